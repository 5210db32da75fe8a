"""The seam to other people's model files: whatever the container, a :class:`Checkpoint`."""

from __future__ import annotations

from pathlib import Path

from flashload.errors import UnsupportedModelError
from flashload.read_gguf import GgufCheckpoint
from flashload.read_safetensors import HfCheckpoint
from flashload.tensors import PICKLE_REFUSED, Checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a GGUF file (one shard opens all) or a Hugging Face folder.

    Raises:
        ModelFileError: missing, malformed or incomplete.
        UnsupportedModelError: a container edge does not read (pickle above all), or a quantised folder.
        DiskError: the drive fails.
    """
    path = Path(path)
    if path.is_dir():
        return HfCheckpoint(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise UnsupportedModelError(f"{path}: {PICKLE_REFUSED}")
    if path.suffix == ".safetensors":
        raise UnsupportedModelError(
            f"{path}: expected the folder that holds it together with config.json, found the weights alone"
        )
    return GgufCheckpoint(path)
