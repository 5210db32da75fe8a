"""A process whose budget changes while it generates, or whose neighbour eats the memory of their cgroup; prints JSON.

``live_child.py PACK shrink MEMORY LESS`` measures what it holds after every change; ``live_child.py PACK hog MEMORY
PRESSURE BYTES`` starts a process that takes BYTES little by little, and lets it go at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import edge
from flashload.machine import rss_bytes

N_TOKENS = 400
HOG = """
import sys, time
held, n_bytes = [], int(sys.argv[1])
for _ in range(0, n_bytes, 1 << 20):
    held.append(bytearray(b"x" * (1 << 20)))
    time.sleep(0.03)
print("full", flush=True)
sys.stdin.read()
"""


def tokens_of(engine: edge.Engine, n: int) -> list[int]:
    return engine.generate("a b c", max_tokens=n, temperature=0, ignore_eos=True, speculation="off").tokens


def shrink(pack: str, memory: int, less: int) -> None:
    with edge.load(pack, memory=memory, context=256, threads=2, whole_process=True, pressure="off") as engine:
        rows = []
        for budget in (memory, less, memory, less):
            engine.set_memory(budget)
            tokens = tokens_of(engine, 32)
            rows.append(
                (budget, rss_bytes(), engine.plan.placement, engine.plan.predicted_peak_bytes, tokens)
            )
    print(json.dumps(rows))


def hog(pack: str, memory: int, pressure: str, n_bytes: int) -> None:
    settings = {"max_tokens": N_TOKENS, "temperature": 0, "ignore_eos": True, "speculation": "off"}
    with edge.load(
        pack, memory=memory, context=512, threads=2, whole_process=True, pressure=pressure
    ) as engine:
        want = engine.generate("a b c", **settings).tokens
        neighbour = subprocess.Popen(
            [sys.executable, "-c", HOG, str(n_bytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert neighbour.stdout is not None and neighbour.stdin is not None
        os.set_blocking(neighbour.stdout.fileno(), False)
        same = True
        while not neighbour.stdout.read():
            same &= engine.generate("a b c", **settings).tokens == want
        low = engine.plan.memory_bytes
        alive = neighbour.poll() is None
        neighbour.stdin.close()
        neighbour.wait()
        while engine.plan.memory_bytes < memory and pressure == "auto":
            same &= engine.generate("a b c", **settings).tokens == want
        print(
            json.dumps({"same": same, "low": low, "neighbour_lived": alive, "changes": engine.memory_changes})
        )


if __name__ == "__main__":
    verb, pack = sys.argv[2], sys.argv[1]
    if verb == "shrink":
        shrink(pack, int(sys.argv[3]), int(sys.argv[4]))
    else:
        hog(pack, int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
