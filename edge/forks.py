"""Engines in a process that forks: the child has their memory, but neither their threads nor what the kernel reads for
them, so it must not touch them, not even to give them back. The parent's go on as if nothing had been.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Protocol


class Forked(Protocol):
    def left_behind(self) -> object:
        """Called in the child: forgets what threads of the parent work with, and returns it."""
        ...


_engines: weakref.WeakSet[Forked] = weakref.WeakSet()


def watch(engine: Forked) -> None:
    """From now on a child of this process is told of ``engine``."""
    _engines.add(engine)


def _in_child() -> None:
    for engine in list(_engines):
        # Never freed: that would wait for threads which are not there.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine.left_behind()))
    _engines.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
