"""``edge pack SRC DST``: convert a checkpoint by hand."""

from __future__ import annotations

from dataclasses import asdict

import click

from edge.cli.common import conversion_line, json_option, print_json, progress_bar
from flashload.machine import format_bytes


@click.command("pack")
@click.argument("source")
@click.argument("destination")
@click.option("--weights", default="keep", show_default=True, type=click.Choice(["keep", "q8", "q4"]))
@click.option(
    "--neurons",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "on", "off"]),
    help="Pack feed-forward layers as one record per neuron; auto: when predictors lie beside the model.",
)
@click.option(
    "--neuron-order",
    type=click.Path(exists=True, dir_okay=False),
    help="An .npz file with arrays layers.I.neuron_order: neurons that fire together side by side.",
)
@json_option
def command(
    source: str, destination: str, weights: str, neurons: str, neuron_order: str | None, as_json: bool
) -> None:
    """Convert SOURCE (a GGUF file or Hugging Face folder) to the pack DESTINATION."""
    from edge.api import pack

    with progress_bar("packing", as_json) as progress:
        report = pack(
            source,
            destination,
            weights=weights,
            neurons=neurons,
            neuron_order=neuron_order,
            progress=progress,
        )
    if as_json:
        print_json({**asdict(report), "config": report.config.to_json()})
        return
    click.echo(f"{report.path}: {format_bytes(report.file_bytes)}, {report.config.family}")
    for conversion in report.conversions:
        click.echo(f"  {conversion_line(conversion)}")
    if report.neurons is not None:
        click.echo(
            f"  neurons: {report.neurons['neurons']} in {report.neurons['layers']} layers, "
            f"{format_bytes(report.neurons['bytes'])}; relative error of down columns "
            f"{report.neurons['down_loss']:.2e}, of the other rows {report.neurons['row_loss']:.2e}"
        )
