"""Llama 1, 2, 3 and Code Llama (Touvron et al. 2302.13971; Grattafiori et al. 2407.21783)."""

from __future__ import annotations

from flashload.arch._family import GGUF_NAMES, HF_LLAMA, Family, gguf_decoder, hf_decoder

FAMILY = Family(
    name="llama",
    hf_architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    hf_model_type="llama",
    from_hf=lambda keys: hf_decoder(keys, "llama"),
    hf_names=HF_LLAMA,
    gguf_architectures=("llama",),
    gguf_when=lambda keys: not keys.get("expert_count"),
    from_gguf=lambda keys, tensors: gguf_decoder(keys, tensors, "llama"),
    gguf_names=GGUF_NAMES,
    interleaved_gguf=True,
)
