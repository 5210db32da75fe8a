"""Hugging Face folders: config.json and safetensors, single or split by an index."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from flashload.errors import ModelFileError, UnsupportedModelError
from flashload.ggml import BF16, F16, F32
from flashload.rawfile import RawFile
from flashload.tensors import (
    PICKLE_REFUSED,
    Checkpoint,
    TensorInfo,
    check_overlap,
    parse_json,
    read_json,
    tensor_bytes,
)

_MAX_HEADER_BYTES = 32 << 20
_MAX_DIMENSIONS = 8
_WEIGHTS = {"F32": F32, "F16": F16, "BF16": BF16}
# Sizes of the dtypes that may stand beside weights (buffers), in bits.
_OTHERS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "C64": 64,
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def _tensor(file: RawFile, name: str, entry: Any, data_at: int) -> TensorInfo:
    if not name or not name.isprintable():
        raise ModelFileError(f"{file.path}: tensor name: expected printable text, found {name[:80]!r}")
    where = f"{file.path}: {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ModelFileError(f"{where}: expected dtype, shape and data_offsets, found {repr(entry)[:80]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in _WEIGHTS and dtype not in _OTHERS):
        raise UnsupportedModelError(
            f"{where}: dtype: expected one of {', '.join([*_WEIGHTS, *_OTHERS])}, found {repr(dtype)[:80]}"
        )
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise ModelFileError(
            f"{where}: shape: expected up to {_MAX_DIMENSIONS} sizes, found {repr(shape)[:80]}"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ModelFileError(f"{where}: data_offsets: expected [begin, end], found {repr(offsets)[:80]}")
    begin, end = offsets
    # A scalar is a vector of one value.
    sizes = tuple(shape) or (1,)
    if dtype in _WEIGHTS and all(sizes):
        n_bytes = tensor_bytes(where, _WEIGHTS[dtype], sizes)
    else:
        bits = _OTHERS.get(dtype, 0)
        for size in sizes:
            bits *= size
        n_bytes = -(-bits // 8)
    if begin > end or end - begin != n_bytes:
        raise ModelFileError(
            f"{where}: data_offsets: expected {n_bytes} bytes for {sizes}, found {begin}..{end}"
        )
    if data_at + end > file.size:
        raise ModelFileError(
            f"{where}: expected data up to offset {data_at + end}, found a file of {file.size} bytes: "
            "cut short?"
        )
    kind = _WEIGHTS.get(dtype, -1)
    return TensorInfo(name, kind, dtype, sizes, data_at + begin, n_bytes, file.path)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def read_header(file: RawFile) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, every place proven.

    Raises:
        ModelFileError: malformed, cut short, overlapping, or with bytes no tensor owns.
    """
    if file.size < 8:
        raise ModelFileError(f"{file.path}: expected at least 8 bytes, found {file.size}")
    (header_bytes,) = struct.unpack("<Q", file.read(0, 8, "header length"))
    most = min(_MAX_HEADER_BYTES, file.size - 8)
    if header_bytes > most:
        raise ModelFileError(f"{file.path}: header length: expected at most {most}, found {header_bytes}")
    header = parse_json(file.read(8, header_bytes, "header"), f"{file.path}: header")
    header.pop("__metadata__", None)
    data_at = 8 + header_bytes
    tensors = {name: _tensor(file, name, entry, data_at) for name, entry in header.items()}
    check_overlap(str(file.path), tensors)
    owned = sum(info.bytes for info in tensors.values())
    if owned != file.size - data_at:
        raise ModelFileError(f"{file.path}: expected {owned} bytes of data, found {file.size - data_at}")
    return tensors


class HfCheckpoint(Checkpoint):
    """A folder of config.json and safetensors."""

    kind = "hf"

    def __init__(self, path: Path) -> None:
        """Reads and proves every header (see :func:`flashload.checkpoint.open_checkpoint`)."""
        super().__init__()
        self.path = path
        config = path / "config.json"
        if not config.is_file():
            others = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; name one of its GGUF files instead: {', '.join(others[:4])}" if others else ""
            raise ModelFileError(f"{path}: expected a folder with config.json, found none{hint}")
        self.metadata = {"config": read_json(config), "generation_config": {}}
        if (path / "generation_config.json").is_file():
            self.metadata["generation_config"] = read_json(path / "generation_config.json")
        quantised = self.metadata["config"].get("quantization_config")
        if quantised is not None:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise UnsupportedModelError(
                f"{config}: quantization_config: expected F32, F16 or BF16 weights, found {method!r}; use "
                "the original folder or a GGUF file"
            )
        self.tensors = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        if (self.path / _INDEX).is_file():
            self._open_index(self.path / _INDEX)
            return
        single = self.path / _SINGLE
        if not single.is_file():
            found = sorted(p.name for p in self.path.glob("*.safetensors"))
            if found:
                raise ModelFileError(
                    f"{self.path}: expected {_SINGLE} or {_INDEX}, found {', '.join(found[:4])}"
                )
            pickles = sorted(p.name for p in [*self.path.glob("*.bin"), *self.path.glob("*.pt*")])
            if pickles:
                raise UnsupportedModelError(f"{self.path / pickles[0]}: {PICKLE_REFUSED}")
            raise ModelFileError(f"{self.path}: expected {_SINGLE}, found no weights")
        self._files[single] = RawFile(single)
        self.tensors = read_header(self._files[single])

    def _open_index(self, index: Path) -> None:
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ModelFileError(f"{index}: weight_map: expected an object, found {type(places).__name__}")
        for name, shard in places.items():
            plain = isinstance(shard, str) and shard == Path(shard).name and shard.endswith(".safetensors")
            if not plain:
                raise ModelFileError(f"{index}: {name}: expected a file name in this folder, found {shard!r}")
        for shard in sorted(set(places.values())):
            if not (self.path / shard).is_file():
                raise ModelFileError(f"{index}: expected {shard} beside it, found no such file")
            file = self._files[self.path / shard] = RawFile(self.path / shard)
            tensors = read_header(file)
            twice = self.tensors.keys() & tensors.keys()
            if twice:
                raise ModelFileError(
                    f"{file.path}: {min(twice)}: expected every tensor once, found it in two files"
                )
            self.tensors.update(tensors)
        for name, shard in places.items():
            info = self.tensors.get(name)
            if info is None or info.file.name != shard:
                found = "none" if info is None else info.file.name
                raise ModelFileError(f"{index}: {name}: expected it in {shard}, found it in {found}")

    def describe(self) -> str:
        return "safetensors"
