"""Products of ggml, the library below llama.cpp, as llama-cpp-python ships it; through its C functions.

Weights lie where llama.cpp would put them: in the first buffer type of the CPU that takes the product (ggml's own
re-arranged ones come first), and a pass is one graph of a product per copy, as a token of a model is one graph.
Protocol: see ``products``.
"""

from __future__ import annotations

import ctypes
import json
import sys
import weakref
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint, c_void_p
from typing import Any

import llama_cpp
import numpy as np
from products import copies_of, serve

#: ``enum ggml_type`` (ggml.h).
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14}
_CPU_DEVICE, _SUCCESS = 0, 0


class InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Ggml:
    """The functions that are used: name, result, arguments (ggml.h, ggml-backend.h, ggml-cpu.h)."""

    _FUNCTIONS = (
        ("ggml_init", c_void_p, (InitParams,)),
        ("ggml_free", None, (c_void_p,)),
        ("ggml_tensor_overhead", c_size_t, ()),
        ("ggml_graph_overhead_custom", c_size_t, (c_size_t, c_bool)),
        ("ggml_new_tensor_2d", c_void_p, (c_void_p, c_int, c_int64, c_int64)),
        ("ggml_mul_mat", c_void_p, (c_void_p, c_void_p, c_void_p)),
        ("ggml_new_graph_custom", c_void_p, (c_void_p, c_size_t, c_bool)),
        ("ggml_build_forward_expand", None, (c_void_p, c_void_p)),
        ("ggml_backend_alloc_ctx_tensors_from_buft", c_void_p, (c_void_p, c_void_p)),
        ("ggml_backend_buffer_free", None, (c_void_p,)),
        ("ggml_backend_buft_name", c_char_p, (c_void_p,)),
        ("ggml_backend_dev_buffer_type", c_void_p, (c_void_p,)),
        ("ggml_backend_dev_backend_reg", c_void_p, (c_void_p,)),
        ("ggml_backend_dev_supports_op", c_bool, (c_void_p, c_void_p)),
        ("ggml_backend_reg_get_proc_address", c_void_p, (c_void_p, c_char_p)),
        ("ggml_backend_tensor_set", None, (c_void_p, c_void_p, c_size_t, c_size_t)),
        ("ggml_backend_tensor_get", None, (c_void_p, c_void_p, c_size_t, c_size_t)),
        ("ggml_backend_graph_compute", c_int, (c_void_p, c_void_p)),
        ("ggml_nbytes", c_size_t, (c_void_p,)),
        ("ggml_backend_dev_by_type", c_void_p, (c_uint,)),
        ("ggml_backend_cpu_init", c_void_p, ()),
        ("ggml_backend_cpu_set_n_threads", None, (c_void_p, c_int)),
    )

    def __init__(self, threads: int) -> None:
        # Through llama.cpp's own handle: a library opened by another of its names would be a second one, with tables
        # of its own that nobody has filled.
        library = llama_cpp.llama_cpp._lib
        for name, result, arguments in self._FUNCTIONS:
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        llama_cpp.llama_backend_init()
        self.device = self.backend_dev_by_type(_CPU_DEVICE)
        self.backend = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.backend, threads)

    def buffer_types(self) -> list[int]:
        """Where weights may lie, in the order in which llama.cpp tries them; the plain one is last."""
        register = self.backend_dev_backend_reg(self.device)
        address = self.backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
        found = []
        if address:
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.device)
            while extra and extra[len(found)]:
                found.append(extra[len(found)])
        return [*found, self.backend_dev_buffer_type(self.device)]

    def context(self, n_tensors: int) -> int:
        """Room for the descriptions of tensors and of one graph of them."""
        size = n_tensors * self.tensor_overhead() + self.graph_overhead_custom(n_tensors, False)
        return self.init(InitParams(size, None, True))

    def release(self, context: int, buffer: int) -> None:
        if buffer:
            self.backend_buffer_free(buffer)
        self.free(context)


class Graph:
    """One pass over all copies for rows x [m, cols]."""

    def __init__(self, ggml: Ggml, weights: list[int], x: np.ndarray, rows: int) -> None:
        self._ggml, self._shape = ggml, (len(x), rows)
        n = len(weights)
        context = ggml.context(2 * n + 1)
        given = ggml.new_tensor_2d(context, TYPES["f32"], x.shape[1], len(x))
        self.graph = ggml.new_graph_custom(context, 2 * n, False)
        self._outputs = [ggml.mul_mat(context, one, given) for one in weights]
        for one in self._outputs:
            ggml.build_forward_expand(self.graph, one)
        buffer = ggml.backend_alloc_ctx_tensors_from_buft(context, ggml.backend_dev_buffer_type(ggml.device))
        weakref.finalize(self, ggml.release, context, buffer)
        ggml.backend_tensor_set(given, x.ctypes.data, 0, x.nbytes)

    def run(self) -> None:
        code = self._ggml.backend_graph_compute(self._ggml.backend, self.graph)
        if code != _SUCCESS:
            raise RuntimeError(f"ggml_backend_graph_compute returned {code}")

    def outputs(self) -> list[np.ndarray]:
        found = []
        for one in self._outputs:
            made = np.empty(self._shape, np.float32)
            self._ggml.backend_tensor_get(one, made.ctypes.data, 0, made.nbytes)
            found.append(made)
        return found


class Weights:
    """Copies of a matrix of blocks."""

    def __init__(self, request: dict[str, Any], ggml: Ggml) -> None:
        self._ggml, self._rows = ggml, request["rows"]
        blocks = np.fromfile(request["blocks"], np.uint8)
        self.weight_bytes = blocks.nbytes
        self.copies = copies_of(request, self.weight_bytes)
        self._reference = np.load(request["reference"])
        for place in ggml.buffer_types():
            self._tensors = self._lay(place, TYPES[request["format"]], request["cols"])
            if self._tensors:
                break
        for one in self._tensors:
            ggml.backend_tensor_set(one, blocks.ctypes.data, 0, blocks.nbytes)

    def _lay(self, place: int, kind: int, cols: int) -> list[int]:
        """The copies' tensors in a buffer of this type; none where the device does not multiply from there."""
        ggml = self._ggml
        context = ggml.context(self.copies)
        made = [ggml.new_tensor_2d(context, kind, cols, self._rows) for _ in range(self.copies)]
        buffer = ggml.backend_alloc_ctx_tensors_from_buft(context, place)
        scratch = ggml.context(2)
        product = ggml.mul_mat(scratch, made[0], ggml.new_tensor_2d(scratch, TYPES["f32"], cols, 512))
        fits = bool(buffer) and ggml.backend_dev_supports_op(ggml.device, product)
        ggml.free(scratch)
        if fits:
            weakref.finalize(self, ggml.release, context, buffer)
            return made
        ggml.release(context, buffer)
        return []

    def reference(self, n_rows: int) -> np.ndarray:
        return self._reference[:n_rows]

    def inputs(self, x: np.ndarray) -> Graph:
        return Graph(self._ggml, self._tensors, np.ascontiguousarray(x), self._rows)

    def multiply(self, inputs: Graph) -> Graph:
        inputs.run()
        return inputs

    def products(self, outputs: Graph) -> list[np.ndarray]:
        return outputs.outputs()


def main() -> None:
    ggml = Ggml(json.loads(sys.argv[1])["threads"])
    serve(llama_cpp.__version__, lambda request: Weights(request, ggml))


if __name__ == "__main__":
    main()
