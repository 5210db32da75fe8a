"""One budget of ``python -m bench plan``: a process that loads a model and times it, between two probes of the machine,
and what is predicted for the same plan from each of them; and from what the drive gave right before and right after the
prompt and the tokens, which on a drive that others use may be another rate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import harmonic_mean, median
from typing import Any

from bench import machine
from flashload.estimate import CostModel
from flashload.format import PackFile
from flashload.plan import directory_of, weights_of
from flashload.probe import READ_BYTES, Machine, machine_from, probe

_DONE = "done"
#: A smaller file is read from one place of the drive only, or from its cache.
_LEAST_FILE_BYTES = 64 << 20


def run_child(
    pack: str, memory_bytes: int, context: int, threads: int, prompt: int, tokens: int
) -> dict[str, Any]:
    """Loads a pack and times it; in a process of its own.

    Tells on standard output when the model is loaded, when the prompt is read and when all is done; goes on when it
    gets a line, and at last reads figures of the machine on standard input: of the probes, then what the drive gave at
    each of the three moments.
    """
    from edge.loading import load
    from flashload.machine import peak_rss_bytes

    with load(pack, memory=memory_bytes, context=context, threads=threads, whole_process=True) as engine:
        core, sequence = engine._core, engine._sequence
        assert core is not None and sequence is not None
        drawn = random.Random(0)
        ids = [drawn.randrange(3, engine.tokenizer.vocab_size) for _ in range(prompt + tokens)]
        sequence.set_tokens(ids[:prompt])
        _pause()
        start, cpu = time.perf_counter(), time.process_time()
        while sequence.n_pending:
            sequence.advance()
        first_token_seconds, first_token_cpu = time.perf_counter() - start, time.process_time() - cpu
        seconds, cpu_seconds = [], []
        _pause()
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
    figures, rates = json.load(sys.stdin)
    cost = _cost_model(Path(pack), wanted)

    def tell(on: Machine) -> dict[str, Any]:
        found = cost(on).predict(plan, position=prompt + tokens / 2, prompt_tokens=prompt)
        return found.to_dict() | {"peak_bytes": plan.predicted_peak_bytes}

    probed = [machine_from(f) for f in figures]
    told = [tell(on) for on in probed]
    met = [
        _mean([tell(at_rate(on, harmonic_mean(around))) for on in probed])
        for around in itertools.pairwise(rates)
    ]
    as_met = met[1] | {key: met[0][key] for key in ("time_to_first_token_seconds", "prompt_tokens")}
    return measured | {"predicted": _mean(told), "predictions": told, "predicted_as_met": as_met}


def _pause() -> None:
    print(_DONE, flush=True)
    sys.stdin.readline()


def at_rate(on: Machine, bytes_per_second: float) -> Machine:
    """The machine with a drive that is so fast in a row, and in everything else by the same factor."""
    factor = bytes_per_second / on.drive.sequential_bytes_per_second
    points = [p | {"bytes_per_second": factor * p["bytes_per_second"]} for p in on.drive.points]
    drive = replace(
        on.drive,
        request_seconds=on.drive.request_seconds / factor,
        bytes_per_second=on.drive.bytes_per_second * factor,
        sequential_bytes_per_second=bytes_per_second,
        points=points,
    )
    return replace(on, drive=drive)


def _drive_rate(pack: Path, probed: Machine) -> float:
    """Bytes per second of one long stream: the better of two; what was probed where the file is too small for it."""
    import _edge

    if pack.stat().st_size < _LEAST_FILE_BYTES:
        return probed.drive.sequential_bytes_per_second
    reads = (
        _edge.bench_read(str(pack), bytes_per_request=READ_BYTES, depth=32, seconds=0.15, sequential=True)
        for _ in range(2)
    )
    return float(max(read["bytes_per_second"] for read in reads))


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


def _cost_model(pack: Path, neurons_wanted: float) -> Callable[[Machine], CostModel]:
    """Predicts on a machine; how many neurons the text needs is not the plan's to know and comes from what was run."""
    with PackFile(pack) as file:
        weights = weights_of(file)
        neurons = sum(w.rows for w in weights if w.name.endswith(".neurons.records"))
        use = directory_of(file).neurons.use
        if neurons_wanted:
            share = neurons_wanted / neurons
            use = replace(use, active_share=share, predicted_share=share)
        decoder = file.config.to_json()
    return lambda on: CostModel(weights, decoder, on, use)


def measure_point(
    name: str, pack: Path, kind: str, memory_bytes: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One budget: a probe, a run with three looks at the drive, a probe, and what they predict."""
    with PackFile(pack) as file:
        formats = {int(entry.format) for entry in file.entries.values()}

    def look() -> Machine:
        return probe(pack.parent, args.threads, [pack], force=True, formats=formats)

    point = {"model": name, "kind": kind, "memory_bytes": memory_bytes}
    before = look()
    busy, start = machine.busy_seconds(), time.perf_counter()
    command = [sys.executable, "-m", "bench.plan_point", str(pack), "--memory", str(memory_bytes)]
    for option in ("context", "threads", "prompt", "tokens"):
        command += [f"--{option}", str(getattr(args, option))]
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
            rates: list[float] = []
            while len(rates) < 3 and child.stdout.readline().strip() == _DONE:
                rates.append(_drive_rate(pack, before))
                if len(rates) < 3:
                    child.stdin.write("\n")
                    child.stdin.flush()
            ran = len(rates) == 3
            busy, passed = machine.busy_seconds() - busy, time.perf_counter() - start
            out = ""
            if ran:
                after = look()
                out, _ = child.communicate(json.dumps([[before.to_dict(), after.to_dict()], rates]))
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
        "predicted_as_met": found.pop("predicted_as_met"),
        "drive_met_bytes_per_second": rates,
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


def main() -> None:
    parser = argparse.ArgumentParser(description="the process that is timed")
    parser.add_argument("pack")
    for name in ("memory", "context", "threads", "prompt", "tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    found = run_child(args.pack, args.memory, args.context, args.threads, args.prompt, args.tokens)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
