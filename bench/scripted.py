"""Drafters that do as they are told: of a stated acceptance, always right, never right, or full of nonsense.

They guess from a text known beforehand, in no time and with no memory: what they gain is the most that a drafter of
that acceptance would.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import _edge

from edge import speculation

#: (token, parent) pairs below the root, which is 0.
Nodes = Sequence[tuple[int, int]]
#: (the text so far, how many nodes a tree holds) -> guesses.
Propose = Callable[[list[int], int], Nodes]


def chain(tokens: Sequence[int]) -> Nodes:
    """A tree without branches."""
    return [(token, i) for i, token in enumerate(tokens)]


def oracle(text: Sequence[int], depth: int) -> Propose:
    """Guesses the next ``depth`` tokens of a text."""
    return lambda tokens, _: chain(text[len(tokens) : len(tokens) + depth])


def scripted(text: Sequence[int], rate: float, depth: int, vocab: int, seed: int = 0) -> Propose:
    """As :func:`oracle`, but each guess is right with probability ``rate``."""

    def propose(tokens: list[int], max_nodes: int) -> Nodes:
        # Chances belong to places of the text, so that every run meets the same.
        ahead = range(len(tokens), min(len(tokens) + min(depth, max_nodes - 1), len(text)))
        right = [random.Random(1_000_003 * seed + place).random() < rate for place in ahead]
        return chain(
            [text[at] if ok else (text[at] + 1) % vocab for at, ok in zip(ahead, right, strict=True)]
        )

    return propose


def wrong(text: Sequence[int], depth: int, vocab: int) -> Propose:
    """Never right: every guess is the token after the right one."""
    return scripted(text, 0.0, depth, vocab)


def at_random(seed: int, vocab: int) -> Propose:
    """Any tokens below any nodes, out of range at both ends, and more than fit."""

    def propose(tokens: list[int], max_nodes: int) -> Nodes:
        choose = random.Random(seed * 1000 + len(tokens))
        n = choose.randrange(max_nodes + 5)
        return [(choose.randrange(-2, vocab + 3), choose.randrange(-1, i + 2)) for i in range(n)]

    return propose


def half_right(text: Sequence[int], vocab: int) -> Propose:
    """A tree whose path is right for a while, with wrong siblings before and behind it, and doubles."""

    def propose(tokens: list[int], _: int) -> Nodes:
        nodes: list[tuple[int, int]] = []
        parent = 0
        for token in text[len(tokens) : len(tokens) + 1 + len(tokens) % 4]:
            nodes += [((token + 3) % vocab, parent), (token, parent), ((token + 5) % vocab, parent)]
            nodes += [(token, parent)]
            parent = len(nodes) - 2
        return nodes

    return propose


def adversaries(text: Sequence[int], vocab: int) -> dict[str, Propose]:
    """Every kind of proposal that a verifier must not be misled by."""
    return {
        "oracle": oracle(text, 5),
        "wrong": wrong(text, 4, vocab),
        "half right": half_right(text, vocab),
        "random": at_random(1, vocab),
        "out of range": lambda tokens, _: [(-1, 0), (vocab, 0), (1 << 30, 0), (text[0], 9), (text[0], -1)],
        "root again": lambda tokens, _: [(tokens[-1], 0)] * 9,
        "empty": lambda tokens, _: [],
    }


@contextmanager
def guessing(propose: Propose, depth: int = 16, max_rows: int = 33) -> Iterator[None]:
    """While it lasts all guesses are what ``propose`` says, whatever is asked for."""

    met: list[Any] = []

    def restart(speculators: Any) -> None:
        drafting = speculators._drafting
        speculators.forget()
        speculators.renew(drafting)

    def configured(self: Any, settings: speculation.Speculation, begins: bool = True) -> _edge.Speculator:
        if begins or self._speculator is None:
            restart(self)
            met.append(self)
            self._speculator = _edge.Speculator(self._core)
            self._speculator.add_callback(propose)
            self._speculator.configure(depth=depth, max_rows=max_rows)
        return self._speculator

    with patch.object(speculation.Speculators, "configured", configured):
        try:
            yield
        finally:
            for speculators in met[-1:]:
                restart(speculators)
