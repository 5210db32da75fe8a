"""Texts that memory has no room for are parked in files and read again: never another text, never more than allowed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge
from edge.errors import ArgumentError
from edge.parked import Pace, Parking
from edge.text_index import TextIndex, n_common

#: Keys and values of one text of the shipped model are about half a megabyte.
_ROOM = "64MiB"


def _prompt(begin: int, n: int = 200) -> list[int]:
    return [*range(300, 340), *range(begin, begin + n)]


def _generate(engine: edge.Engine, tokens: list[int], **settings: Any) -> edge.Completion:
    return engine.generate(tokens, **({"max_tokens": 8, "temperature": 0, "ignore_eos": True} | settings))


@pytest.fixture(scope="module")
def alone() -> Iterator[edge.Engine]:
    with edge.load("story", context=1024, pressure="off") as found:
        yield found


def _fresh(alone: edge.Engine, tokens: list[int], **settings: Any) -> list[int]:
    alone.forget()
    return _generate(alone, tokens, **settings).tokens


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_SCRATCH", str(tmp_path))
    # What pays depends on the machine; a test says.
    monkeypatch.setattr(Pace, "reading_pays", lambda self, n_tokens, n_bytes: True)
    return tmp_path


def _open(prefix_disk: int | str | None = _ROOM, **options: Any) -> edge.Engine:
    return edge.load("story", **({"context": 1024, "pressure": "off", "prefix_disk": prefix_disk} | options))


def _files(scratch: Path) -> list[Path]:
    return sorted(scratch.glob("edge-prefixes-*/*"), key=lambda path: int(path.stem))


def _crowd_out(engine: edge.Engine) -> None:
    """A text that takes the whole context: all others leave memory."""
    _generate(engine, list(range(2500, 2600)), max_tokens=1024 - 100)
    assert len(engine._prefixes) == 0


@pytest.mark.parametrize("speculation", ["off", "lookup", "lookahead"])
def test_a_parked_text_goes_on_as_if_nothing_had_happened(
    speculation: str, scratch: Path, alone: edge.Engine
) -> None:
    settings: dict[str, Any] = {"temperature": 0.7, "seed": 5, "speculation": speculation}
    with _open() as engine:
        first, second = _prompt(1000), _prompt(2000)
        texts = [_generate(engine, tokens, **settings) for tokens in (first, second)]
        _crowd_out(engine)
        assert engine._prefixes.n_parked == len(_files(scratch)) >= 2
        for tokens, before in zip((first, second), texts, strict=True):
            again = _generate(engine, tokens, **settings)
            assert again.stats["reused_tokens"] == len(tokens) - 1
            assert again.tokens == before.tokens == _fresh(alone, tokens, **settings)
            longer = [*tokens, *again.tokens, 77, 78]
            assert _generate(engine, longer).tokens == _fresh(alone, longer)
        assert engine.notes == () and engine.stats()["peak_bytes"] <= engine.stats()["budget_bytes"]


@pytest.mark.parametrize("options", [{"kv": "flash"}, {"kv_type": "int4"}, {"kv_type": "int8"}], ids=str)
def test_conversations_in_turn_whatever_keys_and_values_are(options: dict[str, str], scratch: Path) -> None:
    """Also where texts cannot share pages of memory: then each is parked when another one begins."""
    with _open(**options) as engine, _open(None, **options) as other:
        talks = [_prompt(900 + 300 * i) for i in range(3)]
        for turn in range(3):
            for i, talk in enumerate(talks):
                done = _generate(engine, talk, temperature=0.7, seed=i)
                if turn:
                    # Of 4 bits, up to a block of 64 tokens is computed again.
                    assert done.stats["reused_tokens"] >= len(talk) - 2 - 64
                other.forget()
                assert done.tokens == _generate(other, talk, temperature=0.7, seed=i).tokens
                talk += [*done.tokens, 400 + turn]
        assert engine.notes == ()
    assert list(scratch.iterdir()) == []


def test_files_stay_within_their_bytes(scratch: Path, alone: edge.Engine) -> None:
    with _open(2 << 20) as engine:
        prompts = [_prompt(400 + 250 * i) for i in range(9)]
        for tokens in prompts:
            _generate(engine, tokens)
        _crowd_out(engine)
        sizes = [path.stat().st_size for path in _files(scratch)]
        assert 0 < sum(sizes) == engine._prefixes.parked_bytes <= 2 << 20
        assert engine._prefixes.n_parked == len(sizes) < len(prompts)
        last = _generate(engine, prompts[-1])
        assert last.stats["reused_tokens"] == len(prompts[-1]) - 1
        assert last.tokens == _fresh(alone, prompts[-1])
        assert _generate(engine, prompts[0]).stats["reused_tokens"] < len(prompts[0]) - 1


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_told_and_computed_again(damage: str, scratch: Path, alone: edge.Engine) -> None:
    with _open() as engine:
        first = _prompt(1000)
        _generate(engine, first)
        _crowd_out(engine)
        (path,) = [path for path in _files(scratch) if path.stem == "1"]
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 1
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(whole if damage == "flip" else whole[: len(whole) // 2])
        again = _generate(engine, first)
        assert again.tokens == _fresh(alone, first)
        assert again.stats["reused_tokens"] < 40
        assert len(engine.notes) == 1 and "parked text computed again: " in engine.notes[0]
        assert path not in _files(scratch)


def test_a_drive_that_cannot_be_written(
    scratch: Path, alone: edge.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _open() as engine:
        first = _prompt(1000)
        _generate(engine, first)
        monkeypatch.setenv("EDGE_IO_WRITE_FAULT", "enospc@0")
        _crowd_out(engine)
        monkeypatch.delenv("EDGE_IO_WRITE_FAULT")
        assert "parked text not written: " in engine.notes[0]
        assert _generate(engine, first).tokens == _fresh(alone, first)


def test_a_folder_that_cannot_be_made(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (scratch / "file").write_text("")
    monkeypatch.setenv("EDGE_SCRATCH", str(scratch / "file" / "none"))
    with _open() as engine:
        _generate(engine, _prompt(1000))
        _crowd_out(engine)
        assert "cannot be made" in engine.notes[0] and engine._prefixes.n_parked == 0


def test_what_does_not_pay_is_not_read(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _open() as engine:
        first = _prompt(1000)
        _generate(engine, first)
        _crowd_out(engine)
        monkeypatch.setattr(Pace, "reading_pays", lambda self, n_tokens, n_bytes: False)
        assert _generate(engine, first).stats["reused_tokens"] < 40


def test_several_texts_at_once_park_the_others(scratch: Path, alone: edge.Engine) -> None:
    with _open() as engine:
        first, second = _prompt(1000), _prompt(2000)
        _generate(engine, first)
        _generate(engine, second)
        engine.generate_many([[5, 6, 7], [8, 9]], max_tokens=4, temperature=0, ignore_eos=True)
        assert len(engine._prefixes) == 0 < engine._prefixes.n_parked
        again = _generate(engine, first)
        assert again.stats["reused_tokens"] == len(first) - 1 and again.tokens == _fresh(alone, first)


def test_files_outlive_a_change_of_the_budget(scratch: Path, alone: edge.Engine) -> None:
    with _open() as engine:
        first = _prompt(1000)
        _generate(engine, first)
        _crowd_out(engine)
        engine.set_memory(engine.plan.memory_bytes - (8 << 20))
        again = _generate(engine, first)
        assert again.stats["reused_tokens"] == len(first) - 1 and again.tokens == _fresh(alone, first)


def test_forgotten_is_forgotten_and_closed_is_gone(scratch: Path) -> None:
    with _open() as engine:
        first = _prompt(1000)
        _generate(engine, first)
        _crowd_out(engine)
        assert _files(scratch)
        engine.forget()
        assert _files(scratch) == [] and _generate(engine, first).stats["reused_tokens"] == 0
        _crowd_out(engine)
        (folder,) = scratch.iterdir()
        assert folder.stat().st_mode & 0o077 == 0
    assert list(scratch.iterdir()) == []


def test_nothing_is_written_unasked(scratch: Path) -> None:
    with _open(None) as engine:
        _generate(engine, _prompt(1000))
        _crowd_out(engine)
        assert list(scratch.iterdir()) == []


def test_what_a_process_left_is_removed(scratch: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    left, own = scratch / f"edge-prefixes-{int(done.stdout)}-x", scratch / f"edge-prefixes-{os.getpid()}-y"
    for folder in (left, own):
        folder.mkdir()
    with _open() as engine:
        _generate(engine, _prompt(1000))
        _crowd_out(engine)
        assert not left.exists() and own.exists()


@pytest.mark.parametrize("value", [0, -1, "much", True])
def test_a_size_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match="prefix_disk: expected"):
        edge.load("story", prefix_disk=value)


def test_pace() -> None:
    pace = Pace()
    assert pace.reading_pays(1, 1 << 40)
    pace.token_seconds, pace.byte_seconds = 0.01, 1e-9
    assert pace.reading_pays(100, 10**8) and not pace.reading_pays(100, 10**10)
    parking = Parking(1 << 20)
    parking.pace = pace
    parking._token_bytes = 1e8  # a text of so large tokens is not even written
    assert parking.park(None, 10) is None  # type: ignore[arg-type]


class _Text:
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = np.asarray(tokens, np.int32)


def test_the_index_finds_what_looking_at_all_finds() -> None:
    draw = random.Random(3)
    index: TextIndex[_Text] = TextIndex()
    texts: list[_Text] = []
    for _ in range(300):
        base = draw.choice(texts).tokens.tolist() if texts and draw.random() < 0.7 else []
        tokens = base[: draw.randrange(len(base) + 1)] + [
            draw.randrange(3) for _ in range(draw.randrange(60))
        ]
        wanted = np.asarray(tokens, np.int32)
        most = max((n_common(text.tokens, wanted) for text in texts), default=0)
        found, n = index.best(wanted, lambda text: True)
        assert n == (most if most >= 16 else 0)
        assert (found is None) == (n == 0) and (found is None or n_common(found.tokens, wanted) == n)
        begun = [
            one for one in texts if len(one.tokens) >= 16 and n_common(one.tokens, wanted) == len(one.tokens)
        ]
        assert {id(one) for one in index.begun_by(wanted)} == {id(one) for one in begun}
        texts.append(_Text(tokens))
        index.add(texts[-1])
        if len(texts) > 25:
            index.remove(texts.pop(draw.randrange(len(texts))))
    for text in texts:
        index.remove(text)
    assert index._at == {}
