"""GGUF files: read as gguf-py reads them, and refused in one typed line when anything is wrong with them."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from flashload import read_gguf
from flashload.checkpoint import Checkpoint, open_checkpoint
from flashload.errors import ArgumentError, EdgeError, ModelFileError, UnsupportedModelError
from flashload.ggml import BLOCK_TYPES
from tests.random_blocks import random_blocks
from tests.tiny import GGUF_ARCHITECTURES, tiny_gguf, tiny_llama_gguf

U32, F32_T, BOOL, TEXT, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def tensor(name: str | bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file by hand; the defaults are valid and hold nothing."""
    keys, tensors = keys or [], tensors or []
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def opened(path: Path, data: bytes) -> Checkpoint:
    path.write_bytes(data)
    return open_checkpoint(path)


def u32(name: str, value: int) -> bytes:
    return key(name, U32, struct.pack("<I", value))


ONE = [tensor("a", [8, 4])]
DATA = bytes(8 * 4 * 4)
BIG = 1 << 60

HOSTILE: dict[str, tuple[bytes, type[EdgeError], str]] = {
    "empty": (b"", ModelFileError, "magic"),
    "three bytes": (b"GGU", ModelFileError, "magic"),
    "other magic": (build(magic=b"GGML"), ModelFileError, "magic: expected b'GGUF'"),
    "zip": (b"PK\3\4" + bytes(60), ModelFileError, "magic"),
    "version 1": (build(version=1), UnsupportedModelError, "version: expected 2 or 3, found 1"),
    "version 4": (build(version=4), UnsupportedModelError, "version"),
    "big endian": (build(version=3 << 24), UnsupportedModelError, "big-endian"),
    "no counts": (build()[:12], ModelFileError, "tensor count"),
    "too many tensors": (build(counts=(BIG, 0)), ModelFileError, "tensor count: expected at most"),
    "too many keys": (build(counts=(0, BIG)), ModelFileError, "key count: expected at most"),
    "more keys than bytes": (build(counts=(0, 10000)), ModelFileError, "key 0"),
    "more tensors than bytes": (build(counts=(10000, 0)), ModelFileError, "tensor 0"),
    "key name of 2**60": (
        build([struct.pack("<Q", BIG) + bytes(40)], counts=(0, 1)),
        ModelFileError,
        "length of key 0",
    ),
    "key name not UTF-8": (build([key(b"\xff\xfe", U32, bytes(4))]), ModelFileError, "UTF-8"),
    "key without a name": (build([u32("", 1)]), ModelFileError, "key 0: expected printable text"),
    "key of two lines": (build([u32("a\nb", 1)]), ModelFileError, "key 0: expected printable text"),
    "tensor of two lines": (
        build(tensors=[tensor("a\nb", [8])], data=DATA),
        ModelFileError,
        "name of tensor 0",
    ),
    "key twice": (build([u32("a", 1), u32("a", 2)]), ModelFileError, "a: expected every key once"),
    "value type 13": (build([key("a", 13, bytes(8))]), ModelFileError, "a: expected a value type"),
    "value type 2**31": (build([key("a", 1 << 31, bytes(8))]), ModelFileError, "a: expected a value type"),
    "text of 2**60": (build([key("a", TEXT, struct.pack("<Q", BIG))]), ModelFileError, "length of a"),
    "text past the end": (build([key("a", TEXT, struct.pack("<Q", 1 << 20))]), ModelFileError, "a: expected"),
    "vocabulary not UTF-8": (
        build([key("tokenizer.x", ARRAY, struct.pack("<IQ", TEXT, 1) + text(b"\xff"))]),
        ModelFileError,
        "UTF-8",
    ),
    "array of 2**60": (
        build([key("a", ARRAY, struct.pack("<IQ", U32, BIG))]),
        ModelFileError,
        "length of a: expected at most",
    ),
    "array past the end": (
        build([key("a", ARRAY, struct.pack("<IQ", U64, 1 << 20))]),
        ModelFileError,
        "a: expected 8388608 bytes",
    ),
    "texts past the end": (
        build([key("a", ARRAY, struct.pack("<IQ", TEXT, 1 << 20))]),
        ModelFileError,
        "a: expected 1048576 texts",
    ),
    "array of arrays": (
        build([key("a", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(12))]),
        ModelFileError,
        "found type 9",
    ),
    "array of type 77": (
        build([key("a", ARRAY, struct.pack("<IQ", 77, 1))]),
        ModelFileError,
        "found type 77",
    ),
    "alignment 0": (
        build([u32("general.alignment", 0)]),
        ModelFileError,
        "alignment: expected a power of two",
    ),
    "alignment 48": (build([u32("general.alignment", 48)]), ModelFileError, "alignment"),
    "alignment 2**31": (build([u32("general.alignment", 1 << 31)]), ModelFileError, "alignment"),
    "alignment text": (build([key("general.alignment", TEXT, text("32"))]), ModelFileError, "alignment"),
    "no dimensions": (build(tensors=[tensor("a", [])]), ModelFileError, "a: expected 1 to 4 dimensions"),
    "five dimensions": (build(tensors=[tensor("a", [1] * 5)]), ModelFileError, "1 to 4 dimensions"),
    "2**32-1 dimensions": (
        build(tensors=[text("a") + struct.pack("<I", (1 << 32) - 1) + bytes(64)]),
        ModelFileError,
        "1 to 4 dimensions",
    ),
    "dimension 0": (build(tensors=[tensor("a", [8, 0])]), ModelFileError, "a: expected dimensions in 1.."),
    "dimension 2**63": (build(tensors=[tensor("a", [1 << 63, 2])]), ModelFileError, "dimensions"),
    "product beyond 2**64": (
        build(tensors=[tensor("a", [1 << 40, 1 << 40])]),
        ModelFileError,
        "a: expected a size below 2\\*\\*62",
    ),
    "product that wraps to 0": (
        build(tensors=[tensor("a", [1 << 32, 1 << 32, 1 << 32])]),
        ModelFileError,
        "size below",
    ),
    "unknown block type": (
        build(tensors=[tensor("a", [32], 99)]),
        UnsupportedModelError,
        "a: expected a known",
    ),
    "removed block type": (build(tensors=[tensor("a", [32], 4)]), UnsupportedModelError, "found 4"),
    "half a block": (
        build(tensors=[tensor("a", [48], 8)], data=bytes(99)),
        ModelFileError,
        "whole Q8_0 blocks",
    ),
    "offset not aligned": (
        build(tensors=[tensor("a", [8, 4], 0, 4)], data=DATA + bytes(99)),
        ModelFileError,
        "a: expected an offset aligned to 32, found 4",
    ),
    "offset past the end": (
        build(tensors=[tensor("a", [8, 4], 0, BIG)], data=DATA),
        ModelFileError,
        "cut short",
    ),
    "offset 2**64-32": (
        build(tensors=[tensor("a", [8, 4], 0, (1 << 64) - 32)], data=DATA),
        ModelFileError,
        "cut short",
    ),
    "data cut short": (build(tensors=ONE, data=DATA[:-1]), ModelFileError, "cut short"),
    "tensor twice": (
        build(tensors=[tensor("a", [8, 4]), tensor("a", [8, 4], 0, 128)], data=DATA * 2),
        ModelFileError,
        "a: expected every tensor once",
    ),
    "tensors overlap": (
        build(tensors=[tensor("a", [8, 4]), tensor("b", [8, 4], 0, 96)], data=DATA * 2),
        ModelFileError,
        "b: expected an offset of",
    ),
    "tensors in one place": (
        build(tensors=[tensor("a", [8, 4]), tensor("b", [8])], data=DATA),
        ModelFileError,
        "offset",
    ),
    "tensor name of 2**60": (
        build(tensors=[struct.pack("<Q", BIG) + bytes(64)]),
        ModelFileError,
        "length of name of tensor 0",
    ),
    "tensor name not UTF-8": (build(tensors=[tensor(b"\x80", [8])], data=DATA), ModelFileError, "UTF-8"),
    "part of a split file": (
        build([u32("split.count", 3)]),
        ModelFileError,
        "split.count: expected 1, found 3",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    data, error, message = HOSTILE[name]
    with pytest.raises(error, match=message) as raised:
        opened(tmp_path / "m.gguf", data)
    assert "\n" not in str(raised.value)
    assert "m.gguf" in str(raised.value)


def test_the_valid_base_of_the_hostile_files_opens(tmp_path: Path) -> None:
    with opened(tmp_path / "m.gguf", build([u32("x", 7)], ONE, DATA)) as checkpoint:
        assert checkpoint.metadata == {"x": 7}
        assert checkpoint.tensors["a"].shape == (4, 8)


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    texts = key("a", ARRAY, struct.pack("<IQ", TEXT, 1 << 18))
    path = tmp_path / "m.gguf"
    path.write_bytes(build([texts], counts=(0, 1000)))
    with open(path, "r+b") as file:
        file.truncate(1 << 32)
    with pytest.raises(ModelFileError):
        open_checkpoint(path)


def test_a_header_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_llama_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(read_gguf, "_MAX_HEADER_BYTES", 4096)
    with pytest.raises(ModelFileError, match="a header may take 4096"):
        open_checkpoint(path)


def test_version_2_opens(tmp_path: Path) -> None:
    with opened(tmp_path / "m.gguf", build(tensors=ONE, data=DATA, version=2)) as checkpoint:
        assert list(checkpoint.tensors) == ["a"]


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = build([u32("x", 7), key("t", TEXT, text("some text"))], ONE, DATA)
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    for length in reversed(range(len(whole))):
        os.truncate(path, length)
        with pytest.raises(ModelFileError):
            open_checkpoint(path)


def test_every_flipped_bit_opens_or_is_refused(tmp_path: Path) -> None:
    whole = build(
        [u32("general.alignment", 32), key("t", ARRAY, struct.pack("<IQ", TEXT, 2) + text("ab") + text("c"))],
        [tensor("a", [32, 2], 8), tensor("b", [8], 0, 96)],
        bytes(128),
    )
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    with open(path, "r+b", buffering=0) as file:
        for bit in range((len(whole) - 128) * 8):
            os.pwrite(file.fileno(), bytes([whole[bit // 8] ^ (1 << (bit % 8))]), bit // 8)
            try:
                open_checkpoint(path).close()
            except ModelFileError as error:
                assert "\n" not in str(error)
            os.pwrite(file.fileno(), whole[bit // 8 : bit // 8 + 1], bit // 8)


@pytest.mark.parametrize("kind", [t for t in BLOCK_TYPES.values() if t.is_weight], ids=lambda t: t.name)
def test_block_types_have_gguf_sizes_and_names(kind: Any) -> None:
    theirs = gguf.GGMLQuantizationType(kind.id)
    assert theirs.name == kind.name
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.block_values, kind.block_bytes)


def test_every_type_gguf_decodes_is_known() -> None:
    decodable = {kind.value for kind in gguf.quants._type_traits} | {0, 1}
    assert decodable == {kind.id for kind in BLOCK_TYPES.values() if kind.is_weight}


@pytest.mark.parametrize("kind", [t.name for t in BLOCK_TYPES.values() if t.is_weight])
def test_rows_are_those_written(kind: str, tmp_path: Path) -> None:
    theirs = gguf.GGMLQuantizationType[kind]
    data = random_blocks(theirs, (7, 512), np.random.default_rng(0))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("a", data, raw_dtype=theirs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        info = checkpoint.tensors["a"]
        assert (info.type_name, info.shape, info.rows, info.cols) == (kind, (7, 512), 7, 512)
        assert checkpoint.read_rows("a", 0, 7) == data.tobytes()
        assert checkpoint.read_rows("a", 2, 3) == data[2:5].tobytes()


@pytest.mark.parametrize("family", GGUF_ARCHITECTURES)
def test_header_equals_that_of_gguf_reader(family: str, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", family)
    theirs = gguf.GGUFReader(path)
    with open_checkpoint(path) as checkpoint:
        fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
        assert checkpoint.metadata == fields
        assert list(checkpoint.tensors) == [t.name for t in theirs.tensors]
        for t in theirs.tensors:
            info = checkpoint.tensors[t.name]
            assert info.shape == tuple(int(n) for n in reversed(t.shape))
            assert (info.offset, info.bytes, info.ggml_type) == (t.data_offset, t.n_bytes, t.tensor_type)


def test_values_of_every_kind(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint64("u64", (1 << 64) - 1)
    writer.add_int64("i64", -(1 << 63))
    writer.add_float64("f64", 1e300)
    writer.add_bool("yes", True)
    writer.add_string("text", "näme\n")
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("floats", [0.5, -0.25])
    writer.add_array("flags", [True, False])
    writer.add_array("texts", ["a", "", "ü"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        found = {k: v for k, v in checkpoint.metadata.items() if k != "general.architecture"}
    assert found == {
        "u8": 255,
        "i8": -128,
        "u16": 65535,
        "i16": -32768,
        "u64": (1 << 64) - 1,
        "i64": -(1 << 63),
        "f64": 1e300,
        "yes": True,
        "text": "näme\n",
        "numbers": [1, -2, 3],
        "floats": [0.5, -0.25],
        "flags": [True, False],
        "texts": ["a", "", "ü"],
    }


def test_texts_across_and_beyond_the_window(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = ["ä" * int(n) for n in rng.integers(0, 300, 20_000)]
    texts[7_000] = "x" * (3 << 20)
    payload = struct.pack("<IQ", TEXT, len(texts)) + b"".join(map(text, texts))
    with opened(tmp_path / "m.gguf", build([key("a", ARRAY, payload), u32("b", 5)])) as checkpoint:
        assert checkpoint.metadata == {"a": texts, "b": 5}


def split(path: Path, count: int = 3) -> list[Path]:
    """A model in ``count`` parts, one tensor each, as gguf-split numbers them."""
    paths = [path / f"m-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    for i, part in enumerate(paths):
        keys = [
            key("split.no", 2, struct.pack("<H", i)),
            key("split.count", 2, struct.pack("<H", count)),
            key("split.tensors.count", 5, struct.pack("<i", count)),
        ]
        if i == 0:
            keys.append(u32("first", 1))
        part.write_bytes(build(keys, [tensor(f"t{i}", [8, 4])], bytes([i]) * 128))
    return paths


@pytest.mark.parametrize("named", [0, 1, 2])
def test_any_part_opens_all(named: int, tmp_path: Path) -> None:
    paths = split(tmp_path)
    with open_checkpoint(paths[named]) as checkpoint:
        assert list(checkpoint.tensors) == ["t0", "t1", "t2"]
        assert checkpoint.metadata["first"] == 1
        assert checkpoint.files == paths
        assert checkpoint.read_rows("t2", 1, 1) == bytes([2]) * 32


def lose(paths: list[Path]) -> None:
    paths[1].unlink()


def repeat(paths: list[Path]) -> None:
    paths[2].write_bytes(paths[1].read_bytes())


def cut(paths: list[Path]) -> None:
    paths[2].write_bytes(paths[2].read_bytes()[:-1])


def recount(paths: list[Path]) -> None:
    paths[1].write_bytes(paths[1].read_bytes().replace(b"\x03\x00", b"\x04\x00", 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose, "1 missing: m-00002"),
        (repeat, "split.no: expected 2, found 1"),
        (cut, "cut short"),
        (recount, "split"),
    ],
)
def test_damaged_splits(damage: Callable[[list[Path]], None], message: str, tmp_path: Path) -> None:
    paths = split(tmp_path)
    damage(paths)
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(paths[0])


def test_wrong_total_of_a_split(tmp_path: Path) -> None:
    paths = split(tmp_path)
    for part in paths:
        data = part.read_bytes().replace(struct.pack("<Ii", 5, 3), struct.pack("<Ii", 5, 9))
        part.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"split.tensors.count: expected 9 tensors, found 3"):
        open_checkpoint(paths[0])


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 5), (4, 1), (0, -1)])
def test_rows_outside_a_tensor(first: int, count: int, tmp_path: Path) -> None:
    with (
        opened(tmp_path / "m.gguf", build(tensors=ONE, data=DATA)) as checkpoint,
        pytest.raises(ArgumentError, match="a: expected rows"),
    ):
        checkpoint.read_rows("a", first, count)


def test_rows_of_no_tensor(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "m.gguf", build(tensors=ONE, data=DATA)) as checkpoint,
        pytest.raises(ArgumentError, match="no such tensor"),
    ):
        checkpoint.read_rows("b", 0, 1)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "m.gguf", build(tensors=[tensor("a", [8, 4], 26)], data=DATA)) as checkpoint,
        pytest.raises(UnsupportedModelError, match="found type I32"),
    ):
        checkpoint.read_rows("a", 0, 1)


def test_a_file_that_shrinks_while_open(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with opened(path, build(tensors=ONE, data=DATA)) as checkpoint:
        os.truncate(path, path.stat().st_size - 64)
        with pytest.raises(EdgeError, match="shrank"):
            checkpoint.read_rows("a", 0, 4)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        open_checkpoint(tmp_path / "none.gguf")


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(ModelFileError, match="regular file"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickles_are_refused_with_a_way_out(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"pytorch_model{suffix}"
    path.write_bytes(b"\x80\x02.")
    with pytest.raises(UnsupportedModelError, match="save_pretrained"):
        open_checkpoint(path)


def test_files_do_not_stay_open(tmp_path: Path) -> None:
    path = tiny_llama_gguf(tmp_path / "m.gguf")
    damaged = tmp_path / "d.gguf"
    damaged.write_bytes(path.read_bytes()[:-1])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        open_checkpoint(path).close()
        with pytest.raises(ModelFileError):
            open_checkpoint(damaged)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(200))
def test_random_damage(seed: int, tmp_path: Path) -> None:
    whole = tiny_llama_gguf(tmp_path / "m.gguf").read_bytes()
    rng = np.random.default_rng(seed)
    damaged = bytearray(whole)
    for at in rng.integers(0, 9000, 20):
        damaged[at] = rng.integers(0, 256)
    try:
        opened(tmp_path / "d.gguf", bytes(damaged)).close()
    except ModelFileError as error:
        assert "\n" not in str(error)
