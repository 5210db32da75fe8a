"""Calls that need no loaded model: plan and pack."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edge.models import resolve_model
from edge.planning import ModelPlan, plan
from flashload.errors import ArgumentError

if TYPE_CHECKING:
    from flashload.pack import PackReport

__all__ = ["ModelPlan", "pack", "plan"]


def pack(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    weights: str = "keep",
    neurons: str = "auto",
    neuron_order: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PackReport:
    """Converts a GGUF file or a Hugging Face folder to a pack.

    Args:
        weights: "keep" leaves block types with a native kernel bit-exact; "q8" and "q4" requantise.
        neurons: "on" packs dense feed-forward layers as one record per neuron, which a model with ReLU (or with
            thresholds, :func:`edge.sparsify`) gains from; "auto" does so when predictors lie beside the weights, "off"
            never does.
        neuron_order: an .npz file with arrays ``layers.{i}.neuron_order``: the order of the records.
        destination: a new file, or a pack, which is replaced once the new one is complete.
        progress: called with (bytes done, bytes).

    Raises:
        ArgumentError: the destination is a folder, or a file that is no pack.
        ModelFileError, UnsupportedModelError, DiskError.
    """
    from flashload.format import is_pack
    from flashload.pack import pack as pack_checkpoint

    path = resolve_model(source)
    destination = Path(destination)
    if destination.exists() and destination.resolve() != path.resolve() and not is_pack(destination):
        raise ArgumentError(f"{destination}: expected a new file or a pack to replace, found something else")
    return pack_checkpoint(
        path,
        destination,
        weights=weights,
        neurons=neurons,
        neuron_order=None if neuron_order is None else Path(neuron_order),
        progress=progress,
    )
