"""What a checkpoint is to the packer: named tensors with proven bounds, read by rows; the readers build on it."""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from flashload.errors import ArgumentError, ModelFileError, UnsupportedModelError
from flashload.ggml import BLOCK_TYPES
from flashload.rawfile import RawFile

_MAX_JSON_BYTES = 32 << 20
PICKLE_REFUSED = (
    "expected GGUF or safetensors, found a pickle file, which can run code when opened; convert it with "
    "transformers: model.save_pretrained(folder, safe_serialization=True)"
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint; every bound is proven when the checkpoint is opened.

    Attributes:
        ggml_type: block type id (``flashload.ggml``); -1 for a safetensors dtype that cannot be a weight.
        type_name: the type as its container calls it.
        shape: outermost first, [out, in] for a matrix.
        offset: of the first byte in ``file``.
        bytes: size in the file.
    """

    name: str
    ggml_type: int
    type_name: str
    shape: tuple[int, ...]
    offset: int
    bytes: int
    file: Path

    @property
    def cols(self) -> int:
        """Length of the innermost dimension."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Product of the other dimensions; 1 for a vector."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.bytes // self.rows if self.rows else 0


class Checkpoint(ABC):
    """An opened checkpoint: ``kind`` is "gguf" or "hf".

    Attributes:
        path: what was opened: a file or a folder.
        metadata: GGUF key-values, or ``{"config": ..., "generation_config": ...}`` of a folder.
        tensors: name -> :class:`TensorInfo`.
    """

    kind: str
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def __init__(self) -> None:
        self._files: dict[Path, RawFile] = {}

    @property
    def files(self) -> list[Path]:
        """The files that hold weights, in order."""
        return list(self._files)

    @abstractmethod
    def describe(self) -> str:
        """One word on the container, for messages and the pack's metadata."""

    def read_rows(self, name: str, first: int, count: int) -> bytes:
        """Raw bytes of rows [first, first + count) of a tensor; page cache is dropped behind.

        Raises:
            ArgumentError: no such tensor or rows.
            UnsupportedModelError: its type cannot be a weight.
            DiskError: the drive fails, or the file shrank.
        """
        info = self.tensors.get(name)
        if info is None or first < 0 or count < 0 or first + count > info.rows:
            found = "no such tensor" if info is None else f"{info.rows} rows"
            raise ArgumentError(f"{self.path}: {name}: expected rows {first}..{first + count}, found {found}")
        block = BLOCK_TYPES.get(info.ggml_type)
        if block is None or not block.is_weight:
            raise UnsupportedModelError(
                f"{info.file}: {name}: expected a weight, found type {info.type_name}"
            )
        file = self._files[info.file]
        return file.read(info.offset + first * info.row_bytes, count * info.row_bytes, name, drop=True)

    def close(self) -> None:
        """Closes every file. May be called twice."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object from untrusted bytes.

    Raises:
        ModelFileError: not JSON, not an object, a key twice, or nested without end.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                raise ModelFileError(f"{where}: expected every key once, found {key!r} twice")
            out[key] = value
        return out

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ModelFileError(f"{where}: expected JSON, found one nested too deep") from None
    except ValueError as error:
        raise ModelFileError(f"{where}: expected JSON, found an error: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 32 MiB."""
    with RawFile(path) as file:
        if file.size > _MAX_JSON_BYTES:
            raise ModelFileError(
                f"{path}: expected at most {_MAX_JSON_BYTES} bytes of JSON, found {file.size}"
            )
        return parse_json(file.read(0, file.size, "JSON"), str(path))


def tensor_bytes(where: str, ggml_type: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this type and shape.

    Raises:
        ModelFileError: rows that do not fill whole blocks, or a size beyond 2**62.
    """
    block = BLOCK_TYPES[ggml_type]
    if shape[-1] % block.block_values:
        raise ModelFileError(
            f"{where}: expected rows of whole {block.name} blocks of {block.block_values}, found {shape[-1]}"
        )
    n_bytes = block.block_bytes
    for size in (*shape[:-1], shape[-1] // block.block_values):
        n_bytes *= size
    if n_bytes >= 1 << 62:
        raise ModelFileError(f"{where}: expected a size below 2**62 bytes, found shape {shape}")
    return n_bytes


def check_overlap(where: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Proves that no two tensors of a file share a byte; raises ModelFileError."""
    by_place = sorted(tensors.values(), key=lambda t: (str(t.file), t.offset))
    for one, other in itertools.pairwise(by_place):
        if one.file == other.file and one.offset + one.bytes > other.offset:
            raise ModelFileError(
                f"{where}: {other.name}: expected an offset of {one.offset + one.bytes} or more (the end of "
                f"{one.name}), found {other.offset}"
            )
