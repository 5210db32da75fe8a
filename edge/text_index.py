"""Texts found by how they begin: a hash of every sixteen tokens and all before them, so that a look-up compares few."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]

#: Tokens of a step; what two texts share below it is not found.
STEP_TOKENS = 16


class HasTokens(Protocol):
    """What an index holds."""

    tokens: Tokens


_T = TypeVar("_T", bound=HasTokens)


def n_common(first: Tokens, second: Tokens) -> int:
    """How many tokens two texts begin alike."""
    n = min(len(first), len(second))
    differ = np.flatnonzero(first[:n] != second[:n])
    return int(differ[0]) if len(differ) else n


def _marks(tokens: Tokens) -> Iterator[int]:
    """A hash of the first step, of the first two, and so on; equal ones need not mean equal texts."""
    mark = 0
    for end in range(STEP_TOKENS, len(tokens) + 1, STEP_TOKENS):
        mark = hash((mark, tokens[end - STEP_TOKENS : end].tobytes()))
        yield mark


class TextIndex(Generic[_T]):
    """Texts by their marks: together a radix tree whose edges are steps."""

    def __init__(self) -> None:
        self._at: dict[int, list[_T]] = {}

    def add(self, text: _T) -> None:
        """Makes a text known."""
        for mark in _marks(text.tokens):
            self._at.setdefault(mark, []).append(text)

    def remove(self, text: _T) -> None:
        """Forgets a text that was added."""
        for mark in _marks(text.tokens):
            texts = self._at[mark]
            texts.remove(text)
            if not texts:
                del self._at[mark]

    def best(self, tokens: Tokens, wanted: Callable[[_T], bool]) -> tuple[_T | None, int]:
        """Of the ``wanted`` texts the one that shares most with ``tokens``, the latest of several; and how much."""
        for mark in reversed([mark for mark in _marks(tokens) if mark in self._at]):
            found = [text for text in reversed(self._at[mark]) if wanted(text)]
            best = max(found, key=lambda text: n_common(text.tokens, tokens), default=None)
            if best is not None and (n := n_common(best.tokens, tokens)) >= STEP_TOKENS:
                return best, n
        return None, 0

    def begun_by(self, tokens: Tokens) -> list[_T]:
        """The texts that ``tokens`` begins with or is."""
        texts = {id(text): text for mark in _marks(tokens) for text in self._at.get(mark, ())}
        return [text for text in texts.values() if n_common(text.tokens, tokens) == len(text.tokens)]
