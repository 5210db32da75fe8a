"""What `edge plan` predicts against what happens: ``python -m bench plan MODEL ...``.

For each model and budget the machine is probed anew, a fresh process loads the model, reads a prompt and then takes
random tokens one at a time (so that a mixture's routing is as uniform as the prediction assumes it to be), and its
speed, peak memory and reads stand beside the prediction for the same plan, prompt and length of text.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench import machine, report

if TYPE_CHECKING:
    from flashload.plan import Plan

#: Bars of the prediction: tokens per second and peak memory, relative.
SPEED_BAR, PEAK_BAR = 0.15, 0.03


def run_child(
    pack: str, memory_bytes: int, context: int, threads: int, prompt: int, tokens: int
) -> dict[str, Any]:
    """Loads a pack and times it; in a process of its own. The probe's figures come as JSON on standard input."""
    from edge.loading import load
    from flashload.machine import peak_rss_bytes

    figures = json.load(sys.stdin)

    with load(pack, memory=memory_bytes, context=context, threads=threads, whole_process=True) as engine:
        core, sequence = engine._core, engine._sequence
        assert core is not None and sequence is not None
        drawn = random.Random(0)
        ids = [drawn.randrange(3, engine.tokenizer.vocab_size) for _ in range(prompt + tokens)]
        sequence.set_tokens(ids[:prompt])
        start = time.perf_counter()
        while sequence.n_pending:
            sequence.advance()
        first_token_seconds = time.perf_counter() - start
        seconds, cpu_seconds = [], []
        before = core.stats()
        for i in range(tokens):
            sequence.set_tokens(ids[: prompt + i + 1])
            start, cpu = time.perf_counter(), time.process_time()
            sequence.advance()
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu)
        after = core.stats()
        peak_bytes = peak_rss_bytes()
        wanted = (after["neurons_wanted"] - before["neurons_wanted"]) / tokens
        return {
            "predicted": _predict(Path(pack), engine.plan, figures, prompt + tokens / 2, prompt, wanted),
            "neurons_wanted_per_token": wanted,
            "plan": engine.plan.to_dict(),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "time_to_first_token_seconds": first_token_seconds,
            "peak_bytes": peak_bytes,
            "flash_bytes_per_token": (after["flash_bytes"] - before["flash_bytes"]) / tokens,
            "neuron_requests_per_token": (after["neuron_requests"] - before["neuron_requests"]) / tokens,
            "hits": after["hits"] - before["hits"],
            "misses": after["misses"] - before["misses"],
            "wait_seconds": after["wait_seconds"] - before["wait_seconds"],
        }


def _predict(
    pack: Path, plan: Plan, figures: dict[str, Any], position: float, prompt: int, neurons_wanted: float
) -> dict[str, Any]:
    """The prediction for what was run; how many neurons the text needs is not the plan's to know and comes from it."""
    from flashload.estimate import CostModel
    from flashload.format import PackFile
    from flashload.plan import weights_of
    from flashload.probe import machine_from

    with PackFile(pack) as file:
        weights = weights_of(file)
        neurons = sum(w.rows for w in weights if w.name.endswith(".neurons.records"))
        share = {"active_share": neurons_wanted / neurons} if neurons_wanted else {}
        model = CostModel(weights, file.config.to_json(), machine_from(figures), **share)
    found = model.predict(plan, position=position, prompt_tokens=prompt)
    return found.to_dict() | {"peak_bytes": plan.predicted_peak_bytes}


def measure_point(pack: Path, memory_bytes: int, args: argparse.Namespace) -> dict[str, Any]:
    """One budget: a probe, a prediction, a run."""
    from flashload.format import PackFile
    from flashload.plan_neurons import is_neurons
    from flashload.probe import probe

    with PackFile(pack) as file:
        neurons = any(is_neurons(name) for name in file.entries)
    on = probe(pack.parent, args.threads, [pack], force=True, neurons=neurons)
    busy, start = machine.busy_seconds() - _children_seconds(), time.perf_counter()
    command = [sys.executable, "-m", "bench.plan", "--child", str(pack), str(memory_bytes)]
    command += ["--context", str(args.context), "--threads", str(args.threads)]
    command += ["--prompt", str(args.prompt), "--tokens", str(args.tokens)]
    done = subprocess.run(
        command,
        cwd=machine.ROOT,
        input=json.dumps(on.to_dict()),
        capture_output=True,
        text=True,
        timeout=args.timeout,
    )
    if done.returncode:
        return {
            "model": pack.name,
            "memory_bytes": memory_bytes,
            "failure": done.stderr.strip().splitlines()[-1:],
        }
    others = (machine.busy_seconds() - _children_seconds() - busy) / (time.perf_counter() - start)
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = found["seconds"]
    if args.clock == "cpu":
        seconds = [s / args.threads for s in found["cpu_seconds"]]
    # The ring and the cache even out over tokens: a streamed token's time is the mean.
    token = median(seconds) if found["plan"]["placement"] == "resident" else sum(seconds) / len(seconds)
    return {
        "model": pack.name,
        "memory_bytes": memory_bytes,
        "placement": found["plan"]["placement"],
        "predicted": found.pop("predicted"),
        "measured": found | {"tokens_per_second": 1 / token},
        "machine": {
            "bus_bytes_per_second": on.bus_bytes_per_second,
            "drive_bytes_per_second": on.drive.sequential_bytes_per_second,
            "drive_request_seconds": on.drive.request_seconds,
            "layer": vars(on.layer),
            "busy": on.busy,
        },
        "others_cpus": max(0.0, others),
    }


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def budgets(pack: Path, shares: list[float], args: argparse.Namespace) -> list[int]:
    """Budgets at these shares of the way from the floor (0) to everything in memory (1)."""
    from edge.loading import plan_host, prepare
    from flashload.errors import BudgetError

    host = prepare(pack, whole_process=True)
    try:
        full = plan_host(
            host, memory=1 << 50, context=args.context, threads=args.threads
        ).predicted_peak_bytes
        floor = full
        try:
            plan_host(host, memory=1, context=args.context, threads=args.threads)
        except BudgetError as refusal:
            floor = refusal.floor_bytes
    finally:
        host.pack.close()
    # The processes that run hold a little more or less than this one.
    slack = 4 << 20
    return [int(floor + share * (full - floor)) + slack for share in shares]


def show(document: dict[str, Any]) -> None:
    rows, notes = [], []
    for p in document["points"]:
        if "failure" in p:
            notes.append(f"{p['model']} in {p['memory_bytes'] / 1e9:.2f} GB failed: {p['failure']}")
            continue
        told, seen = p["predicted"], p["measured"]
        rows.append(
            (
                p["model"],
                f"{p['memory_bytes'] / 1e9:.2f}",
                p["placement"],
                *_pair(told["tokens_per_second"], seen["tokens_per_second"]),
                *_pair(told["time_to_first_token_seconds"], seen["time_to_first_token_seconds"]),
                *_pair(told["peak_bytes"] / 1e9, seen["peak_bytes"] / 1e9),
                f"{told['flash_bytes_per_token'] / 1e9:.3f} / {seen['flash_bytes_per_token'] / 1e9:.3f}",
                f"{p['machine']['bus_bytes_per_second'] / 1e9:.1f}",
                f"{p['machine']['drive_bytes_per_second'] / 1e9:.2f}",
                report.figure(p["others_cpus"]),
            )
        )
    columns = (
        "model",
        "GB",
        "placement",
        "tok/s told / seen",
        "off",
        f"prompt {document['prompt_tokens']} s",
        "off",
    )
    columns += ("peak GB", "off", "GB read/token", "bus GB/s", "drive GB/s", "others' cpus")
    title = f"predicted / measured, {document['threads']} threads, context {document['context']}"
    worst = max(
        (abs(_off(p, "tokens_per_second")) for p in document["points"] if "measured" in p), default=0.0
    )
    notes.append(f"largest difference in tok/s: {100 * worst:.0f} % (bar: {100 * SPEED_BAR:.0f} %)")
    notes.append(report.machine_line(document["machine"]))
    report.print_table(title, columns, rows, notes)


def _pair(told: float, seen: float) -> tuple[str, str]:
    return f"{report.figure(told)} / {report.figure(seen)}", f"{100 * (told / seen - 1):+.0f} %"


def _off(point: dict[str, Any], key: str) -> float:
    return float(point["predicted"][key] / point["measured"][key] - 1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench plan", description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="packs, GGUF files or folders")
    parser.add_argument("--child", nargs=2, metavar=("PACK", "BYTES"), help=argparse.SUPPRESS)
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
    parser.add_argument("--check", action="store_true", help="exit 1 when a prediction misses its bar")
    args = parser.parse_args(argv)
    if args.threads is None:
        from flashload.machine import cpu_count

        args.threads = cpu_count()
    args.context = args.context or args.prompt + args.tokens
    if args.child:
        found = run_child(
            args.child[0], int(args.child[1]), args.context, args.threads, args.prompt, args.tokens
        )
        print(json.dumps(found))
        return 0
    if not args.models:
        parser.error("expected at least one model")
    try:
        shares = [float(x) for x in args.shares.split(",")]
    except ValueError:
        parser.error(f"--shares: expected numbers separated by commas, found {args.shares!r}")
    from flashload.cache import ensure_packed

    document: dict[str, Any] = {
        "benchmark": "plan",
        "machine": machine.facts(),
        "threads": args.threads,
        "context": args.context,
        "prompt_tokens": args.prompt,
        "tokens": args.tokens,
        "points": [],
    }
    for model in args.models:
        pack = ensure_packed(model)
        for memory_bytes in budgets(pack, shares, args):
            point = measure_point(pack, memory_bytes, args)
            document["points"].append(point)
            if "measured" in point:
                said = _pair(point["predicted"]["tokens_per_second"], point["measured"]["tokens_per_second"])
                print(
                    f"{pack.name}, {memory_bytes / 1e9:.2f} GB: {said[0]} tok/s, {said[1]}", file=sys.stderr
                )
    report.put_out("plan", document, show, args)
    done = [p for p in document["points"] if "measured" in p]
    missed = [
        p
        for p in done
        if abs(_off(p, "tokens_per_second")) > SPEED_BAR or abs(_off(p, "peak_bytes")) > PEAK_BAR
    ]
    return 1 if not done or (args.check and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
