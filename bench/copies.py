"""Prompts whose continuation copies them, but for edits: what answers about a given document look like.

For models of :func:`bench.walk.successor`, whose text from a token on is the same whatever came before. That text is
the document as it will be written; the prompt holds it as it was before somebody edited it, and its first word. So a
look-up copies until an edit and has to find the place again behind it. One word in so many was edited: another word
stands there, or one is missing, or one too many, in turn; words that stand in for others are of the same document.
"""

from __future__ import annotations

import random
from typing import Any

#: An edit for every so many words.
EDITS = (10, 20, 50)
_PROMPTS = 3


def edited(text: list[int], gap: int, choose: random.Random) -> list[int]:
    """``text`` with an edit somewhere in each ``gap`` tokens, by turns a wrong, a missing and a further word."""
    out = []
    for number, first in enumerate(range(0, len(text), gap)):
        part = text[first : first + gap]
        at = choose.randrange(len(part))
        word = choose.choice([other for other in text if other != part[at]])
        part[at : at + 1] = ([word], [], [part[at], word])[number % 3]
        out += part
    return out


def prompts(engine: Any, n_tokens: int, seed: int) -> dict[str, list[list[int]]]:
    """Kind of text -> prompts as tokens, each continued with ``n_tokens``.

    Besides the copies: ``new words``, where the prompt has none of those that follow, and ``new order``, where it has
    them all, but nowhere two that follow each other there, so that whatever a look-up finds is wrong.

    Raises:
        RuntimeError: the model's text depends on more than its last token.
    """
    choose = random.Random(seed)
    found: dict[str, list[list[int]]] = {f"edit in {gap}": [] for gap in EDITS} | {
        "new words": [],
        "new order": [],
    }

    def written(prompt: list[int], n: int) -> list[int]:
        settings = {"max_tokens": n, "temperature": 0.0, "ignore_eos": True, "speculation": "off"}
        return [prompt[-1], *engine.generate(prompt, **settings).tokens]

    for _ in range(_PROMPTS):
        start = choose.randrange(engine.vocab_size // 2, engine.vocab_size)
        text = written([start], n_tokens)
        for gap in EDITS:
            found[f"edit in {gap}"].append([*edited(text, gap, choose), text[0]])
        others = [word for word in range(engine.vocab_size // 2, engine.vocab_size) if word not in set(text)]
        found["new words"].append([*choose.sample(others, len(text)), text[0]])
        # Every second word first: none is followed by its successor.
        found["new order"].append([*text[2::2], *text[1::2], text[0]])
        if any(written(kind[-1], n_tokens) != text for kind in found.values()):
            raise RuntimeError(
                "copies: expected a model whose text depends on its last token alone (python -m bench synth SHAPE "
                "--successor), found another"
            )
    return found
