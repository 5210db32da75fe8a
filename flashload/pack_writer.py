"""Writes a pack: entries streamed into a temporary file, hashed on the way, renamed when complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import xxhash

from flashload import pack_layout as layout
from flashload.errors import ArgumentError, DiskError
from flashload.pack_layout import Entry
from quant.formats import WeightFormat
from quant.formats.neuron import NEURON_FORMATS

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Written pages are flushed and given back this often, so that packing does not fill the page cache.
_FLUSH_BYTES = 128 << 20


def file_bytes_for(payloads: Iterable[int], chunk_counts: int, n_entries: int) -> int:
    """Size of a pack with these payloads, directory included."""
    directory = layout.DIRECTORY.size + n_entries * layout.ENTRY.itemsize + 8 * chunk_counts
    return layout.HEADER_BYTES + sum(map(layout.round_up, payloads)) + layout.round_up(directory)


def remove_stale(path: Path) -> None:
    """Removes temporaries of ``path`` whose writer is gone: a living writer holds a lock on its own."""
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            fd = os.open(stale, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stale.unlink()
            finally:
                os.close(fd)


class PackWriter:
    """Context manager that builds the pack ``path``; leaving it cleanly publishes the file.

    An exception inside (KeyboardInterrupt too) removes the temporary and leaves ``path`` as it was. A killed
    process leaves only a temporary beside it, which the next writer of the same path removes.
    """

    def __init__(self, path: Path, needed_bytes: int = 0) -> None:
        """Opens the temporary.

        Args:
            path: the pack to make; an existing one is replaced at the end, atomically.
            needed_bytes: expected size, refused at once when the drive has less.

        Raises:
            DiskError: the folder cannot be written, or lacks the space.
        """
        self.path = path
        self._entries: list[Entry] = []
        self._names: set[str] = set()
        self._hashes: list[int] = []
        self._end = layout.HEADER_BYTES
        self._unflushed = 0
        self._needed_bytes = needed_bytes
        try:
            remove_stale(path)
            free = shutil.disk_usage(path.parent).free
            if needed_bytes > free:
                raise DiskError(f"{path}: the pack needs {needed_bytes} bytes, the drive has {free} free")
            self._temporary = path.parent / f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
            self._file = open(self._temporary, "xb", buffering=1 << 20)  # noqa: SIM115
            # Some network drives know no locks; their stale files are then left alone as well.
            with contextlib.suppress(OSError):
                fcntl.flock(self._file.fileno(), fcntl.LOCK_EX)
        except OSError as error:
            raise DiskError(f"{path}: cannot be written: {error.strerror}") from error

    def add(
        self,
        name: str,
        weight_format: WeightFormat,
        rows: int,
        cols: int,
        parts: Iterable[bytes],
        layer: int = -1,
        expert: int = -1,
        neuron_parts: int = 1,
    ) -> None:
        """Appends one entry; ``parts`` are written as they come and must add up to the payload.

        ``neuron_parts`` rows make one record of a neuron format.

        Raises:
            ArgumentError: a bad or repeated name, a shape the format cannot hold, or parts of another length.
            DiskError: the drive is full or fails.
        """
        if not _NAME.match(name) or name in self._names:
            raise ArgumentError(f"pack entry {name!r}: expected an unused name of 1 to 64 of [A-Za-z0-9._-]")
        try:
            n_bytes = layout.payload_bytes(weight_format, rows, cols, neuron_parts)
        except ValueError as error:
            raise ArgumentError(f"pack entry {name}: {error}") from None
        neurons = weight_format in NEURON_FORMATS
        chunk = n_bytes // rows if neurons else layout.chunk_bytes_for(name, n_bytes)
        entry = Entry(
            name, weight_format, rows, cols, self._end, n_bytes, chunk, len(self._hashes), layer, expert
        )
        self._stream(entry, parts)
        self._entries.append(entry)
        self._names.add(name)
        self._end += entry.stored_bytes

    def _stream(self, entry: Entry, parts: Iterable[bytes]) -> None:
        hasher = xxhash.xxh3_64()
        in_chunk = written = 0

        def put(data: memoryview) -> None:
            nonlocal in_chunk
            self._write(data)
            while data:
                piece = data[: entry.chunk_bytes - in_chunk]
                hasher.update(piece)
                in_chunk += len(piece)
                data = data[len(piece) :]
                if in_chunk == entry.chunk_bytes:
                    self._hashes.append(hasher.intdigest())
                    hasher.reset()
                    in_chunk = 0

        for part in parts:
            written += len(part)
            if written > entry.bytes:
                break
            put(memoryview(part))
        if written != entry.bytes:
            raise ArgumentError(f"pack entry {entry.name}: expected {entry.bytes} bytes, found {written}")
        put(memoryview(bytes(entry.hashed_bytes - entry.bytes)))
        if in_chunk:
            self._hashes.append(hasher.intdigest())
        self._write(bytes(entry.stored_bytes - entry.hashed_bytes))

    def _write(self, data: memoryview | bytes) -> None:
        try:
            self._file.write(data)
            self._unflushed += len(data)
            if self._unflushed >= _FLUSH_BYTES:
                self._flush()
        except OSError as error:
            raise self._disk_error(error) from error

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._unflushed = 0

    def _disk_error(self, error: OSError) -> DiskError:
        if error.errno in _FULL:
            free = shutil.disk_usage(self.path.parent).free
            needed = max(self._needed_bytes, self._end)
            return DiskError(
                f"{self.path}: no space: the pack needs {needed} bytes, the drive has {free} free"
            )
        return DiskError(f"{self.path}: writing the pack failed: {error.strerror}")

    def commit(self) -> None:
        """Writes directory and header, makes them durable, and renames the file into place.

        Raises:
            DiskError: the drive is full or fails.
            ArgumentError: more entries than a pack may hold.
        """
        directory = layout.directory_bytes(self._entries, self._hashes)
        if len(self._entries) > layout.MAX_ENTRIES or len(directory) > layout.MAX_DIRECTORY_BYTES:
            raise ArgumentError(
                f"{self.path}: directory: expected at most {layout.MAX_ENTRIES} entries in "
                f"{layout.MAX_DIRECTORY_BYTES} bytes, found {len(self._entries)} in {len(directory)}"
            )
        self._write(directory)
        try:
            self._file.seek(0)
            self._file.write(layout.header_bytes(self._end + len(directory), self._end, directory))
            self._flush()
            os.replace(self._temporary, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise self._disk_error(error) from error
        self._file.close()

    def discard(self) -> None:
        """Removes the temporary; ``path`` stays as it was."""
        # The buffer may hold bytes that a full drive refuses again on close.
        with contextlib.suppress(OSError):
            self._temporary.unlink()
        with contextlib.suppress(OSError):
            self._file.close()

    def __enter__(self) -> PackWriter:
        self._file.write(bytes(layout.HEADER_BYTES))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.commit()
        except BaseException:
            self.discard()
            raise
