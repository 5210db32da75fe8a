"""Products of torch's own formats on a CPU. The interpreter needs torch and numpy. Protocol: see ``products``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from products import Matrices, block_codes, copies_of, filled, normal_weights, serve

_INT4_BLOCK = 32


class Tensors:
    """Copies of a matrix, and what multiplies a row with one of them."""

    def __init__(
        self,
        request: dict[str, Any],
        weight_bytes: int,
        copy: Callable[[], Any],
        product: Callable[[torch.Tensor, Any], torch.Tensor],
        dequantised: Callable[[int], np.ndarray],
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.weight_bytes = weight_bytes
        self.copies = copies_of(request, weight_bytes)
        self._held = [copy() for _ in range(self.copies)]
        self._product, self._dtype = product, dtype
        self.reference = dequantised

    def inputs(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).to(self._dtype)

    @torch.inference_mode()
    def multiply(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        product = self._product
        return [product(inputs, one) for one in self._held]

    def products(self, outputs: list[torch.Tensor]) -> list[np.ndarray]:
        return [one.float().numpy() for one in outputs]


def bf16(request: dict[str, Any]) -> Matrices:
    """``torch.nn.functional.linear``."""
    weights = torch.from_numpy(filled(normal_weights(request), request)).to(torch.bfloat16)
    return Tensors(
        request,
        2 * weights.numel(),
        weights.clone,
        torch.nn.functional.linear,
        lambda n: weights[:n].double().numpy(),
    )


def int8_rows(request: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Codes [rows, cols] and a float scale per row."""
    codes, scales = block_codes(normal_weights(request), request["cols"], 127)
    return filled(codes[:, 0], request), filled(scales[:, 0], request)


def int8_weights(request: dict[str, Any]) -> Matrices:
    """``torch._weight_int8pack_mm``: int8 weights, a bf16 scale per row, bf16 rows."""
    codes, scales = int8_rows(request)
    rounded = torch.from_numpy(scales).to(torch.bfloat16)
    held = torch.from_numpy(codes)
    return Tensors(
        request,
        codes.nbytes + 2 * len(scales),
        held.clone,
        lambda x, one: torch._weight_int8pack_mm(x, one, rounded),
        lambda n: codes[:n] * rounded[:n].double().numpy()[:, None],
    )


def int8_dynamic(request: dict[str, Any]) -> Matrices:
    """``torch.ao.nn.quantized.dynamic.Linear``: int8 weights by row, rows quantised to eight bits as they come."""
    from torch.ao.nn.quantized.dynamic import Linear

    codes, scales = int8_rows(request)
    rows, cols = codes.shape
    quantised = torch._make_per_channel_quantized_tensor(
        torch.from_numpy(codes), torch.from_numpy(scales).double(), torch.zeros(rows, dtype=torch.long), 0
    )

    def copy() -> Linear:
        made = Linear(cols, rows, bias_=False)
        made.set_weight_bias(quantised, None)
        return made

    return Tensors(
        request,
        codes.nbytes + 4 * rows,
        copy,
        lambda x, one: one(x),
        lambda n: codes[:n] * scales[:n].astype(np.float64)[:, None],
        torch.float32,
    )


def int4_weights(request: dict[str, Any]) -> Matrices:
    """``torch._weight_int4pack_mm_for_cpu``: four-bit weights, a bf16 scale and zero per 32 of a row, bf16 rows."""
    first, first_scales = block_codes(normal_weights(request), _INT4_BLOCK, 7)
    codes, scales = filled(first, request), filled(first_scales, request)
    unsigned = torch.from_numpy(codes.reshape(len(codes), -1).astype(np.int32) + 8)
    # [blocks, rows, 2]: a weight is (code - 8) * scale + zero.
    rounded = torch.from_numpy(scales.T.copy()).to(torch.bfloat16)
    both = torch.stack([rounded, torch.zeros_like(rounded)], dim=2).contiguous()
    exact = rounded.T.double().numpy()
    return Tensors(
        request,
        codes.size // 2 + 2 * both.numel(),
        lambda: torch._convert_weight_to_int4pack_for_cpu(unsigned, 1),
        lambda x, one: torch._weight_int4pack_mm_for_cpu(x, one, _INT4_BLOCK, both),
        lambda n: (codes[:n] * exact[:n, :, None]).reshape(n, -1),
    )


FORMATS = {
    "bf16": bf16,
    "int8-weights": int8_weights,
    "int8-dynamic": int8_dynamic,
    "int4-weights": int4_weights,
}


def main() -> None:
    torch.set_num_threads(json.loads(sys.argv[1])["threads"])
    serve(torch.__version__, lambda request: FORMATS[request["format"]](request))


if __name__ == "__main__":
    main()
