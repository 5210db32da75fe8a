"""Small vocabularies made by the tests, and the real ones of the shared test data."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from edge.tokenizer import _BYTE_OF, Tokenizer, load_tokenizer
from flashload.vocab import vocab_from_gguf

_CHAR_OF = {byte: char for char, byte in _BYTE_OF.items()}
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_metadata(**changed: Any) -> dict[str, Any]:
    """GGUF metadata of a byte-level BPE vocabulary: 256 bytes, a few merges, ChatML's special tokens."""
    tokens = [_CHAR_OF[b] for b in range(256)]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "i m", "Ċ Ċ"]
    tokens += [merge.replace(" ", "") for merge in merges]
    types = [1] * len(tokens) + [3] * len(CHATML) + [4]
    tokens += [*CHATML, "<think>"]
    start = len(tokens) - 4
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": start + 2,
        "tokenizer.ggml.padding_token_id": start,
        "tokenizer.chat_template": CHATML_TEMPLATE,
    }
    return {k: v for k, v in {**metadata, **changed}.items() if v is not ...}


WORDS = [
    "▁",
    "t",
    "h",
    "e",
    "a",
    "c",
    "<",
    ">",
    "/",
    "s",
    "th",
    "▁th",
    "▁the",
    "the",
    "▁a",
    "ca",
    "▁c",
    "▁ca",
    "aa",
    "aaa",
]


def spm_pieces() -> list[tuple[str, float, int]]:
    """(piece, score, type) of a SentencePiece BPE vocabulary with byte fallback."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{b:02X}>", 0.0, 6) for b in range(256)]
    return pieces + [(word, -float(i), 1) for i, word in enumerate(WORDS)]


def spm_metadata(**changed: Any) -> dict[str, Any]:
    """The same as GGUF metadata."""
    pieces = spm_pieces()
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [p[0] for p in pieces],
        "tokenizer.ggml.scores": [p[1] for p in pieces],
        "tokenizer.ggml.token_type": [p[2] for p in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return {k: v for k, v in {**metadata, **changed}.items() if v is not ...}


def _field(number: int, data: bytes) -> bytes:
    size, head = len(data), bytearray()
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2, *head, size]) + data


def sentencepiece_model(model_type: int = 2, prefix: int = 1) -> bytes:
    """A tokenizer.model file of :func:`spm_pieces`."""
    out = b""
    for piece, score, kind in spm_pieces():
        body = _field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kind])
        out += _field(1, body)
    return out + _field(2, bytes([3 << 3, model_type])) + _field(3, bytes([3 << 3, prefix]))


def byte_level() -> Tokenizer:
    """A tokenizer of :func:`byte_level_metadata`."""
    return Tokenizer(vocab_from_gguf(byte_level_metadata()))


def spm() -> Tokenizer:
    """A tokenizer of :func:`spm_metadata`."""
    return Tokenizer(vocab_from_gguf(spm_metadata()))


REAL = ["gpt-2", "phi-3", "starcoder", "qwen2"]


def real(shared: Path, name: str) -> Tokenizer:
    """One of the real vocabularies."""
    vocabs = shared / "vocabs"
    return load_tokenizer(vocabs / "qwen2.5" if name == "qwen2" else vocabs / f"ggml-vocab-{name}.gguf")


def known_answers(shared: Path, name: str) -> list[tuple[str, list[int]]]:
    """Texts and the ids they must give."""
    stem = shared / "vocabs" / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{stem}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{stem}.out").read_text(encoding="utf-8").split("\n")
    return list(zip(texts, [[int(i) for i in line.split()] for line in lines], strict=True))
