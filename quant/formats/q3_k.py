"""Q3_K: 256 values in 16 groups of 16; value = d * (scale - 32) * (q - 4), q three bits, scale six.

Block, 110 bytes: 32 bytes of third bits (bit j of a byte: run j of 32 values), 64 bytes of low bits as in Q2_K, 12
bytes of scales (byte g % 8 holds the low nibbles of groups g and g + 8, byte 8 + g % 4 the top bits), f16 d.
"""

from __future__ import annotations

import numpy as np

from quant.formats._fields import Field, FieldFormat
from quant.formats._tiles import F32, U8, halves
from quant.formats.q2_k import two_bits


def _values(blocks: U8) -> F32:
    d, packed = halves(blocks[..., 108:110]), blocks[..., 96:108]
    low = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], axis=-1)
    top = np.concatenate([packed[..., 8:] >> (2 * i) & 3 for i in range(4)], axis=-1)
    scale = (low | (top << 4)).astype(np.float32) - np.float32(32)
    high = np.concatenate([blocks[..., :32] >> j & 1 for j in range(8)], axis=-1)
    q = (two_bits(blocks[..., 32:96]) | (high << 2)).astype(np.float32) - np.float32(4)
    values: F32 = (d * scale)[..., None] * q.reshape(*blocks.shape[:-1], 16, 16)
    return values.reshape(*blocks.shape[:-1], 256)


FORMAT = FieldFormat(256, [Field(108, 2, 2), Field(96, 12, 4), Field(32, 64, 4), Field(0, 32, 4)], _values)
