"""Keys and values that move between memory and a drive: no row changes, old and new memory are never held together."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import _edge
import pytest

from flashload.errors import DiskError

CONTEXT = 400
#: Pages in memory; 0 is all of them.
RESIDENT = (0, 3, 5, 25)


def fill(pool: Any, cache: int, numbers: list[int]) -> None:
    for begin in range(0, len(numbers), 20):
        rows = numbers[begin : begin + 20]
        pool.stage(cache, rows)
        pool.commit(cache, list(range(len(rows))))


def rows_of(pool: Any, cache: int, resident: int) -> list[int]:
    found: list[int] = pool.rows(cache) if resident == 0 else pool.read(cache, [0, 0], 1)[0]
    return found


@pytest.mark.parametrize("seed", range(10))
def test_random_moves(seed: int, tmp_path: Path) -> None:
    choose = random.Random(seed)
    pool = _edge.KvPoolTest(2, choose.choice([8, 40, 128]), CONTEXT, 3, 2, str(tmp_path))
    texts: dict[int, list[int]] = {pool.add(): [] for _ in range(choose.choice([1, 2, 3]))}
    resident = 3
    for _ in range(25):
        cache = choose.choice(list(texts))
        more = [choose.randrange(60000) for _ in range(choose.choice([1, 5, 60]))]
        cut = choose.randrange(len(texts[cache]) + 1)
        if sum(map(len, texts.values())) + len(more) > CONTEXT - 64 * len(texts):
            pool.truncate(cache, cut)
            texts[cache] = texts[cache][:cut]
        else:
            fill(pool, cache, more)
            texts[cache] = texts[cache] + more
        if choose.random() < 0.6:
            resident = choose.choice(RESIDENT)
            pool.move(resident, choose.choice([1, 2, 7]))
        for one, text in texts.items():
            assert pool.n_committed(one) == len(text)
            # Pages of several sequences share the memory: those read now must not be cut inside a page on the drive.
            pool.stage(one, [1])
            pool.rollback(one)
            assert rows_of(pool, one, resident) == text


def test_memory_goes_before_it_comes(tmp_path: Path) -> None:
    pool = _edge.KvPoolTest(2, 128, CONTEXT, 10, 2, str(tmp_path))
    cache = pool.add()
    fill(pool, cache, list(range(300)))
    half_bytes = 16 * 128 * 2
    pages_bytes, buffers_bytes = 10 * 4 * half_bytes, 4 * 2 * half_bytes
    assert pool.used_bytes >= pages_bytes + buffers_bytes
    pool.move(4, 2)
    assert pool.parked_bytes < buffers_bytes + 2 * 4096 + 1  # hashes, no pages
    assert pool.used_bytes == pool.parked_bytes + 4 * 4 * half_bytes
    assert rows_of(pool, cache, 4) == list(range(300))
    pool.move(0, 2)
    assert pool.used_bytes == -(-CONTEXT // 64) * 2 * 2 * 64 * 128 * 2
    assert rows_of(pool, cache, 0) == list(range(300))


@pytest.mark.parametrize("resident", [0, 6])
@pytest.mark.parametrize("fault", ["eio@{}", "enospc@{}"])
def test_a_write_that_fails_changes_nothing(fault: str, resident: int, tmp_path: Path) -> None:
    failed = 0
    for at in range(4):
        pool = _edge.KvPoolTest(2, 128, CONTEXT, 25, 2, str(tmp_path), write_fault=fault.format(at))
        cache = pool.add()
        fill(pool, cache, list(range(200)))
        if resident == 0:
            # All in memory first: the file it is then written to is a new one.
            pool = _edge.KvPoolTest(2, 128, CONTEXT, 25, 2, str(tmp_path))
            cache = pool.add()
            fill(pool, cache, list(range(200)))
            pool.move(0, 2)
        with pytest.raises(DiskError):
            pool.move(6, 2, write_fault=fault.format(at))
        failed += 1
        assert rows_of(pool, cache, resident and 25) == list(range(200))
        fill(pool, cache, [7])
        pool.move(5, 1)
        assert rows_of(pool, cache, 5) == [*range(200), 7]
    assert failed == 4


@pytest.mark.parametrize("fault", ["eio@{}", "flip@{}:77"])
def test_what_a_drive_does_not_give_back_is_forgotten(fault: str, tmp_path: Path) -> None:
    forgotten = 0
    for at in range(4):
        pool = _edge.KvPoolTest(2, 128, CONTEXT, 3, 2, str(tmp_path), read_fault=fault.format(at))
        caches = [pool.add(), pool.add()]
        for cache in caches:
            fill(pool, cache, list(range(130)))
        pool.move(0, 2)
        for cache in caches:
            n = pool.n_committed(cache)
            assert n in (0, 130)
            forgotten += n == 0
            assert pool.rows(cache) == list(range(n))
            fill(pool, cache, [5, 6])
            assert pool.rows(cache) == [*range(n), 5, 6]
    assert forgotten > 0
