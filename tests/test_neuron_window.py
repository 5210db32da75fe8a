"""The window of neuron records: the right bytes at every capacity, what stays and what leaves, and failing drives."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import _edge
import numpy as np
import pytest

from flashload.errors import ArgumentError, BudgetError, CorruptError, DiskError
from flashload.format import PackFile, PackWriter
from flashload.pack_layout import record_bytes
from flashload.plan import weights_of
from flashload.plan_neurons import NeuronModel, NeuronPlacement, _share_out, _tables
from quant.formats import WeightFormat

N, HIDDEN = 300, 700
LAYERS = 2
CODE = WeightFormat.NEURON_Q4
RECORD = record_bytes(CODE, HIDDEN, 3)  # 1296: three to a page, and often over the edge of one
PAGE = 4096
LEAST_STAGING = 2 * (-(-RECORD // PAGE) + 1) * PAGE
RECORDS = [[os.urandom(RECORD) for _ in range(N)] for _ in range(LAYERS)]
#: The weights of the pack: records and gates of each layer.
WEIGHTS = [0, 2]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("window") / "n.edge"
    write(path)
    return str(path)


def write(path: Path) -> None:
    with PackWriter(path, 1 << 22) as writer:
        for layer, records in enumerate(RECORDS):
            name = f"layers.{layer}.neurons."
            writer.add(name + "records", CODE, N, HIDDEN, records, layer, neuron_parts=3)
            writer.add(name + "gates", CODE, N, HIDDEN, [r[: RECORD // 3] for r in records], layer)


def open_window(path: str, n_slots: int, **options: Any) -> Any:
    return _edge.NeuronWindowTest(path, [n_slots, -1, n_slots, -1], **options)


def check(
    window: Any,
    layer: int,
    neurons: list[int],
    rows: list[int] | None = None,
    expected: list[int] | None = None,
) -> list[int]:
    """Reads neurons of a layer, with a guess of what the next one will be asked for."""
    guess = {} if expected is None else {"next": WEIGHTS[layer + 1], "expected": expected}
    records, ends = window.read(WEIGHTS[layer], neurons, rows or [], **guess)
    assert records == [RECORDS[layer][neuron] for neuron in neurons]
    assert ends == sorted(set(ends)) and (not neurons or ends[-1] == len(neurons))
    return list(ends)


def some(choose: random.Random, share: float) -> list[int]:
    return [neuron for neuron in range(N) if choose.random() < share]


# The right bytes


@pytest.mark.parametrize("n_slots", [0, 1, 7, 100, N - 1, N])
@pytest.mark.parametrize("staging", [LEAST_STAGING, 48 << 10, 1 << 20])
@pytest.mark.parametrize("depth", [1, 4, 32])
def test_every_record_at_every_capacity(path: str, n_slots: int, staging: int, depth: int) -> None:
    window = open_window(path, n_slots, staging_bytes=staging, depth=depth)
    choose = random.Random(n_slots)
    for token in range(8):
        for layer in range(LAYERS):
            check(window, layer, some(choose, [0.02, 0.1, 0.5, 1.0][token % 4]))
        window.commit([0])
    stats = window.stats()
    assert (stats["hits"] == stats["wanted"]) == (n_slots == N)
    assert stats["bytes"] > 0 or n_slots == N


@pytest.mark.parametrize("engine", ["io_uring", "pread"])
@pytest.mark.parametrize("direct", [True, False])
def test_every_reader(path: str, engine: str, direct: bool) -> None:
    if engine not in [e["name"] for e in _edge.io_engines() if e["available"]]:
        pytest.skip(f"no {engine} here")
    window = open_window(path, 20, engine=engine, direct=direct)
    for neurons in (list(range(N)), [0, N - 1], [], [150]):
        check(window, 1, neurons)


def test_gates_and_whole_layers_are_read_once(path: str) -> None:
    window = _edge.NeuronWindowTest(path, [N, N, -1, N])
    records, ends = window.read(1, [0, 5, 299])
    assert records == [RECORDS[0][neuron][: RECORD // 3] for neuron in (0, 5, 299)] and ends == [3]
    check(window, 0, list(range(N)))
    stats = window.stats()
    assert stats["bytes"] == stats["requests"] == 0 and stats["hits"] == stats["wanted"] == N + 3


# What is read


def test_neighbours_are_read_together(path: str) -> None:
    window = open_window(path, 0)
    check(window, 0, list(range(N)))
    whole = window.stats()["requests"]
    assert whole <= 1 + N * RECORD // (200 << 10)
    check(window, 0, [10, 12, 290])  # 12 is near 10, 290 is not
    assert window.stats()["requests"] == whole + 2


def test_records_come_in_groups_while_others_are_on_their_way(path: str) -> None:
    window = open_window(path, 0, staging_bytes=64 << 10)
    ends = check(window, 0, list(range(N)))
    assert len(ends) > 3


def test_a_group_leaves_most_of_the_staging_to_reads(path: str) -> None:
    """Whatever has come in: places are free again when a group has been used, and until then nothing is read there."""
    ends = check(open_window(path, 0, staging_bytes=128 << 10), 0, list(range(N)))
    largest = max(end - begin for begin, end in zip([0, *ends], ends, strict=False))
    assert largest * RECORD <= (128 << 10) // 8 + RECORD


def test_what_is_wanted_is_read_into_all_of_the_staging(path: str) -> None:
    staging, far_apart = 40 << 10, list(range(0, N, 15))
    whole = open_window(path, 0, staging_bytes=1 << 20)
    check(whole, 0, far_apart)
    read_bytes = whole.stats()["bytes"] / whole.stats()["requests"]
    window = open_window(path, 0, staging_bytes=staging)
    window.read(WEIGHTS[0], far_apart, most_groups=0)
    assert window.stats()["requests"] > 0.75 * min(len(far_apart), staging / read_bytes)


def test_only_what_is_missing_is_read(path: str) -> None:
    window = open_window(path, 100)
    check(window, 0, list(range(100)))  # the first records have slots from the start
    assert window.stats()["bytes"] == 0
    check(window, 0, [*range(100), 250])
    assert window.stats()["requests"] == 1


# What is expected


@pytest.mark.parametrize("n_slots", [0, 7, 100])
@pytest.mark.parametrize("staging", [LEAST_STAGING, 48 << 10, 1 << 20])
@pytest.mark.parametrize("depth", [1, 4, 32])
def test_guesses_change_no_record(path: str, n_slots: int, staging: int, depth: int) -> None:
    window = open_window(path, n_slots, staging_bytes=staging, depth=depth)
    choose = random.Random(n_slots)
    for token in range(12):
        wanted = [some(choose, [0.0, 0.1, 0.5, 1.0][token % 4]) for _ in range(LAYERS)]
        # Right, half right, wrong, and more than there is room for.
        guess = [wanted[1], sorted({*wanted[1][::2], *some(choose, 0.1)}), some(choose, 0.2), list(range(N))]
        check(window, 0, wanted[0], expected=guess[token // 3])
        check(window, 1, wanted[1])
        window.commit([0])
    stats = window.stats()
    assert 0 < stats["expected_hits"] < stats["expected"]


def test_what_was_expected_is_not_read_again(path: str) -> None:
    window = open_window(path, 20)
    neurons = [50, 100, 150]
    check(window, 0, [5], expected=[5, *neurons, 200])  # 5 has a slot
    before = window.stats()
    assert before["requests"] == 4
    check(window, 1, [*neurons, 250])
    after = window.stats()
    assert after["requests"] == before["requests"] + 1
    assert (after["expected"], after["expected_hits"]) == (4, 3)
    window.commit([0])
    assert all(window.held(WEIGHTS[1], [*neurons, 250])) and not any(window.held(WEIGHTS[1], [200]))


def test_bad_guesses_end_by_themselves_and_good_ones_come_back(path: str) -> None:
    window = open_window(path, 0)

    def guesses(right: bool, n: int) -> int:
        before = window.stats()["expected"]
        for _ in range(n):
            check(window, 0, [10], expected=[200] if right else [100])
            check(window, 1, [200])
        return int(window.stats()["expected"] - before)

    assert guesses(False, 200) < 30
    assert guesses(False, 640) == 10  # one in 64, to see
    assert guesses(True, 640) > 100
    assert guesses(True, 100) == 100


@pytest.mark.parametrize("fault", ["eio@{}", "flip@{}:1600"])
def test_a_guess_that_fails_matters_only_when_it_was_right(path: str, fault: str) -> None:
    # Record 19 begins a few bytes behind a page, whatever the drive's block.
    for wanted, fails in (([150], False), ([19], True)):
        window = open_window(path, 10, fault=fault.format(2))  # the first two fill the slots
        check(window, 0, [5], expected=[19])
        if fails:
            with pytest.raises((DiskError, CorruptError)):
                check(window, 1, wanted)
        check(window, 1, wanted)


def test_a_guess_of_another_layer_is_let_go(path: str) -> None:
    window = open_window(path, 0, staging_bytes=LEAST_STAGING)
    for _ in range(10):
        check(window, 0, [1], expected=[7])
        check(window, 0, [7, 100, 200])
        window.commit([0])
        check(window, 0, [1], expected=[7])
        window.rollback()
    with pytest.raises(ArgumentError, match="after the one"):
        window.read(WEIGHTS[0], [1], next=WEIGHTS[0], expected=[2])
    with pytest.raises(ArgumentError, match="ascending"):
        window.read(WEIGHTS[0], [1], next=WEIGHTS[1], expected=[2, 2])


# Who stays


def test_what_was_used_stays(path: str) -> None:
    window = open_window(path, 50)
    neurons = list(range(200, 250))
    check(window, 0, neurons)
    window.commit([0])
    assert all(window.held(WEIGHTS[0], neurons))
    check(window, 0, neurons)
    assert window.stats()["requests"] == 1
    check(window, 1, neurons)  # another layer's slots are its own
    assert window.stats()["requests"] == 2


def test_what_only_rejected_rows_used_leaves_first(path: str) -> None:
    window = open_window(path, 40)
    check(window, 0, list(range(40)))
    window.commit([0])
    # Row 0 uses 100..109, row 1 uses 120..129; row 1 is dropped.
    neurons = [*range(100, 110), *range(120, 130)]
    check(window, 0, neurons, [1] * 10 + [2] * 10)
    window.commit([0])
    assert all(window.held(WEIGHTS[0], neurons))
    check(window, 0, list(range(200, 210)))
    window.commit([0])
    assert all(window.held(WEIGHTS[0], [*range(100, 110), *range(200, 210)]))
    assert not any(window.held(WEIGHTS[0], list(range(120, 130))))


def test_a_rolled_back_pass_teaches_nothing(path: str) -> None:
    window = open_window(path, 10)
    check(window, 0, list(range(50, 60)))
    window.rollback()
    check(window, 0, list(range(70, 80)))
    window.commit([0])
    assert all(window.held(WEIGHTS[0], list(range(70, 80))))


def test_a_frequent_neuron_outlasts_one_of_the_last_token(path: str) -> None:
    lasting = {}
    for half_life in (0.0, 64.0):
        window = open_window(path, 10, half_life_tokens=half_life)
        for _ in range(20):
            check(window, 0, list(range(10)))
            window.commit([0])
        for first in range(100, 200, 10):
            check(window, 0, list(range(first, first + 10)))
            window.commit([0])
        lasting[half_life] = sum(window.held(WEIGHTS[0], list(range(10))))
    assert lasting == {0.0: 0, 64.0: 10}


def test_the_window_of_the_last_tokens_against_a_model_of_it(path: str) -> None:
    n_slots, choose = 60, random.Random(5)
    window = open_window(path, n_slots, half_life_tokens=0.0)
    last: dict[int, int] = {}
    held = set(range(n_slots))
    hot = some(choose, 0.2)
    hits = 0
    for token in range(40):
        neurons = sorted({n for n in hot if choose.random() < 0.5} | set(some(choose, 0.03)))
        missing = [n for n in neurons if n not in held]
        hits += len(neurons) - len(missing)
        check(window, 0, neurons)
        window.commit([0])
        # The longest unused leave, the later neuron of two; nobody who is wanted now.
        leaving = sorted((n for n in held if n not in neurons), key=lambda n: (last.get(n, -1), -n))
        for neuron, old in zip(missing, leaving, strict=False):
            held.remove(old)
            held.add(neuron)
        last |= dict.fromkeys(neurons, token)
        assert window.stats()["hits"] == hits
    assert [n for n, there in enumerate(window.held(WEIGHTS[0], list(range(N)))) if there] == sorted(held)


# What goes wrong


@pytest.mark.parametrize(
    "fault", ["eio@{}", "short@{}", "zero@{}", "flip@{}:12345", "again@{}", "delay@{}:3"]
)
@pytest.mark.parametrize("depth", [1, 8])
def test_a_fault_at_every_read(path: str, fault: str, depth: int) -> None:
    harmless = fault[:5] in ("again", "delay")
    n_failed = 0
    for at in range(2, 14):  # the first two fill the slots
        window = open_window(path, 30, depth=depth, fault=fault.format(at))
        failed = False
        choose = random.Random(at)
        for _ in range(6):
            neurons = some(choose, 0.05)
            try:
                check(window, 0, neurons)
            except (DiskError, CorruptError):
                assert not failed
                failed = True
                window.rollback()
                check(window, 0, neurons)  # the same again
            window.commit([0])
        check(window, 0, list(range(N)))
        n_failed += failed
    # A bit may be turned between records, and half a long read is read on.
    least = {"eio@": 6, "zero": 6, "flip": 1}.get(fault[:4], 0)
    assert n_failed == 0 if harmless else n_failed >= least


def test_a_fault_while_loading(path: str) -> None:
    for at in range(2):
        with pytest.raises(DiskError):
            open_window(path, 30, fault=f"eio@{at}")
        with pytest.raises(CorruptError, match=f"layer {at}, neuron 3: .*neurons.records: chunk 3 "):
            open_window(path, 30, fault=f"flip@{at}:{8 * 3 * RECORD + 5}")


def test_a_drive_that_is_dead(path: str) -> None:
    window = open_window(path, 30, fault="eio@2+")
    for _ in range(3):
        with pytest.raises(DiskError):
            window.read(WEIGHTS[0], [100, 200])
        check(window, 0, list(range(30)))


def test_a_damaged_record_is_named_and_the_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "n.edge"
    write(path)
    offset = PackFile(path).entries["layers.1.neurons.records"].offset
    for neuron in (0, 17, N - 1):
        with open(path, "r+b") as file:
            file.seek(offset + neuron * RECORD + 77)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))
        window = open_window(str(path), 0)
        with pytest.raises(CorruptError, match=rf"layer 1, neuron {neuron}: .*chunk {neuron} .*edge verify"):
            window.read(WEIGHTS[1], [neuron])
        check(window, 1, [n for n in range(N) if n != neuron][::40])
        check(window, 0, [neuron])
        with open(path, "r+b") as file:
            file.seek(offset + neuron * RECORD + 77)
            file.write(bytes([byte]))


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "n.edge"
    write(path)
    window = open_window(str(path), 10)
    os.truncate(path, 2 * PAGE)
    with pytest.raises(DiskError, match="shrank"):
        window.read(WEIGHTS[1], [200])
    check(window, 1, list(range(10)))


def test_a_turn_cut_short(path: str) -> None:
    window = open_window(path, 20, staging_bytes=LEAST_STAGING)
    for most_groups in (0, 1, 2):
        window.read(WEIGHTS[0], list(range(N)), most_groups=most_groups)
        check(window, 1, [5, 100])
        window.read(WEIGHTS[0], list(range(N)), most_groups=most_groups)
        window.rollback()
        check(window, 0, [5, 100])


@pytest.mark.parametrize("neurons", [[-1], [N], [5, 5], [6, 5]])
def test_neurons_that_are_not_there(path: str, neurons: list[int]) -> None:
    window = open_window(path, 20)
    with pytest.raises(ArgumentError, match="ascending order"):
        window.read(WEIGHTS[0], neurons)
    with pytest.raises(ArgumentError, match="holds no neurons"):
        window.read(1, [0])
    with pytest.raises(ArgumentError):
        window.read(WEIGHTS[0], [1, 2], [1])
    check(window, 0, [1, 2])


# Memory


def placement_of(path: str, slots: list[int]) -> tuple[NeuronModel, list[int]]:
    file = PackFile(Path(path))
    try:
        return NeuronModel(weights_of(file)), slots
    finally:
        file.close()


@pytest.mark.parametrize("slots", [[0, 0], [17, 5], [N, 5], [N, N]])
def test_the_plan_counts_what_the_core_takes(path: str, slots: list[int]) -> None:
    model, _ = placement_of(path, slots)
    window = _edge.NeuronWindowTest(path, [slots[0], -1, slots[1], -1], staging_bytes=1 << 20)
    expected = sum(-(-n * RECORD // PAGE) * PAGE for n in slots) + _tables(model.records, slots)
    assert window.memory().get("neurons", 0) == expected
    assert window.memory().get("neuron staging", 0) == (0 if slots == [N, N] else 1 << 20)


@pytest.mark.parametrize("room", [100 << 10, 300 << 10, 500 << 10, 1 << 20])
def test_slots_fit_the_room(path: str, room: int) -> None:
    model, _ = placement_of(path, [])
    placed: NeuronPlacement | None = model.window("exact", room)
    if placed is None:
        assert room < model.least_bytes("exact")
        return
    assert placed.bytes + placed.staging_bytes <= room
    slots = [placed.slots.get(weight, -1) for weight in range(4)]
    window = _edge.NeuronWindowTest(path, slots, staging_bytes=placed.staging_bytes, budget=room)
    assert sum(window.memory().values()) == placed.bytes + placed.staging_bytes
    assert placed.bytes + placed.staging_bytes > room - (16 << 10) or slots[0] == slots[2] == N


def test_slots_follow_use(path: str) -> None:
    model, _ = placement_of(path, [])
    even, uneven = (_share_out(model.records, use, 100 * RECORD) for use in ([1, 1], [3, 1]))
    assert even[0] == even[1] and 40 <= even[0] <= 50
    assert uneven[0] > 2.9 * uneven[1]
    assert (
        _share_out(model.records, [9, 1], 400 * RECORD)[0] == N
    )  # what a full layer leaves goes to the other
    assert _share_out(model.records, [9, 1], 400 * RECORD)[1] > 90


def test_memory_that_does_not_suffice(path: str) -> None:
    with pytest.raises(BudgetError, match="neurons"):
        open_window(path, 100, budget=100 * RECORD)
    with pytest.raises(BudgetError, match="neuron staging"):
        open_window(path, 100, budget=240 * RECORD, staging_bytes=1 << 20)
    with pytest.raises(ArgumentError, match=r"layers\.0\.neurons\.records: expected at least"):
        open_window(path, 100, staging_bytes=LEAST_STAGING - PAGE)
    with pytest.raises(ArgumentError, match="expected slots for 0 to 300 neurons, found 301"):
        open_window(path, N + 1)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(20))
def test_random_turns_and_faults(path: str, seed: int) -> None:
    choose = random.Random(seed)
    kinds = ["eio@{}", "short@{}", "zero@{}", "flip@{}:99", "again@{}", "delay@{}:1"]
    for _ in range(30):
        fault = ",".join(
            choose.choice(kinds).format(choose.randrange(2, 60)) for _ in range(choose.randrange(3))
        )
        window = open_window(
            path,
            choose.randrange(N),
            depth=choose.choice([1, 2, 8, 32]),
            staging_bytes=LEAST_STAGING + PAGE * choose.randrange(60),
            fault=fault,
            half_life_tokens=choose.choice([0.0, 4.0, 64.0]),
        )
        for _ in range(20):
            for layer in range(LAYERS):
                neurons = some(choose, choose.random() ** 3)
                guess = some(choose, choose.random() ** 3) if layer == 0 else None
                try:
                    check(window, layer, neurons, [choose.randrange(1, 16) for _ in neurons], guess)
                except (DiskError, CorruptError):
                    window.rollback()
            rows = np.array([0, 1, 3])
            if choose.random() < 0.8:
                window.commit(rows[: choose.randrange(4)].tolist())
            else:
                window.rollback()
