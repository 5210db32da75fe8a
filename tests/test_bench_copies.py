"""Models of which a copy is known: they write one order of all tokens, and prompts that copy it are what they say."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="the benchmarks write GGUF files with the gguf package")

import edge
from bench import copies, shapes, speculation, synth
from bench.walk import successor
from tests.tiny import tiny_llama_gguf

SHAPE = shapes.SHAPES["tiny"]
TEXT = list(range(300, 500))


def made(folder: Path, mix: str) -> Path:
    synth.write_model(folder / "m.gguf", SHAPE, mix, walk=successor(SHAPE))
    edge.pack(folder / "m.gguf", folder / "m.edge")
    return folder / "m.edge"


@pytest.mark.parametrize("mix", ["q4_0", "f32", "q4_k_m"])
def test_the_text_is_the_order_whatever_came_before(tmp_path: Path, mix: str) -> None:
    walk = successor(SHAPE)
    with edge.load(made(tmp_path, mix), context=256, threads=1) as engine:
        for prompt in ([300], [7, 411, 90, 300], [*range(259, 400), 300]):
            expected = [300]
            for _ in range(60):
                expected.append(int(walk.next_of[expected[-1] - 259]))
            found = engine.generate(prompt, max_tokens=60, temperature=0, ignore_eos=True)
            assert found.tokens == expected[1:]


def test_the_order_has_every_ordinary_token_once() -> None:
    walk, at, seen = successor(SHAPE), 259, set[int]()
    while at not in seen:
        seen.add(at)
        at = int(walk.next_of[at - 259])
    assert seen == set(range(259, SHAPE.vocab))


@pytest.mark.parametrize("change", [{"hidden": 64}, {"vocab": 260}, {"arch": "opt"}], ids=str)
def test_shapes_that_cannot_keep_tokens_apart_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected a Llama"):
        successor(replace(SHAPE, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("gap", copies.EDITS)
def test_one_word_in_so_many_is_edited(gap: int) -> None:
    found = copies.edited(TEXT, gap, random.Random(3))
    edits = [o for o in SequenceMatcher(None, TEXT, found, autojunk=False).get_opcodes() if o[0] != "equal"]
    # Neighbouring edits, and a word that looks like its neighbour, are told apart differently now and then.
    assert abs(len(edits) - len(TEXT) // gap) <= 1
    assert {"replace", "delete", "insert"} == {kind for kind, *_ in edits}
    assert set(found) <= set(TEXT)


def test_copies_are_copied_and_nothing_else_is(tmp_path: Path) -> None:
    asked = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    guess = {"drafters": ["lookup"], "depth": 8}
    with edge.load(made(tmp_path, "q4_0"), context=160, threads=1) as engine:
        per_pass = {
            kind: [engine.generate(p, speculation=guess, **asked).stats["speculation"] for p in prompts]
            for kind, prompts in copies.prompts(engine, 60, 1).items()
        }
    assert all(s["tokens_per_pass"] == 1 for kind in ("new words", "new order") for s in per_pass[kind])
    assert sum(d["drafters"]["lookup"]["tried"] for d in per_pass["new order"]) > 100
    for gap, least in ((10, 2), (20, 3), (50, 5)):
        assert all(s["tokens_per_pass"] > least for s in per_pass[f"edit in {gap}"])


def test_the_benchmark_of_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        f"{made(tmp_path, 'q4_0')} --context 96 --threads 1 --tokens 30 --runs 1 --passes 0 --json --copies"
    )
    assert speculation.main([*command.split(), "--kind", "edit in 20", "--prompts", "1"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert [(r["text"], r["speculation"]) for r in found] == [
        ("edit in 20", setting) for setting in ("off", "lookup", "auto")
    ]


def test_a_model_that_does_not_copy_is_refused(tmp_path: Path) -> None:
    edge.pack(tiny_llama_gguf(tmp_path / "m.gguf", type="q8_0", seed=5), tmp_path / "m.edge")
    load = edge.load(tmp_path / "m.edge", context=96, threads=1)
    with load as engine, pytest.raises(RuntimeError, match="its last token alone"):
        copies.prompts(engine, 30, 1)
