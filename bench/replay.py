"""Mixtures of experts that replay a recorded routing: random weights, but token after token the experts of a real text.

Each step of the trace has a direction of its own. A token's embedding is the direction of step (id modulo steps), all
else adds little to the residual stream; routers answer a direction with the experts that were chosen there, the output
matrix with the token of the next step. So greedy decoding walks along the trace from wherever the prompt ends, in any
engine that runs the file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench import shapes
from bench.shapes import Tensor
from flashload.expert_policy import Trace, read_trace

F32 = npt.NDArray[np.float32]
#: In the place of a trace's path.
UNIFORM = "uniform"
#: What one sublayer adds to the residual stream, of its scale.
_SUBLAYER = 0.02
#: Router output of a chosen expert; the others have about zero. In the order of choice each gets a little less.
_CHOSEN, _LESS = 6.0, 0.5
#: Output of the next token; the others have about zero.
_NEXT = 12.0


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


class Replay:
    """The planted tensors of one model."""

    def __init__(self, path: Path, shape: shapes.Shape, seed: int = 0) -> None:
        """Reads a trace for a shape; the path ``uniform`` is :func:`uniform_trace`.

        Raises:
            ValueError: the shape has no experts, fewer than the trace, more layers, or too few dimensions.
            ModelFileError: the file is no trace.
        """
        trace = uniform_trace(shape, seed=seed) if str(path) == UNIFORM else read_trace(path)
        self.steps = steps_of(trace)
        self.shape = shape
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
        #: [steps, hidden], orthogonal, unit deviation.
        self.directions: F32 = (np.linalg.qr(random)[0].T * shape.hidden**0.5).astype(np.float32)

    @property
    def first_id(self) -> int:
        """Token of the first step in generated text; control tokens come before it where there is room."""
        n = len(self.steps)
        return n if self.shape.vocab >= 2 * n else 0

    def plan(self, tensors: list[Tensor]) -> list[Tensor]:
        """The model's tensors as they are written: tables in eight bits, sublayers that add little."""
        out = []
        for tensor in tensors:
            name, kind, std = tensor.name, tensor.kind, tensor.std
            if name in ("token_embd.weight", "output.weight"):
                kind = "q8_0"
            elif name.endswith(("attn_output.weight", "ffn_down_exps.weight")):
                std *= _SUBLAYER
            out.append(Tensor(name, tensor.shape, kind, std, tensor.constant))
        return out

    def values(self, name: str) -> F32 | None:
        """[rows, hidden] of a planted tensor; None of one that is random."""
        n = len(self.steps)
        if name == "token_embd.weight":
            table: F32 = self.directions[np.arange(self.shape.vocab) % n]
            return table
        if name == "output.weight":
            # A step is answered with one of the ids of the next; the others are never the most likely.
            rows = np.zeros((self.shape.vocab, self.shape.hidden), np.float32)
            first = self.first_id
            rows[first : first + n] = np.roll(self.directions, 1, axis=0) * np.float32(
                _NEXT / self.shape.hidden
            )
            return rows
        if name.endswith("ffn_gate_inp.weight"):
            return self._router(int(name.split(".")[1]))
        return None

    def _router(self, layer: int) -> F32:
        answers = np.zeros((self.shape.n_experts, len(self.steps)), np.float32)
        for i, step in enumerate(self.steps):
            for place, expert in enumerate(step[layer]):
                answers[expert, i] = _CHOSEN - _LESS * place
        router: F32 = answers @ self.directions / np.float32(self.shape.hidden)
        return router
