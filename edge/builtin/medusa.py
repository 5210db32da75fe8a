"""Trains Medusa heads: small readers of a built-in model's last state that guess the tokens after the next one.

    python -m edge.builtin.medusa --family DIR --corpora DIR [--heads 4] [--steps N]

Medusa-1 of Cai et al. 2024 (arXiv 2401.10774, sections 2.1.1 and 2.2.1): the model stays as it is. The model's
own head reads state h and predicts the next token; head k reads h + silu(W_k h + b_k), through the same output
matrix, and predicts the k-th token after that. Writes FAMILY/story/hf/edge_medusa.safetensors with
`medusa.{k}.weight` [D, D] and `medusa.{k}.bias` [D], k from 0, and FAMILY/story/medusa.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save as safetensors_bytes
from tokenizers import Tokenizer
from torch.nn import functional as F

from edge.builtin.data import load_corpus
from edge.builtin.hf import load_hf
from edge.builtin.medusa_heads import MEDUSA_FILE, NO_TARGET, MedusaHeads, States, accuracies, read_states
from edge.builtin.model import Decoder
from edge.builtin.own_text import BOS_ID, OwnText, model_sha256, read_own_text
from edge.builtin.state import write_atomic
from edge.builtin.tokens import Ids, encode_all
from flashload.errors import ArgumentError, EdgeError


@dataclass(frozen=True)
class MedusaSettings:
    """One training of the heads."""

    heads: int = 4
    steps: int = 800
    states: int = 2048  # of a step, each with up to `heads` targets
    lr: float = 2e-3
    weight_decay: float = 0.0
    warmup: float = 0.05  # share of the run; the rate then falls to zero along a cosine
    head_decay: float = 0.8  # loss of head k counts head_decay ** k
    story_share: float = 0.2  # of the states, training stories; the rest is the model's own text
    kept_back: float = 0.05  # of the own texts, for the accuracies
    seed: int = 0


def train_heads(
    model: Decoder,
    own: States,
    stories: States,
    settings: MedusaSettings,
    show: Callable[[int, float], None] = lambda _step, _loss: None,
) -> MedusaHeads:
    """Heads trained on both sets of states; the same arguments give the same heads on the same machine.

    `show` is told the steps done and the loss (nats, the heads' decayed sum).
    """
    s = settings
    generator = torch.Generator().manual_seed(s.seed)
    output = model.embed_tokens.weight.detach()
    heads = MedusaHeads(s.heads, model.config.hidden_size)
    heads.to(output.device)
    optimiser = torch.optim.AdamW(heads.parameters(), lr=s.lr, betas=(0.9, 0.98), weight_decay=s.weight_decay)
    of_stories = round(s.states * s.story_share) if len(stories.states) else 0
    parts = ((own, s.states - of_stories), (stories, of_stories))
    for step in range(s.steps):
        progress = step / s.steps
        scale = min(1.0, (step + 1) / max(1.0, s.warmup * s.steps)) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimiser.param_groups:
            group["lr"] = s.lr * scale
        picks = [torch.randint(len(data.states), (n,), generator=generator) for data, n in parts if n]
        sources = [data for data, n in parts if n]
        h = torch.cat([data.states[pick] for data, pick in zip(sources, picks, strict=True)])
        targets = torch.cat([data.targets[pick] for data, pick in zip(sources, picks, strict=True)])
        moved, targets = heads(h.to(output.device).float()), targets.to(output.device)
        optimiser.zero_grad(set_to_none=True)
        # Head by head, so that the logits of only one are in memory.
        total = 0.0
        grads = torch.zeros_like(moved)
        for k in range(s.heads):
            mine = moved[:, k].detach().requires_grad_()
            with torch.autocast(output.device.type, torch.bfloat16):
                logits = F.linear(mine, output)
            nats = F.cross_entropy(logits.float(), targets[:, k], ignore_index=NO_TARGET)
            value = s.head_decay ** (k + 1) * nats
            grads[:, k] = torch.autograd.grad(value, mine)[0]
            total += value.item()
        moved.backward(grads)
        optimiser.step()
        show(step + 1, total)
    heads.eval()
    return heads


def _story_rows(
    tokenizer: Tokenizer, stories: Sequence[str], wanted_tokens: int, max_tokens: int, seed: int
) -> list[Ids]:
    """Seeded training stories with begin and end token, together about so many tokens."""
    order = np.random.default_rng(seed).permutation(len(stories))
    rows: list[Ids] = []
    total = 0
    for n in order:
        if total >= wanted_tokens:
            break
        (ids,) = encode_all(tokenizer, [stories[n]])
        rows.append(np.concatenate(([BOS_ID], ids, [BOS_ID]))[:max_tokens])
        total += len(rows[-1])
    return rows


def _split(texts: Sequence[OwnText], share: float, seed: int) -> tuple[list[OwnText], list[OwnText]]:
    """Texts to train on and texts kept back."""
    order = np.random.default_rng(seed).permutation(len(texts))
    n = max(1, round(len(texts) * share))
    return [texts[i] for i in order[n:]], [texts[i] for i in order[:n]]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    defaults = MedusaSettings()
    parser = argparse.ArgumentParser(prog="python -m edge.builtin.medusa", description=__doc__)
    parser.add_argument("--family", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--model", default="story", help="the run in the family that gets the heads")
    parser.add_argument("--heads", type=int, default=defaults.heads)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> None:
    if args.heads < 1 or args.steps < 1:
        raise ArgumentError(f"expected at least 1 head and 1 step, found {args.heads} and {args.steps}")
    settings = MedusaSettings(heads=args.heads, steps=args.steps, lr=args.lr, seed=args.seed)
    hf = args.family / args.model / "hf"
    sha256 = model_sha256(hf)
    texts, about = read_own_text(args.family / args.model / "own")
    if about.get("target_sha256") != sha256:
        raise ArgumentError(
            f"{args.family / args.model / 'own'}: expected text of the model in {hf}, found text of another;"
            " make it again with python -m edge.builtin.own_text"
        )
    corpus = load_corpus(args.corpora, with_books=False)
    model = load_hf(hf).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_file(str(hf / "tokenizer.json"))
    trained, kept_back = _split(texts, settings.kept_back, settings.seed)
    rows = [text.row() for text in trained]
    wanted = round(sum(map(len, rows)) * settings.story_share / (1 - settings.story_share))
    limit = model.config.max_position_embeddings
    story_rows = _story_rows(tokenizer, corpus.stories, wanted, limit, settings.seed)
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        reading = bar.add_task("states", total=sum(map(len, rows + story_rows)), note="")
        steps = bar.add_task("heads", total=settings.steps, note="")

        def read(n: int) -> None:
            bar.advance(reading, n)

        own = read_states(model, rows, settings.heads, read)
        stories = read_states(model, story_rows, settings.heads, read)
        heads = train_heads(
            model,
            own,
            stories,
            settings,
            lambda step, loss: bar.update(steps, completed=step, note=f"loss {loss:.3f}"),
        )
    found: dict[str, dict[str, list[float]]] = {}
    for temperature in sorted({text.temperature for text in kept_back}):
        mine = [text.row() for text in kept_back if text.temperature == temperature]
        found[str(temperature)] = accuracies(model, heads, read_states(model, mine, settings.heads))
        print(f"own text kept back, temperature {temperature}: {found[str(temperature)]}")
    data = safetensors_bytes(heads.tensors(), metadata={"format": "pt", "target_sha256": sha256})
    report = {
        "settings": asdict(settings),
        "target_sha256": sha256,
        "heads_sha256": hashlib.sha256(data).hexdigest(),
        "states": {"own": len(own.states), "stories": len(stories.states)},
        "accuracy_by_temperature": found,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    write_atomic(hf / MEDUSA_FILE, data)
    write_atomic(hf.parent / "medusa.json", (json.dumps(report, indent=1) + "\n").encode())
    print(f"{settings.heads} heads in {hf / MEDUSA_FILE}, {report['minutes']} min")


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        _run(args)
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
