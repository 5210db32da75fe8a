"""Decode and prefill speed of a model that fits in memory: ``python -m bench decode MODEL.gguf``.

Each round measures the memory's read rate, then edge, then the peer, each in its own process; so a machine
whose speed drifts moves all of them alike. Figures are medians over the rounds with the smallest and largest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench import machine, peers, report
from bench.weights import Weights


def agreement(first: list[int], second: list[int]) -> int:
    """How many tokens two greedy runs have in common from the start.

    With random weights the best two logits are often close, so that rounding alone parts two correct programs
    sooner or later; parting at the first token more often than not is a sign of a wrong one.
    """
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


def summarise(name: str, runs: list[peers.Run], bandwidth: list[float], weights: Weights) -> dict[str, Any]:
    """One system's medians; its share of the read rate is taken per round, against that round's own rate."""
    done = [(run, rate) for run, rate in zip(runs, bandwidth, strict=True) if run.result]

    decode = [run.result["decode_tokens_per_second"] for run, _ in done if run.result]
    return {
        "system": name,
        "options": peers.SYSTEMS[name].options,
        "weights": {"token_bytes": weights.token_bytes, **vars(weights)},
        "version": next((run.loaded["version"] for run in runs if run.loaded), None),
        "runs": len(runs),
        "survived": len(done),
        "failures": sorted({run.failure for run in runs if run.failure}),
        "decode_tokens_per_second": report.spread_json(decode),
        "weight_bytes_per_second": report.spread_json([rate * weights.token_bytes for rate in decode]),
        "bandwidth_share": report.spread_json(
            [rate * weights.token_bytes / limit for rate, (_, limit) in zip(decode, done, strict=True)]
        ),
        "prefill_tokens_per_second": report.spread_json(
            [run.result["prefill_tokens_per_second"] for run, _ in done if run.result]
        ),
        "load_seconds": report.spread_json([run.loaded["seconds"] for run in runs if run.loaded]),
        "max_rss_bytes": report.spread_json([float(run.finished.max_rss_bytes) for run, _ in done]),
        "foreign_cpus": report.spread_json([run.foreign_cpus for run, _ in done]),
        "generated": next((run.result["tokens"] for run, _ in done if run.result), []),
    }


def measure(
    model: Path,
    entries: dict[str, peers.Entry],
    missing: dict[str, str],
    threads: int,
    prompt_tokens: int,
    tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """Runs the rounds; returns the document that ``--json`` prints."""
    facts = machine.facts()
    vocab = min((entry.weights.vocab for entry in entries.values()), default=0)
    bandwidth: list[float] = []
    runs: dict[str, list[peers.Run]] = {name: [] for name in entries}
    for number in range(rounds if entries else 0):
        bandwidth.append(machine.read_bandwidth(threads)["median"])
        for name, entry in entries.items():
            run = peers.run(name, peers.Request(entry.path, threads, vocab, prompt_tokens, tokens))
            runs[name].append(run)
            print(f"round {number + 1}/{rounds}, {name}: {peers.brief(run)}", file=sys.stderr)
    return {
        "benchmark": "decode",
        "machine": facts,
        "model": model.name,
        "threads": threads,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "read_bandwidth": report.spread_json(bandwidth),
        "absent": missing,
        "systems": [summarise(name, found, bandwidth, entries[name].weights) for name, found in runs.items()],
    }


def show(document: dict[str, Any]) -> None:
    rows, notes = [], []
    for s in document["systems"]:
        rows.append(
            (
                s["system"],
                f"{s['weights']['token_bytes'] / 1e9:.3f}",
                report.spread_text(s["decode_tokens_per_second"]),
                report.spread_text(s["weight_bytes_per_second"], 1e9),
                report.spread_text(s["bandwidth_share"], 0.01),
                report.spread_text(s["prefill_tokens_per_second"]),
                report.spread_text(s["load_seconds"]),
                report.spread_text(s["max_rss_bytes"], 1e9),
                report.spread_text(s["foreign_cpus"]),
            )
        )
        notes += [
            f"{s['system']}: {s['runs'] - s['survived']} of {s['runs']} failed: {why}"
            for why in s["failures"]
        ]
        if peers.SYSTEMS[s["system"]].says and s["version"]:
            notes.append(f"{s['system']} {s['version']}: {peers.SYSTEMS[s['system']].says}")
    ran = [s for s in document["systems"] if s["generated"]]
    for s in ran[1:]:
        same = agreement(ran[0]["generated"], s["generated"])
        said = f"agree on the first {same} of {len(s['generated'])} greedy tokens"
        notes.append(f"{ran[0]['system']} and {s['system']} {said}")
    title = (
        f"{document['model']}: {document['threads']} threads, prompt {document['prompt_tokens']}, "
        f"{document['tokens']} tokens; median [smallest..largest]"
    )
    columns = (
        "system",
        "weights/token GB",
        "decode tok/s",
        "GB/s",
        "% of read rate",
        "prefill tok/s",
        "load s",
        "RSS GB",
        "others' cpus",
    )
    rate = document["read_bandwidth"]
    notes.append(f"memory read rate in the same rounds: {report.spread_text(rate, 1e9)} GB/s")
    notes.append(report.machine_line(document["machine"]))
    report.print_table(title, columns, rows, notes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench decode", description=__doc__)
    peers.add_model_options(parser)
    parser.add_argument("--tokens", type=int, default=64, help="timed tokens per run")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens per run")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        choices=[n for n in peers.SYSTEMS if n != "edge"],
        help="repeatable",
    )
    parser.add_argument("--only-peer", action="store_true", help="leave edge out")
    report.add_output(parser)
    args = parser.parse_args(argv)
    peers.check_options(parser, args)
    systems = ([] if args.only_peer else ["edge"]) + args.peer
    entries, missing = peers.entries(args.model, systems, args.peer_model, args.weights)
    if not entries:
        return 1  # each one's reason is already on standard error
    document = measure(args.model, entries, missing, args.threads, args.prompt, args.tokens, args.runs)
    report.put_out(f"decode-{args.model.stem}", document, show, args)
    return 0 if any(s["survived"] for s in document["systems"]) else 1


if __name__ == "__main__":
    sys.exit(main())
