"""What a model will do on this machine, told before anything is loaded: the options, and which one to take."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from edge.host import Host, prepare
from edge.models import resolve_model
from edge.options import SPARSITY, PlanOptions, check_sizes, guess_of
from edge.placing import place_host
from flashload.cache import cache_folder
from flashload.curve import Curve, Option
from flashload.errors import ArgumentError, BudgetError
from flashload.estimate import CostModel
from flashload.format import PackFile, is_pack
from flashload.lean import with_free_reads
from flashload.machine import cpu_count, format_bytes, parse_bytes, rss_bytes
from flashload.pack import WEIGHTS
from flashload.plan import Plan, directory_of
from flashload.plan_neurons import is_neurons
from flashload.probe import Machine, probe
from flashload.virtual_pack import Outline, VirtualPack, outline
from quant.formats import TILE_FORMATS
from quant.formats.neuron import NEURON_FORMATS

#: Rows of the table between the floor and everything.
_ROWS = 8
#: A placement this near to the speed of everything in memory counts as fitting.
_NEARLY = 0.7
#: How much faster fewer bits have to be where neither fits: they cost accuracy.
_WORTH_FEWER_BITS = 1.1
_DEFAULT_CONTEXT, _SMALLEST_DEFAULT_CONTEXT = 4096, 512


@dataclass(frozen=True)
class ModelPlan:
    """What :func:`edge.plan` found.

    Attributes:
        kind: "pack", "gguf", "hf" or "config".
        memory_bytes: the budget asked about.
        floor_bytes: the least memory that runs the weights asked for.
        plan: where each byte goes at that budget; None when the budget is below the floor.
        options: every choice of weights at budgets from its floor to all of it in memory, and at ``memory_bytes``.
        recommended: the option to take; when nothing fits ``memory_bytes``, the one that needs least.
        recommendation: the same in words.
        machine: what was measured of this machine.
    """

    model: str
    kind: str
    memory_bytes: int
    context: int
    threads: int
    weights: str
    floor_bytes: int
    plan: Plan | None
    options: list[Option]
    recommended: Option
    recommendation: str
    machine: Machine
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the weights asked for run inside ``memory_bytes``."""
        return self.plan is not None

    @property
    def chosen(self) -> Option | None:
        """The option of the weights and the memory asked for; None below the floor."""
        return next((o for o in self.at_memory if o.weights == self.weights), None)

    @property
    def at_memory(self) -> list[Option]:
        """The options at ``memory_bytes``."""
        return [o for o in self.options if o.memory_bytes == self.memory_bytes]

    @property
    def placement(self) -> str | None:
        return self.plan.placement if self.plan else None

    @property
    def predicted_peak_bytes(self) -> int | None:
        return self.plan.predicted_peak_bytes if self.plan else None

    @property
    def predicted_tokens_per_second(self) -> float | None:
        return self.chosen.predicted_tokens_per_second if self.chosen else None

    def to_dict(self) -> dict[str, Any]:
        """JSON form; the parts of ``plan`` are there when the budget is not below the floor."""
        drive = self.machine.drive
        return (self.plan.to_dict() if self.plan else {}) | {
            "model": self.model,
            "kind": self.kind,
            "memory_bytes": self.memory_bytes,
            "context": self.context,
            "threads": self.threads,
            "weights": self.weights,
            "floor_bytes": self.floor_bytes,
            "fits": self.fits,
            "predicted_tokens_per_second": self.predicted_tokens_per_second,
            "flash_bytes_per_token": self.chosen.flash_bytes_per_token if self.chosen else None,
            "options": [option.to_dict() for option in self.options],
            "recommended": self.recommended.to_dict()
            | {"within_memory": self.recommended.memory_bytes <= self.memory_bytes},
            "recommendation": self.recommendation,
            "machine": {
                "date": self.machine.date,
                "name": self.machine.name,
                "isa": self.machine.isa,
                "bus_bytes_per_second": self.machine.bus_bytes_per_second,
                "drive_bytes_per_second": drive.sequential_bytes_per_second,
                "drive_request_seconds": drive.request_seconds,
                "drive_measured": drive.measured,
            },
            "notes": self.notes,
        }


def _estimated_host(model: Outline, before_bytes: int, whole_process: bool) -> Host:
    """What an engine's process holds before weights, for a model that is not packed: the tokenizer is estimated."""
    import edge.engine
    import edge.tokenizer  # noqa: F401  what they import belongs to what the process holds

    base = rss_bytes() if whole_process else max(0, rss_bytes() - before_bytes)
    held, built = model.vocab_bytes
    # The plan asks a pack for nothing but its configuration and its entries.
    pack = cast(PackFile, model.packs["keep"])
    return Host(pack, directory_of(pack), cast(Any, None), base + held, base + built, 0.0)


def _shortest_context(longest: int) -> int:
    """The context edge.load ends at when a longer one would crowd the weights out."""
    context = min(longest, _DEFAULT_CONTEXT)
    while context // 2 >= _SMALLEST_DEFAULT_CONTEXT:
        context //= 2
    return context


def _bits(pack: VirtualPack) -> tuple[int, float]:
    """Bytes of all matrices, and their bits per weight."""
    matrices = [e for e in pack.entries.values() if e.format in TILE_FORMATS or e.format in NEURON_FORMATS]
    n_bytes = sum(e.bytes for e in matrices)
    return n_bytes, 8 * n_bytes / max(1, sum(e.rows * e.cols * max(1, e.neuron_parts) for e in matrices))


def _curve(
    option: str,
    model: Outline,
    host: Host,
    machine: Machine,
    wanted: PlanOptions,
) -> Curve:
    pack = model.packs[option]
    packed = host.holding(cast(PackFile, pack))

    def make(memory_bytes: int) -> Plan:
        reserved = place_host(packed, replace(wanted, memory=memory_bytes))
        return with_free_reads(reserved.plan, packed.directory, machine)

    weight_bytes, bits = _bits(pack)
    return Curve(
        option,
        make,
        CostModel(
            packed.directory.entries,
            packed.directory.decoder,
            machine,
            packed.directory.neurons.use,
        ),
        weight_bytes=weight_bytes,
        bits_per_weight=bits,
        needs_packing=model.kind == "pack" and option != "keep",
    )


def plan(
    model: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    context: int | None = None,
    threads: int | None = None,
    weights: str = "keep",
    kv: str = "auto",
    kv_type: str = "f16",
    sparsity: str = "off",
    predictor: str | float = "auto",
    whole_process: bool = False,
    probe_again: bool = False,
    on_probe: Callable[[], None] | None = None,
) -> ModelPlan:
    """Predicts speed and memory of a model from its header alone; nothing is loaded or packed.

    Args:
        model: a pack, a GGUF file, a Hugging Face folder, or one of which only ``config.json`` (and, better,
            ``model.safetensors.index.json``) is there; or a shipped model's name.
        memory, context, threads, weights, kv, kv_type, sparsity, predictor: as for :func:`edge.load`.
        whole_process: the budget bounds the whole process, as on the command line.
        probe_again: measure the machine (2 to 3 seconds) even when its figures are known.
        on_probe: called before the machine is measured.

    Raises:
        ModelFileError: the file is malformed, incomplete or not supported.
        ArgumentError: a parameter is out of range.

    A budget below the floor is no error: ``fits`` is False and ``floor_bytes`` says what is needed.
    """
    before_bytes = rss_bytes()
    if weights not in WEIGHTS:
        raise ArgumentError(f"weights: expected one of {', '.join(WEIGHTS)}, found {weights!r}")
    check_sizes(context, threads)
    if sparsity not in SPARSITY:
        raise ArgumentError(f"sparsity: expected one of {', '.join(SPARSITY)}, found {sparsity!r}")
    wanted = PlanOptions(memory, context, threads, kv, guess_of(predictor))
    if memory is not None:
        parse_bytes(memory)
    path = resolve_model(model)
    if is_pack(path):
        # Its tokenizer is built and measured first: what follows would count against it.
        host = prepare(path, whole_process=whole_process)
        host.pack.close()
        found = outline(path)
    else:
        found = outline(path)
        host = _estimated_host(found, before_bytes, whole_process)
    host = host.with_kv_type(kv_type)
    if sparsity == "on":
        host = host.sparse()
    memory_bytes = host.budget_bytes(memory)
    packed = host.holding(cast(PackFile, found.packs[weights]))
    placed: Plan | None = None
    try:
        placed = place_host(packed, replace(wanted, memory=memory_bytes)).plan
        context, n_threads = placed.context, placed.threads
    except BudgetError:
        context = context or _shortest_context(found.config.max_positions)
        n_threads = threads or cpu_count()
    machine = _measured(path, found, n_threads, probe_again, on_probe)
    placed = placed and with_free_reads(placed, packed.directory, machine)
    wanted = replace(wanted, context=context, threads=n_threads)
    curves = [_curve(option, found, host, machine, wanted) for option in WEIGHTS]
    asked = curves[WEIGHTS.index(weights)]
    options = _options(curves, memory_bytes)
    recommended, words = recommend(curves, memory_bytes)
    return ModelPlan(
        model=str(model),
        kind=found.kind,
        memory_bytes=memory_bytes,
        context=context,
        threads=n_threads,
        weights=weights,
        floor_bytes=asked.floor_bytes if placed is None else min(asked.floor_bytes, placed.memory_bytes),
        plan=placed,
        options=options,
        recommended=recommended,
        recommendation=words,
        machine=machine,
        notes=found.notes
        + _assumed(found, packed.directory.neurons.use.active_share)
        + machine.notes
        + ([machine.drive.note] if machine.drive.note else []),
    )


def _measured(
    path: Path, model: Outline, threads: int, again: bool, on_probe: Callable[[], None] | None
) -> Machine:
    """The machine, with the drive that the model's pack lies on or will lie on."""
    place = cache_folder() if model.kind != "pack" else path if path.is_dir() else path.parent
    files = [] if model.largest_file is None else [model.largest_file]
    formats = {int(entry.format) for pack in model.packs.values() for entry in pack.entries.values()}
    return probe(place, threads, files, force=again, formats=formats, on_measure=on_probe)


def _has_neurons(model: Outline) -> bool:
    return any(is_neurons(name) for name in model.packs["keep"].entries)


def _assumed(model: Outline, active_share: float) -> list[str]:
    """What of a model's speed lies in the text and not in its header."""
    notes = []
    if model.config.n_experts:
        notes.append(
            "every expert is taken to be equally likely, the slowest case: text that prefers some needs fewer reads"
        )
    if _has_neurons(model):
        notes.append(
            f"{100 * active_share:.0f} % of the neurons are taken to be active, some far more often than others"
        )
    return notes


def _options(curves: Sequence[Curve], memory_bytes: int) -> list[Option]:
    """Every choice of weights over one ladder of budgets, which begins and ends at a floor and at everything."""
    low = min(curve.floor_bytes for curve in curves)
    high = max(curve.resident_bytes for curve in curves)
    ladder = {low + (high - low) * i // (_ROWS - 1) for i in range(_ROWS)} | {memory_bytes}
    out = []
    for curve in curves:
        own = ladder | {curve.floor_bytes, curve.resident_bytes}
        found = (curve.at(budget) for budget in sorted(own))
        out += [option for option in found if option is not None]
    return out


def recommend(curves: Sequence[Curve], memory_bytes: int) -> tuple[Option, str]:
    """The option to take at one budget, and why, in words.

    The most exact weights that run about as fast as if all of them were in memory; where none do, the fastest. Weights
    that are not in the file at hand (a pack's with fewer bits) are spoken of, not chosen.
    """
    found = [(curve, option) for curve in curves if (option := curve.at(memory_bytes)) is not None]
    at_hand = [pair for pair in found if not pair[1].needs_packing]
    if not at_hand:
        least = min(
            (c for c in curves if c.weights == "keep" or not _repacked(c)), key=lambda c: c.floor_bytes
        )
        option = least.at(least.floor_bytes)
        assert option is not None
        short = f"{format_bytes(memory_bytes)} is too little: the least that runs is {format_bytes(least.floor_bytes)}"
        short += f", {_bits_text(option)}: {_speed(option)}"
        return option, short + _repack_hint(found, None)
    fitting = [o for c, o in at_hand if _fits(c, o)]
    exact = at_hand[0][1]
    best = fitting[0] if fitting else _fastest(exact, [o for _, o in at_hand])
    words = f"{'fits' if fitting else 'runs'} {_bits_text(best)}: {_speed(best)}"
    if not fitting:
        words += f", reading {format_bytes(best.flash_bytes_per_token)} per token from the drive"
    if exact.weights != best.weights:
        words += f"; exact {_bits_text(exact)}: {_speed(exact)}"
    if not fitting or best.weights != exact.weights:
        words += f"; all of it would be in memory from {format_bytes(exact.resident_bytes)}"
    return best, words + _repack_hint(found, best)


def _fastest(exact: Option, options: Sequence[Option]) -> Option:
    best = max(options, key=lambda option: option.predicted_tokens_per_second)
    gain = best.predicted_tokens_per_second / exact.predicted_tokens_per_second
    return best if gain >= _WORTH_FEWER_BITS else exact


def _repacked(curve: Curve) -> bool:
    return curve.weights != "keep" and curve.needs_packing


def _fits(curve: Curve, option: Option) -> bool:
    if option.placement == "resident":
        return True
    return option.predicted_tokens_per_second >= _NEARLY * curve.resident_tokens_per_second


def _repack_hint(found: Sequence[tuple[Curve, Option]], best: Option | None) -> str:
    """What packing again with fewer bits would bring, when that is worth a word."""
    speed = best.predicted_tokens_per_second if best else 0.0
    other = [
        o for c, o in found if o.needs_packing and _fits(c, o) and o.predicted_tokens_per_second > 1.3 * speed
    ]
    if not other:
        return ""
    return f"; packed again from its checkpoint with --weights {other[0].weights}: {_speed(other[0])}"


def _bits_text(option: Option) -> str:
    if option.weights == "keep":
        # Scales and a few finer matrices come on top of a format's bits.
        return f"at {int(option.bits_per_weight)} bits"
    return f"at {option.weights.removeprefix('q')} bits (--weights {option.weights})"


def _speed(option: Option) -> str:
    speed = option.predicted_tokens_per_second
    text = f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}" if speed >= 0.95 else f"{speed:.2g}"
    return f"{text} tok/s"
