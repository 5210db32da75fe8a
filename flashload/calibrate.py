"""What a layer costs besides reading its weights: measured on a model so small that its weights cost nothing."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashload.arch import DecoderConfig
from flashload.bind import Slot, slots_of
from flashload.pack_layout import payload_bytes
from flashload.pack_writer import PackWriter
from quant.formats import WeightFormat, encode

_HIDDEN, _INNER, _HEADS, _HEAD_DIM, _VOCAB = 256, 768, 8, 64, 512
_LAYERS = 6
_SHORT, _LONG = 16, 512
_TOKENS = 12
_MAX_ROWS = 128
#: On a machine that is busy with other things, what has not been timed by then is assumed.
_DEADLINE_SECONDS = 1.0


@dataclass(frozen=True)
class LayerCost:
    """Seconds that do not come from reading weights.

    Attributes:
        layer_seconds: one dense layer at one row: thread hand-overs, norms, rounding of activations.
        token_seconds: one pass besides its layers and the vocabulary.
        vocab_seconds: greedy choice, per word of the vocabulary.
        kv_seconds, kv_head_seconds: attention over one value of the KV cache (a key's or a value's, of one KV head
            and position): ``kv_seconds + group * kv_head_seconds`` with ``group`` query heads per KV head.
    """

    layer_seconds: float
    token_seconds: float
    vocab_seconds: float
    kv_seconds: float
    kv_head_seconds: float


#: An ordinary core, for a machine whose temporary folder cannot be written.
ASSUMED_LAYER = LayerCost(40e-6, 60e-6, 1e-9, 4e-11, 2e-11)


def _config(layers: int, kv_heads: int) -> DecoderConfig:
    return DecoderConfig(
        family="llama",
        vocab_size=_VOCAB,
        hidden_size=_HIDDEN,
        n_layers=layers,
        n_heads=_HEADS,
        n_kv_heads=kv_heads,
        head_dim=_HEAD_DIM,
        intermediate_size=_INNER,
        max_positions=2 * _LONG,
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated=True,
        rope_inv_freq=tuple(1e4 ** (-2 * i / _HEAD_DIM) for i in range(_HEAD_DIM // 2)),
        rope_magnitude=1.0,
        position_offset=-1,
        windows=(0,) * layers,
        qk_norm="none",
        clip_qkv=0.0,
        n_experts=0,
        experts_per_token=0,
        expert_intermediate_size=0,
        norm_topk_prob=False,
        tied_head=False,
        attention_scale=_HEAD_DIM**-0.5,
        logit_scale=1.0,
    )


def _slots(config: DecoderConfig) -> list[Slot]:
    return [slot for slot in slots_of(config, [False] * config.n_layers) if slot.required]


def _write(path: Path, config: DecoderConfig) -> None:
    """A pack of random Q4_0 weights."""
    random = np.random.default_rng(0)
    made: dict[tuple[int, int], bytes] = {}
    with PackWriter(path) as writer:
        for slot in _slots(config):
            if not slot.is_matrix:
                data, code = np.ones(slot.cols, "<f4").tobytes(), WeightFormat.F32_VECTOR
            else:
                code = WeightFormat.Q4_0
                shape = (slot.rows, slot.cols)
                if shape not in made:
                    values = random.normal(scale=slot.cols**-0.5, size=shape).astype(np.float32)
                    made[shape] = encode(code, values)
                data = made[shape]
            assert len(data) == payload_bytes(code, slot.rows, slot.cols)
            writer.add(slot.name, code, slot.rows, slot.cols, [data], slot.layer)


class _Timer:
    """An engine on a calibration pack; times of single tokens at a chosen length."""

    def __init__(self, path: Path, config: DecoderConfig, n_entries: int, threads: int) -> None:
        import _edge

        context = _LONG + 4 * _TOKENS
        decoder = config.to_json()
        kv, activations, logits = _edge.fixed_bytes(decoder, context, _MAX_ROWS, threads)
        options: dict[str, Any] = {
            "pack_path": str(path),
            "decoder": decoder,
            "placement": [0] * n_entries,
            "stream_order": [],
            "ring_bytes": 0,
            "demand_bytes": 0,
            "io_engine": "auto",
            "threads": threads,
            "isa": "",
            "context": context,
            "max_rows": _MAX_ROWS,
            "budget_bytes": path.stat().st_size + kv + activations + logits + (1 << 20),
        }
        self._engine = _edge.Engine(options)
        self._sequence = _edge.Sequence(self._engine)
        self._tokens = [(7 * i) % _VOCAB for i in range(context)]

    def token_seconds(self, position: int) -> float:
        """The fastest of a few single tokens behind ``position`` others."""
        sequence = self._sequence
        sequence.set_tokens(self._tokens[:position])
        while sequence.n_pending:
            sequence.advance()
        best = float("inf")
        for i in range(1, _TOKENS + 1):
            sequence.set_tokens(self._tokens[: position + i])
            start = time.perf_counter()
            sequence.advance()
            best = min(best, time.perf_counter() - start)
        return best


def _vocab_seconds() -> float:
    import _edge

    n = 1 << 16
    logits = np.random.default_rng(0).normal(size=n).astype(np.float32)
    sampler = _edge.Sampler({"temperature": 0.0}, n)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        sampler.sample(logits, [1, 2, 3], 3)
        best = min(best, time.perf_counter() - start)
    return best / n


def measure_layers(threads: int) -> tuple[LayerCost, list[str]]:
    """Costs per layer, token and cached value, and notes on what could not be measured; about half a second."""
    try:
        with tempfile.TemporaryDirectory(prefix="edge-probe-") as folder:
            return _measure(Path(folder), threads), []
    except OSError as error:
        return ASSUMED_LAYER, [f"layers could not be timed ({error.strerror}): ordinary figures are assumed"]


def _measure(folder: Path, threads: int) -> LayerCost:
    start = time.perf_counter()
    seconds: dict[tuple[int, int], float] = {}
    per_value = []
    for kv_heads, depths in ((_HEADS, (2, _LAYERS)), (_HEADS // 4, (_LAYERS,))):
        if time.perf_counter() - start > _DEADLINE_SECONDS:
            break
        path = folder / f"{kv_heads}.edge"
        whole = _config(_LAYERS, kv_heads)
        _write(path, whole)
        for layers in depths:
            # The first layers of the same pack are a model too.
            timer = _Timer(path, _config(layers, kv_heads), len(_slots(whole)), threads)
            seconds[layers, kv_heads] = timer.token_seconds(_SHORT)
        longer = timer.token_seconds(_LONG) - seconds[_LAYERS, kv_heads]
        per_value.append(max(0.0, longer) / (_LAYERS * 2 * (_LONG - _SHORT) * kv_heads * _HEAD_DIM))
    shallow, deep = seconds[2, _HEADS], seconds[_LAYERS, _HEADS]
    per_layer = max(0.0, (deep - shallow) / (_LAYERS - 2))
    # Per cached value at 1 and at 4 query heads per KV head.
    by_head = max(0.0, (per_value[1] - per_value[0]) / 3) if len(per_value) > 1 else per_value[0] / 4
    return LayerCost(
        per_layer,
        max(0.0, shallow - 2 * per_layer),
        _vocab_seconds(),
        max(0.0, per_value[0] - by_head),
        by_head,
    )
