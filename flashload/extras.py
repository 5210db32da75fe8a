"""What may lie beside a model's weights: neuron predictors and Medusa heads, in safetensors files of their own.

    edge_predictor.safetensors   layers.{i}.predictor.down.weight [r, D], .up.weight [F, r], .bias [F] of every
                                 dense layer (r a multiple of 32), and layers.{i}.neuron_order I32 [F] where neurons
                                 are to be packed in another order
    edge_medusa.safetensors      medusa.{k}.weight [D, D] and medusa.{k}.bias [D], k from 0

Predictors: "LLM in a flash", arXiv 2312.11514, section 3.1; heads: Medusa, arXiv 2401.10774, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from flashload.arch import DecoderConfig
from flashload.bind import BoundWeight, Slot
from flashload.errors import ModelFileError, UnsupportedModelError
from flashload.rawfile import RawFile
from flashload.read_safetensors import read_header
from flashload.tensors import Checkpoint, TensorInfo

PREDICTOR_FILE = "edge_predictor.safetensors"
MEDUSA_FILE = "edge_medusa.safetensors"
RANK_MULTIPLE = 32
MAX_RANK = 1 << 14
MAX_HEADS = 64

Order = npt.NDArray[np.int64]


class _ExtraFile(Checkpoint):
    """One safetensors file without a configuration."""

    kind = "hf"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.metadata = {}
        file = self._files[path] = RawFile(path)
        try:
            self.tensors = read_header(file)
        except BaseException:
            self.close()
            raise

    def describe(self) -> str:
        return "safetensors"

    def weight(self, slot: Slot) -> BoundWeight:
        """The tensor of a slot's name, its shape and type proven.

        Raises:
            ModelFileError: missing, or of another shape.
            UnsupportedModelError: a dtype that cannot be a weight.
        """
        info = self._shaped(slot.name, (slot.rows, slot.cols) if slot.is_matrix else (slot.cols,))
        if info.ggml_type < 0:
            raise UnsupportedModelError(
                f"{self.path}: {slot.name}: expected F32, F16 or BF16, found {info.type_name}"
            )
        return BoundWeight(slot, info)

    def _shaped(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{self.path}: expected tensor {name} of shape {shape}, found none")
        if info.shape != shape:
            raise ModelFileError(f"{self.path}: {name}: expected shape {shape}, found {info.shape}")
        return info

    def order(self, name: str, n: int) -> Order:
        """A permutation of n neurons, stored as I32."""
        info = self._shaped(name, (n,))
        if info.type_name != "I32":
            raise ModelFileError(f"{self.path}: {name}: expected I32, found {info.type_name}")
        data = self._files[self.path].read(info.offset, info.bytes, name)
        return as_order(np.frombuffer(data, "<i4"), n, f"{self.path}: {name}")


def as_order(values: npt.NDArray[Any], n: int, where: str) -> Order:
    """``values`` as a permutation of 0 .. n - 1: place -> neuron.

    Raises:
        ModelFileError: it is none.
    """
    whole = values.ndim == 1 and values.size == n and values.dtype.kind in "iu"
    if not whole or not np.array_equal(np.sort(values), np.arange(n)):
        raise ModelFileError(f"{where}: expected every neuron from 0 to {n - 1} once, found something else")
    return values.astype(np.int64)


@dataclass(frozen=True)
class ExtraWeight:
    """A bound weight, and the file that holds it."""

    file: Checkpoint
    weight: BoundWeight


class Extras:
    """The extra files of one model folder, opened; both may be absent. A context manager."""

    def __init__(self, path: Path) -> None:
        """Opens what lies in the folder ``path``; a file as ``path`` has no extras.

        Raises:
            ModelFileError: a file is malformed.
            DiskError: the drive fails.
        """
        self._stack = ExitStack()
        self._predictor: _ExtraFile | None = None
        self._medusa: _ExtraFile | None = None
        self._used: set[tuple[str, str]] = set()
        try:
            if (path / PREDICTOR_FILE).is_file():
                self._predictor = _ExtraFile(path / PREDICTOR_FILE)
                self._stack.enter_context(self._predictor)
            if (path / MEDUSA_FILE).is_file():
                self._medusa = _ExtraFile(path / MEDUSA_FILE)
                self._stack.enter_context(self._medusa)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Extras:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def has_predictor(self) -> bool:
        """Whether predictors lie beside the model."""
        return self._predictor is not None

    def _weights(self, file: _ExtraFile, slots: Iterable[Slot]) -> list[ExtraWeight]:
        out = [ExtraWeight(file, file.weight(slot)) for slot in slots]
        self._used |= {(file.path.name, extra.weight.slot.name) for extra in out}
        return out

    def predictor(self, config: DecoderConfig, layers: Iterable[int]) -> list[ExtraWeight]:
        """The predictor of every layer in ``layers``: down, up and bias of each in turn.

        Raises:
            ModelFileError: a tensor is missing or has another shape than ``config`` asks for.
            UnsupportedModelError: a model without ReLU, or a dtype that cannot be a weight.
        """
        file = self._predictor
        if file is None:
            return []
        if config.activation != "relu":
            raise UnsupportedModelError(
                f"{file.path}: expected predictors beside a ReLU model, found activation {config.activation}"
            )
        out: list[ExtraWeight] = []
        for i in layers:
            prefix = f"layers.{i}.predictor"
            down = file.tensors.get(f"{prefix}.down.weight")
            rank = down.shape[0] if down is not None else RANK_MULTIPLE
            if rank % RANK_MULTIPLE or not 0 < rank <= MAX_RANK:
                raise ModelFileError(
                    f"{file.path}: {prefix}.down.weight: expected a rank of a multiple of {RANK_MULTIPLE} up to "
                    f"{MAX_RANK}, found {rank}"
                )
            hidden, inner = config.hidden_size, config.intermediate_size
            out += self._weights(
                file,
                [
                    Slot(f"{prefix}.down.weight", "predictor.down.weight", rank, hidden, True, layer=i),
                    Slot(f"{prefix}.up.weight", "predictor.up.weight", inner, rank, True, layer=i),
                    Slot(f"{prefix}.bias", "predictor.bias", 1, inner, False, layer=i),
                ],
            )
        return out

    def orders(self, config: DecoderConfig, layers: Iterable[int]) -> dict[int, Order]:
        """The neuron orders the predictor file asks for, by layer."""
        file = self._predictor
        names = {i: f"layers.{i}.neuron_order" for i in layers}
        if file is None:
            return {}
        found = {i: name for i, name in names.items() if name in file.tensors}
        self._used |= {(file.path.name, name) for name in found.values()}
        return {i: file.order(name, config.intermediate_size) for i, name in found.items()}

    def medusa(self, config: DecoderConfig) -> list[ExtraWeight]:
        """Weight and bias of every head in turn.

        Raises:
            ModelFileError: none in the file, one missing, or of another shape.
            UnsupportedModelError: a dtype that cannot be a weight.
        """
        file = self._medusa
        if file is None:
            return []
        n_heads = sum(name.startswith("medusa.") and name.endswith(".weight") for name in file.tensors)
        if not 0 < n_heads <= MAX_HEADS:
            raise ModelFileError(f"{file.path}: expected 1 to {MAX_HEADS} heads, found {n_heads}")
        hidden = config.hidden_size
        return self._weights(
            file,
            (
                slot
                for k in range(n_heads)
                for slot in (
                    Slot(f"medusa.{k}.weight", "medusa.weight", hidden, hidden, True),
                    Slot(f"medusa.{k}.bias", "medusa.bias", 1, hidden, False),
                )
            ),
        )

    def ignored(self) -> list[str]:
        """Tensors of the files that nothing asked for, as file:name."""
        files = [file for file in (self._predictor, self._medusa) if file is not None]
        return sorted(
            f"{file.path.name}:{name}"
            for file in files
            for name in file.tensors
            if (file.path.name, name) not in self._used
        )
