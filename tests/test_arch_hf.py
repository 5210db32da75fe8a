"""Families against transformers itself: names, shapes, defaults and rotary frequencies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from flashload.bind import bind
from flashload.checkpoint import open_checkpoint
from flashload.format import PackFile
from flashload.pack import pack
from quant.formats import WeightFormat, decode
from tests import hf_models

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-all": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
    },
    "yarn-untruncated": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "truncate": False,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
    },
}


def bound(path: Path) -> Any:
    with open_checkpoint(path) as checkpoint:
        return bind(checkpoint)


@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_every_tensor_transformers_saves_has_a_place(family: str, tmp_path: Path) -> None:
    model = hf_models.make(tmp_path, family)
    found = bound(tmp_path)
    assert found.ignored == []
    held = sum(w.slot.rows * w.slot.cols for w in found.weights)
    assert held == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_values_survive_packing(family: str, tmp_path: Path) -> None:
    model = hf_models.make(tmp_path / "hf", family)
    pack(tmp_path / "hf", tmp_path / "m.edge")
    state = model.state_dict()
    with PackFile(tmp_path / "m.edge") as file:
        entry = file.entries["layers.1.o.weight"]
        values = decode(WeightFormat.F32, file.read(entry.name), entry.rows, entry.cols)
        norm = np.frombuffer(file.read("layers.1.attn_norm.weight"), np.float32)
    (o_name,) = [n for n in state if "layers.1." in n and ("o_proj.weight" in n or "out_proj.weight" in n)]
    (norm_name,) = [
        n for n in state if "layers.1." in n and ("input_layernorm.w" in n or "attn_layer_norm.w" in n)
    ]
    assert np.array_equal(values, state[o_name].numpy())
    assert np.array_equal(norm, state[norm_name].numpy())


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_frequencies(kind: str, tmp_path: Path) -> None:
    model = hf_models.make(tmp_path, "llama", rope_scaling=ROPES[kind], rope_theta=50000.0, head_dim=64)
    rotary = model.model.rotary_emb
    config = bound(tmp_path).config
    expected = rotary.inv_freq.numpy()
    assert np.allclose(config.rope_inv_freq, expected, rtol=1e-6, atol=0)
    assert config.rope_magnitude == pytest.approx(rotary.attention_scaling, rel=1e-6)


@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_missing_keys_mean_the_defaults_of_transformers(family: str, tmp_path: Path) -> None:
    """Keys a folder may leave out take the value the family's own config class gives them."""
    import json

    import transformers

    model = hf_models.make(tmp_path, family)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    optional = (
        "rms_norm_eps",
        "hidden_act",
        "activation_function",
        "tie_word_embeddings",
        "rope_parameters",
        "clip_qkv",
        "norm_topk_prob",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "decoder_sparse_step",
        "mlp_only_layers",
    )
    for key in optional:
        stored.pop(key, None)
    if family == "opt":
        stored["tie_word_embeddings"] = True
    path.write_text(json.dumps(stored))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = bound(tmp_path).config
    assert ours.tied_head == theirs.tie_word_embeddings == model.config.tie_word_embeddings
    if family != "opt":
        assert ours.norm_eps == theirs.rms_norm_eps
        theta = theirs.rope_parameters["rope_theta"]
        assert ours.rope_inv_freq[1] == pytest.approx(theta ** (-2.0 / ours.head_dim), rel=1e-6)
        window = getattr(theirs, "sliding_window", None) if family != "olmoe" else None
        kinds = getattr(theirs, "layer_types", None)
        full = kinds is not None and "sliding_attention" not in kinds
        assert set(ours.windows) == {0 if full or window is None else window}
    assert ours.norm_topk_prob == (family == "mixtral" or getattr(theirs, "norm_topk_prob", False))


def test_qwen2_windows(tmp_path: Path) -> None:
    model = hf_models.make(
        tmp_path,
        "qwen2",
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=1,
        num_hidden_layers=3,
    )
    windows = [layer.self_attn.sliding_window or 0 for layer in model.model.layers]
    assert list(bound(tmp_path).config.windows) == windows == [0, 16, 16]


def test_qwen3_moe_dense_layers(tmp_path: Path) -> None:
    hf_models.make(tmp_path, "qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3])
    names = {w.slot.name for w in bound(tmp_path).weights}
    sparse = [f"layers.{i}.router.weight" in names for i in range(4)]
    dense = [f"layers.{i}.gate.weight" in names for i in range(4)]
    assert sparse == [False, True, False, False]
    assert dense == [True, False, True, True]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_stacked_experts_equal_single_ones(family: str, tmp_path: Path) -> None:
    """transformers 5 holds experts stacked with gate and up fused; a folder may be saved that way."""
    from tests.tiny import write_safetensors

    model = hf_models.make(tmp_path / "single", family)
    pack(tmp_path / "single", tmp_path / "a.edge")
    hf_models.make(tmp_path / "stacked", family)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    write_safetensors(tmp_path / "stacked" / "model.safetensors", state)
    pack(tmp_path / "stacked", tmp_path / "b.edge")
    with PackFile(tmp_path / "a.edge") as one, PackFile(tmp_path / "b.edge") as other:
        names = [name for name in one.entries if not name.endswith(".json")]
        assert names == [name for name in other.entries if not name.endswith(".json")]
        assert all(one.read(name) == other.read(name) for name in names)
