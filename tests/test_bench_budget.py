"""The memory-budget benchmark: cells that are kept, suites, how a cell ended, and the tables."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil")

from bench import budget, budget_cells, budget_suite, budget_tables, machine, peers, report
from bench.budget_cells import Cells
from bench.budget_figure import plot_speed_over_memory
from bench.cgroup import Finished, cgroup_refusal
from bench.children import protocol
from tests.neuron_packs import by_neuron, tiny_relu
from tests.tiny import tiny_llama_gguf

DEFAULTS: dict[str, Any] = {
    "budgets": [100, 50],
    "systems": ["edge", "naive"],
    "prompt": 8,
    "tokens": 4,
    "runs": 1,
    "timeout": 60,
}
FACTS = {"cpu": "c", "cpus": 2, "isa": [], "memory_bytes": 2**30, "system": "s", "commit": "c", "date": "2026-01-01",
         "load_average": 0.0}  # fmt: skip


def cell(system: str = "edge", percent: float = 50, rate: float | None = 2.0, **more: Any) -> dict[str, Any]:
    return {
        "system": system,
        "percent": percent,
        "limit_bytes": 10**9,
        "prompt_tokens": 8,
        "tokens": 4,
        "timeout_seconds": 60,
        "runs": 1,
        "survived": 1 if rate else 0,
        "killed": 0,
        "outcome": "survived",
        "outcomes": {"done": 1},
        "neuron_mode": "",
        "tokens_per_second": report.spread_json([rate]) if rate else None,
        "read_bytes_per_token": report.spread_json([5e8]),
        "drive_allows_tokens_per_second": 4.0,
        "read_bytes": None,
        "peak_bytes": report.spread_json([9e8]),
        "drive_bytes_per_second": report.spread_json([2e9]),
        "foreign_cpus": report.spread_json([0.0]),
        "ceiling_tokens_per_second": 3.0,
        "cache_emptied_by": "drop_caches",
        "cached_share_before": 0.0,
        "commit": "c",
    } | more


def document(*points: dict[str, Any], name: str = "m") -> dict[str, Any]:
    return {"machine": FACTS, "model": f"{name}.gguf", "name": name, "full_bytes": 2 * 10**9, "threads": 2,
            "prompt_tokens": 8, "tokens": 4, "read_ahead_kib": 128, "points": list(points)}  # fmt: skip


# --- suites


def test_a_suite_sets_all_and_each(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    suite = {
        "tokens": 16,
        "per_system": {"naive": {"tokens": 2}},
        "models": [
            {"model": "a.gguf", "peer_model": "b.gguf"},
            {"model": "story", "process": 1.5, "budgets": [0]},
        ],
    }
    (tmp_path / "s.json").write_text(json.dumps(suite))
    one, two = budget_suite.read_suite(tmp_path / "s.json", DEFAULTS)
    assert (one.name, one.percents, one.peer_model) == ("a", (100, 50), tmp_path / "b.gguf")
    assert [one.count(s, "tokens") for s in ("edge", "naive")] == [16, 2] and one.count(
        "naive", "prompt"
    ) == 8
    assert two.model.name == "story.edge" and two.process_bytes == 3 << 19 and two.percents == (0,)
    elsewhere = budget_suite.read_suite(tmp_path / "s.json", DEFAULTS, tmp_path / "x")
    assert elsewhere[0].model == tmp_path / "x" / "a.gguf"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "s.json"),
        ("[]", "expected an object"),
        ('{"models": [3]}', r"models\[0\]: expected an object"),
        ('{"models": [{}]}', "model: expected a file's name"),
        ('{"models": [{"model": "a", "limit": 3}]}', "'limit': expected one of"),
        ('{"models": [{"model": "a", "systems": ["x"]}]}', "systems: 'x'"),
        ('{"models": [{"model": "a", "budgets": [-1]}]}', "budgets: expected 0 to 1000, found -1"),
        ('{"models": [{"model": "a", "tokens": 0}]}', "tokens: expected 1"),
        ('{"models": [{"model": "a", "per_system": {"edge": {"budgets": 1}}}]}', "per_system: 'edge'"),
        ('{"models": [{"model": "a", "per_system": {"edge": {"tokens": "x"}}}]}', "tokens: expected 1"),
    ],
)
def test_a_wrong_suite_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=said) as refusal:
        budget_suite.read_suite(tmp_path / "s.json", DEFAULTS)
    assert "\n" not in str(refusal.value)


def test_the_suite_of_the_repository_is_one() -> None:
    path = Path(budget.__file__).parent / "suites" / "memory.json"
    cases = budget_suite.read_suite(path, DEFAULTS)
    assert len(cases) >= 6 and all(0 in case.percents for case in cases)


# --- cells


def test_a_finished_cell_is_not_measured_again(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "cells")
    assert cells.find("m-50-edge", {"tokens": 4}) is None
    cells.keep("m-50-edge", {"tokens": 4}, cell())
    assert cells.find("m-50-edge", {"tokens": 4}) == cell()
    assert cells.find("m-50-edge", {"tokens": 5}) is None and cells.find("m-25-edge", {"tokens": 4}) is None
    (kept,) = (tmp_path / "cells").iterdir()
    kept.write_text(kept.read_text()[:-9])
    assert cells.find("m-50-edge", {"tokens": 4}) is None
    Cells(None).keep("m-50-edge", {}, cell())
    assert Cells(None).find("m-50-edge", {}) is None


def test_another_file_is_another_cell(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"1")
    request = peers.Request(tmp_path / "m", 2, 100, timeout_seconds=5)
    asked = budget_cells.asked_of("edge", request, 1)
    assert asked == json.loads(json.dumps(budget_cells.asked_of("edge", request, 1)))
    (tmp_path / "m").write_bytes(b"12")
    changed = [
        budget_cells.asked_of("edge", request, 1),
        budget_cells.asked_of("edge-exact", request, 1),
        budget_cells.asked_of("edge", dataclasses.replace(request, timeout_seconds=6), 1),
        budget_cells.asked_of("edge", request, 2),
    ]
    assert asked not in changed


def test_a_run_is_compared_with_the_mean_rate_around_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """2 and 6 around the first run, which is 3 on average (all bytes over all time), 4 and 4 around the other."""
    rates = iter((2e9, 6e9, 4e9, 4e9))
    results = iter(((2.0, 1e9), (3.0, 1e9)))

    def run(system: str, _: peers.Request) -> peers.Run:
        speed, read = next(results)
        finished = Finished(0, False, "", "", 1.0, 1.0, 0, 0)
        found = {"decode_tokens_per_second": speed, "read_bytes_per_token": read}
        return peers.Run(system, finished, None, found, None, 0.0)

    monkeypatch.setattr(machine, "drive_rate", lambda _: {"bytes_per_second": next(rates)})
    monkeypatch.setattr(machine, "read_bandwidth", lambda _: {"median": 4e10})
    monkeypatch.setattr(machine, "drop_cache", lambda _: "not at all")
    monkeypatch.setattr(machine, "cached_share", lambda _: 0.0)
    monkeypatch.setattr(peers, "run", run)
    weights = budget.read_weights(tiny_llama_gguf(tmp_path / "m.gguf"))
    point = budget_cells.measure_cell("edge", peers.Request(tmp_path / "m.gguf", 2, 100), weights, 50, 2)
    assert point["drive_bytes_per_second"]["low"] == pytest.approx(3e9)
    assert point["drive_allows_tokens_per_second"] == pytest.approx(3.5)
    assert point["drive_share"]["low"] == pytest.approx(2 / 3)
    assert point["drive_share"]["high"] == pytest.approx(3 / 4)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a case with cells that cost nothing; ``asked`` counts them."""
    weights = budget.read_weights(tiny_llama_gguf(tmp_path / "m.gguf"))
    asked: list[tuple[str, float, int]] = []

    def measure_cell(system: str, request: peers.Request, *rest: Any) -> dict[str, Any]:
        asked.append((system, rest[1], request.tokens))
        lossy = {"neuron_mode": "predictor"} if system == "edge" and rest[1] == 50 else {}
        return cell(system, rest[1], **lossy)

    monkeypatch.setattr(budget_cells, "measure_cell", measure_cell)
    monkeypatch.setattr(
        peers,
        "entries",
        lambda model, systems, *_: ({s: peers.Entry(tmp_path / "m.gguf", weights) for s in systems}, {}),
    )

    def run(cells: Path | None = None, **more: Any) -> dict[str, Any]:
        asked.clear()
        case = budget_suite.case_of({**DEFAULTS, "model": str(tmp_path / "m.gguf"), **more}, tmp_path)
        return budget.measure(case, 2, Cells(cells)) | {"asked": list(asked)}

    return run


def test_a_stopped_table_goes_on(measured: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    first = measured(tmp_path / "cells", budgets=[100])
    again = measured(tmp_path / "cells", per_system={"naive": {"tokens": 2}})
    assert [a[:2] for a in first["asked"]] == [("edge", 100), ("naive", 100)]
    assert again["asked"] == [("naive", 100, 2), ("edge", 50, 4), ("naive", 50, 2)]
    assert len(again["points"]) == 4


def test_exact_is_measured_where_edge_is_lossy(measured: Callable[..., dict[str, Any]]) -> None:
    found = measured(systems=["edge", "edge-exact"])
    assert [a[:2] for a in found["asked"]] == [("edge", 100), ("edge", 50), ("edge-exact", 50)]
    found = measured(systems=["edge", "edge-lean", "naive"])
    assert [a[:2] for a in found["asked"]] == [
        ("edge", 100), ("naive", 100), ("edge", 50), ("edge-lean", 50), ("naive", 50)
    ]  # fmt: skip


def test_lean_takes_a_share(measured: Callable[..., dict[str, Any]]) -> None:
    found = measured(systems=["edge", "edge-lean:0.9", "edge-lean"], budgets=[50])
    assert [a[:2] for a in found["asked"]] == [("edge", 50), ("edge-lean:0.9", 50), ("edge-lean", 50)]
    assert peers.system_of("edge-lean:0.9").options == {"predictor": 0.9}
    assert peers.system_of("edge-lean") is peers.SYSTEMS["edge-lean"]
    points = [cell(system) for system in ("naive", "edge-lean:0.9", "edge-lean:0.8", "edge")]
    header = budget_tables.markdown([document(*points)]).splitlines()[0]
    assert header.index("| edge |") < header.index("edge-lean:0.9") < header.index("edge-lean:0.8")


@pytest.mark.parametrize(
    "name", ["edge-lean:1", "edge-lean:0", "edge-lean:x", "edge:0.9", "edge-leaner", "edge-lean:nan"]
)
def test_a_share_that_lean_cannot_have_is_no_system(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not one of edge, .* or edge-lean:SHARE"):
        peers.system_of(name)


def test_only_edge_is_asked_below_its_floor(
    measured: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget_cells, "floor_bytes", lambda *_: 10**8)
    assert [a[:2] for a in measured(budgets=[0])["asked"]] == [("edge", 0)]


def test_a_floor_is_what_edge_refuses_less_than(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("_edge")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    by_neuron(tiny_relu(tmp_path), tmp_path / "m.edge")
    assert 0 < budget_cells.floor_bytes(tmp_path / "m.edge", 16, 1) < 1 << 30


def test_what_the_drive_allows() -> None:
    assert budget_cells.drive_allows(5e8, 2e9) == 4.0
    assert budget_cells.drive_allows(0.0, 2e9) is None


# --- how a run ended


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., peers.Run]:
    def go(code: str, **request: Any) -> peers.Run:
        script = tmp_path / "child.py"
        script.write_text(f"import json, sys, time\ndef emit(**e): print(json.dumps(e), flush=True)\n{code}")
        monkeypatch.setitem(peers.SYSTEMS, "pretend", peers.System(str(script), "edge"))
        return peers.run("pretend", peers.Request(tmp_path, 2, 100, **request))

    return go


def test_a_late_run_says_how_fast_it_was(pretend: Callable[..., peers.Run]) -> None:
    code = "emit(event='loaded')\nemit(event='token', n=3, seconds=1.5)\ntime.sleep(60)"
    run = pretend(code, timeout_seconds=1.0)
    assert run.outcome == "late" and run.partial_tokens_per_second == 2.0
    assert run.failure is not None and "stopped after 3 tokens" in run.failure
    nothing = pretend("time.sleep(60)", timeout_seconds=0.3)
    assert nothing.outcome == "late" and nothing.partial_tokens_per_second is None


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("emit(event='error', message='BudgetError: memory: 3 bytes'); sys.exit(1)", "refused"),
        ("emit(event='error', message='ValueError: no'); sys.exit(1)", "failed"),
        ("emit(event='result', decode_tokens_per_second=1.0)", "done"),
    ],
)
def test_outcomes(code: str, outcome: str, pretend: Callable[..., peers.Run]) -> None:
    assert pretend(code).outcome == outcome


def test_energy_is_of_whole_packages_and_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "ENERGY_COUNTERS", str(tmp_path))

    def count(zone: str, name: str, microjoules: int) -> None:
        (tmp_path / zone).mkdir(exist_ok=True)
        (tmp_path / zone / "name").write_text(name + "\n")
        (tmp_path / zone / "energy_uj").write_text(f"{microjoules}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("10000000\n")

    assert protocol.Spent().per_token(2)["joules_per_token"] is None
    count("intel-rapl:0", "package-0", 9_000_000)
    count("intel-rapl:0:0", "core", 1)
    spent = protocol.Spent()
    count("intel-rapl:0", "package-0", 3_000_000)
    assert spent.per_token(2)["joules_per_token"] == pytest.approx(2.0)


# --- tables


def test_the_table_says_what_the_drive_allows_and_why_others_have_no_figure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    late = cell(
        "naive", rate=None, outcomes={"late": 1}, partial_tokens_per_second=report.spread_json([0.25])
    )
    refused = cell(percent=0, rate=None, outcomes={"refused": 1}, outcome="BudgetError: too few")
    budget.show(document(cell(), late, refused, cell(percent=25, neuron_mode="predictor")))
    text = " ".join(capsys.readouterr().out.split())
    assert "4.00 (50" in text and "0.250" in text and "> 60 s," in text
    assert "refused" in text and "below the floor = 1.00 GB, edge: BudgetError: too few" in text
    assert "(lossy)" in text and "energy: not readable" in text


def test_all_models_make_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    exact = cell("edge-exact", 25, 1.0, perplexity=report.spread_json([4.8]))
    guessed = cell("edge", 25, 3.0, neuron_mode="predictor", perplexity=report.spread_json([4.9]))
    documents = [
        document(cell(), cell("naive", rate=None, killed=1, outcomes={"killed": 1})),
        document(guessed, exact, cell(percent=0, rate=None, outcomes={"refused": 1}), name="n"),
    ]
    budget_tables.show_suite({"documents": documents, "machine": FACTS})
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 and len({row.count("|") for row in rows}) == 1
    assert "| m | 50 % = 1.00 GB | 2.00 | as edge | killed | 500 | 4.00 | 50 % |" in rows[2]
    assert "3.00 (lossy, perplexity 4.90) | 1.00 (perplexity 4.80) | - |" in rows[3]
    assert "edge: 4 cells: 3 done, 1 refused as it should; 0 killed" in text


@pytest.mark.parametrize(
    ("limits", "labels"),
    [((30, 70), ["30", "40", "50", "60", "70"]), ((0.5, 30), ["0.5", "1", "2", "5", "10", "20"])],
)
def test_logarithmic_axes_have_plain_numbers(limits: tuple[float, float], labels: list[str]) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.set(yscale="log", ylim=limits)
    report.plain_ticks(axes)
    figure.canvas.draw()
    shown = [t for t in axes.get_yticklabels(which="both") if limits[0] <= t.get_position()[1] <= limits[1]]
    assert sorted((t.get_text() for t in shown if t.get_text()), key=float) == labels
    assert axes.get_xscale() == "linear" and any(t.get_text() for t in axes.get_xticklabels())


def test_figures_over_powers_hold_what_died(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [cell(), cell(percent=25, rate=0.01), cell("naive", rate=None, outcomes={"killed": 1})]
    points += [
        cell("naive", 25, None, partial_tokens_per_second=report.spread_json([0.02])),
        cell(percent=0, rate=None),
    ]
    plot_speed_over_memory(document(*points), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


# --- the command


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--suite", "/no/such/file.json"],
        [__file__, __file__, "--peer-model", __file__],
        [__file__, "--process", "-1"],
    ],
)
def test_the_command_refuses(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        budget.main(arguments)
    assert ended.value.code == 2


@pytest.mark.slow
def test_two_models_under_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("_edge")
    if refusal := cgroup_refusal():
        pytest.skip(refusal)
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    by_neuron(tiny_relu(tmp_path), tmp_path / "sparse.edge")
    tiny_llama_gguf(tmp_path / "dense.gguf")
    common = {
        "budgets": [100, 0],
        "systems": ["edge", "naive"],
        "process": 300,
        "tokens": 2,
        "prompt": 4,
        "runs": 1,
    }
    models = [{"model": "dense.gguf"}, {"model": "sparse.edge"}, {"model": "absent.gguf"}]
    (tmp_path / "s.json").write_text(json.dumps(common | {"models": models}))
    arguments = [
        "--suite",
        str(tmp_path / "s.json"),
        "--cells",
        str(tmp_path / "cells"),
        "--threads",
        "1",
        "--json",
    ]
    assert budget.main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    ended = [(p["system"], p["percent"], p["outcomes"]) for d in first["documents"] for p in d["points"]]
    per_model = [("edge", 100, {"done": 1}), ("naive", 100, {"done": 1}), ("edge", 0, {"refused": 1})]
    assert ended == 2 * per_model
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cells").iterdir()}
    assert len(kept) == 6 and budget.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["documents"][0]["points"] == first["documents"][0]["points"]
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
