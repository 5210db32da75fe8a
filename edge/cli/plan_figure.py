"""The speed-versus-memory curve: on the terminal, or as a PNG."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge.cli.figure import png
from flashload.machine import format_bytes

if TYPE_CHECKING:
    from edge.planning import ModelPlan
    from flashload.curve import Option

_MARKS = "●▲■◆"
#: What a terminal without these characters shows instead.
ASCII = str.maketrans(_MARKS + "·│└─", "o^#*.|+-")
_WIDTH, _HEIGHT = 64, 12


def series(plan: ModelPlan) -> dict[str, list[Option]]:
    """Label -> options in order of memory; choices of weights that come to the same bytes are one series."""
    out: dict[str, list[Option]] = {}
    seen: set[int] = set()
    for weights in dict.fromkeys(option.weights for option in plan.options):
        found = [option for option in plan.options if option.weights == weights]
        if found[0].weight_bytes in seen:
            continue
        seen.add(found[0].weight_bytes)
        out[label(found[0])] = sorted(found, key=lambda option: option.memory_bytes)
    return out


def label(option: Option) -> str:
    return f"{option.weights} ({option.bits_per_weight:.1f} bits)"


def terminal_figure(plan: ModelPlan, width: int = _WIDTH, height: int = _HEIGHT) -> list[str]:
    """Lines of text: tokens per second upwards, memory to the right, one mark per choice of weights."""
    found = series(plan)
    points = [option for options in found.values() for option in options]
    low = min(o.memory_bytes for o in points)
    high = max(o.memory_bytes for o in points)
    top = max(o.predicted_tokens_per_second for o in points)
    grid = [[" "] * width for _ in range(height)]

    def place(memory_bytes: float, speed: float, mark: str) -> None:
        column = round((memory_bytes - low) / max(1, high - low) * (width - 1))
        row = height - 1 - round(min(1.0, speed / top) * (height - 1))
        grid[row][column] = mark

    for mark, options in reversed(list(zip(_MARKS, found.values(), strict=False))):
        for left, right in itertools.pairwise(options):
            steps = max(1, round((right.memory_bytes - left.memory_bytes) / max(1, high - low) * width))
            for i in range(1, steps):
                share = i / steps
                memory = left.memory_bytes + share * (right.memory_bytes - left.memory_bytes)
                rise = right.predicted_tokens_per_second - left.predicted_tokens_per_second
                place(memory, left.predicted_tokens_per_second + share * rise, "·")
        for option in options:
            place(option.memory_bytes, option.predicted_tokens_per_second, mark)
    lines = []
    for row, cells in enumerate(grid):
        tick = three_digits(top * (height - 1 - row) / (height - 1)) if row % 4 == (height - 1) % 4 else ""
        lines.append(f"{tick:>8} │{''.join(cells)}")
    lines.append(" " * 9 + "└" + "─" * width)
    ends = format_bytes(low), format_bytes(high)
    lines.append(" " * 10 + ends[0] + ends[1].rjust(width - len(ends[0])))
    keys = "   ".join(f"{mark} {name}" for mark, name in zip(_MARKS, found, strict=False))
    return [*lines, " " * 10 + "tokens/s over memory:", " " * 10 + keys]


def three_digits(value: float) -> str:
    """A figure without exponent: ``2971``, ``45.7``, ``0.61``."""
    return f"{value:.0f}" if value >= 100 or not value else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def save_png(plan: ModelPlan, path: Path) -> None:
    """The same curve as a PNG.

    Raises:
        ArgumentError: matplotlib is not installed.
        DiskError: the file cannot be written.
    """
    with png(path, "bench", 150, figsize=(7, 4.2)) as (figure, axes):
        for name, options in series(plan).items():
            line = axes.plot(
                [o.memory_bytes / 1e9 for o in options],
                [o.predicted_tokens_per_second for o in options],
                "o-",
                ms=4,
                label=name,
            )
            axes.axvline(options[0].floor_bytes / 1e9, ls=":", lw=0.8, color=line[0].get_color())
        axes.axvline(plan.memory_bytes / 1e9, color="0.5", lw=0.8, ls="--", label="this budget")
        axes.set_xlim(0, 1.05 * max(o.memory_bytes for o in _shown(plan)) / 1e9)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("memory, GB (dotted: floors)")
        axes.set_ylabel("decode, tokens/s (predicted)")
        axes.set_title(f"{Path(plan.model).name}, context {plan.context}", fontsize=10)
        machine = plan.machine
        figure.supxlabel(
            f"{machine.name}, {plan.threads} threads, {machine.bus_bytes_per_second / 1e9:.0f} GB/s memory, "
            f"{machine.drive.sequential_bytes_per_second / 1e9:.1f} GB/s drive, {machine.date[:10]}",
            fontsize=7,
        )
        axes.legend(fontsize=8)


def _shown(plan: ModelPlan) -> Sequence[Option]:
    return [option for options in series(plan).values() for option in options]
