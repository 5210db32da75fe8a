"""Formats whose tiles only move the bytes of a block: the block is a list of fields, in the order of the tile.

A field is cut into units of 4, 2 or 1 bytes; in the tile, unit i of row r lies ``(i * 16 + r) * unit`` bytes into
the field. Scales so stand side by side, and values in words of four.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from quant.formats._tiles import F32, TILE_ROWS, U8, blocks_by_tile, rows_of, tile_blocks


class Field(NamedTuple):
    """``n_bytes`` bytes of a block from byte ``at`` on, in units of ``unit`` bytes."""

    at: int
    n_bytes: int
    unit: int


class FieldFormat(NamedTuple):
    """A format of ``block_values`` values in the bytes of ``fields``.

    Attributes:
        values: blocks as they stand in a checkpoint, [..., block bytes] -> [..., block_values] f32.
    """

    block_values: int
    fields: Sequence[Field]
    values: Callable[[U8], F32]

    @property
    def block_bytes(self) -> int:
        """Bytes of one row's block."""
        return sum(field.n_bytes for field in self.fields)

    def from_blocks(self, raw: bytes, rows: int, k: int) -> bytes:
        """Rows of blocks -> tiles; every byte kept."""
        blocks = blocks_by_tile(raw, rows, k // self.block_values, self.block_bytes)
        tiles, n_blocks = blocks.shape[:2]
        parts = []
        for at, n_bytes, unit in self.fields:
            units = blocks[..., at : at + n_bytes].reshape(tiles, n_blocks, TILE_ROWS, n_bytes // unit, unit)
            parts.append(units.swapaxes(2, 3).reshape(tiles, n_blocks, -1))
        return np.concatenate(parts, axis=-1).tobytes()

    def decode(self, tiles: bytes, rows: int, k: int) -> F32:
        """Tiles -> [rows, k] f32."""
        data = tile_blocks(tiles, rows, k // self.block_values, self.block_bytes * TILE_ROWS)
        blocks = np.empty((*data.shape[:2], TILE_ROWS, self.block_bytes), dtype=np.uint8)
        begin = 0
        for at, n_bytes, unit in self.fields:
            end = begin + n_bytes * TILE_ROWS
            units = data[..., begin:end].reshape(*data.shape[:2], n_bytes // unit, TILE_ROWS, unit)
            blocks[..., at : at + n_bytes] = units.swapaxes(2, 3).reshape(*data.shape[:2], TILE_ROWS, n_bytes)
            begin = end
        with np.errstate(invalid="ignore", over="ignore"):
            return rows_of(self.values(blocks), rows)
