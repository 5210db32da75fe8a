"""Text to token ids and back, for any vocabulary a pack can hold.

Who wrote a text decides what it may say: a trusted span (template markup) may spell special tokens, an
untrusted one (what a user typed) never yields one, however it is spelled. Spans are still cut into tokens
together, so where no special token is spelled the ids are those of encoding the whole text at once.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from flashload.errors import ArgumentError, TokenizerError
from flashload.machine import trim_memory
from flashload.vocab_build import SPACE, Vocab

_T = TypeVar("_T")
#: Tokens whose bytes are remembered, in some 200 KB.
_MOST_BYTES_KNOWN = 2048
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies, as GPT-2 chose them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _guarded(what: str, call: Callable[[], _T]) -> _T:
    """Run ``call`` into the tokenizers library; its errors become TokenizerError."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a Rust panic is a BaseException of pyo3
        raise TokenizerError(
            f"{what}: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}"
        ) from error


class _Decoding:
    """How this vocabulary spells bytes, read off its decoder."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        state = None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
        self.byte_level = self.spaces = self.byte_fallback = self.strip = False
        steps = [state] if state else []
        for step in steps:
            kind = step.get("type")
            if kind == "Sequence":
                steps.extend(step["decoders"])
            elif kind == "ByteLevel":
                self.byte_level = True
            elif kind == "ByteFallback":
                self.byte_fallback = True
            elif kind == "Metaspace":
                self.spaces = True
                self.strip = step.get("prepend_scheme", "always") != "never"
            elif (
                kind == "Replace" and step.get("pattern") == {"String": SPACE} and step.get("content") == " "
            ):
                self.spaces = True
            elif kind == "Strip" and step.get("content") == " ":
                self.strip = step.get("start", 0) > 0
            elif kind != "Fuse":
                raise TokenizerError(f"tokenizer: decoder step {str(kind)[:40]!r} is not known")

    def bytes_of(self, token: str) -> bytes:
        if self.byte_level:
            try:
                return bytes([_BYTE_OF[c] for c in token])
            except KeyError:
                return token.encode("utf-8", "replace")
        if self.byte_fallback and (match := _BYTE_TOKEN.match(token)):
            return bytes([int(match[1], 16)])
        return (token.replace(SPACE, " ") if self.spaces else token).encode("utf-8", "replace")


class Tokenizer:
    """Encodes and decodes with one vocabulary. Safe to share between threads.

    Attributes:
        bos_id: id that opens a text, or None.
        eos_ids: ids that end generation; the first is the tokenizer's own.
        unk_id, pad_id: ids or None.
        vocab_size: one past the highest id (a model's matrices may be padded beyond it).
        special_ids: ids that untrusted text never yields.
        config: the config blob of the vocabulary (see :class:`flashload.vocab.Vocab`).
    """

    def __init__(self, vocab: Vocab) -> None:
        """Build from ``vocab``.

        Raises:
            TokenizerError: the serialisation or the config does not describe a usable vocabulary.
        """
        inner = _guarded("tokenizer.json", lambda: tokenizers.Tokenizer.from_str(vocab.tokenizer_json))
        # Parsing leaves as much freed memory behind as the vocabulary takes; the listing below needs some again.
        trim_memory()
        inner.no_truncation()
        inner.no_padding()
        ids = inner.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max(ids, default=-1) + 1
        self._count = len(ids)
        del ids
        self.config = dict(vocab.config)
        self.bos_id = self._config_id("bos_id")
        self.unk_id = self._config_id("unk_id")
        self.pad_id = self._config_id("pad_id")
        self.eos_ids: tuple[int, ...] = tuple(self._config_ids("eos_ids") or ())
        self._prefix = self._affix("prefix_ids", "add_bos", self.bos_id)
        self._suffix = self._affix("suffix_ids", "add_eos", self.eos_ids[0] if self.eos_ids else None)
        self._decoding = _Decoding(inner)
        self._bytes: dict[int, bytes] = {}
        self._inner = inner
        self._add_stand_ins()

    def _config_id(self, key: str, value: Any = None) -> int | None:
        value = self.config.get(key) if value is None else value
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self.vocab_size:
            raise TokenizerError(
                f"tokenizer_config.json: {key} is {str(value)[:40]}, vocabulary has {self.vocab_size} ids"
            )
        return value

    def _config_ids(self, key: str) -> list[int] | None:
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or None in value:
            raise TokenizerError(f"tokenizer_config.json: {key} is not a list of ids")
        return [i for item in value if (i := self._config_id(key, item)) is not None]

    def _affix(self, key: str, flag: str, token: int | None) -> list[int]:
        ids = self._config_ids(key)
        if ids is not None:
            return ids
        if not self.config.get(flag):
            return []
        if token is None:
            raise TokenizerError(f"tokenizer_config.json: {flag} is set, but there is no such token")
        return [token]

    def _add_stand_ins(self) -> None:
        """Give each special token a secret spelling, and stop its public one from being recognised.

        One ``tokenizers`` instance then serves both kinds of text: trusted spans have the public spelling
        replaced by the secret one before encoding; a special id in the output that did not come from a
        stand-in is a leak. The secret is fresh per instance, so no text can hold it.
        """
        added = self._inner.get_added_tokens_decoder()
        self._added = {i: (t.content, bool(t.special)) for i, t in added.items()}
        special = {i for i, t in added.items() if t.special}
        special.update(i for i in (self.bos_id, *self.eos_ids) if i is not None)
        special.discard(-1)
        self.special_ids = frozenset(special)
        # What a vocabulary cannot spell comes out as its unknown token: harmless unless it also ends a text.
        self._forbidden = frozenset(special - ({self.unk_id} - {self.bos_id, *self.eos_ids}))
        secret = secrets.token_hex(16)
        ordered = sorted(special)
        stand_ins: list[tokenizers.AddedToken] = []
        for k, i in enumerate(ordered):
            old = added.get(i)
            strips = (old.single_word, old.lstrip, old.rstrip) if old is not None else (False, False, False)
            stand_ins.append(
                tokenizers.AddedToken(
                    f"\ue000{secret}{k:06d}\ue001",
                    single_word=strips[0],
                    lstrip=strips[1],
                    rstrip=strips[2],
                    normalized=False,
                )
            )
        self._cut = f"\ue000{secret}cutoff\ue001"
        stand_ins.append(tokenizers.AddedToken(self._cut, normalized=False))
        if any(self._inner.id_to_token(self._count + k) is not None for k in range(len(stand_ins))):
            raise TokenizerError("tokenizer.json: the numbering of the tokens has holes")
        self._inner.encode_special_tokens = True
        _guarded("tokenizer.json", lambda: self._inner.add_tokens(stand_ins))
        self._real: dict[int, int] = {}
        self._stand_in: dict[str, str] = {}
        for i, token in zip(ordered, stand_ins, strict=False):
            number = self._inner.token_to_id(token.content)
            if number is None or number < self._count:
                raise TokenizerError("tokenizer.json: the numbering of the tokens has holes")
            self._real[number] = i
            spelling = self.id_to_token(i)
            if spelling:
                self._stand_in[spelling] = token.content
        self._cut_id = self._inner.token_to_id(self._cut)
        longest_first = sorted(self._stand_in, key=len, reverse=True)
        self._spellings = re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")

    def id_to_token(self, token_id: int) -> str | None:
        """The spelling of ``token_id`` in the vocabulary, or None where there is no such id."""
        if token_id in self._added:
            return self._added[token_id][0]
        if not 0 <= token_id < self.vocab_size:
            return None
        token: str | None = self._inner.id_to_token(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of the token spelled exactly so in the vocabulary, or None."""
        number: int | None = self._inner.token_to_id(token)
        return (
            number if number is not None and number < self.vocab_size and number not in self._real else None
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes ``token_id`` adds to a text; empty for an id without a token (a model's padding rows)."""
        known = self._bytes.get(token_id)
        if known is None:
            if len(self._bytes) >= _MOST_BYTES_KNOWN:
                self._bytes.clear()
            known = self._bytes[token_id] = self._bytes_of(token_id)
        return known

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._added:
            content, special = self._added[token_id]
            if not special and self._decoding.spaces:
                content = content.replace(SPACE, " ")
            return content.encode("utf-8", "replace")
        token = self.id_to_token(token_id)
        return b"" if token is None else self._decoding.bytes_of(token)

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of ``text``.

        Args:
            add_special_tokens: put BOS and EOS around it as the model was trained (usually BOS only).
            parse_special: ``text`` is trusted: spellings of special tokens become these tokens.

        Raises:
            ArgumentError: ``text`` is not text, or holds lone surrogates.
        """
        return self.encode_segments([(text, parse_special)], add_special_tokens)

    def encode_segments(
        self, segments: Iterable[tuple[str, bool]], add_special_tokens: bool = False
    ) -> list[int]:
        """Token ids of the segments ``(text, trusted)`` joined; only trusted text yields special tokens.

        A spelling that straddles trusted and untrusted text yields none. See :meth:`encode` for the rest.
        """
        runs: list[tuple[list[str], bool]] = []
        for text, trusted in segments:
            if not isinstance(text, str):
                raise ArgumentError(f"text to encode: expected str, found {type(text).__name__}")
            if runs and runs[-1][1] == bool(trusted):
                runs[-1][0].append(text)
            else:
                runs.append(([text], bool(trusted)))
        joined = [("".join(parts), trusted) for parts, trusted in runs]
        ids = self._encode(joined, cut=False)
        if ids is None:
            ids = self._encode(joined, cut=True)
        if ids is None:
            raise TokenizerError(
                "the text spells a special token that this vocabulary cannot write as plain text"
            )
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def _encode(self, runs: Sequence[tuple[str, bool]], cut: bool) -> list[int] | None:
        """Ids, or None when untrusted text came out as a special token.

        Only odd vocabularies let that happen (a special token that is also an ordinary piece). With ``cut``
        the special spellings of untrusted text are cut in two first.
        """
        parts: list[str] = []
        for text, trusted in runs:
            if trusted:
                text = self._spellings.sub(lambda match: self._stand_in[match[0]], text)
            elif cut:
                text = self._spellings.sub(lambda match: match[0][:1] + self._cut + match[0][1:], text)
            parts.append(text)
        text = "".join(parts)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ArgumentError(f"text to encode: lone surrogate at character {error.start}") from None
        raw: list[int] = _guarded("encoding", lambda: self._inner.encode(text, add_special_tokens=False).ids)
        forbidden = self._forbidden
        ids: list[int] = []
        for i in raw:
            if i in self._real:
                ids.append(self._real[i])
            elif i in forbidden:
                return None
            elif i != self._cut_id:
                ids.append(i)
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True, continues: bool = False) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD.

        Args:
            skip_special_tokens: leave special tokens out.
            continues: the text goes on from an earlier one: keep the space that opens it. Otherwise, where
                the vocabulary puts a space before every text, it is taken off again.
        """
        stream = StreamDecoder(self, skip_special_tokens, continues)
        return stream.push_all(ids) + stream.finish()


class StreamDecoder:
    """Decodes ids one at a time; what it returned, joined, equals :meth:`Tokenizer.decode` of all ids."""

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, continues: bool = False
    ) -> None:
        """See :meth:`Tokenizer.decode` for the arguments."""
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._strip = tokenizer._decoding.strip and not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_between = True  # two characters: no half one is held back

    def push(self, token_id: int) -> str:
        """Text that is certain after ``token_id``: never half a character, so often empty."""
        if token_id in self._skip:
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if self._is_between and not self._strip and data.isascii():
            return data.decode("ascii")  # what nearly every token is
        return self._decode(data)

    def push_all(self, ids: Iterable[int]) -> str:
        """As :meth:`push`, for several ids."""
        skip, token_bytes = self._skip, self._tokenizer.token_bytes
        return self._decode(b"".join([token_bytes(i) for i in ids if i not in skip]))

    def _decode(self, data: bytes) -> str:
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        text = self._utf8.decode(data)
        self._is_between = not self._utf8.getstate()[0]
        return text

    def finish(self) -> str:
        """What was held back: U+FFFD for an unfinished character, else nothing. The decoder is then fresh."""
        rest = self._utf8.decode(b"", True)
        self._utf8.reset()
        self._is_between = True
        return rest


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a GGUF file, a pack, a Hugging Face directory or a tokenizer.json.

    Raises:
        ModelFileError: there is none, or it is malformed; DiskError when it cannot be read.
    """
    from flashload.vocab import vocab_from_hf

    path = Path(path)
    if path.is_dir():
        return Tokenizer(vocab_from_hf(path))
    if path.name == "tokenizer.json":
        return Tokenizer(vocab_from_hf(path.parent))
    return Tokenizer(_vocab_from_file(path))


def _vocab_from_file(path: Path) -> Vocab:
    from flashload.errors import DiskError
    from flashload.vocab import vocab_from_gguf

    try:
        with path.open("rb") as file:
            magic = file.read(8)
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror or error}") from error
    if magic[:4] == b"GGUF":
        from flashload.checkpoint import open_checkpoint

        with open_checkpoint(path) as checkpoint:
            return vocab_from_gguf(checkpoint.metadata)
    if magic == b"EDGEPACK":
        from flashload.format import PackFile

        return PackFile(path).vocab()
    raise TokenizerError(f"{path}: expected a GGUF file, a pack, a directory or tokenizer.json")
