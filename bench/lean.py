"""What reading fewer neurons costs and saves: ``python -m bench lean PACK --text FILE``.

A text is decoded token by token with so many of each layer's records in memory: all neurons computed, all that the
predictor names, and of these only as many of the missing ones read as keep a share of a layer's energy
(``edge.load(predictor="lean")``), or of each layer so many in any case (``--free``: what it takes to cost no time).
Perplexity stands beside what was read for a token.
"""

from __future__ import annotations

import argparse
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import report, window

if TYPE_CHECKING:
    import _edge


class _Scores:
    """Log-probabilities of each text's tokens after the first, all texts but the one that warms."""

    def __init__(self, warming: list[int]) -> None:
        self._warming = warming
        self._nats: list[float] = []

    def step(self, sequence: _edge.Sequence, text: list[int], i: int) -> None:
        logits = np.asarray(sequence.logits(), np.float64)
        if text is self._warming or i + 1 == len(text):
            return
        top = logits.max()
        self._nats.append(float(top + np.log(np.exp(logits - top).sum()) - logits[text[i + 1]]))

    @property
    def perplexity(self) -> float:
        return math.exp(math.fsum(self._nats) / len(self._nats))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every way to decide with every share of slots."""
    decoder, texts, document = window.prepare(args)
    ways = [("all neurons", "exact", 1.0, 0), ("predictor", "predictor", 1.0, 0)]
    for keep, free in itertools.product(args.keep, args.free):
        ways.append((f"lean {keep:g}" + (f", {free} free" if free else ""), "predictor", keep, free))
    for share in args.shares:
        for way, mode, keep, free in ways:
            options = window.options_of(args.pack, decoder, share, mode, max(map(len, texts)) + 8)
            scores = _Scores(texts[0])
            asked = {"neuron_keep": keep, "neuron_free_reads": free}
            figures = window.replay(options | asked, texts, scores.step)
            result = {"slot_share": share, "way": way, "perplexity": scores.perplexity}
            document["results"].append(result | asked | figures)
    return document


def show(document: dict[str, Any]) -> None:
    """A line for each way to decide."""
    rows = []
    exact = document["results"][0]["perplexity"]
    for r in document["results"]:
        loss = 100 * (r["perplexity"] / exact - 1)
        rows.append(
            [
                f"{r['slot_share']:.0%}",
                r["way"],
                f"{r['perplexity']:.4f}",
                f"{loss:+.2f} %",
                f"{r['wanted_per_token']:.0f}",
                f"{r['passed_over_per_token']:.0f}",
                f"{r['bytes_per_token'] / 1024:.0f}",
                f"{r['requests_per_token']:.0f}",
                report.figure(r["tokens_per_second"]),
            ]
        )
    columns = [
        "slots",
        "computed",
        "perplexity",
        "loss",
        "neurons/token",
        "passed over",
        "KiB/token",
        "requests",
    ]
    report.print_table(
        f"{document['model']}: {document['neurons']} neurons",
        [*columns, "tok/s"],
        rows,
        [
            f"{document['tokens']} tokens, one at a time; the first text warms the slots and is not counted",
            report.machine_line(document["machine"]),
        ],
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    window.add_options(parser, [0.05, 0.15, 0.3])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.98, 0.95, 0.9, 0.8])
    parser.add_argument(
        "--free", type=int, nargs="+", default=[0], help="reads of a layer and pass that are free"
    )
    args = parser.parse_args()
    if args.texts < 2:
        parser.error(f"--texts: expected 2 or more, the first warms, found {args.texts}")
    document = measure(args)
    report.put_out(f"lean-{args.pack.stem}", document, show, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
