"""Draws the learning curve of a training run (curve.json) as a small PNG."""

from __future__ import annotations

import json
from pathlib import Path


def draw_curve(curve: Path, png: Path) -> None:
    """Held-out bits per byte and training loss over the tokens seen, one figure of under 100 KB."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    evals = json.loads(curve.read_text())["evals"]
    tokens = [e["tokens"] / 1e6 for e in evals]
    figure, left = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    left.plot(tokens, [e["bits_per_byte"] for e in evals], color="C0")
    left.set_xlabel("training tokens (millions)")
    left.set_ylabel("held-out bits per byte", color="C0")
    right = left.twinx()
    right.plot(tokens, [e["train_nats_per_token"] for e in evals], color="C1", linewidth=1)
    right.set_ylabel("training loss (nats per token)", color="C1")
    best = min(evals, key=lambda e: e["bits_per_byte"])
    left.annotate(
        f"{best['bits_per_byte']:.3f}",
        (best["tokens"] / 1e6, best["bits_per_byte"]),
        xytext=(0, 14),
        textcoords="offset points",
        ha="center",
        color="C0",
    )
    left.grid(alpha=0.3)
    figure.savefig(png, dpi=100)
    pyplot.close(figure)


def draw_family(family: Path, png: Path) -> None:
    """Held-out bits per byte of every finished run over its tokens, and the zero share of the sparse one's gates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    right = left.twinx()
    for curve in sorted(family.glob("*/curve.json")):
        report = json.loads(curve.read_text())
        tokens = [e["tokens"] / 1e6 for e in report["evals"]]
        bits = [e["bits_per_byte"] for e in report["evals"]]
        left.plot(tokens, bits, label=f"{report['model']} {bits[-1]:.3f}")
        sparse = [(t, 100 * e["zeros"]) for t, e in zip(tokens, report["evals"], strict=True) if "zeros" in e]
        if sparse:
            right.plot(*zip(*sparse, strict=True), color="0.5", linestyle="--", linewidth=1)
    left.set_xlabel("training tokens (millions)")
    left.set_ylabel("held-out bits per byte")
    left.set_ylim(top=1.6)
    right.set_ylabel("zero FFN gates of story, % (dashed)", color="0.4")
    right.set_ylim(50, 100)
    left.legend(loc="lower left")
    left.grid(alpha=0.3)
    figure.savefig(png, dpi=100)
    pyplot.close(figure)


def main() -> None:
    """python -m edge.builtin.figure FAMILY PNG"""
    import sys

    draw_family(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
