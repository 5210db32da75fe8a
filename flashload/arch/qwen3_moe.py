"""Qwen3-MoE (2505.09388): Qwen3 with a mixture of experts in all or some layers."""

from __future__ import annotations

from typing import Any

from flashload.arch._family import (
    GGUF_NAMES,
    HF_EXPERTS,
    HF_LLAMA,
    HF_QK_NORM,
    Family,
    every_layer_window,
    gguf_decoder,
    gguf_experts,
    hf_decoder,
)
from flashload.arch._keys import Keys


def _sparse_layers(keys: Keys, layers: int) -> list[bool]:
    dense = keys.items("mlp_only_layers", int) or []
    step = keys.integer("decoder_sparse_step", default=1)
    return [i not in dense and (i + 1) % step == 0 for i in range(layers)]


def _experts(keys: Keys) -> dict[str, Any]:
    windowed = keys.flag("use_sliding_window", default=False)
    layers = keys.integer("num_hidden_layers", high=4096)
    return {
        "n_experts": keys.integer("num_experts", "num_local_experts", high=4096),
        "experts_per_token": keys.integer("num_experts_per_tok", high=4096),
        "expert_intermediate_size": keys.integer("moe_intermediate_size", high=1 << 22),
        "norm_topk_prob": keys.flag("norm_topk_prob", default=False),
        "windows": every_layer_window(keys, default=4096) if windowed else (0,) * layers,
    }


FAMILY = Family(
    name="qwen3_moe",
    hf_architectures=("Qwen3MoeForCausalLM",),
    hf_model_type="qwen3_moe",
    from_hf=lambda keys: hf_decoder(keys, "qwen3_moe", qk_norm="head", **_experts(keys)),
    hf_names={**HF_LLAMA, **HF_QK_NORM, **HF_EXPERTS},
    gguf_architectures=("qwen3moe",),
    from_gguf=lambda keys, tensors: gguf_decoder(
        keys, tensors, "qwen3_moe", qk_norm="head", **gguf_experts(keys, norm_topk_prob=True)
    ),
    gguf_names=GGUF_NAMES,
    sparse_layers=_sparse_layers,
)
