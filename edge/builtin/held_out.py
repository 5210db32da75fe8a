"""Held-out bits per byte of any model edge runs, through the engine itself: what a packed model costs in quality.

python -m edge.builtin.held_out --model story --corpora DIR
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edge.builtin.data import END_OF_TEXT, load_held_out
from flashload.errors import EdgeError

if TYPE_CHECKING:
    from edge.engine import Engine


def held_out_stories(text: str) -> list[str]:
    """The texts between end-of-text marks, stripped; a story cut off by the split counts as it is."""
    return [story for piece in text.split(END_OF_TEXT) if (story := piece.strip())]


def windows(ids: list[int], length: int) -> list[tuple[list[int], int]]:
    """Cuts a sequence (first token given, the others predicted) into windows of at most length + 1 tokens.

    Returns (window, first): positions from `first` on count, so that every token is predicted exactly once
    and windows after the first see at least length / 2 tokens before.
    """
    cut = [(ids[: length + 1], 1)]
    done = length + 1
    while done < len(ids):
        stop = min(done + length // 2, len(ids))
        start = stop - length - 1
        cut.append((ids[start:stop], done - start))
        done = stop
    return cut


def bits_per_byte(engine: Engine, text: str) -> float:
    """Bits per UTF-8 byte of the stories, each read on its own after the begin token; the marks are not counted."""
    nats, n_bytes = 0.0, 0
    for story in held_out_stories(text):
        ids = engine.tokenizer.encode(story, add_special_tokens=True)
        for window, first in windows(ids, engine.plan.context - 1):
            nats -= sum(score for score in engine.score(window)[first:] if score is not None)
        n_bytes += len(story.encode())
    return nats / math.log(2) / n_bytes


def main(argv: list[str] | None = None) -> int:
    """Prints the held-out bits per byte of a pack, GGUF file, Hugging Face folder or shipped model."""
    parser = argparse.ArgumentParser(prog="python -m edge.builtin.held_out", description=main.__doc__)
    parser.add_argument("--model", default="story")
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--weights", default="keep", choices=("keep", "q8", "q4"))
    args = parser.parse_args(argv)
    from edge.loading import load

    try:
        held_out = load_held_out(args.corpora)
        with load(args.model, weights=args.weights) as engine:
            print(f"held-out bits per byte: {bits_per_byte(engine, held_out):.4f}")
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
