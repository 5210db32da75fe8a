"""Neuron kernels on scattered records against the memory's read rate: ``python -m bench neurons``.

Each pass takes one row (dot) or column (axpy) of records picked at random from memory larger than the caches; the
rate counts those bytes. ``read`` is a plain sequential pass over as much memory.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from bench import machine, report

FORMATS = {"f16": 20, "q8": 21, "q4": 22}


def measure_one(
    isa: str, name: str, hidden: int, m: int, threads: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One format, width and number of activation rows: bytes of rows per second."""
    import _edge

    record = 3 * _edge.neuron_rows(0, FORMATS[name], bytes(4 * hidden), 1, hidden, False).nbytes
    n_records = max(args.active, args.bytes // record)
    got = _edge.bench_neurons(isa, FORMATS[name], hidden, n_records, args.active, m, threads, args.seconds)
    read = _edge.read_bandwidth(threads, args.bytes, args.seconds / 4, isa) * 1e9
    rates = {op: [got["bytes"] / s for s in got[f"{op}_seconds"]] for op in ("dot", "axpy")}
    return {
        "isa": isa,
        "format": name,
        "hidden": hidden,
        "m": m,
        "threads": threads,
        "read_bytes_per_second": read,
        **{op: report.spread_json(rate) for op, rate in rates.items()},
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs every combination; returns the document that ``--json`` prints."""
    import _edge

    isa = args.isa or _edge.default_isa()
    cases = [
        (name, hidden, m, threads)
        for threads in args.threads
        for hidden in args.hidden
        for name in args.formats
        for m in args.m
    ]
    results = [measure_one(isa, name, hidden, m, threads, args) for name, hidden, m, threads in cases]
    return {"machine": machine.facts(), "isa": isa, "active": args.active, "results": results}


def show(document: dict[str, Any]) -> None:
    rows = [
        [
            one["format"],
            str(one["hidden"]),
            str(one["threads"]),
            str(one["m"]),
            report.spread_text(one["dot"], 1e9),
            report.spread_text(one["axpy"], 1e9),
            f"{one['read_bytes_per_second'] / 1e9:.1f}",
            str(one["dot"]["runs"]),
        ]
        for one in document["results"]
    ]
    columns = ["format", "hidden", "threads", "M", "dot GB/s", "axpy GB/s", "read GB/s", "passes"]
    title = f"{document['isa']}: {document['active']} neurons at random places"
    notes = [
        "Rates are bytes of rows or columns per second: median of the passes [smallest..largest].",
        report.machine_line(document["machine"]),
    ]
    report.print_table(title, columns, rows, notes)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench neurons",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--isa", help="default: the one a model would run with (EDGE_ISA, else the best)")
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(FORMATS))
    parser.add_argument("--hidden", type=_integers, default=[4096], help="comma separated")
    parser.add_argument("--m", type=_integers, default=[1, 4], help="activation rows")
    parser.add_argument("--threads", type=_integers, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--active", type=int, default=2000, help="neurons of a pass")
    parser.add_argument("--bytes", type=int, default=256_000_000, help="of records, larger than the caches")
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    report.add_output(parser)
    args = parser.parse_args(argv)
    document = measure(args)
    report.put_out("neurons", document, show, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
