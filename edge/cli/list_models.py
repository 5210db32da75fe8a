"""``edge list``: shipped models and cached packs."""

from __future__ import annotations

import click

from edge.cli.common import json_option, print_json
from flashload.machine import format_bytes


@click.command("list")
@json_option
def command(as_json: bool) -> None:
    """List shipped models and the packs in the cache."""
    from edge.models import builtin_models, resolve_model
    from flashload.cache import cache_folder

    shipped = [(name, resolve_model(name)) for name in builtin_models()]
    cached = [(path.stem, path) for path in sorted(cache_folder().glob("*.edge"))]
    rows = [
        {"name": name, "kind": kind, "path": str(path), "bytes": path.stat().st_size}
        for kind, models in (("shipped", shipped), ("cached", cached))
        for name, path in models
    ]
    if as_json:
        print_json({"models": rows})
        return
    for row in rows:
        click.echo(
            f"{row['name']:40} {row['kind']:8} {format_bytes(float(str(row['bytes']))):>12}  {row['path']}"
        )
    if not rows:
        click.echo("no models yet")
