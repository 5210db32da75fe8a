"""Engines on tiny models with keys and values in memory or partly on a drive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _edge
import pytest

from flashload.format import PackFile
from flashload.pack import pack
from flashload.plan import Plan, make_plan, weights_of
from tests.tiny import tiny_gguf, tiny_hf, tiny_llama_gguf

CONTEXT = 320
PAGE_TOKENS = 16
MODELS = ("llama", "wide", "window", "opt", "moe")
FAST = next(isa["name"] for isa in _edge.isas() if isa["available"])
PROMPT = [1 + (i * 37) % 250 for i in range(210)]
N_TOKENS = 24


@pytest.fixture(scope="session")
def kv_packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pack of each of MODELS."""
    folder = tmp_path_factory.mktemp("kv")
    long = {"max_position_embeddings": 1024}
    sources = {
        "llama": tiny_llama_gguf(folder / "llama.gguf", type="q8_0", seed=5, num_hidden_layers=3, **long),
        # Halves of pages that are whole blocks of the drive: 16 rows of 256 bytes.
        "wide": tiny_llama_gguf(
            folder / "wide.gguf", type="q8_0", seed=6, head_dim=64, num_attention_heads=6, **long
        ),
        "window": tiny_hf(folder / "window", "mistral", sliding_window=40, **long),
        "opt": tiny_hf(folder / "opt", "opt", **long),
        "moe": tiny_gguf(folder / "moe.gguf", "mixtral", "q8_0", seed=3, **long),
    }
    for name, source in sources.items():
        pack(source, folder / f"{name}.edge")
    return {name: folder / f"{name}.edge" for name in sources}


def plan_of(
    path: Path, kv: str = "memory", memory_bytes: int = 1 << 34, kv_type: str = "f16", **more: Any
) -> tuple[Any, Plan]:
    with PackFile(path) as file:
        weights, decoder = weights_of(file), file.config.to_json() | {"kv_type": kv_type}
    settings: dict[str, Any] = {"context": CONTEXT, "threads": 2, "host_bytes": 0} | more
    return decoder, make_plan(weights, decoder, memory_bytes=memory_bytes, kv=kv, **settings)


def open_engine(
    path: Path,
    folder: Path,
    kv: tuple[int, int, int] | None,
    *,
    max_rows: int = 32,
    isa: str = FAST,
    threads: int = 2,
    plan: tuple[Any, Plan] | None = None,
    kv_type: str = "f16",
    **faults: str,
) -> _edge.Engine:
    """A resident model; ``kv`` is (pages in memory, pages of a range, rows scored at once), None all in memory."""
    decoder, placed = plan or plan_of(path)
    decoder = decoder | {"kv_type": kv_type}
    options = placed.engine_options(
        path, decoder, isa=isa, threads=threads, max_rows=max_rows, budget_bytes=1 << 28
    )
    if kv is not None:
        resident, ranges, scores = kv
        options["kv"] = {
            "resident_pages": resident,
            "range_pages": ranges,
            "score_rows": scores,
            "folder": str(folder),
            **faults,
        }
    return _edge.Engine(options)


def answer(
    sequence: _edge.Sequence, prompt: list[int], n: int = N_TOKENS, **sampling: Any
) -> list[tuple[int, float]]:
    sequence.set_tokens(prompt)
    sampler = _edge.Sampler({"temperature": 0.0} | sampling, 320)
    return [sequence.next(sampler)[:2] for _ in range(n)]
