"""Predicted beside measured: which points pass, and one of them end to end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf", reason="the benchmarks write GGUF files with the gguf package")

from bench import plan, plan_point, plan_table  # noqa: E402
from flashload.pack import pack  # noqa: E402
from flashload.probe import DriveRate  # noqa: E402
from tests.neuron_packs import by_neuron, tiny_relu  # noqa: E402
from tests.test_estimate import MACHINE  # noqa: E402
from tests.tiny import tiny_gguf, tiny_llama_gguf  # noqa: E402


def point(speed: float = 1.0, peak: float = 1.0, prompt: float = 1.0, **more: Any) -> dict[str, Any]:
    """Predicted over measured."""
    told = {
        "tokens_per_second": 4.0 * speed,
        "time_to_first_token_seconds": prompt,
        "flash_bytes_per_token": 0.0,
    }
    seen = told | {"tokens_per_second": 4.0, "time_to_first_token_seconds": 1.0, "peak_bytes": 1e9}
    about = {"model": "m", "kind": "dense", "memory_bytes": 10**9, "placement": "stream"}
    quiet = {"machine_moved": 0.01, "others_cpus": 0.0}
    return about | quiet | {"predicted": told | {"peak_bytes": 1e9 * peak}, "measured": seen} | more


@pytest.mark.parametrize(
    ("one", "missed"),
    [
        (point(), []),
        (point(1.14, 1.029), []),
        (point(0.86, 0.98), []),
        (point(1.16), ["speed"]),
        (point(0.84), ["speed"]),
        (point(1.0, 1.04), ["peak"]),
        (point(2.0, 0.9), ["speed", "peak"]),
        (point(prompt=1.2), []),
        (point(prompt=0.7), ["prompt"]),
        ({"failure": "edge: BudgetError"}, ["failed"]),
    ],
)
def test_bars(one: dict[str, Any], missed: list[str]) -> None:
    assert plan_table.misses(one) == missed


def test_a_prediction_is_judged_by_the_drive_that_the_run_met() -> None:
    slowed = point(2.0) | {"predicted_as_met": point(1.05)["predicted"]}
    assert plan_table.misses(slowed) == [] and plan_table.misses(slowed, "predicted") == ["speed"]


def test_a_drive_at_another_rate() -> None:
    points = [{"bytes_per_request": 4096, "depth": 1, "bytes_per_second": 1e8}]
    drive = DriveRate(1e-5, 2e9, 2.5e9, 1e-4, 0.0, points=points)
    slow = plan_point.at_rate(dataclasses.replace(MACHINE, drive=drive), 1.25e9).drive
    assert slow.sequential_bytes_per_second == 1.25e9
    for n_bytes, request_bytes, in_flight_bytes in (
        (1 << 30, 1 << 20, 1 << 30),
        (1 << 20, 4096, 1 << 30),
        (1 << 20, 4096, 2048),
    ):
        asked = (n_bytes, request_bytes, in_flight_bytes)
        assert slow.seconds(*asked) == pytest.approx(2 * drive.seconds(*asked))


def test_what_two_probes_predict_is_one_figure() -> None:
    told = [{"tokens_per_second": 2.0, "memory_seconds": 0.2, "bound": "drive", "expert_hit_rate": None},
            {"tokens_per_second": 6.0, "memory_seconds": 0.4, "bound": "drive", "expert_hit_rate": None}]  # fmt: skip
    mean = plan_point._mean(told)
    assert mean == pytest.approx(
        {"tokens_per_second": 3.0, "memory_seconds": 0.3, "bound": "drive", "expert_hit_rate": None}
    )


def test_the_table_counts_and_says_what_was_not_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"cpu": "c", "cpus": 2, "isa": [], "memory_bytes": 2**30, "system": "s", "commit": "c", "date": "d",
             "load_average": 0.0}  # fmt: skip
    points = [point(), point(1.5, others_cpus=1.0), point(kind="MoE"),
              {"model": "m", "kind": "MoE", "memory_bytes": 1, "failure": "edge: too small"}]  # fmt: skip
    plan_table.show({"points": points, "threads": 2, "context": 64, "prompt_tokens": 32, "machine": facts})
    text = capsys.readouterr().out
    assert (
        "dense: 1 of 2 budgets within the bars (1 for the drive as probed); largest differences: speed 50.0"
        in text
    )
    assert "MoE: 1 of 2 budgets within the bars" in text and "failed: edge: too small" in text
    assert "not quiet at 1 of 4 points" in text


def test_kinds(tmp_path: Path) -> None:
    pack(tiny_llama_gguf(tmp_path / "dense.gguf"), tmp_path / "dense.edge")
    pack(tiny_gguf(tmp_path / "moe.gguf", "mixtral", "q8_0"), tmp_path / "moe.edge")
    by_neuron(tiny_relu(tmp_path), tmp_path / "sparse.edge")
    found = {name: plan.kind_of(tmp_path / f"{name}.edge") for name in ("dense", "moe", "sparse")}
    assert found == {"dense": "dense", "moe": "MoE", "sparse": "sparse"}


def test_models_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        "dense.gguf": ("tiny", "--type", "q4_0"),
        "moe.gguf": ("tiny-moe", "--type", "q8_0"),
        "sparse.edge": ("small-opt-sparse", "--layers", "1"),
    }
    assert set(made) == set(plan.MADE)
    monkeypatch.setattr(plan, "MADE", made)
    models = plan.made_models(tmp_path / "models")
    times = [model.stat().st_mtime_ns for model in models]
    assert plan.made_models(tmp_path / "models") == models
    assert [model.stat().st_mtime_ns for model in models] == times
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == sorted(made)


@pytest.mark.slow
def test_one_point(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    model = tiny_gguf(tmp_path / "moe.gguf", "mixtral", "q8_0")
    assert plan.main([str(model), "--shares", "0.5", "--tokens", "2", "--prompt", "4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (one,) = document["points"]
    assert one["kind"] == "MoE" and len(one["predictions"]) == len(one["machine"]) == 2
    assert len(one["drive_met_bytes_per_second"]) == 3 and one["predicted_as_met"]["tokens_per_second"] > 0
    assert one["measured"]["peak_bytes"] > 0 and one["measured"]["tokens_per_second"] > 0
    # So small a model may fit into what processes differ by.
    assert (one["predicted"]["flash_bytes_per_token"] > 0) == (one["placement"] != "resident")


@pytest.mark.slow
def test_a_run_that_fails_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "budgets", lambda *_: [1])
    model = tiny_llama_gguf(tmp_path / "m.gguf")
    assert plan.main([str(model), "--tokens", "2", "--prompt", "4", "--json"]) == 1
