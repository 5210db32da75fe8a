"""Decode with part of the keys and values on the drive: ``python -m bench kv MODEL.edge --tokens 4096``.

One text is computed once and saved; every share of it in memory then goes on from the saved session, so that all give
the same tokens (checked) and only decoding is timed. Figures are medians over the decoded tokens; the drive's own rate
stands beside what was read from it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _edge

from bench import machine, report
from flashload.format import PackFile
from flashload.plan import make_plan, weights_of

SHARES = (1.0, 0.5, 0.25, 0.0)
_RANGE_BYTES = 1 << 20


def open_engine(pack: Path, context: int, threads: int, share: float, folder: str) -> _edge.Engine:
    """A resident model with ``share`` of its keys and values in memory; 1.0 is no drive at all."""
    with PackFile(pack) as file:
        weights, decoder = weights_of(file), file.config.to_json()
    plan = make_plan(
        weights,
        decoder,
        memory_bytes=1 << 36,
        context=context,
        threads=threads,
        host_bytes=0,
        predictor=False,
    )
    page_tokens, _, half_bytes = _edge.kv_flash_shape(decoder)
    n_pages = -(-context // page_tokens)
    least = (plan.max_rows + page_tokens - 2) // page_tokens + 1
    options = plan.engine_options(pack, decoder, budget_bytes=1 << 36)
    if share < 1.0:
        options["kv"] = {
            "resident_pages": max(least, int(share * n_pages)),
            "range_pages": max(1, min(_RANGE_BYTES // half_bytes, n_pages)),
            "score_rows": plan.max_rows,
            "folder": folder,
        }
    return _edge.Engine(options)


def timed(action: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    value = action()
    return time.perf_counter() - start, value


def measure(pack: Path, n_tokens: int, n_decoded: int, threads: int, folder: str) -> dict[str, Any]:
    """Runs every share; returns the document that ``--json`` prints."""
    draw = random.Random(1)
    with PackFile(pack) as file:
        vocab = file.config.vocab_size
    prompt = [draw.randrange(3, vocab) for _ in range(n_tokens)]
    context = n_tokens + n_decoded + 1
    session = str(Path(folder) / "bench.session")
    sequence = _edge.Sequence(open_engine(pack, context, threads, 1.0, folder))
    sequence.set_tokens(prompt)
    prefill_seconds, _ = timed(sequence.logits)
    save_seconds, _ = timed(lambda: _edge.save_session(sequence, session))
    session_bytes = Path(session).stat().st_size
    drive = machine.drive_rate(Path(session)) if session_bytes >= 1 << 20 else None
    del sequence
    rows: list[dict[str, Any]] = []
    answers = set()
    for share in SHARES:
        engine = open_engine(pack, context, threads, share, folder)
        sequence = _edge.Sequence(engine)
        load_seconds, _ = timed(lambda s=sequence: _edge.load_session(s, session))
        sampler = _edge.Sampler({"temperature": 0.0}, vocab)
        before = engine.stats()
        tokens, seconds = [], []
        for _ in range(n_decoded):
            took, drawn = timed(lambda s=sequence, d=sampler: s.next(d))
            seconds.append(took)
            tokens.append(drawn[0])
        after = engine.stats()
        answers.add(tuple(tokens))
        read_bytes = (after["kv_read_bytes"] - before["kv_read_bytes"]) / n_decoded
        rows.append(
            {
                "share": share,
                "kv_memory_bytes": after["by_tag"]["kv cache"],
                "kv_read_bytes_per_token": read_bytes,
                "seconds_per_token": report.spread_json(seconds),
                "kv_bytes_per_second": report.spread_json([read_bytes / s for s in seconds]),
                "waited_share": (after["kv_wait_seconds"] - before["kv_wait_seconds"]) / sum(seconds),
                "load_session_seconds": load_seconds,
            }
        )
    if len(answers) != 1:
        raise SystemExit("kv: the shares answered differently")
    return {
        "benchmark": "kv",
        "machine": machine.facts(),
        "model": pack.name,
        "tokens": n_tokens,
        "threads": threads,
        "prefill_seconds": prefill_seconds,
        "session_bytes": session_bytes,
        "save_session_seconds": save_seconds,
        "drive": drive,
        "shares": rows,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench kv", description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the text before the decoded ones")
    parser.add_argument("--decoded", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", help="where the files go, on the drive to measure; default: beside the pack"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder or options.pack.parent) as folder:
        found = measure(options.pack, options.tokens, options.decoded, options.threads, folder)
    if options.json:
        print(json.dumps(found))
        return 0
    print(
        f"{found['model']}, {found['tokens']} tokens, session of {found['session_bytes'] / 2**20:.0f} MiB",
        end="",
    )
    print(
        f" saved in {found['save_session_seconds']:.2f} s; drive {json.dumps(found['drive'])}",
        file=sys.stdout,
    )
    print("in memory   MiB read/token   ms/token                 GB/s read   waiting   restored in s")
    for row in found["shares"]:
        print(
            f"{row['share']:9.2f} {row['kv_read_bytes_per_token'] / 2**20:16.1f}   "
            f"{report.spread_text(row['seconds_per_token'], 1e-3):22}   "
            f"{report.spread_text(row['kv_bytes_per_second'], 1e9):18} {row['waited_share']:6.0%} "
            f"{row['load_session_seconds']:10.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
