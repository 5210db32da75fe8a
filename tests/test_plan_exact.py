"""The allocator in dry-run is the estimator: each part of a plan is what the engine then holds, to the byte."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import _edge
import pytest

from flashload.errors import BudgetError
from flashload.format import PackFile
from flashload.pack import pack
from flashload.plan import Plan, make_plan, weights_of
from tests.neuron_packs import by_neuron, tiny_relu
from tests.tiny import tiny_gguf, tiny_hf, tiny_llama_gguf

CONTEXT = 512
PROMPT = [1 + (i * 37) % 250 for i in range(300)]
#: Of the way from the floor to everything in memory.
SHARES = (0.0, 0.5, 1.0)
MODELS = ("dense", "tied", "moe", "fine_moe", "sparse", "guessed")
#: The parts of a plan, by the tag their memory has in the core.
PARTS = {
    "weights": "resident_bytes",
    "stream ring": "ring_bytes",
    "demand cache": "demand_bytes",
    "neurons": "neuron_bytes",
    "neuron staging": "neuron_staging_bytes",
    "kv cache": "kv_bytes",
}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exact")
    long = {"max_position_embeddings": 1024}
    sources = {
        "dense": tiny_llama_gguf(folder / "dense.gguf", type="q4_0", num_hidden_layers=5, **long),
        "tied": tiny_hf(folder / "tied", "llama", tie_word_embeddings=True, num_hidden_layers=3, **long),
        "moe": tiny_gguf(folder / "moe.gguf", "mixtral", "q8_0", **long),
        "fine_moe": tiny_hf(folder / "fine_moe", "qwen3_moe", num_experts=32, num_hidden_layers=4, **long),
    }
    made = {name: folder / f"{name}.edge" for name in MODELS}
    for name, source in sources.items():
        pack(source, made[name])
    dense = tiny_relu(folder, num_hidden_layers=3, intermediate_size=1024, **long)
    by_neuron(dense, made["sparse"], "q4")
    by_neuron(dense, made["guessed"], "q8", rank=16)
    return made


def planner(path: Path, kv: str) -> Any:
    with PackFile(path) as file:
        weights, decoder = weights_of(file), file.config.to_json()

    def plan(memory_bytes: int) -> Plan:
        return make_plan(
            weights, decoder, memory_bytes=memory_bytes, context=CONTEXT, threads=2, host_bytes=1 << 20, kv=kv
        )

    return plan, decoder


def budgets(plan: Any) -> list[int]:
    with pytest.raises(BudgetError) as refusal:
        plan(1)
    floor, full = refusal.value.floor_bytes, plan(1 << 34).predicted_peak_bytes
    return [int(floor + share * max(0, full - floor)) for share in SHARES]


@pytest.mark.parametrize("kv", ["memory", "flash"])
@pytest.mark.parametrize("name", MODELS)
def test_every_part_is_what_the_engine_holds(
    name: str, kv: str, packs: dict[str, Path], tmp_path: Path
) -> None:
    plan, decoder = planner(packs[name], kv)
    seen = set()
    for memory_bytes in budgets(plan):
        placed = plan(memory_bytes)
        engine = _edge.Engine(placed.engine_options(packs[name], decoder, scratch=tmp_path))
        sequence = _edge.Sequence(engine)
        sequence.set_tokens(PROMPT)
        sampler = _edge.Sampler({"temperature": 0.8, "seed": 1}, decoder["vocab_size"])
        for _ in range(4):
            sequence.next(sampler)
        held = dict(engine.stats()["by_tag"])
        seen.add(placed.placement)
        for tag, part in PARTS.items():
            assert held.pop(tag, 0) == getattr(placed, part), (tag, placed)
        working = sum(held.pop(tag, 0) for tag in ("activations", "attention", "attention scores", "logits"))
        assert working == placed.activation_bytes
        assert sum(held.values()) <= placed.slack_bytes, held
        assert placed.predicted_peak_bytes == placed.host_bytes + placed.core_bytes <= memory_bytes
    assert len(seen) > 1


def by_slots(path: Path) -> tuple[dict[int, Plan], int, int]:
    """(slots -> a plan that has so many, bytes of the largest expert, bytes for rows of the embedding)."""
    plan, _ = planner(path, "memory")
    with PackFile(path) as file:
        experts = [w for w in weights_of(file) if w.expert >= 0]
    records: Counter[tuple[int, int]] = Counter()
    for w in experts:
        records[w.layer, w.expert] += w.stored_bytes
    largest, rows = max(records.values()), set()
    low, _, full = budgets(plan)
    found: dict[int, Plan] = {}
    for memory_bytes in range(low, full, 4096):
        placed = plan(memory_bytes)
        if placed.placement == "experts":
            rows.add(placed.demand_bytes - placed.expert_slots * largest)
            found.setdefault(placed.expert_slots, placed)
    assert len(rows) == 1 and set(found) <= set(range(2, len(records) + 1))
    return found, largest, rows.pop()


@pytest.mark.parametrize("name", ["moe", "fine_moe"])
def test_a_cache_is_whole_experts_and_room_for_rows(name: str, packs: dict[str, Path]) -> None:
    found, _, rows = by_slots(packs[name])
    assert len(found) > 2 and rows > 0
    assert list(found) == sorted(found)  # by budget


def test_the_cache_keeps_as_many_experts_as_it_says(packs: dict[str, Path], tmp_path: Path) -> None:
    """Of the same prompt twice the second reads what has no slot; more may lie where no rows are being read."""
    _, decoder = planner(packs["moe"], "memory")
    found, largest, rows = by_slots(packs["moe"])
    for slots, placed in found.items():
        options = placed.engine_options(packs["moe"], decoder, scratch=tmp_path)
        engine = _edge.Engine({**options, "fill_experts": False})
        read = []
        for _ in range(2):
            before = engine.stats()
            sequence = _edge.Sequence(engine)
            sequence.set_tokens(PROMPT[: placed.max_rows])
            sequence.logits()
            read.append(engine.stats()["flash_bytes"] - before["flash_bytes"])
        assert slots <= (read[0] - read[1]) / largest <= slots + rows / largest
