"""The memory of a loaded engine, which may change between two passes: when its user says so, or when others need it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge.draft import open_draft_core
from edge.pressure import Pressure
from edge.sizing import Sized, Sizing
from edge.watch import Progress, watched
from flashload.errors import BudgetError, EdgeError
from flashload.machine import format_bytes, parse_bytes

if TYPE_CHECKING:
    import _edge

    from edge.engine import Engine
    from flashload.plan import Plan


class LiveMemory:
    """What one engine's budget is, and how to make it another.

    Attributes:
        changes: every change since load: ``from_bytes`` and ``to_bytes`` (budgets), ``placement``, ``reason``; and
            ``error`` for one that failed.
        holds_kv: keys and values do not move between memory and a drive, whatever the budget.
    """

    def __init__(self, sizing: Sizing, sized: Sized, pressure: Pressure | None) -> None:
        self.changes: list[dict[str, Any]] = []
        self.holds_kv = False
        self._sizing = sizing
        self._sized = sized
        self._pressure = pressure

    def set(self, engine: Engine, memory: int | str, on_load: Progress | None) -> None:
        """Between two passes; see :meth:`edge.Engine.set_memory`."""
        self._apply(engine, self._spend(memory), "asked", on_load)
        if self._pressure is not None:
            self._pressure.restart(self._sized.plan.memory_bytes)

    @property
    def due(self) -> bool:
        """Whether :meth:`relieve` would look at anything now."""
        return self._pressure is not None and self._pressure.due

    def relieve(self, engine: Engine) -> None:
        """Looks at what others need, where that is due, and gives memory or takes it back.

        A drive that fails meanwhile does not end the request: the change is left out, and told among :attr:`changes`.
        """
        if self._pressure is None or (change := self._pressure.check(self._sized.plan)) is None:
            return
        try:
            self._apply(engine, self._at_least(change.memory_bytes), change.reason, None)
        except EdgeError as error:
            self.changes.append(self._change(change.memory_bytes, change.reason) | {"error": str(error)})

    def _at_least(self, memory_bytes: int) -> Sized:
        try:
            return self._spend(memory_bytes)
        except BudgetError as refusal:
            if not memory_bytes < refusal.floor_bytes <= self._sized.plan.memory_bytes:
                raise
            return self._spend(refusal.floor_bytes)

    def _spend(self, memory: int | str) -> Sized:
        kv = "memory" if self._sized.plan.kv_on_flash is None else "flash"
        return self._sizing.at(memory, kv if self.holds_kv else None)

    def _change(self, memory_bytes: int, reason: str) -> dict[str, Any]:
        plan = self._sized.plan
        return {
            "from_bytes": plan.memory_bytes,
            "to_bytes": memory_bytes,
            "placement": plan.placement,
            "reason": reason,
        }

    def _apply(self, engine: Engine, sized: Sized, reason: str, on_load: Progress | None) -> None:
        core = engine._open_core()
        change = self._change(sized.plan.memory_bytes, reason) | {"placement": sized.plan.placement}
        # What goes is given back before anything new is read. Pages of one text can go to a drive, shared ones cannot.
        engine._prefixes.leave_memory(park=False)
        drafting = engine._part_with_drafters(keep_draft=sized.draft is not None)
        draft, notes = drafting.draft, list[str]()
        try:
            watched(lambda progress: core.resize(sized.options, progress), on_load)
            self._sized = sized
            self.changes.append(change)
        finally:
            if draft is None and self._sized.draft is not None:
                draft, notes = _open_draft(self._sized, core)
            engine._settle(self._sized.plan, self._sized.drafting(draft, *notes))


def _open_draft(sized: Sized, core: _edge.Engine) -> tuple[_edge.Engine | None, list[str]]:
    """A draft model that cannot be read is missed, no more."""
    assert sized.draft is not None
    try:
        return open_draft_core(sized.draft, core), []
    except EdgeError as error:
        return None, [f"draft {sized.draft.name} left out: {error}"]


def describe(change: dict[str, Any]) -> str:
    """One change of :attr:`LiveMemory.changes` in words."""
    sizes = f"{format_bytes(change['from_bytes'])} -> {format_bytes(change['to_bytes'])}"
    failed = f"; failed: {change['error']}" if "error" in change else ""
    return f"memory {sizes}, {change['placement']} ({change['reason']}){failed}"


def set_memory(engine: Engine, memory: int | str, *, on_load: Progress | None = None) -> Plan:
    """Gives the engine another budget; what it holds shrinks or grows, the text stays the same.

    Works from any thread, also while a request runs: it waits for the end of the pass that is being computed (a
    :meth:`edge.Engine.score` or a session being saved is one), and the next pass runs inside the new budget. The
    context stays; keys and values move to a drive or back where ``kv="auto"`` allows it. What is no longer needed is
    given back before anything is read, and what stays is not read again.

    Args:
        memory: as for :func:`edge.load`.
        on_load: called with (bytes done, bytes) while weights are read.

    Returns:
        Plan: the one now in place.

    Raises:
        BudgetError: below the floor, which its message and ``floor_bytes`` name; the engine keeps its old budget.
        ArgumentError: not a size.
        DiskError, CorruptError: the drive failed; the engine keeps its old budget, and tries again to read what that
            needs when next asked to compute.
        EdgeError: called by the pass that is being computed, or the engine is closed.
    """
    memory_bytes = parse_bytes(memory)
    with engine._passes.between():
        engine._open_core()
        if engine._memory is None:
            raise EdgeError("engine: its memory cannot change: it was not made by edge.load()")
        engine._memory.set(engine, memory_bytes, on_load)
        return engine.plan
