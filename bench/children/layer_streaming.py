"""Layer streaming as accelerate's disk offload and airllm do it: each layer is loaded into torch, run, and dropped.

The model is a Hugging Face folder of safetensors in their own dtype (OPT and Llama layouts are run as what they are:
their matrices, one after the other, with attention over the context left out, which can only be faster). Nothing of
edge is imported; the interpreter needs torch and safetensors. Protocol: see ``protocol``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from protocol import run, time_baseline
from safetensors import safe_open


class Model:
    """A folder's matrices by layer; embeddings and the output matrix are the last group."""

    def __init__(self, folder: Path) -> None:
        self.groups: dict[int, list[tuple[Path, str]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            if path.name.startswith("edge_"):
                continue  # predictors and heads of edge's own
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  not a dict
                    if len(file.get_slice(name).get_shape()) == 2 and "position" not in name:
                        found = re.search(r"\.layers\.(\d+)\.", name)
                        group = int(found.group(1)) if found else 1 << 30
                        self.groups.setdefault(group, []).append((path, name))
        if not self.groups:
            raise ValueError(f"{folder}: expected matrices in safetensors, found none")
        outer = self.groups.get(1 << 30, [])
        heads = [one for one in outer if "lm_head" in one[1]]
        # Of an embedding that is not the output matrix too, a row is enough.
        self.groups[1 << 30] = heads or outer

    def loaded(self) -> Iterator[list[torch.Tensor]]:
        """The matrices of one group after the other, dropped from the page cache behind."""
        for _, names in sorted(self.groups.items()):
            matrices = []
            for path, name in names:
                with safe_open(path, "pt") as file:
                    matrices.append(file.get_tensor(name).clone())
            yield matrices
            for path in {path for path, _ in names}:
                fd = os.open(path, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)

    @torch.no_grad()
    def forward(self, n_rows: int) -> None:
        """One pass of ``n_rows`` tokens that share every loading."""
        for matrices in self.loaded():
            for matrix in matrices:
                torch.nn.functional.linear(torch.randn(n_rows, matrix.shape[1]).to(matrix.dtype), matrix)


def main(request: dict[str, Any]) -> None:
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    time_baseline(request, lambda: Model(Path(request["model"])), torch.__version__)


if __name__ == "__main__":
    run(main)
