"""Hit rates of expert caches over recorded routing traces: ``python -m bench experts TRACES``.

How many of a mixture's expert uses a cache serves, by capacity and policy, from first uses on: least recently used,
least frequently used (half-life 12 tokens), edge's own, and the clairvoyant optimum that no policy can beat.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import machine, report
from flashload.errors import EdgeError
from flashload.expert_policy import POLICIES, Trace, read_trace, simulate

#: Of all experts.
CAPACITIES = (0.0625, 0.125, 0.25, 0.5)


def traces_in(paths: Iterable[Path]) -> list[Path]:
    """The trace files among ``paths``, folders searched."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        found += [one for one in inside if one.name.removesuffix(".xz").endswith((".csv", ".jsonl"))]
    return found


def gap_closed(rates: dict[str, float]) -> float | None:
    """The share of the way from least recently used to the optimum that edge's policy goes; None without a way."""
    way = rates["clairvoyant"] - rates["lru"]
    return (rates["edge"] - rates["lru"]) / way if way > 1e-9 else None


def measure(trace: Trace, capacities: Iterable[float]) -> list[dict[str, Any]]:
    """One row per capacity: experts held, working sets of a token that fit, hit rate by policy."""
    rows = []
    for share in capacities:
        held = max(1, int(trace.total_experts * share))
        rates = {name: simulate(trace, held, policy(trace)) for name, policy in POLICIES.items()}
        working_sets = held / trace.token_experts
        rows.append({"share": share, "experts": held, "working_sets": working_sets, "hit_rates": rates})
    return rows


def show(document: dict[str, Any]) -> None:
    columns = ["trace", "capacity", "experts", "working sets", *POLICIES, "gap closed"]
    rows = []
    for one in document["traces"]:
        for row in one["rows"]:
            closed = gap_closed(row["hit_rates"])
            rows.append(
                [
                    one["name"],
                    f"{100 * row['share']:g} %",
                    str(row["experts"]),
                    f"{row['working_sets']:.1f}",
                    *(f"{rate:.3f}" for rate in row["hit_rates"].values()),
                    "-" if closed is None else f"{100 * closed:.0f} %",
                ]
            )
    notes = [
        "Share of expert uses served from memory, first uses counted as misses. Capacity: of all experts; a working "
        "set is what one token chooses over all layers.",
        report.machine_line(document["machine"]),
    ]
    report.print_table("hit rates of expert caches over recorded traces", columns, rows, notes)


def plot(document: dict[str, Any], path: Path) -> None:
    """Hit rate over capacity, one panel per trace; PNG at ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    traces = document["traces"]
    figure, panels = pyplot.subplots(
        1, len(traces), figsize=(4 * len(traces), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, one in zip(panels[0], traces, strict=True):
        shares = [100 * row["share"] for row in one["rows"]]
        for name in POLICIES:
            axes.plot(shares, [row["hit_rates"][name] for row in one["rows"]], marker="o", label=name)
        axes.set_title(one["name"], fontsize=10)
        axes.set_xlabel("capacity, % of all experts")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("hit rate")
    panels[0][0].legend(fontsize=8)
    figure.supxlabel(
        f"{document['machine']['date'][:10]}, commit {document['machine']['commit']}", fontsize=7
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"expected shares above 0 up to 1, found {text!r}")
    return shares


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench experts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "traces", nargs="+", type=Path, help="trace files (.csv, .jsonl, .xz of these) or folders of them"
    )
    parser.add_argument(
        "--capacities", type=_shares, default=list(CAPACITIES), help="of all experts (0.0625,0.125,...)"
    )
    report.add_output(parser)
    args = parser.parse_args(argv)
    document: dict[str, Any] = {"machine": machine.facts(), "traces": []}
    try:
        for path in traces_in(args.traces):
            trace = read_trace(path)
            name = path.name.split(".")[0]
            rows = measure(trace, args.capacities)
            document["traces"].append(
                {
                    "name": name,
                    "layers": trace.n_layers,
                    "experts": trace.n_experts,
                    "visits": len(trace.visits),
                    "rows": rows,
                }
            )
    except (EdgeError, OSError) as error:
        print(f"experts: {error}", file=sys.stderr)
        return 1
    if not document["traces"]:
        print("experts: no trace (.csv, .jsonl, .xz of these) among the paths given", file=sys.stderr)
        return 1
    report.put_out("experts", document, show, args, plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
