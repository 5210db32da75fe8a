"""Training predictors for any ReLU model: from text through the engine to a pack that runs with them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edge
from edge import predictor_training
from edge.cli import cli
from edge.predictor_training import PredictorReport, default_ranks, train_predictor
from edge.predictor_work import WorkFolder
from flashload.errors import ArgumentError, BudgetError
from flashload.format import PackFile
from flashload.pack import pack
from flashload.plan import directory_of
from tests.builtin_family import one_thread  # noqa: F401
from tests.neuron_packs import tiny_relu
from tests.tiny import tiny_hf

HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="fitting needs torch (pip install edge[train])")
WORDS = ["the", "cat", "dog", "sat", "ran", "on", "mat", "and", "a"]
SETTINGS: dict[str, Any] = {"memory": "4GiB", "tokens": 2000, "steps": 40, "ranks": [32], "threads": 1}


def text_of(n_words: int) -> str:
    words = (WORDS[(7 * i + i * i // 5) % len(WORDS)] for i in range(n_words))
    return " ".join(word + ("\n" if i % 11 == 10 else "") for i, word in enumerate(words))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(text_of(4000))
    return path


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits in this process, which has torch loaded already."""
    torch = pytest.importorskip("torch")
    from edge.predictor_fit import fit_all

    def fit(work: WorkFolder, n_layers: int, on_progress: Any) -> None:
        before = torch.get_num_threads()
        try:
            fit_all(
                work,
                lambda layer, rank, done: on_progress(f"layer {layer}, rank {rank}", int(1000 * done), 1000),
            )
        finally:
            torch.set_num_threads(before)

    monkeypatch.setattr(predictor_training, "_fit", fit)


def trained(folder: Path, family: str, data: Path, **changes: Any) -> tuple[Path, PredictorReport]:
    source = tiny_relu(folder, family, max_position_embeddings=256)
    report = train_predictor(source, data, **(SETTINGS | {"out": folder / f"{family}-out.edge"} | changes))
    return source, report


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@needs_torch
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_dense_pack_learns_its_predictors(
    tmp_path: Path, family: str, data: Path, in_process: None
) -> None:
    source = tiny_relu(tmp_path, family, max_position_embeddings=256)
    before = digest(source)
    _, report = trained(tmp_path, family, data, recall=0.9)
    assert digest(source) == before
    assert report.tokens == 2000 and 200 <= report.held_out_tokens <= 500
    for layer in report.layers:
        assert layer.rank == 32
        # The threshold is set on other tokens of the text.
        assert layer.recall == pytest.approx(0.9, abs=0.05)
        # Better than naming as many neurons blindly.
        assert layer.precision > layer.active + 0.15
        assert layer.predicted * layer.precision == pytest.approx(layer.active * layer.recall)
    assert report.mean.recall == pytest.approx(sum(r.recall for r in report.layers) / 2)
    assert 0.5 < report.perplexity_predicted / report.perplexity < 2
    assert report.perplexity_predicted != report.perplexity
    with PackFile(report.path) as file:
        file.verify()
        assert file.metadata["predictor"]["rank"] == [32, 32]
        assert file.metadata["predictor"]["recall"] == pytest.approx(report.mean.recall, abs=1e-4)
        # A plan of the pack knows how much of it texts use.
        use = directory_of(file).neurons.use
        assert use.active_share == pytest.approx(report.mean.active, abs=1e-4)
        assert use.predicted_share == pytest.approx(report.mean.predicted, abs=1e-4)
        assert use.falloff == file.metadata["predictor"]["falloff"] > 0
    with edge.load(report.path, context=64) as one, edge.load(source, context=64) as other:
        assert one.plan.neuron_mode == "exact" and other.plan.neuron_mode == ""
    assert not list(tmp_path.glob(".*training"))


@needs_torch
def test_every_kind_of_model_ends_in_the_same_predictors(
    tmp_path: Path, data: Path, in_process: None
) -> None:
    """A folder, and packs of it by matrix, by neuron, and with predictors already."""
    folder = tiny_hf(tmp_path / "hf", "opt", max_position_embeddings=256)
    pack(folder, tmp_path / "dense.edge")
    pack(folder, tmp_path / "neurons.edge", neurons="on")
    found = []
    for name in ("hf", "dense.edge", "neurons.edge", "out-hf.edge"):
        report = train_predictor(tmp_path / name, data, **SETTINGS, out=tmp_path / f"out-{Path(name).stem}-.edge"
                                 if name == "out-hf.edge" else tmp_path / f"out-{Path(name).stem}.edge")  # fmt: skip
        with PackFile(report.path) as file:
            found.append({name: file.read(name) for name in file.entries if name.startswith("layers.")})
    assert all(other == found[0] for other in found[1:])


@needs_torch
def test_more_recall_names_more_neurons_and_q4_is_smaller(
    tmp_path: Path, data: Path, in_process: None
) -> None:
    reports = {
        key: trained(tmp_path, "llama", data, out=tmp_path / f"{key}.edge", **changes)[1]
        for key, changes in {"low": {"recall": 0.6}, "high": {"recall": 0.97}, "q4": {"bits": "q4"}}.items()
    }
    assert reports["low"].mean.predicted < reports["high"].mean.predicted
    assert reports["low"].mean.recall < reports["high"].mean.recall
    assert reports["low"].mean.precision > reports["high"].mean.precision
    assert reports["q4"].predictor_bytes < 0.7 * reports["low"].predictor_bytes
    # The threshold is that of the rounded matrices.
    assert reports["q4"].mean.recall == pytest.approx(0.95, abs=0.04)


@needs_torch
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, data: Path, in_process: None) -> None:
    _, whole = trained(tmp_path, "llama", data, out=tmp_path / "whole.edge")
    out = tmp_path / "out.edge"
    stages: list[str] = []

    def stop(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        if stage.startswith("layer 1") and done > 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, "llama", data, out=out, on_progress=stop)
    assert not out.exists() and (tmp_path / ".out.training").is_dir()
    first, stages = set(stages), []
    trained(tmp_path, "llama", data, out=out, on_progress=lambda stage, done, total: stages.append(stage))
    assert "running the text" in first and "layer 0, rank 32" in first
    assert not {"packing by neuron", "running the text", "layer 0, rank 32"} & set(stages)
    assert "layer 1, rank 32" in stages and not (tmp_path / ".out.training").exists()
    assert digest(out) == digest(tmp_path / "whole.edge") and whole.file_bytes == out.stat().st_size


@needs_torch
def test_another_question_begins_anew(tmp_path: Path, data: Path, in_process: None) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("layer 0"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, "llama", data, on_progress=stop)
    kept = tmp_path / ".llama-out.training" / "notes.txt"
    kept.write_text("mine")
    stages: set[str] = set()
    trained(tmp_path, "llama", data, seed=3, on_progress=lambda stage, done, total: stages.add(stage))
    assert {"packing by neuron", "running the text"} <= stages
    assert [path.name for path in kept.parent.iterdir()] == ["notes.txt"]


@needs_torch
@pytest.mark.usefixtures("one_thread")
def test_the_rank_grows_while_it_saves() -> None:
    """A gate of rank 48 in the inputs' space: 64 tells more than 32; and nothing more than 64."""
    import numpy as np
    import torch

    from edge.predictor_fit import FitSettings, Rows, fit_layer
    from quant.predictor import OpenBits

    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(256, 48, generator=generator) @ torch.randn(48, 256, generator=generator) / 16
    x = torch.randn(3000, 256, generator=generator).half()
    packed = (x.float() @ gate.T > 8).numpy()
    bits = torch.from_numpy(np.packbits(packed, axis=1, bitorder="little"))
    rows = Rows(x, OpenBits(bits, 256))
    settings = FitSettings(steps=60)
    found = {
        record_bytes: fit_layer(rows, gate.numpy(), 32, 128, record_bytes, settings, 0).down.rows
        for record_bytes in (16, 4096)
    }
    assert found == {16: 32, 4096: 64}


@needs_torch
def test_the_command_in_a_process_of_its_own(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    source = tiny_relu(tmp_path, "opt", max_position_embeddings=256)
    arguments = ["train-predictor", str(source), "--data", str(data), "--memory", "4GiB", "--tokens", "2000"]
    arguments += [
        "--threads",
        "1",
        "--steps",
        "20",
        "--rank",
        "32,64",
        "--figure",
        str(tmp_path / "figure.png"),
    ]
    cli.main([*arguments, "--json"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    assert Path(report["path"]) == tmp_path / "opt-0-predictor.edge"
    assert [layer["rank"] for layer in report["layers"]] == [32, 64]
    assert report["perplexity_ratio"] == report["perplexity_predicted"] / report["perplexity"]
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    Path(report["path"]).unlink()
    cli.main([*arguments[:-2], "--out", str(tmp_path / "table.edge")], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "recall" in shown and "mean" in shown and "perplexity" in shown and "table.edge" in shown


def test_ranks_follow_the_paper() -> None:
    assert default_ranks(4096, 32) == [128] * 28 + [1024] * 4
    assert default_ranks(288, 6) == [32] * 5 + [96]
    assert default_ranks(32, 2) == [32, 32]


@pytest.fixture
def torchless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if torch were there: nothing here gets so far as to load it."""
    monkeypatch.setattr(predictor_training, "find_spec", lambda name: name)
    return


def test_without_torch_one_line_says_so(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor_training, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"needs torch, found none; pip install 'edge\[train\]'"):
        trained(tmp_path, "llama", data)


@pytest.mark.usefixtures("torchless")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recall": 1.0}, "recall: expected a share between 0 and 1, found 1.0"),
        ({"bits": "q2"}, "bits: expected one of q8, q4, found 'q2'"),
        ({"ranks": [48]}, "rank: expected multiples of 32 up to 64, found 48"),
        ({"ranks": [32, 32, 32]}, "rank: expected one, or one per layer \\(2\\), found 3"),
        ({"tokens": 100}, "tokens: expected at least 2,000, found 100"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, data: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        trained(tmp_path, "llama", data, **changes)
    assert not (tmp_path / "llama-out.edge").exists()


@pytest.mark.usefixtures("torchless")
def test_models_without_closed_neurons_are_refused(tmp_path: Path, data: Path) -> None:
    silu = tiny_hf(tmp_path / "silu", "llama")
    mixture = tiny_hf(tmp_path / "mixture", "mixtral", hidden_act="relu")
    pack(silu, tmp_path / "silu.edge")
    for model, found in ((silu, "silu"), (tmp_path / "silu.edge", "silu"), (mixture, "a mixture of experts")):
        with pytest.raises(ArgumentError, match=f"dense ReLU layers.*found .*{found}"):
            train_predictor(model, data, out=tmp_path / "out.edge")
    assert not list(tmp_path.glob(".*training"))


@pytest.mark.usefixtures("torchless")
def test_what_exists_is_never_replaced(tmp_path: Path, data: Path) -> None:
    source = tiny_relu(tmp_path, max_position_embeddings=256)
    taken = tmp_path / f"{source.stem}-predictor.edge"
    taken.write_bytes(b"mine")
    for out in (None, taken, source):
        with pytest.raises(ArgumentError, match="exists; name another file"):
            train_predictor(source, data, out=out)
    assert taken.read_bytes() == b"mine"


@pytest.mark.usefixtures("torchless")
def test_too_little_memory_or_text(tmp_path: Path, data: Path) -> None:
    with pytest.raises(BudgetError, match="fitting a layer of 96 neurons to 2,000 tokens needs") as refusal:
        trained(tmp_path, "llama", data, memory="64MiB")
    assert refusal.value.floor_bytes > 64 << 20
    short = tmp_path / "short.txt"
    short.write_text(text_of(300))
    with pytest.raises(
        ArgumentError, match=r"expected text of at least 2,000 tokens, and 200 in its last tenth"
    ):
        trained(tmp_path, "llama", short)
