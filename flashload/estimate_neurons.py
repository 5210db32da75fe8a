"""What feed-forward layers stored by neuron cost: who decides, the active neurons, and the reads of the missing.

Texts use some neurons far more than others, which the window comes to hold; beyond that, which neurons a token needs is
taken to be independent from token to token ("LLM in a flash", arXiv 2312.11514, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashload.neuron_use import GUESSED, NeuronUse
from flashload.plan import Plan, Weight
from flashload.plan_neurons import is_neurons, read_share
from flashload.probe import Machine
from quant.formats import WeightFormat

#: Rows that share one reading of a layer's neurons (flashload.plan).
_BLOCK_ROWS = 64
#: Records nearer than this come in one request (cpp/store/neuron_turn.cc).
_GAP_BYTES = 16 << 10
#: The longest request (cpp/store/neuron_turn.cc).
_RUN_BYTES = 256 << 10
#: Direct reads are this fine where the drive takes them so (cpp/io/read_file.cc).
_BLOCK_BYTES = 512
#: A predictor lets so many rows at once look a layer ahead (cpp/model/sparse_ffn.cc).
_AHEAD_ROWS = 4
#: Of what a layer lacks, the part that is there or on its way when the layer is reached: 0.75 to 0.93 was asked for a
#: layer ahead, and not all of that had come.
_FORETOLD = 0.75
#: What it takes to note that a row used a record (its worth, a logarithm and a power; who leaves for it), in values
#: that small steps pass over (flashload.calibrate.row_values).
_USE_VALUES = 32
#: Formats of records, the tile format with the same bits, and bytes per value with scales (quant.formats.neuron).
_LIKE = {
    WeightFormat.NEURON_F16: (WeightFormat.F16, 2.0),
    WeightFormat.NEURON_Q8: (WeightFormat.Q8_0, 272 / 256),
    WeightFormat.NEURON_Q4: (WeightFormat.Q4_0, 144 / 256),
}


@dataclass(frozen=True)
class NeuronWork:
    """One pass over all layers, or one of them.

    Attributes:
        seconds: of computing, and of asking for records and checking them.
        late_seconds: of waiting for those that were not foretold, behind which nothing hides.
        flash_bytes: that came from the drive.
        flash_seconds: that the drive took, late ones aside.
    """

    seconds: float
    late_seconds: float
    flash_bytes: float
    flash_seconds: float

    def __add__(self, other: NeuronWork) -> NeuronWork:
        return NeuronWork(
            self.seconds + other.seconds,
            self.late_seconds + other.late_seconds,
            self.flash_bytes + other.flash_bytes,
            self.flash_seconds + other.flash_seconds,
        )


def reads_of(
    n_records: float, record_bytes: int, missing: float, most_bytes: float = _RUN_BYTES
) -> tuple[float, float]:
    """(bytes, requests) to read a random share ``missing`` of a layer's records: near ones come in one request.

    After a missing record, ``j`` present ones lie before the next with probability ``missing * (1 - missing)**j``;
    up to a gap of 16 KiB they are read along, in requests of at most ``most_bytes``.
    """
    n_missing = missing * n_records
    # A request begins and ends at a block of the drive: half of each belongs to neighbours, unless records fill blocks.
    edges = _BLOCK_BYTES if record_bytes % _BLOCK_BYTES else 0
    longest = (_GAP_BYTES + edges // 2) // record_bytes
    joined = 1 - (1 - missing) ** (longest + 1)
    skipped = sum(j * missing * (1 - missing) ** j for j in range(1, longest + 1))
    useful = n_missing * (1 + skipped) * record_bytes
    most_records = max(1.0, (most_bytes - edges) // record_bytes)
    requests = max(n_missing * (1 - joined), 1.0, useful / (most_records * record_bytes))
    return min(useful + requests * edges, float(n_records * record_bytes)), requests


def thresholds_pay(plan: Plan, weights: Sequence[Weight], active_share: float) -> bool:
    """Whether leaving out neurons lets a token read less from the drive, or nothing is read from it at all.

    Without thresholds every neuron is wanted, the same ones are missing each time, and they come in long reads. With
    them the missing lie anywhere, and short gaps between them are read along.
    """
    with_all = with_some = 0.0
    for weight in weights:
        if weight.name.endswith(".neurons.records") and plan.neuron_slots[weight.id] < weight.rows:
            missing = 1 - plan.neuron_slots[weight.id] / weight.rows
            with_all += missing * weight.rows * weight.chunk_bytes
            with_some += reads_of(weight.rows, weight.chunk_bytes, missing * active_share)[0]
    return with_some < with_all or with_all == 0


class NeuronCost:
    """The layers of a directory that are stored by neuron.

    Args:
        use: how texts use them.
    """

    def __init__(self, weights: Sequence[Weight], machine: Machine, use: NeuronUse | None = None) -> None:
        self._machine = machine
        self._use = use or NeuronUse()
        self._records = [w for w in weights if w.name.endswith(".neurons.records")]
        self._gates = {w.layer: w for w in weights if w.name.endswith(".neurons.gates")}
        self._predictors = [w for w in weights if ".predictor." in w.name]

    def __bool__(self) -> bool:
        return bool(self._records)

    @staticmethod
    def owns(weight: Weight) -> bool:
        """Whether an entry is counted here and nowhere else."""
        return is_neurons(weight.name) or ".predictor." in weight.name

    def work(self, plan: Plan, rows: int) -> NeuronWork:
        """``rows`` rows, in blocks that share what they read."""
        work = NeuronWork(0.0, 0.0, 0.0, 0.0)
        for first in range(0, rows, _BLOCK_ROWS):
            block = min(_BLOCK_ROWS, rows - first)
            for records in self._records:
                work += self._layer(plan, records, block)
            if plan.neuron_mode in GUESSED:
                named = (
                    self._seconds(w.stored_bytes, WeightFormat.Q8_0, 34 / 32, block) for w in self._predictors
                )
                work += NeuronWork(sum(named), 0.0, 0.0, 0.0)
        return work

    def _layer(self, plan: Plan, records: Weight, rows: int) -> NeuronWork:
        gates = self._gates.get(records.layer)
        gate_share = gates.chunk_bytes / records.chunk_bytes if gates is not None else 1 / 3
        n_bytes = float(records.rows * records.chunk_bytes)
        mode = plan.neuron_mode
        token_share, union = self._use.token_share(mode), self._use.wanted_share(mode, rows)
        # Rows at work on one record, on average.
        each = rows * token_share / union
        decide = 0.0
        # Of an active record the down column is added, its other rows are multiplied; the gate is known already where
        # it decided.
        multiplied = 1 - gate_share
        if mode not in GUESSED:
            decide = self._dot_seconds(records.format, gate_share * n_bytes, rows)
            multiplied -= gate_share
        compute = self._dot_seconds(records.format, multiplied * union * n_bytes, each)
        compute += self._axpy_seconds(records.format, gate_share * token_share * rows * n_bytes)
        slots = plan.neuron_slots[records.id] if plan.neuron_slots else records.rows
        drive = self._machine.drive
        read, requests, missing = self._reads(plan, records, rows, min(1.0, slots / records.rows))
        if missing <= 0:
            return NeuronWork(decide + compute, 0.0, 0.0, 0.0)
        # Half of the staging is in flight: decoding reads ahead into the other half; of a prompt, the other half is in
        # use or waits for its turn, for records are used in order.
        reading = drive.seconds(read, read / requests, plan.neuron_staging_bytes / 2)
        # One thread asks for what is missing and checks what has come.
        asking = requests * drive.cpu_seconds_per_request + read * drive.cpu_seconds_per_byte
        decide += rows * token_share * records.rows * _USE_VALUES * self._machine.layer.value_seconds
        if mode in GUESSED and rows <= _AHEAD_ROWS:
            # As much as there is staging for is read a layer ahead, behind everything else that a pass does.
            late = 1 - min(_FORETOLD, plan.neuron_staging_bytes / 2 / read)
            waiting = drive.first_byte_seconds + late * (reading + asking)
            return NeuronWork(decide + compute + (1 - late) * asking, waiting, read, (1 - late) * reading)
        # What is in memory is multiplied while the first records arrive, then one part while another arrives: half of
        # that hides, as the drive waits for places and who computes for records.
        here = compute * (1 - missing / union)
        waiting = max(0.0, drive.first_byte_seconds + reading - here - (compute - here + asking) / 2)
        return NeuronWork(decide + compute + asking, waiting, read, 0.0)

    def _reads(self, plan: Plan, records: Weight, rows: int, held: float) -> tuple[float, float, float]:
        """(bytes, requests, share of the records) that ``rows`` rows want and a layer lacks."""
        most_bytes = min(_RUN_BYTES, plan.neuron_staging_bytes / 4)
        read = requests = missing = 0.0
        wanted = self._use.missing(plan.neuron_mode, rows, held)
        in_all = sum(part * lacking for part, lacking in wanted)
        free = plan.neuron_free_reads / records.rows
        share = max(read_share(plan.neuron_keep), min(1.0, free / in_all)) if in_all > 0 else 0.0
        for part, lacking in wanted:
            lacking *= share
            if part > 0 and lacking > 0:
                found = reads_of(part * records.rows, records.chunk_bytes, lacking, most_bytes)
                read, requests, missing = read + found[0], requests + found[1], missing + part * lacking
        return read, requests, missing

    def _dot_seconds(self, code: int, n_bytes: float, rows: float) -> float:
        rate = self._machine.neurons.get(code)
        if rate is None:
            return self._seconds(n_bytes, *_LIKE[WeightFormat(code)], rows)
        return max(n_bytes / self._machine.bus_bytes_per_second, rate.dot_seconds(n_bytes, max(rows, 1.0)))

    def _axpy_seconds(self, code: int, n_bytes: float) -> float:
        rate = self._machine.neurons.get(code)
        return self._seconds(n_bytes, *_LIKE[WeightFormat(code)], 1) if rate is None else n_bytes / rate.axpy

    def _seconds(self, n_bytes: float, kind: WeightFormat, value_bytes: float, rows: float) -> float:
        return self._machine.product_seconds(int(kind), n_bytes, n_bytes / value_bytes, rows)
