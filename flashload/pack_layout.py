"""The pack file's layout, version 1: header, entries, directory (all little-endian).

    0                      header, 4096 bytes, hashed
    4096                   entries, each 4096-aligned, in reading order, zero padded
    directory_offset       directory: entry records, then one xxh3 per chunk, hashed

The compiled core reads the same layout (``cpp/format/pack_directory.h``); both prove every bound before they
allocate anything.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import xxhash

from quant.formats import TILE_FORMATS, WeightFormat, tile_bytes
from quant.formats.neuron import MAX_PARTS, NEURON_FORMATS, row_bytes

MAGIC = b"EDGEPACK"
VERSION = 1
PAGE_BYTES = 4096
HEADER_BYTES = 4096
MAX_DIRECTORY_BYTES = 64 << 20
MAX_ENTRIES = 100_000
MIN_CHUNK_BYTES = 4096
MAX_CHUNK_BYTES = 16 << 20
MAX_DIMENSION = 1 << 40

# magic, version, header_bytes, file_bytes, directory_offset, directory_bytes, directory_xxh3
HEADER = struct.Struct("<8sIIQQQQ")
HEADER_HASH_AT = 4088
# n_entries, zero, n_chunks
DIRECTORY = struct.Struct("<IIQ")
ENTRY = np.dtype(
    [
        ("name", "S64"),
        ("format", "<u4"),
        ("layer", "<i4"),
        ("rows", "<u8"),
        ("cols", "<u8"),
        ("offset", "<u8"),
        ("bytes", "<u8"),
        ("chunk_bytes", "<u4"),
        ("expert", "<i4"),
        ("first_chunk", "<u8"),
        ("zero", "<u8"),
    ]
)


@dataclass(frozen=True)
class Entry:
    """One tensor or blob of a pack.

    Attributes:
        rows, cols: a matrix is [rows=out, cols=in]; a vector or a blob has one row; records are
            [neurons, hidden size].
        offset: where it begins in the file, a multiple of 4096.
        bytes: its payload; in the file it takes the next multiple of 4096.
        chunk_bytes: bytes under one hash; of a neuron format one record, else a power of two from 4096 on.
        first_chunk: index of its first hash in the directory.
        layer, expert: -1 when it belongs to no layer or no expert.
    """

    name: str
    format: WeightFormat
    rows: int
    cols: int
    offset: int
    bytes: int
    chunk_bytes: int
    first_chunk: int
    layer: int = -1
    expert: int = -1

    @property
    def stored_bytes(self) -> int:
        """Bytes it takes in the file, padding included."""
        return round_up(self.bytes)

    @property
    def n_chunks(self) -> int:
        """Number of hashes it owns."""
        return -(-self.bytes // self.chunk_bytes)

    @property
    def hashed_bytes(self) -> int:
        """Bytes its hashes cover: the padding belongs to the last chunk, but to no record."""
        return self.bytes if self.format in NEURON_FORMATS else self.stored_bytes

    @property
    def neuron_parts(self) -> int:
        """Rows in one record: 1 gates, 2 up and down, 3 gate, up and down; 0 of an entry without records."""
        return self.chunk_bytes // row_bytes(self.format, self.cols) if self.format in NEURON_FORMATS else 0


def round_up(n_bytes: int, to: int = PAGE_BYTES) -> int:
    """``n_bytes`` rounded up to a multiple of ``to``."""
    return -(-n_bytes // to) * to


def xxh3(data: bytes | bytearray | memoryview) -> int:
    """XXH3-64 with seed 0."""
    return xxhash.xxh3_64_intdigest(data)


def payload_bytes(weight_format: WeightFormat, rows: int, cols: int, parts: int = 1) -> int:
    """Payload of an entry of this shape; ``parts`` rows make a record of a neuron format.

    Raises:
        ValueError: a shape the format cannot hold.
    """
    if not (0 < rows <= MAX_DIMENSION and 0 < cols <= MAX_DIMENSION):
        raise ValueError(f"expected rows and cols in 1..{MAX_DIMENSION}, found {rows} x {cols}")
    if weight_format in TILE_FORMATS:
        return tile_bytes(weight_format, rows, cols)
    if weight_format in NEURON_FORMATS:
        return rows * record_bytes(weight_format, cols, parts)
    if rows != 1:
        raise ValueError(f"expected 1 row in a {weight_format.name} entry, found {rows}")
    return cols * 4 if weight_format is WeightFormat.F32_VECTOR else cols


def record_bytes(weight_format: WeightFormat, cols: int, parts: int) -> int:
    """Bytes of one neuron's record of ``parts`` rows of ``cols`` values.

    Raises:
        ValueError: parts outside 1 to 3, or a record above the limit of a chunk.
    """
    n_bytes = parts * row_bytes(weight_format, cols)
    if not 1 <= parts <= MAX_PARTS or n_bytes > MAX_CHUNK_BYTES:
        raise ValueError(
            f"expected records of 1 to {MAX_PARTS} rows and at most {MAX_CHUNK_BYTES} bytes, found {parts} "
            f"rows of {row_bytes(weight_format, cols)}"
        )
    return n_bytes


def chunk_bytes_for(name: str, n_bytes: int) -> int:
    """Bytes under one hash: 64 KiB for embedding rows (read singly), else 256 KiB, less for small entries."""
    largest = 64 << 10 if name == "embed.weight" else 256 << 10
    chunk = MIN_CHUNK_BYTES
    while chunk < largest and chunk < round_up(n_bytes):
        chunk *= 2
    return chunk


def header_bytes(file_bytes: int, directory_offset: int, directory: bytes) -> bytes:
    """The 4096 header bytes of a pack whose directory is ``directory``."""
    fields = HEADER.pack(
        MAGIC, VERSION, HEADER_BYTES, file_bytes, directory_offset, len(directory), xxh3(directory)
    )
    body = fields.ljust(HEADER_HASH_AT, b"\0")
    return body + struct.pack("<Q", xxh3(body))


def directory_bytes(entries: list[Entry], chunk_hashes: list[int]) -> bytes:
    """The directory, padded to a multiple of 4096."""
    records = np.zeros(len(entries), dtype=ENTRY)
    for record, entry in zip(records, entries, strict=True):
        record["name"] = entry.name.encode("ascii")
        for field in ENTRY.names or ():
            if field not in ("name", "zero"):
                record[field] = getattr(entry, field)
    body = DIRECTORY.pack(len(entries), 0, len(chunk_hashes)) + records.tobytes()
    body += np.array(chunk_hashes, dtype="<u8").tobytes()
    return body.ljust(round_up(len(body)), b"\0")
