"""The picture of the memory-budget benchmark: tok/s over the memory limit."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from bench import report
from bench.budget_cells import BELOW_FLOOR, is_lossy

Points = list[dict[str, Any]]


def _limit(point: dict[str, Any]) -> float:
    return float(point["limit_bytes"]) / 1e9


def _speed(point: dict[str, Any]) -> dict[str, float] | None:
    """tok/s; of a run that was late, as far as it came."""
    found: dict[str, float] | None = point["tokens_per_second"] or point.get("partial_tokens_per_second")
    return found


def plot_speed_over_memory(document: dict[str, Any], path: Path) -> None:
    """tok/s of each system over the memory limit, with what pin-and-stream allows, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [p for p in document["points"] if p["percent"] != BELOW_FLOOR]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    allowed = _plot_ceiling(axes, points)
    bottom = min([*(speed["low"] for speed in map(_speed, points) if speed), *allowed], default=0.1) / 2
    for system in dict.fromkeys(p["system"] for p in points):
        _plot_system(axes, system, sorted((p for p in points if p["system"] == system), key=_limit), bottom)
    axes.set_xlabel("memory limit, GB (cgroup, page cache included)")
    axes.set_ylabel("decode, tokens/s")
    axes.set_yscale("log")
    axes.set_ylim(bottom=bottom)
    axes.set_title(
        f"{document.get('name', document['model'])}, {document['full_bytes'] / 1e9:.2f} GB", fontsize=10
    )
    report.save_figure(figure, axes, document, path)


def _plot_ceiling(axes: Any, points: Points) -> list[float]:
    # Systems that run other files have ceilings of their own.
    ours = [p for p in points if p["system"] != "layer-streaming"] or points
    limits = sorted({_limit(p) for p in ours})
    allowed = [median(p["ceiling_tokens_per_second"] for p in ours if _limit(p) == limit) for limit in limits]
    axes.plot(limits, allowed, "--", color="0.5", label="pin + stream at the measured drive rate")
    return allowed


def _plot_system(axes: Any, system: str, points: Points, bottom: float) -> None:
    alive = [(_limit(p), speed, p) for p in points if (speed := _speed(p))]
    dead = [p for p in points if not _speed(p)]
    colour = axes.plot([], [])[0].get_color()
    if alive:
        below = [speed["median"] - speed["low"] for _, speed, _ in alive]
        above = [speed["high"] - speed["median"] for _, speed, _ in alive]
        at, middle = [limit for limit, _, _ in alive], [speed["median"] for _, speed, _ in alive]
        axes.errorbar(at, middle, yerr=(below, above), marker="o", capsize=3, label=system, color=colour)
    _rings(
        axes, [(x, s["median"]) for x, s, p in alive if is_lossy(p)], 9, colour, "lossy: a predictor decides"
    )
    late = [(x, s["median"]) for x, s, p in alive if not p["tokens_per_second"]]
    _rings(axes, late, 12, colour, f"{system}: not done in time, as far as it came")
    if dead:
        refused = all(set(p.get("outcomes", {})) == {"refused"} for p in dead)
        label = f"{system}: {'refused' if refused else 'did not finish'}"
        at = [_limit(p) for p in dead]
        axes.plot(at, [bottom] * len(at), "X", ms=10, color=colour, label=label, clip_on=False)


def _rings(axes: Any, places: list[tuple[float, float]], size: float, colour: str, label: str) -> None:
    if places:
        known = label in axes.get_legend_handles_labels()[1]  # one line for all systems that say the same
        label = "_" + label if known else label
        axes.plot(*zip(*places, strict=True), "o", ms=size, mfc="none", color=colour, label=label)
