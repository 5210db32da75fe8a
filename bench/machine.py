"""What a figure depends on: the machine, the commit, the memory bus and the drive at that minute.

``python -m bench machine [FILE]`` prints them; the other benchmarks call the functions between their runs,
because on a shared machine both rates change from minute to minute.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_ISA_FLAGS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _first(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def facts() -> dict[str, Any]:
    """Machine, software, commit, date (UTC) and load at this moment."""
    flags = set((_first("/proc/cpuinfo", "flags") or _first("/proc/cpuinfo", "Features")).split())
    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else ""),
        "cpu": _first("/proc/cpuinfo", "model name") or platform.machine(),
        "cpus": os.cpu_count(),
        "isa": [flag for flag in _ISA_FLAGS if flag in flags],
        "memory_bytes": int((_first("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) * 1024,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def busy_seconds() -> float:
    """CPU seconds all processes have used since boot, time taken by the host (steal) included."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def measure_bandwidth(threads: int, n_bytes: int = 1 << 30, passes: int = 9) -> dict[str, float]:
    """Sequential read rate of main memory in bytes per second, ``threads`` readers: median and best pass.

    The reader is numpy's maximum over int32, one vector load and one compare per 64 bytes: on AVX-512 it was
    level with a hand-written load loop (both 40-41 GB/s where `np.dot` gave 34, one thread).
    """
    import numpy as np

    raw = np.ones(n_bytes + 4096, np.uint8)
    start = -raw.ctypes.data % 4096
    parts = np.array_split(raw[start : start + n_bytes].view(np.int32), threads)
    rates = []
    for _ in range(passes + 1):
        workers = [threading.Thread(target=part.max) for part in parts]
        begin = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        rates.append(n_bytes / (time.perf_counter() - begin))
    return {"median": median(rates[1:]), "best": max(rates[1:])}


def read_bandwidth(threads: int) -> dict[str, float]:
    """:func:`measure_bandwidth` in a process of its own, so that its buffer is gone afterwards."""
    command = [sys.executable, "-m", "bench.machine", "--bandwidth", str(threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    rates: dict[str, float] = json.loads(done.stdout)
    return rates


def drop_cache(path: Path) -> str:
    """Empties the page cache of ``path``; returns how: the whole machine's cache (as root), or this file's.

    Model weights must be cold, and pages that another process read are not charged to a memory cgroup.
    """
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return "drop_caches"
    except OSError:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return "posix_fadvise"


def cached_share(path: Path) -> float:
    """Share of a file's pages that are in the page cache (mincore(2))."""
    import ctypes

    size = path.stat().st_size
    pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as view,
    ):
        import numpy as np

        array = np.frombuffer(view, np.uint8)
        state = (ctypes.c_ubyte * pages)()
        code = libc.mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(size), state)
        del array
        if code:
            raise OSError(ctypes.get_errno(), f"mincore of {path} failed")
    return sum(b & 1 for b in bytes(state)) / pages


def _aligned_buffers(count: int, n_bytes: int) -> list[memoryview]:
    """Page-aligned buffers, in huge pages where the kernel has them.

    A request of 1 MiB into 4 KiB pages is 256 pieces, more than a virtio queue takes at once: on such a drive
    huge pages gave 3.5 GB/s where ordinary ones gave 1.2.
    """
    import ctypes

    huge = 2 << 20
    memory = mmap.mmap(-1, count * n_bytes + huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % huge
    view = memoryview(memory)
    return [view[start + i * n_bytes : start + (i + 1) * n_bytes] for i in range(count)]


def drive_rate(
    path: Path, n_bytes: int = 1 << 30, threads: int = 8, request_bytes: int = 1 << 20
) -> dict[str, Any]:
    """Sequential read rate of the drive under ``path``: ``threads`` readers, each one request at a time.

    Returns ``bytes_per_second``, ``bytes``, ``direct`` (False where the file system refuses O_DIRECT: then
    the file is dropped from the page cache first, and the rate includes the kernel's copy).
    """
    # A small file is read in one request.
    request_bytes = min(request_bytes, path.stat().st_size // 4096 * 4096)
    if request_bytes == 0:
        raise ValueError(f"{path}: smaller than one page of 4096 bytes")
    size = min(n_bytes, path.stat().st_size) // request_bytes * request_bytes
    buffers = _aligned_buffers(threads, request_bytes)
    direct = True
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            os.preadv(fd, [buffers[0][:4096]], 0)
        except OSError:
            os.close(fd)
            raise
    except OSError:
        direct = False
        drop_cache(path)
        fd = os.open(path, os.O_RDONLY)
    offsets = iter(range(0, size, request_bytes))
    lock = threading.Lock()
    errors: list[BaseException] = []

    def read(buffer: memoryview) -> None:
        try:
            while True:
                with lock:
                    offset = next(offsets, None)
                if offset is None:
                    return
                got = os.preadv(fd, [buffer], offset)
                if got != request_bytes:
                    raise OSError(f"{path}: read {got} of {request_bytes} bytes at {offset}")
        except OSError as error:
            errors.append(error)

    workers = [threading.Thread(target=read, args=(buffer,)) for buffer in buffers]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - begin
    os.close(fd)
    if errors:
        raise errors[0]
    return {"bytes_per_second": size / seconds, "bytes": size, "direct": direct}


def read_ahead_kib(path: Path) -> int | None:
    """Kernel read-ahead of the drive under ``path`` in KiB; None where the file system does not say."""
    device = path.stat().st_dev
    try:
        return int(Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text())
    except (OSError, ValueError):
        return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench machine", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="a large file on the drive to measure")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--bandwidth", type=int, metavar="THREADS", help="print only the memory read rate, as JSON"
    )
    args = parser.parse_args(argv)
    if args.bandwidth:
        print(json.dumps(measure_bandwidth(args.bandwidth)))
        return 0
    report = facts()
    report["read_bandwidth"] = {str(n): measure_bandwidth(n) for n in sorted({1, args.threads})}
    if args.file:
        report["drive"] = drive_rate(args.file) | {"read_ahead_kib": read_ahead_kib(args.file)}
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
