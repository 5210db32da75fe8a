"""What `edge plan` predicts against what happens: ``python -m bench plan --check [MODEL ...]``.

For each model and budget a fresh process loads the model, reads a prompt and then takes random tokens one at a time (so
that a mixture's routing is as uniform as the prediction assumes it to be), and its speed, peak memory and reads stand
beside the prediction for the same plan, prompt and length of text. The machine is probed before and after, as it
changes from minute to minute: the prediction is the mean of the two. Without models a dense one, a mixture of experts
and a sparse one are made (4 GB, kept for the next run).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench import machine, report, synth
from bench.plan_point import measure_point
from bench.plan_table import misses, pair, show

#: Made when no model is named: kind of model, arguments of ``python -m bench synth``.
MADE = {
    "dense.gguf": ("llama-2-7b", "--type", "q4_0", "--layers", "10"),
    "moe.gguf": ("moe-8x", "--type", "q4_0", "--layers", "5"),
    "sparse.edge": ("opt-6.7b-sparse", "--format", "q4", "--layers", "8"),
}


def kind_of(pack: Path) -> str:
    """ "dense", "MoE" or "sparse"."""
    from flashload.format import PackFile
    from flashload.plan_neurons import is_neurons

    with PackFile(pack) as file:
        if any(is_neurons(name) for name in file.entries):
            return "sparse"
        return "MoE" if file.config.n_experts else "dense"


def budgets(pack: Path, shares: list[float], args: argparse.Namespace) -> list[int]:
    """Budgets at these shares of the way from the floor (0) to everything in memory (1)."""
    from edge.host import prepare
    from edge.options import PlanOptions
    from edge.placing import plan_host
    from flashload.errors import BudgetError

    host = prepare(pack, whole_process=True)
    try:
        full = plan_host(host, PlanOptions(1 << 50, args.context, args.threads)).predicted_peak_bytes
        floor = full
        try:
            plan_host(host, PlanOptions(1, args.context, args.threads))
        except BudgetError as refusal:
            floor = refusal.floor_bytes
    finally:
        host.pack.close()
    # The processes that run hold a little more or less than this one.
    slack = 4 << 20
    return [int(floor + share * (full - floor)) + slack for share in shares]


def made_models(folder: Path) -> list[Path]:
    """One model of each kind, written where it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, arguments in MADE.items():
        if not (folder / name).exists():
            made = folder / f"new-{name}"
            synth.main([*arguments, "--out", str(made)])
            made.rename(folder / name)
    return [folder / name for name in MADE]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench plan", description=__doc__)
    parser.add_argument(
        "models", nargs="*", type=Path, help="packs, GGUF files or folders; by default three are made"
    )
    parser.add_argument("--folder", type=Path, help="where they are made (default: edge's cache)")
    parser.add_argument(
        "--shares", default="0.25,0.6,1", help="budgets between the floor (0) and everything (1)"
    )
    parser.add_argument("--context", type=int, help="default: prompt and tokens, so that the cache is filled")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time, for what is in memory on a machine that is not quiet, with --threads 1",
    )
    parser.add_argument("--timeout", type=float, default=600)
    report.add_output(parser)
    parser.add_argument("--check", action="store_true", help="exit 1 when a prediction misses a bar")
    args = parser.parse_args(argv)
    if args.threads is None:
        from flashload.machine import cpu_count

        args.threads = cpu_count()
    args.context = args.context or args.prompt + args.tokens
    try:
        shares = [float(x) for x in args.shares.split(",")]
    except ValueError:
        parser.error(f"--shares: expected numbers separated by commas, found {args.shares!r}")
    from flashload.cache import cache_folder, ensure_packed

    document: dict[str, Any] = {
        "benchmark": "plan",
        "machine": machine.facts(),
        "threads": args.threads,
        "context": args.context,
        "prompt_tokens": args.prompt,
        "tokens": args.tokens,
        "points": [],
    }
    for model in args.models or made_models(args.folder or cache_folder() / "bench-plan"):
        pack = ensure_packed(model)
        kind = kind_of(pack)
        for memory_bytes in budgets(pack, shares, args):
            point = measure_point(model.stem, pack, kind, memory_bytes, args)
            document["points"].append(point)
            said = point.get("failure") or "{} tok/s, {}; prompt {} s, {}".format(
                *pair(point["predicted"]["tokens_per_second"], point["measured"]["tokens_per_second"]),
                *pair(*(point[side]["time_to_first_token_seconds"] for side in ("predicted", "measured"))),
            )
            print(f"{kind}, {model.stem}, {memory_bytes / 1e9:.2f} GB: {said}", file=sys.stderr)
    report.put_out("plan", document, show, args)
    failed = [p for p in document["points"] if misses(p)]
    return int(any("failure" in p for p in failed) or (args.check and bool(failed)))


if __name__ == "__main__":
    sys.exit(main())
