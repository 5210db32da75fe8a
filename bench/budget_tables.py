"""What the memory-budget benchmark says: a table of one model, and one of all in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from bench import peers, report
from bench.budget_cells import BELOW_FLOOR, is_lossy

_LOSSY = "lossy: a predictor decides which neurons count, and leaves some out that the model would use"


def _limit(point: dict[str, Any]) -> str:
    name = "below the floor" if point["percent"] == BELOW_FLOOR else f"{point['percent']:g} %"
    return f"{name} = {point['limit_bytes'] / 1e9:.2f} GB"


def _speed(point: dict[str, Any]) -> str:
    """tok/s, or why there is none, in a word or two."""
    if point["tokens_per_second"]:
        return report.spread_text(point["tokens_per_second"])
    outcome = next(iter(point.get("outcomes") or {}), "failed")
    if outcome != "late":
        return outcome
    partial = point.get("partial_tokens_per_second")
    until = f", {report.spread_text(partial)} until then" if partial else ""
    return f"> {point['timeout_seconds']:.0f} s{until}"


def _share(point: dict[str, Any]) -> str:
    """Share of what the drive would allow; in older documents, of medians."""
    if share := point.get("drive_share"):
        return f"{100 * share['median']:.0f} %"
    allowed, speed = point.get("drive_allows_tokens_per_second"), point["tokens_per_second"]
    return f"{100 * speed['median'] / allowed:.0f} %" if allowed and speed else "-"


def _allowed(point: dict[str, Any]) -> str:
    allowed = point.get("drive_allows_tokens_per_second")
    return report.figure(allowed) if allowed else "-"


def show(document: dict[str, Any]) -> None:
    """The table of one model."""
    points = document["points"]
    scored = any(p.get("perplexity") for p in points)
    weighed = any(p.get("joules_per_token") for p in points)
    rows = [
        (
            _limit(p),
            p["system"] + (" (lossy)" if is_lossy(p) else ""),
            f"{p['survived']}/{p['runs']}",
            _speed(p),
            report.spread_text(p["read_bytes_per_token"], 1e9),
            f"{_allowed(p)} ({_share(p)})",
            report.figure(p["ceiling_tokens_per_second"]),
            report.spread_text(p["read_bytes"], 1e9),
            report.spread_text(p["peak_bytes"], 1e9),
            report.spread_text(p["drive_bytes_per_second"], 1e9),
            report.spread_text(p["foreign_cpus"]),
            *([report.spread_text(p.get("joules_per_token"))] if weighed else []),
            *([report.spread_text(p.get("perplexity"))] if scored else []),
        )
        for p in points
    ]
    title = (
        f"{document['model']}, {document['full_bytes'] / 1e9:.2f} GB: {document['threads']} threads, "
        f"prompt {document['prompt_tokens']}, {document['tokens']} tokens; median [smallest..largest]"
    )
    columns = (
        *("limit", "system", "survived", "tok/s", "GB read/token", "drive allows (reached)"),
        *("pin+stream allows", "GB read, whole run", "peak GB", "drive GB/s", "others' cpus"),
        *(["J/token"] if weighed else []),
        *(["perplexity"] if scored else []),
    )
    report.print_table(title, columns, rows, _notes(document))


def _notes(document: dict[str, Any]) -> list[str]:
    points = document["points"]
    notes = [f"{_limit(p)}, {p['system']}: {p['outcome']}" for p in points if p["survived"] < p["runs"]]
    notes += [f"{name}: {peers.system_of(name).says}" for name in dict.fromkeys(p["system"] for p in points)]
    other = {(p["prompt_tokens"], p["tokens"], p["system"]) for p in points if p.get("tokens", 0)} - {
        (document["prompt_tokens"], document["tokens"], p["system"]) for p in points
    }
    notes += [f"{system}: prompt {prompt}, {tokens} tokens" for prompt, tokens, system in sorted(other)]
    if any(map(is_lossy, points)):
        notes.append(_LOSSY)
    if document.get("process_bytes"):
        notes.append(
            f"limits are percent of the model and {document['process_bytes'] / 2**20:g} MiB for the process"
        )
    notes.append(
        "drive allows: the drive's mean rate right before and after a run over what a token of that run read, and the "
        "share of that reached (medians of the runs)"
    )
    if not any(p.get("joules_per_token") for p in points):
        notes.append("energy: not readable here (no RAPL counter of a processor package)")
    ahead = document["read_ahead_kib"]
    notes.append(f"kernel read-ahead of the drive: {'not known' if ahead is None else f'{ahead} KiB'}")
    emptied = {p["cache_emptied_by"] for p in points}
    warm = max((p["cached_share_before"] for p in points), default=0.0)
    notes.append(f"cache emptied by {', '.join(sorted(emptied))}; largest share left before a run {warm:.1%}")
    notes.append(report.machine_line(document["machine"]))
    commits = Counter(p.get("commit", document["machine"]["commit"]) for p in points)
    if set(commits) != {document["machine"]["commit"]}:
        notes.append(
            "cells by commit: " + ", ".join(f"{commit} {n}" for commit, n in sorted(commits.items()))
        )
    return notes


def _cell(point: dict[str, Any] | None) -> str:
    """One system at one limit, in Markdown."""
    if point is None:
        return ""
    told = _speed(point)
    more = ["lossy"] if is_lossy(point) else []
    if point.get("perplexity"):
        more.append(f"perplexity {report.spread_text(point['perplexity'])}")
    return f"{told} ({', '.join(more)})" if more else told


def markdown(documents: Iterable[dict[str, Any]]) -> str:
    """All models in one table: tok/s of each system, and what edge read, held and could have reached."""
    documents = list(documents)
    usual = list(peers.SYSTEMS)
    found = dict.fromkeys(p["system"] for d in documents for p in d["points"])
    systems = sorted(found, key=lambda s: usual.index(s.partition(":")[0]))
    columns = ["model", "memory", *systems, "edge: MB read/token", "drive allows", "share", "peak GB"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for document in documents:
        for percent in dict.fromkeys(p["percent"] for p in document["points"]):
            here = {p["system"]: p for p in document["points"] if p["percent"] == percent}
            first = next(iter(here.values()))
            edge = here.get("edge", first)
            read = edge["read_bytes_per_token"] if "edge" in here else None
            row = [document.get("name", document["model"]), _limit(first)]
            # Where no predictor decides, edge as it comes is exact.
            same = {"edge-exact"} if edge.get("neuron_mode") else {s for s in systems if s.startswith("edge")}
            row += [_cell(here.get(s)) or ("as edge" if s in same else "-") for s in systems]
            row += [report.spread_text(read, 1e6), _allowed(edge), _share(edge)]
            row.append(report.spread_text(edge["peak_bytes"], 1e9))
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def summary(documents: Iterable[dict[str, Any]]) -> str:
    """How edge's cells ended."""
    outcomes: Counter[str] = Counter()
    for document in documents:
        for point in document["points"]:
            if point["system"].startswith("edge"):
                outcomes.update(["refused as it should" if _rightly_refused(point) else _ended(point)])
    said = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items()))
    return f"edge: {sum(outcomes.values())} cells: {said}; {outcomes['killed']} killed"


def _ended(point: dict[str, Any]) -> str:
    return "killed" if point["killed"] else next(iter(point.get("outcomes") or {"failed": 1}))


def _rightly_refused(point: dict[str, Any]) -> bool:
    return point["percent"] == BELOW_FLOOR and _ended(point) == "refused"


def show_suite(document: dict[str, Any]) -> None:
    """The table of all models, as Markdown, and how edge's cells ended."""
    documents = document["documents"]
    print(markdown(documents))
    print(f"\n{summary(documents)}")
    if any(is_lossy(p) for d in documents for p in d["points"]):
        print(_LOSSY)
    print(report.machine_line(document["machine"]))
