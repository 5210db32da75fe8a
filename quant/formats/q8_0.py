"""Q8_0: 32 values share one f16 scale; value = d * q, q a signed byte.

Source block, 34 bytes: f16 d, int8 q[32]. Tile block of 16 rows, 544 bytes: f16 d[16], then 512 bytes of q
with the top bit flipped (q + 128 unsigned), as the u8 x s8 dot products want them.
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
BLOCK_BYTES = 34
TILE_BLOCK_BYTES = 544


def from_blocks(raw: bytes, rows: int, k: int) -> bytes:
    """Rows of Q8_0 blocks -> tiles; scales and values unchanged."""
    blocks = blocks_by_tile(raw, rows, k // BLOCK_VALUES, BLOCK_BYTES)
    scales = np.ascontiguousarray(blocks[..., :2]).reshape(*blocks.shape[:2], -1)
    return np.concatenate([scales, interleave(blocks[..., 2:] ^ np.uint8(0x80))], axis=-1).tobytes()


def decode(tiles: bytes, rows: int, k: int) -> F32:
    """Tiles -> [rows, k] f32."""
    blocks = tile_blocks(tiles, rows, k // BLOCK_VALUES, TILE_BLOCK_BYTES)
    d = halves(blocks[..., :32])[..., None]
    q = (deinterleave(blocks[..., 32:]) ^ np.uint8(0x80)).view(np.int8)
    with np.errstate(invalid="ignore"):
        return rows_of(d * q.astype(np.float32), rows)


def quantize(values: F32) -> U8:
    """[rows, k] f32 -> rows of Q8_0 blocks: d = amax / 127, q = x / d rounded half away from zero."""
    rows, k = values.shape
    x = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, BLOCK_VALUES)
    d = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = x * np.where(d == 0, np.float32(0), np.float32(1) / d)
        size = np.abs(scaled)
        whole = np.floor(size)
        q = np.sign(scaled) * (whole + np.floor(2 * (size - whole)))
        packed = [d.astype("<f2").view(np.uint8), q.astype(np.int8).view(np.uint8)]
    return np.concatenate(packed, axis=-1).reshape(rows, k // BLOCK_VALUES * BLOCK_BYTES)


def encode(values: F32) -> bytes:
    """[rows, k] f32 -> tiles, rounded to nearest as ggml's reference does."""
    return from_blocks(quantize(values).tobytes(), *values.shape)
