"""Ctrl-C, and a signal handler that calls cancel(), between any two calls of a request: nothing stays locked."""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import edge
from edge import engine as engine_module
from edge import stream as stream_module
from edge import watch as watch_module
from edge.errors import CancelledError
from tests.fault.conftest import CONTEXT

JOIN_S = 60
#: Code that is interrupted. Locks made in Python, which an exception inside them may leave locked, are so by a handler
#: that returns alone.
FILES = {module.__file__ for module in (engine_module, stream_module, watch_module, contextlib)}
LOCKS = {threading.__file__}


class Interruption:
    """Calls ``act`` at the ``at``-th moment of some work at which the interpreter would run a signal handler."""

    def __init__(self, at: int, act: Callable[[], object], files: set[str]) -> None:
        self.n_left, self.act, self.files = at, act, files

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code.co_filename not in self.files or event not in ("call", "c_return"):
            return
        # A generator that is closed runs on without looking; the profiler shows that as a call of it.
        if event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR:
            return
        self.n_left -= 1
        if self.n_left == 0:
            sys.setprofile(None)
            self.act()

    def during(self, work: Callable[[], object]) -> bool:
        """Whether the work had so many moments. What it raises is left aside."""
        sys.setprofile(self)
        try:
            work()
        except (KeyboardInterrupt, CancelledError):
            pass
        finally:
            sys.setprofile(None)
        return self.n_left <= 0


def in_time(work: Callable[[], object]) -> list[object]:
    """What ``work`` returns, from a thread that may hang: then nothing."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(JOIN_S)
    return found


@pytest.fixture(scope="module")
def engine(packs: dict[str, Path]) -> Iterator[edge.Engine]:
    with edge.load(packs["dense"], memory="1GiB", context=CONTEXT, threads=1, pressure="off") as engine:
        yield engine


def interrupt() -> None:
    raise KeyboardInterrupt


def ask(engine: edge.Engine) -> list[int]:
    return engine.generate([1, 17], max_tokens=2, temperature=0, ignore_eos=True).tokens


def score(engine: edge.Engine) -> list[float | None]:
    return engine.score([1, 17, 5])


def ask_many(engine: edge.Engine) -> list[list[int]]:
    texts = engine.generate_many([[1, 17]], max_tokens=2, temperature=0, ignore_eos=True)
    return [text.tokens for text in texts]


def change(engine: edge.Engine) -> int:
    half = 1 << 29
    return engine.set_memory(half if engine.plan.memory_bytes > half else 2 * half).context


# What a finalizer was doing when it was cut short is lost, and told by the interpreter.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("work", [ask, score, ask_many, change], ids=lambda work: work.__name__)
@pytest.mark.parametrize("by", ["ctrl-c", "cancel"])
def test_the_next_request_is_served(
    by: str, work: Callable[[edge.Engine], object], engine: edge.Engine
) -> None:
    expected = work(engine)
    act, files = (interrupt, FILES) if by == "ctrl-c" else (engine.cancel, FILES | LOCKS)
    n_moments, more = 0, True
    while more:
        n_moments += 1
        interruption = Interruption(n_moments, act, files)
        found = in_time(lambda i=interruption: (i.during(lambda: work(engine)), work(engine)))
        assert found, f"nothing is served after an interruption at moment {n_moments}"
        more, answer = found[0]
        assert answer == expected
    assert n_moments > 10
