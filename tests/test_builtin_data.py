"""The text of the built-in models: split, overlaps, case, and files that are missing or damaged."""

from __future__ import annotations

import subprocess
import sys
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
from tests.builtin_family import story, write_corpora, write_usual_corpora


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_usual_corpora(tmp_path_factory.mktemp("corpora"))


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
