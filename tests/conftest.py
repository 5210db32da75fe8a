"""Fixtures every test may use."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent


# The quick tests draw the same examples on every run; the nightly ones look for new ones.
settings.register_profile("quick", derandomize=True, deadline=None)
settings.register_profile("nightly", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# A shell starts what runs in the background with Ctrl-C ignored, and so would be every program the tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models, vocabularies and texts; tests that need it skip where it is absent."""
    path = Path(os.environ.get("EDGE_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"needs the shared test data (EDGE_SHARED), not found at {path}")
    return path


@pytest.fixture(scope="session")
def limited() -> None:
    """Skips where no memory cgroup can be made."""
    from bench import cgroup

    if refusal := cgroup.cgroup_refusal():
        pytest.skip(refusal)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny model of random weights; returns its path."""
    pytest.importorskip("gguf", reason="the benchmarks write GGUF files with the gguf package")
    from bench import shapes, synth

    def make(name: str = "tiny", mix: str = "q4_0", **options: Any) -> Path:
        path = tmp_path / f"{name}-{mix}.gguf"
        synth.write_model(path, shapes.SHAPES[name], mix, **options)
        return path

    return make
