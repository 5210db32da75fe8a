"""A model that drafts for itself with a copy at fewer bits: what the copy is, when it pays; nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import _edge
import pytest

import edge
from edge import host
from edge.draft import copy_pays
from edge.errors import ArgumentError, BudgetError, UnsupportedModelError
from edge.speculation import Speculation
from flashload import pack_copy
from flashload.cache import ensure_copied
from flashload.format import METADATA, PackFile
from flashload.pack_copy import copied_bytes, copy_pack
from tests.neuron_packs import by_neuron, tiny_relu
from tests.test_speculation import SETTINGS
from tests.tiny import tiny_hf, tiny_llama_gguf

CONTEXT = 96
PROMPT = [1, 40, 41, 42, 43]
LOAD: dict[str, Any] = {"context": CONTEXT, "threads": 2, "pressure": "off", "draft": "self"}


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process holds depends on the tests that ran before; budgets must not."""
    monkeypatch.setattr(host, "rss_bytes", lambda: 0)
    monkeypatch.setattr(host, "peak_rss_bytes", lambda: 0)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("self")
    wide = {"hidden_size": 256, "intermediate_size": 776, "num_hidden_layers": 6, "head_dim": 64}
    sources = {
        "wide": tiny_hf(folder / "wide", seed=2, **wide),
        "mixture": tiny_hf(folder / "mixture", "mixtral", seed=3),
        "q4": tiny_llama_gguf(folder / "q4.gguf", type="q4_0", seed=4),
    }
    for name, source in sources.items():
        edge.pack(source, folder / f"{name}.edge")
        edge.pack(source, folder / f"{name}-lowered.edge", weights="q4")
    by_neuron(tiny_relu(folder, "llama", 3), folder / "neurons.edge", "q8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_CACHE", str(folder / "cache"))
        yield {path.stem: path for path in folder.glob("*.edge")}


def floor_of(path: Path) -> int:
    with pytest.raises(BudgetError) as refusal:
        edge.load(path, memory=1, **LOAD | {"draft": None})
    return refusal.value.floor_bytes


@pytest.fixture(scope="module")
def tight(packs: dict[str, Path]) -> int:
    """A budget that the wide model streams in, with room for its copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "rss_bytes", lambda: 0)
        patch.setattr(host, "peak_rss_bytes", lambda: 0)
        return floor_of(packs["wide"]) + (9 << 20)


@pytest.mark.parametrize("step_values", [1 << 20, 1])
@pytest.mark.parametrize("model", ["wide", "mixture"])
def test_a_copy_is_what_packing_at_four_bits_gives(
    packs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, step_values: int
) -> None:
    monkeypatch.setattr(pack_copy, "_STEP_VALUES", step_values)
    told: list[tuple[int, int]] = []
    with PackFile(packs[model]) as source:
        copy_pack(source, tmp_path / "copy.edge", lambda *done: told.append(done))
        promised = copied_bytes(source)
    with PackFile(tmp_path / "copy.edge") as copy, PackFile(packs[f"{model}-lowered"]) as expected:
        assert list(copy.entries) == list(expected.entries)
        for name, entry in expected.entries.items():
            found = copy.entries[name]
            assert (found.rows, found.layer, found.expert) == (entry.rows, entry.layer, entry.expert)
            if name != METADATA:
                assert found.format is entry.format and copy.read(name) == expected.read(name), name
        assert copy.config == expected.config and copy.metadata["weights"] == "q4"
        matrices = [e for e in copy.entries.values() if e.format in pack_copy.TILE_FORMATS]
        assert promised == sum(entry.bytes for entry in matrices)
    assert told[-1][0] == told[-1][1] and told == sorted(told)


@pytest.mark.parametrize(("model", "why"), [("q4", "8 bits or more"), ("neurons", "records of neurons")])
def test_what_cannot_be_copied_is_refused_in_one_line(packs: dict[str, Path], model: str, why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"drafts for itself: expected.*{why}") as refusal:
        edge.load(packs[model], **LOAD)
    assert "\n" not in str(refusal.value)


def test_a_copy_is_made_once(packs: dict[str, Path]) -> None:
    with PackFile(packs["wide"]) as source:
        made = ensure_copied(source)
        before = made.stat().st_mtime_ns
        assert ensure_copied(source) == made and made.stat().st_mtime_ns == before
    with PackFile(packs["mixture"]) as other:
        assert ensure_copied(other) != made


@pytest.mark.parametrize("sampling", SETTINGS)
def test_its_guesses_change_nothing(packs: dict[str, Path], tight: int, sampling: str) -> None:
    with edge.load(packs["wide"], memory=tight, **LOAD) as engine:
        assert (
            engine.plan.placement == "stream" and engine.can_draft("self") and not engine.can_draft("draft")
        )
        for prompt in (PROMPT, PROMPT[:3] + PROMPT):
            asked = {"max_tokens": 40, "ignore_eos": True, "logprobs": 2, **SETTINGS[sampling]}
            plain = engine.generate(prompt, speculation="off", **asked)
            for setting in ("auto", "self", {"drafters": "self", "depth": 3}):
                found = engine.generate(prompt, speculation=setting, **asked)
                assert (found.tokens, found.logprobs) == (plain.tokens, plain.logprobs), setting
        assert found.stats["speculation"]["drafters"]["self"]["tried"] > 0
        stats = engine.stats()
        assert stats["by_tag"]["draft"] > 0 and stats["peak_bytes"] <= tight


def test_its_guesses_are_its_own_at_four_bits(packs: dict[str, Path], tight: int) -> None:
    greedy: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "speculation": "off"}
    with (
        edge.load(packs["wide-lowered"], context=CONTEXT, threads=2) as lowered,
        edge.load(packs["wide"], memory=tight, **LOAD) as engine,
    ):
        sequence, sampler = engine._sequence, _edge.Sampler({"temperature": 0.0}, engine.vocab_size)
        assert sequence is not None and engine._speculators is not None
        speculator = engine._speculators.configured(Speculation(drafters=("self",), depth=4))
        sequence.set_tokens(PROMPT)
        for _ in range(6):
            text = list(sequence.tokens)
            speculator.step(sequence, sampler, 8, [])
            if len(text) > len(PROMPT):  # the first token comes from the prompt's own pass
                expected = lowered.generate(text, max_tokens=4, **greedy).tokens
                assert [token for token, _ in speculator.proposed()] == expected


def test_the_plan_leaves_out_what_does_not_pay(packs: dict[str, Path], tight: int) -> None:
    # Memory that the copy takes from a model which almost fits would be read from the drive for every token.
    with edge.load(packs["wide"], memory="1GiB", **LOAD) as engine:
        full = engine.plan.predicted_peak_bytes
    with edge.load(packs["wide"], memory=full - (1 << 20), **LOAD) as engine:
        assert not engine.can_draft("self")
        assert any("draft self left out" in note for note in engine.notes)
        with pytest.raises(ArgumentError, match=r"self: expected a copy of the model.*found none.*left out"):
            engine.generate(PROMPT, max_tokens=2, speculation="self")
        engine.set_memory(tight)
        assert engine.can_draft("self") and engine.generate(PROMPT, max_tokens=2, speculation="self").tokens
        engine.set_memory(floor_of(packs["wide"]) + (1 << 20))
        assert not engine.can_draft("self") and any("do not fit" in note for note in engine.notes)


def test_when_a_copy_pays(packs: dict[str, Path], tight: int) -> None:
    with edge.load(packs["wide"], memory=tight, **LOAD | {"draft": None}) as engine:
        plan = replace(engine.plan, resident_bytes=500, stream_bytes=500, flash_bytes_per_token=500)
    half = replace(plan, resident_bytes=250, stream_bytes=750, flash_bytes_per_token=750)
    assert copy_pays(plan, half, 250)
    assert copy_pays(plan, plan, 999)  # the drive is slower than any copy
    assert not copy_pays(
        replace(plan, flash_bytes_per_token=50, stream_bytes=50, resident_bytes=950), half, 250
    )
    resident = replace(plan, resident_bytes=1000, stream_bytes=0, flash_bytes_per_token=0)
    assert copy_pays(resident, resident, 280) and not copy_pays(resident, resident, 900)


def test_a_copy_has_to_be_asked_for(packs: dict[str, Path]) -> None:
    with (
        edge.load(packs["wide"], context=CONTEXT, threads=2) as engine,
        pytest.raises(ArgumentError, match="load it with draft='self'"),
    ):
        engine.generate(PROMPT, max_tokens=2, speculation="self")
