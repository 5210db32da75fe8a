"""A budget shared out over one model: the longest context that fits, the weights, and what speculation takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from edge.host import Host
from edge.options import PlanOptions
from flashload.errors import BudgetError
from flashload.plan import Plan, place
from flashload.plan_kv import choose_kv

if TYPE_CHECKING:
    from edge.draft import DraftModel, Reserved

_DEFAULT_CONTEXT = 4096
_SMALLEST_DEFAULT_CONTEXT = 512
#: What the same process holds at the same point differs by this much from run to run.
_JITTER_BYTES = 2 << 20


def plan_host(host: Host, wanted: PlanOptions) -> Plan:
    """Places the weights; see :func:`edge.plan`.

    Raises:
        BudgetError: the budget is below the floor.
        ArgumentError: an option is out of range.
    """
    wanted.check()
    # Said once: what is free changes while one looks.
    wanted = replace(wanted, memory=host.budget_bytes(wanted.memory))
    if wanted.context is not None:
        return _plan_at(host, wanted, wanted.context)
    # Nobody asked for a length: take the longest usual one that fits memory whole, else the shortest usual.
    n_context = min(host.directory.decoder["max_positions"], _DEFAULT_CONTEXT)
    while True:
        shorter = n_context // 2
        try:
            chosen = _plan_at(host, wanted, n_context)
        except BudgetError:
            if shorter < _SMALLEST_DEFAULT_CONTEXT:
                raise
        else:
            in_memory = chosen.placement == "resident" and chosen.kv_on_flash is None
            if in_memory or shorter < _SMALLEST_DEFAULT_CONTEXT:
                return chosen
        n_context = shorter


def _plan_at(host: Host, wanted: PlanOptions, n_context: int) -> Plan:
    memory_bytes = host.budget_bytes(wanted.memory)

    def fit(host_bytes: int, host_peak_bytes: int) -> Plan:
        return choose_kv(
            wanted.kv,
            lambda where: place(
                host.directory,
                memory_bytes=memory_bytes,
                context=n_context,
                threads=wanted.n_threads,
                host_bytes=host_bytes,
                host_peak_bytes=host_peak_bytes,
                predictor=wanted.predictor,
                kv=where,
            ),
        )

    try:
        return fit(host.host_bytes, host.peak_bytes + _JITTER_BYTES)
    except BudgetError as refusal:
        missing_bytes = refusal.floor_bytes - memory_bytes
        if missing_bytes > min(_JITTER_BYTES, host.host_bytes):
            raise
        # The floor that one run names is enough for the next; the plan's margin covers the difference.
        return fit(host.host_bytes - missing_bytes, host.peak_bytes)


def place_host(
    host: Host, wanted: PlanOptions, draft: Callable[[Plan], DraftModel] | None = None
) -> Reserved:
    """The whole budget shared out, as :func:`edge.load` does it: the model, then what speculation takes.

    Args:
        draft: opens the draft model for a plan of the model alone.

    Raises:
        BudgetError: the budget is below the floor.
    """
    from edge.draft import reserve

    wanted = replace(wanted, memory=host.budget_bytes(wanted.memory))
    plan = plan_host(host, wanted)
    # A draft model is not worth a context that no longer fits memory.
    beside = replace(wanted, kv="memory" if plan.kv_on_flash is None else wanted.kv)

    def replan(grown: Host, n_context: int) -> Plan:
        return plan_host(grown, replace(beside, context=n_context))

    return reserve(host, plan, replan, None if draft is None else draft(plan))
