"""F32, F16 and BF16: tiles of plain values, [k][16 rows] inside a tile."""

from __future__ import annotations

import numpy as np

from quant.formats._tiles import F32, TILE_ROWS, blocks_by_tile, tile_blocks, tile_count


def _from_rows(raw: bytes, rows: int, k: int, value_bytes: int) -> bytes:
    return np.ascontiguousarray(blocks_by_tile(raw, rows, k, value_bytes)).tobytes()


def _to_rows(tiles: bytes, rows: int, k: int, dtype: str) -> np.ndarray:
    values = tile_blocks(tiles, rows, k, TILE_ROWS * np.dtype(dtype).itemsize).view(dtype)
    by_row = values.swapaxes(1, 2).reshape(tile_count(rows) * TILE_ROWS, k)
    return np.ascontiguousarray(by_row[:rows])


def f32_from_blocks(raw: bytes, rows: int, k: int) -> bytes:
    """Rows of f32 -> tiles; bits unchanged."""
    return _from_rows(raw, rows, k, 4)


def f32_encode(values: F32) -> bytes:
    """[rows, k] f32 -> tiles."""
    return f32_from_blocks(np.ascontiguousarray(values, dtype="<f4").tobytes(), *values.shape)


def f32_decode(tiles: bytes, rows: int, k: int) -> F32:
    """Tiles -> [rows, k] f32."""
    return _to_rows(tiles, rows, k, "<f4")


def f16_from_blocks(raw: bytes, rows: int, k: int) -> bytes:
    """Rows of f16 -> tiles; bits unchanged."""
    return _from_rows(raw, rows, k, 2)


def f16_encode(values: F32) -> bytes:
    """[rows, k] f32 -> tiles of f16, rounded to nearest even; beyond 65504 becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        halves = np.ascontiguousarray(values, dtype=np.float32).astype("<f2")
    return f16_from_blocks(halves.tobytes(), *values.shape)


def f16_decode(tiles: bytes, rows: int, k: int) -> F32:
    """Tiles of f16 -> [rows, k] f32."""
    return _to_rows(tiles, rows, k, "<f2").astype(np.float32)


def bf16_from_blocks(raw: bytes, rows: int, k: int) -> bytes:
    """Rows of bf16 -> tiles; bits unchanged."""
    return _from_rows(raw, rows, k, 2)


def bf16_encode(values: F32) -> bytes:
    """[rows, k] f32 -> tiles of bf16, rounded to nearest even, NaN made quiet."""
    bits = np.ascontiguousarray(values, dtype="<f4").view(np.uint32)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    top = np.where(is_nan, (bits >> 16) | 0x40, rounded).astype("<u2")
    return bf16_from_blocks(top.tobytes(), *values.shape)


def bf16_decode(tiles: bytes, rows: int, k: int) -> F32:
    """Tiles of bf16 -> [rows, k] f32."""
    bits = _to_rows(tiles, rows, k, "<u2").astype(np.uint32) << np.uint32(16)
    values: F32 = bits.view(np.float32)
    return values
