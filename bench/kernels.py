"""Matrix products against the memory's read rate: ``python -m bench kernels``.

For each format and number of activation rows M, random matrices larger than the caches are multiplied in
passes that take turns with plain read passes over the same memory, so that a busy neighbour slows both. The
share is taken pair by pair. ``--clock cpu`` counts the CPU time the threads got instead of wall time: on a
shared machine it leaves out what the scheduler gave to others, but not what others took of the memory.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from bench import machine, report
from quant.formats import TILE_FORMATS

FORMATS = {traits.name: int(code) for code, traits in TILE_FORMATS.items()}
#: Share of the read rate at M = 1 that AVX-512-VNNI is held to.
TARGETS = dict.fromkeys(FORMATS, 0.9) | {
    "q4_k": 0.88,
    "q5_k": 0.88,
    "q6_k": 0.88,
    "iq4_xs": 0.88,
    "q2_k": 0.8,
    "q3_k": 0.8,
}


def measure_one(
    isa: str, name: str, m: int, threads: int, rows: int, k: int, total_bytes: int, seconds: float, clock: str
) -> dict[str, Any]:
    """One format and M: rates in bytes of weights per second, share of the read rate pass by pass."""
    import _edge

    matrix_bytes = _edge.tile_bytes(FORMATS[name], rows, k)
    n_matrices = max(1, round(total_bytes / matrix_bytes))
    got = _edge.bench_gemv(isa, FORMATS[name], rows, k, m, n_matrices, threads, seconds)
    key, divisor = ("seconds", 1) if clock == "wall" else ("cpu_seconds", threads)
    rates = [got["gemv_bytes"] / (s / divisor) for s in got[f"gemv_{key}"]]
    reads = [got["read_bytes"] / (s / divisor) for s in got[f"read_{key}"]]
    return {
        "isa": isa,
        "format": name,
        "m": m,
        "threads": threads,
        "bytes_per_second": report.spread_json(rates),
        "read_bytes_per_second": report.spread_json(reads),
        "read_share": report.spread_json([rate / read for rate, read in zip(rates, reads, strict=True)]),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs every format and M; returns the document that ``--json`` prints."""
    import _edge

    isa = args.isa or _edge.default_isa()
    document: dict[str, Any] = {
        "machine": machine.facts(),
        "isa": isa,
        "clock": args.clock,
        "rows": args.rows,
        "k": args.k,
        "results": [],
    }
    for threads in args.threads:
        for name in args.formats:
            for m in args.m:
                document["results"].append(
                    measure_one(
                        isa, name, m, threads, args.rows, args.k, args.bytes, args.seconds, args.clock
                    )
                )
    return document


def show(document: dict[str, Any]) -> None:
    rows: list[list[str]] = []
    first: dict[tuple[str, int], tuple[int, float]] = {}
    for one in document["results"]:
        key = (one["format"], one["threads"])
        rate, share = one["bytes_per_second"], one["read_share"]
        first.setdefault(key, (one["m"], rate["median"]))
        base_m, base_rate = first[key]
        target = TARGETS[one["format"]] if one["m"] == 1 else None
        rows.append(
            [
                one["format"],
                str(one["threads"]),
                str(one["m"]),
                report.spread_text(rate, 1e9),
                report.spread_text(one["read_bytes_per_second"], 1e9),
                f"{100 * share['median']:.0f} [{100 * share['low']:.0f}..{100 * share['high']:.0f}]",
                f"{100 * target:.0f}" if target else "",
                "" if one["m"] == base_m else f"{base_rate / rate['median']:.2f} x M={base_m}",
                str(rate["runs"]),
            ]
        )
    columns = ["format", "threads", "M", "GB/s", "read GB/s", "% of read", "target", "time", "passes"]
    title = f"{document['isa']}: matrices of {document['rows']} x {document['k']}, {document['clock']} time"
    notes = [
        "Rates are bytes of weights per second: median of the passes [smallest..largest].",
        report.machine_line(document["machine"]),
    ]
    report.print_table(title, columns, rows, notes)


def worst_share(document: dict[str, Any]) -> float:
    """Smallest ratio of the share reached at M = 1 to its target; infinite when M = 1 was not measured."""
    ratios = [
        one["read_share"]["median"] / TARGETS[one["format"]] for one in document["results"] if one["m"] == 1
    ]
    return min(ratios, default=float("inf"))


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _formats(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected formats of {', '.join(FORMATS)}, found {unknown[0]!r}")
    return names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--isa", help="default: the one a model would run with (EDGE_ISA, else the best)")
    parser.add_argument("--formats", type=_formats, default=list(FORMATS), help="comma separated")
    parser.add_argument("--m", type=_integers, default=[1, 2, 4, 8, 16], help="activation rows (1,2,4,8,16)")
    parser.add_argument("--threads", type=_integers, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--bytes", type=int, default=256_000_000, help="of matrices, larger than the caches")
    parser.add_argument("--seconds", type=float, default=1.0, help="per format and M")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    report.add_output(parser)
    parser.add_argument(
        "--check", action="store_true", help="exit 1 when a share at M = 1 is below its target"
    )
    args = parser.parse_args(argv)
    document = measure(args)
    report.put_out("kernels", document, show, args)
    return 1 if args.check and worst_share(document) < 1 else 0


if __name__ == "__main__":
    sys.exit(main())
