"""How the mixture of experts routes held-out text, and what a cache of its experts would hit while decoding.

python -m edge.builtin.expert_facts --family DIR --corpora DIR [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edge.builtin.activations import Trained, held_out_ids
from edge.builtin.facts_command import run
from flashload.errors import ArgumentError
from flashload.expert_policy import POLICIES, Trace, simulate

CACHED_SHARES = (0.125, 0.25, 0.5, 0.75)  # of all experts of all layers


def route(trained: Trained, text: str) -> list[Tensor]:
    """Of each held-out story the experts its tokens go through: [T, layers, experts per token]."""
    model = trained.model
    if not model.config.num_local_experts:
        raise ArgumentError("expert facts: expected a mixture of experts, found a dense model")
    stories = []
    for ids in held_out_ids(trained, text):
        with torch.no_grad():
            model.hidden(ids[None])
        stories.append(torch.stack([layer.block_sparse_moe.chosen for layer in model.layers], dim=1))
    return stories


def balance(stories: Sequence[Tensor], n_experts: int) -> list[list[float]]:
    """Share of the choices that fall on each expert, per layer."""
    chosen = torch.cat(list(stories))
    shares = []
    for layer in range(chosen.shape[1]):
        counts = torch.bincount(chosen[:, layer].flatten(), minlength=n_experts)
        shares.append([round(value, 4) for value in (counts / counts.sum()).tolist()])
    return shares


def decode_trace(stories: Sequence[Tensor], n_experts: int) -> Trace:
    """The experts in the order that decoding touches them: token after token, through all layers."""
    visits = [
        (layer, tuple(chosen))
        for story in stories
        for token in story.tolist()
        for layer, chosen in enumerate(token)
    ]
    return Trace(stories[0].shape[1], n_experts, visits)


def facts(trained: Trained, text: str) -> dict[str, Any]:
    """Balance per layer, and hit rates by policy and by the share of all experts that the cache holds."""
    stories = route(trained, text)
    n_experts = trained.model.config.num_local_experts
    trace = decode_trace(stories, n_experts)
    shares = balance(stories, n_experts)
    return {
        "held_out_tokens": sum(map(len, stories)),
        "experts": n_experts,
        "per_token": trained.model.config.num_experts_per_tok,
        "balance": shares,
        "busiest": [round(max(layer) * n_experts, 3) for layer in shares],  # 1: perfectly even
        "cached": list(CACHED_SHARES),
        "hit_rate": {
            name: [
                round(simulate(trace, max(1, round(share * trace.total_experts)), policy(trace)), 4)
                for share in CACHED_SHARES
            ]
            for name, policy in POLICIES.items()
        },
    }


def show(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        f"{figures['held_out_tokens']:,} tokens, {figures['per_token']} of {figures['experts']} experts a layer"
    ]
    for layer, shares in enumerate(figures["balance"]):
        even = 1 / len(shares)
        lines.append(
            f"layer {layer}: busiest expert {max(shares) / even:.2f}x its even share, idlest {min(shares) / even:.2f}x"
        )
    lines.append(
        "hit rate    " + "".join(f"{share:>8.1%}" for share in figures["cached"]) + " of all experts cached"
    )
    for policy, rates in figures["hit_rate"].items():
        lines.append(f"{policy:<12}" + "".join(f"{rate:>8.1%}" for rate in rates))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    return run(argv, prog="edge.builtin.expert_facts", model="moe", facts=facts, show=show)


if __name__ == "__main__":
    sys.exit(main())
