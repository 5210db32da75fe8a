"""A process that forks: its child is told that it cannot use the engine, and neither hangs nor harms the parent's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from edge.errors import EdgeError
from tests.fault.conftest import Setup, answer

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LIMIT_S = 60


def in_child(work: Callable[[], bool]) -> bool:
    """What ``work`` says in a child of this process; False when it fails or takes too long."""
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_S)
        right = False
        try:
            right = work()
        finally:
            os._exit(0 if right else 1)
    return os.waitpid(child, 0)[1] == 0


def is_refused(work: Callable[[], object], what: str) -> bool:
    try:
        work()
    except EdgeError as error:
        return what in str(error)
    return False


def test_a_child_cannot_use_it(setup: Setup) -> None:
    with setup.load() as engine:

        def child() -> bool:
            told = is_refused(lambda: answer(engine), f"loaded by process {os.getppid()} before it forked")
            told = told and is_refused(engine.stats, "forked")
            engine.close()
            return told

        assert in_child(child)
        assert answer(engine) == setup.tokens


def test_a_child_loads_its_own(setup: Setup) -> None:
    with setup.load() as engine:

        def child() -> bool:
            with setup.load() as own:
                return answer(own) == setup.tokens

        assert in_child(child)
        assert answer(engine) == setup.tokens


def test_a_child_in_the_middle_of_a_text(setup: Setup) -> None:
    with setup.load() as engine:
        stream = engine.stream([3, 4, 5], max_tokens=8, temperature=0, ignore_eos=True)
        next(stream)
        assert in_child(lambda: is_refused(lambda: answer(engine), "forked"))
        assert len(list(stream)) >= 7
        assert answer(engine) == setup.tokens


def test_a_child_ends() -> None:
    """Through all that Python does at its end, with the engine in a global of the main module."""
    program = """
import os, edge
engine = edge.load("story", memory="96MiB", threads=2)
child = os.fork()
if child == 0:
    raise SystemExit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), engine.generate("Once", max_tokens=4).tokens != [])
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.stdout.split() == ["7", "True"], done.stderr
