"""Guesses of a draft model and of Medusa heads, read along what a built-in model goes on to say."""

# mypy: allow-untyped-decorators
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge.builtin.batch_sampler import continue_batch, gumbel_noise
from edge.builtin.medusa_heads import MedusaHeads
from edge.builtin.model import Decoder
from edge.builtin.own_text import BOS_ID
from edge.builtin.tokens import Ids

_ROWS = 32  # texts at once
_RUN = 8  # tokens


@dataclass(frozen=True)
class Settings:
    """What is generated, and the chain whose accepted length is told."""

    prompt_tokens: int = 24
    new_tokens: int = 128
    temperature: float = 0.8
    chain: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Paths:
    """Texts of one batch: rows [B, T] of begin token, prompt, the model's tokens, filled up with the end token.

    Tokens first..lengths[r] - 1 of row r are the model's (the end token among them), drawn at the temperature with
    `gumbel_noise(seed, B, position - first, V)`.
    """

    rows: Tensor
    first: int
    lengths: list[int]
    temperature: float
    seed: int

    def noise(self, vocab_size: int) -> Tensor:
        """[B, T - first, V]: the noise of each of the model's tokens."""
        b, t = self.rows.shape
        steps = [gumbel_noise(self.seed, b, step, vocab_size) for step in range(t - self.first)]
        return torch.stack(steps, dim=1)


def walk(model: Decoder, prompts: Sequence[Ids], temperature: float, settings: Settings) -> list[Paths]:
    """The model's own continuations of the prompts (ids without begin token, all of one length)."""
    first = settings.prompt_tokens + 1
    paths: list[Paths] = []
    for begin in range(0, len(prompts), _ROWS):
        batch = np.stack([np.concatenate(([BOS_ID], p)) for p in prompts[begin : begin + _ROWS]])
        seed = (settings.seed << 20) + begin
        found = continue_batch(model, batch, settings.new_tokens, temperature, seed, BOS_ID)
        rows = torch.full((len(batch), first + settings.new_tokens), BOS_ID)
        rows[:, :first] = torch.from_numpy(batch)
        for r, text in enumerate(found):
            rows[r, first : first + len(text.ids)] = torch.from_numpy(text.ids)
        lengths = [first + len(text.ids) + text.ended for text in found]
        paths.append(Paths(rows[:, : max(lengths)], first, lengths, temperature, seed))
    return paths


def mean_accepted(rows: Sequence[NDArray[np.bool_]], chain: int) -> float:
    """Mean accepted guesses per chain.

    rows[r][i, k] says that guess k of a chain that starts at token i of the text is right. After a chain with n
    right guesses the next starts n + 1 tokens on. Chains that the end of a text would cut are left out.
    """
    accepted: list[int] = []
    for right in rows:
        i = 0
        while i < len(right):
            wrong = np.flatnonzero(~right[i, :chain])
            n = int(wrong[0]) if len(wrong) else min(chain, right.shape[1])
            accepted.append(n)
            i += n + 1
    return float(np.mean(accepted)) if accepted else 0.0


def _as_chains(flags: NDArray[np.bool_], chain: int) -> NDArray[np.bool_]:
    """Flags per token [n] -> [n - chain + 1, chain]: a draft that was right so far goes on from the text itself."""
    if len(flags) < chain:
        return np.zeros((0, chain), np.bool_)
    return np.lib.stride_tricks.sliding_window_view(flags, chain)


def _mean(parts: Sequence[NDArray[Any]]) -> float:
    return round(float(np.concatenate(parts).mean()), 4)


def repeated_share(paths: Sequence[Paths]) -> float:
    """Share of the model's tokens that end a run of 8 of its tokens said before in the same text: loops are easy."""
    repeated: list[NDArray[np.bool_]] = []
    for batch in paths:
        for row, length in zip(batch.rows.tolist(), batch.lengths, strict=True):
            said: set[tuple[int, ...]] = set()
            flags = np.zeros(length - batch.first, np.bool_)
            for end in range(batch.first + _RUN, length + 1):
                run = tuple(row[end - _RUN : end])
                flags[end - batch.first - 1] = run in said
                said.add(run)
            repeated.append(flags)
    return _mean(repeated)


@torch.no_grad()
def draft_facts(target: Decoder, draft: Decoder, paths: Sequence[Paths], chain: int) -> dict[str, Any]:
    """`match` and its `accepted`; at a temperature also `expected` and `accepted_rejection`."""
    match: list[NDArray[np.bool_]] = []
    kept: list[NDArray[np.bool_]] = []
    expected: list[NDArray[np.float32]] = []
    for batch in paths:
        wanted = batch.rows[:, batch.first :]
        q = draft(batch.rows[:, :-1])[:, -wanted.shape[1] :].float()
        if batch.temperature > 0:
            t = batch.temperature
            p = target(batch.rows[:, :-1])[:, -wanted.shape[1] :].float()
            noise = batch.noise(q.shape[-1])
            guesses = (q / t + noise).argmax(dim=-1)
            p, q = torch.softmax(p / t, dim=-1), torch.softmax(q / t, dim=-1)
            overlap = torch.minimum(p, q).sum(dim=-1).numpy()
            # Rejection sampling that emitted token x had accepted it with chance min(1, q(x) / p(x)).
            of_token = (q.gather(-1, wanted[..., None]) / p.gather(-1, wanted[..., None]))[..., 0]
            generator = torch.Generator().manual_seed(batch.seed)
            lucky = (torch.rand(of_token.shape, generator=generator) < of_token).numpy()
        else:
            guesses = q.argmax(dim=-1)
        same = (guesses == wanted).numpy()
        for r, length in enumerate(batch.lengths):
            n = length - batch.first
            match.append(same[r, :n])
            if batch.temperature > 0:
                expected.append(overlap[r, :n])
                kept.append(lucky[r, :n])
    facts: dict[str, Any] = {
        "tokens": sum(map(len, match)),
        "match": _mean(match),
        "accepted": round(mean_accepted([_as_chains(m, chain) for m in match], chain), 3),
    }
    if expected:
        facts["expected"] = _mean(expected)
        facts["accepted_rejection"] = round(mean_accepted([_as_chains(k, chain) for k in kept], chain), 3)
    return facts


@torch.no_grad()
def medusa_facts(target: Decoder, heads: MedusaHeads, paths: Sequence[Paths], chain: int) -> dict[str, Any]:
    """Per head `top1` and `top5`, at a temperature also `match`; `accepted` of the chain of all heads' guesses."""
    count = len(heads.weight)
    tops: dict[int, list[list[NDArray[np.bool_]]]] = {
        1: [[] for _ in range(count)],
        5: [[] for _ in range(count)],
    }
    match: list[list[NDArray[np.bool_]]] = [[] for _ in range(count)]
    chains: list[NDArray[np.bool_]] = []
    for batch in paths:
        hidden = target.hidden(batch.rows[:, :-1])[:, batch.first - 1 :]
        moved = heads(hidden)  # [B, states, K, D]
        width = hidden.shape[1]
        noise = batch.noise(target.config.vocab_size) if batch.temperature > 0 else None
        per_row: list[list[NDArray[np.bool_]]] = [[] for _ in batch.lengths]
        for k in range(min(count, width - 1)):
            # State n (of the token before the model's n-th) guesses the model's token n + 1 + k, counted from 0.
            wanted = batch.rows[:, batch.first + 1 + k :]
            logits = target.head(moved[:, : width - 1 - k, k]).float()
            best = logits.topk(5, dim=-1).indices
            same = {top: (best[..., :top] == wanted[..., None]).any(dim=-1).numpy() for top in tops}
            coupled = same[1]
            if noise is not None:
                coupled = ((logits / batch.temperature + noise[:, 1 + k :]).argmax(dim=-1) == wanted).numpy()
            for r, length in enumerate(batch.lengths):
                n = max(0, length - batch.first - 1 - k)
                for top in tops:
                    tops[top][k].append(same[top][r, :n])
                match[k].append(coupled[r, :n])
                per_row[r].append(coupled[r, :n])
        for flags in per_row:
            whole = min(map(len, flags)) if len(flags) == count else 0
            chains.append(
                np.stack([f[:whole] for f in flags], axis=1) if whole else np.zeros((0, count), np.bool_)
            )
    facts: dict[str, Any] = {
        "tokens": sum(map(len, tops[1][0])),
        "top1": [_mean(parts) for parts in tops[1]],
        "top5": [_mean(parts) for parts in tops[5]],
        "accepted": round(mean_accepted(chains, chain), 3),
    }
    if any(batch.temperature > 0 for batch in paths):
        facts["match"] = [_mean(parts) for parts in match]
    return facts
