"""A predictor's recall and shares over the layers, as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flashload.errors import ArgumentError, DiskError

if TYPE_CHECKING:
    from edge.predictor_training import PredictorReport


def save_png(report: PredictorReport, path: Path) -> None:
    """Two panels: shares of neurons that open and that are predicted; recall and precision.

    Raises:
        ArgumentError: matplotlib is not installed.
        DiskError: the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ArgumentError(
            "--figure: drawing a PNG needs matplotlib, found none; pip install 'edge[train]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    layers = range(len(report.layers))
    try:
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
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise DiskError(f"{path}: the figure cannot be written: {error.strerror}") from error
    finally:
        pyplot.close(figure)
