"""Low-rank predictors of which FFN neurons a token opens.

Source: LLM in a flash (Alizadeh et al. 2023, arXiv 2312.11514, section 3.1): a product of two small matrices, fed with
what the gate projection is fed with, trained with a loss that weighs open and closed neurons alike.
Shapes: N tokens, D hidden, F neurons, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.predictor_memory import (
    BATCH_TOKENS,
    BATCH_VALUES,
    CHUNK_TOKENS,
    CHUNK_VALUES,
    DOUBLE_ROWS,
    START_TOKENS,
)


class OpenBits:
    """Which of F neurons were open at each of N tokens, one bit each; rows come out as [n, F] bool.

    bits: uint8 [N, ceil(F / 8)], the lowest bit first.
    """

    def __init__(self, bits: Tensor, n_neurons: int) -> None:
        if bits.ndim != 2 or bits.dtype != torch.uint8 or bits.shape[1] != -(-n_neurons // 8):
            raise ValueError(
                f"predictor: expected bits of {n_neurons} neurons, uint8 [N, {-(-n_neurons // 8)}], found "
                f"{bits.dtype} {list(bits.shape)}"
            )
        self._bits = bits
        self.shape = (len(bits), n_neurons)
        self.ndim = 2

    def __len__(self) -> int:
        return len(self._bits)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        spread = self._bits[rows].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)
        return (spread & 1).bool().flatten(-2)[..., : self.shape[1]]


#: [N, F]
Active: TypeAlias = "Tensor | OpenBits"


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


def _parts(x: Tensor, active: Active) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs as floats and activity as bool, some tokens at a time."""
    step = max(1, min(CHUNK_TOKENS, CHUNK_VALUES // active.shape[1]))
    for first in range(0, len(x), step):
        yield x[first : first + step].float(), active[first : first + step]


def _head(active: Active, n: int) -> Active:
    """The first n tokens of the activity."""
    return OpenBits(active._bits[:n], active.shape[1]) if isinstance(active, OpenBits) else active[:n]


def _open_shares(x: Tensor, active: Active) -> Tensor:
    """Of each neuron the share of tokens it is open at, [F]."""
    counts = torch.zeros(active.shape[1], dtype=torch.int64)
    for _, mask in _parts(x, active):
        counts += mask.sum(0)
    return (counts / len(x)).float()


def _second_moments(x: Tensor) -> Tensor:
    """x.T @ x / N in double precision, [D, D]."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for part in x.split(CHUNK_TOKENS):
        total += (part.float().T @ part.float()).double()
    return total / len(x)


def _check(x: Tensor, active: Active, rank: int) -> None:
    if x.ndim != 2 or active.ndim != 2 or len(x) != len(active) or not len(x):
        raise ValueError(
            f"predictor: expected inputs [N, D] and activity [N, F], found {list(x.shape)} and {list(active.shape)}"
        )
    if not 0 < rank <= x.shape[1]:
        raise ValueError(f"predictor: expected a rank of 1 to {x.shape[1]}, found {rank}")
    share = _open_shares(x, active).mean().item()
    if not 0 < share < 1:
        raise ValueError("predictor: expected some neurons open and some closed, found all the same")


def low_rank_gate(gate: Tensor, x: Tensor, rank: int) -> Predictor:
    """The best linear guess of the gates x @ gate.T [N, F] that has this rank, each gate in units of its own spread.

    The truncated singular value decomposition of the gate weights [F, D] in the metric of x's second moments. Its
    scores are gates divided by their root mean square, so one threshold means alike for all neurons.
    """
    values, vectors = torch.linalg.eigh(_second_moments(x))
    root = values.clamp_min(float(values.max()) * 1e-7).sqrt()

    def whitened(rows: Tensor) -> Tensor:
        """[n, D]; its rows' squared norms would be the gates' mean squares, and are one."""
        out = rows.double() @ (vectors * root)
        return out / out.norm(dim=1, keepdim=True).clamp_min(1e-12)

    # The right singular vectors are those of a D x D matrix, which needs no F x D decomposition.
    gram = torch.zeros_like(vectors)
    for rows in gate.split(DOUBLE_ROWS):
        part = whitened(rows)
        gram += part.T @ part
    right = torch.linalg.eigh(gram)[1].flip(-1)[:, :rank]  # [D, r]
    up = torch.cat([(whitened(rows) @ right).float() for rows in gate.split(DOUBLE_ROWS)])
    down = (right.T / root) @ vectors.T
    return Predictor(down.float(), up, torch.zeros(len(gate)))


def _low_rank_labels(x: Tensor, active: Active, rank: int) -> Predictor:
    """As low_rank_gate without gates: their place takes the least-squares fit of the labels."""
    products = torch.zeros(x.shape[1], active.shape[1])
    for part, mask in _parts(x, active):
        products += part.T @ mask.float()
    products = products / len(x) - torch.outer(x.float().mean(0), _open_shares(x, active))
    moments = _second_moments(x).float()
    ridge = moments.diagonal().mean() * 1e-3 * torch.eye(x.shape[1])
    return low_rank_gate(torch.linalg.solve(moments + ridge, products).T, x, rank)


def _start(x: Tensor, active: Active, rank: int, gate: Tensor | None) -> Predictor:
    """The linear start, its bias per neuron where a logistic curve of slope 4 per unit would have it on average."""
    linear = _low_rank_labels(x, active, rank) if gate is None else low_rank_gate(gate, x, rank)
    scores = linear.scores(x[: min(START_TOKENS, BATCH_VALUES // active.shape[1])].float())
    shares = _open_shares(x, active).clamp(1e-3, 1 - 1e-3)
    cut = torch.stack([column.quantile(1 - share) for column, share in zip(scores.T, shares, strict=True)])
    slope = 4.0
    return Predictor(linear.down, slope * linear.up, -slope * cut)


def fit_predictor(
    x: Tensor,
    active: Active,
    rank: int,
    *,
    gate: Tensor | None = None,
    importance: Callable[[Tensor], Tensor] | None = None,
    recall: float = 0.96,
    steps: int = 400,
    batch: int = BATCH_TOKENS,
    lr: float = 2e-3,
    seed: int = 0,
    show: Callable[[float], None] = lambda _: None,
) -> Predictor:
    """Fits a predictor to inputs x [N, D] (single or half floats) and which neurons were open, active [N, F].

    gate: the gate weights [F, D], where known; the fit then starts from their best approximation of this rank.
    importance: of inputs [B, D], what missing each neuron costs [B, F], in any scale; without it all misses cost alike.
    recall: share of the open neurons to predict on the last tenth of the tokens, which is kept for the threshold.
    show: told the done share in [0, 1] after each step.
    Returns a predictor whose bias holds the threshold. Raises ValueError for shapes or a rank that cannot be.
    """
    _check(x, active, rank)
    kept = max(1, len(x) // 10)
    n_fitted = len(x) - kept
    start = _start(x[:n_fitted], _head(active, n_fitted), rank, gate)
    factors = Predictor(start.down.clone(), start.up.clone(), start.bias.clone())
    tensors = [factors.down, factors.up, factors.bias]
    optimiser = torch.optim.AdamW(tensors, lr=lr, weight_decay=0.0, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    open_share = _open_shares(x, active).mean().item()
    batch = max(1, min(batch, n_fitted, BATCH_VALUES // active.shape[1]))
    balance = (1 - open_share) / open_share
    for step in range(steps):
        rows = torch.randint(0, n_fitted, (batch,), generator=generator)
        labels, weights = active[rows], torch.full((), balance, dtype=torch.bfloat16)
        if importance is not None:
            costs = importance(x[rows].float())
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


def calibrate(predictor: Predictor, x: Tensor, active: Active, recall: float) -> Predictor:
    """The predictor with its bias shifted so that this share of the open neurons scores above zero."""
    if not 0 < recall <= 1:
        raise ValueError(f"predictor: expected a recall in (0, 1], found {recall}")
    scores = torch.cat([predictor.scores(part)[mask] for part, mask in _parts(x, active)])
    if not len(scores):
        raise ValueError("predictor: expected open neurons to set the threshold by, found none")
    rank = min(len(scores) - 1, int((1 - recall) * len(scores)))
    lowest = scores.sort().values[rank].item()
    # Strictly above zero: the neuron at the threshold itself counts as found.
    return Predictor(predictor.down, predictor.up, predictor.bias - lowest + 1e-4)


def measure(predictor: Predictor, x: Tensor, active: Active) -> PredictorFigures:
    """Recall, precision and shares on inputs [N, D] with activity [N, F]."""
    hits = found = opened = 0
    n_all = len(x) * active.shape[1]
    for part, mask in _parts(x, active):
        guess = predictor.scores(part) > 0
        hits += int((guess & mask).sum())
        found += int(guess.sum())
        opened += int(mask.sum())
    return PredictorFigures(
        recall=hits / max(1, opened),
        precision=hits / max(1, found),
        predicted=found / n_all,
        active=opened / n_all,
    )
