"""Packs made on first use and kept: one per checkpoint and option, in the user's cache folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs

from flashload import pack_layout as layout
from flashload.errors import ArgumentError, DiskError, ModelFileError
from flashload.format import PackFile, is_pack
from flashload.pack import WEIGHTS, Progress, pack
from flashload.pack_copy import copy_pack
from flashload.rawfile import RawFile
from flashload.read_gguf import shard_paths

# Beginning of a weight file that goes into the key: all of a header, or its first tensors.
_HEAD_BYTES = 1 << 20
_LOCK_POLL_S = 0.1
_ELSEWHERE = "; the environment variable EDGE_CACHE names another"


def cache_folder() -> Path:
    """Where packs are kept: ``EDGE_CACHE``, or the user's cache folder of this system."""
    named = os.environ.get("EDGE_CACHE")
    return Path(named) if named else Path(platformdirs.user_cache_dir("edge", appauthor=False))


def scratch_folder() -> Path:
    """Where the core's temporary files go: ``EDGE_SCRATCH``, or edge's cache folder, which is made.

    Raises:
        DiskError: the folder cannot be made.
    """
    named = os.environ.get("EDGE_SCRATCH")
    folder = Path(named) if named else cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"scratch folder {folder}: cannot be made: {error.strerror}") from error
    return folder


def _sources(path: Path) -> list[Path]:
    """The files a checkpoint is made of, without opening it."""
    if path.is_dir():
        wanted = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken")
        return sorted({file for pattern in wanted for file in path.glob(pattern) if file.is_file()})
    return shard_paths(path)


def cache_key(path: Path, weights: str) -> str:
    """A name for the pack of this checkpoint; changes with option, place, size, time and beginning of a file.

    Raises:
        ModelFileError: ``path`` does not exist.
        DiskError: the drive fails.
    """
    described: list[object] = [str(path.resolve()), weights, layout.VERSION]
    for source in _sources(path):
        with RawFile(source) as file:
            status = source.stat()
            head = file.read(0, min(file.size, _HEAD_BYTES), "beginning")
            described.append([str(source.resolve()), status.st_size, status.st_mtime_ns, layout.xxh3(head)])
    digest = layout.xxh3(json.dumps(described).encode())
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in path.stem)
    return f"{stem[:80]}-{weights}-{digest:016x}.edge"


@contextlib.contextmanager
def _locked(path: Path, waiting: Callable[[], None] | None) -> Iterator[None]:
    """Holds an exclusive lock on ``path``; ``waiting`` is called while another process has it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise DiskError(
            f"{path.parent}: the cache folder cannot be written: {error.strerror}{_ELSEWHERE}"
        ) from error
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                time.sleep(_LOCK_POLL_S)
            except OSError:
                # A drive without locks: at worst two processes pack the same, and the last rename stays.
                break
        yield
    finally:
        os.close(fd)


def _is_whole(path: Path) -> bool:
    """Whether a cached pack opens; chunk hashes are checked on every later read."""
    try:
        with PackFile(path) as file:
            _ = file.config
            file.vocab()
    except ModelFileError:
        return False
    return True


def ensure_packed(path: str | Path, weights: str = "keep", progress: Progress | None = None) -> Path:
    """The pack of a checkpoint, made now if the cache has none; a pack is returned as it is.

    Two processes that ask at once pack once: the second waits and is told (done 0 of 0 bytes) meanwhile.
    A damaged pack in the cache is made again.

    Args:
        path: a pack, a GGUF file or a Hugging Face folder.
        weights: as for :func:`flashload.pack.pack`.
        progress: called with (done_bytes, total_bytes); may raise to give up.

    Raises:
        ModelFileError: the checkpoint is malformed, incomplete, or not one edge runs.
        DiskError: the drive fails or is full.
        ArgumentError: an unknown value of ``weights``.
    """
    path = Path(path)
    if is_pack(path):
        return path
    if weights not in WEIGHTS:
        raise ArgumentError(f"weights: expected one of {', '.join(WEIGHTS)}, found {weights!r}")
    if not path.exists():
        raise ModelFileError(f"{path}: no such file or folder")
    return _made(cache_key(path, weights), lambda packed: pack(path, packed, weights, progress), progress)


def ensure_copied(source: PackFile, progress: Progress | None = None) -> Path:
    """The copy of a pack at fewer bits (:mod:`flashload.pack_copy`), made now if the cache has none.

    Raises:
        UnsupportedModelError: the pack is one by neuron, or has as few bits already.
        CorruptError, DiskError: as of reading and writing packs.
    """
    return _made(cache_key(source.path, "copy"), lambda copy: copy_pack(source, copy, progress), progress)


def _made(name: str, make: Callable[[Path], object], progress: Progress | None) -> Path:
    """A pack of the cache folder, made where it is not there whole."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{folder}: the cache folder cannot be made: {error.strerror}{_ELSEWHERE}") from error
    packed = folder / name
    if _is_whole(packed):
        return packed
    waiting = None if progress is None else lambda: progress(0, 0)
    with _locked(packed.with_suffix(".lock"), waiting):
        if not _is_whole(packed):
            make(packed)
    return packed
