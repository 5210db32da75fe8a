"""What a training step minimises: next-token loss, alone or with sparsity, a teacher, or expert balance."""

# mypy: no-warn-return-any
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from edge.builtin.model import Decoder


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy, nats per token; logits [B, T, V], targets [B, T]."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Objective(Protocol):
    """`loss` returns (what is minimised, the next-token loss for the curve); `state` survives an interruption."""

    state: dict[str, float]

    def loss(self, model: Decoder, tokens: Tensor, progress: float) -> tuple[Tensor, Tensor]: ...


class Plain:
    """The next token alone."""

    def __init__(self) -> None:
        self.state: dict[str, float] = {}

    def loss(self, model: Decoder, tokens: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        del progress
        value = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
        return value, value


class Distil:
    """Divergence from a teacher's next-token distribution (Hinton et al. 2015), plus a little of the text's own.

    Before the share `begin` of the run it is the next token alone.
    """

    def __init__(self, teacher: Decoder, text_share: float, begin: float = 0.0) -> None:
        self.teacher, self.text_share, self.begin = teacher.eval(), text_share, begin
        self.state: dict[str, float] = {}

    def loss(self, model: Decoder, tokens: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        logits = model(tokens[:, :-1])
        if progress < self.begin:
            value = next_token_loss(logits, tokens[:, 1:])
            return value, value
        with torch.no_grad():
            wanted = torch.log_softmax(self.teacher(tokens[:, :-1]).float(), dim=-1)
        found = torch.log_softmax(logits.float(), dim=-1)
        value = F.nll_loss(found.flatten(0, 1), tokens[:, 1:].flatten())
        apart = F.kl_div(found.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")
        return (1 - self.text_share) * apart + self.text_share * value, value


@dataclass(frozen=True)
class SparsitySettings:
    """The zero share wanted of ReLU gates, and where the ramp to it begins and ends (shares of the run).

    From `end` to `settled` it falls back to `rest`: gates closed with some overshoot cost less to hold.
    """

    target: float = 0.93
    begin: float = 0.37
    end: float = 0.75
    rest: float = 0.915
    settled: float = 0.9
    width: float = 0.5  # of tanh, in root mean squares of the open gates
    rate: float = 0.06  # largest change of log(weight) per step


_SAMPLE = 2  # of so many sequences one is looked at, for speed


class Sparse:
    """Another objective plus a progressive sparsity penalty on the ReLU gates.

    As in ProSparse (Song et al. 2024, arXiv 2402.13516, section 3.2) the penalty grows along the run. It is the
    mean of tanh(gate / width): an L1 that saturates, so that it closes gates that are hardly open and leaves the
    strong ones their size. Its weight is steered, within bounds, so that the zero share follows the ramp.
    """

    def __init__(self, settings: SparsitySettings, fit: Objective) -> None:
        self.settings, self.fit = settings, fit
        self.state: dict[str, float] = {"weight": 0.02, "zeros": 0.0, "first": -1.0}

    def wanted(self, progress: float) -> float:
        """Zero share to have at a share of the run."""
        s, first = self.settings, self.state["first"]
        done = min(1.0, max(0.0, (progress - s.begin) / (s.end - s.begin)))
        back = min(1.0, max(0.0, (progress - s.end) / (s.settled - s.end)))
        return first + (s.target - first) * done + (s.rest - s.target) * back

    def loss(self, model: Decoder, tokens: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        s, state = self.settings, self.state
        for layer in model.layers:
            layer.mlp.keep_gates = True
        minimised, value = self.fit.loss(model, tokens, progress)
        penalty, zeros = torch.zeros(()), 0.0
        for layer in model.layers:
            gates = layer.mlp.gates[::_SAMPLE]
            open_share = (gates > 0).float().mean()
            size = (gates.detach().float().square().mean() / (open_share + 1e-6)).sqrt()
            penalty = penalty + torch.tanh(gates / (s.width * size + 1e-6)).float().mean()
            zeros += 1 - open_share.item()
            layer.mlp.gates = torch.empty(0)
        n_layers = len(model.layers)
        state["zeros"] = zeros / n_layers
        if progress >= s.begin:
            if state["first"] < 0:
                state["first"] = state["zeros"]
            miss = (self.wanted(progress) - state["zeros"]) / 0.01
            state["weight"] *= math.exp(s.rate * min(1.0, max(-1.0, miss)))
            state["weight"] = min(20.0, max(1e-3, state["weight"]))
            minimised = minimised + state["weight"] * penalty / n_layers
        return minimised, value


class Balanced:
    """Next token plus the load-balancing loss of every expert layer."""

    def __init__(self, weight: float = 0.01) -> None:
        self.weight = weight
        self.state: dict[str, float] = {}

    def loss(self, model: Decoder, tokens: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        del progress
        value = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
        uneven = torch.stack([layer.block_sparse_moe.balance for layer in model.layers]).mean()
        self.state["balance"] = uneven.item()
        return value + self.weight * uneven, value
