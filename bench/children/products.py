"""The children's end of ``python -m bench peers``: matrices of one runtime, multiplied when it is their turn.

Beside the runtime only numpy is needed. A request is one JSON line on standard input, its answer one on standard output
(``event`` "made", "timed", "dropped" or "error"); nothing is computed in between, so that one child at a time uses the
machine. Before it answers a child waits until its own threads rest.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from protocol import emit

#: Rows of a matrix whose products are compared with the reference, and rows they are multiplied with.
CHECKED_ROWS, CHECKED_M = 64, 3
#: A matrix repeats its rows after so many: which, no product's speed depends on, and making them takes long.
_DISTINCT_ROWS = 256
_REST_SECONDS, _STILL_SECONDS = 2.0, 0.01


class Matrices(Protocol):
    """Copies of one matrix [rows, cols] in the format of a runtime, together larger than the caches.

    Attributes:
        copies: how many, all equal.
        weight_bytes: what a copy takes in its own format, scales included.
    """

    copies: int
    weight_bytes: int

    def reference(self, n_rows: int) -> np.ndarray:
        """What the first rows stand for: float64 [n_rows, cols]."""

    def inputs(self, x: np.ndarray) -> Any:
        """Rows x, float32 [m, cols], as the runtime takes them; made outside of what is timed."""

    def multiply(self, inputs: Any) -> Any:
        """One pass: the rows times every copy."""

    def products(self, outputs: Any) -> list[np.ndarray]:
        """What :meth:`multiply` returned, copy by copy: [m, rows]."""


def normal_weights(request: dict[str, Any]) -> np.ndarray:
    """The first rows of the matrix that is quantised, float32 [n, cols]; it goes on as :func:`filled` has it."""
    rows, cols = min(request["rows"], _DISTINCT_ROWS), request["cols"]
    made = np.random.default_rng(request["seed"]).standard_normal((rows, cols), np.float32)
    return made * np.float32(cols**-0.5)


def filled(first: np.ndarray, request: dict[str, Any]) -> np.ndarray:
    """All rows of what was made of the first ones: they again and again."""
    return np.resize(first, (request["rows"], *first.shape[1:]))


def normal_rows(m: int, cols: int, seed: int = 7) -> np.ndarray:
    """Rows to multiply, float32 [m, cols], of values that bf16 holds too."""
    made = np.random.default_rng(seed).standard_normal((m, cols), np.float32)
    return (made.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def block_codes(weights: np.ndarray, block: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric quantisation: int8 codes -most..most [rows, cols / block, block] and a scale per block."""
    blocks = weights.reshape(len(weights), -1, block)
    scales = np.maximum(np.abs(blocks).max(axis=2), np.float32(1e-12)) / np.float32(most)
    return np.rint(blocks / scales[..., None]).astype(np.int8), scales


def copies_of(request: dict[str, Any], weight_bytes: int) -> int:
    """Copies that take the memory which the request asks for."""
    return max(1, round(request["bytes"] / weight_bytes))


def error_of(matrices: Matrices, cols: int) -> float:
    """The largest relative distance (L2) of a copy's products from those of the reference in float64."""
    x = normal_rows(CHECKED_M, cols, seed=11)
    reference = matrices.reference(CHECKED_ROWS)
    expected = x.astype(np.float64) @ reference.T
    found = matrices.products(matrices.multiply(matrices.inputs(x)))
    distances = [
        np.linalg.norm(one[:, : len(reference)].astype(np.float64) - expected) / np.linalg.norm(expected)
        for one in found
    ]
    return float(np.max(distances))  # NaN stays NaN


def rest() -> None:
    """Waits until no thread of this process computes any more.

    Raises:
        RuntimeError: they go on, and would slow down whose turn is next.
    """
    end = time.perf_counter() + _REST_SECONDS
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(_STILL_SECONDS)
        if time.process_time() - before < 0.2 * _STILL_SECONDS:
            return
    raise RuntimeError(f"still computing {_REST_SECONDS} s after the last product")


def timed(work: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each pass, for so long. The first does not count unless it alone took all the time."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
        if found[0] > seconds:
            return found
    return found[1:]


class Server:
    """Answers requests about the matrices it holds, by name."""

    def __init__(self, version: str, make: Callable[[dict[str, Any]], Matrices]) -> None:
        self._version = version
        self._make = make
        self._held: dict[str, tuple[Matrices, int]] = {}
        self._inputs: dict[tuple[str, int], Any] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "drop":
            self._held.clear()
            self._inputs.clear()
            return {"event": "dropped"}
        if request["do"] == "make":
            return self._made(request)
        matrices, cols = self._held[request["name"]]
        found: dict[str, Any] = {"event": "timed", "copies": matrices.copies}
        if request["do"] == "read":
            found["bytes"] = matrices.read()  # type: ignore[attr-defined]
            found["seconds"] = timed(matrices.read, request["seconds"])  # type: ignore[attr-defined]
            return found
        key = request["name"], request["m"]
        if key not in self._inputs:
            self._inputs[key] = matrices.inputs(normal_rows(request["m"], cols))
            matrices.multiply(self._inputs[key])
        inputs = self._inputs[key]
        found["seconds"] = timed(lambda: matrices.multiply(inputs), request["seconds"])
        return found

    def _made(self, request: dict[str, Any]) -> dict[str, Any]:
        matrices = self._make(request)
        self._held[request["name"]] = matrices, request["cols"]
        return {
            "event": "made",
            "version": self._version,
            "copies": matrices.copies,
            "weight_bytes": matrices.weight_bytes,
            "error": error_of(matrices, request["cols"]),
        }


def serve(version: str, make: Callable[[dict[str, Any]], Matrices]) -> None:
    """Answers until standard input ends. What goes wrong with one request does not end the others."""
    server = Server(version, make)
    for line in sys.stdin:
        try:
            answer = server.answer(json.loads(line))
            rest()
            answer["cpu_seconds"] = time.process_time()
        except Exception as error:
            answer = {"event": "error", "message": f"{type(error).__name__}: {error}".partition("\n")[0]}
        emit(**answer)
