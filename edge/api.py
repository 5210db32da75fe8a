"""Calls that need no loaded model: plan and pack."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edge.loading import plan_host, prepare, resolve_model
from flashload.plan import Plan

if TYPE_CHECKING:
    from flashload.pack import PackReport


def plan(
    model: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    context: int | None = None,
    threads: int | None = None,
    weights: str = "keep",
    whole_process: bool = False,
    on_pack: Callable[[int, int], None] | None = None,
) -> Plan:
    """Where the weights would live inside a budget, and the bytes of every part, without loading them.

    Args: as for :func:`edge.load`.

    Raises:
        BudgetError: the budget is below ``floor_bytes``, which the error carries.
    """
    host = prepare(model, weights=weights, whole_process=whole_process, on_pack=on_pack)
    try:
        return plan_host(host, memory=memory, context=context, threads=threads)
    finally:
        host.pack.close()


def pack(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    weights: str = "keep",
    progress: Callable[[int, int], None] | None = None,
) -> PackReport:
    """Converts a GGUF file or a Hugging Face folder to a pack.

    Args:
        weights: "keep" leaves block types with a native kernel bit-exact; "q8" and "q4" requantise.
        progress: called with (bytes done, bytes).

    Raises:
        ModelFileError, UnsupportedModelError, DiskError.
    """
    from flashload.pack import pack as pack_checkpoint

    return pack_checkpoint(resolve_model(source), Path(destination), weights=weights, progress=progress)
