"""What speculation gains, by drafter and kind of text: ``python -m bench speculation MODEL [--draft MODEL]``.

Each round writes every prompt once without speculation and once with each setting, in one process and one engine, so
that a machine whose speed drifts moves all alike; a setting's gain is taken against the plain run of its own round.
Texts are compared token for token: a setting that changes one is a fault and ends the benchmark.

``--scripted RATE`` (a setting ``scripted:RATE:DEPTH``) guesses DEPTH tokens ahead, each right with probability RATE,
from the plain run's text and in no time: what a drafter of that acceptance would gain on this machine, whatever the
model knows.

``--copies`` takes texts that copy their prompt but for edits, and texts that have nothing to copy
(:mod:`bench.copies`), on a model made for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench import copies, machine, report
from bench.scripted import guessing, scripted

#: Kind of text -> prompts. Stories are what a small model knows; the second kind repeats itself, as edits and
#: answers about a given text do.
PROMPTS = {
    "story": (
        "Once upon a time there was a little dog",
        "The old man opened the door and",
        "Lily went to the park with her mum.",
        "One day, a big bird saw a red ball.",
    ),
    "repeats": (
        "Tom likes cake. Tom likes milk. Tom likes cake. Tom likes milk. Tom likes",
        "The cat sat on the mat. The dog sat on the mat. The bird sat on the mat. The",
        "One, two, three. One, two, three. One, two, three. One,",
    ),
}


def _one(engine: Any, prompt: list[int], setting: str, plain: list[int], args: argparse.Namespace) -> Any:
    asked: dict[str, Any] = {
        "max_tokens": args.tokens,
        "temperature": args.temperature,
        "seed": args.seed,
        "ignore_eos": True,
    }
    if not setting.startswith("scripted:"):
        return engine.generate(prompt, speculation=setting, **asked)
    rate, depth = float(setting.split(":")[1]), int(setting.split(":")[2])
    with guessing(scripted([*prompt, *plain], rate, depth, engine.vocab_size, args.seed), depth, depth + 1):
        return engine.generate(prompt, speculation="auto", **asked)


def _texts(engine: Any, args: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Kind of text -> prompts as tokens: ours, copies, or the first turns of a file of questions by their category."""
    found: dict[str, list[list[int]]] = {}
    if args.copies:
        found = copies.prompts(engine, args.tokens, args.seed)
    else:
        texts: dict[str, Sequence[str]] = dict(PROMPTS)
        if args.questions is not None:
            lines = [json.loads(line) for line in Path(args.questions).read_text().splitlines()]
            kinds = dict.fromkeys(line["category"] for line in lines)
            texts = {kind: [q["turns"][0] for q in lines if q["category"] == kind] for kind in kinds}
        longest = max(1, engine.plan.context - args.tokens)
        for kind, prompts in texts.items():
            ids = [engine.tokenizer.encode(text, add_special_tokens=True) for text in prompts]
            found[kind] = [prompt[-longest:] for prompt in ids]
    return {k: v[: args.prompts] for k, v in found.items() if not args.kind or k in args.kind}


def _drafters(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Acceptance by drafter over several runs."""
    total: dict[str, dict[str, float]] = {}
    for run in runs:
        for name, found in run["drafters"].items():
            into = total.setdefault(name, {"tried": 0, "accepted": 0, "seconds": 0.0})
            for key in into:
                into[key] += found[key]
    return {
        name: t | {"acceptance": t["accepted"] / t["tried"] if t["tried"] else 0.0}
        for name, t in total.items()
    }


def measure(engine: Any, settings: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Runs the rounds; returns the document that ``--json`` prints.

    Raises:
        RuntimeError: a setting changed a text.
    """
    facts = machine.facts()
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    texts = _texts(engine, args)
    for number in range(args.runs):
        for kind, prompts in texts.items():
            seconds: dict[str, float] = dict.fromkeys(settings, 0.0)
            done: dict[str, list[Any]] = {setting: [] for setting in settings}
            for prompt in prompts:
                plain: list[int] = []
                for setting in settings:
                    completion = _one(engine, prompt, setting, plain, args)
                    plain = plain or completion.tokens
                    if plain != completion.tokens:
                        raise RuntimeError(f"speculation={setting!r} changed the text of {kind!r}")
                    seconds[setting] += completion.stats["decode_seconds"]
                    done[setting].append(completion.stats)
            for setting in settings:
                stats = done[setting]
                decoded = sum(s["generated_tokens"] - 1 for s in stats)
                spent = [s["speculation"] for s in stats]
                passes = sum(s["passes"] + s["plain_passes"] for s in spent)
                runs.setdefault((kind, setting), []).append(
                    {
                        "tokens_per_second": decoded / seconds[setting],
                        "gain": seconds[settings[0]] / seconds[setting],
                        "tokens_per_pass": decoded / passes if passes else 1.0,
                        "drafters": _drafters(spent),
                        "saved_seconds": sum(s["saved_seconds"] for s in spent),
                    }
                )
        print(f"round {number + 1}/{args.runs}", file=sys.stderr)
    return {
        "benchmark": "speculation",
        "machine": facts,
        "model": Path(args.model).name,
        "draft": None if args.draft is None else Path(args.draft).name,
        "notes": list(engine.notes),
        "threads": engine.plan.threads,
        "placement": engine.plan.placement,
        "temperature": args.temperature,
        "tokens": args.tokens,
        "results": [
            {
                "text": kind,
                "speculation": setting,
                "tokens_per_second": report.spread_json([r["tokens_per_second"] for r in found]),
                "gain": report.spread_json([r["gain"] for r in found]),
                "tokens_per_pass": median(r["tokens_per_pass"] for r in found),
                "saved_seconds": median(r["saved_seconds"] for r in found),
                "drafters": _drafters(found),
            }
            for (kind, setting), found in runs.items()
        ],
        "pass_ms": pass_ms(engine, args) if args.passes else [],
    }


def _chain_of(depth: int, text: list[int], max_nodes: int) -> list[tuple[int, int]]:
    return [(text[-1], i) for i in range(min(depth, max_nodes - 1))]


def pass_ms(engine: Any, args: argparse.Namespace) -> list[tuple[int, float]]:
    """(rows, median milliseconds) of passes that verify chains which never come true."""
    import _edge

    table = []
    for rows in (1, 2, 3, 4, 6, 8, 12, 16):
        speculator = _edge.Speculator(engine._core)
        speculator.configure(depth=max(1, rows - 1), max_rows=max(2, rows))
        if rows > 1:
            speculator.add_callback(partial(_chain_of, rows - 1))
        sampler = _edge.Sampler({"temperature": 0.0}, engine.vocab_size)
        sequence = engine._sequence
        sequence.set_tokens(engine.tokenizer.encode(PROMPTS["story"][0], add_special_tokens=True))
        for number in range(4 + args.passes):
            speculator.step(sequence, sampler, 1 if number < 4 or rows == 1 else 64, [])
        table.append((rows, dict(speculator.stats()["pass_ms"]).get(rows, 0.0)))
    return table


def show(document: dict[str, Any]) -> None:
    rows = []
    for r in document["results"]:
        drafters = ", ".join(
            f"{name} {d['acceptance']:.0%} of {d['tried']:.0f}"
            for name, d in r["drafters"].items()
            if d["tried"]
        )
        rows.append(
            (
                r["text"],
                r["speculation"],
                report.spread_text(r["tokens_per_second"]),
                report.spread_text(r["gain"]),
                report.figure(r["tokens_per_pass"]),
                drafters or "-",
            )
        )
    first = document["pass_ms"][0][1] if document["pass_ms"] else 0
    costs = ", ".join(f"{rows}: {ms:.3g} ({ms / first:.2f}x)" for rows, ms in document["pass_ms"] if first)
    title = (
        f"{document['model']}, draft {document['draft'] or '-'}, {document['placement']}, "
        f"{document['threads']} threads, temperature {document['temperature']}; median [smallest..largest]"
    )
    columns = ("text", "speculation", "tok/s", "gain over off", "tokens/pass", "guesses accepted")
    notes = [f"a pass over m rows, ms (against one row): {costs}"] if costs else []
    if any(r["speculation"].startswith("scripted:") for r in document["results"]):
        notes.append(
            "scripted:RATE:DEPTH: guesses right with that probability, in no time and with no memory"
        )
    notes += document["notes"]
    report.print_table(title, columns, rows, [*notes, report.machine_line(document["machine"])])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench speculation", description=__doc__)
    parser.add_argument("model", nargs="?", default="story", help="pack, GGUF, folder or shipped model")
    parser.add_argument("--draft", help="a smaller model of the same vocabulary")
    parser.add_argument("--memory", help="ceiling, such as 2GiB")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each text")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument(
        "--passes", type=int, default=24, help="passes for each row of the cost table; 0: none"
    )
    parser.add_argument("--prompts", type=int, help="of each kind of text, at most")
    parser.add_argument("--kind", action="append", default=[], help="kind of text; repeatable, default: all")
    parser.add_argument(
        "--questions", help="JSON lines with category and turns (Spec-Bench), in place of our prompts"
    )
    parser.add_argument(
        "--copies", action="store_true", help="texts that copy: for a model of synth --successor"
    )
    parser.add_argument(
        "--scripted", action="append", default=[], metavar="RATE", help="repeatable; see above"
    )
    parser.add_argument("--depth", type=int, default=7, help="how far ahead --scripted guesses")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        help="repeatable; default: auto and each drafter; lookup and auto with --copies",
    )
    report.add_output(parser)
    args = parser.parse_args(argv)
    import edge
    from edge.speculation import DRAFTERS

    with edge.load(
        args.model, memory=args.memory, context=args.context, threads=args.threads, draft=args.draft
    ) as engine:
        there = [name for name in DRAFTERS if engine.can_draft(name)]
        asked = [*args.setting, *(f"scripted:{rate}:{args.depth}" for rate in args.scripted)]
        usual = ["lookup", "auto"] if args.copies else ["auto", *there]
        settings = ["off", *(asked or usual)]
        document = measure(engine, settings, args)
    report.put_out("speculation-" + document["model"], document, show, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
