"""What a decoder is, in numbers and flags: the one thing the core knows about a family."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from flashload.arch._keys import Keys
from flashload.errors import ModelFileError

NORMS = ("rms", "layer")
ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh")
QK_NORMS = ("none", "head", "full")

# Limits of the core (cpp/model/decoder_config.cc).
_RANGES = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 20),
    "n_layers": (1, 4096),
    "n_heads": (1, 4096),
    "n_kv_heads": (1, 4096),
    "head_dim": (1, 4096),
    "intermediate_size": (0, 1 << 22),
    "max_positions": (1, 1 << 40),
    "position_offset": (-1, 1024),
    "n_experts": (0, 4096),
    "experts_per_token": (0, 4096),
    "expert_intermediate_size": (0, 1 << 22),
}
_NUMBERS = {
    "norm_eps": (1e-30, 1.0),
    "rope_magnitude": (1e-3, 1e3),
    "clip_qkv": (0.0, 1e30),
    "attention_scale": (1e-9, 1e3),
    "logit_scale": (1e-9, 1e9),
}
_CHOICES = {"norm": NORMS, "activation": ACTIVATIONS, "qk_norm": QK_NORMS}


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    Attributes:
        head_dim: width of one head; q is n_heads * head_dim wide.
        intermediate_size: width of a dense FFN; 0 in a mixture without dense layers.
        gated: down(act(gate(x)) * up(x)), else down(act(up(x))).
        rope_inv_freq: angle per position of each rotated pair, [rotary_dim / 2], every scaling folded in;
            empty for a model without rotation. Pair i is (i, i + rotary_dim / 2).
        rope_magnitude: factor on cos and sin (YaRN's attention factor).
        position_offset: first row of the learned positions, -1 when there are none.
        windows: keys a position sees in each layer, its own included; 0 sees all.
        qk_norm: RMS norm of q and k over each head, over the full width, or none.
        clip_qkv: q, k and v are clamped to +-clip_qkv; 0 is off.
        norm_topk_prob: the chosen experts' weights are scaled to add up to 1.
        attention_scale: factor on q.k, usually head_dim ** -0.5.
    """

    family: str
    vocab_size: int
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm: str
    norm_eps: float
    activation: str
    gated: bool
    rope_inv_freq: tuple[float, ...]
    rope_magnitude: float
    position_offset: int
    windows: tuple[int, ...]
    qk_norm: str
    clip_qkv: float
    n_experts: int
    experts_per_token: int
    expert_intermediate_size: int
    norm_topk_prob: bool
    tied_head: bool
    attention_scale: float
    logit_scale: float

    def __post_init__(self) -> None:
        """Proves every value and every relation between them; raises ModelFileError."""
        keys = Keys(f"{self.family} config", dataclasses.asdict(self))
        keys.text("family")
        for name, (low, high) in _RANGES.items():
            keys.integer(name, low=low, high=high)
        for name, (least, most) in _NUMBERS.items():
            keys.number(name, low=least, high=most)
        for name in ("gated", "norm_topk_prob", "tied_head"):
            keys.flag(name)
        for name, known in _CHOICES.items():
            if keys.text(name) not in known:
                raise keys.bad(name, f"one of {', '.join(known)}", getattr(self, name))
        if self.n_heads % self.n_kv_heads:
            raise keys.bad("n_kv_heads", f"a divisor of n_heads {self.n_heads}", self.n_kv_heads)
        if len(self.rope_inv_freq) > self.head_dim // 2:
            raise keys.bad("rope_inv_freq", f"at most {self.head_dim // 2} values", len(self.rope_inv_freq))
        if not all(isinstance(f, float) and math.isfinite(f) and f >= 0 for f in self.rope_inv_freq):
            raise keys.bad("rope_inv_freq", "finite numbers of 0 or more", self.rope_inv_freq)
        if len(self.windows) != self.n_layers:
            raise keys.bad("windows", f"{self.n_layers} values", len(self.windows))
        if not all(type(w) is int and 0 <= w <= 1 << 40 for w in self.windows):
            raise keys.bad("windows", "integers of 0 or more", self.windows)
        if self.n_experts:
            if not 1 <= self.experts_per_token <= self.n_experts:
                raise keys.bad("experts_per_token", f"1..{self.n_experts}", self.experts_per_token)
            keys.integer("expert_intermediate_size", low=1, high=1 << 22)
        else:
            keys.integer("intermediate_size", low=1, high=1 << 22)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every key."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, value: object) -> DecoderConfig:
        """The inverse of :meth:`to_json`, for untrusted input.

        Raises:
            ModelFileError: not an object, missing or unknown keys, or a value out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(value, dict) or set(value) != names:
            found = sorted(set(value) ^ names) if isinstance(value, dict) else type(value).__name__
            raise ModelFileError(f"decoder config: expected an object of {len(names)} keys, wrong: {found}")
        keys = Keys("decoder config", value)
        fields = dict(value)
        for name in ("norm_eps", "rope_magnitude", "clip_qkv", "attention_scale", "logit_scale"):
            fields[name] = keys.number(name, low=-1e300, high=1e300)
        fields["rope_inv_freq"] = tuple(keys.numbers("rope_inv_freq"))
        fields["windows"] = tuple(keys.items("windows", int) or ())
        return cls(**fields)
