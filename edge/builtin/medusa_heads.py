"""Medusa heads of a built-in model: their formula, their file, and the states they are trained and judged on.

Shapes: N states, D hidden, K heads, V vocabulary.
"""

# mypy: allow-subclassing-any, allow-untyped-decorators, no-warn-return-any
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from edge.builtin.model import Decoder
from edge.builtin.own_text import BOS_ID
from edge.builtin.tokens import Ids
from flashload.errors import ArgumentError, ModelFileError

MEDUSA_FILE = "edge_medusa.safetensors"
NO_TARGET = -100  # past the end of a text; F.cross_entropy ignores it
_ROWS = 16  # texts whose states are computed at once
_CHUNK = 4096  # states scored at once


class MedusaHeads(nn.Module):
    """States [..., D] -> states [..., K, D], read by the model's own output matrix; K heads."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, size, size))
        self.bias = nn.Parameter(torch.zeros(heads, size))

    def forward(self, h: Tensor) -> Tensor:
        moved = torch.einsum("...d,ked->...ke", h, self.weight) + self.bias
        return h.unsqueeze(-2) + F.silu(moved)

    def tensors(self) -> dict[str, Tensor]:
        """As stored: `medusa.{k}.weight` [D, D] and `medusa.{k}.bias` [D]."""
        stored: dict[str, Tensor] = {}
        for k in range(len(self.weight)):
            stored[f"medusa.{k}.weight"] = self.weight[k].detach().cpu().clone()
            stored[f"medusa.{k}.bias"] = self.bias[k].detach().cpu().clone()
        return stored


def load_medusa(hf: Path, hidden_size: int) -> MedusaHeads:
    """The heads beside a model; ArgumentError when there are none, ModelFileError when they are of another shape."""
    path = hf / MEDUSA_FILE
    if not path.exists():
        raise ArgumentError(
            f"{path}: expected Medusa heads, found none; train them with python -m edge.builtin.medusa"
        )
    try:
        stored = load_file(path)
    except safetensors.SafetensorError as error:
        raise ModelFileError(
            f"{path}: expected a safetensors file, found a damaged one ({error}); delete it"
        ) from error
    count, d = len(stored) // 2, hidden_size
    wanted = {f"medusa.{k}.weight": (d, d) for k in range(count)} | {
        f"medusa.{k}.bias": (d,) for k in range(count)
    }
    found = {name: tuple(value.shape) for name, value in stored.items()}
    if not count or found != wanted:
        raise ModelFileError(f"{path}: expected medusa.k.weight [{d}, {d}] and medusa.k.bias, found {found}")
    heads = MedusaHeads(count, d)
    with torch.no_grad():
        heads.weight.copy_(torch.stack([stored[f"medusa.{k}.weight"].float() for k in range(count)]))
        heads.bias.copy_(torch.stack([stored[f"medusa.{k}.bias"].float() for k in range(count)]))
    return heads.eval()


@dataclass
class States:
    """Final-normed states [N, D] (half precision) and the heads' targets [N, K]; -100 past the end of a text."""

    states: Tensor
    targets: Tensor


@torch.no_grad()
def read_states(
    model: Decoder, rows: Sequence[Ids], heads: int, show: Callable[[int], None] = lambda _: None
) -> States:
    """States of all positions of the rows (ids with begin and end token) that at least head 0 has a target for.

    The state of position i sees tokens 0..i; the model's head predicts token i + 1, Medusa head k (from 0) token
    i + 2 + k. Rows are cut at the model's positions. `show` is told the tokens of every batch.
    """
    limit = model.config.max_position_embeddings
    device = model.embed_tokens.weight.device
    ordered = sorted((row[:limit] for row in rows), key=len)
    states: list[Tensor] = []
    targets: list[Tensor] = []
    for begin in range(0, len(ordered), _ROWS):
        batch = ordered[begin : begin + _ROWS]
        width = max(map(len, batch))
        tokens = torch.full((len(batch), width), BOS_ID)
        later = torch.full((len(batch), width + heads + 1), NO_TARGET)
        for r, row in enumerate(batch):
            tokens[r, : len(row)] = later[r, : len(row)] = torch.from_numpy(row)
        hidden = model.hidden(tokens.to(device)).half().cpu()
        wanted = torch.stack([later[:, 2 + k : 2 + k + width] for k in range(heads)], dim=-1)
        known = wanted[..., 0] != NO_TARGET
        states.append(hidden[known])
        targets.append(wanted[known])
        show(sum(map(len, batch)))
    return States(torch.cat(states), torch.cat(targets))


@torch.no_grad()
def accuracies(model: Decoder, heads: MedusaHeads, data: States) -> dict[str, list[float]]:
    """Share of targets that are each head's first guess (`top1`) and among its first five (`top5`)."""
    count = data.targets.shape[1]
    hits = {1: torch.zeros(count), 5: torch.zeros(count)}
    device = heads.weight.device
    for begin in range(0, len(data.states), _CHUNK):
        wanted = data.targets[begin : begin + _CHUNK]
        logits = model.head(heads(data.states[begin : begin + _CHUNK].to(device).float())).cpu()
        guesses = logits.topk(5, dim=-1).indices
        for top, total in hits.items():
            total += (guesses[..., :top] == wanted[..., None]).any(dim=-1).sum(dim=0)
    known = (data.targets != NO_TARGET).sum(dim=0).clamp_min(1)
    return {f"top{top}": [round(x, 4) for x in (total / known).tolist()] for top, total in hits.items()}
