"""Guesses of a draft model that has another vocabulary: they pass through text.

The draft model reads the text so far in its own tokens and goes on; what it says is cut into tokens of the model it
drafts for. Wherever the two cut differently there is no guess, and the last token said is none either: more text might
have changed it. A guess may be anything, so text that a vocabulary does not keep to the letter costs acceptance alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import _edge

from edge.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from edge.tokenizer import Tokenizer

#: Tokens before the guesses that are cut again with them: those that a vocabulary might have cut otherwise.
_LEAD_TOKENS = 8
#: What both vocabularies must give back as it was.
_SAMPLE = 'The quick brown fox, aged 12 (or 13?), said: "It\'s over."'


def spells_text(tokenizer: Tokenizer) -> bool:
    """Whether text survives a vocabulary, so that guesses can pass through it."""
    return tokenizer.decode(tokenizer.encode(_SAMPLE, add_special_tokens=False)) == _SAMPLE


def aligned(tokenizer: Tokenizer, lead: Sequence[int], more: str) -> list[int]:
    """The tokens of ``more`` behind those of ``lead``, all but the last; none where a token would cross the seam."""
    before = tokenizer.decode(lead)
    ids = tokenizer.encode(before + more, add_special_tokens=False)
    decoder, n = StreamDecoder(tokenizer), 0
    for i, token in enumerate(ids):
        if n >= len(before):
            return ids[i:-1] if n == len(before) else []
        n += len(decoder.push(token))
    return []


class TranslatedDraft:
    """A draft model's guesses in the tokens of another vocabulary."""

    def __init__(self, core: _edge.Engine, context: int, target: Tokenizer, draft: Tokenizer) -> None:
        """``context``: tokens that fit the draft model's cache."""
        self._sequence = _edge.Sequence(core)
        self._vocab_size = core.vocab_size
        self._sampler = _edge.Sampler({"temperature": 0.0}, core.vocab_size)
        self._context = context
        self._target = target
        self._draft = draft

    def propose(self, text: Sequence[int], max_nodes: int) -> list[tuple[int, int]]:
        """A chain of guesses behind ``text``, as (token, parent) pairs, 0 being the last token of the text."""
        said = StreamDecoder(self._target).push_all(text)
        ids = self._draft.encode(said)
        # What is said last is no guess.
        n_new = min(max_nodes, self._context - len(ids))
        if n_new < 2 or not ids or max(ids) >= self._vocab_size:
            return []
        self._sequence.set_tokens(ids)
        decoder, more = StreamDecoder(self._draft, continues=True), ""
        for _ in range(n_new):
            token = self._sequence.next(self._sampler)[0]
            if token in self._draft.eos_ids:
                break
            more += decoder.push(token)
        guesses = aligned(self._target, text[-_LEAD_TOKENS:], more)[: max_nodes - 1]
        return [(token, parent) for parent, token in enumerate(guesses)]
