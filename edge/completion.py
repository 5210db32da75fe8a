"""What a request gives back, and how text is cut at stop strings while it streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TokenLogprob:
    """One token's log-probability under the model, before any sampling filter.

    Attributes:
        token: its id.
        logprob: natural logarithm.
        top: the most likely ids with theirs, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed text.

    Attributes:
        text: whole characters only; may be empty while a character or a possible stop string is incomplete.
        token: the token behind it, or None for the last, flushing chunk.
        finish_reason: set on the last chunk only.
        stats: set on the last chunk only.
        index: which of several prompts it belongs to.
    """

    text: str
    token: int | None = None
    logprob: TokenLogprob | None = None
    finish_reason: str | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    index: int = 0


@dataclass(frozen=True)
class Completion:
    """A finished text.

    Attributes:
        text: the generated text, without prompt and stop string.
        tokens: the generated ids (an end-of-text token included).
        finish_reason: "stop" (end of text or a stop string), "length", or "cancelled".
        stats: counts, seconds, tokens per second, bytes; the keys of ``edge run --json``.
        logprobs: one per token, when asked for.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    stats: dict[str, Any]
    logprobs: list[TokenLogprob] | None = None


class StopScanner:
    """Cuts a stream of text at the first stop string, holding back what may still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is safe to show now; after a stop string :attr:`stopped` is set and nothing more comes."""
        if not self._stops:
            return text
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text begin `stop`."""
        for n in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:n]):
                return n
        return 0


def collect(chunks: Iterator[Chunk], logprobs: int | None) -> Completion:
    """The whole text of one request's chunks."""
    text: list[str] = []
    tokens: list[int] = []
    details: list[TokenLogprob] = []
    reason, stats = "length", {}
    for chunk in chunks:
        text.append(chunk.text)
        if chunk.token is not None:
            tokens.append(chunk.token)
        if chunk.logprob is not None:
            details.append(chunk.logprob)
        if chunk.finish_reason is not None:
            reason, stats = chunk.finish_reason, chunk.stats
    return Completion("".join(text), tokens, reason, stats, details if logprobs is not None else None)
