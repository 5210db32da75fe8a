"""The rule for feed-forward layers stored by neuron ("LLM in a flash", arXiv 2312.11514): who decides which neurons are
active, and how many records of each layer have a slot in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from flashload.neuron_use import GUESSED, NeuronUse

_PAGE_BYTES = 4096
#: Records on their way in: as many reads as keep a drive busy, less in a small budget. Half of that is in flight when a
#: prompt wants nearly all records (flashload.estimate_neurons), and a drive was seen that gives 40 % of its rate with
#: less than 2 MiB in flight.
_STAGING_MOST_BYTES, _STAGING_SHARE = 6 << 20, 32
#: The core's tables: per neuron who holds it, its worth, which rows use it, who was touched; per slot its neuron; and,
#: once for all layers, the misses of one turn and the guesses of the next.
_TABLE_PER_NEURON, _TABLE_PER_SLOT = 8 + 3 * 4, 4
_TURN_PER_NEURON, _TURN_PER_SLOT = 24 + 16 + 4, 8
#: A predictor changes the text a little: it has to save a third of the reads.
_WORTH_A_LOSS = 2 / 3
#: What ``predictor="lean"`` keeps of a layer's energy; the perplexity it costs: ``python -m bench lean``.
LEAN_KEEP = 0.95
#: Of the missing, exp(-10 * loss ** 0.6) are read then: so does the random process of ``bench.sparsity``, with a
#: seventh of the records in memory and losses of 0.02 to 0.06.
_LEAN_FACTOR, _LEAN_POWER = 10.0, 0.6
#: Who may decide which neurons are active: False: never a predictor; True: one where memory is short; "on": always one;
#: a share: one where records do not all fit, and of those without a slot it reads what keeps that share of a layer's
#: energy (cpp/model/neuron_price.h).
Guess: TypeAlias = "bool | str | float"


class Weight(Protocol):
    """What the rule needs to know of an entry of the directory."""

    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def stored_bytes(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def chunk_bytes(self) -> int: ...


def read_share(keep: float) -> float:
    """Of the neurons without a slot that a predictor names, those that are read to keep a share of the energy."""
    return math.exp(-_LEAN_FACTOR * (1 - keep) ** _LEAN_POWER)


def is_extra(name: str) -> bool:
    """Whether plain runs have no need of an entry: predictors, thresholds and draft heads."""
    return ".predictor." in name or ".sparsity." in name or name.startswith("medusa.")


def is_neurons(name: str) -> bool:
    """Whether an entry holds records of neurons."""
    return ".neurons." in name


@dataclass(frozen=True)
class NeuronPlacement:
    """How a pack's neurons live in memory.

    Attributes:
        mode: "exact" (gate rows decide, the text is that of the whole model), "predictor" (a low-rank guess
            decides; neurons it misses count as zero) or "lean" (the same, and not all it names are read).
        slots: records in memory, by weight id; of a layer's gates all or (not listed) none.
        bytes: slots and the core's tables.
        staging_bytes: where records land that are read on demand; 0 when every record has a slot.
        resident: predictor weights that are loaded.
        keep: share of a layer's energy for which records are read; below 1 where the mode is "lean".
    """

    mode: str
    slots: dict[int, int]
    bytes: int
    staging_bytes: int
    resident: list[int] = field(default_factory=list)
    keep: float = 1.0


class NeuronModel:
    """The entries of a pack that belong to neurons.

    Args:
        use: how texts use them.
    """

    def __init__(self, weights: Sequence[Weight], use: NeuronUse | None = None) -> None:
        self.use = use or NeuronUse()
        self.records = [w for w in weights if w.name.endswith(".neurons.records")]
        self.gates = [w for w in weights if w.name.endswith(".neurons.gates")]
        predictors = [w for w in weights if ".predictor." in w.name]
        layers = {w.layer for w in predictors}
        #: All three weights of every layer, or none at all.
        self.predictors = predictors if all(w.layer in layers for w in self.records) else []

    def whole(self, guided: bool = False) -> NeuronPlacement:
        """Every record in memory; the gate rows are in the records, nobody has to guess unless ``guided``."""
        return NeuronPlacement(
            "predictor" if guided else "exact",
            {w.id: w.rows for w in self.records},
            sum(w.stored_bytes for w in self.records),
            0,
            [w.id for w in self.predictors] if guided else [],
        )

    def modes(self, predictor: Guess) -> list[str]:
        """What may decide, in the order of preference when memory is short."""
        if isinstance(predictor, float):
            return ["lean"]
        if predictor == "on":
            return ["predictor"]
        return ["predictor", "exact"] if predictor and self.predictors else ["exact"]

    def least_bytes(self, mode: str, gates: Sequence[Weight] | None = None) -> int:
        """Memory with no slot at all: whoever decides, tables and the smallest staging; ``gates`` as :meth:`window`."""
        decides = self._gates_held(mode, gates) if mode == "exact" else self.predictors
        tables = _tables(self.records, [0] * len(self.records))
        return sum(w.stored_bytes for w in decides) + tables + self._staging_least_bytes

    def _gates_held(self, mode: str, gates: Sequence[Weight] | None) -> Sequence[Weight]:
        held = self.gates if gates is None else gates
        return held if mode == "exact" else []

    def ahead_bytes(self, room_bytes: int) -> int:
        """Staging beyond the least that keeps the drive busy."""
        return min(_STAGING_MOST_BYTES, room_bytes // _STAGING_SHARE) // _PAGE_BYTES * _PAGE_BYTES

    def window(
        self,
        mode: str,
        room_bytes: int,
        keep: float = 1.0,
        use: Sequence[float] | None = None,
        gates: Sequence[Weight] | None = None,
        ahead_bytes: int | None = None,
    ) -> NeuronPlacement | None:
        """Slots for what fits into ``room_bytes``; None when not even the least does.

        Args:
            keep: of a layer's energy, in mode "lean".
            use: how much each layer's neurons are used, in the order of the layers; None takes them as equal.
            gates: those of the gate rows that are held, in mode "exact", while the others stream; None: all.
            ahead_bytes: staging, where it has been decided; None: as :meth:`ahead_bytes` of the room.
        """
        held_gates = self._gates_held(mode, gates)
        spare = room_bytes - self.least_bytes(mode, gates)
        if spare < 0:
            return None
        ahead = self.ahead_bytes(room_bytes) if ahead_bytes is None else ahead_bytes
        staging = max(ahead, self._staging_least_bytes)
        staging = min(staging, (self._staging_least_bytes + spare) // _PAGE_BYTES * _PAGE_BYTES)
        spare -= staging - self._staging_least_bytes + _PAGE_BYTES * (len(self.records) + 1)
        share = use if use is not None else [1.0] * len(self.records)
        slots = _share_out(self.records, share, spare)
        held = {w.id: n for w, n in zip(self.records, slots, strict=True)}
        held |= {w.id: w.rows for w in held_gates}
        slab_bytes = sum(_page(n * w.chunk_bytes) for w, n in zip(self.records, slots, strict=True))
        gate_bytes = sum(w.stored_bytes for w in held_gates)
        resident = [w.id for w in self.predictors] if mode in GUESSED else []
        return NeuronPlacement(
            mode, held, slab_bytes + gate_bytes + _tables(self.records, slots), staging, resident, keep
        )

    def predictor_pays(self, guess: NeuronPlacement, exact: NeuronPlacement) -> bool:
        """Whether the place that gate rows would take, given to more slots, saves reads enough to bear a loss."""
        return self._missing_share(guess) < _WORTH_A_LOSS * self._missing_share(exact)

    def _missing_share(self, placement: NeuronPlacement) -> float:
        """Share of the neurons that a token wants and that have no slot."""
        held = sum(placement.slots[w.id] for w in self.records)
        return self.use.wanted_share(placement.mode, 1, held / sum(w.rows for w in self.records))

    def read_bytes(self, placement: NeuronPlacement) -> float:
        """Read from the drive for one token."""
        read = self._missing_share(placement) * read_share(placement.keep)
        return read * sum(w.rows * w.chunk_bytes for w in self.records)

    def resident_bytes(self, placement: NeuronPlacement) -> int:
        """Bytes of the predictor weights that a placement loads."""
        return sum(w.stored_bytes for w in self.predictors if w.id in set(placement.resident))

    @property
    def _staging_least_bytes(self) -> int:
        return max((2 * (_page(w.chunk_bytes) + _PAGE_BYTES) for w in self.records), default=0)


def _page(n_bytes: int) -> int:
    return -(-n_bytes // _PAGE_BYTES) * _PAGE_BYTES


def _tables(records: Sequence[Weight], slots: Sequence[int]) -> int:
    """As the core counts them (cpp/store/neuron_window.cc)."""
    windowed = [(w.rows, n) for w, n in zip(records, slots, strict=True) if n < w.rows]
    if not windowed:
        return 0
    n_bytes = sum(_TABLE_PER_NEURON * rows + _TABLE_PER_SLOT * n for rows, n in windowed)
    n_bytes += _TURN_PER_NEURON * max(rows for rows, _ in windowed) + _TURN_PER_SLOT * max(
        n for _, n in windowed
    )
    return _page(n_bytes)


def _share_out(records: Sequence[Weight], use: Sequence[float], room_bytes: int) -> list[int]:
    """Slots per layer, in proportion to its use; what a full layer leaves goes to the others."""
    slots = [0] * len(records)
    left = max(0, room_bytes)
    open_layers = [i for i in range(len(records)) if use[i] > 0]
    while open_layers and left > 0:
        total = sum(use[i] for i in open_layers)
        portion = left / total
        full = []
        for i in open_layers:
            cost = records[i].chunk_bytes + _TABLE_PER_SLOT + _TURN_PER_SLOT
            n = min(int(portion * use[i]) // cost, records[i].rows - slots[i])
            slots[i] += n
            left -= n * cost
            if slots[i] == records[i].rows:
                full.append(i)
        if not full:
            break
        open_layers = [i for i in open_layers if i not in full]
    return slots
