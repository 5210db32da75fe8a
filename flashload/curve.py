"""Speed over memory: placements from the floor to everything in memory, each with what it is predicted to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashload.errors import BudgetError
from flashload.estimate import CostModel, Prediction
from flashload.plan import Plan

#: Budgets between the floor and everything at which the curve is computed.
_STEPS = 24
#: More than any machine has: everything is resident.
_UNBOUNDED_BYTES = 1 << 59


@dataclass(frozen=True)
class Option:
    """One way to run a model.

    Attributes:
        weights: "keep", "q8" or "q4", as for ``edge pack``.
        memory_bytes: the budget.
        placement: what the plan does with it: "resident", "stream", "experts" ...
        speculation: "off": no draft is counted on.
        predicted_peak_bytes: the most that will be held.
        predicted_tokens_per_second: decode at half the context.
        time_to_first_token_seconds: for a prompt of ``prompt_tokens``.
        bound: "memory" or "drive", whichever a token waits for.
        kv: "memory", or "flash" when keys and values of a full context are partly on the drive.
        expert_slots: experts held at a time where not all of a mixture's are in memory, else 0.
        floor_bytes, resident_bytes: the least that runs, and what holds everything, at these weights.
        needs_packing: these weights are not the ones in the file: ``edge pack`` makes them from the checkpoint.
    """

    weights: str
    memory_bytes: int
    placement: str
    predicted_peak_bytes: int
    predicted_tokens_per_second: float
    time_to_first_token_seconds: float
    prompt_tokens: int
    flash_bytes_per_token: float
    expert_hit_rate: float | None
    bound: str
    kv: str
    expert_slots: int
    context: int
    floor_bytes: int
    resident_bytes: int
    weight_bytes: int
    bits_per_weight: float
    needs_packing: bool = False
    speculation: str = "off"

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Curve:
    """Placements and predictions of one choice of weights over all budgets.

    A budget is never told to be slower than a smaller one, which could be named instead: whole weights are pinned, so
    single placements may be a few percent worse than one with less memory. Between the budgets computed, speeds are
    interpolated, which keeps the curve monotone everywhere.
    """

    def __init__(
        self,
        weights: str,
        make: Callable[[int], Plan],
        model: CostModel,
        *,
        weight_bytes: int,
        bits_per_weight: float,
        needs_packing: bool = False,
    ) -> None:
        """
        Args:
            make: budget in bytes -> plan; raises BudgetError below the floor.
        """
        self.weights = weights
        self.weight_bytes = weight_bytes
        self.bits_per_weight = bits_per_weight
        self._make, self._model = make, model
        self.needs_packing = needs_packing
        try:
            self.floor_bytes = make(1).floor_bytes
        except BudgetError as refusal:
            self.floor_bytes = refusal.floor_bytes
        resident = make(_UNBOUNDED_BYTES)
        self.resident_bytes = max(self.floor_bytes, resident.predicted_peak_bytes)
        self.budgets = [
            self.floor_bytes + (self.resident_bytes - self.floor_bytes) * i // _STEPS
            for i in range(_STEPS + 1)
        ]
        speed, wait = 0.0, float("inf")
        self._speeds: list[float] = []
        self._waits: list[float] = []
        for budget in self.budgets:
            found = model.predict(make(budget))
            speed = max(speed, found.tokens_per_second)
            wait = min(wait, found.time_to_first_token_seconds)
            self._speeds.append(speed)
            self._waits.append(wait)

    @property
    def resident_tokens_per_second(self) -> float:
        """With everything in memory."""
        return self._speeds[-1]

    def at(self, memory_bytes: int) -> Option | None:
        """The placement of one budget; None below the floor."""
        if memory_bytes < self.floor_bytes:
            return None
        plan = self._make(memory_bytes)
        found: Prediction = self._model.predict(plan)
        speed, wait = self._between(memory_bytes)
        return Option(
            weights=self.weights,
            memory_bytes=memory_bytes,
            placement=plan.placement,
            predicted_peak_bytes=plan.predicted_peak_bytes,
            predicted_tokens_per_second=speed,
            time_to_first_token_seconds=wait,
            prompt_tokens=found.prompt_tokens,
            flash_bytes_per_token=found.flash_bytes_per_token,
            expert_hit_rate=found.expert_hit_rate,
            bound=found.bound,
            kv="flash" if plan.kv_on_flash else "memory",
            expert_slots=plan.expert_slots,
            context=plan.context,
            floor_bytes=self.floor_bytes,
            resident_bytes=self.resident_bytes,
            weight_bytes=self.weight_bytes,
            bits_per_weight=self.bits_per_weight,
            needs_packing=self.needs_packing,
        )

    def _between(self, memory_bytes: int) -> tuple[float, float]:
        """(tokens per second, seconds to the first token) on the curve."""
        for i in range(len(self.budgets) - 1):
            low, high = self.budgets[i], self.budgets[i + 1]
            if memory_bytes < high:
                share = (memory_bytes - low) / (high - low)
                speed = self._speeds[i] + share * (self._speeds[i + 1] - self._speeds[i])
                return speed, self._waits[i] + share * (self._waits[i + 1] - self._waits[i])
        return self._speeds[-1], self._waits[-1]
