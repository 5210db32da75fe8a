"""Which points of ``python -m bench plan`` pass, and the table of them."""

from __future__ import annotations

from typing import Any

from bench import report

#: Bars of the prediction, relative: key of a point -> (how it is called, bar).
BARS = {
    "tokens_per_second": ("speed", 0.15),
    "time_to_first_token_seconds": ("prompt", 0.25),
    "peak_bytes": ("peak", 0.03),
}
#: A machine that changes more than this between two probes, or on which others use more CPUs, checks nothing.
MOVED_BAR, OTHERS_BAR = 0.15, 0.2


def misses(point: dict[str, Any], told: str = "") -> list[str]:
    """The bars that a point misses; empty when it passes.

    Args:
        told: "predicted" for what the probes before and after say; else what is judged, see :func:`_judged`.
    """
    if "failure" in point:
        return ["failed"]
    return [name for key, (name, bar) in BARS.items() if abs(_off(point, key, told or _judged(point))) > bar]


def _judged(point: dict[str, Any]) -> str:
    """The prediction for the drive as it was around the run; in older documents that of the probes."""
    return "predicted_as_met" if "predicted_as_met" in point else "predicted"


def _quiet(point: dict[str, Any]) -> bool:
    return bool(point["machine_moved"] <= MOVED_BAR and point["others_cpus"] <= OTHERS_BAR)


def show(document: dict[str, Any]) -> None:
    rows, notes = [], []
    for p in document["points"]:
        if "failure" in p:
            notes.append(f"{p['model']} in {p['memory_bytes'] / 1e9:.2f} GB failed: {p['failure']}")
            continue
        told, seen = p["predicted"], p["measured"]
        rows.append(
            (
                f"{p['model']} ({p['kind']})",
                f"{p['memory_bytes'] / 1e9:.2f}",
                p["placement"],
                *pair(told["tokens_per_second"], seen["tokens_per_second"]),
                *pair(told["time_to_first_token_seconds"], seen["time_to_first_token_seconds"]),
                *pair(told["peak_bytes"] / 1e9, seen["peak_bytes"] / 1e9),
                f"{told['flash_bytes_per_token'] / 1e9:.3f} / {seen['flash_bytes_per_token'] / 1e9:.3f}",
                f"{100 * p['machine_moved']:.0f} %",
                report.figure(p["others_cpus"]),
                *_met(p),
                ", ".join(misses(p, "predicted")) or "ok",
                ", ".join(misses(p)) or "ok",
            )
        )
    columns = (
        "model",
        "GB",
        "placement",
        "tok/s told / seen",
        "off",
        f"prompt {document['prompt_tokens']} s",
    )
    columns += ("off", "peak GB", "off", "GB read/token", "moved", "others' cpus")
    columns += ("drive GB/s probed / met", "off then: speed, prompt", "bars, as probed", "bars, as met")
    title = f"predicted / measured, {document['threads']} threads, context {document['context']}"
    for kind in dict.fromkeys(p["kind"] for p in document["points"]):
        seen = [p for p in document["points"] if p["kind"] == kind and "failure" not in p]
        passed, as_probed = (sum(not misses(p, told) for p in seen) for told in ("", "predicted"))
        largest = [
            f"{name} {100 * max((abs(_off(p, key, _judged(p))) for p in seen), default=0):.1f} % (bar: {100 * bar:.0f})"
            for key, (name, bar) in BARS.items()
        ]
        notes.append(
            f"{kind}: {passed} of {sum(p['kind'] == kind for p in document['points'])} budgets within the bars "
            f"({as_probed} for the drive as probed); largest differences: {', '.join(largest)}"
        )
    if restless := [p for p in document["points"] if "failure" not in p and not _quiet(p)]:
        notes.append(
            f"not quiet at {len(restless)} of {len(document['points'])} points: the prediction moved by more than "
            f"{100 * MOVED_BAR:.0f} % between two probes, or others used more than {OTHERS_BAR:g} CPUs"
        )
    notes.append(
        "drive as met: right before the prompt, between prompt and tokens, and right after; bars are judged by the "
        "prediction for these rates"
    )
    notes.append(report.machine_line(document["machine"]))
    report.print_table(title, columns, rows, notes)


def pair(told: float, seen: float) -> tuple[str, str]:
    return f"{report.figure(told)} / {report.figure(seen)}", f"{100 * (told / seen - 1):+.0f} %"


def _met(point: dict[str, Any]) -> tuple[str, str]:
    """The drive as the probes and the run found it, and how far off the prediction is for what the run found."""
    if "predicted_as_met" not in point:
        return "-", "-"
    probed = (on["drive_bytes_per_second"] for on in point["machine"])
    rates = (", ".join(f"{r / 1e9:.2f}" for r in of) for of in (probed, point["drive_met_bytes_per_second"]))
    return " / ".join(rates), ", ".join(
        f"{100 * _off(point, key, _judged(point)):+.0f} %" for key in (*BARS,)[:2]
    )


def _off(point: dict[str, Any], key: str, told: str) -> float:
    return float(point[told][key] / point["measured"][key] - 1)
