"""Real model shapes as lists of GGUF tensors, and synthetic vocabularies of the right size.

Sources of the dimensions: the models' config.json files on their public pages (Llama-2-7B, TinyLlama-1.1B,
OPT-6.7B, OLMoE-1B-7B, Qwen3-30B-A3B). ``moe-8x`` is a Mixtral-like shape small enough for a laptop.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """One model's dimensions; ``n_experts`` 0 means a dense FFN."""

    name: str
    arch: str
    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    head_dim: int
    n_experts: int = 0
    experts_per_token: int = 0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tokenizer: str = "spm"

    @property
    def gqa(self) -> int:
        return self.heads // self.kv_heads


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-2-7b", "llama", 32000, 4096, 11008, 32, 32, 32, 4096, 128),
        Shape("tinyllama-1.1b", "llama", 32000, 2048, 5632, 22, 32, 4, 2048, 64),
        Shape("opt-6.7b", "opt", 50272, 4096, 16384, 32, 32, 32, 2048, 128, tokenizer="bpe"),
        Shape("moe-8x", "llama", 32000, 2048, 7168, 16, 16, 8, 4096, 128, 8, 2),
        # As a llama of this shape: OLMoE's norms of queries and keys left out.
        Shape("olmoe-1b-7b", "llama", 50304, 2048, 1024, 16, 16, 16, 4096, 128, 64, 8),
        # 48 layers in the original; six keep the file small and every layer's work the same.
        Shape("qwen3-30b-a3b", "qwen3moe", 151936, 2048, 768, 6, 32, 4, 40960, 128, 128, 8, 1e-6, 1e6, "bpe"),
        # The shipped story model as a dense Llama.
        Shape("story", "llama", 4096, 256, 1536, 6, 4, 2, 512, 64),
        # For tests: loads in a moment, all row lengths a multiple of 256.
        Shape("tiny", "llama", 512, 256, 512, 2, 4, 2, 256, 64),
        Shape("tiny-moe", "llama", 512, 256, 256, 2, 4, 2, 256, 64, 4, 2),
        Shape("tiny-opt", "opt", 512, 256, 512, 2, 4, 4, 256, 64, tokenizer="bpe"),
        Shape("small-opt", "opt", 512, 512, 2048, 2, 4, 4, 512, 128, tokenizer="bpe"),
        Shape("tiny-qwen3moe", "qwen3moe", 512, 256, 256, 2, 4, 2, 256, 64, 8, 2, 1e-6, 1e6, "bpe"),
    )
}


@dataclass(frozen=True)
class Tensor:
    """One GGUF tensor. ``shape`` is [.., rows, cols] (numpy order), ``std`` of its values, or a constant."""

    name: str
    shape: tuple[int, ...]
    kind: str
    std: float = 0.0
    constant: float | None = None


# Which type a matrix gets in a file of a named mix. The rules are llama.cpp's own for its file types of these
# names (llama-quant.cpp): a finer output matrix, more bits for v and down where they pay.
MIXES = ("f32", "f16", "q8_0", "q4_0", "q4_k", "q4_k_m", "q6_k", "q3_k", "q2_k", "q2_k_mix")


def kind_of(mix: str, role: str, layer: int, shape: Shape) -> str:
    """Block type of a matrix: ``role`` is embed, head, q, k, v, o, gate, up or down."""
    if mix in ("f32", "f16", "q8_0", "q6_k"):
        return mix
    if role == "head":
        return "q6_k"
    if shape.n_experts == 8 and mix != "q2_k" and role in ("k", "v"):
        return "q8_0"
    if mix == "q4_k_m":
        n = shape.layers
        more_bits = layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2
        return "q6_k" if role in ("v", "down") and more_bits else "q4_k"
    if mix == "q2_k_mix":
        if role == "v":
            return "q4_k" if shape.gqa >= 4 else "q3_k"
        return "q3_k" if role in ("o", "down") else "q2_k"
    return mix


def _ones(name: str, n: int) -> Tensor:
    return Tensor(name, (n,), "f32", constant=1.0)


def tensors(shape: Shape, mix: str) -> Iterator[Tensor]:
    """Every tensor of the GGUF file, in file order; an OPT shape under the names of MPT (same matrices).

    Weights have standard deviation 1/sqrt(fan_in), so that each matrix keeps the scale of its input;
    embeddings have 1, so that tokens stay distinct through the layers.
    """
    d, opt = shape.hidden, shape.arch == "opt"
    q_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def matrix(name: str, role: str, layer: int, rows: int, cols: int, *outer: int) -> Tensor:
        kind = kind_of(mix, role, layer, shape)
        return Tensor(f"{name}.weight", (*outer, rows, cols), kind, 1.0 if role == "embed" else cols**-0.5)

    # OPT's output matrix is its embedding: it gets the output's type, and the scale of a matrix.
    yield matrix("token_embd", "head" if opt else "embed", 0, shape.vocab, d)
    for i in range(shape.layers):
        block = f"blk.{i}"
        yield _ones(f"{block}.attn_norm.weight", d)
        if opt:
            yield matrix(f"{block}.attn_qkv", "q", i, q_rows + 2 * kv_rows, d)
        else:
            for role, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
                yield matrix(f"{block}.attn_{role}", role, i, rows, d)
        if shape.arch == "qwen3moe":
            yield _ones(f"{block}.attn_q_norm.weight", shape.head_dim)
            yield _ones(f"{block}.attn_k_norm.weight", shape.head_dim)
        yield matrix(f"{block}.attn_output", "o", i, d, q_rows)
        yield _ones(f"{block}.ffn_norm.weight", d)
        suffix, outer = ("_exps", (shape.n_experts,)) if shape.n_experts else ("", ())
        if shape.n_experts:
            yield Tensor(f"{block}.ffn_gate_inp.weight", (shape.n_experts, d), "f32", d**-0.5)
        for role in ("up", "down") if opt else ("gate", "up", "down"):
            rows, cols = (d, shape.ffn) if role == "down" else (shape.ffn, d)
            yield matrix(f"{block}.ffn_{role}{suffix}", role, i, rows, cols, *outer)
    yield _ones("output_norm.weight", d)
    if not opt:
        yield matrix("output", "head", 0, shape.vocab, d)


def opt_tensors(shape: Shape, up_bias: float) -> Iterator[Tensor]:
    """Every tensor of an OPT checkpoint under its Hugging Face name, f16.

    ``up_bias`` stands under the ReLU of every neuron and so sets how many of them fire.
    """
    d = shape.hidden

    def affine(name: str, rows: int, cols: int, bias: float = 0.0) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", (rows, cols), "f16", cols**-0.5)
        yield Tensor(f"{name}.bias", (rows,), "f16", constant=bias)

    def norm(name: str) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", (d,), "f16", constant=1.0)
        yield Tensor(f"{name}.bias", (d,), "f16", constant=0.0)

    top = "model.decoder."
    yield Tensor(f"{top}embed_tokens.weight", (shape.vocab, d), "f16", d**-0.5)
    # Positions 0 and 1 are padding in OPT's own code: the table is two rows longer than the context.
    yield Tensor(f"{top}embed_positions.weight", (shape.context + 2, d), "f16", d**-0.5)
    for i in range(shape.layers):
        layer = f"{top}layers.{i}."
        yield from norm(f"{layer}self_attn_layer_norm")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from affine(f"{layer}self_attn.{name}", d, d)
        yield from norm(f"{layer}final_layer_norm")
        yield from affine(f"{layer}fc1", shape.ffn, d, up_bias)
        yield from affine(f"{layer}fc2", d, shape.ffn)
    yield from norm(f"{top}final_layer_norm")


def with_layers(shape: Shape, layers: int | None) -> Shape:
    return replace(shape, layers=layers) if layers else shape


def sentencepiece_vocab(n: int) -> tuple[list[str], list[float], list[int]]:
    """``n`` pieces like Llama's: <unk>, <s>, </s>, 256 bytes, characters, then letter pairs and triples.

    Returns (pieces, scores, types); a later piece has a lower score. Types: 1 normal, 2 unknown, 3 control,
    6 byte.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    types = [2, 3, 3] + [6] * 256
    letters = "\u2581" + string.ascii_lowercase
    characters = list(letters + string.ascii_uppercase + string.digits + string.punctuation)
    longer = ("".join(t) for k in (2, 3, 4) for t in itertools.product(letters, repeat=k))
    for piece in itertools.chain(characters, longer):
        if len(pieces) == n:
            break
        pieces.append(piece)
        types.append(1)
    return pieces, [0.0] * 259 + [-float(i) for i in range(n - 259)], types


def byte_bpe_vocab(n: int) -> tuple[list[str], list[str], list[int], int]:
    """``n`` tokens like GPT-2's: the 256 byte characters, then pairs and triples, the end token last.

    Returns (tokens, merges, types, end token id).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(hidden))]
    space = chr(256 + hidden.index(32))
    ordered = [space, *string.ascii_lowercase]
    ordered += [c for c in characters if c not in ordered]
    tokens, merges = list(characters), []
    pairs = [(a, b) for a in ordered for b in ordered]
    triples = ((a + b, c) for a, b in pairs for c in ordered[:27])
    for left, right in itertools.chain(pairs, triples):
        if len(tokens) == n - 1:
            break
        tokens.append(left + right)
        merges.append(f"{left} {right}")
    tokens.append("<|endoftext|>")
    return tokens, merges, [1] * (n - 1) + [3], n - 1
