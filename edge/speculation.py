"""What a request asks of speculation, and the core's part that does it.

Speculation guesses the next tokens and verifies the guesses in one pass. With the default acceptance the text is the
same token for token whether it is on or off: only time changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from flashload.errors import ArgumentError, BudgetError, UnsupportedModelError

if TYPE_CHECKING:
    import _edge

    from edge.tokenizer import Tokenizer

DRAFTERS = ("lookup", "draft", "self", "medusa", "lookahead")
ACCEPTANCES = ("coupling", "rejection", "typical")
_OFF = "off"
_AUTO = "auto"
#: Tokens of the text that look-ups remember; some 100 bytes each.
LOOKUP_WINDOW_TOKENS = 8192
_LONGEST_DEPTH, MOST_ROWS = 16, 128


@dataclass(frozen=True)
class Speculation:
    """Settings of speculation; a dict with these keys is what ``speculation=`` takes in its long form.

    Attributes:
        drafters: who guesses: "lookup" (what followed the same words before), "draft" (the smaller model given to
            :func:`edge.load`), "self" (a copy of the model at fewer bits, from ``draft="self"``), "medusa" (heads
            that came with the model), "lookahead" (the model's own n-grams, at the price of many rows a pass). Empty:
            all there are, lookahead only where weights stream. Their guesses are merged into one tree.
        acceptance: "coupling" gives the very tokens of the plain run. "rejection" is exact in distribution, but its
            tokens depend on what was drafted. "typical" is lossy: it takes what is likely enough.
        depth: how far ahead each guesses; 0 leaves depth and tree to the controller, which turns drafters off that
            do not pay.
        max_rows: rows of one verification pass at most.
        lookahead_window, lookahead_n, lookahead_grams: columns of the window, tokens of an n-gram, and n-grams kept
            for one first token; a pass carries window * (n - 1) rows for it.
    """

    drafters: tuple[str, ...] = ()
    acceptance: str = "coupling"
    depth: int = 0
    max_rows: int = 33
    lookahead_window: int = 5
    lookahead_n: int = 4
    lookahead_grams: int = 3

    def __post_init__(self) -> None:
        drafters = (self.drafters,) if isinstance(self.drafters, str) else self.drafters
        if not isinstance(drafters, (list, tuple)) or not all(name in DRAFTERS for name in drafters):
            raise ArgumentError(
                f"speculation: drafters: expected names of {', '.join(DRAFTERS)}, found {self.drafters!r}"
            )
        object.__setattr__(self, "drafters", tuple(dict.fromkeys(drafters)))
        if self.acceptance not in ACCEPTANCES:
            raise ArgumentError(
                f"speculation: acceptance: expected one of {', '.join(ACCEPTANCES)}, found {self.acceptance!r}"
            )
        for name, low, high in (
            ("depth", 0, _LONGEST_DEPTH),
            ("max_rows", 2, MOST_ROWS),
            ("lookahead_window", 1, 32),
            ("lookahead_n", 2, 8),
            ("lookahead_grams", 1, 32),
        ):
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


@dataclass(frozen=True)
class Drafting:
    """What an engine has to draft with, besides the text itself.

    Attributes:
        draft: the core of a draft model, or of a copy of the model.
        medusa: whether the model's heads may be loaded.
        streams: whether weights come from the drive in every pass, so that rows cost next to nothing.
        notes: why something that was asked for is missing.
        draft_is_copy: which of the two it is.
        words: the tokenizers of the model and of its draft, where these differ.
    """

    draft: _edge.Engine | None = None
    medusa: bool = False
    streams: bool = False
    notes: tuple[str, ...] = ()
    draft_is_copy: bool = False
    words: tuple[Tokenizer, Tokenizer] | None = None

    def by_default(self, drafter: str) -> bool:
        """Whether "auto" uses it."""
        return self.has(drafter) and (drafter != "lookahead" or self.streams)

    def has(self, drafter: str) -> bool:
        """Whether it can be used at all."""
        drafts = self.draft is not None
        there = {
            "draft": drafts and not self.draft_is_copy,
            "self": drafts and self.draft_is_copy,
            "medusa": self.medusa,
        }
        return there.get(drafter, True)


_MISSING = {
    "draft": "a draft model: load the model with draft=",
    "self": "a copy of the model: load it with draft='self'",
    "medusa": "a model that comes with Medusa heads",
}


class Speculators:
    """One engine's drafters, made when first asked for, and what was learned of them under one placement."""

    def __init__(self, core: _edge.Engine, context: int, drafting: Drafting) -> None:
        self._core = core
        self._context = context
        self._drafting = drafting
        self._speculator: _edge.Speculator | None = None
        self._made: dict[str, object] = {}
        self._settings: Speculation | None = None
        self._past: Mapping[str, Any] = {}

    def forget(self) -> None:
        """Gives all memory of the drafters back."""
        self._past = self.stats()
        self._speculator = None
        self._made = {}
        self._settings = None
        self._drafting = Drafting()

    def renew(self, drafting: Drafting) -> None:
        """From now on drafts with these, made when next asked for."""
        self._drafting = drafting

    def stats(self) -> dict[str, Any]:
        """Counts since the engine was loaded, those of drafters that were given back included."""
        past, now = self._past, {} if self._speculator is None else self._speculator.stats()
        drafters: dict[str, dict[str, Any]] = {}
        for part in (past, now):
            for name, counts in part.get("drafters", {}).items():
                sums = drafters.setdefault(name, dict.fromkeys(counts, 0))
                drafters[name] = {key: sums[key] + counts[key] for key in counts}
        keys = ("passes", "tokens", "plain_passes", "saved_ms")
        sums = {key: past.get(key, 0) + now.get(key, 0) for key in keys}
        return {**sums, "drafters": drafters}

    def configured(self, settings: Speculation, begins: bool = True) -> _edge.Speculator:
        """The core's speculator for these settings, its memory inside the engine's budget.

        Args:
            begins: a request begins. One that runs already goes on without a drafter that lost its memory.

        Raises:
            ArgumentError: a drafter was named that this engine has not.
            BudgetError: it does not fit.
        """
        import _edge

        if self._speculator is not None and settings is self._settings:
            return self._speculator
        for name in settings.drafters:
            if begins and not self._drafting.has(name):
                why = "; ".join(self._drafting.notes)
                raise ArgumentError(
                    f"speculation: {name}: expected {_MISSING[name]}, found none"
                    + (f" ({why})" if why else "")
                )
        if self._speculator is None:
            self._speculator = _edge.Speculator(self._core)
        drafters = []
        # A draft model first: under rejection what was drawn from a distribution comes before mere guesses.
        for name in ("draft", "self", "medusa", "lookup", "lookahead"):
            wanted = name in settings.drafters or (not settings.drafters and self._drafting.by_default(name))
            if wanted and self._drafting.has(name) and self._make(name, settings, begins):
                drafters.append(name)
        self._speculator.configure(
            depth=settings.depth,
            max_rows=settings.max_rows,
            acceptance=settings.acceptance,
            drafters=drafters or ["none"],
            always=["lookahead"] if "lookahead" in settings.drafters else [],
        )
        self._settings = settings
        return self._speculator

    def measure(self) -> None:
        """Makes the drafters of "auto" and learns what they and passes over several rows cost here."""
        self.configured(Speculation()).measure()

    def _make(self, name: str, settings: Speculation, begins: bool) -> bool:
        speculator = self._speculator
        assert speculator is not None
        window = (settings.lookahead_window, settings.lookahead_n, settings.lookahead_grams)
        key = window if name == "lookahead" else None
        if name in self._made and self._made[name] == key:
            return True
        try:
            if name in ("draft", "self") and self._drafting.draft is not None:
                self._add_draft(speculator, self._drafting.draft, name == "self")
            elif name == "medusa":
                speculator.add_medusa()
            elif name == "lookup":
                speculator.add_lookup(min(self._context, LOOKUP_WINDOW_TOKENS))
            elif name == "lookahead":
                speculator.add_lookahead(*window)
        except (BudgetError, UnsupportedModelError):
            if settings.drafters and begins:
                raise
            return False  # nobody asked for this one by name
        self._made[name] = key
        return True

    def _add_draft(self, speculator: _edge.Speculator, draft: _edge.Engine, is_copy: bool) -> None:
        words = self._drafting.words
        if words is None:
            speculator.add_draft(draft, is_copy)
            return
        from edge.translation import TranslatedDraft

        speculator.add_callback(TranslatedDraft(draft, draft.context, *words).propose, "draft")


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
        then = before["drafters"].get(name, dict.fromkeys(now, 0))
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
