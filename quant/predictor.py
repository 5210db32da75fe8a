"""Low-rank predictors of which FFN neurons a token opens.

Source: LLM in a flash (Alizadeh et al. 2023, arXiv 2312.11514, section 3.1): a product of two small matrices, fed with
what the gate projection is fed with, trained with a loss that weighs open and closed neurons alike.
Shapes: N tokens, D hidden, F neurons, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK_TOKENS = 4096  # scores computed at once: 4096 x 1536 floats are 24 MiB


@dataclass(frozen=True)
class Predictor:
    """score = up @ (down @ x) + bias; a neuron is predicted open when its score is above zero.

    down [r, D], up [F, r], bias [F].
    """

    down: Tensor
    up: Tensor
    bias: Tensor

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    def scores(self, x: Tensor) -> Tensor:
        """[..., F] of inputs [..., D]."""
        return F.linear(F.linear(x, self.down), self.up, self.bias)


@dataclass(frozen=True)
class PredictorFigures:
    """Shares over all tokens and neurons: of the open ones those predicted (recall), of the predicted ones those
    open (precision), and of all neurons those predicted and those open."""

    recall: float
    precision: float
    predicted: float
    active: float


def _check(x: Tensor, active: Tensor, rank: int) -> None:
    if x.ndim != 2 or active.ndim != 2 or len(x) != len(active) or not len(x):
        raise ValueError(
            f"predictor: expected inputs [N, D] and activity [N, F], found {list(x.shape)} and {list(active.shape)}"
        )
    if not 0 < rank <= x.shape[1]:
        raise ValueError(f"predictor: expected a rank of 1 to {x.shape[1]}, found {rank}")
    if not active.any() or active.all():
        raise ValueError("predictor: expected some neurons open and some closed, found all the same")


def low_rank_gate(gate: Tensor, x: Tensor, rank: int) -> Predictor:
    """The best linear guess of the gates x @ gate.T [N, F] that has this rank, each gate in units of its own spread.

    The truncated singular value decomposition of the gate weights [F, D] in the metric of x's second moments. Its
    scores are gates divided by their root mean square, so one threshold means alike for all neurons.
    """
    moments = x.T @ x / len(x)
    values, vectors = torch.linalg.eigh(moments.double())
    root = values.clamp_min(float(values.max()) * 1e-7).sqrt()
    whitened = gate.double() @ (vectors * root)  # [F, D]; its rows' squared norms are the gates' mean squares
    whitened = whitened / whitened.norm(dim=1, keepdim=True).clamp_min(1e-12)
    left, singular, right = torch.linalg.svd(whitened, full_matrices=False)
    up = left[:, :rank] * singular[:rank]
    down = (right[:rank] / root) @ vectors.T
    return Predictor(down.float(), up.float(), torch.zeros(len(gate)))


def _low_rank_labels(x: Tensor, active: Tensor, rank: int) -> Predictor:
    """As low_rank_gate without gates: their place takes the least-squares fit of the labels."""
    labels = active.float() - active.float().mean(0)
    moments = x.T @ x / len(x)
    ridge = moments.diagonal().mean() * 1e-3 * torch.eye(x.shape[1])
    return low_rank_gate(torch.linalg.solve(moments + ridge, x.T @ labels / len(x)).T, x, rank)


def _start(x: Tensor, active: Tensor, rank: int, gate: Tensor | None) -> Predictor:
    """The linear start, its bias per neuron where a logistic curve of slope 4 per unit would have it on average."""
    linear = _low_rank_labels(x, active, rank) if gate is None else low_rank_gate(gate, x, rank)
    scores = linear.scores(x[: 4 * _CHUNK_TOKENS])
    shares = active.float().mean(0).clamp(1e-3, 1 - 1e-3)
    cut = torch.stack([column.quantile(1 - share) for column, share in zip(scores.T, shares, strict=True)])
    slope = 4.0
    return Predictor(linear.down, slope * linear.up, -slope * cut)


def fit_predictor(
    x: Tensor,
    active: Tensor,
    rank: int,
    *,
    gate: Tensor | None = None,
    importance: Callable[[Tensor], Tensor] | None = None,
    recall: float = 0.96,
    steps: int = 400,
    batch: int = 4096,
    lr: float = 2e-3,
    seed: int = 0,
    show: Callable[[float], None] = lambda _: None,
) -> Predictor:
    """Fits a predictor to inputs x [N, D] and which neurons were open, active [N, F] (bool).

    gate: the gate weights [F, D], where known; the fit then starts from their best approximation of this rank.
    importance: of inputs [B, D], what missing each neuron costs [B, F], in any scale; without it all misses cost alike.
    recall: share of the open neurons to predict on the last tenth of the tokens, which is kept for the threshold.
    show: told the done share in [0, 1] after each step.
    Returns a predictor whose bias holds the threshold. Raises ValueError for shapes or a rank that cannot be.
    """
    _check(x, active, rank)
    kept = max(1, len(x) // 10)
    start = _start(x[:-kept], active[:-kept], rank, gate)
    factors = Predictor(start.down.clone(), start.up.clone(), start.bias.clone())
    tensors = [factors.down, factors.up, factors.bias]
    optimiser = torch.optim.AdamW(tensors, lr=lr, weight_decay=0.0, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    open_share = active.float().mean().item()
    balance = (1 - open_share) / open_share
    for step in range(steps):
        rows = torch.randint(0, len(x) - kept, (min(batch, len(x) - kept),), generator=generator)
        labels, weights = active[rows], torch.full((), balance, dtype=torch.bfloat16)
        if importance is not None:
            costs = importance(x[rows])
            weights = (costs * (balance / costs[labels].mean().clamp_min(1e-12))).bfloat16()
        set_gradients(factors, x[rows].bfloat16(), labels, weights)
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - step / steps)
        optimiser.step()
        show((step + 1) / steps)
    for tensor in tensors:
        tensor.grad = None
    return calibrate(factors, x[-kept:], active[-kept:], recall)


def set_gradients(factors: Predictor, x: Tensor, labels: Tensor, weights: Tensor) -> None:
    """Of the mean binary cross entropy with open neurons weighted; products and scores in bfloat16.

    By hand, because automatic ones over all [B, F] scores in float32 take three times as long.
    """
    down, up = factors.down.bfloat16(), factors.up.bfloat16()
    inner = x @ down.T
    chances = torch.addmm(factors.bias.bfloat16(), inner, up.T).sigmoid_()
    slopes = torch.where(labels, (chances - 1) * weights, chances)
    scale = 1 / slopes.numel()
    factors.up.grad = (slopes.T @ inner).float() * scale
    factors.bias.grad = slopes.sum(0, dtype=torch.float32) * scale
    factors.down.grad = ((slopes @ up).T @ x).float() * scale


def calibrate(predictor: Predictor, x: Tensor, active: Tensor, recall: float) -> Predictor:
    """The predictor with its bias shifted so that this share of the open neurons scores above zero."""
    if not 0 < recall <= 1:
        raise ValueError(f"predictor: expected a recall in (0, 1], found {recall}")
    scores = torch.cat(
        [
            predictor.scores(part)[mask]
            for part, mask in zip(x.split(_CHUNK_TOKENS), active.split(_CHUNK_TOKENS), strict=True)
        ]
    )
    if not len(scores):
        raise ValueError("predictor: expected open neurons to set the threshold by, found none")
    rank = min(len(scores) - 1, int((1 - recall) * len(scores)))
    lowest = scores.sort().values[rank].item()
    # Strictly above zero: the neuron at the threshold itself counts as found.
    return Predictor(predictor.down, predictor.up, predictor.bias - lowest + 1e-4)


def measure(predictor: Predictor, x: Tensor, active: Tensor) -> PredictorFigures:
    """Recall, precision and shares on inputs [N, D] with activity [N, F]."""
    hits = found = opened = 0
    for part, mask in zip(x.split(_CHUNK_TOKENS), active.split(_CHUNK_TOKENS), strict=True):
        guess = predictor.scores(part) > 0
        hits += int((guess & mask).sum())
        found += int(guess.sum())
        opened += int(mask.sum())
    return PredictorFigures(
        recall=hits / max(1, opened),
        precision=hits / max(1, found),
        predicted=found / active.numel(),
        active=opened / active.numel(),
    )
