"""GGUF v2 and v3 files, single or split, read with every length proven before anything is allocated."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

from flashload.errors import ModelFileError, UnsupportedModelError
from flashload.ggml import BLOCK_TYPES
from flashload.rawfile import RawFile
from flashload.tensors import Checkpoint, TensorInfo, check_overlap, tensor_bytes

_MAX_TENSORS = 200_000
_MAX_KEYS = 20_000
_MAX_NAME_BYTES = 256
_MAX_TEXT_BYTES = 16 << 20
_MAX_ITEMS = 4 << 20
_MAX_ALIGNMENT = 1 << 20
_WINDOW_BYTES = 1 << 20
# Three times the largest vocabulary known; parsed, a header takes several times its size in memory.
_MAX_HEADER_BYTES = 64 << 20
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf\Z")

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_U64 = struct.Struct("<Q")


class _Reader:
    """Sequential reads through a window, so that a header of any size costs one megabyte."""

    def __init__(self, file: RawFile) -> None:
        self._file = file
        self.at = 0
        self._window = b""
        self._window_at = 0

    def take(self, n_bytes: int, what: str) -> bytes:
        if self.at + n_bytes > min(_MAX_HEADER_BYTES, self._file.size):
            raise ModelFileError(
                f"{self._file.path}: {what}: expected {n_bytes} bytes at offset {self.at}, found a file of "
                f"{self._file.size} bytes (a header may take {_MAX_HEADER_BYTES})"
            )
        start = self.at - self._window_at
        if start + n_bytes > len(self._window):
            size = min(max(n_bytes, _WINDOW_BYTES), self._file.size - self.at)
            self._window, self._window_at, start = self._file.read(self.at, size, what), self.at, 0
        self.at += n_bytes
        return self._window[start : start + n_bytes]

    def left(self) -> int:
        return self._file.size - self.at

    def scalar(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        return struct.unpack("<" + code, self.take(size, what))[0]

    def bounded(self, what: str, most: int) -> int:
        """A u64 of at most ``most``."""
        value: int = self.scalar("Q", what)
        if value > most:
            raise ModelFileError(f"{self._file.path}: {what}: expected at most {most}, found {value}")
        return value

    def _decoded(self, data: bytes, what: str, exact: bool) -> str:
        try:
            return data.decode("utf-8", "strict" if exact else "replace")
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{self._file.path}: {what}: expected UTF-8, found {error}") from None

    def text(self, what: str, most: int, exact: bool) -> str:
        return self._decoded(self.take(self.bounded(f"length of {what}", most), what), what, exact)

    def texts(self, count: int, what: str, exact: bool) -> list[str]:
        """``count`` texts; vocabularies hold half a million, so most are cut straight out of the window."""
        out: list[str] = []
        for _ in range(count):
            window, start = self._window, self.at - self._window_at + 8
            end = start + _U64.unpack_from(window, start - 8)[0] if start <= len(window) else len(window) + 1
            if end <= len(window):
                out.append(self._decoded(window[start:end], what, exact))
                self.at += end - start + 8
            else:
                out.append(self.text(what, _MAX_TEXT_BYTES, exact))
        return out

    def name(self, what: str) -> str:
        """A key or tensor name: it stands in messages, so it must be printable."""
        value = self.text(what, _MAX_NAME_BYTES, exact=True)
        if not value or not value.isprintable():
            raise ModelFileError(f"{self._file.path}: {what}: expected printable text, found {value!r}")
        return value


def _value(reader: _Reader, kind: int, key: str, where: Path) -> Any:
    # Vocabulary texts must not change by one byte; a description may hold anything.
    exact = key.startswith("tokenizer.")
    if kind in _SCALARS:
        return reader.scalar(_SCALARS[kind], key)
    if kind == _TEXT:
        return reader.text(key, _MAX_TEXT_BYTES, exact)
    if kind != _ARRAY:
        raise ModelFileError(f"{where}: {key}: expected a value type of 0 to 12, found {kind}")
    item_kind = reader.scalar("I", key)
    count = reader.bounded(f"length of {key}", _MAX_ITEMS)
    if item_kind == _TEXT:
        if count * 8 > reader.left():
            raise ModelFileError(f"{where}: {key}: expected {count} texts, found {reader.left()} bytes left")
        return reader.texts(count, key, exact)
    if item_kind not in _SCALARS:
        raise ModelFileError(
            f"{where}: {key}: expected items of a plain type or text, found type {item_kind}"
        )
    code = _SCALARS[item_kind]
    data = reader.take(count * struct.calcsize("<" + code), key)
    return list(struct.unpack(f"<{count}{code}", data))


class _Shard:
    """The header of one file."""

    def __init__(self, file: RawFile) -> None:
        self.path = file.path
        reader = _Reader(file)
        magic = reader.take(4, "magic")
        if magic != b"GGUF":
            raise ModelFileError(f"{file.path}: magic: expected b'GGUF', found {magic!r}")
        version = reader.scalar("I", "version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            hint = " (a big-endian file)" if swapped in (2, 3) else ""
            raise UnsupportedModelError(f"{file.path}: GGUF version: expected 2 or 3, found {version}{hint}")
        n_tensors = reader.bounded("tensor count", _MAX_TENSORS)
        n_keys = reader.bounded("key count", _MAX_KEYS)
        self.metadata: dict[str, Any] = {}
        for index in range(n_keys):
            key = reader.name(f"key {index}")
            if key in self.metadata:
                raise ModelFileError(f"{file.path}: {key}: expected every key once, found it twice")
            self.metadata[key] = _value(reader, reader.scalar("I", key), key, file.path)
        alignment = self.metadata.get("general.alignment", 32)
        power = type(alignment) is int and alignment > 0 and alignment & (alignment - 1) == 0
        if not power or alignment > _MAX_ALIGNMENT:
            raise ModelFileError(
                f"{file.path}: general.alignment: expected a power of two up to {_MAX_ALIGNMENT}, found "
                f"{alignment!r}"
            )
        places = [self._tensor(reader, index) for index in range(n_tensors)]
        data_at = -(-reader.at // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        for name, kind, shape, offset in places:
            self._place(file, name, kind, shape, offset, data_at, alignment)
        check_overlap(str(file.path), self.tensors)

    def _tensor(self, reader: _Reader, index: int) -> tuple[str, int, tuple[int, ...], int]:
        name = reader.name(f"name of tensor {index}")
        n_dims = reader.scalar("I", f"{name} dimensions")
        if not 1 <= n_dims <= 4:
            raise ModelFileError(f"{self.path}: {name}: expected 1 to 4 dimensions, found {n_dims}")
        # GGUF writes the innermost dimension first.
        sizes = [reader.scalar("Q", f"{name} dimensions") for _ in range(n_dims)]
        if not all(1 <= size < 1 << 48 for size in sizes):
            raise ModelFileError(f"{self.path}: {name}: expected dimensions in 1..2**48, found {sizes}")
        kind = reader.scalar("I", f"{name} type")
        return name, kind, tuple(reversed(sizes)), reader.scalar("Q", f"{name} offset")

    def _place(
        self,
        file: RawFile,
        name: str,
        kind: int,
        shape: tuple[int, ...],
        offset: int,
        data_at: int,
        alignment: int,
    ) -> None:
        where = f"{file.path}: {name}"
        if name in self.tensors:
            raise ModelFileError(f"{where}: expected every tensor once, found it twice")
        if kind not in BLOCK_TYPES:
            raise UnsupportedModelError(
                f"{where}: expected a known block type (0..{max(BLOCK_TYPES)}), found {kind}"
            )
        n_bytes = tensor_bytes(where, kind, shape)
        if offset % alignment:
            raise ModelFileError(f"{where}: expected an offset aligned to {alignment}, found {offset}")
        if data_at + offset + n_bytes > file.size:
            raise ModelFileError(
                f"{where}: expected {n_bytes} bytes at offset {data_at + offset}, found a file of "
                f"{file.size} bytes: cut short?"
            )
        place = data_at + offset
        self.tensors[name] = TensorInfo(name, kind, BLOCK_TYPES[kind].name, shape, place, n_bytes, file.path)


def shard_paths(path: Path) -> list[Path]:
    """All files of a split model, or the one file.

    Raises:
        ModelFileError: a part is missing.
    """
    match = _SPLIT.match(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["index"]) <= count:
        raise ModelFileError(f"{path}: expected a part of 1 to {count}, found {int(match['index'])}")
    paths = [path.with_name(f"{match['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        shown = ", ".join(missing[:4]) + (" ..." if len(missing) > 4 else "")
        raise ModelFileError(f"{path}: expected {count} parts, found {len(missing)} missing: {shown}")
    return paths


class GgufCheckpoint(Checkpoint):
    """A GGUF model; ``metadata`` is the first file's, tensors are those of all parts."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        """Reads and proves the header of every part (see :func:`flashload.checkpoint.open_checkpoint`)."""
        super().__init__()
        self.path = path
        self.tensors = {}
        self.metadata = {}
        try:
            paths = shard_paths(path)
            for index, part in enumerate(paths):
                self._files[part] = RawFile(part)
                self._add(_Shard(self._files[part]), index, len(paths))
            expected = self.metadata.get("split.tensors.count")
            if len(paths) > 1 and expected is not None and expected != len(self.tensors):
                raise ModelFileError(
                    f"{path}: split.tensors.count: expected {expected} tensors, found {len(self.tensors)}"
                )
        except BaseException:
            self.close()
            raise

    def _add(self, shard: _Shard, index: int, count: int) -> None:
        for key, expected, default in (("split.count", count, 1), ("split.no", index, 0)):
            found = shard.metadata.get(key, default)
            # A lone file may say 0 or 1 parts.
            if found != expected and not (count == 1 and found in (0, 1)):
                raise ModelFileError(f"{shard.path}: {key}: expected {expected}, found {found!r}")
        if index == 0:
            self.metadata = shard.metadata
        twice = self.tensors.keys() & shard.tensors.keys()
        if twice:
            raise ModelFileError(
                f"{shard.path}: {min(twice)}: expected every tensor once, found it in two parts"
            )
        self.tensors.update(shard.tensors)

    def describe(self) -> str:
        return "GGUF"
