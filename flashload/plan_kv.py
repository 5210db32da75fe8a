"""Keys and values on a drive: how many of their pages stay in memory, and what reading the others takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flashload.errors import BudgetError

if TYPE_CHECKING:
    from flashload.plan import Plan

#: Where keys and values of a context go.
KV = ("auto", "memory", "flash")

#: What keys and values are held as (``KvType``).
KV_TYPES = ("f16", "int8", "int4")

#: One read of one layer's keys or values: long enough for the drive's sequential rate.
_RANGE_BYTES = 1 << 20
_LEAST_RANGE_BYTES = 64 << 10
#: Shares of the memory beyond the floor. Pages get what all weights leave over: a token reads weights whole, of keys
#: and values only what the context holds by then.
_SCORE_SHARE, _RANGE_SHARE = 1 / 16, 1 / 16
#: A file is worth its trouble where it saves a quarter of what a token reads.
_WORTH_A_FILE = 3 / 4
#: Positions at which a mean over the context is taken.
_MEAN_STEPS = 16
#: Buffers that ranges are read into (``KvFlash::kBuffers``).
KV_BUFFERS = 4


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
        page_tokens, page_bytes: of one page, all layers.
    """

    memory_bytes: int
    activation_bytes: int
    resident_pages: int
    range_pages: int
    score_rows: int
    file_bytes: int
    page_tokens: int
    page_bytes: int

    def read_bytes(self, windows: Sequence[int], position: float) -> float:
        """Read from the file for one row at ``position`` tokens; ``windows`` holds each layer's, 0 for none."""
        held = self.resident_pages * self.page_tokens
        seen = (min(position, window) if window else position for window in windows)
        token_bytes = self.page_bytes / self.page_tokens / len(windows)
        return sum(max(0.0, n - held) for n in seen) * token_bytes

    def mean_read_bytes(self, windows: Sequence[int], context: int) -> float:
        """:meth:`read_bytes` over a context that fills."""
        steps = [context * (i + 0.5) / _MEAN_STEPS for i in range(_MEAN_STEPS)]
        return sum(self.read_bytes(windows, position) for position in steps) / _MEAN_STEPS

    def request_bytes(self, n_layers: int) -> float:
        """Of one read."""
        return self.range_pages * self.page_bytes / n_layers / 2

    def options(self, folder: str) -> dict[str, Any]:
        """What the core is told; ``folder`` is where the file goes."""
        return {
            "resident_pages": self.resident_pages,
            "range_pages": self.range_pages,
            "score_rows": self.score_rows,
            "folder": folder,
        }


def kv_on_flash(
    decoder: dict[str, Any],
    context: int,
    max_rows: int,
    threads: int,
    spare_bytes: int = 0,
    left_over_bytes: int = 0,
) -> KvOnFlash:
    """The least memory that works, plus a share of ``spare_bytes``, plus pages.

    Args:
        decoder: DecoderConfig as a dict.
        spare_bytes: memory beyond the floor of weights and everything else; 0 (or less) gives the floor itself.
        left_over_bytes: what of them no weight needs.
    """
    import _edge

    page_tokens, page_bytes, half_bytes = _edge.kv_flash_shape(decoder)
    n_pages = -(-context // page_tokens)
    # Rows of one pass may begin at the last token of a page.
    least_pages = (max_rows + page_tokens - 2) // page_tokens + 1
    spare_bytes = max(0, spare_bytes)

    # No more than the context is worth, where that is short.
    least_range_bytes = min(_LEAST_RANGE_BYTES, n_pages * half_bytes // 8)
    range_bytes = min(_RANGE_BYTES, max(least_range_bytes, int(spare_bytes * _RANGE_SHARE) // KV_BUFFERS))
    range_pages = max(1, min(range_bytes // half_bytes, n_pages))
    score_bytes = 4 * int(decoder["n_heads"]) * context
    score_rows = max(1, min(int(spare_bytes * _SCORE_SHARE) // score_bytes, max_rows))
    left_over_bytes -= int(spare_bytes * (_SCORE_SHARE + _RANGE_SHARE))
    extra_pages = min(max(0, left_over_bytes) // page_bytes, max(0, n_pages - least_pages))
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
        page_tokens=page_tokens,
        page_bytes=page_bytes,
    )


def choose_kv(kv: str, plan: Callable[[str], Plan]) -> Plan:
    """``plan("memory")`` or ``plan("flash")``, as ``kv`` (one of :data:`KV`) says.

    "auto" has the lower floor of both, and takes the one that reads less from the drive for a token: weights before
    keys and values where every token reads them, the other way round where a token needs few of them.

    Raises:
        BudgetError: of the two refusals the one with the lower floor.
    """
    if kv != "auto":
        return plan(kv)
    found: dict[str, Plan] = {}
    refusals: list[BudgetError] = []
    for one in ("memory", "flash"):
        try:
            found[one] = plan(one)
        except BudgetError as refusal:
            refusals.append(refusal)
    if not found:
        raise min(refusals, key=lambda refusal: refusal.floor_bytes)
    floors = [p.floor_bytes for p in found.values()] + [refusal.floor_bytes for refusal in refusals]
    best = found.get("memory") or found["flash"]
    if "flash" in found and found["flash"].flash_bytes_per_token < _WORTH_A_FILE * best.flash_bytes_per_token:
        best = found["flash"]
    return replace(best, floor_bytes=min(floors))


def kv_type_of(decoder: Mapping[str, Any]) -> str:
    """What a model's keys and values are held as; ``decoder`` is DecoderConfig as a dict, ``kv_type`` if chosen."""
    return str(decoder.get("kv_type", "f16"))


def kv_token_bytes(decoder: Mapping[str, Any]) -> float:
    """Bytes of one layer's key and value of one token."""
    head_dim, heads = int(decoder["head_dim"]), int(decoder["n_kv_heads"])
    padded = -(-head_dim // 32) * 32
    # Besides the values, the scales of a key and a value, and as much room that tiles of values leave free.
    sizes = {"f16": 2 * head_dim * 2, "int8": 2 * padded + 8, "int4": padded + 8}
    return float(heads * sizes[kv_type_of(decoder)])


def _round_up(n_bytes: int) -> int:
    return -(-n_bytes // 4096) * 4096
