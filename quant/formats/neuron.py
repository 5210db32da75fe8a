"""Neuron records: gate row, up row and down column of one feed-forward neuron side by side (``cpp/kernels/neuron.h``).

"LLM in a flash" (arXiv 2312.11514, section 3.2) bundles them so that one read brings what one neuron needs. A row
holds ``hidden`` values, zero-padded to groups of 256 = 8 lanes of 32 values; in a group k = lane*32 + s*4 + b.

    dot row (gate, up)   q8   f16 d[8] (one per lane), then u8 q + 128 at s*32 + lane*4 + b       272 bytes
                         q4   f16 d[8], then at s'*32 + lane*4 + b, s' < 4: low nibble s = s',
                              high nibble s = s' + 4                                             144 bytes
                         f16  value lane*32 + j at j*8 + lane                                    512 bytes
    column row (down)    q8   f16 d[8], int8 q in order
                         q4   f16 d[8], per 32 values 16 bytes: low nibble j, high nibble 16 + j
                         f16  in order

Values are d * q; q4 stores q + 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quant.formats import WeightFormat, q4_0, q8_0
from quant.formats._tiles import F32, U8, halves

GROUP_VALUES = 256
MAX_PARTS = 3
_LANES, _LANE_VALUES = 8, 32


@dataclass(frozen=True)
class NeuronFormat:
    """Sizes of one row format.

    Attributes:
        group_bytes: bytes of 256 values.
        ggml_type: checkpoint block type whose rows keep every bit as dot rows (hidden a multiple of 32).
    """

    name: str
    group_bytes: int
    ggml_type: int


NEURON_FORMATS: dict[WeightFormat, NeuronFormat] = {
    WeightFormat.NEURON_F16: NeuronFormat("neuron_f16", 512, 1),
    WeightFormat.NEURON_Q8: NeuronFormat("neuron_q8", 272, 8),
    WeightFormat.NEURON_Q4: NeuronFormat("neuron_q4", 144, 2),
}


def row_bytes(weight_format: WeightFormat, hidden: int) -> int:
    """Bytes of one row (one part of a record) of ``hidden`` values."""
    return -(-hidden // GROUP_VALUES) * NEURON_FORMATS[weight_format].group_bytes


def _padded(values: F32) -> F32:
    """[n, hidden] -> [n, hidden rounded up to 256], zeros behind."""
    out: F32 = np.zeros((len(values), -(-values.shape[1] // GROUP_VALUES) * GROUP_VALUES), np.float32)
    out[:, : values.shape[1]] = values
    return out


def _quantize(weight_format: WeightFormat, values: F32) -> U8:
    """[n, k] f32 -> checkpoint blocks [n, blocks, bytes]."""
    if weight_format is WeightFormat.NEURON_Q8:
        return q8_0.quantize(values).reshape(len(values), -1, q8_0.BLOCK_BYTES)
    return q4_0.quantize(values).reshape(len(values), -1, q4_0.BLOCK_BYTES)


def _split_blocks(weight_format: WeightFormat, blocks: U8) -> tuple[U8, U8]:
    """Scales [n, groups, 16] as bytes and quants [n, groups, 8, 32] as stored: q + 128 or q + 8, unsigned."""
    rows = len(blocks)
    by_group = blocks.reshape(rows, -1, _LANES, blocks.shape[-1])
    packed = by_group[..., 2:]
    if weight_format is WeightFormat.NEURON_Q8:
        quants = packed ^ np.uint8(0x80)
    else:
        quants = np.concatenate([packed & 15, packed >> 4], axis=-1)
    return np.ascontiguousarray(by_group[..., :2]).reshape(rows, -1, 16), quants


def _dot_order(quants: U8) -> U8:
    """[..., lane, 32] -> [..., 256] at s*32 + lane*4 + b; its own inverse is :func:`_lane_order`."""
    split = quants.reshape(*quants.shape[:-1], 8, 4)
    return np.ascontiguousarray(split.swapaxes(-3, -2)).reshape(*quants.shape[:-2], GROUP_VALUES)


def _lane_order(data: U8) -> U8:
    split = data.reshape(*data.shape[:-1], 8, _LANES, 4)
    return np.ascontiguousarray(split.swapaxes(-3, -2)).reshape(*data.shape[:-1], _LANES, _LANE_VALUES)


def _dot_rows(weight_format: WeightFormat, blocks: U8) -> U8:
    scales, quants = _split_blocks(weight_format, blocks)
    data = _dot_order(quants)
    if weight_format is WeightFormat.NEURON_Q4:
        data = data[..., :128] | (data[..., 128:] << np.uint8(4))
    return np.concatenate([scales, data], axis=-1).reshape(len(blocks), -1)


def _column_rows(weight_format: WeightFormat, blocks: U8) -> U8:
    scales, quants = _split_blocks(weight_format, blocks)
    if weight_format is WeightFormat.NEURON_Q8:
        data = quants ^ np.uint8(0x80)
    else:
        data = quants[..., :16] | (quants[..., 16:] << np.uint8(4))
    return np.concatenate([scales, data.reshape(*data.shape[:2], -1)], axis=-1).reshape(len(blocks), -1)


def _lanes_last(values: npt.NDArray[np.float16]) -> U8:
    """f16 [n, k] in order -> dot rows."""
    lanes = values.reshape(len(values), -1, _LANES, _LANE_VALUES).swapaxes(-1, -2)
    return np.ascontiguousarray(lanes).reshape(len(values), -1).view(np.uint8)


def encode_dot(weight_format: WeightFormat, values: F32) -> U8:
    """[n, hidden] f32 -> dot rows [n, row_bytes], rounded as the tile formats are."""
    x = _padded(values)
    if weight_format is WeightFormat.NEURON_F16:
        with np.errstate(over="ignore"):
            return _lanes_last(x.astype("<f2"))
    return _dot_rows(weight_format, _quantize(weight_format, x))


def encode_column(weight_format: WeightFormat, values: F32) -> U8:
    """[n, hidden] f32, one down column per row -> column rows [n, row_bytes]."""
    x = _padded(values)
    if weight_format is WeightFormat.NEURON_F16:
        with np.errstate(over="ignore"):
            return x.astype("<f2").view(np.uint8)
    return _column_rows(weight_format, _quantize(weight_format, x))


def from_blocks(weight_format: WeightFormat, raw: bytes, rows: int, hidden: int, column: bool) -> U8:
    """Raw checkpoint rows of the format's own block type -> rows of records; every value keeps its bits."""
    data = np.frombuffer(raw, np.uint8).reshape(rows, -1)
    padded = -(-hidden // GROUP_VALUES) * GROUP_VALUES
    if weight_format is WeightFormat.NEURON_F16:
        halfs = np.zeros((rows, padded), "<f2")
        halfs[:, :hidden] = data.view("<f2")
        return halfs.view(np.uint8) if column else _lanes_last(halfs)
    blocks = _quantize(weight_format, np.zeros((rows, padded), np.float32))
    blocks[:, : hidden // _LANE_VALUES] = data.reshape(rows, -1, blocks.shape[-1])
    return (_column_rows if column else _dot_rows)(weight_format, blocks)


def record_finite(weight_format: WeightFormat, data: U8) -> bool:
    """Whether no value of freshly rounded rows [n, row_bytes] is infinite or NaN."""
    if weight_format is not WeightFormat.NEURON_F16:
        data = data.reshape(len(data), -1, NEURON_FORMATS[weight_format].group_bytes)[..., :16]
    return bool(((np.ascontiguousarray(data).view("<u2") & 0x7C00) != 0x7C00).all())


def _split(weight_format: WeightFormat, data: U8) -> tuple[F32, U8]:
    """Rows [n, row_bytes] -> scales [n, groups, 8, 1], the bytes behind them [n, groups, bytes]."""
    groups = data.reshape(len(data), -1, NEURON_FORMATS[weight_format].group_bytes)
    return halves(groups[..., :16])[..., None], np.ascontiguousarray(groups[..., 16:])


def _values(weight_format: WeightFormat, scales: F32, stored: U8, hidden: int) -> F32:
    """d * q of quants [n, groups, 8, 32] as :func:`_blocks` gives them -> [n, hidden]."""
    offset = 128 if weight_format is WeightFormat.NEURON_Q8 else 8
    with np.errstate(invalid="ignore"):
        values = scales * (stored.astype(np.float32) - np.float32(offset))
    out: F32 = values.reshape(len(values), -1)[:, :hidden]
    return out


def decode_dot(weight_format: WeightFormat, data: U8, hidden: int) -> F32:
    """Dot rows [n, row_bytes] -> [n, hidden] f32."""
    if weight_format is WeightFormat.NEURON_F16:
        values = halves(data).reshape(len(data), -1, _LANE_VALUES, _LANES).swapaxes(-1, -2)
        return np.ascontiguousarray(values).reshape(len(data), -1)[:, :hidden]
    scales, packed = _split(weight_format, data)
    if weight_format is WeightFormat.NEURON_Q4:
        packed = np.concatenate([packed & 15, packed >> 4], axis=-1)
    return _values(weight_format, scales, _lane_order(packed), hidden)


def decode_column(weight_format: WeightFormat, data: U8, hidden: int) -> F32:
    """Column rows [n, row_bytes] -> [n, hidden] f32."""
    if weight_format is WeightFormat.NEURON_F16:
        return halves(data).reshape(len(data), -1)[:, :hidden]
    scales, packed = _split(weight_format, data)
    if weight_format is WeightFormat.NEURON_Q8:
        quants = (packed ^ np.uint8(0x80)).reshape(*packed.shape[:2], _LANES, _LANE_VALUES)
    else:
        pairs = packed.reshape(*packed.shape[:2], _LANES, _LANE_VALUES // 2)
        quants = np.concatenate([pairs & 15, pairs >> 4], axis=-1)
    return _values(weight_format, scales, quants, hidden)
