"""Packing: every value that should survive does, bit for bit; every change is reported."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from flashload import pack as packing
from flashload import pack_writer
from flashload.checkpoint import open_checkpoint
from flashload.errors import ArgumentError, DiskError, ModelFileError
from flashload.format import PackFile
from flashload.ggml import BLOCK_TYPES
from flashload.pack import PackReport, choose_format, pack
from quant import formats
from quant.formats import TILE_FORMATS, WeightFormat
from tests.tiny import (
    FAMILIES,
    GGUF_ARCHITECTURES,
    hf_config,
    hf_tensors,
    interleave_heads,
    tiny_gguf,
    tiny_hf,
    tiny_llama_gguf,
    write_safetensors,
)

ROOT = Path(__file__).resolve().parent.parent
WEIGHT_TYPES = [kind.name for kind in BLOCK_TYPES.values() if kind.is_weight]
KEPT = {
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "Q5_K", "Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL", "MXFP4",
}  # fmt: skip


def matrix(file: PackFile, name: str) -> np.ndarray:
    entry = file.entries[name]
    return formats.decode(entry.format, file.read(name), entry.rows, entry.cols)


def vector(file: PackFile, name: str) -> np.ndarray:
    assert file.entries[name].format is WeightFormat.F32_VECTOR
    return np.frombuffer(file.read(name), np.float32)


def weights_of(path: Path) -> dict[str, bytes]:
    with PackFile(path) as file:
        return {name: file.read(name) for name in file.entries if not name.endswith(".json")}


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_pack_bit_for_bit(family: str, tmp_path: Path) -> None:
    pack(tiny_hf(tmp_path / "hf", family), tmp_path / "m.edge")
    tensors = hf_tensors(hf_config(family))
    with PackFile(tmp_path / "m.edge") as file:
        found = {n: e for n, e in file.entries.items() if not n.endswith(".json")}
        assert len(found) == len(tensors)
        packed = {n: (matrix if e.format in TILE_FORMATS else vector)(file, n) for n, e in found.items()}
    by_bytes = {values.tobytes() for values in packed.values()}
    assert by_bytes == {values.tobytes() for values in tensors.values()}


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("family", GGUF_ARCHITECTURES)
def test_gguf_packs_as_the_folder_does(family: str, stacked: bool, tmp_path: Path) -> None:
    """Names, expert stacks, and the row order of q and k all come out the same."""
    pack(tiny_hf(tmp_path / "hf", family), tmp_path / "a.edge")
    pack(tiny_gguf(tmp_path / "m.gguf", family, stacked=stacked), tmp_path / "b.edge")
    one, other = weights_of(tmp_path / "a.edge"), weights_of(tmp_path / "b.edge")
    assert list(one) == list(other)
    assert [name for name in one if one[name] != other[name]] == []


def test_gguf_biases_are_put_in_order_with_their_rows(tmp_path: Path) -> None:
    pack(tiny_hf(tmp_path / "hf", attention_bias=True), tmp_path / "a.edge")
    pack(tiny_gguf(tmp_path / "m.gguf", attention_bias=True), tmp_path / "b.edge")
    assert weights_of(tmp_path / "a.edge") == weights_of(tmp_path / "b.edge")


def test_partial_rotation_moves_only_the_rotated_rows(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", extra={"llama.rope.dimension_count": 8})
    pack(path, tmp_path / "m.edge")
    with open_checkpoint(path) as checkpoint:
        source = np.frombuffer(checkpoint.read_rows("blk.0.attn_q.weight", 0, 64), np.float32).reshape(
            4, 16, 64
        )
    with PackFile(tmp_path / "m.edge") as file:
        found = matrix(file, "layers.0.q.weight").reshape(4, 16, 64)
    assert np.array_equal(found[:, 8:], source[:, 8:])
    assert np.array_equal(found[:, :8], source[:, [0, 2, 4, 6, 1, 3, 5, 7]])


def test_the_interleaving_undone_is_that_of_the_converter() -> None:
    """Pair j of a head holds dimensions j and j + d/2 of the rotate-half order."""
    rows = np.arange(32)
    assert interleave_heads(rows, 2).tolist()[:4] == [0, 8, 1, 9]
    order = packing._pair_order(16, 16)
    assert np.array_equal(interleave_heads(rows, 2)[:16][order], rows[:16])


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
def test_every_block_type_packs(kind: str, tmp_path: Path) -> None:
    path = tiny_llama_gguf(tmp_path / "m.gguf", kind)
    report = pack(path, tmp_path / "m.edge")
    name = "blk.1.ffn_down.weight"
    with open_checkpoint(path) as checkpoint, PackFile(tmp_path / "m.edge") as file:
        info = checkpoint.tensors[name]
        raw = np.frombuffer(checkpoint.read_rows(name, 0, info.rows), np.uint8).reshape(info.rows, -1)
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).reshape(info.shape)
        found = matrix(file, "layers.1.down.weight")
        assert file.metadata["conversions"] == report.conversions
        if kind in KEPT:
            assert report.conversions == []
            assert file.entries["layers.1.down.weight"].format.name == kind
        else:
            rounded = gguf.quants.quantize(expected, gguf.GGMLQuantizationType.Q8_0)
            expected = gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType.Q8_0)
            (group,) = report.conversions
            assert (group["from"], group["to"], group["weights"]) == (kind.lower(), "q8_0", 16)
            assert group["bytes_before"] < group["bytes_after"]
    assert np.isfinite(expected).all()
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_floats_stay_what_they_are(dtype: str, tmp_path: Path) -> None:
    report = pack(tiny_hf(tmp_path / "hf", dtype=dtype), tmp_path / "m.edge")
    values = hf_tensors(hf_config("llama"))["model.layers.0.mlp.gate_proj.weight"]
    if dtype == "F16":
        values = values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    with PackFile(tmp_path / "m.edge") as file:
        assert file.entries["layers.0.gate.weight"].format.name == dtype
        assert np.array_equal(matrix(file, "layers.0.gate.weight"), values)
        assert vector(file, "final_norm.weight").size == 64
    assert report.conversions == []


@pytest.mark.parametrize(("weights", "inner"), [("q8", WeightFormat.Q8_0), ("q4", WeightFormat.Q4_0)])
def test_lowering_the_bits(weights: str, inner: WeightFormat, tmp_path: Path) -> None:
    report = pack(tiny_hf(tmp_path / "hf", "qwen2"), tmp_path / "m.edge", weights)
    tensors = hf_tensors(hf_config("qwen2"))
    with PackFile(tmp_path / "m.edge") as file:
        assert {file.entries[n].format for n in ("embed.weight", "head.weight")} == {WeightFormat.Q8_0}
        assert file.entries["layers.0.q.weight"].format is inner
        assert np.array_equal(
            vector(file, "layers.0.q.bias"), tensors["model.layers.0.self_attn.q_proj.bias"]
        )
        raw = formats.encode(inner, tensors["model.layers.1.mlp.up_proj.weight"])
        assert file.read("layers.1.up.weight") == raw
        assert file.metadata["weights"] == weights
    assert {(g["from"], g["to"]) for g in report.conversions} == {
        ("f32", "q8_0"),
        ("f32", inner.name.lower()),
    }
    assert sum(g["weights"] for g in report.conversions) == 16


@pytest.mark.parametrize("weights", ["keep", "q8", "q4"])
def test_routers_and_positions_stay_float(weights: str, tmp_path: Path) -> None:
    pack(tiny_hf(tmp_path / "moe", "olmoe", dtype="BF16"), tmp_path / "a.edge", weights)
    pack(tiny_hf(tmp_path / "opt", "opt", dtype="F16"), tmp_path / "b.edge", weights)
    with PackFile(tmp_path / "a.edge") as moe, PackFile(tmp_path / "b.edge") as opt:
        assert moe.entries["layers.0.router.weight"].format is WeightFormat.F32
        assert opt.entries["embed.position"].format is WeightFormat.F16


Q4_0, Q5_0, Q8_0, Q4_K, Q6_K = 2, 6, 8, 12, 14


@pytest.mark.parametrize(
    ("name", "source", "cols", "weights", "expected"),
    [
        ("layers.0.q.weight", 0, 64, "keep", "F32"),
        ("layers.0.q.weight", 30, 33, "keep", "BF16"),
        ("layers.0.q.weight", Q4_K, 256, "keep", "Q4_K"),
        ("layers.0.q.weight", Q5_0, 256, "keep", "Q8_0"),
        ("layers.0.q.weight", 13, 256, "keep", "Q5_K"),
        ("layers.0.q.weight", 13, 256, "q4", "Q4_0"),
        ("layers.0.q.weight", 10, 256, "q8", "Q2_K"),
        ("layers.0.q.weight", 10, 256, "q4", "Q2_K"),
        ("layers.0.q.weight", Q5_0, 256, "q8", "Q8_0"),
        ("layers.0.q.weight", Q4_0, 64, "q8", "Q4_0"),
        ("layers.0.q.weight", Q6_K, 256, "q8", "Q6_K"),
        ("layers.0.q.weight", Q6_K, 256, "q4", "Q4_0"),
        ("layers.0.q.weight", Q4_K, 256, "q4", "Q4_K"),
        ("layers.0.q.weight", Q8_0, 64, "q4", "Q4_0"),
        ("head.weight", Q6_K, 256, "q4", "Q6_K"),
        ("embed.weight", 1, 64, "q4", "Q8_0"),
        ("embed.weight", Q4_0, 64, "q4", "Q4_0"),
        ("layers.0.q.weight", 0, 33, "q8", "F16"),
        ("layers.0.q.weight", 30, 33, "q4", "BF16"),
        ("layers.0.router.weight", 1, 64, "q4", "F16"),
        ("layers.0.router.weight", 30, 64, "keep", "F32"),
        ("layers.0.router.weight", Q8_0, 64, "keep", "F32"),
        ("embed.position", 0, 64, "q8", "F32"),
    ],
)
def test_the_format_of_a_matrix(name: str, source: int, cols: int, weights: str, expected: str) -> None:
    assert choose_format(name, source, cols, weights).name == expected


def test_widths_that_fill_no_block_become_f16(tmp_path: Path) -> None:
    report = pack(tiny_hf(tmp_path / "hf", intermediate_size=90), tmp_path / "m.edge", "q8")
    with PackFile(tmp_path / "m.edge") as file:
        assert file.entries["layers.0.down.weight"].format is WeightFormat.F16
        assert file.entries["layers.0.up.weight"].format is WeightFormat.Q8_0
    assert {g["to"] for g in report.conversions} == {"q8_0", "f16"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize(("weights", "columns"), [("q8", 96), ("q4", 96), ("q8", 90)])
def test_values_that_cannot_be_rounded(value: float, weights: str, columns: int, tmp_path: Path) -> None:
    """One value would silence a block, or all that follows; f32 kept as it is may hold it."""
    tiny_hf(tmp_path / "hf", intermediate_size=columns)
    tensors = hf_tensors(hf_config("llama", intermediate_size=columns))
    tensors["model.layers.1.mlp.down_proj.weight"][17, 40] = value
    write_safetensors(tmp_path / "hf" / "model.safetensors", tensors)
    with pytest.raises(ModelFileError, match=r"layers.1.mlp.down_proj.weight: expected finite values"):
        pack(tmp_path / "hf", tmp_path / "m.edge", weights)
    assert os.listdir(tmp_path) == ["hf"]
    pack(tmp_path / "hf", tmp_path / "m.edge")


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    pack(tiny_hf(tmp_path / "hf", tie_word_embeddings=True), tmp_path / "m.edge")
    with PackFile(tmp_path / "m.edge") as file:
        assert file.config.tied_head
        assert "head.weight" not in file.entries


def test_experts_lie_together_in_record_order(tmp_path: Path) -> None:
    pack(tiny_gguf(tmp_path / "m.gguf", "olmoe"), tmp_path / "m.edge")
    with PackFile(tmp_path / "m.edge") as file:
        entries = [e for e in file.entries.values() if e.layer == 1 and e.expert >= 0]
    assert [(e.expert, e.name.split(".")[4]) for e in entries] == [
        (e, part) for e in range(4) for part in ("gate", "up", "down")
    ]
    for one, other in itertools.pairwise(entries):
        assert other.offset == one.offset + one.stored_bytes


def test_metadata_says_where_it_comes_from(tmp_path: Path) -> None:
    report = pack(tiny_hf(tmp_path / "some-model"), tmp_path / "m.edge")
    with PackFile(tmp_path / "m.edge") as file:
        assert file.config == report.config
        assert file.metadata["source"] == {
            "kind": "hf",
            "name": "some-model",
            "files": ["model.safetensors"],
            "ignored": [],
        }
        assert file.metadata["generation"] == {"eos_token_id": 2, "temperature": 0.7}
        assert str(tmp_path) not in json.dumps(file.metadata)


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_the_tokenizer_travels_along(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    source = tiny_hf(tmp_path / "hf") if kind == "hf" else tiny_gguf(tmp_path / "m.gguf")
    pack(source, tmp_path / "m.edge")
    with PackFile(tmp_path / "m.edge") as file:
        vocab = file.vocab()
    assert (vocab.config["bos_id"], vocab.config["eos_ids"]) == (1, [2])
    tokenizer = Tokenizer.from_str(vocab.tokenizer_json)
    assert tokenizer.decode(tokenizer.encode("the cat").ids).strip() == "the cat"


def test_the_report(tmp_path: Path) -> None:
    report = pack(tiny_hf(tmp_path / "hf"), tmp_path / "m.edge")
    assert isinstance(report, PackReport)
    assert report.file_bytes == os.path.getsize(tmp_path / "m.edge")
    assert report.ignored == []


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    pack(
        tiny_hf(tmp_path / "hf"), tmp_path / "m.edge", progress=lambda done, total: told.append((done, total))
    )
    assert told[-1][0] == told[-1][1] == told[0][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_small_steps_give_the_same_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one tile, or one head, join without a seam."""
    source = tiny_llama_gguf(tmp_path / "m.gguf", "q4_k")
    pack(source, tmp_path / "a.edge")
    monkeypatch.setattr(packing, "_STEP_BYTES", 1)
    pack(source, tmp_path / "b.edge")
    assert (tmp_path / "a.edge").read_bytes() == (tmp_path / "b.edge").read_bytes()


@pytest.mark.parametrize("head_dim", [24, 40])
def test_heads_that_are_no_whole_tiles(
    head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_STEP_BYTES", 1)
    pack(tiny_hf(tmp_path / "hf", head_dim=head_dim), tmp_path / "a.edge")
    pack(tiny_gguf(tmp_path / "m.gguf", head_dim=head_dim), tmp_path / "b.edge")
    assert weights_of(tmp_path / "a.edge") == weights_of(tmp_path / "b.edge")


@pytest.mark.parametrize("weights", ["", "q5", "Q8", None, 8])
def test_unknown_options(weights: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="weights: expected one of keep, q8, q4"):
        pack(tiny_hf(tmp_path / "hf"), tmp_path / "m.edge", weights)


def test_a_pack_is_not_packed_again(tmp_path: Path) -> None:
    pack(tiny_hf(tmp_path / "hf"), tmp_path / "m.edge")
    with pytest.raises(ModelFileError, match="found a pack"):
        pack(tmp_path / "m.edge", tmp_path / "n.edge")


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    source = tiny_gguf(tmp_path / "m.gguf")
    before = source.read_bytes()
    with pytest.raises(ArgumentError, match="expected another file than the source"):
        pack(source, source)
    assert source.read_bytes() == before


def test_a_bad_model_leaves_nothing(tmp_path: Path) -> None:
    tiny_hf(tmp_path / "hf", vocab_size=300)
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError):
        pack(tmp_path / "hf", tmp_path / "m.edge")
    assert os.listdir(tmp_path) == ["hf"]


def test_giving_up_leaves_nothing(tmp_path: Path) -> None:
    class GaveUp(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise GaveUp

    with pytest.raises(GaveUp):
        pack(tiny_hf(tmp_path / "hf"), tmp_path / "m.edge", progress=stop)
    assert os.listdir(tmp_path) == ["hf"]


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_hf(tmp_path / "hf")
    expected = pack(source, tmp_path / "m.edge").file_bytes
    usage = type("Usage", (), {"free": expected - 1})
    monkeypatch.setattr(pack_writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match=f"needs {expected} bytes, the drive has {expected - 1} free"):
        pack(source, tmp_path / "n.edge")
    usage.free = expected  # type: ignore[attr-defined]
    pack(source, tmp_path / "n.edge")


# A process killed half way.

_CHILD = """
    import sys, time
    sys.path[:0] = {paths!r}
    from flashload.pack import pack
    n_steps = 0
    def progress(done, total):
        global n_steps
        n_steps += 1
        print(done, flush=True)
        time.sleep(600 if n_steps == int(sys.argv[3]) else 0.002)
    pack(sys.argv[1], sys.argv[2], progress=progress)
"""


def child(source: Path, destination: Path, stop_after_steps: int = 0) -> subprocess.Popen[str]:
    code = textwrap.dedent(_CHILD).format(paths=[str(ROOT), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(destination), str(stop_after_steps)],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("old", [False, True])
def test_a_killed_packer_leaves_no_half_pack(steps: int, old: bool, tmp_path: Path) -> None:
    source = tiny_hf(tmp_path / "hf")
    out = tmp_path / "out"
    out.mkdir()
    if old:
        pack(source, out / "m.edge", "q8")
    before = (out / "m.edge").read_bytes() if old else None
    with child(source, out / "m.edge", steps) as process:
        assert process.stdout is not None
        for _ in range(steps):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    left = os.listdir(out)
    assert len([name for name in left if name.endswith(".tmp")]) == 1
    assert ((out / "m.edge").read_bytes() if old else None) == before
    assert ("m.edge" in left) == old
    pack(source, out / "m.edge")
    assert os.listdir(out) == ["m.edge"]


@pytest.mark.parametrize("steps", [1, 10])
def test_an_interrupted_packer_removes_its_temporary(steps: int, tmp_path: Path) -> None:
    source = tiny_hf(tmp_path / "hf")
    out = tmp_path / "out"
    out.mkdir()
    with child(source, out / "m.edge", steps) as process:
        assert process.stdout is not None
        for _ in range(steps):
            assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
    assert os.listdir(out) == []


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(100))
def test_killed_at_a_random_moment(seed: int, tmp_path: Path) -> None:
    import time

    source = tiny_hf(tmp_path / "hf")
    out = tmp_path / "out"
    out.mkdir()
    with child(source, out / "m.edge") as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(float(np.random.default_rng(seed).uniform(0, 0.12)))
        process.send_signal(signal.SIGKILL)
    if (out / "m.edge").exists():
        with PackFile(out / "m.edge") as file:
            file.verify()
    pack(source, out / "m.edge")
    assert os.listdir(out) == ["m.edge"]


# Real checkpoints.


def test_q8_of_the_folder_equals_llama_cpps_q8(shared: Path, tmp_path: Path) -> None:
    models = shared / "models"
    pack(models / "tinystories-656k", tmp_path / "a.edge", "q8")
    pack(models / "tinystories-656k-q8_0.gguf", tmp_path / "b.edge")
    assert weights_of(tmp_path / "a.edge") == weights_of(tmp_path / "b.edge")


@pytest.mark.parametrize("weights", ["keep", "q8", "q4"])
def test_stories260k_packs(weights: str, shared: Path, tmp_path: Path) -> None:
    report = pack(shared / "models" / "stories260K-f32.gguf", tmp_path / "m.edge", weights)
    with PackFile(tmp_path / "m.edge") as file:
        file.verify()
        assert file.config.n_kv_heads == 4
        # 172 columns fill no block of 32.
        expected = "F32" if weights == "keep" else "F16"
        assert file.entries["layers.0.down.weight"].format.name == expected
    assert report.ignored == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A sparse folder of 1.4 GB packs within 512 MiB."""
    config = hf_config(
        "llama",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    source = tmp_path / "hf"
    tiny_hf(source)
    shapes = {name: values.shape for name, values in hf_tensors(hf_config("llama")).items()}
    sizes = {64: 4096, 96: 11008, 320: 32000, 32: 4096}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        real = [sizes[n] for n in shape]
        n_bytes = 2 * int(np.prod(real))
        header[name] = {"dtype": "F16", "shape": real, "data_offsets": [end, end + n_bytes]}
        end += n_bytes
    text = json.dumps(header).encode()
    with open(source / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (source / "config.json").write_text(json.dumps(config))
    code = f"""
        import resource, sys
        sys.path[:0] = {[str(ROOT), *sys.path]!r}
        from flashload.pack import pack
        pack({str(source)!r}, {str(tmp_path / "m.edge")!r}, "q4")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) < 512 << 20
