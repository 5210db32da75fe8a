"""Checkpoints to slots: every tensor found once, with the right shape, from folders and from GGUF."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashload.bind import Bound
from flashload.errors import ModelFileError, UnsupportedModelError
from tests import tiny
from tests.test_arch import LLAMA3, bound, config, llama3_factors, plain
from tests.tiny import GGUF_ARCHITECTURES, hf_config, hf_tensors, tiny_gguf, tiny_hf, write_safetensors

# Binding: every weight has its tensor.


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_tensor_is_bound_once(family: str, tmp_path: Path) -> None:
    found = bound(tiny_hf(tmp_path, family))
    assert found.family.name == family
    assert found.ignored == []
    names = [weight.slot.name for weight in found.weights]
    assert len(names) == len(set(names))
    assert sorted(weight.info.name for weight in found.weights) == sorted(hf_tensors(hf_config(family)))


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("family", GGUF_ARCHITECTURES)
def test_gguf_means_the_same_as_the_folder(family: str, stacked: bool, tmp_path: Path) -> None:
    one = bound(tiny_hf(tmp_path / "hf", family))
    other = bound(tiny_gguf(tmp_path / "m.gguf", family, stacked=stacked))
    expected, found = one.config.to_json(), other.config.to_json()
    assert found.pop("norm_eps") == pytest.approx(expected.pop("norm_eps"))
    assert found == expected
    assert [w.slot for w in other.weights] == [w.slot for w in one.weights]


def test_pack_order(tmp_path: Path) -> None:
    names = [w.slot.name for w in bound(tiny_hf(tmp_path, "qwen3_moe")).weights]
    assert names[0] == "embed.weight"
    assert names[-2:] == ["final_norm.weight", "head.weight"]
    layer = [n.removeprefix("layers.0.") for n in names if n.startswith("layers.0.")]
    parts = ["attn_norm", "q", "k", "v", "o", "q_norm", "k_norm", "ffn_norm", "router"]
    experts = [f"experts.{e}.{part}" for e in range(4) for part in ("gate", "up", "down")]
    assert layer == [f"{name}.weight" for name in parts + experts]


def rewrite(folder: Path, change: Any, family: str = "llama", **overrides: Any) -> Path:
    """A folder whose tensors went through ``change``."""
    tiny_hf(folder, family, **overrides)
    tensors = hf_tensors(hf_config(family, **overrides))
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ],
)
def test_missing_tensors(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=f"expected tensor.*{name}.*found none"):
        bound(rewrite(tmp_path, lambda t: t.pop(name)))


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_missing_experts(family: str, tmp_path: Path) -> None:
    def drop(tensors: dict[str, np.ndarray]) -> None:
        tensors.pop(next(name for name in tensors if "layers.1" in name and "experts.3." in name))

    with pytest.raises(ModelFileError, match=r"layers.1.experts.3.*found none"):
        bound(rewrite(tmp_path, drop, family))


def test_wrong_shapes(tmp_path: Path) -> None:
    def turn(tensors: dict[str, np.ndarray]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = np.ascontiguousarray(tensors[name].T)

    with pytest.raises(ModelFileError, match=r"up_proj.weight: expected shape \(96, 64\), found \(64, 96\)"):
        bound(rewrite(tmp_path, turn))


def test_a_vocabulary_of_another_size(tmp_path: Path) -> None:
    tiny_hf(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "vocab_size": 321}))
    with pytest.raises(ModelFileError, match=r"embed_tokens.weight: expected shape \(321, 64\)"):
        bound(tmp_path)


def test_biases_in_some_layers_only(tmp_path: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(64, np.float32)

    with pytest.raises(ModelFileError, match=r"q.bias: expected it in all layers or in none"):
        bound(rewrite(tmp_path, add))


def test_llama_with_biases(tmp_path: Path) -> None:
    names = {w.slot.name for w in bound(tiny_hf(tmp_path, "llama", attention_bias=True)).weights}
    assert {"layers.0.q.bias", "layers.1.v.bias"} <= names


def test_qwen2_needs_its_biases(tmp_path: Path) -> None:
    def drop(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.endswith("v_proj.bias")]:
            tensors.pop(name)

    with pytest.raises(ModelFileError, match=r"layers.0.v.bias"):
        bound(rewrite(tmp_path, drop, "qwen2"))


def test_unexpected_tensors_are_listed(tmp_path: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)

    assert bound(rewrite(tmp_path, add)).ignored == ["model.layers.0.self_attn.rotary_emb.inv_freq"]


def test_a_tied_head_is_not_bound(tmp_path: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    found = bound(rewrite(tmp_path, add, tie_word_embeddings=True))
    assert found.config.tied_head
    assert found.ignored == ["lm_head.weight"]


def test_a_tied_matrix_may_be_stored_as_the_head(tmp_path: Path) -> None:
    def move(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    found = bound(rewrite(tmp_path, move, tie_word_embeddings=True))
    assert found.weights[0].info.name == "lm_head.weight"
    assert found.ignored == []


def test_opt_names_without_the_outer_prefix(tmp_path: Path) -> None:
    def strip(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    assert bound(rewrite(tmp_path, strip, "opt")).ignored == []


def test_a_config_of_millions_of_experts_is_refused_at_once(tmp_path: Path) -> None:
    tiny_hf(tmp_path, "olmoe")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**values, "num_hidden_layers": 4096, "num_experts": 4096})
    )
    with pytest.raises(ModelFileError):
        bound(tmp_path)


# GGUF metadata.


def gguf_bound(path: Path, **extra: Any) -> Bound:
    return bound(tiny_gguf(path / "m.gguf", extra={k.replace("__", "."): v for k, v in extra.items()}))


def test_gguf_linear_scaling(tmp_path: Path) -> None:
    found = gguf_bound(tmp_path, llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    assert np.allclose(found.config.rope_inv_freq, plain(10000.0, 16) / 4, rtol=1e-7)


def test_gguf_factor_without_a_kind_is_linear(tmp_path: Path) -> None:
    found = gguf_bound(tmp_path, llama__rope__scale_linear=2.0)
    assert np.allclose(found.config.rope_inv_freq, plain(10000.0, 16) / 2, rtol=1e-7)


def test_gguf_no_scaling_ignores_the_factor(tmp_path: Path) -> None:
    found = gguf_bound(tmp_path, llama__rope__scaling__type="none", llama__rope__scaling__factor=4.0)
    assert np.allclose(found.config.rope_inv_freq, plain(10000.0, 16), rtol=1e-7)


def test_gguf_yarn_equals_that_of_the_folder(tmp_path: Path) -> None:
    found = gguf_bound(
        tmp_path,
        llama__rope__scaling__type="yarn",
        llama__rope__scaling__factor=4.0,
        llama__rope__scaling__original_context_length=32,
    ).config
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    expected = config(rope_scaling=scaling)
    assert found.rope_inv_freq == expected.rope_inv_freq
    assert found.rope_magnitude == pytest.approx(expected.rope_magnitude)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama__rope__scaling__type": "longrope"}, "longrope"),
        (
            {
                "llama__rope__scaling__type": "yarn",
                "llama__rope__scaling__factor": 2.0,
                "llama__rope__scaling__yarn_log_multiplier": 0.1,
            },
            "yarn_log_multiplier",
        ),
        ({"llama__attention__value_length": 8}, "value_length"),
    ],
)
def test_gguf_options_refused(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        gguf_bound(tmp_path, **extra)


def test_gguf_sliding_window(tmp_path: Path) -> None:
    assert gguf_bound(tmp_path, llama__attention__sliding_window=24).config.windows == (24, 24)


def with_tensor(path: Path, name: str, values: np.ndarray, **extra: Any) -> Path:
    """A tiny Llama with one more tensor."""
    original = tiny.gguf_tensors
    try:
        tiny.gguf_tensors = lambda *args: {**original(*args), name: values}  # type: ignore[assignment]
        return tiny_gguf(path / "m.gguf", extra=extra)
    finally:
        tiny.gguf_tensors = original


def test_gguf_rope_factors_equal_llama3(tmp_path: Path) -> None:
    factors = llama3_factors(10000.0, 16, 64).astype(np.float32)
    found = bound(with_tensor(tmp_path, "rope_freqs.weight", factors))
    expected = config(rope_scaling={**LLAMA3, "original_max_position_embeddings": 64})
    assert np.allclose(found.config.rope_inv_freq, expected.rope_inv_freq, rtol=1e-6)
    assert found.ignored == []


@pytest.mark.parametrize("factors", [[1.0] * 7, [0.0] * 8, [math.nan] * 8, [-1.0] * 8])
def test_gguf_rope_factors_refused(factors: list[float], tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="rope_freqs"):
        bound(with_tensor(tmp_path, "rope_freqs.weight", np.array(factors, np.float32)))


def test_gguf_weights_with_separate_scales_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"blk.0.attn_q.weight: expected no separate scale"):
        bound(with_tensor(tmp_path, "blk.0.attn_q.scale", np.ones(1, np.float32)))


def test_gguf_unknown_architectures_list_the_known_ones(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf")
    # The same length, so that nothing else in the file moves.
    data = path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma", 1)
    path.write_bytes(data)
    with pytest.raises(UnsupportedModelError, match=r"llama, olmoe, qwen2, qwen3, qwen3moe, found 'gemma'"):
        bound(path)


def test_gguf_more_tokens_than_embeddings(tmp_path: Path) -> None:
    original = tiny.vocabulary
    try:
        tiny.vocabulary = lambda size: original(size + 1)  # type: ignore[assignment]
        path = tiny_gguf(tmp_path / "m.gguf")
    finally:
        tiny.vocabulary = original
    with pytest.raises(ModelFileError, match=r"tokenizer.ggml.tokens: expected at most 320 .*found 321"):
        bound(path)


def test_gguf_without_an_architecture(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError):
        bound(shared / "vocabs" / "ggml-vocab-gpt-2.gguf")
