"""Packs with neuron records: what stood in the checkpoint stands in the records; extras come along, checked."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import edge
from flashload import errors, extras, pack_neurons
from flashload.bind import bind
from flashload.checkpoint import open_checkpoint
from flashload.format import PackFile
from flashload.pack import pack
from quant import formats
from quant.formats import WeightFormat
from quant.formats.neuron import decode_column, decode_dot, row_bytes
from tests.tiny import hf_config, hf_tensors, tiny_gguf, tiny_hf

F16, Q8, Q4 = WeightFormat.NEURON_F16, WeightFormat.NEURON_Q8, WeightFormat.NEURON_Q4
RELU = {"hidden_act": "relu"}
HIDDEN, INNER = 64, 96
MATRICES = ("gate", "up", "down")


def relu_hf(path: Path, dtype: str = "F32", **overrides: Any) -> Path:
    return tiny_hf(path, "llama", dtype=dtype, **{**RELU, **overrides})


def source(family: str = "llama", **overrides: Any) -> dict[str, np.ndarray]:
    return hf_tensors(hf_config(family, **overrides))


def parts_of(file: PackFile, layer: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Gates [F, D], and the parts of the records [F, D] each, as f32."""
    gates, records = (file.entries[f"layers.{layer}.neurons.{name}"] for name in ("gates", "records"))
    assert (gates.rows, gates.cols, gates.neuron_parts) == (records.rows, records.cols, 1)
    assert gates.layer == records.layer == layer
    width = row_bytes(gates.format, gates.cols)
    first = np.frombuffer(file.read(gates.name), np.uint8).reshape(gates.rows, width)
    rows = np.frombuffer(file.read(records.name), np.uint8).reshape(records.rows, -1, width)
    decoded = [
        (decode_column if part == rows.shape[1] - 1 else decode_dot)(
            records.format, rows[:, part].copy(), records.cols
        )
        for part in range(rows.shape[1])
    ]
    return decode_dot(gates.format, first, gates.cols), decoded


def rms(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_gated_layers_become_records_of_three(tmp_path: Path, dtype: str) -> None:
    report = pack(relu_hf(tmp_path / "hf", dtype), tmp_path / "m.edge", neurons="on")
    pack(tmp_path / "hf", tmp_path / "plain.edge", neurons="off")
    tensors = source()
    with PackFile(tmp_path / "m.edge") as file, PackFile(tmp_path / "plain.edge") as plain:
        replaced = {f"layers.{i}.{part}.weight" for i in range(2) for part in MATRICES}
        assert plain.entries.keys() - file.entries.keys() == replaced
        for name in file.entries.keys() & plain.entries.keys() - {"metadata.json"}:
            assert file.read(name) == plain.read(name)
        for i in range(2):
            gates, records = parts_of(file, i)
            exact = [tensors[f"model.layers.{i}.mlp.{part}_proj.weight"] for part in MATRICES]
            exact[2] = exact[2].T
            if dtype == "BF16":
                exact = [
                    (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
                    for x in map(np.ascontiguousarray, exact)
                ]
            exact = [x.astype(np.float16).astype(np.float32) for x in exact]
            assert np.array_equal(gates, exact[0])
            assert len(records) == 3
            assert all(np.array_equal(a, b) for a, b in zip(records, exact, strict=True))
            names = list(file.entries)
            assert names.index(f"layers.{i}.neurons.records") == names.index(f"layers.{i}.neurons.gates") + 1
    assert report.neurons is not None
    assert (report.neurons["formats"], report.neurons["layers"]) == (["neuron_f16"], 2)
    assert report.neurons["neurons"] == 2 * INNER
    # The eight bits of BF16 fit those of f16, down to its subnormals.
    assert (report.neurons["down_loss"] == 0) == (dtype != "F32")
    assert report.neurons["row_loss"] < 1e-3 and report.neurons["down_loss"] < 1e-3


def test_layers_without_a_gate_become_records_of_two(tmp_path: Path) -> None:
    pack(tiny_hf(tmp_path / "hf", "opt", dtype="F16"), tmp_path / "m.edge", neurons="on")
    tensors = source("opt")
    with PackFile(tmp_path / "m.edge") as file:
        for i in range(2):
            layer = f"model.decoder.layers.{i}."
            up = tensors[layer + "fc1.weight"].astype(np.float16).astype(np.float32)
            down = tensors[layer + "fc2.weight"].T.astype(np.float16).astype(np.float32)
            gates, records = parts_of(file, i)
            assert np.array_equal(gates, up)
            assert np.array_equal(records[0], up) and np.array_equal(records[1], down)
            bias = np.frombuffer(file.read(f"layers.{i}.up.bias"), np.float32)
            assert np.array_equal(bias, tensors[layer + "fc1.bias"].astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(("weights", "expected", "most"), [("q8", Q8, 0.01), ("q4", Q4, 0.12)])
def test_fewer_bits_are_reported_with_their_loss(
    tmp_path: Path, weights: str, expected: WeightFormat, most: float
) -> None:
    report = pack(relu_hf(tmp_path / "hf", "F16"), tmp_path / "m.edge", weights, neurons="on")
    tensors = source()
    errors_of: list[tuple[np.ndarray, np.ndarray]] = []
    with PackFile(tmp_path / "m.edge") as file:
        for i in range(2):
            assert file.entries[f"layers.{i}.neurons.records"].format is expected
            _, records = parts_of(file, i)
            down = tensors[f"model.layers.{i}.mlp.down_proj.weight"].T.astype(np.float16).astype(np.float32)
            errors_of.append((records[2], down))
    found = rms(*(np.stack(side) for side in zip(*errors_of, strict=True)))
    assert report.neurons is not None
    assert report.neurons["down_loss"] == pytest.approx(found, rel=1e-4)
    assert 0 < found < most and 0 < report.neurons["row_loss"] < most
    (conversion,) = [c for c in report.conversions if c["to"].startswith("neuron")]
    assert (conversion["from"], conversion["weights"]) == ("f16", 6)
    assert conversion["bytes_before"] == 6 * 2 * HIDDEN * INNER
    assert conversion["bytes_after"] == report.neurons["bytes"] == 2 * 4 * INNER * row_bytes(expected, HIDDEN)


@pytest.mark.parametrize(
    ("kind", "expected"), [("q8_0", Q8), ("q4_0", Q4), ("q4_k", Q8), ("q6_k", Q8), ("bf16", F16)]
)
def test_rows_of_quantised_checkpoints(tmp_path: Path, kind: str, expected: WeightFormat) -> None:
    """Rows of the format's own blocks keep their values; down columns are rounded anew."""
    path = tiny_gguf(tmp_path / "m.gguf", "llama", kind, hidden_size=256, intermediate_size=256)
    pack(path, tmp_path / "plain.edge", neurons="off")
    with open_checkpoint(path) as checkpoint, PackFile(tmp_path / "plain.edge") as plain:
        layers = pack_neurons.neuron_layers(bind(checkpoint), "keep", "auto", True, {})
        assert sorted(layers) == [0, 1]
        layer = layers[1]
        assert layer.format is expected
        width = row_bytes(expected, 256)
        records = np.frombuffer(b"".join(layer.records(checkpoint)), np.uint8).reshape(256, 3, width)
        gates = np.frombuffer(b"".join(layer.gates(checkpoint)), np.uint8).reshape(256, width)
        assert np.array_equal(gates, records[:, 0])
        exact = {}
        for part in MATRICES:
            entry = plain.entries[f"layers.1.{part}.weight"]
            exact[part] = formats.decode(entry.format, plain.read(entry.name), 256, 256)
    native = kind in ("q8_0", "q4_0")
    for n, part in enumerate(("gate", "up")):
        found = decode_dot(expected, records[:, n].copy(), 256)
        assert rms(found, exact[part]) < 0.01
        assert np.array_equal(found, exact[part]) or not native
    assert (layer.row_loss.size == 0) == native
    down = rms(decode_column(expected, records[:, 2].copy(), 256), exact["down"].T)
    assert down < (0.12 if expected is Q4 else 0.01)
    assert layer.down_loss.relative_rms == pytest.approx(down, rel=1e-3)


@pytest.mark.parametrize(
    ("types", "weights", "expected"),
    [
        ([0, 1], "keep", F16),
        ([8, 8, 8], "keep", Q8),
        ([2, 2, 2], "keep", Q4),
        ([2, 2, 14], "keep", Q8),
        ([12, 12, 14], "keep", Q8),
        ([2, 2, 1], "keep", F16),
        ([30, 30, 30], "q8", Q8),
        ([2, 2, 2], "q8", Q4),
        ([12, 2, 2], "q8", Q8),
        ([8, 1, 14], "q4", Q4),
    ],
)
def test_format_of_the_records(types: list[int], weights: str, expected: WeightFormat) -> None:
    assert pack_neurons.neuron_format(types, weights) is expected


@pytest.mark.parametrize("ordered", [False, True])
def test_small_steps_and_many_sweeps_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    relu_hf(tmp_path / "hf", "BF16")
    order = order_file(tmp_path, {0: 5, 1: 6}) if ordered else None
    pack(tmp_path / "hf", tmp_path / "a.edge", "q8", neurons="on", neuron_order=order)
    monkeypatch.setattr(pack_neurons, "BLOCK_BYTES", 4 * HIDDEN * 40)
    monkeypatch.setattr(pack_neurons, "STEP_BYTES", 4 * HIDDEN * 7)
    pack(tmp_path / "hf", tmp_path / "b.edge", "q8", neurons="on", neuron_order=order)
    assert (tmp_path / "a.edge").read_bytes() == (tmp_path / "b.edge").read_bytes()


@pytest.mark.parametrize("weights", ["keep", "q8", "q4"])
def test_the_oracle_packs_the_same_without_the_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    relu_hf(tmp_path / "hf", "F16")
    pack(tmp_path / "hf", tmp_path / "a.edge", weights, neurons="on")
    monkeypatch.setattr(pack_neurons, "_EDGE", None)
    pack(tmp_path / "hf", tmp_path / "b.edge", weights, neurons="on")
    assert (tmp_path / "a.edge").read_bytes() == (tmp_path / "b.edge").read_bytes()


# Orders


def shuffled(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(INNER)


def order_file(folder: Path, seeds: dict[int, int]) -> Path:
    path = folder / "order.npz"
    np.savez(path, **{f"layers.{i}.neuron_order": shuffled(seed) for i, seed in seeds.items()})
    return path


def test_an_order_moves_gates_records_and_biases_alike(tmp_path: Path) -> None:
    tiny_hf(tmp_path / "hf", "opt")
    pack(tmp_path / "hf", tmp_path / "a.edge", neurons="on")
    order = order_file(tmp_path, {1: 3})
    report = pack(tmp_path / "hf", tmp_path / "b.edge", neurons="on", neuron_order=order)
    assert report.neurons is not None and report.neurons["ordered"]
    with PackFile(tmp_path / "a.edge") as a, PackFile(tmp_path / "b.edge") as b:
        for name in a.entries:
            if not name.startswith(("layers.1.neurons.", "layers.1.up.bias")):
                assert a.read(name) == b.read(name)
        gates_a, records_a = parts_of(a, 1)
        gates_b, records_b = parts_of(b, 1)
        assert np.array_equal(gates_b, gates_a[shuffled(3)])
        for x, y in zip(records_a, records_b, strict=True):
            assert np.array_equal(y, x[shuffled(3)])
        bias = [np.frombuffer(file.read("layers.1.up.bias"), np.float32) for file in (a, b)]
        assert np.array_equal(bias[1], bias[0][shuffled(3)])


BAD_ORDERS = [
    {"layers.0.neuron_order": np.zeros(INNER, np.int64)},
    {"layers.0.neuron_order": np.arange(INNER - 1)},
    {"layers.0.neuron_order": np.arange(INNER).astype(np.float32)},
    {"layers.0.neuron_order": np.arange(INNER).reshape(2, -1)},
    {"layers.2.neuron_order": np.arange(INNER)},
    {"layers.x.neuron_order": np.arange(INNER)},
    {"order": np.arange(INNER)},
    {"layers.0.neuron_order": np.array([{}] * INNER)},
]


@pytest.mark.parametrize("arrays", BAD_ORDERS)
def test_orders_that_are_none_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    relu_hf(tmp_path / "hf")
    np.savez(tmp_path / "order.npz", **arrays)
    with pytest.raises(errors.ModelFileError, match="order"):
        pack(tmp_path / "hf", tmp_path / "m.edge", neurons="on", neuron_order=tmp_path / "order.npz")


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 no archive", b"not numpy at all", None])
def test_order_files_of_other_kinds_are_refused(tmp_path: Path, data: bytes | None) -> None:
    relu_hf(tmp_path / "hf")
    if data is not None:
        (tmp_path / "order.npz").write_bytes(data)
    with pytest.raises(errors.EdgeError, match=r"order\.npz"):
        pack(tmp_path / "hf", tmp_path / "m.edge", neurons="on", neuron_order=tmp_path / "order.npz")


def test_an_order_without_records_is_refused(tmp_path: Path) -> None:
    relu_hf(tmp_path / "hf")
    with pytest.raises(errors.ArgumentError, match="neuron_order"):
        pack(tmp_path / "hf", tmp_path / "m.edge", neuron_order=order_file(tmp_path, {0: 1}))


# Extras


def write_extra(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file of f32, f16 and i32 arrays."""
    names = {"float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64"}
    header, data = {}, b""
    for name, values in tensors.items():
        begin, data = len(data), data + values.tobytes()
        header[name] = {
            "dtype": names[str(values.dtype)],
            "shape": list(values.shape),
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def predictor_tensors(ranks: tuple[int, ...] = (32, 64), hidden: int = HIDDEN) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(9)
    out: dict[str, np.ndarray] = {}
    for i, rank in enumerate(ranks):
        prefix = f"layers.{i}.predictor."
        out[prefix + "down.weight"] = rng.normal(size=(rank, hidden)).astype(np.float32)
        out[prefix + "up.weight"] = rng.normal(size=(INNER, rank)).astype(np.float32)
        out[prefix + "bias"] = rng.normal(size=INNER).astype(np.float32)
    return out


def medusa_tensors(n_heads: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    shapes = {"weight": (HIDDEN, HIDDEN), "bias": (HIDDEN,)}
    return {
        f"medusa.{k}.{part}": rng.normal(size=shape).astype(np.float32)
        for k in range(n_heads)
        for part, shape in shapes.items()
    }


def with_extras(
    path: Path, predictor: dict[str, np.ndarray] | None, medusa: dict[str, np.ndarray] | None
) -> None:
    if predictor is not None:
        write_extra(path / extras.PREDICTOR_FILE, predictor)
    if medusa is not None:
        write_extra(path / extras.MEDUSA_FILE, medusa)


def values_of(file: PackFile, name: str) -> np.ndarray:
    entry = file.entries[name]
    if entry.format is WeightFormat.F32_VECTOR:
        return np.frombuffer(file.read(name), np.float32)
    return formats.decode(entry.format, file.read(name), entry.rows, entry.cols)


def test_predictors_turn_records_on_and_come_along(tmp_path: Path) -> None:
    with_extras(relu_hf(tmp_path / "hf"), predictor_tensors(), medusa_tensors())
    report = pack(tmp_path / "hf", tmp_path / "m.edge")
    assert report.neurons is not None and report.ignored == []
    with PackFile(tmp_path / "m.edge") as file:
        assert "layers.0.neurons.records" in file.entries and "layers.0.up.weight" not in file.entries
        assert file.metadata["predictor"] == {"rank": [32, 64]}
        assert file.metadata["medusa"] == {"heads": 2}
        for name, values in (predictor_tensors() | medusa_tensors()).items():
            entry = file.entries[name]
            expected = WeightFormat.F32_VECTOR if values.ndim == 1 else WeightFormat.Q8_0
            assert entry.format is expected
            assert entry.layer == (int(name.split(".")[1]) if name.startswith("layers") else -1)
            assert rms(values_of(file, name), values) < 0.01
        assert list(file.entries)[-1] == "medusa.1.bias"


def test_off_leaves_predictors_out(tmp_path: Path) -> None:
    with_extras(relu_hf(tmp_path / "hf"), predictor_tensors(), None)
    report = pack(tmp_path / "hf", tmp_path / "m.edge", neurons="off")
    assert report.neurons is None
    assert report.ignored == sorted(f"{extras.PREDICTOR_FILE}:{name}" for name in predictor_tensors())
    with PackFile(tmp_path / "m.edge") as file:
        assert not [name for name in file.entries if "neurons" in name or "predictor" in name]
        assert "predictor" not in file.metadata


@pytest.mark.parametrize("by_file", [False, True])
def test_predictors_follow_the_order_of_their_neurons(tmp_path: Path, by_file: bool) -> None:
    tensors = predictor_tensors()
    with_extras(relu_hf(tmp_path / "hf"), tensors, None)
    pack(tmp_path / "hf", tmp_path / "a.edge")
    tensors["layers.0.neuron_order"] = shuffled(3 if by_file else 4).astype(np.int32)
    with_extras(tmp_path / "hf", tensors, None)
    named = order_file(tmp_path, {0: 4}) if by_file else None
    report = pack(tmp_path / "hf", tmp_path / "b.edge", neuron_order=named)
    assert report.ignored == []
    with PackFile(tmp_path / "a.edge") as a, PackFile(tmp_path / "b.edge") as b:
        for name in ("layers.0.predictor.up.weight", "layers.0.predictor.bias"):
            assert np.array_equal(values_of(b, name), values_of(a, name)[shuffled(4)])
        assert np.array_equal(parts_of(b, 0)[0], parts_of(a, 0)[0][shuffled(4)])
        same = ("layers.0.predictor.down.weight", "layers.1.predictor.up.weight", "layers.1.neurons.records")
        assert all(a.read(name) == b.read(name) for name in same)


def test_odd_widths_stay_float(tmp_path: Path) -> None:
    config = {"hidden_size": 72, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 36}
    with_extras(relu_hf(tmp_path / "hf", **config), predictor_tensors(hidden=72), None)
    pack(tmp_path / "hf", tmp_path / "m.edge")
    with PackFile(tmp_path / "m.edge") as file:
        assert file.entries["layers.0.predictor.down.weight"].format is WeightFormat.F16
        assert file.entries["layers.0.predictor.up.weight"].format is WeightFormat.Q8_0
        assert file.entries["layers.0.neurons.records"].cols == 72


def bent(name: str, values: np.ndarray | None) -> dict[str, np.ndarray]:
    tensors = predictor_tensors()
    del tensors[name]
    return tensors if values is None else tensors | {name: values}


F32 = np.float32
BAD_PREDICTORS = [
    bent("layers.1.predictor.down.weight", None),
    bent("layers.1.predictor.bias", None),
    bent("layers.0.predictor.down.weight", np.zeros((32, HIDDEN + 1), F32)),
    bent("layers.0.predictor.down.weight", np.zeros((33, HIDDEN), F32)),
    bent("layers.0.predictor.down.weight", np.zeros((64, HIDDEN), F32)),
    bent("layers.0.predictor.up.weight", np.zeros((INNER - 1, 32), F32)),
    bent("layers.0.predictor.up.weight", np.zeros((INNER, 32), np.int32)),
    bent("layers.0.predictor.bias", np.zeros((INNER, 1), F32)),
    bent("layers.0.predictor.bias", np.full(INNER, 1, F32))
    | {"layers.0.neuron_order": np.zeros(INNER, np.int32)},
    predictor_tensors() | {"layers.0.neuron_order": np.arange(INNER, dtype=np.int64)},
]


@pytest.mark.parametrize("tensors", BAD_PREDICTORS)
def test_predictors_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    with_extras(relu_hf(tmp_path / "hf"), tensors, None)
    with pytest.raises(errors.ModelFileError, match=extras.PREDICTOR_FILE):
        pack(tmp_path / "hf", tmp_path / "m.edge")
    assert not (tmp_path / "m.edge").exists()


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"medusa.0.weight": np.zeros((HIDDEN, HIDDEN), F32)},
        {"medusa.1.weight": np.zeros((HIDDEN, HIDDEN), F32), "medusa.1.bias": np.zeros(HIDDEN, F32)},
        medusa_tensors() | {"medusa.0.weight": np.zeros((HIDDEN, 2 * HIDDEN), F32)},
        medusa_tensors() | {"medusa.1.bias": np.zeros(HIDDEN, np.int32)},
    ],
)
def test_heads_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    with_extras(tiny_hf(tmp_path / "hf"), None, tensors)
    with pytest.raises(errors.ModelFileError, match=extras.MEDUSA_FILE):
        pack(tmp_path / "hf", tmp_path / "m.edge")


def test_malformed_extras_are_refused(tmp_path: Path) -> None:
    relu_hf(tmp_path / "hf")
    for name in (extras.PREDICTOR_FILE, extras.MEDUSA_FILE):
        (tmp_path / "hf" / name).write_bytes(b"\xff" * 64)
        with pytest.raises(errors.ModelFileError, match=name):
            pack(tmp_path / "hf", tmp_path / "m.edge")
        (tmp_path / "hf" / name).unlink()


def test_predictors_beside_a_model_without_relu_are_refused(tmp_path: Path) -> None:
    with_extras(tiny_hf(tmp_path / "hf"), predictor_tensors(), None)
    with pytest.raises(errors.UnsupportedModelError, match="ReLU"):
        pack(tmp_path / "hf", tmp_path / "m.edge")


def test_records_of_a_model_without_dense_layers_are_refused(tmp_path: Path) -> None:
    tiny_hf(tmp_path / "hf", "olmoe", hidden_act="relu")
    for neurons in ("on", "yes"):
        with pytest.raises(errors.ArgumentError, match="neurons"):
            pack(tmp_path / "hf", tmp_path / "m.edge", neurons=neurons)


def test_mixtures_keep_their_experts(tmp_path: Path) -> None:
    """A dense layer between sparse ones becomes records, experts stay as they are."""
    tiny_hf(tmp_path / "hf", "qwen3_moe", hidden_act="relu", mlp_only_layers=[0])
    pack(tmp_path / "hf", tmp_path / "m.edge", neurons="on")
    with PackFile(tmp_path / "m.edge") as file:
        assert {n for n in file.entries if "neurons" in n} == {
            "layers.0.neurons.gates",
            "layers.0.neurons.records",
        }
        assert "layers.1.experts.3.down.weight" in file.entries


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e6])
@pytest.mark.parametrize("name", ["down_proj", "up_proj"])
def test_values_beyond_the_format_are_refused(tmp_path: Path, name: str, value: float) -> None:
    relu_hf(tmp_path / "hf")
    data = bytearray((tmp_path / "hf" / "model.safetensors").read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin = header[f"model.layers.1.mlp.{name}.weight"]["data_offsets"][0]
    at = 8 + int.from_bytes(data[:8], "little") + begin + 40
    data[at : at + 4] = np.float32(value).tobytes()
    (tmp_path / "hf" / "model.safetensors").write_bytes(data)
    with pytest.raises(errors.ModelFileError, match=f"{name}.*finite"):
        pack(tmp_path / "hf", tmp_path / "m.edge", neurons="on")
    assert not (tmp_path / "m.edge").exists()


def test_heads_beside_a_model_change_no_token(tmp_path: Path) -> None:
    tiny_hf(tmp_path / "hf")
    pack(tmp_path / "hf", tmp_path / "a.edge")
    with_extras(tmp_path / "hf", None, medusa_tensors())
    pack(tmp_path / "hf", tmp_path / "b.edge")
    texts = []
    for name in ("a.edge", "b.edge"):
        with edge.load(str(tmp_path / name), context=64, threads=1) as engine:
            texts.append(engine.generate("a cat", max_tokens=12, temperature=0.0).tokens)
    assert texts[0] == texts[1]


def test_the_command_line(tmp_path: Path) -> None:
    from edge.cli import cli as main

    with_extras(relu_hf(tmp_path / "hf"), predictor_tensors(), medusa_tensors())
    out = str(tmp_path / "m.edge")
    order = str(order_file(tmp_path, {0: 1}))
    args = ["pack", str(tmp_path / "hf"), out, "--weights", "q8", "--neurons", "on", "--neuron-order", order]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    assert "neurons: 192 in 2 layers" in done.output and "down columns" in done.output
    shown = CliRunner().invoke(main, ["show", out, "--weights"]).output
    assert "predictor: rank [32, 64]" in shown and "medusa: heads 2" in shown
    assert "layers.1.neurons.records" in shown and "medusa.1.bias" in shown
    report = json.loads(CliRunner().invoke(main, [*args, "--json"]).output)
    assert report["neurons"]["formats"] == ["neuron_q8"]


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path: Path) -> None:
    """One layer of OPT-6.7B (4096 wide, 16384 neurons), whose down matrix alone is 128 MiB of f16."""
    hidden, inner, vocab = 4096, 16384, 320
    config = hf_config("opt", hidden_size=hidden, ffn_dim=inner, num_hidden_layers=1, num_attention_heads=32)
    tiny_hf(tmp_path / "hf", "opt")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    shapes = {name: list(x.shape) for name, x in source("opt").items() if ".layers.1." not in name}
    sizes = {HIDDEN: hidden, INNER: inner, 320: vocab}
    header, end = {}, 0
    for name, shape in shapes.items():
        shape = [sizes.get(size, size) for size in shape]
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + 2 * int(np.prod(shape))]}
        end = header[name]["data_offsets"][1]
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with open(tmp_path / "hf" / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        piece = rng.normal(0, 0.02, 1 << 20).astype(np.float16).tobytes()
        for at in range(0, end, len(piece)):
            file.write(piece[: min(len(piece), end - at)])
    order = tmp_path / "order.npz"
    np.savez(order, **{"layers.0.neuron_order": rng.permutation(inner)})
    program = """
        import resource, sys
        from flashload.pack import pack
        pack(sys.argv[1], sys.argv[2], "q8", neurons="on", neuron_order=sys.argv[3])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "hf"), str(tmp_path / "m.edge")]
    done = subprocess.run([*command, str(order)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 1 << 30
