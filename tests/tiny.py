"""Tiny random models of every family, as Hugging Face folders and GGUF files, made with numpy alone.

The tensor names of the folders are transformers' own; those of the GGUF files come from gguf-py's name map,
so that neither repeats edge's tables.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.random_blocks import random_blocks

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "olmoe", "opt")
GGUF_ARCHITECTURES = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "opt": "OPTForCausalLM",
}
_MIXTURES = ("mixtral", "qwen3_moe", "olmoe")
_WORDS = [" the", " a", " and", "ing", " cat", " dog", " sat", " ran", " on", " mat", ".", ",", "\n"]

Arrays = dict[str, np.ndarray]


def hf_config(family: str, **overrides: Any) -> dict[str, Any]:
    """config.json of a tiny model; ``overrides`` replace its values."""
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": 320,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    if family == "opt":
        config |= {"ffn_dim": 96, "activation_function": "relu", "word_embed_proj_dim": config["hidden_size"]}
        config |= {"do_layer_norm_before": True, "tie_word_embeddings": True}
    else:
        config |= {"num_key_value_heads": 2, "intermediate_size": 96, "hidden_act": "silu"}
        config |= {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False}
    if family == "mistral":
        config["sliding_window"] = 16
    if family in ("qwen3", "qwen3_moe"):
        config["head_dim"] = 32
    if family in _MIXTURES:
        config |= {"num_experts_per_tok": 2, "norm_topk_prob": family == "qwen3_moe"}
        config["num_local_experts" if family == "mixtral" else "num_experts"] = 4
    if family == "qwen3_moe":
        config["moe_intermediate_size"] = 32
    if family == "olmoe":
        config["clip_qkv"] = 8.0
    config |= overrides
    if family == "opt" and "word_embed_proj_dim" not in overrides:
        config["word_embed_proj_dim"] = config["hidden_size"]
    return config


def is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer of a mixture has experts."""
    dense = config.get("mlp_only_layers") or []
    return layer not in dense and (layer + 1) % config.get("decoder_sparse_step", 1) == 0


def hf_tensors(config: Mapping[str, Any], seed: int = 0) -> Arrays:
    """The tensors transformers would save for this config, random f32."""
    rng = np.random.default_rng(seed)
    family, hidden, heads = config["model_type"], config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim") or hidden // heads
    out: Arrays = {}

    def matrix(name: str, rows: int, cols: int, bias: bool = False) -> None:
        out[name + ".weight"] = (rng.normal(size=(rows, cols)) / np.sqrt(cols)).astype(np.float32)
        if bias:
            out[name + ".bias"] = rng.normal(scale=0.1, size=rows).astype(np.float32)

    def norm(name: str, width: int) -> None:
        out[name + ".weight"] = rng.normal(1.0, 0.1, size=width).astype(np.float32)
        if family == "opt":
            out[name + ".bias"] = rng.normal(scale=0.1, size=width).astype(np.float32)

    top = "model.decoder." if family == "opt" else "model."
    matrix(top + "embed_tokens", config["vocab_size"], hidden)
    if family == "opt":
        matrix(top + "embed_positions", config["max_position_embeddings"] + 2, hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"{top}layers.{i}."
        bias = family == "opt"
        qkv_bias = bias or family == "qwen2" or bool(config.get("attention_bias"))
        matrix(layer + "self_attn.q_proj", heads * head_dim, hidden, qkv_bias)
        matrix(layer + "self_attn.k_proj", kv_heads * head_dim, hidden, qkv_bias)
        matrix(layer + "self_attn.v_proj", kv_heads * head_dim, hidden, qkv_bias)
        matrix(layer + ("self_attn.out_proj" if bias else "self_attn.o_proj"), hidden, heads * head_dim, bias)
        if family in ("qwen3", "qwen3_moe"):
            norm(layer + "self_attn.q_norm", head_dim)
            norm(layer + "self_attn.k_norm", head_dim)
        if family == "olmoe":
            norm(layer + "self_attn.q_norm", heads * head_dim)
            norm(layer + "self_attn.k_norm", kv_heads * head_dim)
        if family == "opt":
            norm(layer + "self_attn_layer_norm", hidden)
            norm(layer + "final_layer_norm", hidden)
            matrix(layer + "fc1", config["ffn_dim"], hidden, True)
            matrix(layer + "fc2", hidden, config["ffn_dim"], True)
            continue
        norm(layer + "input_layernorm", hidden)
        norm(layer + "post_attention_layernorm", hidden)
        block, names = layer + "mlp.", ("gate_proj", "up_proj", "down_proj")
        prefixes, inner = [block], config["intermediate_size"]
        if family in _MIXTURES and is_sparse(config, i):
            if family == "mixtral":
                block, names = layer + "block_sparse_moe.", ("w1", "w3", "w2")
            experts = config.get("num_experts") or config["num_local_experts"]
            matrix(block + "gate", experts, hidden)
            prefixes = [f"{block}experts.{e}." for e in range(experts)]
            inner = config.get("moe_intermediate_size", inner)
        for prefix in prefixes:
            matrix(prefix + names[0], inner, hidden)
            matrix(prefix + names[1], inner, hidden)
            matrix(prefix + names[2], hidden, inner)
    norm(top + ("final_layer_norm" if family == "opt" else "norm"), hidden)
    if not config["tie_word_embeddings"]:
        matrix("lm_head", config["vocab_size"], hidden)
    return out


def as_bf16(values: np.ndarray) -> np.ndarray:
    """f32 -> bf16 bits, cut off."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: Arrays, dtype: str = "F32") -> None:
    """A safetensors file of f32 tensors stored as F32, F16 or BF16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        stored = {"F32": lambda v: v, "F16": lambda v: v.astype(np.float16), "BF16": as_bf16}[dtype](values)
        begin, data = len(data), data + stored.tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def vocabulary(size: int) -> list[str]:
    """<unk>, <s>, </s>, the 256 byte tokens, letters, words, and fillers up to ``size``."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *string.ascii_lowercase, *(word.replace(" ", "▁") for word in _WORDS)]
    return (tokens + [f"▁x{i}" for i in range(size)])[:size]


def tokenizer_json(size: int) -> str:
    """A byte-level tokenizers file: specials, 256 byte symbols, words, fillers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", "<s>", "</s>", *symbols]
    names += [f"filler{i}" for i in range(size - len(names))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names[:size])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    return str(tokenizer.to_str())


def tiny_hf(path: Path, family: str = "llama", seed: int = 0, dtype: str = "F32", **overrides: Any) -> Path:
    """A Hugging Face folder at ``path`` (made if missing); ``overrides`` go into config.json."""
    config = hf_config(family, **overrides)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.7}))
    (path / "tokenizer.json").write_text(tokenizer_json(config["vocab_size"]))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    )
    write_safetensors(path / "model.safetensors", hf_tensors(config, seed), dtype)
    return path


def interleave_heads(values: np.ndarray, heads: int) -> np.ndarray:
    """Rotate-half rows -> pairs side by side, as llama.cpp's converter stores q and k of Llama."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def gguf_tensors(config: Mapping[str, Any], tensors: Arrays, stacked: bool = True) -> Arrays:
    """The same model under GGUF's names and orders; ``stacked=False``: a tensor per expert (old Mixtral)."""
    family = config["model_type"]
    by_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(by_name[GGUF_ARCHITECTURES[family]], config["num_hidden_layers"])
    out: Arrays = {}
    experts: dict[str, list[np.ndarray]] = {}
    mixtral = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for name, values in tensors.items():
        if GGUF_ARCHITECTURES[family] == "llama":
            if ".q_proj." in name:
                values = interleave_heads(values, config["num_attention_heads"])
            if ".k_proj." in name:
                values = interleave_heads(values, config["num_key_value_heads"])
        if ".experts." in name:
            head, _, tail = name.partition(".experts.")
            _, part, _ = tail.split(".")
            part = mixtral.get(part, part)
            experts.setdefault(f"{head.replace('block_sparse_moe', 'mlp')}.experts.{part}", []).append(values)
            continue
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        out[mapped] = values
    for name, parts in experts.items():
        mapped = names.get_name(name)
        assert mapped is not None, name
        if stacked:
            out[mapped + ".weight"] = np.stack(parts)
        else:
            for e, values in enumerate(parts):
                out[f"{mapped.removesuffix('_exps')}.{e}.weight"] = values
    return out


def _write_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    if "head_dim" in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    experts = config.get("num_experts") or config.get("num_local_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "clip_qkv" in config:
        writer.add_clamp_kqv(config["clip_qkv"])


def write_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A SentencePiece-like vocabulary with byte fallback."""
    tokens = vocabulary(size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(size - 259)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (size - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def tiny_gguf(
    path: Path,
    family: str = "llama",
    type: str = "f32",
    seed: int = 0,
    stacked: bool = True,
    extra: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """A GGUF file of the model :func:`tiny_hf` makes with the same seed and overrides.

    Args:
        type: block type of the matrices ("q8_0", "q4_k" ...); norms and routers stay f32. Types gguf-py
            cannot quantise to get random blocks; blocks of 256 need sizes of 256.
        extra: further metadata: int, float, str or bool by key.
    """
    config = hf_config(family, **overrides)
    writer = gguf.GGUFWriter(path, GGUF_ARCHITECTURES[family])
    _write_metadata(writer, config)
    for key, value in (extra or {}).items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add[value.__class__](key, value)
    write_vocabulary(writer, config["vocab_size"])
    kind = gguf.GGMLQuantizationType[type.upper()]
    rng = np.random.default_rng(seed)
    for name, values in gguf_tensors(config, hf_tensors(config, seed), stacked).items():
        if values.ndim == 1 or "ffn_gate_inp" in name or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
            continue
        try:
            data = gguf.quants.quantize(values, kind)
        except NotImplementedError:
            data = random_blocks(kind, values.shape, rng)
        writer.add_tensor(name, data.view(np.uint8) if data.dtype == np.float16 else data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_llama_gguf(path: Path, type: str = "f32", seed: int = 0, **overrides: Any) -> Path:
    """A tiny Llama as GGUF; types with blocks of 256 get rows of 256."""
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type.upper()]][0]
    if block == 256:
        overrides = {"hidden_size": 256, "intermediate_size": 512, **overrides}
    elif block == 64:
        overrides = {"intermediate_size": 128, **overrides}
    return tiny_gguf(path, "llama", type, seed, **overrides)
