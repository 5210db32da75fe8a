"""Engines for the tests of speculation: every placement, and drafters that do as they are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _edge
import pytest

import edge
from edge import speculation
from edge.tokenizer import Tokenizer
from flashload.errors import BudgetError
from flashload.format import PackFile
from flashload.plan import make_plan, weights_of

Nodes = Sequence[tuple[int, int]]
Propose = Callable[[list[int], int], Nodes]

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


@contextmanager
def guessing(propose: Propose, depth: int = 16, max_rows: int = 33) -> Iterator[None]:
    """While it lasts all guesses are what `propose` says, whatever is asked for."""

    def configured(self: Any, settings: speculation.Speculation, begins: bool = True) -> _edge.Speculator:
        if begins or self._speculator is None:
            self.forget()
            self._speculator = _edge.Speculator(self._core)
            self._speculator.add_callback(propose)
            self._speculator.configure(depth=depth, max_rows=max_rows)
        return self._speculator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation.Speculators, "configured", configured)
        yield


def with_guesses(engine: edge.Engine, propose: Propose, prompt: Any, **settings: Any) -> edge.Completion:
    """A completion whose guesses are all from `propose`."""
    with guessing(propose):
        return engine.generate(prompt, speculation="auto", **settings)


def chain(tokens: Sequence[int]) -> Nodes:
    """A tree without branches: (token, parent) pairs below the root, which is 0."""
    return [(token, i) for i, token in enumerate(tokens)]


def oracle(text: Sequence[int], depth: int) -> Propose:
    """Guesses the next `depth` tokens of a text known beforehand."""
    return lambda tokens, _: chain(text[len(tokens) : len(tokens) + depth])
