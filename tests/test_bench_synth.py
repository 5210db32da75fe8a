"""Synthetic models of real shapes: sane values, whole vocabularies, published sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="the benchmarks write GGUF files with the gguf package")

from bench import shapes, synth  # noqa: E402
from bench.random_blocks import TYPES, random_blocks  # noqa: E402

MB = 1 << 20


def values_of(tensor: Any) -> np.ndarray:
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)


# --- random weights


@pytest.mark.parametrize("kind", sorted(TYPES))
@pytest.mark.parametrize("std", [1.0, 1 / 64, 1 / 128])
def test_random_blocks_have_the_wanted_spread_and_no_drift(kind: str, std: float) -> None:
    block = TYPES[kind]
    n = 40_000 // block.values + 1
    blocks = random_blocks(block, n, std, np.random.SFC64(7))
    assert blocks.shape == (n, block.block_bytes)
    values = gguf.quants.dequantize(blocks.reshape(1, -1), gguf.GGMLQuantizationType[kind.upper()])
    assert np.isfinite(values).all()
    # f16 and f32 take the nearest power of two, the others carry a scale of +-25 %.
    assert 0.7 * std < values.std() < 1.45 * std
    assert abs(values.mean()) < 0.02 * values.std() + 1e-12


def test_q8_0_never_holds_minus_128() -> None:
    blocks = random_blocks(TYPES["q8_0"], 2000, 1.0, np.random.SFC64(1))
    assert blocks[:, 2:].view(np.int8).min() == -127


def test_block_types_agree_with_gguf() -> None:
    for name, block in TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]] == (
            block.values,
            block.block_bytes,
        )


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 256"):
        TYPES["q4_k"].row_bytes(300)


@pytest.mark.parametrize("name", ["tiny", "tiny-moe", "tiny-qwen3moe"])
@pytest.mark.parametrize("mix", shapes.MIXES)
def test_models_open_and_hold_sane_values(name: str, mix: str, tiny: Callable[..., Path]) -> None:
    path = tiny(name, mix)
    shape = shapes.SHAPES[name]
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert set(found) == {tensor.name for tensor in shapes.tensors(shape, mix)}
    for tensor in shapes.tensors(shape, mix):
        values = values_of(found[tensor.name]).reshape(tensor.shape)
        if tensor.constant is not None:
            assert (values == tensor.constant).all()
        else:
            assert np.isfinite(values).all()
            assert 0.6 * tensor.std < values.std() < 1.6 * tensor.std
    assert found["output.weight"].tensor_type.name == {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}.get(
        mix, "Q6_K"
    )
    assert len(reader.fields["tokenizer.ggml.tokens"].data) == shape.vocab


def test_a_seed_gives_the_same_file_and_another_seed_another(tmp_path: Path) -> None:
    files = []
    for i, seed in enumerate((3, 3, 4)):
        path = tmp_path / f"{i}.gguf"
        synth.write_model(path, shapes.SHAPES["tiny"], "q4_0", seed=seed)
        files.append(path.read_bytes())
    assert files[0] == files[1] != files[2]


def test_mixes_follow_the_named_file_types() -> None:
    seven = shapes.SHAPES["llama-2-7b"]
    kinds = [shapes.kind_of("q4_k_m", "down", i, seven) for i in range(32)]
    # n/8 first and last layers, and every third between them: 16 of 32.
    assert kinds.count("q6_k") == 16 and kinds[:4] == ["q6_k"] * 4 and kinds[-4:] == ["q6_k"] * 4
    assert shapes.kind_of("q4_k_m", "gate", 0, seven) == "q4_k"
    assert shapes.kind_of("q4_0", "v", 0, shapes.SHAPES["moe-8x"]) == "q8_0"
    assert shapes.kind_of("q2_k_mix", "v", 0, shapes.SHAPES["tinyllama-1.1b"]) == "q4_k"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("tinyllama-1.1b", 1_100_048_384), ("moe-8x", 5_970_000_000)],
)
def test_shapes_have_the_published_parameter_counts(name: str, parameters: int) -> None:
    total = sum(math.prod(t.shape) for t in shapes.tensors(shapes.SHAPES[name], "f16"))
    assert total == pytest.approx(parameters, rel=1e-3 if name == "moe-8x" else 1e-9)


def test_opt_has_the_published_parameter_count() -> None:
    total = sum(math.prod(t.shape) for t in shapes.opt_tensors(shapes.SHAPES["opt-6.7b"], 0.0))
    assert total == 6_658_473_984


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen3moe"])
def test_vocabularies_load_and_round_trip(name: str, tiny: Callable[..., Path]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocab = pytest.importorskip("flashload.vocab")
    fields = gguf.GGUFReader(tiny(name)).fields
    made = vocab.vocab_from_gguf({key: field.contents() for key, field in fields.items() if "." in key})
    tokenizer = tokenizers.Tokenizer.from_str(made.tokenizer_json)
    text = "the quick brown fox, 1234 times\n\u00e9\u4e2d"
    assert tokenizer.get_vocab_size() == shapes.SHAPES[name].vocab
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


@pytest.mark.parametrize("n", [512, 32000])
def test_sentencepiece_vocabulary_is_whole(n: int) -> None:
    pieces, scores, types = shapes.sentencepiece_vocab(n)
    assert len(pieces) == len(set(pieces)) == len(scores) == len(types) == n
    assert types.count(6) == 256 and types[:3] == [2, 3, 3]
    assert scores[259:] == sorted(scores[259:], reverse=True)


@pytest.mark.parametrize("n", [512, 50272, 151936])
def test_byte_bpe_vocabulary_is_whole(n: int) -> None:
    tokens, merges, types, end = shapes.byte_bpe_vocab(n)
    assert len(tokens) == len(set(tokens)) == len(types) == n and end == n - 1 and types[end] == 3
    known = set(tokens)
    assert all(set(merge.split(" ")) <= known and merge.replace(" ", "") in known for merge in merges)


def test_opt_is_a_folder_that_the_checkpoint_reader_takes(tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("flashload.checkpoint")
    bind = pytest.importorskip("flashload.bind")
    from bench.synth_hf import write_opt_folder

    write_opt_folder(tmp_path, shapes.SHAPES["tiny-opt"], active=0.05)
    bound = bind.bind(checkpoint.open_checkpoint(tmp_path))
    assert bound.config.family == "opt" and bound.config.activation == "relu" and bound.config.tied_head
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "np") as file:
        bias = file.get_tensor("model.decoder.layers.1.fc1.bias")
    assert bias == pytest.approx(-1.645, abs=2e-3)  # the 5 % quantile of a normal distribution


def test_opt_as_mpt_has_the_same_matrices(tiny: Callable[..., Path]) -> None:
    path = tiny("tiny-opt", as_mpt=True)
    shape = shapes.SHAPES["tiny-opt"]
    found = {t.name: int(t.n_elements) for t in gguf.GGUFReader(path).tensors if "norm" not in t.name}
    opt = sum(
        math.prod(t.shape)
        for t in shapes.opt_tensors(shape, 0.0)
        if len(t.shape) == 2 and "positions" not in t.name
    )
    assert sum(found.values()) == opt


def test_synth_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synth.main(["tiny", "--type", "q8_0", "--layers", "1", "--out", str(tmp_path / "x.gguf")]) == 0
    assert "MB/s" in capsys.readouterr().out
    assert len(gguf.GGUFReader(tmp_path / "x.gguf").tensors) == 3 + 9
    with pytest.raises(SystemExit):
        synth.main(["tiny", "--as-mpt", "--out", str(tmp_path / "y.gguf")])
    with pytest.raises(SystemExit):
        synth.main(["tiny-opt", "--active", "1.5", "--out", str(tmp_path / "z")])
