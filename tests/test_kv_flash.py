"""Keys and values on a drive: the bits of resident ones, whatever the share in memory, and a drive that may fail."""

from __future__ import annotations

import random
from pathlib import Path

import _edge
import numpy as np
import pytest

from flashload.errors import (
    ArgumentError,
    CancelledError,
    ContextOverflowError,
    CorruptError,
    DiskError,
    EdgeError,
)
from tests.kv_engines import MODELS, PROMPT, answer, kv_packs, open_engine

packs = kv_packs

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
