"""Rows of checkpoint blocks -> tiles or f32, and back: the one place where packing meets the compiled core.

Without the core built (a source checkout), the numpy oracles and the ``gguf`` package do the same, slowly.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from flashload.errors import UnsupportedModelError
from flashload.ggml import BLOCK_TYPES
from quant import formats
from quant.formats import F32, TILE_FORMATS, TILE_ROWS, WeightFormat


def _core() -> Any:
    try:
        core = importlib.import_module("_edge")
    except ImportError:
        return None
    return core if hasattr(core, "tile_rows") else None


_EDGE = _core()


def _decode(ggml_type: int, data: bytes) -> F32:
    try:
        quants = importlib.import_module("gguf.quants")
    except ImportError as missing:
        name = BLOCK_TYPES[ggml_type].name
        raise UnsupportedModelError(
            f"{name}: decoding needs the compiled core, found neither it nor gguf"
        ) from missing
    kind = importlib.import_module("gguf.constants").GGMLQuantizationType(ggml_type)
    with np.errstate(all="ignore"):
        values: F32 = quants.dequantize(np.frombuffer(data, np.uint8), kind)
    return values.astype(np.float32, copy=False).reshape(-1)


def decode_blocks(ggml_type: int, data: bytes, n_values: int) -> F32:
    """Blocks -> f32 [n_values].

    Raises:
        UnsupportedModelError: a type nothing here decodes.
    """
    if _EDGE is not None:
        values: F32 = _EDGE.decode_blocks(ggml_type, data, n_values)
        return values
    return _decode(ggml_type, data)


def is_finite(weight_format: WeightFormat, tiles: bytes) -> bool:
    """Whether no value of freshly rounded tiles (f32, f16, q8_0, q4_0) is infinite or NaN."""
    if weight_format is WeightFormat.F32:
        return bool(np.isfinite(np.frombuffer(tiles, "<f4")).all())
    traits = TILE_FORMATS[weight_format]
    halves = np.frombuffer(tiles, "<u2").reshape(-1, traits.tile_block_bytes // 2)
    # A block of 16 rows begins with its f16 scales; one of f16 values is all of them.
    return bool(((halves[:, :TILE_ROWS] & 0x7C00) != 0x7C00).all())


def tile_rows(ggml_type: int, weight_format: WeightFormat, data: bytes, rows: int, k: int) -> bytes:
    """Raw rows [rows, k] of a block type -> tiles; the format's own type keeps every bit, others are rounded.

    Raises:
        UnsupportedModelError: a type nothing here decodes.
    """
    if _EDGE is not None:
        tiles: bytes = _EDGE.tile_rows(ggml_type, int(weight_format), data, rows, k)
        return tiles
    if TILE_FORMATS[weight_format].ggml_type == ggml_type:
        return formats.from_blocks(weight_format, data, rows, k)
    return formats.encode(weight_format, _decode(ggml_type, data).reshape(rows, k))


def untile_rows(weight_format: WeightFormat, tiles: bytes, rows: int, k: int) -> F32:
    """Tiles -> values [rows, k]."""
    if _EDGE is not None:
        values: F32 = _EDGE.untile_rows(int(weight_format), tiles, rows, k)
        return values
    return formats.decode(weight_format, tiles, rows, k)
