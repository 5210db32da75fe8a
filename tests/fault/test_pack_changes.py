"""The pack changes on disk: while an engine streams from it, or between two runs in the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

import edge
from edge.errors import CorruptError
from flashload.cache import ensure_packed
from flashload.format import PackFile
from tests.tiny import tiny_llama_gguf

PAGE = 4096
CHILD = """
import gc, json, sys
import edge
from flashload.machine import rss_bytes, trim_memory

pack = sys.argv[1]
for _ in range(2):  # the second is not charged for the modules that the first imported
    try:
        edge.load(pack, memory=1, context=64, threads=2)
    except edge.errors.BudgetError as error:
        floor = error.floor_bytes
held = int(sys.argv[2])
before = rss_bytes()
engine = edge.load(pack, memory=floor + held, context=64, threads=2)
def say(**values):
    print(json.dumps(values), flush=True)
def answer():
    try:
        say(tokens=engine.generate([1, 7, 9], max_tokens=8, temperature=0, ignore_eos=True).tokens)
    except edge.errors.EdgeError as error:
        say(error=type(error).__name__, message=str(error))
answer()
for line in sys.stdin:
    if line == "close\\n":
        loaded = rss_bytes()
        engine.close()
        gc.collect()
        trim_memory()
        say(loaded=loaded - before, closed=rss_bytes() - before)
    else:
        answer()
"""


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_gguf(
        tmp_path_factory.mktemp("changes") / "m.gguf",
        type="f16",
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
    )


@pytest.fixture
def pack(gguf_file: Path, tmp_path: Path) -> Path:
    edge.pack(gguf_file, tmp_path / "m.edge")
    return tmp_path / "m.edge"


class Child:
    """An engine at its floor plus ``held_bytes``, in a process of its own."""

    def __init__(self, pack: Path, held_bytes: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(pack), str(held_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first = self.read()

    def read(self) -> dict[str, Any]:
        out: IO[str] | None = self.process.stdout
        assert out is not None
        line = out.readline()
        assert line, f"the process ended with {self.process.wait(10)}"
        value: dict[str, Any] = json.loads(line)
        return value

    def ask(self, what: str = "answer") -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.read()

    def finish(self) -> None:
        _, _ = self.process.communicate(timeout=100)
        assert self.process.returncode == 0


@pytest.fixture
def start() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def make(pack: Path, held_bytes: int = 0) -> Child:
        children.append(Child(pack, held_bytes))
        return children[-1]

    yield make
    for child in children:
        child.process.kill()
        child.process.wait()


def overwrite(path: Path, first: int, last: int) -> None:
    with open(path, "r+b") as file:
        file.seek(first)
        file.write(os.urandom(last - first))
        file.flush()
        os.fsync(file.fileno())


Start = Callable[..., Child]


def test_a_pack_cut_short_under_a_stream(pack: Path, start: Start) -> None:
    child = start(pack)
    os.truncate(pack, pack.stat().st_size // 2 // PAGE * PAGE)
    errors = [child.ask() for _ in range(3)]
    assert all(e["error"] == "DiskError" and "shrank" in e["message"] for e in errors)
    assert all("\n" not in e["message"] for e in errors)
    child.ask("close")
    child.finish()


def test_a_pack_emptied_under_a_stream(pack: Path, start: Start) -> None:
    child = start(pack)
    os.truncate(pack, 0)
    assert {child.ask()["error"] for _ in range(3)} == {"DiskError"}
    child.finish()


def test_a_pack_overwritten_under_a_stream(pack: Path, start: Start) -> None:
    child = start(pack)
    whole = pack.read_bytes()
    overwrite(pack, PAGE, len(whole) - PAGE)
    errors = [child.ask() for _ in range(3)]
    assert {e["error"] for e in errors} == {"CorruptError"}
    assert all(".weight" in e["message"] and "edge verify" in e["message"] for e in errors)
    with open(pack, "r+b") as file:  # repaired in place
        file.write(whole)
        file.flush()
        os.fsync(file.fileno())
    # What was read ahead while it was damaged may fail one more request.
    assert child.first in (child.ask(), child.ask())
    child.finish()


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_pack_deleted_or_replaced_under_a_stream(how: str, pack: Path, start: Start) -> None:
    """The engine keeps the file it opened."""
    child = start(pack)
    if how == "replaced":
        other = pack.with_suffix(".new")
        other.write_bytes(os.urandom(8 * PAGE))
        other.rename(pack)
    else:
        pack.unlink()
    assert child.ask() == child.ask() == child.first
    child.finish()


def test_close_returns_the_memory(pack: Path, start: Start) -> None:
    size = pack.stat().st_size
    child = start(pack, 2 * size)
    after = child.ask("close")
    assert after["loaded"] > size * 0.8
    assert after["closed"] < after["loaded"] - size * 0.7
    child.finish()


def test_close_after_an_error_returns_the_memory(pack: Path, start: Start) -> None:
    size = pack.stat().st_size
    child = start(pack, size // 2)
    os.truncate(pack, 0)
    assert child.ask()["error"] == "DiskError"
    after = child.ask("close")
    assert after["closed"] < after["loaded"] - size * 0.3
    child.finish()


# -- the cache -----------------------------------------------------------------------------------------------------


def run(model: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from edge.cli import main; main()", "run", str(model), "the cat"]
    return subprocess.run(
        [*command, "-n", "4", "--temperature", "0", "--ignore-eos", "--context", "64"],
        env=os.environ | {"EDGE_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.parametrize("part", ["header", "directory", "metadata"])
def test_a_cached_pack_with_a_damaged_front_is_made_again(part: str, gguf_file: Path, tmp_path: Path) -> None:
    good = run(gguf_file, tmp_path)
    assert good.returncode == 0, good.stderr
    (packed,) = tmp_path.glob("*.edge")
    whole = packed.read_bytes()
    at = {"header": 20, "directory": len(whole) - 3 * PAGE, "metadata": PAGE + 10}[part]
    overwrite(packed, at, at + 64)
    again = run(gguf_file, tmp_path)
    assert again.returncode == 0 and again.stdout == good.stdout
    assert packed.read_bytes() == whole


def test_damaged_weights_are_named_with_the_way_to_repair(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path))
    packed = ensure_packed(gguf_file)
    with PackFile(packed) as file:
        entry = file.entries["layers.3.up.weight"]
    overwrite(packed, entry.offset + 100, entry.offset + 132)
    with pytest.raises(CorruptError) as damage:
        edge.load(gguf_file, memory="1GiB", context=64)
    text = str(damage.value)
    assert "layers.3.up.weight" in text and str(packed) in text and "\n" not in text
    assert "edge verify" in text and "delete" in text
    done = run(gguf_file, tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("edge: CorruptError: ")
    assert len(done.stderr.splitlines()) == 1
    packed.unlink()  # as the message says
    assert run(gguf_file, tmp_path).returncode == 0
