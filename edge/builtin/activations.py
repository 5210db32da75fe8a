"""A trained member of the family at work: its weights, held-out text as tokens, and what its layers are fed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from edge.builtin.held_out import held_out_stories
from edge.builtin.hf import load_hf
from edge.builtin.model import Decoder
from flashload.errors import ArgumentError, ModelFileError


@dataclass(frozen=True)
class Trained:
    """A model in eval mode, its tokenizer, and the id that begins and ends a text."""

    model: Decoder
    tokenizer: Tokenizer
    bos_id: int


def load_trained(folder: Path) -> Trained:
    """Reads a Hugging Face directory that `edge.builtin.train` wrote.

    Raises ArgumentError where there is none, ModelFileError where it cannot be read.
    """
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ArgumentError(f"{folder / name}: expected a trained model, found none; train it first")
    try:
        bos_id = json.loads((folder / "config.json").read_text())["bos_token_id"]
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return Trained(load_hf(folder), tokenizer, bos_id)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelFileError(f"{folder}: expected a model of the family, found {error!r:.200}") from error


def held_out_ids(trained: Trained, text: str) -> list[Tensor]:
    """Of each held-out story its begin token and ids [T], cut at the longest position."""
    encodings = trained.tokenizer.encode_batch(held_out_stories(text), add_special_tokens=False)
    length = trained.model.config.max_position_embeddings
    return [torch.tensor([trained.bos_id, *encoding.ids][:length]) for encoding in encodings]


def ffn_inputs(
    model: Decoder, batches: Iterable[Tensor], *, autocast: bool = False
) -> Iterator[list[Tensor]]:
    """For each batch of tokens [B, T] or [T]: what the feed-forward of each layer is given, [N, D].

    autocast: products in bfloat16, as in training; several times faster where the processor has them.
    """
    inputs: list[Tensor] = []
    hooks = [
        layer.ffn.register_forward_pre_hook(lambda _module, given: inputs.append(given[0].flatten(0, 1)))
        for layer in model.layers
    ]
    try:
        for tokens in batches:
            inputs.clear()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model.hidden(tokens.view(-1, tokens.shape[-1]))
            yield list(inputs)
    finally:
        for hook in hooks:
            hook.remove()
