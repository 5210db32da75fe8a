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
from tests.tiny import hf_config


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
