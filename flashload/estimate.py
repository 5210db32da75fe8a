"""How fast a placement will run, from the directory, the plan and the probe of the machine: the cost model.

    T_flash = sum over reads of (t0 + bytes / rate), at least bytes / sequential rate
    T_ram   = weights and cached keys and values over the bus, or the kernels' own rate where that is lower,
              and a fixed cost per layer, for a prompt per row too
    T_token = max(T_ram, T_flash) + what of the head the stream cannot hide       (reading runs ahead of computing)

Of the experts that are not at hand, most are guessed layers ahead: their reads hide behind all that the layers
compute. The others are asked for only when their layer has chosen them, and hide behind that layer's other experts
alone. What is not known (which experts a text asks for) is taken to be uniform. A prompt's chunks ask for nearly all
experts of each layer and find other shares of them at hand than a token does (:func:`prompt_hit_rate`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flashload.calibrate import row_values
from flashload.estimate_neurons import NeuronCost
from flashload.neuron_use import NeuronUse
from flashload.plan import RESIDENT, Plan, Weight
from flashload.plan_kv import KV_BUFFERS, kv_token_bytes, kv_type_of
from flashload.plan_neurons import is_extra
from flashload.probe import READ_BYTES, Machine
from quant.formats import TILE_FORMATS, TILE_ROWS, WeightFormat

#: Prompt that "time to first token" is told for.
PROMPT_TOKENS = 512
#: Thread hand-overs of a dense layer at one row: q, k and v at once, attention, o, gate with up, down.
_DENSE_STEPS = 5
#: Of an expert (gate with up, down), and of a mixture's attention half and router.
_EXPERT_STEPS, _ROUTED_STEPS = 2, 4
#: Time that attention computes, against that over f16: integer products take several values at a time.
_KV_COMPUTE = {"f16": 1.0, "int8": 0.4, "int4": 0.4}
#: Of what routers of trained and random weights named from the residual stream of the layer before, so much was then
#: chosen.
_RIGHT_GUESSES = 0.75
_TABLES = ("embed.weight", "embed.position")
_NOT_READ = (int(WeightFormat.F32_VECTOR), int(WeightFormat.BYTES))


@dataclass(frozen=True)
class Prediction:
    """What one placement costs.

    Attributes:
        tokens_per_second: decode, at half the context.
        time_to_first_token_seconds: a prompt of ``prompt_tokens``, the engine loaded.
        memory_seconds, flash_seconds: T_ram (with the reads that nothing hides) and T_flash of one token.
        flash_bytes_per_token: read from the drive for one token of decode.
        expert_hit_rate: share of chosen experts at hand; None without experts.
        bound: "memory" or "drive", whichever a token waits for.
    """

    tokens_per_second: float
    time_to_first_token_seconds: float
    prompt_tokens: int
    memory_seconds: float
    flash_seconds: float
    flash_bytes_per_token: float
    expert_hit_rate: float | None
    bound: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def expected_hit_rate(capacity: float, n_experts: int, top_k: int) -> float:
    """Share of a layer's chosen experts that its cache of ``capacity`` experts holds, each being equally likely.

    Uniform choice is the worst case: real routing prefers some experts, which any policy gains from. What is kept is
    then worth its share and no more, whatever the policy, as long as it keeps something: below one expert there is
    only room for those being computed with.
    """
    if capacity >= n_experts:
        return 1.0
    if capacity <= 1 or top_k >= n_experts:
        return 0.0
    return capacity / n_experts


def prompt_hit_rate(capacity: float, n_layers: int, n_experts: int, chosen: float) -> float:
    """Share of the experts that a chunk of a prompt chooses and that are in its cache when their layer comes.

    A chunk chooses nearly all of a layer's experts, layer by layer, and those of one layer are held together. What was
    just used makes room, being a whole pass away: what loading or the chunk before left of the layers to come stays.

    Args:
        capacity: experts that the cache has room for.
        chosen: experts of each layer, on average.
    """
    total = n_layers * n_experts
    if capacity >= total:
        return 1.0
    return max(0.0, capacity - chosen) / (total - chosen) if chosen < total else 0.0


@dataclass(frozen=True)
class _KvReads:
    """Keys and values from the drive in one pass: bytes, how long the drive takes, and what of that nothing hides."""

    flash_bytes: float
    flash_seconds: float
    exposed_seconds: float


class _Group:
    """Weights that are read together: bytes and values by format."""

    def __init__(self) -> None:
        self.bytes: dict[int, float] = defaultdict(float)
        self.values: dict[int, float] = defaultdict(float)

    def add(self, weight: Weight) -> None:
        if weight.format in _NOT_READ:
            return
        code = weight.format
        traits = TILE_FORMATS[WeightFormat(code)]
        self.bytes[code] += weight.stored_bytes
        self.values[code] += weight.stored_bytes / traits.tile_block_bytes * TILE_ROWS * traits.block_values

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes.values())

    def seconds(self, machine: Machine, rows: float, share: float = 1.0) -> float:
        """Products of ``rows`` activation rows with ``share`` of the group's weights."""
        return share * sum(
            machine.product_seconds(code, n_bytes, self.values[code], rows)
            for code, n_bytes in self.bytes.items()
        )


class CostModel:
    """Predictions for one directory on one machine.

    Args:
        weights: the directory in file order.
        decoder: DecoderConfig as a dict.
        machine: the probe's figures.
        use: how texts use neurons (packs with records of them).
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        decoder: Mapping[str, Any],
        machine: Machine,
        use: NeuronUse | None = None,
    ) -> None:
        self._weights = weights
        self._decoder = decoder
        self._machine = machine
        self._neurons = NeuronCost(weights, machine, use)
        self._layers, self._head, self._experts = _Group(), _Group(), _Group()
        self._tables: list[Weight] = []
        tied = bool(decoder["tied_head"])
        sparse = set()
        for weight in weights:
            if weight.expert >= 0:
                self._experts.add(weight)
                sparse.add(weight.layer)
            elif weight.name == ("embed.weight" if tied else "head.weight"):
                self._head.add(weight)
                if tied:
                    self._tables.append(weight)
            elif weight.name in _TABLES:
                self._tables.append(weight)
            elif not (NeuronCost.owns(weight) or is_extra(weight.name)):
                self._layers.add(weight)
        self._n_sparse = len(sparse)
        self._expert_weight_bytes = max((w.stored_bytes for w in weights if w.expert >= 0), default=0)

    # -- parts of one pass ------------------------------------------------------------------------------------------

    @property
    def _expert_bytes(self) -> float:
        n_experts = self._n_sparse * int(self._decoder["n_experts"])
        return self._experts.total_bytes / n_experts if n_experts else 0.0

    def _attention_seconds(self, position: float) -> float:
        """Reading the keys and values of ``position`` tokens in every layer, for one row."""
        d, layer = self._decoder, self._machine.layer
        seen = sum(min(position, window) if window else position for window in d["windows"])
        values = 2.0 * seen * d["n_kv_heads"] * d["head_dim"]
        group = d["n_heads"] / d["n_kv_heads"]
        compute = values * (layer.kv_seconds + group * layer.kv_head_seconds)
        compute *= _KV_COMPUTE[kv_type_of(d)]
        return float(max(seen * kv_token_bytes(d) / self._machine.bus_bytes_per_second, compute))

    def _overhead_seconds(self, experts_at_work: float) -> float:
        """Hand-overs between threads and what one row's small steps cost, all layers."""
        step = self._machine.layer.layer_seconds / _DENSE_STEPS
        dense = self._decoder["n_layers"] - self._n_sparse
        mixture = step * (_ROUTED_STEPS + _EXPERT_STEPS * experts_at_work)
        return float(dense * self._machine.layer.layer_seconds + self._n_sparse * mixture)

    def _small_seconds(self) -> float:
        """The small steps of a prompt's row in all layers; of a mixture's, in each expert that it uses."""
        d = self._decoder
        head_dim, dense = d["head_dim"], d["n_layers"] - self._n_sparse
        q_dim, kv_dim = d["n_heads"] * head_dim, d["n_kv_heads"] * head_dim
        values = dense * row_values(d["hidden_size"], q_dim, kv_dim, d["intermediate_size"])
        # An expert's rows are gathered, and what it gives is added.
        expert = d["experts_per_token"] * (d["expert_intermediate_size"] + d["hidden_size"])
        values += self._n_sparse * row_values(d["hidden_size"], q_dim, kv_dim, expert)
        return float(values * self._machine.layer.value_seconds)

    def _token_seconds(self) -> float:
        layer = self._machine.layer
        return layer.token_seconds + float(self._decoder["vocab_size"]) * layer.vocab_seconds

    def _row_seconds(self, plan: Plan) -> tuple[float, float]:
        """(seconds, bytes) to look up one token's rows in tables that are not in memory: one small read each."""
        seconds = n_bytes = 0.0
        drive = self._machine.drive
        for table in self._tables:
            if plan.placements[table.id] == RESIDENT:
                continue
            tile = TILE_ROWS * table.stored_bytes / max(table.rows, TILE_ROWS)
            read = -(-tile // table.chunk_bytes) * table.chunk_bytes
            seconds += drive.first_byte_seconds + read / drive.bytes_per_second
            n_bytes += read
        return seconds, n_bytes

    def _hit_rate(self, plan: Plan) -> float | None:
        if not self._n_sparse:
            return None
        if all(plan.placements[w.id] == RESIDENT for w in self._weights if w.expert >= 0):
            return 1.0
        d = self._decoder
        return expected_hit_rate(plan.expert_slots / self._n_sparse, d["n_experts"], d["experts_per_token"])

    def _io_seconds(self, n_bytes: float, checked_bytes: float = 0.0) -> float:
        """What reading ``n_bytes`` takes from computing: the bus they arrive over, and cores when none is spare.

        Args:
            checked_bytes: those of them whose time on a core is counted where they are used.
        """
        machine = self._machine
        spare = machine.cores > machine.threads
        others = n_bytes - checked_bytes
        cpu = 0.0 if spare else machine.drive.cpu_seconds_per_byte * others / machine.cores
        return cpu + n_bytes / machine.bus_bytes_per_second

    def _kv_reads(self, plan: Plan, position: float, rows: int) -> _KvReads:
        """Keys and values read back from their file, once for every ``score_rows`` rows.

        While anything but attention is computed, reading runs ahead as far as there are buffers; the rest of a layer
        arrives while it is attended to.
        """
        if plan.kv_on_flash is None:
            return _KvReads(0.0, 0.0, 0.0)
        windows = self._decoder["windows"]
        request = plan.kv_on_flash.request_bytes(len(windows))
        times = -(-rows // plan.kv_on_flash.score_rows)
        n_bytes = times * plan.kv_on_flash.read_bytes(windows, position)
        late = max(0.0, n_bytes - len(windows) * KV_BUFFERS * request)
        exposed = self._machine.drive.seconds(late, request) - rows * self._attention_seconds(position)
        return _KvReads(n_bytes, self._machine.drive.seconds(n_bytes, request), max(0.0, exposed))

    # -- decode -----------------------------------------------------------------------------------------------------

    def predict(
        self, plan: Plan, *, position: float | None = None, prompt_tokens: int = PROMPT_TOKENS
    ) -> Prediction:
        """Decode and prompt speed of a placement.

        Args:
            position: tokens in the cache when decode is timed; half the context by default.
            prompt_tokens: at most what the context holds besides one token.
        """
        at = plan.context / 2 if position is None else position
        prompt_tokens = max(1, min(prompt_tokens, plan.context - 1))
        hit = self._hit_rate(plan)
        row_seconds, row_bytes = self._row_seconds(plan)
        top_k = float(self._decoder["experts_per_token"])
        compute = (
            self._layers.seconds(self._machine, 1)
            + self._head.seconds(self._machine, 1)
            + self._attention_seconds(at)
            + self._overhead_seconds(top_k)
            + self._token_seconds()
            + row_seconds
        )
        idle = self._layers.seconds(self._machine, 1) + self._attention_seconds(at)
        mixture, expert_bytes = self._mixture_seconds(hit, 1, top_k, idle)
        neurons = self._neurons.work(plan, 1)
        stream = self._machine.drive.seconds(plan.stream_bytes)
        kv = self._kv_reads(plan, at, 1)
        read = plan.stream_bytes + neurons.flash_bytes + kv.flash_bytes
        memory = compute + mixture + neurons.seconds + kv.exposed_seconds
        memory += self._io_seconds(read, neurons.flash_bytes)
        # The ring runs on while the head is computed, as far as it has room.
        head = self._head.seconds(self._machine, 1) if plan.stream_bytes else 0.0
        exposed = max(0.0, head - plan.ring_bytes / self._machine.drive.sequential_bytes_per_second)
        flash = stream + self._machine.drive.seconds(expert_bytes, self._read_bytes)
        flash += neurons.flash_seconds + kv.flash_seconds
        token = neurons.late_seconds + max(memory, flash) + (exposed if flash > memory else 0.0)
        return Prediction(
            tokens_per_second=1 / token,
            time_to_first_token_seconds=self._prompt_seconds(plan, prompt_tokens, hit, row_seconds),
            prompt_tokens=prompt_tokens,
            memory_seconds=memory,
            flash_seconds=flash + neurons.late_seconds,
            flash_bytes_per_token=read + expert_bytes + row_bytes,
            expert_hit_rate=hit,
            bound="drive" if flash + neurons.late_seconds > token / 2 else "memory",
        )

    @property
    def _read_bytes(self) -> float:
        return min(READ_BYTES, self._expert_weight_bytes or READ_BYTES)

    def _mixture_seconds(
        self, hit: float | None, rows: float, at_work: float, idle_seconds: float = 0.0
    ) -> tuple[float, float]:
        """(seconds with those of reading, bytes read) of all mixtures: ``at_work`` experts each, on ``rows`` rows each.

        Args:
            idle_seconds: what else the layers of a pass do, when guesses may be read; 0 where nothing is guessed.
        """
        if hit is None or not self._n_sparse:
            return 0.0, 0.0
        machine = self._machine
        share = 1 / (self._n_sparse * self._decoder["n_experts"])
        one = self._experts.seconds(machine, rows, share)
        missing = at_work * (1 - hit)
        if missing <= 0:
            return self._n_sparse * at_work * one, 0.0
        # The drive is idle between what one layer has read and what the next one chooses. A guess begins then, where
        # the likeliest expert is not at hand; a wrong one is read to its end, while the layer waits.
        read_one = machine.drive.seconds(self._expert_bytes, self._read_bytes)
        idle = idle_seconds / self._n_sparse
        guessing = (self._n_sparse - 1) / self._n_sparse if idle else 0.0
        guesses = guessing * min(missing, (1 - hit) * max(1.0, idle / read_one))
        read = (missing + (1 - _RIGHT_GUESSES) * guesses) * self._expert_bytes
        ahead = min(idle, guesses * read_one)
        # All of a layer's reads start together. While the drive is waited for, what is at hand is multiplied and what
        # has landed is checked; the last expert is computed after it has landed. Where none is missing, nothing hides.
        any_miss = 1 - hit**at_work
        reading = machine.drive.first_byte_seconds + machine.drive.seconds(read, self._read_bytes) / any_miss
        busy = at_work * one + self._io_seconds(read) / any_miss
        waiting = max(busy, reading - ahead) + one / 2
        layer = any_miss * waiting + (1 - any_miss) * at_work * one
        return self._n_sparse * layer, self._n_sparse * read

    # -- prompt -----------------------------------------------------------------------------------------------------

    def _prompt_seconds(self, plan: Plan, n_tokens: int, hit: float | None, row_seconds: float) -> float:
        """A prompt in chunks of ``max_rows``; each chunk is one pass over what streams."""
        total = self._head.seconds(self._machine, 1) + self._token_seconds() + n_tokens * row_seconds
        # Keys and values are written to memory that nobody has used yet; all other is made by loading.
        new_bytes = plan.kv_bytes * n_tokens / plan.context
        total += new_bytes * self._machine.touch_seconds_per_byte
        for first in range(0, n_tokens, plan.max_rows):
            rows = min(plan.max_rows, n_tokens - first)
            total += self._chunk_seconds(plan, first, rows, hit)
        return total

    def _chosen(self, rows: int) -> float:
        """Experts of a layer that ``rows`` rows choose between them."""
        n, k = self._decoder["n_experts"], self._decoder["experts_per_token"]
        return float(n * (1 - (1 - k / n) ** rows))

    def _chunk_seconds(self, plan: Plan, first: int, rows: int, hit: float | None) -> float:
        machine = self._machine
        compute = self._layers.seconds(machine, rows)
        compute += rows * (self._attention_seconds(first + rows / 2) + self._small_seconds())
        at_work, each = 0.0, 0.0
        if self._n_sparse:
            at_work = self._chosen(rows)
            each = rows * self._decoder["experts_per_token"] / at_work
            if hit is not None and hit < 1:
                hit = prompt_hit_rate(plan.expert_slots, self._n_sparse, self._decoder["n_experts"], at_work)
        compute += self._overhead_seconds(at_work)
        mixture, expert_bytes = self._mixture_seconds(hit, each, at_work)
        neurons = self._neurons.work(plan, rows)
        kv = self._kv_reads(plan, first + rows / 2, rows)
        read = plan.stream_bytes + neurons.flash_bytes + kv.flash_bytes
        memory = compute + mixture + neurons.seconds + kv.exposed_seconds
        memory += self._io_seconds(read, neurons.flash_bytes)
        flash = machine.drive.seconds(plan.stream_bytes) + machine.drive.seconds(expert_bytes)
        return neurons.late_seconds + max(memory, flash + neurons.flash_seconds + kv.flash_seconds)
