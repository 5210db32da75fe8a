"""The fuzz targets build, and a fixed set of random inputs passes under the sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["fuzz_pack_directory", "fuzz_tiling"]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler on the path")
    folder = tmp_path_factory.mktemp("fuzz")
    configure = ["cmake", "-S", str(ROOT / "cpp/fuzz"), "-B", str(folder), "-DEDGE_FUZZ_STANDALONE=ON"]
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", TARGETS)
def test_random_inputs(build: Path, target: str) -> None:
    done = subprocess.run(
        [str(build / target), "--random", "20000"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "20000 random inputs\n"
