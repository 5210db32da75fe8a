"""How the comparison of runtimes is told: a table per shape, bars on the terminal, a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import report

_BAR_CELLS = 12


def columns(batches: list[str]) -> list[str]:
    found = ["runtime", "format", "bits"]
    for m in batches:
        found += [
            f"M={m} tok/s",
            *(["GB/s", "% of read", ""] if m == "1" else ["GFLOP/s"]),
        ]
    return [*found, "error"]


def bar(value: float, most: float) -> str:
    """A bar of eighths of a cell."""
    eighths = round(8 * _BAR_CELLS * value / most) if most > 0 else 0
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def row(one: dict[str, Any], batches: list[str], most: float) -> list[str]:
    cells = [one["runtime"], one["format"], report.figure(one["bits_per_weight"])]
    for m in batches:
        at = one["m"][m]
        cells.append(report.spread_text(at["tokens_per_second_of_1e9"]))
        if m == "1":
            cells += [
                report.spread_text(at["bytes_per_second"], 1e9),
                report.spread_text(at["read_share"], 0.01),
                bar(at["tokens_per_second_of_1e9"]["median"], most),
            ]
        else:
            cells.append(report.spread_text(at["operations_per_second"], 1e9))
    return [*cells, f"{one['error']:.1e}"]


def speed(one: dict[str, Any], m: str) -> float:
    """Tokens per second; of a first batch with a read share those at equal read rates, since memory's changes."""
    at = one["m"][m]
    if at["read_share"] is not None:
        return float(at["read_share"]["median"] / one["bits_per_weight"])
    return float(at["tokens_per_second_of_1e9"]["median"])


def ratios(shape: dict[str, Any], batches: list[str]) -> list[str]:
    """Edge's fastest format against the fastest of every other runtime, of weights with about as many bits."""
    said = []
    for m in batches:
        for low, high, bits in ((0, 5.5, "4 bits and a little"), (5.5, 10, "6 to 9 bits")):
            best: dict[str, tuple[float, str]] = {}
            for one in shape["products"]:
                if low <= one["bits_per_weight"] < high:
                    rate = speed(one, m), one["format"]
                    best[one["runtime"]] = max(best.get(one["runtime"], rate), rate)
            ours = best.pop("edge", None)
            if ours is None or not best:
                continue
            parts = [f"{ours[0] / rate:.2f} x {name} {form}" for name, (rate, form) in best.items()]
            said.append(f"M={m}, {bits}: edge {ours[1]} is {', '.join(parts)}")
    return said


def show(document: dict[str, Any]) -> None:
    batches = [str(m) for m in document["batches"]]
    for shape in document["shapes"]:
        speeds = [one["m"].get("1") for one in shape["products"]]
        most = max((s["tokens_per_second_of_1e9"]["median"] for s in speeds if s), default=0.0)
        title = (
            f"{shape['rows']} x {shape['cols']}, {document['threads']} threads, {document['rounds']} rounds; "
            f"memory reads {report.spread_text(shape['read_bytes_per_second'], 1e9)} GB/s; "
            f"others' cpus {report.figure(shape['foreign_cpus'])}"
        )
        rows = [row(one, batches, most) for one in shape["products"]]
        report.print_table(title, columns(batches), rows, [*ratios(shape, batches), *shape["failures"], ""])
    for model in document["models"]:
        _show_model(model, document)
    for line in (
        "tok/s: tokens a second of a model with 1e9 weights in such matrices; error: of the products, against",
        "float64 products of the format's own weights (relative, L2). Bytes are those of each format itself. Edge",
        "against others at one row is at equal read rates: shares of reads just before, over bits.",
        *document["absent"].values(),
        report.machine_line(document["machine"]),
    ):
        print(line)


def _show_model(model: dict[str, Any], document: dict[str, Any]) -> None:
    rows = [
        (
            one["label"],
            report.spread_text(one["decode_tokens_per_second"]),
            report.spread_text(one["read_share"], 0.01),
            report.spread_text(one["prefill_tokens_per_second"]),
            report.spread_text(one["operations_per_second"], 1e9),
            report.spread_text(one["foreign_cpus"]),
        )
        for one in model["systems"]
    ]
    title = (
        f"{model['model']}: whole tokens, prompt of {model['prompt_tokens']}, {document['threads']} threads"
    )
    titles = ("system", "decode tok/s", "% of read", "prefill tok/s", "GFLOP/s", "others' cpus")
    report.print_table(title, titles, rows, [*model["failures"], ""])


def plot(document: dict[str, Any], path: Path) -> None:
    """Bars of every format, shape by shape: one row and a prompt's rows, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = [str(m) for m in document["batches"]]
    shapes = document["shapes"]
    names = list(dict.fromkeys(_name(one) for shape in shapes for one in shape["products"]))
    height = 1.2 + 0.17 * len(names) * max(1, len(shapes))
    figure, axes = pyplot.subplots(1, len(batches), figsize=(10, height), layout="constrained", squeeze=False)
    for panel, m in zip(axes[0], batches, strict=True):
        for i, shape in enumerate(shapes):
            _plot_shape(panel, shape, names, m, (i + 0.5) / len(shapes) - 0.5, 0.8 / len(shapes))
        panel.set_title("decode, one row" if m == "1" else f"prefill, {m} rows", fontsize=10)
        panel.set_xlabel("tokens/s of a model with 1e9 weights")
        panel.set_yticks(range(len(names)), names if panel is axes[0][0] else [""] * len(names))
        panel.set_ylim(len(names) - 0.4, -0.6)
    report.save_figure(figure, axes[0][-1], document, path)


def _name(one: dict[str, Any]) -> str:
    return f"{one['runtime']} {one['format']}"


def _plot_shape(
    panel: Any, shape: dict[str, Any], names: list[str], m: str, at: float, height: float
) -> None:
    found = [
        (names.index(_name(one)) + at, one["m"][m]["tokens_per_second_of_1e9"]) for one in shape["products"]
    ]
    panel.barh(
        [y for y, _ in found],
        [rate["median"] for _, rate in found],
        height,
        xerr=(
            [rate["median"] - rate["low"] for _, rate in found],
            [rate["high"] - rate["median"] for _, rate in found],
        ),
        error_kw={"elinewidth": 0.7},
        label=f"{shape['rows']} x {shape['cols']}",
    )
