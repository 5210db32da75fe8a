"""Mixtures that replay a recorded routing: the router chooses what the trace says, in the order of the trace."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf", reason="the benchmarks write GGUF files with the gguf package")

import edge
from bench import shapes, synth
from bench.replay import Replay, steps_of
from edge.errors import ModelFileError
from flashload.expert_policy import read_trace
from flashload.format import PackFile
from flashload.pack import pack
from quant.formats import TILE_FORMATS
from tests.neuron_packs import values_of
from tests.oracle import Oracle, softmax

N_STEPS = 40
SHAPE = replace(shapes.SHAPES["tiny-moe"], n_experts=8, experts_per_token=2)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    random = np.random.default_rng(5)
    path = tmp_path / "trace.jsonl"
    steps = [
        {"layers": [[int(e) for e in random.permutation(8)[:2]] for _ in range(2)]} for _ in range(N_STEPS)
    ]
    path.write_text("\n".join(map(json.dumps, steps)))
    return path


def made(tmp_path: Path, trace: Path, mix: str = "q4_0", shape: shapes.Shape = SHAPE) -> tuple[Path, Replay]:
    replay = Replay(trace, shape)
    path = tmp_path / f"{mix}.gguf"
    synth.write_model(path, shape, mix, walk=replay)
    return path, replay


def test_a_uniform_routing_prefers_nobody(tmp_path: Path) -> None:
    _, replay = made(tmp_path, Path("uniform"))
    steps = np.array(replay.steps)
    assert steps.shape == (SHAPE.hidden // 2, SHAPE.layers, 2) and (steps[..., 0] != steps[..., 1]).all()
    shares = np.bincount(steps.ravel(), minlength=8) / steps.size
    assert (abs(shares - 1 / 8) < 0.05).all()
    assert (steps != np.array(Replay(Path("uniform"), SHAPE, seed=1).steps)).any()


class Watching(Oracle):
    """Keeps the experts that each mixture chose."""

    chosen: list[list[set[int]]]

    def mixture(self, x: Any, prefix: str) -> Any:
        probability = softmax(self.linear(x, prefix + "router"))
        top = np.argsort(-probability, axis=1)[:, : self.c["experts_per_token"]]
        self.chosen.append([{int(e) for e in row} for row in top])
        return super().mixture(x, prefix)


@pytest.mark.parametrize("mix", ["q4_0", "q8_0", "q4_k_m"])
def test_routers_choose_what_the_trace_says(tmp_path: Path, trace: Path, mix: str) -> None:
    path, replay = made(tmp_path, trace, mix)
    pack(path, tmp_path / "m.edge")
    with PackFile(tmp_path / "m.edge") as file:
        matrices = {
            n: values_of(file, n)
            for n, e in file.entries.items()
            if e.format in TILE_FORMATS or (e.rows == 1 and "json" not in n)
        }
        oracle = Watching(file.config.to_json(), matrices)
    oracle.chosen = []
    tokens = [7, 200, 33, *range(2 * N_STEPS, 3 * N_STEPS), 511]
    oracle.logits(tokens)
    expected = [[set(replay.steps[t % N_STEPS][layer]) for t in tokens] for layer in range(2)]
    assert oracle.chosen == expected


def test_greedy_text_walks_along_the_trace(tmp_path: Path, trace: Path) -> None:
    path, replay = made(tmp_path, trace)
    pack(path, tmp_path / "m.edge")
    with edge.load(tmp_path / "m.edge", context=128, threads=1) as engine:
        found = engine.generate([5, 300], max_tokens=N_STEPS + 3, temperature=0, ignore_eos=True)
    start = 300 % N_STEPS + 1
    assert list(found.tokens) == [replay.first_id + (start + i) % N_STEPS for i in range(N_STEPS + 3)]


def test_prompts_recorded_layer_by_layer_give_the_same_steps(tmp_path: Path, trace: Path) -> None:
    steps = steps_of(read_trace(trace))
    rows = ["turn,phase,step,layer,slot,expert,weight"]
    for layer in range(2):
        for i, step in enumerate(steps):
            rows += [f"0,0,{i},{layer},{slot},{expert},0.5" for slot, expert in enumerate(step[layer])]
    path = tmp_path / "t.route.csv"
    path.write_text("\n".join(rows))
    assert steps_of(read_trace(path)) == steps and len(steps) == N_STEPS
    # The last layer computed from the end of the prompt on.
    path.write_text("\n".join([*rows[: 1 + 2 * N_STEPS], *rows[-2 * (N_STEPS - 10) :]]))
    short = steps_of(read_trace(path))
    assert [s[0] for s in short] == [s[0] for s in steps] and short[10:] == steps[10:]
    assert {s[1] for s in short[:10]} == {steps[10][1]}


@pytest.mark.parametrize(
    "change",
    [{"n_experts": 4}, {"layers": 3}, {"hidden": 64}, {"vocab": 30}],
    ids=lambda change: next(iter(change)),
)
def test_shapes_that_cannot_hold_the_trace_are_refused(trace: Path, change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected a mixture"):
        Replay(trace, replace(SHAPE, **change))


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("{}")
    with pytest.raises(ModelFileError):
        Replay(path, SHAPE)
    with pytest.raises(SystemExit):
        synth.main(["tiny-moe", "--routing", str(path), "--out", str(tmp_path / "x.gguf")])
    assert "--routing" in capsys.readouterr().err


def test_recorded_traces_fit_their_shapes(shared: Path) -> None:
    for name, shape in (("olmoe.jsonl.xz", "olmoe-1b-7b"), ("qwen.route.csv.xz", "qwen3-30b-a3b")):
        replay = Replay(shared / "traces" / name, shapes.SHAPES[shape])
        assert len(replay.steps) >= 150 and replay.experts_per_token in (6, 8)
