"""The probe: what it measures is positive, kept, and never in the way."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import _edge
import pytest

from flashload import calibrate, probe, probe_kernels
from flashload.probe import DriveRate, Machine, fit_drive
from flashload.probe_kernels import NeuronRate


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("EDGE_CACHE", str(folder))
    return folder


def points(t0: float, rate: float, *sizes: int) -> list[dict[str, float]]:
    return [{"bytes_per_request": s, "bytes_per_second": s / (t0 + s / rate)} for s in sizes]


def drive(**changes: Any) -> DriveRate:
    return dataclasses.replace(DriveRate(20e-6, 2e9, 1.8e9, 100e-6, 0.0), **changes)


def machine(date: str = "2026-11-21T00:00:00+00:00", **changes: Any) -> Machine:
    kernels = {3: {1: 1e11, 8: 4e11, 128: 6e11}, 4: {1: 2e11, 8: 4e11, 128: 6e11}}
    layer = calibrate.LayerCost(2e-5, 1e-5, 1e-9, 4e-11, 2e-11)
    return dataclasses.replace(Machine(date, "cpu", 2, 2, "ref", 2e10, kernels, layer, drive()), **changes)


def test_fit_finds_what_made_the_points() -> None:
    t0, rate = fit_drive(points(30e-6, 2.5e9, 4096, 32768, 262144, 1 << 20))
    assert t0 == pytest.approx(30e-6, rel=1e-6) and rate == pytest.approx(2.5e9, rel=1e-6)


def test_fit_does_not_depend_on_the_order() -> None:
    made = points(30e-6, 2.5e9, 1 << 20, 4096, 262144)
    assert fit_drive(made) == pytest.approx(fit_drive(sorted(made, key=lambda p: p["bytes_per_request"])))


def test_a_disturbed_large_request_does_not_count() -> None:
    made = points(30e-6, 2.5e9, 4096, 32768, 262144)
    made.append({"bytes_per_request": 1 << 20, "bytes_per_second": 1e7})
    _, rate = fit_drive(made)
    assert rate > 1e9


def test_reads_cost_requests_and_bytes_bounded_by_the_stream() -> None:
    rate = drive()
    assert rate.seconds(0) == 0.0
    small, large = rate.seconds(1 << 30, 4096), rate.seconds(1 << 30, 1 << 20)
    assert small > 10 * large / 2 and large == pytest.approx((1 << 30) / 1.8e9)
    assert rate.seconds(4096) == pytest.approx(20e-6 + 4096 / 2e9)


def test_less_in_flight_is_slower() -> None:
    measured = [(4096, 1, 5e7), (262144, 2, 9e8), (262144, 4, 1e9), (4096, 32, 2e8), (262144, 8, 1.8e9)]
    keys = ("bytes_per_request", "depth", "bytes_per_second")
    rate = drive(points=[dict(zip(keys, point, strict=True)) for point in measured])
    assert rate.rate_with(512 << 10) == 9e8 and rate.rate_with(768 << 10) == pytest.approx(9.5e8)
    assert rate.rate_with(2048) == pytest.approx(2.5e7) and rate.rate_with(0) == 0
    found = [rate.seconds(1 << 30, 1 << 18, n << 10) for n in (4, 64, 128, 512, 1024, 1536, 2048, 8192)]
    assert found == sorted(found, reverse=True) and found[0] == pytest.approx((1 << 30) / 5e7)
    assert found[-1] == rate.seconds(1 << 30, 1 << 18)
    assert drive().rate_with(1) == math.inf  # nothing is known of it


def test_kernel_rates_between_what_was_measured() -> None:
    rates = [machine().macs_per_second(3, rows) for rows in (1, 2, 8, 64, 128, 500)]
    assert rates == sorted(rates) and rates[0] == 1e11 and rates[-1] == 6e11
    assert machine().macs_per_second(99, 1) == 1e11  # unknown: the slowest known


def test_the_drive_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(os.urandom(1 << 20) * 8)
    found = probe.probe_drive(file)
    assert found.measured and len(found.points) == 12
    for rate in (found.bytes_per_second, found.sequential_bytes_per_second, found.first_byte_seconds):
        assert rate > 0
    assert found.sequential_bytes_per_second >= max(p["bytes_per_second"] for p in found.points)
    assert found.request_seconds >= 0 and found.cpu_seconds_per_byte > 0


def test_layers_are_measured() -> None:
    cost, notes = calibrate.measure_layers(1)
    assert notes == []
    assert cost.layer_seconds >= 0 and cost.vocab_seconds > 0
    assert cost.kv_seconds + cost.kv_head_seconds > 0


def test_kernels_are_measured_for_every_tile_format() -> None:
    from quant.formats import TILE_FORMATS

    found = probe_kernels.probe_kernels(1)
    assert set(found) == {int(code) for code in TILE_FORMATS}
    assert all(set(rates) == set(probe_kernels.KERNEL_BATCHES) for rates in found.values())
    assert all(rate > 0 for rates in found.values() for rate in rates.values())


def test_kernels_of_records_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_kernels, "_NEURON_BYTES", 16 << 20)
    found = probe_kernels.probe_neurons(1)
    assert set(found) == {20, 21, 22}
    for rate in found.values():
        assert rate.axpy > 0 and rate.dot_seconds(1e6, 1) > 0
        assert rate.dot_seconds(1e6, 32) == pytest.approx(2 * rate.dot_seconds(1e6, 16))


def test_rows_of_records_between_what_was_measured() -> None:
    rate = NeuronRate({1: 4e10, 8: 1e10}, 2e10)
    seconds = [rate.dot_seconds(1e9, rows) for rows in (1, 4, 8, 32)]
    assert seconds == sorted(seconds) and seconds[0] == 1 / 40 and seconds[-1] == pytest.approx(0.4)
    finer = NeuronRate({1: 4e10, 8: 1e10, 16: 8e9}, 2e10)
    assert finer.dot_seconds(1e9, 8) == pytest.approx(0.1)
    assert finer.dot_seconds(1e9, 12) == pytest.approx((0.1 + 0.125) / 2)
    assert finer.dot_seconds(1e9, 32) == pytest.approx(0.25)


class Counted:
    """Stands in for everything slow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.formats: list[int] = []
        monkeypatch.setattr(probe, "probe_drive", self.drive)
        monkeypatch.setattr(probe, "probe_bus", lambda threads: 2e10)
        monkeypatch.setattr(probe, "probe_kernels", lambda threads: machine().kernels)
        monkeypatch.setattr(probe, "probe_neurons", self.neurons)
        monkeypatch.setattr(probe, "probe_memory_shares", self.shares)
        monkeypatch.setattr(probe, "measure_layers", lambda threads: (machine().layer, []))
        monkeypatch.setattr(probe, "_TEMPORARY_BYTES", 4 << 20)
        monkeypatch.setattr(probe, "_is_busy", lambda: False)

    def neurons(self, threads: int, formats: list[int]) -> dict[int, NeuronRate]:
        self.formats += formats
        return {code: NeuronRate({1: 4e10, 8: 1e10}, 2e10) for code in formats}

    def shares(self, threads: int, formats: list[int]) -> dict[int, float]:
        self.formats += formats
        return dict.fromkeys(formats, 0.8)

    def drive(self, path: Path) -> DriveRate:
        self.calls += 1
        self.read = Path(os.readlink(path)) if path.is_symlink() else path  # a file without a name
        self.read_bytes = path.stat().st_size
        return drive()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def test_figures_are_kept_until_asked_anew(tmp_path: Path, counted: Counted) -> None:
    said = []
    first = probe.probe(tmp_path, 2, on_measure=lambda: said.append(1))
    assert probe.probe(tmp_path, 2, on_measure=lambda: said.append(1)) == first
    assert counted.calls == 1 and said == [1]
    probe.probe(tmp_path, 2, force=True)
    assert counted.calls == 2
    probe.probe(tmp_path, 1)  # another number of threads is another machine
    assert counted.calls == 3


def test_formats_are_measured_once_when_a_model_has_them(tmp_path: Path, counted: Counted) -> None:
    assert probe.probe(tmp_path, 2).neurons == {} and counted.formats == []
    one = probe.probe(tmp_path, 2, formats={4, 21, 100})
    assert one.neurons[21].axpy == 2e10 and one.memory_shares == {4: 0.8}
    two = probe.probe(tmp_path, 2, formats={4, 3, 21})
    assert two.memory_shares == {4: 0.8, 3: 0.8} and probe.probe(tmp_path, 2) == two
    assert counted.calls == 1 and sorted(counted.formats) == [3, 4, 21]


def test_memory_holds_products_back_by_their_share_of_the_bus() -> None:
    one = machine(memory_shares={4: 0.5})
    assert one.memory_seconds(4, 1e10) == 2 * one.memory_seconds(3, 1e10) == 1.0


def test_shares_of_the_bus_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_kernels, "_SHARE_BYTES", 40 << 20)
    monkeypatch.setattr(probe_kernels, "_SHARE_SECONDS", 0.01)
    found = probe_kernels.probe_memory_shares(1, [4, 3])
    assert set(found) == {3, 4} and all(0 < share <= 1 for share in found.values())


def test_the_temporary_file_is_gone_and_small(tmp_path: Path, counted: Counted) -> None:
    probe.probe(tmp_path, 2)
    assert counted.read.parent == tmp_path and not counted.read.exists()
    assert 0 < counted.read_bytes <= 256 << 20
    assert list(tmp_path.glob(".probe-*")) == []


def test_a_large_file_of_the_model_is_read_instead(
    tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_LEAST_FILE_BYTES", 1000)
    file = tmp_path / "model"
    file.write_bytes(bytes(2000))
    probe.probe(tmp_path, 2, [tmp_path / "absent", file])
    assert counted.read == file and file.stat().st_size == 2000


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        "{}",
        "{not json",
        '{"date": 3}',
        json.dumps(dataclasses.asdict(machine()) | {"bus_bytes_per_second": -1}),
        json.dumps(dataclasses.asdict(machine(date="2001-01-01T00:00:00+00:00"))),
        json.dumps(dataclasses.asdict(machine(date="3001-01-01T00:00:00+00:00"))),
        json.dumps(dataclasses.asdict(machine()) | {"surprise": 1}),
    ],
)
def test_damaged_and_old_figures_are_measured_again(
    damage: str, tmp_path: Path, cache: Path, counted: Counted
) -> None:
    probe.probe(tmp_path, 2)
    (kept,) = cache.glob("probe-*.json")
    kept.write_text(damage)
    assert probe.probe(tmp_path, 2).bus_bytes_per_second == 2e10
    assert counted.calls == 2
    assert json.loads(kept.read_text())["bus_bytes_per_second"] == 2e10


def test_busy_figures_do_not_last(tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_is_busy", lambda: True)
    assert any("busy" in note for note in probe.probe(tmp_path, 2).notes)
    probe.probe(tmp_path, 2)
    assert counted.calls == 1
    monkeypatch.setattr(probe, "_MAX_BUSY_AGE_SECONDS", -1.0)
    probe.probe(tmp_path, 2)
    assert counted.calls == 2


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_drive_is_assumed_and_said(
    tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TemporaryFile", "NamedTemporaryFile"):
        monkeypatch.setattr(probe.tempfile, name, refuse)
    found = probe.probe(tmp_path, 2)
    assert not found.drive.measured and "No space left" in found.drive.note
    assert any("could not be kept" in note for note in found.notes)


def test_a_folder_that_is_not_there_takes_its_nearest_parent(tmp_path: Path, counted: Counted) -> None:
    probe.probe(tmp_path / "not" / "yet", 2)
    assert counted.read.parent == tmp_path and not (tmp_path / "not").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_file_system_is_named(tmp_path: Path) -> None:
    device, _, kind = probe.file_system(tmp_path).partition(" ")
    assert device.count(":") == 1 and kind


def test_json_round_trip() -> None:
    one = machine()
    assert probe.machine_from(json.loads(json.dumps(one.to_dict()))) == one


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="files without a name need /proc")
def test_a_file_to_read_has_no_name(tmp_path: Path) -> None:
    """Nothing of it stays, whatever ends the process."""
    with probe._file_to_read(tmp_path, []) as path:
        assert path.stat().st_size >= 64 << 20 and path.stat().st_dev == tmp_path.stat().st_dev
        assert list(tmp_path.iterdir()) == []
        assert _edge.bench_read(str(path), bytes_per_request=1 << 20, depth=4, seconds=0.01)["bytes"] > 0
