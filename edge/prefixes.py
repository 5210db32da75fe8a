"""Beginnings that requests share: texts of earlier requests whose keys and values are in memory, or parked on a drive.

Every text kept is a fork that shares pages with those it begins like, so that together they are a radix tree of pages
(RadixAttention: Zheng et al., arXiv 2312.07104, section 3) which takes none that the running request needs. A text that
gives way is parked where the user gave room for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.text_index import TextIndex, Tokens, n_common
from flashload.errors import CancelledError

if TYPE_CHECKING:
    import _edge

    from edge.parked import ParkedText, Parking

#: Texts kept in memory, and files, at most.
MOST_TEXTS, MOST_PARKED = 16, 64
#: Fewer tokens are computed again about as soon as found.
_LEAST_TOKENS = 16
#: A shorter prompt's pass may cost as much as this one's.
_TELLING_TOKENS = 64


@dataclass(eq=False)
class _Kept:
    """A text in memory or in a file."""

    tokens: Tokens
    text: _edge.Sequence | None = None
    parked: ParkedText | None = None


class Prefixes:
    """The texts kept, least recently used first."""

    def __init__(self, parking: Parking | None = None) -> None:
        self._kept: list[_Kept] = []
        self._index: TextIndex[_Kept] = TextIndex()
        self._parking = parking

    def __len__(self) -> int:
        """Texts in memory."""
        return sum(one.text is not None for one in self._kept)

    @property
    def n_parked(self) -> int:
        """Texts in files."""
        return sum(one.parked is not None for one in self._kept)

    @property
    def parked_bytes(self) -> int:
        """What the files take."""
        return sum(one.parked.bytes for one in self._kept if one.parked is not None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What failed of parking, a sentence each."""
        return () if self._parking is None else tuple(self._parking.notes)

    def begin(
        self, core: _edge.Engine, running: _edge.Sequence, tokens: list[int], shares: bool = True
    ) -> _edge.Sequence:
        """The sequence that knows most of ``tokens``: ``running``, or one that begins as a kept text does.

        What ``running`` would forget is kept, unless it is short.

        Args:
            shares: whether texts can share pages in memory; else they are parked at once, or forgotten.
        """
        if not shares and self._parking is None:
            return running
        wanted = np.asarray(tokens, np.int32)
        known = np.asarray(running.tokens[: running.n_tokens - running.n_pending], np.int32)
        n_known = n_common(known, wanted)
        if len(known) - n_known >= _LEAST_TOKENS:
            self._keep(running, known, shares)
        near, n_near = self._index.best(wanted, lambda one: one.text is not None)
        far, n_far = self._index.best(wanted, lambda one: one.parked is not None)
        if far is not None and self._reading_pays(far, n_far - max(n_known, n_near)):
            if self._restore(core, running, far):
                return running
            n_known = 0
        if near is None or near.text is None or n_near < n_known + _LEAST_TOKENS:
            return running
        self._touch(near)
        return near.text.fork(n_near)

    def _keep(self, running: _edge.Sequence, tokens: Tokens, shares: bool) -> None:
        """Keeps a text, and no longer those that it begins like."""
        one = _Kept(tokens, running.fork(len(tokens)) if shares else None)
        if not shares:
            assert self._parking is not None
            one.parked = self._parking.park(running, len(tokens))
            if one.parked is None:
                return
        for other in self._index.begun_by(tokens):
            self._drop(other)
        self._kept.append(one)
        self._index.add(one)
        while len(self) > MOST_TEXTS:
            self._give_way()
        self._bound()

    def _reading_pays(self, far: _Kept, n_gained: int) -> bool:
        assert self._parking is not None and far.parked is not None
        return n_gained >= _LEAST_TOKENS and self._parking.pace.reading_pays(n_gained, far.parked.bytes)

    def _restore(self, core: _edge.Engine, running: _edge.Sequence, far: _Kept) -> bool:
        """Reads a parked text into ``running``, whose own keys and values are then gone in any case."""
        assert self._parking is not None and far.parked is not None
        self._touch(far)
        if running.n_tokens:
            running.truncate(1)
        self.make_room(core, len(far.tokens))
        if self._parking.restore(running, far.parked):
            return True
        self._drop(far)
        return False

    def _touch(self, one: _Kept) -> None:
        if one in self._kept:
            self._kept.remove(one)
            self._kept.append(one)

    def _drop(self, one: _Kept) -> None:
        self._kept.remove(one)
        self._index.remove(one)
        one.text = None
        if one.parked is not None and self._parking is not None:
            self._parking.drop(one.parked)

    def _give_way(self) -> None:
        """Takes the oldest text out of memory: to a file, or for good."""
        one = next(one for one in self._kept if one.text is not None)
        if self._parking is not None and one.text is not None:
            try:
                one.parked = self._parking.park(one.text, len(one.tokens))
            finally:
                one.text = None
                if one.parked is None:
                    self._drop(one)
        else:
            self._drop(one)
        self._bound()

    def _bound(self) -> None:
        """Removes the oldest files that are too much."""
        while self._parking is not None and (
            self.n_parked > MOST_PARKED or self.parked_bytes > self._parking.limit_bytes
        ):
            self._drop(next(one for one in self._kept if one.parked is not None))

    def make_room(self, core: _edge.Engine, n_rows: int) -> None:
        """Takes the oldest texts out of memory until a pass of so many rows finds pages."""
        # One more for the page that it shares with a text and will write to.
        n_pages = -(-n_rows // core.kv_page_tokens) + 1
        while len(self) and core.kv_pages_left < n_pages:
            self._give_way()

    def computed(self, n_tokens: int, seconds: float) -> None:
        """What a prompt took, which says when reading pays."""
        if self._parking is not None and n_tokens >= _TELLING_TOKENS:
            self._parking.pace.token_seconds = seconds / n_tokens

    def leave_memory(self, park: bool) -> None:
        """Takes all texts out of memory: to files where that is possible, or for good; files stay."""
        for one in [one for one in self._kept if one.text is not None]:
            if park:
                try:
                    self._give_way()
                except CancelledError:  # of the request that this makes room for
                    park = False
            else:
                self._drop(one)

    def clear(self) -> None:
        """Forgets all texts."""
        for one in list(self._kept):
            self._drop(one)

    def close(self) -> None:
        """Forgets all texts, and returns their folder."""
        self.clear()
        if self._parking is not None:
            self._parking.close()
