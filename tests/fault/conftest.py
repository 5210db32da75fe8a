"""Tiny models under every placement, and the tokens they give when nothing fails."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import edge
from edge import host
from tests.tiny import tiny_gguf, tiny_hf, tiny_llama_gguf

PROMPT = [1, 17, 5, 99, 42]
N_TOKENS = 6
CONTEXT = 64
#: placement -> (model, how far the budget lies between the floor and a resident model).
PLACEMENTS = {
    "resident": ("dense", 1.0),
    "half": ("dense", 0.5),
    "floor": ("dense", 0.0),
    "experts": ("moe", 0.25),
    "experts_floor": ("moe", 0.0),
    "neurons": ("neurons", 0.3),
    "neurons_floor": ("neurons", 0.0),
}


def answer(engine: edge.Engine) -> list[int]:
    return engine.generate(PROMPT, max_tokens=N_TOKENS, temperature=0, ignore_eos=True).tokens


@dataclass(frozen=True)
class Setup:
    """A pack, a budget that gives it one placement, and what it answers."""

    name: str
    pack: Path
    memory_bytes: int
    tokens: list[int]

    def load(self) -> edge.Engine:
        return edge.load(self.pack, memory=self.memory_bytes, context=CONTEXT, threads=2)


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process holds depends on the tests that ran before; budgets must not."""
    monkeypatch.setattr(host, "rss_bytes", lambda: 0)
    monkeypatch.setattr(host, "peak_rss_bytes", lambda: 0)


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fault")
    paths = {name: folder / f"{name}.edge" for name in ("dense", "moe", "neurons")}
    edge.pack(
        tiny_llama_gguf(folder / "dense.gguf", type="q8_0", seed=5, num_hidden_layers=4), paths["dense"]
    )
    edge.pack(tiny_gguf(folder / "moe.gguf", "mixtral", "q8_0", seed=3), paths["moe"])
    relu = tiny_hf(folder / "relu", "opt", ffn_dim=1024, num_hidden_layers=3)
    edge.pack(relu, paths["neurons"], weights="q8", neurons="on")
    return paths


def floor_of(pack: Path) -> int:
    with pytest.raises(edge.errors.BudgetError) as refusal:
        edge.load(pack, memory=1, context=CONTEXT, threads=2)
    return int(refusal.value.floor_bytes)


@pytest.fixture(params=PLACEMENTS)
def setup(request: pytest.FixtureRequest, packs: dict[str, Path]) -> Setup:
    return make_setup(request.param, packs)


def make_setup(name: str, packs: dict[str, Path]) -> Setup:
    model, fraction = PLACEMENTS[name]
    pack = packs[model]
    with edge.load(pack, memory="1GiB", context=CONTEXT, threads=2) as engine:
        assert engine.plan.placement == "resident"
        full, tokens = engine.plan.predicted_peak_bytes, answer(engine)
    floor = floor_of(pack)
    return Setup(name, pack, int(floor + fraction * (full - floor)), tokens)
