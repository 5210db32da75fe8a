"""Products of onnxruntime's MatMulNBits (four bits, blocks of 32). The interpreter needs onnxruntime, onnx and numpy.

The operator: onnxruntime's ContribOperators.md, ``com.microsoft.MatMulNBits``. Protocol: see ``products``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from products import block_codes, copies_of, filled, normal_weights, serve

_BLOCK = 32
#: ``accuracy_level`` by format: what activations may be rounded to, 0 nothing, 4 int8.
LEVELS = {"int4-acc0": 0, "int4-acc4": 4}


def graph(packed: np.ndarray, scales: np.ndarray, cols: int, copies: int, level: int) -> bytes:
    """A model of ``copies`` products of one input x [m, cols].

    Copy i begins i rows later than the first: of weights that are equal the runtime keeps one.
    """
    rows = len(packed)
    nodes, held, outputs = [], [], []
    for i in range(copies):
        held += [
            numpy_helper.from_array(np.roll(packed, -i, axis=0), f"weights{i}"),
            numpy_helper.from_array(np.roll(scales, -i, axis=0), f"scales{i}"),
        ]
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                ["x", f"weights{i}", f"scales{i}"],
                [f"y{i}"],
                domain="com.microsoft",
                K=cols,
                N=rows,
                bits=4,
                block_size=_BLOCK,
                accuracy_level=level,
            )
        )
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["m", rows]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", cols])
    made = helper.make_graph(nodes, "products", [x], outputs, held)
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=sets, ir_version=10).SerializeToString()


class Session:
    """All copies in one graph, so that a pass is one call."""

    def __init__(self, request: dict[str, Any], threads: int) -> None:
        self._codes, self._scales = block_codes(normal_weights(request), _BLOCK, 7)
        codes = (self._codes + 8).astype(np.uint8)  # the operator's zero where none is given
        packed = filled(codes[..., 0::2] | (codes[..., 1::2] << 4), request)
        scales = filled(self._scales, request)
        self.weight_bytes = packed.nbytes + scales.nbytes
        self.copies = copies_of(request, self.weight_bytes)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        model = graph(packed, scales, request["cols"], self.copies, LEVELS[request["format"]])
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def reference(self, n_rows: int) -> np.ndarray:
        return (self._codes[:n_rows] * self._scales[:n_rows, :, None].astype(np.float64)).reshape(n_rows, -1)

    def inputs(self, x: np.ndarray) -> dict[str, np.ndarray]:
        return {"x": x}

    def multiply(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self._session.run(None, inputs)

    def products(self, outputs: list[np.ndarray]) -> list[np.ndarray]:
        return [np.roll(one, i, axis=1) for i, one in enumerate(outputs)]


def main() -> None:
    onnxruntime.set_default_logger_severity(3)
    threads = json.loads(sys.argv[1])["threads"]
    serve(onnxruntime.__version__, lambda request: Session(request, threads))


if __name__ == "__main__":
    main()
