"""A decoder in plain NumPy, float64: the definition the engine is held against. Shares no code with the core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def layer_norm(x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    out = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps) * weight
    return out if bias is None else out + bias


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _erf(x: Array) -> Array:
    from math import erf

    return np.vectorize(erf)(x)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def rotate(x: Array, positions: Array, inv_freq: Array, magnitude: float) -> Array:
    """x [n, heads, head_dim], rotate-half over the first 2 * len(inv_freq) values."""
    half = len(inv_freq)
    if half == 0:
        return x
    angle = positions[:, None] * inv_freq[None, :]
    cos, sin = (np.cos(angle) * magnitude)[:, None, :], (np.sin(angle) * magnitude)[:, None, :]
    out = x.copy()
    out[..., :half] = x[..., :half] * cos - x[..., half : 2 * half] * sin
    out[..., half : 2 * half] = x[..., half : 2 * half] * cos + x[..., :half] * sin
    return out


#: Positions of a block: in 4 bits a row sees the keys and values of its own block unrounded.
TAIL = 64


def hadamard(x: Array) -> Array:
    """The last axis, rotated by blocks of the largest power of two that divides it."""
    n = x.shape[-1] & -x.shape[-1]
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return (x.reshape(*x.shape[:-1], -1, n) @ h / np.sqrt(n)).reshape(x.shape)


def round_kv(x: Array, kv_type: str) -> Array:
    """Rows along the last axis, each with an f16 scale of its own."""
    largest = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)
    scale = np.float64(np.float16(np.abs(largest) / 127 if kv_type == "int8" else largest / -8))
    low, high = (-127, 127) if kv_type == "int8" else (-8, 7)
    steps = np.divide(x, scale, out=np.zeros_like(x), where=scale != 0)
    return np.clip(np.rint(steps), low, high) * scale


def round_query(x: Array) -> Array:
    """8 bits, one scale for a head."""
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale != 0)) * scale


class Oracle:
    """weights: canonical name -> float array; config: DecoderConfig as a dict.

    With ``predict`` the low-rank predictors decide which neurons of a ReLU layer count; the others are zero. With
    ``thresholds`` [layers, neurons] those count whose activation is larger, whatever its sign. ``kv_type`` rounds keys
    and values as the core's cache does.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, Array],
        predict: bool = False,
        thresholds: Array | None = None,
        kv_type: str = "f16",
    ) -> None:
        self.c = config
        self.kv_type = kv_type
        self.predict = predict
        self.thresholds = thresholds
        self.w = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}

    def norm(self, x: Array, name: str) -> Array:
        weight, bias = self.w[f"{name}.weight"].reshape(-1), self.w.get(f"{name}.bias")
        if self.c["norm"] == "rms":
            return rms_norm(x, weight, self.c["norm_eps"])
        return layer_norm(x, weight, None if bias is None else bias.reshape(-1), self.c["norm_eps"])

    def linear(self, x: Array, name: str) -> Array:
        y = x @ self.w[f"{name}.weight"].T
        bias = self.w.get(f"{name}.bias")
        return y if bias is None else y + bias.reshape(-1)

    def attention(self, x: Array, layer: int) -> Array:
        c, n, prefix = self.c, len(x), f"layers.{layer}."
        q, k, v = (self.linear(x, prefix + name) for name in "qkv")
        if c["qk_norm"] == "full":
            q = rms_norm(q, self.w[prefix + "q_norm.weight"].reshape(-1), c["norm_eps"])
            k = rms_norm(k, self.w[prefix + "k_norm.weight"].reshape(-1), c["norm_eps"])
        if c["clip_qkv"]:
            q, k, v = (np.clip(t, -c["clip_qkv"], c["clip_qkv"]) for t in (q, k, v))
        q, k, v = (t.reshape(n, -1, c["head_dim"]) for t in (q, k, v))
        if c["qk_norm"] == "head":
            q = rms_norm(q, self.w[prefix + "q_norm.weight"].reshape(-1), c["norm_eps"])
            k = rms_norm(k, self.w[prefix + "k_norm.weight"].reshape(-1), c["norm_eps"])
        positions, inv_freq = np.arange(n, dtype=np.float64), np.array(c["rope_inv_freq"])
        q, k = (rotate(t, positions, inv_freq, c["rope_magnitude"]) for t in (q, k))
        if self.kv_type == "int4":
            q, k, v = (hadamard(t) for t in (q, k, v))
        group = c["n_heads"] // c["n_kv_heads"]
        exact_k, exact_v = (np.repeat(t, group, axis=1) for t in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, exact_k) * c["attention_scale"]
        rounded = np.zeros((n, n), dtype=bool)
        if self.kv_type == "f16":
            k, v = exact_k, exact_v
        else:
            k, v = (np.repeat(round_kv(t, self.kv_type), group, axis=1) for t in (k, v))
            rounded[:] = True
            if self.kv_type == "int4":
                rounded = positions[None, :] // TAIL < positions[:, None] // TAIL
            coarse = np.einsum("qhd,khd->hqk", round_query(q), k) * c["attention_scale"]
            scores = np.where(rounded, coarse, scores)
        ahead = positions[None, :] > positions[:, None]
        if c["windows"][layer]:
            ahead |= positions[None, :] <= positions[:, None] - c["windows"][layer]
        scores[:, ahead] = -np.inf
        p = softmax(scores)
        out = np.einsum("hqk,khd->qhd", p * rounded, v) + np.einsum("hqk,khd->qhd", p * ~rounded, exact_v)
        if self.kv_type == "int4":
            out = hadamard(out)
        return self.linear(out.reshape(n, -1), prefix + "o")

    def ffn(self, x: Array, prefix: str) -> Array:
        act = ACTIVATIONS[self.c["activation"]]
        up = self.linear(x, prefix + "up")
        opened = act(self.linear(x, prefix + "gate") if self.c["gated"] else up)
        if self.thresholds is not None:
            opened = np.where(np.abs(opened) > self.thresholds[int(prefix.split(".")[1])], opened, 0.0)
        inner = opened * up if self.c["gated"] else opened
        if self.predict and prefix + "predictor.up.weight" in self.w:
            low = x @ self.w[prefix + "predictor.down.weight"].T
            score = low @ self.w[prefix + "predictor.up.weight"].T + self.w[
                prefix + "predictor.bias"
            ].reshape(-1)
            inner = np.where(score > 0, inner, 0.0)
        return self.linear(inner, prefix + "down")

    def mixture(self, x: Array, prefix: str) -> Array:
        probability = softmax(self.linear(x, prefix + "router"))
        out = np.zeros_like(x)
        for row in range(len(x)):
            top = np.argsort(-probability[row], kind="stable")[: self.c["experts_per_token"]]
            weight = probability[row, top]
            if self.c["norm_topk_prob"]:
                weight = weight / weight.sum()
            for e, w in zip(top, weight, strict=True):
                out[row] += w * self.ffn(x[row : row + 1], f"{prefix}experts.{e}.")[0]
        return out

    def logits(self, tokens: Sequence[int]) -> Array:
        """[n, vocab_size] for a whole text."""
        x = self.w["embed.weight"][list(tokens)]
        if self.c["position_offset"] >= 0:
            x = x + self.w["embed.position"][np.arange(len(tokens)) + self.c["position_offset"]]
        for layer in range(self.c["n_layers"]):
            prefix = f"layers.{layer}."
            x = x + self.attention(self.norm(x, prefix + "attn_norm"), layer)
            h = self.norm(x, prefix + "ffn_norm")
            x = x + (self.mixture(h, prefix) if prefix + "router.weight" in self.w else self.ffn(h, prefix))
        head = self.w["embed.weight" if self.c["tied_head"] else "head.weight"]
        return (self.norm(x, "final_norm") @ head.T) * self.c["logit_scale"]
