"""A predictor's recall and shares over the layers, as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edge.cli.figure import png

if TYPE_CHECKING:
    from edge.predictor_training import PredictorReport


def save_png(report: PredictorReport, path: Path) -> None:
    """Two panels: shares of neurons that open and that are predicted; recall and precision.

    Raises:
        ArgumentError: matplotlib is not installed.
        DiskError: the file cannot be written.
    """
    layers = range(len(report.layers))
    with png(path, "train", 120, nrows=1, ncols=2, figsize=(8, 3.4)) as (figure, (left, right)):
        left.bar(layers, [100 * r.predicted for r in report.layers], label="predicted", color="0.75")
        left.bar(layers, [100 * r.active for r in report.layers], label="open", color="C0", width=0.5)
        left.set(xlabel="layer", ylabel="share of neurons (%)")
        right.plot(layers, [100 * r.recall for r in report.layers], "o-", label="recall")
        right.plot(layers, [100 * r.precision for r in report.layers], "s-", label="precision")
        right.set(xlabel="layer", ylabel="%", ylim=(0, 101))
        for axes in (left, right):
            axes.legend(fontsize=8)
            axes.grid(alpha=0.3)
        ratio = report.perplexity_predicted / report.perplexity
        figure.suptitle(
            f"{report.path.name}: {report.held_out_tokens:,} held-out tokens, perplexity x {ratio:.4f}",
            fontsize=9,
        )
