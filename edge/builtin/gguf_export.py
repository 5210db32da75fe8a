"""Writes a built-in model's Hugging Face directory as GGUF, in float32, for engines that read that.

    python -m edge.builtin.gguf_export --model DIR --out FILE

Llama and Mixtral directories with SiLU: GGUF's `llama` has no other activation, so a ReLU model is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from flashload.errors import ArgumentError, EdgeError, ModelFileError

_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
}
_EXPERTS = {"w1": "ffn_gate_exps.weight", "w2": "ffn_down_exps.weight", "w3": "ffn_up_exps.weight"}
_NORMAL, _CONTROL = 1, 3  # token types

Array = NDArray[np.float32]


def _interleave(rows: Array, head_dim: int) -> Array:
    """Rows of each head from RoPE's rotate-half order to the side-by-side pairs that GGUF's llama rotates."""
    heads = rows.reshape(-1, 2, head_dim // 2, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(rows.shape))


def _tensors(config: dict[str, Any], weights: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    if "lm_head.weight" in weights:
        yield "output.weight", weights["lm_head.weight"]
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        for ours, theirs in _NAMES.items():
            value = weights.get(prefix + ours)
            if value is not None:
                turned = ours.endswith(("q_proj.weight", "k_proj.weight"))
                yield f"blk.{i}.{theirs}", _interleave(value, config["head_dim"]) if turned else value
        for ours, theirs in _EXPERTS.items() if config.get("num_local_experts") else ():
            names = [
                f"{prefix}block_sparse_moe.experts.{e}.{ours}.weight"
                for e in range(config["num_local_experts"])
            ]
            yield f"blk.{i}.{theirs}", np.stack([weights[name] for name in names])


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("num_local_experts"):
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    """Byte-level BPE with GPT-2's pre-tokenizer, which is what the recipe trains."""
    model = tokenizer["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([_CONTROL if token in special else _NORMAL for token in vocabulary])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(True)


def export(folder: Path, out: Path) -> None:
    """Writes the directory as one float32 GGUF file, whole or not at all.

    Raises:
        ModelFileError: a file of the directory is missing or damaged.
        ArgumentError: the model's activation is not SiLU.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        weights = load_file(folder / "model.safetensors")
    except Exception as error:  # safetensors raises its own type, json and the file system theirs
        raise ModelFileError(f"{folder}: expected a Hugging Face directory, found {error}") from error
    if config["hidden_act"] != "silu":
        raise ArgumentError(
            f"{folder}: hidden_act: expected silu for GGUF's llama, found {config['hidden_act']}"
        )
    temporary = out.with_name(out.name + ".tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    _add_metadata(writer, config)
    _add_tokenizer(writer, tokenizer, config)
    for name, value in _tensors(config, weights):
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m edge.builtin.gguf_export", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--out", type=Path, required=True, help="GGUF file to write")
    args = parser.parse_args(argv)
    try:
        export(args.model, args.out)
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
