"""stdin, stdout and stderr as a command finds them: closed, of any encoding, read by nobody."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def open_streams() -> None:
    """Gives the process all three streams, and characters that a stream's encoding lacks a ``?``.

    A stream that was closed by the caller leads nowhere: a file opened later would take its number.
    """
    for name, mode in (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY)):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = os.open(os.devnull, mode)
            stream = open(nowhere, "r" if mode == os.O_RDONLY else "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def discard_output() -> None:
    """Lets what stdout still holds go nowhere: it could not be written, and would fail again at the end."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a stdout that is no file
        return


def is_unicode(stream: object) -> bool:
    """Whether every character can be written to ``stream``."""
    encoding = str(getattr(stream, "encoding", None) or "utf-8")
    return encoding.lower().replace("-", "").startswith("utf")


def console(width: int) -> Console:
    """Where tables go: as wide as the terminal, or ``width`` columns where stdout is none."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    found = Output()
    return found if found.is_terminal else Output(width=width)
