"""The arrows between folders and the size of files, checked by machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPP = ROOT / "cpp"

#: Folder -> folders it may include, besides itself.
ALLOWED = {
    "core": set(),
    "io": {"core"},
    "kernels": {"core"},
    "format": {"core", "io", "kernels"},  # kernels/format.h only: the tile sizes
    "store": {"core", "io", "format", "kernels"},
    "kv": {"core", "io", "kernels"},
    "sample": {"core"},
    "model": {"core", "kernels", "format", "store", "kv"},
    "speculate": {"core", "kernels", "format", "store", "kv", "model", "sample"},
    "engine": {"core", "kernels", "format", "store", "kv", "model", "sample", "speculate"},
    "bindings": {"core", "io", "kernels", "format", "store", "kv", "model", "sample", "speculate", "engine"},
}
MAX_LINES = 600


def cpp_files() -> list[Path]:
    return [
        p for p in sorted(CPP.rglob("*")) if p.suffix in (".h", ".cc") and p.parts[len(CPP.parts)] in ALLOWED
    ]


def includes(path: Path) -> list[str]:
    return re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", cpp_files(), ids=lambda p: str(p.relative_to(CPP)))
def test_includes_follow_the_arrows(path: Path) -> None:
    folder = path.relative_to(CPP).parts[0]
    for name in includes(path):
        target = name.split("/")[0]
        assert target == folder or target in ALLOWED[folder], f"{folder} must not include {name}"
        if target == "kernels" and folder in ("format", "store"):
            assert name == "kernels/format.h", f"{folder} knows tile sizes, not kernels: {name}"


def test_python_headers_only_in_bindings() -> None:
    for path in cpp_files():
        if path.relative_to(CPP).parts[0] != "bindings":
            assert not re.search(r"#include <(pybind11|Python\.h)", path.read_text()), path


def test_no_file_is_over_600_lines() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.split("\n"):
        path = ROOT / name
        if path.suffix in (".py", ".h", ".cc", ".cu") and path.is_file():
            assert len(path.read_text().splitlines()) <= MAX_LINES, f"{name} is over {MAX_LINES} lines"


def test_import_edge_brings_no_heavy_package() -> None:
    heavy = ("torch", "numpy", "tokenizers", "jinja2", "rich")
    code = f"import sys, edge; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "[]"


def test_loading_the_engine_module_brings_no_torch() -> None:
    code = "import sys, edge.engine, edge.loading; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "False"
