"""Beginnings of earlier requests are not computed again, and take nothing that a request needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import edge
from edge.prefixes import MOST_TEXTS

_SYSTEM = list(range(300, 420))


def _prompt(begin: int, n: int = 60) -> list[int]:
    return [*_SYSTEM, *range(begin, begin + n)]


def _generate(engine: edge.Engine, tokens: list[int], **settings: Any) -> edge.Completion:
    return engine.generate(tokens, **({"max_tokens": 8, "temperature": 0, "ignore_eos": True} | settings))


@pytest.fixture(scope="module")
def engine() -> Iterator[edge.Engine]:
    with edge.load("story", context=2048, pressure="off") as found:
        yield found


@pytest.fixture(scope="module")
def alone() -> Iterator[edge.Engine]:
    with edge.load("story", context=2048, pressure="off") as found:
        yield found


def _fresh(alone: edge.Engine, tokens: list[int], **settings: Any) -> list[int]:
    """The same request where nothing is known of it."""
    alone.forget()
    done = _generate(alone, tokens, **settings)
    assert done.stats["reused_tokens"] == 0
    return done.tokens


def test_an_earlier_prompt_is_known(engine: edge.Engine, alone: edge.Engine) -> None:
    first, second = _prompt(1000), _prompt(2000)
    texts = [_generate(engine, tokens) for tokens in (first, second, first, second)]
    assert texts[1].stats["reused_tokens"] == len(_SYSTEM)
    assert [one.stats["reused_tokens"] for one in texts[2:]] == [len(first) - 1, len(second) - 1]
    assert [one.tokens for one in texts] == [_fresh(alone, tokens) for tokens in (first, second)] * 2


@pytest.mark.parametrize("speculation", ["off", "lookup", "lookahead"])
def test_conversations_in_turn(engine: edge.Engine, alone: edge.Engine, speculation: str) -> None:
    """Three conversations that go on in turn: only what is new is computed, the texts are those of each alone."""
    talks = [_prompt(1500 + 70 * i, 40) for i in range(3)]
    for turn in range(3):
        for i, talk in enumerate(talks):
            known = len(talk) if turn else 0
            talk += range(2500 + 10 * turn + i, 2520 + 10 * turn + i)
            done = _generate(engine, talk, speculation=speculation, temperature=0.7, seed=i)
            if turn:
                assert done.stats["reused_tokens"] >= known - 8 - 1
            assert done.tokens == _fresh(alone, talk, temperature=0.7, seed=i, speculation="off")
            talk += done.tokens


def test_a_short_text_is_not_kept() -> None:
    with edge.load("story", context=512, pressure="off") as engine:
        _generate(engine, list(range(300, 310)), max_tokens=1)
        _generate(engine, list(range(900, 910)), max_tokens=1)
        assert len(engine._prefixes) == 0


def test_texts_give_way_to_a_long_one() -> None:
    with edge.load("story", context=1024, pressure="off") as engine:
        core = engine._open_core()
        budget = engine.stats()["budget_bytes"]
        for i in range(6):
            _generate(engine, list(range(300 + 200 * i, 420 + 200 * i)))
        assert len(engine._prefixes) > 0
        n_pages = -(-1024 // core.kv_page_tokens)
        whole = _generate(engine, list(range(2000, 2100)), max_tokens=1024 - 100)
        assert whole.stats["generated_tokens"] == 924
        assert len(engine._prefixes) == 0
        assert 0 <= core.kv_pages_left < n_pages
        assert engine.stats()["peak_bytes"] <= budget


def test_there_are_never_too_many(engine: edge.Engine) -> None:
    for i in range(MOST_TEXTS + 4):
        _generate(engine, [*range(300 + 40 * i, 335 + 40 * i)], max_tokens=1)
        assert len(engine._prefixes) <= MOST_TEXTS
    assert len(engine._prefixes) > 4


def test_a_prefix_of_a_kept_text_is_not_kept_twice() -> None:
    with edge.load("story", context=1024, pressure="off") as engine:
        for n in (60, 120, 180):
            _generate(engine, list(range(300, 300 + n)), max_tokens=1)
            _generate(engine, [7, 8, 9], max_tokens=1)
        assert len(engine._prefixes) == 1


def test_several_texts_and_another_budget_come_first(engine: edge.Engine, alone: edge.Engine) -> None:
    first, second = _prompt(1000), _prompt(2000)
    _generate(engine, first)
    _generate(engine, second)
    assert len(engine._prefixes) > 0
    many = engine.generate_many([first, second], max_tokens=8, temperature=0, ignore_eos=True)
    assert len(engine._prefixes) == 0
    assert [one.tokens for one in many] == [_fresh(alone, tokens) for tokens in (first, second)]
    for tokens in (first, second):
        _generate(engine, tokens)
    engine.set_memory(engine.plan.memory_bytes - (8 << 20))
    assert len(engine._prefixes) == 0
    assert _generate(engine, first).tokens == _fresh(alone, first)


def test_nothing_is_kept_of_keys_and_values_on_a_drive() -> None:
    with edge.load("story", context=1024, kv="flash", pressure="off") as engine:
        assert engine.plan.kv_on_flash is not None
        texts = [_generate(engine, tokens).tokens for tokens in (_prompt(1000), _prompt(2000), _prompt(1000))]
        assert texts[0] == texts[2] and len(engine._prefixes) == 0


@pytest.mark.parametrize("speculation", ["off", "lookup"])
def test_texts_that_are_no_longer_kept_give_their_pages_back(engine: edge.Engine, speculation: str) -> None:
    engine.forget()
    left = []
    for round_ in range(8):
        _generate(engine, _prompt(1100 + round_ % 2, 300), max_tokens=40, speculation=speculation)
        left.append(engine._core.kv_pages_left)
    assert left[2:4] == left[6:8]
