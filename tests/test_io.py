"""Reading the drive: every engine gives the same bytes, and a failing drive becomes one typed error."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import _edge
import pytest

from flashload.errors import ArgumentError, DiskError, ModelFileError, UnsupportedModelError

PAGE = 4096
PIECE = 1 << 20
URING = next(engine for engine in _edge.io_engines() if engine["name"] == "io_uring")
ENGINES = [
    pytest.param("io_uring", marks=pytest.mark.skipif(not URING["available"], reason=URING["reason"])),
    "pread",
]
SIZE = 5 * PIECE + 3 * PAGE


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture(scope="module")
def path(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("io") / "data"
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return str(path)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("depth", [1, 3, 32])
@pytest.mark.parametrize("request_bytes", [PAGE, 7 * PAGE, PIECE, 2 * PIECE + PAGE, SIZE])
def test_bytes(engine: str, direct: bool, depth: int, request_bytes: int, path: str, content: bytes) -> None:
    found = _edge.read_file(path, engine, direct, 0, SIZE, depth, request_bytes=request_bytes)
    assert found == content


def test_a_range_in_the_middle(engine: str, path: str, content: bytes) -> None:
    found = _edge.read_file(path, engine, offset=3 * PAGE, bytes=PIECE + PAGE)
    assert found == content[3 * PAGE : 4 * PAGE + PIECE]


@pytest.mark.parametrize(
    ("fault", "right"),
    [
        ("short@0", True),
        ("short@0,short@6,short@7", True),
        ("again@0,again@2", True),
        ("delay@1:20", True),
        ("delay@0+:1", True),
        ("eio@99", True),
        ("eio@0", False),
        ("eio@5", False),
        ("eio@2+", False),
        ("zero@3", False),
        ("again@1+", False),
    ],
)
@pytest.mark.parametrize("request_bytes", [PIECE, SIZE])
def test_faults(engine: str, fault: str, right: bool, request_bytes: int, path: str, content: bytes) -> None:
    def read() -> bytes:
        return bytes(_edge.read_file(path, engine, True, 0, SIZE, 4, fault, request_bytes))

    if right:
        assert read() == content
        return
    with pytest.raises(DiskError, match=path) as caught:
        read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["eio", "short", "zero", "again", "delay", "flip"])
def test_a_fault_at_every_read(engine: str, kind: str, path: str, content: bytes) -> None:
    for at in range(8):
        try:
            found = _edge.read_file(path, engine, True, 0, SIZE, 2, f"{kind}@{at}:5")
        except DiskError:
            assert kind in ("eio", "zero", "short")
        else:
            different = [i for i in range(0, SIZE, PAGE) if found[i : i + PAGE] != content[i : i + PAGE]]
            assert len(different) == (1 if kind == "flip" and at < 6 else 0)


@pytest.mark.parametrize(
    "fault", ["eio", "eio@", "eio@x", "boom@1", "eio@1:", "eio@1;zero@2", "flip@0:-1", "@1"]
)
def test_a_fault_plan_that_is_none(fault: str, path: str) -> None:
    with pytest.raises(ArgumentError, match="fault plan"):
        _edge.read_file(path, fault=fault)


def test_fault_plan_of_the_environment(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_IO_FAULT", "eio@0")
    with pytest.raises(DiskError, match="Input/output error"):
        _edge.read_file(path)


def test_engine_of_the_environment(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_IO", "pread")
    assert _edge.bench_read(path, seconds=0.001, depth=1)["engine"] == "pread"
    monkeypatch.setenv("EDGE_IO", "carrier pigeon")
    with pytest.raises(ArgumentError, match="carrier pigeon"):
        _edge.read_file(path)


@pytest.mark.parametrize("direct", [True, False])
def test_past_the_end(engine: str, direct: bool, path: str) -> None:
    for offset in (SIZE - 2 * PAGE, SIZE):
        with pytest.raises(DiskError, match=f"shrank: expected {PAGE} bytes at offset {SIZE}, found 0"):
            _edge.read_file(path, engine, direct, offset, SIZE + PAGE - offset)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 4095, 4097, 9000])
def test_a_file_that_ends_inside_a_block(engine: str, direct: bool, size: int, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"x" * size)
    whole = size // PAGE * PAGE
    if whole:
        assert _edge.read_file(str(path), engine, direct, 0, whole) == b"x" * whole
    with pytest.raises(DiskError, match="shrank"):
        _edge.read_file(str(path), engine, direct, 0, whole + PAGE)


@pytest.mark.parametrize(
    ("offset", "size"), [(1, PAGE), (513, PAGE), (0, 100), (0, PAGE + 256), (1 << 63, PAGE)]
)
def test_unaligned_requests(engine: str, offset: int, size: int, path: str) -> None:
    with pytest.raises(ArgumentError):
        _edge.read_file(path, engine, offset=offset, bytes=size)


def test_direct_reads_as_fine_as_the_drive_takes_them(engine: str, path: str, content: bytes) -> None:
    align = _edge.bench_read(path, engine, True, PAGE, 1, 0.001)["align"]
    assert align in (512, PAGE)
    for offset, size in ((align, PAGE), (PAGE - align, 2 * align), (3 * PAGE + align, 9 * align)):
        assert _edge.read_file(path, engine, True, offset, size) == content[offset : offset + size]


def test_buffered_reads_are_of_whole_pages(engine: str, path: str) -> None:
    with pytest.raises(ArgumentError, match="multiples of 4096"):
        _edge.read_file(path, engine, False, 512, 512)


@pytest.mark.parametrize("depth", [0, -1, 1025])
def test_depth_out_of_range(engine: str, depth: int, path: str) -> None:
    with pytest.raises(ArgumentError, match="depth"):
        _edge.read_file(path, engine, depth=depth)


def test_no_such_file(engine: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="No such file"):
        _edge.read_file(str(tmp_path / "none"), engine)
    with pytest.raises(ModelFileError, match="regular file"):
        _edge.read_file(str(tmp_path), engine)


def test_page_cache_is_left_as_it_was(engine: str, path: str, content: bytes) -> None:
    """Buffered reads drop what they cached; direct ones cache nothing."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.pread(fd, SIZE, 0)
        if not _edge.page_cached(path, 0, SIZE):
            pytest.skip("the kernel cannot tell what is cached (cachestat, Linux 6.5)")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if _edge.page_cached(path, 0, PAGE):
            pytest.skip("the file system is memory")
    finally:
        os.close(fd)
    for direct in (True, False):
        assert _edge.read_file(path, engine, direct, 0, SIZE) == content
        assert not any(_edge.page_cached(path, at, PAGE) for at in range(0, SIZE, PAGE))


@pytest.mark.parametrize("sequential", [True, False])
def test_bench(engine: str, sequential: bool, path: str) -> None:
    result = _edge.bench_read(path, engine, True, 16 * PAGE, 4, 0.02, sequential)
    assert result["engine"] == engine
    assert result["bytes"] == result["requests"] * 16 * PAGE > 0
    assert result["bytes_per_second"] > 0
    assert 0 < result["mean_latency_us"] <= 1e6 * result["seconds"]


@pytest.mark.parametrize(
    "options", [{"bytes_per_request": 100}, {"bytes_per_request": 0}, {"seconds": 0}, {"depth": 0}]
)
def test_bench_arguments(options: dict[str, int], path: str) -> None:
    with pytest.raises(ArgumentError):
        _edge.bench_read(path, **options)


def test_a_replay_reads_what_it_is_given(path: str) -> None:
    pieces = [(0, PAGE), (3 * PAGE, 2 * PAGE), (PAGE, PAGE)]
    result = _edge.replay_reads(path, pieces, [2, 2, 3], 2)
    assert (result["requests"], result["bytes"]) == (3, 4 * PAGE) and result["seconds"] > 0
    many = [(PAGE * (i % 7), PAGE) for i in range(100)]
    assert _edge.replay_reads(path, many, [100], 8)["requests"] == 100


@pytest.mark.parametrize(
    ("pieces", "ends", "depth"),
    [([], [], 4), ([(0, PAGE)], [2], 4), ([(0, PAGE)] * 3, [2, 1, 3], 4), ([(0, 0)], [1], 4), ([(0, PAGE)], [1], 0),
     ([(0, 1 << 30)], [1], 4)],
)  # fmt: skip
def test_replay_arguments(pieces: list[tuple[int, int]], ends: list[int], depth: int, path: str) -> None:
    with pytest.raises(ArgumentError, match="read replay"):
        _edge.replay_reads(path, pieces, ends, depth)


def test_a_replay_past_the_end_is_a_disk_error(path: str) -> None:
    with pytest.raises(DiskError):
        _edge.replay_reads(path, [(0, PAGE), (1 << 40, PAGE)], [2], 4)


def test_bench_of_a_file_too_small(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(PAGE))
    with pytest.raises(ArgumentError, match="at least"):
        _edge.bench_read(str(tmp_path / "small"), bytes_per_request=2 * PAGE)


def test_engines_are_listed() -> None:
    engines = {engine["name"]: engine for engine in _edge.io_engines()}
    assert list(engines) == ["io_uring", "pread"]
    assert engines["pread"] == {"name": "pread", "available": True, "reason": ""}
    assert engines["io_uring"]["available"] == (engines["io_uring"]["reason"] == "")


WITHOUT_URING = """
    import ctypes, errno, struct, sys

    # A seccomp filter as containers use it: io_uring_setup (425) answers {errno_name}, all else is allowed.
    def instruction(code, jt, jf, k):
        return struct.pack("HBBI", code, jt, jf, k)
    code = b"".join([
        instruction(0x20, 0, 0, 0),                          # load the call's number
        instruction(0x15, 0, 1, 425),                        # is it io_uring_setup?
        instruction(0x06, 0, 0, 0x00050000 | errno.{errno_name}),
        instruction(0x06, 0, 0, 0x7FFF0000),
    ])
    buffer = ctypes.create_string_buffer(code)
    class Program(ctypes.Structure):
        _fields_ = [("n", ctypes.c_ushort), ("code", ctypes.c_void_p)]
    libc = ctypes.CDLL(None, use_errno=True)
    program = Program(len(code) // 8, ctypes.addressof(buffer))
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
        print("no seccomp")
        sys.exit(77)

    import _edge
    from flashload.errors import UnsupportedModelError
    uring = _edge.io_engines()[0]
    assert not uring["available"]
    assert {reason!r} in uring["reason"], uring
    path = sys.argv[1]
    assert len(_edge.read_file(path, "auto", bytes=8192)) == 8192
    assert _edge.bench_read(path, "auto", seconds=0.001)["engine"] == "pread"
    try:
        _edge.read_file(path, "io_uring")
    except UnsupportedModelError as error:
        assert {reason!r} in str(error)
    else:
        raise AssertionError("io_uring was used though the kernel refuses it")
"""


@pytest.mark.parametrize(("errno_name", "reason"), [("EPERM", "refused here"), ("ENOSYS", "no io_uring")])
def test_where_io_uring_is_refused(errno_name: str, reason: str, path: str) -> None:
    script = (
        textwrap.dedent(WITHOUT_URING).replace("{errno_name}", errno_name).replace("{reason!r}", repr(reason))
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script, path], env=environment, capture_output=True, text=True
    )
    if done.returncode == 77:
        pytest.skip("seccomp filters are not available here")
    assert done.returncode == 0, done.stderr


def test_asking_for_an_engine_that_is_not_there(path: str) -> None:
    if URING["available"]:
        assert _edge.bench_read(path, "io_uring", seconds=0.001)["engine"] == "io_uring"
    else:
        with pytest.raises(UnsupportedModelError):
            _edge.read_file(path, "io_uring")
