"""Gate rows that stream: each row has a hash of its own, pages hold parts of several, and the bytes are the file's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _edge
import numpy as np
import pytest

from flashload import plan_directory
from flashload.errors import ArgumentError, CorruptError, DiskError
from flashload.format import PackFile, PackWriter
from flashload.plan import NEURONS, RESIDENT, STREAM, weights_of
from quant.formats import WeightFormat
from quant.formats.neuron import row_bytes

PAGE = 4096
#: (format, neurons, hidden): rows of 144, 272 and 1,536 bytes, whose shortest readable runs are 256, 256 and 8 of them.
GATES = [
    (WeightFormat.NEURON_Q4, 1000, 200),
    (WeightFormat.NEURON_Q8, 300, 96),
    (WeightFormat.NEURON_F16, 77, 700),
]
PART_BYTES = [PAGE, 50_000, 1 << 20]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[bytes]]:
    path = tmp_path_factory.mktemp("gates") / "gates.edge"
    fill = np.random.default_rng(5)
    data = [fill.bytes(rows * row_bytes(code, hidden)) for code, rows, hidden in GATES]
    with PackWriter(path, 1 << 22) as writer:
        for layer, ((code, rows, hidden), held) in enumerate(zip(GATES, data, strict=True)):
            writer.add(f"layers.{layer}.neurons.gates", code, rows, hidden, [held], layer)
    return str(path), data


def open_store(path: str, part_bytes: int, ring_bytes: int = 1 << 20, **options: Any) -> Any:
    placement, order = [STREAM] * len(GATES), list(range(len(GATES)))
    return _edge.WeightStoreTest(
        path, placement, order, ring_bytes=ring_bytes, part_bytes=part_bytes, **options
    )


def read(store: Any, weight: int) -> list[bytes]:
    """The parts of one weight."""
    parts, first = [], 0
    while first < GATES[weight][1]:
        end, data = store.acquire_tiles(weight, first)
        assert len(data) == (end - first) * row_bytes(GATES[weight][0], GATES[weight][2])
        parts.append(data)
        first = end
    return parts


def largest_part(path: str, part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(plan_directory, "_PART_BYTES", part_bytes)
    file = PackFile(Path(path))
    try:
        return max(plan_directory.part_bytes(weight) for weight in weights_of(file))
    finally:
        file.close()


@pytest.mark.parametrize("part_bytes", PART_BYTES)
@pytest.mark.parametrize("pages", [0, 1, 20])
@pytest.mark.parametrize("depth", [1, 8])
def test_the_bytes_of_the_file(
    pack: tuple[str, list[bytes]], part_bytes: int, pages: int, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the least ring that the plan may give on, pass after pass."""
    path, data = pack
    ring_bytes = largest_part(path, part_bytes, monkeypatch) + pages * PAGE
    store = open_store(path, part_bytes, ring_bytes, depth=depth)
    for _ in range(3):
        for weight, held in enumerate(data):
            parts = read(store, weight)
            assert b"".join(parts) == held
            assert len(parts) > 1 or part_bytes > len(held) or weight == 1  # 81,600 bytes, cut after 69,632


def test_the_plan_counts_the_parts_that_the_core_cuts(
    pack: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArgumentError, match=r"gates needs \d+ bytes, the stream ring has"):
        open_store(pack[0], PAGE, largest_part(pack[0], PAGE, monkeypatch) - PAGE)


@pytest.mark.parametrize("fault", ["eio@{}", "zero@{}", "flip@{}:777", "short@{}", "again@{}", "delay@{}:2"])
def test_a_fault_at_every_read(pack: tuple[str, list[bytes]], fault: str) -> None:
    """Nothing wrong is handed out, and the same rows can be asked for again."""
    n_failed = 0
    for at in range(8):
        store = open_store(pack[0], PAGE, fault=fault.format(at), depth=2)
        for weight, held in enumerate(pack[1]):
            try:
                parts = read(store, weight)
            except (DiskError, CorruptError) as error:
                assert "gates" in str(error) or "gates.edge" in str(error)
                n_failed += 1
                store.rewind()
                parts = read(store, weight)
            assert b"".join(parts) == held
    assert (n_failed > 0) == (fault[:4] in ("eio@", "zero", "flip"))


@pytest.mark.parametrize("placement", [RESIDENT, NEURONS])
def test_no_other_store_takes_them_without_slots(pack: tuple[str, list[bytes]], placement: int) -> None:
    with pytest.raises(ArgumentError, match="expected records of neurons where the plan has their slots"):
        _edge.WeightStoreTest(
            pack[0], [placement, STREAM, STREAM], [1, 2], ring_bytes=1 << 20, part_bytes=PAGE
        )
