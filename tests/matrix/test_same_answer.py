"""One model, one prompt, one answer: budgets (and so placements) x ISAs x threads x chunk sizes, bit for bit."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import _edge
import pytest

from flashload.format import PackFile
from flashload.pack import pack
from flashload.plan import Plan, make_plan, weights_of
from tests.neuron_packs import by_neuron, tiny_relu
from tests.tiny import tiny_gguf, tiny_llama_gguf

FORMATS = ("f32", "f16", "q8_0", "q4_0", "q4_k", "moe", "neurons")
#: How much of the way from the floor to a fully resident model the budget goes.
BUDGETS = {"resident": 1.0, "75%": 0.75, "40%": 0.4, "floor": 0.0}
ISAS = tuple(isa["name"] for isa in _edge.isas() if isa["available"])
THREADS = (1, 2, 3)
PROMPT = [1, 17, 5, 99, 42, 7, 63, 120, 3, 8, 21]
N_TOKENS = 16


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("matrix")
    paths = {}
    for name in FORMATS:
        source = folder / f"{name}.gguf"
        if name == "neurons":
            paths[name] = by_neuron(
                tiny_relu(folder, "llama", 3, num_hidden_layers=4), folder / "n.edge", "q8", rank=32
            )
            continue
        if name == "moe":
            tiny_gguf(source, "mixtral", "q8_0", seed=3)
        else:
            tiny_llama_gguf(source, type=name, seed=3, num_hidden_layers=4)
        paths[name] = folder / f"{name}.edge"
        pack(source, paths[name])
    return paths


def plan_for(path: Path, budget: str, threads: int) -> tuple[dict[str, Any], Plan]:
    file = PackFile(path)
    try:
        weights, decoder = weights_of(file), file.config.to_json()
    finally:
        file.close()
    arguments: dict[str, Any] = {"context": 64, "threads": threads, "host_bytes": 0}
    arguments["predictor"] = False  # what changes an answer
    full = make_plan(weights, decoder, memory_bytes=1 << 34, **arguments)
    needed = full.predicted_peak_bytes
    least = make_plan(weights, decoder, memory_bytes=needed, **arguments).floor_bytes
    fraction = BUDGETS[budget]
    if fraction == 1.0:
        return decoder, full
    return decoder, make_plan(
        weights, decoder, memory_bytes=int(least + fraction * max(0, needed - least - 1)), **arguments
    )


def greedy(
    path: Path, decoder: dict[str, Any], plan: Plan, isa: str, max_rows: int
) -> tuple[list[int], list[float]]:
    options = plan.engine_options(
        path, decoder, isa=isa, max_rows=max_rows, budget_bytes=plan.core_bytes + (1 << 20)
    )
    engine = _edge.Engine(options)
    sequence = _edge.Sequence(engine)
    sequence.set_tokens(PROMPT)
    sampler = _edge.Sampler({"temperature": 0.0}, decoder["vocab_size"])
    tokens, logprobs = [], []
    for _ in range(N_TOKENS):
        token, logprob, _ = sequence.next(sampler)
        tokens.append(token)
        logprobs.append(logprob)
    return tokens, logprobs


@cache
def reference(path: Path) -> tuple[tuple[int, ...], tuple[float, ...]]:
    decoder, plan = plan_for(path, "resident", 1)
    tokens, logprobs = greedy(path, decoder, plan, "ref", 1)
    return tuple(tokens), tuple(logprobs)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", FORMATS)
def test_same_tokens(packs: dict[str, Path], name: str, budget: str, isa: str, threads: int) -> None:
    path = packs[name]
    decoder, plan = plan_for(path, budget, threads)
    if budget == "resident":
        assert plan.placement == "resident"
    elif budget == "floor":
        assert plan.stream_bytes > 0 or plan.placement == "experts"
    expected_tokens, expected_logprobs = reference(path)
    for max_rows in (1, 4, 128) if threads == 2 else (128,):
        tokens, logprobs = greedy(path, decoder, plan, isa, min(max_rows, plan.max_rows))
        assert tuple(tokens) == expected_tokens
        assert tuple(logprobs) == expected_logprobs  # not merely close: the same bits


def test_the_matrix_has_at_least_200_cells() -> None:
    if len(ISAS) < 3:
        pytest.skip(f"this machine runs only {', '.join(ISAS)}")
    assert len(FORMATS) * len(BUDGETS) * len(ISAS) * len(THREADS) >= 200


def test_answers_differ_between_models(packs: dict[str, Path]) -> None:
    assert len({reference(path)[0] for path in packs.values()}) > 1


def test_scoring_reads_no_more_than_one_prompt_chunk(packs: dict[str, Path]) -> None:
    decoder, plan = plan_for(packs["q8_0"], "floor", 1)
    tokens = list(range(1, plan.context + 1))
    read_bytes = []
    for scored in (False, True):
        engine = _edge.Engine(
            plan.engine_options(
                packs["q8_0"],
                decoder,
                isa="ref",
                max_rows=plan.context,
                budget_bytes=plan.core_bytes + (1 << 20),
            )
        )
        sequence = _edge.Sequence(engine)
        if scored:
            sequence.score(tokens)
        else:
            sequence.set_tokens(tokens)
            sequence.advance()
        read_bytes.append(engine.stats()["flash_bytes"])
    # Either may have read ahead by what the ring holds.
    assert abs(read_bytes[1] - read_bytes[0]) <= plan.ring_bytes
