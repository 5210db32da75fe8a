"""Random but valid blocks of every GGUF type: any bits, with scales that stay small and finite."""

from __future__ import annotations

import gguf
import numpy as np

# Byte offsets of the f16 scales of a block.
_SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def random_blocks(
    kind: gguf.GGMLQuantizationType, shape: tuple[int, ...], rng: np.random.Generator, scale: float = 1e-3
) -> np.ndarray:
    """[..., k] values as raw bytes [..., bytes of a row]."""
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    n_blocks = int(np.prod(shape)) // block_values
    blocks = rng.integers(0, 256, (n_blocks, block_bytes), dtype=np.uint8)
    sizes = (scale * rng.uniform(0.5, 1.5, n_blocks)).astype(np.float16)
    for offset in _SCALES.get(kind.name, ()):
        blocks[:, offset : offset + 2] = sizes.view(np.uint8).reshape(-1, 2)
    if kind.name == "IQ1_M":  # the f16 scale is spread over the top nibbles of four words
        words = blocks[:, 48:56].view(np.uint16)
        nibbles = np.stack([sizes.view(np.uint16) >> (4 * i) & 15 for i in range(4)], axis=-1)
        words[:] = (words & 0x0FFF) | (nibbles << 12).astype(np.uint16)
    if kind.name == "MXFP4":
        blocks[:, 0] = rng.integers(112, 120, n_blocks)
    if kind.name == "NVFP4":
        blocks[:, :4] = rng.integers(8, 64, (n_blocks, 4))
    if kind.name in ("F32", "F16", "BF16"):
        values = (scale * rng.normal(size=(n_blocks, 1))).astype(np.float32)
        return gguf.quants.quantize(values, kind).view(np.uint8).reshape(*shape[:-1], -1)
    return blocks.reshape(*shape[:-1], shape[-1] // block_values * block_bytes)
