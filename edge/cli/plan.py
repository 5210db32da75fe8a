"""``edge plan MODEL``: the placement for one budget, from the directory alone."""

from __future__ import annotations

import click

from edge.cli.common import json_option, print_json
from flashload.machine import format_bytes

_PARTS = (
    ("host_bytes", "interpreter, tokenizer, margin"),
    ("resident_bytes", "weights held"),
    ("ring_bytes", "staging of streamed layers"),
    ("demand_bytes", "cache of embedding rows and experts"),
    ("kv_bytes", "keys and values"),
    ("activation_bytes", "activations and logits"),
)


@click.command("plan")
@click.argument("model")
@click.option("--memory", help="Ceiling, such as 2GiB. Default: most of what is free.")
@click.option("--context", type=int, help="Tokens of context.")
@click.option("--threads", type=int)
@json_option
def command(model: str, memory: str | None, context: int | None, threads: int | None, as_json: bool) -> None:
    """Show where MODEL's weights would live inside a budget, without loading it."""
    from edge.api import plan

    chosen = plan(model, memory=memory, context=context, threads=threads, whole_process=True)
    if as_json:
        print_json(chosen.to_dict())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}: {chosen.placement}, context {chosen.context}", title_justify="left")
    table.add_column("part")
    table.add_column("bytes", justify="right")
    for key, text in _PARTS:
        table.add_row(text, format_bytes(getattr(chosen, key)))
    table.add_section()
    table.add_row("predicted peak", format_bytes(chosen.predicted_peak_bytes))
    table.add_row("budget", format_bytes(chosen.memory_bytes))
    table.add_row("floor (least that runs)", format_bytes(chosen.floor_bytes))
    table.add_row("read from flash for each token", format_bytes(chosen.stream_bytes))
    Console().print(table)
