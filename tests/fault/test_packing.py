"""Packing that is killed, interrupted, out of space or not alone: no half pack is ever used."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashload.format import PackFile
from tests.tiny import tiny_llama_gguf

PROGRAM = [sys.executable, "-c", "from edge.cli import main; main()"]


def slow_program(stop_after: int = 0) -> list[str]:
    """As PROGRAM, with every piece of payload written slowly; it stops for good, and says so, after that many."""
    code = f"""
import sys, time
from flashload.pack_writer import PackWriter
write = PackWriter._write
n_written = 0
def slow(self, data):
    global n_written
    write(self, data)
    n_written += 1
    if n_written == {stop_after}:
        print("stopped", flush=True)
        time.sleep(600)
    time.sleep(0.02)
PackWriter._write = slow
from edge.cli import main
main()
"""
    return [sys.executable, "-c", code]


ARGUMENTS = ("the cat", "-n", "4", "--temperature", "0", "--ignore-eos", "--context", "64", "--json")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_gguf(
        tmp_path_factory.mktemp("packing") / "m.gguf",
        type="f16",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
    )


def start(source: Path, cache: Path, program: list[str] = PROGRAM, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*program, "run", str(source), *ARGUMENTS],
        env=os.environ | {"EDGE_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    out, err = process.communicate(timeout=100)
    return process.returncode, json.loads(out.splitlines()[-1]) if out else {}, err


def answer(source: Path, cache: Path) -> list[int]:
    code, result, err = finish(start(source, cache))
    assert code == 0, err
    tokens: list[int] = result["tokens"]
    return tokens


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    return answer(source, tmp_path_factory.mktemp("expected"))


def names(folder: Path, suffix: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(suffix)) if folder.exists() else []


def start_and_stop(source: Path, cache: Path, n_written: int) -> subprocess.Popen[str]:
    """A process that packs, and stopped after so many pieces."""
    process = start(source, cache, slow_program(n_written))
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n"
    assert len(names(cache, ".tmp")) == 1
    return process


def check_recovery(source: Path, cache: Path, expected: list[int]) -> None:
    """After packing was cut short: nothing half-made is used, and the next run cleans up and works."""
    assert names(cache, ".edge") == []
    assert answer(source, cache) == expected
    (packed,) = names(cache, ".edge")
    assert names(cache, ".tmp") == []
    with PackFile(cache / packed) as file:
        file.verify()


def check_kill(source: Path, cache: Path, expected: list[int], n_written: int) -> None:
    process = start_and_stop(source, cache, n_written)
    process.kill()
    process.communicate(timeout=100)
    assert len(names(cache, ".tmp")) == 1
    check_recovery(source, cache, expected)


def test_killed_while_packing(source: Path, expected: list[int], tmp_path: Path) -> None:
    check_kill(source, tmp_path, expected, 15)


@pytest.mark.slow
@pytest.mark.parametrize("n_written", [1, 2, 3, 7, 20, 40])
def test_killed_at_any_moment(n_written: int, source: Path, expected: list[int], tmp_path: Path) -> None:
    check_kill(source, tmp_path, expected, n_written)


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "stopped"), (signal.SIGTERM, "")])
def test_stopped_while_packing(
    number: int, said: str, source: Path, expected: list[int], tmp_path: Path
) -> None:
    process = start_and_stop(source, tmp_path, 5)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 128 + number and err.strip() == said
    assert names(tmp_path, ".tmp") == []
    check_recovery(source, tmp_path, expected)


def check_no_space(code: int, result: dict[str, Any], err: str, cache: Path) -> None:
    assert code == 1 and result["error"] == "DiskError", (code, result, err)
    assert err.startswith("edge: DiskError: ") and len(err.splitlines()) == 1
    assert "needs" in err and "bytes" in err
    assert names(cache, ".edge") == names(cache, ".tmp") == []


def test_a_file_size_limit_is_like_a_full_drive(source: Path, expected: list[int], tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    check_no_space(*finish(start(source, tmp_path, preexec_fn=limit)), tmp_path)
    check_recovery(source, tmp_path, expected)


@pytest.fixture
def small_drive(tmp_path: Path) -> Iterator[Path]:
    """A drive of 2 MiB."""
    folder = tmp_path / "drive"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small drive")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_drive(source: Path, small_drive: Path) -> None:
    check_no_space(*finish(start(source, small_drive)), small_drive)


def test_a_drive_that_fills_while_packing(source: Path, small_drive: Path) -> None:
    """The space was there when packing began."""
    roomy = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)"
    program = [*PROGRAM[:2], f"{roomy}\n{PROGRAM[2]}"]
    check_no_space(*finish(start(source, small_drive, program)), small_drive)


def test_a_read_only_cache(source: Path, small_drive: Path) -> None:
    cache = small_drive / "cache"
    cache.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_drive)], check=True)
    for folder in (cache, small_drive / "new"):
        code, result, err = finish(start(source, folder))
        assert code == 1 and result["error"] == "DiskError", (code, result, err)
        assert str(folder) in err and "Read-only" in err and len(err.splitlines()) == 1


def test_a_cached_pack_is_used_though_the_cache_became_read_only(
    source: Path, expected: list[int], small_drive: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_drive)], check=True)
    assert answer(source, small_drive) == expected
    subprocess.run(["mount", "-o", "remount,ro", str(small_drive)], check=True)
    assert answer(source, small_drive) == expected


def test_two_at_once_pack_once(source: Path, expected: list[int], tmp_path: Path) -> None:
    both = [start(source, tmp_path, slow_program()) for _ in range(2)]
    seen = set()
    while any(process.poll() is None for process in both):
        seen |= set(names(tmp_path, ".tmp"))
        time.sleep(0.01)
    for process in both:
        code, result, err = finish(process)
        assert code == 0, err
        assert result["tokens"] == expected
    assert len(seen) == 1 and len(names(tmp_path, ".edge")) == 1


def test_the_second_packs_when_the_first_is_killed(source: Path, expected: list[int], tmp_path: Path) -> None:
    first = start_and_stop(source, tmp_path, 3)
    second = start(source, tmp_path)
    time.sleep(0.5)
    first.kill()
    first.communicate(timeout=100)
    code, result, err = finish(second)
    assert code == 0, err
    assert result["tokens"] == expected
    assert names(tmp_path, ".tmp") == []
