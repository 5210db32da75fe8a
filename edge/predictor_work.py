"""The folder a predictor is trained in: captured rows and finished layers, so that a run cut short goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.calibration import Captured
from flashload.errors import DiskError
from flashload.neuron_use import USE_TOKENS
from flashload.pack_predictor import StoredMatrix, StoredPredictor
from quant.formats import WeightFormat

_MANIFEST, _CAPTURED = "manifest.json", "captured.json"


class WorkFolder:
    """Files of one training run, valid for one manifest: what it was asked for.

    Attributes:
        base: where the model packed by neuron, without predictors, belongs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = path / "base.edge"

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Makes the folder; one that another manifest left is emptied.

        Raises:
            DiskError: it cannot be made.
        """
        wanted = json.dumps(manifest, sort_keys=True)
        try:
            if self.path.is_dir() and self._read(_MANIFEST) != json.loads(wanted):
                self.remove()
            self.path.mkdir(parents=True, exist_ok=True)
            self._write(_MANIFEST, wanted)
        except OSError as error:
            raise self._error(error) from error

    @property
    def manifest(self) -> dict[str, Any]:
        """What :meth:`begin` was told."""
        found = self._read(_MANIFEST)
        return found if isinstance(found, dict) else {}

    def _error(self, error: OSError) -> DiskError:
        return DiskError(f"{self.path}: working files cannot be written: {error.strerror or error}")

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_bytes())
        except (OSError, ValueError):
            return None

    def _write(self, name: str, text: str) -> None:
        temporary = self.path / f"{name}.tmp"
        temporary.write_text(text)
        os.replace(temporary, self.path / name)

    def rows(self, part: str, layer: int) -> tuple[Path, Path]:
        """Files of one layer's inputs and open bits; part is "fit" or "held-out"."""
        return self.path / f"{part}-{layer}.inputs", self.path / f"{part}-{layer}.open"

    def open_rows(self, part: str, layer: int, n_neurons: int) -> NDArray[np.bool_]:
        """[tokens, neurons]: which neurons were open for the first tokens of the text, as many as tell their use."""
        row_bytes = -(-n_neurons // 8)
        packed = np.fromfile(self.rows(part, layer)[1], np.uint8, USE_TOKENS * row_bytes).reshape(
            -1, row_bytes
        )
        return np.unpackbits(packed, axis=1, count=n_neurons, bitorder="little").astype(bool)

    def write_rows(self, part: str, blocks: Iterable[Captured], n_layers: int, n_bytes: int) -> None:
        """Appends captured blocks to the files of every layer.

        Args:
            n_bytes: what they will take; refused at once when the drive has less.

        Raises:
            DiskError: the drive is full or fails.
        """
        try:
            free = shutil.disk_usage(self.path).free
            if n_bytes > free:
                raise DiskError(f"{self.path}: captured rows need {n_bytes} bytes, the drive has {free} free")
            with ExitStack() as stack:
                files = [
                    [stack.enter_context(open(path, "wb")) for path in self.rows(part, layer)]
                    for layer in range(n_layers)
                ]
                for block in blocks:
                    for layer, (inputs, is_open) in enumerate(files):
                        inputs.write(block.inputs[layer].tobytes())
                        is_open.write(block.open[layer].tobytes())
        except OSError as error:
            raise self._error(error) from error

    def finish_capture(self, facts: Mapping[str, Any]) -> None:
        """Says that all rows are there, and what was measured on the way."""
        try:
            self._write(_CAPTURED, json.dumps(facts))
        except OSError as error:
            raise self._error(error) from error

    @property
    def captured(self) -> dict[str, Any] | None:
        """What :meth:`finish_capture` was told; None before."""
        facts = self._read(_CAPTURED)
        return facts if isinstance(facts, dict) else None

    def write_layer(self, layer: int, predictor: StoredPredictor, figures: Mapping[str, float]) -> None:
        """Keeps a finished layer and what was measured of it."""
        arrays: dict[str, Any] = {"bias": predictor.bias, "figures": json.dumps(dict(figures))}
        for side in ("down", "up"):
            matrix: StoredMatrix = getattr(predictor, side)
            arrays[side] = np.frombuffer(matrix.tiles, np.uint8)
            arrays[f"{side}.shape"] = np.array([int(matrix.format), matrix.rows, matrix.cols])
        temporary = self.path / f"layer-{layer}.tmp.npz"
        try:
            np.savez(temporary, **arrays)
            os.replace(temporary, self.path / f"layer-{layer}.npz")
        except OSError as error:
            raise self._error(error) from error

    def layer(self, layer: int) -> tuple[StoredPredictor, dict[str, float]] | None:
        """A finished layer, or None."""
        path = self.path / f"layer-{layer}.npz"
        if not path.is_file():
            return None

        def matrix(side: str) -> StoredMatrix:
            code, rows, cols = (int(value) for value in arrays[f"{side}.shape"])
            return StoredMatrix(WeightFormat(code), rows, cols, arrays[side].tobytes())

        with np.load(path, allow_pickle=False) as arrays:
            predictor = StoredPredictor(matrix("down"), matrix("up"), arrays["bias"])
            return predictor, json.loads(str(arrays["figures"]))

    def remove(self) -> None:
        """Removes the folder; what a user put there stays, and the folder with it."""
        patterns = (
            "*.inputs",
            "*.open",
            "layer-*.npz",
            "base.edge",
            ".base.edge.*.tmp",
            "*.json",
            "*.json.tmp",
        )
        for pattern in patterns:
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()
