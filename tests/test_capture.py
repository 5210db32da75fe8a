"""What a pass shows of its feed-forward layers: the same rows from tiles and from records, in any chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _edge
import numpy as np
import pytest

import edge
from edge.errors import ArgumentError
from flashload.format import PackFile
from flashload.pack import pack
from tests.neuron_packs import by_neuron, decoded, tiny_relu
from tests.oracle import Oracle
from tests.test_neuron_engine import plan_of, windowed
from tests.tiny import tiny_hf

N, HIDDEN, NEURONS = 41, 64, 96
TOKENS = [1 + (17 * i) % 300 for i in range(N)]


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("capture")
    out = {family: tiny_relu(folder, family, max_position_embeddings=256) for family in ("llama", "opt")}
    for family in ("llama", "opt"):
        out[f"{family}-neurons"] = by_neuron(out[family], folder / f"{family}-n.edge", "f16", rank=32)
    return out


def engine_of(path: Path, **changes: Any) -> _edge.Engine:
    plan, decoder = plan_of(path, 1, False)
    return _edge.Engine(plan.engine_options(path, decoder, **changes))


def captured(engine: _edge.Engine, max_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[float]]:
    """Inputs [layers, N, D], gates [layers, N, F], open [layers, N, F] bool, and the logits that follow."""
    x = np.full((2, max_rows, HIDDEN), np.nan, np.float16)
    gates = np.full((2, max_rows, NEURONS), np.nan, np.float16)
    bits = np.full((2, max_rows, NEURONS // 8), 255, np.uint8)
    sequence = _edge.Sequence(engine)
    sequence.set_tokens(TOKENS)
    parts: list[tuple[np.ndarray, ...]] = []
    while sequence.n_pending:
        n = sequence.capture(inputs=x, gates=gates, open=bits)
        is_open = np.unpackbits(bits[:, :n], axis=2, bitorder="little").astype(bool)
        parts.append((x[:, :n].copy(), gates[:, :n].copy(), is_open))
    assert sequence.capture(open=bits) == 0
    whole = [np.concatenate(column, axis=1) for column in zip(*parts, strict=True)]
    return whole[0], whole[1], whole[2], list(sequence.logits())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_gates_are_the_product_of_inputs(packs: dict[str, Path], family: str) -> None:
    x, gates, is_open, _ = captured(engine_of(packs[family]), 128)
    weights = decoded(packs[family])
    for layer in range(2):
        side = "gate" if family == "llama" else "up"
        expected = x[layer].astype(np.float32) @ weights[f"layers.{layer}.{side}.weight"].T
        expected += weights.get(f"layers.{layer}.{side}.bias", np.zeros((1, NEURONS), np.float32))
        assert np.abs(gates[layer] - expected).max() < 5e-3 * np.abs(expected).max()
    assert np.array_equal(is_open, gates > 0) and 0.2 < is_open.mean() < 0.8


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("max_rows", [1, 7, 128])
def test_records_and_chunks_show_the_same(packs: dict[str, Path], family: str, max_rows: int) -> None:
    expected = captured(engine_of(packs[f"{family}-neurons"]), 128)
    found = captured(engine_of(packs[f"{family}-neurons"], max_rows=max_rows), max_rows)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)
    few = captured(_edge.Engine(windowed(packs[f"{family}-neurons"], 9) | {"max_rows": 128}), 128)
    for one, other in zip(few, expected, strict=True):
        assert np.array_equal(one, other)


def test_watching_changes_nothing(packs: dict[str, Path]) -> None:
    engine = engine_of(packs["llama"])
    *_, watched = captured(engine, 128)
    sequence = _edge.Sequence(engine)
    sequence.set_tokens(TOKENS)
    assert list(sequence.logits()) == watched


@pytest.mark.parametrize("name", ["llama", "llama-neurons", "opt"])
def test_the_stream_grows_by_what_a_layer_adds(packs: dict[str, Path], name: str) -> None:
    """The length of the residual stream before a layer's feed-forward: of all rows, in any chunks."""
    found = []
    for max_rows in (7, 128):
        sequence = _edge.Sequence(engine_of(packs[name], max_rows=max_rows))
        sequence.set_tokens(TOKENS)
        norms = np.zeros((2, max_rows, 1), np.float32)
        parts = []
        while sequence.n_pending:
            n = sequence.capture(norms=norms)
            parts.append(norms[:, :n, 0].copy())
        found.append(np.concatenate(parts, axis=1))
    assert np.array_equal(*found)
    oracle = Oracle(PackFile(packs[name]).config.to_json(), decoded(packs[name]))
    seen: list[np.ndarray] = []
    plain = oracle.norm

    def watched(x: np.ndarray, weight: str) -> np.ndarray:
        if weight.endswith("ffn_norm"):
            seen.append(np.linalg.norm(x, axis=1))
        return plain(x, weight)

    oracle.norm = watched  # type: ignore[method-assign]
    oracle.logits(TOKENS)
    assert np.allclose(found[0], seen, rtol=2e-3)


def test_what_is_not_asked_for_is_not_needed(packs: dict[str, Path]) -> None:
    engine = engine_of(packs["llama"])
    _, _, is_open, _ = captured(engine, 128)
    sequence = _edge.Sequence(engine)
    sequence.set_tokens(TOKENS)
    bits = np.zeros((2, 128, NEURONS // 8), np.uint8)
    assert sequence.capture(open=bits) == N
    assert np.array_equal(np.unpackbits(bits[:, :N], axis=2, bitorder="little"), is_open)


def test_refusals(packs: dict[str, Path], tmp_path: Path) -> None:
    engine = engine_of(packs["llama"])
    sequence = _edge.Sequence(engine)
    sequence.set_tokens(TOKENS)
    for wrong in (np.zeros((2, 127, HIDDEN), np.float16), np.zeros((2, 128, HIDDEN), np.float32),
                  np.zeros((2, 128, 2 * HIDDEN), np.float16)[:, :, ::2], np.zeros(5, np.float16)):  # fmt: skip
        with pytest.raises(ArgumentError, match="capture: inputs: expected"):
            sequence.capture(inputs=wrong)
    assert sequence.n_pending == N
    guessed = _edge.Sequence(_edge.Engine(windowed(packs["llama-neurons"], 9, "predictor")))
    guessed.set_tokens(TOKENS)
    with pytest.raises(ArgumentError, match="expected 2 dense layers whose gates are computed, found 0"):
        guessed.capture()
    mixture = tmp_path / "mixtral.edge"
    pack(tiny_hf(tmp_path / "mixtral", "mixtral"), mixture)
    with edge.load(mixture, context=64) as loaded, PackFile(mixture):
        experts = _edge.Sequence(loaded._open_core())
        experts.set_tokens(TOKENS)
        with pytest.raises(ArgumentError, match="expected 2 dense layers"):
            experts.capture()
