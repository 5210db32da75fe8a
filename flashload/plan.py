"""(model, memory, context) -> where each weight lives, decided from the pack's directory before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashload.errors import BudgetError
from flashload.machine import format_bytes

if TYPE_CHECKING:
    from flashload.format import PackFile

RESIDENT, STREAM, DEMAND = 0, 1, 2
#: Formats of plain vectors and blobs (see flashload.format).
_VECTOR, _BLOB = 100, 101
_PAGE_BYTES = 4096
#: Growth of the interpreter, thread stacks, I/O rings and the page tables of what is loaded.
_MARGIN_BYTES = 12 << 20
#: Weights the ring holds: two leased together (gate and up), and a gap where the next does not fit before the end.
_RING_LEAST = 3
#: Rounding of blocks, and what a sampler keeps.
_SLACK_BYTES = 256 << 10
_MAX_ROWS = (128, 64, 32, 16, 8)


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

    @property
    def core_bytes(self) -> int:
        """What the core may reserve."""
        return (
            self.resident_bytes + self.ring_bytes + self.demand_bytes + self.kv_bytes + self.activation_bytes
        )

    @property
    def predicted_peak_bytes(self) -> int:
        return self.host_bytes + self.core_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the per-weight lists."""
        keys = (
            "memory_bytes context threads max_rows placement host_bytes resident_bytes stream_bytes ring_bytes "
            "demand_bytes kv_bytes activation_bytes floor_bytes"
        )
        return {key: getattr(self, key) for key in keys.split()} | {
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "flash_bytes_per_token": self.stream_bytes,
        }


def _round_up(n_bytes: int) -> int:
    return -(-n_bytes // _PAGE_BYTES) * _PAGE_BYTES


def _is_matrix(weight: Weight) -> bool:
    return weight.format not in (_VECTOR, _BLOB)


class _Model:
    """The directory, sorted by what may be done with each weight."""

    def __init__(self, weights: Sequence[Weight], tied_head: bool) -> None:
        self.weights = weights
        matrices = [w for w in weights if _is_matrix(w)]
        self.fixed = [w for w in weights if w.format == _VECTOR or w.name.endswith("router.weight")]
        self.experts = [w for w in matrices if w.expert >= 0]
        #: Only a few rows per token are needed of these; a tied embedding is also the head, read whole.
        self.tables = [w for w in matrices if w.name in ("embed.weight", "embed.position")]
        self.head = [w for w in matrices if w.name == "head.weight"]
        if tied_head:
            self.head = [w for w in self.tables if w.name == "embed.weight"]
            self.tables = [w for w in self.tables if w.name != "embed.weight"]
        known = {w.id for w in self.fixed + self.experts + self.tables + self.head}
        self.layers = [w for w in matrices if w.id not in known]


def _bytes(weights: Sequence[Weight]) -> int:
    return sum(w.stored_bytes for w in weights)


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
) -> Plan:
    """Places every weight for one budget.

    Args:
        weights: the directory in file order, which is the order a pass reads them.
        decoder: DecoderConfig as a dict.
        memory_bytes: the ceiling.
        context: tokens of KV cache.
        threads: compute threads.
        host_bytes: memory already held when loading starts (interpreter, tokenizer).

    Raises:
        BudgetError: the budget is below the floor; the message names the floor and what would lower it.
    """
    import _edge

    model = _Model(weights, decoder["tied_head"])
    host_bytes += _MARGIN_BYTES
    largest = max((w.stored_bytes for w in model.layers + model.head), default=0)
    demand_floor = _demand_bytes(model)

    def fixed(max_rows: int) -> tuple[int, int]:
        kv, activations, logits = _edge.fixed_bytes(decoder, context, max_rows, threads)
        return _round_up(kv), _round_up(activations) + _round_up(logits)

    def floor(max_rows: int) -> int:
        kv, activations = fixed(max_rows)
        ring = _ring_bytes(largest, _RING_LEAST)
        return host_bytes + kv + activations + _bytes(model.fixed) + ring + demand_floor + _SLACK_BYTES

    everything = _bytes([w for w in weights if w.format != _BLOB])
    for max_rows in _MAX_ROWS:
        kv, activations = fixed(max_rows)
        room = memory_bytes - host_bytes - kv - activations
        # Fewer rows per pass only when more would crowd the weights out.
        if (
            everything + _SLACK_BYTES <= room
            or activations <= memory_bytes // 12
            or max_rows == _MAX_ROWS[-1]
        ):
            break
    floor_bytes = floor(_MAX_ROWS[-1])
    common = {
        "memory_bytes": memory_bytes,
        "context": context,
        "threads": threads,
        "max_rows": max_rows,
        "host_bytes": host_bytes,
        "kv_bytes": kv,
        "activation_bytes": activations,
    }
    placements = [RESIDENT] * len(weights)
    slack = _SLACK_BYTES
    if everything + slack <= room:
        return Plan(
            placement="resident", resident_bytes=everything + slack, stream_bytes=0, ring_bytes=0, demand_bytes=0,
            floor_bytes=min(floor_bytes, memory_bytes), placements=placements, stream_order=[], **common,
        )  # fmt: skip
    if room < 0 or memory_bytes < floor_bytes:
        raise _too_small(memory_bytes, floor_bytes, context, kv)

    for weight in model.tables + model.experts:
        placements[weight.id] = DEMAND
    room -= slack + _bytes(model.fixed) + demand_floor
    if model.experts:
        # Everything but the experts is read for every token; what is left goes to the expert cache.
        always = _bytes(model.layers) + _bytes(model.head)
        ring = 0 if always <= room else _ring_bytes(largest, _RING_LEAST)
        streamed = [] if ring == 0 else _spread(model.layers + model.head, room - ring)
    else:
        ring = _ring_bytes(largest, _RING_LEAST + (memory_bytes > floor_bytes + largest))
        # The head stays if it can: a prompt chunk that needs no logits would stream it for nothing.
        pinned_head = _bytes(model.head) if _bytes(model.head) <= room - ring else 0
        streamed = _spread(model.layers, room - ring - pinned_head)
        if not pinned_head:
            streamed += model.head
    for weight in streamed:
        placements[weight.id] = STREAM
    resident = [w for w in weights if w.format != _BLOB and placements[w.id] == RESIDENT]
    demand = demand_floor
    if model.experts:
        demand += max(0, room - ring - (_bytes(model.layers + model.head) - _bytes(streamed)))
    return Plan(
        placement="stream" if streamed else "experts" if model.experts else "resident",
        resident_bytes=_bytes(resident) + slack,
        stream_bytes=_bytes(streamed),
        ring_bytes=ring,
        demand_bytes=demand,
        floor_bytes=floor_bytes,
        placements=placements,
        stream_order=[w.id for w in streamed],
        **common,
    )


def _ring_bytes(largest_bytes: int, n_weights: int) -> int:
    return _round_up(n_weights * largest_bytes)


def _demand_bytes(model: _Model) -> int:
    """The least a demand cache works with: one row's chunks of each table, and one expert's three weights twice."""
    rows = sum(-(-16 * w.stored_bytes // max(w.rows, 16)) + 3 * w.chunk_bytes for w in model.tables)
    expert = 3 * max((w.stored_bytes for w in model.experts), default=0)
    return _round_up(rows) + 2 * expert


def _too_small(memory_bytes: int, floor_bytes: int, context: int, kv_bytes: int) -> BudgetError:
    ways = [f"a shorter context (now {context} tokens, {format_bytes(kv_bytes)} of keys and values)"]
    ways.append("fewer weight bits (edge pack --weights q4)")
    error = BudgetError(
        f"memory: {memory_bytes} bytes ({format_bytes(memory_bytes)}) are too few: this model needs at least "
        f"{floor_bytes} bytes ({format_bytes(floor_bytes)}) even with every layer streamed; what would lower it: "
        + ", ".join(ways)
    )
    error.floor_bytes = floor_bytes
    return error


def weights_of(pack: PackFile) -> list[Weight]:
    """The directory of a pack in the plan's terms."""
    return [
        Weight(i, e.name, e.layer, e.expert, int(e.format), _round_up(e.bytes), e.rows, e.chunk_bytes)
        for i, e in enumerate(pack.entries.values())
    ]
