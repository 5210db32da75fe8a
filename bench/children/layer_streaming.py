"""Layer streaming as accelerate's disk offload and airllm do it: each layer is loaded into torch, run, and dropped.

The model is a Hugging Face folder of safetensors in their own dtype (OPT and Llama layouts are run as what they are:
their matrices, one after the other, with attention over the context left out, which can only be faster). Nothing of
edge is imported; the interpreter needs torch and safetensors. Protocol: see ``llama_cpp_decode``.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


def emit(**event: object) -> None:
    print(json.dumps(event), flush=True)


def read_bytes() -> int:
    """Bytes this process had fetched from the drive so far."""
    with open("/proc/self/io") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


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


def main() -> None:
    request: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    start = time.perf_counter()
    model = Model(Path(request["model"]))
    emit(
        event="loaded",
        seconds=time.perf_counter() - start,
        version=torch.__version__,
        read_bytes=read_bytes(),
    )
    start = time.perf_counter()
    model.forward(request["prompt_tokens"])
    prefill_seconds = time.perf_counter() - start
    emit(event="warm")
    before, start = read_bytes(), time.perf_counter()
    for n in range(request["tokens"]):
        model.forward(1)
        emit(event="token", n=n + 1)
    rate = request["tokens"] / (time.perf_counter() - start)
    emit(
        event="result",
        decode_tokens_per_second=rate,
        decode_tokens_per_second_outside=rate,
        prefill_tokens_per_second=request["prompt_tokens"] / prefill_seconds,
        read_bytes_per_token=(read_bytes() - before) / request["tokens"],
        tokens=[],
        info="",
    )
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        emit(event="error", message=f"{type(error).__name__}: {error}")
        sys.exit(1)
