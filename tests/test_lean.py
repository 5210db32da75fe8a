"""Neurons with a price: what is passed over, what it costs, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import _edge
import numpy as np
import pytest

import edge
from edge import host
from edge.errors import ArgumentError
from flashload.format import PackFile
from flashload.lean import with_free_reads
from flashload.plan import directory_of
from flashload.plan_neurons import LEAN_KEEP, read_share
from flashload.probe import Machine
from tests.neuron_packs import by_neuron, tiny_relu
from tests.test_estimate import MACHINE
from tests.test_neuron_engine import CONTEXT, N_NEURONS, generate, long_prompt, plan_of, windowed
from tests.test_neuron_window import WEIGHTS, check, open_window, write

SLOTS = N_NEURONS // 8
#: Of the way from the floor to everything: records do not all fit there.
SHORT = 0.1


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lean")
    sizes = {"hidden_size": 96, "num_attention_heads": 2, "ffn_dim": N_NEURONS}
    dense = tiny_relu(folder, "opt", num_hidden_layers=3, max_position_embeddings=256, **sizes)
    return by_neuron(dense, folder / "opt-q8.edge", "q8", rank=32)


def settings(pack: Path, keep: float = 1.0, slots: int = SLOTS, **changes: Any) -> dict[str, Any]:
    return windowed(pack, slots, "predictor") | {"neuron_keep": keep} | changes


def run(options: dict[str, Any], n_tokens: int = 40) -> tuple[list[int], dict[str, int]]:
    """Tokens after a prompt, and what was counted."""
    engine = _edge.Engine(options)
    tokens, _ = generate(engine, long_prompt(70), n_tokens)
    return tokens, engine.stats()


def test_a_share_of_all_is_the_predictor_itself(pack: Path) -> None:
    plain = windowed(pack, SLOTS, "predictor")
    tokens, found = run(plain)
    assert run(plain | {"neuron_keep": 1.0})[0] == tokens and found["neurons_passed_over"] == 0


def test_the_smaller_the_share_the_fewer_are_read(pack: Path) -> None:
    counted = [run(settings(pack, keep))[1] for keep in (1.0, 0.98, 0.9, 0.5)]
    misses = [found["neuron_misses"] for found in counted]
    passed = [found["neurons_passed_over"] for found in counted]
    assert misses == sorted(misses, reverse=True) and misses[-1] < 0.7 * misses[0]
    assert passed == sorted(passed) and passed[0] == 0


def test_nothing_is_passed_over_where_all_have_a_slot(pack: Path) -> None:
    whole, found = run(settings(pack, 0.5, slots=N_NEURONS))
    assert found["neurons_passed_over"] == 0 and found["neuron_misses"] == 0
    assert whole == run(settings(pack, 1.0, slots=N_NEURONS))[0]


def test_the_more_reads_are_free_the_fewer_are_passed_over(pack: Path) -> None:
    counted = [run(settings(pack, 0.5, neuron_free_reads=free))[1] for free in (0, 4, 16, 64)]
    passed = [found["neurons_passed_over"] for found in counted]
    assert passed == sorted(passed, reverse=True) and passed[-1] < passed[0] / 2
    plain, _ = run(settings(pack))
    all_free, found = run(settings(pack, 0.5, neuron_free_reads=N_NEURONS))
    assert all_free == plain and found["neurons_passed_over"] == 0


def test_with_free_reads_nothing_is_left_out_in_the_end(pack: Path) -> None:
    """The more memory there is, the less is lost, at the same cost."""
    shares = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
    made = [settings(pack, 0.7, slots=int(s * N_NEURONS), neuron_free_reads=24) for s in shares]
    counted = [run(options)[1] for options in made]
    passed = [found["neurons_passed_over"] for found in counted]
    assert passed == sorted(passed, reverse=True) and passed[-1] < passed[0] / 100
    misses = [found["neuron_misses"] for found in counted]
    assert max(misses[1:]) <= misses[0]


def test_exact_gates_leave_nothing_out(pack: Path) -> None:
    """A price is for what a predictor names; where gates decide, every active neuron is read."""
    options = windowed(pack, SLOTS)
    assert run(options | {"neuron_keep": 0.5})[0] == run(options)[0]


@pytest.mark.parametrize("isa", [isa["name"] for isa in _edge.isas() if isa["available"]])
def test_same_history_same_text(pack: Path, isa: str) -> None:
    """Depends on what is in memory, not on time, threads, or how far the drive has come."""
    tokens, found = run(settings(pack, 0.9, isa=isa))
    assert found["neurons_passed_over"] > 0
    others = ({"threads": 1}, {"neuron_staging_bytes": 16 << 10}, {"io_engine": "pread"})
    for changes in others:
        again, counted = run(settings(pack, 0.9, isa=isa, **changes))
        assert again == tokens and counted["neurons_passed_over"] == found["neurons_passed_over"]


@pytest.mark.parametrize("keep", [0.9, 0.7])
def test_logits_stay_near_the_predictors(pack: Path, keep: float) -> None:
    """The part of every layer's output that is lost has about the stated share of its energy."""
    tokens = long_prompt(120)

    def logits(share: float) -> np.ndarray:
        sequence = _edge.Sequence(_edge.Engine(settings(pack, share)))
        out = []
        for i in range(60, len(tokens)):
            sequence.set_tokens(tokens[: i + 1])
            out.append(np.asarray(sequence.logits()))
        return np.stack(out)

    plain, lean = logits(1.0), logits(keep)
    centred = plain - plain.mean()
    lost = float(np.square(lean - plain).sum() / np.square(centred).sum())
    assert 0 < lost < 2 * (1 - keep)


def test_what_was_learnt_outlives_a_change_of_budget(pack: Path) -> None:
    options = settings(pack, 0.7)
    engine = _edge.Engine(options)
    sequence = _edge.Sequence(engine)
    tokens = long_prompt(120)
    for i in range(60, 100):
        sequence.set_tokens(tokens[: i + 1])
        sequence.advance()
    engine.resize(settings(pack, 0.7, slots=SLOTS // 2))
    before = engine.stats()["neurons_passed_over"]
    sequence.set_tokens(tokens[:101])
    sequence.advance()
    assert engine.stats()["neurons_passed_over"] > before


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.5, math.nan])
def test_an_impossible_share_is_refused(pack: Path, keep: float) -> None:
    with pytest.raises(ArgumentError, match="neuron_keep: expected a share above 0"):
        _edge.Engine(settings(pack, keep))


def test_reads_cannot_be_fewer_than_none(pack: Path) -> None:
    with pytest.raises(ArgumentError, match="neuron_free_reads: expected 0 or more, found -1"):
        _edge.Engine(settings(pack, neuron_free_reads=-1))


def test_the_faster_the_drive_the_more_reads_are_free(pack: Path) -> None:
    with PackFile(pack) as file:
        directory = directory_of(file)
    plan, _ = plan_of(pack, SHORT, LEAN_KEEP)
    drives = [dataclasses.replace(MACHINE.drive, request_seconds=s) for s in (1.0, 2e-6, 1e-6)]
    free = [with_free_reads(plan, directory, dataclasses.replace(MACHINE, drive=d)) for d in drives]
    reads = [p.neuron_free_reads for p in free]
    assert reads[0] == 0 < reads[1] < reads[2]
    assert plan.flash_bytes_per_token == free[0].flash_bytes_per_token <= free[2].flash_bytes_per_token
    assert free[2].engine_options(pack, {})["neuron_free_reads"] == reads[2]
    for other in (plan_of(pack, SHORT, "on")[0], plan_of(pack, 1, LEAN_KEEP)[0]):
        assert with_free_reads(other, directory, MACHINE) is other
    assert with_free_reads(plan, directory, None) is plan


def test_a_machine_that_was_measured_reads_for_nothing(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = dataclasses.replace(
        MACHINE.drive, request_seconds=1e-7, bytes_per_second=1e11, sequential_bytes_per_second=1e11
    )
    found: list[Machine | None] = [None, dataclasses.replace(MACHINE, drive=quick)]
    monkeypatch.setattr(host, "rss_bytes", lambda: 0)
    monkeypatch.setattr(host, "peak_rss_bytes", lambda: 0)
    options = {"context": CONTEXT, "threads": 2, "kv": "memory", "predictor": "lean"}
    memory = plan_of(pack, SHORT, LEAN_KEEP)[0].memory_bytes
    for machine in found:
        monkeypatch.setattr("flashload.probe.known", lambda *_, machine=machine: machine)
        with edge.load(pack, memory=memory, **options) as engine:
            assert engine.plan.neuron_mode == "lean"
            assert (engine.plan.neuron_free_reads > 0) == (machine is not None)
            assert any("was not measured" in note for note in engine.notes) == (machine is None)


def test_plan_is_lean_where_records_do_not_fit_and_exact_where_they_do(pack: Path) -> None:
    short, _ = plan_of(pack, SHORT, LEAN_KEEP)
    assert (short.neuron_mode, short.neuron_keep) == ("lean", LEAN_KEEP)
    whole, _ = plan_of(pack, 1, LEAN_KEEP)
    assert (whole.neuron_mode, whole.neuron_keep) == ("exact", 1.0)
    guided, _ = plan_of(pack, SHORT, "on")
    assert guided.neuron_keep == 1.0
    assert short.flash_bytes_per_token < guided.flash_bytes_per_token


def test_nobody_gets_it_unasked(pack: Path) -> None:
    for share in (0, SHORT, 0.4):
        for predictor in (True, False, "on"):
            assert plan_of(pack, share, predictor)[0].neuron_keep == 1.0


def test_load_takes_a_name_or_a_share(pack: Path) -> None:
    def keep(predictor: str | float, **options: Any) -> float:
        with edge.load(pack, context=192, predictor=predictor, **options) as engine:
            return float(engine.plan.neuron_keep)

    assert keep("lean") == 1.0  # everything is in memory
    for wrong in ("most", 1.0, 0.0, -0.1):
        with pytest.raises(ArgumentError, match="predictor: expected one of auto, on, off, lean, or a share"):
            keep(wrong)


def test_a_pack_without_predictors_is_refused(tmp_path: Path) -> None:
    dense = tiny_relu(tmp_path, "opt", hidden_size=96, num_attention_heads=2, ffn_dim=N_NEURONS)
    plain = by_neuron(dense, tmp_path / "plain.edge", "q8")
    with pytest.raises(ArgumentError, match="expected a pack with predictors, found none"):
        edge.load(plain, predictor="lean")


def test_shares_that_are_read_fall_with_what_is_kept() -> None:
    shares = [read_share(keep) for keep in (1.0, 0.99, 0.95, 0.9, 0.5)]
    assert shares[0] == 1.0 and shares == sorted(shares, reverse=True) and shares[-1] > 0


def test_pack_says_nothing_of_prices(pack: Path) -> None:
    """What a score is worth is learnt from the text: every pack with predictors can be lean."""
    with PackFile(pack) as file:
        assert not [name for name in file.entries if "price" in name]


def test_what_is_passed_over_earns_a_slot(tmp_path: Path) -> None:
    """A neuron that was often wanted and not read takes the slot of one that was wanted less, once it is read."""
    path = tmp_path / "n.edge"
    write(path)
    for often in (False, True):
        window = open_window(str(path), 4, half_life_tokens=8)
        for token in range(6):
            if often:
                window.pass_over(WEIGHTS[0], 9)
            check(window, 0, [0, 1, 2, 3] if token < 5 else [9])
            window.commit([0])
        assert window.held(WEIGHTS[0], [9]) == [often]
        assert window.stats()["passed_over"] == (6 if often else 0)
