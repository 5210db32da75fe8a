"""Conversion of the tokenizers found in checkpoints, good and hostile."""

from __future__ import annotations

import heapq
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.tokenizer import Tokenizer, load_tokenizer
from flashload.errors import EdgeError, ModelFileError, TokenizerError, UnsupportedModelError
from flashload.vocab import Vocab, vocab_from_gguf, vocab_from_hf
from flashload.vocab_pre import PRE_TOKENIZERS
from flashload.vocab_spm import vocab_from_sentencepiece
from tests.vocabs import CHATML_TEMPLATE, byte_level_metadata, real, sentencepiece_model, spm_metadata

BYTE_LEVEL, SPM = byte_level_metadata, spm_metadata


def sentencepiece_by_definition(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece BPE by definition: join the best-scoring neighbours, leftmost first."""
    symbols: list[str | None] = list(text)
    queue: list[tuple[float, int, int, str]] = []

    def offer(i: int, j: int) -> None:
        joined = (symbols[i] or "") + (symbols[j] or "")
        if joined in scores:
            heapq.heappush(queue, (-scores[joined], i, j, joined))

    def after(i: int) -> int | None:
        return next((j for j in range(i + 1, len(symbols)) if symbols[j] is not None), None)

    for i in range(len(symbols) - 1):
        offer(i, i + 1)
    while queue:
        _, i, j, joined = heapq.heappop(queue)
        if (
            symbols[i] is None
            or symbols[j] is None
            or after(i) != j
            or (symbols[i] or "") + (symbols[j] or "") != joined
        ):
            continue
        symbols[i], symbols[j] = joined, None
        before = next((k for k in range(i - 1, -1, -1) if symbols[k] is not None), None)
        if before is not None:
            offer(before, i)
        if (following := after(i)) is not None:
            offer(i, following)
    return [s for s in symbols if s is not None]


def check_against_definition(tokenizer: Tokenizer, metadata: dict[str, Any], text: str) -> None:
    types = metadata["tokenizer.ggml.token_type"]
    scores = {
        t: s
        for t, s, k in zip(
            metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], types, strict=True
        )
        if k == 1
    }
    want: list[int] = []
    for piece in sentencepiece_by_definition("▁" + text.replace(" ", "▁"), scores):
        found = tokenizer.token_to_id(piece)
        want += (
            [found] if found is not None else [tokenizer.token_to_id(f"<0x{b:02X}>") for b in piece.encode()]
        )
    assert tokenizer.encode(text, add_special_tokens=False) == want, repr(text)


@given(st.text(alphabet="theac< /s>é", min_size=1, max_size=40))
def test_sentencepiece_merges_follow_the_definition(text: str) -> None:
    check_against_definition(_SPM_TOKENIZER, SPM(), text)


_SPM_TOKENIZER = Tokenizer(vocab_from_gguf(spm_metadata()))


def test_sentencepiece_merges_of_a_real_vocabulary(shared: Path) -> None:
    from flashload.checkpoint import open_checkpoint

    with open_checkpoint(shared / "vocabs" / "ggml-vocab-phi-3.gguf") as checkpoint:
        metadata = dict(checkpoint.metadata)
    tokenizer = real(shared, "phi-3")
    words = (
        (shared / "prompts" / "README.md").read_text() if (shared / "prompts" / "README.md").exists() else ""
    )
    words = (words + " The quick brown fox, aaaaa bbb; 12345 naïve café — 你好 def f(x): return x**2").split(
        " "
    )
    rng = random.Random(5)
    for _ in range(150):
        text = " ".join(rng.choices(words, k=6)).replace("<", "(") + " " * rng.randrange(6) + "x"
        check_against_definition(tokenizer, metadata, text)


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_text_whole(name: str) -> None:
    tokenizer = Tokenizer(
        vocab_from_gguf(BYTE_LEVEL(**{"tokenizer.ggml.pre": name, "tokenizer.ggml.bos_token_id": 0}))
    )
    text = "Hello  world's 1234567 naïve Ǆ 你好こんにちは!?\r\n\t  ...=>\n\n ok 🦙 don'T\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gpt-2", "Hi 1234", ["Hi", " 1234"]),
        ("starcoder", "a 1234", ["a", " ", "1", "2", "3", "4"]),
        ("llama-bpe", "Hi 12345", ["Hi", " ", "123", "45"]),
        ("qwen2", "Hi 123's", ["Hi", " ", "1", "2", "3", "'s"]),
        ("tekken", "aBc", ["a", "Bc"]),
        ("gpt-4o", "don't aB", ["don't", " a", "B"]),
        ("deepseek-v3", "a1234!", ["a", "123", "4", "!"]),
        ("deepseek-llm", "ab 你好", ["ab", " ", "你好"]),
        ("qwen35", "e\u0301a", ["e\u0301a"]),
        ("bloom", "a, b", ["a", ",", " b"]),
    ],
)
def test_words_are_cut_as_the_vocabulary_was_trained(name: str, text: str, words: list[str]) -> None:
    metadata = BYTE_LEVEL(**{"tokenizer.ggml.pre": name, "tokenizer.ggml.bos_token_id": 0})
    pre_tokenizer = Tokenizer(vocab_from_gguf(metadata))._inner.pre_tokenizer
    cut = [text[start:stop] for _, (start, stop) in pre_tokenizer.pre_tokenize_str(text)]
    assert cut == words


def test_gguf_config() -> None:
    config = vocab_from_gguf(BYTE_LEVEL()).config
    assert config["chat_template"] == CHATML_TEMPLATE
    eos = BYTE_LEVEL()["tokenizer.ggml.eos_token_id"]
    # <|endoftext|> is a control token that ends a text too.
    assert config["eos_ids"] == [eos, eos - 2] and config["pad_id"] == eos - 2
    assert config["bos_id"] is None and config["add_bos"] is False
    assert vocab_from_gguf(SPM()).config["add_bos"] is True


def test_gguf_named_templates_and_turn_ends() -> None:
    metadata = BYTE_LEVEL(
        **{
            "tokenizer.chat_template.tool_use": "tools",
            "tokenizer.chat_template": ...,
            "tokenizer.ggml.eot_token_id": 5,
        }
    )
    config = vocab_from_gguf(metadata).config
    assert config["chat_template"] is None and config["chat_templates"] == {"tool_use": "tools"}
    assert config["eos_ids"][1] == 5


def test_absent_ids_may_be_written_as_minus_one() -> None:
    metadata = SPM(**{"tokenizer.ggml.padding_token_id": 0xFFFFFFFF, "tokenizer.ggml.seperator_token_id": -1})
    assert vocab_from_gguf(metadata).config["pad_id"] is None


def test_numpy_arrays_are_as_good_as_lists() -> None:
    metadata = SPM()
    for key in ("scores", "token_type"):
        metadata[f"tokenizer.ggml.{key}"] = np.array(metadata[f"tokenizer.ggml.{key}"])
    assert vocab_from_gguf(metadata) == vocab_from_gguf(SPM())


def test_unnamed_pre_tokenizer_is_said() -> None:
    assert vocab_from_gguf(BYTE_LEVEL()).config["warnings"] == []
    assert "pre-tokenizer" in vocab_from_gguf(BYTE_LEVEL(**{"tokenizer.ggml.pre": ...})).config["warnings"][0]


TOKENS = "tokenizer.ggml.tokens"
HOSTILE: list[tuple[Any, dict[str, Any]]] = [
    (BYTE_LEVEL, {TOKENS: ...}),
    (BYTE_LEVEL, {TOKENS: []}),
    (BYTE_LEVEL, {TOKENS: "abc"}),
    (BYTE_LEVEL, {TOKENS: 7}),
    (BYTE_LEVEL, {TOKENS: [1, 2]}),
    (BYTE_LEVEL, {TOKENS: [b"\xff"]}),
    (BYTE_LEVEL, {TOKENS: ["a", "a"], "tokenizer.ggml.token_type": ...}),
    (BYTE_LEVEL, {TOKENS: ["a" * 5000], "tokenizer.ggml.token_type": ...}),
    (BYTE_LEVEL, {"tokenizer.ggml.token_type": [1]}),
    (BYTE_LEVEL, {"tokenizer.ggml.token_type": "1"}),
    (BYTE_LEVEL, {"tokenizer.ggml.token_type": [1.5] * 268}),
    (BYTE_LEVEL, {"tokenizer.ggml.merges": ...}),
    (BYTE_LEVEL, {"tokenizer.ggml.merges": ["ab"]}),
    (BYTE_LEVEL, {"tokenizer.ggml.merges": [" "]}),
    (BYTE_LEVEL, {"tokenizer.ggml.merges": ["a  b"]}),
    (BYTE_LEVEL, {"tokenizer.ggml.merges": ["a nothere"]}),
    (BYTE_LEVEL, {"tokenizer.ggml.merges": [None]}),
    (BYTE_LEVEL, {"tokenizer.ggml.pre": 3}),
    (BYTE_LEVEL, {"tokenizer.ggml.pre": "made-up"}),
    (BYTE_LEVEL, {"tokenizer.ggml.model": "made-up"}),
    (BYTE_LEVEL, {"tokenizer.ggml.model": None}),
    (BYTE_LEVEL, {"tokenizer.ggml.model": ...}),
    (BYTE_LEVEL, {"tokenizer.ggml.eos_token_id": 10**6}),
    (BYTE_LEVEL, {"tokenizer.ggml.eos_token_id": "2"}),
    (BYTE_LEVEL, {"tokenizer.ggml.eos_token_id": -7}),
    (BYTE_LEVEL, {"tokenizer.ggml.add_bos_token": 1}),
    (BYTE_LEVEL, {"tokenizer.ggml.add_bos_token": True}),
    (BYTE_LEVEL, {"tokenizer.chat_template": 5}),
    (BYTE_LEVEL, {"tokenizer.chat_template": "x" * 10**6}),
    (SPM, {"tokenizer.ggml.scores": ...}),
    (SPM, {"tokenizer.ggml.scores": [0.0]}),
    (SPM, {"tokenizer.ggml.scores": [float("nan")] * len(SPM()[TOKENS])}),
    (SPM, {"tokenizer.ggml.scores": ["x"] * len(SPM()[TOKENS])}),
    (SPM, {"tokenizer.ggml.add_space_prefix": "yes"}),
    (
        SPM,
        {
            "tokenizer.ggml.model": "t5",
            "tokenizer.ggml.unknown_token_id": ...,
            "tokenizer.ggml.token_type": ...,
        },
    ),
]


@pytest.mark.parametrize(("base", "changed"), HOSTILE)
def test_hostile_gguf_metadata(base: Any, changed: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError) as caught:
        vocab_from_gguf(base(**changed))
    assert "\n" not in str(caught.value)


_any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@given(data=st.data(), base=st.sampled_from([BYTE_LEVEL, SPM]))
@settings(max_examples=150, deadline=None)
def test_any_metadata_converts_or_is_refused(data: st.DataObject, base: Any) -> None:
    metadata = base()
    for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), min_size=1, max_size=3)):
        metadata[key] = data.draw(_any)
    try:
        Tokenizer(vocab_from_gguf(metadata))
    except EdgeError as error:
        assert "\n" not in str(error)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_small_vocabulary_converts_or_is_refused(data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.text(max_size=4), min_size=1, max_size=12))
    n = len(tokens)
    metadata = {
        "tokenizer.ggml.model": data.draw(st.sampled_from(["gpt2", "llama", "t5"])),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": data.draw(st.lists(st.integers(-1, 8), min_size=n, max_size=n)),
        "tokenizer.ggml.scores": data.draw(st.lists(st.floats(width=32), min_size=n, max_size=n)),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.unknown_token_id": 0,
    }
    text = data.draw(st.text(alphabet="".join(tokens) + "a ", max_size=12))
    try:
        tokenizer = Tokenizer(vocab_from_gguf(metadata))
        ids = tokenizer.encode(text, add_special_tokens=False)
    except EdgeError:
        return
    assert not (tokenizer.special_ids - {tokenizer.unk_id}).intersection(ids)


def test_unigram_takes_the_likelier_cut() -> None:
    pieces = [
        ("<unk>", 0.0, 2),
        ("</s>", 0.0, 3),
        ("▁", -3.0, 1),
        ("a", -3.0, 1),
        ("b", -3.0, 1),
        ("▁ab", -4.0, 1),
    ]
    pieces += [("s", -5.0, 1), ("/", -5.0, 1), ("<", -5.0, 1), (">", -5.0, 1)]
    metadata = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": [p[0] for p in pieces],
        "tokenizer.ggml.scores": [p[1] for p in pieces],
        "tokenizer.ggml.token_type": [p[2] for p in pieces],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = Tokenizer(vocab_from_gguf(metadata))
    assert tokenizer.encode("ab") == [5, 1]  # t5 ends its texts
    assert tokenizer.decode(tokenizer.encode("ab b")) == "ab b"
    assert 1 not in tokenizer.encode("</s>", add_special_tokens=False)


def test_sentencepiece_file_equals_gguf() -> None:
    ours, gguf = vocab_from_sentencepiece(sentencepiece_model()), vocab_from_gguf(SPM())
    assert ours == gguf
    assert vocab_from_sentencepiece(sentencepiece_model(prefix=0)).config["add_space_prefix"] is False


def test_sentencepiece_word_models_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match="word model"):
        vocab_from_sentencepiece(sentencepiece_model(model_type=3))


def test_sentencepiece_damage_is_an_error_or_another_vocabulary() -> None:
    whole = sentencepiece_model()
    for n in range(0, len(whole), 7):
        try:
            vocab_from_sentencepiece(whole[:n])
        except ModelFileError:
            continue
    rng = random.Random(3)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            vocab_from_sentencepiece(bytes(damaged))
        except ModelFileError:
            continue


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    try:
        vocab_from_sentencepiece(data)
    except ModelFileError as error:
        assert "\n" not in str(error)


def hf_directory(path: Path, **files: Any) -> Path:
    """A directory with the byte-level vocabulary as tokenizer.json, and ``files`` (``name__ext``)."""
    (path / "tokenizer.json").write_text(vocab_from_gguf(BYTE_LEVEL()).tokenizer_json, encoding="utf-8")
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return path


def test_hf_tokenizer_json_is_kept_as_it_is(tmp_path: Path) -> None:
    vocab = vocab_from_hf(hf_directory(tmp_path))
    assert vocab.tokenizer_json == vocab_from_gguf(BYTE_LEVEL()).tokenizer_json


def test_hf_eos_ids_come_from_both_files(tmp_path: Path) -> None:
    directory = hf_directory(
        tmp_path,
        tokenizer_config__json={"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"},
        generation_config__json={"eos_token_id": [264, 5]},
        config__json={"eos_token_id": 7},
    )
    config = vocab_from_hf(directory).config
    end = Tokenizer(vocab_from_hf(directory)).token_to_id("<|im_end|>")
    assert config["eos_ids"] == [end, 264, 5]
    (directory / "generation_config.json").unlink()
    assert vocab_from_hf(directory).config["eos_ids"] == [end, 7]


def test_hf_templates(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    directory = hf_directory(tmp_path, tokenizer_config__json={"chat_template": listed})
    config = vocab_from_hf(directory).config
    assert (config["chat_template"], config["chat_templates"]) == ("a", {"tool_use": "b"})
    (directory / "chat_template.jinja").write_text("c")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("d")
    config = vocab_from_hf(directory).config
    assert (config["chat_template"], config["chat_templates"]) == ("c", {"tool_use": "b", "rag": "d"})


def test_hf_post_processor_says_what_surrounds_a_text(tmp_path: Path) -> None:
    tokenizer = json.loads(vocab_from_gguf(BYTE_LEVEL()).tokenizer_json)
    parts = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [265], "tokens": ["<|im_start|>"]}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }
    directory = hf_directory(
        tmp_path, tokenizer__json=tokenizer, tokenizer_config__json={"bos_token": "<|im_start|>"}
    )
    loaded = load_tokenizer(directory)
    assert loaded.encode("a") == [loaded.bos_id, ord("a")] and loaded.bos_id == 265
    hf_directory(tmp_path, tokenizer__json=tokenizer, tokenizer_config__json={})
    assert load_tokenizer(directory).encode("a") == [265, ord("a")]


@pytest.mark.parametrize(("flag", "ids"), [(True, [264, ord("a")]), (False, [ord("a")])])
def test_hf_llama_classes_obey_add_bos_token(tmp_path: Path, flag: bool, ids: list[int]) -> None:
    settings_ = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": flag, "bos_token": "<|endoftext|>"}
    assert load_tokenizer(hf_directory(tmp_path, tokenizer_config__json=settings_)).encode("a") == ids


def test_hf_vocab_and_merges(tmp_path: Path) -> None:
    metadata = BYTE_LEVEL()
    tokens = metadata["tokenizer.ggml.tokens"]
    listed = {t: i for i, t in enumerate(tokens) if i < 264}
    added = {str(i): {"content": tokens[i], "special": i < 267} for i in range(264, 268)}
    (tmp_path / "vocab.json").write_text(json.dumps(listed))
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(metadata["tokenizer.ggml.merges"]) + "\n"
    )
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    made, wanted = load_tokenizer(tmp_path), Tokenizer(vocab_from_gguf(metadata))
    text = "hello world <|im_end|> 123"
    for parse in (False, True):
        assert made.encode(text, parse_special=parse) == wanted.encode(text, parse_special=parse)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "OddTokenizer"}))
    with pytest.raises(UnsupportedModelError, match="OddTokenizer"):
        vocab_from_hf(tmp_path)


def test_hf_tokenizer_model_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the") == Tokenizer(vocab_from_gguf(SPM())).encode("the")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__json": "{"},
        {"tokenizer__json": "[" * 100_000},
        {"tokenizer__json": "[]"},
        {"tokenizer__json": {}},
        {"tokenizer__json": {"model": {"type": "WordPiece", "vocab": {}}}},
        {"tokenizer__json": {"model": {"type": "BPE", "vocab": {}}}},
        {"tokenizer__json": {"model": {"type": "BPE", "vocab": {"a": -1}}}},
        {"tokenizer__json": {"model": {"type": "BPE", "vocab": {"a": "b"}}}},
        {"tokenizer__json": {"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": [{}]}},
        {"tokenizer__json": {"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": 3}},
        {"tokenizer__json": {"model": {"type": "Unigram", "vocab": [["a"]]}}},
        {"tokenizer_config__json": "nonsense"},
        {"tokenizer_config__json": {"chat_template": 3}},
        {"tokenizer_config__json": {"chat_template": [{"template": "x"}]}},
        {"generation_config__json": {"eos_token_id": [10**9]}},
        {"generation_config__json": {"eos_token_id": "2"}},
        {"chat_template__jinja": "x" * 10**6},
    ],
)
def test_hostile_hf_files(tmp_path: Path, files: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError) as caught:
        vocab_from_hf(hf_directory(tmp_path, **files))
    assert "\n" not in str(caught.value)


def test_hf_files_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(TokenizerError, match="not UTF-8"):
        vocab_from_hf(tmp_path)


@pytest.mark.parametrize(
    "charsmap", [[1, 2, 3], [255] * 64, [4, 0, 0, 0, 0, 0, 0, 0, 65, 0], [8, 0, 0, 0] + [255] * 200]
)
def test_hostile_charsmap(charsmap: list[int]) -> None:
    metadata = SPM(**{"tokenizer.ggml.model": "t5", "tokenizer.ggml.precompiled_charsmap": charsmap})
    with pytest.raises(TokenizerError):
        Tokenizer(vocab_from_gguf(metadata)).encode("the cat")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(?=a*)*", "[", "(", "a{100000}{100000}", r"(?<n>a\g<n>)"])
def test_hostile_regular_expressions(pattern: str) -> None:
    vocab = vocab_from_gguf(BYTE_LEVEL())
    tokenizer = json.loads(vocab.tokenizer_json)
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    with pytest.raises(TokenizerError):
        Tokenizer(Vocab(json.dumps(tokenizer), vocab.config)).encode("a" * 40 + "c")
