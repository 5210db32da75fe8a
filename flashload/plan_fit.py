"""How weights fit into the room there is: what stays in memory, what streams, what is fetched when it is asked for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flashload.plan_directory import (
    LEAST_EXPERTS,
    SLACK_BYTES,
    Directory,
    Weight,
    row_bytes,
    total_bytes,
)
from flashload.plan_neurons import Guess, NeuronPlacement, is_neurons

#: Near the floor records get this part of the staging they would have, before they get no more than the least.
_LITTLE_AHEAD = 8


@dataclass(frozen=True)
class Fit:
    """One way to fit the weights into some room."""

    name: str
    resident_bytes: int
    streamed: list[Weight]
    ring_bytes: int
    demand_bytes: int
    neurons: NeuronPlacement | None = None
    expert_slots: int = 0


def fit_into(model: Directory, room_bytes: int, predictor: Guess) -> Fit | None:
    """What to do where not everything fits; None where nothing helps."""
    return _window(model, room_bytes, predictor) if model.neurons.records else _stream(model, room_bytes)


def _stream(model: Directory, room_bytes: int) -> Fit | None:
    """What stays and what streams when not everything fits; None when nothing helps."""
    always = total_bytes(model.layers) + total_bytes(model.head)
    room_bytes -= SLACK_BYTES + total_bytes(model.fixed) + model.demand_bytes
    held = total_bytes(model.fixed)
    if model.experts and always <= room_bytes:
        # Everything but the experts is read for every token; what is left goes to as many experts as it holds whole.
        slots = min(LEAST_EXPERTS + (room_bytes - always) // model.expert_bytes, model.n_experts)
        demand_bytes = row_bytes(model.tables) + slots * model.expert_bytes
        return Fit("experts", held + always, [], 0, demand_bytes, expert_slots=slots)
    # The head stays if it can: a prompt chunk that needs no logits would stream it for nothing.
    for streamable, ring_bytes, lookup_bytes in (
        (model.layers, model.ring_bytes, 0),
        (model.layers, model.ring_least_bytes, 0),
        (model.layers + model.head, model.ring_with_head_bytes, row_bytes(model.tied)),
    ):
        pinned = always - total_bytes(streamable)
        if pinned + ring_bytes + lookup_bytes <= room_bytes:
            streamed = _spread(streamable, room_bytes - pinned - ring_bytes - lookup_bytes)
            resident = held + always - total_bytes(streamed)
            name = "stream" if streamed else "resident"
            demand_bytes = model.demand_bytes + lookup_bytes
            slots = LEAST_EXPERTS if model.experts else 0
            return Fit(
                name, resident, streamed, ring_bytes if streamed else 0, demand_bytes, expert_slots=slots
            )
    return None


def _window(model: Directory, room_bytes: int, predictor: Guess) -> Fit | None:
    """Records of neurons in slots, everything else in memory; where that is too much, the rest streams as well.

    A byte of attention or of gate rows that streams is read for every token, one of a record only when its neuron is
    active: so slots get what the rest leaves.
    """
    neurons = model.neurons
    held_bytes = total_bytes(model.fixed) + total_bytes(model.layers) + total_bytes(model.head)
    modes = neurons.modes(predictor)
    keep = predictor if isinstance(predictor, float) else 1.0
    slot_room = room_bytes - held_bytes - model.demand_bytes - SLACK_BYTES
    fitting = {mode: neurons.window(mode, slot_room, keep) for mode in modes}
    chosen, guess = fitting.get("exact", fitting.get("lean")), fitting.get("predictor")
    if guess is not None and (chosen is None or neurons.predictor_pays(guess, chosen)):
        chosen = guess
    if chosen is not None:
        held_bytes += neurons.resident_bytes(chosen)
        return Fit("neurons", held_bytes, [], 0, model.demand_bytes, chosen)
    ahead = neurons.ahead_bytes(room_bytes)
    for mode, ahead_bytes in itertools.product(modes, (ahead, ahead // _LITTLE_AHEAD, 0)):
        least_bytes = neurons.least_bytes(mode, gates=[]) + ahead_bytes
        deciding = model.deciding_by(mode)
        streaming = _stream(deciding, room_bytes - least_bytes)
        if streaming is None:
            continue
        # Gate rows that do not stream lie with the records, not with the weights held.
        streamed = {w.id for w in streaming.streamed}
        gates = [w for w in deciding.layers if is_neurons(w.name) and w.id not in streamed]
        room = least_bytes + total_bytes(gates)
        least = neurons.window(mode, room, keep, gates=gates, ahead_bytes=ahead_bytes)
        if least is not None:
            resident_bytes = streaming.resident_bytes - total_bytes(gates) + neurons.resident_bytes(least)
            return replace(streaming, name="neurons", resident_bytes=resident_bytes, neurons=least)
    return None


def _spread(weights: Sequence[Weight], room_bytes: int) -> list[Weight]:
    """The weights to stream so that the rest fits ``room_bytes``, spread evenly over the pass.

    An even spread keeps the drive's demand uniform against the compute it hides behind, which a small ring can follow.
    """
    total = total_bytes(weights)
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
