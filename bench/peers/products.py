"""Products of matrices in the formats of several runtimes, which take turns: one computes, the others wait.

A runtime is a child process in an interpreter of its own that holds its matrices while it waits
(``bench/children/products.py``). In every round each format multiplies one row, just behind plain reads of
memory, then each multiplies a prompt's rows; the next round begins with another format. Before a format is timed its
products are compared with those of a float64 reference of its own weights: one that computes something else is told,
not timed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench import peers, report
from bench.machine import busy_seconds
from bench.random_blocks import TYPES, random_blocks
from quant.formats import WeightFormat, decode, from_blocks

#: Rows of the reference that are decoded for runtimes with ggml's blocks.
_REFERENCE_ROWS = 64
#: A child that does not answer for so long is ended.
_WAIT_SECONDS = 300.0


@dataclass(frozen=True)
class Runtime:
    """A child that multiplies, and the formats that are asked of it.

    Attributes:
        tolerance: how far products may be from the reference's (relative, L2), by format: what rounding activations
            or outputs as it does costs on normal rows, doubled or so.
    """

    system: peers.System
    tolerance: dict[str, float]


#: Rows are rounded to int8, a scale for each 32 or 256 values.
_BLOCKS = dict.fromkeys(TYPES, 0.012)

RUNTIMES = {
    "edge": Runtime(peers.System("edge_products.py", "edge"), _BLOCKS),
    "llama.cpp": Runtime(peers.System("ggml_products.py", "llama_cpp"), _BLOCKS),
    "onnxruntime": Runtime(
        peers.System("onnxruntime_products.py", "onnxruntime"), {"int4-acc4": 0.012, "int4-acc0": 1e-4}
    ),
    "torch": Runtime(
        peers.System("torch_products.py", "torch"),
        {"int4-weights": 0.004, "int8-weights": 0.004, "int8-dynamic": 0.04, "bf16": 0.004},
    ),
}
FORMATS = ("q4_0", "q4_k", "q6_k", "q8_0", "int4-acc4", "int4-acc0", "int4-weights", "int8-weights")
FORMATS += ("int8-dynamic", "bf16")


class ChildError(Exception):
    """What a child said instead of an answer, in one line."""


class Child:
    """A runtime's process, and questions to it. One that died answers every question with that.

    Attributes:
        cpu_seconds: processor time that it had used when it last answered.
    """

    def __init__(self, name: str, system: peers.System, threads: int) -> None:
        self.name = name
        self.cpu_seconds = 0.0
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            [peers.interpreter(system), str(peers.CHILDREN / system.child), json.dumps({"threads": threads})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=peers.environment(system),
        )

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            ChildError: it failed, or the process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):  # it has ended; what it said last is read below
            self._process.stdin.write(json.dumps({"do": do, **what}) + "\n")
            self._process.stdin.flush()
        watchdog = threading.Timer(_WAIT_SECONDS, self._process.kill)
        watchdog.start()
        try:
            # Libraries print lines of their own.
            events = (event for line in self._process.stdout for event in peers.events_of(line))
            answer = next(events, None)
        finally:
            watchdog.cancel()
        if answer is not None and answer["event"] == "error":
            raise ChildError(answer["message"])
        if answer is not None:
            self.cpu_seconds = answer["cpu_seconds"]
            return answer
        self._errors.seek(0)
        code, said = self._process.wait(), self._errors.read().strip().splitlines()
        raise ChildError(f"its process ended with {code}: {said[-1] if said else 'no message'}")

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(OSError):  # a request that was never read
                file.close()


@contextmanager
def children(names: Sequence[str], threads: int) -> Iterator[tuple[dict[str, Child], dict[str, str]]]:
    """The runtimes of these names that are here, and why the others are not (one line each)."""
    present: dict[str, Child] = {}
    missing: dict[str, str] = {}
    try:
        for name in names:
            system = RUNTIMES[name].system
            why = peers.absent(name, system)
            if why is None:
                present[name] = Child(name, system, threads)
            else:
                missing[name] = why
                print(why, file=sys.stderr)
        yield present, missing
    finally:
        for child in present.values():
            child.close()


@dataclass
class Entrant:
    """One format of one runtime at one shape.

    Attributes:
        made: what its child said of it.
        seconds: a product's, of every round, by rows multiplied at once.
        read_rates: of memory just before it multiplied the first of them, of every round; bytes per second.
    """

    runtime: str
    format: str
    made: dict[str, Any]
    seconds: dict[int, list[float]] = field(default_factory=dict)
    read_rates: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.runtime} {self.format}"


def write_blocks(folder: Path, name: str, rows: int, cols: int, seed: int) -> dict[str, str]:
    """A random matrix in ggml's blocks, and what its first rows stand for, as the files that children read."""
    kind, code = TYPES[name], WeightFormat[name.upper()]
    blocks = random_blocks(kind, rows * cols // kind.values, cols**-0.5, np.random.SFC64(seed))
    blocks.tofile(folder / f"{name}.bin")
    first = min(rows, _REFERENCE_ROWS)
    tiles = from_blocks(code, blocks[: first * cols // kind.values].tobytes(), first, cols)
    np.save(folder / f"{name}.npy", decode(code, tiles, first, cols).astype(np.float64))
    return {"blocks": str(folder / f"{name}.bin"), "reference": str(folder / f"{name}.npy")}


def make(child: Child, what: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """What a child says of matrices that it has made.

    Raises:
        ChildError: it cannot make them, or their products are not those of its own weights.
    """
    made = child.ask("make", **what)
    if not made["error"] <= tolerance:  # which NaN is not either
        raise ChildError(
            f"products are {made['error']:.3g} away from the reference, expected at most {tolerance}"
        )
    return made | {"tolerance": tolerance}


def enter(
    found: dict[str, Child], formats: Sequence[str], shape: tuple[int, int], n_bytes: int
) -> tuple[list[Entrant], list[str]]:
    """Makes every format's matrices and compares their products; who may be timed, and what was wrong with others."""
    entrants: list[Entrant] = []
    failures: list[str] = []
    rows, cols = shape
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: write_blocks(Path(folder), name, rows, cols, 1)
            for name in formats
            if name in TYPES and any(name in RUNTIMES[child].tolerance for child in found)
        }
        for runtime, child in found.items():
            tolerances = RUNTIMES[runtime].tolerance
            for name in (name for name in formats if name in tolerances):
                what = {"name": name, "format": name, "rows": rows, "cols": cols, "bytes": n_bytes, "seed": 1}
                try:
                    made = make(child, what | files.get(name, {}), tolerances[name])
                except ChildError as error:
                    failures.append(f"{runtime} {name}, {rows} x {cols}: {error}")
                else:
                    entrants.append(Entrant(runtime, name, made))
    return entrants, failures


def read_rate(found: dict[str, Child], reader: Entrant | None, seconds: float) -> list[float]:
    """Bytes per second of plain reads over edge's matrices now; empty where edge takes no part."""
    if reader is None:
        return []
    got = found[reader.runtime].ask("read", name=reader.format, seconds=seconds)
    return [got["bytes"] / median(got["seconds"])]


def take_turns(
    found: dict[str, Child],
    entrants: list[Entrant],
    batches: Sequence[int],
    rounds: int,
    seconds: float,
    failures: list[str],
) -> None:
    """Fills the entrants' seconds, a median per round, and the read rates of the moments before.

    Who fails is told in ``failures`` and not asked again.
    """
    reader = next((one for one in entrants if one.runtime == "edge"), None)
    for number in range(rounds):
        for m in batches:
            # Who is first changes: what a neighbour of this machine does may be as regular as the rounds.
            for one in [*entrants[number:], *entrants[:number]]:
                try:
                    rates = read_rate(found, reader, seconds / 2) if m == batches[0] else []
                    got = found[one.runtime].ask("time", name=one.format, m=m, seconds=seconds)
                except ChildError as error:
                    failures.append(f"{one.name}: {error}")
                    entrants.remove(one)
                    continue
                one.read_rates += rates
                one.seconds.setdefault(m, []).append(median(got["seconds"]) / got["copies"])


@contextmanager
def foreign_cpus(found: dict[str, Child]) -> Iterator[list[float]]:
    """One number when it ends: the processors that were busy meanwhile with other things than these children."""

    def ours() -> float:
        return time.process_time() + sum(child.cpu_seconds for child in found.values())

    others: list[float] = []
    start, busy, own = time.perf_counter(), busy_seconds(), ours()
    yield others
    foreign = busy_seconds() - busy - (ours() - own)
    others.append(max(0.0, foreign / (time.perf_counter() - start)))


def figures(one: Entrant, shape: tuple[int, int]) -> dict[str, Any]:
    """An entrant's part of the document; shares of the read rate are those of the first batch."""
    weights = shape[0] * shape[1]
    batches: dict[str, Any] = {}
    for i, (m, seconds) in enumerate(one.seconds.items()):
        bytes_per_second = [one.made["weight_bytes"] / s for s in seconds]
        batches[str(m)] = {
            "seconds": report.spread_json(seconds),
            "bytes_per_second": report.spread_json(bytes_per_second),
            "read_share": report.spread_json(
                rate / read
                for rate, read in zip(bytes_per_second, one.read_rates if i == 0 else (), strict=False)
            ),
            "operations_per_second": report.spread_json([2 * m * weights / s for s in seconds]),
            "tokens_per_second_of_1e9": report.spread_json([m * weights / 1e9 / s for s in seconds]),
        }
    return {
        "runtime": one.runtime,
        "format": one.format,
        "version": one.made["version"],
        "weight_bytes": one.made["weight_bytes"],
        "bits_per_weight": 8 * one.made["weight_bytes"] / weights,
        "copies": one.made["copies"],
        "error": one.made["error"],
        "tolerance": one.made["tolerance"],
        "m": batches,
    }


def measure_shape(
    found: dict[str, Child],
    shape: tuple[int, int],
    formats: Sequence[str],
    batches: Sequence[int],
    rounds: int,
    seconds: float,
    n_bytes: int,
) -> dict[str, Any]:
    """One shape [rows, cols] of the document: ``batches`` are rows multiplied at once, ``n_bytes`` of copies each."""
    print(f"{shape[0]} x {shape[1]}: matrices are made and compared", file=sys.stderr)
    entrants, failures = enter(found, formats, shape, n_bytes)
    print(f"{shape[0]} x {shape[1]}: {len(entrants)} formats take turns", file=sys.stderr)
    with foreign_cpus(found) as others:
        take_turns(found, entrants, batches, rounds, seconds, failures)
    for child in found.values():
        try:
            child.ask("drop")
        except ChildError as error:
            failures.append(f"{child.name}: {error}")
    return {
        "rows": shape[0],
        "cols": shape[1],
        "read_bytes_per_second": report.spread_json(rate for one in entrants for rate in one.read_rates),
        "products": [figures(one, shape) for one in entrants],
        "foreign_cpus": others[0],
        "failures": failures,
    }
