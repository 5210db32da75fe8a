"""The pack file: what is written is read back, and no damaged byte passes for a whole one."""

from __future__ import annotations

import importlib
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashload import pack_layout as layout
from flashload.errors import (
    ArgumentError,
    CorruptError,
    DiskError,
    EdgeError,
    ModelFileError,
    UnsupportedModelError,
)
from flashload.format import PackFile, PackWriter, is_pack
from quant.formats import WeightFormat, tile_bytes


def core_directory() -> Any:
    """The compiled core's reader of the same layout, or None where it is not built."""
    try:
        return getattr(importlib.import_module("_edge"), "PackDirectory", None)
    except ImportError:
        return None


CORE = core_directory()

BYTES, VECTOR, F32, Q8_0 = WeightFormat.BYTES, WeightFormat.F32_VECTOR, WeightFormat.F32, WeightFormat.Q8_0


def content(n_bytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, n_bytes, dtype=np.uint8).tobytes()


ENTRIES: list[tuple[str, WeightFormat, int, int, int, int]] = [
    ("metadata.json", BYTES, 1, 7, -1, -1),
    ("embed.weight", F32, 33, 500, -1, -1),
    ("layers.0.attn_norm.weight", VECTOR, 1, 1024, 0, -1),
    ("layers.0.experts.1.gate.weight", Q8_0, 20, 64, 0, 1),
    ("layers.0.up.weight", F32, 160, 600, 0, -1),
]


def payload(index: int) -> bytes:
    _, code, rows, cols, _, _ = ENTRIES[index]
    return content(layout.payload_bytes(code, rows, cols), index)


def write(path: Path, piece_bytes: int = 1000) -> Path:
    with PackWriter(path) as writer:
        for index, (name, code, rows, cols, layer, expert) in enumerate(ENTRIES):
            data = payload(index)
            parts = [data[i : i + piece_bytes] for i in range(0, len(data), piece_bytes)]
            writer.add(name, code, rows, cols, parts, layer, expert)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("pack") / "m.edge").read_bytes()


@pytest.mark.parametrize("piece_bytes", [1, 4096, 65536, 1 << 20])
def test_what_is_written_is_read(piece_bytes: int, tmp_path: Path) -> None:
    if piece_bytes == 1:
        piece_bytes = 997
    with PackFile(write(tmp_path / "m.edge", piece_bytes)) as file:
        assert list(file.entries) == [entry[0] for entry in ENTRIES]
        for index, (name, code, rows, cols, layer, expert) in enumerate(ENTRIES):
            entry = file.entries[name]
            assert (entry.format, entry.rows, entry.cols) == (code, rows, cols)
            assert (entry.layer, entry.expert) == (layer, expert)
            assert file.read(name) == payload(index)


@pytest.mark.skipif(CORE is None, reason="needs the compiled core")
def test_the_core_reads_what_is_written(tmp_path: Path) -> None:
    path = str(write(tmp_path / "m.edge"))
    directory = CORE.open(path)
    for index, entry in enumerate(ENTRIES):
        assert directory.read(path, entry[0]) == payload(index)


def test_bytes_do_not_depend_on_the_pieces(tmp_path: Path) -> None:
    assert write(tmp_path / "a.edge", 333).read_bytes() == write(tmp_path / "b.edge", 100_000).read_bytes()


def test_layout_of_the_file(whole: bytes) -> None:
    magic, version, header_bytes, file_bytes, at, n_bytes, digest = layout.HEADER.unpack_from(whole)
    assert (magic, version, header_bytes, file_bytes) == (b"EDGEPACK", 1, 4096, len(whole))
    assert at % 4096 == n_bytes % 4096 == 0
    assert at + n_bytes == len(whole)
    assert digest == layout.xxh3(whole[at:])
    assert struct.unpack_from("<Q", whole, 4088)[0] == layout.xxh3(whole[:4088])
    assert not any(whole[48:4088])
    n_entries, zero, n_chunks = struct.unpack_from("<IIQ", whole, at)
    assert (n_entries, zero) == (len(ENTRIES), 0)
    assert layout.ENTRY.itemsize == 128
    end, chunk = 4096, 0
    hashes = struct.unpack_from(f"<{n_chunks}Q", whole, at + 16 + 128 * n_entries)
    for index in range(n_entries):
        record = struct.unpack_from("<64sIiQQQQIiQQ", whole, at + 16 + 128 * index)
        name, code, _, rows, cols, offset, size, chunk_bytes, _, first, last = record
        assert name.rstrip(b"\0").decode() == ENTRIES[index][0]
        assert (code, rows, cols) == ENTRIES[index][1:4]
        assert (offset, first, last) == (end, chunk, 0)
        stored = -(-size // 4096) * 4096
        assert whole[offset : offset + size] == payload(index)
        assert not any(whole[offset + size : offset + stored])
        for begin in range(0, stored, chunk_bytes):
            assert hashes[chunk] == layout.xxh3(
                whole[offset + begin : offset + min(begin + chunk_bytes, stored)]
            )
            chunk += 1
        end += stored
    assert (end, chunk) == (at, n_chunks)


@pytest.mark.parametrize(
    ("name", "n_bytes", "expected"),
    [
        ("embed.weight", 1 << 30, 65536),
        ("head.weight", 1 << 30, 262144),
        ("x", 1, 4096),
        ("x", 4096, 4096),
        ("x", 4097, 8192),
        ("x", 3 * 4096, 16384),
        ("x", 262144, 262144),
        ("embed.weight", 5000, 8192),
    ],
)
def test_chunk_sizes(name: str, n_bytes: int, expected: int) -> None:
    assert layout.chunk_bytes_for(name, n_bytes) == expected


def test_tile_entries_have_the_size_of_their_tiles() -> None:
    assert layout.payload_bytes(Q8_0, 20, 64) == tile_bytes(Q8_0, 20, 64) == 2 * 2 * 544


# Damage.


def opened(path: Path, data: bytes) -> PackFile:
    """Opens a pack; where the core is built, it must agree on whether the file is one."""
    path.write_bytes(data)
    try:
        file = PackFile(path)
    except ModelFileError as error:
        if CORE is not None:
            with pytest.raises(type(error)):
                CORE.open(str(path))
        raise
    if CORE is not None:
        CORE.open(str(path))
    return file


def test_no_truncation_opens(whole: bytes, tmp_path: Path) -> None:
    for length in [*range(0, 64), *range(64, len(whole), 1531), len(whole) - 1]:
        with pytest.raises(ModelFileError):
            opened(tmp_path / "m.edge", whole[:length])


def test_more_bytes_than_the_header_says(whole: bytes, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="file size"):
        opened(tmp_path / "m.edge", whole + bytes(4096))


def test_no_flipped_bit_of_header_or_directory_opens(whole: bytes, tmp_path: Path) -> None:
    at = layout.HEADER.unpack_from(whole)[4]
    path = tmp_path / "m.edge"
    path.write_bytes(whole)
    with open(path, "r+b", buffering=0) as file:
        for place in [*range(64), *range(64, 4096, 61), *range(4088, 4096), *range(at, len(whole), 7)]:
            file.seek(place)
            file.write(bytes([whole[place] ^ (1 << (place % 8))]))
            with pytest.raises(ModelFileError):
                PackFile(path)
            file.seek(place)
            file.write(whole[place : place + 1])
    PackFile(path).close()


@pytest.mark.parametrize("index", range(len(ENTRIES)))
@pytest.mark.parametrize("where", ["first", "middle", "last", "padding"])
def test_no_flipped_payload_bit_is_read(index: int, where: str, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.edge"
    path.write_bytes(whole)
    with PackFile(path) as file:
        entry = file.entries[ENTRIES[index][0]]
        place = {
            "first": 0,
            "middle": entry.bytes // 2,
            "last": entry.bytes - 1,
            "padding": entry.stored_bytes - 1,
        }
        at = entry.offset + place[where]
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=f"entry {entry.name} chunk.*expected xxh3"):
            file.read(entry.name)
        with pytest.raises(CorruptError, match=entry.name):
            file.verify()
        for other in file.entries:
            if other != entry.name:
                file.read(other)


def rehashed(data: bytes, directory: Callable[[bytearray], None] | None = None, **header: int) -> bytes:
    """A pack with changed fields and right hashes: what only the bounds can refuse."""
    names = ["magic", "version", "header_bytes", "file_bytes", "offset", "bytes", "digest"]
    fields = dict(zip(names, layout.HEADER.unpack_from(data), strict=True))
    at = fields["offset"]
    tail = bytearray(data[at:])
    if directory is not None:
        directory(tail)
    fields["digest"] = layout.xxh3(tail)
    fields.update(header)
    head = layout.HEADER.pack(*fields.values()).ljust(4088, b"\0")
    return head + struct.pack("<Q", layout.xxh3(head)) + data[4096:at] + bytes(tail)


@pytest.mark.parametrize(
    ("header", "error", "message"),
    [
        ({"version": 2}, UnsupportedModelError, "version: expected 1, found 2"),
        ({"version": 0}, UnsupportedModelError, "version"),
        ({"header_bytes": 8192}, ModelFileError, "header"),
        ({"file_bytes": 1 << 60}, ModelFileError, "file size"),
        ({"offset": 0}, ModelFileError, "directory"),
        ({"offset": 4097}, ModelFileError, "directory"),
        ({"offset": (1 << 64) - 4096}, ModelFileError, "directory"),
        ({"bytes": 0}, ModelFileError, "directory"),
        ({"bytes": 4095}, ModelFileError, "directory"),
        ({"bytes": 1 << 40}, ModelFileError, "directory"),
        ({"bytes": (64 << 20) + 4096}, ModelFileError, "directory"),
        ({"bytes": 8192}, ModelFileError, "directory"),
        ({"digest": 0}, CorruptError, "directory: expected xxh3"),
    ],
)
def test_headers_out_of_bounds(
    header: dict[str, int], error: type[EdgeError], message: str, whole: bytes, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        opened(tmp_path / "m.edge", rehashed(whole, **header))


def test_rehashing_alone_changes_nothing(whole: bytes, tmp_path: Path) -> None:
    assert rehashed(whole) == whole


FIELDS = {
    "format": (64, "<I"),
    "layer": (68, "<i"),
    "rows": (72, "<Q"),
    "cols": (80, "<Q"),
    "offset": (88, "<Q"),
    "bytes": (96, "<Q"),
    "chunk_bytes": (104, "<I"),
    "expert": (108, "<i"),
    "first_chunk": (112, "<Q"),
    "zero": (120, "<Q"),
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 7),
        ("format", 99),
        ("format", (1 << 32) - 1),
        ("format", 5),
        ("layer", -2),
        ("rows", 0),
        ("rows", 1000),
        ("rows", (1 << 64) - 1),
        ("cols", 0),
        ("cols", 1 << 63),
        ("offset", 0),
        ("offset", 4096),
        ("offset", 4097),
        ("offset", (1 << 64) - 4096),
        ("bytes", 0),
        ("bytes", 1),
        ("bytes", (1 << 64) - 1),
        ("chunk_bytes", 0),
        ("chunk_bytes", 2048),
        ("chunk_bytes", 5000),
        ("chunk_bytes", 32 << 20),
        ("expert", -2),
        ("first_chunk", 0),
        ("first_chunk", 1 << 40),
        ("zero", 1),
    ],
)
def test_entries_out_of_bounds(field: str, value: int, whole: bytes, tmp_path: Path) -> None:
    place, code = FIELDS[field]

    def change(directory: bytearray) -> None:
        struct.pack_into(code, directory, 16 + 128 * 3 + place, value)

    with pytest.raises(ModelFileError, match=r"entry layers\.0\.experts\.1\.gate\.weight"):
        opened(tmp_path / "m.edge", rehashed(whole, change))


@pytest.mark.parametrize(
    "name", [b"", b"a b", b"a/b", b"\xff", b"a\0b", "ü".encode(), b"a\n", b"embed.weight"], ids=repr
)
def test_names_out_of_bounds(name: bytes, whole: bytes, tmp_path: Path) -> None:
    def change(directory: bytearray) -> None:
        directory[16 + 128 * 3 : 16 + 128 * 3 + 64] = name.ljust(64, b"\0")

    with pytest.raises(ModelFileError, match="entry 3"):
        opened(tmp_path / "m.edge", rehashed(whole, change))


@pytest.mark.parametrize(
    ("at", "code", "value"),
    [
        (0, "<I", 0),
        (0, "<I", 4),
        (0, "<I", 6),
        (0, "<I", 100_001),
        (0, "<I", (1 << 32) - 1),
        (4, "<I", 1),
        (8, "<Q", 0),
        (8, "<Q", 9),
        (8, "<Q", 1 << 61),
        (8, "<Q", (1 << 64) - 1),
        (4095, "<B", 1),
    ],
)
def test_directories_out_of_bounds(at: int, code: str, value: int, whole: bytes, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError):
        opened(tmp_path / "m.edge", rehashed(whole, lambda tail: struct.pack_into(code, tail, at, value)))


def test_header_zeros_are_zero(whole: bytes, tmp_path: Path) -> None:
    head = bytearray(whole[:4088])
    head[2000] = 1
    with pytest.raises(ModelFileError, match="zero after the fields"):
        opened(tmp_path / "m.edge", bytes(head) + struct.pack("<Q", layout.xxh3(head)) + whole[4096:])


def test_a_file_that_shrinks_while_open(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.edge"
    with opened(path, whole) as file:
        os.truncate(path, 8192)
        with pytest.raises(DiskError, match="shrank"):
            file.read("layers.0.up.weight")


@pytest.mark.parametrize("data", [b"", b"GGUF", bytes(8192), b"EDGEPACK", b"EDGEPACK" + bytes(8184)])
def test_no_packs(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError):
        opened(tmp_path / "m.edge", data)


def test_is_pack(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(whole)
    (tmp_path / "b").write_bytes(b"GGUF")
    assert is_pack(tmp_path / "a")
    assert not is_pack(tmp_path / "b")
    assert not is_pack(tmp_path / "none")
    assert not is_pack(tmp_path)


def test_a_missing_pack(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        PackFile(tmp_path / "none.edge")


def test_entries_that_are_not_there(whole: bytes, tmp_path: Path) -> None:
    with (
        opened(tmp_path / "m.edge", whole) as file,
        pytest.raises(ModelFileError, match=r"one named head\.weight"),
    ):
        file.read("head.weight")


def test_metadata_that_is_no_json(whole: bytes, tmp_path: Path) -> None:
    with opened(tmp_path / "m.edge", whole) as file:
        with pytest.raises(ModelFileError, match=r"entry metadata\.json: expected JSON"):
            _ = file.metadata
        with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
            file.vocab()


@pytest.mark.parametrize("blob", [b"[]", b'"x"', b"{}", b'{"config": 7}', b"[" * 100_000, b'{"config": {}}'])
def test_metadata_that_holds_no_config(blob: bytes, tmp_path: Path) -> None:
    with PackWriter(tmp_path / "m.edge") as writer:
        writer.add("metadata.json", BYTES, 1, len(blob), [blob])
    with PackFile(tmp_path / "m.edge") as file, pytest.raises(ModelFileError):
        _ = file.config


def test_verify_tells_how_far_it_is(whole: bytes, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with opened(tmp_path / "m.edge", whole) as file:
        file.verify(lambda done, total: told.append((done, total)))
        total = sum(entry.stored_bytes for entry in file.entries.values())
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# Writing.


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ä", "x" * 65, "a\n", "a\0"])
def test_bad_names_are_not_written(name: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ArgumentError, match="expected an unused name"),
        PackWriter(tmp_path / "m.edge") as writer,
    ):
        writer.add(name, BYTES, 1, 1, [b"x"])
    assert os.listdir(tmp_path) == []


def test_names_are_written_once(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="unused"), PackWriter(tmp_path / "m.edge") as writer:
        writer.add("a", BYTES, 1, 1, [b"x"])
        writer.add("a", BYTES, 1, 1, [b"x"])


@pytest.mark.parametrize("parts", [[], [b"123"], [b"1234", b"5"], [b"12345"]])
def test_parts_must_add_up(parts: list[bytes], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="a: expected 4 bytes"), PackWriter(tmp_path / "m.edge") as writer:
        writer.add("a", BYTES, 1, 4, parts)


@pytest.mark.parametrize(
    ("code", "rows", "cols"), [(Q8_0, 16, 33), (VECTOR, 2, 4), (BYTES, 1, 0), (F32, 0, 4)]
)
def test_shapes_a_format_cannot_hold(code: WeightFormat, rows: int, cols: int, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="entry a: "), PackWriter(tmp_path / "m.edge") as writer:
        writer.add("a", code, rows, cols, [])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit, MemoryError])
def test_an_exception_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def parts() -> Any:
        yield b"12"
        raise error

    with pytest.raises(error), PackWriter(tmp_path / "m.edge") as writer:
        writer.add("a", BYTES, 1, 4, parts())
    assert os.listdir(tmp_path) == []


def test_an_exception_leaves_the_old_pack(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.edge"
    path.write_bytes(whole)
    with pytest.raises(RuntimeError), PackWriter(path) as writer:
        writer.add("a", BYTES, 1, 4, [b"1234"])
        raise RuntimeError
    assert path.read_bytes() == whole
    assert os.listdir(tmp_path) == ["m.edge"]


def test_nothing_appears_before_the_end(tmp_path: Path) -> None:
    with PackWriter(tmp_path / "m.edge") as writer:
        writer.add("a", BYTES, 1, 4, [b"1234"])
        assert not (tmp_path / "m.edge").exists()
    assert os.listdir(tmp_path) == ["m.edge"]


def test_temporaries_of_the_living_are_left_alone(tmp_path: Path) -> None:
    with PackWriter(tmp_path / "m.edge") as one:
        one.add("a", BYTES, 1, 4, [b"1234"])
        with PackWriter(tmp_path / "m.edge") as other:
            other.add("a", BYTES, 1, 4, [b"5678"])
    with PackFile(tmp_path / "m.edge") as file:
        assert file.read("a") == b"1234"


def test_temporaries_of_the_dead_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".m.edge.123-abcd.tmp").write_bytes(b"half")
    (tmp_path / ".other.edge.123-abcd.tmp").write_bytes(b"half")
    write(tmp_path / "m.edge")
    assert sorted(os.listdir(tmp_path)) == [".other.edge.123-abcd.tmp", "m.edge"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot be written"):
        PackWriter(tmp_path / "none" / "m.edge")


def test_too_little_space_is_refused_before_starting(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"needs 1152921504606846976 bytes, the drive has \d+ free"):
        PackWriter(tmp_path / "m.edge", needed_bytes=1 << 60)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("limit", [0, 4096, 50_000, 400_000])
def test_a_full_drive(limit: int, tmp_path: Path) -> None:
    """A limit on file size stands in for a full drive: write() fails half way."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(DiskError, match=r"m\.edge: no space: the pack needs \d+ bytes"):
            write(tmp_path / "m.edge")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_too_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_ENTRIES", 2)
    with pytest.raises(ArgumentError, match="at most 2 entries"), PackWriter(tmp_path / "m.edge") as writer:
        for name in "abc":
            writer.add(name, BYTES, 1, 1, [b"x"])
    assert os.listdir(tmp_path) == []


def test_files_do_not_stay_open(whole: bytes, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    write(tmp_path / "m.edge")
    PackFile(tmp_path / "m.edge").close()
    with pytest.raises(ModelFileError):
        opened(tmp_path / "d.edge", whole[:-4096])
    with pytest.raises(RuntimeError), PackWriter(tmp_path / "x.edge"):
        raise RuntimeError
    assert len(os.listdir("/proc/self/fd")) == before
