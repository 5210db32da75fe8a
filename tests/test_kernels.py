"""Matrix products: ref is the definition to the last bit, and every other ISA gives the bits of ref."""

from __future__ import annotations

import platform
import shutil
import subprocess
from fractions import Fraction
from typing import Any

import _edge
import numpy as np
import numpy.typing as npt
import pytest

from flashload import errors
from quant import formats
from quant.formats import WeightFormat

Array = npt.NDArray[Any]
F32 = np.float32

FORMATS = [WeightFormat(f) for f in formats.TILE_FORMATS]
WITH_MINS = (WeightFormat.Q4_K, WeightFormat.Q5_K, WeightFormat.Q2_K)
FAST_ISAS = [isa["name"] for isa in _edge.isas() if isa["available"] and isa["name"] != "ref"]
all_formats = pytest.mark.parametrize("weight_format", FORMATS, ids=[f.name.lower() for f in FORMATS])
fast_isas = pytest.mark.parametrize("isa", FAST_ISAS)


def block_of(weight_format: WeightFormat) -> int:
    return formats.TILE_FORMATS[weight_format].block_values


def random_tiles(weight_format: WeightFormat, rows: int, k: int, rng: np.random.Generator) -> bytes:
    """Random quants under ordinary scales; every byte of the quants and packed scales takes every value."""
    n_bytes = formats.tile_bytes(weight_format, rows, k)
    if weight_format == WeightFormat.F32:
        return rng.standard_normal(n_bytes // 4).astype(F32).tobytes()
    if weight_format == WeightFormat.F16:
        return rng.standard_normal(n_bytes // 2).astype(np.float16).tobytes()
    if weight_format == WeightFormat.BF16:
        return (rng.standard_normal(n_bytes // 2).astype(F32).view(np.uint32) >> 16).astype("<u2").tobytes()
    blocks = rng.integers(0, 256, n_bytes, np.uint8).reshape(
        -1, formats.TILE_FORMATS[weight_format].tile_block_bytes
    )
    return with_scales(weight_format, blocks, rng.standard_normal((len(blocks), 32)) * 0.01)


def with_scales(weight_format: WeightFormat, blocks: Array, scales: Array) -> bytes:
    """Puts scales (and mins) at the start of every block of quants; scales [n, 32].

    MXFP4 takes the next power of two.
    """
    out = blocks.copy()
    if weight_format == WeightFormat.MXFP4:
        _, exponent = np.frexp(np.abs(scales[:, :16]).astype(F32))
        out[:, :16] = np.clip(exponent + 127, 0, 255).astype(np.uint8)
        return out.tobytes()
    n = 32 if weight_format in WITH_MINS else 16
    out[:, : 2 * n] = np.ascontiguousarray(scales[:, :n].astype("<f2")).view(np.uint8)
    return out.tobytes()


def row_scales(weight_format: WeightFormat, raw: Array) -> Array:
    """[blocks, 32] scales and, where there are any, mins of blocks [blocks, bytes]; the inverse of with_scales."""
    if weight_format == WeightFormat.MXFP4:
        return np.ldexp(F32(1), raw[:, :16].astype(np.int32) - 128)
    return np.ascontiguousarray(raw[:, :64]).view("<f2").astype(F32)


def filled_tiles(weight_format: WeightFormat, rows: int, k: int, fill: int, scale: float) -> bytes:
    """Tiles whose quants are all one byte, under one scale."""
    n_bytes = formats.tile_bytes(weight_format, rows, k)
    if weight_format <= WeightFormat.BF16:
        values = np.full((rows, k), scale, F32)
        return formats.encode(weight_format, values)
    blocks = np.full((1, n_bytes), fill, np.uint8).reshape(
        -1, formats.TILE_FORMATS[weight_format].tile_block_bytes
    )
    return with_scales(weight_format, blocks, np.full((len(blocks), 32), scale))


def activations(m: int, k: int, rng: np.random.Generator) -> Array:
    return (rng.standard_normal((m, k)) * 10.0 ** rng.integers(-2, 3, (m, 1))).astype(F32)


def bits(x: Array) -> Array:
    """Bit patterns, one for every NaN."""
    return np.where(np.isnan(x), F32(np.nan), x).view(np.uint32)


def assert_same_bits(found: Array, expected: Array) -> None:
    np.testing.assert_array_equal(bits(found), bits(expected))


# The definition in exact arithmetic.


def round_f32(exact: Fraction) -> np.float32:
    """The float32 nearest to an exact value, ties to even."""
    guess = F32(float(exact))
    near = [np.nextafter(guess, F32(-np.inf)), guess, np.nextafter(guess, F32(np.inf))]
    return min(near, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.uint32)) & 1))


def fma(a: Any, b: Any, c: Any) -> np.float32:
    return round_f32(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


def quantize(x: Array, block: int) -> tuple[Array, Array]:
    """(d [n], q [n, block]) of one row: cpp/kernels/act_scale.h in NumPy."""
    blocks = x.reshape(-1, block)
    largest = np.abs(blocks).max(axis=1)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = F32(127) / largest
    zero = np.isinf(inverse)
    inverse = np.where(zero, F32(1), inverse)
    if block == 32:
        d = largest / F32(127)
        normal = (d >= F32(2.0**-14)) & (d <= F32(65504))
        d = np.where(normal, np.where(normal, d, 1).astype(np.float16).astype(F32), d)
    else:
        d = F32(1) / inverse
    q = np.rint(np.clip(blocks * inverse[:, None], -127, 127))
    return np.where(zero, F32(0), d), np.where(zero[:, None], 0, q).astype(np.int64)


def unit_tiles(weight_format: WeightFormat, tiles: bytes, d: float, dmin: float) -> bytes:
    """The same quants under scales d (and dmin): decoded, they are the integers of the definition."""
    block_bytes = formats.TILE_FORMATS[weight_format].tile_block_bytes
    blocks = np.frombuffer(tiles, np.uint8).reshape(-1, block_bytes)
    scales = np.full((len(blocks), 32), d)
    scales[:, 16:] = dmin
    return with_scales(weight_format, blocks, scales)


def defined_dot(
    weight_format: WeightFormat, tiles: bytes, rows: int, k: int, row: int, x: Array
) -> np.float32:
    """One product of the definition: exact integers, one rounding per fma, blocks in order."""
    if weight_format <= WeightFormat.BF16:
        weights = formats.decode(weight_format, tiles, rows, k)[row]
        acc = [F32(0)] * 4
        for i in range(k):
            acc[i % 4] = fma(weights[i], x[i], acc[i % 4])
        return F32(F32(acc[0] + acc[1]) + F32(acc[2] + acc[3]))
    block = block_of(weight_format)
    d_a, q_a = quantize(x, block)
    scaled = formats.decode(weight_format, unit_tiles(weight_format, tiles, 1.0, 0.0), rows, k)[row]
    mins = formats.decode(weight_format, unit_tiles(weight_format, tiles, 0.0, 1.0), rows, k)[row]
    n_blocks, block_bytes = k // block, formats.TILE_FORMATS[weight_format].tile_block_bytes
    raw = np.frombuffer(tiles, np.uint8).reshape(-1, n_blocks, block_bytes)[row // 16]
    halves = row_scales(weight_format, raw)
    total = F32(0)
    for b in range(n_blocks):
        part = slice(b * block, (b + 1) * block)
        isum = int((scaled[part].astype(np.int64) * q_a[b]).sum())
        total = fma(F32(isum), halves[b, row % 16] * d_a[b], total)
        if weight_format in WITH_MINS:
            msum = -int((mins[part].astype(np.int64) * q_a[b]).sum())
            total = fma(-F32(msum), halves[b, 16 + row % 16] * d_a[b], total)
    return total


@all_formats
def test_reference_is_the_definition_to_the_last_bit(weight_format: WeightFormat) -> None:
    rng = np.random.default_rng(int(weight_format))
    rows, m = 19, 2
    k = 37 if block_of(weight_format) == 1 else 3 * block_of(weight_format)
    tiles = random_tiles(weight_format, rows, k, rng)
    x = activations(m, k, rng)
    found = _edge.gemv("ref", weight_format, tiles, rows, k, x)
    assert found.shape == (m, rows)
    for i, row in [(0, 0), (0, 15), (1, 7), (1, 16), (0, 18)]:
        expected = defined_dot(weight_format, tiles, rows, k, row, x[i])
        assert found[i, row].view(np.uint32) == expected.view(np.uint32), (i, row, found[i, row], expected)


@all_formats
def test_products_are_near_the_decoded_weights_in_float64(weight_format: WeightFormat) -> None:
    rng = np.random.default_rng(100 + int(weight_format))
    rows, k = 33, 512
    tiles = random_tiles(weight_format, rows, k, rng)
    x = activations(4, k, rng)
    weights = formats.decode(weight_format, tiles, rows, k).astype(np.float64)
    exact = x.astype(np.float64) @ weights.T
    # An int8 activation is off by at most half a step of its block's largest value / 127.
    step = 0.0 if weight_format <= WeightFormat.BF16 else 0.5 / 127
    bound = np.abs(x).max(axis=1, keepdims=True) * step * np.abs(weights).sum(axis=1) + 1e-5 * (
        np.abs(x).astype(np.float64) @ np.abs(weights).T
    )
    assert (np.abs(_edge.gemv("ref", weight_format, tiles, rows, k, x) - exact) <= bound).all()


# Every ISA against ref.


@fast_isas
@all_formats
def test_random_shapes_have_the_bits_of_ref(isa: str, weight_format: WeightFormat) -> None:
    rng = np.random.default_rng(200 + int(weight_format))
    # 75: a panel's 64 rows, some of a second one's, and rows that are left over.
    for m in [*range(1, 10), 16, 33, 64, 75]:
        rows = int(rng.integers(1, 50))
        k = (
            int(rng.integers(1, 300))
            if block_of(weight_format) == 1
            else int(block_of(weight_format) * rng.integers(1, max(2, 512 // block_of(weight_format))))
        )
        tiles = random_tiles(weight_format, rows, k, rng)
        x = activations(m, k, rng)
        assert_same_bits(
            _edge.gemv(isa, weight_format, tiles, rows, k, x),
            _edge.gemv("ref", weight_format, tiles, rows, k, x),
        )


@fast_isas
@all_formats
def test_a_prompt_chunk_that_crosses_tile_groups_has_the_bits_of_ref(
    isa: str, weight_format: WeightFormat
) -> None:
    # 20 tiles of 16 KiB or more: several groups of 256 KiB, and more rows than one block of activations.
    rng = np.random.default_rng(300 + int(weight_format))
    rows, k, m = 20 * 16, 1024 if weight_format >= WeightFormat.Q8_0 else 512, 11
    tiles = random_tiles(weight_format, rows, k, rng)
    x = activations(m, k, rng)
    assert_same_bits(
        _edge.gemv(isa, weight_format, tiles, rows, k, x), _edge.gemv("ref", weight_format, tiles, rows, k, x)
    )


@fast_isas
@all_formats
@pytest.mark.parametrize("scale", [0.0, 2.0**-24, 65504.0, -65504.0], ids=["zero", "subnormal", "max", "min"])
@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x7F, 0x80])
def test_extreme_quants_and_scales_have_the_bits_of_ref(
    isa: str, weight_format: WeightFormat, scale: float, fill: int
) -> None:
    rows, k = 17, 512
    tiles = filled_tiles(weight_format, rows, k, fill, scale)
    steps = np.array([1, -1, 1, 1], F32)
    # All at +-max (int16 pairs at their bound), zero blocks, subnormal blocks, huge blocks.
    x = np.stack(
        [
            np.full(k, 3.0, F32),
            np.full(k, -3.0, F32),
            np.resize(steps, k) * F32(2.5),
            np.where(np.arange(k) // 256 == 0, F32(0), F32(1e-40)),
            np.full(k, 1e30, F32),
        ]
    )
    expected = _edge.gemv("ref", weight_format, tiles, rows, k, x)
    assert_same_bits(_edge.gemv(isa, weight_format, tiles, rows, k, x), expected)
    # So many rows take their tiles from panels.
    many = _edge.gemv(isa, weight_format, tiles, rows, k, np.tile(x, (8, 1)))
    assert_same_bits(many, np.tile(expected, (8, 1)))
    assert np.isfinite(expected[:4]).all()


@pytest.mark.parametrize("isa", ["ref", *FAST_ISAS])
def test_byte_products_do_not_saturate(isa: str) -> None:
    """The largest weights, activations at +-127: pairs beyond int16 if weights were taken unsigned."""
    k = 64
    for code, stored, weight in [
        (WeightFormat.Q8_0, 0x00, -128),
        (WeightFormat.Q8_0, 0xFF, 127),
        (WeightFormat.IQ4_NL, 0x00, -127),
        (WeightFormat.IQ4_NL, 0xFF, 113),
    ]:
        tiles = filled_tiles(code, 16, k, stored, 1.0)
        for sign in (1, -1):
            x = np.full((1, k), sign * 127.0, F32)
            assert (_edge.gemv(isa, code, tiles, 16, k, x) == sign * 127 * weight * k).all()


@pytest.mark.parametrize("isa", ["ref", *FAST_ISAS])
def test_exponents_of_every_size(isa: str) -> None:
    """MXFP4's scale 2^(e - 128), from the subnormal ones to the largest: weight 1 (twice 0.5) times 127."""
    for exponent in range(256):
        block = np.full(272, 0x11, np.uint8)
        block[:16] = exponent
        found = _edge.gemv(isa, WeightFormat.MXFP4, block.tobytes(), 16, 32, np.full((1, 32), 127.0, F32))
        with np.errstate(over="ignore"):
            expected = F32(32 * 127) * np.ldexp(F32(1), exponent - 128)
        assert (found == expected).all(), exponent


@pytest.mark.parametrize("isa", ["ref", *FAST_ISAS])
@all_formats
def test_a_row_does_not_depend_on_its_neighbours(isa: str, weight_format: WeightFormat) -> None:
    rng = np.random.default_rng(400 + int(weight_format))
    rows, k = 40, 256
    tiles = random_tiles(weight_format, rows, k, rng)
    x = activations(64, k, rng)
    alone = np.concatenate([_edge.gemv(isa, weight_format, tiles, rows, k, row[None]) for row in x])
    for m in [*range(1, 10), 16, 33, 64]:
        assert_same_bits(_edge.gemv(isa, weight_format, tiles, rows, k, x[:m]), alone[:m])


@all_formats
def test_rows_do_not_depend_on_the_tiles_after_them(weight_format: WeightFormat) -> None:
    rng = np.random.default_rng(500 + int(weight_format))
    k = 256
    tiles = random_tiles(weight_format, 48, k, rng)
    x = activations(3, k, rng)
    first = tiles[: formats.tile_bytes(weight_format, 16, k)]
    for isa in ["ref", *FAST_ISAS]:
        whole = _edge.gemv(isa, weight_format, tiles, 48, k, x)
        assert_same_bits(_edge.gemv(isa, weight_format, first, 13, k, x), whole[:, :13])


# Activation quantisation.


@pytest.mark.parametrize("isa", ["ref", *FAST_ISAS])
@pytest.mark.parametrize("block", [32, 256])
def test_activations_are_quantised_as_defined(isa: str, block: int) -> None:
    rng = np.random.default_rng(block)
    x = activations(1, 12 * block, rng)[0].reshape(12, block)
    x[1] = 0
    x[2] *= F32(1e-42)
    x[3, 5] = F32(3e38)
    x[4] = np.resize(np.array([0.5, 1.5, 2.5, -0.5, -1.5, 127.0], F32), block)  # ties, at d = 1
    x[5] = F32(-0.0)
    d, q = quantize(x.reshape(-1), block)
    kind = [("d", "<f4"), ("sum", "<i4"), ("q", "i1", 32)]
    if block == 256:
        kind = [("d", "<f4"), ("pad", "<i4"), ("sums", "<i2", 16), ("q", "i1", 256)]
    blocks = np.frombuffer(_edge.quantize(isa, f"q8x{block}", x.reshape(-1)), np.dtype(kind))
    assert_same_bits(blocks["d"].astype(F32), d)
    np.testing.assert_array_equal(blocks["q"], q)
    if block == 32:
        np.testing.assert_array_equal(blocks["sum"], q.sum(axis=1))
    else:
        np.testing.assert_array_equal(blocks["sums"], q.reshape(-1, 16, 16).sum(axis=2))


@fast_isas
@pytest.mark.parametrize("block", [32, 256])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_shows_in_the_output(isa: str, block: int, value: float) -> None:
    x = np.linspace(-1, 1, 2 * block).astype(F32)
    x[block + 3] = value
    for name in ("ref", isa):
        raw = np.frombuffer(_edge.quantize(name, f"q8x{block}", x), np.uint8).reshape(2, -1)
        d = np.ascontiguousarray(raw[:, :4]).view("<f4").ravel()
        assert np.isfinite(d[0])
        assert not np.isfinite(d[1])
        weight_format = WeightFormat.Q8_0 if block == 32 else WeightFormat.Q6_K
        tiles = random_tiles(weight_format, 16, 2 * block, np.random.default_rng(1))
        assert not np.isfinite(_edge.gemv(name, weight_format, tiles, 16, 2 * block, x[None])).any()
    expected = np.frombuffer(_edge.quantize("ref", f"q8x{block}", x), np.uint8).reshape(2, -1)
    found = np.frombuffer(_edge.quantize(isa, f"q8x{block}", x), np.uint8).reshape(2, -1)
    np.testing.assert_array_equal(found[:, 4:], expected[:, 4:])


# The choice of ISA.


def test_isas_are_listed_best_first_and_ref_runs_everywhere() -> None:
    isas = _edge.isas()
    assert [isa["name"] for isa in isas][-1] == "ref"
    assert isas[-1]["available"]
    for isa in isas:
        assert isa["available"] == (isa["reason"] == "")


def test_the_best_available_isa_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGE_ISA", raising=False)
    assert _edge.default_isa() == next(isa["name"] for isa in _edge.isas() if isa["available"])
    monkeypatch.setenv("EDGE_ISA", "")
    assert _edge.default_isa() == next(isa["name"] for isa in _edge.isas() if isa["available"])


@pytest.mark.parametrize("isa", ["ref", *FAST_ISAS])
def test_edge_isa_forces_one(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_ISA", isa)
    assert _edge.default_isa() == isa


def test_an_unknown_edge_isa_lists_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_ISA", "mmx")
    with pytest.raises(errors.ArgumentError, match=r"EDGE_ISA: unknown ISA 'mmx': expected one of .*ref"):
        _edge.default_isa()


# Arguments from outside.


def test_wrong_arguments_are_refused_with_what_was_found() -> None:
    x = np.zeros((1, 64), F32)
    good = bytes(formats.tile_bytes(WeightFormat.Q4_0, 16, 64))
    calls: list[tuple[tuple[Any, ...], str]] = [
        (("sse", WeightFormat.Q4_0, good, 16, 64, x), "unknown ISA 'sse'"),
        (("ref", 100, good, 16, 64, x), "found 100"),
        (("ref", WeightFormat.Q4_0, good[:-1], 16, 64, x), "575"),
        (("ref", WeightFormat.Q4_0, good, 16, 48, x), "48"),
        (("ref", WeightFormat.Q4_0, good, 0, 64, x), "0"),
        (("ref", WeightFormat.Q4_0, good, 16, 64, x[:, :32]), r"\[m, 64\]"),
        (("ref", WeightFormat.Q4_0, good, 16, 64, x[:0]), "found 0"),
    ]
    for arguments, message in calls:
        with pytest.raises(errors.ArgumentError, match=message):
            _edge.gemv(*arguments)
    with pytest.raises(errors.ArgumentError, match="found 33"):
        _edge.quantize("ref", "q8x32", np.zeros(33, F32))
    with pytest.raises(errors.ArgumentError, match="q8x64"):
        _edge.quantize("ref", "q8x64", np.zeros(64, F32))
    with pytest.raises(errors.ArgumentError, match="n_threads"):
        _edge.bench_gemv("ref", WeightFormat.Q4_0, 16, 64, 1, 1, 0, 0.0)


@pytest.mark.skipif(
    shutil.which("objdump") is None or platform.machine() != "x86_64",
    reason="needs objdump to look at the x86-64 code",
)
def test_the_compiler_keeps_the_prefetches() -> None:
    """A compiler may drop them without a trace in any result, and then most formats run at half the speed."""
    code = subprocess.run(
        ["objdump", "-d", _edge.__file__], capture_output=True, text=True, check=True
    ).stdout
    # 16 kernels a format, at 5 (IQ4_XS) to 44 (Q5_K) lines a step; half of that where a tile is two parts.
    assert code.count("prefetcht0") > 1500


@pytest.mark.parametrize("isa", [one["name"] for one in _edge.isas() if one["available"]])
def test_every_isa_says_how_fast_it_multiplies(isa: str) -> None:
    assert _edge.int8_rate(2, 0.0, isa) > 0
    with pytest.raises(errors.ArgumentError, match="n_threads"):
        _edge.int8_rate(0, 0.0, isa)
