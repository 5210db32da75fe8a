"""Qwen3 (2505.09388): RMS norm on q and k of each head, no biases."""

from __future__ import annotations

from flashload.arch._family import (
    GGUF_NAMES,
    HF_LLAMA,
    HF_QK_NORM,
    Family,
    gguf_decoder,
    hf_decoder,
    qwen_windows,
)

FAMILY = Family(
    name="qwen3",
    hf_architectures=("Qwen3ForCausalLM",),
    hf_model_type="qwen3",
    from_hf=lambda keys: hf_decoder(
        keys,
        "qwen3",
        windows=qwen_windows(keys),
        qk_norm="head",
    ),
    hf_names={**HF_LLAMA, **HF_QK_NORM},
    gguf_architectures=("qwen3",),
    from_gguf=lambda keys, tensors: gguf_decoder(keys, tensors, "qwen3", qk_norm="head"),
    gguf_names=GGUF_NAMES,
)
