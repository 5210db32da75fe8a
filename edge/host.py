"""The process that will hold a model: its open pack, its tokenizer, and the memory these take."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edge.models import open_pack
from edge.watch import Progress
from flashload.errors import ArgumentError
from flashload.format import PackFile
from flashload.machine import (
    available_bytes,
    cgroup_limit_bytes,
    parse_bytes,
    peak_rss_bytes,
    rss_bytes,
    trim_memory,
)
from flashload.plan import Directory, directory_of
from flashload.plan_kv import KV_TYPES, kv_type_of

if TYPE_CHECKING:
    from edge.tokenizer import Tokenizer


def default_memory_bytes() -> int:
    """Nine tenths of what the machine (or the cgroup) still has."""
    limit = cgroup_limit_bytes()
    room = available_bytes()
    return int(0.9 * (room if limit is None else min(room, limit - rss_bytes())))


@dataclass(frozen=True)
class Host:
    """A pack open for loading, its tokenizer, and the memory this process holds for them.

    Attributes:
        directory: the pack's, ready to be planned.
        host_bytes: held now: by the whole process, or only what opening added.
        outside_bytes: held by the process for other things than edge.
        peak_bytes: the most held until now, counted likewise.
    """

    pack: PackFile
    directory: Directory
    tokenizer: Tokenizer
    host_bytes: int
    peak_bytes: int
    pack_seconds: float
    outside_bytes: int = 0

    def holding(self, pack: PackFile) -> Host:
        """The same process with another pack."""
        directory = directory_of(pack)
        if self.directory.thresholds_bytes:
            directory = directory.with_thresholds(self.directory.neurons.use.active_share)
        directory = directory.with_kv_type(kv_type_of(self.directory.decoder))
        return replace(self, pack=pack, directory=directory)

    def with_kv_type(self, kv_type: str) -> Host:
        """The same with keys and values held as one of :data:`flashload.plan_kv.KV_TYPES`.

        Raises:
            ArgumentError: it is none of them.
        """
        if kv_type not in KV_TYPES:
            raise ArgumentError(f"kv_type: expected one of {', '.join(KV_TYPES)}, found {kv_type!r}")
        return replace(self, directory=self.directory.with_kv_type(kv_type))

    def sparse(self) -> Host:
        """The same with the pack's thresholds in use.

        Raises:
            ArgumentError: the pack has none.
        """
        from flashload.sparsity import kept_share

        return replace(self, directory=self.directory.with_thresholds(kept_share(self.pack)))

    def budget_bytes(self, memory: int | str | None) -> int:
        """A budget as it was asked for; None is what is free now, on top of what opening the model took already."""
        return default_memory_bytes() + self.host_bytes if memory is None else parse_bytes(memory)


def prepare(
    model: str | os.PathLike[str],
    *,
    weights: str = "keep",
    whole_process: bool = False,
    on_pack: Progress | None = None,
) -> Host:
    """Everything that comes before the weights: packing when it is needed, the tokenizer, the modules of an engine."""
    before_bytes, peak_before_bytes = rss_bytes(), peak_rss_bytes()
    start = time.perf_counter()
    pack = open_pack(model, weights=weights, on_pack=on_pack)
    pack_seconds = time.perf_counter() - start
    try:
        import edge.engine  # noqa: F401  its modules belong to what the process holds
        from edge.tokenizer import Tokenizer

        tokenizer = Tokenizer(pack.vocab())
    except BaseException:
        pack.close()
        raise
    # Building a tokenizer takes several times what it holds in the end.
    trim_memory()
    host_bytes, peak_bytes = rss_bytes(), peak_rss_bytes()
    if not whole_process:
        host_bytes = max(0, host_bytes - before_bytes)
        # An older peak of the process is not edge's.
        peak_bytes = peak_bytes - before_bytes if peak_bytes > peak_before_bytes else 0
    outside_bytes = 0 if whole_process else before_bytes
    return Host(pack, directory_of(pack), tokenizer, host_bytes, peak_bytes, pack_seconds, outside_bytes)
