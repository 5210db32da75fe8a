"""The built-in models' own text, their Medusa heads, and the figures of how often guesses are right."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.builtin.data import END_OF_TEXT
from flashload.errors import ArgumentError, ContextOverflowError, CorruptError, ModelFileError

torch = pytest.importorskip("torch", reason="the recipe needs torch (pip install edge[train])")
pytest.importorskip("safetensors", reason="the recipe needs safetensors (pip install edge[train])")

from edge.builtin import guesses, medusa, medusa_heads, own_text, speculation_facts  # noqa: E402
from edge.builtin.batch_sampler import continue_batch, gumbel_noise  # noqa: E402
from edge.builtin.hf import save_hf  # noqa: E402
from edge.builtin.model import Decoder, ModelConfig  # noqa: E402
from edge.builtin.own_text import OwnText, load_own_text, read_own_text, save_own_text, write_texts  # noqa: E402
from edge.builtin.tokens import save_tokenizer, train_tokenizer  # noqa: E402

VOCAB = 300
SHAPES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 192,
}


def decoder(seed: int = 0, **changes: Any) -> Decoder:
    """A random model whose weights are large enough that its logits differ from token to token."""
    torch.manual_seed(seed)
    model = Decoder(ModelConfig(**{**SHAPES, **changes}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.mul_(1.0 if name.startswith("embed") else 8.0)
    return model.eval()


def prompts(rows: int, tokens: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(1, VOCAB, (rows, tokens))


def plain(
    model: Decoder, row: list[int], tokens: int, temperature: float, noise: Any, end_id: int
) -> list[int]:
    """The whole text computed anew for every token."""
    ids = list(row)
    for step in range(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        if temperature:
            logits = logits / temperature + noise(step)
        token = int(logits.argmax())
        if token == end_id:
            break
        ids.append(token)
    return ids[len(row) :]


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "relu"},
        {"hidden_act": "silu"},
        {"num_local_experts": 4, "intermediate_size": 32},
        {"num_key_value_heads": 4},
    ],
    ids=["relu", "silu", "experts", "no-groups"],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_cached_sampler_writes_what_full_recomputation_does(
    changes: dict[str, Any], temperature: float
) -> None:
    model = decoder(**changes)
    rows = prompts(6, 5)
    found = continue_batch(model, rows, 24, temperature, seed=9)
    for r, row in enumerate(rows):
        want = plain(model, row.tolist(), 24, temperature, lambda s, r=r: gumbel_noise(9, 6, s, VOCAB)[r], 0)
        assert found[r].ids.tolist() == want
        assert found[r].ended == (len(want) < 24)


def test_rows_end_alone_and_the_others_go_on_unchanged() -> None:
    model = decoder(3)
    rows = prompts(16, 6)
    free = continue_batch(model, rows, 40, 0.8, seed=1, end_id=-1)
    assert all(len(text.ids) == 40 and not text.ended for text in free)
    drawn = np.concatenate([text.ids for text in free])
    # A token that some rows draw early, some late and some not at all.
    counts = np.bincount(drawn, minlength=VOCAB)
    end_id = int(np.argmin(np.abs(counts - 12)))
    cut = continue_batch(model, rows, 40, 0.8, seed=1, end_id=end_id)
    lengths = []
    for text, whole in zip(cut, free, strict=True):
        at = np.flatnonzero(whole.ids == end_id)
        lengths.append(int(at[0]) if len(at) else 40)
        assert text.ended == bool(len(at))
        assert text.ids.tolist() == whole.ids[: lengths[-1]].tolist()
    assert len(set(lengths)) > 3 and 40 in lengths


def test_sampler_tells_every_token_and_refuses_too_long_texts() -> None:
    model = decoder()
    told: list[int] = []
    found = continue_batch(model, prompts(3, 4), 10, 0.0, end_id=-1, show=told.append)
    assert told == [3] * 10 and all(len(text.ids) == 10 for text in found)
    positions = model.config.max_position_embeddings
    assert len(continue_batch(model, prompts(1, positions - 3), 4, 0.0, end_id=-1)[0].ids) == 4
    with pytest.raises(ContextOverflowError, match=f"at most {positions + 1} tokens"):
        continue_batch(model, prompts(1, positions - 3), 5, 0.0)


def test_noise_is_gumbel_and_a_function_of_its_arguments() -> None:
    noise = gumbel_noise(5, 40, 2, 500)
    assert torch.equal(noise, gumbel_noise(5, 40, 2, 500))
    for other in (gumbel_noise(6, 40, 2, 500), gumbel_noise(5, 40, 3, 500)):
        assert not torch.equal(noise, other)
    # Mean and variance of the standard Gumbel distribution: Euler's constant and pi^2 / 6.
    assert abs(noise.mean().item() - 0.5772) < 0.05
    assert abs(noise.var().item() - 1.6449) < 0.1
    logits = torch.log(torch.tensor([0.1, 0.6, 0.3]))
    draws = (logits + gumbel_noise(1, 20_000, 0, 3)).argmax(dim=-1)
    shares = torch.bincount(draws, minlength=3) / 20_000
    assert torch.allclose(shares, torch.tensor([0.1, 0.6, 0.3]), atol=0.015)


def stories(count: int, seed: int = 0) -> list[Any]:
    random = np.random.default_rng(seed)
    return [random.integers(1, VOCAB, random.integers(20, 60)) for _ in range(count)]


def test_own_texts_start_from_stories_at_both_temperatures() -> None:
    model = decoder()
    sources = stories(400)
    texts = write_texts(model, sources, 150, new_tokens=12, seed=4)
    assert len(texts) == 150
    starts = {tuple(story[:8].tolist()) for story in sources if len(story) > 32}
    keys = set()
    for text in texts:
        assert 8 <= text.prompt_tokens <= 32
        assert tuple(text.ids[:8].tolist()) in starts
        keys.add(tuple(text.ids[: text.prompt_tokens].tolist()))
        new = len(text.ids) - text.prompt_tokens
        assert new == 12 if not text.ended else new < 12
    assert len(keys) == 150
    temperatures = [text.temperature for text in texts]
    assert temperatures.count(0.0) == 64 + 22 and temperatures.count(0.8) == 64
    greedy = next(text for text in texts if not text.temperature)
    prompt = [0, *greedy.ids[: greedy.prompt_tokens].tolist()]
    assert greedy.ids[greedy.prompt_tokens :].tolist() == plain(model, prompt, 12, 0.0, None, 0)


def test_same_seed_same_own_text() -> None:
    model, sources = decoder(), stories(200)
    first, again, other = (write_texts(model, sources, 70, 6, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a.ids, b.ids) for a, b in zip(first, other, strict=True))


def test_own_text_of_stories_that_begin_alike_is_not_written_twice() -> None:
    model, story = decoder(), stories(1)[0]
    long = np.concatenate((story, story, story))
    assert len(write_texts(model, [long] * 50, 20, 4)) == 1
    with pytest.raises(ArgumentError, match="a story of 33 tokens"):
        write_texts(model, [story[:10]], 20, 4)


def sample_texts() -> list[OwnText]:
    return [
        OwnText(np.arange(1, n), 2, t, e) for n, t, e in ((9, 0.0, True), (4, 0.8, False), (30, 0.8, True))
    ]


def test_own_text_reads_back(tmp_path: Path) -> None:
    save_own_text(tmp_path, sample_texts(), {"target_sha256": "ab"})
    texts, about = read_own_text(tmp_path)
    assert about == {"target_sha256": "ab"}
    for mine, read in zip(sample_texts(), texts, strict=True):
        assert np.array_equal(mine.ids, read.ids) and read.ids.dtype == np.int64
        assert (mine.prompt_tokens, mine.temperature, mine.ended) == (
            read.prompt_tokens,
            read.temperature,
            read.ended,
        )
    assert [ids.tolist() for ids in load_own_text(tmp_path)] == [t.ids.tolist() for t in sample_texts()]
    assert texts[0].row().tolist() == [0, *range(1, 9), 0] and texts[1].row().tolist() == [0, 1, 2, 3]


def test_missing_or_damaged_own_text_is_one_typed_line(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"python -m edge\.builtin\.own_text") as raised:
        load_own_text(tmp_path / "story" / "own")
    assert f"--family {tmp_path} " in str(raised.value) and "\n" not in str(raised.value)
    save_own_text(tmp_path, sample_texts(), {})
    path = tmp_path / "texts.bin"
    whole = path.read_bytes()
    for position in (9, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(CorruptError, match=r"texts\.bin: own text is damaged"):
            load_own_text(tmp_path)
    path.write_bytes(whole[:50])
    with pytest.raises(CorruptError):
        load_own_text(tmp_path)
    path.write_bytes(b"EDGETRN1" + whole[8:])
    with pytest.raises(ModelFileError, match="EDGETRN1"):
        load_own_text(tmp_path)


def test_medusa_heads_begin_as_the_models_own_guess() -> None:
    heads = medusa_heads.MedusaHeads(3, 8)
    h = torch.randn(2, 5, 8)
    assert torch.equal(heads(h), h.unsqueeze(-2).expand(2, 5, 3, 8))


def test_medusa_head_is_the_papers_formula() -> None:
    torch.manual_seed(1)
    heads = medusa_heads.MedusaHeads(2, 8)
    torch.nn.init.normal_(heads.weight)
    torch.nn.init.normal_(heads.bias)
    h = torch.randn(4, 8)
    stored = heads.tensors()
    for k in range(2):
        moved = h @ stored[f"medusa.{k}.weight"].T + stored[f"medusa.{k}.bias"]
        assert torch.allclose(heads(h)[:, k], h + moved * torch.sigmoid(moved), atol=1e-6)


def test_states_and_targets_stand_in_line() -> None:
    model = decoder()
    rows = [np.array([0, 5, 6, 7, 8, 0]), np.array([0, 9, 10]), np.array([0, 11])]
    data = medusa_heads.read_states(model, rows, heads=3)
    # Row 1 gives one state, row 0 four; row 2 has no token after the next one.
    none = -100
    assert data.targets.tolist() == [[10, none, none], [6, 7, 8], [7, 8, 0], [8, 0, none], [0, none, none]]
    with torch.no_grad():
        whole = model.hidden(torch.tensor([[0, 5, 6, 7, 8, 0]]))[0]
    assert torch.allclose(data.states[1:].float(), whole[:4], atol=2e-3)


def cycle_rows(count: int, length: int, period: int, seed: int = 0) -> list[Any]:
    """Texts that count up by one, from anywhere, around a circle of ids."""
    starts = np.random.default_rng(seed).integers(0, period, count)
    return [np.concatenate(([0], 1 + (start + np.arange(length)) % period)) for start in starts]


def test_heads_learn_what_the_states_tell() -> None:
    model = decoder()
    with torch.no_grad():
        model.embed_tokens.weight.mul_(25.0)
    empty = medusa_heads.States(torch.zeros(0, 32).half(), torch.zeros(0, 2, dtype=torch.int64))
    own = medusa_heads.read_states(model, cycle_rows(20, 20, 10), heads=2)
    settings = medusa.MedusaSettings(heads=2, steps=60, states=64, lr=5e-2)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    losses: list[float] = []
    heads = medusa.train_heads(model, own, empty, settings, lambda _step, loss: losses.append(loss))
    assert len(losses) == 60 and losses[-1] < losses[0] / 2
    unseen = medusa_heads.read_states(model, cycle_rows(6, 20, 10, seed=1), heads=2)
    untrained = medusa_heads.accuracies(model, medusa_heads.MedusaHeads(2, 32), unseen)
    found = medusa_heads.accuracies(model, heads, unseen)
    for k in range(2):
        assert found["top1"][k] > 0.8 > 0.5 > untrained["top1"][k]
        assert found["top5"][k] >= found["top1"][k]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])


def test_story_states_take_part_and_training_is_seeded() -> None:
    model = decoder()
    own = medusa_heads.read_states(model, cycle_rows(10, 12, 10), heads=2)
    texts = medusa_heads.read_states(model, cycle_rows(10, 12, 200, seed=3), heads=2)
    settings = medusa.MedusaSettings(heads=2, steps=5, states=32)
    first, again = (medusa.train_heads(model, own, texts, settings).tensors() for _ in range(2))
    alone = medusa.train_heads(model, own, own, settings).tensors()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["medusa.0.weight"], alone["medusa.0.weight"])


def test_accuracies_count_only_known_targets() -> None:
    model = decoder()
    heads = medusa_heads.MedusaHeads(2, 32)
    states = torch.randn(7, 32).half()
    with torch.no_grad():
        best = model.head(states.float()).topk(2, dim=-1).indices
    targets = torch.stack([best[:, 0], best[:, 1]], dim=1)
    targets[3:, 1] = -100
    assert medusa_heads.accuracies(model, heads, medusa_heads.States(states, targets)) == {
        "top1": [1.0, 0.0],
        "top5": [1.0, 1.0],
    }


def test_accepted_chains_are_walked_as_a_decoder_walks_them() -> None:
    right = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 1, 1]], bool)
    # Starts at token 0 (2 right), token 3 (none), token 4 (1 right); then the text is over.
    assert guesses.mean_accepted([right], 4) == 1.0
    assert guesses.mean_accepted([np.ones((10, 4), bool)], 4) == 4.0
    assert guesses.mean_accepted([np.ones((10, 4), bool)], 3) == 3.0
    assert guesses.mean_accepted([], 4) == 0.0


def test_repeated_share_counts_runs_said_before() -> None:
    fresh, loop = list(range(1, 21)), [*range(1, 11), *range(1, 11)]
    rows = torch.tensor([[0, 50, *fresh], [0, 51, *loop]])
    # Of the second text's 20 tokens the last three end runs of 8 that were there before.
    assert guesses.repeated_share([guesses.Paths(rows, 2, [22, 22], 0.0, 0)]) == pytest.approx(3 / 40)


SETTINGS = guesses.Settings(prompt_tokens=6, new_tokens=20)


def test_a_model_is_its_own_perfect_draft() -> None:
    model = decoder(5)
    for temperature in (0.0, 0.8):
        paths = guesses.walk(model, prompts(5, 6), temperature, SETTINGS)
        facts = guesses.draft_facts(model, model, paths, 4)
        assert facts["match"] == 1.0 and facts["accepted"] == 4.0
        if temperature:
            assert facts["expected"] == 1.0 and facts["accepted_rejection"] == 4.0


def test_draft_facts_equal_the_definitions() -> None:
    """Against a loop over single tokens, and sum of min(p, q) against the rule of rejection sampling."""
    target, draft = decoder(5), decoder(6, hidden_size=16)
    rows = prompts(40, 6)
    paths = guesses.walk(target, rows, 0.8, SETTINGS)
    facts = guesses.draft_facts(target, draft, paths, 4)
    matches, overlaps = [], []
    for begin, batch in zip((0, 32), paths, strict=True):
        noise = batch.noise(VOCAB)
        for r, length in enumerate(batch.lengths):
            ids = batch.rows[r].tolist()
            assert ids[:7] == [0, *rows[begin + r].tolist()]
            with torch.no_grad():
                after = [model(batch.rows[r : r + 1])[0] / 0.8 for model in (target, draft)]
            for at in range(7, length):
                p, q = (logits[at - 1] for logits in after)
                assert int((p + noise[r, at - 7]).argmax()) == ids[at]
                matches.append(int((q + noise[r, at - 7]).argmax()) == ids[at])
                overlaps.append(torch.minimum(p.softmax(-1), q.softmax(-1)).sum().item())
    assert facts["tokens"] == len(matches)
    assert facts["match"] == pytest.approx(np.mean(matches), abs=1e-4)
    assert facts["expected"] == pytest.approx(np.mean(overlaps), abs=1e-3)
    assert 0 < facts["match"] < facts["expected"] < 1


def test_medusa_facts_equal_the_definitions() -> None:
    model = decoder(5)
    torch.manual_seed(2)
    heads = medusa_heads.MedusaHeads(3, 32)
    torch.nn.init.normal_(heads.weight, std=0.3)
    for temperature in (0.0, 0.8):
        paths = guesses.walk(model, prompts(5, 6), temperature, SETTINGS)
        facts = guesses.medusa_facts(model, heads.eval(), paths, 4)
        (batch,) = paths
        hits: list[list[bool]] = [[] for _ in range(3)]
        for r, length in enumerate(batch.lengths):
            with torch.no_grad():
                best = model.head(heads(model.hidden(batch.rows[r : r + 1])[0])).topk(5, dim=-1).indices
            for state in range(6, length):
                for k in range(3):
                    if state + 2 + k < length:
                        hits[k].append(int(batch.rows[r, state + 2 + k]) in best[state, k].tolist())
        assert facts["top5"] == pytest.approx([np.mean(h) for h in hits], abs=1e-4)
        assert facts["tokens"] == len(hits[0])
        assert ("match" in facts) == bool(temperature)
        assert 0 <= facts["accepted"] <= 3


def test_heads_that_copy_a_repeating_model_are_always_right() -> None:
    """A model that says one token for ever: heads that leave the state alone guess it."""
    model = decoder(hidden_act="relu")
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.embed_tokens.weight.fill_(0.001)
        model.embed_tokens.weight[:, 0] = 1.0
        model.embed_tokens.weight[7, 0] = 2.0
    paths = guesses.walk(model, prompts(3, 6), 0.0, SETTINGS)
    facts = guesses.medusa_facts(model, medusa_heads.MedusaHeads(4, 32), paths, 4)
    assert set(paths[0].rows[:, 7:].flatten().tolist()) == {7}
    assert facts["top1"] == [1.0] * 4 and facts["accepted"] == 4.0


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora of made-up stories, as small as the recipe takes them."""
    folder = tmp_path_factory.mktemp("corpora")
    random = np.random.default_rng(0)
    words = ["the", "a", "dog", "cat", "tree", "boat", "saw", "found", "liked", "big", "small", "Lily", "Tom"]
    told = [" ".join(random.choice(words, 120)) + f" {n}." for n in range(420)]
    (folder / "tinystories.txt.xz").write_bytes(lzma.compress(f"\n{END_OF_TEXT}\n".join(told).encode()))
    (folder / "tinystories-lower.txt.xz").write_bytes(lzma.compress(told[0].lower().encode()))
    return folder


@pytest.fixture
def family(corpora: Path, tmp_path: Path) -> Path:
    """A family folder with a random target and a random draft of one tokenizer."""
    from edge.builtin.data import load_corpus

    tokenizer = train_tokenizer(load_corpus(corpora, with_books=False).stories[:50], VOCAB)
    for name, model in (("story", decoder(1)), ("draft", decoder(2, hidden_size=16))):
        save_hf(model, tmp_path / name / "hf", bos_id=0)
        save_tokenizer(tokenizer, tmp_path / name / "hf", 192)
    return tmp_path


def run(tool: Any, family: Path, corpora: Path, *more: str) -> int:
    status: int = tool.main(["--family", str(family), "--corpora", str(corpora), *more])
    return status


def test_commands_from_own_text_to_facts(
    family: Path, corpora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = family / "story" / "hf"
    assert run(own_text, family, corpora, "--texts", "24", "--tokens", "16") == 0
    assert "24 texts" in capsys.readouterr().out
    texts, about = read_own_text(family / "story" / "own")
    assert len(texts) == 24 and about["target_sha256"] == own_text.model_sha256(hf)
    assert run(medusa, family, corpora, "--heads", "3", "--steps", "4") == 0
    report = json.loads((family / "story" / "medusa.json").read_text())
    assert report["target_sha256"] == about["target_sha256"] and report["settings"]["heads"] == 3
    heads = medusa_heads.load_medusa(hf, 32)
    assert heads.weight.shape == (3, 32, 32) and heads.weight.abs().max() > 0
    assert not list(family.rglob("*.tmp"))
    capsys.readouterr()
    assert run(speculation_facts, family, corpora, "--json", "--stories", "4") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["texts"] == {"stories": 4}
    assert set(facts["facts"]["stories"]) == {"text", "draft", "medusa"}
    assert set(facts["facts"]["stories"]["draft"]) == {"0", "0.8"}
    assert run(speculation_facts, family, corpora, "--stories", "2") == 0
    table = capsys.readouterr().out
    assert "rejection sampling" in table and "among the first five" in table


def test_facts_of_the_draft_alone(family: Path, corpora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(speculation_facts, family, corpora, "--json", "--stories", "2") == 0
    assert set(json.loads(capsys.readouterr().out)["facts"]["stories"]) == {"text", "draft"}


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_commands_say_what_is_missing(
    family: Path, corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tool in (own_text, medusa, speculation_facts):
        assert run(tool, family / "none", corpora) == 1
        assert "expected a trained model" in one_error(capsys)
    assert run(own_text, family, tmp_path / "none") == 1
    assert "tinystories.txt.xz" in one_error(capsys)
    assert run(medusa, family, corpora) == 1
    assert "edge.builtin.own_text" in one_error(capsys)
    assert run(speculation_facts, family, corpora, "--draft", "none") == 1
    assert "found neither" in one_error(capsys)
    assert run(own_text, family, corpora, "--texts", "0") == 1
    assert "at least 1 text" in one_error(capsys)


def test_heads_are_not_trained_on_another_models_text(
    family: Path, corpora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_own_text(family / "story" / "own", sample_texts(), {"target_sha256": "00"})
    assert run(medusa, family, corpora, "--steps", "2") == 1
    assert "found text of another" in one_error(capsys)
    assert not (family / "story" / "hf" / medusa_heads.MEDUSA_FILE).exists()


def test_interrupted_heads_leave_no_file(
    family: Path, corpora: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(own_text, family, corpora, "--texts", "4", "--tokens", "8") == 0

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(medusa, "train_heads", interrupt)
    assert run(medusa, family, corpora, "--steps", "2") == 130
    assert "nothing written" in capsys.readouterr().err
    assert {p.name for p in (family / "story").iterdir()} == {"hf", "own"}
    assert not (family / "story" / "hf" / medusa_heads.MEDUSA_FILE).exists()


def test_heads_of_another_shape_or_damaged_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / medusa_heads.MEDUSA_FILE
    with pytest.raises(ArgumentError, match="found none"):
        medusa_heads.load_medusa(tmp_path, 32)
    save_file(medusa_heads.MedusaHeads(2, 16).tensors(), path)
    with pytest.raises(ModelFileError, match=r"\[32, 32\]"):
        medusa_heads.load_medusa(tmp_path, 32)
    assert len(medusa_heads.load_medusa(tmp_path, 16).weight) == 2
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelFileError, match="damaged"):
        medusa_heads.load_medusa(tmp_path, 16)


def test_draft_of_another_vocabulary_is_refused(
    family: Path, corpora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_hf(decoder(2, vocab_size=200), family / "draft" / "hf", bos_id=0)
    assert run(speculation_facts, family, corpora) == 1
    assert "300 tokens, found 200" in one_error(capsys)
    save_hf(decoder(2, max_position_embeddings=64), family / "draft" / "hf", bos_id=0)
    assert run(speculation_facts, family, corpora) == 1
    assert "153 positions or more, found 64" in one_error(capsys)


def test_book_prompts_are_spread_over_the_books() -> None:
    texts = [f"{name} word " * 20 for name in ("one", "two", "three")]
    tokenizer = train_tokenizer(texts, VOCAB)
    books = ["\n".join(f"{text} {n}" for n in range(9)) + "\nshort" for text in texts]
    found = speculation_facts.book_prompts(tokenizer, books, 12, 7)
    assert len(found) == 7 and all(len(ids) == 12 for ids in found)
    begins = [tokenizer.decode(ids.tolist()).split()[0] for ids in found]
    assert begins == ["one"] * 2 + ["two"] * 2 + ["three"] * 3
