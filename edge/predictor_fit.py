"""Predictors of all layers, from captured rows to what a pack holds: a process of its own, which alone loads torch.

    python -m edge.predictor_fit FOLDER

FOLDER is a working folder whose rows are captured (edge.predictor_work). Says "LAYER RANK DONE" on standard output,
DONE in thousandths; a failure is one line on standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from edge.predictor_work import WorkFolder
from flashload.errors import EdgeError
from flashload.format import PackFile
from flashload.pack_predictor import StoredMatrix, StoredPredictor, gate_rows
from quant.formats import F32
from quant.predictor import OpenBits, Predictor, PredictorFigures, calibrate, fit_predictor, measure


@dataclass(frozen=True)
class Rows:
    """Captured tokens of one layer: inputs [N, D] in half floats, and which neurons were open [N, F]."""

    inputs: torch.Tensor
    open: OpenBits

    @classmethod
    def read(cls, inputs: Path, bits: Path, hidden: int, n_neurons: int) -> Rows:
        """From the files that captured blocks were appended to."""
        x = np.fromfile(inputs, np.float16).reshape(-1, hidden)
        packed = np.fromfile(bits, np.uint8).reshape(len(x), -1)
        return cls(torch.from_numpy(x), OpenBits(torch.from_numpy(packed), n_neurons))

    def tail(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[-n:], self.open[-n:]


@dataclass(frozen=True)
class FitSettings:
    """How every layer is fitted.

    Attributes:
        recall: share of the open neurons that the threshold lets through, on the last tenth of the training tokens.
        bits: "q8" or "q4", of the stored matrices.
    """

    recall: float = 0.95
    bits: str = "q8"
    steps: int = 300
    seed: int = 0


def as_stored(predictor: Predictor, bits: str) -> StoredPredictor:
    """Rounded to what a pack holds."""
    down, up = (StoredMatrix.of(side.numpy(), bits) for side in (predictor.down, predictor.up))
    return StoredPredictor(down, up, predictor.bias.numpy())


def as_read(stored: StoredPredictor) -> Predictor:
    """What the pack says."""
    down, up = (torch.from_numpy(np.array(side.values())) for side in (stored.down, stored.up))
    return Predictor(down, up, torch.from_numpy(np.array(stored.bias)))


def fit_rank(
    rows: Rows, gate: F32, rank: int, settings: FitSettings, layer: int, show: Callable[[float], None]
) -> StoredPredictor:
    """The layer's predictor of one rank; its threshold is that of the rounded matrices."""
    fitted = fit_predictor(
        rows.inputs,
        rows.open,
        rank,
        gate=torch.from_numpy(gate),
        recall=settings.recall,
        steps=settings.steps,
        seed=settings.seed + layer,
        show=show,
    )
    stored = as_stored(fitted, settings.bits)
    kept = max(1, len(rows.inputs) // 10)
    exact = calibrate(as_read(stored), *rows.tail(kept), settings.recall)
    return StoredPredictor(stored.down, stored.up, exact.bias.numpy())


def fit_layer(
    rows: Rows,
    gate: F32,
    first_rank: int,
    last_rank: int,
    record_bytes: int,
    settings: FitSettings,
    layer: int,
    show: Callable[[int, float], None] = lambda rank, done: None,
) -> StoredPredictor:
    """The layer's predictor; its rank doubles while that saves more bytes of records per token than it adds.

    Args:
        gate: the rows that decide which neurons are open, [F, D].
        first_rank, last_rank: the rank to begin with and the largest one; the same: no other is tried.
        record_bytes: of one neuron.
        show: told the rank and the done share of its fit.
    """
    kept = max(1, len(rows.inputs) // 10)

    def cost(stored: StoredPredictor) -> float:
        """Bytes that a token reads: the predictor, and the records of what it predicts."""
        share = measure(as_read(stored), *rows.tail(kept)).predicted
        return stored.bytes + share * len(gate) * record_bytes

    def fit(rank: int) -> StoredPredictor:
        return fit_rank(rows, gate, rank, settings, layer, lambda done: show(rank, done))

    best = fit(first_rank)
    while (rank := 2 * best.down.rows) <= last_rank:
        other = fit(rank)
        if cost(other) >= cost(best):
            break
        best = other
    return best


def figures(stored: StoredPredictor, rows: Rows) -> PredictorFigures:
    """Recall, precision and shares of the predictor as stored."""
    return measure(as_read(stored), rows.inputs, rows.open)


def fit_all(work: WorkFolder, show: Callable[[int, int, float], None]) -> None:
    """Fits every layer that is not done yet; show is told layer, rank and the done share of its fit.

    Raises:
        ValueError: a layer cannot be fitted: no neuron of it opens, or all do.
    """
    wanted = work.manifest["fit"]
    settings = FitSettings(wanted["recall"], wanted["bits"], wanted["steps"], wanted["seed"])
    if wanted["threads"]:
        torch.set_num_threads(wanted["threads"])
    with PackFile(work.base) as base:
        hidden, neurons = base.config.hidden_size, base.config.intermediate_size
        for layer in range(base.config.n_layers):
            if work.layer(layer) is not None:
                continue
            rows = Rows.read(*work.rows("fit", layer), hidden, neurons)
            try:
                stored = fit_layer(
                    rows,
                    gate_rows(base, layer),
                    wanted["first_ranks"][layer],
                    wanted["last_rank"],
                    base.entries[f"layers.{layer}.neurons.records"].chunk_bytes,
                    settings,
                    layer,
                    lambda rank, done, layer=layer: show(layer, rank, done),  # type: ignore[misc]
                )
            except ValueError as error:
                raise ValueError(f"layer {layer}: {error}; other text may open some") from error
            del rows
            held_out = Rows.read(*work.rows("held-out", layer), hidden, neurons)
            work.write_layer(layer, stored, asdict(figures(stored, held_out)))


def main(argv: list[str] | None = None) -> int:
    """Fits what a working folder asks for."""
    (folder,) = sys.argv[1:] if argv is None else argv
    try:
        fit_all(
            WorkFolder(Path(folder)),
            lambda layer, rank, done: print(layer, rank, round(1000 * done), flush=True),
        )
    except (EdgeError, ValueError, MemoryError) as error:
        print(str(error) or type(error).__name__, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
