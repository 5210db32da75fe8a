"""(model, memory, context) -> where each weight lives, decided from the pack's directory before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashload.errors import ArgumentError, BudgetError
from flashload.machine import format_bytes
from flashload.plan_directory import (
    BLOB,
    SLACK_BYTES,
    Directory,
    Weight,
    directory_of,
    round_up,
    total_bytes,
    weights_of,
)
from flashload.plan_fit import Fit, fit_into
from flashload.plan_kv import KvOnFlash, kv_on_flash, kv_type_of
from flashload.plan_neurons import Guess, NeuronPlacement, is_neurons

__all__ = [
    "DEMAND",
    "NEURONS",
    "RESIDENT",
    "STREAM",
    "UNUSED",
    "Directory",
    "Plan",
    "Weight",
    "directory_of",
    "make_plan",
    "place",
    "weights_of",
]

RESIDENT, STREAM, DEMAND, NEURONS, UNUSED = 0, 1, 2, 3, 4
#: Growth of the interpreter while it generates, thread stacks, I/O rings.
_MARGIN_BYTES = 8 << 20
#: The kernel charges a page table of 4 KiB for every 2 MiB.
_PAGE_TABLE_SHARE = 512
_MAX_ROWS = (128, 64, 32, 16, 8)
#: Rows that share one reading of a layer's neurons.
_NEURON_ROWS = 64
#: Fewer rows per pass are taken where what they need at a time would be more than this share of the budget.
_ROWS_SHARE = 12


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
    #: And of each layer so many in any case, for they cost no time (flashload.lean).
    neuron_free_reads: int = 0
    neuron_bytes: int = 0
    neuron_staging_bytes: int = 0
    #: Of ``stream_bytes``, gate rows that did not fit (mode "exact").
    gate_stream_bytes: int = 0
    neuron_slots: list[int] = field(default_factory=list, repr=False)
    slab_bytes: list[int] = field(default_factory=list, repr=False)
    #: Experts that the demand cache holds at a time; 0 when all are in memory, or there are none.
    expert_slots: int = 0
    #: Experts that one token uses, all layers: the working set that the cache is measured in.
    experts_per_token: int = 0
    #: Read from the drive for a token, on average over a context that fills, every expert being as likely.
    flash_bytes_per_token: int = 0
    #: Rounding of blocks, and what a sampler keeps.
    slack_bytes: int = SLACK_BYTES
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
            "neuron_free_reads": self.neuron_free_reads,
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
            "demand_bytes kv_bytes activation_bytes floor_bytes neuron_mode neuron_keep neuron_free_reads "
            "neuron_bytes neuron_staging_bytes gate_stream_bytes slab_bytes expert_slots experts_per_token slack_bytes "
            "flash_bytes_per_token"
        )
        return {key: getattr(self, key) for key in keys.split()} | {
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "kv": "flash" if self.kv_on_flash else "memory",
            "kv_type": self.kv_type,
            "kv_file_bytes": self.kv_on_flash.file_bytes if self.kv_on_flash else 0,
        }


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
    sizes = _Sizes(model, context, threads, predictor, kv)
    host_bytes += _MARGIN_BYTES + sizes.everything_bytes // _PAGE_TABLE_SHARE
    max_rows, fixed, fit = sizes.fit(memory_bytes - host_bytes, memory_bytes // _ROWS_SHARE)
    floor_bytes = max(host_bytes + sizes.least_bytes, host_peak_bytes)
    if fit is None or memory_bytes < host_peak_bytes:
        raise _too_small(memory_bytes, floor_bytes, context, fixed.kv_bytes, kv, kv_type_of(model.decoder))
    neurons = fit.neurons or NeuronPlacement("", {}, 0, 0)
    neuron_slots = [neurons.slots.get(w.id, 0) for w in model.entries] if neurons.slots else []
    return Plan(
        memory_bytes=memory_bytes,
        context=context,
        threads=threads,
        max_rows=max_rows,
        placement=fit.name,
        host_bytes=host_bytes,
        resident_bytes=fit.resident_bytes,
        stream_bytes=total_bytes(fit.streamed),
        ring_bytes=fit.ring_bytes,
        demand_bytes=fit.demand_bytes,
        kv_bytes=fixed.kv_bytes,
        activation_bytes=fixed.activation_bytes,
        floor_bytes=min(floor_bytes, memory_bytes),
        placements=_placements(model, fit, neurons),
        stream_order=[w.id for w in fit.streamed],
        neuron_mode=neurons.mode,
        neuron_keep=neurons.keep,
        neuron_bytes=neurons.bytes,
        neuron_staging_bytes=neurons.staging_bytes,
        gate_stream_bytes=total_bytes([w for w in fit.streamed if is_neurons(w.name)]),
        neuron_slots=neuron_slots,
        slab_bytes=[neurons.slots[w.id] * w.chunk_bytes for w in model.neurons.records]
        if neuron_slots
        else [],
        expert_slots=fit.expert_slots,
        experts_per_token=model.experts_per_token,
        flash_bytes_per_token=_flash_bytes_per_token(model, fit, fixed.kv_on_flash, context),
        kv_on_flash=fixed.kv_on_flash,
        kv_type=kv_type_of(model.decoder),
    )


def _placements(model: Directory, fit: Fit, neurons: NeuronPlacement) -> list[int]:
    """By weight id."""
    placements = [RESIDENT] * len(model.entries)
    if fit.demand_bytes:
        for weight in model.tables + model.experts:
            placements[weight.id] = DEMAND
    for unused in model.unused:
        placements[unused] = UNUSED
    for weight in fit.streamed:
        placements[weight.id] = STREAM
    for loaded in neurons.resident:
        placements[loaded] = RESIDENT
    for held in neurons.slots:
        placements[held] = NEURONS
    return placements


@dataclass(frozen=True)
class _Fixed:
    """What a pass needs at a time whatever is done with weights: keys and values, activations, logits."""

    kv_bytes: int
    activation_bytes: int
    kv_on_flash: KvOnFlash | None = None

    @property
    def bytes(self) -> int:
        return self.kv_bytes + self.activation_bytes


class _Sizes:
    """What a model takes at one context: in memory all of it, at least, and besides its weights.

    Raises:
        ArgumentError: a predictor is to decide, and there is none.
    """

    def __init__(self, model: Directory, context: int, threads: int, predictor: Guess, kv: str) -> None:
        neurons = model.neurons
        guided = predictor == "on"
        if (guided or isinstance(predictor, float)) and not neurons.predictors:
            raise ArgumentError(
                "predictor: expected a pack with predictors, found none (edge train-predictor)"
            )
        self._model, self._context, self._threads = model, context, threads
        self._predictor, self._kv = predictor, kv
        self._whole = neurons.whole(guided) if neurons.records else None
        self._dense_bytes = total_bytes([w for w in model.weights if w.format != BLOB])
        if self._whole is not None:
            self._dense_bytes += neurons.resident_bytes(self._whole)
        self.everything_bytes = self._dense_bytes + SLACK_BYTES + (self._whole.bytes if self._whole else 0)
        self._least_weights = min(self.everything_bytes, model.least_bytes(predictor))

    @property
    def least_bytes(self) -> int:
        """The least that runs, what the host holds aside."""
        return self._fixed(_MAX_ROWS[-1]).bytes + self._least_weights

    def fit(self, room_bytes: int, most_activation_bytes: int) -> tuple[int, _Fixed, Fit | None]:
        """(rows of a pass, what they need, how the weights fit into the rest); None where they do not."""
        # Shorter prompt chunks are a small price for neurons that are all in memory.
        fitting = [rows for rows in _MAX_ROWS if self._holds_all(rows, room_bytes)] if self._whole else []
        for max_rows in fitting[:1] or _MAX_ROWS:
            fixed = self._fixed_within(max_rows, room_bytes)
            if self.everything_bytes <= room_bytes - fixed.bytes:
                return max_rows, fixed, Fit("resident", self._dense_bytes, [], 0, 0, self._whole)
            if self._whole is not None and max_rows > _NEURON_ROWS:
                continue
            fit = fit_into(self._model, room_bytes - fixed.bytes, self._predictor)
            # Fewer rows per pass only when more would crowd the weights out.
            if fit is not None and fixed.activation_bytes <= most_activation_bytes:
                break
        return max_rows, fixed, fit

    def _fixed(self, max_rows: int, spare_bytes: int = 0, left_over_bytes: int = 0) -> _Fixed:
        import _edge

        decoder, thresholds_bytes = self._model.decoder, self._model.thresholds_bytes
        if self._kv == "flash":
            kv = kv_on_flash(decoder, self._context, max_rows, self._threads, spare_bytes, left_over_bytes)
            return _Fixed(kv.memory_bytes, kv.activation_bytes + thresholds_bytes, kv)
        pages, activations, logits = _edge.fixed_bytes(decoder, self._context, max_rows, self._threads)
        return _Fixed(round_up(pages), round_up(activations) + round_up(logits) + thresholds_bytes)

    def _fixed_within(self, max_rows: int, room_bytes: int) -> _Fixed:
        free = room_bytes - self._fixed(max_rows).bytes
        return self._fixed(max_rows, free - self._least_weights, free - self.everything_bytes)

    def _holds_all(self, max_rows: int, room_bytes: int) -> bool:
        return self.everything_bytes <= room_bytes - self._fixed_within(max_rows, room_bytes).bytes


def _flash_bytes_per_token(model: Directory, placed: Fit, kv: KvOnFlash | None, context: int) -> int:
    n_bytes = float(total_bytes(placed.streamed))
    if placed.expert_slots:
        missing = 1 - placed.expert_slots / model.n_experts
        n_bytes += model.experts_per_token * missing * model.expert_bytes
    if placed.neurons is not None:
        n_bytes += model.neurons.read_bytes(placed.neurons)
    if kv is not None:
        n_bytes += kv.mean_read_bytes(model.decoder["windows"], context)
    return round(n_bytes)


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
