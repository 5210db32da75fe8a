"""Muon (Jordan et al. 2024) for the matrices, AdamW for embeddings, norms and routers, in one optimiser."""

# mypy: allow-subclassing-any, no-warn-return-any
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic iteration of Jordan's post, section "coefficients"


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix of each [rows, columns] in a stack, by Newton-Schulz (singular values 0.7-1.2)."""
    a, b, c = _NS_COEFFICIENTS
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class MuonAdamW(torch.optim.Optimizer):
    """Parameter groups carry `muon` (bool), `base_lr`, `weight_decay`; `lr_scale` multiplies every rate."""

    def __init__(
        self, named: Iterable[tuple[str, Tensor]], *, muon_lr: float, adam_lr: float, weight_decay: float
    ):
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for name, p in named:
            (matrices if p.ndim >= 2 and "embed" not in name and "moe.gate" not in name else rest).append(p)
        groups: list[dict[str, Any]] = [
            {"params": matrices, "muon": True, "base_lr": muon_lr, "weight_decay": weight_decay},
            {"params": rest, "muon": False, "base_lr": adam_lr, "weight_decay": 0.0},
        ]
        super().__init__(groups, {})
        self.lr_scale = 1.0

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                update = self._muon if group["muon"] else self._adam
                for p in group["params"]:
                    if p.grad is not None:
                        update(p, group["base_lr"] * self.lr_scale, group["weight_decay"])

    def _muon(self, p: Tensor, lr: float, weight_decay: float, beta: float = 0.95) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"]
        momentum.lerp_(p.grad, 1 - beta)
        update = orthogonalise(p.grad.lerp(momentum, beta))  # Nesterov
        p.mul_(1 - lr * weight_decay)
        p.add_(update, alpha=-lr * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)

    def _adam(
        self, p: Tensor, lr: float, weight_decay: float, beta1: float = 0.9, beta2: float = 0.98
    ) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, first=torch.zeros_like(p), second=torch.zeros_like(p))
        state["step"] += 1
        state["first"].lerp_(p.grad, 1 - beta1)
        state["second"].lerp_(p.grad.square(), 1 - beta2)
        first = state["first"] / (1 - beta1 ** state["step"])
        second = state["second"] / (1 - beta2 ** state["step"])
        p.mul_(1 - lr * weight_decay)
        p.addcdiv_(first, second.sqrt() + 1e-9, value=-lr)
