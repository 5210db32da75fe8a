"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models, vocabularies and texts; tests that need it skip where it is absent."""
    path = Path(os.environ.get("EDGE_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"needs the shared test data (EDGE_SHARED), not found at {path}")
    return path
