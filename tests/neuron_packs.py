"""Packs of tiny ReLU models by neuron, made from a dense pack by the definition of the record format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _edge
import numpy as np

from flashload.format import PackFile, PackWriter
from flashload.pack import pack
from flashload.pack_layout import record_bytes
from flashload.tiles import tile_rows
from quant.formats import TILE_FORMATS, WeightFormat
from quant.formats.neuron import decode_column, decode_dot, encode_column, encode_dot, row_bytes
from tests.tiny import tiny_hf

_GGML_F32 = 0
FORMATS = {"f16": WeightFormat.NEURON_F16, "q8": WeightFormat.NEURON_Q8, "q4": WeightFormat.NEURON_Q4}


def tiny_relu(folder: Path, family: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """A dense pack of a tiny model whose feed-forward layers are ReLU."""
    if family != "opt":
        overrides = {"hidden_act": "relu", **overrides}
    dense = folder / f"{family}-{seed}.edge"
    if not dense.exists():
        pack(tiny_hf(folder / f"{family}-{seed}", family, seed=seed, **overrides), dense)
    return dense


def values_of(file: PackFile, name: str) -> np.ndarray:
    """[rows, cols] f32 of a matrix or vector."""
    entry = file.entries[name]
    data = file.read(name)
    if entry.format in TILE_FORMATS:
        return np.asarray(_edge.untile_rows(int(entry.format), data, entry.rows, entry.cols))
    return np.frombuffer(data, "<f4")[None, :]


def layer_records(
    code: WeightFormat, gate: np.ndarray | None, up: np.ndarray, down: np.ndarray
) -> tuple[bytes, bytes]:
    """(gates, records) of one layer from [F, D], [F, D] and [D, F]."""
    rows = [encode_dot(code, gate)] if gate is not None else []
    rows += [encode_dot(code, up), encode_column(code, np.ascontiguousarray(down.T))]
    return rows[0].tobytes(), np.concatenate(rows, axis=1).tobytes()


def predictor_of(decides: np.ndarray, rank: int, bias: float) -> dict[str, np.ndarray]:
    """A low-rank stand-in for the rows that decide; the larger the bias the fewer neurons it misses."""
    left, size, right = np.linalg.svd(decides.astype(np.float64), full_matrices=False)
    return {
        "up": (left[:, :rank] * size[:rank]).astype(np.float32),
        "down": right[:rank].astype(np.float32),
        "bias": np.full(len(decides), bias, np.float32),
    }


def by_neuron(
    dense: Path, destination: Path, bits: str = "q8", rank: int = 0, predictor_bias: float = 0.1
) -> Path:
    """The dense pack with its feed-forward layers by neuron, and with predictors where rank is above zero."""
    code = FORMATS[bits]
    file = PackFile(dense)
    config = file.config.to_json()
    with PackWriter(destination, 1 << 24) as writer:
        for name, entry in file.entries.items():
            layer, _, kind = name.removeprefix("layers.").partition(".")
            first = "gate.weight" if config["gated"] else "up.weight"
            if kind == first:
                prefix = f"layers.{layer}."
                up, down = values_of(file, prefix + "up.weight"), values_of(file, prefix + "down.weight")
                gate = values_of(file, prefix + "gate.weight") if config["gated"] else None
                gates, records = layer_records(code, gate, up, down)
                n, hidden = up.shape
                writer.add(prefix + "neurons.gates", code, n, hidden, [gates], int(layer))
                parts = 3 if config["gated"] else 2
                writer.add(
                    prefix + "neurons.records", code, n, hidden, [records], int(layer), neuron_parts=parts
                )
                if rank:
                    fit = predictor_of(gate if gate is not None else up, rank, predictor_bias)
                    for side in ("down", "up"):
                        shape = fit[side].shape
                        tiles = tile_rows(_GGML_F32, WeightFormat.F32, fit[side].tobytes(), *shape)
                        name = f"{prefix}predictor.{side}.weight"
                        writer.add(name, WeightFormat.F32, *shape, [tiles], int(layer))
                    bias = fit["bias"].tobytes()
                    writer.add(prefix + "predictor.bias", WeightFormat.F32_VECTOR, 1, n, [bias], int(layer))
            elif kind not in ("gate.weight", "up.weight", "down.weight"):
                writer.add(
                    name, entry.format, entry.rows, entry.cols, [file.read(name)], entry.layer, entry.expert
                )
    file.close()
    return destination


def decoded(path: Path) -> dict[str, np.ndarray]:
    """Every weight of a pack as f32; records come apart into gate, up and down."""
    file = PackFile(path)
    gated = file.config.to_json()["gated"]
    out: dict[str, np.ndarray] = {}
    for name, entry in file.entries.items():
        if entry.format is WeightFormat.BYTES or name.endswith(".neurons.gates"):
            continue
        if not name.endswith(".neurons.records"):
            out[name] = values_of(file, name)
            continue
        size, parts = row_bytes(entry.format, entry.cols), entry.neuron_parts
        assert entry.chunk_bytes == record_bytes(entry.format, entry.cols, parts)
        data = np.frombuffer(file.read(name), np.uint8).reshape(entry.rows, parts, size)
        prefix = name.removesuffix("neurons.records")
        decode = [np.ascontiguousarray(data[:, part]) for part in range(parts)]
        if gated:
            out[prefix + "gate.weight"] = decode_dot(entry.format, decode[0], entry.cols)
        out[prefix + "up.weight"] = decode_dot(entry.format, decode[-2], entry.cols)
        out[prefix + "down.weight"] = decode_column(entry.format, decode[-1], entry.cols).T
    file.close()
    return out
