"""The thread pool by itself, under the sanitizers: what threads share, also beside busy processes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.sanitized import configure, fixed_addresses, make


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_jobs_of_a_pool(sanitizer: str, tmp_path: Path) -> None:
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} to build the pool's own test")
    configure(sanitizer, tmp_path, EDGE_PYTHON="OFF")
    make(tmp_path, "pool_selftest")
    done = subprocess.run(
        [*fixed_addresses(), tmp_path / "pool_selftest"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.rpartition(": ")[2] for line in done.stdout.splitlines()] == ["ok"] * 5
