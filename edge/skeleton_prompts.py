"""The texts that Skeleton-of-Thought sends to a model, and how what it writes back is read."""

from __future__ import annotations

import re
from collections.abc import Sequence

#: Points an answer may have (Ning et al., arXiv 2307.15337, section 3.1); with fewer there is little to share a pass.
MIN_POINTS, MAX_POINTS = 3, 10
#: A point of a skeleton is a few words; longer ones are an answer already, and are cut.
MAX_POINT_WORDS = 12

#: What the model's turn begins with, so that it writes a list and no preface.
SKELETON_REPLY = "1."

_SKELETON = """\
You plan answers. For the question below give only the skeleton of the answer, not the answer itself: a numbered list \
(1., 2., 3., and so on) of 3 to 10 points, each a title of 3 to 5 words and no whole sentence.

Question:
What helps to fall asleep earlier?
Skeleton:
1. Fixed bedtime
2. Less light at night
3. No late coffee
4. Cool, quiet bedroom
5. Calm evening habits

Question:
Why do cities plant trees?
Skeleton:
1. Shade and cooler streets
2. Cleaner air
3. Less flooding
4. Homes for birds
5. Pleasant places to walk

Question:
{question}
Skeleton:"""

_POINT = """\
You write one part of an answer, and others write the other parts.

Question:
{question}

Skeleton of the whole answer:
{skeleton}

Write only the point that is named last, in one or two short sentences; do not go on with other points. \
The point to write is number {number}."""

_CHOICE = """\
Question:
{question}

How would a good answer to this question be organised?
A. As a list of points, each of which can be written without knowing what the others say.
B. As a list of points or steps that build on the ones before them.
C. Not as a list.

Reply with one letter, A, B or C, and nothing else."""

_NUMBERED = re.compile(r"^[\s>*_#]*(\d{1,3})\s*[.):][*_]*\s*(.*)$")
_BULLET = re.compile(r"^\s*[-*•–]\s+(.*)$")
_INLINE = re.compile(r"(?<=\S)\s+(?=(\d{1,2})[.)]\s)")
_LETTER = re.compile(r"\b([ABC])\b")


def skeleton_prompt(question: str) -> str:
    """Asks for the points of an answer (arXiv 2307.15337, section 2.1); the reply begins with SKELETON_REPLY."""
    return _SKELETON.format(question=question)


def point_prompt(question: str, points: Sequence[str], number: int) -> str:
    """Asks for point ``number`` (from 1) of the answer; prompts of one answer differ in their last characters only."""
    listed = "\n".join(f"{i}. {title}" for i, title in enumerate(points, 1))
    return _POINT.format(question=question, skeleton=listed, number=number)


def point_reply(points: Sequence[str], number: int) -> str:
    """What the model's turn begins with when it writes point ``number``."""
    return f"{number}. {points[number - 1]}:"


def choice_prompt(question: str) -> str:
    """Asks whether an answer is a list of independent points (A), dependent ones (B) or no list (C); section 4.1."""
    return _CHOICE.format(question=question)


def parse_choice(text: str) -> str | None:
    """The letter a model replied with, "A", "B" or "C"; None when it named none."""
    found = _LETTER.search(text)
    return found[1] if found else None


def parse_skeleton(text: str) -> list[str]:
    """The titles of the points in a model's skeleton, at most MAX_POINTS, in order.

    Numbered lines ("1.", "1)", "1:", "**1.**"), several on one line when their numbers run on, or bullets when
    nothing is numbered. A number or a title that came before, and a line without a title, is left out; a list that
    begins anew ends the skeleton. Markup and final punctuation go; titles are cut at MAX_POINT_WORDS words.
    """
    lines = [line for row in text.splitlines() for line in _split_inline(row)]
    numbered = [(int(found[1]), found[2]) for line in lines if (found := _NUMBERED.match(line))]
    if numbered:
        bodies, last = [], 0
        for number, body in numbered:
            if number == 1 and last > 1:
                break
            if number > last:
                bodies.append(body)
                last = number
    else:
        bodies = [found[1] for line in lines if (found := _BULLET.match(line))]
    titles: dict[str, str] = {}
    for body in bodies:
        title = _title(body)
        if any(map(str.isalnum, title)):
            titles.setdefault(title.casefold(), title)
    return list(titles.values())[:MAX_POINTS]


def _split_inline(line: str) -> list[str]:
    """The points of a line such as "1. Sun 2. Moon": cut before a number only where it is the next one."""
    first = _NUMBERED.match(line)
    if not first:
        return [line]
    parts, begin, number = [], 0, int(first[1])
    for found in _INLINE.finditer(line):
        if int(found[1]) == number + 1:
            parts.append(line[begin : found.start()])
            begin, number = found.end(), number + 1
    return [*parts, line[begin:]]


def _title(body: str) -> str:
    words = body.replace("*", "").replace("`", "").split()[:MAX_POINT_WORDS]
    return " ".join(words).strip(" _").rstrip(" .:;,-–")
