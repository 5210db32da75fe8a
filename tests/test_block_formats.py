"""Decoding of checkpoint block types against the gguf package, bit for bit."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import _edge
import numpy as np
import numpy.typing as npt
import pytest

from flashload.errors import ArgumentError, UnsupportedModelError

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")

TYPES = [
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
]  # fmt: skip
N_BLOCKS = 67

# Where a block keeps its f16 scales: (type, byte offsets). The other types have none or hide it (IQ1_M).
SCALES = {
    "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "TQ1_0": [52], "TQ2_0": [64],
    "IQ1_S": [0], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0], "IQ3_XXS": [0], "IQ3_S": [0],
}  # fmt: skip
SPECIAL_HALVES = {
    "zero": 0x0000, "minus zero": 0x8000, "smallest": 0x0001, "largest subnormal": 0x83FF, "largest": 0x7BFF,
    "infinite": 0x7C00, "minus infinite": 0xFC00, "NaN": 0x7E00, "signalling NaN": 0xFD01,
}  # fmt: skip


def ggml_type(name: str) -> int:
    return int(gguf.GGMLQuantizationType[name])


def reference(name: str, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    with np.errstate(all="ignore"):
        values: Any = quants.dequantize(data, gguf.GGMLQuantizationType[name])
    return np.ascontiguousarray(values, dtype=np.float32).reshape(-1)


def assert_same_bits(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
    """Equal bit patterns; any NaN equals any NaN."""
    assert found.dtype == np.float32 and found.shape == expected.shape
    differ = (found.view(np.uint32) != expected.view(np.uint32)) & ~(np.isnan(found) & np.isnan(expected))
    at = np.flatnonzero(differ)
    assert at.size == 0, (
        f"{at.size} differ, first at {at[0]}: expected {expected[at[0]]!r}, found {found[at[0]]!r}"
    )


def check(name: str, data: npt.NDArray[np.uint8]) -> None:
    _, block_values, block_bytes = _edge.block_type(ggml_type(name))
    n_values = data.size // block_bytes * block_values
    assert_same_bits(_edge.decode_blocks(ggml_type(name), data, n_values), reference(name, data))


def random_bytes(name: str, seed: int, n_blocks: int = N_BLOCKS) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, n_blocks * _edge.block_type(ggml_type(name))[2], dtype=np.uint8)


@pytest.mark.parametrize("name", TYPES)
def test_sizes_are_those_of_gguf(name: str) -> None:
    values, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert _edge.block_type(ggml_type(name)) == (name, values, n_bytes)


def test_every_type_gguf_decodes_is_known() -> None:
    decodable = {int(t) for t in quants._type_traits} | {0, 1}
    assert decodable == {ggml_type(name) for name in TYPES}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TYPES)
def test_random_bytes(name: str, seed: int) -> None:
    check(name, random_bytes(name, seed))


@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x80, 0x7F, 0x55, 0xAA, 0x0F, 0xF0])
@pytest.mark.parametrize("name", TYPES)
def test_one_byte_repeated(name: str, byte: int) -> None:
    check(name, np.full(3 * _edge.block_type(ggml_type(name))[2], byte, dtype=np.uint8))


@pytest.mark.parametrize("special", SPECIAL_HALVES)
@pytest.mark.parametrize("name", SCALES)
def test_special_scales(name: str, special: str) -> None:
    block_bytes = _edge.block_type(ggml_type(name))[2]
    blocks = random_bytes(name, 11, 8).reshape(8, block_bytes)
    half = np.frombuffer(np.uint16(SPECIAL_HALVES[special]).tobytes(), dtype=np.uint8)
    for offset in SCALES[name]:
        blocks[:, offset : offset + 2] = half
    check(name, blocks.reshape(-1))


@pytest.mark.parametrize("special", SPECIAL_HALVES)
def test_special_scales_spread_over_nibbles(special: str) -> None:
    """IQ1_M keeps its f16 scale in the top nibbles of four words."""
    words = random_bytes("IQ1_M", 12, 8).view(np.uint16).reshape(8, 28)
    for i in range(4):
        nibble = (SPECIAL_HALVES[special] >> (4 * i)) & 15
        words[:, 24 + i] = (words[:, 24 + i] & 0x0FFF) | (nibble << 12)
    check("IQ1_M", words.view(np.uint8).reshape(-1))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_16_bit_float(name: str) -> None:
    check(name, np.arange(65536, dtype=np.uint16).view(np.uint8))


@pytest.mark.parametrize(("name", "scale_bytes"), [("MXFP4", 1), ("NVFP4", 4)])
def test_every_8_bit_scale(name: str, scale_bytes: int) -> None:
    block_bytes = _edge.block_type(ggml_type(name))[2]
    blocks = random_bytes(name, 13, 256).reshape(256, block_bytes)
    blocks[:, :scale_bytes] = np.arange(256, dtype=np.uint8)[:, None]
    check(name, blocks.reshape(-1))


@pytest.mark.parametrize("name", TYPES)
def test_empty(name: str) -> None:
    assert _edge.decode_blocks(ggml_type(name), b"", 0).shape == (0,)


def test_any_contiguous_buffer_at_any_alignment() -> None:
    data = random_bytes("Q4_K", 14, 4)
    expected = reference("Q4_K", data)
    padded = bytearray(b"x" + data.tobytes())
    for buffer in (data.tobytes(), bytearray(data), memoryview(padded)[1:], data.reshape(4, 144)):
        assert_same_bits(_edge.decode_blocks(12, buffer, 1024), expected)


@pytest.mark.parametrize("n_values", [0, 255, 257, 512, -256, 2**63 - 1, 2**63, 2**70, -(2**70)])
def test_wrong_value_count(n_values: int) -> None:
    with pytest.raises(ArgumentError):
        _edge.decode_blocks(12, bytes(144), n_values)


@pytest.mark.parametrize("n_bytes", [0, 1, 143, 145, 288])
def test_wrong_byte_count_names_both(n_bytes: int) -> None:
    with pytest.raises(ArgumentError, match=rf"expected 256.*{n_bytes} bytes"):
        _edge.decode_blocks(12, bytes(n_bytes), 256)


def test_wrong_kinds_of_argument() -> None:
    with pytest.raises(ArgumentError, match="integer"):
        _edge.decode_blocks(12, bytes(144), 256.0)
    with pytest.raises(ArgumentError, match="buffer"):
        _edge.decode_blocks(12, "text", 256)
    with pytest.raises(ArgumentError, match="buffer"):
        _edge.decode_blocks(0, np.zeros((4, 4), dtype=np.float32)[:, 1], 4)


@pytest.mark.parametrize("number", [4, 5, 9, 15, 24, 31, 36, 41, 42, 99, -1, 2**40])
def test_unknown_type_lists_the_known(number: int) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"expected one of 0 F32.*40 NVFP4, found {number}$"):
        _edge.block_type(number)
    with pytest.raises(UnsupportedModelError):
        _edge.decode_blocks(number, b"", 0)


def test_grid_of_a_wrong_size_or_type_is_refused() -> None:
    with pytest.raises(ArgumentError, match="expected 2048 values, found 7"):
        _edge.set_grid(ggml_type("IQ2_XXS"), bytes(7))
    with pytest.raises(ArgumentError, match="no grid"):
        _edge.set_grid(ggml_type("Q4_0"), bytes(7))


def test_grid_is_set_once() -> None:
    check("IQ3_S", random_bytes("IQ3_S", 15, 2))
    grid = np.asarray(quants.IQ3_S.grid, dtype=np.int8)
    _edge.set_grid(ggml_type("IQ3_S"), np.ascontiguousarray(grid))
    with pytest.raises(ArgumentError, match="set before"):
        _edge.set_grid(ggml_type("IQ3_S"), np.ascontiguousarray(grid[..., ::-1]))
    check("IQ3_S", random_bytes("IQ3_S", 16, 2))


def test_iq_type_without_gguf_names_the_extra() -> None:
    script = (
        "import sys; sys.modules['gguf'] = None\n"
        "import _edge\n"
        "from flashload.errors import UnsupportedModelError\n"
        "for kind, size in ((16, 66), (29, 56)):\n"
        "    try: _edge.decode_blocks(kind, bytes(size), 256)\n"
        "    except UnsupportedModelError as error: print(error)\n"
        "print(_edge.decode_blocks(2, bytes(18), 32).size)\n"
    )
    lines = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["IQ2_XXS", "IQ1_M"]
    assert all("pip install 'edge[gguf]'" in line for line in lines[:2])
    assert lines[2] == "32"


def test_first_decode_from_many_threads() -> None:
    """The grid is fetched once, whoever comes first; run in a fresh process so that it is not set yet."""
    script = (
        "import threading, numpy as np, _edge\n"
        "data = np.random.default_rng(3).integers(0, 256, 8 * 82, dtype=np.uint8)\n"
        "found = []\n"
        "def work(): found.append(_edge.decode_blocks(22, data, 2048).tobytes())\n"
        "threads = [threading.Thread(target=work) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print(len(found), len(set(found)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["8", "1"]


def test_decoding_in_threads_gives_the_same_bits() -> None:
    data = random_bytes("Q6_K", 17, 64)
    expected = reference("Q6_K", data)
    found: list[npt.NDArray[np.float32]] = []
    threads = [
        threading.Thread(target=lambda: found.append(_edge.decode_blocks(14, data, 64 * 256)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for values in found:
        assert_same_bits(values, expected)


@pytest.mark.nightly
@pytest.mark.parametrize("name", TYPES)
def test_many_random_bytes(name: str) -> None:
    for seed in range(20):
        check(name, random_bytes(name, 1000 + seed, 4096))
