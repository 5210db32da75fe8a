"""Instructions that a product of 16 rows by 32 values takes on aarch64, counted under an emulator: counts, not speed.

A count is the difference between a tile of 1024 values a row and one of 512, divided by 16, so that what a call does
once cancels out. The program is ``kernel_selftest`` of the C++ core, built as ``tests/test_isa_qemu.py`` builds it.
Which of the instructions run side by side is the machine's affair.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

EMULATOR = "qemu-aarch64-static"
SHORT, LONG = 512, 1024


def executed(program: Path, isa: str, weight_format: str, m: int, k: int) -> int:
    """Instructions from start to exit: with one of them a block, the emulator logs a line for each."""
    command = [EMULATOR, "-cpu", "max", "-singlestep", "-d", "exec,nochain", "-D", "/dev/stderr"]
    command += [str(program), "gemv", isa, weight_format, str(m), str(k)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[-5:])}: {done.stdout.decode().strip() or done.returncode}")
    return done.stderr.count(b"\n")


def per_block(program: Path, isa: str, weight_format: str, m: int) -> float:
    counts = [executed(program, isa, weight_format, m, k) for k in (SHORT, LONG)]
    return (counts[1] - counts[0]) / ((LONG - SHORT) / 32)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench instructions", description=__doc__)
    parser.add_argument("program", type=Path, help="kernel_selftest, built for aarch64 and linked statically")
    parser.add_argument("--isas", default="neon,neon_dotprod,neon_i8mm")
    parser.add_argument("--formats", default="q4_0,q8_0,q4_k,q6_k,q2_k")
    parser.add_argument("--rows", default="1,4,8,16", help="activation rows")
    options = parser.parse_args()
    if shutil.which(EMULATOR) is None:
        print(f"needs {EMULATOR}", file=sys.stderr)
        return 2
    rows = [int(m) for m in options.rows.split(",")]
    print(f"{'format':8} {'ISA':14}" + "".join(f"{f'M = {m}':>8}" for m in rows))
    for weight_format in options.formats.split(","):
        for isa in options.isas.split(","):
            counts = [per_block(options.program, isa, weight_format, m) for m in rows]
            print(f"{weight_format:8} {isa:14}" + "".join(f"{count:8.0f}" for count in counts), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
