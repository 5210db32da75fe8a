"""``edge show MODEL``: what a model file holds."""

from __future__ import annotations

from collections import Counter

import click

from edge.cli.common import conversion_line, json_option, print_json
from flashload.machine import format_bytes


@click.command("show")
@click.argument("model")
@click.option("--weights", "list_weights", is_flag=True, help="List every entry.")
@click.option("--template", "show_template", is_flag=True, help="Print the chat template.")
@json_option
def command(model: str, list_weights: bool, show_template: bool, as_json: bool) -> None:
    """Show MODEL's architecture, formats, tokenizer and source. A checkpoint is packed first."""
    from edge.models import open_pack

    pack = open_pack(model)
    entries = list(pack.entries.values())
    by_format: Counter[str] = Counter()
    for entry in entries:
        by_format[entry.format.name.lower()] += entry.bytes
    template = pack.vocab().config.get("chat_template")
    config = pack.config.to_json()
    if as_json:
        rows = [
            {"name": e.name, "format": e.format.name.lower(), "rows": e.rows, "cols": e.cols} for e in entries
        ]
        print_json(
            {
                "path": str(pack.path),
                **pack.metadata,
                "bytes": by_format,
                "template": template,
                "entries": rows,
            }
        )
        return
    if show_template:
        click.echo(template or "this model has no chat template")
        return
    click.echo(f"{pack.path} ({format_bytes(pack.path.stat().st_size)})")
    for key, value in config.items():
        if isinstance(value, list) and len(value) > 4:
            value = f"[{value[0]}, {value[1]}, ... {len(value)} values]"
        click.echo(f"  {key}: {value}")
    click.echo(
        "  bytes: " + ", ".join(f"{name} {format_bytes(size)}" for name, size in by_format.most_common())
    )
    click.echo(f"  chat template: {'yes (--template prints it)' if template else 'none'}")
    for extra in ("predictor", "medusa"):
        if extra in pack.metadata:
            said = ", ".join(f"{key} {value}" for key, value in pack.metadata[extra].items())
            click.echo(f"  {extra}: {said}")
    if "sparsity" in pack.metadata:
        found = pack.metadata["sparsity"]
        click.echo(
            f"  sparsity on: {found['skipped']:.0%} of the neurons left out, perplexity "
            f"{found['dense_perplexity']:.3f} -> {found['perplexity']:.3f}"
        )
    for conversion in pack.metadata.get("conversions", []):
        click.echo(f"  {conversion_line(conversion)}")
    if list_weights:
        for entry in entries:
            click.echo(f"    {entry.name:48} {entry.format.name.lower():10} {entry.rows:>8} x {entry.cols}")
