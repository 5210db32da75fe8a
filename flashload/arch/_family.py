"""The form a family file fills in, and what most families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flashload.arch import _rope
from flashload.arch._config import DecoderConfig
from flashload.arch._keys import Keys
from flashload.errors import UnsupportedModelError


class Tensors(Protocol):
    """What a family may ask of a GGUF file's tensors."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """[out, in] of a tensor, or None when the file lacks it."""

    def vector(self, name: str) -> Sequence[float]:
        """The values of a small f32 tensor."""


@dataclass(frozen=True)
class Family:
    """One family of models, as data.

    Name maps go from canonical names to the source's, ``{i}`` the layer and ``{e}`` the expert; several
    alternatives are tried in order. A source without ``{e}`` for an expert stacks all experts along its first
    dimension; ``[0/2]`` and ``[1/2]`` after it take the first or second half of each expert's rows.

    Attributes:
        hf_architectures, hf_model_type: how config.json names it.
        gguf_architectures: values of ``general.architecture``.
        gguf_when: whether such a file is of this family.
        from_hf, from_gguf: read the configuration.
        hf_names, gguf_names: canonical name -> alternatives.
        required: optional weights (biases) this family always has.
        interleaved_gguf: its GGUF files hold q and k with rotary pairs (2i, 2i + 1) side by side.
        sparse_layers: which layers are mixtures, where the configuration says so.
    """

    name: str
    hf_architectures: tuple[str, ...]
    hf_model_type: str
    from_hf: Callable[[Keys], DecoderConfig]
    hf_names: Mapping[str, tuple[str, ...]]
    gguf_architectures: tuple[str, ...] = ()
    from_gguf: Callable[[Keys, Tensors], DecoderConfig] | None = None
    gguf_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gguf_when: Callable[[Keys], bool] = lambda keys: True
    required: tuple[str, ...] = ()
    interleaved_gguf: bool = False
    sparse_layers: Callable[[Keys, int], list[bool]] | None = None


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def activation(keys: Keys, *names: str, default: str) -> str:
    """The activation a config names.

    Raises:
        UnsupportedModelError: one the core does not have.
    """
    found = keys.text(*names, default=default)
    if found not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{keys.where}: {names[0]}: expected one of {', '.join(_ACTIVATIONS)}, found {found!r}"
        )
    return _ACTIVATIONS[found]


def hf_decoder(
    keys: Keys, family: str, default_theta: float = 10000.0, default_eps: float = 1e-6, **overrides: Any
) -> DecoderConfig:
    """A Llama-like config.json; ``overrides`` replace what the family does differently."""
    hidden = keys.integer("hidden_size", high=1 << 20)
    heads = keys.integer("num_attention_heads", high=4096)
    layers = keys.integer("num_hidden_layers", high=4096)
    head_dim = keys.integer("head_dim", high=4096, default=max(hidden // heads, 1))
    positions = keys.integer("max_position_embeddings")
    rope = _rope.from_hf(keys, head_dim, positions, default_theta)
    values: dict[str, Any] = {
        "family": family,
        "vocab_size": keys.integer("vocab_size", high=1 << 24),
        "hidden_size": hidden,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": keys.integer("num_key_value_heads", high=4096, default=heads),
        "head_dim": head_dim,
        "intermediate_size": keys.integer("intermediate_size", high=1 << 22),
        "max_positions": positions,
        "norm": "rms",
        "norm_eps": keys.number("rms_norm_eps", low=1e-30, high=1.0, default=default_eps),
        "activation": activation(keys, "hidden_act", default="silu"),
        "gated": True,
        "rope_inv_freq": rope.inv_freq,
        "rope_magnitude": rope.magnitude,
        "position_offset": -1,
        "windows": (0,) * layers,
        "qk_norm": "none",
        "clip_qkv": 0.0,
        "n_experts": 0,
        "experts_per_token": 0,
        "expert_intermediate_size": 0,
        "norm_topk_prob": False,
        "tied_head": keys.flag("tie_word_embeddings", default=False),
        "attention_scale": head_dim**-0.5,
        "logit_scale": 1.0,
    }
    return DecoderConfig(**{**values, **overrides})


def every_layer_window(keys: Keys, default: int | None) -> tuple[int, ...]:
    """``sliding_window`` in every layer (Mistral, Mixtral, Qwen3-MoE); null sees all."""
    absent = "sliding_window" not in keys.values
    window = default if absent else keys.get("sliding_window")
    layers = keys.integer("num_hidden_layers", high=4096)
    return (0 if window is None else keys.integer("sliding_window", default=window),) * layers


def qwen_windows(keys: Keys) -> tuple[int, ...]:
    """Qwen2's and Qwen3's rule: ``layer_types``, or the layers from ``max_window_layers`` on."""
    layers = keys.integer("num_hidden_layers", high=4096)
    used = keys.flag("use_sliding_window", default=False)
    window = every_layer_window(keys, default=4096)[0] if used else 0
    kinds = keys.items("layer_types", str, layers)
    if kinds is None:
        first = keys.integer("max_window_layers", low=0, default=28)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise UnsupportedModelError(
            f"{keys.where}: layer_types: expected full_attention or sliding_attention, found "
            f"{sorted(unknown)}"
        )
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def gguf_decoder(keys: Keys, tensors: Tensors, family: str, **overrides: Any) -> DecoderConfig:
    """Llama-like GGUF metadata; ``overrides`` replace what the family does differently."""
    for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(keys.get(name), list):
            raise UnsupportedModelError(
                f"{keys.where}: {keys.prefix}{name}: expected one value, found one per layer"
            )
    embed = tensors.shape("token_embd.weight")
    if embed is None or len(embed) != 2:
        raise keys.bad("token_embd.weight", "a matrix", embed)
    heads = keys.integer("attention.head_count", high=4096)
    hidden = keys.integer("embedding_length", high=1 << 20)
    head_dim = keys.integer("attention.key_length", high=4096, default=max(hidden // heads, 1))
    if keys.integer("attention.value_length", high=4096, default=head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{keys.where}: {keys.prefix}attention.value_length: expected key_length {head_dim}, found "
            f"{keys.get('attention.value_length')}"
        )
    layers = keys.integer("block_count", high=4096)
    positions = keys.integer("context_length")
    rotary_dim = keys.integer("rope.dimension_count", high=head_dim, default=head_dim)
    if rotary_dim % 2:
        raise keys.bad("rope.dimension_count", "an even number", rotary_dim)
    factors = tensors.vector("rope_freqs.weight") if tensors.shape("rope_freqs.weight") else None
    rope = _rope.from_gguf(keys, rotary_dim, positions, factors)
    values: dict[str, Any] = {
        "family": family,
        "vocab_size": embed[0],
        "hidden_size": hidden,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": keys.integer("attention.head_count_kv", high=4096, default=heads),
        "head_dim": head_dim,
        "intermediate_size": keys.integer("feed_forward_length", low=0, high=1 << 22),
        "max_positions": positions,
        "norm": "rms",
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon", low=1e-30, high=1.0),
        "activation": "silu",
        "gated": True,
        "rope_inv_freq": rope.inv_freq,
        "rope_magnitude": rope.magnitude,
        "position_offset": -1,
        "windows": (keys.integer("attention.sliding_window", low=0, default=0),) * layers,
        "qk_norm": "none",
        "clip_qkv": keys.number("attention.clamp_kqv", low=0, high=1e30, default=0.0),
        "n_experts": 0,
        "experts_per_token": 0,
        "expert_intermediate_size": 0,
        "norm_topk_prob": False,
        "tied_head": tensors.shape("output.weight") is None,
        "attention_scale": keys.number("attention.scale", low=1e-9, high=1e3, default=head_dim**-0.5),
        "logit_scale": 1.0,
    }
    return DecoderConfig(**{**values, **overrides})


def gguf_experts(keys: Keys, norm_topk_prob: bool) -> dict[str, Any]:
    """The mixture's keys of a GGUF file."""
    return {
        "n_experts": keys.integer("expert_count", high=4096),
        "experts_per_token": keys.integer("expert_used_count", high=4096),
        "expert_intermediate_size": keys.integer(
            "expert_feed_forward_length", "feed_forward_length", high=1 << 22
        ),
        "norm_topk_prob": keys.flag("expert_weights_norm", default=norm_topk_prob),
    }


def _names(pairs: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {canonical: tuple(source.split(" | ")) for canonical, source in pairs.items()}


_HF_LAYER = "model.layers.{i}."
_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}

#: Names of Hugging Face's Llama, which most families keep.
HF_LLAMA: dict[str, tuple[str, ...]] = _names(
    {
        "embed.weight": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
        "attn_norm.weight": _HF_LAYER + "input_layernorm.weight",
        "ffn_norm.weight": _HF_LAYER + "post_attention_layernorm.weight",
        **{
            f"{ours}.{kind}": f"{_HF_LAYER}self_attn.{theirs}.{kind}"
            for ours, theirs in _PROJECTIONS.items()
            for kind in ("weight", "bias")
        },
        **{
            f"{ours}.{kind}": f"{_HF_LAYER}mlp.{ours}_proj.{kind}"
            for ours in ("gate", "up", "down")
            for kind in ("weight", "bias")
        },
    }
)

HF_QK_NORM: dict[str, tuple[str, ...]] = _names(
    {f"{x}_norm.weight": f"{_HF_LAYER}self_attn.{x}_norm.weight" for x in ("q", "k")}
)

#: Mixtures that keep their experts under ``mlp``: one tensor per expert, or stacked with gate and up fused.
HF_EXPERTS: dict[str, tuple[str, ...]] = _names(
    {
        "router.weight": _HF_LAYER + "mlp.gate.weight",
        "experts.gate.weight": f"{_HF_LAYER}mlp.experts.{{e}}.gate_proj.weight"
        f" | {_HF_LAYER}mlp.experts.gate_up_proj[0/2]",
        "experts.up.weight": f"{_HF_LAYER}mlp.experts.{{e}}.up_proj.weight"
        f" | {_HF_LAYER}mlp.experts.gate_up_proj[1/2]",
        "experts.down.weight": f"{_HF_LAYER}mlp.experts.{{e}}.down_proj.weight"
        f" | {_HF_LAYER}mlp.experts.down_proj",
    }
)

#: GGUF uses one set of names for all families.
GGUF_NAMES: dict[str, tuple[str, ...]] = _names(
    {
        "embed.weight": "token_embd.weight",
        "final_norm.weight": "output_norm.weight",
        "head.weight": "output.weight",
        "attn_norm.weight": "blk.{i}.attn_norm.weight",
        "ffn_norm.weight": "blk.{i}.ffn_norm.weight",
        "q_norm.weight": "blk.{i}.attn_q_norm.weight",
        "k_norm.weight": "blk.{i}.attn_k_norm.weight",
        "router.weight": "blk.{i}.ffn_gate_inp.weight",
        **{
            f"{ours}.{kind}": f"blk.{{i}}.{theirs}.{kind}"
            for ours, theirs in (
                ("q", "attn_q"),
                ("k", "attn_k"),
                ("v", "attn_v"),
                ("o", "attn_output"),
                ("gate", "ffn_gate"),
                ("up", "ffn_up"),
                ("down", "ffn_down"),
            )
            for kind in ("weight", "bias")
        },
        "experts.gate.weight": "blk.{i}.ffn_gate_exps.weight | blk.{i}.ffn_gate.{e}.weight"
        " | blk.{i}.ffn_gate_up_exps.weight[0/2]",
        "experts.up.weight": "blk.{i}.ffn_up_exps.weight | blk.{i}.ffn_up.{e}.weight"
        " | blk.{i}.ffn_gate_up_exps.weight[1/2]",
        "experts.down.weight": "blk.{i}.ffn_down_exps.weight | blk.{i}.ffn_down.{e}.weight",
    }
)
