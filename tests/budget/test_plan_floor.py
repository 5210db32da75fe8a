"""The floor, to the page: accepted at it, refused one page below, and nothing reserved beyond the plan."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import _edge
import pytest

from flashload.errors import BudgetError
from flashload.format import PackFile
from flashload.pack import pack
from flashload.plan import Plan, make_plan, weights_of
from tests.tiny import tiny_gguf, tiny_hf, tiny_llama_gguf

PAGE = 4096
MODELS = ("dense", "tied", "moe", "opt", "f16")
CONTEXTS = (1, 64, 128)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("floor")
    sources = {
        "dense": tiny_llama_gguf(folder / "dense.gguf", type="q4_0", num_hidden_layers=5),
        "tied": tiny_hf(folder / "tied", "llama", tie_word_embeddings=True, num_hidden_layers=3),
        "moe": tiny_gguf(folder / "moe.gguf", "olmoe", "q8_0"),
        "opt": tiny_hf(folder / "opt", "opt"),
        "f16": tiny_llama_gguf(folder / "f16.gguf", type="f16", vocab_size=2000),
    }
    for name, source in sources.items():
        pack(source, folder / f"{name}.edge")
    return {name: folder / f"{name}.edge" for name in sources}


class Planner:
    def __init__(self, path: Path, context: int, host_bytes: int = 0) -> None:
        self.path = path
        with PackFile(path) as file:
            self._weights, self.decoder = weights_of(file), file.config.to_json()
        self._arguments: dict[str, Any] = {"context": context, "threads": 2, "host_bytes": host_bytes}

    def __call__(self, memory_bytes: int, **more: Any) -> Plan:
        return make_plan(self._weights, self.decoder, memory_bytes=memory_bytes, **self._arguments, **more)

    def floor(self) -> int:
        with pytest.raises(BudgetError) as refusal:
            self(1)
        return int(refusal.value.floor_bytes)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", MODELS)
def test_accepted_at_the_floor_and_refused_a_page_below(
    name: str, context: int, packs: dict[str, Path]
) -> None:
    plan = Planner(packs[name], context, host_bytes=50 << 20)
    floor = plan.floor()
    chosen = plan(floor)
    assert chosen.predicted_peak_bytes <= floor == chosen.floor_bytes
    with pytest.raises(BudgetError, match=str(floor)) as refusal:
        plan(floor - PAGE)
    assert refusal.value.floor_bytes == floor


@pytest.mark.parametrize("name", MODELS)
def test_every_budget_above_the_floor_is_accepted(name: str, packs: dict[str, Path]) -> None:
    plan = Planner(packs[name], 64)
    floor, full = plan.floor(), plan(1 << 34).predicted_peak_bytes
    step = max(PAGE, (full - floor) // 60 // PAGE * PAGE)
    for memory in range(floor, full + 2 * step, step):
        chosen = plan(memory)
        assert chosen.predicted_peak_bytes <= memory
        assert chosen.floor_bytes == floor
    assert plan(full).placement == "resident"


@pytest.mark.parametrize("name", MODELS)
def test_the_core_runs_in_what_the_plan_gives_it(name: str, packs: dict[str, Path]) -> None:
    """From the floor up the core never asks for a page more than the plan reserved, and answers the same."""
    plan = Planner(packs[name], 64)
    floor, full = plan.floor(), plan(1 << 34).predicted_peak_bytes
    answers = set()
    for part in range(9):
        chosen = plan(floor + part * max(0, full - floor) // 8)
        engine = _edge.Engine(chosen.engine_options(plan.path, plan.decoder, threads=2))
        sequence = _edge.Sequence(engine)
        sequence.set_tokens([1 + i % 300 for i in range(40)])
        sampler = _edge.Sampler({"temperature": 0.0}, plan.decoder["vocab_size"])
        answers.add(tuple(sequence.next(sampler)[0] for _ in range(24)))  # the context is full now
        assert engine.stats()["peak_bytes"] <= chosen.core_bytes
    assert len(answers) == 1


def test_a_longer_context_has_a_higher_floor(packs: dict[str, Path]) -> None:
    floors = [Planner(packs["dense"], context).floor() for context in (64, 4096, 65536)]
    assert all(a < b for a, b in itertools.pairwise(floors))


def test_what_was_held_before_counts(packs: dict[str, Path]) -> None:
    plan = Planner(packs["dense"], 64)
    floor = plan.floor()
    with pytest.raises(BudgetError, match=str(floor + PAGE)):
        plan(floor, host_peak_bytes=floor + PAGE)
    assert plan(floor + PAGE, host_peak_bytes=floor + PAGE).floor_bytes == floor + PAGE
