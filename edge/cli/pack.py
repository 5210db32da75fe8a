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
@json_option
def command(source: str, destination: str, weights: str, as_json: bool) -> None:
    """Convert SOURCE (a GGUF file or Hugging Face folder) to the pack DESTINATION."""
    from edge.api import pack

    with progress_bar("packing", as_json) as progress:
        report = pack(source, destination, weights=weights, progress=progress)
    if as_json:
        print_json({**asdict(report), "config": report.config.to_json()})
        return
    click.echo(f"{report.path}: {format_bytes(report.file_bytes)}, {report.config.family}")
    for conversion in report.conversions:
        click.echo(f"  {conversion_line(conversion)}")
