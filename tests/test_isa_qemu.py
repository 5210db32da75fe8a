"""The NEON kernels, cross-compiled and emulated: the bits of ref, and a CPU without dot products."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64-static"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def selftest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kernel_selftest for aarch64, linked statically so that the emulator needs no libraries."""
    for tool in (COMPILER, EMULATOR, "cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} to build and run the NEON kernels")
    build = tmp_path_factory.mktemp("aarch64")
    options = {
        "EDGE_PYTHON": "OFF",
        "EDGE_SELFTEST": "ON",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_EXE_LINKER_FLAGS": "-static",
    }
    if shutil.which("ccache"):
        options["CMAKE_CXX_COMPILER_LAUNCHER"] = "ccache"
    flags = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-S", ROOT / "cpp", "-B", build, "-G", "Ninja", *flags], check=True)
    subprocess.run(["cmake", "--build", build, "--target", "kernel_selftest"], check=True)
    return build / "kernel_selftest"


def emulate(cpu: str, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([EMULATOR, "-cpu", cpu, str(program), *arguments], capture_output=True, text=True)


def test_neon_has_the_bits_of_ref(selftest: Path) -> None:
    done = emulate("cortex-a76", selftest, "150", "1")
    assert done.stdout.splitlines() == ["neon: same bits as ref"]
    assert done.returncode == 0


def test_a_cpu_without_dot_products_is_told_apart(selftest: Path) -> None:
    done = emulate("cortex-a53", selftest, "1")
    assert "neon: not run: CPU lacks asimddp" in done.stdout
    assert done.returncode == 1
