"""Positioned reads of one regular file, in bounded pieces, with the page cache dropped behind them.

Nothing is mapped: a mapped page counts against the memory of the process, and a file that shrinks while it is
mapped kills it. Here it raises :class:`DiskError`.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType

from flashload.errors import DiskError, ModelFileError

PIECE_BYTES = 8 << 20


class RawFile:
    """A regular file opened for positioned reads; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Opens ``path``.

        Raises:
            ModelFileError: it does not exist, or is not a regular file.
            DiskError: the system refuses to open it.
        """
        self.path = path
        try:
            # A pipe would block in open(), so the kind is asked before and after.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ModelFileError(f"{path}: expected a regular file, found a folder or a device")
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            raise ModelFileError(f"{path}: no such file") from None
        except OSError as error:
            raise DiskError(f"{path}: cannot be opened: {error.strerror}") from error
        self.size = os.fstat(self._fd).st_size

    def read(self, offset: int, n_bytes: int, what: str, drop: bool = False) -> bytes:
        """Exactly ``n_bytes`` from ``offset``; ``drop`` gives their page cache back to the system.

        Raises:
            ModelFileError: the range lies outside the file (nothing is allocated then).
            DiskError: the drive fails, or the file shrank since it was opened.
        """
        if offset < 0 or n_bytes < 0 or offset + n_bytes > self.size:
            raise ModelFileError(
                f"{self.path}: {what}: expected {n_bytes} bytes at offset {offset}, found a file of "
                f"{self.size} bytes"
            )
        out = bytearray(n_bytes)
        view = memoryview(out)
        done = 0
        try:
            while done < n_bytes:
                piece = view[done : done + PIECE_BYTES]
                got = os.preadv(self._fd, [piece], offset + done)
                if got == 0:
                    raise DiskError(
                        f"{self.path}: {what}: the file shrank while it was read, at {offset + done}"
                    )
                if drop and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(self._fd, offset + done, got, os.POSIX_FADV_DONTNEED)
                done += got
        except OSError as error:
            raise DiskError(
                f"{self.path}: {what}: read at {offset + done} failed: {error.strerror}"
            ) from error
        return bytes(out)

    def close(self) -> None:
        """Closes the file; further reads fail. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> RawFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
