"""How texts use neurons: the curve, what is measured of it, and what a pack says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashload.neuron_use import NeuronUse, _density, measure_falloff, neuron_use


@given(active=st.floats(0.001, 0.15), held=st.floats(0, 1), rows=st.integers(1, 64))
def test_what_rows_want_and_slots_do_not_hold(active: float, held: float, rows: int) -> None:
    use = NeuronUse(active)
    last = math.exp(-use.falloff)
    alone = active * (math.exp(-use.falloff * held) - last) / (1 - last)
    assert use.wanted_share("exact", 1, held) == pytest.approx(alone, rel=1e-2)
    missing, union = use.wanted_share("exact", rows, held), use.wanted_share("exact", rows)
    assert missing <= union <= min(1.0, rows * active * 1.01) and missing <= 1 - held + 1e-9
    assert union - missing <= held + 1e-4  # all that is held may be wanted
    assert use.wanted_share("exact", rows + 1, held) >= missing


@given(active=st.floats(0.2, 1.0), held=st.floats(0, 1))
def test_use_of_many_neurons_is_as_uneven_as_it_can_be(active: float, held: float) -> None:
    use = NeuronUse(active)
    assert use.wanted_share("exact", 1) == pytest.approx(active, rel=1e-2)
    assert NeuronUse(1.0).wanted_share("exact", 1, held) == pytest.approx(1 - held)
    assert use.wanted_share("exact", 1, held) <= 1 - held + 1e-9


def test_missing_neurons_as_measured() -> None:
    """``python -m bench window`` on OPT-6.7B's shape with the published statistics, its predictor deciding."""
    use = NeuronUse(0.1, 0.098)
    for held, missing in ((0.1, 0.541), (0.2, 0.324), (0.374, 0.138), (0.5, 0.082)):
        assert use.wanted_share("predictor", 1, held) / 0.098 == pytest.approx(missing, rel=0.2)


@pytest.mark.parametrize("falloff", [0.0, 3.0, 8.0])
def test_how_uneven_use_is_can_be_measured(falloff: float) -> None:
    draw = np.random.default_rng(0)
    chance = 0.05 * np.array([_density(falloff, (i + 0.5) / 1000) for i in range(1000)])
    chance = np.minimum(1.0, draw.permutation(chance))
    found = measure_falloff([draw.random((600, 1000)) < chance for _ in range(2)])
    # The recent past is not all there is to know: what is found is a little less.
    assert 0.6 * falloff - 0.1 <= found <= falloff + 0.3


def test_nothing_open_tells_nothing() -> None:
    assert measure_falloff([np.zeros((64, 32), bool)]) == 0.0 and measure_falloff([]) == 0.0


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, NeuronUse()),
        ({"predictor": {"active": 0.03, "predicted": 0.1, "falloff": 4.5}}, NeuronUse(0.03, 0.1, 4.5)),
        ({"predictor": {"active": 2.0, "predicted": "0.1", "falloff": float("nan")}}, NeuronUse()),
        ({"predictor": {"active": True, "predicted": -1, "falloff": 1e9}}, NeuronUse()),
        ({"predictor": []}, NeuronUse()),
        ({"calibrated_to": {}}, NeuronUse(in_order=True)),
        (
            {"calibrated_to": {"active": 0.25, "missed": 0.5, "false_alarms": 0.5}},
            NeuronUse(0.25, 0.5, in_order=True),
        ),
        ({"calibrated_to": {"active": 0.2}, "predictor": {"active": 0.1}}, NeuronUse(0.1, in_order=True)),
    ],
)
def test_what_metadata_says_of_neurons(said: dict[str, Any], expected: NeuronUse) -> None:
    assert neuron_use(said, "relu") == expected
    assert neuron_use(said, "silu").active_share == 1.0


@given(active=st.floats(0.01, 1.0), held=st.floats(0, 1), rows=st.integers(1, 64))
def test_the_order_of_records_changes_where_the_missing_lie_not_how_many(
    active: float, held: float, rows: int
) -> None:
    alike, ordered = NeuronUse(active), NeuronUse(active, in_order=True)
    ((whole, missing),) = alike.missing("exact", rows, held)
    parts = ordered.missing("exact", rows, held)
    assert whole == 1 and sum(part for part, _ in parts) == pytest.approx(1 - held)
    assert sum(part * lacking for part, lacking in parts) == pytest.approx(missing)
    lacking = [share for _, share in parts]
    assert lacking == sorted(lacking, reverse=True)
