"""The pack's directory: everything a file can say is either proven or refused with a typed error."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import _edge
import pytest

from flashload.errors import CorruptError, EdgeError, ModelFileError, UnsupportedModelError
from flashload.format import PackFile, PackWriter
from quant.formats import WeightFormat
from tests.pack_maker import BYTES, F32_VECTOR, PAGE, Q4_0, Entry, Pack, seal_header, small_pack, xxh3

ENTRY_AT, ENTRY_BYTES = 16, 128


@pytest.fixture(scope="module")
def pack() -> Pack:
    return small_pack()


def tiny_pack() -> Pack:
    return Pack([Entry("a", Q4_0, 3, 32, data=bytes(288)), Entry("b", F32_VECTOR, 1, 3, data=bytes(12))])


def bend(pack: Pack, at: int, format: str, value: object) -> bytes:
    """The directory with one field overwritten."""
    directory = bytearray(pack.directory)
    struct.pack_into(format, directory, at, value)
    return bytes(directory)


def field_at(entry: int, offset: int) -> int:
    return ENTRY_AT + entry * ENTRY_BYTES + offset


def test_reads_every_field(pack: Pack, tmp_path: Path) -> None:
    directory = _edge.PackDirectory.open(str(pack.write(tmp_path / "a.edge")))
    found = directory.entries()
    assert len(found) == len(pack.entries)
    for have, want, offset in zip(found, pack.entries, pack.offsets, strict=True):
        for key in ("name", "format", "rows", "cols", "layer", "expert", "chunk_bytes"):
            assert have[key] == getattr(want, key), key
        assert (have["offset"], have["bytes"], have["stored_bytes"]) == (
            offset,
            len(want.data),
            len(want.padded),
        )
    assert directory.find("head.weight") == len(found) - 1
    assert directory.find("head") == -1
    assert directory.memory_bytes() > 100 * len(found)


def test_reads_a_blob(pack: Pack, tmp_path: Path) -> None:
    path = str(pack.write(tmp_path / "a.edge"))
    directory = _edge.PackDirectory.open(path)
    for entry in pack.entries:
        assert directory.read(path, entry.name) == entry.data
    with pytest.raises(ModelFileError, match="no entry nothing"):
        directory.read(path, "nothing")


def test_empty_pack(tmp_path: Path) -> None:
    assert _edge.PackDirectory.open(str(Pack([]).write(tmp_path / "a.edge"))).entries() == []


def flips_refused(path: Path, image: bytes, bits: range) -> None:
    with open(path, "r+b", buffering=0) as file:
        for bit in bits:
            at = bit // 8
            os.pwrite(file.fileno(), bytes([image[at] ^ 1 << bit % 8]), at)
            try:
                with pytest.raises(ModelFileError):
                    _edge.PackDirectory.open(str(path))
            finally:
                os.pwrite(file.fileno(), image[at : at + 1], at)
    _edge.PackDirectory.open(str(path))


def test_every_bit_of_the_header_counts() -> None:
    pack = tiny_pack()
    header, size = pack.header(), len(pack.image())
    assert _edge.PackDirectory.check_header(header, size)[:2] == (pack.directory_offset, PAGE)
    for bit in range(8 * PAGE):
        damaged = bytearray(header)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ModelFileError):
            _edge.PackDirectory.check_header(bytes(damaged), size)


def test_flips_in_the_file(tmp_path: Path) -> None:
    pack = tiny_pack()
    path, image = pack.write(tmp_path / "a.edge"), pack.image()
    flips_refused(path, image, range(0, 8 * PAGE, 509))
    flips_refused(path, image, range(8 * pack.directory_offset, 8 * len(image), 127))


@pytest.mark.slow
def test_every_flip_in_the_file(tmp_path: Path) -> None:
    pack = tiny_pack()
    path, image = pack.write(tmp_path / "a.edge"), pack.image()
    flips_refused(path, image, range(8 * PAGE))
    flips_refused(path, image, range(8 * pack.directory_offset, 8 * len(image)))


def test_every_bit_of_the_directory_without_its_hash(pack: Pack) -> None:
    """Behind the hash the parser alone stands: a flip is refused or parsed within bounds."""
    size = pack.directory_offset
    refused = 0
    for bit in range(8 * (ENTRY_AT + len(pack.entries) * ENTRY_BYTES)):
        directory = bytearray(pack.directory)
        directory[bit // 8] ^= 1 << bit % 8
        try:
            for entry in _edge.PackDirectory.parse(bytes(directory), size).entries():
                assert entry["offset"] >= PAGE and entry["offset"] + entry["stored_bytes"] <= size
        except ModelFileError:
            refused += 1
    assert refused > 8 * 60 * len(pack.entries)


def test_every_truncation(tmp_path: Path) -> None:
    pack = tiny_pack()
    header, size = pack.header(), len(pack.image())
    for shorter in range(size):
        with pytest.raises(ModelFileError):
            _edge.PackDirectory.check_header(header[:shorter], shorter)
    path = pack.write(tmp_path / "a.edge")
    for shorter in [*range(size - 1, 0, -97), 0]:
        os.truncate(path, shorter)
        with pytest.raises(ModelFileError):
            _edge.PackDirectory.open(str(path))
    for shorter in range(0, len(pack.directory)):
        with pytest.raises(ModelFileError):
            _edge.PackDirectory.parse(pack.directory[:shorter], pack.directory_offset)


def test_a_longer_file_is_refused(pack: Pack, tmp_path: Path) -> None:
    path = tmp_path / "a.edge"
    path.write_bytes(pack.image() + bytes(PAGE))
    with pytest.raises(ModelFileError, match="expected a file of"):
        _edge.PackDirectory.open(str(path))


@pytest.mark.parametrize("make", ["missing", "folder", "pipe", "text"])
def test_what_is_not_a_pack(make: str, tmp_path: Path) -> None:
    path = tmp_path / make
    if make == "folder":
        path.mkdir()
    elif make == "pipe":
        os.mkfifo(path)
    elif make == "text":
        path.write_text("GGUF" * 5000)
    with pytest.raises(ModelFileError, match=str(path)):
        _edge.PackDirectory.open(str(path))


@pytest.mark.parametrize(
    ("at", "format", "value", "error"),
    [
        (0, "8s", b"EDGEPACC", ModelFileError),
        (8, "I", 2, UnsupportedModelError),
        (12, "I", 8192, ModelFileError),
        (16, "Q", 1 << 63, ModelFileError),
        (24, "Q", 4097, ModelFileError),
        (24, "Q", (1 << 64) - PAGE, ModelFileError),
        (32, "Q", 0, ModelFileError),
        (32, "Q", (64 << 20) + PAGE, ModelFileError),
        (32, "Q", (1 << 64) - PAGE, ModelFileError),
        (40, "Q", 1, CorruptError),
        (48, "B", 1, ModelFileError),
        (4087, "B", 1, ModelFileError),
    ],
)
def test_a_sealed_header_that_lies(
    at: int, format: str, value: object, error: type[EdgeError], pack: Pack, tmp_path: Path
) -> None:
    header = bytearray(pack.header())
    struct.pack_into("<" + format, header, at, value)
    path = tmp_path / "a.edge"
    path.write_bytes(seal_header(bytes(header[: PAGE - 8])) + pack.data + pack.directory)
    with pytest.raises(error) as caught:
        _edge.PackDirectory.open(str(path))
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


LIES = [
    (0, "I", 100_001, "out of range"),
    (0, "I", 3, "padding"),
    (0, "I", 2000, "expected"),
    (4, "I", 1, "out of range"),
    (8, "Q", 1 << 61, "out of range"),
    (8, "Q", (1 << 64) - 1, "out of range"),
    (field_at(0, 0), "64s", b"", "name"),
    (field_at(0, 0), "64s", b"a/b", "name"),
    (field_at(0, 0), "64s", b"a\0b", "name"),
    (field_at(0, 0), "64s", "n\u00e4me".encode(), "name"),
    (field_at(1, 0), "64s", b"metadata.json", "twice"),
    (field_at(1, 68), "i", -2, "layer"),
    (field_at(1, 68), "i", 65_536, "layer"),
    (field_at(1, 108), "i", -2, "expert"),
    (field_at(1, 72), "Q", 0, "shape"),
    (field_at(1, 72), "Q", 101 + 16, "bytes for its format"),
    (field_at(1, 72), "Q", 1 << 31, "shape"),
    (field_at(1, 80), "Q", 0, "shape"),
    (field_at(1, 80), "Q", 1 << 63, "shape"),
    (field_at(1, 80), "Q", 255, "multiple of 32"),
    (field_at(2, 72), "Q", 2, "1 row"),
    (field_at(0, 80), "Q", 5001, "bytes for its format"),
    (field_at(0, 80), "Q", (1 << 64) - 1, "shape"),
    (field_at(1, 88), "Q", 0, "at offset"),
    (field_at(1, 88), "Q", PAGE, "at offset"),
    (field_at(1, 88), "Q", 4 * PAGE, "at offset"),
    (field_at(1, 88), "Q", (1 << 64) - PAGE, "at offset"),
    (field_at(1, 96), "Q", (1 << 64) - 1, "bytes for its format"),
    (field_at(1, 104), "I", 0, "power of two"),
    (field_at(1, 104), "I", 2048, "power of two"),
    (field_at(1, 104), "I", 12288, "power of two"),
    (field_at(1, 104), "I", 32 << 20, "power of two"),
    (field_at(1, 112), "Q", 0, "first chunk"),
    (field_at(1, 112), "Q", (1 << 64) - 1, "first chunk"),
    (field_at(1, 120), "Q", 1, "reserved"),
    (PAGE - 1, "B", 1, ""),
]


@pytest.mark.parametrize(("at", "format", "value", "message"), LIES)
def test_a_directory_that_lies(at: int, format: str, value: object, message: str, pack: Pack) -> None:
    if at == PAGE - 1:
        at = len(pack.directory) - 1  # the padding
        message = "padding"
    with pytest.raises(ModelFileError, match=message) as caught:
        _edge.PackDirectory.parse(bend(pack, at, "<" + format, value), pack.directory_offset)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", [13, 19, 99, 102, 1 << 31, (1 << 32) - 1])
def test_an_unknown_format(format: int, pack: Pack) -> None:
    with pytest.raises(UnsupportedModelError, match=f"embed.weight: unknown weight format {format}"):
        _edge.PackDirectory.parse(bend(pack, field_at(1, 64), "<I", format), pack.directory_offset)


def test_data_that_ends_early_or_late(pack: Pack) -> None:
    for offset in (pack.directory_offset - PAGE, pack.directory_offset + PAGE, PAGE):
        with pytest.raises(ModelFileError):
            _edge.PackDirectory.parse(pack.directory, offset)


def test_the_largest_shape() -> None:
    """2^31-1 rows of 2^31-1 f32 columns come within a hair of 2^64 bytes."""
    pack = Pack([Entry("a", 0, 16, 1, data=bytes(64))])
    directory = bytearray(pack.directory)
    struct.pack_into("<QQ", directory, field_at(0, 72), (1 << 31) - 1, (1 << 31) - 1)
    with pytest.raises(ModelFileError, match="18446744065119617024 bytes for its format"):
        _edge.PackDirectory.parse(bytes(directory), pack.directory_offset)


def test_reads_what_the_packer_writes(tmp_path: Path) -> None:
    with PackWriter(tmp_path / "a.edge") as writer:
        for entry in small_pack().entries:
            shape = (entry.rows, entry.cols, [entry.data], entry.layer, entry.expert)
            writer.add(entry.name, WeightFormat(entry.format), *shape)
    directory = _edge.PackDirectory.open(str(tmp_path / "a.edge"))
    with PackFile(tmp_path / "a.edge") as file:
        for found, want in zip(directory.entries(), file.entries.values(), strict=True):
            for key in ("name", "rows", "cols", "layer", "expert", "offset", "bytes", "chunk_bytes"):
                assert found[key] == getattr(want, key)
            assert directory.read(str(file.path), want.name) == file.read(want.name)


def test_the_python_reader_agrees(pack: Pack, tmp_path: Path) -> None:
    """The maker of these packs and the library's own reader follow one definition."""
    with PackFile(pack.write(tmp_path / "a.edge")) as file:
        file.verify()
        assert file.read("head.weight") == pack.entries[-1].data


def test_names_of_full_length_and_blobs_of_any_size(tmp_path: Path) -> None:
    entries = [Entry("n" * 64, BYTES, 1, size, data=bytes(size)) for size in (1,)]
    entries += [Entry(f"b{size}", BYTES, 1, size, data=bytes(size)) for size in (4095, 4096, 4097)]
    found = _edge.PackDirectory.open(str(Pack(entries).write(tmp_path / "a.edge"))).entries()
    assert [entry["name"] for entry in found] == [entry.name for entry in entries]


def test_xxh3_equals_the_reference() -> None:
    data = bytes(range(256)) * 17 + os.urandom(1 << 20)
    sizes = [*range(129, 1400), 4087, 4088, 4096, 65535, 65536, 65537, 1 << 20, (1 << 20) - 1]
    for size in sizes:
        assert _edge.xxh3(data[:size]) == xxh3(data[:size]), size
        assert _edge.xxh3(data[7 : 7 + size]) == xxh3(data[7 : 7 + size]), size  # unaligned
