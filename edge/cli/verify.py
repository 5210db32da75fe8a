"""``edge verify PACK``: every byte against its checksum."""

from __future__ import annotations

from pathlib import Path

import click

from edge.cli.common import json_option, print_json, progress_bar
from flashload.machine import format_bytes


@click.command("verify")
@click.argument("model")
@json_option
def command(model: str, as_json: bool) -> None:
    """Check header, directory and every chunk of a pack (or of a shipped model)."""
    from edge.models import resolve_model
    from flashload.format import PackFile

    pack = PackFile(Path(resolve_model(model)))
    with progress_bar("verifying", as_json) as progress:
        pack.verify(progress)
    size = pack.path.stat().st_size
    if as_json:
        print_json({"path": str(pack.path), "bytes": size, "entries": len(pack.entries), "ok": True})
    else:
        click.echo(f"{pack.path}: {len(pack.entries)} entries, {format_bytes(size)}, every checksum holds")
