"""Hugging Face folders: safetensors read as its own library does, and refused when anything is wrong."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from flashload.checkpoint import Checkpoint, open_checkpoint
from flashload.errors import EdgeError, ModelFileError, UnsupportedModelError
from tests.tiny import FAMILIES, hf_config, hf_tensors, tiny_hf, write_safetensors


def entry(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def build(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body) if length is None else length) + body + data


def opened(folder: Path, data: bytes) -> Checkpoint:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(data)
    return open_checkpoint(folder)


GOOD = {"a": entry("F32", [2, 4], 0, 32)}
DATA = bytes(32)
BIG = 1 << 60

HOSTILE: dict[str, tuple[bytes, type[EdgeError], str]] = {
    "empty": (b"", ModelFileError, "at least 8 bytes"),
    "seven bytes": (bytes(7), ModelFileError, "at least 8 bytes"),
    "header of 2**63": (build(GOOD, DATA, 1 << 63), ModelFileError, "header length: expected at most"),
    "header past the end": (build(GOOD, DATA, 1000), ModelFileError, "header length: expected at most"),
    "no JSON": (build(b"not json", DATA), ModelFileError, "expected JSON"),
    "not UTF-8": (build(b'{"\xff": 1}', DATA), ModelFileError, "expected JSON"),
    "a list": (build(b"[]", DATA), ModelFileError, "expected a JSON object, found list"),
    "nested without end": (build(b'{"a":' + b"[" * 100_000), ModelFileError, "expected JSON"),
    "an integer of 10,000 digits": (build(b'{"a": ' + b"9" * 10_000 + b"}"), ModelFileError, "JSON|dtype"),
    "key twice": (
        build(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "shape": [2]}}', bytes(4)),
        ModelFileError,
        "'shape' twice",
    ),
    "tensor twice": (build(b'{"a": 1, "a": 2}'), ModelFileError, "'a' twice"),
    "entry no object": (build({"a": 5}), ModelFileError, "a: expected dtype, shape and data_offsets"),
    "entry without shape": (
        build({"a": {"dtype": "F32", "data_offsets": [0, 4]}}),
        ModelFileError,
        "dtype, shape",
    ),
    "entry with more": (build({"a": {**GOOD["a"], "x": 1}}, DATA), ModelFileError, "dtype, shape"),
    "dtype unknown": (
        build({"a": entry("F13", [8], 0, 32)}, DATA),
        UnsupportedModelError,
        "dtype: expected one of",
    ),
    "dtype no text": (build({"a": entry(7, [8], 0, 32)}, DATA), UnsupportedModelError, "dtype"),  # type: ignore[arg-type]
    "shape negative": (build({"a": entry("F32", [-2, -4], 0, 32)}, DATA), ModelFileError, "shape: expected"),
    "shape of floats": (build({"a": entry("F32", [8.0], 0, 32)}, DATA), ModelFileError, "shape: expected"),
    "shape of booleans": (
        build({"a": entry("F32", [True, 8], 0, 32)}, DATA),
        ModelFileError,
        "shape: expected",
    ),
    "shape of 2**60": (build({"a": entry("F32", [BIG], 0, 32)}, DATA), ModelFileError, "shape: expected"),
    "shape that overflows": (
        build({"a": entry("F32", [1 << 40, 1 << 40], 0, 32)}, DATA),
        ModelFileError,
        "size below",
    ),
    "shape of nine": (build({"a": entry("F32", [1] * 9, 0, 4)}, bytes(4)), ModelFileError, "up to 8 sizes"),
    "shape no list": (build({"a": entry("F32", "8", 0, 32)}, DATA), ModelFileError, "shape"),  # type: ignore[arg-type]
    "zero dimension with bytes": (
        build({"a": entry("F32", [0, 4], 0, 32)}, DATA),
        ModelFileError,
        "expected 0 bytes",
    ),
    "offsets swapped": (
        build({"a": entry("F32", [8], 32, 0)}, DATA),
        ModelFileError,
        "data_offsets: expected 32",
    ),
    "offsets negative": (
        build({"a": entry("F32", [8], -32, 0)}, DATA),
        ModelFileError,
        "expected .begin, end.",
    ),
    "offsets of another size": (
        build({"a": entry("F32", [8], 0, 16)}, DATA),
        ModelFileError,
        "expected 32 bytes",
    ),
    "offsets past the end": (build({"a": entry("F32", [8], 32, 64)}, DATA), ModelFileError, "cut short"),
    "offsets of 2**60": (
        build({"a": entry("F32", [8], BIG, BIG + 32)}, DATA),
        ModelFileError,
        "data_offsets",
    ),
    "three offsets": (
        build({"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 16, 32]}}, DATA),
        ModelFileError,
        "data_offsets",
    ),
    "data cut short": (build(GOOD, DATA[:-1]), ModelFileError, "cut short"),
    "data nobody owns": (build(GOOD, DATA + b"x"), ModelFileError, "expected 32 bytes of data, found 33"),
    "a hole": (
        build({"a": entry("F32", [4], 0, 16), "b": entry("F32", [2], 24, 32)}, DATA),
        ModelFileError,
        "expected 24 bytes of data, found 32",
    ),
    "overlap": (
        build({"a": entry("F32", [6], 0, 24), "b": entry("F32", [4], 16, 32)}, DATA),
        ModelFileError,
        "b: expected an offset of",
    ),
    "entry of two lines": (build({"a": "x\ny"}), ModelFileError, "dtype, shape"),
    "name of two lines": (build({"a\nb": entry("F32", [8], 0, 32)}, DATA), ModelFileError, "printable"),
    "name empty": (build({"": entry("F32", [8], 0, 32)}, DATA), ModelFileError, "printable"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    data, error, message = HOSTILE[name]
    with pytest.raises(error, match=message) as raised:
        opened(tmp_path, data)
    assert "\n" not in str(raised.value)
    assert "model.safetensors" in str(raised.value)


def test_the_valid_base_of_the_hostile_files_opens(tmp_path: Path) -> None:
    with opened(tmp_path, build(GOOD, DATA)) as checkpoint:
        assert checkpoint.tensors["a"].shape == (2, 4)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = build(GOOD, DATA)
    opened(tmp_path, whole).close()
    for length in reversed(range(len(whole))):
        os.truncate(tmp_path / "model.safetensors", length)
        with pytest.raises(ModelFileError):
            open_checkpoint(tmp_path)


def test_every_flipped_bit_opens_or_is_refused(tmp_path: Path) -> None:
    whole = build({"a": entry("F32", [2, 2], 0, 16), "b": entry("F16", [8], 16, 32)}, DATA)
    opened(tmp_path, whole).close()
    with open(tmp_path / "model.safetensors", "r+b", buffering=0) as file:
        for bit in range((len(whole) - 32) * 8):
            os.pwrite(file.fileno(), bytes([whole[bit // 8] ^ (1 << (bit % 8))]), bit // 8)
            try:
                open_checkpoint(tmp_path).close()
            except ModelFileError as error:
                assert "\n" not in str(error)
            os.pwrite(file.fileno(), whole[bit // 8 : bit // 8 + 1], bit // 8)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_those_safetensors_wrote(dtype: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {"a": rng.normal(size=(5, 7)).astype(dtype), "b": rng.normal(size=(3,)).astype(dtype)}
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read_rows("a", 0, 5) == tensors["a"].tobytes()
        assert checkpoint.read_rows("a", 3, 1) == tensors["a"][3].tobytes()
        assert checkpoint.read_rows("b", 0, 1) == tensors["b"].tobytes()


def test_buffers_beside_weights_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"ids": np.arange(4), "flags": np.array([True, False])}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["ids"].type_name == "I64"
        with pytest.raises(UnsupportedModelError, match="found type BOOL"):
            checkpoint.read_rows("flags", 0, 1)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    header = {"s": entry("F32", [], 0, 4), "e": entry("F32", [0, 4], 4, 4)}
    with opened(tmp_path, build(header, bytes(4))) as checkpoint:
        assert checkpoint.tensors["s"].shape == (1,)
        assert checkpoint.tensors["e"].bytes == 0
        assert checkpoint.read_rows("e", 0, 0) == b""


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_of_every_family_open(family: str, tmp_path: Path) -> None:
    tiny_hf(tmp_path, family)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.kind == "hf"
        assert checkpoint.metadata["config"]["model_type"] == family
        assert checkpoint.metadata["generation_config"]["temperature"] == 0.7
        assert set(checkpoint.tensors) == set(hf_tensors(hf_config(family)))


def sharded(folder: Path) -> dict[str, str]:
    """A Llama in three files; returns the weight map."""
    tiny_hf(folder)
    (folder / "model.safetensors").unlink()
    tensors = hf_tensors(hf_config("llama"))
    places: dict[str, str] = {}
    for i in range(3):
        shard = f"model-{i + 1:05}-of-00003.safetensors"
        part = dict(list(tensors.items())[i::3])
        write_safetensors(folder / shard, part)
        places |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def test_shards_open_as_one(tmp_path: Path) -> None:
    places = sharded(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert {name: info.file.name for name, info in checkpoint.tensors.items()} == places
        assert len(checkpoint.files) == 3


def drop_shard(folder: Path, places: dict[str, str]) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def promise_more(folder: Path, places: dict[str, str]) -> None:
    places["ghost.weight"] = "model-00001-of-00003.safetensors"


def swap_places(folder: Path, places: dict[str, str]) -> None:
    places["lm_head.weight"], places["model.norm.weight"] = (
        places["model.norm.weight"],
        places["lm_head.weight"],
    )


def duplicate(folder: Path, places: dict[str, str]) -> None:
    one = folder / "model-00001-of-00003.safetensors"
    (folder / "model-00002-of-00003.safetensors").write_bytes(one.read_bytes())


def climb(folder: Path, places: dict[str, str]) -> None:
    places["lm_head.weight"] = "../outside.safetensors"


def absolute(folder: Path, places: dict[str, str]) -> None:
    places["lm_head.weight"] = "/etc/passwd"


def number(folder: Path, places: dict[str, Any]) -> None:
    places["lm_head.weight"] = 7


def nothing(folder: Path, places: dict[str, str]) -> None:
    places.clear()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shard, "expected model-00002-of-00003.safetensors beside it"),
        (promise_more, "ghost.weight: expected it in model-00001-of-00003.safetensors, found it in none"),
        (swap_places, "expected it in"),
        (duplicate, "expected every tensor once, found it in two files"),
        (climb, "expected a file name in this folder"),
        (absolute, "expected a file name in this folder"),
        (number, "expected a file name in this folder"),
        (nothing, "weight_map: expected an object"),
    ],
)
def test_damaged_indexes(damage: Callable[[Path, Any], None], message: str, tmp_path: Path) -> None:
    places = sharded(tmp_path)
    damage(tmp_path, places)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(tmp_path)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"config.json, found none"):
        open_checkpoint(tmp_path)


def test_a_folder_of_gguf_files_says_which(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFileError, match=r"name one of its GGUF files instead: model-q4.gguf"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelFileError, match="found no weights"):
        open_checkpoint(tmp_path)


def test_a_folder_with_other_safetensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"found adapter_model.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"]
)
def test_folders_of_pickles_are_refused_with_a_way_out(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x02.")
    with pytest.raises(UnsupportedModelError, match="save_pretrained"):
        open_checkpoint(tmp_path)


def test_weights_without_their_folder(tmp_path: Path) -> None:
    tiny_hf(tmp_path)
    with pytest.raises(UnsupportedModelError, match="expected the folder"):
        open_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_quantised_folders_are_refused_by_name(method: str, tmp_path: Path) -> None:
    tiny_hf(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UnsupportedModelError, match=f"found '{method}'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "nul", '{"a": 1, "a": 2}', "[" * 100_000])
def test_damaged_configs(text: str, tmp_path: Path) -> None:
    tiny_hf(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_a_config_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    tiny_hf(tmp_path)
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 32)
    with pytest.raises(ModelFileError, match="expected at most 33554432 bytes"):
        open_checkpoint(tmp_path)
