"""Products of edge's tile formats as its engine makes them. Protocol: see ``products``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from products import copies_of, serve

#: Rows that a pass of the engine takes of a prompt.
_MOST_ROWS = 128


class Tiles:
    """Blocks of a checkpoint, re-arranged."""

    def __init__(self, request: dict[str, Any], threads: int) -> None:
        import _edge

        from quant.formats import WeightFormat, from_blocks

        code, rows, cols = WeightFormat[request["format"].upper()], request["rows"], request["cols"]
        tiles = from_blocks(code, Path(request["blocks"]).read_bytes(), rows, cols)
        self.weight_bytes = len(tiles)
        self.copies = copies_of(request, self.weight_bytes)
        self._rows = np.load(request["reference"])
        self._bench = _edge.ProductBench(
            _edge.default_isa(), int(code), tiles, rows, cols, self.copies, threads
        )
        self.read = self._bench.read
        self._set: np.ndarray | None = None

    def reference(self, n_rows: int) -> np.ndarray:
        return self._rows[:n_rows]

    def inputs(self, x: np.ndarray) -> np.ndarray:
        return x

    def multiply(self, inputs: np.ndarray) -> None:
        if self._set is not inputs:
            self._bench.set_rows(inputs, _MOST_ROWS)
            self._set = inputs
        self._bench.multiply()

    def products(self, outputs: None) -> list[np.ndarray]:
        return [self._bench.product(copy) for copy in range(self.copies)]


def main() -> None:
    import edge

    threads = json.loads(sys.argv[1])["threads"]
    serve(getattr(edge, "__version__", "unknown"), lambda request: Tiles(request, threads))


if __name__ == "__main__":
    main()
