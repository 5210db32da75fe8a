"""Conversations parked in files: a request that goes on with the text computes only what is new."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import _edge

if TYPE_CHECKING:
    from edge.engine import Engine


def save_session(engine: Engine, path: str | os.PathLike[str]) -> None:
    """Writes the tokens, keys and values of the engine's last request to ``path``.

    The file appears whole or not at all; it is about as large as the keys and values of its tokens, and readable by its
    owner alone. Waits for a running request.

    Raises:
        DiskError: the drive failed or is full; what ``path`` held before is still there.
        CancelledError: :meth:`edge.Engine.cancel` was called.
    """
    with engine._serving() as sequence:
        _edge.save_session(sequence, os.fspath(path))


def load_session(engine: Engine, path: str | os.PathLike[str]) -> list[int]:
    """Restores what :func:`save_session` wrote, under the same model and any budget, and returns its tokens.

    The next request keeps the longest prefix it shares with them, bit for bit as if it had just been computed.

    Raises:
        UnsupportedModelError: the session belongs to another model.
        CorruptError: its bytes do not match their checksums.
        ModelFileError: it is no session, or cut short.
        ContextOverflowError: it holds more tokens than this engine's context.
        DiskError: the drive failed.
        CancelledError: :meth:`edge.Engine.cancel` was called.
    """
    with engine._serving() as sequence:
        _edge.load_session(sequence, os.fspath(path))
        return list(sequence.tokens)
