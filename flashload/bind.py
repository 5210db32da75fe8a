"""Matches a checkpoint's tensors with what its architecture needs, before a byte of weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flashload.arch import DecoderConfig, Family, Keys, family_of_gguf, family_of_hf
from flashload.errors import ModelFileError, UnsupportedModelError
from flashload.ggml import BLOCK_TYPES
from flashload.pack_layout import MAX_ENTRIES
from flashload.tensors import Checkpoint, TensorInfo
from flashload.tiles import decode_blocks

_MAX_TABLE_BYTES = 1 << 20
_HALVES = {"[0/2]": 0, "[1/2]": 1}


@dataclass(frozen=True)
class Slot:
    """A weight the architecture has a place for.

    Attributes:
        name: canonical name, as in the pack.
        key: its entry in a family's name map.
        required: the checkpoint must have it.
    """

    name: str
    key: str
    rows: int
    cols: int
    is_matrix: bool
    required: bool = True
    layer: int = -1
    expert: int = -1


@dataclass(frozen=True)
class BoundWeight:
    """A slot and the rows of the checkpoint that fill it.

    Attributes:
        first_row: of the slot's rows within the tensor (experts are stacked).
        head_dim, rotary_dim: when not 0, every head's first rotary_dim rows hold pairs side by side and are
            moved to the rotate-half order.
    """

    slot: Slot
    info: TensorInfo
    first_row: int = 0
    head_dim: int = 0
    rotary_dim: int = 0


@dataclass(frozen=True)
class Bound:
    """A checkpoint understood: weights in pack order, and the tensors nothing asks for."""

    family: Family
    config: DecoderConfig
    weights: list[BoundWeight]
    ignored: list[str]


class _GgufTensors:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def shape(self, name: str) -> tuple[int, ...] | None:
        info = self._checkpoint.tensors.get(name)
        return None if info is None else info.shape

    def vector(self, name: str) -> Sequence[float]:
        info = self._checkpoint.tensors[name]
        if info.bytes > _MAX_TABLE_BYTES:
            raise ModelFileError(
                f"{info.file}: {name}: expected at most {_MAX_TABLE_BYTES} bytes, found {info.bytes}"
            )
        data = self._checkpoint.read_rows(name, 0, info.rows)
        return [float(v) for v in decode_blocks(info.ggml_type, data, info.rows * info.cols)]


def _layer_slots(config: DecoderConfig, i: int, sparse: bool) -> Iterator[Slot]:
    hidden, q_dim = config.hidden_size, config.n_heads * config.head_dim
    kv_dim = config.n_kv_heads * config.head_dim

    def matrix(name: str, rows: int, cols: int) -> Iterator[Slot]:
        yield Slot(f"layers.{i}.{name}.weight", f"{name}.weight", rows, cols, True, layer=i)
        yield Slot(f"layers.{i}.{name}.bias", f"{name}.bias", 1, rows, False, required=False, layer=i)

    def norm(name: str, width: int) -> Iterator[Slot]:
        yield Slot(f"layers.{i}.{name}.weight", f"{name}.weight", 1, width, False, layer=i)
        if config.norm == "layer":
            yield Slot(f"layers.{i}.{name}.bias", f"{name}.bias", 1, width, False, layer=i)

    yield from norm("attn_norm", hidden)
    yield from matrix("q", q_dim, hidden)
    yield from matrix("k", kv_dim, hidden)
    yield from matrix("v", kv_dim, hidden)
    yield from matrix("o", hidden, q_dim)
    if config.qk_norm != "none":
        full = config.qk_norm == "full"
        for name, width in (("q_norm", q_dim), ("k_norm", kv_dim)):
            cols = width if full else config.head_dim
            yield Slot(f"layers.{i}.{name}.weight", f"{name}.weight", 1, cols, False, layer=i)
    yield from norm("ffn_norm", hidden)
    if not sparse:
        inner = config.intermediate_size
        if config.gated:
            yield from matrix("gate", inner, hidden)
        yield from matrix("up", inner, hidden)
        yield from matrix("down", hidden, inner)
        return
    inner = config.expert_intermediate_size
    yield Slot(f"layers.{i}.router.weight", "router.weight", config.n_experts, hidden, True, layer=i)
    for e in range(config.n_experts):
        for part, rows, cols in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            name = f"layers.{i}.experts.{e}.{part}.weight"
            yield Slot(name, f"experts.{part}.weight", rows, cols, True, layer=i, expert=e)


def slots_of(config: DecoderConfig, sparse_layers: Sequence[bool]) -> Iterator[Slot]:
    """Every weight of a decoder, in pack order; biases are optional."""
    hidden = config.hidden_size
    yield Slot("embed.weight", "embed.weight", config.vocab_size, hidden, True)
    if config.position_offset >= 0:
        rows = config.max_positions + config.position_offset
        yield Slot("embed.position", "embed.position", rows, hidden, True)
    for i in range(config.n_layers):
        yield from _layer_slots(config, i, sparse_layers[i])
    yield Slot("final_norm.weight", "final_norm.weight", 1, hidden, False)
    if config.norm == "layer":
        yield Slot("final_norm.bias", "final_norm.bias", 1, hidden, False)
    if not config.tied_head:
        yield Slot("head.weight", "head.weight", config.vocab_size, hidden, True)


class _Binder:
    def __init__(self, checkpoint: Checkpoint, family: Family, config: DecoderConfig) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._names = family.hf_names if checkpoint.kind == "hf" else family.gguf_names
        self._interleaved = checkpoint.kind == "gguf" and family.interleaved_gguf
        self.used: set[str] = set()

    def sources(self, key: str, layer: int, expert: int) -> list[tuple[str, int, bool]]:
        """Alternatives for a slot: tensor name, half of the rows (-1 all), whether experts are stacked."""
        out = []
        for template in self._names.get(key, ()):
            half = _HALVES.get(template[-5:], -1)
            name = template[:-5] if half >= 0 else template
            stacked = expert >= 0 and "{e}" not in name
            out.append((name.replace("{i}", str(layer)).replace("{e}", str(expert)), half, stacked))
        return out

    def has(self, key: str, layer: int) -> bool:
        return any(name in self._checkpoint.tensors for name, _, _ in self.sources(key, layer, -1))

    def bind(self, slot: Slot) -> BoundWeight | None:
        sources = self.sources(slot.key, slot.layer, slot.expert)
        if slot.key == "embed.weight" and self._config.tied_head:
            # A tied checkpoint may hold the shared matrix under either name.
            sources += self.sources("head.weight", -1, -1)
        for name, half, stacked in sources:
            info = self._checkpoint.tensors.get(name)
            if info is not None:
                self.used.add(name)
                return self._fit(slot, info, half, stacked)
        if slot.required:
            names = " or ".join(name for name, _, _ in sources) or "a name for it"
            raise ModelFileError(f"{self._checkpoint.path}: {slot.name}: expected tensor {names}, found none")
        return None

    def _fit(self, slot: Slot, info: TensorInfo, half: int, stacked: bool) -> BoundWeight:
        rows = slot.rows * (2 if half >= 0 else 1)
        shape: tuple[int, ...] = (rows, slot.cols) if slot.is_matrix else (slot.cols,)
        if stacked:
            shape = (self._config.n_experts, *shape)
        if info.shape != shape:
            raise ModelFileError(f"{info.file}: {info.name}: expected shape {shape}, found {info.shape}")
        block = BLOCK_TYPES.get(info.ggml_type)
        if block is None or not block.is_weight:
            raise UnsupportedModelError(
                f"{info.file}: {info.name}: expected a weight, found type {info.type_name}"
            )
        scale = info.name.removesuffix("weight") + "scale"
        if scale in self._checkpoint.tensors:
            raise UnsupportedModelError(
                f"{info.file}: {info.name}: expected no separate scale, found {scale}"
            )
        first = (slot.expert * rows if stacked else 0) + max(half, 0) * slot.rows
        kind = slot.key.partition(".")[0]
        rotary = 2 * len(self._config.rope_inv_freq) if self._interleaved and kind in ("q", "k") else 0
        return BoundWeight(slot, info, first, self._config.head_dim if rotary else 0, rotary)


def bind(checkpoint: Checkpoint) -> Bound:
    """Reads the configuration and finds every weight.

    Raises:
        ModelFileError: a value out of range, a missing tensor, or one of another shape.
        UnsupportedModelError: an architecture, type or option edge does not run.
    """
    if checkpoint.kind == "hf":
        keys = Keys(str(checkpoint.path / "config.json"), checkpoint.metadata["config"])
        family = family_of_hf(keys)
        config = family.from_hf(keys)
    else:
        where = str(checkpoint.path)
        architecture = Keys(where, checkpoint.metadata).text("general.architecture")
        keys = Keys(where, checkpoint.metadata, f"{architecture}.")
        family = family_of_gguf(keys, architecture)
        if family.from_gguf is None:
            raise UnsupportedModelError(
                f"{where}: expected a Hugging Face folder for {family.name}, found GGUF"
            )
        config = family.from_gguf(keys, _GgufTensors(checkpoint))
        tokens = checkpoint.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list) and len(tokens) > config.vocab_size:
            raise ModelFileError(
                f"{where}: tokenizer.ggml.tokens: expected at most {config.vocab_size} (the rows of "
                f"token_embd.weight), found {len(tokens)}"
            )
    binder = _Binder(checkpoint, family, config)
    sparse = [config.n_experts > 0 and binder.has("router.weight", i) for i in range(config.n_layers)]
    if checkpoint.kind == "hf" and family.sparse_layers is not None:
        sparse = family.sparse_layers(keys, config.n_layers)
    elif config.n_experts and not config.intermediate_size:
        sparse = [True] * config.n_layers
    weights: list[BoundWeight] = []
    # A few bytes of config can name billions of weights; a pack has a limit, so binding has it too.
    absent: Counter[str] = Counter()
    present: Counter[str] = Counter()
    for index, slot in enumerate(slots_of(config, sparse)):
        if index == MAX_ENTRIES:
            raise UnsupportedModelError(
                f"{checkpoint.path}: expected at most {MAX_ENTRIES} weights, found more"
            )
        required = slot.required or slot.key in family.required
        bound = binder.bind(slot if required == slot.required else _required(slot))
        (absent if bound is None else present)[slot.key] += 1
        if bound is not None:
            weights.append(bound)
    for key, missing in absent.items():
        if present[key]:
            raise ModelFileError(
                f"{checkpoint.path}: {key}: expected it in all layers or in none, found it missing in "
                f"{missing} of {missing + present[key]}"
            )
    ignored = sorted(checkpoint.tensors.keys() - binder.used - {"rope_freqs.weight"})
    return Bound(family, config, weights, ignored)


def _required(slot: Slot) -> Slot:
    return Slot(slot.name, slot.key, slot.rows, slot.cols, slot.is_matrix, True, slot.layer, slot.expert)
