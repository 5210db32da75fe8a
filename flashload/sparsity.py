"""Which neurons count: a threshold on the activation of each, from calibration text, and the entries that hold them.

A neuron adds ``act(gate) * up * down`` to a residual stream of length R. With what ``up`` is on average and the length
of its down column, ``|act(gate)|`` alone tells how much of the stream that would be:

    score = |act(gate)| * w,    w = mean|up| * |down| / R

and one bound on the score, the same in every layer, decides: the share of all scores below it is the share of neurons
left out, and a layer that matters less gives up more. The bound over ``w`` is the neuron's threshold. Thresholds on
``|act(gate)|`` are CATS (arXiv 2404.08763: one for a layer); shares that differ between layers by what
they cost are TEAL (arXiv 2408.14690: found by search).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashload.errors import ArgumentError, ModelFileError
from flashload.format import METADATA, PackFile, PackWriter
from flashload.pack_writer import file_bytes_for
from quant.formats import WeightFormat
from quant.formats.neuron import decode_column, decode_dot, row_bytes

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]

_LARGEST = float(np.finfo(np.float32).max)
#: A float's sign, exponent and seven bits of its mantissa: bins of less than a hundredth.
_SHIFT, _BINS = 16, 1 << 15
_BLOCK_VALUES = 1 << 22


def entry_name(layer: int) -> str:
    """The entry with a layer's thresholds, f32 [neurons]."""
    return f"layers.{layer}.sparsity.thresholds"


class Scores:
    """How scores of 0 or more are distributed, in bins of less than one percent."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, np.int64)

    def add(self, scores: Floats) -> None:
        """Counts finite scores of any shape."""
        bins = np.ascontiguousarray(scores, np.float32).view(np.uint32).reshape(-1) >> _SHIFT
        self.counts += np.bincount(bins, minlength=_BINS)

    def below(self, bound: float) -> float:
        """Share of the scores that are at most a bound that :func:`bound_of` found."""
        last = int(np.float32(bound).view(np.uint32)) >> _SHIFT
        return float(self.counts[: last + 1].sum() / max(1, self.counts.sum()))


def bound_of(layers: Mapping[int, Scores], share: float) -> float:
    """The least bound with at least ``share`` of all layers' scores at or below it, as fine as the bins are."""
    total = np.sum([scores.counts for scores in layers.values()], axis=0)
    first = int(np.searchsorted(np.cumsum(total), share * total.sum()))
    return float(np.array((first + 1 << _SHIFT) - 1, np.uint32).view(np.float32))


def thresholds_for(bound: float, weights: Floats) -> Floats:
    """Of neurons with these w; a neuron that adds nothing never counts."""
    with np.errstate(divide="ignore", over="ignore"):
        out: Floats = np.minimum(np.float32(bound) / weights, np.float32(_LARGEST)).astype(np.float32)
    return out


def neuron_weights(pack: PackFile, layer: int, inputs: Floats, stream_length: float) -> Floats:
    """w of each neuron of a layer, [neurons].

    Args:
        inputs: what some tokens gave the layer, [tokens, hidden].
        stream_length: of the residual stream it adds to, on average.
    """
    entry = pack.entries[f"layers.{layer}.neurons.records"]
    size = row_bytes(entry.format, entry.cols)
    records = np.frombuffer(pack.read(entry.name), np.uint8).reshape(entry.rows, -1, size)
    bias: Floats | None = None
    if f"layers.{layer}.up.bias" in pack.entries:
        bias = np.frombuffer(pack.read(f"layers.{layer}.up.bias"), "<f4")
    out = np.empty(entry.rows, np.float32)
    step = max(1, _BLOCK_VALUES // entry.cols)
    for first in range(0, entry.rows, step):
        part = records[first : first + step]
        down = decode_column(entry.format, np.ascontiguousarray(part[:, -1]), entry.cols)
        mean = np.ones(len(part), np.float32)
        if pack.config.gated:
            up = inputs @ decode_dot(entry.format, np.ascontiguousarray(part[:, -2]), entry.cols).T
            mean = np.abs(up if bias is None else up + bias[first : first + step]).mean(0)
        out[first : first + step] = mean * np.linalg.norm(down, axis=1) / stream_length
    return out


def neuron_layers_of(pack: PackFile) -> list[int]:
    """Layers whose feed-forward is stored by neuron."""
    return [e.layer for e in pack.entries.values() if e.name.endswith(".neurons.records")]


def read_thresholds(pack: PackFile) -> Floats | None:
    """A pack's thresholds [layers, neurons], zero where a layer has none; None when it holds none at all.

    Raises:
        ModelFileError: another shape, or a threshold that is not a finite number of 0 or more.
    """
    config = pack.config
    out = np.zeros((config.n_layers, config.intermediate_size), np.float32)
    found = False
    for layer in neuron_layers_of(pack):
        entry = pack.entries.get(entry_name(layer))
        if entry is None:
            continue
        found = True
        if (entry.format, entry.rows, entry.cols) != (WeightFormat.F32_VECTOR, 1, config.intermediate_size):
            raise ModelFileError(
                f"{pack.path}: {entry.name}: expected {config.intermediate_size} thresholds, found "
                f"{entry.rows} x {entry.cols} of {entry.format.name}"
            )
        out[layer] = np.frombuffer(pack.read(entry.name), "<f4")
    if not (np.isfinite(out) & (out >= 0)).all():
        raise ModelFileError(f"{pack.path}: expected thresholds of 0 or more, found something else")
    return out if found else None


def kept_share(pack: PackFile) -> float:
    """Share of the neurons that the thresholds of a pack leave active, as it was measured when they were made.

    Raises:
        ArgumentError: the pack has none.
        ModelFileError: what the pack says is no share.
    """
    if not any(is_threshold(name) for name in pack.entries):
        raise ArgumentError(
            f"sparsity: {pack.path}: expected a pack with thresholds (edge sparsify), found none"
        )
    facts = pack.metadata.get("sparsity")
    skipped = facts.get("skipped") if isinstance(facts, dict) else None
    if isinstance(skipped, bool) or not isinstance(skipped, (int, float)) or not 0 <= skipped < 1:
        raise ModelFileError(
            f"{pack.path}: sparsity: skipped: expected a number from 0 to below 1, found {skipped!r}"
        )
    return 1.0 - skipped


def add_thresholds(
    source: Path,
    destination: Path,
    thresholds: Mapping[int, Floats],
    facts: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Writes a pack again with these thresholds in the place of any it had; all else stays byte for byte.

    Args:
        thresholds: by layer.
        facts: what the metadata says of them, under "sparsity".
        progress: called with (done_bytes, total_bytes).

    Raises:
        ArgumentError: the destination is the source.
        ModelFileError, CorruptError, DiskError: as of reading and writing packs.
    """
    if destination.resolve() == source.resolve():
        raise ArgumentError(f"{destination}: expected another file than the source")
    with PackFile(source) as pack:
        metadata = json.dumps(
            pack.metadata | {"sparsity": dict(facts)}, ensure_ascii=False, separators=(",", ":")
        ).encode()
        kept = [e for e in pack.entries.values() if not is_threshold(e.name)]
        sizes = [e.bytes for e in kept] + [4 * t.size for t in thresholds.values()] + [len(metadata)]
        chunks = sum(-(-e.bytes // e.chunk_bytes) for e in kept) + 2 * len(sizes) + len(metadata) // 4096
        total, done = sum(sizes), 0
        with PackWriter(destination, file_bytes_for(sizes, chunks, len(sizes))) as writer:
            for e in kept:
                whole = metadata if e.name == METADATA else pack.read(e.name)
                cols = len(metadata) if e.name == METADATA else e.cols
                parts = max(1, e.neuron_parts)
                writer.add(e.name, e.format, e.rows, cols, [whole], e.layer, e.expert, parts)
                done += e.bytes
                if progress is not None:
                    progress(done, total)
            for layer, values in thresholds.items():
                data = np.ascontiguousarray(values, "<f4").tobytes()
                writer.add(entry_name(layer), WeightFormat.F32_VECTOR, 1, values.size, [data], layer)


def is_threshold(name: str) -> bool:
    """Whether an entry holds thresholds."""
    return name.endswith(".sparsity.thresholds")
