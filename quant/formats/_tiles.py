"""Moves between rows of blocks and tiles of 16 rows.

A matrix [rows, k] is stored as ceil(rows / 16) tiles; missing rows are zero. Inside a tile the blocks along k
follow each other, and inside a block the bytes of the 16 rows are interleaved in groups of four, so that one
64-byte load feeds 16 rows with four consecutive k values each.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TILE_ROWS = 16

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


def tile_count(rows: int) -> int:
    """Number of tiles that hold ``rows`` rows."""
    return -(-rows // TILE_ROWS)


def blocks_by_tile(raw: bytes | bytearray | memoryview, rows: int, n_blocks: int, block_bytes: int) -> U8:
    """Raw rows of blocks -> [tile, block, row 0..15, block byte], missing rows zero.

    Raises:
        ValueError: ``raw`` does not hold exactly ``rows * n_blocks * block_bytes`` bytes.
    """
    data = np.frombuffer(raw, dtype=np.uint8)
    expected = rows * n_blocks * block_bytes
    if data.size != expected:
        raise ValueError(f"tile rows: expected {expected} bytes for {rows} rows, found {data.size}")
    padded: U8 = np.zeros((tile_count(rows) * TILE_ROWS, n_blocks, block_bytes), dtype=np.uint8)
    padded[:rows] = data.reshape(rows, n_blocks, block_bytes)
    by_tile: U8 = padded.reshape(-1, TILE_ROWS, n_blocks, block_bytes).swapaxes(1, 2)
    return by_tile


def tile_blocks(tiles: bytes | bytearray | memoryview, rows: int, n_blocks: int, tile_block_bytes: int) -> U8:
    """Tile bytes -> [tile, block, byte of the 16-row block].

    Raises:
        ValueError: ``tiles`` has another size than the shape says.
    """
    data = np.frombuffer(tiles, dtype=np.uint8)
    expected = tile_count(rows) * n_blocks * tile_block_bytes
    if data.size != expected:
        raise ValueError(f"tiles: expected {expected} bytes for {rows} rows, found {data.size}")
    return data.reshape(-1, n_blocks, tile_block_bytes)


def interleave(values: U8) -> U8:
    """[tile, block, row, n] -> [tile, block, 16 * n]: row r's byte 4s + b goes to ``s*64 + r*4 + b``."""
    tiles, blocks, _, n = values.shape
    grouped = values.reshape(tiles, blocks, TILE_ROWS, n // 4, 4).swapaxes(2, 3)
    return np.ascontiguousarray(grouped).reshape(tiles, blocks, TILE_ROWS * n)


def deinterleave(data: U8) -> U8:
    """The inverse of :func:`interleave`: [tile, block, 16 * n] -> [tile, block, row, n]."""
    tiles, blocks, n_bytes = data.shape
    n = n_bytes // TILE_ROWS
    grouped = data.reshape(tiles, blocks, n // 4, TILE_ROWS, 4).swapaxes(2, 3)
    return np.ascontiguousarray(grouped).reshape(tiles, blocks, TILE_ROWS, n)


def rows_of(values: F32, rows: int) -> F32:
    """[tile, block, row, block value] -> [rows, k], padding rows dropped."""
    tiles, blocks, _, n = values.shape
    flat = values.swapaxes(1, 2).reshape(tiles * TILE_ROWS, blocks * n)
    return np.ascontiguousarray(flat[:rows])


def halves(data: U8) -> F32:
    """Bytes of little-endian f16 along the last axis -> f32."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)
