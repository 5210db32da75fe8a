"""Other runtimes behind an engine's calls, where the user has them: ``edge.load(model, backend="llama.cpp")``.

They draw with edge's samplers from their own logits, or, where they show none, with their own (``mlc``). None of them
keeps a budget: what edge promises of memory, placement and speed does not hold for them.
"""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

from edge.options import check_sizes
from flashload.errors import ArgumentError

if TYPE_CHECKING:
    from edge.backends.peer import Peer

#: Name, the module here that adapts it, the package it needs, and how to get that.
BACKENDS = {
    "llama.cpp": ("llama_cpp", "llama_cpp", "pip install 'edge[llama-cpp]'"),
    "onnxruntime": ("onnxruntime_genai", "onnxruntime_genai", "pip install 'edge[onnxruntime]'"),
    "mlc": ("mlc", "mlc_llm", "see https://llm.mlc.ai/docs/install/mlc_llm.html"),
}


class Adapter(Protocol):
    """What a module here offers."""

    def open_peer(
        self, package: Any, model: Path, tokenizer: Any, context: int | None, threads: int
    ) -> Peer: ...


def load_peer(
    model: str | os.PathLike[str], backend: str, *, context: int | None, threads: int | None
) -> Peer:
    """Loads a model with another runtime.

    Args:
        model: what that runtime reads: a GGUF file for llama.cpp, the folder of an ONNX or MLC model for the others.
        context: tokens; None takes what the model was made for, at most 4096.
        threads: None takes the cores this process may use.

    Raises:
        ArgumentError: the backend is not known, its package is not installed, or a parameter is out of range.
        ModelFileError: the model is not one it reads.
    """
    from edge.tokenizer import load_tokenizer
    from flashload.machine import cpu_count

    if backend not in BACKENDS:
        raise ArgumentError(f"backend: expected edge, {', '.join(BACKENDS)}, found {backend!r}")
    adapter, package, advice = BACKENDS[backend]
    check_sizes(context, threads)
    found = _package(backend, package, advice)
    path = Path(model).expanduser()
    if not path.exists():
        raise ArgumentError(f"model: expected a file or a folder for {backend}, found {str(model)!r}")
    start = time.perf_counter()
    tokenizer = load_tokenizer(path)
    module = cast(Adapter, importlib.import_module(f"edge.backends.{adapter}"))
    peer = module.open_peer(found, path, tokenizer, context, threads or cpu_count())
    peer.load_seconds = time.perf_counter() - start
    return peer


def _package(backend: str, package: str, advice: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        why = "is not installed" if error.name == package else f"does not load ({error})"
        raise ArgumentError(
            f"backend: {backend} needs the package {package}, which {why}; {advice}"
        ) from None
