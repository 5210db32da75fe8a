"""``edge doctor``: which ISA, I/O engine, memory limit and GPU were found, and why a better one was not."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import click

from edge.cli.common import json_option, print_json
from flashload.machine import available_bytes, cgroup_limit_bytes, cpu_count, format_bytes


def examine() -> dict[str, Any]:
    """Everything the command prints, as plain data."""
    import _edge

    limit = cgroup_limit_bytes()
    isas = list(_edge.isas())
    chosen = next((isa["name"] for isa in isas if isa["available"]), "ref")
    engines = list(_edge.io_engines())
    return {
        "edge": _version(),
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": cpu_count(),
        "isa": os.environ.get("EDGE_ISA") or chosen,
        "isas": isas,
        "io_engine": next((engine["name"] for engine in engines if engine["available"]), "none"),
        "io_engines": engines,
        "available_memory_bytes": available_bytes(),
        "cgroup_limit_bytes": limit,
        "gpu": _gpu(),
        "cache": str(_cache_folder()),
    }


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Show what this machine offers and what is missing."""
    facts = examine()
    if as_json:
        print_json(facts)
        return
    click.echo(f"edge {facts['edge']}, Python {facts['python']}, {facts['system']}, {facts['cores']} cores")
    click.echo(f"kernels: {facts['isa']}")
    for isa in facts["isas"]:
        click.echo(f"  {isa['name']:12} {'yes' if isa['available'] else 'no: ' + isa['reason']}")
    click.echo(f"disk reads: {facts['io_engine']}")
    for engine in facts["io_engines"]:
        click.echo(f"  {engine['name']:12} {'yes' if engine['available'] else 'no: ' + engine['reason']}")
    limit = facts["cgroup_limit_bytes"]
    click.echo(f"memory: {format_bytes(facts['available_memory_bytes'])} available, cgroup limit "
               f"{format_bytes(limit) if limit else 'none'}")  # fmt: skip
    click.echo(f"gpu: {facts['gpu']}")
    click.echo(f"cache: {facts['cache']}")


def _version() -> str:
    import edge

    return edge.__version__


def _cache_folder() -> Path:
    from flashload.cache import cache_folder

    return cache_folder()


def _gpu() -> str:
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        return "an NVIDIA driver is loaded, but this build has no CUDA kernels"
    return "none found: no NVIDIA driver is loaded"
