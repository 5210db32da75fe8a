"""What a request asks of speculation, and the core's part that does it.

Speculation guesses the next tokens and verifies the guesses in one pass. With the default acceptance the text is the
same token for token whether it is on or off: only time changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from flashload.errors import ArgumentError

if TYPE_CHECKING:
    import _edge

DRAFTERS = ("lookup",)
_OFF = "off"
_AUTO = "auto"
#: Tokens of the text that look-ups remember; 16 bytes each.
_LOOKUP_WINDOW_TOKENS = 8192
_LONGEST_DEPTH, _MOST_ROWS = 16, 128


@dataclass(frozen=True)
class Speculation:
    """Settings of speculation; a dict with these keys is what ``speculation=`` takes in its long form.

    Attributes:
        drafters: who guesses: "lookup" (what followed the same words before). Guesses are merged into one tree.
        depth: how far ahead each guesses; 0 leaves depth and tree to the controller, which turns drafters off that
            do not pay.
        max_rows: rows of one verification pass at most.
    """

    drafters: tuple[str, ...] = DRAFTERS
    depth: int = 0
    max_rows: int = 17

    def __post_init__(self) -> None:
        drafters = (self.drafters,) if isinstance(self.drafters, str) else self.drafters
        if not isinstance(drafters, (list, tuple)) or not drafters or not set(drafters) <= set(DRAFTERS):
            raise ArgumentError(
                f"speculation: drafters: expected names of {', '.join(DRAFTERS)}, found {self.drafters!r}"
            )
        object.__setattr__(self, "drafters", tuple(dict.fromkeys(drafters)))
        for name, low, high in (("depth", 0, _LONGEST_DEPTH), ("max_rows", 2, _MOST_ROWS)):
            found = getattr(self, name)
            if isinstance(found, bool) or not isinstance(found, int) or not low <= found <= high:
                raise ArgumentError(
                    f"speculation: {name}: expected an integer in {low}..{high}, found {found!r}"
                )


def parse(setting: object) -> Speculation | None:
    """Settings from "auto", "off", a drafter's name, or a mapping of :class:`Speculation`'s fields; None is off.

    Raises:
        ArgumentError: names what was expected and what was found.
    """
    if setting == _OFF:
        return None
    if setting == _AUTO:
        return Speculation()
    if isinstance(setting, str) and setting in DRAFTERS:
        return Speculation(drafters=(setting,))
    if isinstance(setting, Mapping):
        known = [field.name for field in fields(Speculation)]
        unknown = [str(key) for key in setting if key not in known]
        if unknown:
            raise ArgumentError(
                f"speculation: unknown setting {unknown[0]!r}; expected some of {', '.join(known)}"
            )
        return Speculation(**setting)
    names = ", ".join((_AUTO, _OFF, *DRAFTERS))
    raise ArgumentError(f"speculation: expected one of {names}, or a mapping of settings, found {setting!r}")


def make_speculator(core: _edge.Engine, settings: Speculation, context: int) -> _edge.Speculator:
    """The core's speculator for these settings, its memory inside the engine's budget."""
    import _edge

    speculator = _edge.Speculator(core, depth=settings.depth, max_rows=settings.max_rows)
    if "lookup" in settings.drafters:
        speculator.add_lookup(min(context, _LOOKUP_WINDOW_TOKENS))
    return speculator


def spent(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, Any]:
    """What speculation did between two readings of ``Speculator.stats()``: the part of a completion's stats.

    Keys: passes and plain_passes (over drafts, and over one token), tokens_per_pass (of all decoding passes),
    saved_seconds (against a plain pass per token), drafters (name -> tried, accepted, acceptance, seconds).
    """
    if before is None or after is None:
        return {"passes": 0, "plain_passes": 0, "tokens_per_pass": 1.0, "saved_seconds": 0.0, "drafters": {}}

    def grown(key: str) -> Any:
        return after[key] - before[key]

    passes, plain = grown("passes"), grown("plain_passes")
    drafters = {}
    for name, now in after["drafters"].items():
        then = before["drafters"][name]
        tried, accepted = now["tried"] - then["tried"], now["accepted"] - then["accepted"]
        drafters[name] = {
            "tried": tried,
            "accepted": accepted,
            "acceptance": accepted / tried if tried else 0.0,
            "seconds": (now["ms"] - then["ms"]) / 1000,
        }
    n_passes = passes + plain
    return {
        "passes": passes,
        "plain_passes": plain,
        "tokens_per_pass": (grown("tokens") + plain) / n_passes if n_passes else 1.0,
        "saved_seconds": grown("saved_ms") / 1000,
        "drafters": drafters,
    }
