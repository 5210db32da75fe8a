"""edge: run a language model inside the memory you name.

>>> import edge
>>> with edge.load("story", memory="64MiB") as engine:
...     print(engine.generate("Once upon a time", max_tokens=40).text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge import errors

if TYPE_CHECKING:
    from edge.api import pack, plan
    from edge.completion import Chunk, Completion, TokenLogprob
    from edge.config import GenerationConfig
    from edge.engine import Engine
    from edge.loading import load
    from edge.models import builtin_models
    from edge.predictor_training import train_predictor
    from edge.sparsify import sparsify
    from edge.tokenizer import Tokenizer, load_tokenizer

__version__ = "0.1.0"

#: Public name -> the module that defines it; imported on first use, so that ``import edge`` costs next to nothing.
_LAZY = {
    "Chunk": "edge.completion",
    "Completion": "edge.completion",
    "Engine": "edge.engine",
    "GenerationConfig": "edge.config",
    "TokenLogprob": "edge.completion",
    "Tokenizer": "edge.tokenizer",
    "builtin_models": "edge.models",
    "load": "edge.loading",
    "load_tokenizer": "edge.tokenizer",
    "pack": "edge.api",
    "plan": "edge.api",
    "sparsify": "edge.sparsify",
    "train_predictor": "edge.predictor_training",
}

__all__ = [
    "Chunk",
    "Completion",
    "Engine",
    "GenerationConfig",
    "TokenLogprob",
    "Tokenizer",
    "builtin_models",
    "errors",
    "load",
    "load_tokenizer",
    "pack",
    "plan",
    "sparsify",
    "train_predictor",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'edge' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
