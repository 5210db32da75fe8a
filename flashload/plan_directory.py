"""What a plan is made of: a pack's directory, its weights sorted by what may be done with each, and their sizes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flashload.neuron_use import neuron_use
from flashload.plan_neurons import Guess, NeuronModel, is_extra, is_neurons

if TYPE_CHECKING:
    from flashload.format import PackFile

#: Formats of plain vectors and blobs (see flashload.format).
_VECTOR, BLOB = 100, 101
_PAGE_BYTES = 4096
#: Parts of layer weights (cpp/store/stream_part.cc) the ring holds at least, and how many let the drive run ahead.
_RING_LEAST, _RING_AHEAD = 3, 4
#: Of a layer, what is multiplied with the same rows: as much of it as comes whole is leased together.
_TOGETHER = (("q", "k", "v"), ("gate", "up"))
#: What is on its way and what the drive brings while held weights are computed with: 16 ms of a fast one. Measured:
#: half as much costs a tenth of the rate, more brings nothing.
_RING_BYTES = 64 << 20
_PART_BYTES = 2 << 20
#: Rounding of blocks, and what a sampler keeps.
SLACK_BYTES = 256 << 10
#: One that is computed with, one that arrives.
LEAST_EXPERTS = 2


@dataclass(frozen=True)
class Weight:
    """One entry of the directory as the plan sees it."""

    id: int
    name: str
    layer: int
    expert: int
    format: int
    stored_bytes: int
    rows: int
    chunk_bytes: int


def round_up(n_bytes: int) -> int:
    return -(-n_bytes // _PAGE_BYTES) * _PAGE_BYTES


def _is_matrix(weight: Weight) -> bool:
    return weight.format not in (_VECTOR, BLOB)


class Directory:
    """A model's weights, sorted by what may be done with each: what all its plans begin with.

    Args:
        weights: the directory in file order, which is the order a pass reads them.
        decoder: DecoderConfig as a dict.
        metadata: the pack's, which may say how texts use its neurons.
    """

    def __init__(
        self, weights: Sequence[Weight], decoder: dict[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.entries = weights
        self.neurons = NeuronModel(weights, neuron_use(metadata or {}, decoder["activation"]))
        self.decoder = decoder | {"by_neuron": bool(self.neurons.records)}
        #: Of neurons' activations, where the core is given them (flashload.sparsity).
        self.thresholds_bytes = 0
        self.unused = {w.id for w in weights if is_extra(w.name)} | {w.id for w in self.neurons.gates}
        weights = [w for w in weights if not (is_extra(w.name) or is_neurons(w.name))]
        self.weights = weights
        matrices = [w for w in weights if _is_matrix(w)]
        self.fixed = [w for w in weights if w.format == _VECTOR or w.name.endswith("router.weight")]
        self.experts = [w for w in matrices if w.expert >= 0]
        #: Only a few rows per token are needed of these; a tied embedding is also the head, read whole.
        self.tables = [w for w in matrices if w.name in ("embed.weight", "embed.position")]
        self.head = [w for w in matrices if w.name == "head.weight"]
        #: Rows are looked up in these while they stream as the head.
        self.tied: list[Weight] = []
        if decoder["tied_head"]:
            self.head = [w for w in self.tables if w.name == "embed.weight"]
            self.tied = self.head
            self.tables = [w for w in self.tables if w.name != "embed.weight"]
        #: The largest expert, one record of three weights: the cache gives each as much (cpp/store/demand_cache.cc).
        records: Counter[tuple[int, int]] = Counter()
        for weight in self.experts:
            records[weight.layer, weight.expert] += weight.stored_bytes
        self.n_experts, self.expert_bytes = len(records), max(records.values(), default=0)
        n_layers = len({layer for layer, _ in records})
        self.experts_per_token = n_layers * int(decoder["experts_per_token"]) if n_layers else 0
        known = {w.id for w in self.fixed + self.experts + self.tables + self.head}
        #: What every pass reads of the layers, whatever the text, and may stream.
        self.layers = [w for w in matrices if w.id not in known]

    def deciding_by(self, mode: str) -> Directory:
        """The same where this decides which neurons are active (flashload.plan_neurons): gate rows may stream too."""
        if mode != "exact":
            return self
        other = copy(self)
        streamable = {w.id for w in self.layers} | {w.id for w in self.neurons.gates}
        other.layers = [w for w in self.entries if w.id in streamable]
        return other

    def with_thresholds(self, active_share: float) -> Directory:
        """The same for a core that is given thresholds of all neurons, which leave this share of them active."""
        other = copy(self)
        other.neurons = NeuronModel(self.entries, replace(self.neurons.use, active_share=active_share))
        n_neurons = int(self.decoder["n_layers"]) * int(self.decoder["intermediate_size"])
        other.thresholds_bytes = round_up(4 * n_neurons)
        return other

    def with_kv_type(self, kv_type: str) -> Directory:
        """The same with keys and values held as one of :data:`flashload.plan_kv.KV_TYPES`."""
        other = copy(self)
        other.decoder = self.decoder | {"kv_type": kv_type}
        return other

    @property
    def largest_bytes(self) -> int:
        """The most of a layer's weight that is in the ring at once."""
        return max((part_bytes(w) for w in self.layers), default=0)

    @property
    def ring_least_bytes(self) -> int:
        """Room for what is leased together, and for a gap where the next does not fit before the end."""
        leased_bytes = (_leased_bytes(self.layers, names) for names in _TOGETHER)
        return max(_RING_LEAST * self.largest_bytes, max(leased_bytes) + self.largest_bytes)

    @property
    def ring_bytes(self) -> int:
        """A ring that lets the drive run ahead."""
        longest_bytes = max((w.stored_bytes for w in self.layers), default=0)
        return max(_RING_AHEAD * self.largest_bytes, min(_RING_BYTES, _RING_AHEAD * longest_bytes))

    @property
    def ring_with_head_bytes(self) -> int:
        """The head is leased alone: room for it, and for the first weight of the next pass."""
        return max(self.ring_least_bytes, total_bytes(self.head) + self.largest_bytes)

    @property
    def demand_bytes(self) -> int:
        """The least a demand cache works with: a row's chunks of each table, and two experts."""
        return row_bytes(self.tables) + LEAST_EXPERTS * self.expert_bytes

    def least_bytes(self, predictor: Guess) -> int:
        """Weights, ring and caches at their smallest: the head streamed as well, or (a tiny one) held."""
        least = total_bytes(self.fixed) + self.demand_bytes + SLACK_BYTES
        if not self.neurons.records:
            return least + self._least_stream_bytes
        modes = self.neurons.modes(predictor)
        return least + min(
            self.deciding_by(m)._least_stream_bytes + self.neurons.least_bytes(m, gates=[]) for m in modes
        )

    @property
    def _least_stream_bytes(self) -> int:
        streamed = self.ring_with_head_bytes + row_bytes(self.tied)
        return min(streamed, total_bytes(self.head) + self.ring_least_bytes)


def total_bytes(weights: Sequence[Weight]) -> int:
    return sum(w.stored_bytes for w in weights)


def _leased_bytes(layers: Sequence[Weight], names: Sequence[str]) -> int:
    """The most of some weights of a layer that the core leases at a time: the whole ones, and one part."""
    whole: Counter[int] = Counter()
    parts: Counter[int] = Counter()
    for weight in layers:
        if weight.name.split(".")[2:] not in ([name, "weight"] for name in names):
            continue
        if weight.stored_bytes <= _PART_BYTES:
            whole[weight.layer] += weight.stored_bytes
        else:
            parts[weight.layer] = max(parts[weight.layer], part_bytes(weight))
    return max((whole[layer] + parts[layer] for layer in whole | parts), default=0)


def part_bytes(weight: Weight) -> int:
    """Ring that a weight of a layer needs at once: all of it, or its largest part."""
    if weight.stored_bytes <= _PART_BYTES:
        return weight.stored_bytes
    by_neuron = is_neurons(weight.name)
    tile_bytes = weight.chunk_bytes if by_neuron else -(-16 * weight.stored_bytes // max(weight.rows, 16))
    # What can be read and checked by itself; where it holds whole tiles no part begins inside one.
    unit_bytes = math.lcm(weight.chunk_bytes, _PAGE_BYTES)
    part_bytes = -(-max(_PART_BYTES, 2 * tile_bytes) // unit_bytes) * unit_bytes
    return min(weight.stored_bytes, part_bytes) + (0 if by_neuron else round_up(tile_bytes))


def row_bytes(tables: Sequence[Weight]) -> int:
    """Room to look up one row of each table."""
    return round_up(sum(-(-16 * w.stored_bytes // max(w.rows, 16)) + 3 * w.chunk_bytes for w in tables))


def directory_of(pack: PackFile) -> Directory:
    """The directory of a pack, ready to be planned."""
    return Directory(weights_of(pack), pack.config.to_json(), pack.metadata)


def weights_of(pack: PackFile) -> list[Weight]:
    """The directory of a pack in the plan's terms."""
    return [
        Weight(i, e.name, e.layer, e.expert, int(e.format), round_up(e.bytes), e.rows, e.chunk_bytes)
        for i, e in enumerate(pack.entries.values())
    ]
