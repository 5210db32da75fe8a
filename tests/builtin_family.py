"""Made-up corpora and models of a few thousand parameters, for the tests of the built-in family."""

from __future__ import annotations

import io
import lzma
import random
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edge.builtin.data import END_OF_TEXT

if TYPE_CHECKING:
    from edge.builtin.model import Decoder, ModelConfig
    from edge.builtin.recipes import Settings

NAMES = ("Lily", "Tom", "Ben", "Mia", "Sam")
THINGS = ("dog", "ball", "tree", "boat", "cake", "hat", "bird", "frog")
VERBS = ("found", "saw", "liked", "lost", "painted", "hid")


def story(seed: int, sentences: int = 12) -> str:
    """A made-up story; other seeds share no 48 letters with it."""
    r = random.Random(seed)
    parts = [f"Once there was a {r.choice(THINGS)} number {seed} of the town."]
    for _ in range(sentences):
        name, other = r.sample(NAMES, 2)
        parts.append(f"One day {name} {r.choice(VERBS)} a {r.choice(THINGS)} and a {r.choice(THINGS)}.")
        parts.append(f'"I {r.choice(VERBS)} the {r.choice(THINGS)}," said {other}.')
    return " ".join(parts)


def write_corpora(folder: Path, cased: list[str], lower: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tinystories.txt.xz").write_bytes(lzma.compress(f"\n{END_OF_TEXT}\n".join(cased).encode()))
    (folder / "tinystories-lower.txt.xz").write_bytes(lzma.compress("\n".join(lower).lower().encode()))
    book = ("# Heidi\n\n" + "The goats went up the mountain in the morning with Peter. " * 30).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("Johanna Spyri/Heidi.md")
        member.size = len(book)
        archive.addfile(member, io.BytesIO(book))
    (folder / "books-train.tar.xz").write_bytes(lzma.compress(buffer.getvalue()))


def write_usual_corpora(folder: Path) -> Path:
    """320 cased stories, the last of them held out; 130 lower-cased ones, 60 of them new."""
    write_corpora(folder, [story(i) for i in range(320)], [story(i) for i in range(250, 380)])
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small products are slower on many threads of a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


def tiny_config(**changes: Any) -> ModelConfig:
    from edge.builtin.model import ModelConfig

    return ModelConfig(**{**TINY, **changes})


def tiny_settings(name: str = "twin", shape: dict[str, Any] | None = None, **changes: Any) -> Settings:
    """A recipe as it is but for sizes: six steps of four short rows."""
    from edge.builtin.recipes import RECIPES

    recipe = RECIPES[name]
    sizes = {**TINY, **({"intermediate_size": 16} if recipe.model.num_local_experts else {}), **(shape or {})}
    return replace(
        recipe, **{"model": replace(recipe.model, **sizes), "steps": 6, "rows": 4, "eval_steps": 3, **changes}
    )


def random_decoder(seed: int = 0, **changes: Any) -> Decoder:
    """In eval mode, its weights large enough that greedy tokens differ from place to place."""
    import torch

    from edge.builtin.model import Decoder

    torch.manual_seed(seed)
    model = Decoder(tiny_config(**changes))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.mul_(10.0)
    return model.eval()
