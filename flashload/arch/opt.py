"""OPT (Zhang et al. 2205.01068): learned positions, LayerNorm, biases, ReLU. GGUF does not know it."""

from __future__ import annotations

from flashload.arch._config import DecoderConfig
from flashload.arch._family import Family, activation
from flashload.arch._keys import Keys
from flashload.errors import UnsupportedModelError

_TOP = {
    "embed.weight": "embed_tokens.weight",
    "embed.position": "embed_positions.weight",
    "final_norm.weight": "final_layer_norm.weight",
    "final_norm.bias": "final_layer_norm.bias",
}
_LAYER = {
    "attn_norm": "self_attn_layer_norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "up": "fc1",
    "down": "fc2",
}
_PREFIXES = ("model.decoder.", "decoder.")


def _config(keys: Keys) -> DecoderConfig:
    hidden = keys.integer("hidden_size", high=1 << 20)
    for name, default, only in (
        ("do_layer_norm_before", True, True),
        ("_remove_final_layer_norm", False, False),
        ("layer_norm_elementwise_affine", True, True),
    ):
        if keys.flag(name, default=default) is not only:
            raise UnsupportedModelError(f"{keys.where}: {name}: expected {only}, found {not only}")
    if keys.integer("word_embed_proj_dim", default=hidden) != hidden:
        found = keys.get("word_embed_proj_dim")
        raise UnsupportedModelError(f"{keys.where}: word_embed_proj_dim: expected {hidden}, found {found}")
    heads, layers = (
        keys.integer("num_attention_heads", high=4096),
        keys.integer("num_hidden_layers", high=4096),
    )
    head_dim = max(hidden // heads, 1)
    return DecoderConfig(
        family="opt",
        vocab_size=keys.integer("vocab_size", high=1 << 24),
        hidden_size=hidden,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=keys.integer("ffn_dim", high=1 << 22),
        max_positions=keys.integer("max_position_embeddings"),
        norm="layer",
        norm_eps=1e-5,
        activation=activation(keys, "activation_function", default="relu"),
        gated=False,
        rope_inv_freq=(),
        rope_magnitude=1.0,
        position_offset=2,
        windows=(0,) * layers,
        qk_norm="none",
        clip_qkv=0.0,
        n_experts=0,
        experts_per_token=0,
        expert_intermediate_size=0,
        norm_topk_prob=False,
        tied_head=keys.flag("tie_word_embeddings", default=True),
        attention_scale=head_dim**-0.5,
        logit_scale=1.0,
    )


FAMILY = Family(
    name="opt",
    hf_architectures=("OPTForCausalLM",),
    hf_model_type="opt",
    from_hf=_config,
    hf_names={
        "head.weight": ("lm_head.weight",),
        **{ours: tuple(p + theirs for p in _PREFIXES) for ours, theirs in _TOP.items()},
        **{
            f"{ours}.{kind}": tuple(f"{p}layers.{{i}}.{theirs}.{kind}" for p in _PREFIXES)
            for ours, theirs in _LAYER.items()
            for kind in ("weight", "bias")
        },
    },
)
