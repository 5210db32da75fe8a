"""Mistral (Jiang et al. 2310.06825): Llama with a sliding window. Its GGUF files call themselves llama."""

from __future__ import annotations

from flashload.arch._family import HF_LLAMA, Family, every_layer_window, hf_decoder

FAMILY = Family(
    name="mistral",
    hf_architectures=("MistralForCausalLM",),
    hf_model_type="mistral",
    from_hf=lambda keys: hf_decoder(keys, "mistral", windows=every_layer_window(keys, default=4096)),
    hf_names=HF_LLAMA,
)
