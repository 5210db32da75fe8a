"""Beginnings that requests share: texts of earlier requests whose keys and values are still in memory.

Every text kept is a fork that shares pages with those it begins like, so that together they are a radix tree of pages
(RadixAttention: Zheng et al., arXiv 2312.07104, section 3) which takes none that the running request needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import _edge

#: Texts kept at most: finding the best takes a look at each.
MOST_TEXTS = 16
#: Fewer tokens are computed again about as soon as found.
_LEAST_TOKENS = 16


@dataclass(eq=False)
class _Kept:
    text: _edge.Sequence
    tokens: NDArray[np.int64]


def _n_common(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    n = min(len(first), len(second))
    differ = np.flatnonzero(first[:n] != second[:n])
    return int(differ[0]) if len(differ) else n


class Prefixes:
    """The texts kept, least recently used first."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []

    def __len__(self) -> int:
        return len(self._kept)

    def begin(self, running: _edge.Sequence, tokens: list[int]) -> _edge.Sequence:
        """The sequence that knows most of ``tokens``: ``running``, or one that begins as a kept text does.

        What ``running`` would forget is kept, unless it is short.
        """
        wanted = np.asarray(tokens)
        known = np.asarray(running.tokens[: running.n_tokens - running.n_pending])
        n_known = _n_common(known, wanted)
        best = max(self._kept, key=lambda kept: _n_common(kept.tokens, wanted), default=None)
        if len(known) - n_known >= _LEAST_TOKENS:
            self._keep(running.fork(len(known)), known)
        if best is None or (n_best := _n_common(best.tokens, wanted)) < n_known + _LEAST_TOKENS:
            return running
        if best in self._kept:
            self._kept.remove(best)
            self._kept.append(best)
        return best.text.fork(n_best)

    def _keep(self, text: _edge.Sequence, tokens: NDArray[np.int64]) -> None:
        """Keeps a text, and no longer those that it begins like."""
        self._kept = [one for one in self._kept if _n_common(one.tokens, tokens) < len(one.tokens)]
        self._kept.append(_Kept(text, tokens))
        del self._kept[: max(0, len(self._kept) - MOST_TEXTS)]

    def make_room(self, core: _edge.Engine, n_rows: int) -> None:
        """Forgets the oldest texts until a pass of so many rows finds pages."""
        # One more for the page that it shares with a text and will write to.
        n_pages = -(-n_rows // core.kv_page_tokens) + 1
        while self._kept and core.kv_pages_left < n_pages:
            del self._kept[0]

    def clear(self) -> None:
        """Forgets all texts."""
        self._kept.clear()
