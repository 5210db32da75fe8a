"""A draft model of another vocabulary: its guesses pass through text, and the text of the model stays what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Inner

import edge
from edge.errors import ArgumentError
from edge.tokenizer import Tokenizer
from edge.translation import aligned
from tests.test_speculation import SETTINGS
from tests.tiny import hf_config, hf_tensors, tiny_hf, tokenizer_json, write_safetensors

CONTEXT = 96
PROMPT = list(range(40, 60))
VOCAB = 300


def with_merges(size: int, words: list[str]) -> str:
    """The byte-level vocabulary of the other tests, which also knows some words."""
    inner = Inner.from_str(tokenizer_json(size - sum(len(word) - 1 for word in words)))
    vocab, merges = inner.get_vocab(), []
    for word in words:
        for i in range(2, len(word) + 1):
            if word[:i] not in vocab:
                merges.append((word[: i - 1], word[i - 1]))
                vocab[word[:i]] = len(vocab)
    document = json.loads(inner.to_str())
    document["model"] |= {"vocab": vocab, "merges": [list(pair) for pair in merges]}
    return json.dumps(document)


def tokenizer(serialised: str) -> Tokenizer:
    from flashload.vocab import Vocab

    return Tokenizer(Vocab(tokenizer_json=serialised, config={}))


def pack(folder: Path, words: str, tensors: dict[str, np.ndarray] | None = None, **options: Any) -> Path:
    tiny_hf(folder, **options)
    (folder / "tokenizer.json").write_text(words)
    if tensors is not None:
        write_safetensors(folder / "model.safetensors", tensors)
    edge.pack(folder, folder.with_suffix(".edge"))
    return folder.with_suffix(".edge")


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that writes plain letters, the same under other ids, and one of another shape that knows words."""
    folder = tmp_path_factory.mktemp("words")
    words = tokenizer_json(VOCAB)
    tensors = hf_tensors(hf_config("llama", vocab_size=VOCAB, tie_word_embeddings=False), seed=1)
    letters = {
        i for name, i in Inner.from_str(words).get_vocab().items() if len(name) == 1 and name.isascii()
    }
    tensors["lm_head.weight"][[i for i in range(VOCAB) if i not in letters]] = 0
    order = np.concatenate([np.arange(3), 3 + np.random.default_rng(5).permutation(VOCAB - 3)])
    moved = {
        name: value[order] if name in ("lm_head.weight", "model.embed_tokens.weight") else value
        for name, value in tensors.items()
    }
    document = json.loads(words)
    names = sorted(document["model"]["vocab"], key=document["model"]["vocab"].__getitem__)
    document["model"]["vocab"] = {names[old]: new for new, old in enumerate(order)}
    options = {"vocab_size": VOCAB, "tie_word_embeddings": False}
    return {
        "target": pack(folder / "target", words, tensors, **options),
        "moved": pack(folder / "moved", json.dumps(document), moved, **options),
        "words": pack(folder / "words", with_merges(320, ["abc", "the"]), seed=3, num_hidden_layers=1),
    }


def test_the_same_model_under_other_ids_is_always_right(packs: dict[str, Path]) -> None:
    asked = {"max_tokens": 1 + 4 * 5, "ignore_eos": True, "temperature": 0}
    with edge.load(packs["target"], context=CONTEXT, threads=1, draft=packs["moved"]) as engine:
        plain = engine.generate(PROMPT, speculation="off", **asked)
        found = engine.generate(PROMPT, speculation={"drafters": "draft", "depth": 4}, **asked)
        done = found.stats["speculation"]
        assert found.tokens == plain.tokens
        assert done["tokens_per_pass"] == 5 and done["drafters"]["draft"]["acceptance"] == 1


@pytest.mark.parametrize("draft", ["moved", "words"])
@pytest.mark.parametrize("sampling", SETTINGS)
def test_it_changes_nothing(packs: dict[str, Path], draft: str, sampling: str) -> None:
    with edge.load(packs["target"], context=CONTEXT, threads=1, draft=packs[draft]) as engine:
        for prompt in (PROMPT, [1, 200, 201, 40], list(range(3, 80))):
            asked = {"max_tokens": 40, "overflow": "shift", "ignore_eos": True, **SETTINGS[sampling]}
            plain = engine.generate(prompt, speculation="off", **asked)
            for setting in ("auto", {"drafters": "draft", "depth": 3}, {"depth": 16, "max_rows": 5}):
                found = engine.generate(prompt, speculation=setting, **asked)
                assert found.tokens == plain.tokens, setting


def test_the_shipped_models_draft_for_another_vocabulary(packs: dict[str, Path]) -> None:
    with edge.load("story", context=128, threads=1, draft=packs["words"]) as engine:
        asked = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
        plain = engine.generate("One day", speculation="off", **asked)
        found = engine.generate("One day", speculation={"drafters": "draft", "depth": 4}, **asked)
        assert found.tokens == plain.tokens


def test_its_words_are_counted(packs: dict[str, Path]) -> None:
    with edge.load(packs["target"], context=CONTEXT, draft="story-draft") as engine:
        assert engine._drafting is not None and engine._drafting.words is not None
        assert engine.notes == () and engine.stats()["by_tag"]["draft"] > 0
    with edge.load(packs["target"], context=CONTEXT, draft=packs["target"]) as engine:
        assert engine._drafting is not None and engine._drafting.words is None


def test_only_tokens_whose_ends_are_certain_are_guesses() -> None:
    words = tokenizer(with_merges(320, ["abc", "the"]))
    a, b, x, abc = (words.encode(text, add_special_tokens=False)[0] for text in ("a", "b", "x", "abc"))
    assert words.encode("abcx", add_special_tokens=False) == [abc, x]
    assert aligned(words, [x, x], "abcx") == [abc]
    assert aligned(words, [x], "abxab")[-1] == x  # "ab" may yet become "abc"
    assert aligned(words, [], "xx") == [x]
    # The model wrote "a", "b": its vocabulary would have cut what follows otherwise.
    assert aligned(words, [x, a, b], "cx") == []
    assert aligned(words, [x], "") == []
    assert aligned(words, [x, 3], "xxx") is not None  # a lone byte, half a character


def test_words_that_do_not_keep_text_are_refused(packs: dict[str, Path], tmp_path: Path) -> None:
    words = json.loads(with_merges(VOCAB, ["the"])) | {"normalizer": {"type": "Lowercase"}}
    lower = pack(tmp_path / "lower", json.dumps(words), vocab_size=VOCAB)
    expected = r"draft: .*lower.edge: expected the vocabulary of .*found that .*lower.edge does not"
    with pytest.raises(ArgumentError, match=expected):
        edge.load(packs["target"], context=CONTEXT, draft=lower)


def test_a_vocabulary_larger_than_its_embedding_only_costs_guesses(
    packs: dict[str, Path], tmp_path: Path
) -> None:
    draft = pack(tmp_path / "few", with_merges(330, ["abc", "the"]), vocab_size=VOCAB)
    with edge.load(packs["target"], context=CONTEXT, threads=1, draft=draft) as engine:
        asked = {"max_tokens": 10, "temperature": 0, "ignore_eos": True}
        plain = engine.generate("abcabc", speculation="off", **asked)
        found = engine.generate("abcabc", speculation={"drafters": "draft", "depth": 4}, **asked)
        assert found.tokens == plain.tokens
