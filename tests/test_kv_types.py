"""Keys and values of every type in an engine: one text whatever the chunks, threads, ISA and place of the pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _edge
import numpy as np
import pytest

import edge
from flashload.errors import ArgumentError, BudgetError, UnsupportedModelError
from flashload.format import PackFile
from flashload.pack import pack
from tests.kv_engines import FAST, MODELS, PROMPT, answer, kv_packs, open_engine, plan_of
from tests.neuron_packs import decoded
from tests.oracle import Oracle
from tests.test_kv_flash import random_steps
from tests.tiny import tiny_hf, tiny_llama_gguf

packs = kv_packs
TYPES = ("int8", "int4")
ALL_TYPES = ("f16", *TYPES)
ISAS = [isa["name"] for isa in _edge.isas() if isa["available"]]

_EXPECTED: dict[tuple[str, str], list[tuple[int, float]]] = {}


def expected(packs: dict[str, Path], name: str, kv_type: str) -> list[tuple[int, float]]:
    """One row at a time, on one thread, in plain code."""
    if (name, kv_type) not in _EXPECTED:
        engine = open_engine(packs[name], Path(), None, isa="ref", threads=1, max_rows=1, kv_type=kv_type)
        _EXPECTED[name, kv_type] = answer(_edge.Sequence(engine), PROMPT)
    return _EXPECTED[name, kv_type]


@pytest.mark.parametrize("kv_type", ALL_TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_prompt_chunks_of_any_size(name: str, kv_type: str, packs: dict[str, Path], tmp_path: Path) -> None:
    for max_rows, threads in ((7, 2), (64, 1), (128, 3)):
        engine = open_engine(packs[name], tmp_path, None, max_rows=max_rows, threads=threads, kv_type=kv_type)
        assert answer(_edge.Sequence(engine), PROMPT) == expected(packs, name, kv_type)


@pytest.mark.parametrize("kv_type", ALL_TYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa(isa: str, kv_type: str, packs: dict[str, Path], tmp_path: Path) -> None:
    engine = open_engine(packs["wide"], tmp_path, None, isa=isa, kv_type=kv_type)
    assert answer(_edge.Sequence(engine), PROMPT) == expected(packs, "wide", kv_type)


@pytest.mark.parametrize("kv", [(3, 1, 1), (4, 2, 5), (20, 4, 32)], ids=str)
@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_pages_in_a_file(
    name: str, kv_type: str, kv: tuple[int, int, int], packs: dict[str, Path], tmp_path: Path
) -> None:
    n_pages = -(-320 // (32 if kv_type == "int8" else 64))
    engine = open_engine(packs[name], tmp_path, (min(kv[0], n_pages), *kv[1:]), kv_type=kv_type)
    assert answer(_edge.Sequence(engine), PROMPT) == expected(packs, name, kv_type)
    if kv[0] == 3:
        assert engine.stats()["kv_written_bytes"] > 0


@pytest.mark.parametrize("kv_type", ALL_TYPES)
@pytest.mark.parametrize("name", ["llama", "window"])
def test_trees_of_tokens(name: str, kv_type: str, packs: dict[str, Path], tmp_path: Path) -> None:
    """A row of a tree has the bits it has in a chain, in memory and in a file, whatever was dropped before."""
    steps = random_steps(len(name))
    found = _edge.kv_trees(open_engine(packs[name], tmp_path, None, kv_type=kv_type), steps)
    in_file = _edge.kv_trees(open_engine(packs[name], tmp_path, (4, 2, 5), kv_type=kv_type), steps)
    for one, other in zip(found, in_file, strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(other))
    chain = _edge.Sequence(open_engine(packs[name], tmp_path, None, kv_type=kv_type))
    text: list[int] = []
    for (tokens, parents, path), rows in zip(steps, found, strict=True):
        if len(tokens) <= 8:
            row = len(tokens) - 1
            branch = [row]
            while parents[branch[0]] >= 0:
                branch.insert(0, parents[branch[0]])
            chain.set_tokens(text + [tokens[i] for i in branch])
            np.testing.assert_array_equal(
                np.array(chain.logits(), np.float32), np.array(rows[row], np.float32)
            )
        text += [tokens[i] for i in path or []]


@pytest.mark.parametrize("kv_type", TYPES)
def test_a_kept_prefix_changes_no_bit(kv_type: str, packs: dict[str, Path], tmp_path: Path) -> None:
    sequence = _edge.Sequence(open_engine(packs["llama"], tmp_path, None, kv_type=kv_type))
    fresh = _edge.Sequence(open_engine(packs["llama"], tmp_path, None, kv_type=kv_type))
    answer(sequence, PROMPT, 4)
    for cut in (205, 200, 192, 191, 100, 65, 64, 63, 160, 1):
        prompt = PROMPT[:cut] + [9 + (i * 5) % 200 for i in range(30)]
        fresh.set_tokens([3])
        assert answer(sequence, prompt, 3) == answer(fresh, prompt, 3)
        kept = sequence.set_tokens([*prompt[:cut], 5, 6])
        # Of 4 bits whole blocks, unless the text ends in the block that is cut.
        assert kept == cut if kv_type == "int8" else cut // 64 * 64 <= kept <= cut


@pytest.mark.parametrize("kv_type", TYPES)
def test_texts_share_pages(kv_type: str, packs: dict[str, Path], tmp_path: Path) -> None:
    engine = open_engine(packs["llama"], tmp_path, None, kv_type=kv_type)
    trunk = _edge.Sequence(engine)
    want = answer(trunk, PROMPT[:150], 8)
    other = trunk.fork(140)
    assert answer(other, [*PROMPT[:140], 7, 9], 8) != want
    assert answer(trunk, PROMPT[:150], 8) == want


@pytest.mark.parametrize("before", [None, (4, 2, 5)], ids=["memory", "flash"])
@pytest.mark.parametrize("kv_type", TYPES)
def test_sessions(kv_type: str, before: Any, packs: dict[str, Path], tmp_path: Path) -> None:
    """Saved and restored in memory or on a drive, at and around the blocks of 64 tokens of which int4 keeps f16."""
    path = str(tmp_path / "s")
    sequence = _edge.Sequence(open_engine(packs["llama"], tmp_path, before, kv_type=kv_type))
    sampler = _edge.Sampler({"temperature": 0.0}, 320)
    for n in (20, 60, 61, 64, len(PROMPT)):
        answer(sequence, PROMPT[:n], 4)
        _edge.save_session(sequence, path)
        want = [sequence.next(sampler)[:2] for _ in range(6)]
        for kv in (None, (4, 2, 5)):
            restored = _edge.Sequence(open_engine(packs["llama"], tmp_path, kv, kv_type=kv_type))
            _edge.load_session(restored, path)
            assert [restored.next(sampler)[:2] for _ in range(6)] == want, (n, kv)
    with pytest.raises(UnsupportedModelError, match=f"expected a session of f16 .* found {kv_type}"):
        _edge.load_session(_edge.Sequence(open_engine(packs["llama"], tmp_path, None)), path)


@pytest.mark.parametrize("kv_type", TYPES)
def test_logits_match_the_oracle(kv_type: str, tmp_path: Path) -> None:
    path = tmp_path / "m.edge"
    edge.pack(tiny_hf(tmp_path / "hf", "llama", seed=2, max_position_embeddings=512), path)
    tokens = [1 + (i * 37) % 250 for i in range(150)]
    config, weights = PackFile(path).config.to_json(), decoded(path)
    right = Oracle(config, weights, kv_type=kv_type).logits(tokens)[-1]
    whole = Oracle(config, weights).logits(tokens)[-1]
    with edge.load(path, context=256, threads=1, kv_type=kv_type) as engine:
        found = engine.logits(tokens)
    assert np.abs(found - right).max() < 0.3 * np.abs(whole - right).max()


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("name", ["llama", "window", "moe"])
def test_the_core_takes_what_the_plan_says(
    name: str, kv_type: str, packs: dict[str, Path], tmp_path: Path
) -> None:
    for kv in ("memory", "flash"):
        with pytest.raises(BudgetError) as refusal:
            plan_of(packs[name], kv, 1, kv_type, context=2000)
        floor = int(refusal.value.floor_bytes)
        for memory in (floor, floor + (1 << 18), 1 << 34):
            decoder, plan = plan_of(packs[name], kv, memory, kv_type, context=2000)
            assert plan.kv_type == plan.to_dict()["kv_type"] == kv_type
            engine = _edge.Engine(plan.engine_options(packs[name], decoder, scratch=tmp_path))
            answer(_edge.Sequence(engine), PROMPT + PROMPT, 4)
            stats = engine.stats()
            assert stats["peak_bytes"] <= plan.core_bytes
            assert plan.kv_bytes - 8192 <= stats["by_tag"]["kv cache"] <= plan.kv_bytes


def test_fewer_bits_are_less_memory(packs: dict[str, Path]) -> None:
    sizes = {t: plan_of(packs["wide"], kv_type=t, context=32768)[1].kv_bytes for t in ("f16", *TYPES)}
    assert sizes["int8"] < 0.54 * sizes["f16"]
    assert sizes["int4"] < 0.30 * sizes["f16"]


@pytest.mark.parametrize("kv_type", TYPES)
def test_load(kv_type: str, packs: dict[str, Path]) -> None:
    settings: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    with edge.load(packs["wide"], context=1000, threads=2, kv_type=kv_type) as engine:
        alone = engine.generate(PROMPT, speculation="off", **settings).tokens
        assert engine.generate(PROMPT, speculation="lookup", **settings).tokens == alone
        prompts = [PROMPT, PROMPT[:100], PROMPT[:130]]
        each = [engine.generate(p, speculation="off", **settings).tokens for p in prompts]
        assert [c.tokens for c in engine.generate_many(prompts, **settings)] == each
        wanted = engine.plan.memory_bytes
        engine.set_memory(engine.plan.floor_bytes + (1 << 20))
        assert engine.plan.kv_type == kv_type
        assert engine.generate(PROMPT, speculation="off", **settings).tokens == alone
        engine.set_memory(wanted)
    with pytest.raises(ArgumentError, match="kv_type: expected one of f16, int8, int4, found 'q8'"):
        edge.load(packs["wide"], kv_type="q8")


def test_the_type_is_in_the_text_of_the_plan(packs: dict[str, Path]) -> None:
    from click.testing import CliRunner

    from edge.cli.plan import command

    done = CliRunner().invoke(command, [str(packs["wide"]), "--context", "512", "--kv-type", "int8"])
    assert done.exit_code == 0, done.output
    assert "keys and values as int8" in done.output
    assert FAST


@pytest.mark.parametrize(("heads", "kv_heads"), [(20, 1), (6, 2), (4, 4)])
def test_groups_of_any_size(heads: int, kv_heads: int, tmp_path: Path) -> None:
    """Query heads of one or of several rows share a key: f16, one row at a time in plain code against all at once."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16}
    source = tiny_llama_gguf(tmp_path / "m.gguf", type="q8_0", seed=8, max_position_embeddings=1024, **sizes)
    pack(source, tmp_path / "m.edge")
    plain = open_engine(tmp_path / "m.edge", tmp_path, None, isa="ref", threads=1, max_rows=1)
    many = open_engine(tmp_path / "m.edge", tmp_path, None, threads=3, max_rows=64)
    assert answer(_edge.Sequence(many), PROMPT) == answer(_edge.Sequence(plain), PROMPT)
