"""Several texts in one pass: each the text it would be alone, to the bit, with its beginning held once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import _edge
import pytest

import edge
from edge import host
from edge.errors import ArgumentError, BudgetError, ContextOverflowError, DiskError
from tests.tiny import tiny_gguf, tiny_hf, tiny_llama_gguf

CONTEXT = 512
SHARED = [1, 17, 5, 99, 42, 7, 63, 120, 3, 8, 21] * 7  # more than a page of 64 tokens
PROMPTS = [[*SHARED, 9], [*SHARED, 30, 31, 32], SHARED, [*SHARED, 9, 77]]
SETTINGS = {"max_tokens": 20, "ignore_eos": True, "speculation": "off", "logprobs": 2, "seed": 11}


@pytest.fixture(autouse=True, scope="module")
def steady() -> Iterator[None]:
    """What this process holds depends on the tests that ran before; budgets must not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "rss_bytes", lambda: 0)
        patch.setattr(host, "peak_rss_bytes", lambda: 0)
        yield


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("batch")
    long = {"max_position_embeddings": 1024}
    sources = {
        "dense": tiny_llama_gguf(folder / "dense.gguf", type="q8_0", seed=5, num_hidden_layers=4, **long),
        "moe": tiny_gguf(folder / "moe.gguf", "mixtral", "q8_0", seed=3, **long),
        "window": tiny_hf(folder / "window", "mistral", sliding_window=40, **long),
        "neurons": tiny_hf(folder / "opt", "opt", ffn_dim=1024, num_hidden_layers=3, **long),
    }
    for name, source in sources.items():
        options = {"weights": "q8", "neurons": "on"} if name == "neurons" else {}
        edge.pack(source, folder / f"{name}.edge", **options)
    return {name: folder / f"{name}.edge" for name in sources}


def load(path: Path, fraction: float = 1.0, **options: object) -> edge.Engine:
    memory: int | str = "1GiB"
    if fraction < 1.0:
        with pytest.raises(BudgetError) as refusal:
            edge.load(path, memory=1, context=CONTEXT, threads=2)
        memory = int(refusal.value.floor_bytes + fraction * path.stat().st_size)
    return edge.load(path, memory=memory, **{"context": CONTEXT, "threads": 2, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine(packs: dict[str, Path]) -> Iterator[edge.Engine]:
    with load(packs["dense"]) as loaded:
        yield loaded


def alone(engine: edge.Engine, prompts: list[list[int]], **settings: object) -> list[edge.Completion]:
    wanted = {**SETTINGS, **settings}
    seed = wanted.pop("seed")
    return [engine.generate(ids, seed=seed + i, **wanted) for i, ids in enumerate(prompts)]


def check_equal(found: list[edge.Completion], expected: list[edge.Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens and one.text == other.text
        assert one.finish_reason == other.finish_reason and one.logprobs == other.logprobs


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("fraction", [1.0, 0.0])
@pytest.mark.parametrize("name", ["dense", "moe", "window", "neurons"])
def test_the_texts_are_those_of_single_requests(
    name: str, fraction: float, temperature: float, packs: dict[str, Path]
) -> None:
    with load(packs[name], fraction) as engine:
        assert (engine.plan.placement == "resident") == (fraction == 1.0)
        together = engine.generate_many(PROMPTS, temperature=temperature, **SETTINGS)
        check_equal(together, alone(engine, PROMPTS, temperature=temperature))


def test_samples_of_one_prompt_differ_by_their_seeds(engine: edge.Engine) -> None:
    together = engine.generate_many([SHARED] * 5, temperature=1.5, top_k=0, **SETTINGS)
    check_equal(together, alone(engine, [SHARED] * 5, temperature=1.5, top_k=0))
    assert len({tuple(one.tokens) for one in together}) == 5
    assert [one.stats["seed"] for one in together] == [11, 12, 13, 14, 15]


@pytest.mark.parametrize("max_parallel", [1, 2, 3])
def test_no_text_depends_on_how_many_run_at_once(max_parallel: int, engine: edge.Engine) -> None:
    together = engine.generate_many(PROMPTS, temperature=0.9, max_parallel=max_parallel, **SETTINGS)
    check_equal(together, alone(engine, PROMPTS, temperature=0.9))


def test_the_common_beginning_is_computed_once(engine: edge.Engine) -> None:
    engine.generate([2, 4], max_tokens=1)  # nothing of it is left from before
    together = engine.generate_many(PROMPTS, temperature=0, **SETTINGS)
    assert [one.stats["reused_tokens"] for one in together] == [len(SHARED) - 1] * 4
    assert [one.stats["prompt_tokens"] for one in together] == [len(ids) for ids in PROMPTS]


def test_texts_wait_for_room(packs: dict[str, Path]) -> None:
    """Seven texts of three pages each in a context of six: two run, the others follow as those end."""
    prompts = [[1 + i, *SHARED, i] for i in range(7)]
    with load(packs["dense"], context=384) as engine:
        running: set[int] = set()
        most = 0
        for chunk in engine.stream_many(prompts, temperature=0, **{**SETTINGS, "max_tokens": 60}):
            running.add(chunk.index)
            most = max(most, len(running))
            if chunk.finish_reason:
                running.remove(chunk.index)
        assert most == 2
        found = engine.generate_many(prompts, temperature=0, **{**SETTINGS, "max_tokens": 60})
        check_equal(found, alone(engine, prompts, temperature=0, max_tokens=60))


def test_all_pages_come_back(packs: dict[str, Path]) -> None:
    with load(packs["dense"], context=256) as engine:
        for _ in range(3):
            engine.generate_many([SHARED] * 4, temperature=0, **SETTINGS)
            stream = engine.stream_many([SHARED] * 4, temperature=0, **SETTINGS)
            next(stream)
            stream.close()
        assert len(engine.generate(SHARED, max_tokens=256 - len(SHARED), ignore_eos=True).tokens) == 179


def test_without_a_limit_the_texts_share_the_context(packs: dict[str, Path]) -> None:
    with load(packs["dense"], context=256) as engine:
        found = engine.generate_many([[1, 2], [3, 4]], temperature=0, ignore_eos=True, seed=1)
        assert [len(one.tokens) for one in found] == [126, 126]
        assert all(one.finish_reason == "length" for one in found)


def test_each_text_ends_by_itself(engine: edge.Engine) -> None:
    plain = alone(engine, PROMPTS, temperature=0)
    stop = plain[1].text[3:6]
    found = engine.generate_many(PROMPTS, temperature=0, stop=[stop], **SETTINGS)
    check_equal(found, alone(engine, PROMPTS, temperature=0, stop=[stop]))
    assert found[1].finish_reason == "stop"
    nothing = engine.generate_many(PROMPTS, max_tokens=0)
    assert [(one.tokens, one.finish_reason) for one in nothing] == [([], "length")] * 4


def test_keys_and_values_on_a_drive(
    packs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cannot be shared there: the texts come one after the other."""
    monkeypatch.setenv("EDGE_SCRATCH", str(tmp_path))
    with load(packs["dense"], kv="flash") as engine:
        found = engine.generate_many(PROMPTS, temperature=0.9, **SETTINGS)
        check_equal(found, alone(engine, PROMPTS, temperature=0.9))


def test_cancelling_ends_all_of_them(engine: edge.Engine) -> None:
    reasons = {}
    for n, chunk in enumerate(engine.stream_many(PROMPTS, temperature=0, max_parallel=2, **SETTINGS)):
        if n == 4:
            engine.cancel()
        if chunk.finish_reason:
            reasons[chunk.index] = chunk.finish_reason
    assert reasons == dict.fromkeys(range(4), "cancelled")
    check_equal(
        engine.generate_many(PROMPTS, temperature=0, **SETTINGS), alone(engine, PROMPTS, temperature=0)
    )


def test_a_drive_that_fails(packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected: list[edge.Completion] = []
    failed = 0
    for at in (30, 40, 60):
        monkeypatch.setenv("EDGE_IO_FAULT", f"eio@{at}")
        with load(packs["dense"], 0.0) as engine:
            monkeypatch.delenv("EDGE_IO_FAULT")
            found: list[edge.Completion] = []
            while not found:
                try:
                    found = engine.generate_many(PROMPTS, temperature=0, **SETTINGS)
                except DiskError:
                    failed += 1
                assert failed < 20
            expected = expected or alone(engine, PROMPTS, temperature=0)
            check_equal(found, expected)
    assert failed > 0


@pytest.mark.parametrize(
    "prompts, settings, what",
    [
        ([], {}, "prompts"),
        ("one text", {}, "prompts"),
        ([[1]], {"overflow": "shift"}, "overflow"),
        ([[1]], {"speculation": "lookup"}, "speculation"),
        ([[1]], {"max_parallel": 0}, "max_parallel"),
        ([[1]], {"nonsense": 1}, "nonsense"),
    ],
)
def test_requests_that_are_refused(
    engine: edge.Engine, prompts: object, settings: dict[str, object], what: str
) -> None:
    with pytest.raises(ArgumentError, match=what):
        engine.generate_many(prompts, **settings)  # type: ignore[arg-type]


def test_a_text_too_long_for_the_context(engine: edge.Engine) -> None:
    with pytest.raises(ContextOverflowError, match="prompt 1: 3 prompt tokens"):
        engine.generate_many([[1], [1, 2, 3]], max_tokens=CONTEXT - 2)
    with pytest.raises(ContextOverflowError):
        engine.generate_many([[1] * CONTEXT, [1]])


def test_texts_that_begin_alike_may_need_more_pages_than_there_are(packs: dict[str, Path]) -> None:
    """Six tokens fit a context of 64 by far, but not beside the page that holds what all begin with."""
    with (
        load(packs["dense"], context=64) as engine,
        pytest.raises(
            ContextOverflowError,
            match=r"prompt 0: 3 prompt tokens \+ 3 to generate take 2 pages of 64 tokens \(1 for the 2 tokens that all "
            r"prompts begin with\), the context of 64 tokens has 1; raise it",
        ),
    ):
        engine.generate_many([[1, 2, 3], [1, 2, 4]], max_tokens=3)


def test_a_fork_and_its_trunk_go_separate_ways(engine: edge.Engine) -> None:
    """Whoever writes to a shared page first, the other's keys and values stay."""
    core = engine._open_core()
    sampler = _edge.Sampler(edge.GenerationConfig(temperature=0).sampling(1), engine.vocab_size)

    def fresh(ids: list[int]) -> list[int]:
        return engine.generate(ids, max_tokens=8, temperature=0, ignore_eos=True, speculation="off").tokens

    expected = [fresh([*SHARED, 9]), fresh([*SHARED, 30])]
    trunk = _edge.Sequence(core)
    trunk.set_tokens([*SHARED, 9])
    trunk.next(sampler)
    fork = trunk.fork(len(SHARED))
    other = fork.fork(len(SHARED))
    fork.set_tokens([*SHARED, 30])
    found = [trunk.tokens[len(SHARED) + 1 :], []]
    for _ in range(8):
        found[1].append(_edge.step(core, [(fork, sampler, 1)])[0][0][0])
        found[0].append(trunk.next(sampler)[0])
    del trunk
    other.set_tokens([*SHARED, 9])
    again = [_edge.step(core, [(other, sampler, 1)])[0][0][0] for _ in range(8)]
    assert found[0][:8] == expected[0] == again and found[1] == expected[1]


def test_what_a_pass_refuses(engine: edge.Engine) -> None:
    core = engine._open_core()
    sampler = _edge.Sampler(edge.GenerationConfig(temperature=0).sampling(1), engine.vocab_size)
    text = _edge.Sequence(core)
    with pytest.raises(ArgumentError, match="none pending"):
        _edge.step(core, [(text, sampler, 1)])
    text.set_tokens([1, 2])
    with pytest.raises(ArgumentError, match="it twice"):
        _edge.step(core, [(text, sampler, 1), (text, sampler, 1)])
    with pytest.raises(ArgumentError, match="found 0"):
        _edge.step(core, [])
    with pytest.raises(ArgumentError, match=r"fork: expected 0\.\.2 tokens"):
        text.fork(3)


def test_passes_of_a_moment_are_those_of_single_steps(engine: edge.Engine) -> None:
    core = engine._open_core()
    config = edge.GenerationConfig(temperature=0.8)
    prompts, limits = ([1, 2, 3], [4, 5], [6] * 9), (7, 3, 5)

    def lane(number: int) -> tuple[_edge.Sequence, _edge.Sampler, int]:
        text = _edge.Sequence(core)
        text.set_tokens(prompts[number])
        return text, _edge.Sampler(config.sampling(number), engine.vocab_size), limits[number]

    def single(number: int) -> list[int]:
        one = [lane(number)]
        return [_edge.step(core, one)[0][0][0] for _ in range(limits[number])]

    def moment(numbers: range, ends: tuple[int, ...] = ()) -> list[list[int]]:
        drawn = _edge.step(core, [lane(number) for number in numbers], 60_000, ends)
        return [[one[0] for one in of_one] for of_one in drawn]

    expected = [single(number) for number in range(3)]
    assert moment(range(3)) == expected
    end = expected[0][2]
    assert moment(range(1), (end,)) == [expected[0][: expected[0].index(end) + 1]]
