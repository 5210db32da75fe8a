"""Packing: a checkpoint of any size streamed into one pack, tile by tile."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashload import pack_layout as layout
from flashload.arch import DecoderConfig
from flashload.bind import Bound, BoundWeight, Slot, bind
from flashload.checkpoint import Checkpoint, open_checkpoint
from flashload.errors import ArgumentError, ModelFileError
from flashload.extras import Extras, Order
from flashload.format import METADATA, TOKENIZER, TOKENIZER_CONFIG, PackWriter, is_pack
from flashload.ggml import BLOCK_TYPES
from flashload.pack_neurons import (
    NEURONS,
    Loss,
    NeuronLayer,
    dense_layers,
    gather_rows,
    neuron_layers,
    read_orders,
)
from flashload.pack_writer import file_bytes_for
from flashload.tiles import decode_blocks, is_finite, tile_rows
from flashload.vocab import Vocab, vocab_from_gguf, vocab_from_hf
from quant.formats import TILE_FORMATS, TILE_ROWS, WeightFormat
from quant.formats.neuron import NEURON_FORMATS

Progress = Callable[[int, int], None]

WEIGHTS = ("keep", "q8", "q4")
# A step holds the source rows, their f32 values and their tiles: about three times this.
_STEP_BYTES = 16 << 20
_NATIVE = {traits.ggml_type: code for code, traits in TILE_FORMATS.items()}
_FLOATS = (WeightFormat.F32, WeightFormat.F16, WeightFormat.BF16)
_MAX_SHOWN = 8
_GENERATION_KEYS = (
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "min_p",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
)


@dataclass(frozen=True)
class PackReport:
    """What packing did.

    Attributes:
        conversions: weights that changed format: from, to, number of weights, their bytes before and after.
        ignored: tensors of the checkpoint that nothing asked for.
        neurons: of a pack with neuron records: their format, layers, bytes (records and gates), and the relative
            RMS error of the down columns and of the other rows; None without records.
    """

    path: Path
    file_bytes: int
    config: DecoderConfig
    conversions: list[dict[str, Any]]
    ignored: list[str]
    neurons: dict[str, Any] | None = None


def _bits(code: WeightFormat) -> float:
    traits = TILE_FORMATS[code]
    return 8 * traits.block_bytes / traits.block_values


def choose_format(name: str, ggml_type: int, cols: int, weights: str) -> WeightFormat:
    """The format of a matrix in the pack.

    ``keep`` re-arranges what has tiles and takes the rest to q8_0. ``q8`` and ``q4`` lower the bits of what
    has more, and leave what has as few already; q4 keeps embedding and head at eight. Routers and positions
    stay float: a wrong expert costs more than their bytes.
    """
    native = _NATIVE.get(ggml_type)
    if name == "embed.position" or name.endswith(".router.weight"):
        return WeightFormat.F16 if native is WeightFormat.F16 else WeightFormat.F32
    wide = weights == "q8" or (weights == "q4" and name in ("embed.weight", "head.weight"))
    if weights == "keep":
        chosen = native if native is not None else WeightFormat.Q8_0
    elif wide:
        chosen = WeightFormat.Q8_0 if native is None or native in _FLOATS else native
    else:
        chosen = (
            native if native is not None and _bits(native) <= _bits(WeightFormat.Q4_0) else WeightFormat.Q4_0
        )
    if cols % TILE_FORMATS[chosen].block_values:
        return native if native is WeightFormat.BF16 else WeightFormat.F16
    return chosen


@dataclass(frozen=True)
class _Step:
    """One entry to write; ``parts`` makes its payload, ``neuron_parts`` rows to a record."""

    slot: Slot
    format: WeightFormat
    parts: Callable[[], Iterator[bytes]]
    neuron_parts: int = 1

    @property
    def payload_bytes(self) -> int:
        return layout.payload_bytes(self.format, self.slot.rows, self.slot.cols, self.neuron_parts)

    @property
    def n_chunks(self) -> int:
        if self.format in NEURON_FORMATS:
            return self.slot.rows
        return -(-self.payload_bytes // layout.chunk_bytes_for(self.slot.name, self.payload_bytes))


def _weight_step(
    checkpoint: Checkpoint, weight: BoundWeight, weights: str, order: Order | None = None
) -> _Step:
    slot = weight.slot
    if not slot.is_matrix:
        return _Step(slot, WeightFormat.F32_VECTOR, lambda: _vector(checkpoint, weight, order))
    code = choose_format(slot.name, weight.info.ggml_type, slot.cols, weights)
    return _Step(slot, code, lambda: _matrix(checkpoint, weight, code, order))


def _neuron_steps(checkpoint: Checkpoint, layer: NeuronLayer) -> list[_Step]:
    def slot(name: str) -> Slot:
        name = f"layers.{layer.index}.neurons.{name}"
        return Slot(name, name, layer.neurons, layer.hidden, True, layer=layer.index)

    return [
        _Step(slot("gates"), layer.format, lambda: layer.gates(checkpoint), 1),
        _Step(slot("records"), layer.format, lambda: layer.records(checkpoint), len(layer.rows) + 1),
    ]


def _plan(
    checkpoint: Checkpoint, bound: Bound, weights: str, layers: Mapping[int, NeuronLayer]
) -> list[_Step]:
    steps: list[_Step] = []
    for weight in bound.weights:
        layer = layers.get(weight.slot.layer)
        key = weight.slot.key
        if layer is None or key.partition(".")[0] not in ("gate", "up", "down"):
            steps.append(_weight_step(checkpoint, weight, weights))
        elif not weight.slot.is_matrix:
            order = None if key == "down.bias" else layer.order
            steps.append(_weight_step(checkpoint, weight, weights, order))
        elif weight is layer.rows[0]:
            steps += _neuron_steps(checkpoint, layer)
    return steps


def _extra_steps(
    extras: Extras, config: DecoderConfig, layers: Mapping[int, NeuronLayer]
) -> tuple[list[_Step], dict[str, Any]]:
    """Entries of predictors (of layers packed as records) and Medusa heads, and what the metadata says of them."""
    steps: list[_Step] = []
    metadata: dict[str, Any] = {}
    predictor, medusa = extras.predictor(config, layers), extras.medusa(config)
    if predictor:
        ranks = [
            extra.weight.slot.cols for extra in predictor if extra.weight.slot.name.endswith(".up.weight")
        ]
        metadata["predictor"] = {"rank": ranks}
    if medusa:
        metadata["medusa"] = {"heads": len(medusa) // 2}
    for extra in (*predictor, *medusa):
        slot = extra.weight.slot
        by_neuron = slot.key in ("predictor.up.weight", "predictor.bias")
        order = layers[slot.layer].order if by_neuron else None
        steps.append(_weight_step(extra.file, extra.weight, "q8", order))
    return steps, metadata


def _conversions(bound: Bound, steps: list[_Step], layers: Mapping[int, NeuronLayer]) -> list[dict[str, Any]]:
    out: dict[tuple[str, str], dict[str, Any]] = {}

    def add(weights: list[BoundWeight], to: str, after: int, name: str) -> None:
        key = (BLOCK_TYPES[weights[0].info.ggml_type].name.lower(), to)
        group = out.setdefault(
            key,
            {"from": key[0], "to": key[1], "weights": 0, "bytes_before": 0, "bytes_after": 0, "names": []},
        )
        group["weights"] += len(weights)
        group["bytes_before"] += sum(weight.info.row_bytes * weight.slot.rows for weight in weights)
        group["bytes_after"] += after
        if len(group["names"]) < _MAX_SHOWN:
            group["names"].append(name)

    by_name = {step.slot.name: step for step in steps}
    for weight in bound.weights:
        step = by_name.get(weight.slot.name)
        if step is None or not weight.slot.is_matrix or _NATIVE.get(weight.info.ggml_type) is step.format:
            continue
        add([weight], TILE_FORMATS[step.format].name, step.payload_bytes, weight.slot.name)
    for i, layer in layers.items():
        names = [f"layers.{i}.neurons.{part}" for part in ("gates", "records")]
        n_bytes = sum(by_name[name].payload_bytes for name in names)
        add([*layer.rows, layer.down], NEURON_FORMATS[layer.format].name, n_bytes, names[1])
    return list(out.values())


def _neurons_report(steps: list[_Step], layers: Mapping[int, NeuronLayer]) -> dict[str, Any] | None:
    if not layers:
        return None
    down, rows = Loss(), Loss()
    for layer in layers.values():
        down.merge(layer.down_loss)
        rows.merge(layer.row_loss)
    return {
        "formats": sorted({NEURON_FORMATS[layer.format].name for layer in layers.values()}),
        "layers": len(layers),
        "neurons": sum(layer.neurons for layer in layers.values()),
        "bytes": sum(step.payload_bytes for step in steps if step.format in NEURON_FORMATS),
        "down_loss": down.relative_rms,
        "row_loss": rows.relative_rms,
        "ordered": any(layer.order is not None for layer in layers.values()),
    }


def _pair_order(head_dim: int, rotary_dim: int) -> np.ndarray:
    """Row of the interleaved head that becomes row d of the rotate-half head."""
    pairs = np.arange(rotary_dim).reshape(-1, 2).T.reshape(-1)
    return np.concatenate([pairs, np.arange(rotary_dim, head_dim)])


def _rows(checkpoint: Checkpoint, weight: BoundWeight, first: int, count: int) -> bytes:
    """Rows [first, first + count) of a slot, q and k in rotate-half order."""
    data = checkpoint.read_rows(weight.info.name, weight.first_row + first, count)
    if not weight.rotary_dim:
        return data
    heads = np.frombuffer(data, np.uint8).reshape(-1, weight.head_dim, weight.info.row_bytes)
    return np.ascontiguousarray(heads[:, _pair_order(weight.head_dim, weight.rotary_dim)]).tobytes()


def _matrix(
    checkpoint: Checkpoint, weight: BoundWeight, code: WeightFormat, order: Order | None
) -> Iterator[bytes]:
    slot = weight.slot
    # Whole tiles, and whole heads where rows move within a head.
    unit = math.lcm(TILE_ROWS, weight.head_dim or TILE_ROWS)
    piece = max(_STEP_BYTES // (4 * slot.cols * unit), 1) * unit
    kind = weight.info.ggml_type
    ordered = None if order is None else gather_rows(checkpoint, weight, order)
    for first in range(0, slot.rows, piece):
        count = min(piece, slot.rows - first)
        moved = None if ordered is None else ordered[first : first + count].tobytes()
        data = _rows(checkpoint, weight, first, count) if moved is None else moved
        tiles = tile_rows(kind, code, data, count, slot.cols)
        if kind != TILE_FORMATS[code].ggml_type and not is_finite(code, tiles):
            raise ModelFileError(
                f"{weight.info.file}: {weight.info.name}: expected finite values to convert to "
                f"{TILE_FORMATS[code].name}, found NaN, infinity or one beyond its range"
            )
        yield tiles


def _vector(checkpoint: Checkpoint, weight: BoundWeight, order: Order | None) -> Iterator[bytes]:
    data = checkpoint.read_rows(weight.info.name, 0, 1)
    values = decode_blocks(weight.info.ggml_type, data, weight.slot.cols)
    if weight.rotary_dim:
        pairs = _pair_order(weight.head_dim, weight.rotary_dim)
        values = values.reshape(-1, weight.head_dim)[:, pairs].reshape(-1)
    if order is not None:
        values = values[order]
    yield np.ascontiguousarray(values, dtype="<f4").tobytes()


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    found = checkpoint.metadata.get("generation_config", {}) if checkpoint.kind == "hf" else {}
    return {key: found[key] for key in _GENERATION_KEYS if found.get(key) is not None}


def _vocab(checkpoint: Checkpoint) -> Vocab:
    return (
        vocab_from_gguf(checkpoint.metadata) if checkpoint.kind == "gguf" else vocab_from_hf(checkpoint.path)
    )


def _json(value: dict[str, Any]) -> bytes:
    # A file's name need not be text: what is none of it becomes "?".
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def pack(
    source: str | Path,
    destination: str | Path,
    weights: str = "keep",
    progress: Progress | None = None,
    *,
    neurons: str = "auto",
    neuron_order: str | Path | None = None,
) -> PackReport:
    """Packs a GGUF file or a Hugging Face folder into ``destination``.

    Predictors and Medusa heads beside the weights of a folder (``flashload.extras``) go into the pack too.

    Args:
        source: what to pack.
        destination: the pack to write; it appears complete or not at all.
        weights: "keep" leaves the weights as they are where tiles exist for them, "q8" and "q4" lower them.
        progress: called with (done_bytes, total_bytes) of payload.
        neurons: whether dense layers are packed as neuron records: "on", "off", or "auto": on when predictors lie
            beside the weights.
        neuron_order: .npz file with an order of the neurons of some layers, ``layers.{i}.neuron_order``; it goes
            before one in the predictors' file.

    Raises:
        ModelFileError: the checkpoint is malformed, incomplete, or not one edge runs.
        DiskError: the drive fails or is full; the message says how much is needed.
        ArgumentError: an unknown value of ``weights`` or ``neurons``, records of a model without dense layers, or an
            order without records.
    """
    source, destination = Path(source), Path(destination)
    if weights not in WEIGHTS:
        raise ArgumentError(f"weights: expected one of {', '.join(WEIGHTS)}, found {weights!r}")
    if neurons not in NEURONS:
        raise ArgumentError(f"neurons: expected one of {', '.join(NEURONS)}, found {neurons!r}")
    if is_pack(source):
        raise ModelFileError(f"{source}: expected a GGUF file or a Hugging Face folder, found a pack")
    with open_checkpoint(source) as checkpoint, Extras(source) as extras:
        if destination.resolve() in [file.resolve() for file in checkpoint.files]:
            raise ArgumentError(f"{destination}: expected another file than the source")
        bound = bind(checkpoint)
        vocab = _vocab(checkpoint)
        orders = extras.orders(bound.config, dense_layers(bound))
        if neuron_order is not None:
            orders |= read_orders(Path(neuron_order), bound.config)
        layers = neuron_layers(bound, weights, neurons, extras.has_predictor, orders)
        if neuron_order is not None and not layers:
            raise ArgumentError(f"neuron_order: expected neurons='on', found {neurons!r} and no predictors")
        steps = _plan(checkpoint, bound, weights, layers)
        conversions = _conversions(bound, steps, layers)
        extra_steps, extra_metadata = _extra_steps(extras, bound.config, layers)
        ignored = bound.ignored + extras.ignored()
        metadata = {
            "config": bound.config.to_json(),
            "source": {
                "kind": checkpoint.kind,
                "name": source.name,
                "files": [file.name for file in checkpoint.files],
                "ignored": ignored,
            },
            "weights": weights,
            "conversions": conversions,
            "generation": _generation(checkpoint),
            **extra_metadata,
        }
        blobs = {
            METADATA: _json(metadata),
            TOKENIZER: vocab.tokenizer_json.encode(),
            TOKENIZER_CONFIG: _json(vocab.config),
        }
        file_bytes = _write(destination, blobs, steps + extra_steps, progress)
    report = _neurons_report(steps, layers)
    return PackReport(destination, file_bytes, bound.config, conversions, ignored, report)


def _write(destination: Path, blobs: dict[str, bytes], steps: list[_Step], progress: Progress | None) -> int:
    def blob_step(name: str, data: bytes) -> _Step:
        return _Step(Slot(name, name, 1, len(data), False), WeightFormat.BYTES, lambda: iter([data]))

    steps = [blob_step(name, data) for name, data in blobs.items()] + steps
    sizes = [step.payload_bytes for step in steps]
    file_bytes = file_bytes_for(sizes, sum(step.n_chunks for step in steps), len(steps))
    total, done = sum(sizes), 0

    def counted(parts: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal done
        for part in parts:
            yield part
            done += len(part)
            if progress is not None:
                progress(done, total)

    with PackWriter(destination, file_bytes) as writer:
        for step in steps:
            slot, parts = step.slot, counted(step.parts())
            writer.add(
                slot.name,
                step.format,
                slot.rows,
                slot.cols,
                parts,
                slot.layer,
                slot.expert,
                step.neuron_parts,
            )
    return file_bytes
