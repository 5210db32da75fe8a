"""Work on weights in a thread of its own, watched and cancelled from the caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import _edge

_T = TypeVar("_T")

#: Called with (bytes done, bytes).
Progress = Callable[[int, int], None]


def watched(work: Callable[[_edge.LoadProgress], _T], on_load: Progress | None) -> _T:
    """Reads weights in a thread of its own, so that this one sees Ctrl-C and can show how far it is."""
    progress = _edge.LoadProgress()
    results: list[_T] = []
    failed: list[BaseException] = []
    # An event, because an interrupted Thread.join() may take a running thread for a finished one (CPython 3.11).
    done = threading.Event()

    def read() -> None:
        try:
            results.append(work(progress))
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    threading.Thread(target=read, name="edge-load").start()
    try:
        while not done.wait(0.05):
            if on_load is not None and progress.total_bytes:
                on_load(progress.done_bytes, progress.total_bytes)
    except BaseException:
        progress.cancel()
        done.wait()
        raise
    if failed:
        raise failed[0]
    return results[0]
