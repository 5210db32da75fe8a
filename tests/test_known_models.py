"""Trained models whose text is known: the whole way from file to text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import edge
from tests.test_engine import oracle_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))


#: Greedy continuations transformers 5.23 computed in float32 for tinystories-656k: prompt ids -> 64 ids.
TINYSTORIES: dict[tuple[int, ...], list[int]] = {
    (1,): [
        147, 201, 282, 215, 286, 598, 1662, 356, 499, 826, 1363, 1145, 1652, 615, 242, 1482,
        951, 628, 499, 826, 872, 921, 318, 385, 628, 499, 826, 617, 242, 198, 1047, 425,
        1939, 122, 1924, 1171, 94, 303, 328, 229, 521, 776, 115, 1139, 312, 447, 1456, 319,
        115, 133, 114, 100, 167, 753, 1665, 361, 303, 1900, 319, 467, 730, 717, 532, 856,
    ],
    (1, 300, 500, 700): [
        92, 337, 1071, 144, 497, 445, 1335, 739, 301, 93, 1071, 89, 431, 1071, 144, 497,
        445, 1335, 739, 301, 93, 1071, 89, 600, 245, 254, 1081, 448, 563, 217, 243, 192,
        122, 223, 1459, 94, 167, 438, 605, 1032, 288, 198, 202, 1143, 368, 379, 119, 288,
        198, 202, 1143, 368, 1378, 288, 198, 850, 178, 102, 1641, 403, 1165, 57, 288, 198,
    ],
    (1, 45, 99, 1200): [
        1492, 444, 111, 100, 220, 263, 1585, 84, 223, 409, 217, 273, 259, 503, 100, 328,
        58, 116, 55, 87, 752, 284, 813, 1346, 233, 144, 265, 448, 600, 115, 93, 58,
        116, 55, 87, 58, 116, 55, 87, 58, 116, 55, 87, 58, 116, 55, 87, 58,
        116, 55, 87, 58, 116, 55, 87, 58, 116, 55, 87, 58, 116, 55, 87, 58,
    ],
}  # fmt: skip


def test_stories260k_gives_its_known_text(shared: Path) -> None:
    expected = (shared / "models/stories260K-greedy-200.txt").read_text()
    with edge.load(shared / "models/stories260K-f32.gguf", context=256, memory="128MiB") as engine:
        assert engine.generate("", max_tokens=200, temperature=0, ignore_eos=True).text == expected


@pytest.mark.parametrize("prompt", TINYSTORIES, ids=str)
def test_tinystories_gives_the_tokens_of_transformers(shared: Path, prompt: tuple[int, ...]) -> None:
    with edge.load(shared / "models/tinystories-656k", context=128) as engine:
        found = engine.generate(list(prompt), max_tokens=64, temperature=0, ignore_eos=True)
    assert found.tokens == TINYSTORIES[prompt]


def test_q8_0_stays_near_the_exact_logits(shared: Path, tmp_path: Path) -> None:
    """Eight-bit activations cost about a percent of the largest logit, as in llama.cpp."""
    path = tmp_path / "q8.edge"
    edge.pack(shared / "models/tinystories-656k-q8_0.gguf", path)
    oracle = oracle_of(path)
    with edge.load(path, context=128) as engine:
        for prompt in ([1], [1, 300, 500, 700], list(range(3, 40))):
            exact = oracle.logits(prompt)[-1]
            assert np.abs(engine.logits(prompt) - exact).max() <= 0.03 * np.abs(exact).max()


def test_q8_0_file_and_folder_tell_the_same_story(shared: Path) -> None:
    texts = []
    for name in ("tinystories-656k", "tinystories-656k-q8_0.gguf"):
        with edge.load(shared / "models" / name, context=128) as engine:
            texts.append(engine.generate("One day", max_tokens=24, temperature=0).text)
    assert texts[0][:40] == texts[1][:40]
