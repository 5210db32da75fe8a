"""MXFP4: 32 values of E2M1 under one power of two (OCP Microscaling Formats v1.0, 5.3.3 and 5.4.1).

Block, 17 bytes: exponent e (E8M0, bias 127), 16 bytes of nibbles (the low ones first). Kept whole: the values are
doubled, the scale is 2^(e - 128).
"""

from __future__ import annotations

import numpy as np

from quant.formats._fields import Field, FieldFormat
from quant.formats._tiles import F32, U8
from quant.formats.iq4 import chosen

DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.float32)


def _values(blocks: U8) -> F32:
    scale = np.ldexp(np.float32(1), blocks[..., :1].astype(np.int32) - 128)
    values: F32 = scale.astype(np.float32) * chosen(DOUBLED, blocks[..., 1:])
    return values


FORMAT = FieldFormat(32, [Field(0, 1, 1), Field(1, 16, 4)], _values)
