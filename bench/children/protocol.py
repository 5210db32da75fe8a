"""The children's end of the line to ``bench.peers``; nothing but the standard library, for any interpreter.

One JSON request as the only argument; JSON lines on standard output, one per event, so that the parent knows how far
a killed process came.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

#: Energy counters of whole processor packages (Documentation/power/powercap of the kernel); memory and cores are parts.
ENERGY_COUNTERS = "/sys/class/powercap"


def emit(**event: object) -> None:
    print(json.dumps(event), flush=True)


def read_bytes() -> int:
    """Bytes this process had fetched from the drive so far."""
    with open("/proc/self/io") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def energy_counters() -> list[tuple[int, int]]:
    """(microjoules, where it begins again) of every package; empty where none can be read."""
    found = []
    for zone in sorted(Path(ENERGY_COUNTERS).glob("*:*")):
        try:
            if (zone / "name").read_text().startswith("package"):
                found.append(
                    (int((zone / "energy_uj").read_text()), int((zone / "max_energy_range_uj").read_text()))
                )
        except (OSError, ValueError):
            return []
    return found


class Spent:
    """What decoding takes of drive and socket from here on."""

    def __init__(self) -> None:
        self._read_bytes = read_bytes()
        self._energy = energy_counters()

    def per_token(self, n_tokens: int) -> dict[str, float | None]:
        """``read_bytes_per_token`` and ``joules_per_token`` (of all the machine does; None where none can be read)."""
        energy = energy_counters()
        joules = None
        if energy and len(energy) == len(self._energy):
            joules = sum(
                1e-6 * ((now - before) % most)
                for (now, most), (before, _) in zip(energy, self._energy, strict=True)
            )
        return {
            "read_bytes_per_token": (read_bytes() - self._read_bytes) / n_tokens,
            "joules_per_token": None if joules is None else joules / n_tokens,
        }


def run(main: Callable[[dict[str, Any]], None]) -> None:
    """Answers the request and ends the process."""
    try:
        main(json.loads(sys.argv[1]))
    except Exception as error:
        emit(event="error", message=f"{type(error).__name__}: {error}")
        sys.exit(1)
    # Nothing is freed by hand: an exit cannot fail after the figures are out.
    os._exit(0)


class Baseline(Protocol):
    """A model that keeps nothing between passes."""

    def forward(self, n_rows: int) -> None:
        """One pass of ``n_rows`` tokens that share every loading."""


def time_baseline(request: dict[str, Any], load: Callable[[], Baseline], version: str) -> None:
    """Loads, reads the prompt, and decodes, all as passes without a text."""
    start = time.perf_counter()
    model = load()
    emit(event="loaded", seconds=time.perf_counter() - start, version=version, read_bytes=read_bytes())
    start = time.perf_counter()
    model.forward(request["prompt_tokens"])
    prefill_seconds = time.perf_counter() - start
    emit(event="warm")
    spent, start = Spent(), time.perf_counter()
    for n in range(request["tokens"]):
        model.forward(1)
        emit(event="token", n=n + 1, seconds=time.perf_counter() - start)
    rate = request["tokens"] / (time.perf_counter() - start)
    emit(
        event="result",
        decode_tokens_per_second=rate,
        decode_tokens_per_second_outside=rate,
        prefill_tokens_per_second=request["prompt_tokens"] / prefill_seconds,
        tokens=[],
        info="",
        **spent.per_token(request["tokens"]),
    )
