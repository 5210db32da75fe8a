"""Text to ids and back: known answers of real vocabularies, streaming, who may write special tokens."""

from __future__ import annotations

import functools
import itertools
import threading
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from flashload.errors import ArgumentError, DiskError, ModelFileError, TokenizerError
from flashload.vocab import Vocab, vocab_from_gguf
from tests.vocabs import CHATML, REAL, byte_level, byte_level_metadata, known_answers, real, spm, spm_metadata

_real = functools.lru_cache(maxsize=None)(real)
_byte_level = functools.lru_cache(maxsize=None)(byte_level)
_spm = functools.lru_cache(maxsize=None)(spm)
SMALL = [_byte_level, _spm]

# Text that comes close to special spellings far more often than chance would.
_shards = st.sampled_from(
    [*CHATML, "<|im_", "end|>", "<|", "|>", "im_start", "</s>", "<s>", "<", "s", ">", "\n", " ", "é", "🦙"]
)
tricky = st.lists(st.one_of(_shards, st.text(max_size=4)), max_size=12).map("".join)


@pytest.mark.parametrize("name", REAL)
def test_known_answers(shared: Path, name: str) -> None:
    tokenizer = _real(shared, name)
    answers = known_answers(shared, name)
    assert len(answers) == 47
    for text, ids in answers:
        assert tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)


@pytest.mark.parametrize("name", REAL)
def test_known_answers_decode_back(shared: Path, name: str) -> None:
    tokenizer = _real(shared, name)
    for text, ids in known_answers(shared, name):
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", REAL)
def test_decoding_agrees_with_the_tokenizers_library(shared: Path, name: str) -> None:
    tokenizer = _real(shared, name)
    for text, ids in known_answers(shared, name):
        assert tokenizer.decode(ids) == tokenizer._inner.decode(ids), repr(text)


@pytest.mark.parametrize("name", REAL)
def test_streaming_real_vocabularies(shared: Path, name: str) -> None:
    tokenizer = _real(shared, name)
    for text, ids in known_answers(shared, name):
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.finish() == text
        assert all("\ufffd" not in piece for piece in pieces)


def test_gguf_and_directory_of_one_model_agree(shared: Path) -> None:
    models = shared / "models"
    a, b = load_tokenizer(models / "tinystories-656k"), load_tokenizer(models / "tinystories-656k-q8_0.gguf")
    assert (a.bos_id, a.eos_ids, a.vocab_size) == (b.bos_id, b.eos_ids, b.vocab_size) == (1, (2,), 2048)
    for text in [
        "Once upon a time, there was a little girl.",
        "  two  spaces",
        'Tom said: "No!"\nHe ran.',
        "",
    ]:
        assert a.encode(text) == b.encode(text)
        assert a.decode(a.encode(text)) == text


def kept(make, text: str) -> str:
    """What the vocabulary's own normaliser makes of ``text``: NFC, as Qwen2's, or "▁" as the space it stands for."""
    return unicodedata.normalize("NFC", text) if make is _byte_level else text.replace("▁", " ")


@given(st.text(max_size=60))
@example("▁")
@example("e\u0301")
@pytest.mark.parametrize("make", SMALL)
def test_round_trip(make, text: str) -> None:
    tokenizer = make()
    assert tokenizer.decode(tokenizer.encode(text)) == kept(make, text)


@given(ids=st.lists(st.integers(0, 400), max_size=30), skip=st.booleans(), continues=st.booleans())
@pytest.mark.parametrize("make", SMALL)
def test_pushed_pieces_join_to_decode(make, ids: list[int], skip: bool, continues: bool) -> None:
    tokenizer = make()
    stream = StreamDecoder(tokenizer, skip, continues)
    assert "".join([stream.push(i) for i in ids]) + stream.finish() == tokenizer.decode(ids, skip, continues)


@given(ids=st.lists(st.integers(0, 255), max_size=12))
def test_streamed_text_never_changes_later(ids: list[int]) -> None:
    tokenizer = _byte_level()
    whole = bytes(b for i in ids for b in tokenizer.token_bytes(i))
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.finish() == whole.decode("utf-8", "replace")


@given(text=tricky)
@pytest.mark.parametrize("make", SMALL)
def test_plain_text_yields_no_special_id(make, text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert not tokenizer.special_ids.intersection(ids)
    assert tokenizer.decode(ids) in (text, kept(make, text))


@given(parts=st.lists(st.tuples(tricky, st.booleans()), max_size=6))
@pytest.mark.parametrize("make", SMALL)
def test_only_trusted_segments_yield_special_ids(make, parts: list[tuple[str, bool]]) -> None:
    tokenizer = make()
    ids = tokenizer.encode_segments(parts)
    found = [i for i in ids if i in tokenizer.special_ids]
    runs: list[list] = []
    for text, trusted in parts:
        if runs and runs[-1][1] == trusted:
            runs[-1][0] += text
        else:
            runs.append([text, trusted])
    wanted = [
        i
        for text, trusted in runs
        if trusted
        for i in tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        if i in tokenizer.special_ids
    ]
    assert found == wanted


@given(text=tricky, at=st.lists(st.integers(0, 60), max_size=4))
def test_where_segments_are_cut_does_not_matter(text: str, at: list[int]) -> None:
    """Spans are encoded together: with no special spelling near, cutting and trust change nothing."""
    tokenizer = _byte_level()
    text = text.replace("|", "!")
    cuts = sorted({0, len(text), *[min(a, len(text)) for a in at]})
    parts = [(text[a:b], k % 2 == 0) for k, (a, b) in enumerate(itertools.pairwise(cuts))]
    assert tokenizer.encode_segments(parts) == tokenizer.encode(text, add_special_tokens=False)


def test_trusted_markup_becomes_special_tokens() -> None:
    tokenizer = _byte_level()
    start, end = (tokenizer.token_to_id(t) for t in CHATML[1:])
    ids = tokenizer.encode_segments(
        [("<|im_start|>", True), ("hello<|im_end|>", False), ("<|im_end|>", True)]
    )
    assert [i for i in ids if i in tokenizer.special_ids] == [start, end]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hello<|im_end|><|im_end|>"
    assert tokenizer.decode(ids) == "hello<|im_end|>"


def test_a_spelling_across_trust_is_text() -> None:
    tokenizer = _byte_level()
    ids = tokenizer.encode_segments([("<|im_", False), ("end|>", True)])
    assert not tokenizer.special_ids.intersection(ids)
    joined = tokenizer.encode_segments([("<|im_", True), ("end|>", True)])
    assert joined == [tokenizer.token_to_id("<|im_end|>")]


def test_user_defined_tokens_stay_whole_in_any_text() -> None:
    tokenizer = _byte_level()
    think = tokenizer.token_to_id("<think>")
    assert think not in tokenizer.special_ids
    assert tokenizer.encode("<think>", add_special_tokens=False) == [think]
    assert tokenizer.decode([think]) == "<think>"


def test_a_special_token_that_is_also_a_word_is_cut() -> None:
    """A vocabulary whose end token is an ordinary piece: the text still cannot end itself."""
    metadata = byte_level_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    hello = tokens.index("hello")
    metadata["tokenizer.ggml.eos_token_id"] = hello
    vocab = vocab_from_gguf(metadata)
    tokenizer = Tokenizer(vocab)
    ids = tokenizer.encode("hello hello", add_special_tokens=False)
    assert hello not in ids and tokenizer.decode(ids) == "hello hello"
    ordinary = vocab_from_gguf(byte_level_metadata())
    tokenizer = Tokenizer(Vocab(ordinary.tokenizer_json, {**ordinary.config, "eos_ids": [hello]}))
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert hello not in ids and tokenizer.decode(ids) == "hello"
    assert tokenizer.encode("hello", add_special_tokens=False, parse_special=True) == [hello]


def test_a_special_token_of_one_character_cannot_be_hidden() -> None:
    ordinary = vocab_from_gguf(byte_level_metadata())
    tokenizer = Tokenizer(Vocab(ordinary.tokenizer_json, {**ordinary.config, "eos_ids": [ord("a")]}))
    with pytest.raises(TokenizerError, match="cannot write as plain text"):
        tokenizer.encode("a")
    assert tokenizer.decode(tokenizer.encode("b")) == "b"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("the", ["▁the"]),
        (" the", ["▁", "▁the"]),
        ("é", ["▁", "<0xC3>", "<0xA9>"]),
        ("</s>", ["▁", "<", "/", "s", ">"]),
        ("", []),
    ],
)
def test_sentencepiece_spelling(text: str, ids: list[str]) -> None:
    tokenizer = _spm()
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode(text, add_special_tokens=False)] == ids
    assert tokenizer.encode(text) == [1, *tokenizer.encode(text, add_special_tokens=False)]


def test_space_rule_when_a_text_continues() -> None:
    tokenizer = _spm()
    the = tokenizer.token_to_id("▁the")
    assert tokenizer.decode([the]) == "the"
    assert tokenizer.decode([the], continues=True) == " the"
    assert tokenizer.decode([the, the]) == "the the"


def test_no_space_is_put_where_the_file_says_so() -> None:
    tokenizer = Tokenizer(vocab_from_gguf(spm_metadata(**{"tokenizer.ggml.add_space_prefix": False})))
    assert tokenizer.id_to_token(tokenizer.encode("the", add_special_tokens=False)[0]) == "the"
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


def test_token_bytes() -> None:
    tokenizer, spm_tokenizer = _byte_level(), _spm()
    assert [tokenizer.token_bytes(b) for b in range(256)] == [bytes([b]) for b in range(256)]
    assert tokenizer.token_bytes(tokenizer.token_to_id("Ġw") or -1) == b" w"
    assert spm_tokenizer.token_bytes(3 + 0xE9) == b"\xe9"
    assert spm_tokenizer.token_bytes(spm_tokenizer.token_to_id("▁th") or -1) == b" th"
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""


def test_ids_outside_the_vocabulary_have_no_text() -> None:
    tokenizer = _byte_level()
    assert tokenizer.id_to_token(tokenizer.vocab_size) is None
    assert tokenizer.id_to_token(-1) is None
    assert tokenizer.decode([tokenizer.vocab_size + 1, -3, ord("a")]) == "a"


def test_secret_spellings_do_not_show() -> None:
    tokenizer = _byte_level()
    secret = next(iter(tokenizer._stand_in.values()))
    assert tokenizer.token_to_id(secret) is None
    assert byte_level()._stand_in != tokenizer._stand_in


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_lone_surrogates_are_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="surrogate"):
        _byte_level().encode(text)


def test_text_must_be_text() -> None:
    with pytest.raises(ArgumentError, match="expected str, found bytes"):
        _byte_level().encode(b"hello")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed",
    [
        {"eos_ids": [10**9]},
        {"eos_ids": "2"},
        {"eos_ids": [True]},
        {"eos_ids": [None]},
        {"bos_id": -1},
        {"bos_id": "1"},
        {"add_bos": True, "bos_id": None},
        {"prefix_ids": [10**9]},
    ],
)
def test_hostile_config_is_refused(changed: dict) -> None:
    vocab = vocab_from_gguf(byte_level_metadata())
    with pytest.raises(TokenizerError):
        Tokenizer(Vocab(vocab.tokenizer_json, {**vocab.config, **changed}))


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"model": {"type": "BPE"}}', "\0", "{" * 10000])
def test_hostile_serialisation_is_refused(text: str) -> None:
    with pytest.raises(TokenizerError):
        Tokenizer(Vocab(text, {}))


def test_prefix_and_suffix_ids() -> None:
    vocab = vocab_from_gguf(byte_level_metadata())
    tokenizer = Tokenizer(
        Vocab(vocab.tokenizer_json, {**vocab.config, "prefix_ids": [1, 2], "suffix_ids": [3]})
    )
    assert tokenizer.encode("a") == [1, 2, ord("a"), 3]
    assert tokenizer.encode("a", add_special_tokens=False) == [ord("a")]


def test_threads_share_one_tokenizer() -> None:
    tokenizer = _byte_level()
    text = "hello world <|im_end|> " * 50
    want = tokenizer.encode(text), tokenizer.encode(text, parse_special=True)
    wrong: list[object] = []

    def work() -> None:
        for _ in range(20):
            if (tokenizer.encode(text), tokenizer.encode(text, parse_special=True)) != want:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DiskError):
        load_tokenizer(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"what is this")
    with pytest.raises(TokenizerError, match="expected a GGUF file"):
        load_tokenizer(tmp_path / "x.bin")


@pytest.mark.nightly
@settings(max_examples=100_000, deadline=None)
@given(text=tricky)
def test_plain_text_yields_no_special_id_at_length(text: str) -> None:
    for make in SMALL:
        assert not make().special_ids.intersection(make().encode(text, add_special_tokens=False))
