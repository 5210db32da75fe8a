"""Qwen2 and Qwen2.5 (2407.10671): Llama with biases on q, k, v and windows in the upper layers."""

from __future__ import annotations

from flashload.arch._family import GGUF_NAMES, HF_LLAMA, Family, gguf_decoder, hf_decoder, qwen_windows

FAMILY = Family(
    name="qwen2",
    hf_architectures=("Qwen2ForCausalLM",),
    hf_model_type="qwen2",
    from_hf=lambda keys: hf_decoder(keys, "qwen2", windows=qwen_windows(keys)),
    hf_names=HF_LLAMA,
    gguf_architectures=("qwen2",),
    from_gguf=lambda keys, tensors: gguf_decoder(keys, tensors, "qwen2"),
    gguf_names=GGUF_NAMES,
    required=("q.bias", "k.bias", "v.bias"),
)
