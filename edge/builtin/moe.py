"""A mixture of experts as Hugging Face's MixtralForCausalLM computes it (Jiang et al. 2024, arXiv 2401.04088)."""

# mypy: allow-subclassing-any, no-warn-return-any
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SparseMoe(nn.Module):
    """Each token goes through the `per_token` experts of largest router logit, weighted by their softmax.

    Weights of all experts are stacked: w1 (gate) and w3 (up) [E, F, D], w2 (down) [E, D, F]. `balance` is the
    load-balancing loss of the last call (Switch Transformer, section 2.2: 1 when perfectly even), `chosen` the
    experts [N, per_token] of its N tokens.
    """

    def __init__(self, hidden: int, intermediate: int, experts: int, per_token: int) -> None:
        super().__init__()
        self.experts, self.per_token = experts, per_token
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.w1 = nn.Parameter(torch.empty(experts, intermediate, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, intermediate))
        self.w3 = nn.Parameter(torch.empty(experts, intermediate, hidden))
        self.balance, self.chosen = torch.zeros(()), torch.empty(0, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(rows.float(), self.gate.weight.float())
        top, chosen = logits.topk(self.per_token, dim=-1)
        weights = torch.softmax(top, dim=-1).flatten()
        order = chosen.flatten().argsort(stable=True)
        tokens = order // self.per_token
        counts = torch.bincount(chosen.flatten(), minlength=self.experts)
        outputs = [
            F.linear(F.silu(F.linear(part, self.w1[e])) * F.linear(part, self.w3[e]), self.w2[e])
            for e, part in enumerate(rows[tokens].split(counts.tolist()))
        ]
        mixed = torch.cat(outputs) * weights[order, None]
        self.chosen = chosen
        self.balance = self.experts * (counts / counts.sum() * torch.softmax(logits, dim=-1).mean(0)).sum()
        return torch.zeros_like(rows).index_add(0, tokens, mixed.to(rows.dtype)).view(x.shape)
