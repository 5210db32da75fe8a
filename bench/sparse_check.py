"""Measures who fires and who is predicted in an OPT pack by neuron, beside the figures published for OPT-6.7B.

The model runs in NumPy, one layer in memory at a time, over one text: which shares come out does not depend on the
engine. Attention, norms and records are those of the pack; products are f32.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _edge
import numpy as np

from bench import report, sparsity
from bench.sparsity import F32
from flashload.format import PackFile
from quant.formats import TILE_FORMATS
from quant.formats.neuron import decode_column, decode_dot, row_bytes

_ROWS = 1024


class _Text:
    """The forward pass of one text through a pack."""

    def __init__(self, pack: PackFile, tokens: list[int]) -> None:
        self.pack = pack
        self.config = pack.config
        embedding, positions = self.matrix("embed.weight"), self.matrix("embed.position")
        self.x: F32 = embedding[tokens] + positions[np.arange(len(tokens)) + self.config.position_offset]

    def matrix(self, name: str) -> F32:
        """[rows, cols] f32."""
        entry = self.pack.entries[name]
        data = self.pack.read(name)
        if entry.format not in TILE_FORMATS:
            return np.frombuffer(data, "<f4")[None, :]
        return np.asarray(_edge.untile_rows(int(entry.format), data, entry.rows, entry.cols))

    def vector(self, name: str) -> F32:
        return self.matrix(name)[0] if name in self.pack.entries else np.zeros(1, np.float32)

    def linear(self, x: F32, name: str) -> F32:
        out: F32 = x @ self.matrix(f"{name}.weight").T + self.vector(f"{name}.bias")
        return out

    def norm(self, name: str) -> F32:
        centred = self.x - self.x.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(self.config.norm_eps))
        out: F32 = centred / scale * self.vector(f"{name}.weight") + self.vector(f"{name}.bias")
        return out

    def attention(self, i: int) -> None:
        n, prefix = len(self.x), f"layers.{i}"
        h = self.norm(f"{prefix}.attn_norm")
        q, k, v = (
            self.linear(h, f"{prefix}.{part}").reshape(n, -1, self.config.head_dim).swapaxes(0, 1)
            for part in "qkv"
        )
        scores = q @ k.swapaxes(1, 2) * np.float32(self.config.attention_scale)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = (scores / scores.sum(axis=-1, keepdims=True) @ v).swapaxes(0, 1).reshape(n, -1)
        self.x = self.x + self.linear(np.ascontiguousarray(out), f"{prefix}.o")

    def neurons(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Runs the feed-forward layer; who fires and who is predicted, bool [tokens, neurons]."""
        prefix = f"layers.{i}"
        h = self.norm(f"{prefix}.ffn_norm")
        low = h @ self.matrix(f"{prefix}.predictor.down.weight").T
        called = low @ self.matrix(f"{prefix}.predictor.up.weight").T + self.vector(
            f"{prefix}.predictor.bias"
        )
        entry = self.pack.entries[f"{prefix}.neurons.records"]
        hidden, size = self.config.hidden_size, row_bytes(entry.format, entry.cols)
        data = np.frombuffer(self.pack.read(entry.name), np.uint8).reshape(entry.rows, 2, size)
        bias = self.vector(f"{prefix}.up.bias")

        def part(first: int) -> tuple[F32, F32]:
            rows = data[first : first + _ROWS]
            up = decode_dot(entry.format, np.ascontiguousarray(rows[:, 0]), hidden)
            value = np.maximum(h @ up.T + bias[first : first + _ROWS], np.float32(0))
            return value, value @ decode_column(entry.format, np.ascontiguousarray(rows[:, 1]), hidden)

        with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
            parts = list(pool.map(part, range(0, entry.rows, _ROWS)))
        self.x = self.x + sum(out for _, out in parts) + self.vector(f"{prefix}.down.bias")
        return np.concatenate([value for value, _ in parts], axis=1) > 0, called > 0


def check(path: Path, n_tokens: int = 192, seed: int = 1) -> dict[str, Any]:
    """Statistics of each layer over a text of random tokens, and their means.

    Returns:
        {"tokens", "layers": [one dict of ``sparsity.Measured`` each], "mean"}.

    Raises:
        ValueError: a pack without records and predictors, or with gates.
    """
    with PackFile(path) as pack:
        config = pack.config
        if config.gated or config.position_offset < 0 or "layers.0.predictor.bias" not in pack.entries:
            raise ValueError(f"{path}: expected an OPT pack by neuron with predictors")
        n_tokens = min(n_tokens, config.max_positions)
        tokens = np.random.default_rng(seed).integers(3, config.vocab_size, n_tokens)
        text = _Text(pack, [int(t) for t in tokens])
        layers = []
        for i in range(config.n_layers):
            text.attention(i)
            layers.append(asdict(sparsity.measure(*text.neurons(i))))
    mean = {key: float(np.mean([layer[key] for layer in layers])) for key in layers[0]}
    return {"tokens": n_tokens, "layers": layers, "mean": mean}


def show(path: Path, found: dict[str, Any], published: sparsity.Published = sparsity.OPT) -> None:
    """Prints the published figures and the measured ones: the mean, the first, the middle and the last layer."""
    layers = found["layers"]
    calls = published.active * (1 - published.missed) + (1 - published.active) * published.false_alarms
    rows = [
        ("active, % of neurons", "active", published.active),
        ("predicted, %", "predicted", calls),
        ("missed, % of active", "missed", published.missed),
        ("false alarms, % of inactive", "false_alarms", published.false_alarms),
        (f"predicted in {published.window_tokens} tokens, %", "window", published.window),
        ("... and new in the next, %", "fresh", published.fresh),
        (f"activations of the hottest {published.hot:.0%}, %", "hot_activations", published.hot_activations),
        ("... chosen on the other half, %", "hot_activations_held_out", math.nan),
    ]
    middle = (len(layers) - 1) // 2
    cells = []
    for label, key, value in rows:
        text = "-" if math.isnan(value) else f"{100 * value:.1f}"
        measured = [found["mean"][key], *(layers[i][key] for i in (0, middle, -1))]
        cells.append((label, text, *(f"{100 * m:.1f}" for m in measured)))
    columns = ("", "published", "measured", "layer 1", f"layer {middle + 1}", f"layer {len(layers)}")
    notes = [
        f"active by layer, published: {100 * published.active_first:.1f} (1), {100 * published.active_middle:.1f} "
        f"(16), {100 * published.active_last:.1f} (32)",
        f"published: {published.source}",
    ]
    report.print_table(f"{path.name}: {found['tokens']} random tokens", columns, cells, notes)
