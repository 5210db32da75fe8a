"""What writing the points of an answer together gains: ``python -m bench skeleton MODEL``.

The skeleton is given, and texts have a fixed length: small models write no skeletons, and random weights no texts, so
this measures speed and nothing else. Each round, in one process and one engine, writes

- ``together``: all points in one batch, their common prefix computed once (what Skeleton-of-Thought does);
- ``one by one``: the same points as single requests, which find the prefix of the one before in memory;
- ``prefix each time``: the same, with nothing left in memory from the point before;
- ``in one go``: one plain text as long as all points together;
- ``skeleton``: a text as long as the skeleton, from its prompt: what comes before the points.

The points must be equal token for token, else the benchmark fails. Nothing is speculated unless
``--speculation`` says so, and then only where texts are written alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from bench import machine, report

QUESTION = "What helps people to live a healthy life?"
TITLES = (
    "Enough sleep",
    "Daily exercise",
    "Fresh food",
    "Clean water",
    "Good friends",
    "Less stress",
    "Time outdoors",
    "Regular check-ups",
)
ARMS = ("together", "one by one", "prefix each time", "in one go", "skeleton")


def _timed(work: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def one_round(engine: Any, n_points: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each arm over the same points, and the tokens of prompts that were computed for them.

    Raises:
        RuntimeError: the points differ between arms.
    """
    from edge.skeleton import SkeletonOfThought
    from edge.skeleton_prompts import SKELETON_REPLY, skeleton_prompt

    titles = TITLES[:n_points]
    prompts = SkeletonOfThought(engine).point_prompts(QUESTION, titles)
    encode = engine.tokenizer.encode
    listed = "\n".join(f"{i}. {title}" for i, title in enumerate(titles, 1))
    asked = {"max_tokens": args.tokens, "temperature": args.temperature, "ignore_eos": True}
    alone = asked | {"speculation": args.speculation}

    def together() -> list[Any]:
        return list(engine.generate_many(prompts, max_parallel=n_points, seed=args.seed, **asked))

    def one_by_one() -> list[Any]:
        return [engine.generate(ids, seed=args.seed + i, **alone) for i, ids in enumerate(prompts)]

    seconds: dict[str, float] = {}
    texts: dict[str, list[Any]] = {}
    for arm, work in (("together", together), ("one by one", one_by_one)):
        engine.forget()
        seconds[arm], texts[arm] = _timed(work)
    seconds["prefix each time"], texts["prefix each time"] = 0.0, []
    for i, ids in enumerate(prompts):
        engine.forget()
        spent, text = _timed(lambda ids=ids, i=i: engine.generate(ids, seed=args.seed + i, **alone))
        seconds["prefix each time"] += spent
        texts["prefix each time"].append(text)
    expected = [one.tokens for one in texts["one by one"]]
    for arm, found in texts.items():
        if [one.tokens for one in found] != expected:
            raise RuntimeError(f"skeleton: the points written {arm!r} are not those written one by one")
    whole = encode(QUESTION, add_special_tokens=True)
    plan = encode(f"{skeleton_prompt(QUESTION)}\n{SKELETON_REPLY}", add_special_tokens=True)
    n_skeleton = len(encode(listed))
    for arm, ids, n_tokens in (
        ("in one go", whole, n_points * args.tokens),
        ("skeleton", plan, n_skeleton),
    ):
        engine.forget()
        wanted = alone | {"max_tokens": n_tokens, "seed": args.seed}
        seconds[arm], _ = _timed(lambda ids=ids, wanted=wanted: engine.generate(ids, **wanted))
    computed = {
        arm: sum(one.stats["prompt_tokens"] - one.stats["reused_tokens"] for one in found)
        for arm, found in texts.items()
    }
    # Together, the prefix counts as known to every point; one computation of it made it so.
    computed["together"] += max(one.stats["reused_tokens"] for one in texts["together"])
    return {"seconds": seconds, "prompt_tokens_computed": computed, "skeleton_tokens": n_skeleton}


def measure(engine: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the rounds; returns the document that ``--json`` prints."""
    facts = machine.facts()
    rounds: dict[int, list[dict[str, Any]]] = {n: [] for n in args.points}
    for number in range(args.runs):
        for n_points, found in rounds.items():
            found.append(one_round(engine, n_points, args))
        print(f"round {number + 1}/{args.runs}", file=sys.stderr)
    return {
        "benchmark": "skeleton",
        "machine": facts,
        "model": Path(args.model).name,
        "placement": engine.plan.placement,
        "threads": engine.plan.threads,
        "context": engine.plan.context,
        "tokens": args.tokens,
        "temperature": args.temperature,
        "speculation": args.speculation,
        "skeleton": "given",
        "notes": list(engine.notes),
        "results": [_result(n_points, found) for n_points, found in rounds.items()],
    }


def _result(n_points: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    def gain(slow: tuple[str, ...], fast: tuple[str, ...]) -> dict[str, float] | None:
        pairs = [[sum(r["seconds"][arm] for arm in arms) for arms in (slow, fast)] for r in rounds]
        return report.spread_json([a / b for a, b in pairs])

    return {
        "points": n_points,
        "skeleton_tokens": rounds[0]["skeleton_tokens"],
        "prompt_tokens_computed": rounds[0]["prompt_tokens_computed"],
        "seconds": {arm: report.spread_json([r["seconds"][arm] for r in rounds]) for arm in ARMS},
        "gain_points": gain(("one by one",), ("together",)),
        "gain_points_over_prefix_each_time": gain(("prefix each time",), ("together",)),
        "gain_end_to_end": gain(("skeleton", "one by one"), ("skeleton", "together")),
        "gain_over_one_go": gain(("in one go",), ("skeleton", "together")),
    }


def show(document: dict[str, Any]) -> None:
    rows = []
    for r in document["results"]:
        for arm in ARMS:
            computed = r["prompt_tokens_computed"].get(arm)
            rows.append(
                (
                    str(r["points"]),
                    arm,
                    report.spread_text(r["seconds"][arm]),
                    "-" if computed is None else str(computed),
                )
            )
    notes = [
        f"{r['points']} points: together {report.spread_text(r['gain_points'])}x faster than one by one; with the "
        f"skeleton before both {report.spread_text(r['gain_end_to_end'])}x; than a text of that length in one go "
        f"{report.spread_text(r['gain_over_one_go'])}x"
        for r in document["results"]
    ]
    title = (
        f"{document['model']}, {document['placement']}, {document['threads']} threads, {document['tokens']} tokens a "
        f"point, skeleton given, speculation {document['speculation']}; median [smallest..largest]"
    )
    columns = ("points", "written", "seconds", "prompt tokens computed")
    report.print_table(
        title, columns, rows, [*notes, *document["notes"], report.machine_line(document["machine"])]
    )


def plot(document: dict[str, Any], path: Path) -> None:
    """Seconds of each way to write the points; PNG at ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 3.6), layout="constrained")
    results = document["results"]
    bars = ("together", "one by one", "prefix each time")
    for place, arm in enumerate(bars):
        at = [i + 0.25 * (place - 1) for i in range(len(results))]
        before = [r["seconds"]["skeleton"]["median"] for r in results]
        spread = [r["seconds"][arm] for r in results]
        errors = (
            [s["median"] - s["low"] for s in spread],
            [s["high"] - s["median"] for s in spread],
        )
        axes.bar(at, before, 0.23, color="0.8", label="skeleton" if place == 0 else None)
        axes.bar(at, [s["median"] for s in spread], 0.23, bottom=before, yerr=errors, label=f"points {arm}")
    axes.set_xticks(range(len(results)), [f"{r['points']} points" for r in results])
    axes.set_ylabel("seconds")
    axes.set_title(f"{document['model']}, {document['tokens']} tokens a point, skeleton given", fontsize=10)
    report.save_figure(figure, axes, document, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench skeleton", description=__doc__)
    parser.add_argument("model", nargs="?", default="story", help="pack, GGUF, folder or shipped model")
    parser.add_argument("--memory", help="ceiling, such as 2GiB")
    parser.add_argument("--context", type=int, help="default: the model's, at most 4096")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--points", type=int, action="append", help="repeatable, 1 to 8; default: 5 and 8")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each point")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--speculation", default="off", help="of the texts that are written alone")
    report.add_output(parser)
    args = parser.parse_args(argv)
    args.points = args.points or [5, 8]
    if not all(1 <= n <= len(TITLES) for n in args.points):
        parser.error(f"--points: expected 1 to {len(TITLES)}")
    import edge

    with edge.load(args.model, memory=args.memory, context=args.context, threads=args.threads) as engine:
        document = measure(engine, args)
    report.put_out(f"skeleton-{document['model']}", document, show, args, plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
