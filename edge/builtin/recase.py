"""Gives lower-cased story text its capitals back, learnt from cased text of the same kind.

Whether a word is capitalised is decided by counts over its surroundings: the characters between it and
the word before (``'. '``, ``', "'``, ``'\\n'``...), the word before and the word after, backing off from
the whole context to the word alone. Names that the cased text does not hold are found per story behind
"named" and "called".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_INTRODUCED = re.compile(r"\b(?:named|name was|name is|named is)[,:]? [\"'“]?([^\W\d_]+)")
_CALLED = re.compile(r"\bcalled [\"'“]?([^\W\d_]+)[\"'”]?[.,!]")
_MIN_COUNT = 3  # contexts seen less often than this are left to the next, wider one

_Context = tuple[str, ...]


def _contexts(text: str) -> Iterator[tuple[re.Match[str], list[_Context]]]:
    """Each word of the text with its contexts, the narrowest first."""
    words = list(_WORD.finditer(text))
    lowered = [match.group().lower() for match in words]
    end = 0
    for i, match in enumerate(words):
        gap = text[end : match.start()][-4:]
        before = lowered[i - 1] if i else ""
        after = lowered[i + 1] if i + 1 < len(words) else ""
        word = lowered[i]
        end = match.end()
        contexts: list[_Context] = [
            ("both", gap, word, before, after),
            ("before", gap, word, before),
            ("after", gap, word, after),
            ("word", gap, word),
        ]
        yield match, contexts


class Recaser:
    """Capital counts learnt from cased stories; `restore` applies them to a lower-cased one."""

    def __init__(self, cased_stories: Iterable[str]) -> None:
        self._counts: dict[_Context, list[int]] = defaultdict(lambda: [0, 0])  # [lower, capital]
        self._forms: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._gaps: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for story in cased_stories:
            for match, contexts in _contexts(story):
                capital = int(match.group()[0].isupper())
                for context in contexts:
                    self._counts[context][capital] += 1
                gap = contexts[-1][1]
                self._gaps[gap][capital] += 1
                if gap == " ":
                    self._forms[match.group().lower()][match.group()] += 1

    def _is_name(self, word: str) -> bool:
        forms = self._forms.get(word)
        return not forms or sum(n for form, n in forms.items() if form[0].islower()) < _MIN_COUNT

    def _capitalises(self, contexts: list[_Context], names: set[str]) -> bool:
        gap, word = contexts[-1][1], contexts[-1][2]
        if word in names:
            return True
        for context in contexts:
            seen = self._counts.get(context)
            if seen and sum(seen) >= _MIN_COUNT:
                return seen[1] > seen[0]
        lower, capital = self._gaps.get(gap, (1, 0))
        forms = self._forms.get(word, {})
        if sum(n for form, n in forms.items() if form[0].isupper()) * 2 > sum(forms.values()):
            return True
        return capital > lower

    def restore(self, story: str) -> str:
        """The lower-cased story with capitals at sentence starts, in quotes, for "I" and for names."""
        names = {word for word in _INTRODUCED.findall(story) + _CALLED.findall(story) if self._is_name(word)}
        parts: list[str] = []
        end = 0
        for match, contexts in _contexts(story):
            parts.append(story[end : match.start()])
            word = match.group()
            parts.append(word[0].upper() + word[1:] if self._capitalises(contexts, names) else word)
            end = match.end()
        parts.append(story[end:])
        return "".join(parts)
