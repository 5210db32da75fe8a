"""``edge train-predictor MODEL --data TEXT``: predictors for a ReLU model, in a new pack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge.cli.common import json_option, print_json, progress_bar, threads_option, weights_option
from edge.cli.streams import console
from flashload.machine import format_bytes

if TYPE_CHECKING:
    from edge.predictor_training import PredictorReport


def _ranks(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return () if value == "auto" else tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(
            f"expected auto, a rank, or one per layer (N,N,...), found {value!r}"
        ) from None


@click.command("train-predictor")
@click.argument("model")
@click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, dir_okay=False),
    help="UTF-8 text such as MODEL will write; its last tenth is held out.",
)
@click.option(
    "--out", type=click.Path(dir_okay=False), help="The pack to write. Default: NAME-predictor.edge."
)
@click.option(
    "--memory", help="Ceiling of running and of fitting, such as 2GiB. Default: most of what is free."
)
@threads_option
@weights_option
@click.option(
    "--recall",
    type=float,
    default=0.95,
    show_default=True,
    help="Share of the open neurons that every layer's predictor shall name.",
)
@click.option(
    "--rank",
    "ranks",
    callback=_ranks,
    metavar="auto|N|N,N,...",
    default="auto",
    show_default=True,
    help="Multiples of 32; auto: small, larger in the last layers, doubled while that saves bytes.",
)
@click.option(
    "--bits",
    default="q8",
    show_default=True,
    type=click.Choice(["q8", "q4"]),
    help="Of the stored predictors.",
)
@click.option(
    "--tokens", type=int, help="Tokens to fit to. Default: as many as memory holds, at most 100,000."
)
@click.option("--steps", type=int, default=300, show_default=True, help="Of the optimiser, per fit.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--figure", type=click.Path(dir_okay=False, path_type=Path), help="Write recall and shares as a PNG."
)
@json_option
def command(
    model: str,
    data: str,
    out: str | None,
    memory: str | None,
    threads: int | None,
    weights: str,
    recall: float,
    ranks: tuple[int, ...],
    bits: str,
    tokens: int | None,
    steps: int,
    seed: int,
    figure: Path | None,
    as_json: bool,
) -> None:
    """Train predictors of which neurons open for MODEL, a model with ReLU layers, and write a new pack with them.

    MODEL is a pack, a GGUF file, a Hugging Face folder, or a shipped model; it stays as it is. The engine runs the text
    inside the budget; every layer is then fitted by itself (which needs torch: pip install 'edge[train]').
    """
    from edge.predictor_training import train_predictor

    with _stages(as_json) as on_progress:
        report = train_predictor(
            model,
            data,
            out=out,
            memory=memory,
            threads=threads,
            weights=weights,
            ranks=ranks,
            recall=recall,
            bits=bits,
            tokens=tokens,
            steps=steps,
            seed=seed,
            whole_process=True,
            on_progress=on_progress,
        )
    if figure is not None:
        from edge.cli.predictor_figure import save_png

        save_png(report, figure)
    if as_json:
        print_json(report.to_dict())
        return
    _show(report)
    if figure is not None:
        click.echo(f"figure: {figure}")


@contextmanager
def _stages(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage in turn."""
    with ExitStack() as stack:
        current: str | None = None
        update: Callable[[int, int], None] = lambda done, total: None  # noqa: E731

        def show(stage: str, done: int, total: int) -> None:
            nonlocal current, update
            if stage != current:
                stack.close()
                current, update = stage, stack.enter_context(progress_bar(stage, quiet, unit_bytes=False))
            update(done, total)

        yield show


def _show(report: PredictorReport) -> None:
    from rich.table import Table

    table = Table()
    for column in ("layer", "rank", "recall", "precision", "predicted", "open", "bytes"):
        table.add_column(column, justify="right")
    for name, row in [*((str(i), layer) for i, layer in enumerate(report.layers)), ("mean", report.mean)]:
        if name == "mean":
            table.add_section()
        shares = (f"{share:.1%}" for share in (row.recall, row.precision, row.predicted, row.active))
        table.add_row(name, str(row.rank), *shares, format_bytes(row.bytes))
    click.echo(f"{report.held_out_tokens:,} held-out tokens, predictors fitted to {report.tokens:,}:")
    console(100).print(table)
    ratio = report.perplexity_predicted / report.perplexity
    click.echo(
        f"perplexity {report.perplexity:.4g}, with the predictors {report.perplexity_predicted:.4g} (x {ratio:.4f})"
    )
    click.echo(
        f"{report.path}: {format_bytes(report.file_bytes)}, of it {format_bytes(report.predictor_bytes)} of "
        f"predictors ({report.seconds:.0f} s)"
    )
