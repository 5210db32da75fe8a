"""The look-up tables of speculation, against a search through the whole text."""

from __future__ import annotations

import random

import _edge
import pytest

from edge.errors import ArgumentError

#: Contexts whose latest end is kept exactly.
FRESH = 24


def repeats(text: list[int]) -> dict[int, dict[int, int]]:
    """Length of an end of the text that occurred before -> token that followed it -> where that stood last.

    What stands last of all counts only where it is the only one.
    """
    found: dict[int, dict[int, int]] = {}
    n = len(text)
    for length in range(1, n):
        after = {
            text[i + length]: i + length for i in range(n - length) if text[i : i + length] == text[-length:]
        }
        if not after:
            break
        earlier = {
            t: end
            for i in range(n - length - 1)
            if text[i : i + length] == text[-length:]
            for t, end in [(text[i + length], i + length)]
        }
        found[length] = after | earlier
    return found


TEXTS = {
    "two letters": lambda rng: [rng.randrange(2) for _ in range(120)],
    "some letters": lambda rng: [rng.randrange(6) for _ in range(150)],
    "one letter": lambda rng: [7] * 20,
    "a period": lambda rng: [1, 2, 3, 1, 4] * 6,
    "a copy": lambda rng: (lambda part: [*part, 99, *part])([rng.randrange(20) for _ in range(60)]),
    "no repeats": lambda rng: list(range(100)),
    "large ids": lambda rng: [(1 << 31) - 1 - rng.randrange(3) for _ in range(60)],
}


@pytest.mark.parametrize("kind", TEXTS)
def test_every_context_is_found_with_all_that_followed_it(kind: str) -> None:
    text = TEXTS[kind](random.Random(3))
    automaton = _edge.SuffixAutomaton(len(text))
    for n, token in enumerate(text):
        automaton.append(token)
        expected, found = repeats(text[: n + 1]), automaton.contexts()
        lengths = [length for length, _ in found]
        assert lengths == sorted(set(lengths), reverse=True)
        assert lengths[:1] == ([max(expected)] if expected else [])
        for place, (length, after) in enumerate(found):
            assert {t for t, _ in after} == expected[length].keys()
            for t, end in after:
                # Any end is a true one; those of the longest contexts are the latest.
                assert text[end - length : end + 1] == [*text[n + 1 - length : n + 1], t]
                assert end == expected[length][t] or place + len(found) > FRESH
        # A length between two of them ends wherever the longer one does.
        for length in expected:
            nearest = min(other for other in lengths if other >= length)
            assert expected[length].keys() == expected[nearest].keys()


def test_it_holds_what_it_was_made_for() -> None:
    automaton = _edge.SuffixAutomaton(5)
    for token in (1, 1, 2, 1, 1):
        automaton.append(token)
    assert automaton.contexts()[0] == (2, [(2, 2)])
    with pytest.raises(ArgumentError, match="full"):
        automaton.append(1)
    for size in (0, 1 << 40):
        with pytest.raises(ArgumentError, match=r"expected room for 1\.\."):
            _edge.SuffixAutomaton(size)
