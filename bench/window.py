"""Slots of a model by neuron against what must be read: ``python -m bench window PACK``.

A text is decoded token by token with so many of each layer's records in memory, under policies from "the last tokens"
(half-life 0) to "the most used": the share of wanted neurons that had a slot, bytes read and requests per token. The
figures are of the text, not of the machine. Without ``--text`` the model writes its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import machine, report

if TYPE_CHECKING:
    import _edge

_SLACK_BYTES = 64 << 20


def options_of(path: Path, decoder: dict[str, Any], share: float, mode: str, context: int) -> dict[str, Any]:
    """Of a core engine with this share of each layer's records in memory; mode: "exact" or "predictor" decides."""
    from flashload.format import PackFile
    from flashload.plan import NEURONS, RESIDENT, UNUSED

    placements, slots, weight_bytes = [], [], 0
    with PackFile(path) as pack:
        for name, entry in pack.entries.items():
            is_predictor = ".predictor." in name
            is_used = not name.startswith("medusa.") and not (is_predictor and mode == "exact")
            placement, n_slots = RESIDENT if is_used else UNUSED, 0
            if name.endswith(".neurons.records"):
                placement, n_slots = NEURONS, int(share * entry.rows)
            elif name.endswith(".neurons.gates"):
                placement, n_slots = (NEURONS, entry.rows) if mode == "exact" else (UNUSED, 0)
            placements.append(placement)
            slots.append(n_slots)
            weight_bytes += entry.stored_bytes
    return {
        "pack_path": str(path),
        "decoder": decoder,
        "placement": placements,
        "stream_order": [],
        "ring_bytes": 0,
        "demand_bytes": 0,
        "neuron_slots": slots,
        "neuron_bytes": 2 * weight_bytes + _SLACK_BYTES,
        "neuron_staging_bytes": 4 << 20,
        "io_engine": "auto",
        "threads": 1,
        "isa": "",
        "context": context,
        "max_rows": 64,
        "budget_bytes": 3 * weight_bytes + (1 << 31),
    }


def own_texts(path: Path, n_texts: int, n_tokens: int) -> list[list[int]]:
    """What the model writes after its first token at temperature 0.8, from seeds 0, 1, 2 ..."""
    import edge

    with edge.load(path, context=n_tokens + 8, threads=1) as engine:
        settings: dict[str, Any] = {"max_tokens": n_tokens, "temperature": 0.8, "ignore_eos": True}
        return [engine.generate("", seed=seed, **settings).tokens for seed in range(n_texts)]


def replay(
    options: dict[str, Any],
    texts: list[list[int]],
    step: Callable[[_edge.Sequence, list[int], int], None] = lambda sequence, text, i: sequence.advance(),
) -> dict[str, float]:
    """Decodes the texts one after the other with one window; the first text warms it and is not counted.

    Args:
        step: computes token i of a text, the last one of the sequence; called for those that count too.
    """
    import _edge

    engine = _edge.Engine(options)
    sequence = _edge.Sequence(engine)
    before, n_tokens, seconds = engine.stats(), 0, 0.0
    for number, text in enumerate(texts):
        if number == 1:
            before, n_tokens, seconds = engine.stats(), 0, 0.0
        start = time.perf_counter()
        for i in range(len(text)):
            sequence.set_tokens(text[: i + 1])
            step(sequence, text, i)
        n_tokens += len(text)
        seconds += time.perf_counter() - start
    after = engine.stats()
    wanted = after["neurons_wanted"] - before["neurons_wanted"]
    return {
        "tokens_per_second": n_tokens / seconds,
        "wanted_per_token": wanted / n_tokens,
        "passed_over_per_token": (after["neurons_passed_over"] - before["neurons_passed_over"]) / n_tokens,
        "hit_share": (after["neuron_hits"] - before["neuron_hits"]) / wanted if wanted else 0.0,
        "bytes_per_token": (after["neuron_bytes"] - before["neuron_bytes"]) / n_tokens,
        "requests_per_token": (after["neuron_requests"] - before["neuron_requests"]) / n_tokens,
    }


def prepare(args: argparse.Namespace) -> tuple[dict[str, Any], list[list[int]], dict[str, Any]]:
    """The decoder's configuration, the texts, and what a document says of them; of options of :func:`add_options`."""
    from edge.tokenizer import Tokenizer
    from flashload.format import PackFile

    with PackFile(args.pack) as pack:
        decoder, tokenizer = pack.config.to_json(), Tokenizer(pack.vocab())
        n_neurons = sum(e.rows for name, e in pack.entries.items() if name.endswith(".neurons.records"))
    if args.text:
        tokens = tokenizer.encode(args.text.read_text(), add_special_tokens=True)
        texts = [tokens[i * args.tokens : (i + 1) * args.tokens] for i in range(args.texts)]
        texts = [text for text in texts if text]
    else:
        texts = own_texts(args.pack, args.texts, args.tokens)
    document: dict[str, Any] = {
        "machine": machine.facts(),
        "model": args.pack.name,
        "neurons": n_neurons,
        "tokens": sum(map(len, texts)),
        "results": [],
    }
    return decoder, texts, document


def add_options(parser: argparse.ArgumentParser, shares: list[float]) -> None:
    """A pack, shares of records in memory, and texts."""
    parser.add_argument("pack", type=Path, help="a pack with neuron records (edge pack --neurons on)")
    parser.add_argument("--shares", type=float, nargs="+", default=shares)
    parser.add_argument("--text", type=Path, help="decode this text instead of the model's own")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=200, help="per text")
    report.add_output(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every share of slots under every half-life."""
    decoder, texts, document = prepare(args)
    document["mode"] = args.mode
    for share in args.shares:
        options = options_of(args.pack, decoder, share, args.mode, max(map(len, texts)) + 8)
        for half_life in args.half_lives:
            figures = replay(options | {"neuron_half_life_tokens": half_life}, texts)
            document["results"].append({"slot_share": share, "half_life_tokens": half_life} | figures)
    return document


def show(document: dict[str, Any]) -> None:
    """The hit shares as a table, one column per half-life, with what the best of them reads."""
    results = document["results"]
    half_lives = list(dict.fromkeys(r["half_life_tokens"] for r in results))
    rows = []
    for share in dict.fromkeys(r["slot_share"] for r in results):
        row = [r for r in results if r["slot_share"] == share]
        best = max(row, key=lambda r: r["hit_share"])
        hits = [f"{r['hit_share']:.1%}" for r in row]
        reads = [f"{best['bytes_per_token'] / 1024:.0f}", f"{best['requests_per_token']:.0f}"]
        rows.append([f"{share:.0%}", *hits, *reads])
    active = results[0]["wanted_per_token"] / document["neurons"]
    report.print_table(
        f"{document['model']}, {document['mode']}: {active:.1%} of {document['neurons']} neurons wanted per token",
        ["slots", *(f"half-life {h:g}" for h in half_lives), "KiB/token", "requests"],
        rows,
        [
            f"{document['tokens']} tokens; the first text warms the slots",
            report.machine_line(document["machine"]),
        ],
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, [0.05, 0.1, 0.15, 0.25, 0.5, 0.75])
    parser.add_argument("--mode", choices=("exact", "predictor"), default="exact")
    parser.add_argument("--half-lives", type=float, nargs="+", default=[0, 4, 16, 32, 64, 256])
    args = parser.parse_args()
    document = measure(args)
    report.put_out(f"window-{args.pack.stem}", document, show, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
