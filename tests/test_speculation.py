"""Guesses change how fast a text comes and nothing else: tokens, log-probabilities, stops, what the engine keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edge
from bench.scripted import adversaries, half_right, wrong
from edge import speculation
from edge.errors import ArgumentError, ContextOverflowError, EdgeError
from tests.speculating import (
    CONTEXT,
    PLACEMENTS,
    chain,
    guessing,
    open_engine,
    oracle,
    with_guesses,
)
from tests.tiny import tiny_hf, tiny_llama_gguf

VOCAB = 320
GREEDY: dict[str, Any] = {"temperature": 0}
DRAWN: dict[str, Any] = {"temperature": 1.3, "top_k": 0, "top_p": 1.0, "seed": 11}
FILTERED: dict[str, Any] = {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 5}
PENALISED: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 50,
    "seed": 3,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.2,
    "penalty_last_n": 12,
    "logit_bias": {7: 2.0, 9: -3.0},
}
SETTINGS = {"greedy": GREEDY, "drawn": DRAWN, "filtered": FILTERED, "penalised": PENALISED}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("speculation")
    dense, mixture = folder / "dense.edge", folder / "mixture.edge"
    edge.pack(tiny_llama_gguf(folder / "m.gguf", type="q8_0", seed=5, num_hidden_layers=5), dense)
    edge.pack(tiny_hf(folder / "moe", "mixtral", seed=6, num_hidden_layers=3), mixture)
    return {"resident": dense, "stream": dense, "experts": mixture}


@pytest.fixture(scope="module")
def engines(packs: dict[str, Path]) -> Iterator[dict[str, edge.Engine]]:
    loaded = {placement: open_engine(packs[placement], placement) for placement in PLACEMENTS}
    yield loaded
    for engine in loaded.values():
        engine.close()


@pytest.fixture
def engine(engines: dict[str, edge.Engine]) -> edge.Engine:
    return engines["resident"]


def sequence_of(engine: edge.Engine) -> list[int]:
    assert engine._sequence is not None
    return list(engine._sequence.tokens)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("sampling", SETTINGS)
def test_no_drafter_changes_the_text(engines: dict[str, edge.Engine], placement: str, sampling: str) -> None:
    engine, settings = engines[placement], SETTINGS[sampling]
    for prompt in ([1, 5, 9], [1, 40, 41, 42, 40, 41]):
        asked = {"max_tokens": 40, "ignore_eos": True, "logprobs": 3, **settings}
        plain = engine.generate(prompt, speculation="off", **asked)
        text = prompt + plain.tokens
        for name, propose in adversaries(text, VOCAB).items():
            found = with_guesses(engine, propose, prompt, **asked)
            assert found.tokens == plain.tokens, name
            assert found.text == plain.text and found.finish_reason == plain.finish_reason
            assert found.logprobs == plain.logprobs, name
            assert sequence_of(engine) == text
        small = {"lookahead_window": 3, "lookahead_n": 3, "lookahead_grams": 2}
        for setting in (
            "auto",
            "lookup",
            {"drafters": "lookup", "depth": 6},
            "lookahead",
            {"depth": 4, **small},
        ):
            found = engine.generate(prompt, speculation=setting, **asked)
            assert (found.tokens, found.logprobs) == (plain.tokens, plain.logprobs)


@pytest.mark.parametrize("depth", [1, 2, 3, 7, 15])
def test_an_oracle_gives_depth_and_one_tokens_a_pass(engine: edge.Engine, depth: int) -> None:
    prompt, n = [1, 5, 9], 1 + 3 * (depth + 1)
    plain = engine.generate(prompt, max_tokens=n, ignore_eos=True, speculation="off", **DRAWN)
    found = with_guesses(
        engine,
        oracle(prompt + plain.tokens + [0] * 16, depth),
        prompt,
        max_tokens=n,
        ignore_eos=True,
        **DRAWN,
    )
    assert found.tokens == plain.tokens
    done = found.stats["speculation"]
    # The first token comes from the prompt's own pass.
    assert (done["passes"], done["plain_passes"], done["tokens_per_pass"]) == (3, 0, depth + 1)
    assert done["drafters"]["callback"]["accepted"] == 3 * depth


def test_what_is_always_wrong_gives_a_token_a_pass(engine: edge.Engine) -> None:
    plain = engine.generate([1, 5], max_tokens=21, ignore_eos=True, speculation="off", **GREEDY)
    found = with_guesses(
        engine, wrong([1, 5, *plain.tokens], 3, VOCAB), [1, 5], max_tokens=21, ignore_eos=True, **GREEDY
    )
    done = found.stats["speculation"]
    assert done["tokens_per_pass"] == 1 and done["drafters"]["callback"]["accepted"] == 0
    assert done["drafters"]["callback"]["tried"] >= 19


@pytest.mark.parametrize("n", range(1, 12))
def test_the_limit_holds_inside_a_draft(engine: edge.Engine, n: int) -> None:
    text = [1, 5, *engine.generate([1, 5], max_tokens=20, ignore_eos=True, speculation="off", **DRAWN).tokens]
    found = with_guesses(engine, oracle(text, 6), [1, 5], max_tokens=n, ignore_eos=True, **DRAWN)
    assert found.tokens == text[2 : 2 + n] and found.finish_reason == "length"
    assert sequence_of(engine) == text[: 2 + n]


def test_an_end_of_text_inside_a_draft_ends_it(engine: edge.Engine) -> None:
    eos = engine.tokenizer.eos_ids[0]
    bias: dict[str, Any] = {**DRAWN, "logit_bias": {eos: 4.0}}
    n_stopped = 0
    for seed in range(8):
        asked = {**bias, "seed": seed, "max_tokens": 30}
        plain = engine.generate([1, 5], speculation="off", **asked)
        kept = sequence_of(engine)
        n_stopped += plain.finish_reason == "stop"
        # Guesses go on after the end of the text as if there were none.
        text = [1, 5, *plain.tokens, *range(20, 40)]
        found = with_guesses(engine, oracle(text, 7), [1, 5], **asked)
        assert (found.tokens, found.text, found.finish_reason) == (
            plain.tokens,
            plain.text,
            plain.finish_reason,
        )
        assert sequence_of(engine) == kept
    assert n_stopped >= 3


def test_a_stop_string_inside_a_draft_ends_it(engine: edge.Engine) -> None:
    whole = engine.generate([1, 5], max_tokens=40, ignore_eos=True, speculation="off", **GREEDY)
    text = [1, 5, *whole.tokens]
    for begin in range(2, len(whole.text) - 4, 3):
        stop = whole.text[begin : begin + 3]
        plain = engine.generate(
            [1, 5], max_tokens=40, ignore_eos=True, speculation="off", stop=stop, **GREEDY
        )
        kept = sequence_of(engine)
        found = with_guesses(
            engine, oracle(text, 6), [1, 5], max_tokens=40, ignore_eos=True, stop=stop, **GREEDY
        )
        assert (found.tokens, found.text, found.finish_reason) == (plain.tokens, plain.text, "stop")
        assert sequence_of(engine) == kept


def test_what_follows_goes_on_from_the_same_state(engine: edge.Engine) -> None:
    """Keys and values kept from drafts are those of the plain run: a second turn reads them."""
    first = engine.generate([1, 5, 9], max_tokens=20, ignore_eos=True, speculation="off", **DRAWN)
    turn = [1, 5, 9, *first.tokens, 30, 31]
    plain = engine.generate(turn, max_tokens=20, ignore_eos=True, speculation="off", logprobs=2, **DRAWN)
    expected = engine.logits(turn)
    with_guesses(engine, half_right(turn, VOCAB), [1, 5, 9], max_tokens=20, ignore_eos=True, **DRAWN)
    found = with_guesses(
        engine,
        half_right(turn + plain.tokens, VOCAB),
        turn,
        max_tokens=20,
        ignore_eos=True,
        logprobs=2,
        **DRAWN,
    )
    # The last token drawn had no pass of its own.
    assert found.stats["reused_tokens"] == len(turn) - 3
    assert (found.tokens, found.logprobs) == (plain.tokens, plain.logprobs)
    assert (engine.logits(turn) == expected).all()


def test_the_context_ends_inside_a_draft(engine: edge.Engine) -> None:
    prompt = [1, *range(10, 30)]
    plain = engine.generate(prompt, ignore_eos=True, speculation="off", **DRAWN)
    assert len(prompt) + len(plain.tokens) == CONTEXT
    text = prompt + plain.tokens + [3] * 20
    found = with_guesses(engine, oracle(text, 9), prompt, ignore_eos=True, **DRAWN)
    assert found.tokens == plain.tokens and found.finish_reason == "length"
    with pytest.raises(ContextOverflowError):
        engine.generate(prompt, max_tokens=CONTEXT, speculation="auto")


def test_a_shifted_context_is_the_plain_one(engine: edge.Engine) -> None:
    asked: dict[str, Any] = {"max_tokens": 230, "ignore_eos": True, "overflow": "shift", **DRAWN}
    plain = engine.generate([1, 5], speculation="off", **asked)
    kept = sequence_of(engine)

    def propose(tokens: list[int], _: int) -> list[tuple[int, int]]:
        # Where the text stands in the whole one is told by its last tokens: the front was dropped.
        for at in range(len(plain.tokens)):
            if plain.tokens[max(0, at - 12) : at] == tokens[-12:]:
                return list(chain(plain.tokens[at : at + 5]))
        return []

    found = with_guesses(engine, propose, [1, 5], **asked)
    assert found.tokens == plain.tokens and sequence_of(engine) == kept
    assert found.stats["speculation"]["tokens_per_pass"] > 2
    assert engine.generate([1, 5], speculation="lookup", **asked).tokens == plain.tokens


def test_a_stream_that_is_dropped_keeps_what_was_read(engine: edge.Engine) -> None:
    plain = engine.generate([1, 5], max_tokens=20, ignore_eos=True, speculation="off", **GREEDY)
    text = [1, 5, *plain.tokens]
    with guessing(oracle(text, 6)):
        stream = engine.stream([1, 5], max_tokens=20, ignore_eos=True, **GREEDY)
        assert [next(stream).token for _ in range(4)] == plain.tokens[:4]
        stream.close()
    assert sequence_of(engine) == text[:6]
    again = engine.generate([1, 5], max_tokens=20, ignore_eos=True, speculation="off", **GREEDY)
    assert again.tokens == plain.tokens


def test_a_drafter_that_fails_ends_the_request(engine: edge.Engine) -> None:
    def fail(tokens: list[int], _: int) -> list[tuple[int, int]]:
        if len(tokens) > 6:
            raise KeyError("no idea")
        return []

    with pytest.raises(KeyError, match="no idea"):
        with_guesses(engine, fail, [1, 5], max_tokens=20, ignore_eos=True, **GREEDY)
    with pytest.raises(EdgeError, match="pairs"):
        with_guesses(engine, lambda tokens, _: "nonsense", [1, 5], max_tokens=20, **GREEDY)  # type: ignore[arg-type, return-value]
    assert len(engine.generate([1, 5], max_tokens=20, ignore_eos=True, **GREEDY).tokens) == 20


def test_look_ups_find_what_repeats(engine: edge.Engine) -> None:
    block = [50, 51, 52, 53, 54, 55, 56, 57]
    # A bias makes the model say one token for ever: a text of period one.
    asked: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "logit_bias": {60: 1000.0}, **GREEDY}
    fixed = {"drafters": "lookup", "depth": 4}
    found = engine.generate([1, *block, *block], speculation=fixed, **asked)
    assert found.tokens == [60] * 40
    assert found.stats["speculation"]["tokens_per_pass"] > 3
    assert found.stats["speculation"]["drafters"]["lookup"]["acceptance"] > 0.6


def test_keys_and_values_on_a_drive(packs: dict[str, Path], engine: edge.Engine) -> None:
    with edge.load(packs["resident"], context=CONTEXT, threads=2, kv="flash") as flash:
        for settings in SETTINGS.values():
            asked: dict[str, Any] = {"max_tokens": 80, "ignore_eos": True, "logprobs": 2, **settings}
            plain = engine.generate([1, 5, 9], speculation="off", **asked)
            found = with_guesses(flash, half_right([1, 5, 9, *plain.tokens], VOCAB), [1, 5, 9], **asked)
            assert (found.tokens, found.logprobs) == (plain.tokens, plain.logprobs)


def test_lookahead_learns_what_the_model_repeats(engine: edge.Engine) -> None:
    asked: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, **GREEDY}
    plain = engine.generate([1, 5], speculation="off", **asked)
    found = engine.generate([1, 5], speculation={"drafters": "lookahead", "lookahead_n": 3}, **asked)
    assert found.tokens == plain.tokens
    done = found.stats["speculation"]
    # A greedy text of a small model soon goes round in circles.
    assert done["tokens_per_pass"] > 1.5 and done["drafters"]["lookahead"]["accepted"] > 10


def test_settings_are_read() -> None:
    assert speculation.parse("off") is None
    assert speculation.parse("auto") == speculation.Speculation()
    assert speculation.parse("lookup") == speculation.Speculation(drafters=("lookup",))
    assert speculation.parse({"drafters": []}) == speculation.Speculation()
    assert speculation.parse({"drafters": ["lookup", "lookup"], "depth": 3}) == speculation.Speculation(
        drafters=("lookup",), depth=3
    )


BAD: list[Any] = [
    "wild",
    "",
    None,
    3,
    True,
    ["lookup"],
    {"drafter": "lookup"},
    {"drafters": "wild"},
    {"drafters": ["lookup", 3]},
    {"acceptance": "always"},
    "draft",
    "medusa",
    {"drafters": 3},
    {"depth": 17},
    {"depth": -1},
    {"depth": True},
    {"max_rows": 1},
    {"max_rows": 1000},
    {"max_rows": "many"},
]


@pytest.mark.parametrize("setting", BAD, ids=str)
def test_nonsense_is_refused_in_one_line(engine: edge.Engine, setting: Any) -> None:
    with pytest.raises(
        ArgumentError, match=r"speculation: .*expected.*found|speculation: unknown"
    ) as refusal:
        engine.generate([1], max_tokens=1, speculation=setting)
    assert "\n" not in str(refusal.value)
