"""How fast a prompt is read: ``python -m bench prefill MODEL.gguf --peer llama.cpp``.

Each round measures what the processor can multiply (int8, in registers, by the instructions that edge uses), then every
system in turn, each in its own process. Operations are those of the prompt's matrix products, attention left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

from bench import contest, machine, peers, report


def int8_rate(threads: int) -> float:
    """Operations per second, in a process of its own like everything that is timed."""
    code = f"import _edge; print(_edge.int8_rate({threads}, 0.5))"
    env = peers.environment(peers.SYSTEMS["edge"])
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=120
    )
    return float(done.stdout)


def summarise(one: contest.Contestant, found: contest.Rounds) -> dict[str, Any]:
    done, ops = found.done(one.label), 2 * one.entry.weights.multiply_adds
    rates = [result["prefill_tokens_per_second"] for result, _ in done]
    return contest.summary(one, found) | {
        "prefill_tokens_per_second": report.spread_json(rates),
        "operations_per_second": report.spread_json([rate * ops for rate in rates]),
        "int8_rate_share": report.spread_json(
            [rate * ops / limit for rate, (_, limit) in zip(rates, done, strict=True)]
        ),
    }


def against(systems: list[dict[str, Any]]) -> list[str]:
    """The first system's medians over each other's."""
    found = [(s["label"], s["prefill_tokens_per_second"]) for s in systems if s["prefill_tokens_per_second"]]
    return [
        f"{found[0][0]} reads {report.figure(found[0][1]['median'] / rate['median'])} times as fast as {label}"
        for label, rate in found[1:]
    ]


def show(document: dict[str, Any]) -> None:
    rows = [
        (
            s["label"],
            report.spread_text(s["prefill_tokens_per_second"]),
            report.spread_text(s["operations_per_second"], 1e12),
            report.spread_text(s["int8_rate_share"], 0.01),
            report.spread_text(s["max_rss_bytes"], 1e9),
            report.spread_text(s["foreign_cpus"]),
        )
        for s in document["systems"]
    ]
    title = (
        f"{document['model']}: prompt of {document['tokens']} tokens, {document['threads']} threads; "
        "median [smallest..largest]"
    )
    columns = ("system", "prefill tok/s", "Top/s", "% of int8 rate", "RSS GB", "others' cpus")
    rate = report.spread_text(document["int8_rate"], 1e12)
    notes = [
        *against(document["systems"]),
        *contest.notes(document),
        f"int8 rate of {document['isa']} in the same rounds: {rate} Top/s",
        report.machine_line(document["machine"]),
    ]
    report.print_table(title, columns, rows, notes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench prefill", description=__doc__)
    peers.add_model_options(parser)
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt")
    contest.add_rounds(parser, runs=3)
    report.add_output(parser)
    args = parser.parse_args(argv)
    peers.check_options(parser, args)
    entries, missing = peers.entries(args.model, ["edge", *args.peer], args.peer_model, args.weights)
    if "edge" not in entries:
        return 1  # the reason is already on standard error
    import _edge

    document: dict[str, Any] = {
        "benchmark": "prefill",
        "machine": machine.facts(),
        "model": args.model.name,
        "threads": args.threads,
        "tokens": args.tokens,
        "isa": _edge.default_isa(),
        "absent": missing,
    }
    entrants = contest.contestants(entries, args.threads)
    found = contest.take_turns(entrants, args.runs, lambda: int8_rate(args.threads), args.tokens, 1)
    document["int8_rate"] = report.spread_json(found.limits)
    document["systems"] = [summarise(one, found) for one in entrants]
    report.put_out(f"prefill-{args.model.stem}", document, show, args)
    return 0 if contest.survived(document) else 1


if __name__ == "__main__":
    sys.exit(main())
