"""The cache of experts: one record each, the policy's choices, hits before misses, and failing drives under it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import _edge
import numpy as np
import pytest

from flashload.errors import CorruptError, DiskError, EdgeError
from flashload.expert_policy import ExpertPolicy, Lru, Trace, simulate
from flashload.format import PackFile
from flashload.pack import pack
from flashload.plan import make_plan, weights_of
from tests.pack_maker import DEMAND, F16, PAGE, Q8_0, RESIDENT, Entry, Pack
from tests.tiny import tiny_gguf

LAYERS, EXPERTS, PARTS = 3, 8, 3
FAULTS = ["eio@{}", "short@{}", "zero@{}", "flip@{}:12345", "again@{}", "delay@{}:3"]


def make_pack() -> Pack:
    """An embedding and three layers of eight experts; the down weights of odd layers are larger."""
    random = np.random.default_rng(5)
    entries = [Entry("embed.weight", Q8_0, 64, 64)]
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            name = f"layers.{layer}.experts.{expert}"
            entries += [
                Entry(f"{name}.gate.weight", F16, 32, 64, layer, expert),
                Entry(f"{name}.up.weight", F16, 32, 64, layer, expert),
                Entry(f"{name}.down.weight", F16, 64, 32 + 32 * (layer % 2), layer, expert),
            ]
    return Pack([entry.fill(random) for entry in entries])


PACK = make_pack()
N = len(PACK.entries)
RECORD = max(
    sum(len(entry.padded) for entry in PACK.entries if (entry.layer, entry.expert) == (layer, 0))
    for layer in range(LAYERS)
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(PACK.write(tmp_path_factory.mktemp("experts") / "experts.edge"))


def weights(layer: int, expert: int) -> list[int]:
    """Gate, up and down of one expert."""
    first = 1 + (layer * EXPERTS + expert) * PARTS
    return [first, first + 1, first + 2]


def open_store(path: str, records: float, **options: Any) -> Any:
    return _edge.WeightStoreTest(path, [DEMAND] * N, demand_bytes=int(records * RECORD), **options)


def take(store: Any, layer: int, expert: int) -> None:
    for weight in weights(layer, expert):
        assert store.acquire(weight) == PACK.entries[weight].data


def visit(store: Any, layer: int, chosen: list[int]) -> list[int]:
    """What a layer does with its experts; the order they were ready in."""
    store.expect([weight for expert in chosen for weight in weights(layer, expert)])
    left, order = list(chosen), []
    while left:
        expert = left.pop(store.first_ready([weights(layer, expert)[0] for expert in left]))
        take(store, layer, expert)
        order.append(expert)
    return order


def routing(n_tokens: int, top: int = 2, seed: int = 0) -> list[tuple[int, tuple[int, ...]]]:
    """Visits with favourites that change now and then."""
    choose = random.Random(seed)
    favourites = [choose.sample(range(EXPERTS), 4) for _ in range(LAYERS)]
    visits = []
    for _ in range(n_tokens):
        for layer in range(LAYERS):
            if choose.random() < 0.05:
                favourites[layer] = choose.sample(range(EXPERTS), 4)
            pool = favourites[layer] if top <= 4 and choose.random() < 0.8 else range(EXPERTS)
            visits.append((layer, tuple(choose.sample(list(pool), top))))
    return visits


# Filling


@pytest.mark.parametrize("records", [2, 7, LAYERS * EXPERTS, LAYERS * EXPERTS + 5])
def test_filling_takes_the_free_room_and_no_more(path: str, records: int) -> None:
    store = open_store(path, records)
    store.fill()
    stats = store.stats()
    assert (stats["flash_bytes"], stats["hits"], stats["misses"]) == (0, 0, 0)
    held = min(records, LAYERS * EXPERTS)
    assert (held - 1) * RECORD * 0.6 < stats["load_bytes"] <= held * RECORD
    store.fill()  # nothing is left, or no room
    assert store.stats()["load_bytes"] == stats["load_bytes"]


def test_filling_takes_as_much_of_every_layer(path: str) -> None:
    store = open_store(path, 2 * LAYERS)
    store.fill()
    for layer in range(LAYERS):
        for expert in (0, 1):
            take(store, layer, expert)
    stats = store.stats()
    assert (stats["flash_bytes"], stats["misses"]) == (0, 0) and stats["hits"] == 2 * LAYERS * PARTS


def test_all_of_a_mixture_that_fits_is_read_once(path: str) -> None:
    store = open_store(path, LAYERS * EXPERTS)
    store.fill()
    for layer, chosen in routing(8):
        visit(store, layer, list(chosen))
    assert store.stats()["flash_bytes"] == 0 and store.stats()["misses"] == 0


def test_what_was_filled_makes_way(path: str) -> None:
    store = open_store(path, 3)
    store.fill()
    for expert in range(EXPERTS):
        visit(store, 2, [expert])
    assert store.stats()["flash_bytes"] > 0


@pytest.mark.parametrize("fault", FAULTS)
def test_an_expert_that_cannot_be_filled_is_read_when_wanted(path: str, fault: str) -> None:
    for at in range(4):
        store = open_store(path, 4, fault=fault.format(at))
        store.fill()
        for layer in range(LAYERS):
            visit(store, layer, [0, 1, 2])


def test_filling_leaves_what_is_not_on_demand(path: str) -> None:
    placements = [DEMAND] + [RESIDENT] * (N - 1)
    store = _edge.WeightStoreTest(path, placements, demand_bytes=8 * RECORD)
    before = store.stats()["load_bytes"]
    store.fill()
    assert store.stats()["load_bytes"] == before


# Records


def test_an_expert_is_one_read(path: str) -> None:
    for asked in range(PARTS):  # whichever weight is asked for first
        store = open_store(path, 2, fault="eio@1+")
        for weight in weights(1, 3)[asked:] + weights(1, 3)[:asked]:
            assert store.acquire(weight) == PACK.entries[weight].data
        read = sum(len(PACK.entries[weight].padded) for weight in weights(1, 3))
        assert store.stats()["flash_bytes"] == read
        assert (store.stats()["misses"], store.stats()["hits"]) == (PARTS, 0)
        take(store, 1, 3)
        assert (store.stats()["misses"], store.stats()["hits"]) == (PARTS, PARTS)


def test_large_experts_are_several_reads(tmp_path: Path) -> None:
    entries = [Entry(f"w{i}", F16, 512, 1024, 0, i // 3, chunk_bytes=1 << 16) for i in range(6)]
    large = Pack([entry.fill(np.random.default_rng(1)) for entry in entries])
    store = _edge.WeightStoreTest(
        str(large.write(tmp_path / "large.edge")), [DEMAND] * 6, demand_bytes=6 << 20, depth=2
    )
    store.expect(list(range(6)))
    for weight in (3, 0, 5, 1, 4, 2):
        assert store.acquire(weight) == large.entries[weight].data
    assert store.stats()["flash_bytes"] == 6 << 20


def test_experts_of_different_sizes_leave_no_gaps_too_small(path: str) -> None:
    """Layer 1's experts are larger: after any history, as many experts stay as the room has records."""
    choose = random.Random(7)
    store = open_store(path, 6)
    for _ in range(60):
        visit(store, choose.randrange(LAYERS), choose.sample(range(EXPERTS), 2))
    held = []
    for layer, expert in [(1, 0), (0, 1), (1, 2), (2, 3), (1, 4), (1, 5)]:
        held += [store.hold(weight) for weight in weights(layer, expert)[:1]]
    before = store.stats()["misses"]
    for layer, expert in [(1, 0), (0, 1), (1, 2), (2, 3), (1, 4), (1, 5)]:
        assert store.acquire(weights(layer, expert)[0]) == PACK.entries[weights(layer, expert)[0]].data
    assert store.stats()["misses"] == before


def test_rows_of_a_table_do_not_drop_an_expert_each_time(path: str) -> None:
    store = open_store(path, 7)
    for _ in range(3):  # from the second round on there is room for a row beside the experts
        store.acquire(0, [5])
        for expert in range(EXPERTS):
            take(store, 0, expert)
    for expert in range(6):
        visit(store, 0, [expert])
    before = store.stats()["misses"]
    for row in range(5):
        store.acquire(0, [row])
        for expert in range(6):
            take(store, 0, expert)
    assert store.stats()["misses"] == before + 5  # the rows themselves


# The policy


@pytest.mark.parametrize("records", [3, 6, 9, 12, 18])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_core_keeps_what_the_simulation_keeps(records: int, seed: int, path: str) -> None:
    trace = Trace(LAYERS, EXPERTS, routing(150, seed=seed))
    store = open_store(path, records)
    for layer, chosen in trace.visits:
        visit(store, layer, list(chosen))
    stats = store.stats()
    rate = stats["hits"] / (stats["hits"] + stats["misses"])
    assert rate == pytest.approx(simulate(trace, records, ExpertPolicy(trace)), abs=0.003)


def test_fewer_misses_than_least_recently_used(path: str) -> None:
    trace = Trace(LAYERS, EXPERTS, routing(300, seed=3))
    store = open_store(path, 9)
    for layer, chosen in trace.visits:
        visit(store, layer, list(chosen))
    stats = store.stats()
    assert stats["hits"] / (stats["hits"] + stats["misses"]) > simulate(trace, 9, Lru(trace)) + 0.02


def test_a_prompt_tells_how_often_each_expert_was_chosen(path: str) -> None:
    """A chunk of 20 rows chose all of a layer's experts, half of them once: those make way."""
    rows = [9, 1, 1, 9, 1, 9, 9, 1]
    store = open_store(path, EXPERTS)
    all_of_it = [weight for expert in range(EXPERTS) for weight in weights(0, expert)]
    store.expect(all_of_it, [n for n in rows for _ in range(PARTS)], 20)
    for expert in range(EXPERTS):
        take(store, 0, expert)
    visit(store, 1, [0, 1, 2, 3])
    before = store.stats()["misses"]
    for expert in (0, 3, 5, 6):
        take(store, 0, expert)
    assert store.stats()["misses"] == before


def test_the_working_set_is_told(path: str) -> None:
    store = open_store(path, 4)
    assert store.stats()["pass_expert_bytes"] == 0
    for _ in range(2):
        for layer in range(LAYERS):
            visit(store, layer, [1, 5])
    expected = sum(
        len(PACK.entries[weight].padded)
        for layer in range(LAYERS)
        for e in (1, 5)
        for weight in weights(layer, e)
    )
    assert store.stats()["pass_expert_bytes"] == expected


def test_experts_numbered_at_random(tmp_path: Path) -> None:
    """Numbers out of a file that are no grid of layers and experts: the least recently used goes, no table is made."""
    random = np.random.default_rng(2)
    places = [(0, 65535), (65535, 3), (7, 0), (9, 12)]
    odd = Pack([Entry(f"w{i}", F16, 32, 64, *place).fill(random) for i, place in enumerate(places)])
    store = _edge.WeightStoreTest(str(odd.write(tmp_path / "odd.edge")), [DEMAND] * 4, demand_bytes=3 * PAGE)
    for weight in (0, 1, 2, 0, 3, 0, 2):  # 3 takes the place of 1
        store.expect([weight])
        assert store.acquire(weight) == odd.entries[weight].data
    assert (store.stats()["hits"], store.stats()["misses"]) == (3, 4)


# Expected experts


def test_hits_come_before_misses(path: str) -> None:
    store = open_store(path, 8, fault="delay@2+:20")
    visit(store, 0, [4])
    visit(store, 0, [6])
    assert visit(store, 0, [1, 4, 5, 6])[:2] == [4, 6]


@pytest.mark.parametrize("records", [1, 2, 3, 4])
def test_more_experts_than_room(records: int, path: str) -> None:
    store = open_store(path, records)
    for _ in range(3):
        for layer in range(LAYERS):
            assert sorted(visit(store, layer, list(range(EXPERTS)))) == list(range(EXPERTS))


def test_expected_experts_do_not_make_way_for_each_other(path: str) -> None:
    store = open_store(path, 4)
    visit(store, 0, [0, 1, 2, 3])
    before = store.stats()["misses"]
    visit(store, 0, [7, 6, 1, 0])
    assert store.stats()["misses"] - before == 2 * PARTS


def test_an_abandoned_expectation_does_not_hold_room(path: str) -> None:
    store = open_store(path, 4)
    store.expect([weight for expert in range(4) for weight in weights(0, expert)])
    assert sorted(visit(store, 1, [0, 1, 2, 3])) == [0, 1, 2, 3]
    before = store.stats()["misses"]
    visit(store, 1, [0, 1, 2, 3])
    assert store.stats()["misses"] == before


def test_expectations_of_nothing(path: str) -> None:
    store = open_store(path, 4)
    store.expect([])
    store.expect([-1, N, 1 << 30])
    assert store.first_ready([-1, N]) == 0
    assert store.first_ready(weights(0, 0)) == 0
    take(store, 0, 0)


# Failing drives


def test_damage_is_told_of_the_weight_that_has_it(tmp_path: Path) -> None:
    path = PACK.write(tmp_path / "a.edge")
    choose = random.Random(4)
    for weight in range(1, N):
        entry, offset = PACK.entries[weight], PACK.offsets[weight]
        image = bytearray(path.read_bytes())
        at = choose.randrange(len(entry.padded))
        image[offset + at] ^= 0x10
        damaged = tmp_path / "damaged.edge"
        damaged.write_bytes(image)
        store = open_store(str(damaged), 4)
        store.expect(weights(entry.layer, entry.expert))
        for other in weights(entry.layer, entry.expert):
            if other == weight:
                with pytest.raises(CorruptError, match=f"{entry.name}: chunk {at // PAGE} "):
                    store.acquire(other)
            else:
                assert store.acquire(other) == PACK.entries[other].data


def test_a_weight_beside_a_damaged_one_in_use(tmp_path: Path) -> None:
    gate, up, down = weights(1, 2)
    image = bytearray(PACK.image())
    image[PACK.offsets[up]] ^= 1
    path = tmp_path / "a.edge"
    path.write_bytes(image)
    store = open_store(str(path), 1)
    held = store.hold(gate)
    with pytest.raises(CorruptError):
        store.acquire(up)
    assert store.bytes(held) == PACK.entries[gate].data
    held.release()
    path.write_bytes(PACK.image())  # mended: the record is read again
    for weight in (down, up, gate):
        assert store.acquire(weight) == PACK.entries[weight].data


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("depth", [1, 4])
def test_a_fault_at_every_read(depth: int, fault: str, path: str) -> None:
    visits = routing(6, seed=9)
    n_failed = 0
    for at in range(12):
        store = open_store(path, 6, fault=fault.format(at), depth=depth)
        errors = 0
        for layer, chosen in visits:
            try:
                visit(store, layer, list(chosen))
            except (DiskError, CorruptError):
                errors += 1  # the request ends, the store does not
                store.rewind()
        n_failed += errors
        for layer in range(LAYERS):
            visit(store, layer, [0, 1])
        assert errors <= PARTS  # a fault in one expert's read may be told of each of its weights
    assert (n_failed > 0) == (fault[:4] in ("eio@", "zero", "flip", "shor")) or fault.startswith("short")


def test_a_drive_that_is_dead(path: str) -> None:
    store = open_store(path, 6, fault="eio@2+")
    visit(store, 0, [0, 1])
    for _ in range(3):
        for layer in range(1, LAYERS):
            with pytest.raises(DiskError):
                visit(store, layer, [3, 4])
        visit(store, 0, [0, 1])  # what is in memory stays


def test_stores_close_while_experts_are_read(path: str) -> None:
    for fault in ("", "delay@0+:2", "eio@1+"):
        for n in range(4):
            store = open_store(path, 8, fault=fault, depth=2)
            store.expect([weight for expert in range(6) for weight in weights(0, expert)])
            try:
                for expert in range(n):
                    take(store, 0, expert)
            except DiskError:
                assert "eio" in fault
            del store


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(20))
def test_random_visits_and_faults(seed: int, path: str) -> None:
    choose = random.Random(seed)
    for _ in range(50):
        fault = ",".join(
            choose.choice(FAULTS).format(choose.randrange(40)) for _ in range(choose.randrange(3))
        )
        store = open_store(path, choose.uniform(1, 20), fault=fault, depth=choose.choice([1, 2, 8]))
        for layer, chosen in routing(10, top=choose.randrange(1, 6), seed=choose.randrange(1000)):
            try:
                if choose.random() < 0.2:
                    store.acquire(0, [choose.randrange(64)])
                visit(store, layer, list(chosen))
            except EdgeError as error:
                assert isinstance(error, DiskError | CorruptError), error
                store.rewind()


# The engine: the answer of everything in memory

PROMPT = [1, 17, 5, 99, 42, 7, 63, 120, 3, 8, 21]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    # Four experts a token, since a sum of two has no order; f32, since quantised activations hide a rounding.
    tiny_gguf(folder / "moe.gguf", "mixtral", "f32", seed=3, num_local_experts=8, num_experts_per_tok=4)
    pack(folder / "moe.gguf", folder / "moe.edge")
    return folder / "moe.edge"


def answer(
    path: Path, records: float | None, max_rows: int, threads: int = 1, **more: Any
) -> tuple[list[Any], dict[str, Any]]:
    """Greedy tokens with their logprobs, and the store's stats; `records` of room for experts, None = all resident."""
    file = PackFile(path)
    try:
        placed, decoder = weights_of(file), file.config.to_json()
    finally:
        file.close()
    plan = make_plan(placed, decoder, memory_bytes=1 << 34, context=64, threads=threads, host_bytes=0)
    experts = [weight for weight in placed if weight.expert >= 0]
    record = PARTS * max(weight.stored_bytes for weight in experts)
    placements = list(plan.placements)
    if records is not None:
        for weight in experts:
            assert placements[weight.id] == RESIDENT
            placements[weight.id] = DEMAND
    engine = _edge.Engine(
        plan.engine_options(
            path,
            decoder,
            placement=placements,
            demand_bytes=int((records or 0) * record),
            isa="ref",
            max_rows=max_rows,
            budget_bytes=1 << 30,
            **more,
        )
    )
    sequence = _edge.Sequence(engine)
    sequence.set_tokens(PROMPT)
    sampler = _edge.Sampler({"temperature": 0.0}, decoder["vocab_size"])
    return [sequence.next(sampler)[:2] for _ in range(16)], engine.stats()


@pytest.mark.parametrize("records", [2, 4, 6.5, 11, 20])
@pytest.mark.parametrize("max_rows", [1, 2, 8, 64])
def test_same_bits_with_any_room(mixtral: Path, records: float, max_rows: int) -> None:
    expected, _ = answer(mixtral, None, max_rows)
    assert answer(mixtral, records, max_rows)[0] == expected


@pytest.mark.parametrize("delays", ["delay@20+:1", "delay@11:9,delay@13:9,delay@17:9,delay@19:9"])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_in_whatever_order_experts_land(
    mixtral: Path, delays: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = answer(mixtral, None, 64)
    monkeypatch.setenv("EDGE_IO_FAULT", delays)
    tokens, stats = answer(mixtral, 6, 64, threads)
    assert tokens == expected
    assert stats["misses"] > 0


def test_a_failing_drive_ends_the_request(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, stats = answer(mixtral, 6, 64)
    monkeypatch.setenv("EDGE_IO_FAULT", "eio@30+")
    with pytest.raises(DiskError):
        answer(mixtral, 6, 64)
    assert stats["pass_expert_bytes"] > 0
