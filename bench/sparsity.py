"""The activation statistics published for OPT-6.7B, and the random process of neurons that has them.

A neuron's pre-activation is a unit normal s + n over a threshold: s (variance 1 - sigma^2) is what a low-rank predictor
sees, n is what it does not. Thresholds differ from neuron to neuron (normal, deviation tau), so a few neurons fire
often and most seldom. s is part persistent (a first-order autoregressive process over positions), part fresh in every
token. Four figures of the paper fix the four unknowns of a layer, two more fix persistence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Published:
    """Shares between 0 and 1, of neurons unless said otherwise.

    Attributes:
        active: fire for one token, on average over layers; ``active_first``, ``_middle``, ``_last``: of 32 layers.
        missed: of the active, not predicted.
        false_alarms: of the inactive, predicted.
        window: predicted for at least one of ``window_tokens`` neighbouring tokens.
        fresh: predicted, but for none of the ``window_tokens`` tokens before.
        hot: of neurons that carry ``hot_activations`` of all activations.
    """

    active: float = 0.033
    active_first: float = 0.0156
    active_middle: float = 0.0266
    active_last: float = 0.0536
    missed: float = 0.05
    false_alarms: float = 0.07
    window_tokens: int = 5
    window: float = 0.24
    fresh: float = 0.024
    hot: float = 0.26
    hot_activations: float = 0.80
    source: str = "LLM in a flash, arXiv 2312.11514 (OPT-6.7B); hot: PowerInfer, arXiv 2312.12456 (OPT-30B)"


OPT = Published()
RANK, LAST_RANK, LAST_LAYERS = 128, 1024, 4
#: Share of the persistent part in the variance of what a token brings, and its correlation from one position to the
#: next: solved for ``OPT.window`` and ``OPT.fresh`` (``tests/test_bench_sparse.py`` holds them to it).
PERSISTENT_SHARE = 11 / 16
POSITION_CORRELATION = 0.79


@dataclass(frozen=True)
class Layer:
    """What generates one layer's neurons.

    Attributes:
        active: share that fires.
        mean, spread: of the thresholds (normal).
        noise: deviation of what the predictor does not see, of a unit pre-activation.
        slack: how far below its threshold the predictor calls for a neuron.
    """

    active: float
    mean: float
    spread: float
    noise: float
    slack: float


_GRID = np.linspace(-9.0, 9.0, 4001)
_CDF = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in _GRID])


def normal_cdf(x: F64) -> F64:
    """Chance that a unit normal is below x."""
    out: F64 = np.interp(x, _GRID, _CDF)
    return out


def _solve(f: Callable[[float], float], low: float, high: float, steps: int = 22) -> float:
    """Where f, monotonous between low and high, is zero."""
    rising = f(high) > f(low)
    for _ in range(steps):
        middle = (low + high) / 2
        if (f(middle) > 0) == rising:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def _quantiles(n: int) -> F64:
    return np.array([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)])


_Z = _quantiles(256)
_SEEN = np.linspace(-5.0, 5.0, 101)
_SEEN_WEIGHT = np.exp(-(_SEEN**2) / 2) / np.exp(-(_SEEN**2) / 2).sum()


def _mean(active: float, spread: float) -> float:
    return _solve(lambda m: float(normal_cdf(-m - spread * _Z).mean()) - active, -3.0, 9.0)


def _hot_activations(active: float, spread: float, hot: float) -> float:
    rate = np.sort(normal_cdf(-_mean(active, spread) - spread * _Z))[::-1]
    return float(rate[: round(hot * len(rate))].sum() / rate.sum())


def _errors(thresholds: F64, noise: float, slack: float) -> tuple[float, float]:
    """(missed of the active, false alarms of the inactive)."""
    seen = math.sqrt(1 - noise**2) * _SEEN
    fires = normal_cdf((seen[None] - thresholds[:, None]) / noise)
    called = seen[None] > thresholds[:, None] - slack
    active = float((fires @ _SEEN_WEIGHT).mean())
    hits = float(((fires * called) @ _SEEN_WEIGHT).mean())
    alarms = float((called @ _SEEN_WEIGHT).mean()) - hits
    return 1 - hits / active, alarms / (1 - active)


@cache
def fit(active: float, published: Published = OPT) -> Layer:
    """The layer whose neurons fire in ``active`` of all cases and have the other published figures."""
    spread = _solve(
        lambda t: _hot_activations(active, t, published.hot) - published.hot_activations, 0.05, 3.0
    )
    mean = _mean(active, spread)
    thresholds = mean + spread * _quantiles(64)

    def slack(noise: float) -> float:
        return _solve(lambda s: _errors(thresholds, noise, s)[0] - published.missed, -1.0, 4.0, 16)

    noise = _solve(lambda n: _errors(thresholds, n, slack(n))[1] - published.false_alarms, 0.15, 0.95, 14)
    return Layer(active, mean, spread, noise, slack(noise))


def active_share(layer: int, n_layers: int, published: Published = OPT) -> float:
    """Share of a layer's neurons that fire: straight lines between the published layers 1, 16 and 32."""
    at = layer / max(n_layers - 1, 1)
    ends = (published.active_first, published.active_middle, published.active_last)
    return float(np.interp(at, (0, 15 / 31, 1), ends))


def rank(layer: int, n_layers: int, hidden: int) -> int:
    """The predictor's rank, scaled with the hidden size (published at 4096); a multiple of 32."""
    full = LAST_RANK if layer >= n_layers - LAST_LAYERS and n_layers > LAST_LAYERS else RANK
    return max(32, full * hidden // 4096 // 32 * 32)


def positions(n: int, width: int, generator: np.random.Generator) -> F32:
    """The persistent part: n neighbouring rows of ``width`` unit normals, each correlated with the one before."""
    rows: F32 = generator.standard_normal((n, width), np.float32)
    fresh = math.sqrt(1 - POSITION_CORRELATION**2)
    for i in range(1, n):
        rows[i] = POSITION_CORRELATION * rows[i - 1] + fresh * rows[i]
    return rows


@dataclass(frozen=True)
class Measured:
    """The same shares as :class:`Published`, of one layer in one text.

    Attributes:
        hot_activations_held_out: with the hot neurons chosen on the other half of the text: too low by chance, as
            ``hot_activations`` (chosen on the same text) is too high.
    """

    active: float
    predicted: float
    missed: float
    false_alarms: float
    window: float
    fresh: float
    hot_activations: float
    hot_activations_held_out: float


def measure(
    active: npt.NDArray[np.bool_], predicted: npt.NDArray[np.bool_], published: Published = OPT
) -> Measured:
    """Statistics of who fires and who is predicted, both [tokens, neurons] of neighbouring tokens."""
    n, k = len(active), published.window_tokens
    if n < 2 * k + 2:
        raise ValueError(f"expected at least {2 * k + 2} tokens, found {n}")
    ages = np.stack([predicted[i : n - k + i] for i in range(k + 1)])  # [k + 1, n - k, neurons], oldest first
    before = ages[:k].any(axis=0)
    n_hot = round(published.hot * active.shape[1])

    def carried(chosen_on: npt.NDArray[np.bool_], counted_on: npt.NDArray[np.bool_]) -> float:
        hottest = np.argsort(-chosen_on.sum(axis=0), kind="stable")[:n_hot]
        return float(counted_on[:, hottest].sum() / max(counted_on.sum(), 1))

    hits = float((active & predicted).sum())
    return Measured(
        active=float(active.mean()),
        predicted=float(predicted.mean()),
        missed=1 - hits / max(float(active.sum()), 1.0),
        false_alarms=(float(predicted.sum()) - hits) / max(float((~active).sum()), 1.0),
        window=float(before.mean()),
        fresh=float((ages[k] & ~before).mean()),
        hot_activations=carried(active, active),
        hot_activations_held_out=carried(active[: n // 2], active[n // 2 :]),
    )
