"""Rounds in which systems take turns on one model, and what every comparison says of one of them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import peers, report


@dataclass(frozen=True)
class Contestant:
    """A system with its file and threads; ``label`` is its line in the table."""

    label: str
    system: str
    entry: peers.Entry
    threads: int


def contestants(entries: dict[str, peers.Entry], threads: int) -> list[Contestant]:
    return [Contestant(name, name, entry, threads) for name, entry in entries.items()]


@dataclass(frozen=True)
class Rounds:
    """What came of all rounds: the measure of the machine in each, and the runs by label, in order."""

    limits: list[float]
    runs: dict[str, list[peers.Run]]

    def done(self, label: str) -> list[tuple[dict[str, Any], float]]:
        """Figures of the runs that reached their end, each with the measure of its own round."""
        pairs = zip(self.runs[label], self.limits, strict=True)
        return [(run.result, limit) for run, limit in pairs if run.result]


def take_turns(
    entrants: list[Contestant],
    rounds: int,
    limit: Callable[[], float],
    prompt_tokens: int,
    tokens: int,
) -> Rounds:
    """Measures the machine (``limit``), then runs every contestant once, and all again, ``rounds`` times."""
    vocab = min((one.entry.weights.vocab for one in entrants), default=0)
    found = Rounds([], {one.label: [] for one in entrants})
    for number in range(rounds if entrants else 0):
        found.limits.append(limit())
        for one in entrants:
            request = peers.Request(one.entry.path, one.threads, vocab, prompt_tokens, tokens)
            run = peers.run(one.system, request)
            found.runs[one.label].append(run)
            print(f"round {number + 1}/{rounds}, {one.label}: {peers.brief(run)}", file=sys.stderr)
    return found


def summary(one: Contestant, found: Rounds) -> dict[str, Any]:
    """What every benchmark of whole models says of one contestant."""
    runs, weights = found.runs[one.label], one.entry.weights
    done = [run for run in runs if run.result]
    return {
        "label": one.label,
        "system": one.system,
        "threads": one.threads,
        "options": peers.SYSTEMS[one.system].options,
        "weights": {"token_bytes": weights.token_bytes, **vars(weights)},
        "version": next((run.loaded["version"] for run in runs if run.loaded), None),
        "runs": len(runs),
        "survived": len(done),
        "failures": sorted({run.failure for run in runs if run.failure}),
        "load_seconds": report.spread_json([run.loaded["seconds"] for run in runs if run.loaded]),
        "max_rss_bytes": report.spread_json([float(run.finished.max_rss_bytes) for run in done]),
        "foreign_cpus": report.spread_json([run.foreign_cpus for run in done]),
    }


def notes(document: dict[str, Any]) -> list[str]:
    """Failures and the systems' own words, below a table."""
    said = []
    for s in document["systems"]:
        said += [
            f"{s['label']}: {s['runs'] - s['survived']} of {s['runs']} failed: {why}" for why in s["failures"]
        ]
        if peers.SYSTEMS[s["system"]].says and s["version"] and s["label"] == s["system"]:
            said.append(f"{s['system']} {s['version']}: {peers.SYSTEMS[s['system']].says}")
    return said


def survived(document: dict[str, Any]) -> bool:
    return any(s["survived"] for s in document["systems"])


@contextmanager
def competitors(count: int) -> Iterator[None]:
    """``count`` processes beside the runs that compute and never wait."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def warm_cache(path: Path) -> None:
    """Reads a file into the page cache."""
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def add_rounds(parser: argparse.ArgumentParser, runs: int) -> None:
    """How many rounds, and who takes part beside edge."""
    parser.add_argument("--runs", type=int, default=runs, help="rounds")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        choices=[name for name in peers.SYSTEMS if name != "edge"],
        help="repeatable",
    )
