"""The NEON kernels, cross-compiled and emulated on CPUs with and without dot and matrix products: the bits of ref."""

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


NO_DOT, NO_MATRIX = "not run: CPU lacks asimddp", "not run: CPU lacks i8mm"
SAME = "same bits as ref"


@pytest.mark.parametrize(
    ("cpu", "neon_i8mm", "neon_dotprod"),
    [("cortex-a53", NO_DOT, NO_DOT), ("cortex-a76", NO_MATRIX, SAME), ("max", SAME, SAME)],
)
def test_what_a_cpu_has_gives_the_bits_of_ref(
    selftest: Path, cpu: str, neon_i8mm: str, neon_dotprod: str
) -> None:
    done = emulate(cpu, selftest, "60", "1")
    assert done.stdout.splitlines() == [
        f"neon_i8mm: {neon_i8mm}",
        f"neon_dotprod: {neon_dotprod}",
        f"neon: {SAME}",
    ]
    assert done.returncode == 0
