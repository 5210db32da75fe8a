"""Speed under a hard memory limit: ``python -m bench budget MODEL.gguf --budgets 100,75,50,35,25``.

Every system runs inside a memory cgroup of each size (page cache counts), from a cold cache; a run that the kernel
kills, or that is not done in time, is a result too. Several models, or a suite file that names them, make one table and
a picture each; with ``--cells`` a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from bench import budget_cells, budget_tables, machine, peers, report
from bench.budget_cells import BELOW_FLOOR, BELOW_FLOOR_SHARE, Cells, ceiling, is_lossy
from bench.budget_figure import plot_speed_over_memory
from bench.budget_suite import Case, case_of, read_suite
from bench.budget_tables import show
from bench.cgroup import CgroupError, CgroupResult, cgroup_refusal, run_in_cgroup
from bench.weights import read_weights

__all__ = ["CgroupError", "CgroupResult", "ceiling", "cgroup_refusal", "run_in_cgroup"]


def measure(case: Case, threads: int, cells: Cells) -> dict[str, Any]:
    """Every system of a case at every limit; returns the document of one model."""
    entries, missing = peers.entries(
        case.model, case.systems, case.peer_model, case.pack_weights, case.folder
    )
    # One limit for all: percent of the model named, or of edge's pack where that is a folder.
    sized = None if case.model.is_file() else next(iter(entries.values()), None)
    full_bytes = (sized.weights if sized else read_weights(case.model)).model_bytes if entries else 0
    document: dict[str, Any] = {
        "benchmark": "budget",
        "machine": machine.facts(),
        "model": case.model.name,
        "name": case.name,
        "full_bytes": full_bytes,
        "process_bytes": case.process_bytes,
        "threads": threads,
        "prompt_tokens": int(case.counts["prompt"]),
        "tokens": int(case.counts["tokens"]),
        "read_ahead_kib": machine.read_ahead_kib(case.model),
        "absent": missing,
        "points": [],
    }
    for percent in case.percents:
        for system, entry in entries.items():
            if _is_done_already(system, percent, document["points"]):
                continue
            request = _request(case, system, entry, percent, full_bytes, threads, entries)
            if request is None:
                continue
            rounds = int(case.count(system, "runs"))
            name = f"{case.name}-{percent:g}-{system}"
            asked = budget_cells.asked_of(system, request, rounds)
            point = cells.find(name, asked)
            if point is None:
                if percent == BELOW_FLOOR:  # which is a little different every time, and the same cell
                    request = _below_floor(request)
                point = budget_cells.measure_cell(
                    system, request, entry.weights, percent, rounds, case.process_bytes
                )
                cells.keep(name, asked, point)
            document["points"].append(point)
    return document


def _is_done_already(system: str, percent: float, points: list[dict[str, Any]]) -> bool:
    """Whether edge ran at this limit as another of its ways would: exact, or a model without records of neurons."""
    if system == "edge" or peers.system_of(system).child != "edge_decode.py":
        return False
    ran = [p for p in points if p["system"] == "edge" and p["survived"]]
    if percent == BELOW_FLOOR:  # where none runs: what it did above tells
        return bool(ran) and not any(p["neuron_mode"] for p in ran)
    here = next((p for p in ran if p["percent"] == percent), None)
    return here is not None and (not here["neuron_mode"] or (system == "edge-exact" and not is_lossy(here)))


def _request(
    case: Case,
    system: str,
    entry: peers.Entry,
    percent: float,
    full_bytes: int,
    threads: int,
    entries: dict[str, peers.Entry],
) -> peers.Request | None:
    """What is asked of a system at a limit; None where only edge can answer."""
    by_edge = peers.system_of(system).child == "edge_decode.py"
    if percent == BELOW_FLOOR and not by_edge:
        return None
    return peers.Request(
        entry.path,
        threads,
        min(entry.weights.vocab for entry in entries.values()),
        int(case.count(system, "prompt")),
        int(case.count(system, "tokens")),
        limit_bytes=int(full_bytes * percent / 100) + case.process_bytes,
        timeout_seconds=case.count(system, "timeout"),
        text=case.text if by_edge else None,
    )


def _below_floor(request: peers.Request) -> peers.Request:
    floor = budget_cells.floor_bytes(request.model, request.context, request.threads)
    return dataclasses.replace(request, limit_bytes=int(BELOW_FLOOR_SHARE * floor))


def _is_synthetic(model: Path) -> bool:
    from flashload.format import PackFile, is_pack

    if not is_pack(model):
        return False
    with PackFile(model) as pack:
        return "synthetic" in pack.metadata


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench budget", description=__doc__)
    peers.add_model_options(parser, several=True)
    parser.add_argument("--suite", type=Path, metavar="JSON", help="models and their settings")
    parser.add_argument(
        "--models-in", type=Path, metavar="DIR", help="where a suite's models lie (default: beside it)"
    )
    parser.add_argument(
        "--cells", type=Path, metavar="DIR", help="keep every finished cell here, and measure only the others"
    )
    parser.add_argument(
        "--budgets",
        default="100,75,50,35,25",
        help="limits in percent of the file, separated by commas; 0 is one that edge has to refuse",
    )
    parser.add_argument(
        "--systems", default="edge,llama.cpp-mmap", help=f"of {', '.join(peers.SYSTEMS)}, edge-lean:SHARE"
    )
    parser.add_argument(
        "--process",
        type=float,
        default=0,
        metavar="MIB",
        help="add this to every limit: for models smaller than an interpreter",
    )
    parser.add_argument("--folder", type=Path, help="the Hugging Face folder for layer-streaming")
    parser.add_argument("--tokens", type=int, default=8, help="timed tokens per run")
    parser.add_argument("--prompt", type=int, default=8, help="prompt tokens per run")
    parser.add_argument("--runs", type=int, default=3, help="cold runs of each system at each limit")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which a run is given up")
    parser.add_argument("--text", type=Path, help="measure edge's perplexity on this file (trained models)")
    report.add_output(parser)
    return parser


def _cases(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Case]:
    """What was asked for; ends the program with one line where that is nothing that can be run."""
    try:
        budgets = [float(x) for x in args.budgets.split(",")]
    except ValueError:
        parser.error(f"--budgets: expected numbers separated by commas, found {args.budgets!r}")
    defaults = {
        "budgets": budgets,
        "systems": args.systems.split(","),
        "process": args.process,
        "weights": args.weights,
        "prompt": args.prompt,
        "tokens": args.tokens,
        "runs": args.runs,
        "timeout": args.timeout,
    }
    paths = {
        key: str(getattr(args, key).resolve())
        for key in ("peer_model", "folder", "text")
        if getattr(args, key)
    }
    if len(args.models) > 1 and ("peer_model" in paths or "folder" in paths):
        parser.error("--peer-model, --folder: of one model only; a suite file names them for each")
    try:
        cases = [case_of({**defaults, **paths, "model": str(model)}, Path.cwd()) for model in args.models]
        if args.suite:
            cases += read_suite(args.suite, defaults, args.models_in)
    except ValueError as error:
        parser.error(str(error))
    if not cases:
        parser.error("expected a model or --suite")
    return [case for case in cases if _is_there(parser, case, must=case.model in args.models)]


def _is_there(parser: argparse.ArgumentParser, case: Case, must: bool) -> bool:
    """Whether a case can be run; of a suite's models those that are there are run."""
    if not case.model.exists():
        if must:
            parser.error(f"{case.model}: no such file")
        print(f"{case.name}: {case.model}: no such file", file=sys.stderr)
        return False
    if case.text and not case.text.is_file():
        parser.error(f"--text: {case.text}: no such file")
    if case.text and _is_synthetic(case.model):
        parser.error(f"--text: {case.model} has random weights, whose perplexity means nothing")
    return True


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    peers.check_options(parser, args)
    cases = _cases(parser, args)
    if refusal := cgroup_refusal():
        print(f"bench budget: {refusal}", file=sys.stderr)
        return 3
    documents = []
    for case in cases:
        document = measure(case, args.threads, Cells(args.cells))
        if not document["points"]:
            continue  # each one's reason is already on standard error
        documents.append(document)
        stem = f"budget-{case.name}"
        # One model's picture is kept as soon as it is there: the next may take an hour.
        if len(cases) == 1:
            report.put_out(stem, document, show, args, plot_speed_over_memory)
        elif args.save:
            path = report.save(stem, document)
            plot_speed_over_memory(document, path.with_suffix(".png"))
    if len(cases) > 1 and documents:
        whole = {"benchmark": "budget-suite", "machine": documents[0]["machine"], "documents": documents}
        report.put_out("budget-suite", whole, budget_tables.show_suite, args)
    return 0 if any(p["survived"] for d in documents for p in d["points"]) else 1


if __name__ == "__main__":
    sys.exit(main())
