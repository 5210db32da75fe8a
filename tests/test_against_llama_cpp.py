"""The same files through llama-cpp-python: the same tokens, or a tie within the noise of eight-bit activations.

Needs llama-cpp-python in this interpreter or in the one EDGE_PEER_PYTHON names; skips without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge
from tests.tiny import tiny_llama_gguf

pytestmark = pytest.mark.slow

PEER = """
import ctypes, json, sys
import llama_cpp, numpy as np
path, prompts, n = json.load(sys.stdin)
model = llama_cpp.Llama(path, n_ctx=512, verbose=False)
size = model.n_vocab()
out = []
for prompt in prompts:
    model.reset()
    model.eval(prompt)
    tokens, rows = [], []
    for _ in range(n):
        row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), shape=(size,)).copy()
        rows.append(row.tolist())
        tokens.append(int(row.argmax()))
        model.eval([tokens[-1]])
    out.append({"tokens": tokens, "logits": rows})
json.dump(out, sys.stdout)
"""
PROMPTS = [
    "Once upon a time",
    "One day, a little girl",
    "The cat and the dog",
    "Tom was a boy who",
    "There was a big tree",
    "Lily and Ben went",
    "A small bird",
    "In the morning, the sun",
    "Mom said to",
    "The old man had",
    "Sara liked to play",
    "It was a rainy day",
    "The frog jumped",
    "Once there was a king",
    "Tim had a red ball",
    "Anna saw a",
    "The rabbit was",
    "They wanted to",
    "He was very",
    "She found a",
]
N_TOKENS = 64
LONG = 200


def peer(path: Path, prompts: list[list[int]], n: int) -> list[dict[str, Any]]:
    python = os.environ.get("EDGE_PEER_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode != 0:
        pytest.skip(
            f"llama-cpp-python is not installed for {python}; EDGE_PEER_PYTHON names another interpreter"
        )
    done = subprocess.run(
        [python, "-c", PEER],
        input=json.dumps([str(path), prompts, n]),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))


def test_f32_file_same_tokens_and_logits(shared: Path) -> None:
    path = shared / "models/stories260K-f32.gguf"
    (theirs,) = peer(path, [[1]], LONG)
    with edge.load(path, context=256) as engine:
        assert (
            engine.generate([1], max_tokens=LONG, temperature=0, ignore_eos=True).tokens == theirs["tokens"]
        )
        for i in range(0, LONG, 10):
            expected = np.array(theirs["logits"][i])
            found = engine.logits([1, *theirs["tokens"][:i]])
            assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def test_q8_0_file_same_tokens_but_for_ties(shared: Path) -> None:
    path = shared / "models/tinystories-656k-q8_0.gguf"
    with edge.load(path, context=256) as engine:
        prompts = [engine.tokenizer.encode(text) for text in PROMPTS]
        theirs = peer(path, prompts, N_TOKENS)
        n_equal = 0
        for prompt, their in zip(prompts, theirs, strict=True):
            ours = engine.generate(prompt, max_tokens=N_TOKENS, temperature=0, ignore_eos=True).tokens
            differ = [i for i in range(N_TOKENS) if ours[i] != their["tokens"][i]]
            if not differ:
                n_equal += 1
                continue
            # From there on they are different texts; at that token the two must be a tie for the peer.
            row = np.array(their["logits"][differ[0]])
            gap = row[their["tokens"][differ[0]]] - row[ours[differ[0]]]
            assert 0 <= gap <= 0.005 * np.abs(row).max()
    print(f"{n_equal} of {len(prompts)} texts of {N_TOKENS} tokens are equal")
    assert n_equal > len(prompts) // 2


@pytest.mark.parametrize(
    "kind", ["q8_0", "q4_k", "q5_k", "q6_k", "q2_k", "q3_k", "iq4_nl", "iq4_xs", "mxfp4"]
)
def test_every_tile_format_has_the_logits(kind: str, tmp_path: Path) -> None:
    """Random blocks of the type: what is packed unchanged gives the peer's logits, activation roundings aside."""
    path = tiny_llama_gguf(tmp_path / "m.gguf", type=kind, seed=3, num_hidden_layers=2)
    prompt = [1, 17, 5, 99, 42, 7, 63, 120, 3, 8, 21]
    (theirs,) = peer(path, [prompt], 8)
    with edge.load(path, context=64) as engine:
        for i in range(8):
            expected = np.array(theirs["logits"][i])
            found = engine.logits([*prompt, *theirs["tokens"][:i]])
            assert np.abs(found - expected).max() <= 2e-2 * np.abs(expected).max()
