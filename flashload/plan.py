"""(model, memory, context) -> where each weight lives, decided from the pack's directory before anything is loaded."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashload.errors import ArgumentError, BudgetError
from flashload.machine import format_bytes
from flashload.plan_kv import KvOnFlash, kv_on_flash, kv_type_of
from flashload.plan_neurons import ACTIVE_SHARE, Guess, NeuronModel, NeuronPlacement, is_extra, is_neurons

if TYPE_CHECKING:
    from flashload.format import PackFile

RESIDENT, STREAM, DEMAND, NEURONS, UNUSED = 0, 1, 2, 3, 4
#: Formats of plain vectors and blobs (see flashload.format).
_VECTOR, _BLOB = 100, 101
_PAGE_BYTES = 4096
#: Growth of the interpreter while it generates, thread stacks, I/O rings.
_MARGIN_BYTES = 8 << 20
#: The kernel charges a page table of 4 KiB for every 2 MiB.
_PAGE_TABLE_SHARE = 512
#: Parts of layer weights (cpp/store/stream_part.cc) the ring holds at least: two leased together (gate and up, where
#: they come whole), and a gap where the next does not fit before the end; and how many let the drive run ahead.
_RING_LEAST, _RING_AHEAD = 3, 4
#: What is on its way and what the drive brings while held weights are computed with: 16 ms of a fast one. Measured:
#: half as much costs a tenth of the rate, more brings nothing.
_RING_BYTES = 64 << 20
_PART_BYTES = 2 << 20
_SLACK_BYTES = 256 << 10
_MAX_ROWS = (128, 64, 32, 16, 8)
#: One that is computed with, one that arrives.
_LEAST_EXPERTS = 2
#: Rows that share one reading of a layer's neurons.
_NEURON_ROWS = 64


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


@dataclass(frozen=True)
class Plan:
    """Placement of every weight and the bytes each part takes.

    ``predicted_peak_bytes`` is what the process (command line) or edge's share of it (library) will hold.
    ``neuron_mode`` is empty for a pack without neurons, else who decides which are active (flashload.plan_neurons);
    ``slab_bytes`` are the records with a slot, per layer that has them.
    """

    memory_bytes: int
    context: int
    threads: int
    max_rows: int
    placement: str
    host_bytes: int
    resident_bytes: int
    stream_bytes: int
    ring_bytes: int
    demand_bytes: int
    kv_bytes: int
    activation_bytes: int
    floor_bytes: int
    placements: list[int] = field(repr=False)
    stream_order: list[int] = field(repr=False)
    neuron_mode: str = ""
    #: Share of a layer's energy for which records without a slot are read (mode "lean").
    neuron_keep: float = 1.0
    neuron_bytes: int = 0
    neuron_staging_bytes: int = 0
    neuron_slots: list[int] = field(default_factory=list, repr=False)
    slab_bytes: list[int] = field(default_factory=list, repr=False)
    #: Experts that the demand cache holds at a time; 0 when all are in memory, or there are none.
    expert_slots: int = 0
    #: Experts that one token uses, all layers: the working set that the cache is measured in.
    experts_per_token: int = 0
    #: Read from the drive for a token, on average over a context that fills, every expert being as likely.
    flash_bytes_per_token: int = 0
    #: Rounding of blocks, and what a sampler keeps.
    slack_bytes: int = _SLACK_BYTES
    #: How keys and values are kept when they are not all in memory; ``kv_bytes`` is then the part in memory.
    kv_on_flash: KvOnFlash | None = None
    #: What keys and values are held as (flashload.plan_kv).
    kv_type: str = "f16"

    @property
    def shares_kv(self) -> bool:
        """Whether texts can share pages: those in a file have one owner, and the f16 tail of int4 has room for one."""
        return self.kv_on_flash is None and self.kv_type != "int4"

    @property
    def core_bytes(self) -> int:
        """What the core may reserve."""
        weights = self.resident_bytes + self.ring_bytes + self.demand_bytes
        neurons = self.neuron_bytes + self.neuron_staging_bytes
        return weights + neurons + self.kv_bytes + self.activation_bytes + self.slack_bytes

    @property
    def predicted_peak_bytes(self) -> int:
        return self.host_bytes + self.core_bytes

    def engine_options(
        self, pack_path: str | Path, decoder: dict[str, Any], *, scratch: str | Path = "", **changes: Any
    ) -> dict[str, Any]:
        """What ``_edge.Engine`` is opened with to do as planned.

        Args:
            scratch: folder for keys and values that are not in memory.
            changes: options, by the core's names, that are to be otherwise than planned or usual.
        """
        options = {
            "pack_path": str(pack_path),
            "decoder": decoder,
            "placement": self.placements,
            "stream_order": self.stream_order,
            "ring_bytes": self.ring_bytes,
            "demand_bytes": self.demand_bytes,
            "neuron_slots": self.neuron_slots,
            "neuron_bytes": self.neuron_bytes,
            "neuron_keep": self.neuron_keep,
            "neuron_staging_bytes": self.neuron_staging_bytes,
            "io_engine": "auto",
            "threads": self.threads,
            "isa": "",
            "context": self.context,
            "max_rows": self.max_rows,
            "budget_bytes": self.core_bytes,
        }
        if self.kv_on_flash is not None:
            options["kv"] = self.kv_on_flash.options(str(scratch))
        return options | changes

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the per-weight lists."""
        keys = (
            "memory_bytes context threads max_rows placement host_bytes resident_bytes stream_bytes ring_bytes "
            "demand_bytes kv_bytes activation_bytes floor_bytes neuron_mode neuron_keep neuron_bytes "
            "neuron_staging_bytes slab_bytes expert_slots experts_per_token slack_bytes "
            "flash_bytes_per_token"
        )
        return {key: getattr(self, key) for key in keys.split()} | {
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "kv": "flash" if self.kv_on_flash else "memory",
            "kv_type": self.kv_type,
            "kv_file_bytes": self.kv_on_flash.file_bytes if self.kv_on_flash else 0,
        }


def _round_up(n_bytes: int) -> int:
    return -(-n_bytes // _PAGE_BYTES) * _PAGE_BYTES


def _is_matrix(weight: Weight) -> bool:
    return weight.format not in (_VECTOR, _BLOB)


class Directory:
    """A model's weights, sorted by what may be done with each: what all its plans begin with.

    Args:
        weights: the directory in file order, which is the order a pass reads them.
        decoder: DecoderConfig as a dict.
    """

    def __init__(self, weights: Sequence[Weight], decoder: dict[str, Any]) -> None:
        self.entries = weights
        # Other functions than ReLU leave no neuron at zero.
        self.neurons = NeuronModel(weights, ACTIVE_SHARE if decoder["activation"] == "relu" else 1.0)
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
        self.layers = [w for w in matrices if w.id not in known]
        self.largest_bytes = max((_part_bytes(w) for w in self.layers), default=0)
        #: A ring that lets the drive run ahead.
        self.ring_bytes = max(
            _RING_AHEAD * self.largest_bytes,
            min(_RING_BYTES, _RING_AHEAD * max((w.stored_bytes for w in self.layers), default=0)),
        )

    def with_thresholds(self, active_share: float) -> Directory:
        """The same for a core that is given thresholds of all neurons, which leave this share of them active."""
        other = copy(self)
        other.neurons = NeuronModel(self.entries, active_share)
        n_neurons = int(self.decoder["n_layers"]) * int(self.decoder["intermediate_size"])
        other.thresholds_bytes = _round_up(4 * n_neurons)
        return other

    def with_kv_type(self, kv_type: str) -> Directory:
        """The same with keys and values held as one of :data:`flashload.plan_kv.KV_TYPES`."""
        other = copy(self)
        other.decoder = self.decoder | {"kv_type": kv_type}
        return other

    @property
    def ring_with_head_bytes(self) -> int:
        """The head is leased alone: room for it, and for the first weight of the next pass."""
        return max(_RING_LEAST * self.largest_bytes, _bytes(self.head) + self.largest_bytes)

    @property
    def demand_bytes(self) -> int:
        """The least a demand cache works with: a row's chunks of each table, and two experts."""
        return _row_bytes(self.tables) + _LEAST_EXPERTS * self.expert_bytes

    def least_bytes(self, predictor: Guess) -> int:
        """Weights, ring and caches at their smallest: the head streamed as well, or (a tiny one) held."""
        streamed = self.ring_with_head_bytes + _row_bytes(self.tied)
        held = _bytes(self.head) + _RING_LEAST * self.largest_bytes
        neurons = 0
        if self.neurons.records:
            neurons = min(self.neurons.least_bytes(mode) for mode in self.neurons.modes(predictor))
        return _bytes(self.fixed) + min(streamed, held) + self.demand_bytes + neurons + _SLACK_BYTES


def _bytes(weights: Sequence[Weight]) -> int:
    return sum(w.stored_bytes for w in weights)


def _part_bytes(weight: Weight) -> int:
    """Ring that a weight of a layer needs at once: all of it, or its largest part."""
    if weight.stored_bytes <= _PART_BYTES:
        return weight.stored_bytes
    tile_bytes = -(-16 * weight.stored_bytes // max(weight.rows, 16))
    most = max(_PART_BYTES, 2 * tile_bytes)
    part_bytes = min(weight.stored_bytes, -(-most // weight.chunk_bytes) * weight.chunk_bytes)
    return part_bytes + _round_up(tile_bytes)


def _row_bytes(tables: Sequence[Weight]) -> int:
    """Room to look up one row of each table."""
    return _round_up(sum(-(-16 * w.stored_bytes // max(w.rows, 16)) + 3 * w.chunk_bytes for w in tables))


def _spread(weights: Sequence[Weight], room_bytes: int) -> list[Weight]:
    """The weights to stream so that the rest fits ``room_bytes``, spread evenly over the pass.

    An even spread keeps the drive's demand uniform against the compute it hides behind, which a small ring can follow.
    """
    total = _bytes(weights)
    excess = max(0, total - room_bytes)
    streamed: list[Weight] = []
    streamed_bytes = 0
    seen_bytes = 0
    for weight in weights:
        seen_bytes += weight.stored_bytes
        due = excess * seen_bytes / total if total else 0
        if due - streamed_bytes > weight.stored_bytes / 2:
            streamed.append(weight)
            streamed_bytes += weight.stored_bytes
    # Rounding may leave a little too much pinned: stream the smallest weights that mend it.
    chosen = {w.id for w in streamed}
    rest = sorted((w for w in weights if w.id not in chosen), key=lambda w: w.stored_bytes)
    while streamed_bytes < excess and rest:
        short = excess - streamed_bytes
        weight = next((w for w in rest if w.stored_bytes >= short), rest[-1])
        rest.remove(weight)
        streamed.append(weight)
        streamed_bytes += weight.stored_bytes
    return sorted(streamed, key=lambda w: w.id)


def make_plan(
    weights: Sequence[Weight],
    decoder: dict[str, Any],
    *,
    memory_bytes: int,
    context: int,
    threads: int,
    host_bytes: int,
    host_peak_bytes: int = 0,
    predictor: Guess = True,
    kv: str = "memory",
) -> Plan:
    """:func:`place` for weights of which only one plan is made."""
    return place(
        Directory(weights, decoder),
        memory_bytes=memory_bytes,
        context=context,
        threads=threads,
        host_bytes=host_bytes,
        host_peak_bytes=host_peak_bytes,
        predictor=predictor,
        kv=kv,
    )


def place(
    model: Directory,
    *,
    memory_bytes: int,
    context: int,
    threads: int,
    host_bytes: int,
    host_peak_bytes: int = 0,
    predictor: Guess = True,
    kv: str = "memory",
) -> Plan:
    """Places every weight for one budget.

    Args:
        memory_bytes: the ceiling.
        context: tokens of KV cache.
        threads: compute threads.
        host_bytes: memory already held when loading starts (interpreter, tokenizer).
        host_peak_bytes: the most that was held until then (while the tokenizer was built, or a checkpoint packed).
        predictor: a pack's predictor may decide which neurons are active where memory is short, at a small loss;
            "on": it decides however much memory there is; a share: see :data:`flashload.plan_neurons.Guess`.
        kv: "memory"; "flash" keeps a share of the context's keys and values in memory and the rest in a file.

    Raises:
        BudgetError: the budget is below the floor; the message names the floor and what would lower it.
        ArgumentError: predictor "on" or a share for a pack without predictors.
    """
    import _edge

    weights, decoder = model.entries, model.decoder
    guided = predictor == "on"
    if (guided or isinstance(predictor, float)) and not model.neurons.predictors:
        raise ArgumentError("predictor: expected a pack with predictors, found none (edge train-predictor)")
    whole = model.neurons.whole(guided) if model.neurons.records else None
    dense_bytes = _bytes([w for w in model.weights if w.format != _BLOB])
    dense_bytes += model.neurons.resident_bytes(whole) if whole else 0
    everything = dense_bytes + _SLACK_BYTES + (whole.bytes if whole else 0)
    host_bytes += _MARGIN_BYTES + everything // _PAGE_TABLE_SHARE

    least_weights = min(everything, model.least_bytes(predictor))
    on_flash: KvOnFlash | None = None

    def fixed(max_rows: int, spare_bytes: int = 0, left_over_bytes: int = 0) -> tuple[int, int]:
        nonlocal on_flash
        if kv == "flash":
            on_flash = kv_on_flash(decoder, context, max_rows, threads, spare_bytes, left_over_bytes)
            return on_flash.memory_bytes, on_flash.activation_bytes + model.thresholds_bytes
        pages, activations, logits = _edge.fixed_bytes(decoder, context, max_rows, threads)
        return _round_up(pages), _round_up(activations) + _round_up(logits) + model.thresholds_bytes

    floor_bytes = host_bytes + sum(fixed(_MAX_ROWS[-1])) + least_weights
    floor_bytes = max(floor_bytes, host_peak_bytes)

    def fixed_within(max_rows: int) -> tuple[int, int]:
        free = memory_bytes - host_bytes - sum(fixed(max_rows))
        return fixed(max_rows, free - least_weights, free - everything)

    def holds_all(max_rows: int) -> bool:
        return everything <= memory_bytes - host_bytes - sum(fixed_within(max_rows))

    # Shorter prompt chunks are a small price for neurons that are all in memory.
    fitting = [rows for rows in _MAX_ROWS if holds_all(rows)] if whole else []
    for max_rows in fitting[:1] or _MAX_ROWS:
        kv_bytes, activations = fixed_within(max_rows)
        room = memory_bytes - host_bytes - kv_bytes - activations
        if everything <= room:
            placed = _Placed("resident", dense_bytes, [], 0, 0, whole)
            break
        if whole is None:
            streaming = _stream(model, room)
        elif max_rows <= _NEURON_ROWS:
            streaming = _window(model, room, predictor)
        else:
            continue
        # Fewer rows per pass only when more would crowd the weights out.
        if streaming is not None and (activations <= memory_bytes // 12 or max_rows == _MAX_ROWS[-1]):
            placed = streaming
            break
    if memory_bytes < host_peak_bytes or (everything > room and streaming is None):
        raise _too_small(memory_bytes, floor_bytes, context, kv_bytes, kv, kv_type_of(decoder))

    placements = [RESIDENT] * len(weights)
    if placed.demand_bytes:
        for weight in model.tables + model.experts:
            placements[weight.id] = DEMAND
    for weight in placed.streamed:
        placements[weight.id] = STREAM
    for unused in model.unused:
        placements[unused] = UNUSED
    neurons = placed.neurons or NeuronPlacement("", {}, 0, 0)
    for loaded in neurons.resident:
        placements[loaded] = RESIDENT
    neuron_slots = [0] * len(weights) if neurons.slots else []
    for held, n_slots in neurons.slots.items():
        placements[held] = NEURONS
        neuron_slots[held] = n_slots
    return Plan(
        memory_bytes=memory_bytes,
        context=context,
        threads=threads,
        max_rows=max_rows,
        placement=placed.name,
        host_bytes=host_bytes,
        resident_bytes=placed.resident_bytes,
        stream_bytes=_bytes(placed.streamed),
        ring_bytes=placed.ring_bytes,
        demand_bytes=placed.demand_bytes,
        kv_bytes=kv_bytes,
        activation_bytes=activations,
        floor_bytes=min(floor_bytes, memory_bytes),
        placements=placements,
        stream_order=[w.id for w in placed.streamed],
        neuron_mode=neurons.mode,
        neuron_keep=neurons.keep,
        neuron_bytes=neurons.bytes,
        neuron_staging_bytes=neurons.staging_bytes,
        neuron_slots=neuron_slots,
        slab_bytes=[neuron_slots[w.id] * w.chunk_bytes for w in model.neurons.records]
        if neuron_slots
        else [],
        expert_slots=placed.expert_slots,
        experts_per_token=model.experts_per_token,
        flash_bytes_per_token=_flash_bytes_per_token(model, placed, on_flash, context),
        kv_on_flash=on_flash,
        kv_type=kv_type_of(decoder),
    )


@dataclass(frozen=True)
class _Placed:
    """One way to fit the weights into some room."""

    name: str
    resident_bytes: int
    streamed: list[Weight]
    ring_bytes: int
    demand_bytes: int
    neurons: NeuronPlacement | None = None
    expert_slots: int = 0


def _flash_bytes_per_token(model: Directory, placed: _Placed, kv: KvOnFlash | None, context: int) -> int:
    n_bytes = float(_bytes(placed.streamed))
    if placed.expert_slots:
        missing = 1 - placed.expert_slots / model.n_experts
        n_bytes += model.experts_per_token * missing * model.expert_bytes
    if placed.neurons is not None:
        n_bytes += model.neurons.read_bytes(placed.neurons)
    if kv is not None:
        n_bytes += kv.mean_read_bytes(model.decoder["windows"], context)
    return round(n_bytes)


def _window(model: Directory, room_bytes: int, predictor: Guess) -> _Placed | None:
    """Records of neurons in slots, everything else in memory; where that is too much, the rest streams as well.

    A byte of attention that streams is read for every token, one of a record only when its neuron is active: so slots
    get what the rest leaves.
    """
    neurons = model.neurons
    held_bytes = _bytes(model.fixed) + _bytes(model.layers) + _bytes(model.head)
    modes = neurons.modes(predictor)
    keep = predictor if isinstance(predictor, float) else 1.0
    slot_room = room_bytes - held_bytes - model.demand_bytes - _SLACK_BYTES
    fitting = {mode: neurons.window(mode, slot_room, keep) for mode in modes}
    chosen, guess = fitting.get("exact", fitting.get("lean")), fitting.get("predictor")
    if guess is not None and (chosen is None or neurons.predictor_pays(guess, chosen)):
        chosen = guess
    if chosen is not None:
        held_bytes += neurons.resident_bytes(chosen)
        return _Placed("neurons", held_bytes, [], 0, model.demand_bytes, chosen)
    for mode, ahead_bytes in itertools.product(modes, (neurons.ahead_bytes(room_bytes), 0)):
        least_bytes = neurons.least_bytes(mode) + ahead_bytes
        least = neurons.window(mode, least_bytes, keep)
        streaming = _stream(model, room_bytes - least_bytes)
        if least is not None and streaming is not None:
            resident_bytes = streaming.resident_bytes + neurons.resident_bytes(least)
            return replace(streaming, name="neurons", resident_bytes=resident_bytes, neurons=least)
    return None


def _stream(model: Directory, room_bytes: int) -> _Placed | None:
    """What stays and what streams when not everything fits; None when nothing helps."""
    always = _bytes(model.layers) + _bytes(model.head)
    room_bytes -= _SLACK_BYTES + _bytes(model.fixed) + model.demand_bytes
    held = _bytes(model.fixed)
    if model.experts and always <= room_bytes:
        # Everything but the experts is read for every token; what is left goes to as many experts as it holds whole.
        slots = min(_LEAST_EXPERTS + (room_bytes - always) // model.expert_bytes, model.n_experts)
        demand_bytes = _row_bytes(model.tables) + slots * model.expert_bytes
        return _Placed("experts", held + always, [], 0, demand_bytes, expert_slots=slots)
    # The head stays if it can: a prompt chunk that needs no logits would stream it for nothing.
    for streamable, ring_bytes, row_bytes in (
        (model.layers, model.ring_bytes, 0),
        (model.layers, _RING_LEAST * model.largest_bytes, 0),
        (model.layers + model.head, model.ring_with_head_bytes, _row_bytes(model.tied)),
    ):
        pinned = always - _bytes(streamable)
        if pinned + ring_bytes + row_bytes <= room_bytes:
            streamed = _spread(streamable, room_bytes - pinned - ring_bytes - row_bytes)
            resident = held + always - _bytes(streamed)
            name = "stream" if streamed else "resident"
            demand_bytes = model.demand_bytes + row_bytes
            slots = _LEAST_EXPERTS if model.experts else 0
            return _Placed(
                name, resident, streamed, ring_bytes if streamed else 0, demand_bytes, expert_slots=slots
            )
    return None


def _too_small(
    memory_bytes: int, floor_bytes: int, context: int, kv_bytes: int, kv: str, kv_type: str
) -> BudgetError:
    held = f"{format_bytes(kv_bytes)} of keys and values" + (" beside a file" if kv == "flash" else "")
    ways = [f"a shorter context (now {context} tokens, {held})"]
    if kv_type == "f16":
        ways.append("keys and values of 8 bits (--kv-type int8)")
    ways.append("fewer weight bits (edge pack --weights q4)")
    error = BudgetError(
        f"memory: {memory_bytes} bytes ({format_bytes(memory_bytes)}) are too few: this model needs at least "
        f"{floor_bytes} bytes ({format_bytes(floor_bytes)}) even with every layer streamed; what would lower it: "
        + ", ".join(ways)
    )
    error.floor_bytes = floor_bytes
    return error


def directory_of(pack: PackFile) -> Directory:
    """The directory of a pack, ready to be planned."""
    return Directory(weights_of(pack), pack.config.to_json())


def weights_of(pack: PackFile) -> list[Weight]:
    """The directory of a pack in the plan's terms."""
    return [
        Weight(i, e.name, e.layer, e.expert, int(e.format), _round_up(e.bytes), e.rows, e.chunk_bytes)
        for i, e in enumerate(pack.entries.values())
    ]
