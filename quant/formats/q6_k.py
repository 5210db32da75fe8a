"""Q6_K: 256 values in 16 groups of 16; value = d * scale * (q - 32), q six bits, scale a signed byte.

Source block, 210 bytes: ql[128] (low four bits), qh[64] (top two), int8 scales[16], f16 d. Tile block of 16
rows, 3360 bytes: f16 d[16], int8 scales[16][16], low four bits as four pairs of 32-value sub-blocks (512
bytes each), top two bits as two quads of sub-blocks (512 bytes each).
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
BLOCK_BYTES = 210
TILE_BLOCK_BYTES = 3360

U2, U4, U6 = np.uint8(2), np.uint8(4), np.uint8(6)


def _sub_blocks(blocks: U8) -> U8:
    """[..., 210] -> q of 0..63 as [..., 8 sub-blocks, 32]."""
    parts = []
    for half in range(2):  # 128 values each
        ql = blocks[..., 64 * half : 64 * half + 64]
        qh = blocks[..., 128 + 32 * half : 160 + 32 * half]
        low = [ql[..., :32] & 15, ql[..., 32:] & 15, ql[..., :32] >> 4, ql[..., 32:] >> 4]
        parts += [nibble | (((qh >> (2 * i)) & 3) << 4) for i, nibble in enumerate(low)]
    return np.stack(parts, axis=-2)


def from_blocks(raw: bytes, rows: int, k: int) -> bytes:
    """Rows of Q6_K blocks -> tiles; every value unchanged."""
    blocks = blocks_by_tile(raw, rows, k // BLOCK_VALUES, BLOCK_BYTES)
    tiles, n_blocks = blocks.shape[:2]
    q = _sub_blocks(blocks)
    low, high = q & np.uint8(15), q >> U4
    quads = [
        high[..., 4 * u, :]
        | (high[..., 4 * u + 1, :] << U2)
        | (high[..., 4 * u + 2, :] << U4)
        | (high[..., 4 * u + 3, :] << U6)
        for u in range(2)
    ]
    parts = [
        np.ascontiguousarray(blocks[..., 208:210]).reshape(tiles, n_blocks, -1),
        blocks[..., 192:208].swapaxes(-1, -2).reshape(tiles, n_blocks, -1),
        *(interleave(low[..., 2 * p, :] | (low[..., 2 * p + 1, :] << U4)) for p in range(4)),
        *(interleave(quad) for quad in quads),
    ]
    return np.concatenate(parts, axis=-1).tobytes()


def decode(tiles: bytes, rows: int, k: int) -> F32:
    """Tiles -> [rows, k] f32."""
    blocks = tile_blocks(tiles, rows, k // BLOCK_VALUES, TILE_BLOCK_BYTES)
    n_tiles, n_blocks = blocks.shape[:2]
    d = halves(blocks[..., :32])[..., None]
    scales = blocks[..., 32:288].reshape(n_tiles, n_blocks, 16, TILE_ROWS).swapaxes(-1, -2).astype(np.uint8)
    low: list[U8] = []
    for p in range(4):
        packed = deinterleave(blocks[..., 288 + 512 * p : 800 + 512 * p])
        low += [packed & np.uint8(15), packed >> U4]
    quads = [deinterleave(blocks[..., 2336 + 512 * u : 2848 + 512 * u]) for u in range(2)]
    q = np.stack([low[j] | (((quads[j // 4] >> (2 * (j % 4))) & 3) << 4) for j in range(8)], axis=-2)
    grouped = q.reshape(n_tiles, n_blocks, TILE_ROWS, 16, 16)
    signed = grouped.astype(np.float32) - np.float32(32)
    with np.errstate(invalid="ignore", over="ignore"):
        values = (d * scales.view(np.int8).astype(np.float32))[..., None] * signed
    return rows_of(values.reshape(n_tiles, n_blocks, TILE_ROWS, BLOCK_VALUES), rows)
