"""A budget that changes under a loaded engine: the same tokens, inside the new budget, whatever fails meanwhile."""

from __future__ import annotations

import itertools
import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge
from edge import host
from edge.errors import ArgumentError, BudgetError, DiskError, EdgeError
from tests.neuron_packs import by_neuron, tiny_relu
from tests.tiny import tiny_gguf, tiny_llama_gguf

PROMPT = [1 + (i * 37) % 250 for i in range(40)]
N_TOKENS = 20
GREEDY: dict[str, Any] = {"max_tokens": N_TOKENS, "temperature": 0, "ignore_eos": True}
#: How far a budget lies between the floor and a resident model, from one token to the next.
STEPS = (1.0, 0.0, 0.5, 0.2, 0.9, 0.3, 1.0, 0.7)
#: model -> settings of edge.load
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "moe": ("moe", {}),
    "neurons": ("neurons", {"exact": True}),
    "kv on flash": ("dense", {"kv": "flash"}),
    "kv to flash and back": ("dense", {"context": 1024}),
    "moe, kv to flash and back": ("moe", {"context": 1024}),
}


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What this process holds depends on the tests that ran before; budgets must not."""
    monkeypatch.setattr(host, "rss_bytes", lambda: 0)
    monkeypatch.setattr(host, "peak_rss_bytes", lambda: 0)
    monkeypatch.setenv("EDGE_SCRATCH", str(tmp_path))


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("live")
    long = {"max_position_embeddings": 1024}
    sources = {
        "dense": tiny_llama_gguf(
            folder / "dense.gguf",
            type="q8_0",
            seed=5,
            num_hidden_layers=6,
            hidden_size=128,
            head_dim=64,
            **long,
        ),
        "moe": tiny_gguf(
            folder / "moe.gguf", "mixtral", "q8_0", seed=3, num_hidden_layers=4, head_dim=64, **long
        ),
        "draft": tiny_llama_gguf(
            folder / "draft.gguf", type="q8_0", seed=6, num_hidden_layers=1, hidden_size=512, **long
        ),
    }
    for name, source in sources.items():
        edge.pack(source, folder / f"{name}.edge")
    by_neuron(tiny_relu(folder, "llama", 3, num_hidden_layers=4), folder / "neurons.edge", "q8", rank=32)
    return {name: folder / f"{name}.edge" for name in (*sources, "neurons")}


@dataclass
class Case:
    """A model under some settings: the budgets it knows, and what it answers."""

    pack: Path
    settings: dict[str, Any]
    floor_bytes: int
    full_bytes: int
    tokens: list[int]

    def load(self, fraction: float = 1.0, **more: Any) -> edge.Engine:
        return edge.load(self.pack, memory=self.at(fraction), **self.settings | more)

    def at(self, fraction: float) -> int:
        return int(self.floor_bytes + fraction * (self.full_bytes - self.floor_bytes))


_CASES: dict[str, Case] = {}


def make_case(name: str, packs: dict[str, Path]) -> Case:
    if name not in _CASES:
        model, settings = CASES[name]
        settings = {"context": 128, "threads": 2, "pressure": "off"} | settings
        with pytest.raises(BudgetError) as refusal:
            edge.load(packs[model], memory=1, **settings)
        with edge.load(packs[model], memory="1GiB", **settings) as engine:
            full, tokens = engine.plan.predicted_peak_bytes, engine.generate(PROMPT, **GREEDY).tokens
        _CASES[name] = Case(packs[model], settings, refusal.value.floor_bytes, full, tokens)
    return _CASES[name]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, packs: dict[str, Path]) -> Case:
    return make_case(request.param, packs)


def inside(engine: edge.Engine) -> None:
    stats = engine.stats()
    assert stats["used_bytes"] <= stats["budget_bytes"] <= engine.plan.memory_bytes


# -- the same answer --------------------------------------------------------------------------------------------------


def test_a_change_at_every_token(case: Case) -> None:
    budgets, placements = itertools.cycle(STEPS), set()
    with case.load() as engine:
        tokens = []
        for chunk in engine.stream(PROMPT, **GREEDY):
            tokens += [] if chunk.token is None else [chunk.token]
            plan = engine.set_memory(case.at(next(budgets)))
            assert plan is engine.plan
            placements.add((plan.placement, plan.kv_on_flash is not None))
            inside(engine)
        assert tokens == case.tokens
        assert len(chunk.stats["memory_changes"]) == N_TOKENS  # the last one comes after them
        assert engine.generate(PROMPT, **GREEDY).tokens == case.tokens
    assert len({name for name, _ in placements}) > 1
    if "context" in CASES[_name(case)][1]:
        assert {on_flash for _, on_flash in placements} == {True, False}


def _name(case: Case) -> str:
    return next(name for name, one in _CASES.items() if one is case)


def test_a_change_at_every_prompt_chunk(case: Case) -> None:
    budgets = itertools.cycle(STEPS)
    with case.load(0.0) as engine:
        done = []

        def on_progress(n: int, total: int) -> None:
            done.append(n)
            engine.set_memory(case.at(next(budgets)))

        completion = engine.generate(PROMPT, on_progress=on_progress, **GREEDY)
        assert completion.tokens == case.tokens
        assert done[-1] == len(PROMPT)


@pytest.mark.parametrize("speculation", ["lookup", "draft", "lookahead"])
@pytest.mark.parametrize("name", ["dense", "kv on flash", "moe"])
def test_speculation_goes_on(name: str, speculation: str, packs: dict[str, Path]) -> None:
    case = make_case(name, packs)
    budgets = itertools.cycle(STEPS)
    more = {"draft": packs["draft"]} if speculation == "draft" else {}
    with case.load(**more) as engine:
        engine.set_memory("1GiB")
        # A fixed depth: what pays is learned anew under every placement.
        settings = GREEDY | {"speculation": {"drafters": [speculation], "depth": 3}}
        tokens, saw = [], set()
        for chunk in engine.stream(PROMPT, **settings):
            tokens += [] if chunk.token is None else [chunk.token]
            engine.set_memory("1GiB" if len(tokens) % 3 else case.at(next(budgets)))
            saw.add(engine.can_draft("draft"))
            inside(engine)
        assert tokens == case.tokens
        spent = chunk.stats["speculation"]
        assert spent["passes"] + spent["plain_passes"] <= N_TOKENS
        if speculation == "draft":
            assert saw == {True, False}  # it makes way for the model, and comes back
            assert spent["drafters"]["draft"]["tried"] > 0
        engine.set_memory("1GiB")
        assert engine.generate(PROMPT, **settings).tokens == case.tokens


def test_a_draft_that_left_says_so(packs: dict[str, Path]) -> None:
    case = make_case("dense", packs)
    with case.load(draft=packs["draft"]) as engine:
        engine.set_memory("1GiB")
        assert engine.can_draft("draft") and not engine.notes
        engine.set_memory(case.at(0.0))
        assert not engine.can_draft("draft") and "left out" in engine.notes[0]
        with pytest.raises(ArgumentError, match="draft model"):
            engine.generate(PROMPT, speculation="draft", **GREEDY)
        assert engine.generate(PROMPT, **GREEDY).tokens == case.tokens


def test_thresholds_stay(packs: dict[str, Path]) -> None:
    case = make_case("neurons", packs)
    texts = []
    for fractions in ([1.0], STEPS):
        with case.load() as engine:
            decoder = engine.metadata["config"]
            shape = (decoder["n_layers"], decoder["intermediate_size"])
            engine.set_memory(case.full_bytes + (1 << 20))
            engine._open_core().set_neuron_thresholds(np.full(shape, 0.4, np.float32))
            budgets, tokens = itertools.cycle(fractions), []
            for chunk in engine.stream(PROMPT, **GREEDY):
                tokens += [] if chunk.token is None else [chunk.token]
                engine.set_memory(case.at(next(budgets)) + (1 << 20))
            texts.append(tokens)
    assert texts[0] == texts[1] != case.tokens


def test_drawn_tokens_and_a_saved_session(packs: dict[str, Path], tmp_path: Path) -> None:
    case = make_case("kv to flash and back", packs)
    drawn = {"max_tokens": 12, "temperature": 1.2, "seed": 7, "ignore_eos": True, "speculation": "off"}
    with case.load() as engine:
        want = engine.generate(PROMPT, **drawn).tokens
        engine.save_session(tmp_path / "session")
        engine.generate([3, 4], **drawn)
        engine.set_memory(case.at(0.0))
        assert engine.load_session(tmp_path / "session") == PROMPT + want
        engine.set_memory(case.at(0.8))
        again = engine.generate(PROMPT + want, **drawn)
        assert again.stats["reused_tokens"] == len(PROMPT) + 11
        engine.set_memory(case.at(0.1))
        assert engine.generate(PROMPT, **drawn).tokens == want


# -- memory -----------------------------------------------------------------------------------------------------------


def test_keys_and_values_are_kept(case: Case) -> None:
    """A prompt that was read under one budget is not read again under another."""
    with case.load() as engine:
        engine.generate(PROMPT, **GREEDY)
        for fraction in STEPS:
            engine.set_memory(case.at(fraction))
            completion = engine.generate([*PROMPT, *case.tokens[:-1]], **GREEDY | {"max_tokens": 1})
            assert completion.stats["reused_tokens"] == len(PROMPT) + N_TOKENS - 2


def test_no_more_than_the_larger_budget(case: Case) -> None:
    with case.load(0.3) as engine:
        engine.generate(PROMPT, **GREEDY)
        for fraction in (0.1, 0.0, 0.3):
            engine.set_memory(case.at(fraction))
            engine.generate(PROMPT, **GREEDY)
            inside(engine)
        assert engine.stats()["peak_bytes"] <= case.at(0.3)


def test_below_the_floor(case: Case) -> None:
    with case.load(0.5) as engine:
        plan = engine.plan
        tokens = []
        for chunk in engine.stream(PROMPT, **GREEDY):
            tokens += [] if chunk.token is None else [chunk.token]
            with pytest.raises(BudgetError, match="needs at least") as refusal:
                engine.set_memory(1 << 20)
            assert "\n" not in str(refusal.value)
            assert engine.plan is plan
        assert tokens == case.tokens
        assert engine.set_memory(refusal.value.floor_bytes).memory_bytes == refusal.value.floor_bytes
        assert engine.generate(PROMPT, **GREEDY).tokens == case.tokens
        assert len(engine.memory_changes) == 1


@pytest.mark.parametrize("memory", ["soon", 0, -1, None, 1.5, True])
def test_no_size(memory: Any, packs: dict[str, Path]) -> None:
    with make_case("dense", packs).load() as engine, pytest.raises(ArgumentError, match="memory"):
        engine.set_memory(memory)


def test_only_a_loaded_engine(packs: dict[str, Path]) -> None:
    engine = make_case("dense", packs).load()
    engine.close()
    with pytest.raises(EdgeError, match="closed"):
        engine.set_memory("1GiB")


def test_what_changed_is_told(packs: dict[str, Path]) -> None:
    case = make_case("dense", packs)
    with case.load() as engine:
        engine.set_memory(case.at(0.5))
        stream = engine.stream(PROMPT, **GREEDY)
        next(stream)
        engine.set_memory(case.at(0.0))
        *_, last = stream
        assert last.stats["memory_changes"] == [
            {
                "from_bytes": case.at(0.5),
                "to_bytes": case.at(0.0),
                "placement": "stream",
                "reason": "asked",
            }
        ]
        assert last.stats["budget_bytes"] == case.at(0.0) and last.stats["placement"] == "stream"
        assert len(engine.memory_changes) == 2


# -- other threads ----------------------------------------------------------------------------------------------------


def test_from_another_thread(case: Case) -> None:
    """Changes come between passes whenever they like; none is lost, none blocks for good."""
    with case.load() as engine:
        done, failed = threading.Event(), []

        def change(seed: int) -> None:
            choose = random.Random(seed)
            try:
                while not done.is_set():
                    engine.set_memory(case.at(choose.random()))
                    engine.stats()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=change, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(3):
                assert engine.generate(PROMPT, **GREEDY).tokens == case.tokens
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert not failed
        assert len(engine.memory_changes) > 3
        inside(engine)


def test_a_stream_that_nobody_reads_does_not_block(packs: dict[str, Path]) -> None:
    case = make_case("dense", packs)
    with case.load() as engine:
        stream = engine.stream(PROMPT, **GREEDY)
        tokens = [next(stream).token]
        thread = threading.Thread(target=engine.set_memory, args=(case.at(0.0),))
        thread.start()
        thread.join(timeout=60)
        assert not thread.is_alive() and engine.plan.placement == "stream"
        tokens += [chunk.token for chunk in stream if chunk.token is not None]
        assert tokens == case.tokens


# -- a failing drive --------------------------------------------------------------------------------------------------


def fails_at(fault: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> bool:
    """One change in the middle of a text while every file opened meanwhile fails so; returns whether it was refused."""
    refused = False
    with case.load(0.0) as engine:
        stream = engine.stream(PROMPT, **GREEDY)
        tokens = [next(stream).token for _ in range(4)]
        monkeypatch.setenv("EDGE_IO_FAULT", fault)
        try:
            engine.set_memory(case.at(1.0))
        except EdgeError as error:
            assert "\n" not in str(error)
            assert not isinstance(error, BudgetError)
            refused = True
        monkeypatch.delenv("EDGE_IO_FAULT")
        assert engine.plan.memory_bytes == case.at(0.0 if refused else 1.0)
        while len(tokens) < N_TOKENS:
            # Readers that were opened meanwhile keep their fault: a request may end, the next one goes on.
            try:
                tokens += [chunk.token for chunk in stream if chunk.token is not None]
            except EdgeError:
                stream = engine.stream(PROMPT, **GREEDY)
                tokens = []
        assert tokens == case.tokens
        engine.set_memory(case.at(0.6))
        inside(engine)
        for _ in range(4):
            try:
                assert engine.generate(PROMPT, **GREEDY).tokens == case.tokens
                break
            except EdgeError:
                continue
        else:
            pytest.fail("no request works any more")
    return refused


@pytest.mark.parametrize("fault", ["eio@{}", "flip@{}:12345"])
def test_a_read_that_fails_meanwhile(fault: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = [fails_at(fault.format(at), case, monkeypatch) for at in (0, 1, 2, 4)]
    assert any(refused)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["eio@{}", "zero@{}", "short@{}", "flip@{}:12345", "delay@{}:5", "again@{}"]
)
def test_a_fault_at_every_read(fault: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in range(20):
        fails_at(fault.format(at), case, monkeypatch)


@pytest.mark.parametrize("name", ["kv to flash and back", "kv on flash"])
def test_a_write_that_fails_meanwhile(
    name: str, packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values that cannot go to the drive stay where they are, and with them the old budget."""
    case = make_case(name, packs)
    with case.load() as engine:
        stream = engine.stream(PROMPT, **GREEDY)
        tokens = [next(stream).token for _ in range(4)]
        if name == "kv to flash and back":
            monkeypatch.setenv("EDGE_IO_WRITE_FAULT", "enospc@0+")
            with pytest.raises(DiskError, match="scratch file"):
                engine.set_memory(case.at(0.0))
            monkeypatch.delenv("EDGE_IO_WRITE_FAULT")
            assert engine.plan.memory_bytes == case.at(1.0)
        engine.set_memory(case.at(0.0))
        assert engine.plan.kv_on_flash is not None
        tokens += [chunk.token for chunk in stream if chunk.token is not None]
        assert tokens == case.tokens


def test_a_drive_that_is_gone_for_a_while(packs: dict[str, Path]) -> None:
    """Neither the new budget nor the old one can be read: requests fail until the drive is back."""
    case = make_case("dense", packs)
    away = case.pack.with_suffix(".away")
    with case.load(0.5) as engine:
        case.pack.rename(away)
        try:
            with pytest.raises(EdgeError, match="No such file"):
                engine.set_memory(case.at(1.0))
            for _ in range(2):
                with pytest.raises(EdgeError, match="No such file"):
                    engine.generate(PROMPT, **GREEDY)
        finally:
            away.rename(case.pack)
        assert engine.plan.memory_bytes == case.at(0.5)
        assert engine.generate(PROMPT, **GREEDY).tokens == case.tokens
        inside(engine)


# -- several texts at once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "moe", "kv on flash", "kv to flash and back"])
def test_several_texts_at_once(name: str, packs: dict[str, Path]) -> None:
    """Their shared pages stay where they are; rows of a pass may become fewer than texts."""
    case = make_case(name, packs)
    prompts = [[*PROMPT[:20], 3 + i] for i in range(12)]
    settings = {"max_tokens": 5, "temperature": 0, "ignore_eos": True}
    with case.load() as engine:
        want = [completion.tokens for completion in engine.generate_many(prompts, **settings)]
    budgets, refused = itertools.cycle(STEPS), 0
    with case.load() as engine:
        on_flash = engine.plan.kv_on_flash is not None
        found: list[list[int]] = [[] for _ in prompts]
        for chunk in engine.stream_many(prompts, **settings):
            found[chunk.index] += [] if chunk.token is None else [chunk.token]
            try:
                plan = engine.set_memory(case.at(next(budgets)))
            except BudgetError:
                refused += 1
            assert (engine.plan.kv_on_flash is not None) == on_flash
            inside(engine)
        assert found == want
        assert (refused > 0) == (not on_flash)  # the floor is one with keys and values on the drive
        plan = engine.set_memory(case.at(0.0))
        assert plan.max_rows == 8
        assert plan.kv_on_flash is not None
