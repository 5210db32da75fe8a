"""The tokenizer inside a GGUF file (keys ``tokenizer.*``, GGUF specification)."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from flashload.errors import TokenizerError, UnsupportedModelError
from flashload.vocab_build import (
    BYTE,
    CONTROL,
    MAX_MERGES,
    MAX_TOKENS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Json,
    Pieces,
    Vocab,
    added_tokens,
    byte_bpe,
    check_scores,
    check_template,
    make_config,
    spm_bpe,
    unigram,
)
from flashload.vocab_pre import PRE_TOKENIZERS

_NONE = (-1, 0xFFFFFFFF)  # how writers say "no such token"

# Control tokens that end a turn in some family. Files name one EOS, often not the one the chat format uses,
# so each of these that the vocabulary holds as a control token ends generation too.
_END_OF_TURN = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eom_id|>",
        "<|return|>",
        "<|call|>",
        "<EOT>",
        "[EOT]",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
    ]
)


def _array(metadata: Mapping[str, Any], key: str, limit: int) -> Sequence[Any]:
    value = metadata.get(key)
    if value is None:
        raise TokenizerError(f"{key}: missing")
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__") or not hasattr(value, "__iter__"):
        raise TokenizerError(f"{key}: expected an array, found {type(value).__name__}")
    if len(value) > limit:
        raise TokenizerError(f"{key}: {len(value)} entries, at most {limit} allowed")
    return value.tolist() if hasattr(value, "tolist") else value  # type: ignore[no-any-return]


def _texts(metadata: Mapping[str, Any], key: str, limit: int) -> list[str]:
    texts: list[str] = []
    for i, item in enumerate(_array(metadata, key, limit)):
        if isinstance(item, bytes):
            try:
                item = item.decode("utf-8")
            except UnicodeDecodeError as error:
                raise TokenizerError(f"{key}: entry {i} is not UTF-8") from error
        if not isinstance(item, str):
            raise TokenizerError(f"{key}: entry {i} is {type(item).__name__}, expected text")
        texts.append(item)
    return texts


def _numbers(metadata: Mapping[str, Any], key: str, limit: int, what: type) -> list[Any]:
    numbers = list(_array(metadata, key, limit))
    for i, item in enumerate(numbers):
        if isinstance(item, bool) or not isinstance(item, (int, float) if what is float else int):
            raise TokenizerError(f"{key}: entry {i} is {type(item).__name__}, expected {what.__name__}")
    return numbers


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(key, default)
    if value is True or value is False or type(value).__name__ == "bool_":
        return bool(value)
    raise TokenizerError(f"{key}: expected a bool, found {type(value).__name__}")


def _text(metadata: Mapping[str, Any], key: str, default: str) -> str:
    value = metadata.get(key, default)
    if not isinstance(value, str):
        raise TokenizerError(f"{key}: expected text, found {type(value).__name__}")
    return value


def _token_id(metadata: Mapping[str, Any], name: str, n: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        raise TokenizerError(f"{key}: expected an integer, found {type(value).__name__}") from None
    if number in _NONE:
        return None
    if not 0 <= number < n:
        raise TokenizerError(f"{key}: {number} is outside the vocabulary of {n} tokens")
    return number


def _pieces(metadata: Mapping[str, Any]) -> Pieces:
    tokens = _texts(metadata, "tokenizer.ggml.tokens", MAX_TOKENS)
    if metadata.get("tokenizer.ggml.token_type") is None:
        return Pieces(tokens, [NORMAL] * len(tokens))
    types = _numbers(metadata, "tokenizer.ggml.token_type", MAX_TOKENS, int)
    known = (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE)
    return Pieces(tokens, [t if t in known else UNUSED for t in types])


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template."
    names = sorted(key for key in metadata if isinstance(key, str) and key.startswith(prefix))[:64]
    return {key[len(prefix) :]: check_template(key[len(prefix) :], metadata[key]) for key in names}


def _eos_ids(metadata: Mapping[str, Any], pieces: Pieces) -> list[int]:
    n = len(pieces.tokens)
    named = [_token_id(metadata, name, n) for name in ("eos", "eot", "eom")]
    spelled = [i for i in pieces.of_type(CONTROL) if pieces.tokens[i] in _END_OF_TURN]
    eos = list(dict.fromkeys(i for i in [*named, *spelled] if i is not None))
    # In the harmony format <|end|> only closes a message; <|return|> and <|call|> end the turn.
    if {"<|return|>", "<|call|>", "<|end|>"} <= {pieces.tokens[i] for i in eos}:
        eos.remove(pieces.ids["<|end|>"])
    return eos


def vocab_from_gguf(metadata: Mapping[str, Any]) -> Vocab:
    """Convert the tokenizer of a GGUF file; ids are those the file gives its tokens.

    Args:
        metadata: the file's key-value pairs, arrays as lists or numpy arrays.

    Raises:
        TokenizerError: a key is missing, of a wrong type, or out of range.
        UnsupportedModelError: a tokenizer model or pre-tokenizer of unknown kind.
    """
    kind = _text(metadata, "tokenizer.ggml.model", "")
    pieces = _pieces(metadata)
    n = len(pieces.tokens)
    config = make_config(chat_templates=_templates(metadata))
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        config["chat_template"] = check_template("default", template)
    config["bos_id"] = _token_id(metadata, "bos", n)
    config["eos_ids"] = _eos_ids(metadata, pieces)
    config["pad_id"] = _token_id(metadata, "padding", n)
    unk_id = _token_id(metadata, "unknown", n)
    if unk_id is None and (unknown := pieces.of_type(UNKNOWN)) and kind != "gpt2":
        unk_id = unknown[0]
    config["unk_id"] = unk_id

    # A token the file names as BOS or EOS is special even where its type says otherwise, or else a text could
    # end its own turn. Unknown-type tokens are placeholders; only the unknown token itself needs an entry.
    special = set(pieces.of_type(CONTROL)) | {
        i for i in (config["bos_id"], *config["eos_ids"]) if i is not None
    }
    if unk_id is not None and pieces.types[unk_id] in (UNKNOWN, CONTROL):
        special.add(unk_id)

    if kind == "gpt2":
        text = _byte_level(metadata, pieces, special, config)
    elif kind in ("llama", "t5"):
        text = _sentencepiece(metadata, kind, pieces, special, config)
    else:
        raise UnsupportedModelError(
            f"tokenizer.ggml.model: {kind[:40]!r} is not known; known are gpt2, llama (SentencePiece) and t5"
        )
    for flag, holder in (("add_bos", config["bos_id"]), ("add_eos", config["eos_ids"] or None)):
        if config[flag] and holder is None:
            raise TokenizerError(f"tokenizer.ggml.{flag}_token is true, but the file names no such token")
    return Vocab(text, config)


def _byte_level(metadata: Mapping[str, Any], pieces: Pieces, special: set[int], config: Json) -> str:
    name = _text(metadata, "tokenizer.ggml.pre", "")
    if not name:
        config["warnings"].append("the file does not name its pre-tokenizer; words are cut as in old files")
    pre = PRE_TOKENIZERS.get(name or "default")
    if pre is None:
        raise UnsupportedModelError(f"tokenizer.ggml.pre: {name[:40]!r} is not a known pre-tokenizer")
    config["add_bos"] = _flag(
        metadata, "tokenizer.ggml.add_bos_token", pre.add_bos and config["bos_id"] is not None
    )
    config["add_eos"] = _flag(metadata, "tokenizer.ggml.add_eos_token", False)
    config["add_space_prefix"] = _flag(metadata, "tokenizer.ggml.add_space_prefix", False)
    merges = _texts(metadata, "tokenizer.ggml.merges", MAX_MERGES)
    return byte_bpe(pieces, merges, pre, added_tokens(pieces, special), config["add_space_prefix"])


def _sentencepiece(
    metadata: Mapping[str, Any], kind: str, pieces: Pieces, special: set[int], config: Json
) -> str:
    scores = check_scores(_numbers(metadata, "tokenizer.ggml.scores", MAX_TOKENS, float), len(pieces.tokens))
    config["add_space_prefix"] = prefix = _flag(metadata, "tokenizer.ggml.add_space_prefix", True)
    bos_default = kind == "llama" and config["bos_id"] is not None
    config["add_bos"] = _flag(metadata, "tokenizer.ggml.add_bos_token", bos_default)
    config["add_eos"] = _flag(
        metadata, "tokenizer.ggml.add_eos_token", kind == "t5" and bool(config["eos_ids"])
    )
    if kind == "llama":
        # Phi-3's markup tokens swallow the white space after them; in a GGUF file only the name tells.
        rstrip: set[int] = set()
        if any(name in str(metadata.get("general.name", "")).lower() for name in ("phi-3", "phi3")):
            keep = {"<unk>", "<s>", "<|endoftext|>"}
            listed = special | set(pieces.of_type(USER_DEFINED))
            rstrip = {i for i in listed if pieces.tokens[i] not in keep}
        return spm_bpe(pieces, scores, config["unk_id"], added_tokens(pieces, special, rstrip), prefix)
    if config["unk_id"] is None:
        raise TokenizerError("tokenizer.ggml.unknown_token_id: missing, a t5 vocabulary needs it")
    charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap")
    data = b""
    if charsmap is not None:
        values = _numbers(metadata, "tokenizer.ggml.precompiled_charsmap", 1 << 24, int)
        data = bytes(v & 0xFF for v in values)
    squeeze = _flag(metadata, "tokenizer.ggml.remove_extra_whitespaces", False)
    return unigram(pieces, scores, config["unk_id"], added_tokens(pieces, special), prefix, data, squeeze)
