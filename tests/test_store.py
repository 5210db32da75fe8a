"""Where weights live: every placement gives the bytes that Resident gives, and survives a failing drive."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from typing import Any

import _edge
import numpy as np
import pytest

from flashload.errors import (
    ArgumentError,
    BudgetError,
    CancelledError,
    CorruptError,
    DiskError,
    ModelFileError,
)
from tests.pack_maker import (
    BYTES,
    DEMAND,
    F32_VECTOR,
    PAGE,
    Q4_0,
    Q8_0,
    RESIDENT,
    STREAM,
    TILES,
    Entry,
    Pack,
    small_pack,
    tile_bytes,
)

PACK = small_pack()
N = len(PACK.entries)
WEIGHTS = [i for i, entry in enumerate(PACK.entries) if entry.format != BYTES]
EMBED = 1
LARGEST = max(len(PACK.entries[i].padded) for i in WEIGHTS)
TOTAL = sum(len(PACK.entries[i].padded) for i in WEIGHTS)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = PACK.write(tmp_path_factory.mktemp("store") / "small.edge")
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return str(path)


def open_store(path: str, placement: int | list[int], **options: Any) -> Any:
    placements = [placement] * N if isinstance(placement, int) else placement
    order = [i for i in WEIGHTS if placements[i] == STREAM]
    options = {"stream_order": order, "ring_bytes": LARGEST, "demand_bytes": LARGEST, **options}
    return _edge.WeightStoreTest(path, placements, **options)


def rows_of(weight: int, rows: list[int]) -> bytes:
    """The tiles a row lease gives, one per row."""
    entry = PACK.entries[weight]
    size = tile_bytes(entry.format, entry.cols)
    return b"".join(entry.data[row // 16 * size : (row // 16 + 1) * size] for row in rows)


def check_all(store: Any, passes: int = 1) -> None:
    for _ in range(passes):
        for weight in WEIGHTS:
            assert store.acquire(weight) == PACK.entries[weight].data, PACK.entries[weight].name


def mixed_placements() -> list[list[int]]:
    choose = random.Random(1)
    return [[choose.choice([RESIDENT, STREAM, DEMAND]) for _ in range(N)] for _ in range(6)]


# The contract


@pytest.mark.parametrize("engine", [engine["name"] for engine in _edge.io_engines() if engine["available"]])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("placement", [RESIDENT, STREAM, DEMAND, *mixed_placements()], ids=str)
def test_same_bytes_everywhere(placement: int | list[int], engine: str, direct: bool, path: str) -> None:
    store = open_store(path, placement, engine=engine, direct=direct, depth=4, ring_bytes=2 * LARGEST)
    check_all(store, passes=3)


@pytest.mark.parametrize("placement", [RESIDENT, STREAM, DEMAND])
@pytest.mark.parametrize(
    "rows", [[0], [99], [17, 17], [99, 0, 50, 51, 3], list(range(100)), list(range(99, 0, -9))], ids=len
)
def test_rows(placement: int, rows: list[int], path: str) -> None:
    store = open_store(path, placement, demand_bytes=1 << 19)
    assert store.acquire(EMBED, rows) == rows_of(EMBED, rows)
    check_all(store)
    assert store.acquire(EMBED, rows) == rows_of(EMBED, rows)


@pytest.mark.parametrize("weight", [i for i in WEIGHTS if PACK.entries[i].format in TILES])
def test_single_rows_of_every_format(weight: int, path: str) -> None:
    store = open_store(path, DEMAND)
    for row in range(0, PACK.entries[weight].rows, 7):
        assert store.acquire(weight, [row]) == rows_of(weight, [row])


@pytest.mark.parametrize("placement", [RESIDENT, STREAM, DEMAND])
def test_vectors_are_leased_whole(placement: int, path: str) -> None:
    norm = next(i for i in WEIGHTS if PACK.entries[i].format == F32_VECTOR)
    assert open_store(path, placement).acquire(norm, [0]) == PACK.entries[norm].data


@pytest.mark.parametrize("placement", [RESIDENT, STREAM, DEMAND])
def test_wrong_requests(placement: int, path: str) -> None:
    store = open_store(path, placement)
    for weight, rows in [(-1, []), (N, []), (1 << 30, []), (0, []), (EMBED, [100]), (EMBED, [0, -1])]:
        with pytest.raises(ArgumentError):
            store.acquire(weight, rows)
    store.prefetch(-1)
    store.prefetch(N)
    check_all(store)


def test_random_requests(path: str) -> None:
    """Whole weights, rows, held leases and rewinds in any order: right bytes or a refusal for room."""
    choose = random.Random(2)
    for placement in [RESIDENT, STREAM, DEMAND, *mixed_placements()]:
        store = open_store(path, placement, ring_bytes=3 * LARGEST, demand_bytes=3 * LARGEST)
        held: list[tuple[Any, int, list[int]]] = []
        for _ in range(300):
            weight, action = choose.choice(WEIGHTS), choose.random()
            entry = PACK.entries[weight]
            rows = (
                [choose.randrange(entry.rows) for _ in range(choose.randrange(3))]
                if entry.format in TILES
                else []
            )
            if action < 0.05:
                store.rewind()
            elif action < 0.2:
                store.prefetch(weight, rows)
            elif held and (action < 0.5 or len(held) > 4):
                lease, weight, rows = held.pop(choose.randrange(len(held)))
                want = rows_of(weight, rows) if rows else PACK.entries[weight].data
                assert store.bytes(lease, len(rows)) == want
                lease.release()
            else:
                try:
                    held.append((store.hold(weight, rows), weight, rows))
                except BudgetError:
                    assert held
        for lease, _, _ in held:
            lease.release()


# Plans


def test_a_plan_that_does_not_fit_the_pack(path: str) -> None:
    streamed = [RESIDENT] * (N - 1) + [STREAM]
    for placements, order in [
        ([RESIDENT], []),
        ([7] * N, []),
        (streamed, []),
        (streamed, [N - 1, N - 1]),
        (streamed, [N - 1, N - 2]),
        (streamed, [N]),
        ([STREAM] * N, list(range(N))),  # blobs cannot be streamed
    ]:
        with pytest.raises(ArgumentError, match="store plan"):
            _edge.WeightStoreTest(path, placements, order, ring_bytes=LARGEST, demand_bytes=LARGEST)
    with pytest.raises(ArgumentError, match="ring has"):
        open_store(path, STREAM, ring_bytes=LARGEST - PAGE)


def test_memory_is_the_plans(path: str) -> None:
    assert open_store(path, RESIDENT, demand_bytes=0).memory() == {"weights": TOTAL}
    assert open_store(path, STREAM, ring_bytes=2 * LARGEST, demand_bytes=0).memory() == {
        "stream ring": 2 * LARGEST
    }
    assert open_store(path, DEMAND, demand_bytes=LARGEST + 1).memory() == {"demand cache": LARGEST + PAGE}


@pytest.mark.parametrize("placement", [RESIDENT, STREAM, DEMAND])
def test_over_budget_is_told_before_reading(placement: int, path: str) -> None:
    floor = sum(open_store(path, placement).memory().values())
    assert open_store(path, placement, budget=floor).stats()["resident_bytes"] in (0, TOTAL)
    with pytest.raises(BudgetError, match="budget"):
        open_store(path, placement, budget=floor - PAGE, fault="eio@0+")


# Resident


def test_load_is_counted(path: str) -> None:
    progress = _edge.LoadProgress()
    stats = open_store(path, RESIDENT, progress=progress).stats()
    assert progress.done_bytes == progress.total_bytes == TOTAL
    assert (stats["load_bytes"], stats["resident_bytes"], stats["flash_bytes"]) == (TOTAL, TOTAL, 0)


def test_load_cancelled_before(path: str) -> None:
    progress = _edge.LoadProgress()
    progress.cancel()
    with pytest.raises(CancelledError):
        open_store(path, RESIDENT, progress=progress)
    assert progress.done_bytes == 0


def test_load_cancelled_on_the_way(tmp_path: Path) -> None:
    pack = Pack(
        [Entry(f"w{i}", F32_VECTOR, 1, 1 << 18, data=bytes(1 << 20), chunk_bytes=1 << 16) for i in range(8)]
    )
    path = str(pack.write(tmp_path / "a.edge"))
    progress = _edge.LoadProgress()

    def cancel_when_started() -> None:
        while progress.done_bytes == 0:
            pass
        progress.cancel()

    thread = threading.Thread(target=cancel_when_started)
    thread.start()
    with pytest.raises(CancelledError):
        _edge.WeightStoreTest(path, [RESIDENT] * 8, depth=1, fault="delay@0+:50", progress=progress)
    thread.join()
    assert 0 < progress.done_bytes < progress.total_bytes


def test_a_warm_file_is_read_through_the_cache(path: str) -> None:
    """Pages someone else has cached are used and stay; with direct reads of a cold file none appear."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.read()
        if not _edge.page_cached(path, 0, size):
            pytest.skip("the kernel cannot tell what is cached (cachestat, Linux 6.5)")
        store = open_store(path, RESIDENT, demand_bytes=0)
        assert not store.stats()["io_direct"]
        check_all(store)
        assert _edge.page_cached(path, PAGE, TOTAL)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if _edge.page_cached(path, 0, PAGE):
            pytest.skip("the file system is memory")
        check_all(open_store(path, RESIDENT))
        assert not any(_edge.page_cached(path, at, PAGE) for at in range(PAGE, size, PAGE))


def test_a_file_that_lost_a_page_of_the_cache_is_warm_still(tmp_path: Path) -> None:
    """The system takes single pages on the side; one page in twenty is no reason to read all from the drive."""
    path, kept = str(PACK.write(tmp_path / "a.edge")), 0.95
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # page by page
        for at in range(0, size, PAGE):
            os.pread(file.fileno(), PAGE, at)
        if not _edge.page_cached(path, 0, size):
            pytest.skip("the kernel cannot tell what is cached (cachestat, Linux 6.5)")
        begin = PAGE + int(kept * TOTAL) // PAGE * PAGE
        os.posix_fadvise(file.fileno(), begin, PAGE, os.POSIX_FADV_DONTNEED)
        if _edge.page_cached(path, begin, PAGE):
            pytest.skip("the file system is memory, or caches in larger pieces")
        store = open_store(path, RESIDENT, demand_bytes=0)
        assert not store.stats()["io_direct"]
        check_all(store)


def test_a_large_warm_file_is_copied_by_several_threads(tmp_path: Path) -> None:
    """Every byte lands where it belongs, damage is found wherever it is, and one failing loader ends the others."""
    numbers = np.random.default_rng(5)
    data = [numbers.bytes(3 << 20) for _ in range(8)]
    pack = Pack(
        [
            Entry(f"w{i}", F32_VECTOR, 1, len(one) // 4, data=one, chunk_bytes=1 << 16)
            for i, one in enumerate(data)
        ]
    )
    path = pack.write(tmp_path / "a.edge")
    progress = _edge.LoadProgress()
    store = _edge.WeightStoreTest(str(path), [RESIDENT] * len(data), progress=progress)
    assert [store.acquire(i) for i in range(len(data))] == data
    assert progress.done_bytes == progress.total_bytes == store.stats()["load_bytes"]
    whole = path.read_bytes()
    for at in (whole.index(data[0]), whole.index(data[-1]) + len(data[-1]) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CorruptError):
            _edge.WeightStoreTest(str(path), [RESIDENT] * len(data))
        path.write_bytes(whole)
    with pytest.raises(DiskError):
        _edge.WeightStoreTest(str(path), [RESIDENT] * len(data), fault="eio@3")


def test_a_file_that_is_gone_or_cut(tmp_path: Path) -> None:
    path = PACK.write(tmp_path / "a.edge")
    os.truncate(path, path.stat().st_size - PAGE)
    with pytest.raises(ModelFileError):
        open_store(str(path), RESIDENT)
    path.unlink()
    with pytest.raises(ModelFileError, match="No such file"):
        open_store(str(path), RESIDENT)


# Streams


@pytest.mark.parametrize("ring_bytes", [LARGEST, LARGEST + PAGE, 2 * LARGEST + 3 * PAGE, TOTAL, 3 * TOTAL])
@pytest.mark.parametrize("depth", [1, 2, 32])
def test_stream_passes(ring_bytes: int, depth: int, path: str) -> None:
    store = open_store(path, STREAM, ring_bytes=ring_bytes, depth=depth, demand_bytes=0)
    check_all(store, passes=5)
    stats = store.stats()
    assert stats["flash_bytes"] >= 5 * TOTAL
    assert stats["hits"] + stats["misses"] == 5 * len(WEIGHTS)
    assert stats["staging_bytes"] == ring_bytes // PAGE * PAGE


def test_stream_reads_ahead_into_the_next_pass(path: str) -> None:
    store = open_store(path, STREAM, ring_bytes=TOTAL, demand_bytes=0)
    check_all(store)
    while store.stats()["flash_bytes"] < 2 * TOTAL:  # the ring fills without anyone asking
        pass
    before = store.stats()
    check_all(store)
    assert store.stats()["misses"] == before["misses"]


def test_abandoned_passes(path: str) -> None:
    store = open_store(path, STREAM, ring_bytes=2 * LARGEST)
    for n in range(len(WEIGHTS) + 1):
        for weight in WEIGHTS[:n]:
            assert store.acquire(weight) == PACK.entries[weight].data
        store.rewind()
        store.rewind()
        assert store.acquire(WEIGHTS[0]) == PACK.entries[WEIGHTS[0]].data
        store.rewind()
    check_all(store, passes=2)


def test_stream_out_of_order(path: str) -> None:
    store = open_store(path, STREAM)
    for weight in [*WEIGHTS[::-1], *WEIGHTS[::3], *WEIGHTS[1::2], EMBED, EMBED]:
        assert store.acquire(weight) == PACK.entries[weight].data
    check_all(store)


def test_stream_leases_held(path: str) -> None:
    """Four neighbours at once, dropped in any order, while the rest streams on."""
    store = open_store(path, STREAM, ring_bytes=5 * LARGEST)
    choose = random.Random(3)
    for _ in range(5):
        for at in range(0, len(WEIGHTS), 4):
            group = WEIGHTS[at : at + 4]
            held = [(weight, store.hold(weight)) for weight in group]
            again = store.hold(group[0])  # shared while it is held
            choose.shuffle(held)
            for weight, lease in held:
                assert store.bytes(lease) == PACK.entries[weight].data
                lease.release()
            assert store.bytes(again) == PACK.entries[group[0]].data
            again.release()


def test_a_ring_too_small_for_the_leases_held(path: str) -> None:
    store = open_store(path, STREAM)
    held = []
    with pytest.raises(BudgetError, match="stream ring"):
        for weight in WEIGHTS:
            held.append(store.hold(weight))
    for lease, weight in zip(held, WEIGHTS, strict=False):
        assert store.bytes(lease) == PACK.entries[weight].data
        lease.release()
    store.rewind()
    check_all(store, passes=2)


def test_stores_close_at_any_moment(path: str) -> None:
    for fault in ("", "delay@0+:2", "eio@1+"):
        for n in range(4):
            store = open_store(path, STREAM, ring_bytes=2 * LARGEST, depth=2, fault=fault)
            for weight in WEIGHTS[:n]:
                if "eio" not in fault:
                    store.acquire(weight)
            del store


def test_embedding_that_is_the_head_as_well(path: str) -> None:
    """Rows at the start of a pass, the whole weight in its place in the stream."""
    order = [*WEIGHTS[1:], EMBED]
    store = open_store(path, STREAM, stream_order=order, demand_bytes=1 << 16)
    for row in (3, 99, 17):
        assert store.acquire(EMBED, [row]) == rows_of(EMBED, [row])
        for weight in order:
            assert store.acquire(weight) == PACK.entries[weight].data
    assert store.stats()["flash_bytes"] < 5 * TOTAL


# Demand


def test_demand_keeps_what_fits(path: str) -> None:
    store = open_store(path, DEMAND, demand_bytes=TOTAL)
    check_all(store, passes=4)
    assert store.stats()["flash_bytes"] == TOTAL
    assert store.stats()["hits"] == 3 * len(WEIGHTS)


def test_demand_drops_the_least_recently_used(tmp_path: Path) -> None:
    pack = Pack([Entry(f"e{i}", F32_VECTOR, 1, 1024, data=bytes([i]) * PAGE) for i in range(4)])
    path = str(pack.write(tmp_path / "a.edge"))
    store = _edge.WeightStoreTest(path, [DEMAND] * 4, demand_bytes=3 * PAGE)
    for weight in (0, 1, 2, 0, 3, 0, 2):  # 3 takes the place of 1
        assert store.acquire(weight) == pack.entries[weight].data
    assert (store.stats()["hits"], store.stats()["misses"]) == (3, 4)
    store.acquire(1)
    assert store.stats()["misses"] == 5


def test_prefetched_experts_are_hits(path: str) -> None:
    experts = [i for i in WEIGHTS if PACK.entries[i].expert >= 0]
    store = open_store(path, DEMAND, demand_bytes=TOTAL)
    for weight in experts:
        store.prefetch(weight)
        store.prefetch(weight)
    for weight in reversed(experts):
        assert store.acquire(weight) == PACK.entries[weight].data
    assert store.stats()["flash_bytes"] == sum(len(PACK.entries[i].padded) for i in experts)


def test_prefetch_never_fails_nor_takes_what_is_needed(path: str) -> None:
    store = open_store(path, DEMAND, demand_bytes=LARGEST, fault="eio@2,eio@5")
    held = store.hold(WEIGHTS[0])
    for weight in WEIGHTS:
        store.prefetch(weight)
    assert store.bytes(held) == PACK.entries[WEIGHTS[0]].data
    held.release()
    errors = 0
    for weight in WEIGHTS:
        try:
            assert store.acquire(weight) == PACK.entries[weight].data
        except DiskError:
            errors += 1
            assert store.acquire(weight) == PACK.entries[weight].data
    assert errors <= 2


def test_demand_too_small(path: str) -> None:
    store = open_store(path, DEMAND, demand_bytes=LARGEST - PAGE)
    with pytest.raises(BudgetError, match="demand cache"):
        for weight in WEIGHTS:
            store.acquire(weight)
    with pytest.raises(BudgetError, match="demand cache"):
        store.acquire(EMBED, list(range(100)))
    assert store.acquire(EMBED, [1]) == rows_of(EMBED, [1])


def test_row_leases_read_only_their_chunks(path: str) -> None:
    entry = PACK.entries[EMBED]
    store = open_store(path, DEMAND)
    store.acquire(EMBED, [0])
    assert store.stats()["flash_bytes"] <= tile_bytes(entry.format, entry.cols) + 2 * entry.chunk_bytes
    assert store.stats()["flash_bytes"] < len(entry.data)


# Larger weights, where runs are cut and merged


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Pack]:
    fill = np.random.default_rng(5)
    entries = []
    for layer in range(3):
        entries += [
            Entry(f"l{layer}.norm", F32_VECTOR, 1, 2048, layer),
            Entry(f"l{layer}.q", Q8_0, 1024, 2048, layer, chunk_bytes=1 << 18),
            Entry(f"l{layer}.up", Q4_0, 2048, 2048, layer, chunk_bytes=1 << 21),
        ]
    pack = Pack([entry.fill(fill) for entry in entries])
    return str(pack.write(tmp_path_factory.mktemp("large") / "large.edge")), pack


@pytest.mark.parametrize("placement", [RESIDENT, STREAM, DEMAND])
@pytest.mark.parametrize("depth", [1, 2, 32])
def test_large_weights(placement: int, depth: int, large: tuple[str, Pack]) -> None:
    path, pack = large
    n = len(pack.entries)
    store = _edge.WeightStoreTest(
        path,
        [placement] * n,
        list(range(n)) if placement == STREAM else [],
        5 << 20,
        5 << 20,
        depth=depth,
        part_bytes=5 << 20,
    )
    for _ in range(3):
        for weight, entry in enumerate(pack.entries):
            assert store.acquire(weight) == entry.data
    q = pack.entries[1]
    size = tile_bytes(q.format, q.cols)
    if placement != STREAM:
        assert store.acquire(1, [1023]) == q.data[-size:]
