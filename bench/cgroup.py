"""Commands inside a memory cgroup: a hard ceiling that counts anonymous memory and page cache alike.

Works on cgroup v1 (``/sys/fs/cgroup/memory``) and v2 (``/sys/fs/cgroup``); both need permission to make a
child group: root, or under v2 a delegated parent, as user services have. Kernel documentation:
admin-guide/cgroup-v1/memory.rst, admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import itertools
import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

V1_ROOT = Path("/sys/fs/cgroup/memory")
V2_ROOT = Path("/sys/fs/cgroup")

_numbers = itertools.count()


class CgroupError(RuntimeError):
    """No memory cgroup can be made here; the message says why."""


@dataclass(frozen=True)
class Finished:
    """A command that has ended.

    Attributes:
        returncode: exit status; minus the signal number when a signal ended it.
        timed_out: it was killed because its time was over.
        seconds: wall clock.
        cpu_seconds: user and system time of the command and its children.
        drive_read_bytes: fetched from the drive by the command and its children (page faults included).
        max_rss_bytes: largest resident set, mapped file pages included.
    """

    returncode: int
    timed_out: bool
    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: float
    drive_read_bytes: int
    max_rss_bytes: int


@dataclass(frozen=True)
class CgroupResult(Finished):
    """A command that ended inside a memory cgroup.

    Attributes:
        limit_bytes: the ceiling.
        peak_bytes: most that the group held at once, page cache included; it reaches the limit whenever a
            command reads more files than fit, so it is a sign of trouble only together with ``killed``.
        killed: the kernel's out-of-memory killer ended a process of the group.
    """

    limit_bytes: int
    peak_bytes: int
    killed: bool


def run_measured(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout_seconds: float | None = None,
) -> Finished:
    """Runs a command to its end and accounts for it. A missing program raises FileNotFoundError."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin = time.perf_counter()
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )
        expired = threading.Event()

        def stop() -> None:
            expired.set()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(timeout_seconds, stop) if timeout_seconds else None
        if timer:
            timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            stop()
            process.wait()
            raise
        finally:
            if timer:
                timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begin
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Finished(
        returncode=process.returncode,
        timed_out=expired.is_set(),
        stdout=texts[0],
        stderr=texts[1],
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        # 512 bytes is the unit of ru_inblock on Linux, whatever the drive's block is.
        drive_read_bytes=usage.ru_inblock * 512,
        max_rss_bytes=usage.ru_maxrss * 1024,
    )


def _number(path: Path, key: str | None = None) -> int:
    """The number a control file holds, or that after ``key`` in a file of "key number" lines; 0 if absent."""
    try:
        text = path.read_text()
    except OSError:
        return 0
    if key is None:
        return int(text)
    return next((int(line.split()[1]) for line in text.splitlines() if line.split()[0] == key), 0)


class MemoryGroup:
    """One child group with a ceiling; a context manager that removes it again.

    Args:
        parent: an existing group of the memory hierarchy.
        version: 1 or 2.
        limit_bytes: the ceiling; the kernel rounds it down to whole pages.

    Raises:
        OSError: not permitted, or the kernel refuses the limit.
    """

    def __init__(self, parent: Path, version: int, limit_bytes: int) -> None:
        self.path = parent / f"edge-bench-{os.getpid()}-{next(_numbers)}"
        self.version = version
        if version == 2 and "memory" not in (parent / "cgroup.subtree_control").read_text().split():
            (parent / "cgroup.subtree_control").write_text("+memory")
        self.path.mkdir()
        try:
            if version == 1:
                (self.path / "memory.limit_in_bytes").write_text(str(limit_bytes))
                # Without these a command could go on in swap, and be called a survivor.
                with suppress(OSError):
                    (self.path / "memory.swappiness").write_text("0")
                with suppress(OSError):
                    (self.path / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
            else:
                (self.path / "memory.max").write_text(str(limit_bytes))
                with suppress(OSError):
                    (self.path / "memory.swap.max").write_text("0")
        except OSError:
            self.remove()
            raise

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def procs(self) -> Path:
        return self.path / "cgroup.procs"

    def peak_bytes(self) -> int:
        return _number(self.path / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"))

    def oom_kills(self) -> int:
        return _number(
            self.path / ("memory.oom_control" if self.version == 1 else "memory.events"), "oom_kill"
        )

    def remove(self) -> None:
        """Kills what still runs in the group, then removes it."""
        for _ in range(50):
            with suppress(OSError):
                for pid in self.procs.read_text().split():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:  # busy until the kernel has let go of the last process
                time.sleep(0.02)


def _parents() -> list[tuple[Path, int]]:
    """Groups in which a child group may be made, most likely first."""
    if (V1_ROOT / "memory.limit_in_bytes").exists():
        return [(V1_ROOT, 1)]
    if not (V2_ROOT / "cgroup.controllers").exists():
        return []
    own = next(
        (line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")),
        "/",
    )
    path = V2_ROOT / own.lstrip("/")
    # A group that holds processes cannot give its children a memory limit, so its parent is tried first.
    found = [path.parent, path, V2_ROOT] if path != V2_ROOT else [V2_ROOT]
    return [(p, 2) for p in dict.fromkeys(found) if p == V2_ROOT or V2_ROOT in p.parents]


def make_group(limit_bytes: int) -> MemoryGroup:
    """A new child group with a ceiling.

    Raises:
        CgroupError: none can be made here.
    """
    reasons = []
    for parent, version in _parents():
        try:
            return MemoryGroup(parent, version, limit_bytes)
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror or error}")
    why = "; ".join(reasons) or "no memory cgroup is mounted under /sys/fs/cgroup"
    raise CgroupError(
        f"a memory cgroup cannot be made here ({why}): run as root, or with a delegated memory controller"
    )


def cgroup_refusal() -> str | None:
    """None where commands can be limited, else why not."""
    try:
        make_group(64 << 20).remove()
    except CgroupError as error:
        return str(error)
    return None


def run_in_cgroup(
    command: Sequence[str],
    memory_bytes: int,
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout_seconds: float | None = None,
) -> CgroupResult:
    """Runs a command that can never hold more than ``memory_bytes``, page cache included.

    The process joins the group before it becomes the command, so every page is counted from the first on.

    Raises:
        CgroupError: no group can be made here.
    """
    with make_group(memory_bytes) as group:
        enter = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.procs), *command]
        done = run_measured(enter, env=env, cwd=cwd, timeout_seconds=timeout_seconds)
        return CgroupResult(
            **vars(done),
            limit_bytes=memory_bytes // resource.getpagesize() * resource.getpagesize(),
            peak_bytes=group.peak_bytes(),
            killed=group.oom_kills() > 0,
        )
