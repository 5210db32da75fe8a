"""How much memory others leave: of the machine, and of every memory cgroup this process is in. Linux alone.

Kernel documentation: filesystems/proc.rst (MemAvailable), admin-guide/cgroup-v2.rst (memory.*),
admin-guide/cgroup-v1/memory.rst, accounting/psi.rst.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashload.machine import cgroup_folders

#: Limits above this are "no limit" in cgroup v1.
_NO_LIMIT_BYTES = 1 << 60
#: All tasks stood still for memory during this share of the last ten seconds.
_STALLED_PERCENT = 5.0

ReadFile = Callable[[str], str]


@dataclass(frozen=True)
class Room:
    """What one limit leaves.

    Attributes:
        left_bytes: what may still be taken; page cache that the kernel would drop for it is counted as free.
        limit_bytes: the limit.
        where: "machine", or the cgroup's folder.
        stalled: tasks have been waiting for memory lately.
    """

    left_bytes: int
    limit_bytes: int
    where: str
    stalled: bool = False


def read_file(path: str) -> str:
    """The text of a file. OSError where there is none."""
    return Path(path).read_text()


class RoomReader:
    """The places where a limit may be met.

    Args:
        read: reads a file; another one may simulate a machine.
    """

    def __init__(self, read: ReadFile = read_file) -> None:
        self._read = read
        self._groups = [(str(folder), version) for folder, version in cgroup_folders(self._text)]

    def tightest(self) -> Room | None:
        """The limit that leaves least now; None where nothing is known."""
        rooms = [self._machine(), *(self._group(folder, version) for folder, version in self._groups)]
        return min(
            (room for room in rooms if room is not None), key=lambda room: room.left_bytes, default=None
        )

    def _text(self, path: str) -> str:
        try:
            return self._read(path)
        except (OSError, KeyError):
            return ""

    def _number(self, path: str) -> int | None:
        """A limit or a usage; None for "max", and where there is no such file."""
        text = self._text(path).strip()
        return int(text) if text.isdigit() and int(text) < _NO_LIMIT_BYTES else None

    def _stalled(self, path: str) -> bool:
        match = re.search(r"^full avg10=([\d.]+)", self._text(path), re.MULTILINE)
        return match is not None and float(match[1]) >= _STALLED_PERCENT

    def _machine(self) -> Room | None:
        fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", self._text("/proc/meminfo"), re.MULTILINE))
        if "MemAvailable" not in fields:
            return None
        left, total = int(fields["MemAvailable"]) << 10, int(fields["MemTotal"]) << 10
        return Room(left, total, "machine", self._stalled("/proc/pressure/memory"))

    def _group(self, folder: str, version: int) -> Room | None:
        if version == 2:
            limits = [self._number(f"{folder}/{name}") for name in ("memory.max", "memory.high")]
            used, prefix = self._number(f"{folder}/memory.current"), ""
        else:
            limits = [self._number(f"{folder}/memory.limit_in_bytes")]
            used, prefix = self._number(f"{folder}/memory.usage_in_bytes"), "total_"
        known = [limit for limit in limits if limit is not None]
        if not known or used is None:
            return None
        stat = dict(re.findall(r"^(\w+) (\d+)$", self._text(f"{folder}/memory.stat"), re.MULTILINE))
        cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
        return Room(
            min(known) - used + cached, min(known), folder, self._stalled(f"{folder}/memory.pressure")
        )
