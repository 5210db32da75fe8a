"""Texts parked on a drive: their keys and values in files of their own, within a number of bytes, read when that is
quicker than computing them again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import _edge

from flashload.cache import scratch_folder
from flashload.errors import CancelledError, DiskError, EdgeError
from flashload.machine import parse_bytes

_FOLDER = "edge-prefixes-"


@dataclass(frozen=True)
class ParkedText:
    """One file."""

    path: Path
    bytes: int


class Pace:
    """What a token costs to compute and a byte to read, as last seen; nothing is known at first."""

    def __init__(self) -> None:
        self.token_seconds: float | None = None
        self.byte_seconds: float | None = None

    def reading_pays(self, n_tokens: int, n_bytes: int) -> bool:
        """Whether so many tokens take longer to compute than so many bytes to read; yes where that is not known yet."""
        if self.token_seconds is None or self.byte_seconds is None:
            return True
        return n_tokens * self.token_seconds > n_bytes * self.byte_seconds


def _sweep(folder: Path) -> None:
    """Removes what processes left that are no more."""
    for left in folder.glob(f"{_FOLDER}*"):
        pid = left.name.removeprefix(_FOLDER).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)


class Parking:
    """A folder of parked texts, made when the first one is parked and gone with the engine.

    Attributes:
        notes: what failed, a sentence each.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.pace = Pace()
        self.notes: list[str] = []
        self._n_written = 0
        self._token_bytes = 0.0
        self._folder: Path | None = None
        self._remove: weakref.finalize[[str], Parking] | None = None

    def park(self, text: _edge.Sequence, n_tokens: int) -> ParkedText | None:
        """Writes a text; None where that does not pay or the drive fails.

        Raises:
            CancelledError: the request was cancelled meanwhile.
        """
        n_bytes = int(self._token_bytes * n_tokens)
        if n_bytes > self.limit_bytes or not self.pace.reading_pays(n_tokens, n_bytes):
            return None
        self._n_written += 1
        name = f"{self._n_written}.session"
        if not self._tried(lambda: _edge.save_session(text, str(self._made_folder() / name)), "not written"):
            return None
        path = self._made_folder() / name
        n_bytes = path.stat().st_size
        self._token_bytes = n_bytes / n_tokens
        return ParkedText(path, n_bytes)

    def restore(self, into: _edge.Sequence, parked: ParkedText) -> bool:
        """Reads a text in place of another, which is gone either way; False where the file is not what was written.

        Raises:
            CancelledError: the request was cancelled meanwhile.
        """
        start = time.perf_counter()
        if not self._tried(lambda: _edge.load_session(into, str(parked.path)), "computed again"):
            return False
        self.pace.byte_seconds = (time.perf_counter() - start) / parked.bytes
        return True

    def drop(self, parked: ParkedText) -> None:
        """Removes a file."""
        with contextlib.suppress(OSError):
            parked.path.unlink()

    def close(self) -> None:
        """Removes the folder."""
        if self._remove is not None:
            self._remove()

    def _made_folder(self) -> Path:
        if self._folder is None:
            parent = scratch_folder()
            _sweep(parent)
            try:
                self._folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-", dir=parent))
            except OSError as error:
                raise DiskError(f"{parent}: no folder can be made: {error.strerror}") from error
            # Also where nobody closes the engine.
            self._remove = weakref.finalize(self, shutil.rmtree, str(self._folder), True)
        return self._folder

    def _tried(self, work: Callable[[], None], otherwise: str) -> bool:
        try:
            work()
        except CancelledError:
            raise
        except EdgeError as error:
            self.notes = [*self.notes[-7:], f"parked text {otherwise}: {error}"]
            return False
        return True


def parking(prefix_disk: int | str | None) -> Parking | None:
    """The folder for ``prefix_disk`` of :func:`edge.load`; None where nothing is to be parked."""
    return None if prefix_disk is None else Parking(parse_bytes(prefix_disk, "prefix_disk"))
