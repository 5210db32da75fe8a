"""Text to fit predictors and thresholds to: read, split, cut into rows, and run through the engine."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flashload.errors import ArgumentError, DiskError

if TYPE_CHECKING:
    from edge.engine import Engine
    from edge.tokenizer import Tokenizer

#: Parts one text from the next in a file of many.
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.1
_MAX_TEXT_BYTES = 1 << 30
#: Characters tokenised at once.
_PIECE_CHARS = 1 << 16

Row = list[int]
Counter = Callable[[int, int], None]


def read_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 file of at most 1 GiB.

    Raises:
        DiskError: it cannot be read.
        ArgumentError: it is larger, or no UTF-8.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_TEXT_BYTES + 1)  # a device may be endless
        if len(data) > _MAX_TEXT_BYTES:
            raise ArgumentError(f"data: {path}: expected at most {_MAX_TEXT_BYTES} bytes of text, found more")
        return data.decode("utf-8")
    except OSError as error:
        raise DiskError(f"data: {path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"data: {path}: expected UTF-8 text, found byte {error.start} that is not"
        ) from error


def split_text(text: str, held_out_share: float = HELD_OUT_SHARE) -> tuple[list[str], list[str]]:
    """Documents to fit to, and those of the last share of the characters, which is held out.

    Documents end at ``<|endoftext|>`` lines; the one the cut runs through is parted at the end of a line,
    or else of a word.
    """
    cut = len(text) - round(held_out_share * len(text))
    line_end = text.find("\n", cut, (cut + len(text)) // 2)
    cut = (line_end if line_end >= 0 else text.rfind(" ", 0, cut)) + 1
    return _documents(text[:cut]), _documents(text[cut:])


def _documents(text: str) -> list[str]:
    return [document for piece in text.split(END_OF_TEXT) if (document := piece.strip())]


def _pieces(document: str) -> Iterator[str]:
    """A document in pieces that end at white space where there is any."""
    at = 0
    while at < len(document):
        end = at + _PIECE_CHARS
        if end < len(document):
            space = max(document.rfind("\n", at, end), document.rfind(" ", at, end))
            end = space if space > at else end
        yield document[at:end]
        at = end


def token_rows(
    tokenizer: Tokenizer, documents: Sequence[str], length: int, n_tokens: int, seed: int | None = None
) -> list[Row]:
    """Rows of at most ``length`` tokens, each from one document and begun as a prompt begins.

    Args:
        n_tokens: of all rows; the last is cut to it. Fewer when the text ends before.
        seed: of the order documents are taken in; None takes them as they come.
    """
    order = list(documents)
    if seed is not None:
        random.Random(seed).shuffle(order)
    begin = tokenizer.encode("", add_special_tokens=True)
    room = length - len(begin)
    rows: list[Row] = []
    left = n_tokens
    for document in order:
        for piece in _pieces(document):
            ids = tokenizer.encode(piece, add_special_tokens=False)
            for first in range(0, len(ids), room):
                row = (begin + ids[first : first + room])[:left]
                left -= len(row)
                rows.append(row)
                if left <= 0:
                    return rows
    return rows


@dataclass(frozen=True)
class Captured:
    """What every layer's feed-forward saw of some tokens.

    Attributes:
        inputs: f16 [layers, tokens, hidden].
        open: uint8 [layers, tokens, ceil(neurons / 8)], bits of gates above zero, the lowest first.
    """

    inputs: NDArray[np.float16]
    open: NDArray[np.uint8]


def capture_bytes(n_layers: int, hidden: int, n_neurons: int, max_rows: int = 128) -> int:
    """Memory of the blocks that :func:`capture` hands out."""
    return n_layers * max_rows * (2 * hidden + -(-n_neurons // 8))


def capture(engine: Engine, rows: Sequence[Row], on_progress: Counter | None = None) -> Iterator[Captured]:
    """Runs rows through the engine; blocks of at most ``plan.max_rows`` tokens, overwritten by the next one.

    Raises:
        ArgumentError: the model's feed-forward layers are mixtures, or a predictor decides.
    """
    config, max_rows = engine.metadata["config"], engine.plan.max_rows
    n_layers, n_neurons = config["n_layers"], config["intermediate_size"]
    inputs = np.empty((n_layers, max_rows, config["hidden_size"]), np.float16)
    is_open = np.empty((n_layers, max_rows, -(-n_neurons // 8)), np.uint8)
    total, done = sum(map(len, rows)), 0
    with engine._serving() as sequence:
        for row in rows:
            # What an earlier row left computed would not be seen: one token keeps nothing of it.
            sequence.set_tokens(row[:1])
            sequence.set_tokens(row)
            while sequence.n_pending:
                n = sequence.capture(inputs=inputs, open=is_open)
                done += n
                yield Captured(inputs[:, :n], is_open[:, :n])
                if on_progress is not None:
                    on_progress(done, total)


def perplexity(engine: Engine, rows: Sequence[Row], on_progress: Counter | None = None) -> float:
    """exp of the mean negative log-probability of every token after the first of its row."""
    nats, n_scored = 0.0, 0
    for i, row in enumerate(rows):
        scores = [score for score in engine.score(row) if score is not None]
        nats -= math.fsum(scores)
        n_scored += len(scores)
        if on_progress is not None:
            on_progress(i + 1, len(rows))
    return math.exp(nats / max(1, n_scored))
