"""What Skeleton-of-Thought reads out of a model's words, and which questions its classifier sends there."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.builtin import router
from edge.errors import ModelFileError
from edge.routing import N_BUCKETS, Classifier, features, shipped
from edge.skeleton_prompts import MAX_POINT_WORDS, MAX_POINTS, parse_choice, parse_skeleton, point_prompt


@pytest.mark.parametrize(
    ("text", "titles"),
    [
        ("1. Sun\n2. Moon\n3. Stars", ["Sun", "Moon", "Stars"]),
        ("1. Sun. \n\n2) Moon:\n3: Stars;", ["Sun", "Moon", "Stars"]),
        ("**1.** **Sun**\n**2. Moon**\n> 3. `Stars`", ["Sun", "Moon", "Stars"]),
        ("- Sun\n* Moon\n• Stars", ["Sun", "Moon", "Stars"]),
        ("Here it is:\n1. Sun\n   - its light\n2. Moon\nThat is all.", ["Sun", "Moon"]),
        ("1. Sun 2. Moon 3. Stars", ["Sun", "Moon", "Stars"]),
        ("1. Win 5. place 2. Moon", ["Win 5. place", "Moon"]),
        ("1. Sun\n1. Moon\n2. sun\n3. Stars", ["Sun", "Stars"]),
        ("1. Sun\n2. Moon\n\nQuestion: what?\n1. Other\n2. List", ["Sun", "Moon"]),
        ("2. Sun\n4. Moon", ["Sun", "Moon"]),
        ("1.\n2. ...\n3. Stars", ["Stars"]),
        ("1. " + "word " * 40, [" ".join(["word"] * MAX_POINT_WORDS)]),
        ("1. 太阳。\n2. 月亮", ["太阳。", "月亮"]),
        ("", []),
        ("No list here at 10.30 in the morning.", []),
    ],
)
def test_points_of_a_skeleton(text: str, titles: list[str]) -> None:
    assert parse_skeleton(text) == titles


def test_more_points_than_an_answer_may_have() -> None:
    assert len(parse_skeleton("\n".join(f"{i}. point {i}" for i in range(1, 30)))) == MAX_POINTS


_WORDS = st.text("abcdefghij", min_size=1, max_size=8)
_TITLES = st.lists(
    st.lists(_WORDS, min_size=1, max_size=5).map(" ".join), min_size=1, max_size=10, unique=True
)


@given(_TITLES, st.sampled_from(["{}. {}\n", "{}) {}.\n", " **{}.** {}\n\n", "{}: {} \n", "{}. {} "]))
def test_a_written_list_is_read_back(titles: list[str], form: str) -> None:
    assert parse_skeleton("".join(form.format(i, title) for i, title in enumerate(titles, 1))) == titles


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    titles = parse_skeleton(text)
    assert len(titles) <= MAX_POINTS
    assert all(title.strip() and "\n" not in title for title in titles)
    assert len({title.casefold() for title in titles}) == len(titles)


def test_prompts_of_points_differ_at_their_ends_only() -> None:
    first, other = (point_prompt("Why?", ["a", "b", "c"], number) for number in (1, 3))
    assert first[:-2] == other[:-2] and first != other


@pytest.mark.parametrize(
    ("reply", "letter"),
    [("A", "A"), (" B.", "B"), ("(C)", "C"), ("Answer: A", "A"), ("None", None), ("", None)],
)
def test_choice(reply: str, letter: str | None) -> None:
    assert parse_choice(reply) == letter


@pytest.mark.parametrize(
    "question",
    [
        "What are the most effective ways to stay healthy in winter?",
        "What are the main differences between cats and dogs as pets?",
        "How can I improve my memory?",
        "What are the advantages and disadvantages of nuclear power?",
    ],
)
def test_questions_that_suit(question: str) -> None:
    assert shipped().probability(question) > 0.5


@pytest.mark.parametrize(
    "question",
    [
        "Write a short poem about the sea.",
        "def add(a, b):\n    return a - b\nFix this function.",
        "A train goes 60 miles in 2 hours. How far does it go in 5 hours?",
        "Translate German to English: Das Haus ist rot.",
        "Who wrote Hamlet?",
    ],
)
def test_questions_that_do_not(question: str) -> None:
    assert shipped().probability(question) < 0.5


@given(st.text())
def test_any_question_has_a_probability(question: str) -> None:
    found = features(question)
    assert len(found) > 0 and found[0] >= 0 and found[-1] < N_BUCKETS
    assert 0.0 < shipped().probability(question) < 1.0


def _zip_without_arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, other=np.zeros(3))
    return buffer.getvalue()


def _short_weights() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, weights=np.zeros(3, np.float16), bias=np.float32(0))
    return buffer.getvalue()


def _pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}]), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("data", [b"", b"PK\3\4 cut", _zip_without_arrays(), _short_weights(), _pickled()])
def test_damaged_weights_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "router.npz"
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"router\.npz"):
        Classifier.load(path)


def test_training_is_deterministic_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "N_STEPS", 60)
    asked = router.SUITABLE_FORMS[:4], router.UNSUITABLE_FORMS[:4]
    questions = [form.format(s) for forms in asked for form in forms for s in router.SUBJECTS[:4]]
    data = router._balanced(questions, [True] * 16 + [False] * 16, 1.0)
    files = []
    for name in ("a.npz", "b.npz"):
        router.train(data).save(tmp_path / name)
        files.append(Classifier.load(tmp_path / name))
    assert np.array_equal(files[0].weights, files[1].weights) and files[0].bias == files[1].bias
    found = np.array([files[0].probability(question) for question in questions])
    assert router.scores(data, found)["accuracy"] == 1.0
    assert files[0].probability(router.SUITABLE_FORMS[0].format("chess")) > 0.5
    assert files[0].probability(router.UNSUITABLE_FORMS[0].format("chess")) < 0.5


@pytest.mark.slow
def test_shipped_weights_are_those_of_the_recipe(shared: Path) -> None:
    data = router.benchmarks(shared / "prompts") + router.forms()
    made = router.train(data)
    assert np.allclose(made.weights, shipped().weights, atol=2e-2)
    found = np.array([shipped().probability(question) for question in data.questions])
    assert router.scores(data, found)["accuracy"] > 0.97
