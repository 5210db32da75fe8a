"""From a path or a shipped model's name to an engine: pack once, plan, load."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _edge

from flashload.errors import ArgumentError, BudgetError
from flashload.format import PackFile
from flashload.machine import available_bytes, cgroup_limit_bytes, cpu_count, parse_bytes, rss_bytes
from flashload.plan import Plan, make_plan, weights_of

if TYPE_CHECKING:
    from edge.engine import Engine

_BUILTIN = Path(__file__).parent / "builtin"
_DEFAULT_CONTEXT = 4096
_SMALLEST_DEFAULT_CONTEXT = 512
_DEVICES = ("auto", "cpu")

Progress = Callable[[int, int], None]


def builtin_models() -> list[str]:
    """Names of the models that ship with edge."""
    return sorted(path.stem for path in _BUILTIN.glob("*.edge"))


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """A shipped model's bare name, or a path.

    Raises:
        ArgumentError: neither.
    """
    if isinstance(model, str) and model in builtin_models():
        return _BUILTIN / f"{model}.edge"
    path = Path(model).expanduser()
    if not path.exists():
        names = ", ".join(builtin_models()) or "none"
        raise ArgumentError(
            f"model: expected a file, a folder or a shipped model ({names}), found {str(model)!r}"
        )
    return path


def open_pack(
    model: str | os.PathLike[str], *, weights: str = "keep", on_pack: Progress | None = None
) -> PackFile:
    """The pack behind a model; other files are packed once into the cache."""
    from flashload.cache import ensure_packed

    return PackFile(ensure_packed(resolve_model(model), weights=weights, progress=on_pack))


def default_memory_bytes() -> int:
    """Nine tenths of what the machine (or the cgroup) still has."""
    limit = cgroup_limit_bytes()
    room = available_bytes()
    return int(0.9 * (room if limit is None else min(room, limit - rss_bytes())))


def _open_core(options: dict[str, Any], on_load: Progress | None) -> _edge.Engine:
    """Reads the weights in a thread of their own, so that this one sees Ctrl-C and can show how far they are."""
    progress = _edge.LoadProgress()
    opened: list[_edge.Engine] = []
    failed: list[BaseException] = []

    def read() -> None:
        try:
            opened.append(_edge.Engine(options, progress))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=read, name="edge-load")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.05)
            if on_load is not None and progress.total_bytes:
                on_load(progress.done_bytes, progress.total_bytes)
    except BaseException:
        progress.cancel()
        thread.join()
        raise
    if failed:
        raise failed[0]
    return opened[0]


def plan_pack(
    pack: PackFile,
    *,
    memory: int | str | None = None,
    context: int | None = None,
    threads: int | None = None,
    host_bytes: int = 0,
) -> Plan:
    """Places a pack's weights; see :func:`edge.plan`."""
    decoder = pack.config.to_json()
    memory_bytes = default_memory_bytes() if memory is None else parse_bytes(memory)
    n_threads = cpu_count() if threads is None else threads
    if isinstance(n_threads, bool) or not isinstance(n_threads, int) or not 1 <= n_threads <= 1024:
        raise ArgumentError(f"threads: expected 1..1024, found {threads!r}")
    weights = weights_of(pack)

    def plan(n_context: int) -> Plan:
        return make_plan(
            weights,
            decoder,
            memory_bytes=memory_bytes,
            context=n_context,
            threads=n_threads,
            host_bytes=host_bytes,
        )

    longest = decoder["max_positions"]
    if context is not None:
        if isinstance(context, bool) or not isinstance(context, int) or not 1 <= context <= 1 << 24:
            raise ArgumentError(f"context: expected 1..{1 << 24} tokens, found {context!r}")
        return plan(context)
    # Nobody asked for a length: take the longest usual one that leaves the weights resident, else the shortest usual.
    n_context = min(longest, _DEFAULT_CONTEXT)
    while True:
        shorter = n_context // 2
        try:
            chosen = plan(n_context)
        except BudgetError:
            if shorter < _SMALLEST_DEFAULT_CONTEXT:
                raise
        else:
            if chosen.placement == "resident" or shorter < _SMALLEST_DEFAULT_CONTEXT:
                return chosen
        n_context = shorter


def load(
    model: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    device: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    weights: str = "keep",
    isa: str = "",
    io: str = "auto",
    whole_process: bool = False,
    on_pack: Progress | None = None,
    on_load: Progress | None = None,
) -> Engine:
    """Loads a model inside a memory budget.

    Args:
        model: a pack, a GGUF file, a Hugging Face folder, or the bare name of a shipped model.
        memory: ceiling as ``"2GiB"`` or bytes, for all that edge adds to this process; None takes most of what is free.
        device: "auto" or "cpu".
        threads: compute threads; None takes the cores this process may use.
        context: tokens of KV cache; None takes what the model was trained for, at most 4096, less if it crowds out
            the weights.
        weights: "keep", "q8" or "q4": how a checkpoint is packed, when it has to be.
        isa: force a kernel set (see ``edge doctor``); also the environment variable EDGE_ISA.
        io: "auto", "io_uring" or "pread".
        whole_process: the ceiling bounds the whole process, as on the command line.
        on_pack: called with (bytes done, bytes) while a checkpoint is packed.
        on_load: called with (bytes done, bytes) while weights are read.

    Returns:
        Engine: use it as a context manager, or close it.

    Raises:
        BudgetError: the budget is too small; nothing was loaded.
        ModelFileError: the file is malformed, corrupt or not supported.
        ArgumentError: a parameter is out of range.
    """
    if device not in _DEVICES:
        raise ArgumentError(f"device: expected one of {', '.join(_DEVICES)}, found {device!r}")
    before_bytes = 0 if whole_process else rss_bytes()
    start = time.perf_counter()
    pack = open_pack(model, weights=weights, on_pack=on_pack)
    pack_seconds = time.perf_counter() - start
    from edge.engine import Engine
    from edge.tokenizer import Tokenizer

    tokenizer = Tokenizer(pack.vocab())
    host_bytes = max(0, rss_bytes() - before_bytes)
    plan = plan_pack(pack, memory=memory, context=context, threads=threads, host_bytes=host_bytes)
    options = {
        "pack_path": str(pack.path),
        "decoder": pack.config.to_json(),
        "placement": plan.placements,
        "stream_order": plan.stream_order,
        "ring_bytes": plan.ring_bytes,
        "demand_bytes": plan.demand_bytes,
        "io_engine": io,
        "threads": plan.threads,
        "isa": isa,
        "context": plan.context,
        "max_rows": plan.max_rows,
        "budget_bytes": plan.core_bytes,
    }
    core = _open_core(options, on_load)
    metadata = pack.metadata
    pack.close()
    return Engine(core, plan, tokenizer, metadata, time.perf_counter() - start - pack_seconds)
