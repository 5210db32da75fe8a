"""Random quantised weights, made as blocks: the packed quants are random bits, only the scales are chosen.

Every type is centred (the mean weight is zero): with a mean different from zero, a random model's activations
drift into one direction, all tokens look alike and a router sends every one of them to the same experts.
Block layouts: ggml (``ggml-common.h``), the same as in ``quant.formats``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class BlockType:
    """How one block of a type is made.

    Attributes:
        name: GGUF type name in lower case.
        values: weights per block.
        block_bytes: bytes per block.
        unit_std: standard deviation of the weights when the block's scale field is 1.
        finish: writes the scale fields into random blocks [n, block_bytes] for a wanted standard deviation.
    """

    name: str
    values: int
    block_bytes: int
    unit_std: float
    finish: Callable[[Bytes, float], None]

    def row_bytes(self, cols: int) -> int:
        if cols % self.values:
            raise ValueError(f"{self.name}: rows of {cols} values, expected a multiple of {self.values}")
        return cols // self.values * self.block_bytes


def _scales(blocks: Bytes, at: int, scale: float, signed: bool = False) -> npt.NDArray[np.intp]:
    """Overwrites the f16 at byte ``at`` with +-25 % around ``scale``; returns the table row of each block.

    The random byte that was there picks the row.
    """
    rows = blocks[:, at].astype(np.intp)
    blocks[:, at : at + 2] = _table(scale, signed)[rows]
    return rows


def _table(scale: float, signed: bool) -> Bytes:
    steps = np.linspace(0.75, 1.25, 256) * scale
    if signed:
        steps[::2] *= -1
    return steps.astype("<f2").view(np.uint8).reshape(256, 2)


def _q4_0(blocks: Bytes, std: float) -> None:
    # Codes run from -8 to 7, mean -0.5: signs that alternate from block to block cancel it, as in real files,
    # where the scale takes the sign of the block's largest weight.
    _scales(blocks, 0, std / Q4_0.unit_std, signed=True)


def _q8_0(blocks: Bytes, std: float) -> None:
    codes = blocks[:, 2:].view(np.int8)
    np.maximum(codes, -127, out=codes)  # real files never hold -128
    _scales(blocks, 0, std / Q8_0.unit_std)


def _q4_k(blocks: Bytes, std: float) -> None:
    # min code = scale code and dmin = 7.5 d, so each sub-block is d * scale * (q - 7.5).
    scale = std / Q4_K.unit_std
    rows = _scales(blocks, 0, scale)
    blocks[:, 2:4] = _table(7.5 * scale, False)[rows]
    blocks[:, 8:12] = blocks[:, 4:8]
    low = blocks[:, 12:16] & 15
    blocks[:, 12:16] = low | (low << 4)


def _q6_k(blocks: Bytes, std: float) -> None:
    _scales(blocks, 208, std / Q6_K.unit_std)


def _q2_k(blocks: Bytes, std: float) -> None:
    scale = std / Q2_K.unit_std
    low = blocks[:, :16] & 15
    blocks[:, :16] = low | (low << 4)
    rows = _scales(blocks, 80, scale)
    blocks[:, 82:84] = _table(1.5 * scale, False)[rows]


def _q3_k(blocks: Bytes, std: float) -> None:
    _scales(blocks, 108, std / Q3_K.unit_std)


def _f16(blocks: Bytes, std: float) -> None:
    # Random sign and mantissa, one exponent: +-[1, 2) * 2^e has mean square 7/3 * 4^e.
    exponent = int(np.clip(np.round(np.log2(std / (7 / 3) ** 0.5)), -14, 15)) + 15
    bits = blocks.view("<u2")
    bits &= 0x83FF
    bits |= exponent << 10


def _f32(blocks: Bytes, std: float) -> None:
    exponent = int(np.clip(np.round(np.log2(std / (7 / 3) ** 0.5)), -100, 100)) + 127
    bits = blocks.view("<u4")
    bits &= 0x807FFFFF
    bits |= exponent << 23


def _code_square(n_codes: int, centre: float) -> float:
    codes = np.arange(n_codes)
    return float(np.mean((codes - centre) ** 2))


Q4_0 = BlockType("q4_0", 32, 18, _code_square(16, 8) ** 0.5, _q4_0)
Q8_0 = BlockType("q8_0", 32, 34, _code_square(256, 128) ** 0.5, _q8_0)
Q4_K = BlockType("q4_k", 256, 144, (_code_square(64, 0) * _code_square(16, 7.5)) ** 0.5, _q4_k)
Q6_K = BlockType("q6_k", 256, 210, (_code_square(256, 128) * _code_square(64, 32)) ** 0.5, _q6_k)
Q2_K = BlockType("q2_k", 256, 84, (_code_square(16, 0) * _code_square(4, 1.5)) ** 0.5, _q2_k)
Q3_K = BlockType("q3_k", 256, 110, (_code_square(64, 32) * _code_square(8, 4)) ** 0.5, _q3_k)
F16 = BlockType("f16", 1, 2, 1.0, _f16)
F32 = BlockType("f32", 1, 4, 1.0, _f32)

TYPES = {t.name: t for t in (F32, F16, Q8_0, Q4_0, Q4_K, Q6_K, Q3_K, Q2_K)}


def random_blocks(kind: BlockType, n_blocks: int, std: float, bits: np.random.SFC64) -> Bytes:
    """``n_blocks`` blocks of weights with standard deviation ``std``; uint8 [n_blocks, block_bytes]."""
    n_bytes = n_blocks * kind.block_bytes
    raw = np.asarray(bits.random_raw((n_bytes + 7) // 8)).view(np.uint8)[:n_bytes]
    blocks = raw.reshape(n_blocks, kind.block_bytes)
    kind.finish(blocks, std)
    return blocks


def write_blocks(out: IO[bytes], kind: BlockType, n_blocks: int, std: float, bits: np.random.SFC64) -> None:
    """Streams ``n_blocks`` random blocks to a file; what is held at once stays below a megabyte or two."""
    step = (1 << 20) // kind.block_bytes
    while n_blocks:
        blocks = random_blocks(kind, min(step, n_blocks), std, bits)
        out.write(blocks.data)
        n_blocks -= len(blocks)
