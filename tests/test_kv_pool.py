"""Pages of sequences that share a little memory and a file, without a model."""

from __future__ import annotations

import random
from pathlib import Path

import _edge
import pytest

from flashload.errors import DiskError
from tests.kv_engines import PAGE_TOKENS


class Model:
    """What a sequence of KvPoolTest holds."""

    def __init__(self) -> None:
        self.committed: list[int] = []
        self.staged: list[int] = []


@pytest.mark.parametrize("seed", range(12))
def test_random_lives_of_a_pool(seed: int, tmp_path: Path) -> None:
    choose = random.Random(seed)
    context = choose.choice([200, 400])
    pool = _edge.KvPoolTest(
        2, choose.choice([8, 40, 128]), context, 4, choose.choice([1, 2, 5]), str(tmp_path)
    )
    live: dict[int, Model] = {pool.add(): Model() for _ in range(choose.choice([1, 1, 2, 3]))}
    for _ in range(150):
        cache = choose.choice(list(live))
        model = live[cache]
        action = choose.random()
        if action < 0.6:
            rows = [choose.randrange(60000) for _ in range(choose.choice([1, 1, 2, 15, 17, 33]))]
            pages = sum(-(-len(m.committed) // PAGE_TOKENS) for m in live.values() if m is not model)
            if pages + -(-(len(model.committed) + len(rows)) // PAGE_TOKENS) > -(-context // PAGE_TOKENS):
                pool.truncate(cache, 0)
                model.committed = []
            pool.stage(cache, rows)
            model.staged = rows
            path = sorted(choose.sample(range(len(rows)), choose.randrange(len(rows) + 1)))
            if choose.random() < 0.8:
                pool.commit(cache, path)
                model.committed += [rows[i] for i in path]
            else:
                pool.rollback(cache)
            # Rows that were staged may leave pages behind the committed ones, which others cannot take.
            pool.truncate(cache, len(model.committed))
        elif action < 0.75:
            keep = choose.randrange(len(model.committed) + 1)
            pool.truncate(cache, keep)
            model.committed = model.committed[:keep]
        elif action < 0.8 and len(live) > 1:
            pool.remove(cache)
            del live[cache]
            continue
        pool.stage(cache, [1])  # a page cut inside comes back into memory before it is read
        pool.rollback(cache)
        firsts = [choose.randrange(len(model.committed) + 1) for _ in range(2)]
        repeats = choose.choice([1, 3])
        views = pool.read(cache, firsts, repeats)
        assert len(views) == 4 * repeats
        for i, view in enumerate(views):
            assert view == model.committed[firsts[i // (2 * repeats)] :]
        assert sum(pool.pages(one)[0] for one in live) <= 4


def test_a_page_is_written_once(tmp_path: Path) -> None:
    pool = _edge.KvPoolTest(2, 128, 640, 4, 2, str(tmp_path))
    cache = pool.add()
    for row in range(600):
        pool.stage(cache, [row])
        pool.commit(cache, [0])
    page_bytes = 2 * 2 * 16 * 128 * 2
    assert pool.pages(cache) == (4, 34)
    assert pool.bytes_written == 34 * page_bytes
    pool.truncate(cache, 320)
    pool.stage(cache, [1])  # the latest pages come back, and leave again without a write
    pool.commit(cache, [0])
    assert pool.pages(cache)[0] == 4
    for row in range(80):
        pool.stage(cache, [row])
        pool.commit(cache, [0])
    assert pool.bytes_written == (34 + 2) * page_bytes


@pytest.mark.parametrize("fault", ["eio@{}", "enospc@{}", "zero@{}"])
def test_a_write_that_fails_loses_nothing(fault: str, tmp_path: Path) -> None:
    failed = 0
    for at in range(12):
        pool = _edge.KvPoolTest(2, 128, 640, 3, 2, str(tmp_path), write_fault=fault.format(at))
        cache = pool.add()
        rows: list[int] = []
        while len(rows) < 120:
            try:
                pool.stage(cache, [len(rows)] * 3)
            except DiskError as error:
                assert "\n" not in str(error) and "scratch file" in str(error)
                failed += 1
                continue
            pool.commit(cache, [0, 1, 2])
            rows += [len(rows)] * 3
        assert pool.read(cache, [0, 0], 1) == [rows] * 4
    assert failed == 12


def test_short_writes_and_repeats_are_carried_on(tmp_path: Path) -> None:
    fault = ",".join([f"short@{i}" for i in range(0, 60, 3)] + [f"again@{i}" for i in range(1, 60, 3)])
    pool = _edge.KvPoolTest(2, 256, 640, 3, 2, str(tmp_path), write_fault=fault)
    cache = pool.add()
    for row in range(300):
        pool.stage(cache, [row])
        pool.commit(cache, [0])
    assert pool.read(cache, [0, 5], 1) == [list(range(300))] * 2 + [list(range(5, 300))] * 2
