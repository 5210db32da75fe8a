"""Keys and values on a drive: how many of their pages stay in memory, and what reading the others takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashload.errors import BudgetError

if TYPE_CHECKING:
    from flashload.plan import Plan

#: Where keys and values of a context go; "auto" keeps them in memory while the budget holds them beside the least of
#: the weights.
KV = ("auto", "memory", "flash")

#: One read of one layer's keys or values: long enough for the drive's sequential rate.
_RANGE_BYTES = 1 << 20
_LEAST_RANGE_BYTES = 64 << 10
#: Shares of the memory beyond the floor. A context that is not full leaves pages unused: weights get the other half.
_SCORE_SHARE, _RANGE_SHARE, _PAGE_SHARE = 1 / 16, 1 / 16, 3 / 8
#: Buffers that ranges are read into (``KvFlash::kBuffers``).
_BUFFERS = 4


@dataclass(frozen=True)
class KvOnFlash:
    """How the core keeps keys and values of one context partly in a file.

    Attributes:
        memory_bytes: pages in memory, read buffers and hashes.
        activation_bytes: activations, with the scores of ``score_rows`` rows, and one sequence's logits.
        resident_pages: pages in memory; the latest of a sequence.
        range_pages: pages of one read of one layer's keys or values.
        score_rows: rows of a prompt chunk that share one reading of the file.
        file_bytes: size of the file when the context is full.
    """

    memory_bytes: int
    activation_bytes: int
    resident_pages: int
    range_pages: int
    score_rows: int
    file_bytes: int

    def options(self, folder: str) -> dict[str, Any]:
        """What the core is told; ``folder`` is where the file goes."""
        return {
            "resident_pages": self.resident_pages,
            "range_pages": self.range_pages,
            "score_rows": self.score_rows,
            "folder": folder,
        }


def kv_on_flash(
    decoder: dict[str, Any], context: int, max_rows: int, threads: int, spare_bytes: int
) -> KvOnFlash:
    """The least memory that works, plus a share of ``spare_bytes``.

    Args:
        decoder: DecoderConfig as a dict.
        spare_bytes: memory beyond the floor of weights and everything else; 0 (or less) gives the floor itself.
    """
    import _edge

    page_tokens, page_bytes, half_bytes = _edge.kv_flash_shape(decoder)
    n_pages = -(-context // page_tokens)
    # Rows of one pass may begin at the last token of a page.
    least_pages = (max_rows + page_tokens - 2) // page_tokens + 1
    spare_bytes = max(0, spare_bytes)

    extra_pages = min(int(spare_bytes * _PAGE_SHARE) // page_bytes, max(0, n_pages - least_pages))
    # No more than the context is worth, where that is short.
    least_range_bytes = min(_LEAST_RANGE_BYTES, n_pages * half_bytes // 8)
    range_bytes = min(_RANGE_BYTES, max(least_range_bytes, int(spare_bytes * _RANGE_SHARE) // _BUFFERS))
    range_pages = max(1, min(range_bytes // half_bytes, n_pages))
    score_bytes = 4 * int(decoder["n_heads"]) * context
    score_rows = max(1, min(int(spare_bytes * _SCORE_SHARE) // score_bytes, max_rows))
    kv_bytes, activation_bytes, logits_bytes = _edge.kv_flash_bytes(
        decoder, context, max_rows, threads, least_pages + extra_pages, range_pages, score_rows
    )
    return KvOnFlash(
        memory_bytes=_round_up(kv_bytes),
        activation_bytes=_round_up(activation_bytes) + _round_up(logits_bytes),
        resident_pages=least_pages + extra_pages,
        range_pages=range_pages,
        score_rows=score_rows,
        file_bytes=n_pages * page_bytes,
    )


def choose_kv(kv: str, plan: Callable[[str], Plan]) -> Plan:
    """``plan("memory")`` or ``plan("flash")``, as ``kv`` (one of :data:`KV`) says.

    Raises:
        BudgetError: of the two refusals the one with the lower floor.
    """
    if kv != "auto":
        return plan(kv)
    try:
        return plan("memory")
    except BudgetError as in_memory:
        try:
            return plan("flash")
        except BudgetError as on_flash:
            refusal = on_flash if on_flash.floor_bytes < in_memory.floor_bytes else in_memory
    raise refusal


def _round_up(n_bytes: int) -> int:
    return -(-n_bytes // 4096) * 4096
