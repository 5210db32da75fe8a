"""IQ4_NL and IQ4_XS: four bits choose one of 16 uneven steps; value = d * step, or d * (scale - 32) * step.

IQ4_NL, 32 values in 18 bytes: f16 d, 16 bytes of nibbles (the low ones first). IQ4_XS, 256 values in 136 bytes: f16
d, u16 of two top scale bits for each run of 32, 4 bytes of low scale nibbles, then the nibbles of every run.
"""

from __future__ import annotations

import numpy as np

from quant.formats._fields import Field, FieldFormat
from quant.formats._tiles import F32, U8, halves

# ggml-common.h, kvalues_iq4nl.
STEPS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)


def chosen(table: F32, packed: U8) -> F32:
    """[..., 16] bytes of nibbles -> [..., 32] entries of a table of 16."""
    values: F32 = table[np.concatenate([packed & 15, packed >> 4], axis=-1)]
    return values


def _nl_values(blocks: U8) -> F32:
    return halves(blocks[..., :2]) * chosen(STEPS, blocks[..., 2:])


def _xs_values(blocks: U8) -> F32:
    runs = np.arange(8, dtype=np.uint8)
    low = np.repeat(blocks[..., 4:8], 2, axis=-1) >> (4 * (runs % 2)) & 15
    top = np.repeat(blocks[..., 2:4], 4, axis=-1) >> (2 * (runs % 4)) & 3
    scale = (low | (top << 4)).astype(np.float32) - np.float32(32)
    steps = chosen(STEPS, blocks[..., 8:].reshape(*blocks.shape[:-1], 8, 16))
    values: F32 = (halves(blocks[..., :2]) * scale)[..., None] * steps
    return values.reshape(*blocks.shape[:-1], 256)


NL = FieldFormat(32, [Field(0, 2, 2), Field(2, 16, 4)], _nl_values)
XS = FieldFormat(256, [Field(0, 2, 2), Field(2, 2, 2), Field(4, 4, 4), Field(8, 128, 4)], _xs_values)
