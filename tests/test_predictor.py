"""Low-rank neuron predictors: the linear start, the fit, the threshold, and what is measured."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="fitting predictors needs torch (pip install edge[train])")

from quant.predictor import Predictor, calibrate, fit_predictor, low_rank_gate, measure, set_gradients  # noqa: E402
from tests.builtin_family import one_thread  # noqa: E402, F401

pytestmark = pytest.mark.usefixtures("one_thread")

N, D, F = 6000, 32, 96


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any, Any]:
    """Inputs [N, D] of uneven directions, gates of which 16 dimensions matter most, and which are open (9 %)."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(1, -1, D)
    x = torch.randn(N, D, generator=generator) * spread
    x[:, 0] = 4.0  # a constant part, as normed hidden states have it
    gate = torch.randn(F, D, generator=generator) / spread
    gate[:, 16:] *= 0.3
    gate[:, 0] = -1.6  # most are closed
    return x, gate, x @ gate.T > 0


def test_full_rank_is_the_gate_itself(made: tuple[Any, Any, Any]) -> None:
    x, gate, active = made
    predictor = low_rank_gate(gate, x, D)
    gates = x @ gate.T
    scale = gates.square().mean(0).sqrt()
    assert torch.allclose(predictor.scores(x), gates / scale, atol=2e-3)
    figures = measure(predictor, x, active)
    assert figures.recall > 0.999 and figures.precision > 0.999
    assert figures.active == figures.predicted == pytest.approx(active.float().mean().item(), abs=1e-3)


def test_linear_start_is_the_best_of_its_rank(made: tuple[Any, Any, Any]) -> None:
    """No other rank-8 guess is nearer: the best one of the gates themselves (Eckart and Young) is not."""
    x, gate, _ = made
    gates = x @ gate.T
    gates = gates / gates.square().mean(0).sqrt()
    left, singular, right = torch.linalg.svd(gates, full_matrices=False)
    best = ((left[:, :8] * singular[:8]) @ right[:8] - gates).square().mean().item()
    found = (low_rank_gate(gate, x, 8).scores(x) - gates).square().mean().item()
    assert found == pytest.approx(best, rel=1e-3)
    plain = torch.linalg.svd(gate, full_matrices=False)  # blind to how the inputs are spread
    guess = x @ ((plain[0][:, :8] * plain[1][:8]) @ plain[2][:8]).T
    assert (guess / (x @ gate.T).square().mean(0).sqrt() - gates).square().mean().item() > 1.2 * best


def test_fit_keeps_the_wanted_recall_and_predicts_fewer_than_its_start(made: tuple[Any, Any, Any]) -> None:
    x, gate, active = made
    fitted = fit_predictor(x, active, 8, gate=gate, recall=0.95, steps=150, batch=512)
    start = calibrate(low_rank_gate(gate, x, 8), x, active, 0.95)
    found, before = measure(fitted, x, active), measure(start, x, active)
    assert (
        fitted.rank == 8
        and fitted.down.shape == (8, D)
        and fitted.up.shape == (F, 8)
        and fitted.bias.shape == (F,)
    )
    assert found.recall == pytest.approx(0.95, abs=0.015)
    assert found.predicted < 0.95 * before.predicted


def test_more_rank_predicts_fewer_neurons(made: tuple[Any, Any, Any]) -> None:
    x, gate, active = made
    shares = [
        measure(fit_predictor(x, active, rank, gate=gate, steps=60, batch=512), x, active).predicted
        for rank in (4, 8, 16)
    ]
    assert shares == sorted(shares, reverse=True) and shares[0] > 1.3 * shares[2]


def test_gate_may_be_unknown(made: tuple[Any, Any, Any]) -> None:
    x, _, active = made
    figures = measure(fit_predictor(x, active, 8, steps=100, batch=512), x, active)
    assert figures.recall > 0.94 and figures.predicted < 0.4


def test_importance_turns_recall_to_what_matters(made: tuple[Any, Any, Any]) -> None:
    """With all the weight on half of the neurons, those are found more precisely, the others less."""
    x, gate, active = made
    costs = torch.ones(F)
    costs[F // 2 :] = 0.02
    plain = fit_predictor(x, active, 4, gate=gate, steps=150, batch=512)
    weighed = fit_predictor(
        x, active, 4, gate=gate, steps=150, batch=512, importance=lambda rows: costs.expand(len(rows), F)
    )

    def found(predictor: Predictor, half: slice) -> float:
        return float(((predictor.scores(x) > 0) & active)[:, half].sum() / active[:, half].sum())

    assert found(weighed, slice(0, F // 2)) > found(plain, slice(0, F // 2)) + 0.01
    assert found(weighed, slice(F // 2, F)) < found(plain, slice(F // 2, F)) - 0.01


@pytest.mark.parametrize("weighed", [False, True])
def test_gradients_are_those_of_balanced_cross_entropy(made: tuple[Any, Any, Any], weighed: bool) -> None:
    x, gate, active = (made[0][:512], made[1], made[2][:512])
    factors = low_rank_gate(gate, x, 8)
    weights = (
        torch.rand(512, F, generator=torch.Generator().manual_seed(2)) + 5 if weighed else torch.tensor(9.0)
    )
    leaves = [t.clone().requires_grad_() for t in (factors.down, factors.up, factors.bias)]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        Predictor(*leaves).scores(x), active.float(), pos_weight=weights
    )
    loss.backward()
    set_gradients(factors, x.bfloat16(), active, weights.bfloat16())
    for leaf, mine in zip(leaves, (factors.down, factors.up, factors.bias), strict=True):
        assert (leaf.grad - mine.grad).norm() < 0.02 * leaf.grad.norm()


def test_same_seed_same_predictor(made: tuple[Any, Any, Any]) -> None:
    x, gate, active = made
    one, two, other = (fit_predictor(x, active, 4, gate=gate, steps=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.up, two.up) and torch.equal(one.bias, two.bias)
    assert not torch.equal(one.up, other.up)


@pytest.mark.parametrize("recall", [0.5, 0.9, 0.999, 1.0])
def test_threshold_finds_exactly_its_share(recall: float) -> None:
    generator = torch.Generator().manual_seed(1)
    predictor = Predictor(torch.eye(8), torch.eye(8), torch.zeros(8))
    x = torch.randn(5000, 8, generator=generator)
    active = torch.rand(5000, 8, generator=generator) < 0.3
    shifted = calibrate(predictor, x, active, recall)
    found = measure(shifted, x, active)
    assert found.recall == pytest.approx(recall, abs=2e-3) and found.recall >= recall - 1e-3
    assert torch.equal(shifted.down, predictor.down)


def test_measured_shares_are_counted_over_all_tokens() -> None:
    predictor = Predictor(torch.eye(2), torch.eye(2), torch.tensor([0.0, -1.0]))
    x = torch.tensor([[1.0, 2.0], [1.0, 1.0], [-1.0, 3.0], [-1.0, 0.0]])  # predicted: [1 1] [1 0] [0 1] [0 0]
    active = torch.tensor([[1, 1], [0, 1], [0, 0], [0, 0]]).bool()
    found = measure(predictor, x, active)
    assert (found.recall, found.precision, found.predicted, found.active) == (2 / 3, 2 / 4, 4 / 8, 3 / 8)


def test_progress_is_told_to_the_end(made: tuple[Any, Any, Any]) -> None:
    x, gate, active = made
    seen: list[float] = []
    fit_predictor(x, active, 4, gate=gate, steps=4, show=seen.append)
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_impossible_questions_are_refused(made: tuple[Any, Any, Any]) -> None:
    x, gate, active = made
    for rank in (0, D + 1):
        with pytest.raises(ValueError, match=f"rank of 1 to {D}, found {rank}"):
            fit_predictor(x, active, rank)
    with pytest.raises(ValueError, match=r"found \[6000, 32\] and \[10, 96\]"):
        fit_predictor(x, active[:10], 4)
    with pytest.raises(ValueError, match="found all the same"):
        fit_predictor(x, torch.zeros_like(active), 4)
    with pytest.raises(ValueError, match="recall in"):
        calibrate(Predictor(gate[:4], gate[:, :4], gate[:, 0]), x, active, 1.5)
    with pytest.raises(ValueError, match="found none"):
        calibrate(Predictor(gate[:4], gate[:, :4], gate[:, 0]), x, torch.zeros_like(active), 0.9)
