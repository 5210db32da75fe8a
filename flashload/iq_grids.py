"""The lookup tables of the IQ1, IQ2 and IQ3 block types: taken from ``gguf`` when a file needs them."""

from __future__ import annotations

import importlib
import threading
from typing import Any

import numpy as np

from flashload.errors import UnsupportedModelError

_lock = threading.Lock()
_loaded: set[int] = set()


def load(ggml_type: int) -> None:
    """Give the compiled core the grid of one IQ type. The core calls this on the first decode of the type.

    Source: ``gguf.quants``, whose class of the type holds the grid; its entries are whole and fit a byte.

    Raises:
        UnsupportedModelError: the ``gguf`` package is missing, or has no grid for this type.
    """
    import _edge

    with _lock:
        if ggml_type in _loaded:
            return
        name = str(_edge.block_type(ggml_type)[0])
        try:
            quants: Any = importlib.import_module("gguf.quants")
        except ImportError as missing:
            raise UnsupportedModelError(
                f"{name}: its lookup table comes from the gguf package, found none: pip install 'edge[gguf]'"
            ) from missing
        try:
            decoder = getattr(quants, name)
            decoder.init_grid()
            grid = np.asarray(decoder.grid)
        except AttributeError as unknown:
            raise UnsupportedModelError(
                f"{name}: expected a lookup table in gguf.quants, found none: pip install -U 'edge[gguf]'"
            ) from unknown
        _edge.set_grid(ggml_type, np.ascontiguousarray(grid, dtype=np.int8))
        _loaded.add(ggml_type)
