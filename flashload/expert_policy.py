"""Which experts of a mixture stay in memory: the core's policy in NumPy, others to hold it against, recorded traces.

``cpp/store/expert_policy.cc`` is the same policy in the core; its comments say why it is made so. Here it runs over
traces of real models, which is how its constants were found (``python -m bench experts``).
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashload.errors import ArgumentError, ModelFileError

Array = NDArray[np.float64]
#: (layer, experts chosen there by one token)
Visit = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Trace:
    """What a model chose: visits of layers in the order they were computed."""

    n_layers: int
    n_experts: int
    visits: Sequence[Visit]

    @property
    def total_experts(self) -> int:
        return self.n_layers * self.n_experts

    @property
    def token_experts(self) -> int:
        """Experts of one token over all layers: the working set, in experts."""
        return self.n_layers * max(len(chosen) for _, chosen in self.visits)


class Policy(Protocol):
    """Says what to drop; sees each visit (one token in one layer) before anything is dropped for it."""

    def visit(self, layer: int, chosen: Sequence[int]) -> None: ...

    def worth(self) -> Array:
        """[n_layers * n_experts]; the least goes first."""
        ...


def simulate(trace: Trace, capacity: int, policy: Policy, loaded: Sequence[tuple[int, int]] = ()) -> float:
    """The share of a trace's accesses that a cache of ``capacity`` experts serves; first uses count as misses.

    What one visit chooses is in the cache together where it fits, so none of it makes way for the rest. The cache
    begins with ``loaded``, pairs of layer and expert.
    """
    if capacity < 1:
        raise ArgumentError(f"capacity: expected at least one expert, found {capacity}")
    cached = np.zeros(trace.total_experts, dtype=bool)
    cached[[layer * trace.n_experts + expert for layer, expert in loaded]] = True
    n_hits = n_accesses = 0
    n_cached = len(loaded)
    for layer, chosen in trace.visits:
        ids = layer * trace.n_experts + np.array(chosen)
        hits = int(np.count_nonzero(cached[ids]))
        n_hits += hits
        n_accesses += len(ids)
        n_cached += len(ids) - hits
        cached[ids] = True
        policy.visit(layer, chosen)
        excess = n_cached - capacity
        if excess <= 0:
            continue
        worth = policy.worth().copy()
        worth[ids] = np.inf
        candidates = np.flatnonzero(cached)
        out = candidates[np.argsort(worth[candidates], kind="stable")[:excess]]
        cached[out] = False
        n_cached -= len(out)
    return n_hits / n_accesses if n_accesses else 0.0


class Lru:
    """The least recently used goes first."""

    def __init__(self, trace: Trace) -> None:
        self._n_experts = trace.n_experts
        self._last = np.zeros(trace.total_experts)
        self._now = 0

    def visit(self, layer: int, chosen: Sequence[int]) -> None:
        self._now += 1
        self._last[layer * self._n_experts + np.array(chosen)] = self._now

    def worth(self) -> Array:
        return self._last


class Lfu:
    """The least frequently used goes first; a use counts half after ``half_life_tokens``."""

    def __init__(self, trace: Trace, half_life_tokens: float = 12.0) -> None:
        self._uses = np.zeros((trace.n_layers, trace.n_experts))
        self._decay = 0.5 ** (1 / half_life_tokens)

    def visit(self, layer: int, chosen: Sequence[int]) -> None:
        self._uses[layer] *= self._decay
        self._uses[layer, list(chosen)] += 1

    def worth(self) -> Array:
        return self._uses.reshape(-1)


class Clairvoyant:
    """What is used again last goes first (Belady 1966): what no policy can beat."""

    def __init__(self, trace: Trace) -> None:
        self._n_experts = trace.n_experts
        self._next: list[Array] = []
        following = np.full(trace.total_experts, np.inf)
        for at in range(len(trace.visits) - 1, -1, -1):
            layer, chosen = trace.visits[at]
            ids = layer * trace.n_experts + np.array(chosen)
            self._next.append(following[ids].copy())
            following[ids] = at
        self._next.reverse()
        self._at = 0
        self._worth = np.full(trace.total_experts, -np.inf)

    def visit(self, layer: int, chosen: Sequence[int]) -> None:
        self._worth[layer * self._n_experts + np.array(chosen)] = -self._next[self._at]
        self._at += 1

    def worth(self) -> Array:
        return self._worth


class ExpertPolicy:
    """The core's policy: how often, what followed choices like these, and how far ahead the layer is."""

    HISTORY = 128
    RECENT_DECAY = 0.5
    RATE_DECAY = 0.9438743127
    RECENT_SHARE = RATE_SHARE = 0.3
    FOLLOW_SHARE = 2.0
    ALIKE_DECAY = 0.9170040432
    FOLLOW_DECAY = 0.67
    DISTANCE = 4.0
    LEAST_CHANCE = 0.05

    def __init__(self, trace: Trace) -> None:
        layers, experts = trace.n_layers, trace.n_experts
        self._recent = np.zeros((layers, experts))
        self._rate = np.zeros((layers, experts))
        self._chance = np.zeros((layers, experts), dtype=np.float32)
        #: newest first
        self._choices = np.zeros((layers, self.HISTORY, experts))
        self._n_visits = np.zeros(layers, dtype=np.int64)
        self._n_tokens = np.zeros(layers, dtype=np.int64)
        self._here = 0
        #: per lag: how much the layers just visited chose as they did `lag` tokens before
        self._alike = np.zeros(self.HISTORY)
        self._alike_norm = 0.0
        # follows[lag] = sum over j >= 1 of decay^(j-1) * likeness[lag + j]
        lags = np.arange(self.HISTORY)
        gap = lags[None, :] - lags[:, None]
        self._following = np.where(gap >= 1, self.FOLLOW_DECAY ** np.maximum(gap - 1, 0), 0.0)

    def visit(
        self, layer: int, chosen: Sequence[int], rows: Sequence[int] | None = None, n_rows: int = 1
    ) -> None:
        """What a batch of ``n_rows`` tokens chose in a layer, and how many of them chose each (None: one)."""
        self._here = layer
        picked = list(chosen)
        share = np.ones(len(picked)) / n_rows if rows is None else np.array(rows) / n_rows
        for uses, decay in ((self._recent, self.RECENT_DECAY), (self._rate, self.RATE_DECAY)):
            uses[layer] *= decay**n_rows
            uses[layer, picked] += (1 - decay**n_rows) * share
        choices = self._choices[layer]
        choices[1:] = choices[:-1]
        choices[0] = 0
        choices[0, picked] = 1
        self._n_visits[layer] += 1
        self._n_tokens[layer] += n_rows
        n = int(self._n_tokens[layer])
        follows = self._follow(choices, int(self._n_visits[layer]))
        often = 1.0 if follows is not None else 1 + self.FOLLOW_SHARE / (self.RECENT_SHARE + self.RATE_SHARE)
        self._chance[layer] = often * (
            self.RECENT_SHARE * self._recent[layer] / (1 - self.RECENT_DECAY**n)
            + self.RATE_SHARE * self._rate[layer] / (1 - self.RATE_DECAY**n)
        )
        if follows is not None:
            self._chance[layer] += self.FOLLOW_SHARE * follows
        never = self._n_visits == 0
        self._chance[never] = self._chance[layer].mean()

    def _follow(self, choices: Array, n_visits: int) -> Array | None:
        """[n_experts]: the share of what followed tokens like this one that was each expert; None: nothing did yet."""
        n_lags = min(n_visits - 1, self.HISTORY - 1)
        sizes = np.maximum(choices.sum(1), 1)
        self._alike_norm = self.ALIKE_DECAY * self._alike_norm + 1
        self._alike *= self.ALIKE_DECAY
        self._alike[1 : n_lags + 1] += (choices @ choices[0] / np.maximum(sizes, sizes[0]))[1 : n_lags + 1]
        best = self._alike[1 : n_lags + 1].max(initial=0.0)
        like = (1 + (self._alike - best) / self._alike_norm) ** 16
        like[0] = 0
        like[n_lags + 1 :] = 0
        weight = self._following @ like
        weight[n_lags + 1 :] = 0
        total = weight.sum()
        if total <= 0:
            return None
        share: Array = weight / total * np.minimum(1.0, sizes[0] / sizes)
        found: Array = share @ choices
        return found

    def worth(self) -> Array:
        layers = len(self._chance)
        ahead = (np.arange(layers) - self._here - 1) % layers + 1
        found = -(
            self.DISTANCE * ahead[:, None] / layers + 1 / (self._chance.astype(float) + self.LEAST_CHANCE)
        )
        return found.reshape(-1)


POLICIES: dict[str, Callable[[Trace], Policy]] = {
    "lru": Lru,
    "lfu": Lfu,
    "edge": ExpertPolicy,
    "clairvoyant": Clairvoyant,
}


# Recorded traces


def read_trace(path: Path) -> Trace:
    """A recorded trace, ``.xz`` or plain.

    ``.csv``: rows of turn, phase, step, layer, slot, expert, ... (route_trace v1; a prompt is recorded layer by layer,
    which is the order it was computed in). ``.jsonl``: one token a line, ``{"layers": [[expert, ...], ...]}``.

    Raises:
        ModelFileError: the file is no such trace; names file, place and what was expected.
    """
    name = path.name.removesuffix(".xz")
    parse = {"csv": _csv_visits, "jsonl": _jsonl_visits}.get(name.rsplit(".", 1)[-1])
    if parse is None:
        raise ModelFileError(f"{path}: expected a trace in .csv or .jsonl (or .xz of these)")
    open_text: Any = lzma.open if path.name.endswith(".xz") else open
    visits: list[Visit] = []
    n_layers = n_experts = 0
    try:
        with open_text(path, "rt", encoding="utf-8") as lines:
            for layer, chosen in parse(lines):
                if not chosen or min(chosen) < 0 or layer < 0 or len(set(chosen)) != len(chosen):
                    raise ValueError("expected distinct experts of a layer")
                visits.append((layer, chosen))
                n_layers = max(n_layers, layer + 1)
                n_experts = max(n_experts, max(chosen) + 1)
    except (OSError, ValueError, KeyError, TypeError, lzma.LZMAError) as error:
        raise ModelFileError(
            f"{path}: no trace of experts after {len(visits)} visits of layers: {error}"
        ) from None
    if not visits:
        raise ModelFileError(f"{path}: expected a trace of experts, found no row")
    return Trace(n_layers, n_experts, visits)


def _csv_visits(lines: Iterator[str]) -> Iterator[Visit]:
    key: tuple[int, ...] | None = None
    chosen: list[int] = []
    for line in lines:
        if not line[:1].isdigit():
            continue  # comments and the names of the columns
        turn, phase, step, layer, _, expert = (int(part) for part in line.split(",")[:6])
        if key is not None and key != (turn, phase, step, layer):
            yield key[3], tuple(chosen)
            chosen = []
        key = (turn, phase, step, layer)
        chosen.append(expert)
    if key is not None:
        yield key[3], tuple(chosen)


def _jsonl_visits(lines: Iterator[str]) -> Iterator[Visit]:
    for line in lines:
        for layer, chosen in enumerate(json.loads(line)["layers"]):
            yield layer, tuple(int(expert) for expert in chosen)
