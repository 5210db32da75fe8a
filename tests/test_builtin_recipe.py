"""The recipe of the built-in models: text preparation, tokenizer, resumable training, export."""

from __future__ import annotations

import io
import json
import lzma
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from edge.builtin.data import (
    END_OF_TEXT,
    CorpusError,
    drop_overlap,
    load_corpus,
    split_cased,
    split_lower,
)
from edge.builtin.recase import Recaser
from flashload.errors import ArgumentError, CorruptError, DiskError, ModelFileError

NAMES = ("Lily", "Tom", "Ben", "Mia", "Sam")
THINGS = ("dog", "ball", "tree", "boat", "cake", "hat", "bird", "frog")
VERBS = ("found", "saw", "liked", "lost", "painted", "hid")


def story(seed: int, sentences: int = 12) -> str:
    """A made-up story; other seeds share no 48 letters with it."""
    r = random.Random(seed)
    parts = [f"Once there was a {r.choice(THINGS)} number {seed} of the town."]
    for _ in range(sentences):
        name, other = r.sample(NAMES, 2)
        parts.append(f"One day {name} {r.choice(VERBS)} a {r.choice(THINGS)} and a {r.choice(THINGS)}.")
        parts.append(f'"I {r.choice(VERBS)} the {r.choice(THINGS)}," said {other}.')
    return " ".join(parts)


def write_corpora(folder: Path, cased: list[str], lower: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tinystories.txt.xz").write_bytes(lzma.compress(f"\n{END_OF_TEXT}\n".join(cased).encode()))
    (folder / "tinystories-lower.txt.xz").write_bytes(lzma.compress("\n".join(lower).lower().encode()))
    book = ("# Heidi\n\n" + "The goats went up the mountain in the morning with Peter. " * 30).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("Johanna Spyri/Heidi.md")
        member.size = len(book)
        archive.addfile(member, io.BytesIO(book))
    (folder / "books-train.tar.xz").write_bytes(lzma.compress(buffer.getvalue()))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_corpora(folder, [story(i) for i in range(320)], [story(i) for i in range(250, 380)])
    return folder


def test_package_itself_needs_no_torch() -> None:
    """Reading the corpora and the package import work where torch is absent."""
    code = "import sys; sys.modules['torch'] = None; import edge.builtin, edge.builtin.data"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_held_out_tail_is_not_trained_on(corpora: Path) -> None:
    corpus = load_corpus(corpora)
    assert len(corpus.held_out) == 100_000
    cut = corpus.held_out.split(END_OF_TEXT)[1:]
    held_out = {piece.strip() for piece in cut}
    assert len(held_out) > 50
    assert not held_out & set(corpus.stories)
    lowered = {text.lower() for text in held_out}
    assert not lowered & {text.lower() for text in corpus.stories}


def test_new_lower_cased_stories_are_kept_and_recased(corpora: Path) -> None:
    corpus = load_corpus(corpora)
    assert corpus.counts["lower_stories"] == 130
    assert corpus.counts["lower_stories_kept"] == 60
    assert story(375) in corpus.stories


def test_same_files_give_the_same_corpus(corpora: Path) -> None:
    assert load_corpus(corpora) == load_corpus(corpora)


def test_books_are_plain_prose(corpora: Path) -> None:
    (book,) = load_corpus(corpora).books
    assert book.startswith("The goats went up") and "#" not in book


@pytest.mark.parametrize("name", ["tinystories.txt.xz", "tinystories-lower.txt.xz", "books-train.tar.xz"])
def test_missing_or_damaged_corpus_is_one_typed_line(corpora: Path, tmp_path: Path, name: str) -> None:
    for file in corpora.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(b"not xz at all")
    with pytest.raises(CorpusError, match="expected xz data") as damaged:
        load_corpus(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CorpusError, match="found none") as missing:
        load_corpus(tmp_path)
    for raised in (damaged, missing):
        assert name in str(raised.value) and "\n" not in str(raised.value)


def test_short_corpus_is_refused(tmp_path: Path) -> None:
    write_corpora(tmp_path, [story(1)], [story(2)])
    with pytest.raises(CorpusError, match="at least 200,000 characters"):
        load_corpus(tmp_path)


def test_split_leaves_out_the_story_under_the_cut() -> None:
    stories, tail = split_cased(f"First.\n{END_OF_TEXT}\nSecond is cut.\n{END_OF_TEXT}\nThird.", 25)
    assert stories == ["First."]
    assert tail.endswith("Third.") and len(tail) == 25


def test_lower_cased_stories_are_parted_and_mojibake_is_undone() -> None:
    first = "once upon a time there was a fox. " * 12 + "\n\nâ€œhello,â€ it said. it wasnâ€™t sad."
    second = "one day a bird sang. " * 20
    assert split_lower(first + "\n" + second) == [
        first.split("\n")[0].strip() + "\n“hello,” it said. it wasn’t sad.",
        second.strip(),
    ]


def test_drop_overlap_sees_through_case_and_punctuation() -> None:
    known = story(7)
    disguised = known.lower().replace(".", " !").replace('"', "")
    assert drop_overlap([disguised, story(8).lower()], known) == [story(8).lower()]


def test_recaser_restores_starts_quotes_i_and_learnt_names() -> None:
    recaser = Recaser([story(i) for i in range(60)])
    for seed in (1000, 1001, 1002):
        assert recaser.restore(story(seed).lower()) == story(seed)


def test_recaser_finds_an_introduced_name() -> None:
    recaser = Recaser([story(i) for i in range(30)])
    text = recaser.restore("one day a dog named zorbo saw a tree. the tree saw zorbo.")
    assert text.count("Zorbo") == 2


# The rest trains, with a model of a few thousand parameters.


@pytest.fixture(scope="module")
def recipe():  # type: ignore[no-untyped-def]
    pytest.importorskip("torch", reason="training the built-in models needs torch (pip install edge[train])")
    pytest.importorskip("safetensors", reason="exporting needs safetensors (pip install edge[train])")
    from edge.builtin import train

    return train


def tiny_settings(recipe, **changes):  # type: ignore[no-untyped-def]
    from edge.builtin.model import ModelConfig

    model = ModelConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return recipe.Settings(**{"model": model, "steps": 6, "rows": 4, "eval_steps": 3, **changes})


@pytest.fixture(scope="module")
def corpus(corpora: Path):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    loaded = load_corpus(corpora)
    return replace(loaded, stories=loaded.stories[:40], held_out=loaded.held_out[:3000])


def test_tokenizer_round_trips_any_text(recipe) -> None:  # type: ignore[no-untyped-def]
    from edge.builtin.tokens import train_tokenizer

    tokenizer = train_tokenizer([story(i) for i in range(20)], 400)
    for text in (story(50), "naïve “quotes” …\n\n  two  spaces", "日本語 🙂", "\x00\x7f", ""):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert tokenizer.encode("Hi").ids[0] == 0


def test_rows_are_a_function_of_their_number(recipe) -> None:  # type: ignore[no-untyped-def]
    import numpy as np

    from edge.builtin.tokens import RowSource

    texts = [np.arange(1, 1 + n) for n in (50, 70, 33, 41)]
    ahead = RowSource(texts, 16, seed=5)
    rows = [ahead.row(n) for n in range(2 * ahead.rows_per_epoch)]
    fresh = RowSource(texts, 16, seed=5)
    for n in reversed(range(len(rows))):
        assert np.array_equal(fresh.row(n), rows[n])
    assert not np.array_equal(np.concatenate(rows[:5]), np.concatenate(rows[ahead.rows_per_epoch :][:5]))
    assert all(len(row) == 17 for row in rows)


def test_windows_predict_every_token_once_with_context(recipe) -> None:  # type: ignore[no-untyped-def]
    from edge.builtin.held_out import windows

    for count in (1, 2, 9, 10, 11, 30, 31, 100):
        ids = list(range(count))
        cut = windows(ids, 8)
        assert [token for window, first in cut for token in window[first:]] == ids[1:]
        assert all(len(window) <= 9 for window, _ in cut)
        assert all(first >= 5 for _, first in cut[1:])


def test_schedule_warms_up_and_ends_at_zero(recipe) -> None:  # type: ignore[no-untyped-def]
    s = recipe.Settings()
    scales = [recipe.rate_scale(i / 1000, s) for i in range(1001)]
    assert 0 < scales[0] < 0.05 and max(scales) == 1.0 and scales[-1] == 0.0
    assert scales[500:] == sorted(scales[500:], reverse=True)
    assert recipe.book_share(0.0, s) == 0.5 and recipe.book_share(0.7, s) == 0.0


def test_resumed_run_equals_an_uninterrupted_one(recipe, corpus, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import torch

    settings = tiny_settings(recipe)
    whole = recipe.Trainer(corpus, settings, tmp_path / "whole")
    assert recipe.train(whole)
    first = recipe.Trainer(corpus, settings, tmp_path / "parts")
    assert not recipe.train(first, stopped=lambda: first.steps_done == 3)
    second = recipe.Trainer(corpus, settings, tmp_path / "parts")
    second.load()
    assert second.steps_done == 3
    recipe.train(second)
    assert second.losses == whole.losses
    assert len(whole.losses) == 6
    for mine, other in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    curve = json.loads((tmp_path / "parts" / "curve.json").read_text())
    assert [e["step"] for e in curve["evals"]] == [3, 6]


def test_training_lowers_the_loss(recipe, corpus, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    trainer = recipe.Trainer(corpus, tiny_settings(recipe, steps=40, eval_steps=20), tmp_path)
    recipe.train(trainer)
    assert sum(trainer.losses[-5:]) / 5 < trainer.losses[0] - 1.0
    assert trainer.evals[-1]["bits_per_byte"] < trainer.evals[0]["bits_per_byte"]


def test_damaged_checkpoints_are_refused(recipe, corpus, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    trainer = recipe.Trainer(corpus, tiny_settings(recipe), tmp_path)
    path = tmp_path / "checkpoint.bin"
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
    assert not list(tmp_path.glob("*.tmp"))


def test_checkpoint_of_another_run_is_refused(recipe, corpus, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe.Trainer(corpus, tiny_settings(recipe), tmp_path).save()
    other = recipe.Trainer(corpus, tiny_settings(recipe, seed=2), tmp_path)
    with pytest.raises(ArgumentError, match="other settings or corpora"):
        other.load()


def test_export_reads_back_equal_and_is_llama(recipe, corpus, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import torch
    from tokenizers import Tokenizer

    from edge.builtin.evaluate import bits_per_byte, ffn_sparsity, sample
    from edge.builtin.model import load_hf

    trainer = recipe.Trainer(corpus, tiny_settings(recipe), tmp_path)
    trainer.step()
    trainer.export()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_act"] == "relu" and config["tie_word_embeddings"] is True
    read = load_hf(tmp_path / "hf")
    tokens = torch.arange(20)[None]
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(read(tokens), trainer.model(tokens))
    tokenizer = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    exact = bits_per_byte(trainer.model, trainer.tokenizer, corpus.held_out)
    assert bits_per_byte(read, tokenizer, corpus.held_out) == exact
    assert 1.0 < exact < 10.0
    assert sample(read, tokenizer, "One day", tokens=8, seed=3).startswith("One day")
    assert all(0.2 < share < 0.8 for share in ffn_sparsity(read, tokenizer, story(3)))


def test_decoder_is_causal(recipe) -> None:  # type: ignore[no-untyped-def]
    import torch

    from edge.builtin.model import Decoder

    torch.manual_seed(0)
    model = Decoder(tiny_settings(recipe).model).eval()
    tokens = torch.randint(0, 300, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 300
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    assert torch.allclose(before[:12], after[:12], atol=1e-6)
    assert not torch.allclose(before[12:], after[12:], atol=1e-4)


def test_muon_update_is_nearly_orthogonal(recipe) -> None:  # type: ignore[no-untyped-def]
    import torch

    from edge.builtin.muon import orthogonalise

    torch.manual_seed(0)
    for shape in ((64, 32), (32, 64), (48, 48)):
        singular = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert singular.min() > 0.3 and singular.max() < 1.5


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


def test_command_reports_a_missing_corpus_in_one_line(recipe, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert recipe.main(["--corpora", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "tinystories.txt.xz" in error
    assert not (tmp_path / "out").exists()


def test_evaluate_command_prints_the_held_out_bits(  # type: ignore[no-untyped-def]
    recipe, corpora: Path, corpus, tmp_path: Path, capsys
) -> None:
    from edge.builtin import evaluate

    trainer = recipe.Trainer(corpus, tiny_settings(recipe), tmp_path)
    trainer.step()
    trainer.export()
    command = ["--model", str(tmp_path / "hf"), "--corpora"]
    assert evaluate.main([*command, str(corpora), "--prompt", "One day"]) == 0
    bits = evaluate.bits_per_byte(trainer.model, trainer.tokenizer, load_corpus(corpora).held_out)
    printed = capsys.readouterr().out
    assert printed.startswith(f"held-out bits per byte: {bits:.4f}\n") and "\nOne day" in printed
    assert evaluate.main([*command, str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
