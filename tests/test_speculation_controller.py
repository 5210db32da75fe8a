"""What the controller of speculation makes of planted costs and acceptances; no clock is read."""

from __future__ import annotations

import _edge
import pytest


def controller(ms_per_row: float, prior: float = 0.5) -> _edge.SpeculationController:
    """One that knows a pass over 1 row to take 1 ms, and each further row ms_per_row."""
    made = _edge.SpeculationController()
    made.set_prior(prior)
    for rows in range(1, 18):
        made.record(rows, 1 + (rows - 1) * ms_per_row)
    return made


def test_costs_between_measured_rows_lie_on_lines() -> None:
    known = _edge.SpeculationController()
    for rows, ms in ((1, 1.0), (4, 4.0), (8, 5.0)):
        known.record(rows, ms)
    assert [known.cost(rows) for rows in (1, 2, 4, 6, 8)] == pytest.approx([1, 2, 4, 4.5, 5])
    assert known.cost(16) > known.cost(8)


def test_costs_never_fall_with_rows() -> None:
    known = _edge.SpeculationController()
    for rows, ms in ((1, 3.0), (2, 9.0), (4, 2.0), (8, 2.5), (16, 2.4)):
        known.record(rows, ms)
    costs = [known.cost(rows) for rows in range(1, 40)]
    assert costs == sorted(costs)


def test_one_slow_pass_is_not_believed() -> None:
    known = _edge.SpeculationController()
    known.record(1, 1.0)
    known.record(4, 1.3)
    known.record(4, 500.0)
    assert known.cost(4) < 2
    for _ in range(40):
        known.record(4, 3.0)
    assert known.cost(4) == pytest.approx(3.0, rel=0.05)


def test_what_is_always_right_is_verified_whole() -> None:
    known = controller(0.1)
    guesses = [1, 2, 3, 4, 5, 6]
    assert [known.verifies(guesses, [*guesses, 9]) for _ in range(60)][-1] == len(guesses)


def test_what_is_never_right_is_not_verified_for_long() -> None:
    known = controller(0.1)
    verified = [known.verifies([1, 2, 3, 4, 5, 6], [9]) for _ in range(200)]
    assert verified[0] > 0
    assert sum(n > 0 for n in verified) <= 12 and not any(verified[-100:])


@pytest.mark.parametrize("ms_per_row", [0.0, 0.1, 0.5, 2.0])
def test_dearer_rows_are_verified_less(ms_per_row: float) -> None:
    rates = [0.6] * 16
    depth, rate = controller(ms_per_row).chain(rates)

    def promised(n: int) -> float:
        return sum(0.6**k for k in range(n + 1)) / (1 + n * ms_per_row)

    best = max(range(17), key=promised)
    if promised(best) <= 1.05:
        assert depth == 0
    else:
        assert depth == best and rate == pytest.approx(promised(best))


def test_the_time_of_guessing_counts() -> None:
    known, rates = controller(0.1), [0.9] * 8
    free, _ = known.chain(rates)
    dear, rate = known.chain(rates, ms_per_depth=0.3)
    assert 0 < dear < free and rate > 1.05
    assert known.chain(rates, ms_fixed=10)[0] == 0


def test_losses_end_what_estimates_would_go_on_with() -> None:
    known = controller(0.1)
    assert known.may_spend()
    passes = 0
    while known.may_spend():
        known.account(1, 1.4)  # a token for the price of 1.4
        passes += 1
    assert 3 <= passes <= 6
    for _ in range(1000):
        known.account(5, 1.4)
    passes = 0
    while known.may_spend():
        known.account(1, 1.4)
        passes += 1
    # A thousand wins do not pay for a thousand losses.
    assert passes < 250


def test_what_the_machine_did_meanwhile_is_not_charged() -> None:
    known = controller(0.1)
    for _ in range(100):
        known.account(2, 50.0, usual_ms=1.4)  # two tokens in a pass that mostly takes 1.4: its core was taken
    assert known.may_spend()
    # A pass that never pays does not pay for being interrupted either.
    passes = 0
    while known.may_spend():
        known.account(1, 50.0, usual_ms=1.4)
        passes += 1
    assert passes < 250


def test_guesses_asked_for_whatever_they_cost_are_held_against_no_others() -> None:
    known = controller(0.1)
    known.note(1, 100.0)
    assert known.may_spend()
    known.begin_text()
    assert known.may_spend()
    known.account(1, 100.0)
    known.begin_text()
    assert not known.may_spend()


def test_a_guess_must_be_the_likelier_the_more_a_millisecond_is_worth() -> None:
    known = controller(0.1)
    assert known.least_reach(1, 0.0, 1.0) == pytest.approx(0.1)
    assert known.least_reach(4, 0.05, 1.0) == pytest.approx(0.15)
    assert known.least_reach(4, 0.05, 2.0) == pytest.approx(0.3)


def test_what_was_won_on_one_text_is_not_lost_on_the_next() -> None:
    def lost(known: _edge.SpeculationController) -> int:
        passes = 0
        while known.may_spend():
            known.account(1, 1.4)
            passes += 1
        return passes

    winner, loser = controller(0.1), controller(0.1)
    for _ in range(1000):
        winner.account(5, 1.4)
    assert lost(loser) <= 6
    for known in (winner, loser):
        known.begin_text()
    assert lost(winner) <= 6 and lost(loser) == 0
