"""Every format of every runtime on the same matrices, in turn: ``python -m bench peers [MODEL.gguf]``.

One row (decode) and a prompt's rows (prefill) are multiplied with matrices of real shapes by edge, llama.cpp's ggml,
onnxruntime and torch, each in a process of its own, of which one computes at a time. A MODEL is run as a whole too,
by edge and llama.cpp. ``EDGE_PEER_PYTHON`` names an interpreter with llama-cpp-python, onnxruntime and onnx,
``EDGE_TORCH_PYTHON`` one with torch; what is not there costs a line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench import contest, machine, peers, report
from bench.peers import products, tables

_SHAPES = ("4096x4096", "4096x11008", "2048x5632")


def _shape(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    try:
        found = int(rows), int(cols)
    except ValueError:
        found = 0, 0
    if found[0] < 64 or found[1] < 256 or found[0] % 16 or found[1] % 256:
        raise argparse.ArgumentTypeError(
            f"expected ROWSxCOLS, multiples of 16 and 256 from 64 on, found {text!r}"
        )
    return found


def _names(known: tuple[str, ...]) -> Any:
    def names(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found {unknown[0]!r}")
        return text.split(",")

    return names


def measure_model(
    model: Path, threads: int, rounds: int, prompt_tokens: int, tokens: int
) -> dict[str, Any] | None:
    """Decode and prefill of whole tokens by edge and llama.cpp, in turn; None where neither runs it."""
    entries, missing = peers.entries(model, ["edge", "llama.cpp"])
    if not entries:
        return None
    entrants = contest.contestants(entries, threads)
    found = contest.take_turns(
        entrants, rounds, lambda: machine.read_bandwidth(threads)["median"], prompt_tokens, tokens
    )
    systems: list[dict[str, Any]] = []
    for one in entrants:
        done, weights = found.done(one.label), one.entry.weights
        decode = [result["decode_tokens_per_second"] for result, _ in done]
        prefill = [result["prefill_tokens_per_second"] for result, _ in done]
        systems.append(
            contest.summary(one, found)
            | {
                "decode_tokens_per_second": report.spread_json(decode),
                "prefill_tokens_per_second": report.spread_json(prefill),
                "operations_per_second": report.spread_json(
                    [2 * rate * weights.multiply_adds for rate in prefill]
                ),
                "read_share": report.spread_json(
                    [
                        rate * weights.token_bytes / limit
                        for rate, (_, limit) in zip(decode, done, strict=True)
                    ]
                ),
            }
        )
    document: dict[str, Any] = {"model": model.name, "prompt_tokens": prompt_tokens, "systems": systems}
    return document | {"failures": [*missing.values(), *contest.notes(document)]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    peers.add_model_options(parser, several=True)
    parser.add_argument("--shapes", type=_shape, nargs="*", default=[_shape(text) for text in _SHAPES])
    parser.add_argument(
        "--runtimes",
        type=_names(tuple(products.RUNTIMES)),
        default=list(products.RUNTIMES),
        help="comma separated",
    )
    parser.add_argument(
        "--formats", type=_names(products.FORMATS), default=list(products.FORMATS), help="comma separated"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 512], help="activation rows M")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument("--seconds", type=float, default=0.1, help="of a format's turn")
    parser.add_argument(
        "--bytes", type=int, default=128_000_000, help="of a format's matrices, larger than the caches"
    )
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a model's prompt")
    parser.add_argument("--tokens", type=int, default=32, help="that a model decodes")
    report.add_output(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    peers.check_options(parser, args)
    if min(args.rows) < 1:
        parser.error(f"--rows: expected at least 1, found {min(args.rows)}")
    document: dict[str, Any] = {
        "benchmark": "peers",
        "machine": machine.facts(),
        "threads": args.threads,
        "batches": args.rows,
        "rounds": args.runs,
        "seconds": args.seconds,
        "shapes": [],
        "models": [],
    }
    with products.children(args.runtimes, args.threads) as (found, missing):
        document["absent"] = missing
        for shape in args.shapes:
            document["shapes"].append(
                products.measure_shape(
                    found, shape, args.formats, args.rows, args.runs, args.seconds, args.bytes
                )
            )
    for model in args.models:
        measured = measure_model(model, args.threads, args.runs, args.prompt, args.tokens)
        document["models"] += [measured] if measured else []
    report.put_out("peers", document, tables.show, args, tables.plot)
    timed = any(shape["products"] for shape in document["shapes"])
    return 0 if timed or any(map(contest.survived, document["models"])) else 1


if __name__ == "__main__":
    sys.exit(main())
