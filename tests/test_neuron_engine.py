"""Models by neuron: every number of slots gives the bits of the resident model, and a predictor what it promises."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import _edge
import numpy as np
import pytest

import edge
from edge import host
from edge.errors import ArgumentError, BudgetError, CorruptError, DiskError
from flashload.format import PackFile
from flashload.plan import NEURONS, RESIDENT, STREAM, UNUSED, Plan, make_plan, weights_of
from tests.neuron_packs import FORMATS, by_neuron, decoded, tiny_relu
from tests.oracle import Oracle
from tests.speculating import Nodes, chain, with_guesses

ISAS = tuple(isa["name"] for isa in _edge.isas() if isa["available"])
CONTEXT = 192
N_NEURONS = 160
RING_BYTES = 160 << 10  # one layer's gates of f16
PROMPT = [1, 17, 5, 99, 42, 7, 63, 120, 3, 8, 21]
FAMILIES = {"llama": {"intermediate_size": N_NEURONS}, "opt": {"ffn_dim": N_NEURONS}}


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("neurons")
    out = {}
    for (family, sizes), bits in itertools.product(FAMILIES.items(), FORMATS):
        # 80 values are two and a half blocks of 32: rows end inside a group, columns inside a block pair.
        hidden = {"hidden_size": 80 if bits == "f16" else 96, "num_attention_heads": 2}
        if family == "llama":
            hidden |= {"num_key_value_heads": 1}
        dense = tiny_relu(
            folder / bits, family, num_hidden_layers=3, max_position_embeddings=256, **sizes, **hidden
        )
        out[family, bits] = by_neuron(dense, folder / f"{family}-{bits}.edge", bits, rank=32)
    return out


@cache
def plan_of(path: Path, share: float, predictor: bool | str, threads: int = 2) -> tuple[Plan, dict[str, Any]]:
    """share 1 is resident, 0 the floor."""
    file = PackFile(path)
    try:
        weights, decoder = weights_of(file), file.config.to_json()
    finally:
        file.close()
    arguments: dict[str, Any] = {
        "context": CONTEXT,
        "threads": threads,
        "host_bytes": 0,
        "predictor": predictor,
    }
    full = make_plan(weights, decoder, memory_bytes=1 << 34, **arguments)
    if share == 1:
        return full, decoder
    with pytest.raises(BudgetError) as refusal:
        make_plan(weights, decoder, memory_bytes=1, **arguments)
    floor = refusal.value.floor_bytes
    memory = floor + int(share * max(0, full.predicted_peak_bytes - 1 - floor))
    return make_plan(weights, decoder, memory_bytes=memory, **arguments), decoder


def windowed(path: Path, slots: int | list[int], mode: str = "exact") -> dict[str, Any]:
    """Options with so many slots per layer, whatever a plan would choose; mode "streamed": the gate rows of all layers
    but the second stream.
    """
    plan, decoder = plan_of(path, 1, True)
    file = PackFile(path)
    placements, n_slots, layer = list(plan.placements), list(plan.neuron_slots), 0
    streamed = []
    for i, (name, entry) in enumerate(file.entries.items()):
        if name.endswith(".neurons.gates") and mode == "streamed" and entry.layer != 1:
            placements[i] = STREAM
            streamed.append(i)
        elif name.endswith(".neurons.gates") and mode != "predictor":
            placements[i], n_slots[i] = NEURONS, entry.rows
        if ".predictor." in name and mode == "predictor":
            placements[i] = RESIDENT
        if name.endswith(".neurons.records"):
            n_slots[i] = slots if isinstance(slots, int) else slots[layer]
            layer += 1
    file.close()
    return plan.engine_options(
        path,
        decoder,
        placement=placements,
        stream_order=streamed,
        ring_bytes=RING_BYTES if streamed else 0,
        neuron_slots=n_slots,
        neuron_bytes=1 << 24,
        neuron_staging_bytes=64 << 10,
        budget_bytes=1 << 27,
    )


def answer(
    settings: dict[str, Any], prompt: list[int] | None = None, n_tokens: int = 12
) -> tuple[list[int], list[float]]:
    return generate(_edge.Engine(settings), prompt or PROMPT, n_tokens)


def generate(engine: _edge.Engine, prompt: list[int], n_tokens: int) -> tuple[list[int], list[float]]:
    sequence = _edge.Sequence(engine)
    sequence.set_tokens(prompt)
    sampler = _edge.Sampler({"temperature": 0.0}, 320)
    tokens, logprobs = [], []
    for _ in range(n_tokens):
        token, logprob, _ = sequence.next(sampler)
        tokens.append(token)
        logprobs.append(logprob)
    return tokens, logprobs


@cache
def expected(path: Path, n_prompt: int = len(PROMPT)) -> tuple[list[int], list[float]]:
    plan, decoder = plan_of(path, 1, True)
    return answer(plan.engine_options(path, decoder, isa="ref", threads=1, max_rows=1), long_prompt(n_prompt))


def long_prompt(n: int) -> list[int]:
    return [PROMPT[i % len(PROMPT)] + i // len(PROMPT) for i in range(n)]


# Against the definition


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", FORMATS)
def test_logits_match_the_oracle(packs: dict[tuple[str, str], Path], family: str, bits: str) -> None:
    path = packs[family, bits]
    tokens = list(range(1, 33))
    oracle = Oracle(PackFile(path).config.to_json(), decoded(path)).logits(tokens)[-1]
    for settings in (windowed(path, N_NEURONS), windowed(path, 16)):
        sequence = _edge.Sequence(_edge.Engine(settings))
        sequence.set_tokens(tokens)
        # Activations carry eight bits where the rows are quantised.
        bound = 2e-3 if bits == "f16" else 0.05
        assert np.abs(sequence.logits() - oracle).max() <= bound * np.abs(oracle).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_predictor_counts_only_what_it_names(packs: dict[tuple[str, str], Path], family: str) -> None:
    path = packs[family, "f16"]
    tokens = list(range(1, 33))
    config, weights = PackFile(path).config.to_json(), decoded(path)
    oracle = Oracle(config, weights, predict=True).logits(tokens)
    whole = Oracle(config, weights).logits(tokens)
    assert np.abs(oracle[-1] - whole[-1]).max() > 0.01 * np.abs(whole).max()  # it does leave some out
    sequence = _edge.Sequence(_edge.Engine(windowed(path, 16, "predictor")))
    sequence.set_tokens(tokens)
    assert np.abs(sequence.logits() - oracle[-1]).max() <= 5e-3 * np.abs(oracle[-1]).max()


# One answer


@pytest.mark.parametrize("slots", [0, 1, 16, 80, N_NEURONS - 1, N_NEURONS, [0, N_NEURONS, 30]])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", FORMATS)
def test_every_number_of_slots(
    packs: dict[tuple[str, str], Path], family: str, bits: str, slots: int | list[int]
) -> None:
    path = packs[family, bits]
    for mode in ("exact", "streamed"):
        assert answer(windowed(path, slots, mode)) == expected(path)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", FORMATS)
def test_every_isa_thread_count_and_chunk(
    packs: dict[tuple[str, str], Path], bits: str, isa: str, threads: int
) -> None:
    path = packs["llama", bits]
    for rows, slots in ((1, 20), (4, 20), (128, 20), (128, N_NEURONS)):
        settings = windowed(path, slots) | {"isa": isa, "threads": threads, "max_rows": rows}
        assert answer(settings) == expected(path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [7, 64, 65, 128])
def test_prompts_longer_than_one_reading(packs: dict[tuple[str, str], Path], family: str, rows: int) -> None:
    path = packs[family, "q8"]
    prompt = long_prompt(150)
    for slots, mode in ((20, "exact"), (20, "streamed"), (N_NEURONS, "exact")):
        assert answer(windowed(path, slots, mode) | {"max_rows": rows}, prompt) == expected(path, 150)


@pytest.mark.parametrize("half_life", [0.0, 3.0])
def test_the_policy_changes_no_bit(packs: dict[tuple[str, str], Path], half_life: float) -> None:
    path = packs["llama", "q8"]
    settings = windowed(path, 20) | {"neuron_half_life_tokens": half_life}
    assert answer(settings) == expected(path)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_exact_budget(packs: dict[tuple[str, str], Path], family: str, share: float) -> None:
    path = packs[family, "q4"]
    plan, decoder = plan_of(path, share, False)
    assert plan.neuron_mode == "exact"
    # Well below the whole model a pass of fewer rows makes room for all weights.
    assert plan.placement == ("neurons" if share == 0 else "resident") or 0 < share < 0.8
    engine = _edge.Engine(plan.engine_options(path, decoder))
    assert generate(engine, PROMPT, 12) == expected(path)
    assert engine.stats()["peak_bytes"] <= plan.core_bytes


@pytest.mark.parametrize("mode", ["exact", "predictor"])
def test_guessed_rows_change_nothing(
    packs: dict[tuple[str, str], Path], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packs["llama", "q8"]
    monkeypatch.setattr(host, "rss_bytes", lambda: 0)
    monkeypatch.setattr(host, "peak_rss_bytes", lambda: 0)
    plan, _ = plan_of(path, 0.3 if mode == "predictor" else 0.0, mode == "predictor")
    settings: dict[str, Any] = {"max_tokens": 30, "temperature": 0, "ignore_eos": True}
    memory = plan.memory_bytes + (160 << 10)
    with edge.load(path, memory=memory, context=CONTEXT, threads=2, exact=mode == "exact") as engine:
        assert (engine.plan.placement, engine.plan.neuron_mode) == ("neurons", mode)
        right = engine.generate(PROMPT, speculation="off", **settings).tokens
        if mode == "exact":
            assert right[:12] == expected(path)[0]
        text = PROMPT + right

        def some_right(tokens: list[int], _: int) -> Nodes:
            """Two branches of three; now the first is right, now the second, now neither after one token."""
            n = len(tokens)
            after = [*text[n : n + 3], 1, 1, 1][:3]
            other = [(token + 1) % 320 for token in after]
            first, second = ((after, other), (other, after), ([after[0], *other[1:]], other))[n % 3]
            return [*chain(first), (second[0], 0), (second[1], 4), (second[2], 5)]

        assert with_guesses(engine, some_right, PROMPT, **settings).tokens == right
        assert engine.generate(PROMPT, speculation="off", **settings).tokens == right


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(8))
def test_random_models_and_slots(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    family, bits = random.choice(list(FAMILIES)), random.choice(list(FORMATS))
    n = int(random.integers(2, 12)) * 32
    dense = tiny_relu(tmp_path, family, seed, **{"intermediate_size" if family == "llama" else "ffn_dim": n})
    path = by_neuron(dense, tmp_path / "m.edge", bits, rank=32)
    for _ in range(6):
        slots = [int(value) for value in random.integers(0, n + 1, 2)]
        settings = windowed(path, slots) | {"max_rows": int(random.integers(1, 20))}
        settings |= {"threads": int(random.integers(1, 4)), "isa": str(random.choice(ISAS))}
        assert answer(settings) == expected(path)


# With a predictor


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", FORMATS)
def test_a_predictor_that_names_all_changes_no_bit(tmp_path: Path, family: str, bits: str) -> None:
    sizes = FAMILIES[family]
    path = by_neuron(
        tiny_relu(tmp_path, family, **sizes), tmp_path / "m.edge", bits, rank=32, predictor_bias=1e6
    )
    for slots in (0, 30):
        assert answer(windowed(path, slots, "predictor")) == expected(path)


@pytest.mark.parametrize("bits", FORMATS)
def test_predicted_answers_depend_on_nothing_else(packs: dict[tuple[str, str], Path], bits: str) -> None:
    path = packs["llama", bits]
    first = answer(windowed(path, 16, "predictor") | {"isa": "ref", "threads": 1, "max_rows": 1})
    assert first[1] != expected(path)[1]
    for slots, rows, threads in ((0, 128, 2), (16, 3, 3), (100, 128, 1)):
        settings = windowed(path, slots, "predictor") | {"max_rows": rows, "threads": threads}
        assert answer(settings) == first


def test_predicted_records_are_read_a_layer_ahead(packs: dict[tuple[str, str], Path]) -> None:
    for mode, rows, ahead in (("predictor", 8, True), ("predictor", 1, False), ("exact", 8, False)):
        engine = _edge.Engine(windowed(packs["opt", "q4"], 16, mode) | {"max_rows": rows})
        generate(engine, PROMPT, 8)
        stats = engine.stats()
        assert (stats["neurons_expected"] > 0) == (stats["neuron_expected_hits"] > 0) == ahead
        assert stats["neuron_expected_hits"] <= stats["neuron_misses"]


def test_a_predictor_reads_less(packs: dict[tuple[str, str], Path]) -> None:
    path = packs["llama", "q8"]
    wanted = {}
    for mode in ("exact", "predictor"):
        engine = _edge.Engine(windowed(path, 0, mode))
        generate(engine, PROMPT, 4)
        wanted[mode] = engine.stats()["neurons_wanted"]
        assert engine.stats()["neuron_misses"] == wanted[mode]
    assert wanted["predictor"] != wanted["exact"]


# The plan


def test_resident_loads_neither_gates_nor_predictors(packs: dict[tuple[str, str], Path]) -> None:
    plan, _ = plan_of(packs["llama", "q8"], 1, True)
    file = PackFile(packs["llama", "q8"])
    placed = dict(zip(file.entries, plan.placements, strict=True))
    assert plan.placement == "resident" and plan.neuron_staging_bytes == 0
    assert all(p == UNUSED for name, p in placed.items() if "predictor" in name or name.endswith("gates"))
    assert all(p == NEURONS for name, p in placed.items() if name.endswith("records"))
    records = [e for name, e in file.entries.items() if name.endswith("records")]
    assert plan.slab_bytes == [e.bytes for e in records]
    assert plan.neuron_bytes == sum(e.stored_bytes for e in records)


def test_the_predictor_steps_in_when_memory_is_short(packs: dict[tuple[str, str], Path]) -> None:
    path = packs["llama", "q8"]
    shares = (0.0, 0.45, 0.5, 0.6, 0.95)
    modes = [plan_of(path, share, True)[0].neuron_mode for share in shares]
    # Below all that a predictor takes gate rows stream.
    assert modes == ["exact", "predictor", "predictor", "exact", "exact"]
    assert all(plan_of(path, share, False)[0].neuron_mode == "exact" for share in shares)
    assert plan_of(path, 0.0, True)[0].floor_bytes == plan_of(path, 0.0, False)[0].floor_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_stream_as_attention_does(packs: dict[tuple[str, str], Path], family: str) -> None:
    """From the floor up less and less of them streams; in memory they lie with the records."""
    path = packs[family, "q8"]
    file = PackFile(path)
    gates = [i for i, name in enumerate(file.entries) if name.endswith(".neurons.gates")]
    file.close()
    plans = [plan_of(path, i / 20, False)[0] for i in range(20)]
    streaming = [sum(plan.placements[gate] == STREAM for gate in gates) for plan in plans]
    assert streaming[0] == len(gates) and streaming[-1] == 0
    for plan in plans:
        streams = {w for w in gates if plan.placements[w] == STREAM}
        assert streams == set(plan.stream_order) & set(gates)
        assert all(plan.placements[w] in (STREAM, NEURONS, UNUSED) for w in gates)


@pytest.mark.parametrize("predictor", [True, False])
def test_more_memory_never_means_fewer_slots(packs: dict[tuple[str, str], Path], predictor: bool) -> None:
    path = packs["opt", "q8"]
    shares = [i / 20 for i in range(21)]
    plans = [plan_of(path, share, predictor)[0] for share in shares]
    for plan in plans:
        assert plan.predicted_peak_bytes <= plan.memory_bytes
    for one, next in itertools.pairwise(plans):
        assert one.placement != "resident" or next.placement == "resident"
        if one.neuron_mode == next.neuron_mode and one.max_rows == next.max_rows:
            assert sum(one.slab_bytes) <= sum(next.slab_bytes)
            assert one.stream_bytes >= next.stream_bytes
    assert plans[0].stream_bytes > 0  # at the floor attention streams as well


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75])
def test_predicted_runs_stay_inside_their_budget(packs: dict[tuple[str, str], Path], share: float) -> None:
    for path in packs.values():
        plan, decoder = plan_of(path, share, True)
        engine = _edge.Engine(plan.engine_options(path, decoder))
        generate(engine, PROMPT, 6)
        assert engine.stats()["peak_bytes"] <= plan.core_bytes


def test_the_core_refuses_a_plan_that_does_not_add_up(packs: dict[tuple[str, str], Path]) -> None:
    path = packs["llama", "q8"]
    settings = windowed(path, 20)
    records = settings["neuron_slots"].index(20)
    without_gates = [
        UNUSED if s == N_NEURONS else p
        for p, s in zip(settings["placement"], settings["neuron_slots"], strict=True)
    ]
    for change, message in (
        ({"neuron_bytes": 4096}, "expected .* bytes for the slots of neurons, found 4096"),
        ({"neuron_staging_bytes": 4096}, "bytes of staging"),
        ({"neuron_slots": []}, "expected records of neurons where the plan has their slots"),
        ({"placement": [RESIDENT] * len(settings["placement"])}, "expected records of neurons"),
    ):
        with pytest.raises(ArgumentError, match=message):
            _edge.Engine(settings | change)
    unread = list(settings["placement"])
    unread[records] = UNUSED
    with pytest.raises(
        ArgumentError, match=r"expected slots for its neurons|holds no neurons|expected all records"
    ):
        answer(settings | {"placement": unread})
    with pytest.raises(ArgumentError, match="predictor"):
        answer(settings | {"placement": without_gates})


def test_a_predictor_may_decide_with_everything_in_memory(packs: dict[tuple[str, str], Path]) -> None:
    path = packs["llama", "q8"]
    few = answer(windowed(path, 16, "predictor"))
    assert answer(windowed(path, N_NEURONS, "predictor")) == few != expected(path)
    full, decoder = plan_of(path, 1, "on")
    assert answer(full.engine_options(path, decoder)) == few
    exact = plan_of(path, 1, False)[0]
    n_bytes = sum(e.stored_bytes for name, e in PackFile(path).entries.items() if ".predictor." in name)
    assert full.neuron_mode == "predictor" and full.placement == "resident"
    assert full.resident_bytes == exact.resident_bytes + n_bytes
    short = plan_of(path, 0.5, "on")[0]
    assert short.predicted_peak_bytes <= short.memory_bytes and short.placement != "resident"
    assert answer(short.engine_options(path, decoder)) == few
    with edge.load(path, predictor="on", context=64) as engine:
        assert engine.plan.neuron_mode == "predictor" and engine.plan.placement == "resident"
    with edge.load(path, predictor="on", exact=True, context=64) as engine:
        assert engine.plan.neuron_mode == "exact"


def test_a_predictor_that_is_not_there_cannot_decide(tmp_path: Path) -> None:
    bare = by_neuron(tiny_relu(tmp_path), tmp_path / "bare.edge")
    with pytest.raises(ArgumentError, match="expected a pack with predictors, found none"):
        edge.load(bare, predictor="on")


# Through the API


def test_load_options(packs: dict[tuple[str, str], Path]) -> None:
    path = packs["llama", "q8"]
    with pytest.raises(ArgumentError, match="predictor: expected one of auto, on, off"):
        edge.load(path, predictor="maybe")
    with pytest.raises(BudgetError) as refusal:
        edge.load(path, memory=1, context=64)
    memory = refusal.value.floor_bytes + (64 << 10)
    for choice in ({}, {"predictor": "off"}, {"exact": True}):
        with edge.load(path, memory=memory, context=64, **choice) as engine:
            assert engine.plan.neuron_mode == "exact"
            assert engine.plan.placement == "neurons" and engine.plan.stream_order
            right = engine.generate(PROMPT, max_tokens=4, temperature=0, ignore_eos=True)
            assert right.tokens == expected(path)[0][:4]
            assert right.stats["placement"] == "neurons" and engine.stats()["neurons_wanted"] > 0
    with pytest.raises(BudgetError):
        edge.load(path, memory=memory, context=64, predictor="on")


# Failing drives


@pytest.mark.parametrize("fault", ["eio@{}", "zero@{}", "flip@{}:12345", "again@{}", "delay@{}:2"])
@pytest.mark.parametrize("mode", ["exact", "streamed", "predictor"])
def test_a_fault_at_every_read_of_a_generation(
    packs: dict[tuple[str, str], Path], mode: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packs["llama", "q8"]
    right = answer(windowed(path, 20, mode))
    n_failed = 0
    for at in range(6, 30):
        monkeypatch.setenv("EDGE_IO_FAULT", fault.format(at))
        try:
            engine = _edge.Engine(windowed(path, 20, mode))
        except (DiskError, CorruptError):
            n_failed += 1
            continue
        finally:
            monkeypatch.delenv("EDGE_IO_FAULT")
        failed = 0
        for _ in range(4):  # until each reader has passed the faulty number
            try:
                assert generate(engine, PROMPT, 12) == right
            except (DiskError, CorruptError) as error:
                assert "\n" not in str(error)
                failed += 1
        n_failed += failed
        assert failed <= (2 if mode == "streamed" else 1)
        assert generate(engine, PROMPT, 12) == right
    assert (n_failed > 0) == (fault[:4] in ("eio@", "zero", "flip"))


def test_a_cancelled_pass_leaves_the_slots_usable(packs: dict[tuple[str, str], Path]) -> None:
    path = packs["llama", "q8"]
    engine = _edge.Engine(windowed(path, 20, "streamed"))
    for _ in range(3):
        engine.cancel()
        with pytest.raises(edge.errors.CancelledError):
            generate(engine, PROMPT, 1)
        engine.resume()
        assert generate(engine, PROMPT, 12) == expected(path)
