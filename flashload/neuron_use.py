"""How texts use the neurons of a model: how many a token needs, and how many of those the most used ones are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Share of the neurons that a token needs: OPT 0.03 (arXiv 2312.11514), Llamas trained to ReLU 0.1 to 0.3 (2402.13516).
ACTIVE_SHARE = 0.1
#: A predictor names a third more neurons than are active, where it does not say how many.
_PREDICTED_PER_ACTIVE = 4 / 3
#: Of OPT-6.7B, a quarter of the neurons in memory leave a quarter of what a predictor names to be read ("LLM in a
#: flash", section 3.2: 24 % used in 5 tokens, 2.4 % new with the next), which alone would be 5.9. Over the layers of
#: a model with those statistics ``python -m bench window`` found 0.54, 0.32, 0.14, 0.08 missing with 0.1, 0.2, 0.37,
#: 0.5 in memory: 5.3.
_FALLOFF, _MOST_FALLOFF = 5.3, 30.0
#: Ranks at which the use of neurons is summed up, and parts of a layer in which they count as alike.
_RANKS, _PARTS = 64, 8
#: The policy of the window (cpp/store/neuron_policy.h), slots it is tried with, and tokens, of which half warm it.
_HALF_LIFE_TOKENS, _SLOTS, USE_TOKENS = 8.0, (0.125, 0.25, 0.5), 512
#: Modes in which a predictor decides.
GUESSED = ("predictor", "lean")


@dataclass(frozen=True)
class NeuronUse:
    """What a plan knows of it.

    A token needs the neuron of rank s (0 is the most used, 1 the least) with a probability in proportion to
    exp(-falloff * s).

    Attributes:
        active_share: share of the neurons that a token needs.
        predicted_share: share that a predictor names; None: not known.
        falloff: how uneven use is; 0: all neurons alike.
        in_order: the pack holds the most used first, so that those which are missing lie near each other.
    """

    active_share: float = ACTIVE_SHARE
    predicted_share: float | None = None
    falloff: float = _FALLOFF
    in_order: bool = False

    def token_share(self, mode: str) -> float:
        """Share of the neurons that one token asks for; mode: who decides (flashload.plan_neurons)."""
        if mode not in GUESSED:
            return self.active_share
        named = self.predicted_share or _PREDICTED_PER_ACTIVE * self.active_share
        return min(1.0, named)

    def wanted_share(self, mode: str, rows: int, held_share: float = 0.0) -> float:
        """Share of the neurons that some of ``rows`` rows want and that are not among the ``held_share`` most used."""
        return (1 - held_share) * sum(self._wanted(mode, rows, held_share)) / _RANKS

    def missing(self, mode: str, rows: int, held_share: float) -> list[tuple[float, float]]:
        """Parts of a layer's records as they lie in the pack: (share of the records, share of those that is read)."""
        if not self.in_order:
            return [(1.0, self.wanted_share(mode, rows, held_share))]
        wanted = self._wanted(mode, rows, held_share)
        parts = (wanted[i : i + _RANKS // _PARTS] for i in range(0, _RANKS, _RANKS // _PARTS))
        return [((1 - held_share) / _PARTS, sum(part) / len(part)) for part in parts]

    def _wanted(self, mode: str, rows: int, held_share: float) -> list[float]:
        """Chances that some of the rows want a neuron, at ranks spread evenly over those that are not held."""
        share = self.token_share(mode)
        # No neuron can be wanted more often than always.
        falloff = min(self.falloff, 1 / share - 1)
        ranks = (held_share + (1 - held_share) * (i + 0.5) / _RANKS for i in range(_RANKS))
        use = (min(1.0, share * _density(falloff, s)) for s in ranks)
        return [1 - (1 - p) ** rows for p in use]


def _density(falloff: float, rank: float) -> float:
    return falloff * math.exp(-falloff * rank) / -math.expm1(-falloff) if falloff > 1e-6 else 1.0


def _missing(falloff: float, held_share: float) -> float:
    if falloff <= 1e-6:
        return 1 - held_share
    last = math.exp(-falloff)
    return (math.exp(-falloff * held_share) - last) / (1 - last)


def neuron_use(metadata: Mapping[str, Any], activation: str) -> NeuronUse:
    """What a pack's metadata says, measured when its predictor was trained; the usual where it says nothing."""
    said = metadata.get("predictor")
    said = said if isinstance(said, Mapping) else {}
    if activation != "relu":
        return NeuronUse(1.0)  # others leave no neuron at zero
    active, falloff = _figure(said, "active", 1.0), _figure(said, "falloff", _MOST_FALLOFF)
    predicted = _figure(said, "predicted", 1.0)
    # Made packs with the statistics of a known model (bench.synth_sparse): they hold the most used first.
    made = metadata.get("calibrated_to")
    if isinstance(made, Mapping):
        active = active or _figure(made, "active", 1.0)
        missed, alarms = _figure(made, "missed", 1.0), _figure(made, "false_alarms", 1.0)
        if active and missed and alarms:
            predicted = predicted or active * (1 - missed) + (1 - active) * alarms
    return NeuronUse(active or ACTIVE_SHARE, predicted, falloff or _FALLOFF, made is not None)


def _figure(said: Mapping[str, Any], key: str, most: float) -> float | None:
    """A number above 0, at most ``most``; None for anything else."""
    value = said.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
        return None
    return float(value)


def measure_falloff(layers: Sequence[NDArray[np.bool_]]) -> float:
    """What comes nearest to the window's misses over a text; 0 where nothing can be told.

    Args:
        layers: [tokens, neurons] of each layer, which neurons were open, in the order of the text.
    """
    found = [[_misses(is_open[:USE_TOKENS], share) for is_open in layers] for share in _SLOTS]
    if not layers or not all(math.isfinite(x) for row in found for x in row):
        return 0.0
    seen = [sum(row) / len(row) for row in found]

    def off(falloff: float) -> float:
        return sum((_missing(falloff, h) - m) ** 2 for h, m in zip(_SLOTS, seen, strict=True))

    return min((i / 10 for i in range(int(10 * _MOST_FALLOFF) + 1)), key=off)


def _misses(is_open: NDArray[np.bool_], slot_share: float) -> float:
    """Share of the open neurons without a slot when the slots are those that recent tokens used most."""
    n_tokens, n_neurons = is_open.shape
    n_slots = max(1, int(slot_share * n_neurons))
    worth = np.zeros(n_neurons, np.float32)
    fade = np.float32(0.5 ** (1 / _HALF_LIFE_TOKENS))
    missed = wanted = 0
    for token, row in enumerate(is_open):
        if token >= n_tokens // 2:
            held = np.zeros(n_neurons, bool)
            held[np.argpartition(-worth, n_slots - 1)[:n_slots]] = True
            missed += int((row & ~held).sum())
            wanted += int(row.sum())
        worth = worth * fade + row
    return missed / wanted if wanted else math.nan
