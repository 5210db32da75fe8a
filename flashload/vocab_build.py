"""Vocabularies in one form: a Hugging Face ``tokenizers`` serialisation and a small config.

The builders take plain lists (tokens, types, scores or merges) and return the dictionary that ``tokenizers``
reads. Nothing here trusts its input: a vocabulary that breaks a rule raises TokenizerError in one line.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashload.errors import TokenizerError
from flashload.vocab_pre import PreTokenizer

# Token types, one numbering for SentencePiece models and GGUF files (sentencepiece_model.proto, gguf spec).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

MAX_TOKENS = 1 << 20
MAX_TOKEN_CHARS = 4096
MAX_MERGES = 1 << 22
MAX_TEMPLATE_CHARS = 1 << 18
SPACE = "\u2581"  # how SentencePiece spells a space inside a token

Json = dict[str, Any]


@dataclass(frozen=True)
class Vocab:
    """A tokenizer as it travels in a pack.

    Attributes:
        tokenizer_json: serialisation for ``tokenizers.Tokenizer.from_str``.
        config: ``bos_id``, ``eos_ids`` (list; the first is the tokenizer's own), ``unk_id``, ``pad_id``,
            ``add_bos``, ``add_eos``, ``add_space_prefix``, ``prefix_ids`` and ``suffix_ids`` (null, or the
            ids put around a text where these are not just BOS and EOS), ``chat_template`` (null or text),
            ``chat_templates`` (name -> text), ``warnings`` (list of sentences).
    """

    tokenizer_json: str
    config: Json = field(default_factory=dict)


@dataclass
class Pieces:
    """Tokens by id with their types, checked: no duplicates, no oversized token, lengths equal."""

    tokens: list[str]
    types: list[int]

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if not 0 < n <= MAX_TOKENS:
            raise TokenizerError(f"vocabulary: expected 1 to {MAX_TOKENS} tokens, found {n}")
        if len(self.types) != n:
            raise TokenizerError(f"vocabulary: {n} tokens but {len(self.types)} token types")
        # An empty token can never be produced; it only holds its place in the numbering.
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.tokens)]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != n:
            seen: set[str] = set()
            twice = next(t for t in self.tokens if t in seen or seen.add(t))  # type: ignore[func-returns-value]
            raise TokenizerError(f"vocabulary: token {twice[:40]!r} occurs twice")
        longest = max(self.tokens, key=len)
        if len(longest) > MAX_TOKEN_CHARS:
            raise TokenizerError(
                f"vocabulary: a token of {len(longest)} characters, at most {MAX_TOKEN_CHARS} allowed"
            )

    def of_type(self, *types: int) -> list[int]:
        """Ids whose type is one of ``types``, ascending."""
        return [i for i, t in enumerate(self.types) if t in types]


def make_config(**given: Any) -> Json:
    """A config with every key present; unknown keys are an error of the caller."""
    config: Json = {
        "bos_id": None,
        "eos_ids": [],
        "unk_id": None,
        "pad_id": None,
        "add_bos": False,
        "add_eos": False,
        "add_space_prefix": False,
        "prefix_ids": None,
        "suffix_ids": None,
        "chat_template": None,
        "chat_templates": {},
        "warnings": [],
    }
    assert given.keys() <= config.keys()
    config.update(given)
    return config


def check_template(name: str, text: Any) -> str:
    """The chat template ``name`` if it is text of a sane length."""
    if not isinstance(text, str):
        raise TokenizerError(f"chat template {name[:40]!r}: expected text, found {type(text).__name__}")
    if len(text) > MAX_TEMPLATE_CHARS:
        raise TokenizerError(
            f"chat template {name[:40]!r}: {len(text)} characters, at most {MAX_TEMPLATE_CHARS} allowed"
        )
    return text


def added_tokens(pieces: Pieces, special_ids: Iterable[int], rstrip_ids: Iterable[int] = ()) -> list[Json]:
    """Added tokens: special ones (never made from plain text) and user-defined ones (always kept whole)."""
    special, rstrip = set(special_ids), set(rstrip_ids)
    wanted = sorted(special | set(pieces.of_type(USER_DEFINED)))
    return [
        {
            "id": i,
            "content": pieces.tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": i in rstrip,
            "normalized": False,
            "special": i in special,
        }
        for i in wanted
    ]


def serialise(model: Json, added: list[Json], normalizer: Any, pre_tokenizer: Any, decoder: Any) -> str:
    """The JSON text ``tokenizers`` reads. BOS and EOS are the runtime's business, so no post-processor."""
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": None,
            "decoder": decoder,
            "model": model,
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )


def byte_bpe(
    pieces: Pieces, merges: Sequence[str], pre: PreTokenizer, added: list[Json], prefix: bool = False
) -> str:
    """Byte-level BPE (GPT-2 and after): ``merges`` are ``"left right"`` in rank order."""
    if len(merges) > MAX_MERGES:
        raise TokenizerError(f"vocabulary: {len(merges)} merges, at most {MAX_MERGES} allowed")
    ids = pieces.ids
    special = {token["content"] for token in added if token["special"]}
    pairs: list[list[str]] = []
    for rank, merge in enumerate(merges):
        left, space, right = merge.partition(" ") if merge[:1] != " " else ("", "", "")
        if not (left and space and right):
            raise TokenizerError(
                f"vocabulary: merge {rank} is {merge[:40]!r}, expected two tokens and a space"
            )
        if left not in ids or right not in ids or left + right not in ids:
            raise TokenizerError(f"vocabulary: merge {rank} ({merge[:40]!r}) names a token that is not there")
        if left + right not in special:
            pairs.append([left, right])
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": pre.ignore_merges,
        "vocab": ids,
        "merges": pairs,
    }
    steps: list[Json] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in pre.patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": False, "use_regex": False}
    steps.append(byte_level)
    return serialise(
        model,
        added,
        {"type": "NFC"} if pre.nfc else None,
        {"type": "Sequence", "pretokenizers": steps},
        byte_level,
    )


def check_scores(scores: Sequence[float], n: int) -> list[float]:
    """Scores as floats, one for each of ``n`` tokens, all finite."""
    if len(scores) != n:
        raise TokenizerError(f"vocabulary: {n} tokens but {len(scores)} scores")
    values = [float(s) for s in scores]
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise TokenizerError(f"vocabulary: the score of token {i} is {value}")
    return values


def merges_from_scores(pieces: Pieces, scores: Sequence[float]) -> list[list[str]]:
    """The merge list that makes ranked BPE choose as SentencePiece does.

    SentencePiece joins the neighbours whose *result* scores highest, so every way of cutting a token in two
    tokens becomes a merge, ranked by the score of the whole; equal scores by id, the order of training.
    (Some converted files carry one score for all tokens: only the ids still hold that order.)
    """
    ids = pieces.ids
    ranked: list[tuple[float, int, int]] = []
    made = [i for i, t in enumerate(pieces.types) if t not in (UNKNOWN, CONTROL, BYTE)]
    for i in made:
        token = pieces.tokens[i]
        for cut in range(1, len(token)):
            if token[:cut] in ids and token[cut:] in ids:
                ranked.append((-scores[i], i, -cut))
    if len(ranked) > MAX_MERGES:
        raise TokenizerError(f"vocabulary: {len(ranked)} merges, at most {MAX_MERGES} allowed")
    ranked.sort()
    return [[pieces.tokens[i][:-cut], pieces.tokens[i][-cut:]] for _, i, cut in ranked]


def spm_decoder(strip: bool) -> Json:
    """Tokens back to text: spaces, byte tokens, and the one space the encoder put in front."""
    steps: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def spm_bpe(
    pieces: Pieces, scores: Sequence[float], unk_id: int | None, added: list[Json], space_prefix: bool
) -> str:
    """SentencePiece BPE with byte fallback (Llama 2, Mistral, Phi-3)."""
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if unk_id is None else pieces.tokens[unk_id],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": pieces.ids,
        "merges": merges_from_scores(pieces, check_scores(scores, len(pieces.tokens))),
    }
    steps: list[Json] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    if space_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
    return serialise(
        model, added, {"type": "Sequence", "normalizers": steps}, None, spm_decoder(space_prefix)
    )


def unigram(
    pieces: Pieces,
    scores: Sequence[float],
    unk_id: int,
    added: list[Json],
    space_prefix: bool,
    charsmap: bytes = b"",
    squeeze_spaces: bool = True,
) -> str:
    """SentencePiece Unigram (T5 and after): the most probable cut, by log probabilities."""
    values = check_scores(scores, len(pieces.tokens))
    # A control token must never win a place in plain text, whatever score it was stored with.
    floor = min(values) - 1000.0
    for i in pieces.of_type(CONTROL):
        values[i] = floor
    steps: list[Json] = []
    if charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if squeeze_spaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    metaspace = {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": "always" if space_prefix else "never",
        "split": True,
    }
    model = {
        "type": "Unigram",
        "unk_id": unk_id,
        "vocab": [[token, value] for token, value in zip(pieces.tokens, values, strict=True)],
        "byte_fallback": bool(pieces.of_type(BYTE)),
    }
    normalizer = {"type": "Sequence", "normalizers": steps} if steps else None
    return serialise(model, added, normalizer, metaspace, spm_decoder(space_prefix))
