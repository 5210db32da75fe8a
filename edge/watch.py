"""Work on weights in a thread of its own, watched and cancelled from the caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import _edge

_T = TypeVar("_T")

#: Called with (bytes done, bytes).
Progress = Callable[[int, int], None]


def watched(work: Callable[[_edge.LoadProgress], _T], on_load: Progress | None) -> _T:
    """Reads weights in a thread of its own, so that this one sees Ctrl-C and can show how far it is.

    However often it is interrupted, it does not return while that thread is at work.
    """
    progress = _edge.LoadProgress()
    results: list[_T] = []
    failed: list[BaseException] = []
    # Plain locks: an interrupted Thread.join() may take a running thread for a finished one (CPython 3.11), and an
    # interrupted Event may keep its lock. Whoever has `begun` first decides whether there is work at all.
    begun, done = threading.Lock(), threading.Lock()
    done.acquire()

    def read() -> None:
        if not begun.acquire(blocking=False):
            return
        try:
            results.append(work(progress))
        except BaseException as error:
            failed.append(error)
        finally:
            done.release()

    try:
        threading.Thread(target=read, name="edge-load").start()
        while not (results or failed):
            done.acquire(timeout=0.05)
            if on_load is not None and progress.total_bytes and not (results or failed):
                on_load(progress.done_bytes, progress.total_bytes)
    except BaseException:
        progress.cancel()
        if not begun.acquire(blocking=False):
            while not (results or failed):
                with suppress(KeyboardInterrupt):
                    done.acquire(timeout=0.05)
        raise
    if failed:
        raise failed[0]
    return results[0]
