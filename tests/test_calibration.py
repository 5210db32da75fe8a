"""Text that predictors are fitted to: how it is split, cut into rows, and run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import edge
from edge.calibration import capture, capture_bytes, perplexity, read_text, split_text, token_rows
from edge.engine import Engine
from flashload.errors import ArgumentError, DiskError
from tests.neuron_packs import tiny_relu

STORIES = [f"the cat {i} sat on a mat.\nthe dog ran {i} times, and on.\n" for i in range(40)]
TEXT = "<|endoftext|>\n".join(STORIES)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = tiny_relu(tmp_path_factory.mktemp("calibration"), max_position_embeddings=256)
    with edge.load(path, context=32) as loaded:
        yield loaded


def test_the_end_is_held_out_and_nothing_is_lost() -> None:
    fit, held_out = split_text(TEXT, 0.25)
    assert "".join("".join(fit + held_out).split()) == "".join("".join(STORIES).split())
    assert sum(map(len, held_out)) / len(TEXT) == pytest.approx(0.25, abs=0.06)
    assert fit[0] == STORIES[0].strip() and held_out[-1] == STORIES[-1].strip()
    assert split_text("one line without an end") == (["one line without an"], ["end"])


def test_rows_are_whole_documents_cut_to_length(engine: Engine) -> None:
    tokenizer = engine.tokenizer
    begin = tokenizer.encode("", add_special_tokens=True)
    rows = token_rows(tokenizer, STORIES, 16, 10_000)
    assert all(len(row) <= 16 and row[: len(begin)] == begin for row in rows)
    said = [tokenizer.encode(story, add_special_tokens=False) for story in STORIES]
    assert [t for row in rows for t in row[len(begin) :]] == [t for ids in said for t in ids]


def test_rows_stop_at_the_tokens_asked_for_in_the_order_of_the_seed(engine: Engine) -> None:
    rows = {seed: token_rows(engine.tokenizer, STORIES, 16, 101, seed) for seed in (None, 1, 2)}
    assert all(sum(map(len, row)) == 101 for row in rows.values())
    assert rows[1] == token_rows(engine.tokenizer, STORIES, 16, 101, 1)
    assert rows[1] != rows[2] != rows[None]


def test_a_long_document_is_cut_at_spaces(engine: Engine) -> None:
    """Pieces are tokenised by themselves; every word is whole in one of them."""
    document = "the cat sat on a mat " * 7000
    rows = token_rows(engine.tokenizer, [document], 4096, 1 << 20)
    words = engine.tokenizer.encode(" the cat sat on a mat", add_special_tokens=False)
    assert {t for row in rows for t in row} <= {*words, *engine.tokenizer.encode("the", True)}


def test_captured_rows_do_not_depend_on_rows_before(engine: Engine) -> None:
    rows = token_rows(engine.tokenizer, STORIES[:4], 32, 1000)
    blocks = [(b.inputs.copy(), b.open.copy()) for b in capture(engine, rows)]
    alone = [(b.inputs.copy(), b.open.copy()) for row in reversed(rows) for b in capture(engine, [row])]
    for index in (0, 1):
        together = np.concatenate([block[index] for block in blocks], axis=1)
        apart = np.concatenate([block[index] for block in reversed(alone)], axis=1)
        assert np.array_equal(together, apart) and together.shape[1] == sum(map(len, rows))
    one = blocks[0]
    assert one[0].nbytes + one[1].nbytes <= capture_bytes(2, 64, 96)


def test_capture_tells_how_far_it_is(engine: Engine) -> None:
    rows = token_rows(engine.tokenizer, STORIES, 32, 100)
    seen: list[tuple[int, int]] = []
    for _ in capture(engine, rows, lambda done, total: seen.append((done, total))):
        pass
    assert seen[-1] == (100, 100) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_perplexity_is_that_of_the_scores(engine: Engine) -> None:
    rows = token_rows(engine.tokenizer, STORIES, 32, 150)
    nats = [-s for row in rows for s in engine.score(row) if s is not None]
    assert perplexity(engine, rows) == pytest.approx(math.exp(sum(nats) / len(nats)))


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ArgumentError, match="expected UTF-8 text, found byte 3"):
        read_text(tmp_path / "latin")
    with pytest.raises(DiskError, match="cannot be read"):
        read_text(tmp_path / "none")
    (tmp_path / "text").write_text("été")
    assert read_text(tmp_path / "text") == "été"
