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
from typing import Any, Protocol


def emit(**event: object) -> None:
    print(json.dumps(event), flush=True)


def read_bytes() -> int:
    """Bytes this process had fetched from the drive so far."""
    with open("/proc/self/io") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


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
    before, start = read_bytes(), time.perf_counter()
    for n in range(request["tokens"]):
        model.forward(1)
        emit(event="token", n=n + 1)
    rate = request["tokens"] / (time.perf_counter() - start)
    emit(
        event="result",
        decode_tokens_per_second=rate,
        decode_tokens_per_second_outside=rate,
        prefill_tokens_per_second=request["prompt_tokens"] / prefill_seconds,
        read_bytes_per_token=(read_bytes() - before) / request["tokens"],
        tokens=[],
        info="",
    )
