"""When others need memory: gives some of the budget back before the kernel kills, and takes it again later.

What counts is the room that is left when this engine has filled its whole budget: of the machine (MemAvailable) and of
every memory cgroup (limit less usage, page cache taken as free), whichever is less. A stall that the kernel reports
(PSI) doubles what is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from flashload.machine import format_bytes, rss_bytes
from flashload.plan import Plan
from flashload.room import Room, RoomReader

#: What should be left: this much, or this share of the limit where that is more.
_MARGIN_BYTES, _MARGIN_SHARE = 64 << 20, 0.03
#: A budget that leaves less than that by itself is taken at its word: others have to take half of what it left, and at
#: least this much, before it gives way.
_JITTER_BYTES = 8 << 20
#: Nothing is given or taken in smaller steps than this share of what is held.
_LEAST_STEP = 0.05
_CHECK_SECONDS = 0.1
#: Room must stay this long before it is taken again; and a step must have had time to show.
_GROW_SECONDS, _SETTLE_SECONDS = 5.0, 0.3


@dataclass(frozen=True)
class Change:
    """The budget to go to, and why."""

    memory_bytes: int
    reason: str


class Pressure:
    """Watches one engine's surroundings; asked between tokens, reads a few small files at most ten times a second.

    Args:
        wanted_bytes: the budget that the user named; it is never passed.
        outside_bytes: what the process holds for other things than this engine.
        room: where limits are; held: memory of this process; clock: seconds. Tests bring their own.
    """

    def __init__(
        self,
        wanted_bytes: int,
        outside_bytes: int = 0,
        *,
        room: RoomReader | None = None,
        held: Callable[[], int] = rss_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._room = room or RoomReader()
        self._held = held
        self._outside_bytes = outside_bytes
        self._clock = clock
        self._next_check = float("-inf")
        self.restart(wanted_bytes)

    def restart(self, wanted_bytes: int) -> None:
        """The user named a budget: what it leaves now is what it may leave."""
        self._wanted_bytes = wanted_bytes
        self._left_at_first: int | None = None
        self._room_since: float | None = None

    @property
    def due(self) -> bool:
        """Whether it is time to look again: a reading of the clock, which needs no lock."""
        return self._clock() >= self._next_check

    def check(self, plan: Plan) -> Change | None:
        """The budget to change to, if any; most calls return at once.

        Args:
            plan: the one in place.
        """
        now = self._clock()
        if now < self._next_check:
            return None
        self._next_check = now + _CHECK_SECONDS
        room = self._room.tightest()
        if room is None:
            return None
        # What the plan allows and nothing has touched yet will be taken too.
        untouched = max(0, plan.predicted_peak_bytes - (self._held() - self._outside_bytes))
        left = room.left_bytes - untouched
        if self._left_at_first is None:
            self._left_at_first = left
        margin = max(_MARGIN_BYTES, int(_MARGIN_SHARE * room.limit_bytes)) * (2 if room.stalled else 1)
        least = min(margin, self._left_at_first // 2, self._left_at_first - _JITTER_BYTES)
        if left < least:
            change = self._shrink(plan, room, left, least, margin)
        else:
            change = self._grow(plan, room, left, margin, now)
        if change is not None:
            self._room_since = None
            self._next_check = now + _SETTLE_SECONDS
        return change

    def _shrink(self, plan: Plan, room: Room, left: int, least: int, margin: int) -> Change | None:
        self._room_since = None
        if plan.memory_bytes <= plan.floor_bytes:
            return None
        # A budget may be more than the model has use for: only less than that gives anything back.
        used = min(plan.memory_bytes, plan.predicted_peak_bytes)
        step = max(least - left + margin // 2, int(_LEAST_STEP * used))
        return Change(max(1, used - step), f"pressure: {format_bytes(max(0, left))} left of {_limit(room)}")

    def _grow(self, plan: Plan, room: Room, left: int, margin: int, now: float) -> Change | None:
        missing = self._wanted_bytes - plan.memory_bytes
        assert self._left_at_first is not None
        # Half a margin above where shrinking begins, so that nothing swings.
        step = min(missing, left - min(margin + margin // 2, self._left_at_first))
        if missing <= 0 or step < min(missing, int(_LEAST_STEP * plan.memory_bytes)):
            self._room_since = None
            return None
        if self._room_since is None:
            self._room_since = now
        if now - self._room_since < _GROW_SECONDS:
            return None
        return Change(plan.memory_bytes + step, f"room: {format_bytes(left)} left of {_limit(room)}")


def _limit(room: Room) -> str:
    of = "the machine's" if room.where == "machine" else f"{room.where}'s"
    return f"{of} {format_bytes(room.limit_bytes)}"
