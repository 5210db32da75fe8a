"""Matrices that stream in parts: the bytes of the whole, through a ring that cannot hold them."""

from __future__ import annotations

import random
from typing import Any

import _edge
import numpy as np
import pytest

from flashload import plan_directory
from flashload.errors import ArgumentError, CorruptError, DiskError
from tests.pack_maker import F16, F32, F32_VECTOR, PAGE, Q4_0, Q4_K, Q8_0, STREAM, Entry, Pack, tile_bytes

ENTRIES = [
    Entry("embed", Q8_0, 64, 96),  # of no layer: comes whole
    Entry("l0.norm", F32_VECTOR, 1, 512, 0),
    Entry("l0.q", Q8_0, 333, 96, 0),  # a tile of 1,632 bytes, a last tile of 13 rows
    Entry("l0.up", Q4_0, 640, 224, 0, chunk_bytes=4 * PAGE),
    Entry("l0.down", Q4_K, 48, 1024, 0),  # 9,216 bytes a tile: longer than a chunk
    Entry("l1.q", F16, 16, 700, 1),  # one tile
    Entry("l1.up", F32, 160, 64, 1),  # tiles that end with their chunks
    Entry("l1.down", Q4_0, 1600, 96, 1, chunk_bytes=2 * PAGE),
]
N = len(ENTRIES)
PART_BYTES = [PAGE, 3 * PAGE, 10_000, 1 << 20]


def part_bytes_of(entry: Entry, part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """What the plan reckons a part of it takes of the ring."""
    monkeypatch.setattr(plan_directory, "_PART_BYTES", part_bytes)
    stored, rows = len(entry.padded), entry.rows
    weight = plan_directory.Weight(
        0, entry.name, entry.layer, -1, entry.format, stored, rows, entry.chunk_bytes
    )
    return plan_directory.part_bytes(weight)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Pack]:
    fill = np.random.default_rng(3)
    pack = Pack([entry.fill(fill) for entry in ENTRIES])
    return str(pack.write(tmp_path_factory.mktemp("parts") / "parts.edge")), pack


def open_store(path: str, ring_bytes: int, part_bytes: int, **options: Any) -> Any:
    return _edge.WeightStoreTest(
        path, [STREAM] * N, list(range(N)), ring_bytes=ring_bytes, part_bytes=part_bytes, **options
    )


def least_ring(part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> int:
    of_layers = [part_bytes_of(entry, part_bytes, monkeypatch) for entry in ENTRIES if entry.layer >= 0]
    return max([len(ENTRIES[0].padded), *of_layers])


def read(store: Any, weight: int) -> bytes:
    entry = ENTRIES[weight]
    if entry.format == F32_VECTOR:
        return store.acquire(weight)
    found, first = b"", 0
    while first < -(-entry.rows // 16):
        first, data = store.acquire_tiles(weight, first)
        found += data
    return found


def check_pass(store: Any) -> None:
    for weight, entry in enumerate(ENTRIES):
        assert read(store, weight) == entry.data, entry.name


@pytest.mark.parametrize("part_bytes", PART_BYTES)
@pytest.mark.parametrize("more", [0, 1, 7, 100])
@pytest.mark.parametrize("depth", [1, 8])
def test_the_bytes_of_the_whole(
    part_bytes: int, more: int, depth: int, pack: tuple[str, Pack], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the least ring the plan may give on."""
    ring_bytes = least_ring(part_bytes, monkeypatch) + more * PAGE
    store = open_store(pack[0], ring_bytes, part_bytes, depth=depth)
    for _ in range(4):
        check_pass(store)
    assert store.stats()["staging_bytes"] == ring_bytes // PAGE * PAGE


def test_large_weights_come_apart_and_others_do_not(pack: tuple[str, Pack]) -> None:
    store = open_store(pack[0], 1 << 20, PAGE)
    ends = {}
    for weight, entry in enumerate(ENTRIES):
        if entry.format != F32_VECTOR:
            ends[entry.name] = store.acquire_tiles(weight, 0)[0]
    assert ends["embed"] == 4 and ends["l1.q"] == 1
    assert all(
        ends[name] < -(-entry.rows // 16)
        for entry in ENTRIES
        if (name := entry.name) in ("l0.q", "l0.up", "l1.down")
    )


def test_what_has_no_tiles_comes_whole_and_its_tiles_are_empty(pack: tuple[str, Pack]) -> None:
    store = open_store(pack[0], 1 << 20, PAGE)
    weight = next(i for i, entry in enumerate(ENTRIES) if entry.format == F32_VECTOR)
    assert store.acquire_tiles(weight, 0) == (-(-ENTRIES[weight].rows // 16), b"")
    store.rewind()
    assert store.acquire(weight) == ENTRIES[weight].data


def test_whole_leases_are_refused_of_what_comes_in_parts(pack: tuple[str, Pack]) -> None:
    store = open_store(pack[0], 1 << 20, PAGE)
    with pytest.raises(ArgumentError, match=r"l0\.q streams in parts"):
        store.acquire(2)
    store.rewind()
    check_pass(store)


def test_tiles_are_asked_for_in_order(pack: tuple[str, Pack]) -> None:
    store = open_store(pack[0], 1 << 20, PAGE)
    first, _ = store.acquire_tiles(2, 0)
    second, _ = store.acquire_tiles(2, first)
    for wrong in (1, first, second + 1, 21, 1000, -1):
        with pytest.raises(ArgumentError, match="expected the tile after"):
            store.acquire_tiles(2, wrong)
    assert store.acquire_tiles(2, second)[0] > second
    with pytest.raises(ArgumentError, match="expected the tile after"):
        store.acquire_tiles(3, first)  # of another weight
    store.rewind()
    check_pass(store)


def test_abandoned_in_the_middle_of_a_weight(pack: tuple[str, Pack], monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(pack[0], least_ring(PAGE, monkeypatch) + PAGE, PAGE)
    choose = random.Random(1)
    for _ in range(60):
        for weight in range(choose.randrange(N)):
            assert read(store, weight) == ENTRIES[weight].data
        first = 0
        for _ in range(choose.randrange(4)):
            first, _ = store.acquire_tiles(7, first)
        store.rewind()
    check_pass(store)


@pytest.mark.parametrize("fault", ["eio@{}", "zero@{}", "flip@{}:777", "short@{}", "again@{}", "delay@{}:2"])
def test_a_fault_at_every_read(fault: str, pack: tuple[str, Pack], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error names its weight and the same tiles can be asked for again; nothing wrong is ever leased."""
    ring_bytes = least_ring(PAGE, monkeypatch) + 3 * PAGE
    n_failed = 0
    for at in range(0, 100, 3):
        store = open_store(pack[0], ring_bytes, PAGE, fault=fault.format(at), depth=2)
        for _ in range(5):  # until the faulty read has passed
            for weight, entry in enumerate(ENTRIES):
                if entry.format == F32_VECTOR:
                    continue
                found, first = b"", 0
                while first < -(-entry.rows // 16):
                    try:
                        end, data = store.acquire_tiles(weight, first)
                    except (DiskError, CorruptError) as error:
                        n_failed += 1
                        assert "\n" not in str(error)
                        continue
                    found += data
                    first = end
                assert found == entry.data
            store.rewind()
        check_pass(store)
    assert (n_failed > 0) == (fault[:4] in ("eio@", "zero", "flip", "shor"))


def test_a_ring_below_the_largest_part(pack: tuple[str, Pack]) -> None:
    with pytest.raises(ArgumentError, match=r"needs \d+ bytes, the stream ring has"):
        open_store(pack[0], 5 * PAGE, PAGE)


def test_every_part_completes_a_tile(pack: tuple[str, Pack]) -> None:
    for part_bytes in PART_BYTES:
        store = open_store(pack[0], 1 << 21, part_bytes)
        for weight, entry in enumerate(ENTRIES):
            first, n_tiles = 0, -(-entry.rows // 16)
            while entry.format != F32_VECTOR and first < n_tiles:
                end, data = store.acquire_tiles(weight, first)
                assert end > first and len(data) == (end - first) * tile_bytes(entry.format, entry.cols)
                first = end
