"""Experts read before their layer has chosen: what a guess may cost, what it may not, and failing drives under it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import _edge
import numpy as np
import pytest

from flashload.errors import CorruptError, DiskError, EdgeError
from tests.pack_maker import DEMAND, F16, Entry, Pack
from tests.test_expert_cache import (
    EXPERTS,
    FAULTS,
    LAYERS,
    PACK,
    RECORD,
    N,
    answer,
    mixtral,
    open_store,
    routing,
    take,
    visit,
    weights,
)

__all__ = ["mixtral"]  # a fixture


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(PACK.write(tmp_path_factory.mktemp("guesses") / "experts.edge"))


def guess(store: Any, layer: int, experts: list[int], distance: int = 1) -> None:
    store.guess([weight for expert in experts for weight in weights(layer, expert)], distance)


def record_bytes(layer: int, expert: int) -> int:
    return sum(len(PACK.entries[weight].padded) for weight in weights(layer, expert))


def guessed(store: Any) -> tuple[int, int]:
    stats = store.stats()
    return stats["experts_guessed"], stats["experts_guessed_right"]


def test_a_right_guess_is_read_once(path: str) -> None:
    store = open_store(path, 6)
    visit(store, 0, [0, 1])
    guess(store, 1, [3])
    visit(store, 1, [3])
    assert guessed(store) == (1, 1)
    assert store.stats()["flash_bytes"] == 2 * record_bytes(0, 0) + record_bytes(1, 3)
    assert store.stats()["hits"] == 0  # its bytes were read for it


def test_a_wrong_guess_costs_a_read(path: str) -> None:
    store = open_store(path, 6)
    visit(store, 0, [0, 1])
    guess(store, 1, [3, 4])
    visit(store, 1, [4, 5])
    assert guessed(store) == (2, 1)
    visit(store, 1, [3])
    assert store.stats()["flash_bytes"] == 2 * record_bytes(0, 0) + 3 * record_bytes(1, 3)


def test_guesses_reach_two_layers(path: str) -> None:
    store = open_store(path, 8)
    visit(store, 0, [0])
    guess(store, 1, [1], 1)
    guess(store, 2, [2], 2)
    visit(store, 1, [1])
    visit(store, 2, [2])
    assert guessed(store) == (2, 2)


@pytest.mark.parametrize("records", [1, 2, 3, 4])
def test_a_guess_takes_no_place_that_is_needed(records: int, path: str) -> None:
    """Two experts are in use: a guess gets what is left of the room."""
    store = open_store(path, records)
    store.expect(weights(0, 0) + weights(0, 1))
    guess(store, 1, [2, 3])
    for expert in (0, 1):
        take(store, 0, expert)
        guess(store, 1, [2, 3])
    assert guessed(store)[0] == max(0, records - 2)
    read = store.stats()["flash_bytes"]
    for expert in (0, 1)[2 - min(records, 2) :]:
        take(store, 0, expert)
    assert store.stats()["flash_bytes"] == read
    visit(store, 1, [2, 3])


def test_guesses_that_fail_are_given_up_and_tried_again(path: str) -> None:
    store = open_store(path, 12)
    first = weights(1, 0)[0]
    n_made = n_refused = 0
    choose = random.Random(1)
    for _ in range(200):
        visit(store, 0, choose.sample(range(EXPERTS), 2))
        wanted = choose.sample(range(EXPERTS), 4)
        if store.guesses(first):
            guess(store, 1, wanted[2:])
            n_made += 1
        else:
            n_refused += 1
        visit(store, 1, wanted[:2])
    n_guessed, n_right = guessed(store)
    assert n_right == 0 < n_guessed
    assert n_refused > 170
    assert n_made > 2  # now and then it is seen whether they still fail


def test_guesses_of_nothing(path: str) -> None:
    store = open_store(path, 4)
    assert not store.guesses(weights(1, 0)[0], 0)
    assert not store.guesses(weights(1, 0)[0], 3)
    assert not store.guesses(0) and not store.guesses(-1) and not store.guesses(N)
    store.guess([])
    store.guess([-1, N, 1 << 30], 1)
    visit(store, 0, [1])
    assert guessed(store) == (0, 0)
    resident = _edge.WeightStoreTest(path, [0] * N)
    assert not resident.guesses(weights(1, 0)[0])
    resident.guess(weights(1, 0), 1)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Pack]:
    """Two layers of four experts of three reads of 1 MiB."""
    entries = [
        Entry(f"w{i}", F16, 512, 1024, i // 12, i // 3 % 4, chunk_bytes=1 << 16).fill(
            np.random.default_rng(i)
        )
        for i in range(24)
    ]
    pack = Pack(entries)
    return str(pack.write(tmp_path_factory.mktemp("large") / "large.edge")), pack


def test_what_is_not_submitted_of_a_wrong_guess_is_not_read(large: tuple[str, Pack]) -> None:
    path, pack = large
    store = _edge.WeightStoreTest(path, [DEMAND] * 24, demand_bytes=9 << 20, depth=2)
    store.expect([0, 1, 2])
    for weight in (0, 1, 2):
        store.acquire(weight)
    store.guess([12, 13, 14, 15, 16, 17], 1)  # two requests fly, four wait
    store.expect([18, 19, 20])
    for weight in (18, 19, 20):
        assert store.acquire(weight) == pack.entries[weight].data
    assert store.stats()["flash_bytes"] <= 8 << 20
    for weight in (14, 12, 13):  # what is there of it is not read again
        assert store.acquire(weight) == pack.entries[weight].data
    assert store.stats()["flash_bytes"] == 9 << 20


# Failing drives


@pytest.mark.parametrize("fault", ["eio@1", "zero@1", "flip@1:99"])
def test_a_failed_guess_is_told_to_nobody(fault: str, path: str) -> None:
    for wanted in (4, 3):  # nobody asks for it; it is asked for, and read again
        store = open_store(path, 6, fault=fault)
        visit(store, 0, [0])
        guess(store, 1, [3])
        visit(store, 1, [wanted])
        visit(store, 1, [3])
        assert guessed(store) == (1, int(wanted == 3))


def test_a_guess_that_fails_for_good(path: str) -> None:
    for fault, error in (("eio@1+", DiskError), ("flip@1+:99", CorruptError)):
        store = open_store(path, 6, fault=fault)
        visit(store, 0, [0])
        guess(store, 1, [3])
        with pytest.raises(error):
            visit(store, 1, [3])
        visit(store, 0, [0])


@pytest.mark.parametrize("fault", ["", *FAULTS])
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("engine", ["io_uring", "pread"])
def test_random_guesses_change_no_answer(fault: str, depth: int, engine: str, path: str) -> None:
    """visit() compares every byte; of a fault at most one record's three weights are told."""
    choose = random.Random(depth)
    for at in range(0, 16, 3) if fault else (0,):
        store = open_store(path, choose.uniform(2, 12), fault=fault.format(at), depth=depth, engine=engine)
        errors = 0
        for layer, chosen in routing(12, seed=at):
            for distance in (1, 2):
                if layer + distance < LAYERS and choose.random() < 0.8:
                    guess(store, layer + distance, choose.sample(range(EXPERTS), 2), distance)
            row = choose.randrange(64) if choose.random() < 0.2 else None
            try:
                if row is not None:
                    store.acquire(0, [row])
                visit(store, layer, list(chosen))
            except (DiskError, CorruptError):
                errors += 1
                store.rewind()
        assert errors <= len(weights(0, 0))


def test_the_room_changes_while_guesses_are_read(path: str) -> None:
    store = open_store(path, 8, fault="delay@2+:5", depth=2)
    for records in (3, 8, 1, 12, 2):
        visit(store, 0, [0])
        guess(store, 1, [2, 3, 4])
        guess(store, 2, [5, 6], 2)
        store.replace([DEMAND] * N, [], 0, records * RECORD, 1 << 30)
        visit(store, 1, [2, 7])
        visit(store, 2, [5, 1])


def test_stores_close_while_guesses_are_read(path: str) -> None:
    for fault in ("delay@1+:3", "eio@1+"):
        store = open_store(path, 8, fault=fault, depth=2)
        visit(store, 0, [0])
        guess(store, 1, [2, 3, 4])
        del store


# The engine


@pytest.mark.parametrize("records", [2, 5, 9, 14])
@pytest.mark.parametrize("max_rows", [2, 64])
def test_same_tokens_with_and_without_guesses(mixtral: Path, records: float, max_rows: int) -> None:
    expected, _ = answer(mixtral, None, max_rows)
    for layers in (0, 1, 2):
        tokens, stats = answer(mixtral, records, max_rows, expert_guess_layers=layers)
        assert tokens == expected
        assert stats["experts_guessed_right"] <= stats["experts_guessed"]
        assert layers > 0 or stats["experts_guessed"] == 0
        assert layers == 0 or records < 9 or stats["experts_guessed"] > 0


@pytest.mark.parametrize("fault", ["eio@{}", "flip@{}:12345", "delay@{}+:1", "again@{}"])
def test_a_fault_in_a_pass_with_guesses(mixtral: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = answer(mixtral, None, 64)
    for at in range(9, 40, 6):
        monkeypatch.setenv("EDGE_IO_FAULT", fault.format(at))
        try:
            tokens, _ = answer(mixtral, 9, 64)
        except EdgeError as error:
            assert isinstance(error, DiskError | CorruptError) and fault[:4] in ("eio@", "flip")
        else:
            assert tokens == expected
