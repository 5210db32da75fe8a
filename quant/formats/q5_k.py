"""Q5_K: 256 values in 8 runs of 32; value = d * scale * q - dmin * min, q five bits, scale and min six.

Block, 176 bytes: f16 d, f16 dmin, 12 bytes of packed scales and mins, 32 bytes of fifth bits (bit j of a byte: run
j), 128 bytes of nibbles (32 for each pair of runs, the even one low).
"""

from __future__ import annotations

import numpy as np

from quant.formats._fields import Field, FieldFormat
from quant.formats._tiles import F32, U8, halves


def scales_and_mins(packed: U8) -> tuple[F32, F32]:
    """[..., 12] packed bytes -> scales [..., 8], mins [..., 8]: numbers 4-7 have their top bits above 0-3."""
    first, second, low = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scale = np.concatenate([first & 63, (low & 15) | (first >> 6 << 4)], axis=-1)
    minimum = np.concatenate([second & 63, (low >> 4) | (second >> 6 << 4)], axis=-1)
    return scale.astype(np.float32), minimum.astype(np.float32)


def _values(blocks: U8) -> F32:
    d, dmin = halves(blocks[..., 0:2]), halves(blocks[..., 2:4])
    scale, minimum = scales_and_mins(blocks[..., 4:16])
    high, low = blocks[..., 16:48], blocks[..., 48:176]
    q = np.stack(
        [
            (low[..., 32 * (j // 2) : 32 * (j // 2) + 32] >> (4 * (j % 2)) & 15) | ((high >> j & 1) << 4)
            for j in range(8)
        ],
        axis=-2,
    )
    values: F32 = (d * scale)[..., None] * q.astype(np.float32) - (dmin * minimum)[..., None]
    return values.reshape(*blocks.shape[:-1], 256)


FORMAT = FieldFormat(
    256, [Field(0, 2, 2), Field(2, 2, 2), Field(4, 12, 4), Field(16, 32, 4), Field(48, 128, 4)], _values
)
