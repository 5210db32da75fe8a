"""Text that remembers who wrote each character.

In a template, a plain ``str`` is markup: the template's author wrote it. A :class:`Mixed` holds text that
came at least partly from a conversation; its mask has one byte per character, 1 where it is untrusted. Each
operation here keeps masks exactly, or, where that has no meaning, calls the whole result untrusted.
Each operation here keeps masks exactly, or, where that has no meaning, calls the whole result untrusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


class Mixed(str):
    """A string with a mask of untrusted characters (``len(mask) == len(text)``, bytes 0 or 1)."""

    __slots__ = ("mask",)
    mask: bytes

    def __new__(cls, text: str, mask: bytes) -> Mixed:
        self = super().__new__(cls, text)
        self.mask = mask
        return self


def untrusted(text: str) -> str:
    """``text`` with every character untrusted."""
    return Mixed(text, b"\1" * len(text)) if text else ""


def mask_of(text: str) -> bytes:
    """The mask of any string; plain ones are trusted throughout."""
    return text.mask if isinstance(text, Mixed) else bytes(len(text))


def make(text: str, mask: bytes) -> str:
    """``text`` with ``mask``: a plain string when nothing in it is untrusted."""
    return Mixed(text, mask) if 1 in mask else str.__str__(text)


def taint_if(condition: bool, text: str) -> str:
    """``text``, untrusted throughout when ``condition``."""
    return untrusted(text) if condition else text


def join(parts: Sequence[str], between: str = "") -> str:
    """``between.join(parts)`` with masks."""
    text = str.join(between, parts)
    if not isinstance(between, Mixed) and not any(isinstance(part, Mixed) for part in parts):
        return text
    return make(text, mask_of(between).join([mask_of(part) for part in parts]))


def cut(text: str, where: slice) -> str:
    """``text[where]`` with its mask."""
    piece = str.__getitem__(text, where)
    return make(piece, text.mask[where]) if isinstance(text, Mixed) else piece


def char(text: str, index: int) -> str:
    """``text[index]`` with its mask; IndexError as Python raises it."""
    piece = str.__getitem__(text, index)
    return make(piece, text.mask[index : index + 1 or None]) if isinstance(text, Mixed) else piece


def chars(text: str) -> Iterator[str]:
    """The characters of ``text``, each with its own origin."""
    return (char(text, i) for i in range(len(text))) if isinstance(text, Mixed) else iter(text)


def strip(text: str, characters: str | None, left: bool = True, right: bool = True) -> str:
    """``strip``, ``lstrip`` or ``rstrip``."""
    start = len(text) - len(str.lstrip(text, characters)) if left else 0
    stop = len(str.rstrip(text, characters)) if right else len(text)
    return cut(text, slice(start, max(start, stop)))


def _located(text: str, pieces: Iterable[str], gap: int | None) -> list[str]:
    """Give ``pieces``, which follow each other in ``text``, their masks; ``gap`` None: search for each."""
    if not isinstance(text, Mixed):
        return list(pieces)
    located: list[str] = []
    at = 0
    for piece in pieces:
        if gap is None:
            at = str.find(text, piece, at)
        located.append(make(piece, text.mask[at : at + len(piece)]))
        at += len(piece) + (gap or 0)
    return located


def split(text: str, separator: str | None = None, maxsplit: int = -1, right: bool = False) -> list[str]:
    """``split`` or ``rsplit``."""
    pieces = (str.rsplit if right else str.split)(text, separator, maxsplit)
    return _located(text, pieces, None if separator is None else len(separator))


def splitlines(text: str, keepends: bool = False) -> list[str]:
    """``splitlines``."""
    lines = _located(text, str.splitlines(text, True), 0)
    if keepends:
        return lines
    return [cut(line, slice(0, len(bare))) for line, bare in zip(lines, str.splitlines(text), strict=True)]


def count_lines(text: str) -> int:
    """An upper bound of the number of lines :func:`splitlines` gives."""
    return 1 + sum(str.count(text, end) for end in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")


def partition(text: str, separator: str, right: bool = False) -> tuple[str, ...]:
    """``partition`` or ``rpartition``."""
    pieces = (str.rpartition if right else str.partition)(text, separator)
    return tuple(_located(text, pieces, 0))


def replace(text: str, old: str, new: str, count: int = -1) -> str:
    """``replace``; new text keeps its own origin."""
    if not old:
        tainted = isinstance(text, Mixed) or isinstance(new, Mixed)
        return taint_if(tainted, str.replace(text, old, new, count))
    return join(split(text, old, count), new)


def recased(text: str, changed: str) -> str:
    """``changed`` is ``text`` in another case; where its length changed, positions say nothing any more."""
    if not isinstance(text, Mixed):
        return changed
    return make(changed, text.mask) if len(changed) == len(text) else untrusted(changed)


def segments(parts: Iterable[str]) -> list[tuple[str, bool]]:
    """``(text, trusted)`` runs of the joined ``parts``; neighbours always differ in trust."""
    runs: list[tuple[list[str], bool]] = []

    def add(text: str, trusted: bool) -> None:
        if not text:
            return
        if runs and runs[-1][1] == trusted:
            runs[-1][0].append(text)
        else:
            runs.append(([text], trusted))

    for part in parts:
        if not isinstance(part, Mixed):
            add(part, True)
            continue
        at = 0
        while at < len(part):
            kind = part.mask[at]
            end = part.mask.find(b"\0" if kind else b"\1", at)
            end = len(part) if end < 0 else end
            add(str.__getitem__(part, slice(at, end)), not kind)
            at = end
    return [("".join(texts), trusted) for texts, trusted in runs]
