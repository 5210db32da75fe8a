"""The command line and what surrounds it: streams that are closed, full or of another encoding; odd files and names."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from edge.cli.streams import console
from tests.tiny import tiny_hf, tiny_llama_gguf

RUN = [sys.executable, "-m", "edge"]
FEW = ("-n", "3", "--context", "64", "--seed", "3")
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_gguf(tmp_path_factory.mktemp("streams") / "tiny.gguf", type="q4_0", seed=1)


@pytest.fixture(scope="module")
def pack_file(gguf_file: Path) -> Path:
    done = subprocess.run([*RUN, "pack", str(gguf_file), str(gguf_file.with_suffix(".edge"))], timeout=100)
    assert done.returncode == 0
    return gguf_file.with_suffix(".edge")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))


def shell(command: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """``command`` in bash, in which "$@" is edge with ``arguments``."""
    return subprocess.run(
        ["bash", "-c", command, "bash", *RUN, *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        env=os.environ | environment,
        timeout=100,
    )


def is_one_line(text: str, begin: str) -> bool:
    return text.startswith(begin) and len(text.strip().splitlines()) == 1


def test_nobody_reads(pack_file: Path) -> None:
    for command in ("run", "show", "plan"):
        more = (*FEW[2:], "-n", 32) if command == "run" else ()
        done = shell('"$@" | true; exit ${PIPESTATUS[0]}', command, pack_file, *more)
        assert done.returncode == 141, (command, done)
        assert "Traceback" not in done.stderr and "Broken" not in done.stderr
    done = shell('"$@" | head -1; exit ${PIPESTATUS[0]}', "plan", pack_file)  # gone between two tables
    assert done.returncode in (0, 141) and "Traceback" not in done.stderr


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_full_drive_behind_stdout(pack_file: Path, more: tuple[str, ...]) -> None:
    done = shell('"$@" > /dev/full', "run", pack_file, "x", *FEW, *more)
    assert done.returncode == 1 and is_one_line(done.stderr, "edge: DiskError: output: No space left")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(pack_file: Path, closed: str) -> None:
    done = shell(f'"$@" {closed}', "run", pack_file, "x", *FEW)
    assert done.returncode == 0, done.stderr
    done = shell(f'"$@" {closed}', "run", pack_file, "--file", "-", *FEW)
    assert done.returncode == 0, done.stderr
    done = shell(f'"$@" {closed}', "chat", pack_file, "--template", os.devnull, *FEW)
    assert done.returncode == 0, done.stderr


def test_a_stream_of_another_encoding(pack_file: Path) -> None:
    """The characters it lacks become a question mark; JSON escapes them and loses nothing."""
    settings = ("run", pack_file, "äß", "-n", 24, "--context", 64, "--seed", 3)
    whole = json.loads(shell('"$@"', *settings, "--json").stdout)
    assert not whole["text"].isascii()
    escaped = shell('"$@"', *settings, "--json", PYTHONIOENCODING="latin-1").stdout
    assert escaped.isascii() and json.loads(escaped)["text"] == whole["text"]
    text = shell('"$@"', *settings, PYTHONIOENCODING="latin-1")
    assert text.returncode == 0 and text.stdout.startswith("\udce4\udcdf") and "?" in text.stdout
    plan = shell('"$@"', "plan", pack_file, "--context", 64, PYTHONIOENCODING="ascii")
    assert plan.returncode == 0 and plan.stdout.isascii() and "o keep (4.5 bits)" in plan.stdout


def test_a_name_that_is_no_text(gguf_file: Path, tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9 \xff.gguf")
    os.link(gguf_file, name)
    for command in (("run", name, "x", *FEW), ("show", name), ("plan", name, "--context", 64), ("list",)):
        for more in ((), ("--json",)):
            done = shell('"$@"', *command, *more)
            assert done.returncode == 0, done.stderr
            if more:
                json.loads(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("run", "{pack}", "--file", "{binary}"), "--file: expected UTF-8 text, found byte 3"),
        (("chat", "{pack}", "--template", "{binary}"), "--template: expected UTF-8 text, found byte 3"),
        (("run", "{pipe}", "x"), "expected a regular file"),
        (("plan", "{pipe}"), "expected a regular file"),
        (("run", "", "x"), "expected a file, a folder or a shipped model"),
        (("run", "x" * 5000, "x"), "cannot be looked up: File name too long"),
        (("chat", "{pack}"), "no chat template"),
        (("pack", "{gguf}", "{binary}"), "expected a new file or a pack to replace"),
        (("pack", "{gguf}", "{folder}"), "expected a new file or a pack to replace"),
        (("run", "~nobody-of-that-name/m.gguf", "x"), "home"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_odd_files(
    arguments: tuple[str, ...], found: str, gguf_file: Path, pack_file: Path, tmp_path: Path
) -> None:
    """One line each, before anything is waited for or written."""
    places = {"pack": pack_file, "gguf": gguf_file, "folder": tmp_path}
    for name in ("binary", "pipe"):
        places[name] = tmp_path / name
    places["binary"].write_bytes(b"abc\xff\x00")
    os.mkfifo(places["pipe"])
    given = [argument.format(**places) for argument in arguments]
    done = shell('"$@" < /dev/null', *given)
    assert done.returncode == 1 and is_one_line(done.stderr, "edge: ") and found in done.stderr
    assert len(done.stderr) < 1000
    assert places["binary"].read_bytes() == b"abc\xff\x00"


def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "hf", "llama", seed=1)
    folder.chmod(0)
    try:
        if os.access(folder, os.R_OK):
            pytest.skip("this user may read every folder")
        for command in (("run", folder, "x"), ("plan", folder), ("run", folder / "config.json", "x")):
            done = shell('"$@"', *command)
            assert done.returncode == 1 and is_one_line(done.stderr, "edge: DiskError: ")
    finally:
        folder.chmod(0o755)


def test_a_cache_that_cannot_be_written_names_the_way_out(gguf_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    done = shell('"$@"', "run", gguf_file, "x", EDGE_CACHE=str(file))
    assert done.returncode == 1 and is_one_line(done.stderr, "edge: DiskError: ")
    assert "EDGE_CACHE names another" in done.stderr


def test_wrong_use_is_json_too() -> None:
    done = shell('"$@"', "run", "--json")
    assert done.returncode == 2 and json.loads(done.stdout)["error"] == "UsageError"
    done = shell('"$@"', "run", "story", "x", "--file", os.devnull)
    assert done.returncode == 2 and "found both" in done.stderr and done.stdout == ""


def test_log_probabilities_are_shown(pack_file: Path) -> None:
    lines = shell('"$@"', "run", pack_file, "x", *FEW, "--logprobs", 2).stdout.splitlines()[-3:]
    found = json.loads(shell('"$@"', "run", pack_file, "x", *FEW, "--logprobs", 2, "--json").stdout)[
        "logprobs"
    ]
    assert [float(line.split()[0]) for line in lines] == [
        pytest.approx(one["logprob"], abs=1e-4) for one in found
    ]
    many = shell(
        '"$@"', "run", pack_file, "x", *FEW, "--logprobs", 2, "--samples", 2, "--context", 128, "--json"
    )
    assert json.loads(many.stdout)["samples"][0]["logprobs"] == found


def test_ctrl_c_while_python_starts() -> None:
    code = """
import signal, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "click":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
from edge.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 130 and done.stderr == "stopped\n"


def _until_asked(stdout: IO[bytes]) -> None:
    """Reads what is left of an answer, up to a prompt behind which nothing comes."""
    said = b""
    while not said.endswith(b"> ") or select.select([stdout], [], [], 0.5)[0]:
        more = os.read(stdout.fileno(), 4096)
        assert more, said
        said = (said + more)[-100:]


def test_ctrl_c_ends_an_answer_and_not_the_conversation(pack_file: Path, tmp_path: Path) -> None:
    """At a terminal, that is: the second question is answered."""
    pty = pytest.importorskip("pty")
    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATE)
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [*RUN, "chat", str(pack_file), "--template", str(template), "--ignore-eos", "--overflow", "shift",
         "-n", "100000000"],
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
    )  # fmt: skip
    os.close(theirs)
    try:
        assert child.stdout is not None
        for _ in range(2):
            _until_asked(child.stdout)
            os.write(ours, b"hello\n")
            assert child.stdout.read(40)
            child.send_signal(signal.SIGINT)
            assert child.stderr is not None
            while b"[stopped" not in child.stderr.readline():
                assert child.poll() is None
        os.write(ours, b"\x04")
        child.stdout.read()
        assert child.wait(timeout=100) == 0
    finally:
        child.kill()
        child.communicate()
        os.close(ours)


def test_a_table_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(text: str) -> int:
        raise BrokenPipeError

    out = console(80)
    monkeypatch.setattr(sys.stdout, "write", gone)
    with pytest.raises(BrokenPipeError):
        out.print("x")
