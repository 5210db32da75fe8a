"""The cost model: directories from headers, predictions that follow the machine, curves that only rise."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashload.bind import bind
from flashload.calibrate import LayerCost
from flashload.curve import Curve
from flashload.errors import ArgumentError, EdgeError, ModelFileError, UnsupportedModelError
from flashload.estimate import CostModel, Prediction, expected_hit_rate, prompt_hit_rate
from flashload.estimate_neurons import NeuronCost, reads_of
from flashload.expert_policy import ExpertPolicy, Trace, simulate
from flashload.format import PackFile
from flashload.neuron_use import NeuronUse
from flashload.pack import _plan, pack
from flashload.pack_neurons import neuron_layers
from flashload.plan import Plan, make_plan, weights_of
from flashload.probe import DriveRate, Machine
from flashload.virtual_pack import ConfigCheckpoint, Outline, VirtualPack, _entries, outline
from tests.tiny import FAMILIES, hf_config, hf_tensors, tiny_gguf, tiny_hf, tiny_llama_gguf, write_safetensors

KERNELS = {code: {1: 1e11, 8: 3e11, 128: 5e11} for code in range(7)}
LAYER = LayerCost(2e-5, 1e-5, 1e-9, 4e-11, 2e-11)
DRIVE = DriveRate(20e-6, 2e9, 1.8e9, 100e-6, 5e-11)
MACHINE = Machine("2026-11-21T00:00:00+00:00", "cpu", 2, 2, "ref", 2e10, KERNELS, LAYER, DRIVE)


def machine(**changes: Any) -> Machine:
    return dataclasses.replace(MACHINE, **changes)


def directory(model: Outline, option: str = "keep") -> list[tuple[Any, ...]]:
    entries = model.packs[option].entries.values()
    return [(e.name, e.format, e.rows, e.cols, e.bytes, e.chunk_bytes, e.layer, e.expert) for e in entries]


def packed(source: Path, option: str) -> list[tuple[Any, ...]]:
    made = source.parent / f"{source.name}-{option}.edge"
    pack(source, made, weights=option)
    rows = directory(outline(made))
    return [row for row in rows if row[1] != 101]


# -- virtual packs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["keep", "q8", "q4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_outline_of_a_folder_is_the_pack_it_becomes(family: str, option: str, tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / family, family, dtype="BF16")
    assert directory(outline(folder), option) == packed(folder, option)


@pytest.mark.parametrize("option", ["keep", "q8", "q4"])
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k", "q5_0", "q6_k"])
def test_the_outline_of_a_gguf_is_the_pack_it_becomes(kind: str, option: str, tmp_path: Path) -> None:
    file = tiny_llama_gguf(tmp_path / "tiny.gguf", type=kind)
    assert directory(outline(file), option) == packed(file, option)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_and_an_index_are_enough(family: str, tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "whole", family, dtype="BF16", torch_dtype="bfloat16")
    bare = config_only(folder, tmp_path / "bare")
    found = outline(bare)
    assert found.kind == "config" and found.notes == [] and found.largest_file is None
    assert directory(found) == directory(outline(folder))
    assert directory(outline(bare / "config.json")) == directory(found)
    assert directory(outline(bare / "model.safetensors.index.json")) == directory(found)


def config_only(folder: Path, bare: Path, total: bool = True) -> Path:
    config = json.loads((folder / "config.json").read_text())
    tensors = hf_tensors(config)
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    if total:
        index["metadata"] = {"total_size": 2 * sum(t.size for t in tensors.values())}
    (bare / "model.safetensors.index.json").write_text(json.dumps(index))
    return bare


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt", "qwen2"])
def test_a_configuration_alone_says_what_it_assumes(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(family, torch_dtype="float16")))
    found = outline(tmp_path)
    assert any("no index" in note for note in found.notes)
    whole = outline(tiny_hf(tmp_path / "whole", family, dtype="F16"))
    assert set(found.packs["keep"].entries) >= {
        n for n in whole.packs["keep"].entries if n.endswith("weight")
    }


@pytest.mark.parametrize(
    ("said", "total", "bytes_per_value"), [("float32", 2, 2), ("bfloat16", 4, 4), (None, 2, 2)]
)
def test_the_index_knows_the_width_better(
    said: str | None, total: int, bytes_per_value: int, tmp_path: Path
) -> None:
    folder = tiny_hf(tmp_path / "whole", "llama")
    bare = config_only(folder, tmp_path / "bare")
    config = json.loads((bare / "config.json").read_text()) | {"torch_dtype": said}
    (bare / "config.json").write_text(json.dumps(config))
    index = json.loads((bare / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] = index["metadata"]["total_size"] // 2 * total
    (bare / "model.safetensors.index.json").write_text(json.dumps(index))
    entry = outline(bare).packs["keep"].entries["layers.0.q.weight"]
    assert entry.bytes == entry.rows * entry.cols * bytes_per_value


def test_a_missing_tensor_in_the_index_is_named(tmp_path: Path) -> None:
    bare = config_only(tiny_hf(tmp_path / "whole", "llama"), tmp_path / "bare")
    index = json.loads((bare / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (bare / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match=r"layers\.1\.up\.weight"):
        outline(bare)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("config.json", "{", ModelFileError),
        ("config.json", '{"architectures": ["NoSuchModel"]}', UnsupportedModelError),
        ("config.json", json.dumps(hf_config("llama", quantization_config={"quant_method": "gptq"})),
         UnsupportedModelError),
        ("config.json", json.dumps(hf_config("llama", hidden_size=-4)), ModelFileError),
        ("model.safetensors.index.json", '{"weight_map": 3}', EdgeError),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../../x.safetensors"}}', EdgeError),
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}, "metadata": {"total_size": -1}}', EdgeError),
    ],
)  # fmt: skip
def test_damaged_headers_are_told_in_one_line(
    name: str, text: str, error: type[EdgeError], tmp_path: Path
) -> None:
    bare = config_only(tiny_hf(tmp_path / "whole", "llama"), tmp_path / "bare")
    (bare / name).write_text(text)
    with pytest.raises(error) as refusal:
        outline(bare)
    assert "\n" not in str(refusal.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no such file"):
        outline(tmp_path / "absent")


# -- predictions ---------------------------------------------------------------------------------------------


class Case:
    """A model of some size, planned and predicted at will."""

    def __init__(self, source: Path | VirtualPack, on: Machine = MACHINE, **more: Any) -> None:
        made = outline(source).packs["keep"] if isinstance(source, Path) else source
        self.decoder = made.config.to_json()
        self.weights = weights_of(made)  # type: ignore[arg-type]
        self.model = CostModel(self.weights, self.decoder, on, **more)

    def plan(self, memory_bytes: int, context: int = 64) -> Plan:
        return make_plan(
            self.weights,
            self.decoder,
            memory_bytes=memory_bytes,
            context=context,
            threads=2,
            host_bytes=8 << 20,
        )

    def predict(self, memory_bytes: int, context: int = 64, **more: Any) -> Prediction:
        return self.model.predict(self.plan(memory_bytes, context), **more)

    def curve(self) -> Curve:
        return Curve("keep", self.plan, self.model, weight_bytes=1, bits_per_weight=4.0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packs in header only: shapes large enough that weights outweigh all else."""
    folder = tmp_path_factory.mktemp("estimate")
    wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 8000}
    configs = {
        "dense": hf_config("llama", **wide),
        "tied": hf_config("llama", **wide | {"tie_word_embeddings": True}),
        "moe": hf_config("mixtral", **wide | {"num_hidden_layers": 4, "num_local_experts": 8}),
        "opt": hf_config("opt", hidden_size=1024, ffn_dim=4096, num_hidden_layers=6, vocab_size=8000),
    }
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    return {name: folder / name for name in configs}


MODELS = ("dense", "tied", "moe", "opt")
EVERYTHING = 1 << 40


@pytest.fixture(scope="module")
def case(sources: dict[str, Path]) -> Callable[..., Case]:
    return lambda name, **changes: Case(sources[name], machine(**changes))


def test_resident_decode_is_the_bus(case: Callable[..., Case]) -> None:
    one = case("dense", bus_bytes_per_second=1e9)
    found = one.predict(EVERYTHING, position=0)
    read = sum(w.stored_bytes for w in one.weights if w.format != 100 and w.name != "embed.weight")
    assert found.bound == "memory" and found.flash_bytes_per_token == 0 and found.expert_hit_rate is None
    assert 1 / found.tokens_per_second == pytest.approx(read / 1e9, rel=0.01)


def test_slow_kernels_count_where_they_are_slower_than_the_bus(case: Callable[..., Case]) -> None:
    slow = {code: {1: 1e9, 8: 1e9, 128: 1e9} for code in range(7)}
    assert case("dense", kernels=slow).predict(EVERYTHING).tokens_per_second < (
        0.2 * case("dense").predict(EVERYTHING).tokens_per_second
    )


def test_streamed_decode_is_the_drive(case: Callable[..., Case]) -> None:
    slow = DriveRate(0.0, 1e8, 1e8, 1e-4, 0.0)
    one = case("dense", drive=slow)
    plan = one.plan(80 << 20)
    assert plan.placement == "stream"
    found = one.model.predict(plan)
    assert found.bound == "drive" and found.flash_bytes_per_token >= plan.stream_bytes
    assert 1 / found.tokens_per_second == pytest.approx(plan.stream_bytes / 1e8, rel=0.05)


def test_a_faster_drive_never_hurts(case: Callable[..., Case]) -> None:
    for name in MODELS:
        curve = case(name).curve()
        for share in (0.1, 0.6):
            memory = int(curve.floor_bytes + share * (curve.resident_bytes - curve.floor_bytes))
            rates = [
                case(name, drive=DriveRate(2e-5, rate, rate, 1e-4, 5e-11)).predict(memory)
                for rate in (2.5e8, 5e8, 1e9)
            ]
            assert rates[0].tokens_per_second < rates[1].tokens_per_second < rates[2].tokens_per_second
            waits = [r.time_to_first_token_seconds for r in rates]
            assert waits == sorted(waits, reverse=True)


def test_longer_texts_are_slower(case: Callable[..., Case]) -> None:
    one = case("dense")
    speeds = [one.predict(EVERYTHING, 4096, position=p).tokens_per_second for p in (0, 1000, 4000)]
    assert speeds == sorted(speeds, reverse=True) and speeds[0] > speeds[-1]


def test_a_window_bounds_what_a_token_sees(sources: dict[str, Path]) -> None:
    one = Case(sources["dense"])
    one.decoder["windows"] = [16] * 8
    near, far = (one.predict(EVERYTHING, 4096, position=p).tokens_per_second for p in (16, 4000))
    assert near == pytest.approx(far)


def test_a_prompt_streams_once_per_chunk(case: Callable[..., Case]) -> None:
    one = case("dense", drive=DriveRate(0.0, 1e8, 1e8, 1e-4, 0.0))
    plan = one.plan(90 << 20, 1024)
    waits = [
        one.model.predict(plan, prompt_tokens=n * plan.max_rows).time_to_first_token_seconds
        for n in (1, 2, 4)
    ]
    # Besides the stream, each row of the embedding is one small read.
    each = plan.stream_bytes / 1e8 + plan.max_rows * (1e-4 + (64 << 10) / 1e8)
    assert waits[1] - waits[0] == pytest.approx(each, rel=0.02)
    assert waits[2] - waits[0] == pytest.approx(3 * each, rel=0.02)


def test_a_prompt_pays_for_every_row_and_decode_does_not(case: Callable[..., Case]) -> None:
    layer = dataclasses.replace(LAYER, value_seconds=1e-9)
    for name in ("dense", "moe"):
        plain, small = case(name), case(name, layer=layer)
        plan = plain.plan(EVERYTHING, 512)
        one, two, four = (
            small.model.predict(plan, prompt_tokens=n).time_to_first_token_seconds
            - plain.model.predict(plan, prompt_tokens=n).time_to_first_token_seconds
            for n in (32, 64, 128)
        )
        assert one > 0 and (two, four) == (pytest.approx(2 * one), pytest.approx(4 * one))
        told = plain.model.predict(plan).tokens_per_second, small.model.predict(plan).tokens_per_second
        assert told[0] == told[1]


def test_a_prompt_finds_the_experts_that_loading_read(case: Callable[..., Case]) -> None:
    one = case("moe", drive=DriveRate(0.0, 1e8, 1e8, 1e-4, 0.0))
    plan = one.plan(250 << 20, 512)
    experts = sum(w.stored_bytes for w in one.weights if w.expert >= 0)
    decoder = one.decoder
    n_layers, n_experts = decoder["n_layers"], decoder["n_experts"]
    assert plan.placement == "experts" and 0 < plan.expert_slots < n_layers * n_experts
    waits = [
        one.model.predict(plan, prompt_tokens=n * plan.max_rows).time_to_first_token_seconds
        for n in (1, 2, 3)
    ]
    hit = prompt_hit_rate(plan.expert_slots, n_layers, n_experts, n_experts)
    for more in (waits[0], waits[1] - waits[0], waits[2] - waits[1]):
        assert more == pytest.approx((1 - hit) * experts / 1e8, rel=0.1)


def test_memory_that_is_new_is_paid_for_once(case: Callable[..., Case]) -> None:
    slow, fast = case("dense", touch_seconds_per_byte=1e-9), case("dense", touch_seconds_per_byte=0.0)
    plan = slow.plan(EVERYTHING, 512)
    more = [
        slow.model.predict(plan, prompt_tokens=n).time_to_first_token_seconds
        - fast.model.predict(plan, prompt_tokens=n).time_to_first_token_seconds
        for n in (128, 256)
    ]
    assert more[0] == pytest.approx(1e-9 * plan.kv_bytes / 4)
    assert more[1] - more[0] == pytest.approx(1e-9 * plan.kv_bytes / 4)


def test_the_prompt_is_no_longer_than_the_context(case: Callable[..., Case]) -> None:
    found = case("dense").predict(EVERYTHING, 64)
    assert found.prompt_tokens == 63


def test_experts_missed_are_read(case: Callable[..., Case]) -> None:
    one = case("moe")
    full, half = one.predict(EVERYTHING), one.predict(250 << 20)
    assert one.plan(250 << 20).placement == "experts"
    assert full.expert_hit_rate == 1.0 and full.flash_bytes_per_token == 0
    assert half.expert_hit_rate is not None and 0 < half.expert_hit_rate < 1
    expert = sum(w.stored_bytes for w in one.weights if w.expert >= 0) / (4 * 8)
    missed = 4 * 2 * (1 - half.expert_hit_rate) * expert
    # And guesses for the three layers behind another, a quarter of them wrong.
    wrong = 3 * 0.25 * (1 - half.expert_hit_rate) * expert
    assert half.flash_bytes_per_token == pytest.approx(missed + wrong, rel=0.02)


def test_entries_a_plain_run_does_not_read_cost_nothing(case: Callable[..., Case]) -> None:
    one = case("dense")
    head = next(w for w in one.weights if w.name == "head.weight")
    extra = [dataclasses.replace(head, id=len(one.weights) + i, name=name)
             for i, name in enumerate(("medusa.0.weight", "layers.0.predictor.up.weight"))]  # fmt: skip
    plan = one.plan(EVERYTHING)
    more = CostModel([*one.weights, *extra], one.decoder, MACHINE).predict(plan)
    assert more == one.model.predict(plan)


# -- layers by neuron --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "opt"])
def by_neuron(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VirtualPack:
    """A ReLU model whose feed-forward layers are records, in header only."""
    folder = tmp_path_factory.mktemp("neurons")
    inner = {"ffn_dim": 4096} if request.param == "opt" else {"intermediate_size": 4096, "hidden_act": "relu"}
    config = hf_config(request.param, hidden_size=1024, num_hidden_layers=6, vocab_size=4000, **inner)
    (folder / "config.json").write_text(json.dumps(config))
    with ConfigCheckpoint(folder) as checkpoint:
        bound = bind(checkpoint)
        layers = neuron_layers(bound, "q4", "on", False, {})
        steps = _plan(checkpoint, bound, "q4", layers)
        entries = _entries((step.slot, step.format, step.neuron_parts) for step in steps)
    return VirtualPack(folder, bound.config, entries)


def test_idle_neurons_are_not_read(by_neuron: VirtualPack) -> None:
    dense, tenth, few = (Case(by_neuron, use=NeuronUse(a)).predict(EVERYTHING) for a in (1.0, 0.1, 0.01))
    assert dense.tokens_per_second < tenth.tokens_per_second < few.tokens_per_second
    assert dense.flash_bytes_per_token == 0


def test_missing_records_are_read(by_neuron: VirtualPack) -> None:
    one = Case(by_neuron, use=NeuronUse(0.1))
    curve = one.curve()
    budget = (curve.floor_bytes + curve.resident_bytes) // 2
    plan = one.plan(budget)
    assert plan.placement == "neurons"
    found = one.model.predict(plan)
    records = [w for w in one.weights if w.name.endswith(".records")]
    held = sum(plan.slab_bytes) / sum(w.rows * w.chunk_bytes for w in records)
    n_bytes = sum(w.rows * w.chunk_bytes for w in records)
    missing = NeuronUse(0.1).wanted_share(plan.neuron_mode, 1, held)
    assert missing * n_bytes <= found.flash_bytes_per_token - plan.stream_bytes <= n_bytes
    assert found.tokens_per_second < curve.resident_tokens_per_second
    idler = Case(by_neuron, use=NeuronUse(0.01)).model.predict(plan)
    assert idler.flash_bytes_per_token < found.flash_bytes_per_token
    assert idler.tokens_per_second > found.tokens_per_second


@given(st.integers(1000, 20000), st.integers(200, 40000), st.floats(1e-4, 1.0))
def test_reads_of_records_are_what_is_missing_and_a_little_around(n: int, size: int, missing: float) -> None:
    n_bytes, requests = reads_of(n, size, missing)
    assert missing * n * size <= n_bytes * (1 + 1e-9) and n_bytes <= n * size
    assert 1 <= requests <= max(1.0, missing * n) + n * size / max(size, (252 << 10) - size)


def test_reads_of_records_as_the_window_joins_them() -> None:
    """Against records drawn at random and joined by the window's rule."""
    n, gap = 40_000, 16 << 10
    for missing, size in itertools.product((0.01, 0.1, 0.5), (4608, 1296)):
        wanted = np.flatnonzero(np.random.default_rng(0).random(n) < missing)
        begin, end = wanted * size // 512 * 512, -(-(wanted + 1) * size // 512) * 512
        breaks = np.flatnonzero(wanted[1:] * size > end[:-1] + gap)
        firsts, lasts = np.append(0, breaks + 1), np.append(breaks, len(wanted) - 1)
        n_bytes, requests = reads_of(n, size, len(wanted) / n)
        assert n_bytes == pytest.approx((end[lasts] - begin[firsts]).sum(), rel=0.15)
        longest = np.maximum(1, (end[lasts] - begin[firsts]) / (256 << 10)).sum()
        assert requests == pytest.approx(longest, rel=0.3)


def test_what_streams_leaves_room_to_read_neurons(by_neuron: VirtualPack) -> None:
    """Where even attention streams there is staging for many records at a time, except at the floor."""
    one = Case(by_neuron)
    floor = one.curve().floor_bytes
    at_floor, above = one.plan(floor), one.plan(floor + (8 << 20))
    assert at_floor.stream_order and above.stream_order
    assert above.neuron_staging_bytes >= 2 * at_floor.neuron_staging_bytes > 0


def test_a_prompt_reads_no_more_than_there_is(by_neuron: VirtualPack) -> None:
    """Where most neurons are wanted, a block of rows reads the layer in order."""
    one = Case(by_neuron, use=NeuronUse(0.5))
    plan = one.plan(one.curve().floor_bytes + (1 << 20))
    records = [w for w in one.weights if w.name.endswith(".records")]
    work = NeuronCost(one.weights, MACHINE, NeuronUse(0.5)).work(plan, 64)
    assert 0 < work.flash_bytes <= sum(w.rows * w.chunk_bytes for w in records)


def test_a_prompt_is_read_as_fast_as_its_staging_lets_the_drive_be(by_neuron: VirtualPack) -> None:
    few = {"bytes_per_request": 1 << 18, "depth": 1, "bytes_per_second": 1e8}
    many = {"bytes_per_request": 1 << 18, "depth": 16, "bytes_per_second": 2e9}
    one = Case(by_neuron, machine(drive=dataclasses.replace(DRIVE, points=[few, many])), use=NeuronUse(0.5))
    curve = one.curve()
    plan = one.plan((curve.floor_bytes + curve.resident_bytes) // 2)
    little, much = (dataclasses.replace(plan, neuron_staging_bytes=n) for n in (1 << 19, 1 << 23))
    slow, quick = (one.model.predict(p, prompt_tokens=plan.max_rows) for p in (little, much))
    reading = one.model._neurons.work(little, plan.max_rows).flash_bytes / 1e8
    assert slow.time_to_first_token_seconds == pytest.approx(reading, rel=0.2)
    assert quick.time_to_first_token_seconds < slow.time_to_first_token_seconds / 4


def test_the_curve_of_neurons_rises(by_neuron: VirtualPack) -> None:
    curve = Case(by_neuron).curve()
    span = curve.resident_bytes - curve.floor_bytes
    options = [curve.at(curve.floor_bytes + span * i // 10) for i in range(11)]
    speeds = [option.predicted_tokens_per_second for option in options if option]
    assert len(speeds) == 11 and speeds == sorted(speeds)


def test_a_folder_with_predictors_is_outlined_by_neuron(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "relu", "llama", hidden_act="relu")
    tensors = {}
    for i in range(2):
        name = f"layers.{i}.predictor."
        tensors[name + "down.weight"] = np.zeros((32, 64), np.float32)
        tensors[name + "up.weight"] = np.zeros((96, 32), np.float32)
        tensors[name + "bias"] = np.zeros(96, np.float32)
    write_safetensors(folder / "edge_predictor.safetensors", tensors)
    for option in ("keep", "q8", "q4"):
        rows = directory(outline(folder), option)
        assert any(row[0].endswith(".neurons.records") for row in rows)
        assert rows == packed(folder, option)
    made = outline(tmp_path / "relu-keep.edge")
    assert directory(made, "q4")[3:] == directory(outline(folder), "q4")


# -- hit rates and curves ------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 256),
    data=st.data(),
)
def test_hit_rate_is_a_share_that_rises_with_room(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    rooms = sorted(data.draw(st.lists(st.floats(0, 2.0 * n), min_size=2, max_size=5)))
    rates = [expected_hit_rate(room, n, k) for room in rooms]
    assert all(0 <= rate <= 1 for rate in rates)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(rates))
    assert expected_hit_rate(0, n, k) == 0 and expected_hit_rate(n, n, k) == 1


@given(n_layers=st.integers(1, 48), n_experts=st.integers(1, 128), data=st.data())
def test_a_prompt_finds_more_experts_with_more_room(
    n_layers: int, n_experts: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.floats(0.5, n_experts))
    rooms = sorted(data.draw(st.lists(st.floats(0, 1.1 * n_layers * n_experts), min_size=2, max_size=5)))
    rates = [prompt_hit_rate(room, n_layers, n_experts, chosen) for room in rooms]
    assert all(0 <= rate <= 1 for rate in rates)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(rates))
    assert prompt_hit_rate(0, n_layers, n_experts, chosen) == 0


@pytest.mark.parametrize("capacity", [12, 20, 28, 40])
def test_a_long_prompt_finds_what_the_policy_keeps(capacity: int) -> None:
    """All experts of every layer, pass after pass: the policy keeps what comes next."""
    n_layers, n_experts, n_passes = 6, 8, 60
    chosen = tuple(range(n_experts))
    trace = Trace(n_layers, n_experts, [(layer, chosen) for layer in range(n_layers)] * n_passes)
    found = simulate(trace, capacity, ExpertPolicy(trace))
    told = prompt_hit_rate(capacity, n_layers, n_experts, n_experts)
    assert told == pytest.approx(found, abs=0.04)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_first_prompt_finds_what_loading_read(share: float) -> None:
    n_layers, n_experts = 12, 16
    chosen = tuple(range(n_experts))
    capacity = int(share * n_layers * n_experts)
    trace = Trace(n_layers, n_experts, [(layer, chosen) for layer in range(n_layers)] * 2)
    loaded = [(layer, expert) for expert in range(n_experts) for layer in range(n_layers)][:capacity]
    told = prompt_hit_rate(capacity, n_layers, n_experts, n_experts)
    found = simulate(trace, capacity, ExpertPolicy(trace), loaded=loaded)
    assert found == pytest.approx(told, abs=0.06)


@pytest.fixture(scope="module")
def curves(sources: dict[str, Path]) -> dict[str, Curve]:
    return {name: Case(source).curve() for name, source in sources.items()}


@pytest.mark.parametrize("name", MODELS)
@given(shares=st.lists(st.floats(0, 1.3), min_size=2, max_size=6))
@settings(max_examples=25, deadline=None)
def test_more_memory_is_never_predicted_slower(
    name: str, curves: dict[str, Curve], shares: list[float]
) -> None:
    curve = curves[name]
    span = curve.resident_bytes - curve.floor_bytes
    options = [curve.at(curve.floor_bytes + int(share * span)) for share in sorted(shares)]
    assert all(option is not None for option in options)
    speeds = [option.predicted_tokens_per_second for option in options if option]
    waits = [option.time_to_first_token_seconds for option in options if option]
    assert speeds == sorted(speeds) and waits == sorted(waits, reverse=True)
    assert all(o.predicted_peak_bytes <= o.memory_bytes for o in options if o)


@pytest.mark.parametrize("name", MODELS)
def test_a_curve_runs_from_its_floor_to_everything(name: str, curves: dict[str, Curve]) -> None:
    curve = curves[name]
    assert curve.at(curve.floor_bytes - 1) is None
    first, last = curve.at(curve.floor_bytes), curve.at(curve.resident_bytes)
    assert first is not None and last is not None
    assert first.placement != "resident" and last.placement == "resident"
    assert last.predicted_tokens_per_second == curve.resident_tokens_per_second
    beyond = curve.at(8 * curve.resident_bytes)
    assert beyond is not None and beyond.predicted_tokens_per_second == last.predicted_tokens_per_second


@pytest.mark.parametrize("name", MODELS)
def test_the_curve_is_near_its_placements(
    name: str, curves: dict[str, Curve], sources: dict[str, Path]
) -> None:
    curve, one = curves[name], Case(sources[name])
    for share in (0.0, 0.17, 0.5, 0.83, 1.0):
        memory = int(curve.floor_bytes + share * (curve.resident_bytes - curve.floor_bytes))
        option = curve.at(memory)
        assert option is not None
        assert option.predicted_tokens_per_second == pytest.approx(
            one.predict(memory).tokens_per_second, rel=0.15
        )


def test_a_packs_outline_names_the_file(tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "m.gguf", "mixtral", "q8_0")
    pack(file, tmp_path / "m.edge")
    found = outline(tmp_path / "m.edge")
    assert found.kind == "pack" and found.largest_file == tmp_path / "m.edge"
    with PackFile(tmp_path / "m.edge") as opened:
        assert found.packs["keep"].entries == opened.entries
    lower = found.packs["q4"].entries["layers.0.q.weight"]
    assert lower.bytes < found.packs["keep"].entries["layers.0.q.weight"].bytes
