"""The tiny models whose logits transformers has written down: family and what differs from tests.tiny's defaults."""

from __future__ import annotations

from typing import Any

#: Small enough that all of them together stay under 2 MB in the repository.
SMALL: dict[str, Any] = {"hidden_size": 32, "vocab_size": 272, "max_position_embeddings": 128}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-llama3": ("llama", {"rope_scaling": _LLAMA3, "rope_theta": 500000.0}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": (
        "qwen2",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16}),
    "olmoe": ("olmoe", {"clip_qkv": 0.5}),
    "opt": ("opt", {}),
}
N_POSITIONS = 64
EXPECTED = "logits.npz"
