"""A context that the budget cannot hold: its keys and values go to a drive, and the budget stays a ceiling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.budget.conftest import Model

Get = Callable[[str], Model]

CONTEXT = 8192
PROMPT = " ".join(["a"] * 600)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_SCRATCH", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_peak_stays_inside_and_the_tokens_are_the_same(fraction: float, model: Get) -> None:
    one = model("small")
    full = one.run("1GiB", CONTEXT, prompt=PROMPT, tokens=8).result
    assert full["plan"]["kv"] == "memory"
    # The refusal names the floor with keys and values on a drive; half way up from there is still below holding them.
    floor = one.run(1, CONTEXT).floor_bytes
    budget = int(floor + fraction * (full["plan"]["floor_bytes"] - floor))
    run = one.run(budget, CONTEXT, prompt=PROMPT, tokens=8)
    assert run.returncode == 0, run.result
    assert run.result["plan"]["kv"] == "flash"
    assert run.result["tokens"] == full["tokens"]
    assert run.result["peak_memory_bytes"] <= run.result["plan"]["predicted_peak_bytes"] <= budget


@pytest.mark.slow
@pytest.mark.usefixtures("cgroups")
def test_never_killed_in_a_group_of_that_size(model: Get) -> None:
    one = model("small")
    floor = one.run(1, CONTEXT).floor_bytes
    run = one.run(floor, CONTEXT, prompt=PROMPT, tokens=8, limit=floor)
    assert not run.killed and run.returncode == 0, run
    assert run.result["plan"]["kv"] == "flash"
