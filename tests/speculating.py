"""Engines for the tests of speculation: every placement, and drafters that do as they are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _edge
import pytest

import edge
from bench.scripted import Nodes, Propose, chain, guessing, oracle
from edge.tokenizer import Tokenizer
from flashload.errors import BudgetError
from flashload.format import PackFile
from flashload.plan import make_plan, weights_of

__all__ = [
    "CONTEXT",
    "PLACEMENTS",
    "Nodes",
    "Propose",
    "chain",
    "guessing",
    "open_engine",
    "oracle",
    "with_guesses",
]

PLACEMENTS = ("resident", "stream", "experts")
CONTEXT = 96


def _floor_bytes(weights: Any, decoder: Any, settings: Any) -> int:
    with pytest.raises(BudgetError) as refusal:
        make_plan(weights, decoder, memory_bytes=1, **settings)
    return refusal.value.floor_bytes


def open_engine(path: Path, placement: str, context: int = CONTEXT, threads: int = 2) -> edge.Engine:
    """An engine with weights placed so: "resident", "stream", or "experts" (of a mixture, beside all else)."""
    with PackFile(path) as pack:
        weights, decoder = weights_of(pack), pack.config.to_json()
        settings = {"context": context, "threads": threads, "host_bytes": 0}
        memory_bytes = 1 << 30 if placement == "resident" else _floor_bytes(weights, decoder, settings)
        plan = make_plan(weights, decoder, memory_bytes=memory_bytes, **settings)
        while plan.placement != placement:
            assert plan.placement != "resident", "never placed so"
            memory_bytes += 32 << 10
            plan = make_plan(weights, decoder, memory_bytes=memory_bytes, **settings)
        core = _edge.Engine(plan.engine_options(path, decoder, budget_bytes=plan.core_bytes + (1 << 20)))
        return edge.Engine(core, plan, Tokenizer(pack.vocab()), pack.metadata, 0.0)


def with_guesses(engine: edge.Engine, propose: Propose, prompt: Any, **settings: Any) -> edge.Completion:
    """A completion whose guesses are all from `propose`."""
    with guessing(propose):
        return engine.generate(prompt, speculation="auto", **settings)
