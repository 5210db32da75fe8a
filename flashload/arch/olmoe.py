"""OLMoE (Muennighoff et al. 2409.02060): 64 experts, q and k normalised over their full width."""

from __future__ import annotations

from typing import Any

from flashload.arch._family import (
    GGUF_NAMES,
    HF_EXPERTS,
    HF_LLAMA,
    HF_QK_NORM,
    Family,
    gguf_decoder,
    gguf_experts,
    hf_decoder,
)
from flashload.arch._keys import Keys


def _experts(keys: Keys) -> dict[str, Any]:
    return {
        "n_experts": keys.integer("num_experts", high=4096),
        "experts_per_token": keys.integer("num_experts_per_tok", high=4096),
        "expert_intermediate_size": keys.integer("intermediate_size", high=1 << 22),
        "norm_topk_prob": keys.flag("norm_topk_prob", default=False),
        "clip_qkv": keys.number("clip_qkv", low=0, high=1e30, default=0.0),
        "intermediate_size": 0,
    }


FAMILY = Family(
    name="olmoe",
    hf_architectures=("OlmoeForCausalLM",),
    hf_model_type="olmoe",
    from_hf=lambda keys: hf_decoder(keys, "olmoe", default_eps=1e-5, qk_norm="full", **_experts(keys)),
    hf_names={**HF_LLAMA, **HF_QK_NORM, **HF_EXPERTS},
    gguf_architectures=("olmoe",),
    from_gguf=lambda keys, tensors: gguf_decoder(
        keys,
        tensors,
        "olmoe",
        qk_norm="full",
        intermediate_size=0,
        **gguf_experts(keys, norm_topk_prob=False),
    ),
    gguf_names=GGUF_NAMES,
)
