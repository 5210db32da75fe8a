"""How fast this machine reads: its drive, its memory bus, its matrix products. Measured once in 2 seconds, then kept.

The figures of a probe are those of its better passes: a neighbour can only slow a pass down, and a plan is for the
machine at rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from flashload.cache import cache_folder
from flashload.calibrate import LayerCost, measure_layers
from flashload.pack_layout import xxh3
from flashload.probe_kernels import (
    NeuronRate,
    probe_bus,
    probe_kernels,
    probe_memory_shares,
    probe_neurons,
    probe_touch,
)
from quant.formats import TILE_FORMATS
from quant.formats.neuron import NEURON_FORMATS

_VERSION = 5
#: Bytes of one read of a stream (cpp/store/read_run.h), and reads the core keeps in flight (cpp/store).
READ_BYTES = 1 << 20
_DEPTH = 32
_REQUEST_BYTES = (4 << 10, 32 << 10, 256 << 10, 1 << 20)
_DEPTHS = (1, _DEPTH)
#: A window of records has less in flight than that: requests as long as its longest, so many at a time.
_WINDOW_REQUEST_BYTES, _WINDOW_DEPTHS = 256 << 10, (2, 4, 8, 16)
_POINT_SECONDS = 0.035
_SEQUENTIAL_SECONDS = 0.25
#: A smaller file is read from one place of the drive only, or from its cache.
_LEAST_FILE_BYTES = 64 << 20
_TEMPORARY_BYTES = 64 << 20
#: A machine changes (other drive, other kernel): a probe this old is measured again.
_MAX_AGE_SECONDS = 90 * 86400.0
#: What was measured among more running programs than cores is good for the next calls only.
_MAX_BUSY_AGE_SECONDS = 600.0


@dataclass(frozen=True)
class DriveRate:
    """The drive in three numbers: ``n`` reads of ``size`` bytes take ``n * (request_seconds + size / rate)``.

    Attributes:
        request_seconds: cost of one request among many in flight.
        bytes_per_second: the rate large requests approach.
        sequential_bytes_per_second: the most one long stream gets.
        first_byte_seconds: latency of a single small request.
        cpu_seconds_per_byte: processor time the reading itself takes (submission, and hashing every chunk).
        cpu_seconds_per_request: the same of one small request, besides its bytes.
        measured: False for assumed figures; ``note`` says why.
    """

    request_seconds: float
    bytes_per_second: float
    sequential_bytes_per_second: float
    first_byte_seconds: float
    cpu_seconds_per_byte: float
    points: list[dict[str, float]] = dataclasses.field(default_factory=list)
    direct: bool = True
    measured: bool = True
    note: str = ""
    cpu_seconds_per_request: float = 0.0

    def seconds(
        self, n_bytes: float, request_bytes: float = READ_BYTES, in_flight_bytes: float = math.inf
    ) -> float:
        """Time to read ``n_bytes`` in requests of ``request_bytes``, with many of them or so many bytes in flight."""
        if n_bytes <= 0:
            return 0.0
        requests = n_bytes / min(request_bytes, n_bytes)
        each = requests * self.request_seconds + n_bytes / self.bytes_per_second
        return max(each, n_bytes / min(self.sequential_bytes_per_second, self.rate_with(in_flight_bytes)))

    def rate_with(self, in_flight_bytes: float) -> float:
        """The most bytes per second with so many in flight; between the points measured, and below in proportion.

        Few bytes in flight are few requests, or short ones: of either, the better rate.
        """
        of_requests = ((p["depth"] * p["bytes_per_request"], p["bytes_per_second"]) for p in self.points)
        known = [(0.0, 0.0)]
        for n_bytes, rate in sorted(of_requests):
            known.append((n_bytes, max(rate, known[-1][1])))
        for (low, low_rate), (high, high_rate) in itertools.pairwise(known):
            if low <= in_flight_bytes < high:
                return low_rate + (in_flight_bytes - low) / (high - low) * (high_rate - low_rate)
        return math.inf


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of the machine.

    Attributes:
        bus_bytes_per_second: sequential read rate of main memory with ``threads`` readers.
        kernels: format code -> activation rows -> multiply-adds per second of weights that are in cache.
        layer: overheads of a decoder's layer and token (see :class:`flashload.calibrate.LayerCost`).
        memory_shares: format code -> share of the bus that products of one row with weights in no cache get.
        neurons: format code of records -> what their kernels do.
        touch_seconds_per_byte: the kernel's time to give a program memory it has not used before.
        busy: other programs wanted more than the cores there are while this was measured.

    ``memory_shares`` and ``neurons`` hold the formats that models had which were asked about.
    """

    date: str
    name: str
    threads: int
    cores: int
    isa: str
    bus_bytes_per_second: float
    kernels: dict[int, dict[int, float]]
    layer: LayerCost
    drive: DriveRate
    memory_shares: dict[int, float] = dataclasses.field(default_factory=dict)
    neurons: dict[int, NeuronRate] = dataclasses.field(default_factory=dict)
    touch_seconds_per_byte: float = 0.0
    busy: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)

    def macs_per_second(self, weight_format: int, rows: float) -> float:
        """Multiply-adds per second at ``rows`` activation rows, log-interpolated between those measured."""
        known = sorted((self.kernels.get(weight_format) or self._slowest()).items())
        if rows <= known[0][0]:
            return known[0][1]
        for (low, low_rate), (high, high_rate) in itertools.pairwise(known):
            if rows <= high:
                share = math.log(rows / low) / math.log(high / low)
                return float(low_rate ** (1 - share) * high_rate**share)
        return known[-1][1]

    def memory_seconds(self, weight_format: int, n_bytes: float) -> float:
        """Products of one row with ``n_bytes`` of weights that lie in memory, as far as memory holds them back."""
        return n_bytes / (self.bus_bytes_per_second * self.memory_shares.get(weight_format, 1.0))

    def product_seconds(self, weight_format: int, n_bytes: float, n_values: float, rows: float) -> float:
        """Products of ``rows`` rows with ``n_values`` weights that lie in memory.

        While weights arrive one row is multiplied with them; what more rows take is added to that, not hidden behind
        it: 32 rows of Q4_0 did 540 G a second with weights in cache and 455 from memory, 8 rows 510 and 300.
        """
        one = n_values / self.macs_per_second(weight_format, 1.0)
        more = n_values * rows / self.macs_per_second(weight_format, rows) - one if rows > 1 else 0.0
        return max(self.memory_seconds(weight_format, n_bytes), one) + max(0.0, more)

    def missing(self, formats: Collection[int]) -> list[int]:
        """Of these formats those that were not measured in memory."""
        known = {*self.memory_shares, *self.neurons}
        return [
            code for code in formats if code not in known and (code in TILE_FORMATS or code in NEURON_FORMATS)
        ]

    def _slowest(self) -> dict[int, float]:
        return min(self.kernels.values(), key=lambda rates: rates[1])

    def to_dict(self) -> dict[str, Any]:
        """JSON form; the inverse of :func:`machine_from`."""
        return dataclasses.asdict(self)


#: What a drive is taken for when it cannot be measured: a modest NVMe drive.
ASSUMED_DRIVE = DriveRate(30e-6, 1.2e9, 1.2e9, 120e-6, 0.0, direct=True, measured=False)


def fit_drive(points: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """(request_seconds, bytes_per_second) of ``size`` -> seconds per request, by least squares of the relative error.

    Args:
        points: ``bytes_per_request`` and ``bytes_per_second`` at one queue depth, two sizes at least, in any order.
    """
    points = sorted(points, key=lambda p: p["bytes_per_request"])
    # A larger request is never slower per byte; where it was measured so, a neighbour used the drive.
    rates = list(itertools.accumulate((p["bytes_per_second"] for p in points), max))
    sizes = [p["bytes_per_request"] for p in points]
    seconds = [size / rate for size, rate in zip(sizes, rates, strict=True)]
    # Weighted by 1 / seconds**2, so that a request of 4 KiB counts as much as one of 1 MiB.
    w = [1 / s**2 for s in seconds]
    sw, sx, sy = sum(w), _dot(w, sizes), _dot(w, seconds)
    sxx = sum(a * x * x for a, x in zip(w, sizes, strict=True))
    sxy = sum(a * x * y for a, x, y in zip(w, sizes, seconds, strict=True))
    slope = (sw * sxy - sx * sy) / (sw * sxx - sx * sx)
    if slope <= 0:
        return 0.0, rates[-1]
    return max(0.0, (sy - slope * sx) / sw), 1 / slope


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def probe_drive(path: Path) -> DriveRate:
    """Reads ``path`` as the core does, in about a second.

    Raises:
        EdgeError: the file cannot be read.
    """
    import _edge

    points = []
    measured = [*itertools.product(_DEPTHS, _REQUEST_BYTES)]
    measured += [(depth, _WINDOW_REQUEST_BYTES) for depth in _WINDOW_DEPTHS]
    for depth, size in measured:
        runs = [
            _edge.bench_read(str(path), bytes_per_request=size, depth=depth, seconds=_POINT_SECONDS)
            for _ in range(2)
        ]
        got = max(runs, key=lambda run: run["bytes_per_second"])
        keys = ("bytes_per_second", "mean_latency_us", "p99_latency_us", "bytes", "cpu_seconds")
        points.append({"bytes_per_request": size, "depth": depth} | {key: got[key] for key in keys})
    got = _edge.bench_read(
        str(path), bytes_per_request=READ_BYTES, depth=_DEPTH, seconds=_SEQUENTIAL_SECONDS, sequential=True
    )
    cpu = got["cpu_seconds"] / got["bytes"]
    request_seconds, rate = fit_drive([p for p in points if p["depth"] == _DEPTH])
    single, many = (next(p for p in points if p["depth"] == depth) for depth in _DEPTHS)
    fastest = max(got["bytes_per_second"], *(p["bytes_per_second"] for p in points))
    return DriveRate(
        request_seconds,
        rate,
        fastest,
        1e-6 * single["mean_latency_us"],
        cpu + _hash_seconds_per_byte(),
        points,
        direct=bool(got["direct"]),
        note="" if got["direct"] else "the file system refuses O_DIRECT: rates include the kernel's copy",
        cpu_seconds_per_request=many["cpu_seconds"] * many["bytes_per_request"] / many["bytes"],
    )


def _hash_seconds_per_byte() -> float:
    """Every chunk that is read is hashed once (xxh3)."""
    data = b"\x5a" * (4 << 20)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        xxh3(data)
        best = min(best, time.perf_counter() - start)
    return best / len(data)


def _machine_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def file_system(path: Path) -> str:
    """Device and kind of the file system that holds ``path``, such as ``259:1 ext4``."""
    device = path.stat().st_dev
    where = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            fields = line.split()
            if fields[2] == where and "-" in fields:
                return f"{where} {fields[fields.index('-') + 1]}"
    return where


@contextlib.contextmanager
def _file_to_read(place: Path, candidates: Sequence[Path]) -> Iterator[Path]:
    """A large file on the drive of ``place``: one of ``candidates``, or a temporary one.

    Raises:
        OSError: none is there and none can be written.
    """
    for file in candidates:
        with contextlib.suppress(OSError):
            if file.stat().st_size >= _LEAST_FILE_BYTES and file.stat().st_dev == place.stat().st_dev:
                yield file
                return
    # Without a name where the system can do that: whatever ends this process, no file stays.
    by_number = Path("/proc/self/fd")
    make = tempfile.TemporaryFile if by_number.is_dir() else tempfile.NamedTemporaryFile
    with make(dir=place, prefix=".probe-", suffix=".tmp") as made:
        # Random, because some drives and file systems store zeros and repeats as nothing.
        for _ in range(_TEMPORARY_BYTES >> 22):
            made.write(os.urandom(4 << 20))
        made.flush()
        os.fsync(made.fileno())
        yield by_number / str(made.fileno()) if by_number.is_dir() else Path(made.name)


def _existing(folder: Path) -> Path:
    """``folder``, or its nearest ancestor that exists."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _read_drive(place: Path, candidates: Sequence[Path]) -> DriveRate:
    from flashload.errors import EdgeError

    try:
        with _file_to_read(place, candidates) as file:
            return probe_drive(file)
    except (OSError, EdgeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        note = f"{place}: the drive could not be measured ({why}); assuming "
        note += f"{ASSUMED_DRIVE.sequential_bytes_per_second / 1e9:.1f} GB/s"
        return dataclasses.replace(ASSUMED_DRIVE, note=note)


def probe(
    place: Path,
    threads: int,
    candidates: Sequence[Path] = (),
    force: bool = False,
    formats: Collection[int] = (),
    on_measure: Callable[[], None] | None = None,
) -> Machine:
    """The machine as a plan needs it: from the cache, or measured now (2 to 3 seconds) and cached.

    Args:
        place: the folder whose drive counts: where the pack lies or will lie.
        threads: compute threads.
        candidates: files that may be read to measure the drive; without a large one on the same drive a temporary
            file of 64 MiB is written into ``place``.
        force: measure even when the cache has figures.
        formats: of the weights there are: how their kernels do with weights in memory is wanted too.
        on_measure: called before anything is measured.

    A drive that cannot be measured (read-only, full) is assumed, and ``drive.note`` says so; nothing is raised.
    """
    import _edge

    place = _existing(place)
    isa = str(_edge.default_isa())
    kept = _kept(place, threads)
    found = None if force else _cached(kept)
    if found is not None and (found.drive.measured or not os.access(place, os.W_OK)):
        if found.missing(formats):
            found = _with_formats(found, formats)
            _keep(kept, found)
        return found
    if on_measure is not None:
        on_measure()
    busy = _is_busy()
    layer, notes = measure_layers(threads)
    if busy:
        notes.append("the machine was busy when it was measured; edge plan --probe measures again")
    machine = Machine(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        name=_machine_name(),
        threads=threads,
        cores=os.cpu_count() or 1,
        isa=isa,
        bus_bytes_per_second=probe_bus(threads),
        kernels=probe_kernels(threads),
        layer=layer,
        drive=_read_drive(place, candidates),
        touch_seconds_per_byte=probe_touch(),
        busy=busy,
        notes=notes,
    )
    machine = _with_formats(machine, formats)
    if why := _keep(kept, machine):
        machine.notes.append(why)
    return machine


def known(place: Path, threads: int) -> Machine | None:
    """What :func:`probe` measured of this machine before; None when it has not, or that is old."""
    return _cached(_kept(_existing(place), threads))


def _kept(place: Path, threads: int) -> Path:
    import _edge

    isa = str(_edge.default_isa())
    key = [_VERSION, file_system(place), _machine_name(), platform.machine(), isa, threads, os.cpu_count()]
    return cache_folder() / f"probe-{xxh3(json.dumps(key).encode()):016x}.json"


def _with_formats(machine: Machine, formats: Collection[int]) -> Machine:
    """The same, with these formats measured."""
    missing = machine.missing(formats)
    shares = probe_memory_shares(machine.threads, [code for code in missing if code in TILE_FORMATS])
    neurons = probe_neurons(machine.threads, [code for code in missing if code in NEURON_FORMATS])
    return dataclasses.replace(
        machine, memory_shares=machine.memory_shares | shares, neurons=machine.neurons | neurons
    )


def _is_busy() -> bool:
    try:
        return os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)
    except (OSError, AttributeError):
        return False


def _keep(path: Path, machine: Machine) -> str:
    """Writes the figures into the cache; returns why it could not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(machine.to_dict(), file)
        os.replace(file.name, path)
    except OSError as error:
        return f"{path.parent}: the figures could not be kept: {error.strerror}"
    return ""


def _cached(path: Path) -> Machine | None:
    """Figures measured before; None when there are none, or what is there is old, damaged or from another version."""
    try:
        machine = machine_from(json.loads(path.read_text()))
        age = datetime.now(timezone.utc) - datetime.fromisoformat(machine.date)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    most = _MAX_BUSY_AGE_SECONDS if machine.busy else _MAX_AGE_SECONDS
    return machine if 0 <= age.total_seconds() < most else None


def machine_from(value: dict[str, Any]) -> Machine:
    """The inverse of :meth:`Machine.to_dict`; ValueError, TypeError or KeyError for anything that does not write."""
    fields = dict(value)
    fields["kernels"] = {
        int(code): {int(rows): float(rate) for rows, rate in rates.items()}
        for code, rates in fields["kernels"].items()
    }
    fields["memory_shares"] = {int(code): float(share) for code, share in fields["memory_shares"].items()}
    fields["neurons"] = {
        int(code): NeuronRate({int(rows): float(r) for rows, r in rate["dot"].items()}, float(rate["axpy"]))
        for code, rate in fields["neurons"].items()
    }
    fields["layer"] = LayerCost(**fields["layer"])
    fields["drive"] = DriveRate(**fields["drive"])
    machine = Machine(**fields)
    numbers = [machine.bus_bytes_per_second, machine.drive.bytes_per_second]
    numbers += [machine.drive.sequential_bytes_per_second]
    numbers += machine.memory_shares.values()
    numbers += [x for rate in machine.neurons.values() for x in (rate.axpy, *rate.dot.values())]
    numbers += [rate for rates in machine.kernels.values() for rate in rates.values()]
    if not all(math.isfinite(x) and x > 0 for x in numbers) or not machine.kernels:
        raise ValueError("a rate is not a positive number")
    return machine
