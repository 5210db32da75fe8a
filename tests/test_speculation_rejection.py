"""Rejection sampling over drafts leaves the target's distribution as it is; the well-known wrong rules do not.

A toy target p and draft q whose next token depends on the one before. Texts of three tokens are drawn with drafts two
deep and up to three wide; chi-square tests compare single tokens, pairs and triples with what p alone gives.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import _edge
import numpy as np
import pytest

V = 6
LENGTH = 3
#: A right rule fails one test in a million; every mutant is far beyond.
LEAST_P = 1e-6

Distribution = list[tuple[int, float]]


def tables(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """p and q [last token][next token]: alike in part, with tokens that one of them hardly ever gives."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet([0.6] * V, size=V) + 1e-4
    q = 0.5 * p + 0.5 * rng.dirichlet([0.6] * V, size=V) + 1e-4
    # Where q is sure of what p never says, and the other way round.
    p[2], q[2] = [0.9, 0.02, 0.02, 0.02, 0.02, 0.02], [0.001, 0.95, 0.01, 0.01, 0.01, 0.019]
    return p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)


P, Q = tables(3)


def pairs(row: np.ndarray) -> Distribution:
    return [(i, float(x)) for i, x in enumerate(row)]


P_PAIRS, Q_PAIRS = [pairs(row) for row in P], [pairs(row) for row in Q]


@dataclass
class Rule:
    """The exact rule, by the core. Mutants replace a part of it."""

    width: int = 2
    guess: bool = True
    steps: int = 0
    tokens: int = 0

    def children(self, last: int, seed: int, position: int, depth: int) -> list[int]:
        return _edge.draw_without_replacement(Q_PAIRS[last], self.width, seed, position)

    def token(
        self, last: int, drawn: list[int], guesses: list[int], seed: int, position: int, depth: int
    ) -> int:
        return _edge.draw_by_rejection(P_PAIRS[last], Q_PAIRS[last], drawn, guesses, seed, position)

    def bonus(self, last: int, seed: int, position: int, depth: int) -> int:
        """After the last draft was accepted."""
        return self.token(last, [], [], seed, position, depth)

    def text(self, seed: int) -> tuple[int, ...]:
        out: list[int] = []
        last = 0
        while len(out) < LENGTH:
            self.steps += 1
            for depth in range(3):
                position = len(out)
                if position == LENGTH:
                    break
                if depth == 2:
                    last = self.bonus(last, seed, position, depth)
                    out += [last]
                    break
                drawn = self.children(last, seed, position, depth)
                guesses = [g for g in [(last + 1) % V] if self.guess and g not in drawn]
                token = self.token(last, drawn, guesses, seed, position, depth)
                out.append(token)
                last = token
                if token not in drawn and token not in guesses:
                    break
        self.tokens += len(out)
        return tuple(out)


def pick(weights: Any, u: float) -> int:
    """The token at u of the cumulated weights as they are; the last where they end before."""
    for token, weight in enumerate(weights):
        u -= weight
        if u < 0:
            return token
    return len(weights) - 1


@dataclass
class Mutant(Rule):
    """The rule in Python: right as it stands, so that a mutant fails for its own fault and no other."""

    noise: random.Random = field(default_factory=lambda: random.Random(1))

    def children(self, last: int, seed: int, position: int, depth: int) -> list[int]:
        left, drawn = Q[last].copy(), list[int]()
        for _ in range(self.width):
            drawn.append(pick(left / left.sum(), self.noise.random()))
            left[drawn[-1]] = 0
        return drawn

    def accepts(self, p: float, q: float) -> bool:
        return self.noise.random() * q < p

    def rest(self, p: np.ndarray, q: np.ndarray) -> np.ndarray:
        left = np.maximum(p - q, 0)
        return left / left.sum()

    def draft(self, last: int) -> np.ndarray:
        return Q[last].copy()

    def token(
        self, last: int, drawn: list[int], guesses: list[int], seed: int, position: int, depth: int
    ) -> int:
        p, q = P[last].copy(), self.draft(last)
        for x in drawn:
            if self.accepts(p[x], q[x]):
                return x
            p = self.rest(p, q)
            q[x] = 0
            if q.sum() > 0:
                q /= q.sum()
        for x in guesses:
            if self.noise.random() < p[x]:
                return x
            p[x] = 0
            p /= max(float(p.sum()), 1e-300)
        return pick(p, self.noise.random())


class MedusaNucleus(Mutant):
    """A draw for each candidate, and another one when none came true: p(x) + (1 - p(x)) p(x)."""

    def token(
        self, last: int, drawn: list[int], guesses: list[int], seed: int, position: int, depth: int
    ) -> int:
        for x in [*drawn, *guesses]:
            if pick(P[last], self.noise.random()) == x:
                return x
        return pick(P[last], self.noise.random())


class EpsilonAccept(Mutant):
    """r < d / d + epsilon, as a scheduler once had it."""

    def accepts(self, p: float, q: float) -> bool:
        return self.noise.random() < p / p + 1e-6


class RatioOfTheTop(Mutant):
    """Children are q's likeliest, the rule is the one for drawn children."""

    def children(self, last: int, seed: int, position: int, depth: int) -> list[int]:
        return [int(x) for x in np.argsort(-Q[last])[: self.width]]


class ReusedNoise(Mutant):
    """Noise by the depth in the tree instead of the position in the text."""

    def text(self, seed: int) -> tuple[int, ...]:
        self.seed = seed
        return super().text(seed)

    def children(self, last: int, seed: int, position: int, depth: int) -> list[int]:
        self.noise = random.Random(1000 * seed + depth)
        return super().children(last, seed, position, depth)

    def bonus(self, last: int, seed: int, position: int, depth: int) -> int:
        self.noise = random.Random(1000 * seed + depth)
        return super().bonus(last, seed, position, depth)


class RawRest(Mutant):
    """The rest is not normalised."""

    def rest(self, p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return np.maximum(p - q, 0)


class DraftBeforeTopK(Mutant):
    """Drawn from q cut to its three likeliest tokens, judged by the whole of q."""

    def children(self, last: int, seed: int, position: int, depth: int) -> list[int]:
        cut = np.where(Q[last] >= np.sort(Q[last])[-3], Q[last], 0)
        first = pick(cut / cut.sum(), self.noise.random())
        cut[first] = 0
        return [first, pick(cut / cut.sum(), self.noise.random())][: self.width]


class NoBonus(Mutant):
    """Nothing is drawn after the last draft: right, but a token short."""

    def text(self, seed: int) -> tuple[int, ...]:
        self.bonus_allowed = False
        out: list[int] = []
        last = 0
        while len(out) < LENGTH:
            self.steps += 1
            for depth in range(2):
                if len(out) == LENGTH:
                    break
                drawn = self.children(last, seed, len(out), depth)
                last = self.token(last, drawn, [], seed, len(out), depth)
                out.append(last)
                if last not in drawn:
                    break
        self.tokens += len(out)
        return tuple(out)


MUTANTS = (MedusaNucleus, EpsilonAccept, RatioOfTheTop, ReusedNoise, RawRest, DraftBeforeTopK)
#: Texts of the slow tests: over 200,000 draws.
N_SLOW = 67_000


def chi_square_p(counts: Counter[Any], expected: dict[Any, float]) -> float:
    """P-value; cells of fewer than five expected are put together (Wilson-Hilferty's approximation)."""
    from math import erfc, sqrt

    big = {cell: n for cell, n in expected.items() if n >= 5}
    statistic = sum((counts[cell] - n) ** 2 / n for cell, n in big.items())
    n_rest = sum(expected.values()) - sum(big.values())
    degrees = len(big) - 1
    if n_rest >= 5:
        statistic += (sum(counts.values()) - sum(counts[cell] for cell in big) - n_rest) ** 2 / n_rest
        degrees += 1
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / sqrt(2 / (9 * degrees))
    return 0.5 * erfc(z / sqrt(2))


def p_values(texts: list[tuple[int, ...]]) -> dict[str, float]:
    """Of the first, second and third token, of pairs and of triples."""
    n = len(texts)
    triples = {
        (a, b, c): n * P[0][a] * P[a][b] * P[b][c] for a in range(V) for b in range(V) for c in range(V)
    }
    views: dict[str, Callable[[tuple[int, ...]], Any]] = {
        "first": lambda t: t[0],
        "second": lambda t: t[1],
        "third": lambda t: t[2],
        "first pair": lambda t: t[:2],
        "second pair": lambda t: t[1:],
        "ends": lambda t: (t[0], t[2]),
        "triple": lambda t: t,
    }
    found = {}
    for name, view in views.items():
        expected: dict[Any, float] = {}
        for triple, count in triples.items():
            expected[view(triple)] = expected.get(view(triple), 0) + count
        found[name] = chi_square_p(Counter(view(text) for text in texts), expected)
    return found


@pytest.mark.parametrize(("width", "guess"), [(0, True), (1, False), (2, False), (3, True), (V, False)])
def test_the_rule_is_exact(width: int, guess: bool) -> None:
    # 5 x 14,000 texts of 3: over 200,000 draws.
    rule = Rule(width=width, guess=guess)
    found = p_values([rule.text(seed) for seed in range(14_000)])
    assert min(found.values()) > LEAST_P, found


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("width", "guess"), [(0, False), (0, True), (1, False), (2, False), (3, True), (V, False)]
)
def test_the_rule_is_exact_over_200_000_draws(width: int, guess: bool, seed: int) -> None:
    """Every number of drawn children, with and without a guess: 67,000 texts of 3 tokens each."""
    rule = Rule(width=width, guess=guess)
    found = p_values([rule.text(seed * N_SLOW + i) for i in range(N_SLOW)])
    assert min(found.values()) > LEAST_P, found


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_rules_are_found_at_every_width(mutant: type[Mutant]) -> None:
    """Beyond doubt with 200,000 draws, and not only in the tests' usual shape."""
    for width, guess in ((1, False), (2, False), (3, True)):
        rule = mutant(width=width, guess=guess)
        found = p_values([rule.text(seed) for seed in range(N_SLOW)])
        assert min(found.values()) < LEAST_P**2, (width, guess, found)


@pytest.mark.slow
def test_the_frame_is_exact_over_200_000_draws() -> None:
    for width, guess in ((1, False), (2, True), (3, True)):
        rule = Mutant(width=width, guess=guess)
        found = p_values([rule.text(seed) for seed in range(N_SLOW)])
        assert min(found.values()) > LEAST_P, (width, guess, found)


def test_the_frame_of_the_mutants_is_exact() -> None:
    rule = Mutant()
    found = p_values([rule.text(seed) for seed in range(8_000)])
    assert min(found.values()) > LEAST_P, found


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_rules_are_found(mutant: type[Mutant]) -> None:
    rule = mutant()
    found = p_values([rule.text(seed) for seed in range(8_000)])
    assert min(found.values()) < LEAST_P, found


def tokens_a_step(rule: Rule, n: int) -> float:
    for seed in range(n):
        rule.text(seed)
    return rule.tokens / rule.steps


def expected_tokens_a_step() -> float:
    """Of texts of three with one drawn child and two depths: by Markov steps over (place, last token)."""
    alpha = np.minimum(P, Q)  # [last][x]: drawn and accepted
    # steps[place][last]: passes still needed; places run backwards.
    steps = np.zeros((LENGTH + 1, V))
    for place in range(LENGTH - 1, -1, -1):
        for last in range(V):
            total = 1.0
            for x in range(V):
                kept, refused = alpha[last][x], P[last][x] - alpha[last][x]
                total += refused * steps[place + 1][x]
                if place + 1 == LENGTH:
                    continue
                for y in range(V):
                    deeper = alpha[x][y]
                    total += kept * (P[x][y] - deeper) * steps[place + 2][y]
                    if place + 2 == LENGTH:
                        continue
                    total += kept * deeper * sum(P[y][z] * steps[place + 3][z] for z in range(V))
            steps[place][last] = total
    return float(LENGTH / steps[0][0])


def test_a_pass_gives_as_many_tokens_as_theory_says() -> None:
    theory = expected_tokens_a_step()
    assert tokens_a_step(Rule(width=1, guess=False), 8_000) == pytest.approx(theory, rel=0.02)
    assert tokens_a_step(NoBonus(width=1), 8_000) < 0.97 * theory


def test_children_come_in_the_order_of_draws_without_replacement() -> None:
    q = Q_PAIRS[1]
    n = 20_000
    found = Counter(tuple(_edge.draw_without_replacement(q, 2, seed, 9)) for seed in range(n))
    w = Q[1]
    expected = {(a, b): n * w[a] * w[b] / (1 - w[a]) for a in range(V) for b in range(V) if a != b}
    assert chi_square_p(found, expected) > LEAST_P
    assert sorted(_edge.draw_without_replacement(q, 99, 0, 0)) == list(range(V))


def test_edges_of_the_rule() -> None:
    sure = [(4, 1.0)]
    # What p never says is never accepted, what it always says always.
    for seed in range(50):
        assert _edge.draw_by_rejection(sure, [(1, 0.5), (2, 0.5)], [1, 2], [3], seed, 0) == 4
        assert _edge.draw_by_rejection(sure, [(1, 1.0)], [1], [], seed, 0) == 4
        assert _edge.draw_by_rejection(sure, sure, [4], [], seed, 0) == 4
        assert _edge.draw_by_rejection([(0, 0.5), (1, 0.5)], [], [], [], seed, 0) in (0, 1)


@pytest.mark.parametrize(
    "config",
    [
        {"temperature": 0.7},
        {"temperature": 1.2, "top_k": 5},
        {"temperature": 0.9, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "typical_p": 0.6},
        {"temperature": 0.0},
        {"temperature": 1.1, "repetition_penalty": 1.5, "presence_penalty": 0.3, "logit_bias": {2: 1.0}},
    ],
    ids=str,
)
def test_the_distribution_is_the_one_that_is_drawn_from(config: dict[str, Any]) -> None:
    logits = np.random.default_rng(5).normal(scale=1.5, size=9).astype(np.float32)
    history = [1, 3, 3, 7]
    n = 20_000
    found: Counter[int] = Counter()
    expected: dict[int, float] = {}
    for seed in range(n):
        sampler = _edge.Sampler({**config, "seed": seed}, 9)
        found[sampler.sample(logits, history, 4)[0]] += 1
        expected = dict(sampler.distribution(logits, history, 4))
    assert sum(expected.values()) == pytest.approx(1, abs=1e-12) and list(expected) == sorted(expected)
    assert set(found) <= set(expected)
    if len(expected) > 1:
        assert chi_square_p(found, {token: n * p for token, p in expected.items()}) > LEAST_P
