"""Which experts to keep: the policies over made-up and recorded traces."""

from __future__ import annotations

import itertools
import json
import lzma
import random
from pathlib import Path

import numpy as np
import pytest

from flashload.errors import ArgumentError, ModelFileError
from flashload.expert_policy import (
    POLICIES,
    Clairvoyant,
    ExpertPolicy,
    Lfu,
    Lru,
    Trace,
    read_trace,
    simulate,
)

#: At a quarter of all experts: what the least-recently-used policy and the optimum reach, and what ours is held to.
RECORDED = {
    "qwen.route.csv.xz": (0.798, 0.886, 0.817),
    "gemma.route.csv.xz": (0.776, 0.877, 0.803),
    "olmoe.jsonl.xz": (0.567, 0.765, 0.657),
}


def made_up(n_tokens: int, n_layers: int = 2, n_experts: int = 6, top: int = 2, seed: int = 0) -> Trace:
    choose = random.Random(seed)
    visits = [
        (layer, tuple(choose.sample(range(n_experts), top)))
        for _ in range(n_tokens)
        for layer in range(n_layers)
    ]
    return Trace(n_layers, n_experts, visits)


def best_of_all(trace: Trace, capacity: int) -> float:
    """The optimum by trying every eviction."""
    states: dict[frozenset[tuple[int, int]], int] = {frozenset(): 0}
    for layer, chosen in trace.visits:
        wanted = frozenset((layer, expert) for expert in chosen)
        after: dict[frozenset[tuple[int, int]], int] = {}
        for state, hits in states.items():
            gained = hits + len(state & wanted)
            old = sorted(state - wanted)
            for kept in itertools.combinations(old, min(len(old), capacity - len(wanted))):
                new = wanted | frozenset(kept)
                after[new] = max(after.get(new, -1), gained)
        states = after
    return max(states.values()) / sum(len(chosen) for _, chosen in trace.visits)


@pytest.mark.parametrize("capacity", [2, 3, 5, 7])
@pytest.mark.parametrize("seed", range(4))
def test_the_clairvoyant_is_the_optimum(capacity: int, seed: int) -> None:
    trace = made_up(12, seed=seed)
    assert simulate(trace, capacity, Clairvoyant(trace)) == pytest.approx(best_of_all(trace, capacity))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("capacity", [2, 5, 11])
def test_no_policy_beats_the_optimum(name: str, capacity: int) -> None:
    trace = made_up(60, seed=5)
    assert simulate(trace, capacity, POLICIES[name](trace)) <= simulate(trace, capacity, Clairvoyant(trace))


@pytest.mark.parametrize("name", POLICIES)
def test_room_for_all_misses_first_uses_alone(name: str) -> None:
    trace = made_up(40, seed=1)
    used = {(layer, expert) for layer, chosen in trace.visits for expert in chosen}
    accesses = sum(len(chosen) for _, chosen in trace.visits)
    found = simulate(trace, trace.total_experts, POLICIES[name](trace))
    assert found == pytest.approx(1 - len(used) / accesses)


def test_hits_counted_by_hand() -> None:
    trace = Trace(1, 4, [(0, (0,)), (0, (1,)), (0, (0,)), (0, (2,)), (0, (0,)), (0, (1,))])
    assert simulate(trace, 2, Lru(trace)) == pytest.approx(2 / 6)
    assert simulate(trace, 3, Lru(trace)) == pytest.approx(3 / 6)
    assert simulate(trace, 1, Lru(trace)) == 0
    with pytest.raises(ArgumentError, match="at least one expert"):
        simulate(trace, 0, Lru(trace))


def test_a_cycle_below_the_working_set_has_no_hits_with_lru_and_some_with_ours() -> None:
    trace = Trace(4, 4, [(layer, (0, 1)) for _ in range(50) for layer in range(4)])
    capacity = trace.token_experts - 2
    assert simulate(trace, capacity, Lru(trace)) == 0
    assert simulate(trace, capacity, ExpertPolicy(trace)) > 0.5


def test_frequency_outlives_a_burst() -> None:
    """Two favourites, and a stream of strangers: frequency keeps the favourites, recency does not."""
    choose = random.Random(2)
    visits = []
    for n in range(200):
        visits.append((0, (n % 2,) if n % 5 == 0 else (choose.randrange(2, 64),)))
    trace = Trace(1, 64, visits)
    assert simulate(trace, 4, Lfu(trace)) > simulate(trace, 4, Lru(trace)) + 0.1
    assert simulate(trace, 4, ExpertPolicy(trace)) > simulate(trace, 4, Lru(trace)) + 0.1


def test_what_followed_before_is_kept() -> None:
    """A text of phrases that come back: after a phrase begins, the experts of its rest are worth keeping."""
    choose = random.Random(3)
    layers = 8
    phrases = [
        [[tuple(choose.sample(range(32), 3)) for _ in range(layers)] for _ in range(6)] for _ in range(8)
    ]
    tokens = [token for _ in range(40) for token in choose.choice(phrases)]
    trace = Trace(layers, 32, [(layer, chosen) for token in tokens for layer, chosen in enumerate(token)])
    capacity = 12 * layers
    ours = simulate(trace, capacity, ExpertPolicy(trace))
    others = max(simulate(trace, capacity, Lru(trace)), simulate(trace, capacity, Lfu(trace)))
    assert ours > others + 0.03

    class Forgetful(ExpertPolicy):
        FOLLOW_SHARE = 0.0

    assert ours > simulate(trace, capacity, Forgetful(trace)) + 0.03


def test_worth_is_finite_and_negative() -> None:
    trace = made_up(300, n_layers=3, n_experts=9)
    policy = ExpertPolicy(trace)
    for layer, chosen in trace.visits:
        policy.visit(layer, chosen)
        worth = policy.worth()
        assert worth.shape == (27,) and np.isfinite(worth).all() and (worth < 0).all()


def test_a_batch_counts_as_its_rows() -> None:
    """Shares of a chunk of rows are what the rows one by one come to, but for their order."""
    trace = made_up(1, n_layers=1, n_experts=4)
    chunk, rows = ExpertPolicy(trace), ExpertPolicy(trace)
    chunk.visit(0, [0, 1, 2], [12, 6, 6], 12)
    for n in range(12):
        rows.visit(0, [0, 1 + n % 2])
    assert np.argsort(chunk.worth())[::-1][0] == np.argsort(rows.worth())[::-1][0] == 0
    assert chunk.worth()[3] < min(chunk.worth()[:3])


# Recorded traces


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_traces(name: str, shared: Path) -> None:
    lru, optimum, least = RECORDED[name]
    trace = read_trace(shared / "traces" / name)
    capacity = trace.total_experts // 4
    assert simulate(trace, capacity, Lru(trace)) == pytest.approx(lru, abs=0.002)
    assert simulate(trace, capacity, Clairvoyant(trace)) == pytest.approx(optimum, abs=0.002)
    assert simulate(trace, capacity, ExpertPolicy(trace)) >= least


def test_reading_traces(tmp_path: Path) -> None:
    csv = "# route_trace v1\nturn,phase,step,layer,slot,expert,weight\n" + "".join(
        f"0,{phase},{step},{layer},{slot},{expert},0.5\n"
        for phase, step, layer, chosen in [
            (0, 0, 0, (3, 1)),
            (0, 1, 0, (1, 2)),
            (0, 0, 1, (0, 4)),
            (1, 2, 0, (7, 3)),
        ]
        for slot, expert in enumerate(chosen)
    )
    (tmp_path / "a.csv").write_text(csv)
    trace = read_trace(tmp_path / "a.csv")
    assert (trace.n_layers, trace.n_experts, trace.token_experts) == (2, 8, 4)
    assert list(trace.visits) == [(0, (3, 1)), (0, (1, 2)), (1, (0, 4)), (0, (7, 3))]
    with lzma.open(tmp_path / "b.jsonl.xz", "wt") as file:
        file.write('{"tok": 1, "layers": [[1, 2], [0, 3]]}\n')
    assert list(read_trace(tmp_path / "b.jsonl.xz").visits) == [(0, (1, 2)), (1, (0, 3))]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", b"0,0,0,0,0,1"),
        ("a.csv", b""),
        ("a.csv", b"# nothing\n"),
        ("a.csv", b"0,0,0,0,0\n"),
        ("a.csv", b"0,0,0,0,0,x\n"),
        ("a.csv", b"0,0,0,0,0,-1\n"),
        ("a.csv", b"0,0,0,0,0,1\n0,0,0,0,1,1\n"),
        ("a.csv", b"0,\xff"),
        ("a.jsonl", b"{}"),
        ("a.jsonl", b"[]"),
        ("a.jsonl", b'{"layers": 3}'),
        ("a.jsonl", b'{"layers": [[]]}'),
        ("a.jsonl", b'{"layers": [["x"]]}'),
        ("a.jsonl.xz", b"not xz"),
    ],
)
def test_what_is_no_trace(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ModelFileError, match="trace"):
        read_trace(tmp_path / name)
    with pytest.raises(ModelFileError):
        read_trace(tmp_path / "absent.csv")


# The benchmark


def test_the_benchmark_tells_rates_by_capacity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench import experts

    tokens = [{"layers": [list(chosen) for _, chosen in made_up(1, seed=seed).visits]} for seed in range(30)]
    (tmp_path / "small.jsonl").write_text("".join(json.dumps(token) + "\n" for token in tokens))
    (tmp_path / "README").write_text("not a trace")
    assert experts.main([str(tmp_path), "--json", "--capacities", "0.25,1"]) == 0
    document = json.loads(capsys.readouterr().out)
    (trace,) = document["traces"]
    assert (trace["name"], trace["layers"], trace["visits"]) == ("small", 2, 60)
    quarter, whole = (row["hit_rates"] for row in trace["rows"])
    assert quarter["clairvoyant"] >= max(quarter.values()) and len(set(whole.values())) == 1
    assert experts.gap_closed(whole) is None and experts.gap_closed(quarter) is not None
    assert experts.main([str(tmp_path)]) == 0
    assert "gap closed" in capsys.readouterr().out


def test_the_benchmark_without_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench import experts

    assert experts.main([str(tmp_path)]) == 1
    (tmp_path / "bad.csv").write_text("0,1\n")
    assert experts.main([str(tmp_path)]) == 1
    assert "trace" in capsys.readouterr().err
