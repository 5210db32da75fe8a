"""Attention over keys and values of every type: ``python -m bench attention [--model M]``.

One token's attention over contexts of 1k to 32k, layer after layer over more memory than the caches hold, in passes
that take turns with plain reads of the same keys and values: bytes per second, and the share of that read rate. With
``--model`` whole tokens are decoded too, behind a context filled with random keys and values; with ``--quality``
and ``--text`` the perplexity of a text is told for every type.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import _edge

from bench import machine, report
from flashload.plan_kv import KV_TYPES

#: TinyLlama 1.1B's attention.
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 64
LENGTHS = (1024, 4096, 16384, 32768)
#: Tokens that are scored together, and how many such pieces of a text.
_PIECE, _PIECES = 512, 24
_LEAST_BYTES = 96 << 20


def measure_kernel(isa: str, kv_type: str, n_tokens: int, threads: int, seconds: float) -> dict[str, Any]:
    """One type and length: seconds per layer, rates in bytes of keys and values per second."""
    made = _edge.AttentionBench(isa, kv_type, HEADS, KV_HEADS, HEAD_DIM, n_tokens, _LEAST_BYTES, threads)
    got = made.measure(seconds)
    rates = [got["bytes"] / s for s in got["seconds"]]
    reads = [got["bytes"] / s for s in got["read_seconds"]]
    return {
        "kv_type": kv_type,
        "tokens": n_tokens,
        "layer_bytes": got["bytes"] / got["layers"],
        "seconds_per_layer": report.spread_json([s / got["layers"] for s in got["seconds"]]),
        "bytes_per_second": report.spread_json(rates),
        "read_share": report.spread_json([rate / read for rate, read in zip(rates, reads, strict=True)]),
    }


def measure_model(model: str, n_tokens: int, n_decoded: int, threads: int) -> list[dict[str, Any]]:
    """Seconds per decoded token of each type; engines take turns, so that a busy neighbour slows all."""
    import edge

    engines, seconds = [], []
    for kv_type in KV_TYPES:
        engine = edge.load(model, context=n_tokens + n_decoded + 2, threads=threads, kv_type=kv_type)
        sequence = _edge.Sequence(engine._open_core())
        sequence.set_tokens([1 + i % 97 for i in range(n_tokens)])
        _edge.fill_kv(sequence, n_tokens - 1)
        engines.append((engine, sequence, _edge.Sampler({"temperature": 0.0}, engine.vocab_size)))
        seconds.append([])
    for turn in range(n_decoded + 1):
        for (_, sequence, sampler), took in zip(engines, seconds, strict=True):
            start = time.perf_counter()
            sequence.next(sampler)
            if turn:
                took.append(time.perf_counter() - start)
    rows = []
    for kv_type, (engine, _, _), took in zip(KV_TYPES, engines, seconds, strict=True):
        rows.append(
            {
                "kv_type": kv_type,
                "tokens": n_tokens,
                "kv_bytes": engine.plan.kv_bytes,
                "seconds_per_token": report.spread_json(took),
                "against_f16": median(seconds[0]) / median(took),
            }
        )
    del engines
    return rows


def measure_quality(model: str, text: str, threads: int) -> list[dict[str, Any]]:
    """Perplexity of pieces of ``text`` that fill a context of 512 tokens."""
    import edge

    rows: list[dict[str, Any]] = []
    for kv_type in KV_TYPES:
        with edge.load(model, context=_PIECE, threads=threads, kv_type=kv_type) as engine:
            tokens = engine.tokenizer.encode(text)
            scores = [
                score
                for begin in range(0, min(len(tokens), _PIECES * _PIECE) - _PIECE + 1, _PIECE)
                for score in engine.score(tokens[begin : begin + _PIECE])
                if score is not None
            ]
        perplexity = math.exp(-sum(scores) / len(scores))
        rows.append({"model": model, "kv_type": kv_type, "tokens": len(scores), "perplexity": perplexity})
        rows[-1]["loss"] = perplexity / rows[0]["perplexity"] - 1
    return rows


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The document that ``--json`` prints."""
    isa = args.isa or _edge.default_isa()
    found: dict[str, Any] = {
        "benchmark": "attention",
        "machine": machine.facts(),
        "isa": isa,
        "threads": args.threads,
    }
    found["heads"] = [HEADS, KV_HEADS, HEAD_DIM]
    found["kernels"] = [
        measure_kernel(isa, kv_type, n_tokens, args.threads, args.seconds)
        for n_tokens in args.tokens
        for kv_type in KV_TYPES
    ]
    if args.model:
        found["model"] = Path(args.model).name
        found["decode"] = measure_model(args.model, args.decode_tokens, args.decoded, args.threads)
    if args.quality:
        text = args.text.read_text()
        found["quality"] = [
            row for model in args.quality for row in measure_quality(model, text, args.threads)
        ]
    return found


def show(found: dict[str, Any]) -> None:
    """Tables."""
    rows = [
        (
            str(row["tokens"]),
            row["kv_type"],
            report.spread_text(row["seconds_per_layer"], 1e-6),
            report.spread_text(row["bytes_per_second"], 1e9),
            report.spread_text(row["read_share"], 0.01),
        )
        for row in found["kernels"]
    ]
    columns = ("tokens", "type", "us per layer", "GB/s", "% of the read loop")
    notes = [report.machine_line(found["machine"])]
    report.print_table(
        f"attention of one token, {found['isa']}, {found['threads']} threads", columns, rows, notes
    )
    if "decode" in found:
        rows = [
            (
                str(row["tokens"]),
                row["kv_type"],
                report.spread_text(row["seconds_per_token"], 1e-3),
                f"{row['against_f16']:.2f}",
                f"{row['kv_bytes'] / 2**20:.0f}",
            )
            for row in found["decode"]
        ]
        columns = ("context", "type", "ms per token", "times f16", "MiB")
        report.print_table(f"decode, {found['model']}", columns, rows, notes)


def show_quality(found: dict[str, Any]) -> None:
    """Perplexities, and what each type adds to that of f16."""
    rows = [
        (
            row["model"],
            row["kv_type"],
            f"{row['perplexity']:.4f}",
            f"{100 * row['loss']:+.3f} %",
            str(row["tokens"]),
        )
        for row in found["quality"]
    ]
    report.print_table("perplexity", ("model", "type", "perplexity", "against f16", "tokens"), rows)


def draw(found: dict[str, Any], path: Path) -> None:
    """Time of a layer over the context, a line per type."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for kv_type in KV_TYPES:
        rows = [row for row in found["kernels"] if row["kv_type"] == kv_type]
        axes.plot(
            [r["tokens"] for r in rows],
            [r["seconds_per_layer"]["median"] * 1e6 for r in rows],
            "o-",
            label=kv_type,
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="us per layer and token")
    report.plain_ticks(axes)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench attention", description=__doc__)
    parser.add_argument("--isa", help="default: the best one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--seconds", type=float, default=2.0, help="per type and length")
    parser.add_argument("--model", help="decode with this model too")
    parser.add_argument("--decode-tokens", type=int, default=16384)
    parser.add_argument("--decoded", type=int, default=12)
    parser.add_argument(
        "--quality", nargs="+", metavar="MODEL", help="perplexity of --text with these models"
    )
    parser.add_argument("--text", type=Path)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--figure", type=Path, help="write a picture here")
    args = parser.parse_args(argv)
    found = measure(args)
    if args.json:
        import json

        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.figure:
        draw(found, args.figure)
    show(found)
    if "quality" in found:
        show_quality(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
