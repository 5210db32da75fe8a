"""Tokenizers found in checkpoints, converted to the one form a pack holds (see :class:`Vocab`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flashload.errors import DiskError, ModelFileError, TokenizerError, UnsupportedModelError
from flashload.vocab_build import (
    CONTROL,
    MAX_TOKENS,
    NORMAL,
    USER_DEFINED,
    Json,
    Pieces,
    Vocab,
    added_tokens,
    byte_bpe,
    check_template,
    make_config,
)
from flashload.vocab_gguf import vocab_from_gguf
from flashload.vocab_pre import PRE_TOKENIZERS
from flashload.vocab_spm import vocab_from_sentencepiece

__all__ = ["Vocab", "vocab_from_gguf", "vocab_from_hf"]

_MAX_FILE_BYTES = 128 << 20
# Classes whose fast version rewrites the post-processor by add_bos_token and add_eos_token.
_FLAG_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
_BYTE_LEVEL_CLASSES = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2", "CodeGenTokenizer": "gpt-2"}


def _read(path: Path) -> bytes | None:
    """The file's bytes, or None where there is no such file."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror or error}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise TokenizerError(f"{path}: larger than {_MAX_FILE_BYTES} bytes")
    return data


def _read_text(path: Path) -> str | None:
    data = _read(path)
    try:
        return None if data is None else data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 (byte {error.start})") from error


def _read_object(path: Path) -> Json | None:
    text = _read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not JSON ({str(error)[:80]})") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _content(token: Any) -> str | None:
    """A token as the config files spell it: text, or an object with ``content``."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _ids_of(value: Any, n: int, where: str) -> list[int]:
    """A token id or a list of them, as generation_config.json has it."""
    ids: list[int] = []
    for item in value if isinstance(value, list) else [] if value is None else [value]:
        if isinstance(item, bool) or not isinstance(item, int):
            raise TokenizerError(f"{where}: expected token ids, found {type(item).__name__}")
        if not 0 <= item < n:
            raise TokenizerError(f"{where}: id {item} is outside the vocabulary of {n} tokens")
        ids.append(item)
    return ids


def _vocabulary(tokenizer: Json, where: Path) -> tuple[dict[str, int], int]:
    """Token -> id, and one past the highest id, of a tokenizer.json."""
    model = tokenizer.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind not in ("BPE", "Unigram"):
        raise UnsupportedModelError(f"{where}: tokenizer model {str(kind)[:40]!r}; known are BPE and Unigram")
    listed = model.get("vocab")
    ids: dict[str, int] = {}
    if isinstance(listed, dict):
        ids.update(listed)
    elif isinstance(listed, list):
        for i, entry in enumerate(listed):
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
                raise TokenizerError(f"{where}: entry {i} of the vocabulary is not [token, score]")
            ids[entry[0]] = i
    else:
        raise TokenizerError(f"{where}: the model has no vocabulary")
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list):
        raise TokenizerError(f"{where}: added_tokens is {type(added).__name__}, expected a list")
    for token in added:
        content, number = _content(token), token.get("id") if isinstance(token, dict) else None
        if content is None or not isinstance(number, int):
            raise TokenizerError(f"{where}: an added token without content or id")
        ids[content] = number
    for content, number in ids.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < MAX_TOKENS:
            raise TokenizerError(f"{where}: token {content[:40]!r} has id {str(number)[:20]}")
    if not ids:
        raise TokenizerError(f"{where}: the vocabulary is empty")
    return ids, max(ids.values()) + 1


def _affixes(tokenizer: Json, ids: dict[str, int]) -> tuple[list[int], list[int]]:
    """Ids the post-processor puts before and after a text (TemplateProcessing, alone or in a Sequence)."""
    post = tokenizer.get("post_processor")
    steps = post.get("processors", [post]) if isinstance(post, dict) else []
    before: list[int] = []
    after: list[int] = []
    for step in steps if isinstance(steps, list) else []:
        if not isinstance(step, dict) or step.get("type") != "TemplateProcessing":
            continue
        target = before
        for part in step.get("single") or []:
            if isinstance(part, dict) and "Sequence" in part:
                target = after
            elif isinstance(part, dict) and isinstance(part.get("SpecialToken"), dict):
                name = part["SpecialToken"].get("id")
                if not isinstance(name, str) or name not in ids:
                    raise TokenizerError(
                        f"tokenizer.json: the post-processor names {str(name)[:40]!r}, not a token"
                    )
                target.append(ids[name])
    return before, after


def _templates(directory: Path, settings: Json) -> tuple[str | None, dict[str, str]]:
    """The default chat template and named ones; files of their own win over tokenizer_config.json."""
    named: dict[str, str] = {}
    listed = settings.get("chat_template")
    if isinstance(listed, list):
        for entry in listed[:64]:
            if not (isinstance(entry, dict) and isinstance(entry.get("name"), str)):
                raise TokenizerError("tokenizer_config.json: a chat template without a name")
            named[entry["name"]] = check_template(entry["name"], entry.get("template"))
    elif listed is not None:
        named["default"] = check_template("default", listed)
    own = _read_object(directory / "chat_template.json")
    if own is not None and "chat_template" in own:
        named["default"] = check_template("default", own["chat_template"])
    text = _read_text(directory / "chat_template.jinja")
    if text is not None:
        named["default"] = check_template("default", text)
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))[:64]:
        named[path.stem] = check_template(path.stem, _read_text(path))
    return named.pop("default", None), named


def _from_lists(directory: Path, settings: Json) -> Json | None:
    """A tokenizer.json made of vocab.json and merges.txt, or None where these are absent."""
    listed, merges = _read_object(directory / "vocab.json"), _read_text(directory / "merges.txt")
    if listed is None or merges is None:
        return None
    tokens: dict[int, str] = {}
    types: dict[int, int] = {}
    added = settings.get("added_tokens_decoder")
    for token, number in listed.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < MAX_TOKENS:
            raise TokenizerError(f"{directory}/vocab.json: token {token[:40]!r} has id {str(number)[:20]}")
        if number in tokens:
            raise TokenizerError(f"{directory}/vocab.json: id {number} is given twice")
        tokens[number] = token
    for key, token in added.items() if isinstance(added, dict) else ():
        content = _content(token)
        if content is None or not key.isdecimal() or int(key[:9]) >= MAX_TOKENS:
            raise TokenizerError(f"{directory}/tokenizer_config.json: added token {key[:20]!r} is malformed")
        tokens[int(key)] = content
        types[int(key)] = CONTROL if token.get("special") is True else USER_DEFINED
    for i in range(max(tokens) + 1 if tokens else 0):
        tokens.setdefault(i, "")
    pieces = Pieces(
        [tokens[i] for i in range(len(tokens))], [types.get(i, NORMAL) for i in range(len(tokens))]
    )
    name = str(settings.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    pre = PRE_TOKENIZERS.get(_BYTE_LEVEL_CLASSES.get(name, ""))
    if pre is None:
        raise UnsupportedModelError(
            f"{directory}: no tokenizer.json, and tokenizer class {name[:40]!r} is not known; make one with "
            "transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    special = added_tokens(pieces, pieces.of_type(CONTROL))
    tokenizer: Json = json.loads(
        byte_bpe(pieces, lines, pre, special, settings.get("add_prefix_space") is True)
    )
    return tokenizer


def vocab_from_hf(directory: Path) -> Vocab:
    """Convert the tokenizer of a Hugging Face directory: tokenizer.json, else vocab.json and merges.txt, else
    tokenizer.model.

    EOS ids are the tokenizer's own first, then those of generation_config.json (or config.json without one).

    Raises:
        ModelFileError: there is no tokenizer, or a file of it is malformed; DiskError when it cannot be read.
    """
    directory = Path(directory)
    settings = _read_object(directory / "tokenizer_config.json") or {}
    for key, value in (_read_object(directory / "special_tokens_map.json") or {}).items():
        settings.setdefault(key, value)
    where = directory / "tokenizer.json"
    text = _read_text(where)
    tokenizer = _read_object(where)
    base = make_config()
    if tokenizer is None:
        tokenizer = _from_lists(directory, settings)
    if tokenizer is None:
        data = _read(directory / "tokenizer.model")
        if data is None:
            raise ModelFileError(
                f"{directory}: no tokenizer (tokenizer.json, vocab.json + merges.txt or tokenizer.model)"
            )
        vocab = vocab_from_sentencepiece(data)
        tokenizer, base = json.loads(vocab.tokenizer_json), vocab.config
    if text is None:
        text = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    ids, n = _vocabulary(tokenizer, where)

    def named(key: str, default: int | None) -> int | None:
        content = _content(settings.get(key))
        return default if content is None else ids.get(content, default)

    generation = _read_object(directory / "generation_config.json")
    model = _read_object(directory / "config.json") or {}
    ends = generation if generation is not None and generation.get("eos_token_id") is not None else model
    own_eos = named("eos_token", base["eos_ids"][0] if base["eos_ids"] else None)
    eos = ([] if own_eos is None else [own_eos]) + _ids_of(ends.get("eos_token_id"), n, "eos_token_id")
    config = base | {
        "bos_id": named("bos_token", base["bos_id"]),
        "eos_ids": list(dict.fromkeys(eos)),
        "unk_id": named("unk_token", base["unk_id"]),
        "pad_id": named("pad_token", base["pad_id"]),
    }
    if tokenizer.get("post_processor") is not None:
        before, after = _affixes(tokenizer, ids)
        config["add_bos"], config["add_eos"] = bool(before), bool(after)
        if before not in ([], [config["bos_id"]]):
            config["prefix_ids"] = before
        if after not in ([], [own_eos]):
            config["suffix_ids"] = after
    flags = str(settings.get("tokenizer_class", "")).removesuffix("Fast") in _FLAG_CLASSES
    for key, holder in (("add_bos", config["bos_id"]), ("add_eos", own_eos)):
        if flags and isinstance(settings.get(f"{key}_token"), bool):
            config[key] = settings[f"{key}_token"] and holder is not None
    config["add_space_prefix"] = base["add_space_prefix"] or _prefixes_space(tokenizer)
    config["chat_template"], config["chat_templates"] = _templates(directory, settings)
    return Vocab(text, config)


def _prefixes_space(tokenizer: Json) -> bool:
    """Whether a space is put in front of a text (Prepend, Metaspace or ByteLevel)."""
    queue: list[Any] = [tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")]
    for step in queue:
        if isinstance(step, dict):
            kind = step.get("type")
            if kind == "Prepend" or (kind == "Metaspace" and step.get("prepend_scheme", "always") != "never"):
                return True
            if kind == "ByteLevel" and step.get("add_prefix_space") is True:
                return True
            for key in ("normalizers", "pretokenizers"):
                if isinstance(step.get(key), list):
                    queue.extend(step[key][:64])
    return False
