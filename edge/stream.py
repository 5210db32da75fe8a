"""Whose turn it is: requests are served one after the other, and a stream keeps its turn until it ends; what changes
the engine under a request waits for the end of a pass."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeAlias

from edge.completion import Chunk
from flashload.errors import CancelledError, EdgeError

_POLL_S = 0.05

Turn: TypeAlias = Generator[None, None, None]


class Turns:
    """The turn of one engine. A thread that still holds it with an unfinished stream is told so, not blocked.

    A turn is a generator inside ``with lock:``, because Ctrl-C may come between any two calls: whatever is not reached
    then, a turn that nobody refers to any more gives itself back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: The thread that computed last for the request whose turn it is.
        self.thread: int | None = None
        self._stream: weakref.ref[Stream] | None = None

    def take(self, stream: Stream | None = None) -> Turn:
        """Waits until no other request is served. Closing the turn gives it back.

        Raises:
            EdgeError: the other request is a stream that this very thread has not finished.
        """
        if self._is_own():
            raise EdgeError(
                "engine: this thread has an unfinished stream; read it to its end or close() it first"
            )
        return _begun(self._turn(None if stream is None else weakref.ref(stream)))

    def take_last(self, cancelled: Callable[[], bool]) -> Turn:
        """As :meth:`take`, but ends a stream at rest: this thread's own, or a cancelled one nobody may ever read.

        Raises:
            EdgeError: called by the running request itself (from its on_progress).
        """
        while not self._lock.acquire(timeout=_POLL_S):
            own = self._is_own()
            stream = None if self._stream is None else self._stream()
            if stream is not None and (own or cancelled()) and not stream.end() and own:
                raise EdgeError("engine: cannot be closed by the request it is serving; cancel() it")
        return _begun(self._locked_turn())

    def _is_own(self) -> bool:
        return self.thread == threading.get_ident() and self._lock.locked()

    def _turn(self, stream: weakref.ref[Stream] | None) -> Turn:
        with self._lock:
            self.thread = threading.get_ident()
            self._stream = stream
            try:
                yield
            finally:
                self.thread = None
                self._stream = None

    def _locked_turn(self) -> Turn:
        try:
            self.thread = threading.get_ident()
            yield
        finally:
            self.thread = None
            self._lock.release()


def _begun(turn: Turn) -> Turn:
    next(turn)
    return turn


class Passes:
    """Passes of the core, one at a time (``with passes.next():``), and what may happen only between two of them."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._pass = threading.Lock()
        self._thread: int | None = None
        self._due: deque[Callable[[], object]] = deque()

    @contextmanager
    def next(self) -> Iterator[None]:
        """Waits for the end of the running pass, and of a change that waits for it too."""
        # Whoever waits between passes holds the gate: the next pass cannot overtake it.
        with self._gate:
            pass
        # Not self._one(): a context within a context is a good part of what Python takes for a token of a small model.
        with self._pass:
            try:
                self._begin()
                yield
            finally:
                self._thread = None

    @contextmanager
    def between(self) -> Iterator[None]:
        """Waits for the end of the running pass; the next one waits for this.

        Raises:
            EdgeError: this thread is inside a pass.
        """
        if self._thread == threading.get_ident() and self._pass.locked():
            raise EdgeError("engine: cannot be changed from inside one of its own passes")
        with self._gate, self._one():
            yield

    def when_free(self, work: Callable[[], object]) -> None:
        """Does ``work``, which must not raise, now or, while a pass or a change is under way, before the next begins.

        Waits for neither: the garbage collector ends streams in the midst of anything, changes by this thread too.
        """
        self._due.append(work)
        if not self._pass.locked():
            with self._one():
                pass

    @contextmanager
    def _one(self) -> Iterator[None]:
        with self._pass:
            try:
                self._begin()
                yield
            finally:
                self._thread = None

    def _begin(self) -> None:
        self._thread = threading.get_ident()
        while self._due:
            self._due[0]()
            self._due.popleft()


class Stream(Iterator[Chunk]):
    """The chunks of one request, computed as they are asked for. Dropping or closing it ends the request."""

    _turn: Turn | None = None

    def __init__(self, turns: Turns, chunks: Generator[Chunk, None, None]) -> None:
        self._turns = turns
        self._chunks: Generator[Chunk, None, None] | None = chunks
        self._last: Chunk | None = None
        self._step = threading.Lock()

    def __next__(self) -> Chunk:
        with self._step:
            if self._chunks is None:
                last, self._last = self._last, None
                if last is None:
                    raise StopIteration
                return last
            try:
                if self._turn is None:
                    self._turn = self._turns.take(self)
                self._turns.thread = threading.get_ident()
                return next(self._chunks)
            except BaseException:
                self._finish()
                raise

    def _finish(self) -> None:
        self._chunks = None
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.close()

    def close(self) -> None:
        """Ends the request. May be called twice."""
        with self._step:
            self._finish()

    def end(self) -> bool:
        """Cancels the request unless it is computing now; whoever reads on finds the last chunk of a cancelled one."""
        if not self._step.acquire(blocking=False):
            return False
        try:
            if self._chunks is not None and self._turn is not None:
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
        self._finish()
