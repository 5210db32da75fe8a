"""Hugging Face directories of the built-in family: written as transformers reads them, and read back."""

# mypy: no-warn-return-any
from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edge.builtin.model import Decoder, ModelConfig

_STACKED = ("w1", "w2", "w3")  # of SparseMoe; one tensor per expert in the file


def _file_name(name: str) -> list[str] | str:
    """The name in the file of a parameter, or a prefix and a suffix around the expert's number."""
    last = name.rpartition(".")[2]
    return [f"model.{name[: -len(last)]}experts.", f".{last}.weight"] if last in _STACKED else f"model.{name}"


def save_hf(model: Decoder, folder: Path, bos_id: int, dtype: torch.dtype = torch.float32) -> None:
    """Writes config.json, generation_config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    moe = bool(model.config.num_local_experts)
    dims = asdict(model.config)
    if not moe:
        del dims["num_local_experts"], dims["num_experts_per_tok"]
    config: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM" if moe else "LlamaForCausalLM"],
        "model_type": "mixtral" if moe else "llama",
        **dims,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "rope_scaling": None,
        "bos_token_id": bos_id,
        "eos_token_id": bos_id,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    generation = {"bos_token_id": bos_id, "eos_token_id": bos_id, "do_sample": True, "temperature": 0.8}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        stored, value = _file_name(name), p.detach().cpu().to(dtype).contiguous()
        if isinstance(stored, str):
            weights[stored] = value
        else:
            weights.update({f"{stored[0]}{e}{stored[1]}": part.clone() for e, part in enumerate(value)})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load_hf(folder: Path) -> Decoder:
    """Reads a Llama or Mixtral directory with tied embeddings in one safetensors file; float32, in eval mode."""
    raw = json.loads((folder / "config.json").read_text())
    raw.setdefault("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    model = Decoder(
        ModelConfig(**{name: raw[name] for name in ModelConfig.__dataclass_fields__ if name in raw})
    )
    stored = {name: w.float() for name, w in load_file(folder / "model.safetensors").items()}
    head = stored.get("lm_head.weight")
    if head is not None:
        stored.setdefault("model.embed_tokens.weight", head)  # tied: some writers keep only the head
    weights: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        at = _file_name(name)
        if isinstance(at, str):
            weights[name] = stored[at]
        else:
            weights[name] = torch.stack([stored[f"{at[0]}{e}{at[1]}"] for e in range(p.shape[0])])
    model.load_state_dict(weights)
    return model.eval()
