"""The Python API: one request after the other, exact, cancellable, inside its budget."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _edge
import numpy as np
import pytest

import edge
from edge.errors import (
    ArgumentError,
    BudgetError,
    ContextOverflowError,
    EdgeError,
    TemplateError,
)
from flashload.format import PackFile
from tests.oracle import Oracle
from tests.tiny import tiny_hf, tiny_llama_gguf

VECTOR, BLOB = 100, 101


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    destination = folder / "m.edge"
    edge.pack(tiny_llama_gguf(folder / "m.gguf", type="q8_0", seed=5), destination)
    return destination


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[edge.Engine]:
    with edge.load(model, context=64, threads=2) as loaded:
        yield loaded


def oracle_of(path: Path) -> Oracle:
    pack = PackFile(path)
    weights = {}
    for name, entry in pack.entries.items():
        if int(entry.format) == BLOB:
            continue
        data = pack.read(name)
        weights[name] = (
            np.frombuffer(data, "<f4")
            if int(entry.format) == VECTOR
            else _edge.untile_rows(int(entry.format), data, entry.rows, entry.cols)
        )
    return Oracle(pack.config.to_json(), weights)


def test_logits_match_the_oracle(tmp_path: Path) -> None:
    path = tmp_path / "m.edge"
    edge.pack(tiny_hf(tmp_path / "hf", "llama", seed=2), path)
    tokens = list(range(1, 33))
    expected = oracle_of(path).logits(tokens)[-1]
    with edge.load(path, context=64, threads=1) as engine:
        found = engine.logits(tokens)
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def test_quantised_logits_stay_near_the_oracle(model: Path, engine: edge.Engine) -> None:
    tokens = list(range(1, 33))
    expected = oracle_of(model).logits(tokens)[-1]
    # Activations carry eight bits: about half a percent of noise for each product.
    assert np.abs(engine.logits(tokens) - expected).max() <= 0.05 * np.abs(expected).max()


def test_generate_stream_and_tokens_agree(engine: edge.Engine) -> None:
    whole = engine.generate([1, 5, 9], max_tokens=20, temperature=0, ignore_eos=True)
    chunks = list(engine.stream([1, 5, 9], max_tokens=20, temperature=0, ignore_eos=True))
    assert [c.token for c in chunks[:-1]] == whole.tokens
    assert (
        "".join(c.text for c in chunks) == whole.text == engine.tokenizer.decode(whole.tokens, continues=True)
    )
    assert whole.finish_reason == chunks[-1].finish_reason == "length"
    assert whole.stats["generated_tokens"] == len(whole.tokens) == 20


def test_the_seed_decides_the_text(engine: edge.Engine) -> None:
    def run(seed: int) -> list[int]:
        return engine.generate([1, 5], max_tokens=24, temperature=1.5, top_k=0, top_p=1.0, seed=seed).tokens

    assert run(7) == run(7)
    assert len({tuple(run(seed)) for seed in range(4)}) == 4


def test_a_kept_prefix_changes_nothing(engine: edge.Engine) -> None:
    fresh = engine.generate([1, 30, 31, 32], max_tokens=8, temperature=0, ignore_eos=True)
    engine.generate([1, 30, 31, 40, 41], max_tokens=8, temperature=0, ignore_eos=True)
    again = engine.generate([1, 30, 31, 32], max_tokens=8, temperature=0, ignore_eos=True)
    assert again.stats["reused_tokens"] == 3
    assert again.tokens == fresh.tokens


def test_score_is_the_log_softmax_of_the_logits(engine: edge.Engine) -> None:
    tokens = [1, 4, 80, 33, 7, 99]
    scores = engine.score(tokens)
    assert scores[0] is None
    for i, score in enumerate(scores[1:], 1):
        logits = engine.logits(tokens[:i]).astype(np.float64)
        expected = logits[tokens[i]] - (np.log(np.exp(logits - logits.max()).sum()) + logits.max())
        assert score == pytest.approx(expected, abs=1e-9)


def test_logprobs(engine: edge.Engine) -> None:
    done = engine.generate([1, 4], max_tokens=3, temperature=0, ignore_eos=True, logprobs=4)
    assert done.logprobs is not None and len(done.logprobs) == 3
    for item in done.logprobs:
        assert len(item.top) == 4 and item.token == item.top[0][0]
        assert item.logprob == pytest.approx(item.top[0][1])
    assert engine.generate([1, 4], max_tokens=3, temperature=0).logprobs is None


def test_stop_strings_end_the_text_before_them(engine: edge.Engine) -> None:
    text = engine.generate([1, 5], max_tokens=30, temperature=0, ignore_eos=True).text
    stop = text[6:9]
    cut = engine.generate([1, 5], max_tokens=30, temperature=0, ignore_eos=True, stop=[stop])
    assert cut.finish_reason == "stop"
    assert cut.text == text[: text.find(stop)]


def test_cancel_from_another_thread(engine: edge.Engine) -> None:
    done: list[edge.Completion] = []
    started = threading.Event()

    def run() -> None:
        pieces = engine.stream([1], max_tokens=10**9, temperature=0, ignore_eos=True, overflow="shift")
        first = next(pieces)
        started.set()
        time.sleep(0.05)
        rest = list(pieces)
        done.append(edge.Completion(first.text, [first.token or 0], rest[-1].finish_reason or "", {}))

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)
    engine.cancel()
    thread.join(60)
    assert not thread.is_alive()
    assert done[0].finish_reason == "cancelled"
    assert engine.generate([1], max_tokens=2, ignore_eos=True).finish_reason == "length"


def test_requests_from_many_threads_are_served_in_turn(engine: edge.Engine) -> None:
    expected = {
        n: engine.generate([1, n], max_tokens=6, temperature=0, ignore_eos=True).tokens for n in range(3, 9)
    }
    found: dict[int, list[int]] = {}

    def run(n: int) -> None:
        found[n] = engine.generate([1, n], max_tokens=6, temperature=0, ignore_eos=True).tokens

    threads = [threading.Thread(target=run, args=(n,)) for n in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected


def test_context_overflow_names_both_numbers(engine: edge.Engine) -> None:
    with pytest.raises(
        ContextOverflowError, match=r"10 prompt tokens \+ 60 to generate exceed the context of 64"
    ):
        engine.generate(list(range(1, 11)), max_tokens=60)
    with pytest.raises(ContextOverflowError, match="70 prompt tokens"):
        engine.generate(list(range(1, 71)))


def test_overflow_shift_goes_on(engine: edge.Engine) -> None:
    done = engine.generate([1, 2, 3], max_tokens=100, temperature=0, ignore_eos=True, overflow="shift")
    assert len(done.tokens) == 100


def test_without_a_limit_the_context_is_the_limit(engine: edge.Engine) -> None:
    done = engine.generate([1, 2, 3], temperature=0, ignore_eos=True)
    assert len(done.tokens) == 61 and done.finish_reason == "length"


BAD_SETTINGS: list[dict[str, Any]] = [
    {"temperature": -1.0},
    {"temperature": math.nan},
    {"top_p": 0.0},
    {"top_p": 1.5},
    {"top_k": -1},
    {"min_p": 2.0},
    {"typical_p": 0.0},
    {"repetition_penalty": 0.0},
    {"presence_penalty": math.inf},
    {"max_tokens": -1},
    {"max_tokens": True},
    {"seed": -1},
    {"logprobs": 1000},
    {"stop": [""]},
    {"stop": [3]},
    {"logit_bias": {1: math.nan}},
    {"logit_bias": {-1: 1.0}},
    {"overflow": "forget"},
    {"speculation": "wild"},
    {"colour": "blue"},
]


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=str)
def test_nonsense_settings_are_refused_by_name(engine: edge.Engine, settings: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(settings))):
        engine.generate([1], **settings)


@pytest.mark.parametrize("prompt", [3, None, [1, "a"], [1.5], [True], [-1], [10**6]], ids=str)
def test_nonsense_prompts_are_refused(engine: edge.Engine, prompt: Any) -> None:
    with pytest.raises(ArgumentError, match="prompt"):
        engine.generate(prompt, max_tokens=1)


def test_a_model_without_template_says_so(engine: edge.Engine) -> None:
    with pytest.raises(TemplateError, match="template"):
        engine.chat([{"role": "user", "content": "hello"}], max_tokens=2)


def test_too_small_a_budget_names_the_floor(model: Path) -> None:
    with pytest.raises(BudgetError, match="needs at least") as refusal:
        edge.load(model, memory="1MiB", context=64)
    floor = refusal.value.floor_bytes
    assert floor > 1 << 20
    assert str(floor) in str(refusal.value)
    plan = edge.plan(model, memory="1GiB", context=64)
    assert plan.placement == "resident" and plan.predicted_peak_bytes < 1 << 30


@pytest.mark.parametrize("memory", ["lots", "-3", 0, "1EiB", None.__class__, 1.5], ids=str)
def test_nonsense_memory_is_refused(model: Path, memory: Any) -> None:
    with pytest.raises(ArgumentError, match="memory"):
        edge.load(model, memory=memory)


@pytest.mark.parametrize(
    "options",
    [{"context": 0}, {"threads": 0}, {"device": "abacus"}, {"isa": "sse9"}, {"io": "tape"}],
    ids=str,
)
def test_nonsense_load_options_are_refused(model: Path, options: dict[str, Any]) -> None:
    with pytest.raises(EdgeError):
        edge.load(model, **options)


def test_a_closed_engine_says_so(model: Path) -> None:
    engine = edge.load(model, context=32)
    engine.close()
    engine.close()
    with pytest.raises(EdgeError, match="closed"):
        engine.generate([1], max_tokens=1)


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ArgumentError, match="no-such-model"):
        edge.load("no-such-model")


def test_every_block_is_counted(engine: edge.Engine) -> None:
    stats = engine.stats()
    assert sum(stats["by_tag"].values()) == stats["used_bytes"] <= stats["budget_bytes"]
