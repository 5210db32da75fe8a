"""Keys and values of 8 and 4 bits as the kernels see them: NumPy's definition, and one set of bits for every ISA."""

from __future__ import annotations

import _edge
import numpy as np
import pytest

from tests.oracle import hadamard, round_kv, round_query, softmax

TYPES = ("int8", "int4")
ISAS = [isa["name"] for isa in _edge.isas() if isa["available"]]
#: (query heads, head_dim, keys): tails of dims, tiles and segments.
SHAPES = [(1, 64, 1), (4, 64, 16), (8, 128, 700), (3, 80, 513), (11, 20, 512), (2, 1, 40), (5, 96, 1100)]


def inputs(group: int, head_dim: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    q, k, v = (draw.standard_normal((rows, head_dim)).astype(np.float32) for rows in (group, n, n))
    # One dimension stands out, as some do in trained models.
    k[:, 0] *= 10
    return q, k, v


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("head_dim", [1, 20, 32, 64, 80, 128])
def test_rounding_is_numpys(kv_type: str, head_dim: int) -> None:
    _, k, v = inputs(1, head_dim, 37)
    for found, exact in zip(_edge.kv_round(kv_type, k, v), (k, v), strict=True):
        np.testing.assert_array_equal(found, round_kv(exact.astype(np.float64), kv_type).astype(np.float32))


@pytest.mark.parametrize("kv_type", TYPES)
def test_rows_at_the_edges_of_f16(kv_type: str) -> None:
    rows = np.array([[0.0] * 32, [1e-30] * 32, [1e30] * 32, [3.0] * 32, [-3.0] * 32, [6e4] * 32], np.float32)
    keys, values = _edge.kv_round(kv_type, rows, rows)
    assert np.isfinite(keys).all() and np.isfinite(values).all()
    assert not keys[:3].any()
    np.testing.assert_allclose(keys[3:], rows[3:], rtol=1e-3)


@pytest.mark.parametrize("head_dim", [1, 20, 64, 80, 96, 128])
def test_the_rotation_is_its_own_inverse(head_dim: int) -> None:
    _, k, _ = inputs(1, head_dim, 9)
    once = _edge.kv_rotate(k)
    np.testing.assert_allclose(once, hadamard(k.astype(np.float64)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(_edge.kv_rotate(once), k, rtol=1e-5, atol=1e-5)


def test_the_rotation_spreads_what_stands_out() -> None:
    _, k, _ = inputs(1, 64, 100)
    error = np.abs(_edge.kv_round("int4", k, k)[0] - k).mean()
    rotated = _edge.kv_rotate(k)
    assert np.abs(_edge.kv_rotate(_edge.kv_round("int4", rotated, rotated)[0]) - k).mean() < 0.7 * error


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("group, head_dim, n", SHAPES)
def test_attention_is_numpys_over_rounded_rows(kv_type: str, group: int, head_dim: int, n: int) -> None:
    q, k, v = inputs(group, head_dim, n)
    scale = head_dim**-0.5
    keys, values = (rows.astype(np.float64) for rows in _edge.kv_round(kv_type, k, v))
    for first in {0, n // 3, n - 1}:
        weights = softmax(round_query(q.astype(np.float64)) @ keys[first:].T * scale)
        found = _edge.tile_attention("ref", kv_type, q, k, v, scale, first)
        # Weights carry 15 bits of the largest of a segment.
        np.testing.assert_allclose(found, weights @ values[first:], atol=2e-4 * np.abs(values).max())


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("group, head_dim, n", SHAPES)
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_has_the_bits_of_ref(isa: str, group: int, head_dim: int, n: int, kv_type: str) -> None:
    q, k, v = inputs(group, head_dim, n, seed=n)
    for first in (0, n // 2):
        found, ref = (_edge.tile_attention(i, kv_type, q, k, v, 0.2, first) for i in (isa, "ref"))
        np.testing.assert_array_equal(found, ref)


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_extremes(isa: str, kv_type: str) -> None:
    """The largest integer sums there are, and keys so far apart that all but one weigh nothing."""
    q = np.ones((9, 64), np.float32)
    ones = np.ones((1024, 64), np.float32)
    same = _edge.tile_attention(isa, kv_type, q, ones, 3 * ones, 1.0)
    np.testing.assert_allclose(same, 3.0, rtol=1e-3)
    far = ones.copy()
    far[5] *= 100
    np.testing.assert_allclose(_edge.tile_attention(isa, kv_type, q, far, far, 1.0), 100.0, rtol=2e-3)
    assert not _edge.tile_attention(isa, kv_type, q, ones, 0 * ones, 1.0).any()


@pytest.mark.parametrize("isa", ISAS)
def test_heads_alone_and_together(isa: str) -> None:
    q, k, v = inputs(11, 96, 75)
    together = _edge.tile_attention(isa, "int8", q, k, v, 0.1)
    for head in range(11):
        alone = _edge.tile_attention(isa, "int8", q[head : head + 1], k, v, 0.1)
        np.testing.assert_array_equal(alone[0], together[head])
