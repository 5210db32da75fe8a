"""The sampler: exact filters, draws that follow the distribution, text that depends on seed and position."""

from __future__ import annotations

import math
from typing import Any

import _edge
import numpy as np
import numpy.typing as npt
import pytest

from flashload import errors

Array = npt.NDArray[Any]
M32 = (1 << 32) - 1


def sample(logits: Any, history: list[int] | None = None, position: int = 0, **config: Any) -> Any:
    """(token, logprob, top) of a fresh sampler."""
    return _edge.Sampler(config, len(logits)).sample(np.asarray(logits, np.float32), history or [], position)


# --- random numbers ---


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_answers(counter: str, key: str, words: str) -> None:
    """Known-answer vectors of Random123 for philox4x32, 10 rounds."""
    numbers = [[int(word, 16) for word in text.split()] for text in (counter, key, words)]
    assert _edge.philox4x32(numbers[0], numbers[1]) == numbers[2]


@pytest.mark.parametrize(
    ("seed", "position", "token"), [(0, 0, 0), (5 << 40 | 7, 3 << 33 | 9, 151935), (1, 2, 3)]
)
def test_philox_is_keyed_by_seed_position_and_token(seed: int, position: int, token: int) -> None:
    counter = [token, position & M32, position >> 32, 0]
    assert _edge.philox(seed, position, token) == _edge.philox4x32(counter, [seed & M32, seed >> 32])


def test_gumbel_is_the_double_logarithm_of_the_first_two_words() -> None:
    for token in range(2000):
        low, high = _edge.philox(11, 22, token)[:2]
        u = (((high << 32 | low) >> 12) + 0.5) * 2.0**-52
        assert _edge.gumbel(11, 22, token) == pytest.approx(-math.log(-math.log1p(-u)), rel=1e-12, abs=1e-12)


def test_gumbel_has_its_mean_and_variance() -> None:
    g = np.array([_edge.gumbel(seed, 3, token) for seed in range(50) for token in range(400)])
    assert abs(g.mean() - 0.5772156649) < 5 * math.sqrt(math.pi**2 / 6 / g.size)
    assert g.var() == pytest.approx(math.pi**2 / 6, rel=0.05)


# --- the definition, spelled out ---


def penalised(logits: Array, history: list[int], config: dict[str, Any]) -> Array:
    out = logits.astype(np.float64)
    for token, bias in dict(config.get("logit_bias", {})).items():
        out[token] += bias
    last_n = config.get("penalty_last_n", -1)
    window = history if last_n < 0 else history[len(history) - min(last_n, len(history)) :]
    repetition = config.get("repetition_penalty", 1.0)
    for token in set(window):
        out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
        out[token] -= config.get("presence_penalty", 0.0)
        out[token] -= config.get("frequency_penalty", 0.0) * window.count(token)
    return out


def softmax(x: Array) -> Array:
    w: Array = np.exp(x - x.max())
    return w / w.sum()


def prefix(order: Array, p: Array, mass: float) -> Array:
    """The shortest front of `order` whose probability reaches `mass` of what `order` holds."""
    reached = np.cumsum(p[order]) >= mass * p[order].sum()
    return order[: int(np.argmax(reached)) + 1] if reached.any() else order


def distribution(logits: Array, history: list[int], config: dict[str, Any]) -> Array:
    """Probability of every token, by sorting whole arrays in float64."""
    scaled = penalised(logits, history, config) / np.float64(np.float32(config.get("temperature", 1.0)))
    p = softmax(scaled)
    order = np.lexsort((np.arange(p.size), -scaled))
    order = order[p[order] > 0]
    if config.get("top_k", 0):
        order = order[: config["top_k"]]
    if config.get("typical_p", 1.0) < 1:
        q = p[order] / p[order].sum()
        entropy = -(q * np.log(q)).sum()
        order = order[np.lexsort((order, np.abs(np.log(q) + entropy)))]
        order = prefix(order, p, np.float64(np.float32(config["typical_p"])))
    if config.get("top_p", 1.0) < 1:
        order = order[np.lexsort((order, -scaled[order]))]
        order = prefix(order, p, np.float64(np.float32(config["top_p"])))
    order = order[p[order] >= np.float64(np.float32(config.get("min_p", 0.0))) * p[order].max()]
    kept = np.zeros_like(p)
    kept[order] = p[order]
    return kept / kept.sum()


CONFIGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 10**9, "top_p": 0.7},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"typical_p": 0.5},
    {"typical_p": 0.9, "temperature": 1.5},
    {"typical_p": 0.9, "top_p": 0.8},
    {"temperature": 0.8, "top_k": 8, "typical_p": 0.95, "top_p": 0.9, "min_p": 0.05},
    {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1, "top_p": 0.9},
    {"logit_bias": {3: 1.5, 0: -math.inf}, "min_p": 0.02},
]
IDS = [", ".join(config) + f" #{i}" for i, config in enumerate(CONFIGS)]


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("vocab", [12, 300, 5000])
def test_the_draw_is_the_argmax_of_log_p_plus_gumbel(config: dict[str, Any], vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for trial in range(12):
        logits = (rng.standard_normal(vocab) * 2.5).astype(np.float32)
        history = rng.integers(0, vocab, 20).tolist()
        p = distribution(logits, history, config)
        kept = np.flatnonzero(p)
        g = np.array([_edge.gumbel(trial, 1000 + trial, int(token)) for token in kept])
        token, logprob, _ = sample(logits, history, 1000 + trial, seed=trial, **config)
        assert token == kept[np.argmax(np.log(p[kept]) + g)]
        assert logprob == pytest.approx(math.log(softmax(logits.astype(np.float64))[token]), abs=1e-9)


def chi_square_limit(freedom: int) -> float:
    """Upper 1e-5 quantile (Wilson and Hilferty, 1931)."""
    a = 2 / (9 * freedom)
    return float(freedom * (1 - a + 4.265 * math.sqrt(a)) ** 3)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_draws_over_seeds_follow_the_distribution(config: dict[str, Any]) -> None:
    logits = np.random.default_rng(5).standard_normal(12).astype(np.float32) * np.float32(1.5)
    history = [1, 1, 4, 7, 2, 1]
    p, n = distribution(logits, history, config), 6000
    counts = np.zeros(12)
    for seed in range(n):
        counts[sample(logits, history, 42, seed=seed, **config)[0]] += 1
    assert not counts[p == 0].any()
    # Cells of few expected draws are pooled.
    order = np.argsort(p)
    small = np.cumsum(p[order]) * n < 10
    cells = [[i] for i in order[~small]]
    if p[order[small]].sum() > 0:
        cells.append(order[small].tolist())
    expected = np.array([p[cell].sum() * n for cell in cells])
    seen = np.array([counts[cell].sum() for cell in cells])
    if len(cells) > 1:
        assert ((seen - expected) ** 2 / expected).sum() < chi_square_limit(len(cells) - 1)
    else:
        assert seen[0] == n


def test_draws_over_positions_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler, n = _edge.Sampler({"seed": 9}, 4), 8000
    counts = np.bincount([sampler.sample(logits, [], position)[0] for position in range(n)], minlength=4)
    expected = np.exp(logits) * n
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(3)


# --- what the text depends on ---


def test_equal_seed_and_position_give_equal_tokens_whatever_came_before() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((30, 500)).astype(np.float32)
    config = {"seed": 7, "temperature": 0.9, "top_p": 0.95, "frequency_penalty": 0.3, "n_logprobs": 3}
    sampler = _edge.Sampler(config, 500)
    forward = [sampler.sample(row, [1, 2, 3], i) for i, row in enumerate(rows)]
    backward = [sampler.sample(rows[i], [1, 2, 3], i) for i in reversed(range(30))]
    alone = [_edge.Sampler(config, 500).sample(row, [1, 2, 3], i) for i, row in enumerate(rows)]
    assert forward == backward[::-1] == alone
    assert len({token for token, _, _ in forward}) > 10


def test_another_seed_or_position_gives_other_tokens() -> None:
    logits = np.zeros(1000, np.float32)
    tokens = {sample(logits, position=p, seed=s)[0] for s in (0, 1, 1 << 32) for p in (0, 1, 1 << 32)}
    assert len(tokens) >= 8


def test_a_token_that_wins_still_wins_when_others_are_cut() -> None:
    rng = np.random.default_rng(1)
    for position in range(100):
        logits = rng.standard_normal(200).astype(np.float32)
        token = sample(logits, position=position, seed=3)[0]
        rank = int((logits > logits[token]).sum())
        assert sample(logits, position=position, seed=3, top_k=rank + 1)[0] == token


def test_adding_a_constant_to_the_logits_changes_nothing() -> None:
    logits = np.arange(-50, 50, dtype=np.float32) / 8
    for position in range(50):
        assert sample(logits, position=position)[0] == sample(logits + 512, position=position)[0]


# --- greedy, ties, penalties ---


@pytest.mark.parametrize(
    "extra", [{}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.1, "typical_p": 0.3}, {"seed": 99}]
)
def test_temperature_zero_takes_the_lowest_id_of_the_largest(extra: dict[str, Any]) -> None:
    logits = [1.0, 5.0, 2.0, 5.0, -1.0, 5.0]
    assert sample(logits, temperature=0.0, **extra)[0] == 1
    assert sample(logits, temperature=0.0, logit_bias={3: 0.5}, **extra)[0] == 3
    assert sample(logits, [1, 1], temperature=0.0, presence_penalty=1.0, **extra)[0] == 3


def test_a_tiny_temperature_is_greedy_without_overflow() -> None:
    logits = np.random.default_rng(2).standard_normal(100).astype(np.float32)
    assert sample(logits, temperature=1e-44, top_p=0.9, typical_p=0.9)[0] == int(logits.argmax())
    assert sample(logits, temperature=1e-44)[0] == int(logits.argmax())


@pytest.mark.parametrize("filtered", [{"top_k": 2}, {"top_p": 0.5}, {"typical_p": 0.5}])
def test_ties_at_a_filters_edge_go_to_the_lower_id(filtered: dict[str, Any]) -> None:
    seen = {sample([0.0] * 4, seed=seed, **filtered)[0] for seed in range(200)}
    assert seen == {0, 1}


@pytest.mark.parametrize("vocab", [3000, 20000])
def test_top_k_ties_across_the_whole_vocabulary_go_to_the_lower_ids(vocab: int) -> None:
    seen = {sample(np.zeros(vocab, np.float32), seed=seed, top_k=3)[0] for seed in range(60)}
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("order", ["ascending", "descending", "equal pairs"])
@pytest.mark.parametrize("config", [{"top_k": 700}, {"top_p": 0.5}, {"typical_p": 0.5}])
def test_ordered_vocabularies_keep_the_same_sets(order: str, config: dict[str, Any]) -> None:
    rising = np.linspace(0, 4, 9000).astype(np.float32)
    logits = {"ascending": rising, "descending": rising[::-1], "equal pairs": np.repeat(rising[::2], 2)}[
        order
    ]
    p = distribution(logits, [], config)
    kept = np.flatnonzero(p)
    for seed in range(5):
        g = np.array([_edge.gumbel(seed, 0, int(token)) for token in kept])
        assert sample(logits, seed=seed, **config)[0] == kept[np.argmax(np.log(p[kept]) + g)]


@pytest.mark.parametrize("last_n", [-1, 0, 1, 3, 100])
@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.5},
        {"presence_penalty": 0.8},
        {"frequency_penalty": 0.6},
        {"frequency_penalty": -0.6, "presence_penalty": 0.4, "repetition_penalty": 1.2},
        {"repetition_penalty": 1.5, "logit_bias": [(2, 0.75), (4, -3.0)]},
    ],
)
def test_penalties_match_their_definition(last_n: int, penalties: dict[str, Any]) -> None:
    rng = np.random.default_rng(8)
    for _ in range(20):
        logits = rng.standard_normal(6).astype(np.float32)
        history = rng.integers(0, 6, 8).tolist()
        config = {"penalty_last_n": last_n, **penalties}
        want = int(penalised(logits, history, config).argmax())
        token, logprob, top = sample(logits, history, temperature=0.0, n_logprobs=6, **config)
        raw = np.log(softmax(logits.astype(np.float64)))
        assert token == want
        assert logprob == pytest.approx(raw[token], abs=1e-9)
        assert dict(top) == pytest.approx(dict(enumerate(raw)), abs=1e-9)


def test_a_banned_token_is_never_drawn() -> None:
    logits = [10.0, 0.0, 0.0]
    assert 0 not in {sample(logits, seed=seed, logit_bias={0: -math.inf})[0] for seed in range(100)}


def test_masked_tokens_are_never_drawn_and_one_token_is_enough() -> None:
    for config in CONFIGS:
        logits = np.full(50, -np.inf, np.float32)
        logits[17] = -4
        assert sample(logits, [17, 2], **config)[:2] == (17, 0.0)


# --- log-probabilities ---


def test_the_reported_tokens_are_the_most_likely_in_order() -> None:
    logits = (np.random.default_rng(4).standard_normal(4000) * 3).astype(np.float32)
    logits[[5, 9]] = logits.max() + 1
    _, _, top = sample(logits, n_logprobs=20, temperature=0.0)
    raw = np.log(softmax(logits.astype(np.float64)))
    want = np.lexsort((np.arange(4000), -logits))[:20]
    assert [token for token, _ in top] == want.tolist()
    np.testing.assert_allclose([logprob for _, logprob in top], raw[want], atol=1e-10)
    assert sample(logits[:3], n_logprobs=20)[2].__len__() == 3


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 100, 32003])
def test_log_prob_matches_float64(n: int) -> None:
    logits = (np.random.default_rng(n).standard_normal(n) * 10).astype(np.float32)
    want = np.log(softmax(logits.astype(np.float64)))
    for token in {0, n // 2, n - 1}:
        assert _edge.log_prob(logits, token) == pytest.approx(want[token], abs=1e-11)


def test_log_prob_at_the_edges() -> None:
    assert _edge.log_prob(np.array([3e38, -3e38], np.float32), 0) == 0
    assert _edge.log_prob(np.array([0.0, -np.inf], np.float32), 1) == -math.inf
    assert _edge.log_prob(np.array([1000.0, 0.0], np.float32), 1) == -1000
    for logits, token in [([0.0], 1), ([0.0], -1), ([math.nan], 0), ([-math.inf], 0), ([math.inf, 0], 0)]:
        assert math.isnan(_edge.log_prob(np.array(logits, np.float32), token))


@pytest.mark.parametrize("n", [1, 15, 16, 17, 511, 512, 513, 1500])
def test_the_first_of_the_largest_is_found_wherever_it_lies(n: int) -> None:
    for first in {0, n // 3, n // 2, n - 1}:
        logits = np.full(n, -3, np.float32)
        logits[[first, n - 1, (first + n - 1) // 2]] = 2
        logits[:first] = -np.inf
        assert sample(logits, temperature=0)[0] == first


@pytest.mark.parametrize("n", [1, 3, 16, 37, 4096])
@pytest.mark.parametrize("spread", [1, 5, 30])
def test_a_rough_share_is_within_4_percent(n: int, spread: int) -> None:
    logits = (np.random.default_rng(n).standard_normal(n) * spread).astype(np.float32)
    logits[n // 2 :: 7] = -np.inf
    logits[n - 1] = 0.5
    exact = np.exp(logits.astype(np.float64) - logits.max())
    exact /= exact.sum()
    for token in (int(np.argmax(logits)), n - 1):
        assert _edge.rough_share(logits, token) == pytest.approx(exact[token], rel=0.04, abs=1e-30)


def test_log_probabilities_nobody_asked_for_are_not_computed() -> None:
    logits = np.random.default_rng(3).normal(size=50).astype(np.float32)
    for temperature in (0.0, 0.8):
        token, logprob, top = sample(logits, temperature=temperature, seed=4, n_logprobs=-1)
        assert token == sample(logits, temperature=temperature, seed=4, n_logprobs=0)[0]
        assert math.isnan(logprob) and top == []


# --- errors ---


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected a number in [0, 100], found -0.1"),
        ({"temperature": math.nan}, "temperature: expected a number in [0, 100], found nan"),
        ({"temperature": math.inf}, "temperature: expected a number in [0, 100], found inf"),
        ({"temperature": "hot"}, "temperature: expected a number, found 'hot'"),
        ({"top_k": -1}, "top_k: expected an integer in [0,"),
        ({"top_k": 2.5}, "top_k: expected an integer, found 2.5"),
        ({"top_p": 0.0}, "top_p: expected a number in (0, 1], found 0"),
        ({"top_p": 1.01}, "top_p: expected a number in (0, 1], found 1.01"),
        ({"top_p": math.nan}, "top_p: expected a number in (0, 1], found nan"),
        ({"typical_p": 0.0}, "typical_p: expected a number in (0, 1], found 0"),
        ({"typical_p": -1.0}, "typical_p: expected a number in (0, 1], found -1"),
        ({"min_p": -0.5}, "min_p: expected a number in [0, 1], found -0.5"),
        ({"min_p": 1.5}, "min_p: expected a number in [0, 1], found 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a number in [0.01, 100], found 0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty: expected a number in [0.01, 100], found nan"),
        ({"presence_penalty": math.inf}, "presence_penalty: expected a number in [-100, 100], found inf"),
        ({"frequency_penalty": -101.0}, "frequency_penalty: expected a number in [-100, 100], found -101"),
        ({"penalty_last_n": -2}, "penalty_last_n: expected an integer in [-1,"),
        ({"n_logprobs": -2}, "n_logprobs: expected an integer in [-1, 1024], found -2"),
        ({"n_logprobs": 1025}, "n_logprobs: expected an integer in [-1, 1024], found 1025"),
        ({"seed": -1}, "seed: expected an integer in [0, 2^64), found -1"),
        ({"logit_bias": {10: 1.0}}, "logit_bias token: expected an integer in [0, 9], found 10"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias token: expected an integer in [0, 9], found -1"),
        ({"logit_bias": {4: math.nan}}, "logit_bias of token 4: expected a finite number or -inf, found nan"),
        ({"logit_bias": {4: math.inf}}, "logit_bias of token 4: expected a finite number or -inf, found inf"),
        ({"logit_bias": 3}, "logit_bias: expected pairs of token id and number, found 3"),
        ({"temprature": 1.0}, "unknown sampling setting 'temprature'"),
    ],
)
def test_every_wrong_setting_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ArgumentError) as raised:
        _edge.Sampler(config, 10)
    assert message in str(raised.value)


@pytest.mark.parametrize("vocab", [0, -5])
def test_a_vocabulary_holds_at_least_one_token(vocab: int) -> None:
    with pytest.raises(errors.ArgumentError, match="vocab_size"):
        _edge.Sampler({}, vocab)


@pytest.mark.parametrize("config", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("index", [0, 16, 20])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_reported(config: dict[str, Any], index: int, value: float) -> None:
    logits = np.zeros(21, np.float32)
    logits[index] = value
    with pytest.raises(errors.CorruptError, match="logits are not finite at position 77"):
        sample(logits, position=77, **config)


def test_a_distribution_without_tokens_is_reported() -> None:
    with pytest.raises(errors.CorruptError, match=r"position 3.*-inf for every token"):
        sample([-math.inf] * 4, position=3)
    with pytest.raises(errors.CorruptError, match=r"position 0.*-inf for every token"):
        sample([0.0, 0.0], logit_bias={0: -math.inf, 1: -math.inf})


def test_a_sampler_goes_on_after_an_error() -> None:
    sampler = _edge.Sampler({"temperature": 0.0, "frequency_penalty": 1.0, "logit_bias": {0: -math.inf}}, 2)
    with pytest.raises(errors.CorruptError):
        sampler.sample(np.array([0, -np.inf], np.float32), [1, 1, 1], 0)
    # Counts of the failed call must not linger: one occurrence costs 1, not 4.
    assert sampler.sample(np.array([0, 5.0], np.float32), [1], 0)[0] == 1
    plain = _edge.Sampler({"temperature": 0.0, "frequency_penalty": 1.0}, 2)
    with pytest.raises(errors.CorruptError):
        plain.sample(np.array([math.nan, 0], np.float32), [1, 1, 1], 0)
    assert plain.sample(np.array([0, 1.5], np.float32), [1], 0)[0] == 1


def test_wrong_sizes_and_ids_are_named() -> None:
    with pytest.raises(errors.ArgumentError, match="logits: expected 3 values, found 2"):
        _edge.Sampler({}, 3).sample(np.zeros(2, np.float32), [], 0)
    for token in (3, -1):
        with pytest.raises(errors.ArgumentError, match=f"history: expected token ids in .* found {token}"):
            sample([0.0] * 3, [0, token], repetition_penalty=1.1)
    # Tokens outside the window are not looked at.
    assert sample([0.0, 1.0, 0.0], [99, 0], temperature=0.0, repetition_penalty=1.1, penalty_last_n=1)[0] == 1
