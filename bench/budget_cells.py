"""One cell of the memory-budget benchmark: a system, a model and a limit, run from a cold cache; and cells kept.

The drive's rate is measured around every run, because on a shared machine it changes from second to second: beside
each figure stands what that rate would have allowed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine, peers, report
from bench.cgroup import CgroupResult
from bench.report import Spread
from bench.weights import Weights
from flashload.neuron_use import GUESSED

#: "Percent" of a limit that edge has to refuse, and its share of the least that edge says it needs.
BELOW_FLOOR, BELOW_FLOOR_SHARE = 0.0, 0.9


def ceiling(weights: Weights, limit_bytes: int, drive_rate: float, memory_rate: float) -> float:
    """tok/s of an ideal pin-and-stream placement: reading and computing overlap, nothing else takes memory.

    Args:
        drive_rate: bytes per second, sequential.
        memory_rate: bytes per second of the memory bus; every weight of a token crosses it once.
    """
    streaming_seconds = weights.streamed_bytes(limit_bytes) / drive_rate
    return 1.0 / max(streaming_seconds, weights.token_bytes / memory_rate)


def drive_allows(read_bytes_per_token: float, drive_rate: float) -> float | None:
    """tok/s at which the drive would be busy all the time with what a token reads; None for less than 4 KiB."""
    return drive_rate / read_bytes_per_token if read_bytes_per_token >= 4096 else None


def mean_rate(*rates: float) -> float:
    """Of readings of as many bytes each: all bytes over all the time."""
    return len(rates) / sum(1 / rate for rate in rates)


_FLOOR = """import sys, edge
from flashload.errors import BudgetError
try:
    edge.load(sys.argv[1], memory=1, context=int(sys.argv[2]), threads=int(sys.argv[3]), whole_process=True)
except BudgetError as refusal:
    print(refusal.floor_bytes)"""


def floor_bytes(pack: Path, context: int, threads: int) -> int:
    """The least that a process running this pack says it needs.

    Asked of a process of its own, because what an interpreter holds counts.
    """
    command = [sys.executable, "-c", _FLOOR, str(pack), str(context), str(threads)]
    env = peers.environment(peers.SYSTEMS["edge"])
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


def measure_cell(
    system: str,
    request: peers.Request,
    weights: Weights,
    percent: float,
    rounds: int,
    process_bytes: int = 0,
) -> dict[str, Any]:
    """One system at one limit: ``rounds`` cold runs; one that was late or did not survive is not repeated.

    The memory is measured before each run, the drive right before and after it, and each run is compared with the mean
    of its own two. A drive that others share has moments that no run lasts through: of readings of 1 GiB within one
    minute, 60 were at 2.2 or at 3.0 GB/s (mean 2.5), so that the better of two was 8 % above what they had on average.
    """
    runs: list[peers.Run] = []
    drives: list[float] = []
    memories: list[float] = []
    warm_share = 0.0
    files = sorted(request.model.glob("*.safetensors")) if request.model.is_dir() else [request.model]
    largest = max(files, key=lambda file: file.stat().st_size)
    for number in range(rounds):
        memories.append(machine.read_bandwidth(request.threads)["median"])
        before = machine.drive_rate(largest)["bytes_per_second"]
        how = ", ".join(sorted({machine.drop_cache(file) for file in files}))
        warm_share = max(warm_share, *(machine.cached_share(file) for file in files))
        run = peers.run(system, request)
        runs.append(run)
        drives.append(mean_rate(before, machine.drive_rate(largest)["bytes_per_second"]))
        print(f"{percent:g} %, {system}, run {number + 1}/{rounds}: {peers.brief(run)}", file=sys.stderr)
        if run.outcome != "done":
            break
    done = [run.result for run in runs if run.result]
    allowed = [
        drive_allows(run.result["read_bytes_per_token"], rate)
        for run, rate in zip(runs, drives, strict=True)
        if run.result
    ]
    shares = [r["decode_tokens_per_second"] / most for r, most in zip(done, allowed, strict=True) if most]
    drive, memory = Spread.of(drives), Spread.of(memories)
    assert drive is not None and memory is not None
    read = Spread.of(r["read_bytes_per_token"] for r in done)
    partial = [run.partial_tokens_per_second for run in runs if run.partial_tokens_per_second]
    failures = sorted({run.failure for run in runs if run.failure})
    counts = Counter(run.outcome for run in runs)
    facts = machine.facts()
    return {
        "system": system,
        "options": peers.system_of(system).options,
        "version": next((run.loaded["version"] for run in runs if run.loaded), None),
        "weights": {"token_bytes": weights.token_bytes, **vars(weights)},
        "percent": percent,
        "limit_bytes": request.limit_bytes,
        "prompt_tokens": request.prompt_tokens,
        "tokens": request.tokens,
        "timeout_seconds": request.timeout_seconds,
        "runs": len(runs),
        "survived": len(done),
        "killed": sum(isinstance(run.finished, CgroupResult) and run.finished.killed for run in runs),
        "outcomes": dict(counts),
        "outcome": "; ".join(failures) or "survived",
        "neuron_mode": next(
            (r.loaded["neuron_mode"] for r in runs if r.loaded and "neuron_mode" in r.loaded), ""
        ),
        "perplexity": report.spread_json([r["perplexity"] for r in done if r.get("perplexity")]),
        "exits": [run.finished.returncode for run in runs],
        "tokens_per_second": report.spread_json([r["decode_tokens_per_second"] for r in done]),
        "partial_tokens_per_second": report.spread_json(partial),
        "joules_per_token": report.spread_json(
            [r["joules_per_token"] for r in done if r.get("joules_per_token")]
        ),
        "read_bytes_per_token": None if read is None else read.json(),
        "read_bytes": report.spread_json([float(run.finished.drive_read_bytes) for run in runs]),
        "peak_bytes": report.spread_json(
            [float(run.finished.peak_bytes) for run in runs if isinstance(run.finished, CgroupResult)]
        ),
        "load_seconds": report.spread_json([run.loaded["seconds"] for run in runs if run.loaded]),
        "foreign_cpus": report.spread_json([run.foreign_cpus for run in runs]),
        "drive_bytes_per_second": drive.json(),
        "memory_bytes_per_second": memory.json(),
        "drive_allows_tokens_per_second": median(most for most in allowed if most) if shares else None,
        "drive_share": report.spread_json(shares),
        "ceiling_tokens_per_second": ceiling(
            weights, max(0, request.limit_bytes - process_bytes), drive.median, memory.median
        ),
        "cache_emptied_by": how,
        "cached_share_before": warm_share,
        "date": facts["date"],
        "commit": facts["commit"],
    }


def is_lossy(point: dict[str, Any]) -> bool:
    """Whether something decided which neurons count that may be wrong."""
    return point.get("neuron_mode") in GUESSED


class Cells:
    """Finished cells in a folder, so that a table of many can be stopped and goes on; a cell asked for otherwise than
    before (another file, prompt, time limit ...) is measured again.

    Args:
        folder: None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def find(self, name: str, asked: dict[str, Any]) -> dict[str, Any] | None:
        """The figures of a finished cell; None where there are none, or they were asked for otherwise."""
        if self._folder is None:
            return None
        try:
            kept = json.loads(self._path(name).read_text())
        except (OSError, ValueError):
            return None
        same = isinstance(kept, dict) and kept.get("asked") == asked
        return kept["point"] if same and isinstance(kept.get("point"), dict) else None

    def keep(self, name: str, asked: dict[str, Any], point: dict[str, Any]) -> None:
        """Writes a finished cell, whole or not at all."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        new = path.with_suffix(".tmp")
        new.write_text(json.dumps({"asked": asked, "point": point}, indent=1) + "\n")
        new.replace(path)

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / (re.sub(r"[^A-Za-z0-9._+-]+", "-", name) + ".json")


def asked_of(system: str, request: peers.Request, rounds: int) -> dict[str, Any]:
    """Everything that a cell's figures depend on besides the machine and the commit, as JSON."""
    text, asked = request.text, json.loads(request.json(peers.system_of(system).options))
    files = [file for file in (request.model, text) if file is not None]
    stats = {str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    asked |= {"rounds": rounds, "timeout_seconds": request.timeout_seconds, "files": stats}
    return dict(asked)
