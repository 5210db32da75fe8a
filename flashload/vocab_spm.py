"""A reader for SentencePiece's ``tokenizer.model``: the few protobuf fields a tokenizer needs.

Wire format: protobuf encoding (varint key = field number << 3 | wire type); fields and numbers from
sentencepiece_model.proto. Unknown fields are skipped, every length is checked before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from flashload.errors import TokenizerError, UnsupportedModelError
from flashload.vocab_build import (
    BYTE,
    CONTROL,
    MAX_TOKENS,
    NORMAL,
    UNKNOWN,
    Pieces,
    Vocab,
    added_tokens,
    make_config,
    spm_bpe,
    unigram,
)

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_WORD, _CHAR = 3, 4

Field = tuple[int, "int | bytes"]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise TokenizerError(f"tokenizer.model: broken number at byte {at}")


def _fields(data: bytes) -> Iterator[Field]:
    """(field number, value) in file order; the value is a number, or the raw bytes of other wire types."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise TokenizerError(f"tokenizer.model: wire type {wire} at byte {at}, not a SentencePiece model")
        if size > len(data) - at:
            raise TokenizerError(
                f"tokenizer.model: {size} bytes wanted at byte {at}, {len(data) - at} are left"
            )
        yield key >> 3, data[at : at + size]
        at += size


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            try:
                text = value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise TokenizerError("tokenizer.model: a piece is not UTF-8") from error
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    if not NORMAL <= kind <= BYTE:
        raise TokenizerError(f"tokenizer.model: piece {text[:40]!r} is of type {kind}, known are 1 to 6")
    return text, score, kind


def _spec(data: bytes) -> dict[int, int | bytes]:
    return dict(_fields(data))


def _signed(value: int | bytes | None, default: int) -> int:
    """An int32 field: protobuf stores negative ones as 64-bit two's complement."""
    if not isinstance(value, int):
        return default
    return value - (1 << 64) if value >= 1 << 63 else value


def vocab_from_sentencepiece(data: bytes) -> Vocab:
    """Convert the bytes of a ``tokenizer.model`` file.

    Raises:
        TokenizerError: the bytes are not a well-formed SentencePiece model.
        UnsupportedModelError: a word or character model.
    """
    listed: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if not isinstance(value, bytes):
            continue
        if number == 1:
            if len(listed) == MAX_TOKENS:
                raise TokenizerError(f"tokenizer.model: more than {MAX_TOKENS} pieces")
            listed.append(_piece(value))
        elif number == 2:
            trainer = _spec(value)
        elif number == 3:
            normalizer = _spec(value)
    pieces = Pieces([text for text, _, _ in listed], [kind for _, _, kind in listed])
    scores = [score for _, score, _ in listed]
    n = len(pieces.tokens)

    def token_id(field: int, default: int) -> int | None:
        number = _signed(trainer.get(field), default)
        return number if 0 <= number < n else None

    unk_id, bos_id, eos_id, pad_id = (token_id(f, d) for f, d in ((40, 0), (41, 1), (42, 2), (43, -1)))
    prefix = normalizer.get(3, 1) == 1  # add_dummy_prefix
    config = make_config(
        bos_id=bos_id,
        eos_ids=[] if eos_id is None else [eos_id],
        unk_id=unk_id,
        pad_id=pad_id,
        add_bos=bos_id is not None,
        add_space_prefix=prefix,
    )
    special = set(pieces.of_type(CONTROL)) | {i for i in (bos_id, eos_id) if i is not None}
    if unk_id is not None and pieces.types[unk_id] in (UNKNOWN, CONTROL):
        special.add(unk_id)
    added = added_tokens(pieces, special)
    model_type = _signed(trainer.get(3), _UNIGRAM)
    if model_type == _BPE:
        return Vocab(spm_bpe(pieces, scores, unk_id, added, prefix), config)
    if model_type != _UNIGRAM:
        kind = {_WORD: "word", _CHAR: "character"}.get(model_type, str(model_type))
        raise UnsupportedModelError(
            f"tokenizer.model: a SentencePiece {kind} model; convert it to tokenizer.json with transformers' "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    if unk_id is None:
        raise TokenizerError("tokenizer.model: a Unigram model without an unknown piece")
    charsmap = normalizer.get(2, b"")
    squeeze = normalizer.get(4, 1) == 1  # remove_extra_whitespaces
    return Vocab(
        unigram(
            pieces, scores, unk_id, added, prefix, charsmap if isinstance(charsmap, bytes) else b"", squeeze
        ),
        config,
    )
