"""Which questions are answered well as a list of independent points: a small classifier of their words.

Hashed words, pairs of words and a few signs of form (Weinberger et al., "Feature Hashing", ICML 2009) under logistic
regression; it takes microseconds where asking the model takes a prompt. ``edge/builtin/router.py`` trains it, and
``edge/builtin/MODEL_CARD.md`` says on what, and how often it is right.
"""

from __future__ import annotations

import functools
import itertools
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from flashload.errors import ModelFileError

WEIGHTS = Path(__file__).resolve().parent / "builtin" / "router.npz"
N_BUCKETS = 4096
#: Words of a question that are looked at: what is asked stands at its beginning.
MAX_WORDS = 256

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+|[^\w\s]")
_CODE = re.compile(r"```|[{}<>]|\w\(|[;=]|\w\.\w")


def features(question: str) -> np.ndarray:
    """Buckets (sorted, distinct, int64) that a question falls into; the vector is 1/sqrt(n) at each of n."""
    words = ["#" if word.isdigit() else word.casefold() for word in _WORD.findall(question)[:MAX_WORDS]]
    names = {f"w {word}" for word in words}
    names |= {f"p {first} {second}" for first, second in itertools.pairwise(words)}
    names |= {f"begin {n} {' '.join(words[:n])}" for n in (1, 2, 3)}
    names |= {f"length {len(words).bit_length()}", f"rows {min(question.count(chr(10)), 3)}"}
    names |= {f"digits {min(words.count('#'), 3)}", f"asks {min(words.count('?'), 2)}"}
    names |= {f"code {min(len(_CODE.findall(question)), 3)}"}
    buckets = {zlib.crc32(name.encode()) % N_BUCKETS for name in names}
    return np.array(sorted(buckets), dtype=np.int64)


class Classifier:
    """Logistic regression over :func:`features`.

    Attributes:
        weights: [N_BUCKETS] float32. bias: added to every score.
    """

    def __init__(self, weights: np.ndarray, bias: float) -> None:
        self.weights = weights
        self.bias = bias

    def probability(self, question: str) -> float:
        """How likely ``question`` is one to be answered point by point, 0 to 1."""
        found = features(question)
        score = self.bias + float(self.weights[found].sum(dtype=np.float64)) / len(found) ** 0.5
        return float(1.0 / (1.0 + np.exp(-np.clip(score, -30.0, 30.0))))

    def save(self, path: Path) -> None:
        """Weights in half precision, which no decision notices, in a file that is the same for the same weights."""
        np.savez(path, weights=self.weights.astype(np.float16), bias=np.float32(self.bias))

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Classifier:
        """
        Raises:
            ModelFileError: the file is missing, damaged, or not of this classifier.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                weights: Any = arrays["weights"].astype(np.float32)
                bias = float(arrays["bias"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, zlib.error) as error:
            raise ModelFileError(f"router: {path}: {error}") from error
        except Exception as error:  # zipfile's own, which has no common base with the others
            raise ModelFileError(f"router: {path}: {error}") from error
        if weights.shape != (N_BUCKETS,) or not np.isfinite([*weights, bias]).all():
            raise ModelFileError(
                f"router: {path}: expected {N_BUCKETS} finite weights, found {weights.shape}"
            )
        return cls(weights, bias)


@functools.cache
def shipped() -> Classifier:
    """The classifier that ships, read once."""
    return Classifier.load()
