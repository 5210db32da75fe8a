"""How fast this machine's kernels and its memory are, without a model."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median

from flashload.room import RoomReader
from quant.formats import TILE_FORMATS, WeightFormat
from quant.formats.neuron import NEURON_FORMATS, row_bytes

#: Far more than the last cache holds, also one shared with other machines: where this was measured, 128 MiB read a
#: quarter faster than 1 GiB. Less where memory is scarce.
_BUS_BYTES, _BUS_LEAST_BYTES, _BUS_SHARE = 1 << 30, 64 << 20, 8
_BUS_SECONDS = 0.25
#: A matrix that stays in cache: what a kernel does when memory does not hold it back.
_KERNEL_ROWS, _KERNEL_COLS = 1024, 1024
_KERNEL_SECONDS = 0.012
#: Rows of activations: one token, a small chunk, a full one.
KERNEL_BATCHES = (1, 8, 128)
#: Records of three rows, more than the last cache holds, and as many of them as a layer has active.
_NEURON_BYTES, _NEURON_HIDDEN, _NEURON_ACTIVE = 192 << 20, 4096, 1024
#: Rows of activations: one token, a small chunk, as many as share a neuron's weights (cpp/model/sparse_ffn.cc).
_NEURON_BATCHES = (1, 8, 16)
_NEURON_SECONDS = 0.03
#: Matrices as a model has them, more than the last cache holds.
_SHARE_ROWS, _SHARE_COLS, _SHARE_BYTES, _SHARE_SECONDS = 4096, 4096, 192 << 20, 0.1
_TOUCH_BYTES = 32 << 20


@dataclass(frozen=True)
class NeuronRate:
    """Kernels of scattered records of neurons that are in memory and in no cache.

    Attributes:
        dot: activation rows -> bytes of rows per second, multiplied with all of them.
        axpy: bytes of columns per second, added for one row.
    """

    dot: dict[int, float]
    axpy: float

    def dot_seconds(self, n_bytes: float, rows: float) -> float:
        """Every activation row with ``n_bytes`` of rows; between the numbers of rows measured in proportion."""
        known = sorted(self.dot.items())
        (low, low_rate), (high, high_rate) = known[0], known[-1]
        if rows >= high:
            return n_bytes / high_rate * rows / high
        for at, rate in known:
            if at <= rows:
                low, low_rate = at, rate
            else:
                high, high_rate = at, rate
                break
        share = max(0.0, rows - low) / max(1, high - low)
        return n_bytes * (1 / low_rate + share * (1 / high_rate - 1 / low_rate))


def probe_kernels(threads: int) -> dict[int, dict[int, float]]:
    """Multiply-adds per second of every tile format at :data:`KERNEL_BATCHES` rows, weights in cache."""
    import _edge

    isa = _edge.default_isa()
    rates: dict[int, dict[int, float]] = {}
    for code in TILE_FORMATS:
        rates[int(code)] = {}
        for rows in KERNEL_BATCHES:
            got = _edge.bench_gemv(
                isa, int(code), _KERNEL_ROWS, _KERNEL_COLS, rows, 1, threads, _KERNEL_SECONDS
            )
            # Processor time leaves out what the scheduler gave to others, which on a busy machine is most of a pass.
            best = min(*got["gemv_seconds"], *(s / threads for s in got["gemv_cpu_seconds"] if s > 0))
            rates[int(code)][rows] = _KERNEL_ROWS * _KERNEL_COLS * rows / best
    return rates


def probe_memory_shares(threads: int, formats: Collection[int]) -> dict[int, float]:
    """Share of the bus's rate that products of one row get of weights in memory, by format; 0.2 seconds each."""
    import _edge

    isa = _edge.default_isa()
    shares = {}
    for code in formats:
        n_matrices = _SHARE_BYTES // _edge.tile_bytes(code, _SHARE_ROWS, _SHARE_COLS)
        got = _edge.bench_gemv(isa, code, _SHARE_ROWS, _SHARE_COLS, 1, n_matrices, threads, _SHARE_SECONDS)
        reads = [got["read_bytes"] / s for s in got["read_seconds"]]
        products = [got["gemv_bytes"] / s for s in got["gemv_seconds"]]
        # Pass by pass, since a neighbour slows both of a pair.
        shares[int(code)] = min(1.0, median(a / b for a, b in zip(products, reads, strict=True)))
    return shares


def probe_touch() -> float:
    """Seconds per byte until memory that is new to a program can be used, zeroed by the kernel."""
    with mmap.mmap(-1, _TOUCH_BYTES) as memory:
        with contextlib.suppress(OSError, AttributeError):
            memory.madvise(mmap.MADV_HUGEPAGE)  # as the core asks for it
        start = time.perf_counter()
        for at in range(0, _TOUCH_BYTES, mmap.PAGESIZE):
            memory[at] = 1
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        for at in range(0, _TOUCH_BYTES, mmap.PAGESIZE):
            memory[at] = 2
        # Less what the loop itself takes.
        return max(0.0, seconds - (time.perf_counter() - start)) / _TOUCH_BYTES


def probe_neurons(threads: int, formats: Collection[int] = tuple(NEURON_FORMATS)) -> dict[int, NeuronRate]:
    """Rates of these formats of records; half a second each."""
    import _edge

    isa = _edge.default_isa()
    rates = {}
    for code in formats:
        n_records = _NEURON_BYTES // (3 * row_bytes(WeightFormat(code), _NEURON_HIDDEN))
        dot, axpy = {}, 0.0
        for rows in _NEURON_BATCHES:
            got = _edge.bench_neurons(
                isa, int(code), _NEURON_HIDDEN, n_records, _NEURON_ACTIVE, rows, threads, _NEURON_SECONDS
            )
            dot[rows] = got["bytes"] / _lower_quartile(got["dot_seconds"])
            axpy = max(axpy, rows * got["bytes"] / _lower_quartile(got["axpy_seconds"]))
        rates[int(code)] = NeuronRate(dot, axpy)
    return rates


def probe_bus(threads: int) -> float:
    """Sequential read rate of main memory, bytes per second.

    Measured in a process of its own, whose memory is not this one's; where none can be started, over less memory here.
    """
    room = RoomReader().tightest()
    n_bytes = max(_BUS_LEAST_BYTES, min(_BUS_BYTES, room.left_bytes // _BUS_SHARE if room else 0))
    code = f"from flashload.probe_kernels import read_bus; print(read_bus({threads:d}, {n_bytes:d}))"
    path = os.pathsep.join(folder for folder in sys.path if folder)
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            check=True,
            text=True,
            timeout=30,
        )
        return float(done.stdout)
    return read_bus(threads, _BUS_LEAST_BYTES)


def read_bus(threads: int, n_bytes: int) -> float:
    """Bytes per second, of ``n_bytes`` of memory read by ``threads``."""
    import _edge

    got = _edge.bench_gemv(
        _edge.default_isa(),
        int(WeightFormat.F32),
        _KERNEL_ROWS,
        _KERNEL_COLS,
        1,
        n_bytes // (4 * _KERNEL_ROWS * _KERNEL_COLS),
        threads,
        _BUS_SECONDS,
    )
    wall = got["read_bytes"] / _lower_quartile(got["read_seconds"])
    # Where others hold the cores, no pass has all of its readers at once; what one of them gets is the least there is.
    alone = _lower_quartile([s for s in got["read_cpu_seconds"] if s > 0] or [math.inf])
    return float(max(wall, got["read_bytes"] / alone))


def _lower_quartile(seconds: Sequence[float]) -> float:
    """The bus of a shared machine has moments better than anything that lasts."""
    return sorted(seconds)[len(seconds) // 4]
