"""What this machine and this process have: memory, limits, cores. Linux facts with portable fallbacks."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path

from flashload.errors import ArgumentError

_UNITS = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "m": 1000**2,
    "mb": 1000**2,
    "g": 1000**3,
    "gb": 1000**3,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}
#: Limits above this are "no limit" in cgroup v1.
_NO_LIMIT_BYTES = 1 << 60


def parse_bytes(value: int | str, name: str = "memory") -> int:
    """``"2GiB"``, ``"1.5 GB"``, ``"300M"`` or a number of bytes -> bytes.

    Raises:
        ArgumentError: not a size, or not positive.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ArgumentError(f"{name}: expected a size such as 2GiB or a number of bytes, found {value!r}")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        if match is None or match[2].lower() not in _UNITS:
            raise ArgumentError(f"{name}: expected a size such as 2GiB, 1500MB or 800000000, found {value!r}")
        value = int(float(match[1]) * _UNITS[match[2].lower()])
    if not 0 < value < _NO_LIMIT_BYTES:
        raise ArgumentError(f"{name}: expected more than 0 and less than 1 EiB, found {value} bytes")
    return value


def format_bytes(n_bytes: float) -> str:
    """Bytes for people: ``1.50 GiB``."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes:.0f} B"


def _status_bytes(key: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        import psutil

        return int(psutil.Process().memory_info().rss)
    match = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def rss_bytes() -> int:
    """Memory this process holds now."""
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int:
    """The most memory this process ever held."""
    return _status_bytes("VmHWM")


def trim_memory() -> None:
    """Gives what the C library keeps of freed memory back to the system; does nothing where it cannot."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)


def available_bytes() -> int:
    """Memory that can be taken without swapping, by the kernel's own estimate."""
    import psutil

    return int(psutil.virtual_memory().available)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def cgroup_folders(read: Callable[[str], str] = _read_text) -> list[tuple[Path, int]]:
    """Every group whose memory limit may apply to this process, innermost first, with its cgroup version (1 or 2).

    Args:
        read: the text of a file, empty where there is none.
    """
    folders: list[tuple[Path, int]] = []
    for line in read("/proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        roots: tuple[str, ...]
        if controllers == "":
            roots, version = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"), 2
        elif "memory" in controllers.split(","):
            roots, version = ("/sys/fs/cgroup/memory",), 1
        else:
            continue
        for root in roots:
            group = Path(root) / path.lstrip("/")
            while True:
                folders.append((group, version))
                if str(group) == root or not str(group).startswith(root):
                    break
                group = group.parent
    return folders


def cgroup_limit_bytes() -> int | None:
    """The tightest memory limit of the cgroups this process is in, or None."""
    limits = []
    for folder, version in cgroup_folders():
        text = _read_text(str(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))).strip()
        if text.isdigit() and int(text) < _NO_LIMIT_BYTES:
            limits.append(int(text))
    return min(limits, default=None)


def cpu_count() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1
