"""Draft models and Medusa heads: the same text, inside the same budget, and the guesses they should make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _edge
import numpy as np
import pytest

import edge
from edge import speculation
from edge.errors import ArgumentError
from flashload.format import PackFile
from tests.test_speculation import SETTINGS
from tests.test_speculation_rejection import LEAST_P, chi_square_p
from tests.tiny import tiny_hf, tokenizer_json, write_safetensors

CONTEXT = 96
PROMPT = [1, 40, 41, 42, 43]


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("drafts")

    def make(name: str, family: str = "llama", **options: Any) -> Path:
        edge.pack(tiny_hf(folder / name, family, **options), folder / f"{name}.edge")
        return folder / f"{name}.edge"

    made = {
        "target": make("target", seed=1),
        "mixture": make("mixture", "mixtral", seed=2),
        "draft": make("draft", seed=3, num_hidden_layers=1),
    }
    # The same tokenizer over a longer and a shorter embedding.
    for name, rows in (("longer", 336), ("shorter", 304)):
        path = tiny_hf(folder / name, seed=4, vocab_size=rows)
        (path / "tokenizer.json").write_text(tokenizer_json(300))
        edge.pack(path, folder / f"{name}.edge")
        made[name] = folder / f"{name}.edge"
    path = tiny_hf(folder / "padded", seed=1)
    (path / "tokenizer.json").write_text(tokenizer_json(300))
    edge.pack(path, folder / "padded.edge")
    made["padded"] = folder / "padded.edge"
    path = tiny_hf(folder / "heads", seed=1)
    rng = np.random.default_rng(7)
    heads = {}
    for k in range(3):
        heads[f"medusa.{k}.weight"] = rng.normal(scale=0.2, size=(64, 64)).astype(np.float32)
        heads[f"medusa.{k}.bias"] = rng.normal(scale=0.2, size=64).astype(np.float32)
    write_safetensors(path / "edge_medusa.safetensors", heads)
    edge.pack(path, folder / "heads.edge")
    made["heads"] = folder / "heads.edge"
    return made


@pytest.fixture(scope="module")
def alone(packs: dict[str, Path]) -> Iterator[edge.Engine]:
    with edge.load(packs["target"], context=CONTEXT, threads=2) as engine:
        yield engine


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("sampling", SETTINGS)
def test_a_model_that_drafts_for_itself_is_always_right(
    packs: dict[str, Path], alone: edge.Engine, sampling: str, depth: int
) -> None:
    asked = {"max_tokens": 1 + 4 * (depth + 1), "ignore_eos": True, "logprobs": 2, **SETTINGS[sampling]}
    plain = alone.generate(PROMPT, speculation="off", **asked)
    with edge.load(packs["target"], context=CONTEXT, threads=2, draft=packs["target"]) as engine:
        found = engine.generate(PROMPT, speculation={"drafters": "draft", "depth": depth}, **asked)
        assert (found.tokens, found.logprobs) == (plain.tokens, plain.logprobs)
        done = found.stats["speculation"]
        assert done["tokens_per_pass"] == depth + 1 and done["drafters"]["draft"]["acceptance"] == 1


@pytest.mark.parametrize(
    ("target", "draft"), [("target", "draft"), ("mixture", "draft"), ("target", "mixture")]
)
@pytest.mark.parametrize("sampling", SETTINGS)
def test_another_model_changes_nothing(
    packs: dict[str, Path], target: str, draft: str, sampling: str
) -> None:
    with edge.load(packs[target], context=CONTEXT, threads=2, draft=packs[draft]) as engine:
        for prompt in (PROMPT, PROMPT[:3] + PROMPT):
            asked = {"max_tokens": 50, "ignore_eos": True, "logprobs": 2, **SETTINGS[sampling]}
            plain = engine.generate(prompt, speculation="off", **asked)
            for setting in ("auto", "draft", {"depth": 3}, {"drafters": "draft", "depth": 6, "max_rows": 4}):
                found = engine.generate(prompt, speculation=setting, **asked)
                assert (found.tokens, found.logprobs) == (plain.tokens, plain.logprobs), setting


def test_the_draft_follows_when_the_text_moves(packs: dict[str, Path]) -> None:
    asked: dict[str, Any] = {"ignore_eos": True, **SETTINGS["drawn"]}
    fixed = {"drafters": "draft", "depth": 3}
    with edge.load(packs["target"], context=CONTEXT, threads=2, draft=packs["target"]) as engine:
        for prompt, n in ((PROMPT, 20), (PROMPT, 20), ([*PROMPT[:4], 9], 20), (PROMPT, 150)):
            more = {**asked, "max_tokens": n, "overflow": "shift"}
            plain = engine.generate(prompt, speculation="off", **more)
            found = engine.generate(prompt, speculation=fixed, **more)
            assert found.tokens == plain.tokens
            assert found.stats["speculation"]["drafters"]["draft"]["acceptance"] == 1


def test_a_restored_session_is_drafted_anew(packs: dict[str, Path], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True, **SETTINGS["drawn"]}
    with edge.load(packs["target"], context=CONTEXT, threads=1, draft=packs["target"]) as engine:
        first = engine.generate(PROMPT, speculation="off", **asked)
        _edge.save_session(engine._sequence, str(tmp_path / "session"))
        text = [*PROMPT, *first.tokens, 7]
        plain = engine.generate(text, speculation="off", **asked)
        engine.generate([9, 8, 7], speculation={"depth": 3}, **asked)
        _edge.load_session(engine._sequence, str(tmp_path / "session"))
        found = engine.generate(text, speculation={"drafters": "draft", "depth": 3}, **asked)
        assert found.stats["reused_tokens"] > 30 and found.tokens == plain.tokens
        assert found.stats["speculation"]["drafters"]["draft"]["acceptance"] == 1


@pytest.mark.parametrize("draft", ["longer", "shorter"])
def test_embeddings_may_be_padded(packs: dict[str, Path], draft: str) -> None:
    with edge.load(packs["padded"], context=CONTEXT, threads=1, draft=packs[draft]) as engine:
        for settings in SETTINGS.values():
            asked = {"max_tokens": 40, "ignore_eos": True, **settings}
            plain = engine.generate(PROMPT, speculation="off", **asked)
            found = engine.generate(PROMPT, speculation={"drafters": "draft", "depth": 4}, **asked)
            assert found.tokens == plain.tokens


def test_no_such_draft_is_refused(packs: dict[str, Path]) -> None:
    with pytest.raises(ArgumentError, match="no-such-model"):
        edge.load(packs["target"], context=CONTEXT, draft="no-such-model")


def test_costs_are_known_after_a_load(packs: dict[str, Path]) -> None:
    with edge.load(packs["heads"], context=CONTEXT, draft=packs["draft"]) as engine:
        assert engine._speculators is not None
        stats = engine._speculators.configured(speculation.Speculation()).stats()
        costs = [ms for _, ms in stats["pass_ms"]]
        assert costs == sorted(costs) and costs[0] > 0
        assert list(stats["drafters"]) == ["draft", "medusa", "lookup"] and stats["saved_ms"] == 0
        plain = engine.generate(PROMPT, max_tokens=20, speculation="off", **SETTINGS["drawn"])
        assert engine.generate(PROMPT, max_tokens=20, **SETTINGS["drawn"]).tokens == plain.tokens


def test_a_draft_is_counted_and_given_back(packs: dict[str, Path]) -> None:
    with edge.load(packs["target"], context=CONTEXT, draft=packs["draft"]) as engine:
        stats = engine.stats()
        assert stats["by_tag"]["draft"] > 0
        assert sum(stats["by_tag"].values()) == stats["used_bytes"] <= stats["budget_bytes"]
        assert engine.plan.predicted_peak_bytes >= stats["used_bytes"]
        assert engine.notes == ()


def test_a_draft_that_does_not_fit_is_left_out(packs: dict[str, Path], tmp_path: Path) -> None:
    large = tiny_hf(tmp_path / "large", seed=3, hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    whole = edge.plan(packs["target"], memory="1GiB", context=CONTEXT, threads=1)
    memory = whole.predicted_peak_bytes + (6 << 20)
    with edge.load(packs["target"], memory=memory, context=CONTEXT, threads=1, draft=large) as engine:
        assert engine.plan.placement == "resident"
        assert len(engine.notes) == 1 and "left out" in engine.notes[0] and "large" in engine.notes[0]
        assert "draft" not in engine.stats()["by_tag"]
        assert len(engine.generate(PROMPT, max_tokens=20, ignore_eos=True).tokens) == 20
        with pytest.raises(ArgumentError, match=r"speculation: draft: expected a draft model.*left out"):
            engine.generate(PROMPT, max_tokens=2, speculation="draft")


def test_the_named_draft_is_needed(alone: edge.Engine) -> None:
    with pytest.raises(ArgumentError, match="speculation: draft: expected a draft model"):
        alone.generate(PROMPT, max_tokens=2, speculation="draft")
    with pytest.raises(ArgumentError, match="speculation: medusa: expected a model that comes with"):
        alone.generate(PROMPT, max_tokens=2, speculation={"drafters": ["lookup", "medusa"]})


@pytest.mark.parametrize("setting", ["medusa", "auto", {"drafters": "medusa", "depth": 2}], ids=str)
def test_heads_change_nothing(packs: dict[str, Path], alone: edge.Engine, setting: Any) -> None:
    with edge.load(packs["heads"], context=CONTEXT, threads=2) as engine:
        for settings in SETTINGS.values():
            asked = {"max_tokens": 50, "ignore_eos": True, "logprobs": 2, **settings}
            plain = alone.generate(PROMPT, speculation="off", **asked)
            found = engine.generate(PROMPT, speculation=setting, **asked)
            assert (found.tokens, found.logprobs) == (plain.tokens, plain.logprobs)


def matrix(pack: PackFile, name: str) -> np.ndarray:
    entry = pack.entries[name]
    if int(entry.format) == 100:
        return np.frombuffer(pack.read(name), "<f4")
    return _edge.untile_rows(int(entry.format), pack.read(name), entry.rows, entry.cols)


def test_heads_guess_what_their_formula_says(packs: dict[str, Path]) -> None:
    with PackFile(packs["heads"]) as pack, edge.load(packs["heads"], context=CONTEXT, threads=1) as engine:
        head = matrix(pack, "head.weight")
        sequence, core = engine._sequence, engine._core
        assert sequence is not None and core is not None
        sampler = _edge.Sampler({"temperature": 0.0}, engine.vocab_size)
        speculator = _edge.Speculator(core)
        speculator.add_medusa()
        speculator.configure(depth=3)
        sequence.set_tokens(PROMPT)
        sequence.keep_hidden()
        for _ in range(12):
            speculator.step(sequence, sampler, 1 if sequence.n_pending != 1 else 8, [])
            state = sequence.hidden().astype(np.float64)
            # The state predicts the newest token itself: it is the one that token was drawn from.
            assert int(np.argmax(head @ state)) == sequence.tokens[-1]
            speculator.step(sequence, sampler, 8, [])
            expected = []
            for k in range(3):
                gate = matrix(pack, f"medusa.{k}.weight") @ state + matrix(pack, f"medusa.{k}.bias")
                expected.append(int(np.argmax(head @ (state + gate / (1 + np.exp(-gate))))))
            assert [token for token, _ in speculator.proposed()] == expected


def test_rejection_keeps_the_distribution(packs: dict[str, Path]) -> None:
    """The second token comes from a verified draft: pairs of tokens against what the logits say."""
    # A bias brings both models to the same few tokens, and leaves how they share among them.
    config = {"temperature": 1.4, "top_k": 4, "logit_bias": {token: 9.0 for token in range(10, 14)}}
    n = 3000
    with edge.load(packs["target"], context=CONTEXT, threads=1, draft=packs["draft"]) as engine:
        sequence, core = engine._sequence, engine._core
        assert sequence is not None and core is not None and engine._drafting is not None
        assert engine._drafting.draft is not None
        judge = _edge.Sampler(config, engine.vocab_size)
        expected: dict[Any, float] = {}
        for a, p_a in judge.distribution(engine.logits(PROMPT), PROMPT, 5):
            for b, p_b in judge.distribution(engine.logits([*PROMPT, a]), [*PROMPT, a], 6):
                expected[a, b] = n * p_a * p_b
        speculator = _edge.Speculator(core)
        speculator.configure(depth=2, acceptance="rejection")
        speculator.add_draft(engine._drafting.draft)
        found: Counter[Any] = Counter()
        for seed in range(n):
            sampler = _edge.Sampler({**config, "seed": seed}, engine.vocab_size)
            sequence.set_tokens(PROMPT)
            while sequence.n_tokens < len(PROMPT) + 2:
                speculator.step(sequence, sampler, len(PROMPT) + 4 - sequence.n_tokens, [])
            found[tuple(sequence.tokens[5:7])] += 1
        accepted = speculator.stats()["drafters"]["draft"]
    assert 0 < accepted["accepted"] < accepted["tried"]
    assert chi_square_p(found, expected) > LEAST_P


@pytest.mark.parametrize("acceptance", ["rejection", "typical"])
def test_other_rules_obey_stops_and_limits(packs: dict[str, Path], acceptance: str) -> None:
    with edge.load(packs["target"], context=CONTEXT, threads=1, draft=packs["draft"]) as engine:
        for depth in (0, 4):
            setting = {"drafters": ["draft", "lookup"], "acceptance": acceptance, "depth": depth}
            asked = {"ignore_eos": True, "logprobs": 2, "speculation": setting, **SETTINGS["filtered"]}
            found = engine.generate(PROMPT, max_tokens=40, **asked)
            assert len(found.tokens) == 40 and found.finish_reason == "length"
            assert found.logprobs is not None and len(found.logprobs) == 40
            scores = engine.score([*PROMPT, *found.tokens])[len(PROMPT) :]
            for item, score in zip(found.logprobs, scores, strict=True):
                assert item.logprob == pytest.approx(score, abs=1e-9) and len(item.top) == 2
            stop = found.text[5:8]
            cut = engine.generate(PROMPT, max_tokens=40, stop=stop, **asked)
            assert stop not in cut.text
        greedy = {**asked, **SETTINGS["greedy"]}
        if acceptance == "rejection":
            plain = engine.generate(PROMPT, max_tokens=40, **{**greedy, "speculation": "off"})
            assert engine.generate(PROMPT, max_tokens=40, **greedy).tokens == plain.tokens


def test_the_pack_names_its_heads(packs: dict[str, Path]) -> None:
    with PackFile(packs["heads"]) as pack:
        names = [name for name in pack.entries if name.startswith("medusa.")]
    assert sorted(names) == sorted(f"medusa.{k}.{part}" for k in range(3) for part in ("weight", "bias"))
