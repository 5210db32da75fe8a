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
        plot(document, path.with_suffix(".png"))
    print(f"saved {path} and what belongs to it", file=sys.stderr)


def _limit(point: dict[str, Any]) -> float:
    return float(point["limit_bytes"])


def is_lossy(point: dict[str, Any]) -> bool:
    """Whether something decided which neurons count that may be wrong."""
    return point.get("neuron_mode", "") not in ("", "exact")


def plot_speed_over_memory(document: dict[str, Any], path: Path) -> None:
    """tok/s of each system over the memory limit, with what pin-and-stream allows, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure_, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    # Systems that run other files have ceilings of their own.
    ours = [p for p in document["points"] if p["system"] != "layer-streaming"] or document["points"]
    limits = sorted({p["limit_bytes"] for p in ours})
    allowed = [
        median(p["ceiling_tokens_per_second"] for p in ours if p["limit_bytes"] == limit) for limit in limits
    ]
    label = "pin + stream at the measured drive rate"
    axes.plot([limit / 1e9 for limit in limits], allowed, "--", color="0.5", label=label)
    speeds = [p["tokens_per_second"]["low"] for p in document["points"] if p["tokens_per_second"]]
    bottom = min([*speeds, *allowed]) / 2
    for system in dict.fromkeys(p["system"] for p in document["points"]):
        points = sorted((p for p in document["points"] if p["system"] == system), key=_limit)
        alive = [p for p in points if p["tokens_per_second"]]
        dead = [p["limit_bytes"] / 1e9 for p in points if p["survived"] < p["runs"]]
        colour = axes.plot([], [])[0].get_color()
        if alive:
            rates = [p["tokens_per_second"] for p in alive]
            middle = [r["median"] for r in rates]
            below = [r["median"] - r["low"] for r in rates]
            above = [r["high"] - r["median"] for r in rates]
            x = [p["limit_bytes"] / 1e9 for p in alive]
            axes.errorbar(x, middle, yerr=(below, above), marker="o", capsize=3, label=system, color=colour)
            lossy = [(a, b) for a, b, p in zip(x, middle, alive, strict=True) if is_lossy(p)]
            if lossy:
                axes.plot(
                    *zip(*lossy, strict=True),
                    "o",
                    ms=9,
                    mfc="none",
                    color=colour,
                    label="lossy: a predictor decides",
                )
        if dead:
            axes.plot(
                dead,
                [bottom] * len(dead),
                "X",
                ms=10,
                color=colour,
                label=f"{system}: did not finish",
                clip_on=False,
            )
    axes.set_xlabel("memory limit, GB (cgroup, page cache included)")
    axes.set_ylabel("decode, tokens/s")
    axes.set_yscale("log")
    axes.set_ylim(bottom=bottom)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(f"{document['model']}, {document['full_bytes'] / 1e9:.2f} GB", fontsize=10)
    facts = document["machine"]
    figure_.supxlabel(
        f"{facts['cpu']}, {document['threads']} threads, {facts['date'][:10]}, commit {facts['commit']}",
        fontsize=7,
    )
    axes.legend(fontsize=8)
    figure_.savefig(path, dpi=150)
    pyplot.close(figure_)
