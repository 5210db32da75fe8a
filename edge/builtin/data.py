"""The text the built-in models are trained on: reading, held-out split, removal of overlaps.

Sources: TinyStories (CDLA-Sharing-1.0), in a cased and a larger lower-cased file that overlap, and a few
children's books in the public domain. The last 100,000 characters of the cased file are held out, with
every story of the lower-cased file that shares text with them.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge.builtin.recase import Recaser
from flashload.errors import EdgeError

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_CHARS = 100_000

_CASED, _LOWER, _BOOKS = "tinystories.txt.xz", "tinystories-lower.txt.xz", "books-train.tar.xz"
_PROBE_LETTERS = 48  # long enough that two stories seldom share one by chance
_SAME_STORY_SHARE = 0.3  # of a story's probes found in the cased text: the same story
_MIN_STORY_CHARS = 300
_BOOK_TITLES = (
    "Aesop's Fables",
    "Black Beauty",
    "Great Big Treasury of Beatrix Potter",
    "Grimms' Fairy Tales",
    "Heidi",
    "The Adventures of Pinocchio",
    "The Book of Dragons",
    "The Boxcar Children",
    "The Happy Prince & Other Tales",
    "The Jungle Book",
    "The King of the Golden River",
    "The Marvelous Land of Oz",
    "The Story of Doctor Dolittle",
    "Through the Looking-Glass",
)
HELD_OUT_BOOKS = (
    "Anne of Green Gables",
    "Beauty and the Beast",
    "Little Men",
    "Swiss Family Robinson",
    "The Call of the Wild",
    "Treasure Island",
    "White Fang",
)
# UTF-8 read as Windows-1252 and then lower-cased, as the lower-cased file holds it.
_MOJIBAKE = (
    ("â€œ", "“"), ("â€™", "’"), ("â€˜", "‘"), ("â€“", "–"), ("â€”", "—"), ("â€¦", "…"),
    ("â€", "”"), ("ã±", "ñ"), ("ã³", "ó"), ("ã©", "é"), ("ã¡", "á"), ("â¡", "¡"), ("â«", "«"), ("â»", "»"),
)  # fmt: skip


class CorpusError(EdgeError):
    """A corpus is missing or cannot be read; the message names the file and what was expected."""


@dataclass
class Corpus:
    """Training stories, training book passages, held-out text and the sources' sha256."""

    stories: list[str]
    books: list[str]
    held_out: str
    sha256: dict[str, str]
    counts: dict[str, int] = field(default_factory=dict)


def _read(path: Path, digests: dict[str, str]) -> bytes:
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: corpus expected here, found none ({error.strerror})") from error
    digests[path.name] = hashlib.sha256(packed).hexdigest()
    try:
        return lzma.decompress(packed)
    except (lzma.LZMAError, EOFError) as error:
        raise CorpusError(f"{path}: expected xz data, found a damaged file ({error})") from error


def _text(path: Path, digests: dict[str, str]) -> str:
    try:
        return _read(path, digests).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: expected UTF-8 text, found byte {error.start} is not") from error


def _letters(text: str) -> str:
    return re.sub(r"[^a-z]+", "", text.lower())


def _tidy(story: str) -> str:
    """One newline between paragraphs, no space at line ends."""
    return re.sub(r"\s*\n\s*", "\n", story).strip()


def split_cased(text: str, held_out_chars: int = HELD_OUT_CHARS) -> tuple[list[str], str]:
    """Training stories and the held-out tail; the story that the cut runs through is not trained on."""
    head, tail = text[:-held_out_chars], text[-held_out_chars:]
    stories = [_tidy(story) for story in head.split(END_OF_TEXT)[:-1]]
    return [story for story in stories if story], tail


def split_lower(text: str) -> list[str]:
    """Stories of the lower-cased file: one newline parts stories, an empty line parts paragraphs.

    A short piece without paragraphs is one that lost its empty line: it goes on with the story before.
    """
    for wrong, right in _MOJIBAKE:
        text = text.replace(wrong, right)
    stories: list[str] = []
    for piece in re.split(r"(?<!\n)[ ]*\n(?![ ]*\n)", text):
        if stories and "\n" not in piece and len(piece) < _MIN_STORY_CHARS:
            stories[-1] += "\n" + piece
        else:
            stories.append(piece)
    return [story for story in map(_tidy, stories) if len(story) >= _MIN_STORY_CHARS]


def _pieces(text: str, stride: int) -> Iterator[str]:
    """Runs of 48 letters of the text, every `stride` letters."""
    letters = _letters(text)
    return (letters[i : i + _PROBE_LETTERS] for i in range(0, len(letters) - _PROBE_LETTERS + 1, stride))


def drop_overlap(stories: list[str], known: str) -> list[str]:
    """The stories that share less than a third of their 48-letter probes with the known text."""
    probes = [set(_pieces(story, _PROBE_LETTERS // 2)) for story in stories]
    wanted = set().union(*probes)
    found = wanted.intersection(_pieces(known, 1))
    return [
        story
        for story, mine in zip(stories, probes, strict=True)
        if mine and len(mine & found) < _SAME_STORY_SHARE * len(mine)
    ]


def _book_passages(path: Path, digests: dict[str, str], titles: Sequence[str] = _BOOK_TITLES) -> list[str]:
    """Plain prose of the books of those titles: Markdown marks, headings and table-like lines removed."""
    passages: list[str] = []
    data = _read(path, digests)
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                if not member.isfile() or Path(member.name).stem not in titles:
                    continue
                source = archive.extractfile(member)
                text = source.read().decode("utf-8", "replace") if source else ""
                paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
                prose = [p for p in paragraphs if len(p) > 80 and p[0] not in "#|>!-[<"]
                passages.append(re.sub(r"[*_\\]+", "", "\n".join(prose)))
    except tarfile.TarError as error:
        raise CorpusError(f"{path}: expected a tar archive, found none ({error})") from error
    return [passage for passage in passages if passage]


def load_held_out(folder: Path) -> str:
    """The held-out text alone; raises CorpusError when the cased file is missing or damaged."""
    return split_cased(_text(folder / _CASED, {}))[1]


def load_held_out_books(folder: Path) -> list[str]:
    """The prose of the seven held-out books; raises CorpusError when the archive is missing or damaged."""
    return _book_passages(folder / _BOOKS, {}, HELD_OUT_BOOKS)


def load_corpus(folder: Path, *, with_books: bool = True) -> Corpus:
    """Reads the corpora of a folder; the same files give the same stories in the same order.

    Raises CorpusError when a file is missing or damaged.
    """
    digests: dict[str, str] = {}
    cased = _text(folder / _CASED, digests)
    if len(cased) < 2 * HELD_OUT_CHARS:
        raise CorpusError(
            f"{folder / _CASED}: expected at least {2 * HELD_OUT_CHARS:,} characters, found {len(cased):,}"
        )
    stories, held_out = split_cased(cased)
    lower = split_lower(_text(folder / _LOWER, digests))
    fresh = drop_overlap(lower, cased)
    recaser = Recaser(stories)
    restored = [recaser.restore(story) for story in fresh]
    books = _book_passages(folder / _BOOKS, digests) if with_books else []
    counts = {
        "cased_stories": len(stories),
        "lower_stories": len(lower),
        "lower_stories_kept": len(fresh),
        "cased_chars": sum(map(len, stories)),
        "restored_chars": sum(map(len, restored)),
        "book_chars": sum(map(len, books)),
    }
    return Corpus(stories + restored, books, held_out, digests, counts)
