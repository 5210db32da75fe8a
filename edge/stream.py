"""Whose turn it is: requests are served one after the other, and a stream keeps its turn until it ends; what changes
the engine under a request waits for the end of a pass."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType

from edge.completion import Chunk
from flashload.errors import CancelledError, EdgeError

_POLL_S = 0.05


class Turns:
    """The turn of one engine. A thread that still holds it with an unfinished stream is told so, not blocked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: The thread that computed last for the request whose turn it is.
        self.thread: int | None = None
        self._stream: weakref.ref[Stream] | None = None

    def take(self, stream: Stream | None = None) -> None:
        """Waits until no other request is served.

        Raises:
            EdgeError: the other request is a stream that this very thread has not finished.
        """
        if self.thread == threading.get_ident():
            raise EdgeError(
                "engine: this thread has an unfinished stream; read it to its end or close() it first"
            )
        self._lock.acquire()
        self.thread = threading.get_ident()
        self._stream = None if stream is None else weakref.ref(stream)

    def take_last(self, cancelled: Callable[[], bool]) -> None:
        """As :meth:`take`, but ends a stream at rest: this thread's own, or a cancelled one nobody may ever read.

        Raises:
            EdgeError: called by the running request itself (from its on_progress).
        """
        while not self._lock.acquire(timeout=_POLL_S):
            own = self.thread == threading.get_ident()
            stream = None if self._stream is None else self._stream()
            if stream is not None and (own or cancelled()) and not stream.end() and own:
                raise EdgeError("engine: cannot be closed by the request it is serving; cancel() it")
        self.thread = threading.get_ident()

    def give_back(self) -> None:
        """The next request may begin."""
        self.thread = None
        self._stream = None
        self._lock.release()


class Passes:
    """Passes of the core, one at a time (``with passes:``), and what may happen only between two of them."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._pass = threading.Lock()
        self._thread: int | None = None
        self._due: deque[Callable[[], object]] = deque()

    def __enter__(self) -> None:
        # Whoever waits between passes holds the gate: the next pass cannot overtake it.
        with self._gate:
            self._pass.acquire()
        self._thread = threading.get_ident()
        self._do_what_is_due()

    def __exit__(self, *_: object) -> None:
        self._thread = None
        self._pass.release()

    def when_free(self, work: Callable[[], object]) -> None:
        """Does ``work``, which must not raise, now or, while a pass or a change is under way, before the next begins.

        Never waits: the garbage collector ends streams in the middle of anything, a change by this very thread too.
        """
        self._due.append(work)
        if self._pass.acquire(blocking=False):
            try:
                self._do_what_is_due()
            finally:
                self._pass.release()

    def _do_what_is_due(self) -> None:
        while self._due:
            self._due.popleft()()

    @contextmanager
    def between(self) -> Iterator[None]:
        """Waits for the end of the running pass; the next one waits for this.

        Raises:
            EdgeError: this thread is inside a pass.
        """
        if self._thread == threading.get_ident():
            raise EdgeError("engine: cannot be changed from inside one of its own passes")
        with self._gate, self._pass:
            self._thread = threading.get_ident()
            try:
                self._do_what_is_due()
                yield
            finally:
                self._thread = None


class Stream(Iterator[Chunk]):
    """The chunks of one request, computed as they are asked for. Dropping or closing it ends the request."""

    def __init__(self, turns: Turns, chunks: Generator[Chunk, None, None]) -> None:
        self._turns = turns
        self._chunks: Generator[Chunk, None, None] | None = chunks
        self._last: Chunk | None = None
        self._step = threading.Lock()
        self._has_turn = False

    def __next__(self) -> Chunk:
        with self._step:
            if self._chunks is None:
                last, self._last = self._last, None
                if last is None:
                    raise StopIteration
                return last
            try:
                if not self._has_turn:
                    self._turns.take(self)
                    self._has_turn = True
                self._turns.thread = threading.get_ident()
                return next(self._chunks)
            except BaseException:
                self._finish()
                raise

    def _finish(self) -> None:
        self._chunks = None
        if self._has_turn:
            self._has_turn = False
            self._turns.give_back()

    def close(self) -> None:
        """Ends the request. May be called twice."""
        with self._step:
            self._finish()

    def end(self) -> bool:
        """Cancels the request unless it is computing now; whoever reads on finds the last chunk of a cancelled one."""
        if not self._step.acquire(blocking=False):
            return False
        try:
            if self._chunks is not None and self._has_turn:
                self._last = self._chunks.throw(CancelledError("the engine was closed"))
        except (CancelledError, StopIteration):
            self._last = None  # the last chunk was read already
        finally:
            self._finish()
            self._step.release()
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._has_turn:
            self._finish()
