"""From opening a model to its first token: ``python -m bench open MODEL.gguf --peer llama.cpp``.

The page cache holds every file; the time runs from the call that loads (interpreter and imports left out) to the
first token after a short prompt. Each round measures the memory's read rate, then every system in turn, each in
its own process.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from bench import contest, machine, peers, report


def summarise(one: contest.Contestant, found: contest.Rounds) -> dict[str, Any]:
    return contest.summary(one, found) | {
        "first_token_seconds": report.spread_json(
            [result["first_token_seconds"] for result, _ in found.done(one.label)]
        )
    }


def show(document: dict[str, Any]) -> None:
    rows = [
        (
            s["label"],
            report.spread_text(s["load_seconds"]),
            report.spread_text(s["first_token_seconds"]),
            f"{100 * s['cached_share']:.0f}",
            report.spread_text(s["max_rss_bytes"], 1e9),
            report.spread_text(s["foreign_cpus"]),
        )
        for s in document["systems"]
    ]
    title = (
        f"{document['model']}: {document['threads']} threads, prompt of {document['prompt_tokens']} tokens, "
        "page cache warm; median [smallest..largest]"
    )
    columns = ("system", "load s", "to the first token s", "% in page cache", "RSS GB", "others' cpus")
    rate = report.spread_text(document["read_bandwidth"], 1e9)
    notes = [
        *contest.notes(document),
        f"memory read rate in the same rounds: {rate} GB/s",
        report.machine_line(document["machine"]),
    ]
    report.print_table(title, columns, rows, notes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench open", description=__doc__)
    peers.add_model_options(parser)
    parser.add_argument("--prompt", type=int, default=8, help="prompt tokens")
    contest.add_rounds(parser, runs=3)
    report.add_output(parser)
    args = parser.parse_args(argv)
    peers.check_options(parser, args)
    entries, missing = peers.entries(args.model, ["edge", *args.peer], args.peer_model, args.weights)
    if not entries:
        return 1  # each one's reason is already on standard error
    entrants = contest.contestants(entries, args.threads)

    def before() -> float:
        for path in {one.entry.path for one in entrants}:
            contest.warm_cache(path)
        return machine.read_bandwidth(args.threads)["median"]

    document: dict[str, Any] = {
        "benchmark": "open",
        "machine": machine.facts(),
        "model": args.model.name,
        "threads": args.threads,
        "prompt_tokens": args.prompt,
        "absent": missing,
    }
    found = contest.take_turns(entrants, args.runs, before, args.prompt, 1)
    document["read_bandwidth"] = report.spread_json(found.limits)
    document["systems"] = [
        summarise(one, found) | {"cached_share": machine.cached_share(one.entry.path)} for one in entrants
    ]
    report.put_out(f"open-{args.model.stem}", document, show, args)
    return 0 if contest.survived(document) else 1


if __name__ == "__main__":
    sys.exit(main())
