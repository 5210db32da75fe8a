"""Sparse models made for benchmarks: they have the published statistics, and the engine meets what NumPy counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import _edge
import numpy as np
import pytest

pytest.importorskip("gguf", reason="the benchmarks write GGUF files with the gguf package")

import edge
from bench import budget, peers, shapes, sparse_check, sparsity, synth, synth_sparse, weights
from flashload.format import PackFile
from tests.test_neuron_engine import windowed

SHAPE = shapes.SHAPES["small-opt"]
N_TOKENS = 160


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sparse")
    out = {form: folder / f"{form}.edge" for form in synth_sparse.FORMATS}
    for form, path in out.items():
        assert synth_sparse.write_sparse(path, SHAPE, form, seed=3) == path.stat().st_size
    return out


# The process of neurons


@pytest.mark.parametrize("active", [0.0156, 0.033, 0.0536])
def test_a_fitted_layer_has_the_published_errors(active: float) -> None:
    law = sparsity.fit(active)
    random = np.random.default_rng(0)
    n = 1_000_000
    seen = np.sqrt(1 - law.noise**2) * random.standard_normal(n)
    excess = seen + law.noise * random.standard_normal(n)
    threshold = law.mean + law.spread * random.standard_normal(n)
    fires, called = excess > threshold, seen > threshold - law.slack
    assert fires.mean() == pytest.approx(active, rel=0.03)
    assert (fires & ~called).sum() / fires.sum() == pytest.approx(0.05, abs=0.006)
    assert (called & ~fires).sum() / (~fires).sum() == pytest.approx(0.07, abs=0.004)
    rate = np.sort(sparsity.normal_cdf(-(law.mean + law.spread * random.standard_normal(20_000))))[::-1]
    assert rate[: int(0.26 * 20_000)].sum() / rate.sum() == pytest.approx(0.80, abs=0.02)


def test_persistence_gives_the_published_window() -> None:
    found = []
    for layer in (3, 12, 20, 28):
        law = sparsity.fit(sparsity.active_share(layer, 32))
        random = np.random.default_rng(layer)
        n_tokens, n = 200, 2048
        slow, fast = sparsity.PERSISTENT_SHARE**0.5, (1 - sparsity.PERSISTENT_SHARE) ** 0.5

        def unit() -> np.ndarray:
            fresh = random.standard_normal((n_tokens, n))  # noqa: B023
            return slow * sparsity.positions(n_tokens, n, random) + fast * fresh  # noqa: B023

        seen = np.sqrt(1 - law.noise**2) * unit()
        threshold = law.mean + law.spread * random.standard_normal(n)
        found.append(sparsity.measure(seen + law.noise * unit() > threshold, seen > threshold - law.slack))
    assert np.mean([m.window for m in found]) == pytest.approx(sparsity.OPT.window, abs=0.012)
    assert np.mean([m.fresh for m in found]) == pytest.approx(sparsity.OPT.fresh, abs=0.0015)


def test_statistics_of_a_text_counted_by_hand() -> None:
    active = np.zeros((12, 4), bool)
    predicted = np.zeros((12, 4), bool)
    active[:, 0] = predicted[:, 0] = True  # always
    active[3, 1] = True  # missed
    predicted[11, 2] = True  # a false alarm, new in the last token
    found = sparsity.measure(active, predicted)
    assert found.active == 13 / 48 and found.predicted == 13 / 48
    assert found.missed == pytest.approx(1 / 13) and found.false_alarms == pytest.approx(1 / 35)
    assert found.window == 1 / 4 and found.fresh == pytest.approx(1 / 28)
    assert found.hot_activations == 12 / 13 and found.hot_activations_held_out == 1.0


def test_a_text_shorter_than_two_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 12 tokens"):
        sparsity.measure(np.zeros((11, 4), bool), np.zeros((11, 4), bool))


def test_layers_grow_denser_as_published() -> None:
    shares = [sparsity.active_share(i, 32) for i in range(32)]
    assert shares == sorted(shares)
    assert (shares[0], shares[15], shares[31]) == pytest.approx((0.0156, 0.0266, 0.0536))
    assert [sparsity.rank(i, 32, 4096) for i in (0, 27, 28, 31)] == [128, 128, 1024, 1024]
    assert sparsity.rank(0, 2, 512) == 32


# The packs


@pytest.mark.parametrize("form", synth_sparse.FORMATS)
def test_a_pack_has_the_published_statistics(packs: dict[str, Path], form: str) -> None:
    found = sparse_check.check(packs[form], N_TOKENS)["mean"]
    middle = (sparsity.OPT.active_first + sparsity.OPT.active_last) / 2
    assert found["active"] == pytest.approx(middle, rel=0.15)
    assert found["missed"] == pytest.approx(0.05, abs=0.02)
    assert found["false_alarms"] == pytest.approx(0.07, abs=0.012)
    assert found["window"] == pytest.approx(0.24, abs=0.03)
    assert found["fresh"] == pytest.approx(0.024, abs=0.004)
    assert found["hot_activations_held_out"] - 0.02 < 0.80 < found["hot_activations"] + 0.02


@pytest.mark.parametrize("form", synth_sparse.FORMATS)
def test_the_engine_meets_what_numpy_counts(packs: dict[str, Path], form: str) -> None:
    found = sparse_check.check(packs[form], N_TOKENS)["mean"]
    tokens = [int(t) for t in np.random.default_rng(1).integers(3, SHAPE.vocab, N_TOKENS)]
    for mode, key in (("exact", "active"), ("predictor", "predicted")):
        # One row a pass, or rows that share a reading would count their neurons once.
        engine = _edge.Engine(windowed(packs[form], 0, mode) | {"max_rows": 1, "context": 192})
        sequence = _edge.Sequence(engine)
        sequence.set_tokens(tokens)
        sequence.logits()
        share = engine.stats()["neurons_wanted"] / (N_TOKENS * SHAPE.layers * SHAPE.ffn)
        assert share == pytest.approx(found[key], rel=0.03)


def test_greedy_text_moves_on(packs: dict[str, Path]) -> None:
    engine = _edge.Engine(windowed(packs["q4"], SHAPE.ffn))
    sequence = _edge.Sequence(engine)
    sequence.set_tokens([5, 77])
    sampler = _edge.Sampler({"temperature": 0.0}, SHAPE.vocab)
    tokens = [sequence.next(sampler)[0] for _ in range(24)]
    assert len(set(tokens)) >= 10


def test_a_pack_says_what_it_is(packs: dict[str, Path]) -> None:
    with PackFile(packs["q4"]) as pack:
        assert "random weights" in pack.metadata["synthetic"]
        assert pack.metadata["calibrated_to"]["window"] == 0.24
        assert "2312.11514" in pack.metadata["calibrated_to"]["source"]
        assert pack.metadata["predictor"]["rank"] == [32, 32]
        pack.verify()


def test_a_seed_gives_the_same_pack(packs: dict[str, Path], tmp_path: Path) -> None:
    again, other = tmp_path / "again.edge", tmp_path / "other.edge"
    synth_sparse.write_sparse(again, SHAPE, "q4", seed=3)
    synth_sparse.write_sparse(other, SHAPE, "q4", seed=4)
    assert again.read_bytes() == packs["q4"].read_bytes() != other.read_bytes()


def test_other_shapes_and_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.edge"
    with pytest.raises(ValueError, match="multiple of 512"):
        synth_sparse.write_sparse(path, shapes.SHAPES["tiny-opt"], "q4")
    with pytest.raises(ValueError, match="OPT shape"):
        synth_sparse.write_sparse(path, shapes.SHAPES["llama-2-7b"], "q4")
    with pytest.raises(ValueError, match="one of q4, f16"):
        synth_sparse.write_sparse(path, SHAPE, "q3")
    assert not path.exists()


def test_a_dense_pack_cannot_be_checked(packs: dict[str, Path], tmp_path: Path) -> None:
    from flashload.pack import pack

    source = tmp_path / "opt"
    synth.write_opt_folder(source, shapes.SHAPES["tiny-opt"])
    pack(source, tmp_path / "opt.edge")
    with pytest.raises(ValueError, match="by neuron with predictors"):
        sparse_check.check(tmp_path / "opt.edge")


def test_the_dense_twin_has_the_same_bytes_in_matrices(packs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "dense.edge"
    synth_sparse.write_sparse(path, SHAPE, "q4", seed=3, dense=True)
    dense, sparse = weights.read_weights(path), weights.read_weights(packs["q4"])
    assert dense.extra_bytes == 0 and dense.always_bytes == pytest.approx(sparse.always_bytes, rel=0.01)
    with PackFile(path) as pack:
        assert pack.entries["layers.0.up.weight"].rows == SHAPE.ffn and "predictor" not in pack.metadata
    with edge.load(path, context=32, threads=1) as engine:
        assert len(engine.generate([5, 6, 7], max_tokens=3, ignore_eos=True).tokens) == 3


def test_the_command_writes_once_and_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.edge"
    monkeypatch.setitem(shapes.SHAPES, "small-opt", replace(SHAPE, ffn=512))
    arguments = ["small-opt-sparse", "--out", str(path), "--layers", "1"]
    assert synth.main([*arguments, "--check", "64"]) == 0
    assert "published" in capsys.readouterr().out
    stamp = path.stat().st_mtime_ns
    assert synth.main([*arguments, "--check", "64"]) == 0
    assert path.stat().st_mtime_ns == stamp
    with pytest.raises(SystemExit):
        synth.main(["tiny", "--out", str(path), "--check"])


# What a token reads


def test_copies_and_predictors_are_no_part_of_the_model(packs: dict[str, Path]) -> None:
    found = weights.read_weights(packs["q4"])
    with PackFile(packs["q4"]) as pack:
        entries = pack.entries
    extra = sum(e.stored_bytes for n, e in entries.items() if "predictor" in n or n.endswith("gates"))
    assert found.extra_bytes == extra and found.model_bytes == packs["q4"].stat().st_size - extra
    records = sum(e.bytes for n, e in entries.items() if n.endswith("records"))
    attention = sum(e.bytes for n, e in entries.items() if n.split(".")[-2] in "qkvo" and e.rows > 1)
    small = sum(
        e.bytes for n, e in entries.items() if e.rows == 1 and "json" not in n and "predictor" not in n
    )
    assert found.always_bytes == records + attention + entries["embed.weight"].bytes + small
    assert found.table_bytes == entries["embed.position"].bytes


def test_a_folder_counts_its_matrices(tmp_path: Path) -> None:
    shape = shapes.SHAPES["tiny-opt"]
    synth.write_opt_folder(tmp_path / "opt", shape)
    found = weights.read_weights(tmp_path / "opt")
    d = shape.hidden
    assert found.always_bytes == 2 * (shape.vocab * d + shape.layers * (4 * d * d + 2 * d * shape.ffn))
    assert found.table_bytes == 2 * (shape.context + 2) * d and found.vocab == shape.vocab
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected safetensors"):
        weights.read_weights(tmp_path / "empty")


# Baselines


def run(system: str, path: Path, vocab: int, **request: Any) -> dict[str, Any]:
    done = peers.run(system, peers.Request(path, 1, vocab, prompt_tokens=3, tokens=2, **request))
    assert done.failure is None
    assert done.result is not None
    return done.result


def test_naive_reload_reads_every_weight_for_every_token(
    packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.children import naive_reload

    asked: list[int] = []
    model = naive_reload.Model(str(packs["q4"]), 1)
    real = model.read
    monkeypatch.setattr(model, "read", lambda entry: asked.append(entry.bytes) or real(entry))
    model.forward(1)
    found = weights.read_weights(packs["q4"])
    vectors = found.always_bytes - sum(asked)
    assert 0 <= vectors < 0.02 * found.always_bytes
    once = list(asked)
    model.forward(1)
    assert asked == once + once


def test_naive_reload_runs_a_mixture_with_as_many_experts_as_the_model(tiny: Any, tmp_path: Path) -> None:
    from bench.children import naive_reload
    from flashload.pack import pack

    pack(tiny("tiny-moe"), tmp_path / "moe.edge")
    model = naive_reload.Model(str(tmp_path / "moe.edge"), 1)
    seen: list[tuple[int, int]] = []
    real = model.multiply
    model.multiply = lambda entry, n: seen.append((entry.layer, entry.expert)) or real(entry, n)  # type: ignore[method-assign, func-returns-value, assignment]
    model.forward(1)
    routed = {one for one in seen if one[1] >= 0}
    assert len(routed) == 2 * 2  # layers x experts per token


def test_naive_reload_speaks_the_protocol(packs: dict[str, Path]) -> None:
    result = run("naive", packs["q4"], SHAPE.vocab)
    assert result["decode_tokens_per_second"] > 0 and result["tokens"] == []


def test_layer_streaming_speaks_the_protocol(tmp_path: Path) -> None:
    if missing := peers.absent("layer-streaming"):
        pytest.skip(missing)
    synth.write_opt_folder(tmp_path / "opt", shapes.SHAPES["tiny-opt"])
    result = run("layer-streaming", tmp_path / "opt", 512)
    assert result["decode_tokens_per_second"] > 0


def test_layer_streaming_needs_a_folder(packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "absent", lambda name: None)
    present, missing = peers.entries(packs["q4"], ["layer-streaming"])
    assert not present and "--folder" in missing["layer-streaming"]


def test_without_torch_layer_streaming_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_TORCH_PYTHON", "/no/such/python")
    said = peers.absent("layer-streaming")
    assert said is not None and "/no/such/python does not run" in said and "\n" not in said


def test_random_weights_have_no_perplexity(packs: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("words")
    with pytest.raises(SystemExit):
        budget.main([str(packs["q4"]), "--text", str(text)])


def test_perplexity_is_that_of_the_scores(tiny: Any, tmp_path: Path) -> None:
    import edge

    text = tmp_path / "text"
    text.write_text("one and two and three " * 40)
    result = run("edge", tiny("tiny"), 512, text=text)
    with edge.load(tiny("tiny"), context=512, threads=1) as engine:
        scores = engine.score(engine.tokenizer.encode(text.read_text())[:512])
    mean = np.mean([score for score in scores if score is not None])
    assert result["perplexity"] == pytest.approx(np.exp(-mean), rel=1e-5)


def test_lossy_cells_are_labelled(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.test_bench import document_of, point

    lossy = point("edge", 500, 2.0) | {"neuron_mode": "predictor", "perplexity": None}
    exact = point("edge-exact", 500, 1.0) | {"neuron_mode": "exact", "perplexity": None}
    budget.show(document_of([lossy, exact]))
    out = capsys.readouterr().out
    assert "edge (lossy)" in out and "lossy: a predictor decides" in out and "edge-exact (lossy)" not in out
    assert "perplexity" not in out.split("others")[0]
    scored = lossy | {"perplexity": {"median": 7.5, "low": 7.5, "high": 7.5, "runs": 1}}
    budget.show(json.loads(json.dumps(document_of([scored, exact]))))
    assert "7.50" in capsys.readouterr().out
