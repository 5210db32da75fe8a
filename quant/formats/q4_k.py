"""Q4_K: 256 values in 8 sub-blocks of 32; value = d * scale * q - dmin * min, q four bits, scale and min six.

Source block, 144 bytes: f16 d, f16 dmin, 12 bytes of packed six-bit scales and mins, 128 bytes of q (32 per
pair of sub-blocks: low nibble the even one). Tile block of 16 rows, 2304 bytes: f16 d[16], f16 dmin[16],
low[8][16] (low nibbles of scale and min), top[4][16] (their two top bits, sub-blocks 2i and 2i+1), q[4][512].
"""

from __future__ import annotations

import numpy as np

from quant.formats._tiles import (
    F32,
    TILE_ROWS,
    U8,
    blocks_by_tile,
    deinterleave,
    halves,
    interleave,
    rows_of,
    tile_blocks,
)

BLOCK_VALUES = 256
BLOCK_BYTES = 144
TILE_BLOCK_BYTES = 2304


def _scales_and_mins(packed: U8) -> tuple[U8, U8]:
    """[..., 12] packed bytes -> scales [..., 8], mins [..., 8]."""
    low_scale, low_min, rest = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scale = np.concatenate([low_scale & 63, (rest & 15) | ((low_scale >> 6) << 4)], axis=-1)
    minimum = np.concatenate([low_min & 63, (rest >> 4) | ((low_min >> 6) << 4)], axis=-1)
    return scale, minimum


def from_blocks(raw: bytes, rows: int, k: int) -> bytes:
    """Rows of Q4_K blocks -> tiles; every value unchanged."""
    blocks = blocks_by_tile(raw, rows, k // BLOCK_VALUES, BLOCK_BYTES)
    tiles, n_blocks = blocks.shape[:2]
    scale, minimum = _scales_and_mins(blocks[..., 4:16])
    low = (scale & 15) | ((minimum & 15) << 4)
    high = (scale >> 4) | ((minimum >> 4) << 2)
    top = high[..., 0::2] | (high[..., 1::2] << 4)
    parts = [
        np.ascontiguousarray(blocks[..., 0:2]).reshape(tiles, n_blocks, -1),
        np.ascontiguousarray(blocks[..., 2:4]).reshape(tiles, n_blocks, -1),
        low.swapaxes(-1, -2).reshape(tiles, n_blocks, -1),
        top.swapaxes(-1, -2).reshape(tiles, n_blocks, -1),
        *(interleave(blocks[..., 16 + 32 * p : 48 + 32 * p]) for p in range(4)),
    ]
    return np.concatenate(parts, axis=-1).tobytes()


def decode(tiles: bytes, rows: int, k: int) -> F32:
    """Tiles -> [rows, k] f32."""
    blocks = tile_blocks(tiles, rows, k // BLOCK_VALUES, TILE_BLOCK_BYTES)
    n_tiles, n_blocks = blocks.shape[:2]
    d, dmin = halves(blocks[..., :32])[..., None], halves(blocks[..., 32:64])[..., None]
    low = blocks[..., 64:192].reshape(n_tiles, n_blocks, 8, TILE_ROWS)
    pairs = blocks[..., 192:256].reshape(n_tiles, n_blocks, 4, 1, TILE_ROWS)
    top = np.concatenate([pairs & 15, pairs >> 4], axis=3).reshape(n_tiles, n_blocks, 8, TILE_ROWS)
    scale = ((low & 15) | ((top & 3) << 4)).swapaxes(-1, -2)
    minimum = ((low >> 4) | ((top >> 2) << 4)).swapaxes(-1, -2)
    halves_of_q = []
    for p in range(4):
        packed = deinterleave(blocks[..., 256 + 512 * p : 768 + 512 * p])
        halves_of_q += [packed & 15, packed >> 4]
    q = np.stack(halves_of_q, axis=-2).astype(np.float32)  # [tile, block, row, sub-block, 32]
    with np.errstate(invalid="ignore", over="ignore"):
        step = (d * scale.astype(np.float32))[..., None]
        values = step * q - (dmin * minimum.astype(np.float32))[..., None]
    return rows_of(values.reshape(n_tiles, n_blocks, TILE_ROWS, BLOCK_VALUES), rows)
