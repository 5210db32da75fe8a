"""How often the guesses of the draft model and of the Medusa heads are what a built-in model goes on to say.

    python -m edge.builtin.speculation_facts --family DIR --corpora DIR [--json]

The model continues held-out stories and held-out books, greedily and at a temperature; the guesses are then read
along that text, which any exact verification leaves as it is. Per guess:

- match: the guess is the model's token (greedy), or is when both draw with the same Gumbel noise (at a temperature).
- expected: sum over tokens of min(p, q), the chance that rejection sampling accepts a token of the draft q (Leviathan
  et al. 2023, arXiv 2211.17192, section 3.2).
- repeated: share of the model's own tokens that repeat it (greedy text falls into loops, which are easy to guess).
- accepted: mean number of guesses accepted of a chain of 4 that ends at its first wrong one; a pass of the model
  then yields one token more than that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from edge.builtin.data import load_held_out, load_held_out_books
from edge.builtin.guesses import Settings, draft_facts, medusa_facts, repeated_share, walk
from edge.builtin.held_out import held_out_stories
from edge.builtin.hf import load_hf
from edge.builtin.medusa_heads import MEDUSA_FILE, MedusaHeads, load_medusa
from edge.builtin.model import Decoder
from edge.builtin.own_text import model_sha256
from edge.builtin.tokens import Ids, encode_all
from flashload.errors import ArgumentError, EdgeError

_BOOK_TEXTS = 20


def measure(
    target: Decoder,
    draft: Decoder | None,
    heads: MedusaHeads | None,
    prompts: Sequence[Ids],
    settings: Settings,
) -> dict[str, Any]:
    """Facts of the text, the draft and the heads, whichever there are, by temperature ("0" and the other)."""
    facts: dict[str, Any] = {}
    for temperature in (0.0, settings.temperature):
        paths = walk(target, prompts, temperature, settings)
        key = f"{temperature:g}"
        facts.setdefault("text", {})[key] = {"repeated": repeated_share(paths)}
        if draft is not None:
            facts.setdefault("draft", {})[key] = draft_facts(target, draft, paths, settings.chain)
        if heads is not None:
            facts.setdefault("medusa", {})[key] = medusa_facts(target, heads, paths, settings.chain)
    return facts


def story_prompts(tokenizer: Tokenizer, text: str, tokens: int) -> list[Ids]:
    """The first tokens of every held-out story that has as many."""
    return [ids[:tokens] for ids in encode_all(tokenizer, held_out_stories(text)) if len(ids) >= tokens]


def book_prompts(tokenizer: Tokenizer, books: Sequence[str], tokens: int, texts: int) -> list[Ids]:
    """The first tokens of paragraphs spread evenly over the books, so many in all."""
    prompts: list[Ids] = []
    for n, book in enumerate(books):
        paragraphs = [ids for ids in encode_all(tokenizer, book.split("\n")) if len(ids) >= tokens]
        wanted = (n + 1) * texts // len(books) - n * texts // len(books)
        places = [(i + 1) * len(paragraphs) // (wanted + 1) for i in range(wanted)] if paragraphs else []
        prompts += [paragraphs[place][:tokens] for place in places]
    return prompts


def _print(facts: dict[str, Any], chain: int) -> None:
    def shares(values: float | list[float]) -> str:
        return " ".join(f"{v:.3f}" for v in (values if isinstance(values, list) else [values]))

    table = Table("text", "of", "T", "measure", "value (Medusa: per head)")
    names = {
        "repeated": "tokens of runs of 8 said before",
        "match": "match with the model's token",
        "expected": "expected acceptance, rejection sampling",
        "accepted": f"accepted of a chain of {chain}",
        "accepted_rejection": f"accepted of a chain of {chain}, rejection sampling",
        "top1": "first guess right",
        "top5": "among the first five",
    }
    for text, guessers in facts.items():
        for guesser, by_temperature in guessers.items():
            for temperature, values in by_temperature.items():
                for key, name in names.items():
                    if key in values:
                        table.add_row(text, guesser, temperature, name, shares(values[key]))
                table.add_section()
    Console(width=max(110, Console().width)).print(table)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m edge.builtin.speculation_facts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--model", default="story", help="the run in the family whose text is guessed")
    parser.add_argument("--draft", default="draft", help="the run in the family that guesses")
    parser.add_argument("--stories", type=int, default=0, help="at most so many held-out stories; 0: all")
    parser.add_argument("--books", action="store_true", help=f"also {_BOOK_TEXTS} texts of held-out books")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    hf, draft_hf = args.family / args.model / "hf", args.family / args.draft / "hf"
    sha256 = model_sha256(hf)
    target, settings = load_hf(hf), Settings(seed=args.seed)
    positions = settings.prompt_tokens + settings.new_tokens + 1
    draft = heads = None
    if draft_hf.exists():
        draft_sha256 = model_sha256(draft_hf)
        draft = load_hf(draft_hf)
        if draft.config.vocab_size != target.config.vocab_size:
            raise ArgumentError(
                f"{draft_hf}: expected a draft of {target.config.vocab_size} tokens,"
                f" found {draft.config.vocab_size}"
            )
        if draft.config.max_position_embeddings < positions:
            raise ArgumentError(
                f"{draft_hf}: expected a draft of {positions} positions or more,"
                f" found {draft.config.max_position_embeddings}"
            )
    if (hf / MEDUSA_FILE).exists():
        heads = load_medusa(hf, target.config.hidden_size)
    if draft is None and heads is None:
        raise ArgumentError(f"expected {draft_hf} or {hf / MEDUSA_FILE}, found neither; train one of them")
    tokenizer = Tokenizer.from_file(str(hf / "tokenizer.json"))
    prompts = {"stories": story_prompts(tokenizer, load_held_out(args.corpora), settings.prompt_tokens)}
    if args.stories:
        prompts["stories"] = prompts["stories"][: args.stories]
    if args.books:
        books = load_held_out_books(args.corpora)
        prompts["books"] = book_prompts(tokenizer, books, settings.prompt_tokens, _BOOK_TEXTS)
    facts: dict[str, Any] = {}
    with Console(stderr=True).status("") as status:
        for text, mine in prompts.items():
            status.update(f"measuring on {len(mine)} texts of the held-out {text}")
            facts[text] = measure(target, draft, heads, mine, settings)
    return {
        "settings": asdict(settings),
        "target_sha256": sha256,
        "draft_sha256": draft_sha256 if draft is not None else None,
        "texts": {text: len(mine) for text, mine in prompts.items()},
        "facts": facts,
    }


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        report = _run(args)
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report["facts"], report["settings"]["chain"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
