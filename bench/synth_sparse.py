"""Packs of the OPT shape by neuron, random weights calibrated to the activation statistics published for OPT-6.7B.

The residual stream is a token's embedding plus its position's row, all else adds little. Eleven of sixteen blocks of
coordinates belong to positions, whose rows change slowly, five to tokens: so neighbouring tokens share most of their
active neurons. Gate rows are a low-rank part, which the predictor knows exactly, plus noise, which it does not; biases
are the thresholds of ``bench.sparsity``. The last layer alone adds much, so that the most likely next token is a random
function of the last one and its position, and greedy text moves on.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _edge
import numpy as np

from bench import shapes, sparsity
from bench.random_blocks import F16, Q4_0, BlockType, random_blocks
from bench.sparsity import F32
from bench.synth_hf import write_opt_settings
from flashload.arch import FAMILIES, DecoderConfig, Keys
from flashload.format import METADATA, TOKENIZER, TOKENIZER_CONFIG, PackWriter
from flashload.tiles import tile_rows
from flashload.vocab import vocab_from_hf
from quant.formats import WeightFormat

FORMATS = ("q4", "f16")
_F32, _F16 = 0, 1
_BLOCK = 32
#: Of every 16 blocks of coordinates those that hold positions; then every coordinate has variance one.
_PERIOD = 16
_OF_POSITIONS = round(sparsity.PERSISTENT_SHARE * _PERIOD)
#: What one sublayer adds to a coordinate of the residual stream, whose deviation is one.
_SUBLAYER = 0.02
#: The same of the last layer's neurons, after which nothing measures the stream any more.
_LAST_SUBLAYER = 1.0
#: RMS of rounding normal values to blocks of Q4_0, of their deviation.
_Q4_NOISE = 0.087
_ROWS = 1024


def of_positions(hidden: int) -> np.ndarray:
    """bool [hidden]: which coordinates of the residual stream positions fill; tokens fill the others."""
    return np.arange(hidden) // _BLOCK % _PERIOD < _OF_POSITIONS


class _Synth:
    """One pack in the making: its shape, formats and random generators."""

    def __init__(self, shape: shapes.Shape, form: str, seed: int) -> None:
        self.shape = shape
        self.quantised = form == "q4"
        self.neuron = WeightFormat.NEURON_Q4 if self.quantised else WeightFormat.NEURON_F16
        self.generator = np.random.default_rng(seed)
        self.bits = np.random.SFC64(seed)
        self.ours = of_positions(shape.hidden)

    def blocks(self, kind: BlockType, rows: int, cols: int, std: float) -> np.ndarray:
        n_blocks = rows * cols // kind.values
        return random_blocks(kind, n_blocks, std, self.bits).reshape(rows, -1, kind.block_bytes)

    def matrix(self, rows: int, cols: int, std: float) -> Iterator[bytes]:
        kind, code, ggml = (Q4_0, WeightFormat.Q4_0, 2) if self.quantised else (F16, WeightFormat.F16, _F16)
        for first in range(0, rows, _ROWS):
            n = min(_ROWS, rows - first)
            yield tile_rows(ggml, code, self.blocks(kind, n, cols, std).tobytes(), n, cols)

    def embedding(self) -> Iterator[bytes]:
        """[vocab, hidden]: unit deviation, zero where positions are."""
        rows, cols = self.shape.vocab, self.shape.hidden
        kind, code, ggml = (Q4_0, WeightFormat.Q4_0, 2) if self.quantised else (F16, WeightFormat.F16, _F16)
        # Per block its scale, or every value: both are what makes it zero.
        zero = self.ours[:: kind.values]
        for first in range(0, rows, _ROWS):
            n = min(_ROWS, rows - first)
            blocks = self.blocks(kind, n, cols, 1.0)
            blocks[:, zero, :2] = 0
            yield tile_rows(ggml, code, blocks.tobytes(), n, cols)

    def position_rows(self) -> bytes:
        """[context + 2, hidden] f16; OPT's first two rows stand for padding."""
        n = self.shape.context + 2
        rows = np.zeros((n, self.shape.hidden), np.float32)
        rows[:, self.ours] = sparsity.positions(n, int(self.ours.sum()), self.generator)
        return tile_rows(_F32, WeightFormat.F16, rows.tobytes(), n, self.shape.hidden)

    def final_norm(self) -> F32:
        signs: F32 = self.generator.choice(np.array([-1.0, 1.0], np.float32), self.shape.hidden)
        # A deviation of about 2.5 over the vocabulary.
        signs *= np.float32(2.5 / math.sqrt((~self.ours).sum()))
        signs[self.ours] = 0
        return signs

    def columns(self, n: int, std: float) -> np.ndarray:
        """uint8 [n, row bytes] of down columns."""
        kind, ggml = (Q4_0, 2) if self.quantised else (F16, _F16)
        raw = self.blocks(kind, n, self.shape.hidden, std).tobytes()
        return np.asarray(_edge.neuron_rows(ggml, int(self.neuron), raw, n, self.shape.hidden, True))


class _Layer:
    """The feed-forward layer of index ``i``: thresholds and the low-rank part first, rows when asked for."""

    def __init__(self, synth: _Synth, i: int) -> None:
        shape, generator = synth.shape, synth.generator
        self.synth = synth
        self.law = sparsity.fit(sparsity.active_share(i, shape.layers))
        self.adds = _LAST_SUBLAYER if i == shape.layers - 1 else _SUBLAYER
        self.rank = sparsity.rank(i, shape.layers, shape.hidden)
        # Often used neurons first, the order a pack gets from measured use: neighbours are then missing together.
        spread = np.sort(generator.standard_normal(shape.ffn, np.float32))
        self.thresholds: F32 = (self.law.mean + self.law.spread * spread).astype(np.float32)
        #: [hidden, rank], columns of about unit length: a normalised input projects to unit normals.
        self.basis = generator.standard_normal((shape.hidden, self.rank), np.float32) / np.float32(
            math.sqrt(shape.hidden)
        )
        weights = generator.standard_normal((shape.ffn, self.rank), np.float32)
        weights *= math.sqrt(1 - self.law.noise**2) / np.linalg.norm(weights, axis=1, keepdims=True)
        self.weights: F32 = weights
        # Rounding adds noise of its own that the predictor does not see either: of the gates and, where those are
        # rounded as much, of its two matrices.
        seen = 1 - self.law.noise**2
        rounding = _Q4_NOISE**2 * (1 + 2 * seen) if synth.quantised else 0.0
        self.noise = math.sqrt((self.law.noise**2 - rounding) / shape.hidden)

    def gates(self) -> np.ndarray:
        """uint8 [ffn, row bytes]."""
        synth, hidden = self.synth, self.synth.shape.hidden
        out = []
        for first in range(0, synth.shape.ffn, _ROWS):
            low = self.weights[first : first + _ROWS] @ self.basis.T
            low += np.float32(self.noise) * synth.generator.standard_normal(low.shape, np.float32)
            out.append(_edge.neuron_rows(_F32, int(synth.neuron), low.tobytes(), len(low), hidden, False))
        return np.concatenate(out)

    def records(self, gates: np.ndarray) -> Iterator[bytes]:
        """A gate row and a down column each."""
        # An active neuron exceeds its threshold by about 0.4 (RMS).
        std = self.adds / (0.4 * math.sqrt(self.law.active * self.synth.shape.ffn))
        for first in range(0, len(gates), _ROWS):
            rows = gates[first : first + _ROWS]
            yield np.concatenate([rows, self.synth.columns(len(rows), std)], axis=1).tobytes()


def _config(shape: shapes.Shape) -> tuple[DecoderConfig, dict[str, bytes]]:
    """The decoder's configuration, and the tokenizer blobs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_opt_settings(folder, shape)
        keys = Keys("config.json", json.loads((folder / "config.json").read_text()))
        from_hf = FAMILIES["opt"].from_hf
        assert from_hf is not None
        config, vocab = from_hf(keys), vocab_from_hf(folder)
    blobs = {TOKENIZER: vocab.tokenizer_json.encode(), TOKENIZER_CONFIG: json.dumps(vocab.config).encode()}
    return config, blobs


def write_sparse(path: Path, shape: shapes.Shape, form: str, seed: int = 0, dense: bool = False) -> int:
    """Writes the pack; returns its bytes.

    Args:
        path: the pack, replaced when it exists.
        shape: an OPT shape with a hidden size of a multiple of 512.
        form: "q4" (all matrices, as ``--pure`` files of llama.cpp have them) or "f16" (predictors in eight bits).
        seed: of all random values.
        dense: feed-forward layers as matrices of plain noise instead of records and predictors: the same bytes to read
            and the same products, for the speed of the dense model.

    Raises:
        ValueError: another shape or format.
    """
    if shape.arch != "opt" or shape.hidden % (_PERIOD * _BLOCK):
        raise ValueError(f"{shape.name}: expected an OPT shape with a hidden size of a multiple of 512")
    if form not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, found {form!r}")
    synth = _Synth(shape, form, seed)
    config, blobs = _config(shape)
    hidden, ffn = shape.hidden, shape.ffn
    metadata: dict[str, Any] = {
        "config": config.to_json(),
        "source": {"kind": "synthetic", "name": f"{shape.name}-sparse", "files": [], "ignored": []},
        "weights": form,
        "conversions": [],
        "generation": {},
        "synthetic": f"random weights, seed {seed}; text means nothing",
    }
    if not dense:
        metadata["calibrated_to"] = asdict(sparsity.OPT)
        metadata["predictor"] = {
            "rank": [sparsity.rank(i, shape.layers, hidden) for i in range(shape.layers)]
        }
    blobs = {METADATA: json.dumps(metadata).encode(), **blobs}
    code = WeightFormat.Q4_0 if synth.quantised else WeightFormat.F16
    with PackWriter(path) as writer:

        def vector(name: str, values: F32, layer: int = -1) -> None:
            data = np.ascontiguousarray(values, "<f4").tobytes()
            writer.add(name, WeightFormat.F32_VECTOR, 1, values.size, [data], layer)

        def norm(name: str, weight: F32, layer: int = -1) -> None:
            vector(f"{name}.weight", weight, layer)
            vector(f"{name}.bias", np.zeros(hidden, np.float32), layer)

        def small(name: str, values: F32, layer: int) -> None:
            rows, cols = values.shape
            kind = WeightFormat.Q4_0 if synth.quantised else WeightFormat.Q8_0
            tiles = tile_rows(_F32, kind, np.ascontiguousarray(values).tobytes(), rows, cols)
            writer.add(name, kind, rows, cols, [tiles], layer)

        for name, blob in blobs.items():
            writer.add(name, WeightFormat.BYTES, 1, len(blob), [blob])
        writer.add("embed.weight", code, shape.vocab, hidden, synth.embedding())
        writer.add("embed.position", WeightFormat.F16, shape.context + 2, hidden, [synth.position_rows()])
        ones = np.ones(hidden, np.float32)
        for i in range(shape.layers):
            prefix = f"layers.{i}"
            norm(f"{prefix}.attn_norm", ones, i)
            for part in "qkvo":
                # Values keep the scale of the input; averaged over the past they only get smaller.
                std = (_SUBLAYER if part == "o" else 1.0) / math.sqrt(hidden)
                writer.add(
                    f"{prefix}.{part}.weight", code, hidden, hidden, synth.matrix(hidden, hidden, std), i
                )
                vector(f"{prefix}.{part}.bias", np.zeros(hidden, np.float32), i)
            norm(f"{prefix}.ffn_norm", ones, i)
            vector(f"{prefix}.down.bias", np.zeros(hidden, np.float32), i)
            if dense:
                for name, rows, cols in (("up", ffn, hidden), ("down", hidden, ffn)):
                    tiles = synth.matrix(rows, cols, _SUBLAYER / math.sqrt(cols))
                    writer.add(f"{prefix}.{name}.weight", code, rows, cols, tiles, i)
                continue
            layer = _Layer(synth, i)
            gates = layer.gates()
            writer.add(f"{prefix}.neurons.gates", synth.neuron, ffn, hidden, [gates.tobytes()], i)
            records = layer.records(gates)
            writer.add(f"{prefix}.neurons.records", synth.neuron, ffn, hidden, records, i, neuron_parts=2)
            vector(f"{prefix}.up.bias", -layer.thresholds, i)
            small(f"{prefix}.predictor.down.weight", layer.basis.T, i)
            small(f"{prefix}.predictor.up.weight", layer.weights, i)
            vector(f"{prefix}.predictor.bias", np.float32(layer.law.slack) - layer.thresholds, i)
        norm("final_norm", synth.final_norm())
    return path.stat().st_size
