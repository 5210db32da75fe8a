"""What is measured on the trained family: neuron predictors, sparsity, and the routing of experts."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the recipe needs torch (pip install edge[train])")
pytest.importorskip("safetensors", reason="the recipe needs safetensors (pip install edge[train])")

from safetensors.torch import load_file  # noqa: E402

from edge.builtin import expert_facts, neuron_facts, predictor  # noqa: E402
from edge.builtin.activations import Trained, ffn_inputs, held_out_ids, load_trained  # noqa: E402
from edge.builtin.data import load_corpus  # noqa: E402
from edge.builtin.evaluate import bits_per_byte  # noqa: E402
from edge.builtin.hf import save_hf  # noqa: E402
from edge.builtin.model import Decoder  # noqa: E402
from edge.builtin.tokens import save_tokenizer, train_tokenizer  # noqa: E402
from flashload.errors import ArgumentError, BudgetError, ModelFileError  # noqa: E402
from quant.predictor import Predictor, measure  # noqa: E402
from tests.builtin_family import one_thread, random_decoder, story, write_usual_corpora  # noqa: E402, F401

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "<|endoftext|>".join(story(i) for i in range(6))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_usual_corpora(tmp_path_factory.mktemp("corpora"))


def write_model(folder: Path, model: Decoder) -> None:
    save_hf(model, folder, bos_id=0)
    tokenizer = train_tokenizer([story(i) for i in range(20)], model.config.vocab_size)
    save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    write_model(folder / "story" / "hf", random_decoder(hidden_act="relu"))
    write_model(folder / "moe" / "hf", random_decoder(num_local_experts=4, intermediate_size=16))
    write_model(folder / "twin" / "hf", random_decoder(hidden_act="silu"))
    return folder


@pytest.fixture(scope="module")
def target(family: Path) -> Trained:
    return load_trained(family / "story" / "hf")


# Reading


def test_inputs_are_what_the_gates_are_given(target: Trained) -> None:
    ids = held_out_ids(target, TEXT)
    assert len(ids) == 6 and all(int(row[0]) == 0 and len(row) == 32 for row in ids)
    gates: list[Any] = []
    hook = target.model.layers[1].mlp.gate_proj.register_forward_hook(lambda _m, _i, out: gates.append(out))
    found = [
        inputs[1] @ target.model.layers[1].mlp.gate_proj.weight.T for inputs in ffn_inputs(target.model, ids)
    ]
    hook.remove()
    for mine, real in zip(found, gates, strict=True):
        assert torch.allclose(mine, real[0], atol=1e-5)
    assert not target.model.layers[0].mlp._forward_pre_hooks


def test_missing_and_damaged_models_are_one_typed_line(family: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="train it first"):
        load_trained(tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        folder = tmp_path / name
        folder.mkdir()
        for file in (family / "story" / "hf").iterdir():
            (folder / file.name).write_bytes(file.read_bytes()[: 40 if file.name == name else None])
        with pytest.raises(ModelFileError, match="expected a model of the family") as raised:
            load_trained(folder)
        assert "\n" not in str(raised.value)
    with pytest.raises(ModelFileError):  # of other shapes than its configuration says
        config = json.loads((family / "story" / "hf" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
        (folder / "tokenizer.json").write_bytes((family / "story" / "hf" / "tokenizer.json").read_bytes())
        load_trained(folder)


# Predictors


def always(value: float) -> list[Predictor]:
    return [Predictor(torch.zeros(1, 32), torch.zeros(64, 1), torch.full((64,), value)) for _ in range(2)]


def test_predicting_everything_changes_nothing_and_nothing_silences_the_layers(target: Trained) -> None:
    plain = bits_per_byte(target.model, target.tokenizer, TEXT)
    with predictor.predicting(target.model, always(1.0)):
        assert bits_per_byte(target.model, target.tokenizer, TEXT) == plain
    with predictor.predicting(target.model, always(0.0)):  # a score of zero is not above zero
        silent = bits_per_byte(target.model, target.tokenizer, TEXT)
    emptied = random_decoder(hidden_act="relu")
    with torch.no_grad():
        for layer in emptied.layers:
            layer.mlp.down_proj.weight.zero_()
    assert silent == pytest.approx(bits_per_byte(emptied, target.tokenizer, TEXT), abs=1e-6)
    assert abs(silent - plain) > 0.01
    assert bits_per_byte(target.model, target.tokenizer, TEXT) == plain


def test_figures_of_perfect_predictors(target: Trained) -> None:
    gates = [layer.mlp.gate_proj.weight.detach() for layer in target.model.layers]
    perfect = [Predictor(torch.eye(32), gate, torch.zeros(64)) for gate in gates]
    figures = predictor.held_out_figures(target, perfect, TEXT)
    assert figures["mean"]["recall"] == figures["mean"]["precision"] == 1.0
    assert figures["mean"]["predicted"] == figures["mean"]["active"]
    assert figures["perplexity_ratio"] == pytest.approx(1.0, abs=1e-4)
    silent = predictor.held_out_figures(target, always(-1.0), TEXT)
    assert silent["mean"]["recall"] == 0.0 and silent["perplexity_ratio"] != pytest.approx(1.0, abs=1e-3)
    tokens = [len(target.tokenizer.encode(story(i), add_special_tokens=False).ids) for i in range(6)]
    worse = silent["bits_per_byte_on"] - silent["bits_per_byte_off"]
    n_bytes = sum(len(story(i).encode()) for i in range(6))
    assert silent["perplexity_ratio"] == pytest.approx(2 ** (worse * n_bytes / sum(tokens)), rel=1e-3)


@pytest.fixture
def short(corpora: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the predictor's command read less; returns its held-out text."""
    whole = load_corpus(corpora)
    less = replace(whole, held_out=whole.held_out[:4000])
    monkeypatch.setattr(predictor, "load_corpus", lambda _folder, with_books: less)
    return less.held_out


def run_predictor(family: Path, corpora: Path, *more: str) -> int:
    few = ("--tokens", "2000", "--steps", "10", "--threads", "1")
    return predictor.main(["--family", str(family), "--corpora", str(corpora), *few, *more])


def copy_of_target(family: Path, tmp_path: Path) -> Path:
    (tmp_path / "story" / "hf").mkdir(parents=True)
    for file in (family / "story" / "hf").iterdir():
        (tmp_path / "story" / "hf" / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_command_writes_factors_and_figures(
    family: Path, corpora: Path, short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of_target(family, tmp_path)
    assert run_predictor(folder, corpora, "--rank", "32", "--recall", "0.9") == 0
    path = folder / "story" / "hf" / "edge_predictor.safetensors"
    first = path.read_bytes()
    weights = load_file(path)
    assert {name: list(w.shape) for name, w in weights.items()} == {
        f"layers.{i}.predictor.{part}": shape
        for i in range(2)
        for part, shape in (("down.weight", [32, 32]), ("up.weight", [64, 32]), ("bias", [64]))
    }
    figures = json.loads((folder / "story" / "predictor.json").read_text())
    assert figures["mean"]["recall"] == pytest.approx(0.9, abs=0.03) and figures["mean"]["rank"] == 32
    assert figures["bytes"] == sum(4 * w.numel() for w in weights.values())
    # The figures are those of the factors as written.
    written = [
        Predictor(*(weights[f"layers.{i}.predictor.{part}"] for part in ("down.weight", "up.weight", "bias")))
        for i in range(2)
    ]
    again = predictor.held_out_figures(load_trained(folder / "story" / "hf"), written, short)
    assert again["layers"] == figures["layers"] and again["bits_per_byte_on"] == figures["bits_per_byte_on"]
    assert "perplexity x" in capsys.readouterr().out
    assert not list(path.parent.glob("*.tmp"))
    assert run_predictor(folder, corpora, "--rank", "32", "--recall", "0.9") == 0
    assert path.read_bytes() == first


def test_rank_search_takes_the_smallest_that_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "RANK_STEP", 4)
    model = random_decoder(hidden_act="relu")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 32, generator=generator)
    gate = model.layers[0].mlp.gate_proj.weight
    with torch.no_grad():
        gate[:, 8:] *= 0.02  # eight directions decide, nearly
    active = x @ gate.detach().T > 0
    limit = active.float().mean().item() + 0.05
    found = predictor.fit_layer(model, 0, x, predictor.FitSettings(steps=30), limit)
    assert found.rank == 8 and measure(found, x, active).predicted <= limit
    given = predictor.fit_layer(model, 1, x, predictor.FitSettings(ranks=(4, 12), steps=2))
    assert given.rank == 12


def test_layers_may_predict_as_much_above_what_opens(target: Trained) -> None:
    assert predictor.predicted_limits([0.02, 0.06, 0.1], 0.08) == pytest.approx([0.04, 0.08, 0.12])
    with pytest.raises(ArgumentError, match=r"above the 6.0% of neurons that open, found 5.0%"):
        predictor.predicted_limits([0.02, 0.06, 0.1], 0.05)
    inputs = [
        torch.cat(parts) for parts in zip(*ffn_inputs(target.model, held_out_ids(target, TEXT)), strict=True)
    ]
    zeros = [layer["zeros"] for layer in neuron_facts.facts(target, TEXT)["layers"]]
    assert predictor.open_shares(target.model, inputs) == pytest.approx([1 - z for z in zeros], abs=1e-3)


def test_weighing_misses_changes_what_is_fitted() -> None:
    model = random_decoder(hidden_act="relu")
    x = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    plain, weighed = (
        predictor.fit_layer(model, 0, x, predictor.FitSettings(ranks=(8,), steps=20, weigh_misses=weigh))
        for weigh in (False, True)
    )
    mlp = model.layers[0].mlp
    gates = (x @ mlp.gate_proj.weight.detach().T).relu()
    values = gates * (x @ mlp.up_proj.weight.detach().T).abs() * mlp.down_proj.weight.detach().norm(dim=0)

    def kept(one: Predictor) -> float:
        return float((values * (one.scores(x) > 0)).sum() / values.sum())

    assert kept(weighed) > kept(plain)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rank", "20"), "multiples of 32 up to 32, found 20"),
        (("--rank", "64"), "found 64"),
        (("--rank", "32", "32", "32"), "one per layer (2), found 3"),
        (("--share", "0.1"), "of neurons that open, found 10.0%"),
    ],
)
@pytest.mark.usefixtures("short")
def test_wrong_ranks_are_one_line(
    family: Path, corpora: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert run_predictor(family, corpora, *more) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_predictors_need_a_sparse_model_and_memory(
    family: Path, target: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArgumentError, match="dense ReLU model, found silu"):
        predictor.check(predictor.FitSettings(), load_trained(family / "twin" / "hf").model)
    monkeypatch.setattr(predictor.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    with pytest.raises(BudgetError, match="1 MiB are free"):
        predictor.check(predictor.FitSettings(), target.model)


# Sparsity


def bits(*rows: str) -> Any:
    return torch.tensor([[c == "1" for c in row] for row in rows])


def test_window_use_by_hand() -> None:
    story_one, story_two = bits("1000", "1100", "0010"), bits("0001", "0001")
    assert neuron_facts.window_use([story_one, story_two], 1) == (6 / 20, 2 / 12)
    # Windows of two: {0,1}, {0,1,2}; {3}. After them: token 2 of the first story opens neuron 2 anew.
    assert neuron_facts.window_use([story_one, story_two], 2) == (6 / 12, 1 / 4)
    assert neuron_facts.window_use([story_one, story_two], 3) == (3 / 4, 0.0)


def test_window_use_is_what_a_cache_of_the_last_tokens_reads() -> None:
    generator = torch.Generator().manual_seed(0)
    stories = [torch.rand(n, 40, generator=generator) < 0.2 for n in (30, 50, 3)]
    window, reads, held, places = 4, 0, 0, 0
    for active in stories:
        recent: list[set[int]] = []
        for t, row in enumerate(active):
            now = set(row.nonzero()[:, 0].tolist())
            if t >= window:
                held += len(set().union(*recent))
                reads += len(now - set().union(*recent))
                places += 40
            recent = [*recent, now][-window:]
    assert neuron_facts.window_use(stories, window)[1] == pytest.approx(reads / places)


def test_hot_share_by_hand() -> None:
    # Uses: 4, 3, 2, 1 of 10; 80 % are carried by the first three of eight neurons.
    rows = bits("11110000", "11100000", "11000000", "10000000")
    assert neuron_facts.hot_share([rows]) == 3 / 8
    assert neuron_facts.hot_share([rows[:2], rows[2:]]) == 3 / 8
    assert neuron_facts.hot_share([rows], carried=1.0) == 4 / 8


def test_neuron_facts_agree_with_each_other(target: Trained) -> None:
    found = neuron_facts.facts(target, TEXT)
    assert found["held_out_tokens"] == 6 * 32 and len(found["layers"]) == 2
    for layer in found["layers"]:
        assert layer["used"][0] == pytest.approx(1 - layer["zeros"], abs=1e-4)
        assert layer["used"] == sorted(layer["used"]) and layer["new"] == sorted(layer["new"], reverse=True)
    with torch.no_grad():
        ids = held_out_ids(target, TEXT)
        inputs = torch.cat([parts[0] for parts in ffn_inputs(target.model, ids)])
        zeros = (target.model.layers[0].mlp.gate_proj(inputs).relu() == 0).float().mean().item()
    assert found["layers"][0]["zeros"] == pytest.approx(zeros, abs=1e-4)
    assert found["mean"]["zeros"] == pytest.approx(sum(row["zeros"] for row in found["layers"]) / 2, abs=1e-4)


def test_neuron_facts_command(
    family: Path, corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    arguments = ["--family", str(family), "--corpora", str(corpora), "--json", str(tmp_path / "facts.json")]
    assert neuron_facts.main([*arguments, "--figure", str(tmp_path / "facts.png")]) == 0
    figures = json.loads((tmp_path / "facts.json").read_text())
    assert f"{figures['mean']['zeros']:.1%}" in capsys.readouterr().out.splitlines()[-1]
    data = (tmp_path / "facts.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) < 100_000
    assert neuron_facts.main(["--family", str(tmp_path), "--corpora", str(corpora)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ArgumentError, match="dense ReLU model"):
        neuron_facts.facts(load_trained(family / "moe" / "hf"), TEXT)


# Experts


def lru(visits: list[tuple[int, tuple[int, ...]]], capacity: int) -> float:
    """Hit rate of a cache that drops what was used longest ago, of one visit the lower number first."""
    cached: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = uses = 0
    for layer, chosen in visits:
        hits += sum((layer, expert) in cached for expert in chosen)
        uses += len(chosen)
        for expert in sorted(chosen):
            cached[layer, expert] = None
            cached.move_to_end((layer, expert))
        while len(cached) > capacity:
            cached.popitem(last=False)
    return hits / uses


def test_routing_is_that_of_the_router(family: Path) -> None:
    trained = load_trained(family / "moe" / "hf")
    stories = expert_facts.route(trained, TEXT)
    inputs = list(ffn_inputs(trained.model, held_out_ids(trained, TEXT)))
    for found, given in zip(stories, inputs, strict=True):
        assert found.shape == (32, 2, 2)
        for layer in range(2):
            logits = given[layer] @ trained.model.layers[layer].block_sparse_moe.gate.weight.T
            assert torch.equal(found[:, layer].sort().values, logits.topk(2).indices.sort().values)


def test_decode_goes_through_all_layers_token_after_token() -> None:
    stories = [torch.tensor([[[3, 1], [0, 2]], [[2, 1], [1, 0]]]), torch.tensor([[[0, 1], [3, 2]]])]
    trace = expert_facts.decode_trace(stories, 4)
    assert (trace.n_layers, trace.n_experts) == (2, 4)
    assert list(trace.visits) == [
        *[(0, (3, 1)), (1, (0, 2))],
        *[(0, (2, 1)), (1, (1, 0))],
        *[(0, (0, 1)), (1, (3, 2))],
    ]
    assert expert_facts.balance(stories, 4) == [
        [round(n / 6, 4) for n in (1, 3, 1, 1)],
        [round(n / 6, 4) for n in (2, 1, 2, 1)],
    ]


def test_hit_rates_are_simulated_at_shares_of_all_experts(family: Path) -> None:
    trained = load_trained(family / "moe" / "hf")
    found = expert_facts.facts(trained, TEXT)
    trace = expert_facts.decode_trace(expert_facts.route(trained, TEXT), 4)
    assert len(trace.visits) == 6 * 32 * 2 and all(len(chosen) == 2 for _, chosen in trace.visits)
    rates = found["hit_rate"]
    for at, capacity in ((1, 2), (2, 4), (3, 6)):
        assert rates["lru"][at] == pytest.approx(lru(list(trace.visits), capacity), abs=1e-4)
    for name in rates:
        assert rates[name] == sorted(rates[name]) and rates[name][0] < rates[name][-1] < 1.0
        assert all(one <= best for one, best in zip(rates[name], rates["clairvoyant"], strict=True))
    assert all(sum(layer) == pytest.approx(1.0, abs=1e-3) for layer in found["balance"])
    assert found["busiest"] == [pytest.approx(4 * max(layer), abs=1e-3) for layer in found["balance"]]
    shown = expert_facts.show(found)
    assert f"{rates['clairvoyant'][1]:.1%}" in shown and "clairvoyant" in shown
    with pytest.raises(ArgumentError, match="found a dense model"):
        expert_facts.route(load_trained(family / "story" / "hf"), TEXT)


def test_expert_facts_command(
    family: Path, corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--family", str(family), "--corpora", str(corpora), "--json", str(tmp_path / "facts.json")]
    assert expert_facts.main(arguments) == 0
    rates = json.loads((tmp_path / "facts.json").read_text())["hit_rate"]
    for lru_rate, best in zip(rates["lru"], rates["clairvoyant"], strict=True):
        assert 0 <= lru_rate <= best <= 1
    assert "hit rate" in capsys.readouterr().out
    assert expert_facts.main(["--family", str(tmp_path), "--corpora", str(corpora)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
