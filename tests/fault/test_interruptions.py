"""Requests and loads that are cut short, by every hand that can: the engine is as good as new, or gone."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import edge
from edge.completion import Chunk
from edge.errors import EdgeError
from edge.live import LiveMemory
from tests.fault.conftest import Setup, answer, make_setup
from tests.tiny import tiny_llama_gguf

JOIN_S = 60
LONG = [1 + i % 300 for i in range(60)]
MANY = {"max_tokens": 50, "temperature": 0, "ignore_eos": True}


@pytest.fixture(params=["floor", "experts_floor", "resident"])
def setup(request: pytest.FixtureRequest, packs: dict[str, Path]) -> Setup:
    return make_setup(request.param, packs)


def slow_drive(monkeypatch: pytest.MonkeyPatch, milliseconds: int = 8) -> None:
    """Reads that take long enough for another thread to act in between."""
    monkeypatch.setenv("EDGE_IO_FAULT", f"delay@0+:{milliseconds}")


class Request(threading.Thread):
    """A request in a thread of its own."""

    def __init__(self, engine: edge.Engine, prompt: list[int], n_tokens: int) -> None:
        super().__init__(daemon=True)
        self.engine, self.prompt, self.n_tokens = engine, prompt, n_tokens
        self.begun = threading.Event()
        self.reason: str | None = None
        self.tokens: list[int] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            chunks = self.engine.stream(
                self.prompt,
                max_tokens=self.n_tokens,
                temperature=0,
                ignore_eos=True,
                on_progress=self.progress,
            )
            for chunk in chunks:
                self.reason = chunk.finish_reason
                if chunk.token is not None:
                    self.tokens.append(chunk.token)
                    self.begun.set()
        except BaseException as error:
            self.error = error

    def progress(self, done: int, total: int) -> None:
        self.begun.set()

    def finish(self) -> None:
        self.join(JOIN_S)
        assert not self.is_alive()


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_cancel_from_another_thread(when: str, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    if setup.name != "resident":
        slow_drive(monkeypatch)
    with setup.load() as engine:
        prompt = LONG if when == "prefill" else [1]
        done = Request(engine, prompt, 64 - len(prompt))
        while when == "decode" and len(done.tokens) < 2 and done.is_alive():
            time.sleep(0.001)
        assert when == "prefill" or done.tokens
        engine.cancel()
        # A cancel before the request has begun is forgotten, as promised; this one is repeated until it is seen.
        while done.is_alive():
            engine.cancel()
            done.join(0.01)
        done.finish()
        assert done.error is None
        assert done.reason in ("cancelled", "length")
        if setup.name != "resident":
            assert done.reason == "cancelled" and len(done.tokens) < 63
        assert answer(engine) == setup.tokens


def test_close_waits_for_a_running_request(setup: Setup) -> None:
    engine = setup.load()
    done = Request(engine, [1], 40)
    assert done.begun.wait(JOIN_S)
    engine.close()
    done.finish()
    assert done.error is None and done.reason == "length" and len(done.tokens) == 40


def test_cancel_and_close_while_a_request_runs(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_drive(monkeypatch, 5)
    engine = setup.load()
    done = Request(engine, [1], 60)
    assert done.begun.wait(JOIN_S)
    engine.cancel()
    engine.close()
    done.finish()
    assert done.error is None and done.reason in ("cancelled", "length")
    with pytest.raises(EdgeError, match="closed"):
        engine.generate([1], max_tokens=1)


def test_close_while_a_stream_is_half_consumed(setup: Setup) -> None:
    engine = setup.load()
    chunks = engine.stream([1, 17], **MANY)
    first = [next(chunks) for _ in range(3)]
    engine.close()
    rest = list(chunks)
    assert all(chunk.token is not None for chunk in first)
    assert [chunk.finish_reason for chunk in rest] == ["cancelled"]
    assert rest[0].stats["generated_tokens"] == 3
    with pytest.raises(EdgeError, match="closed"):
        engine.stats()


def test_leaving_with_a_half_consumed_stream(setup: Setup) -> None:
    with setup.load() as engine:
        chunks = engine.stream([1, 17], **MANY)
        next(chunks)
    assert [chunk.finish_reason for chunk in chunks] == ["cancelled"]


def test_a_stream_that_was_never_begun(setup: Setup) -> None:
    with setup.load() as engine:
        chunks = engine.stream([1, 17], **MANY)
        assert answer(engine) == setup.tokens
    with pytest.raises(EdgeError, match="closed"):
        next(chunks)


def test_close_while_another_thread_left_its_stream(setup: Setup) -> None:
    """Nobody reads on: cancel() lets close() through, and a late reader is told."""
    engine = setup.load()
    held: list[edge.stream.Stream] = []

    def begin() -> None:
        held.append(engine.stream([1, 17], **MANY))
        next(held[0])

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join(JOIN_S)
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    engine.cancel()
    closing.join(JOIN_S)
    assert not closing.is_alive()
    assert [chunk.finish_reason for chunk in held[0]] == ["cancelled"]


def test_a_dropped_stream_makes_way(setup: Setup) -> None:
    with setup.load() as engine:
        for n in range(1, 4):
            chunks = engine.stream([1, 17, 5], **MANY)
            for _ in range(n):
                next(chunks)
            del chunks
            gc.collect()
            assert answer(engine) == setup.tokens


@pytest.mark.parametrize("texts", [1, 2])
def test_a_stream_collected_in_the_middle_of_a_change(
    texts: int, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector ends it from inside the change, which holds what the end of a stream asks for."""
    spend = LiveMemory._spend

    def collect_and_spend(self: LiveMemory, memory: int | str) -> Any:
        gc.collect()
        return spend(self, memory)

    with edge.load(setup.pack, memory="1GiB", context=256, threads=2) as engine:
        prompt = [1, 17, 5, 99, 42]
        chunks = engine.stream(prompt, **MANY) if texts == 1 else engine.stream_many([prompt] * texts, **MANY)
        next(chunks)
        cycle: list[Any] = [chunks]
        cycle.append(cycle)
        del chunks, cycle
        monkeypatch.setattr(LiveMemory, "_spend", collect_and_spend)
        change = threading.Thread(target=engine.set_memory, args=("900MiB",), daemon=True)
        change.start()
        change.join(JOIN_S)
        assert not change.is_alive()
        assert answer(engine) == setup.tokens


def test_a_closed_stream_makes_way(setup: Setup) -> None:
    with setup.load() as engine:
        chunks = engine.stream([1, 17, 5], **MANY)
        next(chunks)
        chunks.close()
        chunks.close()
        assert list(chunks) == []
        with engine.stream([1, 17, 5], **MANY) as chunks:
            next(chunks)
        assert answer(engine) == setup.tokens


def test_a_second_request_beside_an_unfinished_stream_is_an_error(setup: Setup) -> None:
    """It would wait for ever: the stream can only be read on by this very thread."""
    with setup.load() as engine:
        chunks = engine.stream([1, 17, 5, 99, 42], max_tokens=6, temperature=0, ignore_eos=True)
        found: list[Chunk] = [next(chunks)]
        for request in (lambda: answer(engine), lambda: engine.score([1, 2]), lambda: engine.logits([1])):
            with pytest.raises(EdgeError, match="unfinished stream"):
                request()
        found += chunks  # and the stream is none the worse
        assert [chunk.token for chunk in found if chunk.token is not None] == setup.tokens
        assert answer(engine) == setup.tokens


def test_another_thread_waits_for_the_stream(setup: Setup) -> None:
    with setup.load() as engine:
        chunks = engine.stream([1, 17], max_tokens=4, temperature=0, ignore_eos=True)
        next(chunks)
        other = Request(engine, [1, 17, 5, 99, 42], 6)
        other.join(0.2)
        assert other.is_alive() and not other.tokens
        list(chunks)
        other.finish()
        assert other.tokens == setup.tokens


def test_an_error_in_on_progress_ends_the_request(setup: Setup) -> None:
    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError

    with setup.load() as engine:
        with pytest.raises(ZeroDivisionError):
            engine.generate([1, 2, 3], max_tokens=2, on_progress=fail)
        assert answer(engine) == setup.tokens


def test_close_from_on_progress_is_refused(setup: Setup) -> None:
    with setup.load() as engine:
        with pytest.raises(EdgeError, match="cannot be closed by the request"):
            engine.generate([1, 2, 3], max_tokens=2, on_progress=lambda done, total: engine.close())
        assert answer(engine) == setup.tokens


@contextmanager
def interrupt_self(after_seconds: float) -> Iterator[None]:
    timer = threading.Timer(after_seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.join()


def test_ctrl_c_in_a_streamed_request(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_drive(monkeypatch)
    with setup.load() as engine:
        with pytest.raises(KeyboardInterrupt), interrupt_self(0.1):
            while True:  # a resident model is soon done
                engine.generate([1, 17], **MANY)
        assert answer(engine) == setup.tokens


def check_nothing_loads() -> None:
    for thread in threading.enumerate():
        if thread.name == "edge-load":
            with suppress(RuntimeError):  # interrupted before it began, it never will
                thread.join(JOIN_S)
            assert not thread.is_alive()


def test_ctrl_c_while_loading(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_IO_FAULT", "delay@0+:200")
    with pytest.raises(KeyboardInterrupt), interrupt_self(0.1):
        while True:
            setup.load().close()
    check_nothing_loads()
    monkeypatch.delenv("EDGE_IO_FAULT")
    with setup.load() as engine:
        assert answer(engine) == setup.tokens


def test_an_error_in_on_load_ends_the_load(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_IO_FAULT", "delay@0+:100")

    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        edge.load(setup.pack, memory=setup.memory_bytes, context=64, on_load=fail)
    check_nothing_loads()


# -- the command line ----------------------------------------------------------------------------------------------

PROGRAM = [sys.executable, "-c", "from edge.cli import main; main()"]
ENDLESS = ("-n", "100000000", "--overflow", "shift", "--ignore-eos", "--context", "64")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interruptions")
    edge.pack(tiny_llama_gguf(folder / "m.gguf", type="q8_0"), folder / "m.edge")
    return folder / "m.edge"


def endless(pack: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*PROGRAM, "run", str(pack), "x", *ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def holds_open(pid: int, path: Path) -> bool:
    links = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            links.append(os.readlink(entry.path))
    return str(path) in links


@pytest.mark.parametrize("after_seconds", [0.0, 0.05, 0.13])
def test_ctrl_c_at_any_moment(after_seconds: float, pack: Path) -> None:
    child = endless(pack)
    assert child.stdout is not None
    child.stdout.read(20)
    time.sleep(after_seconds)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=100)
    assert child.returncode == 130 and stderr.strip() == b"stopped"


def test_a_reader_that_goes_away(pack: Path) -> None:
    """`edge run ... | head -c 20` ends."""
    child = endless(pack)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.read(20)
    child.stdout.close()
    assert child.wait(100) in (1, 141)  # click's own answer, or the shell's for SIGPIPE
    assert child.stderr.read() == b""
    child.stderr.close()


@pytest.mark.slow
def test_ctrl_c_while_a_model_loads(pack: Path) -> None:
    child = subprocess.Popen(
        [*PROGRAM, "run", str(pack), "x", "-n", "2", "--context", "64"],
        env=os.environ | {"EDGE_IO_FAULT": "delay@0+:3000"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not holds_open(child.pid, pack):  # its load is then far from done
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=100)
    assert child.returncode == 130 and stderr.strip() == b"stopped" and stdout == b""
