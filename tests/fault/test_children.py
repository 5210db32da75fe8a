"""Processes of the library's own that die in mid-work: told in one line, nothing hangs, what was finished is kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge import predictor_training
from edge.predictor_work import WorkFolder
from flashload import probe_kernels
from flashload.errors import ArgumentError, EdgeError

Play = Callable[[str], WorkFolder]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Puts a program in the place of the one that fits; ``folder`` names the working folder in it."""

    def start(program: str) -> WorkFolder:
        work = WorkFolder(tmp_path / ".m.training")
        work.begin({"fit": {}})
        code = f"import os, signal, sys, time; folder = {str(work.path)!r}\n{program}"
        monkeypatch.setattr(predictor_training, "_fit_command", lambda work: [sys.executable, "-c", code])
        return work

    return start


DIES = """
print(0, 32, 500, flush=True)
print("a warning", file=sys.stderr, flush=True)
open(os.path.join(folder, "layer-0.npz"), "w").close()
print(1, 32, 100, flush=True)
os.kill(os.getpid(), signal.SIG{})
"""


@pytest.mark.parametrize("name", ["KILL", "TERM", "SEGV"])
def test_fitting_that_is_killed_is_one_line_and_keeps_what_is_done(name: str, play: Play) -> None:
    work, told = play(DIES.format(name)), []
    with pytest.raises(EdgeError, match=r"train-predictor: .* killed by signal") as found:
        predictor_training._fit(work, 2, lambda stage, done, total: told.append((stage, done)))
    assert "\n" not in str(found.value) and "a warning" not in str(found.value)
    assert told == [("layer 1 of 2, rank 32", 500), ("layer 2 of 2, rank 32", 100)]
    assert (work.path / "layer-0.npz").exists()


def test_fitting_that_fails_says_its_last_line(play: Play) -> None:
    work = play("print('first\\nlayer 0: no neuron opens', file=sys.stderr); sys.exit(1)")
    with pytest.raises(ArgumentError, match=r"^train-predictor: layer 0: no neuron opens$"):
        predictor_training._fit(work, 2, lambda *_: None)


def test_fitting_that_says_nothing(play: Play) -> None:
    with pytest.raises(ArgumentError, match="ended with status 3"):
        predictor_training._fit(play("sys.exit(3)"), 2, lambda *_: None)


def test_other_words_on_its_stdout_are_not_progress(play: Play) -> None:
    told: list[int] = []
    work = play("print('torch says hello'); print(0, 32); print(0, 32, 1000); print(0, 32, end='')")
    predictor_training._fit(work, 1, lambda stage, done, total: told.append(done))
    assert told == [1000]


def test_giving_up_ends_the_process(play: Play, tmp_path: Path) -> None:
    """A caller that stops between two lines leaves no process behind."""
    pid_file = tmp_path / "pid"
    work = play(
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); print(0, 32, 1, flush=True); time.sleep(600)"
    )

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predictor_training._fit(work, 1, stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


@pytest.mark.parametrize("program", [None, "#!/bin/sh\nkill -9 $$\n", "#!/bin/sh\necho words\n"])
def test_a_probe_measures_by_itself_when_its_process_does_not(
    program: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable = tmp_path / "python"
    if program is not None:
        executable.write_text(program)
        executable.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(executable))
    monkeypatch.setattr(probe_kernels, "read_bus", lambda threads, n_bytes: 7.0 * threads)
    assert probe_kernels.probe_bus(2) == 14.0
