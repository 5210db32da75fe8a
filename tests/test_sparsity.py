"""Neurons left out by thresholds: the definition, one answer everywhere, and what is learnt from text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import _edge
import numpy as np
import pytest
from click.testing import CliRunner

import edge
from edge.cli import cli
from edge.errors import ArgumentError, BudgetError, ModelFileError
from edge.sparsify import sparsify
from flashload import estimate_neurons, sparsity
from flashload.estimate_neurons import thresholds_pay
from flashload.format import PackFile, PackWriter
from flashload.pack import pack
from flashload.plan import UNUSED, directory_of
from flashload.plan_neurons import NeuronPlacement
from flashload.sparsity import Scores, bound_of
from tests.neuron_packs import decoded
from tests.oracle import Oracle
from tests.test_neuron_engine import ISAS, generate, long_prompt, plan_of, windowed
from tests.tiny import tiny_hf

LAYERS, HIDDEN, NEURONS = 2, 64, 96
TEXT = "".join(f"the cat sat on mat {i % 7} and a dog ran.\n" for i in range(120))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sparsity")


@pytest.fixture(scope="module")
def packs(folder: Path) -> dict[str, Path]:
    """Models that are not ReLU by neuron, f16 and q8, and one of them without a gate."""
    out = {}
    for name, family, weights, more in (
        ("silu-f16", "llama", "keep", {"torch_dtype": "float16"}),
        ("silu-q8", "llama", "q8", {}),
        ("gelu", "opt", "keep", {"activation_function": "gelu", "torch_dtype": "float16"}),
    ):
        width = {"ffn_dim" if family == "opt" else "intermediate_size": NEURONS}
        tiny_hf(folder / name, family, max_position_embeddings=256, **width, **more)
        out[name] = folder / f"{name}.edge"
        pack(folder / name, out[name], weights, neurons="on")
    return out


def some_thresholds(seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(0, 0.3, (LAYERS, NEURONS)).astype(np.float32)
    values[0, :5] = 0
    return values


def sparse_answer(settings: dict[str, Any], prompt: list[int], thresholds: np.ndarray | None) -> Any:
    engine = _edge.Engine(settings | {"budget_bytes": 1 << 27})
    engine.set_neuron_thresholds(thresholds)
    return generate(engine, prompt, 8)


# The definition


@pytest.mark.parametrize("name", ["silu-f16", "silu-q8", "gelu"])
@pytest.mark.parametrize("sparse", [False, True])
def test_logits_match_the_oracle(packs: dict[str, Path], name: str, sparse: bool) -> None:
    path, tokens = packs[name], list(range(1, 33))
    thresholds = some_thresholds() if sparse else None
    config, weights = PackFile(path).config.to_json(), decoded(path)
    right = Oracle(config, weights, thresholds=thresholds).logits(tokens)[-1]
    if sparse:
        whole = Oracle(config, weights).logits(tokens)[-1]
        assert np.abs(right - whole).max() > 0.01 * np.abs(whole).max()  # it does leave some out
    for slots in (NEURONS, 16):
        engine = _edge.Engine(windowed(path, slots))
        engine.set_neuron_thresholds(thresholds)
        sequence = _edge.Sequence(engine)
        sequence.set_tokens(tokens)
        bound = 0.05 if name == "silu-q8" else 5e-3
        assert np.abs(sequence.logits() - right).max() <= bound * np.abs(right).max()


@pytest.mark.parametrize("name", ["silu-f16", "silu-q8", "gelu"])
@pytest.mark.parametrize("sparse", [False, True])
def test_one_answer(packs: dict[str, Path], name: str, sparse: bool) -> None:
    path, thresholds, prompt = packs[name], some_thresholds() if sparse else None, long_prompt(70)
    first = windowed(path, NEURONS) | {"isa": "ref", "threads": 1, "max_rows": 1}
    expected = sparse_answer(first, prompt, thresholds)
    for isa in ISAS:
        for threads, rows, slots in ((1, 128, NEURONS), (2, 7, 20), (3, 64, 0)):
            settings = windowed(path, slots) | {"isa": isa, "threads": threads, "max_rows": rows}
            assert sparse_answer(settings, prompt, thresholds) == expected


def test_records_agree_with_matrices(packs: dict[str, Path], folder: Path) -> None:
    """In f16 neither form rounds a weight; sums run in another order."""
    pack(folder / "silu-f16", folder / "dense.edge", neurons="off")
    with (
        edge.load(folder / "dense.edge", context=64) as dense,
        edge.load(packs["silu-f16"], context=64) as by_neuron,
    ):
        a, b = (engine.logits(list(range(1, 40))) for engine in (dense, by_neuron))
    assert np.abs(a - b).max() <= 1e-2 * np.abs(a).max()


def test_thresholds_are_set_and_taken_back(packs: dict[str, Path]) -> None:
    path, prompt = packs["silu-f16"], long_prompt(20)
    engine = _edge.Engine(windowed(path, NEURONS))
    whole = generate(engine, prompt, 4)
    engine.set_neuron_thresholds(np.full((LAYERS, NEURONS), 1e30, np.float32))
    before = engine.stats()["neurons_wanted"]
    assert generate(engine, prompt, 4) != whole
    assert engine.stats()["neurons_wanted"] == before  # none is left
    assert engine.stats()["by_tag"]["neuron thresholds"] >= 4 * LAYERS * NEURONS
    engine.set_neuron_thresholds(None)
    assert generate(engine, prompt, 4) == whole
    assert not engine.stats()["by_tag"].get("neuron thresholds")


def test_bad_thresholds_are_refused(packs: dict[str, Path], folder: Path) -> None:
    engine = _edge.Engine(windowed(packs["silu-f16"], NEURONS))
    for bad in (-1.0, float("nan"), float("inf")):
        values = some_thresholds()
        values[1, 3] = bad
        with pytest.raises(ArgumentError, match="neuron thresholds: expected finite numbers of 0 or more"):
            engine.set_neuron_thresholds(values)
    with pytest.raises(ArgumentError, match=f"expected {LAYERS * NEURONS}, found 7"):
        engine.set_neuron_thresholds(np.zeros(7, np.float32))
    plan, decoder = plan_of(packs["silu-f16"], 1, False)
    used_bytes = _edge.Engine(plan.engine_options(packs["silu-f16"], decoder)).stats()["used_bytes"]
    tight = _edge.Engine(plan.engine_options(packs["silu-f16"], decoder, budget_bytes=used_bytes))
    with pytest.raises(BudgetError):
        tight.set_neuron_thresholds(some_thresholds())
    pack(folder / "silu-f16", folder / "tiles.edge", neurons="off")
    plan, decoder = plan_of(folder / "tiles.edge", 1, False)
    with pytest.raises(ArgumentError, match="expected a pack by neuron"):
        _edge.Engine(plan.engine_options(folder / "tiles.edge", decoder)).set_neuron_thresholds(
            some_thresholds()
        )


# What is learnt


def test_bounds_leave_out_the_share_asked_for() -> None:
    random = np.random.default_rng(1)
    layers = {i: Scores() for i in range(3)}
    values = [random.lognormal(i, 2, 5000).astype(np.float32) for i in range(3)]
    for i, scores in layers.items():
        scores.add(values[i][:2000].reshape(40, 50))
        scores.add(values[i][2000:])
    for share in (0.1, 0.5, 0.9):
        bound = bound_of(layers, share)
        true = [float((v <= bound).mean()) for v in values]
        assert np.allclose([scores.below(bound) for scores in layers.values()], true)
        assert share <= np.mean(true) <= share + 0.01
        assert true == sorted(true, reverse=True)  # the layer of small scores gives up most


def test_weights_of_neurons_are_what_each_adds(packs: dict[str, Path]) -> None:
    for name in ("silu-f16", "gelu"):
        with PackFile(packs[name]) as file:
            x = np.random.default_rng(2).normal(size=(9, HIDDEN)).astype(np.float32)
            found = sparsity.neuron_weights(file, 1, x, 3.0)
        w = decoded(packs[name])
        mean = np.abs(x @ w["layers.1.up.weight"].T).mean(0) if name != "gelu" else 1.0
        assert np.allclose(found, mean * np.linalg.norm(w["layers.1.down.weight"], axis=0) / 3, rtol=1e-4)


def test_thresholds_of_a_neuron_that_adds_nothing_are_finite() -> None:
    found = sparsity.thresholds_for(0.5, np.array([0.0, 1e-45, 2.0], np.float32))
    assert np.isfinite(found).all() and found[2] == 0.25 and found[0] > 1e38


# The command


@pytest.fixture(scope="module")
def made(folder: Path, packs: dict[str, Path]) -> Path:
    out = folder / "sparse.edge"
    report = sparsify(packs["silu-f16"], out, data=TEXT, share=0.5, also=[0.2, 0.8], threads=2)
    assert [trial.share for trial in report.trials] == [0.2, 0.5, 0.8] and report.chosen.share == 0.5
    for trial in report.trials:
        assert abs(trial.skipped - trial.share) < 0.1
        n = trial.dense_ffn_bytes
        assert n / 3 < trial.ffn_bytes < n and trial.perplexity > 0
        assert trial.ffn_bytes == pytest.approx(n / 3 + (1 - trial.skipped) * n * 2 / 3, rel=1e-3)
    assert report.token_bytes > report.chosen.dense_ffn_bytes
    assert not list(folder.glob(".edge-sparsify*"))
    return out


def test_a_pack_is_made_again_with_thresholds(made: Path, packs: dict[str, Path]) -> None:
    with PackFile(made) as file, PackFile(packs["silu-f16"]) as source:
        file.verify()
        assert file.metadata["sparsity"]["share"] == 0.5
        for name in source.entries:
            assert name == "metadata.json" or file.read(name) == source.read(name)
        assert {n for n in file.entries if n not in source.entries} == {
            sparsity.entry_name(layer) for layer in range(LAYERS)
        }
        found = sparsity.read_thresholds(file)
        assert found is not None and found.shape == (LAYERS, NEURONS) and (found > 0).any()
        assert sparsity.read_thresholds(source) is None
        plan, _ = plan_of(made, 1, False)
        placed = dict(zip(file.entries, plan.placements, strict=True))
    assert all(placed[sparsity.entry_name(layer)] == UNUSED for layer in range(LAYERS))


def test_half_of_the_neurons_are_left_out_when_asked(made: Path, packs: dict[str, Path]) -> None:
    wanted, tokens = {}, {}
    for name, settings in (
        ("off", {}),
        ("on", {"sparsity": "on"}),
        ("exact", {"sparsity": "on", "exact": True}),
    ):
        with edge.load(made, context=128, threads=2, **settings) as engine:
            before = engine.stats()["neurons_wanted"]
            said = engine.generate(
                "the cat", max_tokens=20, temperature=0, speculation="off", ignore_eos=True
            )
            wanted[name] = engine.stats()["neurons_wanted"] - before
            tokens[name] = said.tokens
            assert engine.stats()["peak_bytes"] <= engine.plan.core_bytes
    assert 0.3 < wanted["on"] / wanted["off"] < 0.7
    assert wanted["exact"] == wanted["off"] and tokens["exact"] == tokens["off"]
    with edge.load(packs["silu-f16"], context=128, threads=2) as engine:
        plain = engine.generate("the cat", max_tokens=20, temperature=0, speculation="off", ignore_eos=True)
    assert plain.tokens == tokens["off"]


def test_speculation_changes_no_token_of_a_sparse_run(made: Path) -> None:
    with edge.load(made, context=128, threads=2, sparsity="on") as engine:
        said = [
            engine.generate(
                "the cat sat", max_tokens=40, temperature=0, speculation=how, ignore_eos=True
            ).tokens
            for how in ("off", "lookup")
        ]
    assert said[0] == said[1]


def test_what_cannot_be_is_refused(made: Path, packs: dict[str, Path], folder: Path) -> None:
    with pytest.raises(ArgumentError, match="sparsity: expected one of off, on"):
        edge.load(made, sparsity="yes")
    with pytest.raises(ArgumentError, match="expected a pack with thresholds"):
        edge.load(packs["silu-f16"], sparsity="on")
    new, model = folder / "new.edge", packs["silu-f16"]
    for share in (0, 1, 0.99, -0.1, True, "half"):
        with pytest.raises(ArgumentError, match="share: expected more than 0 and at most"):
            sparsify(model, new, data=TEXT, share=share)
    with pytest.raises(ArgumentError, match="expected at least 256 tokens and 64 in its last tenth"):
        sparsify(model, new, data="the cat sat")
    with pytest.raises(ArgumentError, match="expected a new file, found one"):
        sparsify(model, made, data=TEXT)
    with pytest.raises(ArgumentError, match="expected a folder to write into"):
        sparsify(model, folder / "none" / "new.edge", data=TEXT)
    with pytest.raises(BudgetError):
        sparsify(model, new, data=TEXT, memory=1)
    pack(folder / "silu-f16", folder / "matrices.edge", neurons="off")
    with pytest.raises(ArgumentError, match="expected a pack by neuron, found matrices"):
        sparsify(folder / "matrices.edge", new, data=TEXT)
    assert not new.exists() and not list(folder.glob(".edge-sparsify*"))


@pytest.mark.parametrize("bad", [[-1.0] * NEURONS, [float("nan")] * NEURONS, [0.1] * (NEURONS - 1)])
def test_bad_thresholds_of_a_pack_are_refused(made: Path, tmp_path: Path, bad: list[float]) -> None:
    path = tmp_path / "m.edge"
    with PackFile(made) as source, PackWriter(path, 1 << 22) as writer:
        for e in source.entries.values():
            data, cols = source.read(e.name), e.cols
            if e.name == sparsity.entry_name(0):
                data, cols = np.array(bad, "<f4").tobytes(), len(bad)
            writer.add(e.name, e.format, e.rows, cols, [data], e.layer, e.expert, max(1, e.neuron_parts))
    with pytest.raises(
        ModelFileError, match=r"expected thresholds of 0 or more|expected 96 thresholds, found 1 x 95"
    ):
        edge.load(path, sparsity="on")


def test_command(packs: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["sparsify", str(folder / "silu-q8"), "--data", str(tmp_path / "text.txt"), "--weights", "q8"]
    said = CliRunner().invoke(
        cli, [*arguments, str(tmp_path / "a.edge"), "--also", "0.3"], catch_exceptions=False
    )
    assert said.exit_code == 0 and "50% *" in said.output and "30%" in said.output
    said = CliRunner().invoke(cli, [*arguments, str(tmp_path / "b.edge"), "--json"], catch_exceptions=False)
    found = json.loads(said.output)
    assert found["trials"][found["chosen"]]["share"] == 0.5 and found["path"] == str(tmp_path / "b.edge")
    # The same text gives the same pack.
    again = [PackFile(tmp_path / name) for name in ("a.edge", "b.edge")]
    both = [sparsity.read_thresholds(file) for file in again]
    assert both[0] is not None and both[1] is not None and np.array_equal(*both)
    said = CliRunner().invoke(
        cli, ["run", str(tmp_path / "a.edge"), "the cat", "-n", "4", "--sparsity", "on", "--json"]
    )
    assert said.exit_code == 0 and len(json.loads(said.output)["tokens"]) == 4
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ArgumentError, match="expected UTF-8 text"):
        CliRunner().invoke(cli, [*arguments, str(tmp_path / "c.edge")], catch_exceptions=False)


# The plan


def test_the_plan_counts_on_the_neurons_left(made: Path, folder: Path) -> None:
    found = {how: edge.plan(made, context=64, sparsity=how) for how in ("off", "on")}
    for how, kept in (("off", 100), ("on", 50)):
        assert any(f"{kept} % of the neurons are taken to be active" in note for note in found[how].notes)
        assert found[how].plan is not None
    off, on = (found[how].plan for how in ("off", "on"))
    assert off is not None and on is not None
    assert on.activation_bytes - off.activation_bytes == 4096  # thresholds, in whole pages
    with pytest.raises(ArgumentError, match="sparsity: expected one of off, on"):
        edge.plan(made, sparsity="yes")
    with pytest.raises(ArgumentError, match="expected a pack with thresholds"):
        edge.plan(folder / "silu-q8", sparsity="on")


def test_a_window_of_a_model_without_relu_reads_what_has_no_slot(packs: dict[str, Path]) -> None:
    """Every neuron is wanted: the plan's share of the drive is that of the slots that are lacking."""
    with PackFile(packs["silu-f16"]) as file:
        model = directory_of(file).neurons
        half = NeuronPlacement("exact", {w.id: w.rows // 2 for w in model.records}, 0, 0)
        n_bytes = sum(w.rows * w.chunk_bytes for w in model.records)
        assert model.read_bytes(half) == pytest.approx(n_bytes / 2)
        sparse = directory_of(file).with_thresholds(0.5).neurons
        # The most used are held, which half of all can only be a little more than the others.
        assert n_bytes / 8 < sparse.read_bytes(half) < n_bytes / 5


def test_a_study_has_room_for_thresholds(tmp_path: Path) -> None:
    """More than the slack of a plan: 512 KiB of them."""
    sizes = {"intermediate_size": 1 << 16, "hidden_size": 32, "num_attention_heads": 2}
    tiny_hf(tmp_path / "hf", max_position_embeddings=256, **sizes)
    report = sparsify(
        tmp_path / "hf", tmp_path / "out.edge", data=TEXT, calibration_tokens=256, held_out_tokens=64
    )
    assert abs(report.chosen.skipped - 0.5) < 0.1
    with edge.load(tmp_path / "out.edge", context=64, sparsity="on") as engine:
        assert engine.stats()["by_tag"]["neuron thresholds"] == 4 * LAYERS << 16
        assert engine.stats()["peak_bytes"] <= engine.plan.core_bytes


@pytest.mark.parametrize("skipped", [None, -0.1, 1.0, "half", True])
def test_a_share_that_is_none_is_refused(made: Path, tmp_path: Path, skipped: object) -> None:
    with PackFile(made) as file:
        thresholds = sparsity.read_thresholds(file)
    assert thresholds is not None
    sparsity.add_thresholds(made, tmp_path / "bad.edge", dict(enumerate(thresholds)), {"skipped": skipped})
    with pytest.raises(ModelFileError, match="sparsity: skipped: expected a number from 0 to below 1"):
        edge.load(tmp_path / "bad.edge", sparsity="on")


def test_thresholds_are_left_alone_where_they_read_more(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small records and few slots: what is missing lies in so many places that all is read."""
    with PackFile(made) as file:
        model = directory_of(file)
    records = model.neurons.records
    near = [replace(w, chunk_bytes=300) for w in model.entries]
    for slots, pays in ((0, False), (NEURONS // 2, False), (NEURONS, True)):
        held = [slots if w in records else 0 for w in model.entries]
        plan = replace(plan_of(made, 1, False)[0], neuron_slots=held)
        assert thresholds_pay(plan, near, 0.5) is pays
    # Records of 64 KiB are further apart than a gap that is read along.
    far = [replace(w, chunk_bytes=64 << 10) for w in model.entries]
    assert thresholds_pay(replace(plan, neuron_slots=[0] * len(far)), far, 0.5)
    settings: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    said = {}
    for pays in (True, False):
        monkeypatch.setattr(estimate_neurons, "thresholds_pay", lambda *_, pays=pays: pays)
        with edge.load(made, context=64, sparsity="on") as engine:
            said[pays] = engine.generate("the cat", **settings).tokens
            assert any("no neuron is left out" in note for note in engine.notes) is not pays
            assert ("neuron thresholds" in engine.stats()["by_tag"]) is pays
    with edge.load(made, context=64) as engine:
        assert engine.generate("the cat", **settings).tokens == said[False]
