"""The benchmarks of speculation: scripted drafters are as right as they say, and a changed text is never missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import edge
from bench import identity, speculation
from bench.scripted import adversaries, guessing, scripted
from edge.engine import Engine
from tests.tiny import tiny_llama_gguf

TEXT = [(7 * i) % 300 for i in range(4000)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    edge.pack(tiny_llama_gguf(folder / "m.gguf", type="q8_0", seed=5), folder / "m.edge")
    return folder / "m.edge"


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 1.0])
def test_a_scripted_drafter_is_right_as_often_as_it_says(rate: float) -> None:
    propose = scripted(TEXT, rate, 1, 300)
    right = sum(propose(TEXT[:at], 9)[0] == (TEXT[at], 0) for at in range(1, 3001))
    assert abs(right / 3000 - rate) < 0.03
    assert propose(TEXT[:50], 9) == propose(TEXT[:50], 9)


def test_it_keeps_to_depth_rows_and_the_end_of_the_text() -> None:
    propose = scripted(TEXT, 1.0, 7, 300)
    assert [len(propose(TEXT[:5], n)) for n in (1, 2, 5, 20)] == [0, 1, 4, 7]
    assert len(propose(TEXT[:-3], 20)) == 3 and not propose(TEXT, 20)


def test_gains_of_a_scripted_drafter(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = tmp_path / "questions.jsonl"
    lines = [{"category": c, "turns": [f"{c} {i}"]} for c in ("math", "qa") for i in range(3)]
    questions.write_text("\n".join(map(json.dumps, lines)))
    command = (
        f"{model} --context 96 --threads 2 --tokens 31 --runs 1 --passes 0 --json --questions {questions} "
    )
    command += "--kind qa --prompts 2 --scripted 1.0 --scripted 0.0 --depth 4"
    assert speculation.main(command.split()) == 0
    found = json.loads(capsys.readouterr().out)
    results = {r["speculation"]: r for r in found["results"]}
    assert {r["text"] for r in found["results"]} == {"qa"}
    assert list(results) == ["off", "scripted:1.0:4", "scripted:0.0:4"]
    assert results["scripted:1.0:4"]["tokens_per_pass"] == 5
    assert results["scripted:0.0:4"]["tokens_per_pass"] == 1
    assert results["scripted:0.0:4"]["drafters"]["callback"]["acceptance"] == 0


def test_what_stood_before_comes_back(model: Path) -> None:
    with edge.load(model, context=96, threads=2) as engine:
        for propose in adversaries(TEXT, engine.vocab_size).values():
            with guessing(propose):
                engine.generate([1, 2], max_tokens=4, temperature=0)
            stats = engine.generate([1, 2], max_tokens=4, temperature=0, speculation="lookup").stats
            assert set(stats["speculation"]["drafters"]) == {"callback", "lookup"}


def identity_of(model: Path, log: Path, capsys: pytest.CaptureFixture[str], prompts: int) -> dict[str, Any]:
    command = f"--model {model} --prompts {prompts} --tokens 12 --json --log {log}"
    assert identity.main(command.split()) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def one_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    def engines(model: str, draft: str | None, threads: int | None) -> Any:
        with edge.load(model, context=96, threads=2) as engine:
            yield engine

    monkeypatch.setattr(identity, "engines", engines)


@pytest.mark.usefixtures("one_placement")
def test_identity_counts_goes_on_and_finds_a_fault(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.jsonl"
    first = identity_of(model, log, capsys, 2)
    assert {r["texts"] for r in first["results"]} == {2} and len(first["results"]) >= 10
    lines = log.read_text().splitlines()
    again = identity_of(model, log, capsys, 3)
    assert {r["texts"] for r in again["results"]} == {3}
    assert log.read_text().splitlines()[: len(lines)] == lines

    generate = Engine.generate

    def faulty(self: Engine, prompt: Any, **settings: Any) -> Any:
        found = generate(self, prompt, **settings)
        if settings["speculation"] != "off":
            found.tokens[-1] += 1
        return found

    monkeypatch.setattr(Engine, "generate", faulty)
    with pytest.raises(RuntimeError, match="differs"):
        identity_of(model, tmp_path / "other.jsonl", capsys, 1)
