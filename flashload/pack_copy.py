"""A copy of a pack at fewer bits, small enough to stay in memory: what a model drafts with for itself.

("SubSpec" and "SpecExec" draft for weights on slow storage with such a copy: arXiv 2509.18344, 2406.02532.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from flashload.errors import UnsupportedModelError
from flashload.format import METADATA, PackFile, PackWriter
from flashload.ggml import F32
from flashload.pack import choose_format
from flashload.pack_layout import MIN_CHUNK_BYTES, Entry, payload_bytes
from flashload.pack_writer import file_bytes_for
from flashload.plan_neurons import is_extra
from flashload.tiles import tile_rows, untile_rows
from quant.formats import TILE_FORMATS, TILE_ROWS, WeightFormat, tile_bytes
from quant.formats.neuron import NEURON_FORMATS

Progress = Callable[[int, int], None]

#: Values held as f32 at a time.
_STEP_VALUES = 1 << 20
#: A copy of more than this share of the matrices' bytes is not worth its memory.
_MOST_SHARE = 0.75


def _copied(entry: Entry) -> WeightFormat:
    if entry.format not in TILE_FORMATS:
        return entry.format
    return choose_format(entry.name, TILE_FORMATS[entry.format].ggml_type, entry.cols, "q4")


def _matrix(pack: PackFile, entry: Entry, code: WeightFormat) -> Iterator[bytes]:
    """Whole tiles of 16 rows, as many as a step holds, decoded and rounded again."""
    tile = tile_bytes(entry.format, TILE_ROWS, entry.cols)
    step = max(1, _STEP_VALUES // (TILE_ROWS * entry.cols)) * tile
    held, row = bytearray(), 0
    for part in pack.parts(entry.name):
        held += part
        while len(held) >= step or (held and row + len(held) // tile * TILE_ROWS >= entry.rows):
            n_bytes = min(step, len(held))
            rows = min(n_bytes // tile * TILE_ROWS, entry.rows - row)
            values = untile_rows(entry.format, bytes(held[:n_bytes]), rows, entry.cols)
            yield tile_rows(F32, code, np.ascontiguousarray(values, "<f4").tobytes(), rows, entry.cols)
            del held[:n_bytes]
            row += rows


def copied_bytes(pack: PackFile) -> int:
    """What the matrices of a copy take.

    Raises:
        UnsupportedModelError: the model is packed by neuron, or has as few bits already.
    """
    entries = [entry for entry in pack.entries.values() if not is_extra(entry.name)]
    if any(entry.format in NEURON_FORMATS for entry in entries):
        raise UnsupportedModelError(
            f"{pack.path}: a model that drafts for itself: expected a pack of matrices, found records of neurons"
        )
    matrices = [entry for entry in entries if entry.format in TILE_FORMATS]
    before = sum(entry.bytes for entry in matrices)
    after = sum(payload_bytes(_copied(entry), entry.rows, entry.cols, 1) for entry in matrices)
    if after > _MOST_SHARE * before:
        raise UnsupportedModelError(
            f"{pack.path}: a model that drafts for itself: expected weights of 8 bits or more to copy at 4, found "
            f"{before} bytes that would become {after}"
        )
    return after


def copy_pack(pack: PackFile, destination: Path, progress: Progress | None = None) -> None:
    """Writes the copy, without predictors and heads; it appears complete or not at all.

    Args:
        progress: called with (done_bytes, total_bytes).

    Raises:
        UnsupportedModelError: as :func:`copied_bytes`.
        CorruptError, DiskError: as of reading and writing packs.
    """
    copied_bytes(pack)
    entries = [entry for entry in pack.entries.values() if not is_extra(entry.name)]
    blob = json.dumps(pack.metadata | {"weights": "q4"}, ensure_ascii=False, separators=(",", ":")).encode()
    formats = [_copied(entry) for entry in entries]
    sizes = [
        len(blob) if entry.name == METADATA else payload_bytes(code, entry.rows, entry.cols, 1)
        for entry, code in zip(entries, formats, strict=True)
    ]
    n_chunks = sum(-(-size // MIN_CHUNK_BYTES) for size in sizes)
    total, done = sum(sizes), 0
    with PackWriter(destination, file_bytes_for(sizes, n_chunks, len(entries))) as writer:
        for entry, code, size in zip(entries, formats, sizes, strict=True):
            cols, parts = entry.cols, partial(pack.parts, entry.name)
            if entry.name == METADATA:
                cols, parts = len(blob), partial(iter, [blob])
            elif code is not entry.format:
                parts = partial(_matrix, pack, entry, code)
            writer.add(entry.name, code, entry.rows, cols, parts(), entry.layer, entry.expert, 1)
            done += size
            if progress is not None:
                progress(done, total)
