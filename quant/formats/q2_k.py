"""Q2_K: 256 values in 16 groups of 16; value = d * scale * q - dmin * min, q two bits, scale and min four.

Block, 84 bytes: 16 bytes of scale (low) and min (high nibble), 64 bytes of q, f16 d, f16 dmin. 32 bytes of q hold
four runs of 32 values, two bits of each in a byte.
"""

from __future__ import annotations

import numpy as np

from quant.formats._fields import Field, FieldFormat
from quant.formats._tiles import F32, U8, halves


def two_bits(packed: U8) -> U8:
    """[..., 64] bytes -> [..., 256] numbers of two bits."""
    runs = [packed[..., 32 * (j // 4) : 32 * (j // 4) + 32] >> (2 * (j % 4)) & 3 for j in range(8)]
    return np.concatenate(runs, axis=-1)


def _values(blocks: U8) -> F32:
    d, dmin = halves(blocks[..., 80:82]), halves(blocks[..., 82:84])
    scale, minimum = blocks[..., :16] & 15, blocks[..., :16] >> 4
    q = two_bits(blocks[..., 16:80]).reshape(*blocks.shape[:-1], 16, 16).astype(np.float32)
    step = (d * scale.astype(np.float32))[..., None]
    values: F32 = step * q - (dmin * minimum.astype(np.float32))[..., None]
    return values.reshape(*blocks.shape[:-1], 256)


FORMAT = FieldFormat(256, [Field(80, 2, 2), Field(82, 2, 2), Field(0, 16, 4), Field(16, 64, 4)], _values)
