"""Random-weight OPT models as Hugging Face folders: the family is not known to GGUF."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from statistics import NormalDist

import numpy as np

from bench import shapes
from bench.random_blocks import F16, write_blocks


def _config(shape: shapes.Shape, end: int) -> dict[str, object]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "hidden_size": shape.hidden,
        "word_embed_proj_dim": shape.hidden,
        "ffn_dim": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.context,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "bos_token_id": end,
        "eos_token_id": end,
    }


def write_opt_settings(folder: Path, shape: shapes.Shape) -> None:
    """Writes config.json and the vocabulary files of an OPT folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens, merges, _, end = shapes.byte_bpe_vocab(shape.vocab)
    token = tokens[end]
    files: dict[str, object] = {
        "config.json": _config(shape, end),
        "vocab.json": {text: i for i, text in enumerate(tokens)},
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer",
            "bos_token": token,
            "eos_token": token,
            "add_bos_token": True,
            "added_tokens_decoder": {str(end): {"content": token, "special": True}},
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def write_opt_folder(folder: Path, shape: shapes.Shape, *, active: float = 0.5, seed: int = 0) -> int:
    """Writes config, vocabulary and one f16 safetensors file; returns that file's bytes.

    Args:
        active: share of FFN neurons that fire per token, set through the bias under the ReLU (trained OPT
            models: about 0.03; 0.5 leaves the bias at zero).
        seed: of the random bits.
    """
    write_opt_settings(folder, shape)
    # A pre-activation is about normal with deviation 1: rows of deviation 1/sqrt(d) times a normalised input.
    plan = list(shapes.opt_tensors(shape, NormalDist().inv_cdf(active)))
    header: dict[str, object] = {}
    at = 0
    for tensor in plan:
        n_bytes = 2 * prod(tensor.shape)
        header[tensor.name] = {"dtype": "F16", "shape": tensor.shape, "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    bits = np.random.SFC64(seed)
    path = folder / "model.safetensors"
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in plan:
            if tensor.constant is not None:
                out.write(np.full(tensor.shape, tensor.constant, "<f2").data)
            else:
                write_blocks(out, F16, prod(tensor.shape), tensor.std, bits)
    return path.stat().st_size
