"""Random-weight models of real shapes: ``python -m bench synth llama-2-7b --type q4_0 --out FILE.gguf``.

Speeds measured on them are those of the real model; their text means nothing. Blocks are written as random
bits with chosen scales, so that a 4 GB file takes seconds and a few tens of megabytes of memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from bench import shapes
from bench.random_blocks import TYPES, write_blocks
from bench.replay import Replay
from bench.synth_hf import write_opt_folder
from bench.walk import Walk, successor
from flashload.errors import ModelFileError

_ROWS = 1024
_FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q8_0": 7,
    "q2_k": 10,
    "q2_k_mix": 10,
    "q3_k": 11,
    "q4_k": 14,
    "q4_k_m": 15,
    "q6_k": 18,
}


def _add_metadata(writer: GGUFWriter, shape: shapes.Shape, mix: str) -> None:
    writer.add_name(f"{shape.name} (random weights)")
    writer.add_file_type(_FILE_TYPES[mix])
    writer.add_quantization_version(2)
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    if shape.arch == "opt":
        writer.add_layer_norm_eps(shape.norm_eps)
        writer.add_max_alibi_bias(8.0)
    else:
        writer.add_layer_norm_rms_eps(shape.norm_eps)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(shape.rope_theta)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
    if shape.n_experts:
        writer.add_expert_count(shape.n_experts)
        writer.add_expert_used_count(shape.experts_per_token)
    if shape.arch == "qwen3moe":
        writer.add_expert_feed_forward_length(shape.ffn)


def _add_tokenizer(writer: GGUFWriter, shape: shapes.Shape) -> None:
    if shape.tokenizer == "spm":
        pieces, scores, types = shapes.sentencepiece_vocab(shape.vocab)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(True)
        return
    tokens, merges, types, end = shapes.byte_bpe_vocab(shape.vocab)
    pre = {"qwen3moe": "qwen2", "opt": "mpt"}[shape.arch]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types(types)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


def write_model(
    path: Path,
    shape: shapes.Shape,
    mix: str,
    *,
    as_mpt: bool = False,
    seed: int = 0,
    walk: Walk | None = None,
) -> int:
    """Writes a random model; returns the file's bytes.

    Args:
        path: the file, replaced when it exists.
        mix: one of ``shapes.MIXES``.
        as_mpt: an OPT shape under the name of MPT (same matrices), for llama.cpp, which has no OPT.
        seed: of the random bits.
        walk: planted tensors, by which text and routing are known; they are random otherwise.
    """
    if shape.arch == "opt" and not as_mpt:
        raise ValueError(f"{shape.name}: GGUF has no OPT; write it as MPT or as a folder")
    plan = list(shapes.tensors(shape, mix))
    if walk is not None:
        plan = walk.plan(plan)
    writer = GGUFWriter(path, "mpt" if as_mpt else shape.arch)
    _add_metadata(writer, shape, mix)
    _add_tokenizer(writer, shape)
    for tensor in plan:
        kind = TYPES[tensor.kind]
        row_bytes = kind.row_bytes(tensor.shape[-1])
        n_bytes = int(np.prod(tensor.shape[:-1], dtype=np.int64)) * row_bytes
        writer.add_tensor_info(
            tensor.name,
            (*tensor.shape[:-1], row_bytes),
            np.dtype(np.uint8),
            n_bytes,
            GGMLQuantizationType[tensor.kind.upper()],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    out = writer.fout[0]
    bits = np.random.SFC64(seed)
    writer.write_padding(out, out.tell())
    for tensor in plan:
        kind = TYPES[tensor.kind]
        left = int(np.prod(tensor.shape, dtype=np.int64)) // kind.values
        n_bytes = left * kind.block_bytes
        planted = walk.values(tensor.name) if walk is not None else None
        if planted is not None:
            kind_code = GGMLQuantizationType[tensor.kind.upper()]
            for first in range(0, len(planted), _ROWS):
                out.write(quantize(planted[first : first + _ROWS], kind_code).tobytes())
        elif tensor.constant is not None:
            out.write(np.full(left, tensor.constant, "<f4").data)
        else:
            write_blocks(out, kind, left, tensor.std, bits)
        writer.write_padding(out, n_bytes)
    writer.close()
    return path.stat().st_size


def _sparse(args: argparse.Namespace, shape: shapes.Shape) -> int:
    """Writes a pack by neuron (one that is there is only checked), and prints its statistics with ``--check``."""
    from bench import sparse_check, synth_sparse

    if not (args.check and args.out.exists()):
        start = time.perf_counter()
        size = synth_sparse.write_sparse(args.out, shape, args.format, args.seed, args.dense)
        _told(args.out, size, time.perf_counter() - start)
    if args.check:
        sparse_check.show(args.out, sparse_check.check(args.out, args.check))
    return 0


def _told(path: Path, size: int, seconds: float) -> None:
    print(f"{path}: {size / 1e9:.2f} GB in {seconds:.1f} s ({size / seconds / 1e6:.0f} MB/s)")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench synth", description=__doc__)
    sparse = {f"{name}-sparse": name for name, shape in shapes.SHAPES.items() if shape.arch == "opt"}
    parser.add_argument("name", choices=[*shapes.SHAPES, *sparse])
    parser.add_argument("--type", dest="mix", choices=shapes.MIXES, help="q4_0 by default; f16 for a folder")
    parser.add_argument("--out", type=Path, required=True, help="a GGUF file; for OPT a Hugging Face folder")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--as-mpt", action="store_true", help="an OPT shape as MPT, for llama.cpp")
    parser.add_argument(
        "--active", type=float, default=0.5, help="share of OPT neurons that fire (0.03 is typical)"
    )
    planted = parser.add_mutually_exclusive_group()
    planted.add_argument(
        "--routing", type=Path, help="a recorded trace that a mixture of experts replays, or uniform"
    )
    planted.add_argument(
        "--successor",
        action="store_true",
        help="a Llama shape whose greedy text is one order of all tokens, whatever came before: it copies",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=("q4", "f16"), default="q4", help="of a -sparse model's pack")
    parser.add_argument(
        "--dense",
        action="store_true",
        help="the shape of a -sparse model in matrices, to compare speeds with",
    )
    parser.add_argument(
        "--check",
        type=int,
        nargs="?",
        const=192,
        metavar="TOKENS",
        help="measure a -sparse model's activations over so many tokens (192); a file that is there is not written",
    )
    args = parser.parse_args(argv)
    shape = shapes.with_layers(shapes.SHAPES[sparse.get(args.name, args.name)], args.layers)
    if args.name in sparse:
        return _sparse(args, shape)
    if args.check:
        parser.error("--check: only for -sparse models")
    if args.as_mpt and shape.arch != "opt":
        parser.error("--as-mpt: only for OPT shapes")
    if not 0 < args.active < 1:
        parser.error(f"--active: expected a share between 0 and 1, found {args.active}")
    walk: Walk | None = None
    try:
        if args.routing:
            walk = replay = Replay(args.routing, shape, args.seed)
            shape = replace(shape, experts_per_token=replay.experts_per_token)
        elif args.successor:
            walk = successor(shape, args.seed)
    except (ValueError, ModelFileError) as error:
        parser.error(f"{'--routing' if args.routing else '--successor'}: {error}")
    start = time.perf_counter()
    if shape.arch == "opt" and not args.as_mpt:
        if args.mix not in (None, "f16"):
            parser.error("--type: OPT exists as a Hugging Face folder of f16 only, unless --as-mpt is given")
        size = write_opt_folder(args.out, shape, active=args.active, seed=args.seed)
    else:
        mix = args.mix or "q4_0"
        size = write_model(args.out, shape, mix, as_mpt=args.as_mpt, seed=args.seed, walk=walk)
    seconds = time.perf_counter() - start
    _told(args.out, size, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
