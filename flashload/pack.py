"""Packing: a checkpoint of any size streamed into one pack, tile by tile."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashload import pack_layout as layout
from flashload.arch import DecoderConfig
from flashload.bind import Bound, BoundWeight, bind
from flashload.checkpoint import Checkpoint, open_checkpoint
from flashload.errors import ArgumentError, ModelFileError
from flashload.format import METADATA, TOKENIZER, TOKENIZER_CONFIG, PackWriter, is_pack
from flashload.ggml import BLOCK_TYPES
from flashload.pack_writer import file_bytes_for
from flashload.tiles import decode_blocks, is_finite, tile_rows
from flashload.vocab import Vocab, vocab_from_gguf, vocab_from_hf
from quant.formats import TILE_FORMATS, TILE_ROWS, WeightFormat

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
    """

    path: Path
    file_bytes: int
    config: DecoderConfig
    conversions: list[dict[str, Any]]
    ignored: list[str]


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
        chosen = native if native in (WeightFormat.Q4_0, WeightFormat.Q4_K) else WeightFormat.Q4_0
    if cols % TILE_FORMATS[chosen].block_values:
        return native if native is WeightFormat.BF16 else WeightFormat.F16
    return chosen


@dataclass(frozen=True)
class _Step:
    """One entry to write."""

    weight: BoundWeight
    format: WeightFormat

    @property
    def payload_bytes(self) -> int:
        return layout.payload_bytes(self.format, self.weight.slot.rows, self.weight.slot.cols)


def _plan(bound: Bound, weights: str) -> list[_Step]:
    steps = []
    for weight in bound.weights:
        slot = weight.slot
        code = WeightFormat.F32_VECTOR
        if slot.is_matrix:
            code = choose_format(slot.name, weight.info.ggml_type, slot.cols, weights)
        steps.append(_Step(weight, code))
    return steps


def _conversions(steps: list[_Step]) -> list[dict[str, Any]]:
    out: dict[tuple[str, str], dict[str, Any]] = {}
    for step in steps:
        slot, info = step.weight.slot, step.weight.info
        if not slot.is_matrix or _NATIVE.get(info.ggml_type) is step.format:
            continue
        key = (BLOCK_TYPES[info.ggml_type].name.lower(), TILE_FORMATS[step.format].name)
        group = out.setdefault(
            key,
            {"from": key[0], "to": key[1], "weights": 0, "bytes_before": 0, "bytes_after": 0, "names": []},
        )
        group["weights"] += 1
        group["bytes_before"] += info.row_bytes * slot.rows
        group["bytes_after"] += step.payload_bytes
        if len(group["names"]) < _MAX_SHOWN:
            group["names"].append(slot.name)
    return list(out.values())


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


def _matrix(checkpoint: Checkpoint, step: _Step) -> Iterator[bytes]:
    weight, slot = step.weight, step.weight.slot
    # Whole tiles, and whole heads where rows move within a head.
    unit = math.lcm(TILE_ROWS, weight.head_dim or TILE_ROWS)
    piece = max(_STEP_BYTES // (4 * slot.cols * unit), 1) * unit
    kind = weight.info.ggml_type
    for first in range(0, slot.rows, piece):
        count = min(piece, slot.rows - first)
        tiles = tile_rows(kind, step.format, _rows(checkpoint, weight, first, count), count, slot.cols)
        if kind != TILE_FORMATS[step.format].ggml_type and not is_finite(step.format, tiles):
            raise ModelFileError(
                f"{weight.info.file}: {weight.info.name}: expected finite values to convert to "
                f"{TILE_FORMATS[step.format].name}, found NaN, infinity or one beyond its range"
            )
        yield tiles


def _vector(checkpoint: Checkpoint, weight: BoundWeight) -> Iterator[bytes]:
    data = checkpoint.read_rows(weight.info.name, 0, 1)
    values = decode_blocks(weight.info.ggml_type, data, weight.slot.cols)
    if weight.rotary_dim:
        order = _pair_order(weight.head_dim, weight.rotary_dim)
        values = values.reshape(-1, weight.head_dim)[:, order].reshape(-1)
    yield np.ascontiguousarray(values, dtype="<f4").tobytes()


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    found = checkpoint.metadata.get("generation_config", {}) if checkpoint.kind == "hf" else {}
    return {key: found[key] for key in _GENERATION_KEYS if found.get(key) is not None}


def _vocab(checkpoint: Checkpoint) -> Vocab:
    return (
        vocab_from_gguf(checkpoint.metadata) if checkpoint.kind == "gguf" else vocab_from_hf(checkpoint.path)
    )


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def pack(
    source: str | Path, destination: str | Path, weights: str = "keep", progress: Progress | None = None
) -> PackReport:
    """Packs a GGUF file or a Hugging Face folder into ``destination``.

    Args:
        source: what to pack.
        destination: the pack to write; it appears complete or not at all.
        weights: "keep" leaves the weights as they are where tiles exist for them, "q8" and "q4" lower them.
        progress: called with (done_bytes, total_bytes) of payload.

    Raises:
        ModelFileError: the checkpoint is malformed, incomplete, or not one edge runs.
        DiskError: the drive fails or is full; the message says how much is needed.
        ArgumentError: an unknown value of ``weights``.
    """
    source, destination = Path(source), Path(destination)
    if weights not in WEIGHTS:
        raise ArgumentError(f"weights: expected one of {', '.join(WEIGHTS)}, found {weights!r}")
    if is_pack(source):
        raise ModelFileError(f"{source}: expected a GGUF file or a Hugging Face folder, found a pack")
    with open_checkpoint(source) as checkpoint:
        if destination.resolve() in [file.resolve() for file in checkpoint.files]:
            raise ArgumentError(f"{destination}: expected another file than the source")
        bound = bind(checkpoint)
        vocab = _vocab(checkpoint)
        steps = _plan(bound, weights)
        conversions = _conversions(steps)
        metadata = {
            "config": bound.config.to_json(),
            "source": {
                "kind": checkpoint.kind,
                "name": source.name,
                "files": [file.name for file in checkpoint.files],
                "ignored": bound.ignored,
            },
            "weights": weights,
            "conversions": conversions,
            "generation": _generation(checkpoint),
        }
        blobs = {
            METADATA: _json(metadata),
            TOKENIZER: vocab.tokenizer_json.encode(),
            TOKENIZER_CONFIG: _json(vocab.config),
        }
        file_bytes = _write(checkpoint, destination, blobs, steps, progress)
    return PackReport(destination, file_bytes, bound.config, conversions, bound.ignored)


def _write(
    checkpoint: Checkpoint,
    destination: Path,
    blobs: dict[str, bytes],
    steps: list[_Step],
    progress: Progress | None,
) -> int:
    sizes = {name: len(data) for name, data in blobs.items()}
    sizes |= {step.weight.slot.name: step.payload_bytes for step in steps}
    chunks = sum(-(-size // layout.chunk_bytes_for(name, size)) for name, size in sizes.items())
    file_bytes = file_bytes_for(sizes.values(), chunks, len(sizes))
    total, done = sum(sizes.values()), 0

    def counted(parts: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal done
        for part in parts:
            yield part
            done += len(part)
            if progress is not None:
                progress(done, total)

    with PackWriter(destination, file_bytes) as writer:
        for name, data in blobs.items():
            writer.add(name, WeightFormat.BYTES, 1, len(data), counted(iter([data])))
        for step in steps:
            slot = step.weight.slot
            parts = _matrix(checkpoint, step) if slot.is_matrix else _vector(checkpoint, step.weight)
            writer.add(slot.name, step.format, slot.rows, slot.cols, counted(parts), slot.layer, slot.expert)
    return file_bytes
