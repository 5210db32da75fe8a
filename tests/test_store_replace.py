"""A store whose plan changes between passes: the same bytes, less reading, never more memory than the larger budget."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import _edge
import pytest

from flashload.errors import ArgumentError, BudgetError, CorruptError, DiskError
from tests.pack_maker import BYTES, DEMAND, PAGE, RESIDENT, STREAM, small_pack

PACK = small_pack()
N = len(PACK.entries)
WEIGHTS = [i for i, entry in enumerate(PACK.entries) if entry.format != BYTES]
SIZES = {i: len(PACK.entries[i].padded) for i in WEIGHTS}
LARGEST, TOTAL = max(SIZES.values()), sum(SIZES.values())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(PACK.write(tmp_path_factory.mktemp("replace") / "small.edge"))


def plan_of(placements: list[int], spare_bytes: int = 0) -> dict[str, Any]:
    """Everything a store takes, its budget exactly that."""
    order = [i for i in WEIGHTS if placements[i] == STREAM]
    demanded = any(placements[i] == DEMAND for i in WEIGHTS)
    ring_bytes = 2 * LARGEST if order else 0
    demand_bytes = LARGEST + spare_bytes if demanded else 0
    resident_bytes = sum(SIZES[i] for i in WEIGHTS if placements[i] == RESIDENT)
    return {
        "placements": placements,
        "stream_order": order,
        "ring_bytes": ring_bytes,
        "demand_bytes": demand_bytes,
        "budget": resident_bytes + ring_bytes + demand_bytes,
    }


def check_all(store: Any) -> None:
    for weight in WEIGHTS:
        assert store.acquire(weight) == PACK.entries[weight].data, PACK.entries[weight].name


@pytest.mark.parametrize("seed", range(8))
def test_random_plans_one_after_the_other(seed: int, path: str) -> None:
    choose = random.Random(seed)
    plan = plan_of([RESIDENT] * N)
    store = _edge.WeightStoreTest(path, **plan)
    budget = plan["budget"]
    for _ in range(12):
        kinds = choose.choice([[RESIDENT], [RESIDENT, STREAM], [DEMAND], [RESIDENT, DEMAND, STREAM]])
        plan = plan_of([choose.choice(kinds) for _ in range(N)], choose.randrange(8) * 64 * PAGE)
        if choose.random() < 0.7:
            for weight in WEIGHTS[: choose.randrange(len(WEIGHTS))]:
                store.acquire(weight)
        store.replace(**plan)
        # The budget alone decides what is given; were it passed, the plan would have been refused.
        assert sum(store.memory().values()) <= plan["budget"]
        budget = max(budget, plan["budget"])
        assert store.peak_bytes() <= budget
        check_all(store)


def test_what_stays_is_not_read_again(path: str) -> None:
    half = [RESIDENT if i % 2 else STREAM for i in range(N)]
    kept_bytes = sum(SIZES[i] for i in WEIGHTS if half[i] == RESIDENT)
    store = _edge.WeightStoreTest(path, **plan_of([RESIDENT] * N))
    assert store.stats()["load_bytes"] == TOTAL
    store.replace(**plan_of(half))
    assert store.stats()["load_bytes"] == TOTAL and store.stats()["resident_bytes"] == kept_bytes
    check_all(store)
    streamed = store.stats()["flash_bytes"]
    store.replace(**plan_of([RESIDENT] * N))
    assert store.stats()["load_bytes"] == 2 * TOTAL - kept_bytes
    check_all(store)
    # What a part of a former plan read is not forgotten.
    assert store.stats()["flash_bytes"] >= streamed > 0


def test_the_cache_keeps_what_fits(path: str) -> None:
    store = _edge.WeightStoreTest(path, **plan_of([DEMAND] * N, TOTAL))
    check_all(store)
    before = store.stats()
    store.replace(**plan_of([DEMAND] * N, 2 * TOTAL))
    check_all(store)
    assert store.stats()["misses"] == before["misses"]
    store.replace(**plan_of([DEMAND] * N, 0))
    check_all(store)
    assert store.stats()["misses"] > before["misses"]
    assert sum(store.memory().values()) == LARGEST


def test_a_plan_that_is_refused_can_be_replaced(path: str) -> None:
    plan = plan_of([RESIDENT] * N)
    store = _edge.WeightStoreTest(path, **plan)
    with pytest.raises(BudgetError):
        store.replace(**{**plan_of([STREAM] * N), "budget": LARGEST})
    with pytest.raises(ArgumentError, match="not placed"):
        store.acquire(WEIGHTS[0])
    store.replace(**plan)
    check_all(store)
    with pytest.raises(ArgumentError, match="store plan"):
        store.replace(**{**plan, "placements": [STREAM] * N})
    store.replace(**plan)
    check_all(store)


@pytest.mark.parametrize("fault, error", [("eio@{}", DiskError), ("flip@{}:12345", CorruptError)])
def test_a_drive_that_fails_meanwhile(
    fault: str, error: type[Exception], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was held stays held, and the next attempt reads the rest."""
    half = [RESIDENT if i % 2 else STREAM for i in range(N)]
    store = _edge.WeightStoreTest(path, **plan_of(half))
    failed = 0
    for at in range(3):
        monkeypatch.setenv("EDGE_IO_FAULT", fault.format(at))
        try:
            store.replace(**plan_of([RESIDENT] * N))
        except error as found:
            assert "\n" not in str(found)
            failed += 1
        monkeypatch.delenv("EDGE_IO_FAULT")
        store.replace(**plan_of([RESIDENT] * N))
        check_all(store)
        store.replace(**plan_of(half))
        check_all(store)
    assert failed > 0
