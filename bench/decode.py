"""Decode and prefill speed of a model that fits in memory: ``python -m bench decode MODEL.gguf``.

Each round measures the memory's read rate, then edge, then the peer, each in its own process; so a machine
whose speed drifts moves all of them alike. Figures are medians over the rounds with the smallest and largest.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import contest, machine, peers, report
from bench.contest import Contestant


def agreement(first: list[int], second: list[int]) -> int:
    """How many tokens two greedy runs have in common from the start.

    With random weights the best two logits are often close, so that rounding alone parts two correct programs
    sooner or later; parting at the first token more often than not is a sign of a wrong one.
    """
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


def summarise(one: Contestant, found: contest.Rounds) -> dict[str, Any]:
    """One contestant's medians; its share of the read rate is taken per round, against that round's own rate."""
    done, token_bytes = found.done(one.label), one.entry.weights.token_bytes
    decode = [result["decode_tokens_per_second"] for result, _ in done]
    return contest.summary(one, found) | {
        "decode_tokens_per_second": report.spread_json(decode),
        "weight_bytes_per_second": report.spread_json([rate * token_bytes for rate in decode]),
        "bandwidth_share": report.spread_json(
            [rate * token_bytes / limit for rate, (_, limit) in zip(decode, done, strict=True)]
        ),
        "prefill_tokens_per_second": report.spread_json(
            [result["prefill_tokens_per_second"] for result, _ in done]
        ),
        "generated": next((result["tokens"] for result, _ in done), []),
    }


def measure(
    model: Path, entrants: list[Contestant], missing: dict[str, str], args: argparse.Namespace
) -> dict[str, Any]:
    """Runs the rounds; returns the document that ``--json`` prints."""
    facts = machine.facts()
    with contest.competitors(args.competitor):
        found = contest.take_turns(
            entrants,
            args.runs,
            lambda: machine.read_bandwidth(args.threads)["median"],
            args.prompt,
            args.tokens,
        )
    return {
        "benchmark": "decode",
        "machine": facts,
        "model": model.name,
        "threads": args.threads,
        "competitors": args.competitor,
        "prompt_tokens": args.prompt,
        "tokens": args.tokens,
        "read_bandwidth": report.spread_json(found.limits),
        "absent": missing,
        "systems": [summarise(one, found) for one in entrants],
    }


def with_one_thread(entrants: list[Contestant]) -> list[Contestant]:
    """Each contestant, and beside it the same with one thread: what a second one brings when others are busy."""
    alone = [replace(one, label=f"{one.label}, 1 thread", threads=1) for one in entrants if one.threads > 1]
    return sorted([*entrants, *alone], key=lambda one: (one.system, -one.threads))


def show(document: dict[str, Any]) -> None:
    rows = []
    for s in document["systems"]:
        rows.append(
            (
                s["label"],
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
    notes = contest.notes(document)
    ran = [s for s in document["systems"] if s["generated"]]
    for s in ran[1:]:
        same = agreement(ran[0]["generated"], s["generated"])
        said = f"agree on the first {same} of {len(s['generated'])} greedy tokens"
        notes.append(f"{ran[0]['label']} and {s['label']} {said}")
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
    if document["competitors"]:
        notes.append(
            f"beside {document['competitors']} busy processes of one thread (counted as others' cpus)"
        )
    notes.append(f"memory read rate in the same rounds: {report.spread_text(rate, 1e9)} GB/s")
    notes.append(report.machine_line(document["machine"]))
    report.print_table(title, columns, rows, notes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench decode", description=__doc__)
    peers.add_model_options(parser)
    parser.add_argument("--tokens", type=int, default=64, help="timed tokens per run")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens per run")
    contest.add_rounds(parser, runs=5)
    parser.add_argument(
        "--competitor",
        type=int,
        default=0,
        metavar="N",
        help="N busy processes beside every run, and every system with one thread too",
    )
    parser.add_argument("--only-peer", action="store_true", help="leave edge out")
    report.add_output(parser)
    args = parser.parse_args(argv)
    peers.check_options(parser, args)
    systems = ([] if args.only_peer else ["edge"]) + args.peer
    entries, missing = peers.entries(args.model, systems, args.peer_model, args.weights)
    if not entries:
        return 1  # each one's reason is already on standard error
    entrants = contest.contestants(entries, args.threads)
    document = measure(args.model, with_one_thread(entrants) if args.competitor else entrants, missing, args)
    report.put_out(f"decode-{args.model.stem}", document, show, args)
    return 0 if contest.survived(document) else 1


if __name__ == "__main__":
    sys.exit(main())
