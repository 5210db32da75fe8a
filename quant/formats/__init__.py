"""The weight formats of the pack, each with a numpy oracle: what every kernel and packer must agree with.

A format adds one file here (its fields and the values of its blocks, or ``from_blocks`` and ``decode`` where tiles
are more than moved bytes, and ``encode`` where rounding to nearest is enough to make it) and one line in
:data:`TILE_FORMATS`. Records of neurons are not tiles: ``neuron``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from quant.formats import floats, iq4, mxfp4, q2_k, q3_k, q4_0, q4_k, q5_k, q6_k, q8_0
from quant.formats._fields import FieldFormat
from quant.formats._tiles import F32, TILE_ROWS, tile_count

__all__ = [
    "F32",
    "TILE_FORMATS",
    "TILE_ROWS",
    "TileFormat",
    "WeightFormat",
    "decode",
    "encode",
    "from_blocks",
    "tile_bytes",
    "tile_count",
]


class WeightFormat(IntEnum):
    """Format codes of pack entries (``cpp/kernels/format.h``)."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q8_0 = 3
    Q4_0 = 4
    Q4_K = 5
    Q6_K = 6
    Q5_K = 7
    Q2_K = 8
    Q3_K = 9
    IQ4_XS = 10
    IQ4_NL = 11
    MXFP4 = 12
    NEURON_F16 = 20
    NEURON_Q8 = 21
    NEURON_Q4 = 22
    F32_VECTOR = 100
    BYTES = 101


@dataclass(frozen=True)
class TileFormat:
    """One tile format: sizes in bytes and the three moves.

    Attributes:
        ggml_type: the checkpoint block type that re-arranges into this format bit for bit.
        block_values: values of one row in one block along k.
        block_bytes: bytes of such a block in the checkpoint.
        tile_block_bytes: bytes of one block of 16 rows in a tile.
    """

    name: str
    ggml_type: int
    block_values: int
    block_bytes: int
    tile_block_bytes: int
    from_blocks: Callable[[bytes, int, int], bytes]
    decode: Callable[[bytes, int, int], F32]
    encode: Callable[[F32], bytes] | None


def _packed(name: str, ggml_type: int, module: object, encode: Callable[[F32], bytes] | None) -> TileFormat:
    sizes = [int(getattr(module, key)) for key in ("BLOCK_VALUES", "BLOCK_BYTES", "TILE_BLOCK_BYTES")]
    moves = getattr(module, "from_blocks"), getattr(module, "decode")  # noqa: B009
    return TileFormat(name, ggml_type, sizes[0], sizes[1], sizes[2], moves[0], moves[1], encode)


def _moved(name: str, ggml_type: int, of: FieldFormat) -> TileFormat:
    tile_block_bytes = of.block_bytes * TILE_ROWS
    return TileFormat(
        name,
        ggml_type,
        of.block_values,
        of.block_bytes,
        tile_block_bytes,
        of.from_blocks,
        of.decode,
        None,
    )


TILE_FORMATS: dict[WeightFormat, TileFormat] = {
    WeightFormat.F32: TileFormat(
        "f32", 0, 1, 4, 64, floats.f32_from_blocks, floats.f32_decode, floats.f32_encode
    ),
    WeightFormat.F16: TileFormat(
        "f16", 1, 1, 2, 32, floats.f16_from_blocks, floats.f16_decode, floats.f16_encode
    ),
    WeightFormat.BF16: TileFormat(
        "bf16", 30, 1, 2, 32, floats.bf16_from_blocks, floats.bf16_decode, floats.bf16_encode
    ),
    WeightFormat.Q8_0: _packed("q8_0", 8, q8_0, q8_0.encode),
    WeightFormat.Q4_0: _packed("q4_0", 2, q4_0, q4_0.encode),
    WeightFormat.Q4_K: _packed("q4_k", 12, q4_k, None),
    WeightFormat.Q6_K: _packed("q6_k", 14, q6_k, None),
    WeightFormat.Q5_K: _moved("q5_k", 13, q5_k.FORMAT),
    WeightFormat.Q2_K: _moved("q2_k", 10, q2_k.FORMAT),
    WeightFormat.Q3_K: _moved("q3_k", 11, q3_k.FORMAT),
    WeightFormat.IQ4_XS: _moved("iq4_xs", 23, iq4.XS),
    WeightFormat.IQ4_NL: _moved("iq4_nl", 20, iq4.NL),
    WeightFormat.MXFP4: _moved("mxfp4", 39, mxfp4.FORMAT),
}


def _traits(weight_format: WeightFormat | int, k: int) -> TileFormat:
    traits = TILE_FORMATS.get(WeightFormat(weight_format))
    if traits is None:
        known = [f.name for f in TILE_FORMATS]
        raise ValueError(f"tile format: expected one of {known}, found {weight_format}")
    if k <= 0 or k % traits.block_values:
        raise ValueError(f"{traits.name} tiles: expected k a multiple of {traits.block_values}, found {k}")
    return traits


def tile_bytes(weight_format: WeightFormat | int, rows: int, k: int) -> int:
    """Bytes of a matrix [rows, k] as tiles."""
    traits = _traits(weight_format, k)
    return tile_count(rows) * (k // traits.block_values) * traits.tile_block_bytes


def from_blocks(weight_format: WeightFormat | int, raw: bytes, rows: int, k: int) -> bytes:
    """Raw checkpoint rows of the format's own block type -> tiles; bit-exact."""
    return _traits(weight_format, k).from_blocks(raw, rows, k)


def decode(weight_format: WeightFormat | int, tiles: bytes, rows: int, k: int) -> F32:
    """Tiles -> [rows, k] f32."""
    return _traits(weight_format, k).decode(tiles, rows, k)


def encode(weight_format: WeightFormat | int, values: F32) -> bytes:
    """[rows, k] f32 -> tiles, rounded to nearest.

    Raises:
        ValueError: the format has no nearest rounding here, or k does not fill its blocks.
    """
    traits = _traits(weight_format, values.shape[1])
    if traits.encode is None:
        raise ValueError(f"{traits.name}: no encoder; it is only re-arranged from checkpoint blocks")
    return traits.encode(np.ascontiguousarray(values, dtype=np.float32))
