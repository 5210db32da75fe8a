"""The float operators: equal bits on every ISA, and close to float64 on the reference one."""

from __future__ import annotations

import math
from typing import Any

import _edge
import numpy as np
import numpy.typing as npt
import pytest

from flashload import errors

Array = npt.NDArray[Any]
SIZES = [1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 63, 257, 1000]
POSITIVE = "0 1e-45 1e-38 1e-20 1 20 87.3 88.7 88.8 89.1 95 103 103.97 104.1 128 150 1e4 3e38"
EXTREMES = np.array([sign * float(v) for v in POSITIVE.split() for sign in (1, -1)], np.float32)
HALF_EDGES = np.array([2.0**-14, 2.0**-24, 2.0**-25, 65504.0, 65519.9, 65520.0, 65536.0], np.float32)


FAST_ISAS = [isa["name"] for isa in _edge.isas() if isa["available"] and isa["name"] != "ref"]


def bits(x: Array) -> Array:
    """The bit patterns, with one pattern for every NaN (its payload is not defined)."""
    if x.dtype == np.uint16:
        return np.where((x & 0x7FFF) > 0x7C00, 0x7E00, x)
    return np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def arguments(name: str, n: int, rng: np.random.Generator) -> tuple[Any, ...]:
    """Arguments of one operator over n values (rope: over 2n)."""
    x = normal(rng, n) * np.float32(10.0 ** rng.integers(-3, 3))
    y = normal(rng, n)
    scalar = float(np.float32(rng.standard_normal()))
    return {
        "rms_norm": (x, y, 1e-5),
        "layer_norm": (x, y, normal(rng, n), 1e-5),
        "rope": (normal(rng, 2 * n + 3), np.cos(x), np.sin(x)),
        "add": (x, y),
        "scale_add": (x, y, scalar),
        "softmax": (x,),
        "to_f16": (x,),
    }.get(name, (x, y))


GATED = ["silu_mul", "relu_mul", "gelu_mul", "gelu_tanh_mul"]
ROWS = ["rms_norm", "layer_norm", "rope", "add", "scale_add", "softmax", "to_f16", *GATED]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("isa", FAST_ISAS)
def test_every_isa_gives_the_bits_of_ref(isa: str, name: str) -> None:
    rng = np.random.default_rng(3)
    for n in SIZES:
        args = arguments(name, n, rng)
        np.testing.assert_array_equal(bits(_edge.op(isa, name, *args)), bits(_edge.op("ref", name, *args)))


@pytest.mark.parametrize("name", ["softmax", "to_f16", "rms_norm", "layer_norm", *GATED])
@pytest.mark.parametrize("isa", FAST_ISAS)
@pytest.mark.parametrize("special", ["", "inf", "-inf", "nan", "nan inf -inf"])
def test_extreme_values_give_the_bits_of_ref(isa: str, name: str, special: str) -> None:
    x = np.concatenate([EXTREMES, HALF_EDGES, np.array(special.split(), np.float32)])
    ones = np.ones_like(x)
    args = {"softmax": (x,), "to_f16": (x,), "rms_norm": (x, ones, 0.0), "layer_norm": (x, ones, None, 1e-5)}
    got, ref = (_edge.op(i, name, *args.get(name, (x, None))) for i in (isa, "ref"))
    np.testing.assert_array_equal(bits(got), bits(ref))


def relative(got: Array, want: Array, floor: float = 1e-30) -> float:
    return float(np.max(np.abs(got.astype(np.float64) - want) / np.maximum(np.abs(want), floor)))


@pytest.mark.parametrize("n", SIZES)
def test_norms_match_float64(n: int) -> None:
    rng = np.random.default_rng(n)
    x, weight, bias = (normal(rng, n) + np.float32(0.5), normal(rng, n), normal(rng, n))
    x64, w64 = x.astype(np.float64), weight.astype(np.float64)
    want = x64 / np.sqrt(np.mean(x64**2) + 1e-5) * w64
    assert relative(_edge.op("ref", "rms_norm", x, weight, 1e-5), want) < 5e-7
    centred = x64 - x64.mean()
    want = centred / np.sqrt(np.mean(centred**2) + 1e-5) * w64
    # The subtraction of the mean leaves an error of one ulp of x, large beside a small deviation from it.
    assert np.max(np.abs(_edge.op("ref", "layer_norm", x, weight, None, 1e-5) - want)) < 3e-6
    assert np.max(np.abs(_edge.op("ref", "layer_norm", x, weight, bias, 1e-5) - want - bias)) < 3e-6


def test_layer_norm_centres_before_it_squares() -> None:
    x = np.float32(1000) + normal(np.random.default_rng(0), 512)
    x64 = x.astype(np.float64)
    want = (x64 - x64.mean()) / x64.std()
    assert np.max(np.abs(_edge.op("ref", "layer_norm", x, np.ones(512), None, 0.0) - want)) < 5e-4


def test_rms_norm_of_zeros_is_zero() -> None:
    np.testing.assert_array_equal(_edge.op("ref", "rms_norm", np.zeros(33), np.ones(33), 1e-6), 0)


@pytest.mark.parametrize(("size", "n_rotary"), [(64, 64), (128, 128), (80, 32), (64, 16), (10, 10), (64, 2)])
def test_rope_rotates_halves_and_leaves_the_rest(size: int, n_rotary: int) -> None:
    rng = np.random.default_rng(n_rotary)
    x, half = normal(rng, size), n_rotary // 2
    angle = normal(rng, half) * 100
    cos, sin = np.cos(angle), np.sin(angle)
    want = x.astype(np.float64)
    a, b = want[:half].copy(), want[half:n_rotary].copy()
    want[:half], want[half:n_rotary] = a * cos - b * sin, b * cos + a * sin
    got = _edge.op("ref", "rope", x, cos, sin)
    assert np.max(np.abs(got - want)) < 1e-6
    np.testing.assert_array_equal(got[n_rotary:], x[n_rotary:])


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    return np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x])


def gelu_tanh(x: Array) -> Array:
    return np.array([v / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x])


@pytest.mark.parametrize(
    ("name", "function", "tolerance"),
    [("silu_mul", silu, 3e-7), ("gelu_mul", gelu, 1e-6), ("gelu_tanh_mul", gelu_tanh, 1.5e-6)],
)
def test_activations_match_float64(name: str, function: Any, tolerance: float) -> None:
    x = np.linspace(-5, 20, 20011).astype(np.float32)
    want = function(x.astype(np.float64))
    # The exponent's own rounding grows with it: relative in the body, absolute in the tail.
    got = _edge.op("ref", name, x, None)
    assert np.max(np.abs(got - want) / np.maximum(np.abs(want), 0.01)) < tolerance
    up = normal(np.random.default_rng(0), x.size)
    np.testing.assert_array_equal(_edge.op("ref", name, x, up), got * up)


@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul", "gelu_tanh_mul"])
def test_activations_vanish_far_below_zero_and_pass_far_above(name: str) -> None:
    x = np.array([-1e4, -200, 200, 1e4], np.float32)
    np.testing.assert_array_equal(_edge.op("ref", name, x, None), [0, 0, 200, 1e4])


def test_gelu_keeps_relative_precision_in_its_tail() -> None:
    x = np.linspace(-12, -5, 1001).astype(np.float32)
    assert relative(_edge.op("ref", "gelu_mul", x, None), gelu(x.astype(np.float64))) < 2e-5


def test_relu_gives_exact_zeros_without_sign() -> None:
    got = _edge.op("ref", "relu_mul", np.array([-1, -0.0, 0, 2, -3e38, np.nan], np.float32), None)
    np.testing.assert_array_equal(bits(got), bits(np.array([0, 0, 0, 2, 0, np.nan], np.float32)))


@pytest.mark.parametrize("isa", ["ref", *FAST_ISAS])
@pytest.mark.parametrize("n", [1, 15, 16, 63, 64, 65, 200])
def test_beyond_marks_all_but_what_is_within_the_limit(isa: str, n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.choice(np.array([-2, -1, -0.0, 0, 1, 2, 1e-45, np.nan, -np.inf], np.float32), n)
    limit = rng.choice(np.array([0, 1, 3], np.float32), n)
    for limits in (limit, None):
        words = _edge.op(isa, "beyond", x, limits)
        marks = np.unpackbits(words.view(np.uint8), bitorder="little")
        expected = np.zeros(words.size * 64, np.uint8)
        expected[:n] = ~(np.abs(x) <= (0 if limits is None else limits))
        np.testing.assert_array_equal(marks, expected)


@pytest.mark.parametrize("n", SIZES)
def test_adds_are_single_roundings(n: int) -> None:
    rng = np.random.default_rng(n)
    x, y, s = normal(rng, n), normal(rng, n), np.float32(0.3)
    np.testing.assert_array_equal(_edge.op("ref", "add", x, y), x + y)
    np.testing.assert_array_equal(_edge.op("ref", "scale_add", x, y, float(s)), x + s * y)


@pytest.mark.parametrize("n", SIZES)
def test_softmax_matches_float64(n: int) -> None:
    x = normal(np.random.default_rng(n), n) * 8
    want = np.exp(x.astype(np.float64) - x.max())
    want /= want.sum()
    got = _edge.op("ref", "softmax", x)
    assert relative(got, want, 1e-12) < 2e-6
    assert abs(float(got.sum(dtype=np.float64)) - 1) < 1e-6


def test_softmax_exponent_is_within_two_ulp_and_correct_at_its_limits() -> None:
    x = -np.linspace(0, 87, 40001).astype(np.float32)
    # One dominant zero and a total near n: multiply back by the total to see exp itself.
    got = np.array([_edge.op("ref", "softmax", np.array([0, v], np.float32)) for v in x[1:2000]])
    ratio = got[:, 1].astype(np.float64) / got[:, 0]
    assert np.max(np.abs(ratio / np.exp(x[1:2000].astype(np.float64)) - 1)) < 4e-7
    got = _edge.op("ref", "softmax", np.array([3, -math.inf, -200, -3e38], np.float32))
    np.testing.assert_array_equal(got, [1, 0, 0, 0])
    np.testing.assert_array_equal(_edge.op("ref", "softmax", np.array([3e38, 3e38], np.float32)), [0.5, 0.5])
    assert np.isnan(_edge.op("ref", "softmax", np.array([0, math.nan], np.float32))).all()


@pytest.mark.parametrize("isa", ["ref", *FAST_ISAS])
def test_to_f16_rounds_to_nearest_even(isa: str) -> None:
    halves = np.arange(0x7C01, dtype=np.uint16)
    exact = halves.view(np.float16).astype(np.float32)
    finite = exact[:-1].astype(np.float64)
    ties = ((finite[:-1] + finite[1:]) / 2).astype(np.float32)
    near = np.concatenate([np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))])
    x = np.concatenate([exact, ties, near, EXTREMES, HALF_EDGES, normal(np.random.default_rng(0), 1000)])
    x = np.concatenate([x, -x])
    with np.errstate(over="ignore"):
        want = x.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(_edge.op(isa, "to_f16", x), want)


@pytest.mark.parametrize("isa", ["ref", *FAST_ISAS])
def test_every_f16_pattern_reads_exactly(isa: str) -> None:
    # One key: its weight is exactly 1, so the output is the value row.
    value = np.arange(1 << 16, dtype=np.uint16)[None]
    zeros = np.zeros_like(value)
    got = _edge.op(isa, "attention", zeros.astype(np.float32), zeros, value, 1.0)
    want = value.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(bits(got), bits(np.where(want == 0, np.float32(0), want)))


def attention_inputs(group: int, head_dim: int, n: int, seed: int = 0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng([group, head_dim, n, seed])
    k, v = (normal(rng, n, head_dim).astype(np.float16).view(np.uint16) for _ in range(2))
    return normal(rng, group, head_dim) * 2, k, v


SHAPES = [(1, 64, 1), (1, 64, 5), (8, 64, 100), (4, 128, 333), (5, 128, 17), (3, 80, 64)]
SHAPES += [(7, 20, 33), (1, 8, 40), (2, 1, 3), (16, 96, 50), (11, 256, 31), (1, 17, 129)]


@pytest.mark.parametrize(("group", "head_dim", "n"), SHAPES)
def test_attention_matches_float64(group: int, head_dim: int, n: int) -> None:
    q, k, v = attention_inputs(group, head_dim, n)
    scale = head_dim**-0.5
    k64, v64 = (a.view(np.float16).astype(np.float64) for a in (k, v))
    scores = q.astype(np.float16).astype(np.float64) @ k64.T * scale
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    # Weights carry f16 precision: half a unit in the last of 11 bits, or of the smallest subnormal.
    rounding = 2.0**-11 * (weights @ np.abs(v64)) + 2.0**-25 * np.abs(v64).sum(axis=0)
    error = np.abs(_edge.op("ref", "attention", q, k, v, scale) - weights @ v64)
    assert (error <= rounding + 4e-6).all()


def test_attention_weights_and_queries_have_f16_precision() -> None:
    # One in a thousand is no f16: exp(0) against exp(ln 999) gives weights 0.001 and 0.999, each rounded.
    third = np.float32(1 / 3)
    q = np.array([[third]], np.float32)
    k = np.array([[0.0], [1.0]], np.float16)
    v = np.array([[1.0], [0.0]], np.float16)
    scale = float(np.log(999.0) / np.float64(np.float16(third)))
    found = _edge.op("ref", "attention", q, k.view(np.uint16), v.view(np.uint16), scale)
    assert found[0, 0] == np.float32(np.float16(0.001))


@pytest.mark.parametrize(("group", "head_dim", "n"), SHAPES)
@pytest.mark.parametrize("isa", FAST_ISAS)
def test_attention_gives_the_bits_of_ref(isa: str, group: int, head_dim: int, n: int) -> None:
    q, k, v = attention_inputs(group, head_dim, n)
    got, ref = (_edge.op(i, "attention", q, k, v, 0.125) for i in (isa, "ref"))
    np.testing.assert_array_equal(bits(got), bits(ref))


@pytest.mark.parametrize("isa", ["ref", *FAST_ISAS])
def test_a_head_does_not_depend_on_the_heads_beside_it(isa: str) -> None:
    q, k, v = attention_inputs(11, 96, 75)
    whole = _edge.op(isa, "attention", q, k, v, 0.1)
    for head in range(11):
        alone = _edge.op(isa, "attention", q[head : head + 1], k, v, 0.1)
        np.testing.assert_array_equal(alone[0], whole[head])


@pytest.mark.parametrize("isa", ["ref", *FAST_ISAS])
def test_a_key_of_weight_zero_changes_no_bit(isa: str) -> None:
    # Appended keys whose exponent underflows leave every sum as it was.
    q, k, v = attention_inputs(3, 64, 40)
    q[:, 0] = 100
    k[:, 0] = np.float16(1).view(np.uint16)
    far = k.copy()
    far[:, 0] = np.float16(-100).view(np.uint16)
    got = _edge.op(isa, "attention", q, np.concatenate([k, far]), np.concatenate([v, v]), 1.0)
    np.testing.assert_array_equal(got, _edge.op(isa, "attention", q, k, v, 1.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("ref", "sofmax", [1.0]), "unknown op 'sofmax'"),
        (("z80", "softmax", [1.0]), "unknown ISA 'z80'"),
        (("ref", "softmax"), "expected arguments (x), found 0"),
        (("ref", "add", [1.0, 2.0], [1.0]), "argument 1: expected 2 values, found 1"),
        (("ref", "rope", [1.0, 2.0], [1.0, 1.0], [0.0, 0.0]), "expected at most 1 cosines, found 2"),
    ],
)
def test_wrong_calls_are_named(call: tuple[Any, ...], message: str) -> None:
    with pytest.raises(errors.ArgumentError) as raised:
        _edge.op(*call)
    assert message in str(raised.value)
