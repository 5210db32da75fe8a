"""Packs made again with predictors: the same model, by neuron, and nothing lost on the way."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge
from flashload.errors import ArgumentError, CorruptError
from flashload.format import PackFile
from flashload.pack import pack
from flashload.pack_predictor import StoredMatrix, StoredPredictor, add_predictors, gate_rows
from quant.formats import WeightFormat
from tests.neuron_packs import values_of
from tests.tiny import tiny_hf

FAMILIES: dict[str, dict[str, Any]] = {"llama": {"hidden_act": "relu"}, "opt": {}}
HIDDEN, NEURONS, RANK = 64, 96, 32
PROMPT = [1, 17, 5, 99, 42, 7]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def made(folder: Path, family: str, weights: str = "keep", neurons: str = "off") -> Path:
    source = folder / family
    if not source.exists():
        tiny_hf(source, family, **FAMILIES[family])
    path = folder / f"{family}-{weights}-{neurons}.edge"
    pack(source, path, weights, neurons=neurons)
    return path


def predictors(seed: int = 0, bits: str = "q8") -> dict[int, StoredPredictor]:
    random = np.random.default_rng(seed)

    def matrix(rows: int, cols: int) -> StoredMatrix:
        return StoredMatrix.of(random.standard_normal((rows, cols), np.float32), bits)

    return {
        i: StoredPredictor(matrix(RANK, HIDDEN), matrix(NEURONS, RANK), np.full(NEURONS, 0.5 + i, np.float32))
        for i in range(2)
    }


def greedy(path: Path, **choices: Any) -> list[int]:
    with edge.load(path, context=64, **choices) as engine:
        return engine.generate(PROMPT, max_tokens=10, temperature=0, ignore_eos=True).tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_pack_becomes_what_its_source_becomes(tmp_path: Path, family: str) -> None:
    dense, expected = made(tmp_path, family), made(tmp_path, family, neurons="on")
    found = tmp_path / "found.edge"
    size = add_predictors(dense, found, {})
    assert size == found.stat().st_size
    with PackFile(found) as one, PackFile(expected) as other:
        assert one.entries.keys() == other.entries.keys()
        for name, entry in other.entries.items():
            if name != "metadata.json":
                assert one.entries[name].format == entry.format and one.read(name) == other.read(name), name
        assert one.metadata["config"] == other.metadata["config"]
    assert greedy(found) == greedy(expected)


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_rounded_rows_keep_their_bits(tmp_path: Path, weights: str) -> None:
    """Tiles hold what records hold of a row; only down columns, which have other blocks, are rounded again."""
    dense, expected = made(tmp_path, "llama", weights), made(tmp_path, "llama", weights, neurons="on")
    add_predictors(dense, tmp_path / "found.edge", {})
    with PackFile(tmp_path / "found.edge") as one, PackFile(expected) as other:
        for layer in range(2):
            name = f"layers.{layer}.neurons.gates"
            assert one.entries[name].format == other.entries[name].format
            assert one.read(name) == other.read(name)
            records = f"layers.{layer}.neurons.records"
            assert one.entries[records].chunk_bytes == other.entries[records].chunk_bytes


@pytest.mark.parametrize("neurons", ["off", "on"])
@pytest.mark.parametrize("bits", ["q8", "q4"])
def test_predictors_lie_beside_an_unchanged_model(tmp_path: Path, neurons: str, bits: str) -> None:
    source = made(tmp_path, "llama", neurons=neurons)
    before = digest(source)
    wanted = predictors(bits=bits)
    seen: list[tuple[int, int]] = []
    found = tmp_path / "found.edge"
    add_predictors(source, found, wanted, {"recall": 0.9}, lambda done, total: seen.append((done, total)))
    assert digest(source) == before
    assert seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted(done for done, _ in seen)
    with PackFile(found) as file:
        file.verify()
        assert file.metadata["predictor"] == {"rank": [RANK, RANK], "recall": 0.9}
        code = WeightFormat.Q8_0 if bits == "q8" else WeightFormat.Q4_0
        for i, predictor in wanted.items():
            assert file.entries[f"layers.{i}.predictor.up.weight"].format is code
            for side in ("down", "up"):
                stored = values_of(file, f"layers.{i}.predictor.{side}.weight")
                assert np.array_equal(stored, getattr(predictor, side).values())
            assert np.array_equal(values_of(file, f"layers.{i}.predictor.bias")[0], predictor.bias)
    assert greedy(found, exact=True) == greedy(source)
    assert greedy(found, predictor="on") == greedy(found, predictor="on")


def test_other_predictors_take_the_place_of_the_first(tmp_path: Path) -> None:
    source = made(tmp_path, "opt")
    for seed in (1, 2):
        add_predictors(source, tmp_path / f"{seed}.edge", predictors(seed))
    add_predictors(tmp_path / "1.edge", tmp_path / "again.edge", predictors(2))
    assert digest(tmp_path / "again.edge") == digest(tmp_path / "2.edge") != digest(tmp_path / "1.edge")
    add_predictors(tmp_path / "1.edge", tmp_path / "none.edge", {})
    with PackFile(tmp_path / "none.edge") as file:
        assert "predictor" not in file.metadata and not any(".predictor." in name for name in file.entries)


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_rows_are_those_of_the_model(tmp_path: Path, family: str) -> None:
    dense, by_neuron = made(tmp_path, family), made(tmp_path, family, neurons="on")
    side = "gate" if family == "llama" else "up"
    with PackFile(dense) as one, PackFile(by_neuron) as other:
        rows = gate_rows(other, 1)
        assert rows.shape == (NEURONS, HIDDEN)
        assert np.allclose(rows, values_of(one, f"layers.1.{side}.weight"), atol=1e-3)


def test_refusals_leave_no_file(tmp_path: Path) -> None:
    silu, mixture = tmp_path / "silu.edge", tmp_path / "mixture.edge"
    pack(tiny_hf(tmp_path / "silu", "llama"), silu)
    pack(tiny_hf(tmp_path / "mixture", "mixtral", hidden_act="relu"), mixture)
    out = tmp_path / "out.edge"
    for source in (silu, mixture):
        with pytest.raises(ArgumentError, match="expected a dense ReLU model"):
            add_predictors(source, out, {})
    with pytest.raises(ArgumentError, match="expected another file than the source"):
        add_predictors(silu, tmp_path / "." / "silu.edge", {})
    damaged = made(tmp_path, "llama")
    with PackFile(damaged) as file:
        at = file.entries["layers.1.down.weight"].offset + 5
    data = bytearray(damaged.read_bytes())
    data[at] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CorruptError):
        add_predictors(damaged, out, {})
    assert not out.exists() and not list(tmp_path.glob(".out*"))
