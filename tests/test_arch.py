"""Families: configurations, tensors and what is refused. (test_arch_hf.py compares with transformers.)"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashload.arch import FAMILIES, DecoderConfig, Keys, family_of_hf
from flashload.bind import Bound, bind
from flashload.checkpoint import open_checkpoint
from flashload.errors import ModelFileError, UnsupportedModelError
from tests import tiny
from tests.tiny import GGUF_ARCHITECTURES, hf_config, hf_tensors, tiny_gguf, tiny_hf, write_safetensors


def bound(path: Path) -> Bound:
    with open_checkpoint(path) as checkpoint:
        return bind(checkpoint)


def config_of(values: dict[str, Any]) -> DecoderConfig:
    keys = Keys("config.json", values)
    return family_of_hf(keys).from_hf(keys)


def config(family: str = "llama", **overrides: Any) -> DecoderConfig:
    return config_of(hf_config(family, **overrides))


def test_the_registry_is_the_folder() -> None:
    folder = Path(__file__).parent.parent / "flashload" / "arch"
    files = {path.stem for path in folder.glob("*.py") if not path.name.startswith("_")}
    assert set(FAMILIES) == files == set(tiny.FAMILIES)
    assert all(family.name == name for name, family in FAMILIES.items())


def test_family_files_are_data() -> None:
    folder = Path(__file__).parent.parent / "flashload" / "arch"
    for name in FAMILIES:
        assert len((folder / f"{name}.py").read_text().splitlines()) <= 100


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_config_survives_json(family: str) -> None:
    one = config(family)
    assert DecoderConfig.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_config_keys_are_those_of_the_core() -> None:
    assert list(config().to_json()) == [
        "family",
        "vocab_size",
        "hidden_size",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "intermediate_size",
        "max_positions",
        "norm",
        "norm_eps",
        "activation",
        "gated",
        "rope_inv_freq",
        "rope_magnitude",
        "position_offset",
        "windows",
        "qk_norm",
        "clip_qkv",
        "n_experts",
        "experts_per_token",
        "expert_intermediate_size",
        "norm_topk_prob",
        "tied_head",
        "attention_scale",
        "logit_scale",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", 1 << 25),
        ("vocab_size", True),
        ("vocab_size", "320"),
        ("hidden_size", -1),
        ("hidden_size", 64.0),
        ("n_layers", 0),
        ("n_layers", 1 << 20),
        ("n_heads", 0),
        ("n_kv_heads", 3),
        ("n_kv_heads", 0),
        ("head_dim", 0),
        ("intermediate_size", 0),
        ("max_positions", 0),
        ("norm", "batch"),
        ("norm", 1),
        ("norm_eps", 0.0),
        ("norm_eps", math.nan),
        ("norm_eps", math.inf),
        ("norm_eps", 10**400),
        ("rope_inv_freq", [10**400]),
        ("activation", "swiglu"),
        ("gated", 1),
        ("rope_inv_freq", [0.5] * 9),
        ("rope_inv_freq", [math.nan]),
        ("rope_inv_freq", [-1.0]),
        ("rope_inv_freq", "1"),
        ("rope_inv_freq", [True]),
        ("rope_magnitude", 0.0),
        ("position_offset", -2),
        ("windows", [0]),
        ("windows", [0, -1]),
        ("windows", [0, 0.5]),
        ("windows", None),
        ("qk_norm", "both"),
        ("clip_qkv", -1.0),
        ("n_experts", 5000),
        ("n_experts", -1),
        ("experts_per_token", -1),
        ("norm_topk_prob", None),
        ("tied_head", "no"),
        ("attention_scale", 0),
        ("logit_scale", math.inf),
        ("family", 3),
    ],
)
def test_values_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ModelFileError, match=key):
        DecoderConfig.from_json({**config().to_json(), key: value})


def test_experts_need_a_number_per_token() -> None:
    with pytest.raises(ModelFileError, match=r"experts_per_token: expected 1\.\.8"):
        DecoderConfig.from_json({**config().to_json(), "n_experts": 8})


@pytest.mark.parametrize("value", [None, [], "x", {}, {"family": "llama"}])
def test_configs_that_are_no_config(value: object) -> None:
    with pytest.raises(ModelFileError, match="decoder config"):
        DecoderConfig.from_json(value)


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ModelFileError, match="surprise"):
        DecoderConfig.from_json({**config().to_json(), "surprise": 1})


# Rotary frequencies: the closed forms, and what each kind keeps and changes.


def plain(theta: float, dim: int) -> np.ndarray:
    return theta ** (-np.arange(0, dim, 2) / dim)


def rope(**scaling: Any) -> DecoderConfig:
    return config(head_dim=64, rope_theta=50000.0, max_position_embeddings=256, rope_scaling=scaling or None)


def test_default_rope() -> None:
    assert np.allclose(rope().rope_inv_freq, plain(50000.0, 64), rtol=1e-7)
    assert rope().rope_magnitude == 1.0


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_linear_rope(key: str) -> None:
    assert np.allclose(
        rope(**{key: "linear", "factor": 4.0}).rope_inv_freq, plain(50000.0, 64) / 4, rtol=1e-7
    )


def test_dynamic_rope_is_default_in_the_trained_context() -> None:
    assert rope(rope_type="dynamic", factor=8.0).rope_inv_freq == rope().rope_inv_freq


def test_rope_parameters_of_transformers_5() -> None:
    values = hf_config("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 9000.0})
    values.pop("rope_theta")
    assert np.allclose(config_of(values).rope_inv_freq, plain(9000.0, 16) / 2, rtol=1e-7)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def llama3_factors(theta: float, dim: int, original: int) -> np.ndarray:
    """Divisors as llama.cpp's converter writes them to rope_freqs.weight."""
    out = []
    for freq in plain(theta, dim):
        wave = 2 * math.pi / freq
        if wave < original / 4.0:
            out.append(1.0)
        elif wave > original / 1.0:
            out.append(8.0)
        else:
            smooth = (original / wave - 1.0) / (4.0 - 1.0)
            out.append(1 / ((1 - smooth) / 8.0 + smooth))
    return np.array(out)


def test_llama3_rope() -> None:
    found = rope(**LLAMA3, original_max_position_embeddings=128).rope_inv_freq
    factors = llama3_factors(50000.0, 64, 128)
    assert {1.0, 8.0} < set(factors)
    assert np.allclose(found, plain(50000.0, 64) / factors, rtol=1e-6)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones() -> None:
    found = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    ratio = np.array(found.rope_inv_freq) / plain(50000.0, 64)
    assert ratio[0] == pytest.approx(1.0)
    assert ratio[-1] == pytest.approx(0.25)
    assert (np.diff(ratio) <= 1e-6).all()
    assert len(set(np.round(ratio, 4))) > 3
    assert found.rope_magnitude == pytest.approx(0.1 * math.log(4.0) + 1)


def test_yarn_magnitude_from_mscale() -> None:
    found = rope(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=0.4
    )
    expected = (0.07 * math.log(4.0) + 1) / (0.04 * math.log(4.0) + 1)
    assert found.rope_magnitude == pytest.approx(expected)


def test_yarn_attention_factor_is_taken_as_it_is() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert rope(**scaling, attention_factor=1.5).rope_magnitude == 1.5


@pytest.mark.parametrize(
    ("scaling", "error", "message"),
    [
        ({"rope_type": "longrope", "factor": 4.0}, UnsupportedModelError, "longrope"),
        ({"rope_type": "su"}, UnsupportedModelError, "su"),
        ({"rope_type": 7}, ModelFileError, "rope_type"),
        ({"rope_type": "linear"}, ModelFileError, "factor"),
        ({"rope_type": "linear", "factor": 0}, ModelFileError, "factor"),
        ({"rope_type": "linear", "factor": "4"}, ModelFileError, "factor"),
        ({**LLAMA3, "high_freq_factor": 1.0}, ModelFileError, "high_freq_factor"),
        ({**LLAMA3, "low_freq_factor": None}, ModelFileError, "low_freq_factor"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": -1}, ModelFileError, "beta_fast"),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": 3}, ModelFileError, "truncate"),
        (
            {"rope_type": "default", "partial_rotary_factor": 0.5},
            UnsupportedModelError,
            "partial_rotary_factor",
        ),
        ({"rope_type": "default", "rope_theta": 0}, ModelFileError, "rope_theta"),
        ("linear", ModelFileError, "rope_scaling"),
    ],
)
def test_rope_refused(scaling: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config(rope_scaling=scaling)


# What the families make of their configurations.


def test_llama_defaults() -> None:
    values = hf_config("llama")
    for key in ("num_key_value_heads", "rms_norm_eps", "hidden_act", "rope_theta", "tie_word_embeddings"):
        values.pop(key)
    found = config_of(values)
    assert (found.n_kv_heads, found.norm_eps, found.activation, found.tied_head) == (4, 1e-6, "silu", False)
    assert found.windows == (0, 0)
    assert found.attention_scale == 16**-0.5


@pytest.mark.parametrize(("window", "expected"), [(16, 16), (None, 0)])
def test_mistral_windows(window: int | None, expected: int) -> None:
    assert config("mistral", sliding_window=window).windows == (expected, expected)


def test_mistral_without_a_window_key_has_the_default() -> None:
    values = hf_config("mistral")
    values.pop("sliding_window")
    assert config_of(values).windows == (4096, 4096)


def test_qwen2_window_is_off_unless_used() -> None:
    assert config("qwen2", sliding_window=16).windows == (0, 0)
    assert config("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=1).windows == (0, 16)


def test_a_window_of_null_is_none() -> None:
    assert config("qwen2", sliding_window=None, use_sliding_window=True, max_window_layers=0).windows == (
        0,
        0,
    )


def test_layer_types_win_over_max_window_layers() -> None:
    kinds = ["sliding_attention", "full_attention"]
    found = config("qwen3", sliding_window=8, use_sliding_window=True, layer_types=kinds, max_window_layers=0)
    assert found.windows == (8, 0)


@pytest.mark.parametrize("kinds", [["chunked_attention"] * 2, ["full_attention"], "full_attention"])
def test_layer_types_refused(kinds: object) -> None:
    with pytest.raises(ModelFileError, match="layer_types"):
        config("qwen2", use_sliding_window=True, layer_types=kinds)


def test_what_sets_the_families_apart() -> None:
    assert config("qwen3").qk_norm == "head"
    assert config("qwen3").head_dim == 32
    assert config("olmoe").qk_norm == "full"
    assert config("olmoe").clip_qkv == 8.0
    assert config("olmoe", clip_qkv=None).clip_qkv == 0.0
    assert not config("olmoe").norm_topk_prob
    assert config("mixtral").norm_topk_prob
    assert config("qwen3_moe").expert_intermediate_size == 32
    assert config("qwen3_moe").n_experts == 4
    opt = config("opt")
    assert (opt.norm, opt.activation, opt.gated, opt.position_offset) == ("layer", "relu", False, 2)
    assert opt.rope_inv_freq == ()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("silu", "silu"),
        ("relu", "relu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
    ],
)
def test_activations(name: str, expected: str) -> None:
    assert config(hidden_act=name).activation == expected


def test_unknown_activation() -> None:
    with pytest.raises(UnsupportedModelError, match=r"hidden_act.*'relu2'"):
        config(hidden_act="relu2")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_layer_norm_before", False),
        ("_remove_final_layer_norm", True),
        ("layer_norm_elementwise_affine", False),
        ("word_embed_proj_dim", 32),
    ],
)
def test_opt_variants_refused(key: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        config("opt", **{key: value})


def test_unknown_architectures_list_the_known_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*found 'GemmaForCausalLM'"):
        config_of({**hf_config("llama"), "architectures": ["GemmaForCausalLM"]})


def test_model_type_serves_where_architectures_are_missing() -> None:
    values = hf_config("qwen2")
    values.pop("architectures")
    assert config_of(values).family == "qwen2"


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [None, 0, -5, "64", 1e3, [64], 1 << 70])
def test_sizes_are_proven(key: str, value: object) -> None:
    with pytest.raises(ModelFileError, match=key):
        config(**{key: value})


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
