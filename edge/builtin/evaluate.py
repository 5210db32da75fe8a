"""Held-out bits per byte and sample texts of a trained built-in model.

python -m edge.builtin.evaluate --model DIR --corpora DIR [--prompt TEXT ...]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from edge.builtin.data import END_OF_TEXT, load_held_out, load_held_out_books
from edge.builtin.held_out import held_out_stories, windows
from edge.builtin.hf import load_hf
from edge.builtin.model import Decoder
from flashload.errors import EdgeError

_ROWS = 16  # windows computed at once
_BOOK_CHARS = 20_000  # of each held-out book


def bits_per_byte(
    model: Decoder, tokenizer: Tokenizer, text: str, bos_id: int = 0, autocast: bool = False
) -> float:
    """Bits per UTF-8 byte of the stories, each read on its own after the begin token.

    The end-of-text marks are neither predicted nor counted as bytes.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    stories = held_out_stories(text)
    length = model.config.max_position_embeddings
    pieces = [
        window
        for encoding in tokenizer.encode_batch(stories, add_special_tokens=False)
        for window in windows([bos_id, *encoding.ids], length)
    ]
    pieces.sort(key=lambda piece: len(piece[0]))
    nats = 0.0
    for begin in range(0, len(pieces), _ROWS):
        rows = pieces[begin : begin + _ROWS]
        width = max(len(ids) for ids, _ in rows)
        tokens = torch.full((len(rows), width), bos_id)
        targets = torch.full((len(rows), width), -100)
        for r, (ids, first) in enumerate(rows):
            tokens[r, : len(ids)] = torch.tensor(ids)
            targets[r, first : len(ids)] = tokens[r, first : len(ids)]
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = model(tokens[:, :-1].to(device)).float().cpu()
        nats += F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), reduction="sum").item()
    model.train(training)
    return nats / math.log(2) / sum(len(story.encode()) for story in stories)


def sample(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
    bos_id: int = 0,
) -> str:
    """Continues the prompt until the begin (end-of-text) token or `tokens` more; the text includes the prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = [bos_id, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    model.eval()
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids[-model.config.max_position_embeddings :]]))[0, -1]
        chances = torch.softmax(logits / temperature, -1)
        token = int(torch.multinomial(chances, 1, generator=generator))
        if token == bos_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[1:])


def ffn_sparsity(model: Decoder, tokenizer: Tokenizer, text: str) -> list[float]:
    """Share of FFN neurons that are exactly zero, per layer, over the beginning of the text."""
    shares: list[float] = []

    def count(_module: object, _inputs: object, gate: torch.Tensor) -> None:
        shares.append((gate <= 0).float().mean().item())

    hooks = [layer.mlp.gate_proj.register_forward_hook(count) for layer in model.layers]
    ids = [0, *tokenizer.encode(text, add_special_tokens=False).ids][: model.config.max_position_embeddings]
    with torch.no_grad():
        model.eval()(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return shares


def main(argv: list[str] | None = None) -> int:
    """Prints the held-out bits per byte of a Hugging Face Llama directory and one sample per prompt."""
    parser = argparse.ArgumentParser(prog="python -m edge.builtin.evaluate", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the corpora")
    parser.add_argument(
        "--books", action="store_true", help="also the beginnings of the seven held-out books"
    )
    parser.add_argument("--prompt", action="append", default=[], help="sample n is drawn with seed n")
    args = parser.parse_args(argv)
    try:
        held_out = load_held_out(args.corpora)
        books = ""
        if args.books:
            books = END_OF_TEXT.join(book[:_BOOK_CHARS] for book in load_held_out_books(args.corpora))
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    model = load_hf(args.model)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    bos_id = json.loads((args.model / "config.json").read_text())["bos_token_id"]
    bits = bits_per_byte(model, tokenizer, held_out, bos_id)
    stories = held_out_stories(held_out)
    n_tokens = sum(len(e.ids) for e in tokenizer.encode_batch(stories, add_special_tokens=False))
    nats = bits * math.log(2) * sum(len(story.encode()) for story in stories)
    print(f"held-out bits per byte: {bits:.4f} (perplexity per token {math.exp(nats / n_tokens):.3f})")
    if books:
        print(f"held-out books, bits per byte: {bits_per_byte(model, tokenizer, books, bos_id):.4f}")
    for seed, prompt in enumerate(args.prompt):
        print(f"--- {prompt!r}, seed {seed}\n{sample(model, tokenizer, prompt, seed=seed, bos_id=bos_id)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
