"""Neuron records: the oracle against its definition, and the directory rules of their entries."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from flashload import pack_layout as layout
from flashload.errors import ArgumentError, CorruptError, ModelFileError
from flashload.format import PackFile, PackWriter
from quant.formats import WeightFormat, decode, encode
from quant.formats.neuron import (
    NEURON_FORMATS,
    decode_column,
    decode_dot,
    encode_column,
    encode_dot,
    row_bytes,
)

_edge = pytest.importorskip("_edge")

F16, Q8, Q4 = WeightFormat.NEURON_F16, WeightFormat.NEURON_Q8, WeightFormat.NEURON_Q4
TILES = {F16: WeightFormat.F16, Q8: WeightFormat.Q8_0, Q4: WeightFormat.Q4_0}
ALL = sorted(NEURON_FORMATS)


def values(rows: int, hidden: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, hidden)).astype(np.float32)
    x[0, : hidden // 2] = 0  # zero blocks
    x[-1] *= np.float32(1e-6)  # f16 subnormal scales
    return x


def f32(half: bytes) -> float:
    return float(np.frombuffer(half, "<f2")[0])


def value_of(weight_format: WeightFormat, row: bytes, k: int, column: bool) -> float:
    """One value by the letter of the layout."""
    group = row[k // 256 * NEURON_FORMATS[weight_format].group_bytes :]
    lane, s, b = k % 256 // 32, k % 32 // 4, k % 4
    if weight_format is F16:
        at = k % 256 if column else k % 32 * 8 + lane
        return f32(group[2 * at : 2 * at + 2])
    d = np.float32(f32(group[2 * lane : 2 * lane + 2]))
    quants = group[16:]
    if weight_format is Q8 and column:
        return float(d * np.float32(struct.unpack_from("b", quants, k % 256)[0]))
    if weight_format is Q8:
        return float(d * np.float32(quants[s * 32 + lane * 4 + b] - 128))
    if column:
        byte, high = quants[lane * 16 + k % 16], k % 32 >= 16
    else:
        byte, high = quants[s % 4 * 32 + lane * 4 + b], s >= 4
    return float(d * np.float32((byte >> 4 if high else byte & 15) - 8))


@pytest.mark.parametrize("hidden", [32, 96, 256, 300, 512, 1000])
@pytest.mark.parametrize("weight_format", ALL)
def test_rows_read_back_by_the_letter_of_the_layout(weight_format: WeightFormat, hidden: int) -> None:
    x = values(3, hidden, hidden)
    for column, pack, unpack in ((False, encode_dot, decode_dot), (True, encode_column, decode_column)):
        data = pack(weight_format, x)
        assert data.shape == (3, row_bytes(weight_format, hidden))
        found = unpack(weight_format, data, hidden)
        for row in range(3):
            expected = [value_of(weight_format, data[row].tobytes(), k, column) for k in range(hidden)]
            assert found[row].tolist() == expected


@pytest.mark.parametrize("weight_format", ALL)
def test_rounding_is_that_of_the_tile_format(weight_format: WeightFormat) -> None:
    x = values(5, 320, 3)
    tile = TILES[weight_format]
    expected = decode(tile, encode(tile, x), 5, 320)
    assert np.array_equal(decode_dot(weight_format, encode_dot(weight_format, x), 320), expected)
    assert np.array_equal(decode_column(weight_format, encode_column(weight_format, x), 320), expected)


@pytest.mark.parametrize("weight_format", ALL)
def test_the_padding_of_a_row_is_worth_nothing(weight_format: WeightFormat) -> None:
    x = values(4, 100, 5)
    for pack, unpack in ((encode_dot, decode_dot), (encode_column, decode_column)):
        assert not unpack(weight_format, pack(weight_format, x), 256)[:, 100:].any()


def write(path: Path, weight_format: WeightFormat, rows: int, hidden: int, parts: int) -> bytes:
    data = np.random.default_rng(rows).bytes(rows * parts * row_bytes(weight_format, hidden))
    with PackWriter(path) as writer:
        writer.add("metadata.json", WeightFormat.BYTES, 1, 2, [b"{}"])
        halves = [data[: len(data) // 3], data[len(data) // 3 :]]
        writer.add("layers.0.neurons.records", weight_format, rows, hidden, halves, 0, -1, parts)
        writer.add("tail", WeightFormat.BYTES, 1, 5, [b"tail!"])
    return data


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("weight_format", ALL)
def test_entries_are_read_back_by_both_readers(
    tmp_path: Path, weight_format: WeightFormat, parts: int
) -> None:
    path = tmp_path / "m.edge"
    data = write(path, weight_format, 37, 300, parts)
    with PackFile(path) as pack:
        entry = pack.entries["layers.0.neurons.records"]
        assert entry.chunk_bytes == parts * row_bytes(weight_format, 300)
        assert (entry.rows, entry.cols, entry.neuron_parts, entry.n_chunks) == (37, 300, parts, 37)
        assert entry.hashed_bytes == len(data)
        assert pack.read(entry.name) == data
        assert pack.entries["tail"].neuron_parts == 0
        pack.verify()
    found = {e["name"]: e for e in _edge.PackDirectory.open(str(path)).entries()}
    assert found[entry.name]["format"] == int(weight_format)
    assert found[entry.name]["chunk_bytes"] == entry.chunk_bytes


def test_a_damaged_record_is_named_and_the_padding_belongs_to_none(tmp_path: Path) -> None:
    path = tmp_path / "m.edge"
    data = write(path, Q4, 50, 256, 3)
    with PackFile(path) as pack:
        entry = pack.entries["layers.0.neurons.records"]
    image = bytearray(path.read_bytes())
    image[entry.offset + len(data)] ^= 1
    path.write_bytes(image)
    with PackFile(path) as pack:
        pack.verify()
        assert pack.read(entry.name) == data
    image[entry.offset + 7 * entry.chunk_bytes + 5] ^= 1
    path.write_bytes(image)
    with PackFile(path) as pack, pytest.raises(CorruptError, match=r"records chunk 7 "):
        pack.verify()


def reseal(path: Path, **fields: int) -> None:
    """Changes fields of the records' directory entry and hashes directory and header anew."""
    image = bytearray(path.read_bytes())
    _, _, _, _, at, n_bytes, _ = layout.HEADER.unpack_from(image)
    directory = bytearray(image[at : at + n_bytes])
    record = np.frombuffer(directory, layout.ENTRY, 1, layout.DIRECTORY.size + layout.ENTRY.itemsize)
    for key, value in fields.items():
        record[key] = value
    path.write_bytes(layout.header_bytes(len(image), at, bytes(directory)) + image[4096:at] + directory)


# hidden 256 in q4: a row is 144 bytes, a record of three 432; 40 records.
BENT = [
    ({"chunk_bytes": 0}, "records"),
    ({"chunk_bytes": 4096}, "records"),
    ({"chunk_bytes": 433}, "records"),
    ({"chunk_bytes": 4 * 144}, "records"),
    ({"chunk_bytes": 2 * 144}, "bytes"),
    ({"rows": 41}, "bytes"),
    ({"cols": 257}, "records"),
    ({"format": int(Q8)}, "records"),
    ({"format": 23}, "format"),
    ({"bytes": 40 * 432 - 1}, "bytes"),
    ({"cols": (1 << 31) - 1}, "records"),
]


@pytest.mark.parametrize(("fields", "message"), BENT)
def test_entries_whose_numbers_disagree_are_refused(
    tmp_path: Path, fields: dict[str, int], message: str
) -> None:
    path = tmp_path / "m.edge"
    write(path, Q4, 40, 256, 3)
    reseal(path)
    PackFile(path).close()
    _edge.PackDirectory.open(str(path))
    reseal(path, **fields)
    with pytest.raises(ModelFileError, match=message):
        PackFile(path)
    with pytest.raises(ModelFileError, match=message):
        _edge.PackDirectory.open(str(path))


@pytest.mark.parametrize(("hidden", "parts"), [(256, 0), (256, 4), (1 << 25, 3)])
def test_the_writer_refuses_records_no_reader_takes(tmp_path: Path, hidden: int, parts: int) -> None:
    with pytest.raises(ArgumentError, match="records"), PackWriter(tmp_path / "m.edge") as writer:
        writer.add("n", Q8, 1, hidden, [b""], 0, -1, parts)
