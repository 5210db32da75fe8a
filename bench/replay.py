"""Mixtures of experts that replay a recorded routing: random weights, but token after token the experts of a real text.

A walk (:mod:`bench.walk`) through the steps of the trace, a token's step being its id modulo their number; routers
answer a direction with the experts that were chosen there. So greedy decoding walks along the trace from wherever the
prompt ends, in any engine that runs the file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench import shapes
from bench.walk import F32, Walk
from flashload.expert_policy import Trace, read_trace

#: In the place of a trace's path.
UNIFORM = "uniform"
#: Router output of a chosen expert; the others have about zero. In the order of choice each gets a little less.
_CHOSEN, _LESS = 6.0, 0.5


def steps_of(trace: Trace) -> list[list[tuple[int, ...]]]:
    """[step][layer] -> the experts chosen; whether a prompt was recorded token by token or layer by layer.

    Recorders that compute the last layer for the end of a prompt alone leave the rest of it out there: such a layer's
    record is the end of the text, and stands still before it.

    Raises:
        ValueError: a layer without any.
    """
    by_layer: list[list[tuple[int, ...]]] = [[] for _ in range(trace.n_layers)]
    for layer, chosen in trace.visits:
        by_layer[layer].append(chosen)
    if not all(by_layer):
        raise ValueError("expected a record of every layer")
    n = max(map(len, by_layer))
    padded = [[chosen[0]] * (n - len(chosen)) + chosen for chosen in by_layer]
    return [list(step) for step in zip(*padded, strict=True)]


def uniform_trace(shape: shapes.Shape, seed: int = 0) -> Trace:
    """A routing of no preference: every expert as likely as any other, whatever came before; up to 512 steps."""
    n_steps = min(512, shape.hidden // 2, shape.vocab)
    random = np.random.default_rng(seed)
    visits = [
        (layer, tuple(int(e) for e in random.permutation(shape.n_experts)[: shape.experts_per_token]))
        for _ in range(n_steps)
        for layer in range(shape.layers)
    ]
    return Trace(shape.layers, shape.n_experts, visits)


class Replay(Walk):
    """The planted tensors of one model, routers among them."""

    def __init__(self, path: Path, shape: shapes.Shape, seed: int = 0) -> None:
        """Reads a trace for a shape; the path ``uniform`` is :func:`uniform_trace`.

        Raises:
            ValueError: the shape has no experts, fewer than the trace, more layers, or too few dimensions.
            ModelFileError: the file is no trace.
        """
        trace = uniform_trace(shape, seed=seed) if str(path) == UNIFORM else read_trace(path)
        self.steps = steps_of(trace)
        n = len(self.steps)
        fits = shape.n_experts >= trace.n_experts and shape.layers <= trace.n_layers
        if not fits or shape.arch == "opt" or n > min(shape.hidden // 2, shape.vocab):
            raise ValueError(
                f"{path}: {n} steps through {trace.n_layers} layers of {trace.n_experts} experts: expected a mixture "
                f"of at least as many experts, at most as many layers, {2 * n} dimensions or more, found "
                f"{shape.name} of {shape.layers} layers, {shape.n_experts} experts, {shape.hidden} dimensions"
            )
        self.experts_per_token = max(len(chosen) for step in self.steps for chosen in step)
        random = np.random.default_rng(seed).standard_normal((shape.hidden, n))
        directions = (np.linalg.qr(random)[0].T * shape.hidden**0.5).astype(np.float32)
        # Generated text has the second n ids where there are so many: control tokens come before them.
        self.first_id = n if shape.vocab >= 2 * n else 0
        super().__init__(
            shape, directions, np.arange(shape.vocab) % n, self.first_id + np.roll(np.arange(n), -1)
        )

    def values(self, name: str) -> F32 | None:
        """[rows, hidden] of a planted tensor; None of one that is random."""
        if name.endswith("ffn_gate_inp.weight"):
            return self._router(int(name.split(".")[1]))
        return super().values(name)

    def _router(self, layer: int) -> F32:
        answers = np.zeros((self.shape.n_experts, len(self.steps)), np.float32)
        for i, step in enumerate(self.steps):
            for place, expert in enumerate(step[layer]):
                answers[expert, i] = _CHOSEN - _LESS * place
        router: F32 = answers @ self.directions / np.float32(self.shape.hidden)
        return router
