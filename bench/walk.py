"""Models whose greedy text is known: random weights, of which the tables and next to nothing else decide what follows.

Every token stands for a step, every step has a direction of its own. A token's embedding is the direction of its step,
all else adds little to the residual stream, and the output matrix answers a direction with the token that follows. All
the computing of the shape is done; the text is the same in any engine that runs the file.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bench.shapes import Shape, Tensor

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]
_TABLES = ("token_embd.weight", "output.weight")
_LARGE = ("f16", "f32")
#: What one sublayer adds to the residual stream, of its scale.
_SUBLAYER = 0.02
#: Output of the next token; the others have about zero.
_NEXT = 12.0
#: Control tokens and bytes come first in a vocabulary.
_ORDINARY = 259


class Walk:
    """The planted tensors of one model.

    Attributes:
        directions: [steps, hidden], unit deviation, as good as orthogonal.
        step_of: [vocab], the step of each token.
        next_of: [steps], the token that follows; no two steps have the same.
    """

    def __init__(self, shape: Shape, directions: F32, step_of: Ids, next_of: Ids) -> None:
        self.shape = shape
        self.directions = directions
        self.step_of = step_of
        self.next_of = next_of

    def plan(self, tensors: list[Tensor]) -> list[Tensor]:
        """The model's tensors as they are written: quantised tables in eight bits, sublayers that add little."""
        out = []
        for tensor in tensors:
            name, kind, std = tensor.name, tensor.kind, tensor.std
            if name in _TABLES and kind not in _LARGE:
                kind = "q8_0"
            elif name.endswith(("attn_output.weight", "ffn_down.weight", "ffn_down_exps.weight")):
                std *= _SUBLAYER
            out.append(Tensor(name, tensor.shape, kind, std, tensor.constant))
        return out

    def values(self, name: str) -> F32 | None:
        """[rows, hidden] of a planted tensor; None of one that is random."""
        if name == "token_embd.weight":
            table: F32 = self.directions[self.step_of]
            return table
        if name == "output.weight":
            # Tokens that follow nothing are never the most likely.
            rows = np.zeros((self.shape.vocab, self.shape.hidden), np.float32)
            rows[self.next_of] = self.directions * np.float32(_NEXT / self.shape.hidden)
            return rows
        return None


def successor(shape: Shape, seed: int = 0) -> Walk:
    """A model of one order of all ordinary tokens: each is followed by the next of them, the last by the first.

    Its text repeats whatever a prompt has of that order, as an answer does that copies: what copying gains can be
    measured at any shape, though no small model copies.

    Raises:
        ValueError: a shape without a Llama vocabulary, or with too few dimensions to keep its tokens apart.
    """
    n = shape.vocab - _ORDINARY
    # A wrong token's output has a deviation of sqrt(hidden) where the right one has hidden.
    if shape.arch != "llama" or n < 2 or shape.hidden < 128:
        raise ValueError(
            f"{shape.name}: expected a Llama with more than {_ORDINARY + 1} tokens and 128 dimensions or more, found "
            f"{shape.arch} of {shape.vocab} tokens, {shape.hidden} dimensions"
        )
    random = np.random.default_rng(seed)
    directions = random.choice(np.array([-1, 1], np.float32), (n, shape.hidden))
    order = random.permutation(n)
    next_of = np.empty(n, np.intp)
    next_of[order] = _ORDINARY + np.roll(order, -1)
    return Walk(shape, directions, (np.arange(shape.vocab) - _ORDINARY) % n, next_of)
