"""Speed under a hard memory limit: ``python -m bench budget MODEL.gguf --budgets 100,75,50,35,25``.

Every system runs inside a memory cgroup of each size (page cache counts), from a cold cache; a run that the
kernel kills is a result too. The drive's rate is measured before every run, and beside the figures stands
what a placement that pins what fits and streams the rest could reach at that rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench import machine, peers, report
from bench.cgroup import CgroupError, CgroupResult, cgroup_refusal, run_in_cgroup
from bench.report import Spread
from bench.weights import Weights, read_weights

__all__ = ["CgroupError", "CgroupResult", "cgroup_refusal", "run_in_cgroup"]


def ceiling(weights: Weights, limit_bytes: int, drive_rate: float, memory_rate: float) -> float:
    """tok/s of an ideal pin-and-stream placement: reading and computing overlap, nothing else takes memory.

    Args:
        drive_rate: bytes per second, sequential.
        memory_rate: bytes per second of the memory bus; every weight of a token crosses it once.
    """
    streaming_seconds = weights.streamed_bytes(limit_bytes) / drive_rate
    return 1.0 / max(streaming_seconds, weights.token_bytes / memory_rate)


def measure_point(
    system: str,
    request: peers.Request,
    weights: Weights,
    percent: float,
    rounds: int,
    process_bytes: int = 0,
) -> dict[str, Any]:
    """One system at one limit: ``rounds`` cold runs.

    The memory is measured before each run, the drive before and after it: the better of the two counts,
    because a neighbour can only slow a measurement down.
    """
    runs: list[peers.Run] = []
    drives: list[float] = []
    memories: list[float] = []
    warm_share = 0.0
    files = sorted(request.model.glob("*.safetensors")) if request.model.is_dir() else [request.model]
    largest = max(files, key=lambda file: file.stat().st_size)
    for number in range(rounds):
        before = machine.drive_rate(largest)["bytes_per_second"]
        memories.append(machine.read_bandwidth(request.threads)["median"])
        how = ", ".join(sorted({machine.drop_cache(file) for file in files}))
        warm_share = max(warm_share, *(machine.cached_share(file) for file in files))
        run = peers.run(system, request)
        runs.append(run)
        drives.append(max(before, machine.drive_rate(largest)["bytes_per_second"]))
        print(f"{percent:g} %, {system}, run {number + 1}/{rounds}: {peers.brief(run)}", file=sys.stderr)
    done = [run.result for run in runs if run.result]
    drive, memory = Spread.of(drives), Spread.of(memories)
    assert drive is not None and memory is not None
    failures = sorted({run.failure for run in runs if run.failure})
    return {
        "system": system,
        "options": peers.SYSTEMS[system].options,
        "version": next((run.loaded["version"] for run in runs if run.loaded), None),
        "weights": {"token_bytes": weights.token_bytes, **vars(weights)},
        "percent": percent,
        "limit_bytes": request.limit_bytes,
        "runs": rounds,
        "survived": len(done),
        "killed": sum(isinstance(run.finished, CgroupResult) and run.finished.killed for run in runs),
        "outcome": "; ".join(failures) or "survived",
        "neuron_mode": next(
            (r.loaded["neuron_mode"] for r in runs if r.loaded and "neuron_mode" in r.loaded), ""
        ),
        "perplexity": report.spread_json([r["perplexity"] for r in done if r.get("perplexity")]),
        "exits": [run.finished.returncode for run in runs],
        "tokens_per_second": report.spread_json([r["decode_tokens_per_second"] for r in done]),
        "read_bytes_per_token": report.spread_json([r["read_bytes_per_token"] for r in done]),
        "read_bytes": report.spread_json([float(run.finished.drive_read_bytes) for run in runs]),
        "peak_bytes": report.spread_json(
            [float(run.finished.peak_bytes) for run in runs if isinstance(run.finished, CgroupResult)]
        ),
        "load_seconds": report.spread_json([run.loaded["seconds"] for run in runs if run.loaded]),
        "foreign_cpus": report.spread_json([run.foreign_cpus for run in runs]),
        "drive_bytes_per_second": drive.json(),
        "memory_bytes_per_second": memory.json(),
        "ceiling_tokens_per_second": ceiling(
            weights, request.limit_bytes - process_bytes, drive.median, memory.median
        ),
        "cache_emptied_by": how,
        "cached_share_before": warm_share,
    }


def measure(
    model: Path,
    entries: dict[str, peers.Entry],
    missing: dict[str, str],
    percents: list[float],
    threads: int,
    prompt_tokens: int,
    tokens: int,
    rounds: int,
    timeout_seconds: float,
    text: Path | None = None,
    process_bytes: int = 0,
) -> dict[str, Any]:
    """Every system at every limit; returns the document that ``--json`` prints.

    Args:
        text: what edge's perplexity is measured on (models by neuron that were trained); None measures none.
        process_bytes: added to every limit.
    """
    facts = machine.facts()
    vocab = min((entry.weights.vocab for entry in entries.values()), default=0)
    # One limit for all: percent of the model named, or of edge's pack where that is a folder.
    sized = None if model.is_file() else next(iter(entries.values()), None)
    full_bytes = (sized.weights if sized else read_weights(model)).model_bytes if entries else 0
    points = []
    for percent in percents:
        for name, entry in entries.items():
            request = peers.Request(
                entry.path,
                threads,
                vocab,
                prompt_tokens,
                tokens,
                limit_bytes=int(full_bytes * percent / 100) + process_bytes,
                timeout_seconds=timeout_seconds,
                text=text if peers.SYSTEMS[name].package == "edge" and name != "naive" else None,
            )
            points.append(measure_point(name, request, entry.weights, percent, rounds, process_bytes))
    return {
        "benchmark": "budget",
        "machine": facts,
        "model": model.name,
        "full_bytes": full_bytes,
        "process_bytes": process_bytes,
        "threads": threads,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "read_ahead_kib": machine.read_ahead_kib(model),
        "absent": missing,
        "points": points,
    }


def join(document: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Adds the points of an earlier document on the same model to ``document``, which goes before it.

    Raises:
        ValueError: it is of another benchmark or model.
    """
    for key in ("benchmark", "model", "full_bytes", "process_bytes"):
        if earlier.get(key, 0) != document[key]:
            raise ValueError(f"{key}: expected {document[key]!r}, found {earlier.get(key)!r}")
    new = {(p["system"], p["percent"]) for p in document["points"]}
    old = [p for p in earlier["points"] if (p["system"], p["percent"]) not in new]
    document["points"] = sorted([*old, *document["points"]], key=lambda p: -float(p["percent"]))
    facts = earlier["machine"]
    document["earlier"] = [*earlier.get("earlier", []), {"date": facts["date"], "commit": facts["commit"]}]


def show(document: dict[str, Any]) -> None:
    rows = []
    scored = any(p.get("perplexity") for p in document["points"])
    for p in document["points"]:
        rows.append(
            (
                f"{p['percent']:g} % = {p['limit_bytes'] / 1e9:.2f} GB",
                p["system"] + (" (lossy)" if report.is_lossy(p) else ""),
                f"{p['survived']}/{p['runs']}",
                report.spread_text(p["tokens_per_second"]),
                report.figure(p["ceiling_tokens_per_second"]),
                report.spread_text(p["read_bytes_per_token"], 1e9),
                report.spread_text(p["read_bytes"], 1e9),
                report.spread_text(p["peak_bytes"], 1e9),
                report.spread_text(p["drive_bytes_per_second"], 1e9),
                report.spread_text(p["foreign_cpus"]),
                *([report.spread_text(p.get("perplexity"))] if scored else []),
            )
        )
    title = (
        f"{document['model']}, {document['full_bytes'] / 1e9:.2f} GB: {document['threads']} threads, "
        f"prompt {document['prompt_tokens']}, {document['tokens']} tokens; median [smallest..largest]"
    )
    columns = (
        "limit",
        "system",
        "survived",
        "tok/s",
        "pin+stream allows",
        "GB read/token",
        "GB read, whole run",
        "peak GB",
        "drive GB/s",
        "others' cpus",
        *(["perplexity"] if scored else []),
    )
    notes = [
        f"{p['percent']:g} %, {p['system']}: {p['outcome']}"
        for p in document["points"]
        if p["survived"] < p["runs"]
    ]
    for name in dict.fromkeys(p["system"] for p in document["points"]):
        notes.append(f"{name}: {peers.SYSTEMS[name].says}")
    if any(report.is_lossy(p) for p in document["points"]):
        notes.append(
            "lossy: a predictor decides which neurons count, and leaves some out that the model would use"
        )
    if document.get("process_bytes"):
        notes.append(
            f"limits are percent of the model and {document['process_bytes'] / 2**20:g} MiB for the process"
        )
    ahead = document["read_ahead_kib"]
    notes.append(f"kernel read-ahead of the drive: {'not known' if ahead is None else f'{ahead} KiB'}")
    emptied = {p["cache_emptied_by"] for p in document["points"]}
    warm = max((p["cached_share_before"] for p in document["points"]), default=0.0)
    notes.append(f"cache emptied by {', '.join(sorted(emptied))}; largest share left before a run {warm:.1%}")
    notes.append(report.machine_line(document["machine"]))
    notes += [f"with points of {one['date']}, commit {one['commit']}" for one in document.get("earlier", [])]
    report.print_table(title, columns, rows, notes)


def _is_synthetic(model: Path) -> bool:
    from flashload.format import PackFile, is_pack

    if not is_pack(model):
        return False
    with PackFile(model) as pack:
        return "synthetic" in pack.metadata


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench budget", description=__doc__)
    peers.add_model_options(parser)
    parser.add_argument(
        "--budgets", default="100,75,50,35,25", help="limits in percent of the file, separated by commas"
    )
    parser.add_argument("--systems", default="edge,llama.cpp-mmap", help=f"of {', '.join(peers.SYSTEMS)}")
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
    parser.add_argument(
        "--with",
        dest="earlier",
        type=Path,
        metavar="JSON",
        help="add the points of an earlier run on this model",
    )
    report.add_output(parser)
    args = parser.parse_args(argv)
    systems = args.systems.split(",")
    for name in systems:
        if name not in peers.SYSTEMS:
            parser.error(f"--systems: {name!r} is not one of {', '.join(peers.SYSTEMS)}")
    try:
        percents = [float(x) for x in args.budgets.split(",")]
    except ValueError:
        parser.error(f"--budgets: expected numbers separated by commas, found {args.budgets!r}")
    if not all(0 < x <= 1000 for x in percents):
        parser.error(f"--budgets: expected percents above 0 and up to 1000, found {args.budgets!r}")
    peers.check_options(parser, args)
    if refusal := cgroup_refusal():
        print(f"bench budget: {refusal}", file=sys.stderr)
        return 3
    if not 0 <= args.process <= 1 << 20:
        parser.error(f"--process: expected 0 to {1 << 20} MiB, found {args.process:g}")
    if args.text and not args.text.is_file():
        parser.error(f"--text: {args.text}: no such file")
    if args.text and _is_synthetic(args.model):
        parser.error(f"--text: {args.model} has random weights, whose perplexity means nothing")
    earlier = None
    if args.earlier:
        try:
            earlier = json.loads(args.earlier.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"--with: {args.earlier}: {error}")
    entries, missing = peers.entries(args.model, systems, args.peer_model, args.weights, args.folder)
    if not entries:
        return 1  # each one's reason is already on standard error
    document = measure(
        args.model,
        entries,
        missing,
        percents,
        args.threads,
        args.prompt,
        args.tokens,
        args.runs,
        args.timeout,
        args.text,
        int(args.process * 2**20),
    )
    if earlier is not None:
        try:
            join(document, earlier)
        except (ValueError, KeyError) as error:
            print(f"--with: {args.earlier}: {error}", file=sys.stderr)  # what was measured is still shown
    report.put_out(f"budget-{args.model.stem}", document, show, args, report.plot_speed_over_memory)
    return 0 if any(p["survived"] for p in document["points"]) else 1


if __name__ == "__main__":
    sys.exit(main())
