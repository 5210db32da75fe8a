"""A drive that fails at every possible read: the right tokens or one typed line, and an engine that goes on."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import pytest

import edge
from edge.errors import CorruptError, DiskError, EdgeError, ModelFileError
from tests.fault.conftest import CONTEXT, PLACEMENTS, Setup, answer

#: fault -> what it may end in; a fault without an error must be survived.
FAULTS: dict[str, tuple[type[EdgeError], ...]] = {
    "eio@{}": (DiskError,),
    "zero@{}": (DiskError,),
    # Half a block of a direct read is what the end of a file looks like; anything longer is read on.
    "short@{}": (DiskError,),
    "again@{}": (),
    # The first read is the header: without its magic it is no pack at all.
    "flip@{}:12345": (CorruptError,),
    "flip@{}:1": (ModelFileError,),
    "delay@{}:5": (),
}
#: Reads whose fault is tried; every reader of an engine counts its own. The sweep below is wider.
FEW = (0, 1, 2, 5, 11)
N_READS = 24


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and "\n" not in text
    return text


def try_load(
    setup: Setup, fault: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[edge.Engine | None, EdgeError | None]:
    monkeypatch.setenv("EDGE_IO_FAULT", fault)
    try:
        return setup.load(), None
    except EdgeError as error:
        one_line(error)
        return None, error
    finally:
        monkeypatch.delenv("EDGE_IO_FAULT")


def generate_with(
    setup: Setup, fault: str, may: tuple[type[EdgeError], ...], monkeypatch: pytest.MonkeyPatch
) -> bool:
    """One faulty load and request; returns whether anything failed. A fault that is over leaves no trace."""
    engine, refused = try_load(setup, fault, monkeypatch)
    if engine is None:
        assert isinstance(refused, may), refused
        return True
    # Of streams and of single weights; records of neurons have one of their own, and at the floor all are busy.
    n_readers = 3 if setup.name == "neurons_floor" else 2
    with engine:
        failed = 0
        for _ in range(12):  # until each reader has passed the faulty number
            try:
                assert answer(engine) == setup.tokens
            except EdgeError as error:
                one_line(error)
                assert isinstance(error, may), error
                failed += 1
        assert failed <= n_readers
        assert answer(engine) == setup.tokens
    return failed > 0


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault(setup: Setup, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = [generate_with(setup, fault.format(at), FAULTS[fault], monkeypatch) for at in FEW]
    assert any(failed) == bool(FAULTS[fault])


def n_load_reads(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> int:
    """The first read whose failure the load survives: from there on faults meet requests."""
    for at in range(100):
        engine, _ = try_load(setup, f"eio@{at}+", monkeypatch)
        if engine is not None:
            engine.close()
            return at
    raise AssertionError("no load survives")


@pytest.mark.slow
@pytest.mark.parametrize("io", ["io_uring", "pread"])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_at_every_read(setup: Setup, fault: str, io: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_IO", io)
    for at in range(N_READS):
        generate_with(setup, fault.format(at), FAULTS[fault], monkeypatch)


FOREVER: dict[str, type[EdgeError] | None] = {
    "eio@{}+": DiskError,
    "zero@{}+": DiskError,
    "again@{}+": DiskError,
    "flip@{}+:7": ModelFileError,
    "short@{}+": DiskError,
    "delay@{}+:1": None,
}


@pytest.mark.parametrize("fault", FOREVER)
def test_a_fault_that_stays(setup: Setup, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = FOREVER[fault]
    ends = {"load": 0, "request": 0, "none": 0}
    first = n_load_reads(setup, monkeypatch)
    for at in (0, first - 1, first, first + 1, first + 6):
        engine, refused = try_load(setup, fault.format(at), monkeypatch)
        if engine is None:
            assert expected is not None and isinstance(refused, expected), refused
            ends["load"] += 1
            continue
        with engine:
            for _ in range(3):  # it goes on failing, in the same way, and never hangs
                try:
                    assert answer(engine) == setup.tokens
                    ends["none"] += 1
                except EdgeError as error:
                    one_line(error)
                    assert expected is not None and isinstance(error, expected), error
                    ends["request"] += 1
    if expected is None:
        assert ends["load"] == ends["request"] == 0
    else:
        assert ends["load"] > 0
        if fault != "short@{}+":
            assert (ends["request"] > 0) == (setup.name != "resident")
    with setup.load() as engine:
        assert answer(engine) == setup.tokens


def test_a_fault_in_the_middle_of_a_stream(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before the fault is right."""
    if setup.name == "resident":
        pytest.skip("a resident model reads nothing while it generates")
    first = n_load_reads(setup, monkeypatch)
    for at in range(first, first + 8):
        engine, _ = try_load(setup, f"eio@{at}", monkeypatch)
        assert engine is not None
        with engine:
            found: list[int] = []
            with contextlib.suppress(DiskError):
                for chunk in engine.stream([1, 17, 5, 99, 42], max_tokens=6, temperature=0, ignore_eos=True):
                    if chunk.token is not None:
                        found.append(chunk.token)
            assert found == setup.tokens[: len(found)]


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("fault, kind", [("eio@0+", "DiskError"), ("flip@0+:99", "CorruptError")])
def test_the_command_line_says_one_line(name: str, fault: str, kind: str, packs: dict[str, object]) -> None:
    pack = packs[PLACEMENTS[name][0]]
    command = [sys.executable, "-c", "from edge.cli import main; main()", "run", str(pack), "x", "-n", "4"]
    done = subprocess.run(
        [*command, "--context", str(CONTEXT), "--json"],
        env=os.environ | {"EDGE_IO_FAULT": fault},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"edge: {kind}: ") and len(done.stderr.splitlines()) == 1
    assert json.loads(done.stdout)["error"] == kind
