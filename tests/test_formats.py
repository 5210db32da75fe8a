"""The numpy oracles of the tile formats against gguf-py and, where it is built, the compiled core."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest

from quant import formats
from quant.formats import TILE_FORMATS, WeightFormat
from tests.random_blocks import random_blocks

ALL = list(TILE_FORMATS)
ENCODED = [code for code, traits in TILE_FORMATS.items() if traits.encode is not None]
ROWS = (1, 15, 16, 17, 48)


def width(code: WeightFormat, blocks: int = 3) -> int:
    traits = TILE_FORMATS[code]
    return traits.block_values * blocks if traits.block_values > 1 else 20


def kind_of(code: WeightFormat) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(TILE_FORMATS[code].ggml_type)


def any_bytes(code: WeightFormat, rows: int, k: int, seed: int) -> np.ndarray:
    traits = TILE_FORMATS[code]
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, k // traits.block_values * traits.block_bytes), dtype=np.uint8)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal bit for bit; any NaN equals any NaN."""
    nan = np.isnan(one) & np.isnan(other)
    return bool((nan | (one.view(np.uint32) == other.view(np.uint32))).all())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("code", ALL, ids=lambda c: c.name)
def test_any_bytes_decode_as_gguf_does(code: WeightFormat, rows: int) -> None:
    k = width(code)
    raw = any_bytes(code, rows, k, seed=rows)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind_of(code)).reshape(rows, k)
    tiles = formats.from_blocks(code, raw.tobytes(), rows, k)
    found = formats.decode(code, tiles, rows, k)
    assert found.dtype == np.float32
    assert same_bits(found, expected)


@pytest.mark.parametrize("code", ALL, ids=lambda c: c.name)
@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0], ids=hex)
def test_constant_bytes_decode_as_gguf_does(code: WeightFormat, fill: int) -> None:
    k = width(code)
    raw = np.full_like(any_bytes(code, 16, k, 0), fill)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind_of(code)).reshape(16, k)
    assert same_bits(formats.decode(code, formats.from_blocks(code, raw.tobytes(), 16, k), 16, k), expected)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("code", ALL, ids=lambda c: c.name)
def test_sizes(code: WeightFormat, rows: int) -> None:
    k = width(code)
    tiles = formats.from_blocks(code, any_bytes(code, rows, k, 0).tobytes(), rows, k)
    traits = TILE_FORMATS[code]
    assert len(tiles) == formats.tile_bytes(code, rows, k)
    assert len(tiles) == -(-rows // 16) * (k // traits.block_values) * traits.tile_block_bytes


@pytest.mark.parametrize("code", ALL, ids=lambda c: c.name)
def test_tiles_are_as_small_as_the_file(code: WeightFormat) -> None:
    traits = TILE_FORMATS[code]
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind_of(code)]
    assert (traits.block_values, traits.block_bytes) == (block_values, block_bytes)
    assert traits.tile_block_bytes == 16 * block_bytes


def test_q2_k_layout() -> None:
    """Halves of 16 rows, then words of four bytes, 16 rows side by side: scales before quants."""
    block = np.zeros((16, 84), np.uint8)
    block[:, :16] = np.arange(256, dtype=np.uint8).reshape(16, 16)
    block[:, 16:80] = np.arange(16 * 64, dtype=np.int64).astype(np.uint8).reshape(16, 64)
    block[:, 80:84] = np.arange(32, dtype=np.float16).reshape(16, 2).view(np.uint8)
    tile = np.frombuffer(formats.from_blocks(WeightFormat.Q2_K, block.tobytes(), 16, 256), np.uint8)
    assert np.array_equal(tile[:64].view(np.float16), [*range(0, 32, 2), *range(1, 32, 2)])
    for s, r, b in [(0, 0, 0), (1, 5, 2), (3, 15, 3)]:
        assert tile[64 + s * 64 + r * 4 + b] == block[r, 4 * s + b]
        assert tile[320 + (4 * s) * 64 + r * 4 + b] == block[r, 16 + 16 * s + b]


@pytest.mark.parametrize("code", ALL, ids=lambda c: c.name)
def test_missing_rows_are_zero(code: WeightFormat) -> None:
    k = width(code)
    raw = random_blocks(kind_of(code), (5, k), np.random.default_rng(0))
    tiles = formats.from_blocks(code, raw.tobytes(), 5, k)
    assert not formats.decode(code, tiles, 16, k)[5:].any()


@pytest.mark.parametrize("code", ENCODED, ids=lambda c: c.name)
@pytest.mark.parametrize("scale", [1e-7, 1.0, 3e4])
def test_rounding_is_that_of_gguf(code: WeightFormat, scale: float) -> None:
    k = width(code)
    values = (np.random.default_rng(1).normal(size=(17, k)) * scale).astype(np.float32)
    values[0] = 0
    values[1, ::2] = -0.0
    with np.errstate(over="ignore"):
        blocks = np.asarray(gguf.quants.quantize(values, kind_of(code)))
    expected = formats.from_blocks(code, blocks.tobytes(), 17, k)
    assert formats.encode(code, values) == expected


@pytest.mark.parametrize("code", [WeightFormat.Q4_0, WeightFormat.Q8_0], ids=lambda c: c.name)
def test_ties_round_as_gguf_does(code: WeightFormat) -> None:
    steps = np.arange(-127, 128, dtype=np.float32) / 2
    values = np.resize(np.concatenate([steps, [127.0, -127.0]]), (16, 96)).astype(np.float32)
    blocks = np.asarray(gguf.quants.quantize(values, kind_of(code)))
    assert formats.encode(code, values) == formats.from_blocks(code, blocks.tobytes(), 16, 96)


def test_q4_0_layout() -> None:
    """Byte s*64 + r*4 + b of row r: low nibble k = 4s + b, high nibble k = 16 + 4s + b; scales first."""
    block = np.zeros((16, 18), np.uint8)
    block[:, :2] = np.arange(1, 17, dtype=np.float16).view(np.uint8).reshape(16, 2)
    block[:, 2:] = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
    tile = np.frombuffer(formats.from_blocks(WeightFormat.Q4_0, block.tobytes(), 16, 32), np.uint8)
    assert np.array_equal(tile[:32].view(np.float16), np.arange(1, 17, dtype=np.float16))
    for s, r, b in [(0, 0, 0), (1, 5, 2), (3, 15, 3)]:
        assert tile[32 + s * 64 + r * 4 + b] == block[r, 2 + 4 * s + b]


def test_q8_0_layout() -> None:
    """Signed values are stored with the top bit flipped."""
    block = np.zeros((16, 34), np.uint8)
    block[:, 2:] = np.arange(16 * 32, dtype=np.int64).astype(np.uint8).reshape(16, 32)
    tile = np.frombuffer(formats.from_blocks(WeightFormat.Q8_0, block.tobytes(), 16, 32), np.uint8)
    for s, r, b in [(0, 0, 0), (4, 9, 1), (7, 15, 3)]:
        assert tile[32 + s * 64 + r * 4 + b] == block[r, 2 + 4 * s + b] ^ 0x80


def test_float_layout() -> None:
    """[k][16 rows]."""
    values = np.arange(16 * 5, dtype=np.float32).reshape(16, 5)
    tile = np.frombuffer(formats.encode(WeightFormat.F32, values), np.float32).reshape(5, 16)
    assert np.array_equal(tile, values.T)


@pytest.mark.parametrize("code", [c for c in ALL if c not in ENCODED], ids=lambda c: c.name)
def test_other_formats_have_no_nearest_rounding(code: WeightFormat) -> None:
    with pytest.raises(ValueError, match="no encoder"):
        formats.encode(code, np.zeros((16, 256), np.float32))


@pytest.mark.parametrize(
    ("code", "k"),
    [(WeightFormat.Q4_0, 33), (WeightFormat.Q4_K, 128), (WeightFormat.F32, 0), (WeightFormat.Q8_0, -32)],
)
def test_widths_that_fill_no_blocks(code: WeightFormat, k: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        formats.tile_bytes(code, 16, k)


@pytest.mark.parametrize("code", ALL, ids=lambda c: c.name)
def test_wrong_lengths(code: WeightFormat) -> None:
    k = width(code)
    raw = any_bytes(code, 16, k, 0).tobytes()
    with pytest.raises(ValueError, match="expected"):
        formats.from_blocks(code, raw[:-1], 16, k)
    with pytest.raises(ValueError, match="expected"):
        formats.decode(code, raw[:-1], 16, k)


def test_vectors_are_no_tiles() -> None:
    with pytest.raises(ValueError, match="tile format"):
        formats.tile_bytes(WeightFormat.F32_VECTOR, 1, 4)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("code", ALL, ids=lambda c: c.name)
def test_the_core_agrees(code: WeightFormat, rows: int) -> None:
    core: Any = pytest.importorskip("_edge")
    k, traits = width(code), TILE_FORMATS[code]
    raw = any_bytes(code, rows, k, seed=rows + 100).tobytes()
    assert core.tile_rows(traits.ggml_type, int(code), raw, rows, k) == formats.from_blocks(
        code, raw, rows, k
    )
    if traits.encode is not None:
        values = np.random.default_rng(rows).normal(size=(rows, k)).astype(np.float32)
        assert core.tile_rows(0, int(code), values.tobytes(), rows, k) == formats.encode(code, values)
