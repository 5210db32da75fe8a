"""What one rendering may cost, and the meter that stops it.

A sandbox keeps a template from reaching out; it does not keep it from looping or padding for ever. Costs are
counted, so the same template stops at the same place on every machine; the clock is only the last guard.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from flashload.errors import TemplateError


@dataclass(frozen=True)
class Limits:
    """Bounds of one rendering; ``input`` is the size of the conversation (see :func:`limits_for`).

    Attributes:
        output_chars: longest text rendered, and longest string made on the way.
        made_chars: characters of all strings made, less those known to be gone (this bounds memory).
        steps: syntax-tree nodes evaluated; long operations on strings and lists count as several.
        depth: macro calls inside each other.
        seconds: processor time of the rendering thread.
    """

    output_chars: int = 1 << 20
    made_chars: int = 1 << 22
    steps: int = 200_000
    depth: int = 32
    seconds: float = 0.9


def limits_for(base: Limits, input_values: int, input_chars: int) -> Limits:
    """``base`` widened for a conversation: what a template may do grows with what it was given.

    Most templates walk each message once (30 to 200 steps were counted over 28 real ones) and copy its text
    up to 8 times; one looks at all messages again for each. Hence a linear and a small quadratic part.
    """
    pairs = input_values * input_values
    return Limits(
        base.output_chars + 2 * input_chars,
        base.made_chars + 16 * input_chars + min(8 * pairs, 1 << 25),
        base.steps + 500 * input_values + pairs + input_chars // 8,
        base.depth,
        base.seconds + input_values * 1e-3 + input_chars * 1e-7,
    )


class Meter:
    """Counts the costs of one rendering; raises TemplateError naming the template and the limit."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name = name
        self.limits = limits
        self.steps = 0
        self.made_chars = 0
        self.depth = 0
        self._look_at_clock = 0
        self._deadline = time.thread_time() + limits.seconds

    def stop(self, what: str) -> TemplateError:
        """The error that says which limit was reached."""
        return TemplateError(f"chat template {self.name!r} stopped: {what}")

    def step(self, n: int = 1) -> None:
        """Count ``n`` steps of about a microsecond each."""
        self.steps += n
        if self.steps > self.limits.steps:
            raise self.stop(f"more than {self.limits.steps} steps")
        if self.steps >= self._look_at_clock:
            self._look_at_clock = self.steps + 256
            if time.thread_time() > self._deadline:
                raise self.stop(f"more than {self.limits.seconds:.1f} s of processor time")

    def text(self, n: int) -> None:
        """Count a string of ``n`` characters; call it before the string is made."""
        if n > self.limits.output_chars:
            raise self.stop(f"a text of {n} characters, at most {self.limits.output_chars} allowed")
        self.made_chars += n
        if self.made_chars > self.limits.made_chars:
            raise self.stop(f"texts of more than {self.limits.made_chars} characters in all")
        self.step(1 + (n >> 10))

    def freed(self, n: int) -> None:
        """Take back a string of ``n`` characters that nothing refers to any more."""
        self.made_chars = max(0, self.made_chars - n)

    def items(self, n: int) -> None:
        """Count a list of ``n`` items (8 bytes each); call it before the list is made."""
        self.text(8 * n)
        self.step(n >> 3)

    def integer(self, value: Any) -> Any:
        """``value`` unless it is an integer beyond 64 bits."""
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise self.stop("an integer beyond 64 bits")
        return value
