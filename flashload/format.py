"""The pack file: :class:`PackFile` reads one, :class:`PackWriter` makes one (layout: ``pack_layout``)."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from flashload import pack_layout as layout
from flashload.arch import DecoderConfig
from flashload.errors import CorruptError, ModelFileError, UnsupportedModelError
from flashload.pack_layout import Entry
from flashload.pack_writer import PackWriter
from flashload.rawfile import RawFile
from flashload.vocab import Vocab
from quant.formats import WeightFormat
from quant.formats.neuron import NEURON_FORMATS, row_bytes

__all__ = ["METADATA", "TOKENIZER", "TOKENIZER_CONFIG", "Entry", "PackFile", "PackWriter", "is_pack"]

METADATA = "metadata.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

_NAME = re.compile(rb"[A-Za-z0-9._-]{1,64}\Z")
_FORMATS = {int(code): code for code in WeightFormat}
# verify() holds one read at a time, read() one entry; blobs are parsed, so they are bounded.
_READ_BYTES = 256 << 10
_MAX_BLOB_BYTES = 64 << 20


def is_pack(path: Path) -> bool:
    """Whether ``path`` is a file that begins as a pack does."""
    try:
        # A pipe would block in open().
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.read(8) == layout.MAGIC
    except OSError:
        return False


class PackFile:
    """A pack opened for reading: header and directory proven, payload read on demand and hash-checked.

    Attributes:
        entries: name -> :class:`Entry`, in file order.
    """

    def __init__(self, path: Path) -> None:
        """Reads header and directory.

        Raises:
            ModelFileError: not a pack, or one that is malformed or cut short.
            CorruptError: header or directory do not match their hash.
            UnsupportedModelError: a pack of another version.
            DiskError: the drive fails.
        """
        self.path = path
        self._file = RawFile(path)
        try:
            offset, n_bytes, digest = self._read_header()
            directory = self._file.read(offset, n_bytes, "directory")
            if layout.xxh3(directory) != digest:
                raise self._corrupt("directory", digest, layout.xxh3(directory))
            self.entries, self._hashes = self._parse(directory, offset)
        except BaseException:
            self._file.close()
            raise

    def _bad(self, what: str, expected: object, found: object) -> ModelFileError:
        return ModelFileError(f"{self.path}: pack {what}: expected {expected}, found {found}")

    def _corrupt(self, what: str, expected: int, found: int) -> CorruptError:
        return CorruptError(
            f"{self.path}: pack {what}: expected xxh3 {expected:016x}, found {found:016x}; "
            "delete the pack and make it again (edge verify checks all of it)"
        )

    def _read_header(self) -> tuple[int, int, int]:
        """Directory offset, bytes and hash, all proven to lie in the file."""
        size = self._file.size
        if size < layout.HEADER_BYTES + layout.PAGE_BYTES:
            raise self._bad("size", f"at least {layout.HEADER_BYTES + layout.PAGE_BYTES} bytes", size)
        header = self._file.read(0, layout.HEADER_BYTES, "header")
        magic, version, header_bytes, file_bytes, offset, n_bytes, digest = layout.HEADER.unpack_from(header)
        if magic != layout.MAGIC:
            raise self._bad("magic", layout.MAGIC, magic)
        (expected,) = struct.unpack_from("<Q", header, layout.HEADER_HASH_AT)
        found = layout.xxh3(header[: layout.HEADER_HASH_AT])
        if expected != found:
            raise self._corrupt("header", expected, found)
        if version != layout.VERSION:
            raise UnsupportedModelError(
                f"{self.path}: pack version: expected {layout.VERSION}, found {version}"
            )
        if header_bytes != layout.HEADER_BYTES or any(header[layout.HEADER.size : layout.HEADER_HASH_AT]):
            raise self._bad("header", "4096 header bytes, zero after the fields", f"{header_bytes} bytes")
        if file_bytes != size:
            raise self._bad("file size", f"{file_bytes} bytes (the header says)", f"{size} bytes: cut short?")
        aligned = offset % layout.PAGE_BYTES == 0 and n_bytes % layout.PAGE_BYTES == 0
        if not aligned or not layout.PAGE_BYTES <= n_bytes <= layout.MAX_DIRECTORY_BYTES:
            raise self._bad("directory", f"whole pages, at most {layout.MAX_DIRECTORY_BYTES} bytes", n_bytes)
        if offset < layout.HEADER_BYTES or offset + n_bytes != size:
            raise self._bad("directory", f"at the end of {size} bytes", f"{n_bytes} bytes at {offset}")
        return offset, n_bytes, digest

    def _parse(self, directory: bytes, data_end: int) -> tuple[dict[str, Entry], np.ndarray]:
        n_entries, zero, n_chunks = layout.DIRECTORY.unpack_from(directory)
        if not 0 < n_entries <= layout.MAX_ENTRIES or zero:
            raise self._bad("directory", f"1 to {layout.MAX_ENTRIES} entries", n_entries)
        hashes_at = layout.DIRECTORY.size + n_entries * layout.ENTRY.itemsize
        end = hashes_at + 8 * n_chunks
        if layout.round_up(end) != len(directory) or any(directory[end:]):
            raise self._bad("directory", f"{len(directory)} bytes", f"{n_entries} entries, {n_chunks} chunks")
        records = np.frombuffer(directory, layout.ENTRY, n_entries, layout.DIRECTORY.size)
        entries: dict[str, Entry] = {}
        at, chunk = layout.HEADER_BYTES, 0
        for index in range(n_entries):
            start = layout.DIRECTORY.size + index * layout.ENTRY.itemsize
            name = self._entry_name(directory[start : start + 64], index)
            if name in entries:
                raise self._bad(f"entry {index}", "a name of its own", name)
            entry = self._entry(name, records[index].item(), at, chunk)
            entries[name] = entry
            at += entry.stored_bytes
            chunk += entry.n_chunks
        if at != data_end:
            raise self._bad("directory offset", f"{at} (the end of the last entry)", data_end)
        if chunk != n_chunks:
            raise self._bad("directory", f"{chunk} chunk hashes", n_chunks)
        return entries, np.frombuffer(directory, "<u8", n_chunks, hashes_at)

    def _entry_name(self, field: bytes, index: int) -> str:
        name = field.rstrip(b"\0")
        if not _NAME.match(name):
            raise self._bad(f"entry {index} name", "1 to 64 of [A-Za-z0-9._-]", field)
        return name.decode("ascii")

    def _entry(self, name: str, record: tuple[Any, ...], at: int, chunk: int) -> Entry:
        _, code, layer, rows, cols, offset, n_bytes, chunk_bytes, expert, first_chunk, zero = record
        where = f"entry {name}"
        if code not in _FORMATS:
            raise self._bad(f"{where} format", f"one of {sorted(_FORMATS)}", code)
        if layer < -1 or expert < -1 or (expert >= 0 and layer < 0) or zero:
            raise self._bad(where, "layer and expert of -1 or more", f"layer {layer}, expert {expert}")
        neurons = _FORMATS[code] in NEURON_FORMATS
        try:
            parts, rest = divmod(chunk_bytes, row_bytes(_FORMATS[code], cols)) if neurons and cols else (1, 0)
            if rest:
                raise ValueError(f"expected records (chunks) of whole rows, found {chunk_bytes} bytes")
            payload = layout.payload_bytes(_FORMATS[code], rows, cols, parts)
        except ValueError as error:
            raise ModelFileError(f"{self.path}: pack {where} shape: {error}") from None
        if n_bytes != payload:
            raise self._bad(f"{where} bytes", f"{payload} for {rows} x {cols}", n_bytes)
        if offset != at:
            raise self._bad(f"{where} offset", f"{at} (the end of the one before)", offset)
        power = chunk_bytes & (chunk_bytes - 1) == 0
        if not neurons and not (power and layout.MIN_CHUNK_BYTES <= chunk_bytes <= layout.MAX_CHUNK_BYTES):
            raise self._bad(f"{where} chunk_bytes", "a power of two in 4096..16 MiB", chunk_bytes)
        if first_chunk != chunk:
            raise self._bad(f"{where} first chunk", chunk, first_chunk)
        if at + n_bytes > self._file.size:
            raise self._bad(f"{where} end", f"at most {self._file.size}", at + n_bytes)
        return Entry(name, _FORMATS[code], rows, cols, offset, n_bytes, chunk_bytes, chunk, layer, expert)

    def _chunks(self, entry: Entry) -> Iterator[bytes]:
        """The hashed bytes of an entry, checked; several small chunks come from one read."""
        step = max(_READ_BYTES // entry.chunk_bytes, 1) * entry.chunk_bytes
        for begin in range(0, entry.hashed_bytes, step):
            n_bytes = min(step, entry.hashed_bytes - begin)
            data = self._file.read(entry.offset + begin, n_bytes, f"entry {entry.name}", drop=True)
            for at in range(0, n_bytes, entry.chunk_bytes):
                chunk = memoryview(data)[at : at + entry.chunk_bytes]
                index = (begin + at) // entry.chunk_bytes
                expected = int(self._hashes[entry.first_chunk + index])
                if (found := layout.xxh3(chunk)) != expected:
                    where = f"entry {entry.name} chunk {index} (offset {entry.offset + begin + at})"
                    raise self._corrupt(where, expected, found)
            yield data

    def read(self, name: str) -> bytes:
        """The payload of one entry, every chunk checked.

        Raises:
            ModelFileError: no such entry.
            CorruptError: a chunk does not match its hash.
            DiskError: the drive fails.
        """
        out = bytearray()
        for data in self.parts(name):
            out += data
        return bytes(out)

    def parts(self, name: str) -> Iterator[bytes]:
        """The same in pieces of some hundred kilobytes."""
        entry = self.entries.get(name)
        if entry is None:
            raise self._bad("entries", f"one named {name}", f"{len(self.entries)} others")
        left = entry.bytes
        for data in self._chunks(entry):
            yield data[:left]
            left -= len(data)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Checks every chunk of every entry; ``progress(done_bytes, total_bytes)`` is called on the way.

        Raises:
            CorruptError: the first chunk that does not match its hash.
            DiskError: the drive fails.
        """
        total = sum(entry.hashed_bytes for entry in self.entries.values())
        done = 0
        for entry in self.entries.values():
            for data in self._chunks(entry):
                done += len(data)
                if progress is not None:
                    progress(done, total)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON blob.

        Raises:
            ModelFileError: absent, larger than 64 MiB, or not a JSON object.
        """
        entry = self.entries.get(name)
        if entry is not None and (entry.format is not WeightFormat.BYTES or entry.bytes > _MAX_BLOB_BYTES):
            raise self._bad(f"entry {name}", f"a blob of at most {_MAX_BLOB_BYTES} bytes", entry.bytes)
        try:
            value = json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise self._bad(f"entry {name}", "JSON", str(error)) from None
        if not isinstance(value, dict):
            raise self._bad(f"entry {name}", "a JSON object", type(value).__name__)
        return value

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The parsed ``metadata.json``: config, source, conversions, generation."""
        return self.read_json(METADATA)

    @cached_property
    def config(self) -> DecoderConfig:
        """What the decoder is.

        Raises:
            ModelFileError: the metadata holds no valid configuration.
        """
        return DecoderConfig.from_json(self.metadata.get("config"))

    def vocab(self) -> Vocab:
        """Tokenizer and its configuration, as packed."""
        entry = self.entries.get(TOKENIZER)
        if entry is None or entry.format is not WeightFormat.BYTES or entry.bytes > _MAX_BLOB_BYTES:
            raise self._bad(f"entry {TOKENIZER}", f"a blob of at most {_MAX_BLOB_BYTES} bytes", "none")
        try:
            text = self.read(TOKENIZER).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._bad(f"entry {TOKENIZER}", "UTF-8", str(error)) from None
        return Vocab(tokenizer_json=text, config=self.read_json(TOKENIZER_CONFIG))

    def close(self) -> None:
        """Closes the file. May be called twice."""
        self._file.close()

    def __enter__(self) -> PackFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
