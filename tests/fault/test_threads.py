"""Several threads, and several engines, at once: none sees what another does half done (`make tsan` looks closer)."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import edge
from edge.errors import EdgeError
from tests.fault.conftest import CONTEXT, PLACEMENTS, PROMPT, Setup, answer, make_setup
from tests.tiny import tiny_llama_gguf

JOIN_S = 60
MANY = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}


@contextmanager
def beside(*loops: Callable[[], object]) -> Iterator[None]:
    """Each of ``loops`` again and again in a thread of its own until the block ends; raises what one of them raised."""
    done, failed = threading.Event(), list[BaseException]()

    def again(work: Callable[[], object]) -> None:
        try:
            while not done.is_set():
                work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=again, args=(work,), daemon=True) for work in loops]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(JOIN_S)
    assert not any(thread.is_alive() for thread in threads)
    if failed:
        raise failed[0]


def look_at(engine: edge.Engine) -> None:
    """All that may be asked while another thread's request runs."""
    stats = engine.stats()
    assert stats["used_bytes"] <= stats["peak_bytes"]
    assert (engine.context, engine.plan.context) == (CONTEXT, CONTEXT)
    assert isinstance(engine.notes, tuple) and isinstance(engine.memory_changes, list)
    assert engine.can_draft("lookup")


def room_of(setup: Setup) -> int:
    with edge.load(setup.pack, memory="1GiB", context=CONTEXT, threads=2) as engine:
        return engine.plan.predicted_peak_bytes


def test_lookers_on(setup: Setup) -> None:
    """Figures are asked for while passes run and memory changes hands."""
    with setup.load() as engine:
        choose, most = random.Random(3), room_of(setup)

        def change() -> None:
            engine.set_memory(choose.randint(setup.memory_bytes, max(most, setup.memory_bytes)))

        with beside(lambda: look_at(engine), change):
            assert answer(engine) == setup.tokens


def test_lookers_on_with_keys_and_values_on_a_drive(packs: dict[str, Path]) -> None:
    with (
        edge.load(packs["dense"], kv="flash", context=CONTEXT, threads=2) as engine,
        beside(lambda: look_at(engine)),
    ):
        assert len({tuple(answer(engine)) for _ in range(3)}) == 1


def test_engines_side_by_side(packs: dict[str, Path]) -> None:
    """One of every placement, each computing in a thread of its own."""
    setups = [make_setup(name, packs) for name in PLACEMENTS]
    engines = [setup.load() for setup in setups]
    failed: list[str] = []

    def ask(engine: edge.Engine, setup: Setup) -> None:
        for _ in range(4):
            if answer(engine) != setup.tokens:
                failed.append(setup.name)

    threads = [
        threading.Thread(target=ask, args=pair, daemon=True) for pair in zip(engines, setups, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
    assert not any(thread.is_alive() for thread in threads)
    assert not failed
    for engine in engines:
        engine.close()


def test_engines_come_and_go_beside_another(packs: dict[str, Path]) -> None:
    other = make_setup("floor", packs)

    def come_and_go() -> None:
        with other.load() as engine:
            next(engine.stream([1, 17], **MANY))

    setup = make_setup("experts_floor", packs)
    with setup.load() as engine, beside(come_and_go):
        for _ in range(5):
            assert answer(engine) == setup.tokens


def test_a_stream_closed_by_another_thread(setup: Setup) -> None:
    """In the middle of a token or between two: its reader finds the end, and the next request is served."""
    with setup.load() as engine:
        for n_before in (0, 1, 3):
            stream = engine.stream(PROMPT, **MANY)
            tokens = [next(stream).token for _ in range(n_before)]
            closer = threading.Thread(target=stream.close, daemon=True)
            closer.start()
            tokens += [chunk.token for chunk in stream]
            closer.join(JOIN_S)
            assert not closer.is_alive()
            assert tokens[: len(setup.tokens)] == setup.tokens[: len(tokens)]
            assert answer(engine) == setup.tokens


def test_a_draft_on_the_threads_of_its_model(packs: dict[str, Path], tmp_path: Path) -> None:
    setup = make_setup("resident", packs)
    draft = tmp_path / "draft.edge"
    edge.pack(tiny_llama_gguf(tmp_path / "draft.gguf", type="q8_0", seed=6, num_hidden_layers=1), draft)
    guessing = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "speculation": "draft"}
    with (
        edge.load(setup.pack, memory="1GiB", context=CONTEXT, threads=2, draft=draft) as engine,
        beside(lambda: look_at(engine)),
    ):
        for _ in range(3):
            assert engine.generate(PROMPT, **guessing).tokens == setup.tokens


def test_a_closed_engine_tells_lookers_on(setup: Setup) -> None:
    engine = setup.load()
    with pytest.raises(EdgeError, match="closed"), beside(lambda: look_at(engine)):
        assert answer(engine) == setup.tokens
        engine.close()
        threading.Event().wait(0.01)
        look_at(engine)
