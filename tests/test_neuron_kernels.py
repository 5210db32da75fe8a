"""Neuron kernels: ref is the definition of neuron.h to the last bit, and every other ISA gives the bits of ref."""

from __future__ import annotations

from typing import Any

import _edge
import numpy as np
import numpy.typing as npt
import pytest

from flashload import errors
from quant.formats import WeightFormat
from quant.formats.neuron import (
    NEURON_FORMATS,
    decode_column,
    decode_dot,
    encode_column,
    encode_dot,
    row_bytes,
)
from tests.test_kernels import quantize

Array = npt.NDArray[Any]
F32 = np.float32
F16, Q8, Q4 = WeightFormat.NEURON_F16, WeightFormat.NEURON_Q8, WeightFormat.NEURON_Q4
FAST_ISAS = [isa["name"] for isa in _edge.isas() if isa["available"] and isa["name"] != "ref"]
all_formats = pytest.mark.parametrize("weight_format", sorted(NEURON_FORMATS), ids=["f16", "q8", "q4"])
fast_isas = pytest.mark.parametrize("isa", FAST_ISAS)
HIDDEN = [32, 64, 224, 256, 288, 300, 512, 1000, 1024]


def random_rows(
    weight_format: WeightFormat, n: int, hidden: int, rng: np.random.Generator, scale: float = 0.01
) -> Array:
    """Rows whose quants take every value; scales ordinary, zero, subnormal and the largest."""
    width = row_bytes(weight_format, hidden)
    if weight_format is F16:
        values = rng.normal(0, 1, (n, width // 2)).astype("<f2")
        values[rng.random(values.shape) < 0.05] = 6e-8
        values[rng.random(values.shape) < 0.05] = -0.0
        return values.view(np.uint8)
    group = NEURON_FORMATS[weight_format].group_bytes
    rows = rng.integers(0, 256, (n, width // group, group), np.uint8)
    scales = rng.normal(0, scale, (n, width // group, 8)).astype("<f2")
    for value in (0.0, -0.0, 6e-8, 65504.0):
        scales[rng.random(scales.shape) < 0.04] = value
    rows[..., :16] = scales.view(np.uint8)
    return rows.reshape(n, width)


def padded(x: Array) -> Array:
    out = np.zeros((len(x), -(-x.shape[1] // 256) * 256), F32)
    out[:, : x.shape[1]] = x
    return out


def lanes_added(acc: Array) -> Array:
    a = [acc[..., lane] for lane in range(8)]
    return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))


def dot_by_definition(weight_format: WeightFormat, rows: Array, x: Array) -> Array:
    """[m, n] in f32, one rounding where neuron.h has one."""
    m, n = len(x), len(rows)
    x = padded(x)
    values = decode_dot(weight_format, rows, x.shape[1]).reshape(n, -1, 8, 32)
    acc = np.zeros((m, n, 8), F32)
    groups = values.shape[1]
    if weight_format is F16:
        lanes = x.reshape(m, groups, 8, 32)
        for g in range(groups):
            for j in range(32):
                acc += values[None, :, g, :, j] * lanes[:, None, g, :, j]
        return lanes_added(acc)
    d_x, q_x = quantize(x.reshape(m * groups * 8, 32), 32)
    d_x, q_x = d_x.reshape(m, groups, 8), q_x.reshape(m, groups, 8, 32).astype(np.int64)
    group = NEURON_FORMATS[weight_format].group_bytes
    d_w = rows.reshape(n, groups, group)[..., :16].copy().view("<f2").astype(F32)
    unit = rows.reshape(n, groups, group).copy()
    unit[..., :16] = np.ones((n, groups, 8), "<f2").view(np.uint8)
    q_w = decode_dot(weight_format, unit.reshape(n, -1), hidden=groups * 256)
    q_w = q_w.reshape(n, groups, 8, 32).astype(np.int64)
    for g in range(groups):
        integers = np.einsum("nlk,mlk->mnl", q_w[:, g], q_x[:, g]).astype(F32)
        acc += (d_w[None, :, g] * d_x[:, None, g]) * integers
    return lanes_added(acc)


def axpy_by_definition(
    weight_format: WeightFormat, cols: Array, a: Array, out: Array, begin: int, end: int
) -> Array:
    hidden = cols.shape[1] // NEURON_FORMATS[weight_format].group_bytes * 256
    out = out.copy()
    if weight_format is F16:
        values = decode_column(F16, cols, hidden)
        products = a[:, None] * values
    else:
        group = NEURON_FORMATS[weight_format].group_bytes
        groups = cols.reshape(len(cols), -1, group)
        d = groups[..., :16].copy().view("<f2").astype(F32)
        unit = groups.copy()
        unit[..., :16] = np.ones(d.shape, "<f2").view(np.uint8)
        q = decode_column(weight_format, unit.reshape(len(cols), -1), hidden)
        products = np.repeat((a[:, None, None] * d).reshape(len(cols), -1), 32, axis=1) * q
    for i in range(len(cols)):
        if a[i] != 0:
            out[begin:end] += products[i, begin:end]
    return out


def rounded(hidden: int) -> int:
    return -(-hidden // 32) * 32


def same_bits(a: Array, b: Array) -> bool:
    return np.array_equal(np.asarray(a, F32).view(np.uint32), np.asarray(b, F32).view(np.uint32))


@pytest.mark.parametrize("hidden", [32, 300, 512, 1000])
@all_formats
def test_ref_dot_is_the_definition(weight_format: WeightFormat, hidden: int) -> None:
    rng = np.random.default_rng(hidden)
    rows = random_rows(weight_format, 7, hidden, rng)
    x = rng.normal(size=(3, hidden)).astype(F32)
    x[1, : hidden // 2] = 0
    found = _edge.neuron_dot("ref", weight_format, rows, hidden, x)
    assert same_bits(found, dot_by_definition(weight_format, rows, x))


@pytest.mark.parametrize("hidden", [32, 300, 512, 1000])
@all_formats
def test_ref_axpy_is_the_definition(weight_format: WeightFormat, hidden: int) -> None:
    rng = np.random.default_rng(hidden)
    cols = random_rows(weight_format, 9, hidden, rng)
    a = rng.normal(size=9).astype(F32)
    a[[2, 5]] = 0.0, -0.0
    room = rounded(hidden)
    out = rng.normal(size=room).astype(F32)
    for begin, end in [(0, room), (32, room), (0, room // 64 * 32)]:
        found = _edge.neuron_axpy("ref", weight_format, cols, hidden, a, out, begin, end)
        assert same_bits(found, axpy_by_definition(weight_format, cols, a, out, begin, end))


@pytest.mark.parametrize("isa", ["ref", *FAST_ISAS])
@pytest.mark.parametrize("hidden", [96, 256, 1100])
def test_activations_are_the_blocks_of_q8x32_rearranged(isa: str, hidden: int) -> None:
    rng = np.random.default_rng(hidden)
    x = rng.normal(size=(2, hidden)).astype(F32)
    x[0, 32:64] = 0
    x[1, :32] *= F32(1e30)
    group = np.dtype([("d", "<f4", 8), ("sum", "<i4", 8), ("q", "i1", (8, 8, 4))])
    found = np.frombuffer(_edge.neuron_act(isa, Q8, x), group).reshape(2, -1)
    block = np.dtype([("d", "<f4"), ("sum", "<i4"), ("q", "i1", 32)])
    expected = np.frombuffer(_edge.quantize(isa, "q8x32", padded(x)), block).reshape(2, -1, 8)
    assert np.array_equal(found["d"], expected["d"])
    assert np.array_equal(found["sum"], expected["sum"])
    # s, lane, b -> lane, s, b
    assert np.array_equal(found["q"].swapaxes(2, 3).reshape(expected["q"].shape), expected["q"])
    assert _edge.neuron_act(isa, Q4, x) == _edge.neuron_act(isa, Q8, x)
    floats = np.frombuffer(_edge.neuron_act(isa, F16, x), F32).reshape(2, -1, 32, 8)
    assert np.array_equal(floats.swapaxes(2, 3).reshape(2, -1), padded(x))


@fast_isas
@pytest.mark.parametrize("hidden", HIDDEN)
@all_formats
def test_dot_has_the_bits_of_ref(weight_format: WeightFormat, hidden: int, isa: str) -> None:
    rng = np.random.default_rng(hidden)
    for n, m in [(1, 1), (4, 1), (11, 1), (6, 2), (3, 3), (5, 4), (5, 9)]:
        rows = random_rows(weight_format, n, hidden, rng)
        x = rng.normal(size=(m, hidden)).astype(F32)
        x[0, :32] = rng.choice([0, 1e-42, 3.0, -3.0, 1e18], 32)
        expected = _edge.neuron_dot("ref", weight_format, rows, hidden, x)
        assert same_bits(_edge.neuron_dot(isa, weight_format, rows, hidden, x), expected)


@fast_isas
@pytest.mark.parametrize("hidden", HIDDEN)
@all_formats
def test_axpy_has_the_bits_of_ref(weight_format: WeightFormat, hidden: int, isa: str) -> None:
    rng = np.random.default_rng(hidden)
    room = rounded(hidden)
    for n in (0, 1, 2, 3, 4, 5, 17):
        cols = random_rows(weight_format, n, hidden, rng)
        a = rng.normal(size=n).astype(F32)
        a[rng.random(n) < 0.4] = 0
        out = rng.normal(size=room).astype(F32)
        begin = 32 * int(rng.integers(0, room // 32 + 1))
        end = 32 * int(rng.integers(begin // 32, room // 32 + 1))
        for range_ in [(0, room), (begin, end)]:
            expected = _edge.neuron_axpy("ref", weight_format, cols, hidden, a, out, *range_)
            assert same_bits(_edge.neuron_axpy(isa, weight_format, cols, hidden, a, out, *range_), expected)


@fast_isas
@pytest.mark.parametrize("fill", [0, 127, 128, 255])
def test_integer_sums_do_not_saturate(isa: str, fill: int) -> None:
    for weight_format in (Q8, Q4):
        rows = random_rows(weight_format, 4, 512, np.random.default_rng(0), 1.0)
        rows.reshape(4, 2, -1)[..., 16:] = fill
        for sign in (1, -1):
            x = np.full((2, 512), sign, F32)
            expected = dot_by_definition(weight_format, rows, x)
            assert same_bits(_edge.neuron_dot(isa, weight_format, rows, 512, x), expected)


@pytest.mark.parametrize("isa", ["ref", *FAST_ISAS])
@all_formats
def test_leaving_out_inactive_neurons_changes_no_bit(weight_format: WeightFormat, isa: str) -> None:
    """The contract behind sparsity: also for a sum of -0 and for columns that are not finite."""
    rng = np.random.default_rng(3)
    cols = random_rows(weight_format, 40, 512, rng)
    cols[7].view("<f2")[:8] = np.inf
    cols[8].view("<f2")[:8] = np.nan
    a = np.maximum(rng.normal(size=40), 0).astype(F32)
    a[[0, 7, 8, 39]] = 0.0, 0.0, -0.0, -0.0
    out = np.full(512, -0.0, F32)
    full = _edge.neuron_axpy(isa, weight_format, cols, 512, a, out, 0, 512)
    kept = np.flatnonzero(a)
    assert 5 < len(kept) < 35
    some = _edge.neuron_axpy(isa, weight_format, cols[kept], 512, a[kept], out, 0, 512)
    assert same_bits(full, some)
    assert np.isfinite(full).all()
    none = _edge.neuron_axpy(isa, weight_format, cols, 512, np.zeros(40, F32), out, 0, 512)
    assert same_bits(none, out)


@pytest.mark.parametrize("isa", ["ref", *FAST_ISAS])
@all_formats
def test_a_row_has_the_same_bits_whatever_it_is_computed_with(weight_format: WeightFormat, isa: str) -> None:
    rng = np.random.default_rng(4)
    rows = random_rows(weight_format, 13, 640, rng)
    x = rng.normal(size=(10, 640)).astype(F32)
    together = _edge.neuron_dot(isa, weight_format, rows, 640, x)
    for m in range(10):
        for i in range(13):
            alone = _edge.neuron_dot(isa, weight_format, rows[i : i + 1], 640, x[m : m + 1])
            assert same_bits(alone, together[m : m + 1, i : i + 1])


@pytest.mark.parametrize("isa", ["ref", *FAST_ISAS])
@all_formats
def test_columns_split_between_threads_have_the_same_bits(weight_format: WeightFormat, isa: str) -> None:
    rng = np.random.default_rng(5)
    cols = random_rows(weight_format, 10, 800, rng)
    a, out = rng.normal(size=10).astype(F32), np.zeros(800, F32)
    expected = _edge.neuron_axpy(isa, weight_format, cols, 800, a, out, 0, 800)
    at = 0
    for end in (32, 224, 288, 640, 800):
        out = _edge.neuron_axpy(isa, weight_format, cols, 800, a, out, at, end)
        at = end
    assert same_bits(out, expected)


@all_formats
def test_a_sparse_layer_is_close_to_the_dense_one(weight_format: WeightFormat) -> None:
    """relu(gate x) * (up x) and back, against f64: the formats' own rounding is all that differs."""
    rng = np.random.default_rng(6)
    hidden, inner = 288, 200
    gate, up, down = (rng.normal(size=(inner, hidden)).astype(F32) / 17 for _ in range(3))
    x = rng.normal(size=(1, hidden)).astype(F32)
    isa = _edge.default_isa()
    gates = _edge.neuron_dot(isa, weight_format, encode_dot(weight_format, gate), hidden, x)[0]
    ups = _edge.neuron_dot(isa, weight_format, encode_dot(weight_format, up), hidden, x)[0]
    h = np.maximum(gates, 0) * ups
    cols = encode_column(weight_format, down)
    found = _edge.neuron_axpy(isa, weight_format, cols, hidden, h, np.zeros(hidden, F32), 0, hidden)
    exact = (np.maximum(gate @ x[0].astype(float), 0) * (up @ x[0].astype(float))) @ down.astype(float)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error < {F16: 1e-3, Q8: 0.02, Q4: 0.25}[weight_format]


BLOCKS = [(0, F16), (1, F16), (30, F16), (0, Q8), (8, Q8), (30, Q8), (12, Q8), (0, Q4), (2, Q4), (8, Q4)]


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("hidden", [256, 512, 288, 100])
@pytest.mark.parametrize(("ggml_type", "weight_format"), BLOCKS)
def test_rows_of_blocks_become_the_rows_of_the_oracle(
    ggml_type: int, weight_format: WeightFormat, hidden: int, column: bool
) -> None:
    name, block_values, block_bytes = _edge.block_type(ggml_type)
    if hidden % block_values:
        with pytest.raises(errors.ArgumentError, match=name):
            _edge.neuron_rows(ggml_type, weight_format, b"", 1, hidden, column)
        return
    rng = np.random.default_rng(hidden)
    if ggml_type in (0, 1, 30):
        x = rng.normal(size=(5, hidden)).astype(F32)
        x[1] = 0
        raw = {0: x, 1: x.astype("<f2"), 30: (x.view(np.uint32) >> 16).astype("<u2")}[ggml_type].tobytes()
    else:
        blocks = rng.integers(0, 256, (5, hidden // block_values, block_bytes), np.uint8)
        blocks[..., :2] = rng.normal(0, 0.1, (5, hidden // block_values, 1)).astype("<f2").view(np.uint8)
        if ggml_type == 12:
            blocks[..., 2:4] = blocks[..., :2]
        raw = blocks.tobytes()
    values = _edge.decode_blocks(ggml_type, raw, 5 * hidden).reshape(5, hidden)
    found = _edge.neuron_rows(ggml_type, weight_format, raw, 5, hidden, column)
    assert found.shape == (5, row_bytes(weight_format, hidden))
    encode, decode = (encode_column, decode_column) if column else (encode_dot, decode_dot)
    if NEURON_FORMATS[weight_format].ggml_type == ggml_type:
        assert np.array_equal(decode(weight_format, found, hidden), values)
        assert not decode(weight_format, found, -(-hidden // 256) * 256)[:, hidden:].any()
    else:
        assert np.array_equal(found, encode(weight_format, values))


@pytest.mark.parametrize(
    ("ggml_type", "weight_format", "n_bytes", "n_rows", "hidden"),
    [
        (0, 3, 1024, 1, 256),
        (0, Q8, 1023, 1, 256),
        (0, Q8, 0, 0, 256),
        (0, Q8, 0, 1, 0),
        (0, Q8, 0, 1, 1 << 40),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    ggml_type: int, weight_format: int, n_bytes: int, n_rows: int, hidden: int
) -> None:
    with pytest.raises(errors.ArgumentError):
        _edge.neuron_rows(ggml_type, weight_format, bytes(n_bytes), n_rows, hidden, False)
