"""``edge plan MODEL``: speed over memory, and where each byte would go, from the model's header alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge.cli.common import (
    json_option,
    kv_option,
    kv_type_option,
    predictor_option,
    print_json,
    sparsity_option,
)
from edge.cli.streams import console, is_unicode
from flashload.machine import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from edge.planning import ModelPlan
    from flashload.curve import Option
    from flashload.plan import Plan

_PARTS = (
    ("host_bytes", "interpreter, tokenizer, margin"),
    ("resident_bytes", "weights held"),
    ("ring_bytes", "staging of streamed layers"),
    ("demand_bytes", "cache of embedding rows and experts"),
    ("neuron_bytes", "records of neurons"),
    ("neuron_staging_bytes", "records on their way in"),
    ("kv_bytes", "keys and values"),
    ("activation_bytes", "activations and logits"),
    ("slack_bytes", "rounding, sampling"),
)


@click.command("plan")
@click.argument("model")
@click.option("--memory", help="Ceiling, such as 2GiB. Default: most of what is free.")
@click.option("--context", type=int, help="Tokens of context.")
@click.option("--threads", type=int, help="Compute threads. Default: all cores.")
@click.option(
    "--weights",
    default="keep",
    show_default=True,
    type=click.Choice(["keep", "q8", "q4"]),
    help="The weights whose parts are listed; the table has all.",
)
@kv_option
@kv_type_option
@sparsity_option
@predictor_option
@click.option("--figure", type=click.Path(dir_okay=False, path_type=Path), help="Write the curve as a PNG.")
@click.option("--probe", "probe_again", is_flag=True, help="Measure drive and memory again (2 to 3 seconds).")
@json_option
def command(
    model: str,
    memory: str | None,
    context: int | None,
    threads: int | None,
    weights: str,
    kv: str,
    kv_type: str,
    sparsity: str,
    predictor: str | float,
    figure: Path | None,
    probe_again: bool,
    as_json: bool,
) -> None:
    """Predict MODEL's speed over memory on this machine, without loading it.

    MODEL is a pack, a GGUF file, a Hugging Face folder, or a folder with config.json and the index of its weights.
    """
    from edge.planning import plan

    def say() -> None:
        if not as_json:
            click.echo("measuring this machine's drive and memory ...", err=True)

    found = plan(
        model,
        memory=memory,
        context=context,
        threads=threads,
        weights=weights,
        kv=kv,
        kv_type=kv_type,
        sparsity=sparsity,
        predictor=predictor,
        whole_process=True,
        probe_again=probe_again,
        on_probe=say,
    )
    if figure is not None:
        from edge.cli.plan_figure import save_png

        save_png(found, figure)
    if as_json:
        print_json(found.to_dict())
        return
    _show(found, figure)


def _show(found: ModelPlan, figure: Path | None) -> None:
    from edge.cli.plan_figure import ASCII, terminal_figure

    out = console(120)
    first = found.options[0]
    title = f"predicted tokens/s, and seconds to the first token of a prompt of {first.prompt_tokens}"
    click.echo(f"{found.model}: {title}; context {found.context}")
    out.print(_curve_table(found))
    if any(option.kv == "flash" for option in found.options):
        click.echo("kv: keys and values of a full context partly in a file on the drive")
    for line in terminal_figure(found):
        if not is_unicode(sys.stdout):
            line = line.translate(ASCII)
        out.print(line, markup=False, highlight=False, no_wrap=True)
    out.print()
    if found.plan is not None:
        click.echo(_placement(found.weights, found.plan))
        out.print(_parts_table(found, found.plan))
    else:
        click.echo(
            f"{format_bytes(found.memory_bytes)} is below the floor of {format_bytes(found.floor_bytes)} "
            f"({found.floor_bytes} bytes) for weights {found.weights}"
        )
    at = (
        f"{format_bytes(found.memory_bytes)}: "
        if found.recommended.memory_bytes <= found.memory_bytes
        else ""
    )
    click.echo(at + found.recommendation)
    machine = found.machine
    click.echo(
        f"measured {machine.date[:10]}, {found.threads} threads: memory {machine.bus_bytes_per_second / 1e9:.1f} GB/s, "
        f"drive {machine.drive.sequential_bytes_per_second / 1e9:.2f} GB/s"
    )
    for note in found.notes:
        click.echo(f"note: {note}")
    if figure is not None:
        click.echo(f"figure: {figure}")


def _curve_table(found: ModelPlan) -> Table:
    from rich.table import Table
    from rich.text import Text

    from edge.cli.plan_figure import series

    table = Table()
    columns = series(found)
    table.add_column("memory", justify="right")
    for name in columns:
        table.add_column(Text(name))
    budgets = sorted({option.memory_bytes for options in columns.values() for option in options})
    for budget in budgets:
        cells = [_cell(next((o for o in options if o.memory_bytes == budget), None), budget, options[0].floor_bytes)
                 for options in columns.values()]  # fmt: skip
        mark = " <" if budget == found.memory_bytes else ""
        table.add_row(Text(format_bytes(budget) + mark), *map(Text, cells))
    return table


def _cell(option: Option | None, budget: int, floor_bytes: int) -> str:
    if option is None:
        return "below the floor" if budget < floor_bytes else ""
    from edge.cli.plan_figure import three_digits

    kv = ", kv" if option.kv == "flash" else ""
    speed, wait = option.predicted_tokens_per_second, option.time_to_first_token_seconds
    return f"{three_digits(speed)} tok/s, {three_digits(wait)} s ({option.placement}{kv})"


def _placement(weights: str, plan: Plan) -> str:
    """One line: where the weights, the experts and the context go."""
    from flashload.neuron_use import GUESSED

    text = f"weights {weights}: {plan.placement}"
    if plan.expert_slots:
        sets = plan.expert_slots / plan.experts_per_token
        text += f", {plan.expert_slots} experts at hand, {sets:.1f} times what a token uses"
    if plan.neuron_staging_bytes or plan.neuron_mode in GUESSED:
        text += f", {_decides(plan)}"
    if plan.kv_on_flash is not None:
        text += f", keys and values in a file of up to {format_bytes(plan.kv_on_flash.file_bytes)}"
    if plan.kv_type != "f16":
        text += f", keys and values as {plan.kv_type}"
    return text


def _decides(plan: Plan) -> str:
    """Who says which neurons are active, where their records are not all in memory."""
    if plan.neuron_mode == "exact":
        if not plan.gate_stream_bytes:
            return "exact: gate rows in memory say which neurons to read"
        return (
            f"exact: gate rows say which neurons to read, {format_bytes(plan.gate_stream_bytes)} of them read again "
            "in every pass"
        )
    told = "a predictor says which neurons to read"
    return f"lossy: {told}" + (", and not all are" if plan.neuron_keep < 1 else "")


def _parts_table(found: ModelPlan, plan: Plan) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column("part")
    table.add_column("bytes", justify="right")
    for key, text in _PARTS:
        if getattr(plan, key):
            table.add_row(text, format_bytes(getattr(plan, key)))
    table.add_section()
    table.add_row("predicted peak", format_bytes(plan.predicted_peak_bytes))
    table.add_row("budget", format_bytes(plan.memory_bytes))
    table.add_row("floor (least that runs)", format_bytes(found.floor_bytes))
    if found.chosen is not None:
        table.add_row("read from the drive for each token", format_bytes(found.chosen.flash_bytes_per_token))
    return table
