"""Random models large enough that memory matters, and `edge run` on them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

import edge
from bench import synth
from bench.cgroup import cgroup_refusal, run_in_cgroup
from bench.shapes import Shape
from tests.tiny import tiny_hf

SHAPES = {
    "q4_0": (Shape("q4_0", "llama", 32000, 1024, 2816, 8, 16, 4, 2048, 64), "q4_0"),
    "f16": (Shape("f16", "llama", 8000, 768, 2048, 6, 12, 4, 2048, 64), "f16"),
    "moe": (Shape("moe", "llama", 8000, 512, 1024, 6, 8, 4, 2048, 64, 8, 2), "q4_0"),
    "small": (Shape("small", "llama", 512, 256, 768, 6, 4, 2, 1024, 64), "q8_0"),
    "small_moe": (Shape("small_moe", "llama", 512, 256, 256, 4, 4, 2, 1024, 64, 8, 2), "q8_0"),
}
#: A vocabulary that weighs more than the weights.
SHAPES["words"] = (
    Shape("words", "qwen3moe", 151936, 256, 256, 2, 4, 2, 1024, 64, 8, 2, 1e-6, 1e6, "bpe"),
    "q4_0",
)
FOLDERS = {"tied": "llama", "opt": "opt", "neurons": "opt"}
MODELS = ("q4_0", "f16", "moe", "small", "small_moe", *FOLDERS)
FEW_TOKENS = 4


@dataclass(frozen=True)
class Run:
    """One `edge run --json`: its answer, or its error."""

    returncode: int
    result: dict[str, Any]
    killed: bool = False

    @property
    def floor_bytes(self) -> int:
        assert self.result.get("error") == "BudgetError", self.result
        found = re.search(r"needs at least (\d+) bytes", self.result["message"])
        assert found is not None, self.result
        return int(found[1])


@dataclass(frozen=True)
class Model:
    name: str
    pack: Path

    def command(self, verb: str, memory: int | str | None, context: int, *more: object) -> list[str]:
        program = [sys.executable, "-c", "from edge.cli import main; main()", verb, str(self.pack), *more]
        options = ["--context", context, "--threads", 2, "--json"]
        if memory is not None:
            options += ["--memory", memory]
        return [str(word) for word in (*program, *options)]

    def run(
        self,
        memory: int | str,
        context: int,
        *,
        prompt: str = "a b c",
        tokens: int = FEW_TOKENS,
        limit: int = 0,
        options: tuple[object, ...] = (),
    ) -> Run:
        """Greedy; inside a memory cgroup of ``limit`` bytes when it is not 0; no ``memory`` is edge's own choice."""
        more = (prompt, "-n", tokens, "--temperature", 0, "--ignore-eos", *options)
        command = self.command("run", memory, context, *more)
        if limit:
            done = run_in_cgroup(command, limit, timeout_seconds=100)
            return Run(done.returncode, _last_line(done.stdout), done.killed)
        plain = subprocess.run(command, capture_output=True, text=True, timeout=100)
        return Run(plain.returncode, _last_line(plain.stdout))

    def plan(self, memory: int | str, context: int) -> dict[str, Any]:
        done = subprocess.run(
            self.command("plan", memory, context), capture_output=True, text=True, timeout=100
        )
        return _last_line(done.stdout)

    @cached_property
    def tokens(self) -> list[int]:
        """What it answers when all of it is resident."""
        found: list[int] = self.run("2GiB", 256).result["tokens"]
        return found


def _last_line(text: str) -> dict[str, Any]:
    lines = text.splitlines()
    value: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return value


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Makes a model on first use."""
    made: dict[str, Model] = {}
    folder = tmp_path_factory.mktemp("budget")

    def get(name: str) -> Model:
        if name not in made:
            pack = folder / f"{name}.edge"
            if name in SHAPES:
                source = folder / f"{name}.gguf"
                synth.write_model(source, *SHAPES[name])
                edge.pack(source, pack)
                source.unlink()
            else:
                inner = {"ffn_dim": 512} if FOLDERS[name] == "opt" else {"intermediate_size": 512}
                folder_of = tiny_hf(
                    folder / name,
                    FOLDERS[name],
                    vocab_size=4000,
                    hidden_size=256,
                    num_hidden_layers=4,
                    max_position_embeddings=1024,
                    tie_word_embeddings=True,
                    **inner,
                )
                edge.pack(folder_of, pack, weights="q8", neurons="on" if name == "neurons" else "off")
            made[name] = Model(name, pack)
        return made[name]

    return get


@pytest.fixture(scope="session")
def cgroups() -> None:
    """Skips where no memory cgroup can be made."""
    if refusal := cgroup_refusal():
        pytest.skip(refusal)
