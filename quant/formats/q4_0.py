"""Q4_0: 32 values share one f16 scale; value = d * (q - 8), q four bits.

Source block, 18 bytes: f16 d, then 16 bytes: low nibble = value i, high nibble = value 16 + i. Tile block of
16 rows, 288 bytes: f16 d[16], then the 16 bytes of every row interleaved by four.
"""

from __future__ import annotations

import numpy as np

from quant.formats._tiles import (
    F32,
    U8,
    blocks_by_tile,
    deinterleave,
    halves,
    interleave,
    rows_of,
    tile_blocks,
)

BLOCK_VALUES = 32
BLOCK_BYTES = 18
TILE_BLOCK_BYTES = 288


def from_blocks(raw: bytes, rows: int, k: int) -> bytes:
    """Rows of Q4_0 blocks -> tiles; scales and values unchanged."""
    blocks = blocks_by_tile(raw, rows, k // BLOCK_VALUES, BLOCK_BYTES)
    scales = np.ascontiguousarray(blocks[..., :2]).reshape(*blocks.shape[:2], -1)
    return np.concatenate([scales, interleave(blocks[..., 2:])], axis=-1).tobytes()


def decode(tiles: bytes, rows: int, k: int) -> F32:
    """Tiles -> [rows, k] f32."""
    blocks = tile_blocks(tiles, rows, k // BLOCK_VALUES, TILE_BLOCK_BYTES)
    d = halves(blocks[..., :32])[..., None]
    packed = deinterleave(blocks[..., 32:])
    q = np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float32) - np.float32(8)
    with np.errstate(invalid="ignore"):
        return rows_of(d * q, rows)


def quantize(values: F32) -> U8:
    """[rows, k] f32 -> rows of Q4_0 blocks: d = (largest value by size) / -8, q = trunc(x / d + 8.5)."""
    rows, k = values.shape
    x = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, BLOCK_VALUES)
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
    d = largest / np.float32(-8)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = x * np.where(d == 0, np.float32(0), np.float32(1) / d) + np.float32(8.5)
        q = np.trunc(scaled).astype(np.uint8).clip(0, 15)
        packed = [d.astype("<f2").view(np.uint8), q[:, :16] | (q[:, 16:] << np.uint8(4))]
    return np.concatenate(packed, axis=-1).reshape(rows, k // BLOCK_VALUES * BLOCK_BYTES)


def encode(values: F32) -> bytes:
    """[rows, k] f32 -> tiles, rounded to nearest as ggml's reference does."""
    return from_blocks(quantize(values).tobytes(), *values.shape)
