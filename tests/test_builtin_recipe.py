"""The recipe of the built-in family: resumable training of each of its models, forks, objectives, export."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the recipe needs torch (pip install edge[train])")
pytest.importorskip("safetensors", reason="the recipe needs safetensors (pip install edge[train])")

from edge.builtin import evaluate, train  # noqa: E402
from edge.builtin.data import END_OF_TEXT, Corpus, load_corpus  # noqa: E402
from edge.builtin.held_out import held_out_stories  # noqa: E402
from edge.builtin.hf import load_hf, save_hf  # noqa: E402
from edge.builtin.objectives import SparsitySettings  # noqa: E402
from edge.builtin.recipes import RECIPES  # noqa: E402
from edge.builtin.tokens import RowSource, mixed_batch, train_tokenizer  # noqa: E402
from edge.builtin.trainer import Trainer, book_share, rate_scale  # noqa: E402
from edge.builtin.trainer import train as run_training  # noqa: E402
from flashload.errors import ArgumentError, BudgetError, CorruptError, DiskError, ModelFileError  # noqa: E402
from tests.builtin_family import (  # noqa: E402
    one_thread,  # noqa: F401
    random_decoder,
    story,
    tiny_settings,
    write_usual_corpora,
)

NAMES = ("twin", "story", "draft", "moe")
FORK_STEP = 2  # round(0.35 * 6)
OWN = [np.full(50, 299, np.int64)]  # a text no story holds


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_usual_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def corpus(corpora: Path) -> Corpus:
    loaded = load_corpus(corpora)
    return replace(loaded, stories=loaded.stories[:40], held_out=loaded.held_out[:3000])


@pytest.fixture
def family(corpus: Corpus, tmp_path: Path) -> Path:
    """A folder with what the later models start from: the twin's fork, and teachers."""
    twin = Trainer("twin", tiny_settings("twin"), corpus, tmp_path)
    for _ in range(FORK_STEP):
        twin.step()
    assert (tmp_path / "twin" / "fork.bin").exists()
    for name in ("twin", "story"):
        save_hf(random_decoder(), tmp_path / name / "hf", bos_id=0)
    return tmp_path


def start(name: str, corpus: Corpus, family: Path, **changes: Any) -> Trainer:
    trainer = Trainer(name, tiny_settings(name, **changes), corpus, family, OWN if name == "draft" else None)
    if trainer.settings.start:
        trainer.fork()
    return trainer


# Running, interrupting, resuming


@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_equals_an_uninterrupted_one(name: str, corpus: Corpus, family: Path) -> None:
    whole = start(name, corpus, family)
    assert run_training(whole)
    (whole.out / "checkpoint.bin").unlink()
    first = start(name, corpus, family)
    assert not run_training(first, stopped=lambda: first.steps_done == 4)
    second = Trainer(name, tiny_settings(name), corpus, family, OWN if name == "draft" else None)
    second.load()
    assert second.steps_done == 4
    assert run_training(second)
    assert second.losses == whole.losses and len(whole.losses) == 6
    assert second.objective.state == whole.objective.state
    for mine, other in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    curve = json.loads((family / name / "curve.json").read_text())
    assert [e["step"] for e in curve["evals"]] == [3, 6] and curve["rows"] == whole.rows_used
    load_hf(family / name / "hf")


def test_story_goes_on_where_the_twin_was(corpus: Corpus, family: Path) -> None:
    twin = Trainer("twin", tiny_settings("twin"), corpus, family)
    for _ in range(FORK_STEP):
        twin.step()
    sparse = start("story", corpus, family)
    assert sparse.steps_done == FORK_STEP and sparse.rows_used == twin.rows_used
    assert sparse.losses == twin.losses
    for mine, other in zip(sparse.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(sparse._batch(), twin._batch())
    assert sparse.model.config.hidden_act == "relu" and twin.model.config.hidden_act == "silu"


@pytest.mark.parametrize("name", ["twin", "moe"])
def test_training_lowers_the_loss(name: str, corpus: Corpus, family: Path) -> None:
    trainer = start(name, corpus, family, steps=40, eval_steps=20)
    run_training(trainer)
    assert sum(trainer.losses[-5:]) / 5 < trainer.losses[0] - 1.0
    assert trainer.evals[-1]["bits_per_byte"] < trainer.evals[0]["bits_per_byte"]


def test_settings_of_the_family_hang_together() -> None:
    assert set(RECIPES) == set(NAMES)
    for recipe in RECIPES.values():
        for other in filter(None, (recipe.start, recipe.teacher, recipe.upcycle)):
            assert RECIPES[other].model.vocab_size == recipe.model.vocab_size
    assert RECIPES["story"].model == replace(RECIPES["twin"].model, hidden_act="relu")
    assert (RECIPES["story"].steps, RECIPES["story"].rows) == (RECIPES["twin"].steps, RECIPES["twin"].rows)
    assert RECIPES["twin"].fork < SparsitySettings().begin < SparsitySettings().end < 1


# Data


def test_rates_and_book_share_along_a_run() -> None:
    s = RECIPES["twin"]
    scales = [rate_scale(i / 1000, s) for i in range(1001)]
    assert 0 < scales[0] < 0.05 and max(scales) == 1.0 and scales[-1] == 0.0
    assert all(scale == 1.0 for scale in scales[20:350])
    assert scales[350:] == sorted(scales[350:], reverse=True) and scales[675] == pytest.approx(0.5)
    assert (
        book_share(0.0, s) == 0.5 and book_share(0.3, s) == pytest.approx(0.25) and book_share(0.7, s) == 0.0
    )


def test_tokenizer_round_trips_any_text() -> None:
    tokenizer = train_tokenizer([story(i) for i in range(20)], 400)
    for text in (story(50), "naïve “quotes” …\n\n  two  spaces", "日本語 🙂", "\x00\x7f", ""):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert tokenizer.encode("Hi").ids[0] == 0


def test_rows_are_a_function_of_their_number() -> None:
    texts = [np.arange(1, 1 + n) for n in (50, 70, 33, 41)]
    ahead = RowSource(texts, 16, seed=5)
    rows = [ahead.row(n) for n in range(2 * ahead.rows_per_epoch)]
    fresh = RowSource(texts, 16, seed=5)
    for n in reversed(range(len(rows))):
        assert np.array_equal(fresh.row(n), rows[n])
    assert not np.array_equal(np.concatenate(rows[:5]), np.concatenate(rows[ahead.rows_per_epoch :][:5]))
    assert all(len(row) == 17 for row in rows)


def test_a_batch_holds_the_shares_and_counts_them() -> None:
    sources = {kind: RowSource([np.full(99, value)], 8, 0) for kind, value in (("stories", 1), ("own", 2))}
    used = {"stories": 3, "own": 0}
    batch = mixed_batch(sources, used, 8, {"own": 0.5, "books": 0.25})
    assert batch.shape == (8, 9)
    assert [2 in row for row in batch].count(True) == 4  # the books' share falls to the stories
    assert used == {"stories": 7, "own": 4}


def test_half_of_a_draft_batch_is_the_teachers_own_text(corpus: Corpus, family: Path) -> None:
    draft = start("draft", corpus, family)
    for _ in range(2):
        own = (draft._batch() == 299).float().mean(1)
        assert (own > 0.9).sum() == 2 and (own < 0.1).sum() == 2
    assert draft.rows_used == {"stories": 4, "books": 0, "own": 4}


# What is minimised


def test_sparsity_follows_its_ramp(corpus: Corpus, tmp_path: Path) -> None:
    """The controller raises the zero share to the target, which plain training does not come near."""
    ramp = SparsitySettings(target=0.9, begin=0.1, end=0.6, rest=0.9, rate=0.3)
    zeros = {}
    for target in (ramp, replace(ramp, begin=2.0, end=3.0)):  # the second never begins
        torch.manual_seed(0)
        settings = tiny_settings("story", steps=80, sparsity=target, teacher="")
        trainer = Trainer("story", settings, corpus, tmp_path)
        while trainer.progress < 1:
            trainer.step()
        zeros[target.begin] = trainer.objective.state["zeros"]
    assert zeros[2.0] < 0.75
    assert zeros[0.1] == pytest.approx(0.9, abs=0.06)


def test_distillation_brings_the_student_nearer(corpus: Corpus, family: Path) -> None:
    draft = start("draft", corpus, family, steps=60)
    batch = draft._batch()
    before = draft.objective.loss(draft.model.eval(), batch, 0.0)[0].item()
    draft.model.train()
    run_training(draft)
    after = draft.objective.loss(draft.model.eval(), batch, 0.0)[0].item()
    assert after < 0.8 * before


# Export


@pytest.mark.parametrize("name", ["twin", "story", "moe"])
def test_export_reads_back_equal(name: str, corpus: Corpus, family: Path) -> None:
    from tokenizers import Tokenizer

    trainer = start(name, corpus, family)
    trainer.step()
    trainer.export()
    hf = family / name / "hf"
    config = json.loads((hf / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM" if name == "moe" else "LlamaForCausalLM"]
    assert (
        config["hidden_act"] == ("relu" if name == "story" else "silu")
        and config["tie_word_embeddings"] is True
    )
    assert ("num_local_experts" in config) == (name == "moe")
    read = load_hf(hf)
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(read(torch.arange(20)[None]), trainer.model(torch.arange(20)[None]))
    tokenizer = Tokenizer.from_file(str(hf / "tokenizer.json"))
    exact = evaluate.bits_per_byte(trainer.model, trainer.tokenizer, corpus.held_out)
    assert evaluate.bits_per_byte(read, tokenizer, corpus.held_out) == exact and 1.0 < exact < 10.0
    assert evaluate.sample(read, tokenizer, "One day", tokens=8, seed=3).startswith("One day")


@pytest.mark.parametrize(("experts", "seed"), [(0, 7), (4, 8)], ids=["llama", "mixtral"])
def test_edge_writes_the_tokens_torch_does(
    experts: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("_edge", reason="the compiled core is not here")
    import edge
    from edge.builtin.tokens import save_tokenizer

    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    model = random_decoder(
        seed, hidden_act="silu" if experts else "relu", num_local_experts=experts, max_position_embeddings=64
    )
    save_hf(model, tmp_path / "hf", bos_id=0)
    save_tokenizer(train_tokenizer([story(i) for i in range(20)], 300), tmp_path / "hf", 64)
    prompt = [0, 17, 250, 33, 81]
    ids, want = list(prompt), []
    for _ in range(24):
        with torch.no_grad():
            want.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        ids.append(want[-1])
    assert len(set(want)) > 5
    with edge.load(tmp_path / "hf", context=64, threads=1) as engine:
        found = engine.generate(prompt, max_tokens=24, temperature=0.0, ignore_eos=True).tokens
    assert list(found) == want


def test_a_head_alone_serves_as_the_tied_embedding(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = random_decoder()
    save_hf(model, tmp_path, bos_id=0)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors")
    assert torch.equal(load_hf(tmp_path).embed_tokens.weight, model.embed_tokens.weight)


def test_curve_figure_is_a_small_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the learning-curve figure needs matplotlib")
    from edge.builtin.figure import draw_curve

    evals = [
        {"tokens": n * 100_000, "bits_per_byte": 1.5 / n, "train_nats_per_token": 4.0 / n}
        for n in range(1, 30)
    ]
    (tmp_path / "curve.json").write_text(json.dumps({"evals": evals}))
    draw_curve(tmp_path / "curve.json", tmp_path / "curve.png")
    data = (tmp_path / "curve.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) < 100_000


def test_windows_predict_every_token_once_with_context() -> None:
    from edge.builtin.held_out import windows

    for count in (1, 2, 9, 10, 11, 30, 31, 100):
        ids = list(range(count))
        cut = windows(ids, 8)
        assert [token for window, first in cut for token in window[first:]] == ids[1:]
        assert all(len(window) <= 9 for window, _ in cut)
        assert all(first >= 5 for _, first in cut[1:])


# What goes wrong


def test_damaged_checkpoints_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    trainer = start("twin", corpus, tmp_path)
    path = tmp_path / "twin" / "checkpoint.bin"
    with pytest.raises(DiskError, match="found none"):
        trainer.load()
    trainer.step()
    trainer.save()
    whole = path.read_bytes()
    for position in (20, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CorruptError, match="checkpoint is damaged") as raised:
            trainer.load()
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    path.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(CorruptError):
        trainer.load()
    path.write_bytes(b"something else")
    with pytest.raises(ModelFileError, match="expected a training checkpoint"):
        trainer.load()
    path.write_bytes(whole)
    trainer.load()
    assert not list(path.parent.glob("*.tmp"))


def test_checkpoint_of_another_run_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    start("twin", corpus, tmp_path).save()
    with pytest.raises(ArgumentError, match="other settings or corpora"):
        start("twin", corpus, tmp_path, seed=2).load()


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpora: Path
) -> Iterator[Command]:
    """Runs the training command on tiny recipes: (exit status, what it wrote to stderr)."""
    monkeypatch.setattr(train, "RECIPES", {name: tiny_settings(name) for name in NAMES})
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(name: str, family: Path, *more: str, corpora: Path = corpora) -> tuple[int, str]:
        capsys.readouterr()
        status = train.main([name, "--corpora", str(corpora), "--family", str(family), *more])
        return status, capsys.readouterr().err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def assert_one_line(result: tuple[int, str], *parts: str) -> None:
    status, error = result
    assert status == 1 and error.startswith("error: ") and error.count("\n") == 1
    for part in parts:
        assert part in error


def test_missing_corpus_is_one_line(command: Command, tmp_path: Path) -> None:
    assert_one_line(command("twin", tmp_path / "out", corpora=tmp_path / "none"), "tinystories.txt.xz")
    assert not (tmp_path / "out").exists()


def test_missing_beginnings_are_one_line(command: Command, tmp_path: Path) -> None:
    assert_one_line(command("story", tmp_path), "found none; train twin first")
    save_hf(random_decoder(), tmp_path / "twin" / "hf", bos_id=0)
    assert_one_line(command("story", tmp_path), "fork.bin", "twin", "found none")
    assert_one_line(command("draft", tmp_path), "own", "found none")
    assert_one_line(command("moe", tmp_path, "--resume"), "checkpoint.bin", "found none")
    assert_one_line(command("moe", tmp_path / "empty"), "found none; train twin first")


def test_missing_teacher_is_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load_own_text", lambda _path: OWN)
    assert_one_line(command("draft", tmp_path), "found none; train story first")


def test_too_little_memory_is_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 << 20))
    assert_one_line(command("twin", tmp_path), "MiB of memory", "100 MiB are free")
    with pytest.raises(BudgetError):
        train.check_memory(RECIPES["twin"])
    assert not (tmp_path / "twin").exists()


def test_memory_needed_grows_with_the_run() -> None:
    twin = RECIPES["twin"]
    assert train.needed_bytes(replace(twin, rows=32)) > 1.5 * train.needed_bytes(twin) > 2 << 30
    assert train.needed_bytes(tiny_settings()) < 1 << 30


def test_terminated_run_saves_and_resumes(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated_after_two(
        trainer: Trainer, show: Callable[[Trainer], None], stopped: Callable[[], bool]
    ) -> bool:
        def show_and_kill(t: Trainer) -> None:
            show(t)
            if t.steps_done == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        return run_training(trainer, show_and_kill, stopped)

    monkeypatch.setattr(train, "train", terminated_after_two)
    status, error = command("twin", tmp_path)
    assert status == 130 and "interrupted: checkpoint saved" in error
    assert not (tmp_path / "twin" / "hf").exists()
    status, error = command("twin", tmp_path, "--resume")
    assert (status, error) == (0, "")
    curve = json.loads((tmp_path / "twin" / "curve.json").read_text())
    assert curve["steps"] == 6 and (tmp_path / "twin" / "hf" / "config.json").exists()


def test_evaluate_command_prints_the_held_out_bits(
    corpora: Path, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = start("twin", corpus, tmp_path)
    trainer.step()
    trainer.export()
    arguments = ["--model", str(tmp_path / "twin" / "hf"), "--corpora"]
    assert evaluate.main([*arguments, str(corpora), "--prompt", "One day"]) == 0
    bits = evaluate.bits_per_byte(trainer.model, trainer.tokenizer, load_corpus(corpora).held_out)
    printed = capsys.readouterr().out
    assert printed.startswith(f"held-out bits per byte: {bits:.4f} (perplexity per token ")
    stories = held_out_stories(load_corpus(corpora).held_out)
    n_tokens = sum(len(trainer.tokenizer.encode(text, add_special_tokens=False).ids) for text in stories)
    perplexity = 2 ** (bits * sum(len(text.encode()) for text in stories) / n_tokens)
    assert f"token {perplexity:.3f})\n" in printed and "\nOne day" in printed
    assert evaluate.main([*arguments, str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
