"""The plainest way to run a model that does not fit: every weight is read again for every token, then multiplied.

One thread reads each matrix of a pack whole into one buffer, drops it from the page cache, and multiplies it with
edge's own kernel; experts are those a fair coin would route to. Products are with random inputs, attention over the
context is left out: it can only be faster than a real engine of this kind. Protocol: see ``protocol``.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import _edge
import numpy as np

from bench.children.protocol import run, time_baseline
from flashload.format import PackFile
from flashload.pack_layout import Entry
from quant.formats import TILE_FORMATS
from quant.formats.neuron import NEURON_FORMATS, row_bytes

PIECE_BYTES = 8 << 20


def is_matrix(entry: Entry) -> bool:
    """Whether a token needs all of an entry: no vectors, blobs, tables of which a row is enough, or copies."""
    extra = (
        ".predictor." in entry.name
        or entry.name.startswith("medusa.")
        or entry.name.endswith(".neurons.gates")
    )
    return (entry.format in TILE_FORMATS or entry.format in NEURON_FORMATS) and not extra


class Model:
    """The matrices of a pack, none of them in memory."""

    def __init__(self, path: str, seed: int) -> None:
        with PackFile(Path(path)) as pack:
            self.config = pack.config
            entries = [entry for entry in pack.entries.values() if is_matrix(entry)]
            biases = {
                e.layer: pack.read(name) for name, e in pack.entries.items() if name.endswith(".up.bias")
            }
        tables = {"embed.position"} | (set() if self.config.tied_head else {"embed.weight"})
        self.always = [entry for entry in entries if entry.expert < 0 and entry.name not in tables]
        self.experts: dict[int, dict[int, list[Entry]]] = {}
        for entry in entries:
            if entry.expert >= 0:
                self.experts.setdefault(entry.layer, {}).setdefault(entry.expert, []).append(entry)
        self.biases = {layer: np.frombuffer(data, "<f4") for layer, data in biases.items()}
        self.file = os.open(path, os.O_RDONLY)
        self.buffer = bytearray(max(entry.bytes for entry in entries))
        self.isa = _edge.default_isa()
        self.random = random.Random(seed)
        self.inputs = np.random.default_rng(seed)

    def read(self, entry: Entry) -> np.ndarray:
        """The payload of an entry, from the drive."""
        view = memoryview(self.buffer)[: entry.bytes]
        done = 0
        while done < entry.bytes:
            done += os.preadv(self.file, [view[done : done + PIECE_BYTES]], entry.offset + done)
        os.posix_fadvise(self.file, entry.offset, entry.bytes, os.POSIX_FADV_DONTNEED)
        return np.frombuffer(self.buffer, np.uint8, entry.bytes)

    def multiply(self, entry: Entry, n_rows: int) -> None:
        data = self.read(entry)
        x = self.inputs.standard_normal((n_rows, entry.cols), np.float32)
        if entry.format in TILE_FORMATS:
            _edge.gemv(self.isa, int(entry.format), data, entry.rows, entry.cols, x)
            return
        # Products with all rows of the records, the down columns among them: cheaper than setting the gates apart.
        parts = entry.neuron_parts
        values = _edge.neuron_dot(self.isa, int(entry.format), data, entry.cols, x).reshape(n_rows, -1, parts)
        gate = values[..., 0] + self.biases.get(entry.layer, np.float32(0))
        values = np.maximum(gate, 0) * (values[..., 1] if parts == 3 else 1)
        records = data.reshape(entry.rows, parts, row_bytes(entry.format, entry.cols))
        start = np.zeros(-(-entry.cols // 32) * 32, np.float32)
        for row in values:
            active = np.flatnonzero(row)
            columns = np.ascontiguousarray(records[active, parts - 1])
            if len(active):
                _edge.neuron_axpy(
                    self.isa, int(entry.format), columns, entry.cols, row[active], start, 0, len(start)
                )

    def forward(self, n_rows: int) -> None:
        """One pass of ``n_rows`` tokens that share every reading."""
        for entry in self.always:
            self.multiply(entry, n_rows)
        for experts in self.experts.values():
            wanted = {
                e
                for _ in range(n_rows)
                for e in self.random.sample(sorted(experts), self.config.experts_per_token)
            }
            for number in sorted(wanted):
                for entry in experts[number]:
                    self.multiply(entry, 1)
        # Reading ahead and pages of many bytes leave some behind.
        os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_DONTNEED)


def main(request: dict[str, Any]) -> None:
    time_baseline(request, lambda: Model(request["model"], request["seed"]), "baseline")


if __name__ == "__main__":
    run(main)
