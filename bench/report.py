"""How figures are told: median and spread, a table on the terminal, JSON for the next program, a picture."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

OUT = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Spread:
    """Median of repeated runs with the smallest and largest."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """The spread of ``values``; None when there are none."""
        found = list(values)
        return cls(median(found), min(found), max(found), len(found)) if found else None

    def text(self, scale: float = 1.0) -> str:
        """``5.83 [5.72..6.09]``, values divided by ``scale``."""
        if self.runs == 1:
            return figure(self.median / scale)
        return f"{figure(self.median / scale)} [{figure(self.low / scale)}..{figure(self.high / scale)}]"

    def json(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high, "runs": self.runs}


def spread_json(values: Iterable[float]) -> dict[str, float] | None:
    """The spread of ``values`` for a JSON document; None when there are none."""
    found = Spread.of(values)
    return found.json() if found else None


def spread_text(value: dict[str, float] | None, scale: float = 1.0) -> str:
    """A spread from a JSON document as text, divided by ``scale``; "-" for None."""
    if not value:
        return "-"
    return Spread(value["median"], value["low"], value["high"], int(value["runs"])).text(scale)


def figure(value: float) -> str:
    """Three significant digits, no exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def machine_line(facts: dict[str, Any]) -> str:
    """One line under every table: where and when it was measured."""
    isa = " ".join(facts["isa"])
    memory = facts["memory_bytes"] / 2**30
    return (
        f"{facts['cpu']}, {facts['cpus']} cpus ({isa}), {memory:.0f} GiB, {facts['system']}; "
        f"commit {facts['commit']}, {facts['date']}, load {facts['load_average']:.1f} at the start"
    )


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()
) -> None:
    """A table on standard output; cells and notes are plain text, never markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table(title=Text(title), title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    for note in notes:
        console.print(Text(note), soft_wrap=True)


def save(name: str, document: dict[str, Any], folder: Path = OUT) -> Path:
    """Writes ``document`` as JSON into ``folder`` under a name of its date and commit; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = document["machine"]
    stem = re.sub(r"[^A-Za-z0-9._+-]+", "-", f"{name}-{facts['date'][:19]}-{facts['commit']}")
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path


def add_output(parser: argparse.ArgumentParser) -> None:
    """What every benchmark is asked about its figures."""
    parser.add_argument("--json", action="store_true", help="JSON on standard output instead of a table")
    parser.add_argument("--save", action="store_true", help=f"keep JSON and table in {OUT}")


def put_out(
    name: str,
    document: dict[str, Any],
    show: Callable[[dict[str, Any]], None],
    args: argparse.Namespace,
    plot: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    """Prints a document, as JSON or by ``show``, and keeps it (and what ``plot`` draws of it) where that was asked."""
    if args.json:
        print(json.dumps(document, indent=2))
    else:
        show(document)
    if not args.save:
        return
    path = save(name, document)
    with path.with_suffix(".txt").open("w") as text, contextlib.redirect_stdout(text):
        show(document)
    if plot is not None:
        try:
            plot(document, path.with_suffix(".png"))
        except ImportError:
            print("no picture: drawing needs matplotlib; pip install 'edge[bench]'", file=sys.stderr)
    print(f"saved {path} and what belongs to it", file=sys.stderr)


def plain_ticks(axes: Any) -> None:
    """Logarithmic axes of matplotlib with plain numbers: 1, 2 and 5 of a decade, or all of a single one."""
    from matplotlib.ticker import FuncFormatter

    def label(axis: Any, value: float) -> str:
        low, high = sorted(axis.get_view_interval())
        return f"{value:g}" if high < 10 * low or f"{value:e}"[0] in "125" else ""

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            plain = FuncFormatter(lambda value, _, axis=axis: label(axis, value))
            axis.set_major_formatter(plain)
            axis.set_minor_formatter(plain)


def save_figure(figure: Any, axes: Any, document: dict[str, Any], path: Path) -> None:
    """A figure of matplotlib with its legend and where its numbers come from, as PNG; closes it."""
    from matplotlib import pyplot

    plain_ticks(axes)
    facts = document["machine"]
    figure.supxlabel(
        f"{facts['cpu']}, {document['threads']} threads, {facts['date'][:10]}, commit {facts['commit']}",
        fontsize=7,
    )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
