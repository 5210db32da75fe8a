"""Sessions on disk: restored bit for bit, and nothing else than what was saved is ever restored."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import _edge
import pytest
import xxhash

import edge
from flashload.errors import (
    CancelledError,
    ContextOverflowError,
    CorruptError,
    DiskError,
    EdgeError,
    ModelFileError,
    UnsupportedModelError,
)
from flashload.pack import pack
from tests.kv_engines import CONTEXT, PROMPT, answer, open_engine, plan_of
from tests.tiny import tiny_hf, tiny_llama_gguf

HEADER_BYTES = 4096
RESIDENT, ON_FLASH = None, (3, 2, 8)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("session")
    long = {"max_position_embeddings": 1024}
    sources = {
        "llama": tiny_llama_gguf(folder / "llama.gguf", type="q8_0", seed=5, num_hidden_layers=3, **long),
        "other": tiny_llama_gguf(folder / "other.gguf", type="q8_0", seed=6, num_hidden_layers=3, **long),
        "window": tiny_hf(folder / "window", "mistral", sliding_window=40, **long),
        "wide": tiny_llama_gguf(folder / "wide.gguf", type="q8_0", head_dim=64, **long),
        # Rows so short that sixteen of them are no input for the hash of long ones.
        "narrow": tiny_llama_gguf(
            folder / "narrow.gguf",
            type="f32",
            head_dim=6,
            num_attention_heads=1,
            num_key_value_heads=1,
            **long,
        ),
    }
    for name, source in sources.items():
        pack(source, folder / f"{name}.edge")
    return {name: folder / f"{name}.edge" for name in sources}


@pytest.fixture
def saved(packs: dict[str, Path], tmp_path: Path) -> Path:
    sequence = _edge.Sequence(open_engine(packs["llama"], tmp_path, RESIDENT))
    answer(sequence, PROMPT[:70], 3)
    path = tmp_path / "text.session"
    _edge.save_session(sequence, str(path))
    return path


def goes_on(sequence: _edge.Sequence, n: int = 12) -> list[tuple[int, float]]:
    sampler = _edge.Sampler({"temperature": 0.0}, 320)
    return [sequence.next(sampler)[:2] for _ in range(n)]


@pytest.mark.parametrize("after", [RESIDENT, ON_FLASH], ids=["to-memory", "to-flash"])
@pytest.mark.parametrize("before", [RESIDENT, ON_FLASH], ids=["memory", "flash"])
@pytest.mark.parametrize("name", ["llama", "window", "wide", "narrow"])
def test_the_text_goes_on_as_if_nothing_had_happened(
    name: str, before: Any, after: Any, packs: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "text.session"
    first = _edge.Sequence(open_engine(packs[name], tmp_path, before))
    for n in (1, 15, 16, 17, 130):
        answer(first, PROMPT[:n], 2)
        _edge.save_session(first, str(path))
        second = _edge.Sequence(open_engine(packs[name], tmp_path, after))
        _edge.load_session(second, str(path))
        assert second.tokens == first.tokens
        assert second.n_pending == 1  # the last token: its logits are drawn from
        assert goes_on(second) == goes_on(first)
        again = _edge.Sequence(open_engine(packs[name], tmp_path, after))
        _edge.load_session(again, str(path))
        assert again.set_tokens([*PROMPT[:n], 7, 8]) == n
    assert [p.name for p in tmp_path.iterdir()] == ["text.session"]


def test_the_same_text_is_the_same_file(packs: dict[str, Path], tmp_path: Path) -> None:
    """Whatever was rolled back behind it, and wherever the pages were."""
    files = []
    for i, kv in enumerate((RESIDENT, ON_FLASH)):
        sequence = _edge.Sequence(open_engine(packs["llama"], tmp_path, kv))
        answer(sequence, PROMPT[: 200 if i else 90], 1)
        sequence.set_tokens(PROMPT[:77])
        sequence.advance()
        if sequence.n_pending:
            goes_on(sequence, 0)
        while sequence.n_pending:
            sequence.advance()
        path = tmp_path / f"{i}.session"
        _edge.save_session(sequence, str(path))
        files.append(path.read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("kv_type", ["f16", "int8"])
def test_a_fork_is_saved_as_the_text_it_is(kv_type: str, packs: dict[str, Path], tmp_path: Path) -> None:
    """Whose pages it shares does not matter, nor that the other text goes on."""

    def saved_bytes(sequence: _edge.Sequence) -> bytes:
        _edge.save_session(sequence, str(tmp_path / "text.session"))
        return (tmp_path / "text.session").read_bytes()

    engines = [open_engine(packs["llama"], tmp_path, RESIDENT, kv_type=kv_type) for _ in range(2)]
    trunk, alone = (_edge.Sequence(engine) for engine in engines)
    answer(trunk, PROMPT[:90], 1)
    for n in (90, 80, 71, 64):
        answer(alone, PROMPT[:n], 1)
        fork = trunk.fork(n)
        answer(fork, PROMPT[:n], 1)
        assert saved_bytes(fork) == saved_bytes(alone)
        want = goes_on(fork)
        del fork  # its pages
        answer(trunk, PROMPT[:90], 1)
        _edge.load_session(alone, str(tmp_path / "text.session"))
        assert goes_on(alone) == want
    answer(alone, PROMPT[:90], 1)
    assert saved_bytes(trunk) == saved_bytes(alone)


@pytest.mark.parametrize("kv", ["memory", "flash"])
@pytest.mark.parametrize("kv_type", ["f16", "int8", "int4"])
def test_a_text_that_was_guessed_is_the_same_file(
    kv_type: str, kv: str, packs: dict[str, Path], tmp_path: Path
) -> None:
    """Rows of guesses that were wrong leave nothing behind; and a restored text goes on under speculation."""
    settings: dict[str, Any] = {"max_tokens": 40, "temperature": 0.6, "seed": 4, "ignore_eos": True}
    prompt = PROMPT[:30] * 2
    ways = ("off", {"drafters": "lookup", "depth": 3}, {"drafters": "lookahead", "depth": 3})
    files, texts = [], []
    with edge.load(packs["llama"], context=300, threads=2, kv=kv, kv_type=kv_type) as engine:
        for way in ways:
            engine.forget()
            found = engine.generate(prompt, speculation=way, **settings)
            assert way == "off" or found.stats["speculation"]["passes"] > 0
            # Whether the last token drawn was computed depends on whether it was guessed.
            engine._sequence.truncate(len(prompt) + 39)  # type: ignore[union-attr]
            engine.save_session(tmp_path / "text.session")
            files.append((tmp_path / "text.session").read_bytes())
            text = [*prompt, *found.tokens[:39], 7]
            engine.generate([9, 8, 7], speculation="off", **settings)
            assert engine.load_session(tmp_path / "text.session") == text[:-1]
            texts.append(engine.generate(text, speculation=way, **settings).tokens)
    assert files[0] == files[1] == files[2] and texts[0] == texts[1] == texts[2]


def test_an_empty_and_a_pending_text(packs: dict[str, Path], tmp_path: Path) -> None:
    path = str(tmp_path / "text.session")
    sequence = _edge.Sequence(open_engine(packs["llama"], tmp_path, RESIDENT))
    _edge.save_session(sequence, path)
    other = _edge.Sequence(open_engine(packs["llama"], tmp_path, RESIDENT))
    other.set_tokens([5, 6])
    _edge.load_session(other, path)
    assert other.tokens == []
    sequence.set_tokens([5, 6, 7])
    _edge.save_session(sequence, path)
    _edge.load_session(other, path)
    assert other.tokens == [5, 6, 7] and other.n_pending == 3
    assert goes_on(other) == goes_on(sequence)


def refused(
    saved: Path, packs: dict[str, Path], kind: type[EdgeError], match: str, name: str = "llama"
) -> None:
    """Loading fails in one line, and the sequence is empty and works."""
    sequence = _edge.Sequence(open_engine(packs[name], saved.parent, RESIDENT))
    answer(sequence, PROMPT[:20], 1)
    with pytest.raises(kind, match=match) as error:
        _edge.load_session(sequence, str(saved))
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    assert sequence.tokens == []
    assert len(answer(sequence, PROMPT[:20], 1)) == 1


def test_another_model_is_refused(saved: Path, packs: dict[str, Path]) -> None:
    refused(saved, packs, UnsupportedModelError, "another model", "other")


def test_a_shorter_context_is_refused(saved: Path, packs: dict[str, Path], tmp_path: Path) -> None:
    engine = open_engine(packs["llama"], tmp_path, RESIDENT, plan=plan_of(packs["llama"], context=64))
    with pytest.raises(ContextOverflowError, match="holds 73 tokens, the context 64"):
        _edge.load_session(_edge.Sequence(engine), str(saved))


def test_no_session_at_all(saved: Path, packs: dict[str, Path]) -> None:
    saved.write_bytes(b"x" * 10000)
    refused(saved, packs, ModelFileError, "expected a saved session")
    saved.write_bytes(b"")
    refused(saved, packs, ModelFileError, "ends at byte 0")
    saved.unlink()
    refused(saved, packs, ModelFileError, "cannot be opened")
    saved.mkdir()
    refused(saved, packs, ModelFileError, "regular file")
    saved.rmdir()
    os.mkfifo(saved)
    refused(saved, packs, ModelFileError, "regular file")


def test_cut_short_or_too_long(saved: Path, packs: dict[str, Path]) -> None:
    whole = saved.read_bytes()
    for length in (1, 100, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 5, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        refused(saved, packs, ModelFileError, "expected a file of|ends at byte")
    saved.write_bytes(whole + b"\0")
    refused(saved, packs, ModelFileError, "expected a file of")


def test_every_damaged_byte_is_found(saved: Path, packs: dict[str, Path]) -> None:
    whole = saved.read_bytes()
    positions = [0, 8, 12, 16, 24, 32, 40, 44, 48, 2000, HEADER_BYTES - 1]
    positions += [HEADER_BYTES + 1, HEADER_BYTES + 73 * 4, *range(HEADER_BYTES + 400, len(whole), 7919)]
    positions.append(len(whole) - 1)
    sequence = _edge.Sequence(open_engine(packs["llama"], saved.parent, RESIDENT))
    for at in positions:
        damaged = bytearray(whole)
        damaged[at] ^= 0x20
        saved.write_bytes(damaged)
        with pytest.raises(EdgeError) as error:
            _edge.load_session(sequence, str(saved))
        if at >= 16:
            assert type(error.value) is CorruptError, at
        assert sequence.tokens == []
    saved.write_bytes(whole)
    _edge.load_session(sequence, str(saved))
    assert len(sequence.tokens) == 73


def test_chunks_that_change_places_are_found(saved: Path, packs: dict[str, Path]) -> None:
    whole = saved.read_bytes()
    chunk = 16 * 32 * 2 + 8
    at = HEADER_BYTES + 73 * 4 + 8
    first, second = whole[at : at + chunk], whole[at + chunk : at + 2 * chunk]
    saved.write_bytes(whole[:at] + second + first + whole[at + 2 * chunk :])
    refused(saved, packs, CorruptError, "keys of layer 0 at token 0")


def test_a_header_that_lies_is_refused(saved: Path, packs: dict[str, Path]) -> None:
    """Values out of range under a valid hash."""
    whole = saved.read_bytes()
    for at, value, kind in [
        (24, 1 << 40, ContextOverflowError),  # tokens
        (24, CONTEXT, ModelFileError),
        (32, 74, ModelFileError),  # committed beyond the tokens
        (32, (1 << 64) - 1, ModelFileError),
        (40, 2, ModelFileError),  # layers (and a kv_dim of 0)
        (8, 2, UnsupportedModelError),  # version
    ]:
        head = bytearray(whole[: HEADER_BYTES - 8])
        head[at : at + 8] = value.to_bytes(8, "little")
        saved.write_bytes(
            head + xxhash.xxh3_64_intdigest(bytes(head)).to_bytes(8, "little") + whole[HEADER_BYTES:]
        )
        refused(saved, packs, kind, "expected|holds")
    tokens = bytearray(whole[HEADER_BYTES : HEADER_BYTES + 73 * 4])
    tokens[8:12] = (320).to_bytes(4, "little")
    hashed = xxhash.xxh3_64_intdigest(bytes(tokens)).to_bytes(8, "little")
    saved.write_bytes(whole[:HEADER_BYTES] + tokens + hashed + whole[HEADER_BYTES + 73 * 4 + 8 :])
    refused(saved, packs, ModelFileError, "expected tokens in 0..319, found 320")


@pytest.mark.parametrize("kind", ["eio", "enospc", "zero"])
def test_a_save_that_fails_leaves_what_was_there(
    kind: str, saved: Path, packs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    sequence = _edge.Sequence(open_engine(packs["llama"], tmp_path, RESIDENT))
    tokens = answer(sequence, PROMPT[:40], 2)
    for at in (0, 1, 2, 3, 11):
        monkeypatch.setenv("EDGE_IO_WRITE_FAULT", f"{kind}@{at}")
        with pytest.raises(DiskError, match=r"text\.session: write"):
            _edge.save_session(sequence, str(saved))
        assert saved.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["text.session"]
    monkeypatch.setenv("EDGE_IO_WRITE_FAULT", "short@0,again@1,short@2,short@5,again@6")
    _edge.save_session(sequence, str(saved))
    monkeypatch.delenv("EDGE_IO_WRITE_FAULT")
    _edge.load_session(sequence, str(saved))
    assert sequence.tokens == [*PROMPT[:40], *(token for token, _ in tokens)]


@pytest.mark.parametrize("fault", ["eio@{}", "zero@{}", "flip@{}:99", "again@{},short@{}"])
def test_a_drive_that_fails_while_loading(
    fault: str, saved: Path, packs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = _edge.Sequence(open_engine(packs["llama"], tmp_path, ON_FLASH))
    for at in (0, 1, 2, 3, 4, 20):
        monkeypatch.setenv("EDGE_IO_FAULT", fault.format(at, at + 1))
        if fault.startswith("again"):
            _edge.load_session(sequence, str(saved))
            assert len(sequence.tokens) == 73
            continue
        with pytest.raises((DiskError, CorruptError, ModelFileError)):
            _edge.load_session(sequence, str(saved))
        assert sequence.tokens == []
    monkeypatch.delenv("EDGE_IO_FAULT")
    _edge.load_session(sequence, str(saved))
    assert len(goes_on(sequence)) == 12


def test_a_folder_that_is_not_there(saved: Path, packs: dict[str, Path], tmp_path: Path) -> None:
    sequence = _edge.Sequence(open_engine(packs["llama"], tmp_path, RESIDENT))
    with pytest.raises(DiskError, match="cannot be created"):
        _edge.save_session(sequence, str(tmp_path / "none" / "a.session"))


def test_cancelled(saved: Path, packs: dict[str, Path], tmp_path: Path) -> None:
    engine = open_engine(packs["llama"], tmp_path, ON_FLASH)
    sequence = _edge.Sequence(engine)
    engine.cancel()
    with pytest.raises(CancelledError):
        _edge.load_session(sequence, str(saved))
    assert sequence.tokens == []
    engine.resume()
    _edge.load_session(sequence, str(saved))
    engine.cancel()
    with pytest.raises(CancelledError):
        _edge.save_session(sequence, str(saved))
    engine.resume()
    assert [p.name for p in tmp_path.iterdir()] == ["text.session"]


def test_the_python_api(packs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "chat.session"
    settings: dict[str, Any] = {"max_tokens": 10, "temperature": 0, "ignore_eos": True}
    with edge.load(packs["wide"], memory="512MiB", context=300, threads=2) as engine:
        first = engine.generate(PROMPT, **settings)
        engine.save_session(path)
        text = [*PROMPT, *first.tokens]
        want = engine.generate([*text, 9], **settings)
    with edge.load(packs["wide"], memory="512MiB", context=300, threads=1, kv="flash") as engine:
        assert engine.load_session(path) == text
        found = engine.generate([*text, 9], **settings)
        assert found.tokens == want.tokens
        assert found.stats["reused_tokens"] >= len(text) - 1
    with pytest.raises(EdgeError, match="closed"):
        engine.save_session(path)
