"""``edge sparsify MODEL OUT --data TEXT``: which neurons count little, from text, and what leaving them out costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edge.cli.common import (
    json_option,
    memory_option,
    print_json,
    progress_bar,
    threads_option,
    weights_option,
)
from flashload.machine import format_bytes

if TYPE_CHECKING:
    from edge.sparsify import SparsityReport


@click.command("sparsify")
@click.argument("model")
@click.argument("out", type=click.Path(dir_okay=False))
@click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, dir_okay=False),
    help="Text (UTF-8) to calibrate on.",
)
@click.option(
    "--share", default=0.5, show_default=True, help="Of the neurons, to be left out for an average token."
)
@click.option("--also", type=float, multiple=True, help="Measure this share too; may be given several times.")
@click.option("--tokens", default=8192, show_default=True, help="Most tokens to calibrate on.")
@click.option(
    "--held-out-tokens", default=4096, show_default=True, help="Most tokens to measure the loss on."
)
@memory_option
@threads_option
@weights_option
@json_option
def command(
    model: str,
    out: str,
    data: str,
    share: float,
    also: tuple[float, ...],
    tokens: int,
    held_out_tokens: int,
    memory: str | None,
    threads: int | None,
    weights: str,
    as_json: bool,
) -> None:
    """Write MODEL (a checkpoint, or a pack by neuron) as the pack OUT with thresholds for `--sparsity on`.

    Each neuron's threshold says how small its activation may be before the neuron is left out. It changes the text a
    little: the table says by how much, on the last tenth of the data.
    """
    from edge.calibration import read_text
    from edge.sparsify import sparsify

    text = read_text(data)
    with (
        progress_bar("packing", as_json) as on_pack,
        progress_bar("reading", as_json, unit_bytes=False) as on_tokens,
    ):
        report = sparsify(
            model,
            out,
            data=text,
            share=share,
            also=also,
            memory=memory,
            threads=threads,
            weights=weights,
            calibration_tokens=tokens,
            held_out_tokens=held_out_tokens,
            whole_process=True,
            on_pack=on_pack,
            on_tokens=on_tokens,
        )
    if as_json:
        print_json(report.to_dict())
        return
    for line in table(report):
        click.echo(line)


def table(report: SparsityReport) -> list[str]:
    """The report in words: one row for each share."""
    dense = report.chosen.dense_ffn_bytes
    rows: list[tuple[Any, ...]] = [("share", "left out", "perplexity", "loss", "FFN/token", "weights/token")]
    none = report.chosen.dense_perplexity
    rows.append(("none", "0.0%", f"{none:.3f}", "", format_bytes(dense), format_bytes(report.token_bytes)))
    for trial in report.trials:
        rows.append(
            (
                f"{trial.share:.0%}" + (" *" if trial is report.chosen else ""),
                f"{trial.skipped:.1%}",
                f"{trial.perplexity:.3f}",
                f"{trial.loss:+.2%}",
                format_bytes(trial.ffn_bytes),
                format_bytes(report.token_bytes - dense + trial.ffn_bytes),
            )
        )
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(str(cell).rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    chosen = report.chosen
    return [
        f"{report.path}: {format_bytes(report.file_bytes)}; calibrated on {report.calibration_tokens} tokens, "
        f"measured on {report.held_out_tokens} others",
        *lines,
        "* in the pack: edge run --sparsity on. Left out by layer: "
        + " ".join(f"{share:.0%}" for share in chosen.layers),
    ]
