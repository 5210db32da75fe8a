"""Feed-forward layers packed by neuron: gate row, up row and down column of each in one record.

"LLM in a flash" (arXiv 2312.11514, section 3.2). Rows of the down matrix run across the neurons, so its columns are
gathered by sweeping over the matrix, a bounded number of neurons at a time.
"""

from __future__ import annotations

import importlib
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashload.arch import DecoderConfig
from flashload.bind import Bound, BoundWeight
from flashload.errors import ArgumentError, DiskError, ModelFileError
from flashload.extras import Order, as_order
from flashload.ggml import BF16, F16, F32, Q4_0
from flashload.tensors import Checkpoint
from flashload.tiles import decode_blocks
from quant.formats import WeightFormat
from quant.formats.neuron import (
    NEURON_FORMATS,
    decode_column,
    decode_dot,
    encode_column,
    encode_dot,
    from_blocks,
    record_finite,
)

NEURONS = ("auto", "on", "off")
_NEURON_KEYS = ("gate.weight", "up.weight", "down.weight")
#: f32 values of the down columns gathered in one sweep; rows in another order take as much again.
BLOCK_BYTES = 128 << 20
STEP_BYTES = 16 << 20
_MAX_ORDER_BYTES = 1 << 30

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def _core() -> Any:
    try:
        core = importlib.import_module("_edge")
    except ImportError:
        return None
    return core if hasattr(core, "neuron_rows") else None


_EDGE = _core()


def neuron_rows(
    ggml_type: int, weight_format: WeightFormat, data: bytes, n: int, hidden: int, column: bool
) -> Bytes:
    """Checkpoint rows [n, hidden] -> rows of records [n, row bytes]; the format's own type keeps every bit."""
    if _EDGE is not None:
        rows: Bytes = _EDGE.neuron_rows(ggml_type, int(weight_format), data, n, hidden, column)
        return rows
    if NEURON_FORMATS[weight_format].ggml_type == ggml_type:
        return from_blocks(weight_format, data, n, hidden, column)
    values = decode_blocks(ggml_type, data, n * hidden).reshape(n, hidden)
    return (encode_column if column else encode_dot)(weight_format, values)


@dataclass
class Loss:
    """Squared error and size of values that were rounded, summed up while packing."""

    error: float = 0.0
    size: float = 0.0

    def add(self, exact: Floats, packed: Floats) -> None:
        """Counts values and what became of them."""
        difference = (exact - packed).reshape(-1)
        self.error += float(np.dot(difference, difference))
        self.size += float(np.dot(exact.reshape(-1), exact.reshape(-1)))

    def merge(self, other: Loss) -> None:
        """Counts what another counted."""
        self.error += other.error
        self.size += other.size

    @property
    def relative_rms(self) -> float:
        """Root of the mean squared error over root of the mean square."""
        return math.sqrt(self.error / self.size) if self.size else 0.0


@dataclass(frozen=True)
class NeuronLayer:
    """One dense layer whose matrices become records.

    Attributes:
        gate: None in a feed-forward without a gate, whose up rows then decide which neurons are active.
        order: place in the pack -> neuron of the checkpoint; None leaves the order.
        row_loss, down_loss: what rounding did to rows and to down columns, filled while packing.
    """

    index: int
    format: WeightFormat
    gate: BoundWeight | None
    up: BoundWeight
    down: BoundWeight
    order: Order | None = None
    row_loss: Loss = field(default_factory=Loss)
    down_loss: Loss = field(default_factory=Loss)

    @property
    def rows(self) -> list[BoundWeight]:
        """The matrices that give rows of a record, in order."""
        return [self.up] if self.gate is None else [self.gate, self.up]

    @property
    def neurons(self) -> int:
        """Width of the layer."""
        return self.up.slot.rows

    @property
    def hidden(self) -> int:
        """Values of one row."""
        return self.up.slot.cols

    def gates(self, checkpoint: Checkpoint) -> Iterator[bytes]:
        """The entry ``layers.i.neurons.gates``: the rows that tell which neurons are active."""
        weight = self.rows[0]
        for ids in _blocks(self, BLOCK_BYTES // (4 * self.hidden)):
            source = _Rows(checkpoint, weight, ids)
            for first, count in _steps(len(ids), STEP_BYTES // (4 * self.hidden)):
                yield self._rows(weight, source(first, count), count, None).tobytes()

    def records(self, checkpoint: Checkpoint) -> Iterator[bytes]:
        """The entry ``layers.i.neurons.records``."""
        for ids in _blocks(self, BLOCK_BYTES // (4 * self.hidden)):
            columns = _columns(checkpoint, self.down, ids)
            sources = [_Rows(checkpoint, weight, ids) for weight in self.rows]
            for first, count in _steps(len(ids), STEP_BYTES // (4 * self.hidden)):
                parts = [
                    self._rows(weight, source(first, count), count, self.row_loss)
                    for weight, source in zip(self.rows, sources, strict=True)
                ]
                parts.append(self._columns(columns[first : first + count]))
                yield np.stack(parts, axis=1).tobytes()

    def _rows(self, weight: BoundWeight, data: bytes, count: int, loss: Loss | None) -> Bytes:
        kind = weight.info.ggml_type
        rows = neuron_rows(kind, self.format, data, count, self.hidden, False)
        if kind == NEURON_FORMATS[self.format].ggml_type:
            return rows
        self._check(weight, rows)
        if loss is not None:
            exact = decode_blocks(kind, data, count * self.hidden).reshape(count, self.hidden)
            loss.add(exact, decode_dot(self.format, rows, self.hidden))
        return rows

    def _columns(self, values: Floats) -> Bytes:
        rows = neuron_rows(F32, self.format, values.tobytes(), len(values), self.hidden, True)
        self._check(self.down, rows)
        self.down_loss.add(values, decode_column(self.format, rows, self.hidden))
        return rows

    def _check(self, weight: BoundWeight, rows: Bytes) -> None:
        if not record_finite(self.format, rows):
            raise ModelFileError(
                f"{weight.info.file}: {weight.info.name}: expected finite values to convert to "
                f"{NEURON_FORMATS[self.format].name}, found NaN, infinity or one beyond its range"
            )


def _steps(n: int, most: int) -> Iterator[tuple[int, int]]:
    for first in range(0, n, max(most, 1)):
        yield first, min(max(most, 1), n - first)


def _blocks(layer: NeuronLayer, most: int) -> Iterator[range | Order]:
    """The neurons of the checkpoint in pack order, so many at a time."""
    for first, count in _steps(layer.neurons, most):
        yield range(first, first + count) if layer.order is None else layer.order[first : first + count]


class _Rows:
    """Raw rows of a matrix: read when asked for, or gathered by one sweep when they lie in another order."""

    def __init__(self, checkpoint: Checkpoint, weight: BoundWeight, ids: range | Order) -> None:
        self._checkpoint, self._weight, self._ids = checkpoint, weight, ids
        self._gathered = None if isinstance(ids, range) else gather_rows(checkpoint, weight, ids)

    def __call__(self, first: int, count: int) -> bytes:
        if self._gathered is not None:
            return self._gathered[first : first + count].tobytes()
        weight = self._weight
        at = weight.first_row + int(self._ids[first])
        return self._checkpoint.read_rows(weight.info.name, at, count)


def gather_rows(checkpoint: Checkpoint, weight: BoundWeight, ids: Order) -> Bytes:
    """Raw rows ``ids`` of a slot, [n, bytes of a row], by reading all of it in order."""
    n_rows, row_bytes = weight.slot.rows, weight.info.row_bytes
    place = np.full(n_rows, -1, np.int64)
    place[ids] = np.arange(len(ids))
    out = np.empty((len(ids), row_bytes), np.uint8)
    for first, count in _steps(n_rows, STEP_BYTES // row_bytes):
        data = checkpoint.read_rows(weight.info.name, weight.first_row + first, count)
        where = place[first : first + count]
        wanted = where >= 0
        out[where[wanted]] = np.frombuffer(data, np.uint8).reshape(count, row_bytes)[wanted]
    return out


def _columns(checkpoint: Checkpoint, down: BoundWeight, ids: range | Order) -> Floats:
    """Columns ``ids`` of the down matrix [hidden, neurons] as f32 [n, hidden]."""
    hidden, width = down.slot.rows, down.slot.cols
    wanted = slice(ids.start, ids.stop) if isinstance(ids, range) else ids
    out = np.empty((len(ids), hidden), np.float32)
    for first, count in _steps(hidden, STEP_BYTES // (4 * width)):
        data = checkpoint.read_rows(down.info.name, down.first_row + first, count)
        values = decode_blocks(down.info.ggml_type, data, count * width).reshape(count, width)
        out[:, first : first + count] = values[:, wanted].T
    return out


def neuron_format(ggml_types: list[int], weights: str) -> WeightFormat:
    """The format of a layer's records: as many bits as the widest of its matrices needs under ``weights``.

    "keep": floats stay f16, Q8_0 and Q4_0 keep the bits of their rows, the rest becomes q8. "q8" and "q4" lower
    what has more.
    """

    def one(ggml_type: int) -> WeightFormat:
        if weights == "q4" or ggml_type == Q4_0:
            return WeightFormat.NEURON_Q4
        if weights == "keep" and ggml_type in (F32, F16, BF16):
            return WeightFormat.NEURON_F16
        return WeightFormat.NEURON_Q8

    # The codes fall with the bits.
    return min(map(one, ggml_types))


def neuron_layers(
    bound: Bound, weights: str, neurons: str, predicted: bool, orders: Mapping[int, Order]
) -> dict[int, NeuronLayer]:
    """The layers that are packed as records, by index.

    Args:
        neurons: "on", "off", or "auto": on where ``predicted``, that is, when predictors lie beside the model.
        orders: neuron order of a layer, where it is not the checkpoint's.

    Raises:
        ArgumentError: "on" for a model without dense layers.
    """
    if neurons == "off" or (neurons == "auto" and not predicted):
        return {}
    found = dense_layers(bound)
    if neurons == "on" and not found:
        raise ArgumentError(
            f"neurons: expected a model with dense layers, found {bound.config.family} with none"
        )
    out = {}
    for i, parts in found.items():
        types = [weight.info.ggml_type for weight in parts.values()]
        out[i] = NeuronLayer(
            i,
            neuron_format(types, weights),
            parts.get("gate.weight"),
            parts["up.weight"],
            parts["down.weight"],
            orders.get(i),
        )
    return out


def dense_layers(bound: Bound) -> dict[int, dict[str, BoundWeight]]:
    """Gate (where there is one), up and down matrix of every dense layer."""
    out: dict[int, dict[str, BoundWeight]] = {}
    for weight in bound.weights:
        if weight.slot.key in _NEURON_KEYS and weight.slot.expert < 0:
            out.setdefault(weight.slot.layer, {})[weight.slot.key] = weight
    return out


def read_orders(path: Path, config: DecoderConfig) -> dict[int, Order]:
    """Neuron orders from an .npz file with arrays ``layers.{i}.neuron_order`` [neurons].

    Raises:
        ModelFileError: not such a file, or an array that is no permutation.
        DiskError: it cannot be read.
    """
    out: dict[int, Order] = {}
    try:
        if path.stat().st_size > _MAX_ORDER_BYTES:
            raise ModelFileError(f"{path}: expected at most {_MAX_ORDER_BYTES} bytes, found more")
        with np.load(path, allow_pickle=False) as arrays:
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ModelFileError(f"{path}: expected an .npz file, found another")
            for name in arrays.files:
                parts = name.split(".")
                known = len(parts) == 3 and (parts[0], parts[2]) == ("layers", "neuron_order")
                if not known or not parts[1].isdecimal() or int(parts[1]) >= config.n_layers:
                    raise ModelFileError(f"{path}: expected layers.{{i}}.neuron_order, found {name!r}")
                where = f"{path}: {name}"
                out[int(parts[1])] = as_order(np.asarray(arrays[name]), config.intermediate_size, where)
    except OSError as error:
        raise DiskError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ModelFileError(f"{path}: expected an .npz file of numbers, found an error: {error}") from error
    return out
