"""Failing drives and damaged files under every placement: a typed error or the right bytes, and no hang."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from flashload.errors import CorruptError, DiskError, EdgeError
from tests.pack_maker import DEMAND, PAGE, RESIDENT, STREAM
from tests.test_store import EMBED, LARGEST, PACK, WEIGHTS, N, check_all, open_store, path, rows_of

__all__ = ["path"]  # the fixture

FAULTS = ["eio@{}", "short@{}", "zero@{}", "flip@{}:12345", "again@{}", "delay@{}:3"]


def acquire_or_error(store: Any, weight: int, errors: list[EdgeError], rows: list[int] | None = None) -> None:
    try:
        found = store.acquire(weight, rows or [])
    except (DiskError, CorruptError) as error:
        errors.append(error)
    else:
        assert found == (rows_of(weight, rows) if rows else PACK.entries[weight].data)


@pytest.mark.parametrize("fault", FAULTS)
def test_resident_with_a_fault_at_every_read(fault: str, path: str) -> None:
    for at in range(6):
        try:
            store = open_store(path, RESIDENT, fault=fault.format(at), depth=2)
        except (DiskError, CorruptError) as error:
            assert fault[:4] in ("eio@", "zero", "flip", "shor"), error
        else:
            check_all(store)
    check_all(open_store(path, RESIDENT))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("placement", [STREAM, DEMAND])
def test_a_fault_at_every_read(placement: int, depth: int, fault: str, path: str) -> None:
    room = {"ring_bytes": 2 * LARGEST, "demand_bytes": 2 * LARGEST}
    n_failed = 0
    for at in range(len(WEIGHTS)):
        store = open_store(path, placement, fault=fault.format(at), depth=depth, **room)
        errors: list[EdgeError] = []
        for _ in range(12):  # a streamed pass takes fewer reads than weights
            for weight in WEIGHTS:
                acquire_or_error(store, weight, errors)
                if errors:  # the request ends, the store does not
                    break
            store.rewind()
            if errors:
                break
        n_failed += len(errors)
        check_all(store, passes=2)
    assert n_failed <= (len(WEIGHTS) if fault[:4] in ("eio@", "zero", "flip", "shor") else 0)
    assert n_failed >= (len(WEIGHTS) // 2 if fault[:4] in ("eio@", "zero", "flip") else 0)


@pytest.mark.parametrize("placement", [STREAM, DEMAND])
def test_the_same_weight_again_after_a_fault(placement: int, path: str) -> None:
    for at in range(8):
        store = open_store(path, placement, fault=f"eio@{at}", depth=2)
        errors: list[EdgeError] = []
        for weight in WEIGHTS:
            acquire_or_error(store, weight, errors)
            if errors:
                assert store.acquire(weight) == PACK.entries[weight].data
        assert len(errors) <= 1


@pytest.mark.parametrize("placement", [STREAM, DEMAND])
def test_a_drive_that_is_dead(placement: int, path: str) -> None:
    store = open_store(path, placement, fault="eio@3+")
    for n in range(3):
        errors: list[EdgeError] = []
        for weight in WEIGHTS:
            acquire_or_error(store, weight, errors)
        assert len(errors) >= (len(WEIGHTS) - 3 if n > 0 else 1)
        assert all(isinstance(error, DiskError) for error in errors)
        store.rewind()


def test_rows_with_a_fault_at_every_read(path: str) -> None:
    for fault in FAULTS:
        for at in range(4):
            store = open_store(path, DEMAND, fault=fault.format(at), demand_bytes=1 << 19)
            errors: list[EdgeError] = []
            for rows in ([5], [0, 99, 40], [99]):
                acquire_or_error(store, EMBED, errors, rows)
            assert len(errors) <= 1
            assert store.acquire(EMBED, [7]) == rows_of(EMBED, [7])


@pytest.mark.parametrize("placement", [RESIDENT, STREAM, DEMAND])
def test_every_damaged_chunk_is_named(placement: int, tmp_path: Path) -> None:
    path = PACK.write(tmp_path / "a.edge")
    choose = random.Random(4)
    for weight in WEIGHTS:
        entry, offset = PACK.entries[weight], PACK.offsets[weight]
        at = offset + choose.randrange(len(entry.padded))  # padding counts as well
        with open(path, "r+b") as file:
            byte = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 0x10]), at)
        chunk = (at - offset) // entry.chunk_bytes
        if placement == RESIDENT:
            with pytest.raises(CorruptError, match=f"{entry.name}: chunk {chunk} "):
                open_store(str(path), placement)
        else:
            store = open_store(str(path), placement, ring_bytes=2 * LARGEST)
            for other in WEIGHTS:
                if other == weight:
                    with pytest.raises(CorruptError, match=f"{entry.name}: chunk {chunk} "):
                        store.acquire(other)
                    store.rewind()
                else:
                    assert store.acquire(other) == PACK.entries[other].data
        with open(path, "r+b") as file:
            os.pwrite(file.fileno(), byte, at)


@pytest.mark.parametrize("placement", [STREAM, DEMAND])
def test_a_file_that_shrinks_under_the_store(placement: int, tmp_path: Path) -> None:
    path = PACK.write(tmp_path / "a.edge")
    store = open_store(str(path), placement)
    assert store.acquire(WEIGHTS[0]) == PACK.entries[WEIGHTS[0]].data
    os.truncate(path, PACK.offsets[WEIGHTS[-1]] + PAGE)
    with pytest.raises(DiskError, match="shrank"):
        store.acquire(WEIGHTS[-1])
    os.truncate(path, 0)
    with pytest.raises(DiskError, match="shrank"):
        for weight in [*WEIGHTS, *WEIGHTS]:
            store.acquire(weight)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(20))
def test_random_plans_and_faults(seed: int, path: str) -> None:
    choose = random.Random(seed)
    for _ in range(100):
        placements = [choose.choice([RESIDENT, STREAM, DEMAND]) for _ in range(N)]
        fault = ",".join(
            choose.choice(FAULTS).format(choose.randrange(40)) for _ in range(choose.randrange(3))
        )
        try:
            store = open_store(
                path,
                placements,
                ring_bytes=LARGEST + PAGE * choose.randrange(50),
                demand_bytes=LARGEST + PAGE * choose.randrange(50),
                depth=choose.choice([1, 2, 8]),
                fault=fault,
            )
        except (DiskError, CorruptError):
            continue
        errors: list[EdgeError] = []
        for _ in range(3):
            for weight in WEIGHTS[: choose.randrange(len(WEIGHTS) + 1)]:
                acquire_or_error(store, weight, errors)
            store.rewind()
        check_all_after = [weight for weight in WEIGHTS if choose.random() < 0.7]
        for weight in check_all_after:
            acquire_or_error(store, weight, errors)
