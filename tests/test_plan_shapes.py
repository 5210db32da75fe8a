"""Plans and predictions of shapes nobody thought of: more memory never hurts, and no plan holds more than it may."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashload.curve import Curve
from flashload.virtual_pack import VirtualPack, outline
from tests.test_estimate import DRIVE, Case, machine
from tests.tiny import hf_config

#: A placement may be this much slower than one of a little less memory: weights are held whole or not at all. The curve
#: that is told never is.
_STEP = 0.75


@st.composite
def shapes(draw: st.DrawFn) -> VirtualPack:
    """A model in header only."""
    family = draw(st.sampled_from(["llama", "mixtral", "opt"]))
    hidden, n_layers = 64 * draw(st.integers(2, 24)), draw(st.integers(1, 8))
    inner = 64 * draw(st.integers(2, 64))
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": n_layers,
        "vocab_size": draw(st.integers(100, 20_000)),
        "num_attention_heads": hidden // 32,
        "tie_word_embeddings": draw(st.booleans()),
    }
    config["ffn_dim" if family == "opt" else "intermediate_size"] = inner
    if family != "opt":
        config["num_key_value_heads"] = hidden // 32
    if family == "mixtral":
        n_experts = draw(st.integers(2, 16))
        config |= {"num_local_experts": n_experts, "num_experts_per_tok": draw(st.integers(1, n_experts))}
    option = draw(st.sampled_from(["keep", "q8", "q4"]))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(
            json.dumps(hf_config(family, **config) | {"torch_dtype": "bfloat16"})
        )
        return outline(folder).packs[option]


@given(
    shape=shapes(),
    rates=st.tuples(st.floats(2e8, 1e10), st.floats(1e10, 1e11), st.floats(2e-6, 1e-4)),
    shares=st.lists(st.floats(0, 1.2), min_size=2, max_size=5),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_more_memory_never_hurts(
    shape: VirtualPack,
    rates: tuple[float, float, float],
    shares: list[float],
) -> None:
    drive, bus, request = rates
    fields = {"bytes_per_second": drive, "sequential_bytes_per_second": drive, "request_seconds": request}
    one = Case(shape, machine(bus_bytes_per_second=bus, drive=replace(DRIVE, **fields)))
    curve: Curve = one.curve()
    budgets = [
        curve.floor_bytes + int(share * (curve.resident_bytes - curve.floor_bytes))
        for share in sorted(shares)
    ]
    options = [option for budget in budgets if (option := curve.at(budget)) is not None]
    assert len(options) == len(budgets)
    speeds = [option.predicted_tokens_per_second for option in options]
    waits = [option.time_to_first_token_seconds for option in options]
    assert speeds == sorted(speeds) and waits == sorted(waits, reverse=True)
    best = 0.0
    for budget in budgets:
        plan = one.plan(budget)
        assert plan.predicted_peak_bytes <= budget
        bare = one.model.predict(plan).tokens_per_second
        assert bare >= _STEP * best
        best = max(best, bare)
