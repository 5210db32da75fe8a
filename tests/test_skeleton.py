"""Skeleton-of-Thought over a real engine: points are the texts of single requests; every way out is a plain answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import edge
from edge import cli as command_line
from edge.completion import Chunk
from edge.config import GenerationConfig
from edge.errors import ArgumentError, ContextOverflowError
from edge.skeleton import SkeletonOfThought, gather, in_order, point_settings
from tests.tiny import tiny_llama_gguf

TITLES = ["Warm sun", "Cold moon", "Far stars"]
QUESTION = "What is in the sky?"
SETTINGS: dict[str, Any] = {"temperature": 0.9, "seed": 5, "max_tokens": 12, "ignore_eos": True}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skeleton")
    source = tiny_llama_gguf(folder / "t.gguf", type="q8_0", seed=5, max_position_embeddings=4096)
    edge.pack(source, folder / "t.edge")
    return folder / "t.edge"


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[edge.Engine]:
    with edge.load(model, memory="1GiB", context=3072, threads=2) as loaded:
        yield loaded


class Scripted(SkeletonOfThought):
    """Its skeleton and router's reply are written here; the rest is the engine's."""

    def __init__(self, engine: edge.Engine, replies: list[str], **options: Any) -> None:
        super().__init__(engine, **options)
        self.replies = replies

    def _short(
        self, tokens: list[int], config: GenerationConfig, n_tokens: int
    ) -> tuple[str, dict[str, Any]]:
        return self.replies.pop(0), {"decode_seconds": 1.0, "generated_tokens": 11}


LIST = " Warm sun\n2. Cold moon\n3. Far stars\n"


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("max_parallel", [1, 2, 10])
def test_points_are_the_texts_of_single_requests(
    engine: edge.Engine, max_parallel: int, template: str | None
) -> None:
    thinker = SkeletonOfThought(engine, max_parallel=max_parallel, template=template)
    found = thinker.answer(QUESTION, skeleton=TITLES, **SETTINGS)
    config = point_settings(GenerationConfig(**SETTINGS), len(TITLES), 96)
    for i, prompt in enumerate(thinker.point_prompts(QUESTION, TITLES)):
        alone = engine.generate(
            prompt, temperature=0.9, seed=5 + i, max_tokens=12, ignore_eos=True, stop=config.stop
        )
        assert found.points[i] == (f"{i + 1}. {TITLES[i]}:" + alone.text).rstrip()
        assert found.stats["skeleton"]["point_tokens"][i] == len(alone.tokens)
    assert found.text == "\n\n".join(found.points)
    assert found.stats["skeleton"]["mode"] == "points"


def test_the_prefix_is_computed_once(engine: edge.Engine) -> None:
    thinker = SkeletonOfThought(engine)
    prompts = thinker.point_prompts(QUESTION, TITLES)
    n_common = next(i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    assert min(map(len, prompts)) - n_common < 30 < n_common
    engine.generate([3, 4], max_tokens=1)
    ends = [c for c in thinker.stream(QUESTION, skeleton=TITLES, **SETTINGS) if c.finish_reason]
    assert [c.stats["reused_tokens"] for c in ends[:2]] == [n_common] * 2
    assert ends[-1].index == -1
    assert ends[-1].stats["reused_tokens"] == 3 * n_common
    assert ends[-1].stats["generated_tokens"] == sum(ends[-1].stats["skeleton"]["point_tokens"])


def test_points_grow_side_by_side(engine: edge.Engine) -> None:
    chunks = list(SkeletonOfThought(engine).stream(QUESTION, skeleton=TITLES, **SETTINGS))
    assert [c.index for c in chunks[:6]] == [0, 1, 2, 0, 1, 2]
    assert [c.text for c in chunks[:3]] == ["1. Warm sun:", "2. Cold moon:", "3. Far stars:"]
    assert sum(c.finish_reason is not None for c in chunks) == 4
    found = gather(iter(chunks))
    shown = "".join(in_order(iter(chunks)))
    assert [part.rstrip() for part in shown.split("\n\n")] == list(found.points)


def test_a_list_the_model_wrote_becomes_the_points(engine: edge.Engine) -> None:
    found = Scripted(engine, [LIST], router="always").answer(QUESTION, **SETTINGS)
    assert found.points == SkeletonOfThought(engine).answer(QUESTION, skeleton=TITLES, **SETTINGS).points
    told = found.stats["skeleton"]
    assert told["titles"] == TITLES and told["why"] == "the router is 'always'"
    assert told["sequential_seconds"] == pytest.approx(0.1 * sum(told["point_tokens"]))


def plain(engine: edge.Engine) -> str:
    return engine.generate(QUESTION, **SETTINGS).text


@pytest.mark.parametrize("reply", ["", " Just one\n", " One\n2. Two\n", "\n\n\n"])
def test_without_a_usable_skeleton_the_answer_is_plain(engine: edge.Engine, reply: str) -> None:
    found = Scripted(engine, [reply], router="always").answer(QUESTION, **SETTINGS)
    assert found.text == plain(engine) and found.points == ()
    assert found.stats["skeleton"]["mode"] == "plain"
    assert "no usable skeleton" in found.stats["skeleton"]["why"]


@pytest.mark.parametrize(
    ("reply", "mode"), [(" A", "points"), ("B.", "plain"), ("C", "plain"), ("eh", "plain")]
)
def test_the_model_as_router(engine: edge.Engine, reply: str, mode: str) -> None:
    found = Scripted(engine, [reply, LIST], router="prompt").answer(QUESTION, **SETTINGS)
    assert found.stats["skeleton"]["mode"] == mode
    assert reply.strip(" .") in found.stats["skeleton"]["why"]


def test_the_classifier_as_router(engine: edge.Engine) -> None:
    thinker = Scripted(engine, [LIST], router="classifier")
    assert thinker.answer("Write a poem about the sky.", **SETTINGS).stats["skeleton"]["mode"] == "plain"
    found = thinker.answer("What are the benefits of sleep?", **SETTINGS)
    assert found.stats["skeleton"]["mode"] == "points" and "%" in found.stats["skeleton"]["why"]


@pytest.mark.parametrize("router", ["never", "prompt", "always"])
def test_a_model_that_writes_noise_still_answers(engine: edge.Engine, router: str) -> None:
    found = SkeletonOfThought(engine, router=router).answer(QUESTION, **SETTINGS)
    assert found.stats["skeleton"]["mode"] == "plain" and found.text == plain(engine)
    assert found.finish_reason == "length"


def test_stop_strings_end_points_and_plain_answers(engine: edge.Engine) -> None:
    free = SkeletonOfThought(engine).answer(QUESTION, skeleton=TITLES, **SETTINGS)
    stop = free.points[1][len("2. Cold moon:") + 2 :][:3]
    found = SkeletonOfThought(engine).answer(QUESTION, skeleton=TITLES, stop=stop, **SETTINGS)
    assert all(stop not in point.split(":", 1)[1] for point in found.points)
    assert len(found.points[1]) < len(free.points[1])
    text = plain(engine)
    cut = SkeletonOfThought(engine, router="never").answer(QUESTION, stop=text[2:5], **SETTINGS)
    assert cut.text == text[: text.find(text[2:5])] and cut.finish_reason == "stop"


def test_cancelled_while_points_grow(engine: edge.Engine) -> None:
    chunks: list[Chunk] = []
    for chunk in SkeletonOfThought(engine).stream(QUESTION, skeleton=TITLES, **SETTINGS):
        chunks.append(chunk)
        if len(chunks) == 8:
            threading.Thread(target=engine.cancel).run()
    found = gather(iter(chunks))
    assert found.finish_reason == "cancelled" and len(found.points) == 3
    assert sum(found.stats["skeleton"]["point_tokens"]) < 36
    assert engine.generate(QUESTION, **SETTINGS).finish_reason == "length"


def test_cancelled_between_phases(engine: edge.Engine) -> None:
    class Cancelling(Scripted):
        def _short(self, *arguments: Any) -> tuple[str, dict[str, Any]]:
            engine.cancel()
            return super()._short(*arguments)

    found = Cancelling(engine, [LIST], router="always").answer(QUESTION, **SETTINGS)
    assert (found.finish_reason, found.text) == ("cancelled", "")
    assert plain(engine)


def test_closed_while_points_grow_and_all_memory_comes_back(model: Path) -> None:
    with edge.load(model, memory="1GiB", context=2048, threads=2) as engine:
        stream = SkeletonOfThought(engine).stream(QUESTION, skeleton=TITLES, **SETTINGS)
        next(stream)
        stream.close()
        first = SkeletonOfThought(engine).stream(QUESTION, skeleton=TITLES, **SETTINGS)
        for _ in range(5):
            next(first)
        engine.cancel()
        assert list(first)[-1].finish_reason == "cancelled"
        tokens = [1] + [5] * 100
        asked = {"max_tokens": 2048 - len(tokens), "ignore_eos": True, "seed": 1}
        assert len(engine.generate(tokens, **asked).tokens) == 2048 - len(tokens)


def test_a_context_with_no_room_for_points(model: Path) -> None:
    prompts_of = SkeletonOfThought.point_prompts
    with edge.load(model, memory="1GiB", context=3072, threads=2) as big:
        n_longest = max(map(len, prompts_of(SkeletonOfThought(big), QUESTION, TITLES)))
    settings = {**SETTINGS, "max_tokens": 30}
    with edge.load(model, memory="1GiB", context=n_longest + 4, threads=2) as engine:
        found = Scripted(engine, [LIST], router="always").answer(QUESTION, **settings)
        assert found.stats["skeleton"]["mode"] == "plain"
        assert "leaves" in found.stats["skeleton"]["why"]
        with pytest.raises(ContextOverflowError, match=r"leaves .* to each of 3 points"):
            SkeletonOfThought(engine).answer(QUESTION, skeleton=TITLES, **settings)
        with pytest.raises(ContextOverflowError):
            SkeletonOfThought(engine).answer("long " * 2 * n_longest, **settings)
    # With room for one at a time they follow each other, and are the same.
    with edge.load(model, memory="1GiB", context=n_longest + 100, threads=2) as engine:
        found = SkeletonOfThought(engine).answer(QUESTION, skeleton=TITLES, **settings)
        config = point_settings(GenerationConfig(**settings), 3, 96)
        one = engine.generate(
            SkeletonOfThought(engine).point_prompts(QUESTION, TITLES)[2],
            **{**settings, "seed": 7, "stop": config.stop},
        )
        assert found.points[2] == ("3. Far stars:" + one.text).rstrip()


@pytest.mark.parametrize(
    ("options", "asked", "message"),
    [
        (
            {"router": "oracle"},
            {},
            "router: expected one of classifier, prompt, always, never, found 'oracle'",
        ),
        ({"point_tokens": 0}, {}, "point_tokens"),
        ({"max_parallel": 0}, {}, "max_parallel"),
        ({}, {"question": "  \n"}, "not empty"),
        ({}, {"question": []}, "at least one message"),
        ({}, {"question": [{"role": "assistant", "content": "Hi"}]}, "user's last message"),
        ({}, {"question": [{"role": "user", "content": "a"}] * 2}, "needs a chat template"),
        ({}, {"skeleton": "abc"}, "skeleton: expected 1 to 10 titles"),
        ({}, {"skeleton": []}, "skeleton"),
        ({}, {"skeleton": ["a"] * 11}, "skeleton"),
        ({}, {"skeleton": ["a\nb"]}, "one line"),
        ({}, {"skeleton": [3]}, "one line"),
        ({}, {"overflow": "shift"}, "overflow"),
        ({}, {"max_token": 3}, "unknown setting max_token"),
    ],
)
def test_what_is_refused(
    engine: edge.Engine, options: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        SkeletonOfThought(engine, **options).answer(**({"question": QUESTION} | asked))


def test_a_conversation_stands_before_every_point(engine: edge.Engine) -> None:
    thinker = SkeletonOfThought(engine, template=TEMPLATE)
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    asked = [*history, {"role": "user", "content": QUESTION}]
    prompt = thinker.point_prompts(asked, TITLES)[2]
    text = engine.tokenizer.decode(prompt)
    assert "Hello" in text and text.endswith("3. Far stars:")
    assert thinker.answer(asked, skeleton=TITLES, **SETTINGS).finish_reason == "length"


def test_texts_in_order() -> None:
    one, two = Chunk("1", index=0), Chunk("2", index=1)
    end_one, end_two = replace(one, finish_reason="stop"), replace(two, finish_reason="stop")
    last = Chunk("", finish_reason="stop", index=-1)
    order = [one, two, two, end_two, one, end_one, last]
    assert list(in_order(iter(order))) == ["1", "1", "1", "\n\n222"]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(command_line.cli, [str(a) for a in arguments], catch_exceptions=False)


LOAD = ("--memory", "1GiB", "--context", 2048, "--threads", 2)


def test_command_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SkeletonOfThought, "_short", lambda self, *a: (LIST, {"decode_seconds": 1.0, "generated_tokens": 9})
    )
    asked = ("run", model, QUESTION, *LOAD, "-n", 8, "--temperature", 0, "--skeleton")
    found = json.loads(run(*asked, "on", "--json").stdout)
    assert found["skeleton"]["mode"] == "points" and len(found["points"]) == 3
    assert found["text"] == "\n\n".join(found["points"]) and found["context"] == 2048
    shown = run(*asked, "on", "--stats")
    assert [p.rstrip() for p in shown.stdout.strip().split("\n\n")] == found["points"]
    assert "points: the router is 'always'" in shown.stderr and "one after the other" in shown.stderr
    poem = run("run", model, "Write a poem.", *LOAD, "-n", 8, "--skeleton", "auto", "--json")
    assert json.loads(poem.stdout)["skeleton"]["mode"] == "plain"


def test_command_line_chat(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATE)
    arguments = ["chat", model, *LOAD, "-n", 8, "--template", template, "--skeleton", "auto", "--json"]
    done = CliRunner().invoke(command_line.cli, [str(a) for a in arguments], input="Write a poem.\nHi\n")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["skeleton"]["mode"] for one in answers] == ["plain", "plain"]


def test_benchmark(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench import skeleton as bench

    options = ["--context", "3072", "--threads", "2", "--points", "3", "--tokens", "6", "--runs", "1"]
    assert bench.main([str(model), *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (found,) = document["results"]
    computed = found["prompt_tokens_computed"]
    assert computed["together"] <= computed["one by one"] < computed["prefix each time"]
    assert set(found["seconds"]) == set(bench.ARMS)
    bench.show(document)
    assert "3 points: together" in " ".join(capsys.readouterr().out.split())
