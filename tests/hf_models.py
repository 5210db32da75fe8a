"""Tiny random models of every family made and saved by transformers: the oracle of names, shapes and logits.

Needs torch and transformers; callers skip without them (``pytest.importorskip("transformers")``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny import FAMILIES, hf_config, tokenizer_json

__all__ = ["FAMILIES", "make"]


def _scramble(model: Any, seed: int) -> None:
    """Norms away from 1 and biases away from 0, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def make(path: Path, family: str, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Any:
    """Saves a tiny model of ``family`` at ``path`` with a tokenizer; returns it in evaluation mode, in f32.

    ``overrides`` go into the configuration (``rope_scaling``, ``sliding_window``, ``head_dim`` ...). With
    ``dtype`` "float16" or "bfloat16" the saved weights are rounded, and so are those of the returned model.
    """
    values = {
        k: v for k, v in hf_config(family, **overrides).items() if k not in ("model_type", "torch_dtype")
    }
    architecture = values.pop("architectures")[0]
    config = transformers.AutoConfig.for_model(family, **values)
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config)
    _scramble(model, seed)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text(tokenizer_json(config.vocab_size))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    )
    return model.to(torch.float32).eval()
