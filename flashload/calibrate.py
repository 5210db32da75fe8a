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
#: A layer wide enough for a prompt to leave the first caches, as those of real models do.
_WIDE_LAYERS, _WIDE_HIDDEN, _WIDE_INNER = 2, 1024, 2816
_CHUNKS, _KERNEL_SECONDS = 8, 0.02
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
        value_seconds: the small steps of a prompt's row (norms, rounding, activation, sums), for each of the
            :func:`row_values` that they pass over.
    """

    layer_seconds: float
    token_seconds: float
    vocab_seconds: float
    kv_seconds: float
    kv_head_seconds: float
    value_seconds: float = 0.0


def row_values(hidden: int, q_dim: int, kv_dim: int, inner: float) -> float:
    """Values that the small steps of one layer pass over for one row.

    Two norms and two sums over the hidden state, rounded twice; rotation and rounding of queries, keys and values as
    f16; an activation of gate and up, rounded.
    """
    return 6 * hidden + 2 * q_dim + 3 * kv_dim + 3 * inner


#: An ordinary core, for a machine whose temporary folder cannot be written.
ASSUMED_LAYER = LayerCost(40e-6, 60e-6, 1e-9, 4e-11, 2e-11, 3e-10)


def _config(layers: int, kv_heads: int, hidden: int = _HIDDEN, inner: int = _INNER) -> DecoderConfig:
    return DecoderConfig(
        family="llama",
        vocab_size=_VOCAB,
        hidden_size=hidden,
        n_layers=layers,
        n_heads=_HEADS,
        n_kv_heads=kv_heads,
        head_dim=_HEAD_DIM,
        intermediate_size=inner,
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
                    # The same rows over and over: they take no longer to be made, and as long to be multiplied.
                    n_rows = min(slot.rows, 64)
                    values = random.normal(scale=slot.cols**-0.5, size=(n_rows, slot.cols)).astype(np.float32)
                    made[shape] = encode(code, values) * (slot.rows // n_rows)
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
        # What others take of a core is not counted, where this thread does all the work.
        self._clock = time.thread_time if threads == 1 else time.perf_counter
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
            start = self._clock()
            sequence.advance()
            best = min(best, self._clock() - start)
        return best

    def chunk_seconds(self) -> float:
        """The fastest of a few prompts of ``_MAX_ROWS`` tokens, in one pass each."""
        best = float("inf")
        for i in range(_CHUNKS):
            # Another first token, so that no prefix is known already.
            self._sequence.set_tokens([i, *self._tokens[1:_MAX_ROWS]])
            start = self._clock()
            while self._sequence.n_pending:
                self._sequence.advance()
            best = min(best, self._clock() - start)
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
    kv_seconds = max(0.0, per_value[0] - by_head)
    return LayerCost(
        per_layer,
        max(0.0, shallow - 2 * per_layer),
        _vocab_seconds(),
        kv_seconds,
        by_head,
        _value_seconds(folder / "wide.edge", threads, kv_seconds + by_head),
    )


def _value_seconds(path: Path, threads: int, attention_seconds: float) -> float:
    """What a prompt takes in a layer besides products and attention, per row and value.

    Args:
        attention_seconds: per cached value, one query head per KV head.
    """
    import _edge

    config = _config(_WIDE_LAYERS, _HEADS, _WIDE_HIDDEN, _WIDE_INNER)
    slots = _slots(config)
    _write(path, config)
    chunk = _Timer(path, config, len(slots), threads).chunk_seconds()
    products = 0.0
    for rows, cols in ((slot.rows, slot.cols) for slot in slots if slot.is_matrix and slot.layer == 0):
        isa, code = _edge.default_isa(), int(WeightFormat.Q4_0)
        got = _edge.bench_gemv(isa, code, rows, cols, _MAX_ROWS, 1, threads, _KERNEL_SECONDS)
        products += min(got["gemv_cpu_seconds" if threads == 1 else "gemv_seconds"])
    kv_dim = _HEADS * _HEAD_DIM
    attention = attention_seconds * kv_dim * _MAX_ROWS * (_MAX_ROWS + 1)
    n_values = _MAX_ROWS * row_values(_WIDE_HIDDEN, kv_dim, kv_dim, _WIDE_INNER)
    return max(0.0, chunk / _WIDE_LAYERS - products - attention) / n_values
