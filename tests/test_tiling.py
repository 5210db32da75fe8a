"""Rows of blocks to tiles and back: layout, bits, rounding and sizes."""

from __future__ import annotations

import threading
from typing import Any

import _edge
import numpy as np
import numpy.typing as npt
import pytest

from flashload.errors import ArgumentError, UnsupportedModelError
from quant import formats
from quant.formats import WeightFormat

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

NATIVE = {
    code: gguf.GGMLQuantizationType(traits.ggml_type).name for code, traits in formats.TILE_FORMATS.items()
}
QUANTISED = [code for code, traits in formats.TILE_FORMATS.items() if traits.encode is not None]
SOURCES = [
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K",
    "IQ4_NL", "IQ4_XS", "MXFP4", "IQ2_XXS", "IQ3_S", "IQ1_S", "TQ2_0",
]  # fmt: skip
ROWS = [1, 15, 16, 17, 35]


def kind(name: str) -> Any:
    return gguf.GGMLQuantizationType[name]


def blocks_of(name: str, n_values: int, seed: int) -> Bytes:
    """Random blocks whose scales are ordinary numbers, so that no value is NaN or infinite."""
    rng = np.random.default_rng(seed)
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind(name)]
    if name in ("F32", "F16", "BF16"):
        return quantize(name, rng.standard_normal(n_values).astype(np.float32).reshape(1, -1))
    blocks = rng.integers(0, 256, (n_values // block_values, block_bytes), dtype=np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(112, 120, len(blocks))
        return blocks.reshape(-1)
    offsets = {
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q2_K": (80, 82),
        "Q6_K": (208,),
        "Q3_K": (108,),
        "TQ2_0": (64,),
    }
    for offset in offsets.get(name, (0,)):
        halves = rng.uniform(-0.01, 0.01, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(-1)


def dequantize(name: str, data: Bytes, rows: int, k: int) -> Floats:
    with np.errstate(all="ignore"):
        values: Any = quants.dequantize(data, kind(name))
    return np.ascontiguousarray(values, dtype=np.float32).reshape(rows, k)


def quantize(name: str, values: Floats) -> Bytes:
    with np.errstate(all="ignore"):
        data: Any = quants.quantize(values, kind(name))
    return np.ascontiguousarray(data).view(np.uint8).reshape(-1)


def tile(source: str, weight_format: WeightFormat, data: Bytes, rows: int, k: int) -> bytes:
    tiles: bytes = _edge.tile_rows(int(kind(source)), int(weight_format), data, rows, k)
    return tiles


def same_bits(found: Floats, expected: Floats) -> bool:
    return bool(np.array_equal(found.view(np.uint32), expected.view(np.uint32)))


# Re-arrangement


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("weight_format", NATIVE)
def test_own_type_matches_the_oracle(weight_format: WeightFormat, rows: int) -> None:
    name, k = NATIVE[weight_format], 512
    data = blocks_of(name, rows * k, rows)
    assert tile(name, weight_format, data, rows, k) == formats.from_blocks(
        weight_format, data.tobytes(), rows, k
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("weight_format", NATIVE)
def test_values_survive_tiling_bit_for_bit(weight_format: WeightFormat, rows: int) -> None:
    name, k = NATIVE[weight_format], 768
    data = blocks_of(name, rows * k, 40 + rows)
    tiles = tile(name, weight_format, data, rows, k)
    found = _edge.untile_rows(int(weight_format), tiles, rows, k)
    assert found.shape == (rows, k) and found.dtype == np.float32
    assert same_bits(found, dequantize(name, data, rows, k))


@pytest.mark.parametrize("weight_format", NATIVE)
def test_any_bits_survive_tiling(weight_format: WeightFormat) -> None:
    """Random bytes, NaN and infinite scales included: no stored bit may be lost."""
    name, rows, k = NATIVE[weight_format], 21, 512
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind(name)]
    rng = np.random.default_rng(5)
    data = rng.integers(0, 256, rows * k // block_values * block_bytes, dtype=np.uint8)
    tiles = tile(name, weight_format, data, rows, k)
    assert tiles == formats.from_blocks(weight_format, data.tobytes(), rows, k)
    found = _edge.untile_rows(int(weight_format), tiles, rows, k)
    expected = dequantize(name, data, rows, k)
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("weight_format", NATIVE)
def test_untile_agrees_with_the_oracle_on_any_tile(weight_format: WeightFormat) -> None:
    rows, k = 35, 512
    tiles = np.random.default_rng(6).integers(
        0, 256, formats.tile_bytes(weight_format, rows, k), dtype=np.uint8
    )
    with np.errstate(all="ignore"):
        expected = formats.decode(weight_format, tiles.tobytes(), rows, k)
    assert np.array_equal(_edge.untile_rows(int(weight_format), tiles, rows, k), expected, equal_nan=True)


@pytest.mark.parametrize("k", [1, 2, 3, 255, 256, 257, 300])
@pytest.mark.parametrize("weight_format", QUANTISED[:3])
def test_plain_floats_take_any_k(weight_format: WeightFormat, k: int) -> None:
    name, rows = NATIVE[weight_format], 17
    data = blocks_of(name, rows * k, k)
    tiles = tile(name, weight_format, data, rows, k)
    assert tiles == formats.from_blocks(weight_format, data.tobytes(), rows, k)
    assert same_bits(_edge.untile_rows(int(weight_format), tiles, rows, k), dequantize(name, data, rows, k))


@pytest.mark.parametrize("k", [32, 64, 224, 256, 288, 4128])
@pytest.mark.parametrize("weight_format", [c for c in NATIVE if formats.TILE_FORMATS[c].block_values == 32])
def test_blocks_of_32_take_any_multiple(weight_format: WeightFormat, k: int) -> None:
    name, rows = NATIVE[weight_format], 18
    data = blocks_of(name, rows * k, k)
    assert tile(name, weight_format, data, rows, k) == formats.from_blocks(
        weight_format, data.tobytes(), rows, k
    )


def test_padding_rows_decode_to_zero() -> None:
    for weight_format, name in NATIVE.items():
        tiles = tile(name, weight_format, blocks_of(name, 512, 7), 1, 512)
        padded = _edge.untile_rows(int(weight_format), tiles, 16, 512)
        assert padded[0].any() and not padded[1:].any(), weight_format


def test_layout_of_q4_0_by_hand() -> None:
    """Row 3 holds q = 0..15 twice; byte s*64 + 3*4 + b of the tile block is elements 4s+b and 16+4s+b."""
    nibbles = np.arange(16, dtype=np.uint8)
    block = np.concatenate([np.array([0x00, 0x3C], dtype=np.uint8), nibbles | (nibbles[::-1] << 4)])
    data = np.zeros((16, 18), dtype=np.uint8)
    data[3] = block
    tiles = np.frombuffer(tile("Q4_0", WeightFormat.Q4_0, data.reshape(-1), 16, 32), dtype=np.uint8)
    assert tiles.size == 288
    assert tiles[:32].view(np.uint16).tolist() == [0, 0, 0, 0x3C00] + [0] * 12
    for s in range(4):
        for b in range(4):
            assert tiles[32 + s * 64 + 3 * 4 + b] == (4 * s + b) | ((15 - 4 * s - b) << 4)
    assert np.count_nonzero(tiles[32:]) == 16


# Conversion


@pytest.mark.parametrize("rows", [1, 16, 19])
@pytest.mark.parametrize(
    ("source", "weight_format"), [(s, f) for s in SOURCES for f in QUANTISED if NATIVE[f] != s]
)
def test_conversion_is_decode_then_gguf_quantize(source: str, weight_format: WeightFormat, rows: int) -> None:
    k = 512
    data = blocks_of(source, rows * k, 100 + rows)
    blocks = quantize(NATIVE[weight_format], dequantize(source, data, rows, k))
    assert tile(source, weight_format, data, rows, k) == formats.from_blocks(
        weight_format, blocks.tobytes(), rows, k
    )


def from_f32(weight_format: WeightFormat, values: Floats) -> bytes:
    return tile("F32", weight_format, values.view(np.uint8).reshape(-1), *values.shape)


def expected_from_f32(weight_format: WeightFormat, values: Floats) -> bytes:
    blocks = quantize(NATIVE[weight_format], values)
    return formats.from_blocks(weight_format, blocks.tobytes(), *values.shape)


@pytest.mark.parametrize("weight_format", [WeightFormat.Q8_0, WeightFormat.Q4_0])
def test_quantising_ordinary_values(weight_format: WeightFormat) -> None:
    rng = np.random.default_rng(8)
    values = rng.standard_normal((64, 1024)).astype(np.float32) * np.exp(rng.uniform(-12, 8, (64, 1))).astype(
        np.float32
    )
    assert from_f32(weight_format, values) == expected_from_f32(weight_format, values)


@pytest.mark.parametrize("weight_format", [WeightFormat.Q8_0, WeightFormat.Q4_0])
def test_quantising_ties_and_signs(weight_format: WeightFormat) -> None:
    """Blocks of few distinct values: halves between steps, equal sizes of both signs, zeros of both signs."""
    rng = np.random.default_rng(9)
    steps = np.array(
        [-8, -7.5, -1, -0.5, -0.0, 0.0, 0.5, 1, 7.5, 8, 63.5, -63.5, 127, -127], dtype=np.float32
    )
    values = rng.choice(steps, (48, 512)).astype(np.float32)
    values[40:] = rng.choice(np.array([0.0, -0.0], dtype=np.float32), (8, 512))
    values[32:40] = rng.choice(np.array([3.0, -3.0], dtype=np.float32), (8, 512))
    assert from_f32(weight_format, values) == expected_from_f32(weight_format, values)


@pytest.mark.parametrize("weight_format", [WeightFormat.Q8_0, WeightFormat.Q4_0])
def test_quantising_tiny_values(weight_format: WeightFormat) -> None:
    """Scales that are subnormal or zero as f16, or whose inverse overflows f32."""
    rng = np.random.default_rng(10)
    sizes = np.float32(10.0) ** np.arange(-45, -5, 1, dtype=np.float32).repeat(2)[:, None]
    values = (rng.standard_normal((80, 256)).astype(np.float32) * sizes).astype(np.float32)
    assert from_f32(weight_format, values) == expected_from_f32(weight_format, values)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 3e38, -3e38])
@pytest.mark.parametrize("weight_format", [WeightFormat.Q8_0, WeightFormat.Q4_0])
def test_a_bad_weight_shows_and_stays_in_its_block(weight_format: WeightFormat, bad: float) -> None:
    values = np.ones((16, 96), dtype=np.float32)
    clean = _edge.untile_rows(int(weight_format), from_f32(weight_format, values), 16, 96)
    values[5, 40] = bad
    found = _edge.untile_rows(int(weight_format), from_f32(weight_format, values), 16, 96)
    assert np.isfinite(clean).all() and not np.isfinite(found[5, 32:64]).any()
    found[5, 32:64] = clean[5, 32:64]
    assert same_bits(found, clean)


@pytest.mark.parametrize("weight_format", [WeightFormat.F16, WeightFormat.BF16])
def test_rounding_to_16_bits_at_every_boundary(weight_format: WeightFormat) -> None:
    """Every 16-bit value, the point half-way to the next, and the floats on both sides of each."""
    every = np.arange(65536, dtype=np.uint16)
    if weight_format == WeightFormat.F16:
        values = every.view(np.float16).astype(np.float32)
    else:
        values = (every.astype(np.uint32) << 16).view(np.float32)
    finite = values[np.isfinite(values)]
    step = finite.view(np.uint32).astype(np.int64)
    halves = step + (1 << (12 if weight_format == WeightFormat.F16 else 15))
    points = np.concatenate([step + i for i in (-1, 0, 1)] + [halves + i for i in (-1, 0, 1)])
    points = np.clip(points, 0, 2**32 - 1).astype(np.uint32)
    points = points[: points.size // 16 * 16].reshape(16, -1)
    found = _edge.untile_rows(
        int(weight_format), from_f32(weight_format, points.view(np.float32)), *points.shape
    )
    with np.errstate(all="ignore"):
        expected = formats.decode(
            weight_format, formats.encode(weight_format, points.view(np.float32)), *points.shape
        )
    assert np.array_equal(found, expected, equal_nan=True)


def test_subnormal_halves_round_to_even() -> None:
    exact = np.arange(0, 2048, dtype=np.float64) / 2 * 2.0**-24  # halves of the smallest f16
    values = exact.astype(np.float32).reshape(16, -1)
    found = _edge.untile_rows(1, from_f32(WeightFormat.F16, values), *values.shape)
    assert same_bits(found, values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("weight_format", [WeightFormat.F16, WeightFormat.BF16])
def test_nan_stays_nan_and_infinity_stays_infinite(weight_format: WeightFormat) -> None:
    bits = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000, 0xFF800000], dtype=np.uint32)
    found = _edge.untile_rows(
        int(weight_format), from_f32(weight_format, bits.view(np.float32).reshape(1, -1)), 1, 6
    )
    assert np.isnan(found[0, :4]).all() and found[0, 4] == np.inf and found[0, 5] == -np.inf


@pytest.mark.parametrize("weight_format", [code for code in NATIVE if code not in QUANTISED])
def test_tiles_without_rounding_come_from_their_own_type_only(weight_format: WeightFormat) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"{NATIVE[weight_format].lower()}.*found F32"):
        tile("F32", weight_format, np.zeros(1024, dtype=np.uint8), 1, 256)


# Sizes


@pytest.mark.parametrize("weight_format", NATIVE)
def test_tile_bytes(weight_format: WeightFormat) -> None:
    for rows in (1, 16, 17, 32000):
        assert _edge.tile_bytes(int(weight_format), rows, 4096) == formats.tile_bytes(
            weight_format, rows, 4096
        )


@pytest.mark.parametrize(
    ("weight_format", "rows", "k"),
    [
        (3, 0, 32), (3, -1, 32), (3, 16, 0), (3, 16, -32), (3, 16, 33), (5, 16, 128), (7, 16, 32),
        (13, 16, 256), (19, 16, 256), (100, 16, 32), (-1, 16, 32), (0, 2**62, 2**62),
        (0, 2**63 - 1, 2**63 - 1), (0, 2**64, 1), (0, 1, 2**60), (6, 1, 2**62),
    ],
)  # fmt: skip
def test_impossible_shapes(weight_format: int, rows: int, k: int) -> None:
    with pytest.raises(ArgumentError):
        _edge.tile_bytes(weight_format, rows, k)
    with pytest.raises(ArgumentError):
        _edge.tile_rows(0, weight_format, b"", rows, k)
    with pytest.raises(ArgumentError):
        _edge.untile_rows(weight_format, b"", rows, k)


@pytest.mark.parametrize("delta", [-144, -1, 1, 144])
def test_wrong_byte_counts_name_both(delta: int) -> None:
    with pytest.raises(ArgumentError, match=rf"expected 2304 bytes for 16 rows.*found {2304 + delta}"):
        _edge.tile_rows(12, 5, bytes(2304 + delta), 16, 256)
    with pytest.raises(ArgumentError, match=rf"expected 2304 bytes for 16 rows.*found {2304 + delta}"):
        _edge.untile_rows(5, bytes(2304 + delta), 16, 256)


def test_k_must_fill_source_and_target_blocks() -> None:
    with pytest.raises(ArgumentError, match="multiple of 256"):
        _edge.tile_rows(12, 1, bytes(144), 1, 128)
    with pytest.raises(ArgumentError, match="multiple of 32"):
        _edge.tile_rows(0, 3, bytes(4 * 33), 1, 33)


def test_threads_tile_without_disturbing_each_other() -> None:
    data = blocks_of("Q6_K", 64 * 1024, 30)
    expected = tile("Q6_K", WeightFormat.Q8_0, data, 64, 1024)
    found: list[bytes] = []
    work = [
        threading.Thread(target=lambda: found.append(tile("Q6_K", WeightFormat.Q8_0, data, 64, 1024)))
        for _ in range(4)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert found == [expected] * 4


@pytest.mark.nightly
def test_random_shapes_agree_with_the_oracle() -> None:
    rng = np.random.default_rng(31)
    for seed in range(300):
        weight_format = WeightFormat(int(rng.integers(0, len(NATIVE))))
        name = NATIVE[weight_format]
        rows, k = int(rng.integers(1, 70)), int(rng.integers(1, 9)) * 256
        data = blocks_of(name, rows * k, seed)
        tiles = tile(name, weight_format, data, rows, k)
        assert tiles == formats.from_blocks(weight_format, data.tobytes(), rows, k)
        assert same_bits(
            _edge.untile_rows(int(weight_format), tiles, rows, k), dequantize(name, data, rows, k)
        )
