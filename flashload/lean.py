"""What ``predictor="lean"`` need not leave out: missing neurons that the drive brings while the rest is computed."""

from __future__ import annotations

from dataclasses import replace

from flashload.estimate import CostModel
from flashload.plan import Directory, Plan
from flashload.probe import Machine

#: Of the time that a token is computed the drive may be kept busy with what need not be read: its requests take some of
#: the processors' time too, and one that is never idle makes a pass wait for its slowest reads.
_IDLE_SHARE = 0.5
_BLOCK_BYTES = 512


def with_free_reads(plan: Plan, model: Directory, machine: Machine | None) -> Plan:
    """The plan with as many reads of each layer as hide behind computing, by the rates measured of this machine.

    So a share of the energy is passed over only where reading it would cost time: the more memory there is, the fewer
    neurons are missing, and with these reads none is left out in the end.

    Args:
        machine: None where nothing was measured; then nothing is taken to be free.
    """
    if plan.neuron_mode != "lean" or machine is None:
        return plan
    records = model.neurons.records
    cost = CostModel(model.entries, model.decoder, machine, model.neurons.use)
    in_memory = replace(plan, neuron_slots=[w.rows for w in model.entries])
    seconds = _IDLE_SHARE * cost.predict(in_memory).memory_seconds / len(records)
    record_bytes = max(w.chunk_bytes for w in records) + _BLOCK_BYTES
    n_free = int(seconds / machine.drive.seconds(record_bytes, record_bytes))
    free = replace(plan, neuron_free_reads=n_free)
    more_bytes = cost.predict(free).flash_bytes_per_token - cost.predict(plan).flash_bytes_per_token
    return replace(free, flash_bytes_per_token=plan.flash_bytes_per_token + round(more_bytes))
