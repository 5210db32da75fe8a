"""Small packs for tests, written from the format's definition alone (no code of the packer)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q6_K, F32_VECTOR, BYTES = 0, 1, 2, 3, 4, 5, 6, 100, 101
#: format -> (values of one row in one block, bytes of one block of 16 rows)
TILES = {
    F32: (1, 64),
    F16: (1, 32),
    BF16: (1, 32),
    Q8_0: (32, 544),
    Q4_0: (32, 288),
    Q4_K: (256, 2304),
    Q6_K: (256, 3360),
}
PAGE = 4096
RESIDENT, STREAM, DEMAND = 0, 1, 2


def xxh3(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def tile_bytes(format: int, cols: int) -> int:
    """Bytes of one tile of 16 rows."""
    values, block_bytes = TILES[format]
    return cols // values * block_bytes


def stored_bytes(format: int, rows: int, cols: int) -> int:
    if format == F32_VECTOR:
        return 4 * cols
    if format == BYTES:
        return cols
    return -(-rows // 16) * tile_bytes(format, cols)


@dataclass
class Entry:
    name: str
    format: int
    rows: int
    cols: int
    layer: int = -1
    expert: int = -1
    chunk_bytes: int = PAGE
    data: bytes = b""

    def fill(self, random: np.random.Generator) -> Entry:
        self.data = random.bytes(stored_bytes(self.format, self.rows, self.cols))
        return self

    @property
    def padded(self) -> bytes:
        return self.data + bytes(-len(self.data) % PAGE)


@dataclass
class Pack:
    """The parts of a pack, so that a test can bend one and seal the rest around it."""

    entries: list[Entry]
    data: bytes = b""
    directory: bytes = b""
    offsets: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        records, hashes, data = [], [], bytearray()
        for entry in self.entries:
            padded = entry.padded
            self.offsets.append(PAGE + len(data))
            first_chunk = len(hashes)
            hashes += [
                xxh3(padded[at : at + entry.chunk_bytes]) for at in range(0, len(padded), entry.chunk_bytes)
            ]
            records.append(
                struct.pack(
                    "<64sIiQQQQIiQQ",
                    entry.name.encode(),
                    entry.format,
                    entry.layer,
                    entry.rows,
                    entry.cols,
                    self.offsets[-1],
                    len(entry.data),
                    entry.chunk_bytes,
                    entry.expert,
                    first_chunk,
                    0,
                )
            )
            data += padded
        directory = struct.pack("<IIQ", len(records), 0, len(hashes)) + b"".join(records)
        directory += b"".join(struct.pack("<Q", value) for value in hashes)
        self.directory = directory + bytes(-len(directory) % PAGE)
        self.data = bytes(data)

    @property
    def directory_offset(self) -> int:
        return PAGE + len(self.data)

    def header(self) -> bytes:
        return seal_header(
            struct.pack(
                "<8sIIQQQQ",
                b"EDGEPACK",
                1,
                PAGE,
                self.directory_offset + len(self.directory),
                self.directory_offset,
                len(self.directory),
                xxh3(self.directory),
            )
        )

    def image(self) -> bytes:
        return self.header() + self.data + self.directory

    def write(self, path: Path) -> Path:
        path.write_bytes(self.image())
        return path


def seal_header(head: bytes) -> bytes:
    """The 4096 header bytes around the leading ones, with their hash."""
    body = head[: PAGE - 8] + bytes(max(0, PAGE - 8 - len(head)))
    return body + struct.pack("<Q", xxh3(body))


def small_pack(seed: int = 0) -> Pack:
    """A model in miniature: blobs, an embedding, layers with norms, one with experts, a head."""
    random = np.random.default_rng(seed)
    entries = [
        Entry("metadata.json", BYTES, 1, 5000),
        Entry("embed.weight", Q8_0, 100, 256, chunk_bytes=8192),
    ]
    for layer in range(3):
        entries += [
            Entry(f"layers.{layer}.attn_norm.weight", F32_VECTOR, 1, 256, layer),
            Entry(f"layers.{layer}.q.weight", Q4_0, 80, 256, layer, chunk_bytes=16384),
            Entry(f"layers.{layer}.up.weight", Q4_K, 48, 512, layer, chunk_bytes=8192),
            Entry(f"layers.{layer}.down.weight", Q6_K, 33, 256, layer, chunk_bytes=4096),
        ]
    for expert in range(4):
        entries += [
            Entry(f"layers.2.experts.{expert}.gate.weight", F16, 20, 64, 2, expert),
            Entry(f"layers.2.experts.{expert}.up.weight", BF16, 20, 64, 2, expert),
        ]
    entries += [
        Entry("final_norm.weight", F32_VECTOR, 1, 256),
        Entry("head.weight", F32, 50, 128, chunk_bytes=32768),
    ]
    return Pack([entry.fill(random) for entry in entries])
