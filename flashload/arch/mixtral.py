"""Mixtral (Jiang et al. 2401.04088): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from flashload.arch._family import (
    GGUF_NAMES,
    HF_LLAMA,
    Family,
    every_layer_window,
    gguf_decoder,
    gguf_experts,
    hf_decoder,
)
from flashload.arch._keys import Keys

_BLOCK = "model.layers.{i}.block_sparse_moe."


def _experts(keys: Keys) -> dict[str, Any]:
    return {
        "n_experts": keys.integer("num_local_experts", high=4096),
        "experts_per_token": keys.integer("num_experts_per_tok", high=4096),
        "expert_intermediate_size": keys.integer("intermediate_size", high=1 << 22),
        "norm_topk_prob": True,
        "intermediate_size": 0,
        "windows": every_layer_window(keys, default=None),
    }


FAMILY = Family(
    name="mixtral",
    hf_architectures=("MixtralForCausalLM",),
    hf_model_type="mixtral",
    from_hf=lambda keys: hf_decoder(keys, "mixtral", default_theta=1e6, default_eps=1e-5, **_experts(keys)),
    hf_names={
        **HF_LLAMA,
        "router.weight": (_BLOCK + "gate.weight", "model.layers.{i}.mlp.gate.weight"),
        "experts.gate.weight": (
            _BLOCK + "experts.{e}.w1.weight",
            "model.layers.{i}.mlp.experts.gate_up_proj[0/2]",
        ),
        "experts.up.weight": (
            _BLOCK + "experts.{e}.w3.weight",
            "model.layers.{i}.mlp.experts.gate_up_proj[1/2]",
        ),
        "experts.down.weight": (_BLOCK + "experts.{e}.w2.weight", "model.layers.{i}.mlp.experts.down_proj"),
    },
    gguf_architectures=("llama",),
    gguf_when=lambda keys: bool(keys.get("expert_count")),
    from_gguf=lambda keys, tensors: gguf_decoder(
        keys, tensors, "mixtral", intermediate_size=0, **gguf_experts(keys, norm_topk_prob=True)
    ),
    gguf_names=GGUF_NAMES,
    interleaved_gguf=True,
)
