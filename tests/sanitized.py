"""Runs the tests of everything that threads share, and of drives that fail, against a core built with a sanitizer.

    python -m tests.sanitized thread [pytest arguments]              # make tsan
    python -m tests.sanitized address,undefined [pytest arguments]   # make asan

Builds into ``build/<sanitizer>``, runs the programs that need no Python, then the tests below with the sanitizer's
runtime loaded first. Anything that a sanitizer reports, in any process of theirs, is printed and fails the run.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: Engines of every placement with two and more threads: requests, changes, ends, and reads that fail.
TESTS = (
    "tests/matrix",
    "tests/fault/test_interruptions.py",
    "tests/fault/test_io_faults.py",
    "tests/fault/test_threads.py",
    "tests/test_batch.py",
    "tests/test_block_formats.py",
    "tests/test_engine.py",
    "tests/test_expert_cache.py",
    "tests/test_expert_guesses.py",
    "tests/test_io.py",
    "tests/test_kv_flash.py",
    "tests/test_kv_move.py",
    "tests/test_kv_session.py",
    "tests/test_kv_types.py",
    "tests/test_live_memory.py",
    "tests/test_neuron_engine.py",
    "tests/test_neuron_window.py",
    "tests/test_prefix_disk.py",
    "tests/test_prefixes.py",
    "tests/test_speculation_drafts.py",
    "tests/test_speculation_self.py",
    "tests/test_store.py",
    "tests/test_store_faults.py",
    "tests/test_store_replace.py",
    "tests/test_stream_parts.py",
)
_RUNTIMES = {"thread": ("libtsan.so",), "address,undefined": ("libasan.so", "libubsan.so")}
#: Nothing is suppressed by name. What the interpreter and the libraries beside the core do is left out as a whole: they
#: are not instrumented, so half of what orders their threads is out of sight. And Python ends without freeing all.
_OPTIONS = {
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:second_deadlock_stack=1:history_size=4",
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def fixed_addresses() -> list[str]:
    """The beginning of a command that runs without randomised addresses, which older runtimes cannot place all of."""
    setarch = shutil.which("setarch")
    return [] if setarch is None else [setarch, "-R"]


def options(report: Path) -> dict[str, str]:
    """Variables that make the sanitizers write to ``report``.<pid>."""
    return {name: f"{value}:log_path={report}" for name, value in _OPTIONS.items()}


def configure(sanitizer: str, build: Path, **settings: str) -> None:
    """Configures a sanitized build of the core."""
    settings |= {"EDGE_SANITIZE": sanitizer, "EDGE_SELFTEST": "ON", "CMAKE_BUILD_TYPE": "Debug"}
    if shutil.which("ccache"):
        settings["CMAKE_CXX_COMPILER_LAUNCHER"] = "ccache"
    flags = [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run(["cmake", "-S", ROOT / "cpp", "-B", build, "-G", "Ninja", *flags], check=True)


def make(build: Path, *targets: str) -> None:
    """Builds targets of a configured build."""
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "2")
    subprocess.run(["cmake", "--build", build, "--parallel", jobs, "--target", *targets], check=True)


def _preload(sanitizer: str) -> str:
    compiler = os.environ.get("CXX", "c++")
    paths = []
    for name in _RUNTIMES[sanitizer]:
        found = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        paths.append(str(Path(found.stdout.strip()).resolve()))
    return ":".join(paths)


def _python(build: Path) -> dict[str, str]:
    """Variables with which the interpreter below this environment finds its packages, and the sanitized core first."""
    packages = [str(build / "out"), str(ROOT), *site.getsitepackages()]
    inherited = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join([*packages, *filter(None, [inherited])])}


def _run(command: Sequence[str | Path], variables: Mapping[str, str]) -> bool:
    print("+", *command, flush=True)
    # Through env, so that the sanitizer's runtime is not loaded into setarch.
    settings = [f"{name}={value}" for name, value in variables.items()]
    return subprocess.run([*fixed_addresses(), "env", *settings, *command], cwd=ROOT).returncode == 0


def run(sanitizer: str, arguments: Sequence[str]) -> bool:
    """Builds and runs all; whether nothing failed and nothing was reported."""
    build = ROOT / "build" / sanitizer.partition(",")[0]
    reports = build / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    out = {"CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(build / "out"), "Python_EXECUTABLE": sys.executable}
    import pybind11

    configure(sanitizer, build, pybind11_DIR=pybind11.get_cmake_dir(), **out)
    make(build, "pool_selftest", "kernel_selftest", "_edge")
    variables = options(reports / "report")
    ok = all(
        [
            _run([build / "pool_selftest"], variables),
            _run([build / "kernel_selftest", "20"], variables),
            _run(
                # The interpreter itself: the environment's site-packages would put the installed core first.
                [Path(sys.executable).resolve(), "-m", "pytest", *(arguments or TESTS)],
                variables | _python(build) | {"LD_PRELOAD": _preload(sanitizer), "OPENBLAS_NUM_THREADS": "1"},
            ),
        ]
    )
    for report in sorted(reports.iterdir()):
        print(report.read_text(errors="replace"))
        ok = False
    return ok


if __name__ == "__main__":
    sys.exit(0 if run(sys.argv[1], sys.argv[2:]) else 1)
