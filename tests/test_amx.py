"""AMX: its model in memory multiplies as the manual says, and the kernels over it give the bits of ref."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import _edge
import numpy as np
import pytest

import edge
from flashload.errors import ArgumentError, UnsupportedModelError
from flashload.pack import pack
from quant.formats import WeightFormat
from tests.kv_engines import answer, open_engine
from tests.test_kernels import (
    F32,
    FORMATS,
    activations,
    assert_same_bits,
    block_of,
    filled_tiles,
    random_tiles,
    row_scales,
    with_scales,
)
from tests.tiny import tiny_llama_gguf

ISAS = {isa["name"]: isa for isa in _edge.isas()}
if platform.machine() not in ("x86_64", "AMD64"):
    pytest.skip("AMX is of x86-64", allow_module_level=True)
if not ISAS["amx_model"]["available"]:
    pytest.skip(f"the model of AMX: {ISAS['amx_model']['reason']}", allow_module_level=True)

#: The hardware too, where there is any.
TILES = [name for name in ("amx", "amx_model") if ISAS[name]["available"]]
QUANTISED = [f for f in FORMATS if f >= WeightFormat.Q8_0]
tiles_of = pytest.mark.parametrize("isa", TILES)
quantised = pytest.mark.parametrize("weight_format", QUANTISED, ids=[f.name.lower() for f in QUANTISED])


# The tiles.


@tiles_of
@pytest.mark.parametrize(
    ("m", "k", "n"), [(16, 16, 16), (16, 8, 16), (1, 1, 1), (5, 3, 7), (16, 1, 2), (2, 16, 16)]
)
def test_a_product_of_tiles_is_the_product_of_the_matrices(isa: str, m: int, k: int, n: int) -> None:
    """sums[i, j] += left[i, 4q + b] * right[q, 4j + b], all of it signed, whatever the tiles' shapes."""
    rng = np.random.default_rng(m * 256 + k * 16 + n)
    left = rng.integers(-128, 128, (m, 4 * k), np.int8)
    right = rng.integers(-128, 128, (k, 4 * n), np.int8)
    sums = rng.integers(-(2**20), 2**20, (m, n)).astype(np.int32)
    as_matrix = right.reshape(k, n, 4).transpose(0, 2, 1).reshape(4 * k, n).astype(np.int64)
    expected = sums + left.astype(np.int64) @ as_matrix
    assert _edge.amx_multiply(isa, left, right, sums) == ""
    np.testing.assert_array_equal(sums, expected)


@tiles_of
def test_sums_of_tiles_are_exact_at_the_extremes(isa: str) -> None:
    left = np.full((16, 64), -128, np.int8)
    sums = np.zeros((16, 16), np.int32)
    for value in (-128, 127):
        sums[:] = 0
        _edge.amx_multiply(isa, left, np.full((16, 64), value, np.int8), sums)
        assert (sums == 64 * -128 * value).all()


@pytest.mark.parametrize(
    ("left", "right", "sums", "fault"),
    [
        ((3, 4), (1, 8), (4, 2), "shapes do not fit"),
        ((4, 8), (1, 8), (4, 2), "shapes do not fit"),
        ((4, 4), (1, 12), (4, 2), "shapes do not fit"),
        ((4, 3), (1, 8), (4, 2), "whole number of dwords"),
    ],
)
def test_the_model_refuses_what_a_cpu_refuses(
    left: tuple[int, int], right: tuple[int, int], sums: tuple[int, int], fault: str
) -> None:
    before = np.full(sums, 5, np.int32)
    found = _edge.amx_multiply("amx_model", np.ones(left, np.int8), np.ones(right, np.int8), before)
    assert found.startswith("#UD")
    assert fault in found
    assert (before == 5).all()
    assert _edge.amx_fault() == ""  # it was told


def test_tiles_of_another_size_are_refused() -> None:
    small, large = np.ones((1, 4), np.int8), np.ones((17, 4), np.int8)
    with pytest.raises(ArgumentError, match="left: expected up to 16 rows of up to 64 bytes"):
        _edge.amx_multiply("amx_model", large, small, np.zeros((1, 1), np.int32))
    with pytest.raises(ArgumentError, match="sums"):
        _edge.amx_multiply("amx_model", small, small, np.zeros((1, 17), np.int32))
    with pytest.raises(ArgumentError, match="amx_model"):
        _edge.amx_multiply("ref", small, small, np.zeros((1, 1), np.int32))


# The kernels over them.


@tiles_of
@quantised
@pytest.mark.parametrize("n_rows", [15, 16, 17, 31, 32, 33, 47, 48, 64, 65, 100, 129, 161])
def test_rows_of_a_prompt_have_the_bits_of_ref(isa: str, weight_format: WeightFormat, n_rows: int) -> None:
    """Groups of 16, pairs of groups, more than one unpacking serves, and a last group that begins early."""
    rng = np.random.default_rng(1000 * int(weight_format) + n_rows)
    block = block_of(weight_format)
    for n_blocks in {1, int(rng.integers(2, 1 + 1024 // block))}:
        rows, k = int(rng.integers(1, 40)), block * n_blocks
        tiles = random_tiles(weight_format, rows, k, rng)
        x = activations(n_rows, k, rng)
        assert_same_bits(
            _edge.gemv(isa, weight_format, tiles, rows, k, x),
            _edge.gemv("ref", weight_format, tiles, rows, k, x),
        )
    assert _edge.amx_fault() == ""


@tiles_of
@pytest.mark.parametrize("weight_format", [WeightFormat.Q8_0, WeightFormat.Q4_K])
def test_long_rows_take_fewer_groups_at_once(isa: str, weight_format: WeightFormat) -> None:
    """Rows of 9 KiB and more: 8 groups of 16 would be more than the MiB of activations that L2 is to keep."""
    rng = np.random.default_rng(int(weight_format))
    rows, k, n_rows = 16, 8192, 120
    tiles = random_tiles(weight_format, rows, k, rng)
    x = activations(n_rows, k, rng)
    assert_same_bits(
        _edge.gemv(isa, weight_format, tiles, rows, k, x),
        _edge.gemv("ref", weight_format, tiles, rows, k, x),
    )


@tiles_of
@quantised
@pytest.mark.parametrize("scale", [0.0, -0.0, 2.0**-24, -65504.0, np.inf, -np.inf, np.nan])
def test_scales_of_every_kind_have_the_bits_of_ref(
    isa: str, weight_format: WeightFormat, scale: float
) -> None:
    """One scale in three blocks; activations of nothing, of subnormal and of huge numbers, and not finite ones."""
    rng = np.random.default_rng(int(weight_format))
    block = block_of(weight_format)
    rows, k = 16, 3 * block
    raw = np.frombuffer(random_tiles(weight_format, rows, k, rng), np.uint8).reshape(3, -1)
    scales = np.ones((3, 32)) * 0.01
    scales[1] = scale
    if weight_format == WeightFormat.MXFP4:
        tiles = raw.tobytes()  # its scales are finite: test_exponents_of_every_size
    else:
        tiles = with_scales(weight_format, raw, scales)
        given = row_scales(weight_format, np.frombuffer(tiles, np.uint8).reshape(3, -1))[1, 0]
        assert np.isnan(given) if np.isnan(scale) else given == F32(scale)
    x = activations(40, k, rng)
    x[3] = 0
    x[17] *= F32(1e-40)
    x[21, 1] = np.inf
    x[22, 2] = np.nan
    x[39] = F32(1e30)
    with np.errstate(invalid="ignore"):
        assert_same_bits(
            _edge.gemv(isa, weight_format, tiles, rows, k, x),
            _edge.gemv("ref", weight_format, tiles, rows, k, x),
        )


@tiles_of
@quantised
@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x7F, 0x80, 0xF0, 0x0F])
def test_the_largest_products_have_the_bits_of_ref(isa: str, weight_format: WeightFormat, fill: int) -> None:
    """Every quant and every scale at an extreme, under activations of -127 and 127 throughout."""
    rows, k, n_rows = 16, 512, 32
    tiles = filled_tiles(weight_format, rows, k, fill, 1.0)
    x = np.where(np.arange(n_rows)[:, None] % 2 == 0, F32(1), F32(-1)) * np.ones(k, F32)
    found = _edge.gemv(isa, weight_format, tiles, rows, k, x)
    assert_same_bits(found, _edge.gemv("ref", weight_format, tiles, rows, k, x))
    assert np.isfinite(found).all()


# The choice.


def test_amx_is_listed_first_and_says_why_it_cannot_run() -> None:
    names = list(ISAS)
    assert names[0] == "amx"
    assert names.index("amx_model") == len(names) - 2
    assert ISAS["amx"]["available"] or ISAS["amx"]["reason"]
    if not ISAS["amx"]["available"]:
        with pytest.raises(UnsupportedModelError, match="ISA amx cannot run here: "):
            _edge.gemv("amx", WeightFormat.Q8_0, bytes(544), 16, 32, np.ones((1, 32), F32))


def test_the_model_is_never_chosen_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGE_ISA", raising=False)
    assert _edge.default_isa() != "amx_model"
    monkeypatch.setenv("EDGE_ISA", "amx_model")
    assert _edge.default_isa() == "amx_model"


@tiles_of
def test_the_self_check_passes_what_is_right(isa: str) -> None:
    assert _edge.gemv_difference(isa, "avx512vnni") == ""
    assert _edge.gemv_difference(isa, "ref") == ""


@quantised
def test_the_self_check_sees_one_wrong_bit(weight_format: WeightFormat) -> None:
    found = _edge.gemv_difference("amx_model", "avx512vnni", falsify=int(weight_format))
    assert found == f"{weight_format.name.lower()} products"


# Whole models.


@tiles_of
@pytest.mark.parametrize(
    "weights", ["q8_0", "q4_0", "mxfp4", "q4_k", "q6_k", "q5_k", "q2_k", "q3_k", "iq4_xs"]
)
def test_a_model_gives_the_same_tokens_and_probabilities(isa: str, weights: str, tmp_path: Path) -> None:
    source = tiny_llama_gguf(tmp_path / "m.gguf", type=weights, seed=7, num_hidden_layers=2)
    pack(source, tmp_path / "m.edge")
    prompt = [1 + (i * 37) % 250 for i in range(150)]

    def answers(name: str, max_rows: int, threads: int) -> list[tuple[Any, ...]]:
        engine = open_engine(
            tmp_path / "m.edge", tmp_path, None, isa=name, max_rows=max_rows, threads=threads
        )
        return [tuple(one) for one in answer(_edge.Sequence(engine), prompt, 12)]

    expected = answers("ref", 150, 1)
    for max_rows, threads in ((17, 1), (64, 2), (150, 3)):
        assert answers(isa, max_rows, threads) == expected


def test_the_story_model_tells_the_same_story(monkeypatch: pytest.MonkeyPatch) -> None:
    def story() -> list[int]:
        with edge.load("story", context=256, pressure="off", threads=2) as engine:
            prompt = "Once upon a time there was a small boat that wanted to see the sea. " * 3
            return list(engine.generate(prompt, max_tokens=24, temperature=0.0).tokens)

    monkeypatch.delenv("EDGE_ISA", raising=False)
    expected = story()
    monkeypatch.setenv("EDGE_ISA", "amx_model")
    assert story() == expected
