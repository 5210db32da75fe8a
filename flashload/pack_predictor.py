"""A pack made again with neuron predictors in it: feed-forward layers by neuron, all else byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from flashload.bind import BoundWeight, Slot
from flashload.errors import ArgumentError, ModelFileError
from flashload.format import METADATA, PackFile, PackWriter
from flashload.ggml import F32
from flashload.pack import choose_format
from flashload.pack_layout import Entry, payload_bytes
from flashload.pack_neurons import NeuronLayer, neuron_format
from flashload.pack_writer import file_bytes_for
from flashload.tensors import Checkpoint, TensorInfo
from flashload.tiles import tile_rows, untile_rows
from quant.formats import F32 as Floats
from quant.formats import TILE_FORMATS, TILE_ROWS, WeightFormat, tile_bytes
from quant.formats.neuron import NEURON_FORMATS, decode_dot

Progress = Callable[[int, int], None]

BITS = ("q8", "q4")
_MATRICES = ("gate.weight", "up.weight", "down.weight")


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix as a pack holds it, rounded to its format."""

    format: WeightFormat
    rows: int
    cols: int
    tiles: bytes

    @classmethod
    def of(cls, values: Floats, bits: str) -> StoredMatrix:
        """Rounds values [rows, cols] to "q8" or "q4" (f16 where a row has no whole blocks)."""
        rows, cols = values.shape
        code = choose_format("predictor", F32, cols, bits)
        data = np.ascontiguousarray(values, "<f4").tobytes()
        return cls(code, rows, cols, tile_rows(F32, code, data, rows, cols))

    def values(self) -> Floats:
        """What the pack will say, [rows, cols]."""
        return untile_rows(self.format, self.tiles, self.rows, self.cols)


@dataclass(frozen=True)
class StoredPredictor:
    """A layer's predictor: down [r, D], up [F, r], bias [F]; open is up @ (down @ x) + bias > 0."""

    down: StoredMatrix
    up: StoredMatrix
    bias: Floats

    @property
    def bytes(self) -> int:
        """What it takes in a pack, padding aside."""
        return len(self.down.tiles) + len(self.up.tiles) + 4 * len(self.bias)


@dataclass(frozen=True)
class _Step:
    name: str
    format: WeightFormat
    rows: int
    cols: int
    parts: Callable[[], Iterable[bytes]]
    layer: int = -1
    expert: int = -1
    neuron_parts: int = 1

    @property
    def n_bytes(self) -> int:
        return payload_bytes(self.format, self.rows, self.cols, self.neuron_parts)

    @property
    def most_chunks(self) -> int:
        return self.rows if self.format in NEURON_FORMATS else -(-self.n_bytes // 4096)


class _PackRows(Checkpoint):
    """A pack's matrices as a packer reads a checkpoint: rows of f32."""

    kind = "pack"

    def __init__(self, pack: PackFile) -> None:
        super().__init__()
        self._pack = pack
        self.path = pack.path
        self.metadata = {}
        self.tensors = {
            e.name: TensorInfo(e.name, F32, "F32", (e.rows, e.cols), e.offset, 4 * e.rows * e.cols, pack.path)
            for e in pack.entries.values()
            if e.format in TILE_FORMATS
        }
        # A layer's matrices are read a few rows at a time, in turn.
        self._tiles = lru_cache(len(_MATRICES))(pack.read)

    def describe(self) -> str:
        return "pack"

    def read_rows(self, name: str, first: int, count: int) -> bytes:
        entry = self._pack.entries[name]
        tile = tile_bytes(entry.format, TILE_ROWS, entry.cols)
        begin = first // TILE_ROWS
        end = -(-(first + count) // TILE_ROWS)
        rows = min(entry.rows, end * TILE_ROWS) - begin * TILE_ROWS
        values = untile_rows(entry.format, self._tiles(name)[begin * tile : end * tile], rows, entry.cols)
        skip = first - begin * TILE_ROWS
        return np.ascontiguousarray(values[skip : skip + count], "<f4").tobytes()


def _dense_layers(pack: PackFile) -> dict[int, dict[str, Entry]]:
    out: dict[int, dict[str, Entry]] = {}
    for entry in pack.entries.values():
        key = entry.name.partition(f"layers.{entry.layer}.")[2]
        if entry.expert < 0 and key in _MATRICES:
            out.setdefault(entry.layer, {})[key] = entry
    return out


def _neuron_layer(rows: _PackRows, layer: int, parts: dict[str, Entry]) -> NeuronLayer:
    def bound(key: str) -> BoundWeight | None:
        entry = parts.get(key)
        if entry is None:
            return None
        slot = Slot(entry.name, key, entry.rows, entry.cols, True, layer=layer)
        return BoundWeight(slot, rows.tensors[entry.name])

    up, down = bound("up.weight"), bound("down.weight")
    if up is None or down is None:
        raise ModelFileError(f"{rows.path}: layer {layer}: expected up and down weights, found one of them")
    kinds = [TILE_FORMATS[entry.format].ggml_type for entry in parts.values()]
    return NeuronLayer(layer, neuron_format(kinds, "keep"), bound("gate.weight"), up, down)


def _neuron_steps(rows: _PackRows, layer: NeuronLayer) -> list[_Step]:
    name, n, cols = f"layers.{layer.index}.neurons", layer.neurons, layer.hidden
    return [
        _Step(f"{name}.gates", layer.format, n, cols, lambda: layer.gates(rows), layer.index),
        _Step(
            f"{name}.records",
            layer.format,
            n,
            cols,
            lambda: layer.records(rows),
            layer.index,
            neuron_parts=len(layer.rows) + 1,
        ),
    ]


def _predictor_steps(layer: int, predictor: StoredPredictor) -> Iterator[_Step]:
    name = f"layers.{layer}.predictor"
    for side, matrix in (("down", predictor.down), ("up", predictor.up)):
        parts = partial(iter, [matrix.tiles])
        yield _Step(f"{name}.{side}.weight", matrix.format, matrix.rows, matrix.cols, parts, layer)
    bias = np.ascontiguousarray(predictor.bias, "<f4").tobytes()
    yield _Step(f"{name}.bias", WeightFormat.F32_VECTOR, 1, len(predictor.bias), partial(iter, [bias]), layer)


def _steps(
    pack: PackFile, predictors: Mapping[int, StoredPredictor], facts: Mapping[str, Any]
) -> list[_Step]:
    rows = _PackRows(pack)
    dense = _dense_layers(pack)
    metadata = {key: value for key, value in pack.metadata.items() if key != "predictor"}
    if predictors:
        metadata["predictor"] = {"rank": [p.down.rows for p in predictors.values()], **facts}
    blob = json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode()
    steps: list[_Step] = []
    for entry in pack.entries.values():
        if entry.name == METADATA:
            steps.append(_Step(METADATA, entry.format, 1, len(blob), lambda: [blob]))
        elif entry in dense.get(entry.layer, {}).values():
            if entry is next(iter(dense[entry.layer].values())):
                steps += _neuron_steps(rows, _neuron_layer(rows, entry.layer, dense[entry.layer]))
        elif ".predictor." not in entry.name:
            parts = partial(pack.parts, entry.name)
            steps.append(
                _Step(
                    entry.name, entry.format, entry.rows, entry.cols, parts, entry.layer, entry.expert,
                    max(1, entry.neuron_parts),
                )
            )  # fmt: skip
    for layer, predictor in predictors.items():
        steps += _predictor_steps(layer, predictor)
    return steps


def add_predictors(
    source: str | Path,
    destination: str | Path,
    predictors: Mapping[int, StoredPredictor],
    facts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> int:
    """Writes ``source`` again as ``destination``, with these predictors in the place of any it had.

    Feed-forward layers of a ReLU model that are matrices become records; their down columns are rounded again, across
    the other dimension, unless they are floats.

    Args:
        source: a pack; it stays as it is.
        destination: appears complete or not at all.
        predictors: by layer: of every dense layer, or none at all.
        facts: what the metadata says of them besides their ranks.
        progress: called with (done_bytes, total_bytes).

    Returns:
        The size of the file.

    Raises:
        ArgumentError: a model without dense ReLU layers, or a destination that is the source.
        ModelFileError, CorruptError, DiskError: as of reading and writing packs.
    """
    source, destination = Path(source), Path(destination)
    if destination.resolve() == source.resolve():
        raise ArgumentError(f"{destination}: expected another file than the source")
    with PackFile(source) as pack:
        if pack.config.activation != "relu" or pack.config.n_experts:
            raise ArgumentError(f"{source}: expected a dense ReLU model, found {pack.config.activation}")
        steps = _steps(pack, predictors, facts or {})
        sizes = [step.n_bytes for step in steps]
        file_bytes = file_bytes_for(sizes, sum(step.most_chunks for step in steps), len(steps))
        total, done = sum(sizes), 0
        with PackWriter(destination, file_bytes) as writer:
            for step in steps:
                writer.add(
                    step.name, step.format, step.rows, step.cols, step.parts(), step.layer, step.expert,
                    step.neuron_parts,
                )  # fmt: skip
                done += step.n_bytes
                if progress is not None:
                    progress(done, total)
    return destination.stat().st_size


def gate_rows(pack: PackFile, layer: int) -> Floats:
    """The rows that decide which neurons of a layer packed by neuron are open, [F, D]."""
    entry = pack.entries[f"layers.{layer}.neurons.gates"]
    data = np.frombuffer(pack.read(entry.name), np.uint8).reshape(entry.rows, -1)
    return decode_dot(entry.format, data, entry.cols)
