"""What a budget holds of keys and values, what goes to the drive, and what that costs."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import cast

import _edge
import pytest

import edge
from flashload.errors import ArgumentError, BudgetError, DiskError
from flashload.format import PackFile
from flashload.plan import Plan, directory_of, place
from flashload.plan_kv import choose_kv, kv_on_flash
from flashload.virtual_pack import outline
from tests.kv_engines import MODELS, PAGE_TOKENS, PROMPT, answer, kv_packs, plan_of
from tests.tiny import hf_config

packs = kv_packs


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
        engine = _edge.Engine(plan.engine_options(packs[name], decoder, scratch=tmp_path, threads=2))
        answers.add(tuple(answer(_edge.Sequence(engine), PROMPT + PROMPT, 12)))
        stats = engine.stats()
        assert stats["peak_bytes"] <= plan.core_bytes
        assert stats["by_tag"]["kv cache"] <= plan.kv_bytes
    assert len(answers) == 1


def test_auto_takes_what_reads_less(tmp_path: Path) -> None:
    """Weights come before keys and values where every token reads them: half of a context is not there yet."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "head_dim": 64}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(hf_config("llama", **sizes, **heads)))
    model = directory_of(cast(PackFile, outline(tmp_path).packs["keep"]))

    def plan(kv: str, memory_bytes: int) -> Plan:
        return place(model, memory_bytes=memory_bytes, context=4000, threads=2, host_bytes=0, kv=kv)

    with pytest.raises(BudgetError) as refusal:
        plan("memory", 1)
    floor, full = refusal.value.floor_bytes, plan("memory", 1 << 34).predicted_peak_bytes
    taken = []
    for part in range(9):
        memory = floor + part * (full - floor) // 8
        plans = {kv: plan(kv, memory) for kv in ("memory", "flash")}
        reads = {kv: found.flash_bytes_per_token for kv, found in plans.items()}
        auto = choose_kv("auto", plans.__getitem__)
        assert auto.flash_bytes_per_token <= min(reads["memory"], reads["flash"] * 4 // 3 + 1)
        taken.append(auto.to_dict()["kv"])
    assert set(taken) == {"flash", "memory"} and taken[-1] == "memory"
    assert plans["memory"].flash_bytes_per_token == 0


def test_auto_takes_the_drive_only_when_memory_is_short(packs: dict[str, Path]) -> None:
    in_memory, on_flash = (floor_of(packs["wide"], kv, 4000) for kv in ("memory", "flash"))

    def chosen(memory_bytes: int) -> Plan:
        return choose_kv("auto", lambda kv: plan_of(packs["wide"], kv, memory_bytes, context=4000)[1])

    assert chosen(in_memory).kv_on_flash is None
    assert chosen(in_memory - 4096).kv_on_flash is not None
    assert chosen(in_memory - 4096).to_dict()["kv"] == "flash"
    assert chosen(in_memory).floor_bytes == chosen(on_flash).floor_bytes == on_flash
    with pytest.raises(BudgetError) as refusal:
        chosen(on_flash - 4096)
    assert refusal.value.floor_bytes == on_flash


def test_more_memory_is_a_larger_share(packs: dict[str, Path]) -> None:
    decoder, _ = plan_of(packs["wide"])
    shares = [kv_on_flash(decoder, 32768, 32, 2, spare << 20, spare << 20) for spare in (0, 1, 16, 64, 1024)]
    for less, more in itertools.pairwise(shares):
        assert less.resident_pages <= more.resident_pages
        assert less.score_rows <= more.score_rows
        assert less.range_pages <= more.range_pages
        assert less.memory_bytes + less.activation_bytes <= more.memory_bytes + more.activation_bytes
    for share, spare in zip(shares, (0, 1, 16, 64, 1024), strict=True):
        grown = share.memory_bytes + share.activation_bytes
        assert grown <= shares[0].memory_bytes + shares[0].activation_bytes + (spare << 20)
    assert shares[-1].resident_pages == 32768 // PAGE_TOKENS
    # What weights still need is not for pages.
    assert kv_on_flash(decoder, 32768, 32, 2, 64 << 20, 0).resident_pages == shares[0].resident_pages


def test_what_a_token_reads(packs: dict[str, Path]) -> None:
    decoder, _ = plan_of(packs["wide"])
    share = kv_on_flash(decoder, 32768, 32, 2)
    held = share.resident_pages * PAGE_TOKENS
    token_bytes = 2 * 2 * 128 * 2  # layers, keys and values, two heads of 64
    assert share.read_bytes([0, 0], held) == 0
    assert share.read_bytes([0, 0], 20000) == (20000 - held) * token_bytes
    assert share.read_bytes([0, held], 20000) == (20000 - held) * token_bytes / 2


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
