"""Keys and values on a drive: the bits of resident ones, whatever the share in memory, and a drive that may fail."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path
from typing import Any

import _edge
import numpy as np
import pytest

import edge
from flashload.errors import (
    ArgumentError,
    BudgetError,
    CancelledError,
    ContextOverflowError,
    CorruptError,
    DiskError,
    EdgeError,
)
from flashload.format import PackFile
from flashload.pack import pack
from flashload.plan import Plan, make_plan, weights_of
from flashload.plan_kv import choose_kv, kv_on_flash
from tests.tiny import tiny_gguf, tiny_hf, tiny_llama_gguf

CONTEXT = 320
PAGE_TOKENS = 16
MODELS = ("llama", "wide", "window", "opt", "moe")
FAST = next(isa["name"] for isa in _edge.isas() if isa["available"])
PROMPT = [1 + (i * 37) % 250 for i in range(210)]
N_TOKENS = 24


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kv")
    long = {"max_position_embeddings": 1024}
    sources = {
        "llama": tiny_llama_gguf(folder / "llama.gguf", type="q8_0", seed=5, num_hidden_layers=3, **long),
        # Halves of pages that are whole blocks of the drive: 16 rows of 256 bytes.
        "wide": tiny_llama_gguf(
            folder / "wide.gguf", type="q8_0", seed=6, head_dim=64, num_attention_heads=6, **long
        ),
        "window": tiny_hf(folder / "window", "mistral", sliding_window=40, **long),
        "opt": tiny_hf(folder / "opt", "opt", **long),
        "moe": tiny_gguf(folder / "moe.gguf", "mixtral", "q8_0", seed=3, **long),
    }
    for name, source in sources.items():
        pack(source, folder / f"{name}.edge")
    return {name: folder / f"{name}.edge" for name in sources}


def plan_of(path: Path, kv: str = "memory", memory_bytes: int = 1 << 34, **more: Any) -> tuple[Any, Plan]:
    with PackFile(path) as file:
        weights, decoder = weights_of(file), file.config.to_json()
    settings: dict[str, Any] = {"context": CONTEXT, "threads": 2, "host_bytes": 0} | more
    return decoder, make_plan(weights, decoder, memory_bytes=memory_bytes, kv=kv, **settings)


def open_engine(
    path: Path,
    folder: Path,
    kv: tuple[int, int, int] | None,
    *,
    max_rows: int = 32,
    isa: str = FAST,
    threads: int = 2,
    plan: tuple[Any, Plan] | None = None,
    **faults: str,
) -> _edge.Engine:
    """A resident model; ``kv`` is (pages in memory, pages of a range, rows scored at once), None all in memory."""
    decoder, placed = plan or plan_of(path)
    options: dict[str, Any] = {
        "pack_path": str(path),
        "decoder": decoder,
        "placement": placed.placements,
        "stream_order": placed.stream_order,
        "ring_bytes": placed.ring_bytes,
        "demand_bytes": placed.demand_bytes,
        "io_engine": "auto",
        "threads": threads,
        "isa": isa,
        "context": placed.context,
        "max_rows": max_rows,
        "budget_bytes": 1 << 28,
    }
    if kv is not None:
        resident, ranges, scores = kv
        options["kv"] = {
            "resident_pages": resident,
            "range_pages": ranges,
            "score_rows": scores,
            "folder": str(folder),
            **faults,
        }
    return _edge.Engine(options)


def answer(
    sequence: _edge.Sequence, prompt: list[int], n: int = N_TOKENS, **sampling: Any
) -> list[tuple[int, float]]:
    sequence.set_tokens(prompt)
    sampler = _edge.Sampler({"temperature": 0.0} | sampling, 320)
    return [sequence.next(sampler)[:2] for _ in range(n)]


#: (model, rows of a pass) -> the bits of the resident run.
_EXPECTED: dict[str, list[tuple[int, float]]] = {}


def expected(packs: dict[str, Path], name: str) -> list[tuple[int, float]]:
    if name not in _EXPECTED:
        engine = open_engine(packs[name], Path(), None, isa="ref", threads=1)
        _EXPECTED[name] = answer(_edge.Sequence(engine), PROMPT)
    return _EXPECTED[name]


@pytest.mark.parametrize("kv", [(3, 1, 1), (3, 2, 32), (4, 20, 3), (9, 3, 5), (20, 4, 8)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_of_the_resident_run(
    name: str, kv: tuple[int, int, int], packs: dict[str, Path], tmp_path: Path
) -> None:
    engine = open_engine(packs[name], tmp_path, kv)
    sequence = _edge.Sequence(engine)
    assert answer(sequence, PROMPT) == expected(packs, name)
    stats = engine.stats()
    if kv[0] < 15:
        assert stats["kv_written_bytes"] > 0
        # The latest pages stay: nine hold a window of 40 tokens and the rows of a pass.
        assert (stats["kv_read_bytes"] == 0) == (name == "window" and kv[0] == 9)
    else:
        assert stats["kv_written_bytes"] == 0
    assert list(tmp_path.iterdir()) == []  # the file has no name


@pytest.mark.parametrize("max_rows, least", [(1, 1), (7, 2), (33, 3), (34, 4), (128, 9)])
@pytest.mark.parametrize("name", ["llama", "window"])
def test_prompt_chunks_of_any_size(
    name: str, max_rows: int, least: int, packs: dict[str, Path], tmp_path: Path
) -> None:
    rows = (max_rows + 1) // 2
    engine = open_engine(packs[name], tmp_path, (least, 3, rows), max_rows=max_rows)
    assert answer(_edge.Sequence(engine), PROMPT) == expected(packs, name)
    with pytest.raises(ArgumentError, match="pages in memory"):
        open_engine(packs[name], tmp_path, (least - 1 or -1, 3, rows), max_rows=max_rows)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", [isa["name"] for isa in _edge.isas() if isa["available"]])
def test_every_isa_and_thread_count(isa: str, threads: int, packs: dict[str, Path], tmp_path: Path) -> None:
    engine = open_engine(packs["wide"], tmp_path, (4, 2, 7), isa=isa, threads=threads)
    assert answer(_edge.Sequence(engine), PROMPT) == expected(packs, "wide")


@pytest.mark.parametrize("io", ["io_uring", "pread"])
def test_every_io_engine(
    io: str, packs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not next(e["available"] for e in _edge.io_engines() if e["name"] == io):
        pytest.skip(f"{io} is not available here")
    monkeypatch.setenv("EDGE_IO", io)
    engine = open_engine(packs["llama"], tmp_path, (3, 2, 7))
    assert answer(_edge.Sequence(engine), PROMPT) == expected(packs, "llama")


def test_drawn_tokens_too(packs: dict[str, Path], tmp_path: Path) -> None:
    sampling = {"temperature": 1.3, "seed": 7, "top_k": 0, "repetition_penalty": 1.1}
    runs = [
        answer(_edge.Sequence(open_engine(packs["moe"], tmp_path, kv)), PROMPT, **sampling)
        for kv in (None, (3, 2, 5))
    ]
    assert runs[0] == runs[1]


def test_a_kept_prefix_is_not_computed_again(packs: dict[str, Path], tmp_path: Path) -> None:
    """Other endings behind a common prefix, cut anywhere: in memory, on the drive, inside a page of it."""
    engine = open_engine(packs["llama"], tmp_path, (4, 2, 8))
    sequence = _edge.Sequence(engine)
    resident = _edge.Sequence(open_engine(packs["llama"], tmp_path, None))
    answer(sequence, PROMPT, 4)
    for cut in (200, 193, 192, 191, 100, 97, 96, 15, 160, 1):
        prompt = PROMPT[:cut] + [9 + (i * 5) % 200 for i in range(30)]
        resident.set_tokens([3])  # keeps nothing
        assert answer(sequence, prompt, 3) == answer(resident, prompt, 3)
    assert sequence.set_tokens([*prompt, 5]) == len(prompt)


def test_shift_goes_on(packs: dict[str, Path], tmp_path: Path) -> None:
    runs = []
    for kv in (None, (3, 2, 8)):
        sequence = _edge.Sequence(open_engine(packs["llama"], tmp_path, kv))
        tokens = answer(sequence, PROMPT, 8)
        sequence.shift(1, 90)
        sampler = _edge.Sampler({"temperature": 0.0}, 320)
        runs.append(tokens + [sequence.next(sampler)[:2] for _ in range(8)])
    assert runs[0] == runs[1]


def test_scores_of_a_whole_text(packs: dict[str, Path], tmp_path: Path) -> None:
    runs = [
        _edge.Sequence(open_engine(packs["window"], tmp_path, kv)).score(PROMPT) for kv in (None, (3, 1, 2))
    ]
    assert runs[0] == runs[1]


def random_steps(seed: int) -> list[tuple[list[int], list[int], list[int] | None]]:
    """Chains and trees of tokens; some are committed along a path, some dropped."""
    choose = random.Random(seed)
    steps: list[tuple[list[int], list[int], list[int] | None]] = []
    n_tokens = 0
    while n_tokens < 280:
        n = choose.choice([1, 1, 3, 8, 20, 32])
        tokens = [choose.randrange(3, 300) for _ in range(n)]
        if choose.random() < 0.4:
            parents = [-1, *range(n - 1)]
            path: list[int] | None = list(range(n))
        else:
            parents = [choose.randrange(-1, i) if i else -1 for i in range(n)]
            leaf = choose.randrange(n)
            path = [leaf]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
        if choose.random() < 0.25:
            path = None
        steps.append((tokens, parents, path))
        n_tokens += len(path or [])
    return steps


@pytest.mark.parametrize("kv", [(3, 1, 32), (5, 2, 5)], ids=str)
@pytest.mark.parametrize("name", ["llama", "window"])
def test_trees_of_tokens(name: str, kv: tuple[int, int, int], packs: dict[str, Path], tmp_path: Path) -> None:
    steps = random_steps(len(name))
    found = _edge.kv_trees(open_engine(packs[name], tmp_path, kv), steps)
    want = _edge.kv_trees(open_engine(packs[name], tmp_path, None), steps)
    assert any(path is None for _, _, path in steps)
    for one, other in zip(found, want, strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(other))


def test_two_sequences_share_the_memory(packs: dict[str, Path], tmp_path: Path) -> None:
    """Turn and turn about: each one's pages make room for the other's."""
    engine = open_engine(packs["llama"], tmp_path, (4, 2, 8))
    sequences = [_edge.Sequence(engine), _edge.Sequence(engine)]
    texts = [PROMPT[:130], PROMPT[60:190]]
    sampler = _edge.Sampler({"temperature": 0.0}, 320)
    found: list[list[tuple[int, float]]] = [[], []]
    for sequence, text in zip(sequences, texts, strict=True):
        sequence.set_tokens(text)
    for _ in range(12):
        for sequence, tokens in zip(sequences, found, strict=True):
            tokens.append(sequence.next(sampler)[:2])
    resident = _edge.Sequence(open_engine(packs["llama"], tmp_path, None))
    for text, tokens in zip(texts, found, strict=True):
        resident.set_tokens([3])
        assert tokens == answer(resident, text, 12)
    with pytest.raises(ContextOverflowError, match="do not fit"):
        for sequence in sequences:
            answer(sequence, [*sequence.tokens, 5], 100)


# -- attention in steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", [isa["name"] for isa in _edge.isas() if isa["available"]])
@pytest.mark.parametrize(
    "group, head_dim, n", [(1, 64, 1), (4, 128, 333), (5, 80, 130), (7, 20, 33), (2, 17, 64)]
)
def test_ranges_give_the_bits_of_one(isa: str, group: int, head_dim: int, n: int) -> None:
    rng = np.random.default_rng([group, head_dim, n])
    k, v = (rng.standard_normal((n, head_dim)).astype(np.float16).view(np.uint16) for _ in range(2))
    q = rng.standard_normal((group, head_dim)).astype(np.float32) * 2
    want = _edge.op(isa, "attention", q, k, v, 0.125).view(np.uint32)
    for cuts in ([], [0, n], [1], [n // 2], [n // 3, n // 3 + 1], sorted(rng.integers(0, n + 1, 7).tolist())):
        cuts = [cut for cut in cuts if cut <= n]
        found = _edge.op(isa, "attention_steps", q, k, v, 0.125, cuts)
        np.testing.assert_array_equal(found.view(np.uint32), want)


# -- the pool alone ---------------------------------------------------------------------------------------------------


class Model:
    """What a sequence of KvPoolTest holds."""

    def __init__(self) -> None:
        self.committed: list[int] = []
        self.staged: list[int] = []


@pytest.mark.parametrize("seed", range(12))
def test_random_lives_of_a_pool(seed: int, tmp_path: Path) -> None:
    choose = random.Random(seed)
    context = choose.choice([200, 400])
    pool = _edge.KvPoolTest(
        2, choose.choice([8, 40, 128]), context, 4, choose.choice([1, 2, 5]), str(tmp_path)
    )
    live: dict[int, Model] = {pool.add(): Model() for _ in range(choose.choice([1, 1, 2, 3]))}
    for _ in range(150):
        cache = choose.choice(list(live))
        model = live[cache]
        action = choose.random()
        if action < 0.6:
            rows = [choose.randrange(60000) for _ in range(choose.choice([1, 1, 2, 15, 17, 33]))]
            pages = sum(-(-len(m.committed) // PAGE_TOKENS) for m in live.values() if m is not model)
            if pages + -(-(len(model.committed) + len(rows)) // PAGE_TOKENS) > -(-context // PAGE_TOKENS):
                pool.truncate(cache, 0)
                model.committed = []
            pool.stage(cache, rows)
            model.staged = rows
            path = sorted(choose.sample(range(len(rows)), choose.randrange(len(rows) + 1)))
            if choose.random() < 0.8:
                pool.commit(cache, path)
                model.committed += [rows[i] for i in path]
            else:
                pool.rollback(cache)
            # Rows that were staged may leave pages behind the committed ones, which others cannot take.
            pool.truncate(cache, len(model.committed))
        elif action < 0.75:
            keep = choose.randrange(len(model.committed) + 1)
            pool.truncate(cache, keep)
            model.committed = model.committed[:keep]
        elif action < 0.8 and len(live) > 1:
            pool.remove(cache)
            del live[cache]
            continue
        pool.stage(cache, [1])  # a page cut inside comes back into memory before it is read
        pool.rollback(cache)
        firsts = [choose.randrange(len(model.committed) + 1) for _ in range(2)]
        repeats = choose.choice([1, 3])
        views = pool.read(cache, firsts, repeats)
        assert len(views) == 4 * repeats
        for i, view in enumerate(views):
            assert view == model.committed[firsts[i // (2 * repeats)] :]
        assert sum(pool.pages(one)[0] for one in live) <= 4


def test_a_page_is_written_once(tmp_path: Path) -> None:
    pool = _edge.KvPoolTest(2, 128, 640, 4, 2, str(tmp_path))
    cache = pool.add()
    for row in range(600):
        pool.stage(cache, [row])
        pool.commit(cache, [0])
    page_bytes = 2 * 2 * 16 * 128 * 2
    assert pool.pages(cache) == (4, 34)
    assert pool.bytes_written == 34 * page_bytes
    pool.truncate(cache, 320)
    pool.stage(cache, [1])  # the latest pages come back, and leave again without a write
    pool.commit(cache, [0])
    assert pool.pages(cache)[0] == 4
    for row in range(80):
        pool.stage(cache, [row])
        pool.commit(cache, [0])
    assert pool.bytes_written == (34 + 2) * page_bytes


@pytest.mark.parametrize("fault", ["eio@{}", "enospc@{}", "zero@{}"])
def test_a_write_that_fails_loses_nothing(fault: str, tmp_path: Path) -> None:
    failed = 0
    for at in range(12):
        pool = _edge.KvPoolTest(2, 128, 640, 3, 2, str(tmp_path), write_fault=fault.format(at))
        cache = pool.add()
        rows: list[int] = []
        while len(rows) < 120:
            try:
                pool.stage(cache, [len(rows)] * 3)
            except DiskError as error:
                assert "\n" not in str(error) and "scratch file" in str(error)
                failed += 1
                continue
            pool.commit(cache, [0, 1, 2])
            rows += [len(rows)] * 3
        assert pool.read(cache, [0, 0], 1) == [rows] * 4
    assert failed == 12


def test_short_writes_and_repeats_are_carried_on(tmp_path: Path) -> None:
    fault = ",".join([f"short@{i}" for i in range(0, 60, 3)] + [f"again@{i}" for i in range(1, 60, 3)])
    pool = _edge.KvPoolTest(2, 256, 640, 3, 2, str(tmp_path), write_fault=fault)
    cache = pool.add()
    for row in range(300):
        pool.stage(cache, [row])
        pool.commit(cache, [0])
    assert pool.read(cache, [0, 5], 1) == [list(range(300))] * 2 + [list(range(5, 300))] * 2


# -- a failing drive --------------------------------------------------------------------------------------------------

READ_FAULTS: dict[str, tuple[type[EdgeError], ...]] = {
    "eio@{}": (DiskError,),
    "zero@{}": (DiskError,),
    "short@{}": (DiskError,),
    "flip@{}:12345": (CorruptError,),
    "again@{}": (),
}
WRITE_FAULTS: dict[str, tuple[type[EdgeError], ...]] = {
    "eio@{}": (DiskError,),
    "enospc@{}": (DiskError,),
    "zero@{}": (DiskError,),
    "short@{}": (DiskError,),  # half of 4096 bytes is no progress for a direct write
    "again@{}": (),
}


def generate_with_fault(
    packs: dict[str, Path], folder: Path, may: tuple[type[EdgeError], ...], **fault: str
) -> bool:
    engine = open_engine(packs["llama"], folder, (3, 2, 8), **fault)
    sequence = _edge.Sequence(engine)
    want = expected(packs, "llama")[:6]
    n_failed = 0
    for _ in range(3):
        try:
            assert answer(sequence, PROMPT, 6) == want
        except EdgeError as error:
            assert may and isinstance(error, may), error
            assert "\n" not in str(error)
            n_failed += 1
    assert n_failed <= 1
    assert answer(sequence, PROMPT, 6) == want
    return n_failed > 0


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_a_fault_at_some_reads(fault: str, packs: dict[str, Path], tmp_path: Path) -> None:
    failed = [
        generate_with_fault(packs, tmp_path, READ_FAULTS[fault], read_fault=fault.format(at))
        for at in (0, 1, 2, 7, 40, 200, 401)
    ]
    assert any(failed) == bool(READ_FAULTS[fault])


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_a_fault_at_some_writes(fault: str, packs: dict[str, Path], tmp_path: Path) -> None:
    failed = [
        generate_with_fault(packs, tmp_path, WRITE_FAULTS[fault], write_fault=fault.format(at))
        for at in (0, 1, 5, 6, 17, 30)
    ]
    assert any(failed) == bool(WRITE_FAULTS[fault]) or fault.startswith("short")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["read_fault", "write_fault"])
def test_a_fault_at_every_access(way: str, packs: dict[str, Path], tmp_path: Path) -> None:
    for fault, may in (READ_FAULTS if way == "read_fault" else WRITE_FAULTS).items():
        for at in [*range(30), *range(30, 500, 17)] if way == "read_fault" else range(60):
            generate_with_fault(packs, tmp_path, may, **{way: fault.format(at)})


def test_a_drive_that_stays_full(packs: dict[str, Path], tmp_path: Path) -> None:
    engine = open_engine(packs["llama"], tmp_path, (3, 2, 8), write_fault="enospc@9+")
    sequence = _edge.Sequence(engine)
    for _ in range(3):
        with pytest.raises(DiskError, match="No space left"):
            answer(sequence, PROMPT, 6)
        # What fits into memory and what was written still works.
        assert len(answer(sequence, PROMPT[:30], 3)) == 3


def test_a_file_size_limit_is_an_error_of_one_line(packs: dict[str, Path], tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(DiskError, match="scratch file"):
            open_engine(packs["llama"], tmp_path, (3, 2, 8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_file(packs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot be created"):
        open_engine(packs["llama"], tmp_path / "none", (3, 2, 8))


def test_cancelled_in_a_pass(packs: dict[str, Path], tmp_path: Path) -> None:
    engine = open_engine(packs["llama"], tmp_path, (3, 2, 8))
    sequence = _edge.Sequence(engine)
    answer(sequence, PROMPT, 2)
    engine.cancel()
    with pytest.raises(CancelledError):
        answer(sequence, PROMPT[:-5], 2)
    engine.resume()
    assert answer(sequence, PROMPT) == expected(packs, "llama")


# -- the plan ---------------------------------------------------------------------------------------------------------


def floor_of(path: Path, kv: str, context: int) -> int:
    with pytest.raises(BudgetError) as refusal:
        plan_of(path, kv, 1, context=context)
    return int(refusal.value.floor_bytes)


@pytest.mark.parametrize("name", MODELS)
def test_the_core_runs_in_what_the_plan_gives_it(name: str, packs: dict[str, Path], tmp_path: Path) -> None:
    context = 2000
    in_memory, on_flash = (floor_of(packs[name], kv, context) for kv in ("memory", "flash"))
    assert on_flash < in_memory
    answers = set()
    for part in range(3):
        memory = on_flash + part * (in_memory - on_flash)
        decoder, plan = plan_of(packs[name], "flash", memory, context=context)
        assert plan.kv_on_flash is not None
        assert plan.predicted_peak_bytes <= memory
        assert plan.floor_bytes == on_flash
        options = {
            "pack_path": str(packs[name]),
            "decoder": decoder,
            "placement": plan.placements,
            "stream_order": plan.stream_order,
            "ring_bytes": plan.ring_bytes,
            "demand_bytes": plan.demand_bytes,
            "io_engine": "auto",
            "threads": 2,
            "isa": "",
            "context": context,
            "max_rows": plan.max_rows,
            "budget_bytes": plan.core_bytes,
            "kv": plan.kv_on_flash.options(str(tmp_path)),
        }
        engine = _edge.Engine(options)
        answers.add(tuple(answer(_edge.Sequence(engine), PROMPT + PROMPT, 12)))
        stats = engine.stats()
        assert stats["peak_bytes"] <= plan.core_bytes
        assert stats["by_tag"]["kv cache"] <= plan.kv_bytes
    assert len(answers) == 1


def test_auto_takes_the_drive_only_when_memory_is_short(packs: dict[str, Path]) -> None:
    in_memory, on_flash = (floor_of(packs["wide"], kv, 4000) for kv in ("memory", "flash"))

    def chosen(memory_bytes: int) -> Plan:
        return choose_kv("auto", lambda kv: plan_of(packs["wide"], kv, memory_bytes, context=4000)[1])

    assert chosen(in_memory).kv_on_flash is None
    assert chosen(in_memory - 4096).kv_on_flash is not None
    assert chosen(in_memory - 4096).to_dict()["kv"] == "flash"
    with pytest.raises(BudgetError) as refusal:
        chosen(on_flash - 4096)
    assert refusal.value.floor_bytes == on_flash


def test_more_memory_is_a_larger_share(packs: dict[str, Path]) -> None:
    decoder, _ = plan_of(packs["wide"])
    shares = [kv_on_flash(decoder, 32768, 32, 2, spare << 20) for spare in (0, 1, 16, 64, 1024)]
    for less, more in itertools.pairwise(shares):
        assert less.resident_pages <= more.resident_pages
        assert less.score_rows <= more.score_rows
        assert less.range_pages <= more.range_pages
        assert less.memory_bytes + less.activation_bytes <= more.memory_bytes + more.activation_bytes
    for share, spare in zip(shares, (0, 1, 16, 64, 1024), strict=True):
        grown = share.memory_bytes + share.activation_bytes
        assert grown <= shares[0].memory_bytes + shares[0].activation_bytes + (spare << 20)
    assert shares[-1].resident_pages == 32768 // PAGE_TOKENS


def test_load(packs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    monkeypatch.setenv("EDGE_SCRATCH", str(scratch))
    found = {}
    for kv in ("memory", "flash"):
        with edge.load(packs["wide"], memory="512MiB", context=1000, threads=2, kv=kv) as engine:
            found[kv] = engine.generate(PROMPT * 4, max_tokens=8, temperature=0, ignore_eos=True).tokens
            assert engine.plan.to_dict()["kv"] == kv
    assert found["memory"] == found["flash"]
    assert list(scratch.iterdir()) == []
    with pytest.raises(ArgumentError, match="kv: expected one of auto, memory, flash"):
        edge.load(packs["wide"], kv="disk")
    monkeypatch.setenv("EDGE_SCRATCH", os.devnull)
    with pytest.raises(DiskError, match="scratch folder"):
        edge.load(packs["wide"], memory="512MiB", context=1000, kv="flash")


def test_the_benchmark_compares_equal_answers(packs: dict[str, Path], tmp_path: Path) -> None:
    from bench import kv

    found = kv.measure(packs["wide"], 200, 3, 2, str(tmp_path))
    shares = {row["share"]: row for row in found["shares"]}
    assert list(shares) == list(kv.SHARES)
    assert shares[1.0]["kv_read_bytes_per_token"] == 0
    assert shares[0.0]["kv_read_bytes_per_token"] > 0
    assert found["session_bytes"] > 200 * 2 * 2 * 128 * 2  # tokens, layers, keys and values, two heads of 64
