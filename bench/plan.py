"""What `edge plan` predicts against what happens: ``python -m bench plan --check [MODEL ...]``.

For each model and budget a fresh process loads the model, reads a prompt and then takes random tokens one at a time (so
that a mixture's routing is as uniform as the prediction assumes it to be), and its speed, peak memory and reads stand
beside the prediction for the same plan, prompt and length of text. The machine is probed before and after, as it
changes from minute to minute: the prediction is the mean of the two. Without models a dense one, a mixture of experts
and a sparse one are made (4 GB, kept for the next run).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench import machine, report, synth

if TYPE_CHECKING:
    from flashload.plan import Plan
    from flashload.probe import Machine

#: Bars of the prediction, relative: key of a point -> (how it is called, bar).
BARS = {
    "tokens_per_second": ("speed", 0.15),
    "time_to_first_token_seconds": ("prompt", 0.25),
    "peak_bytes": ("peak", 0.03),
}
#: A machine that changes more than this between two probes, or on which others use more CPUs, checks nothing.
MOVED_BAR, OTHERS_BAR = 0.15, 0.2
#: Made when no model is named: kind of model, arguments of ``python -m bench synth``.
MADE = {
    "dense.gguf": ("llama-2-7b", "--type", "q4_0", "--layers", "10"),
    "moe.gguf": ("moe-8x", "--type", "q4_0", "--layers", "5"),
    "sparse.edge": ("opt-6.7b-sparse", "--format", "q4", "--layers", "8"),
}
_DONE = "done"


def run_child(
    pack: str, memory_bytes: int, context: int, threads: int, prompt: int, tokens: int
) -> dict[str, Any]:
    """Loads a pack and times it; in a process of its own.

    Tells on standard output that it is done, and reads the machine's figures from before and after on standard input.
    """
    from edge.loading import load
    from flashload.machine import peak_rss_bytes

    with load(pack, memory=memory_bytes, context=context, threads=threads, whole_process=True) as engine:
        core, sequence = engine._core, engine._sequence
        assert core is not None and sequence is not None
        drawn = random.Random(0)
        ids = [drawn.randrange(3, engine.tokenizer.vocab_size) for _ in range(prompt + tokens)]
        sequence.set_tokens(ids[:prompt])
        start, cpu = time.perf_counter(), time.process_time()
        while sequence.n_pending:
            sequence.advance()
        first_token_seconds, first_token_cpu = time.perf_counter() - start, time.process_time() - cpu
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
        plan = engine.plan
        measured = {
            "neurons_wanted_per_token": wanted,
            "plan": plan.to_dict(),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "process_seconds": time.process_time(),
            "time_to_first_token_seconds": first_token_seconds,
            "time_to_first_token_cpu_seconds": first_token_cpu,
            "peak_bytes": peak_bytes,
            "flash_bytes_per_token": (after["flash_bytes"] - before["flash_bytes"]) / tokens,
            "neuron_requests_per_token": (after["neuron_requests"] - before["neuron_requests"]) / tokens,
            "hits": after["hits"] - before["hits"],
            "misses": after["misses"] - before["misses"],
            "wait_seconds": after["wait_seconds"] - before["wait_seconds"],
        }
    print(_DONE, flush=True)
    told = [_predict(Path(pack), plan, f, prompt + tokens / 2, prompt, wanted) for f in json.load(sys.stdin)]
    return measured | {"predicted": _mean(told), "predictions": told}


def _mean(told: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the predictions' seconds and bytes; a rate is that of the mean time."""
    out = dict(told[0])
    for key, value in told[0].items():
        if not isinstance(value, (int, float)):
            continue
        values = [one[key] for one in told]
        rate = key.endswith("_per_second")
        out[key] = len(values) / sum(1 / v for v in values) if rate else sum(values) / len(values)
    return out


def _predict(
    pack: Path, plan: Plan, figures: dict[str, Any], position: float, prompt: int, neurons_wanted: float
) -> dict[str, Any]:
    """The prediction for what was run; how many neurons the text needs is not the plan's to know and comes from it."""
    from flashload.estimate import CostModel
    from flashload.format import PackFile
    from flashload.plan import directory_of, weights_of
    from flashload.probe import machine_from

    with PackFile(pack) as file:
        weights = weights_of(file)
        neurons = sum(w.rows for w in weights if w.name.endswith(".neurons.records"))
        use = directory_of(file).neurons.use
        if neurons_wanted:
            share = neurons_wanted / neurons
            use = replace(use, active_share=share, predicted_share=share)
        model = CostModel(weights, file.config.to_json(), machine_from(figures), use)
    found = model.predict(plan, position=position, prompt_tokens=prompt)
    return found.to_dict() | {"peak_bytes": plan.predicted_peak_bytes}


def kind_of(pack: Path) -> str:
    """ "dense", "MoE" or "sparse"."""
    from flashload.format import PackFile
    from flashload.plan_neurons import is_neurons

    with PackFile(pack) as file:
        if any(is_neurons(name) for name in file.entries):
            return "sparse"
        return "MoE" if file.config.n_experts else "dense"


def measure_point(
    name: str, pack: Path, kind: str, memory_bytes: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One budget: a probe, a run, a probe, and what they predict."""
    from flashload.format import PackFile
    from flashload.probe import probe

    with PackFile(pack) as file:
        formats = {int(entry.format) for entry in file.entries.values()}

    def look() -> Machine:
        return probe(pack.parent, args.threads, [pack], force=True, formats=formats)

    point = {"model": name, "kind": kind, "memory_bytes": memory_bytes}
    before = look()
    busy, start = machine.busy_seconds(), time.perf_counter()
    command = [sys.executable, "-m", "bench.plan", "--child", str(pack), str(memory_bytes)]
    command += ["--context", str(args.context), "--threads", str(args.threads)]
    command += ["--prompt", str(args.prompt), "--tokens", str(args.tokens)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            cwd=machine.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as child,
    ):
        assert child.stdin is not None and child.stdout is not None
        timer = threading.Timer(args.timeout, child.kill)
        timer.start()
        try:
            ran = child.stdout.readline().strip() == _DONE
            busy, passed = machine.busy_seconds() - busy, time.perf_counter() - start
            out = ""
            if ran:
                after = look()
                out, _ = child.communicate(json.dumps([before.to_dict(), after.to_dict()]))
        finally:
            timer.cancel()
            child.kill()
        if child.wait() or not ran or not out:
            errors.seek(0)
            why = errors.read().strip().splitlines()[-1:] or [f"nothing within {args.timeout:g} s"]
            return point | {"failure": why[0]}
    found = json.loads(out.splitlines()[-1])
    seconds = found["seconds"]
    if args.clock == "cpu":
        seconds = [s / args.threads for s in found["cpu_seconds"]]
        found["time_to_first_token_seconds"] = found["time_to_first_token_cpu_seconds"] / args.threads
    # The ring and the cache even out over tokens: a streamed token's time is the mean.
    token = median(seconds) if found["plan"]["placement"] == "resident" else sum(seconds) / len(seconds)
    speeds = [told["tokens_per_second"] for told in found["predictions"]]
    return point | {
        "placement": found["plan"]["placement"],
        "predicted": found.pop("predicted"),
        "predictions": found.pop("predictions"),
        "measured": found | {"tokens_per_second": 1 / token},
        "machine": [
            {
                "bus_bytes_per_second": on.bus_bytes_per_second,
                "drive_bytes_per_second": on.drive.sequential_bytes_per_second,
                "drive_request_seconds": on.drive.request_seconds,
                "layer": vars(on.layer),
                "busy": on.busy,
            }
            for on in (before, after)
        ],
        "machine_moved": max(speeds) / min(speeds) - 1,
        "others_cpus": max(0.0, (busy - found["process_seconds"]) / passed),
    }


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


def misses(point: dict[str, Any]) -> list[str]:
    """The bars that a point misses; empty when it passes."""
    if "failure" in point:
        return ["failed"]
    return [name for key, (name, bar) in BARS.items() if abs(_off(point, key)) > bar]


def _quiet(point: dict[str, Any]) -> bool:
    return bool(point["machine_moved"] <= MOVED_BAR and point["others_cpus"] <= OTHERS_BAR)


def show(document: dict[str, Any]) -> None:
    rows, notes = [], []
    for p in document["points"]:
        if "failure" in p:
            notes.append(f"{p['model']} in {p['memory_bytes'] / 1e9:.2f} GB failed: {p['failure']}")
            continue
        told, seen = p["predicted"], p["measured"]
        rows.append(
            (
                f"{p['model']} ({p['kind']})",
                f"{p['memory_bytes'] / 1e9:.2f}",
                p["placement"],
                *_pair(told["tokens_per_second"], seen["tokens_per_second"]),
                *_pair(told["time_to_first_token_seconds"], seen["time_to_first_token_seconds"]),
                *_pair(told["peak_bytes"] / 1e9, seen["peak_bytes"] / 1e9),
                f"{told['flash_bytes_per_token'] / 1e9:.3f} / {seen['flash_bytes_per_token'] / 1e9:.3f}",
                f"{100 * p['machine_moved']:.0f} %",
                report.figure(p["others_cpus"]),
                ", ".join(misses(p)) or "ok",
            )
        )
    columns = (
        "model",
        "GB",
        "placement",
        "tok/s told / seen",
        "off",
        f"prompt {document['prompt_tokens']} s",
    )
    columns += ("off", "peak GB", "off", "GB read/token", "moved", "others' cpus", "bars")
    title = f"predicted / measured, {document['threads']} threads, context {document['context']}"
    for kind in dict.fromkeys(p["kind"] for p in document["points"]):
        seen = [p for p in document["points"] if p["kind"] == kind and "failure" not in p]
        passed = sum(not misses(p) for p in seen)
        largest = [
            f"{name} {100 * max((abs(_off(p, key)) for p in seen), default=0.0):.1f} % (bar: {100 * bar:.0f})"
            for key, (name, bar) in BARS.items()
        ]
        notes.append(
            f"{kind}: {passed} of {sum(p['kind'] == kind for p in document['points'])} budgets within the bars; "
            f"largest differences: {', '.join(largest)}"
        )
    if restless := [p for p in document["points"] if "failure" not in p and not _quiet(p)]:
        notes.append(
            f"not quiet at {len(restless)} of {len(document['points'])} points: the prediction moved by more than "
            f"{100 * MOVED_BAR:.0f} % between two probes, or others used more than {OTHERS_BAR:g} CPUs"
        )
    notes.append(report.machine_line(document["machine"]))
    report.print_table(title, columns, rows, notes)


def _pair(told: float, seen: float) -> tuple[str, str]:
    return f"{report.figure(told)} / {report.figure(seen)}", f"{100 * (told / seen - 1):+.0f} %"


def _off(point: dict[str, Any], key: str) -> float:
    return float(point["predicted"][key] / point["measured"][key] - 1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench plan", description=__doc__)
    parser.add_argument(
        "models", nargs="*", type=Path, help="packs, GGUF files or folders; by default three are made"
    )
    parser.add_argument("--folder", type=Path, help="where they are made (default: edge's cache)")
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
    parser.add_argument("--check", action="store_true", help="exit 1 when a prediction misses a bar")
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
                *_pair(point["predicted"]["tokens_per_second"], point["measured"]["tokens_per_second"]),
                *_pair(*(point[side]["time_to_first_token_seconds"] for side in ("predicted", "measured"))),
            )
            print(f"{kind}, {model.stem}, {memory_bytes / 1e9:.2f} GB: {said}", file=sys.stderr)
    report.put_out("plan", document, show, args)
    failed = [p for p in document["points"] if misses(p)]
    return int(any("failure" in p for p in failed) or (args.check and bool(failed)))


if __name__ == "__main__":
    sys.exit(main())
