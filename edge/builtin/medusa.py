"""Trains Medusa heads: small readers of a built-in model's last state that guess the tokens after the next one.

    python -m edge.builtin.medusa --family DIR --corpora DIR [--heads 4] [--steps N]

Medusa-1 of Cai et al. 2024 (arXiv 2401.10774, sections 2.1.1 and 2.2.1): the model stays as it is. The model's
own head reads state h and predicts the next token; head k reads h + silu(W_k h + b_k), through the same output
matrix, and predicts the k-th token after that. Writes FAMILY/story/hf/edge_medusa.safetensors with
`medusa.{k}.weight` [D, D] and `medusa.{k}.bias` [D], k from 0, and FAMILY/story/medusa.json.
"""

# mypy: allow-subclassing-any, allow-untyped-decorators, no-warn-return-any
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
import safetensors
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from edge.builtin.data import load_corpus
from edge.builtin.hf import load_hf
from edge.builtin.model import Decoder
from edge.builtin.own_text import BOS_ID, OwnText, model_sha256, read_own_text
from edge.builtin.state import write_atomic
from edge.builtin.tokens import Ids, encode_all
from flashload.errors import ArgumentError, EdgeError, ModelFileError

MEDUSA_FILE = "edge_medusa.safetensors"
_NONE = -100  # target past the end of a text, as F.cross_entropy ignores it
_ROWS = 16  # texts whose states are computed at once
_CHUNK = 4096  # states scored at once


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


class MedusaHeads(nn.Module):
    """States [..., D] -> states [..., K, D], read by the model's own output matrix; K heads."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, size, size))
        self.bias = nn.Parameter(torch.zeros(heads, size))

    def forward(self, h: Tensor) -> Tensor:
        moved = torch.einsum("...d,ked->...ke", h, self.weight) + self.bias
        return h.unsqueeze(-2) + F.silu(moved)

    def tensors(self) -> dict[str, Tensor]:
        """As stored: `medusa.{k}.weight` [D, D] and `medusa.{k}.bias` [D]."""
        stored: dict[str, Tensor] = {}
        for k in range(len(self.weight)):
            stored[f"medusa.{k}.weight"] = self.weight[k].detach().cpu().clone()
            stored[f"medusa.{k}.bias"] = self.bias[k].detach().cpu().clone()
        return stored


def load_medusa(hf: Path, hidden_size: int) -> MedusaHeads:
    """The heads beside a model; ArgumentError when there are none, ModelFileError when they are of another shape."""
    path = hf / MEDUSA_FILE
    if not path.exists():
        raise ArgumentError(
            f"{path}: expected Medusa heads, found none; train them with python -m edge.builtin.medusa"
        )
    try:
        stored = load_file(path)
    except safetensors.SafetensorError as error:
        raise ModelFileError(
            f"{path}: expected a safetensors file, found a damaged one ({error}); delete it"
        ) from error
    count, d = len(stored) // 2, hidden_size
    wanted = {f"medusa.{k}.weight": (d, d) for k in range(count)} | {
        f"medusa.{k}.bias": (d,) for k in range(count)
    }
    found = {name: tuple(value.shape) for name, value in stored.items()}
    if not count or found != wanted:
        raise ModelFileError(f"{path}: expected medusa.k.weight [{d}, {d}] and medusa.k.bias, found {found}")
    heads = MedusaHeads(count, d)
    with torch.no_grad():
        heads.weight.copy_(torch.stack([stored[f"medusa.{k}.weight"].float() for k in range(count)]))
        heads.bias.copy_(torch.stack([stored[f"medusa.{k}.bias"].float() for k in range(count)]))
    return heads.eval()


@dataclass
class States:
    """Final-normed states [N, D] (half precision) and the heads' targets [N, K]; -100 past the end of a text."""

    states: Tensor
    targets: Tensor


@torch.no_grad()
def read_states(
    model: Decoder, rows: Sequence[Ids], heads: int, show: Callable[[int], None] = lambda _: None
) -> States:
    """States of all positions of the rows (ids with begin and end token) that at least head 0 has a target for.

    The state of position i sees tokens 0..i; the model's head predicts token i + 1, Medusa head k (from 0) token
    i + 2 + k. Rows are cut at the model's positions. `show` is told the tokens of every batch.
    """
    limit = model.config.max_position_embeddings
    device = model.embed_tokens.weight.device
    ordered = sorted((row[:limit] for row in rows), key=len)
    states: list[Tensor] = []
    targets: list[Tensor] = []
    for begin in range(0, len(ordered), _ROWS):
        batch = ordered[begin : begin + _ROWS]
        width = max(map(len, batch))
        tokens = torch.full((len(batch), width), BOS_ID)
        later = torch.full((len(batch), width + heads + 1), _NONE)
        for r, row in enumerate(batch):
            tokens[r, : len(row)] = later[r, : len(row)] = torch.from_numpy(row)
        hidden = model.hidden(tokens.to(device)).half().cpu()
        wanted = torch.stack([later[:, 2 + k : 2 + k + width] for k in range(heads)], dim=-1)
        known = wanted[..., 0] != _NONE
        states.append(hidden[known])
        targets.append(wanted[known])
        show(sum(map(len, batch)))
    return States(torch.cat(states), torch.cat(targets))


@torch.no_grad()
def accuracies(model: Decoder, heads: MedusaHeads, data: States) -> dict[str, list[float]]:
    """Share of targets that are each head's first guess (`top1`) and among its first five (`top5`)."""
    count = data.targets.shape[1]
    hits = {1: torch.zeros(count), 5: torch.zeros(count)}
    device = heads.weight.device
    for begin in range(0, len(data.states), _CHUNK):
        wanted = data.targets[begin : begin + _CHUNK]
        logits = model.head(heads(data.states[begin : begin + _CHUNK].to(device).float())).cpu()
        guesses = logits.topk(5, dim=-1).indices
        for top, total in hits.items():
            total += (guesses[..., :top] == wanted[..., None]).any(dim=-1).sum(dim=0)
    known = (data.targets != _NONE).sum(dim=0).clamp_min(1)
    return {f"top{top}": [round(x, 4) for x in (total / known).tolist()] for top, total in hits.items()}


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
    heads = MedusaHeads(s.heads, model.config.hidden_size).to(output.device).train()
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
            nats = F.cross_entropy(F.linear(mine, output), targets[:, k], ignore_index=_NONE)
            value = s.head_decay ** (k + 1) * nats
            grads[:, k] = torch.autograd.grad(value, mine)[0]
            total += value.item()
        moved.backward(grads)
        optimiser.step()
        show(step + 1, total)
    return heads.eval()


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
