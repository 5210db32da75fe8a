"""``edge.sparsify``: which neurons of a model count little, measured on text, written into a new pack.

Training-free sparsity of feed-forward layers (flashload.sparsity): text passes through the engine to learn what each
neuron adds to the residual stream, thresholds are set so that the asked share of the neurons is left out, and text that
was held back says what that costs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import _edge
import numpy as np

from edge.loading import load_to_study
from edge.models import resolve_model
from flashload import sparsity
from flashload.errors import ArgumentError
from flashload.format import PackFile, is_pack
from flashload.machine import parse_bytes
from flashload.sparsity import Floats, Scores
from quant.formats.neuron import NEURON_FORMATS

if TYPE_CHECKING:
    from edge.engine import Engine

Progress = Callable[[int, int], None]

#: Of the text, this share at its end is held back to measure the loss on.
HELD_OUT_SHARE = 0.1
#: The least text that says anything: tokens to calibrate on, and tokens held back.
_LEAST_TOKENS, _LEAST_HELD_OUT = 256, 64
#: Tokens read on their own at a time, as many as a context of this length holds.
_WINDOW_TOKENS = 512
#: Of these many tokens the inputs are kept, to learn how large ``up`` is.
_INPUT_TOKENS = 256
_MOST_SHARE = 0.95
#: Rows of one pass at most (flashload.plan), which captured arrays have room for.
_MAX_ROWS = 128


@dataclass(frozen=True)
class Trial:
    """One bound, on text held back.

    Attributes:
        share: of the neurons, to be left out.
        skipped: share of them that was.
        layers: the same for each layer by neuron.
        perplexity: of the text; ``dense_perplexity`` without thresholds.
        ffn_bytes: read from memory for the feed-forward layers of one token; ``dense_ffn_bytes`` without thresholds.
    """

    share: float
    skipped: float
    layers: list[float]
    perplexity: float
    dense_perplexity: float
    ffn_bytes: int
    dense_ffn_bytes: int

    @property
    def loss(self) -> float:
        """What perplexity grew by, as a share of it."""
        return self.perplexity / self.dense_perplexity - 1


@dataclass(frozen=True)
class SparsityReport:
    """What :func:`sparsify` did.

    Attributes:
        path: the new pack.
        chosen: the share that the pack's thresholds are for.
        trials: that share and the others asked about, ascending.
        token_bytes: weights that one token reads from memory without thresholds, feed-forward layers included.
    """

    path: Path
    chosen: Trial
    trials: list[Trial]
    calibration_tokens: int
    held_out_tokens: int
    token_bytes: int
    file_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        rows = [asdict(trial) | {"loss": trial.loss} for trial in self.trials]
        return asdict(self) | {
            "path": str(self.path),
            "chosen": self.trials.index(self.chosen),
            "trials": rows,
        }


def sparsify(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    data: str,
    share: float = 0.5,
    also: Sequence[float] = (),
    memory: int | str | None = None,
    threads: int | None = None,
    weights: str = "keep",
    calibration_tokens: int = 8192,
    held_out_tokens: int = 4096,
    whole_process: bool = False,
    on_pack: Progress | None = None,
    on_tokens: Progress | None = None,
) -> SparsityReport:
    """Makes a pack whose least important neurons ``edge.load(..., sparsity="on")`` leaves out.

    The share is that of the whole model; how it is spread over layers follows from what each neuron adds. Nothing is
    trained and nothing but ``out`` is written.

    Args:
        model: a GGUF file, a Hugging Face folder, or a pack by neuron (``edge pack --neurons on``).
        out: the pack to write; it must not exist.
        data: text like that which the model will read. Its last tenth is held back to measure the loss.
        share: of the neurons of an average token, to be left out.
        also: shares to measure beside it.
        memory: ceiling as for :func:`edge.load`, this work included.
        calibration_tokens, held_out_tokens: the most that is read of either part of the text.
        on_tokens: called with (tokens done, tokens).

    Raises:
        ArgumentError: a share out of range, too little text, a model without dense layers, or ``out`` exists.
        BudgetError: the budget is too small.
        ModelFileError, DiskError: as of packing and loading.
    """
    source, out = resolve_model(model), Path(out)
    for one in (share, *also):
        if isinstance(one, bool) or not isinstance(one, (int, float)) or not 0 < one <= _MOST_SHARE:
            raise ArgumentError(f"share: expected more than 0 and at most {_MOST_SHARE}, found {one!r}")
    if out.exists():
        raise ArgumentError(f"{out}: expected a new file, found one; remove it or name another")
    with TemporaryDirectory(prefix=".edge-sparsify-", dir=_parent(out)) as folder:
        records = _by_neuron(source, Path(folder), weights, on_pack)
        with PackFile(records) as pack:
            work_bytes = _work_bytes(pack)
            limit = None if memory is None else max(1, parse_bytes(memory) - work_bytes)
            with load_to_study(
                records,
                memory=limit,
                threads=threads,
                context=min(_WINDOW_TOKENS, pack.config.max_positions),
                whole_process=whole_process,
            ) as engine:
                windows, held_out = _split(engine, data, calibration_tokens, held_out_tokens)
                study = _Study(engine, pack, windows, held_out, len({share, *also}), on_tokens)
                trials = [study.trial(one) for one in sorted({share, *also})]
                chosen = next(trial for trial in trials if trial.share == share)
                thresholds = study.thresholds(share)
            n_used, n_held = (sum(map(len, part)) for part in (windows, held_out))
            token_bytes = _token_bytes(pack)
        facts = asdict(chosen) | {"calibration_tokens": n_used, "held_out_tokens": n_held}
        sparsity.add_thresholds(records, out, thresholds, facts, on_pack)
    return SparsityReport(out, chosen, trials, n_used, n_held, token_bytes, out.stat().st_size)


def _parent(out: Path) -> Path:
    if not out.parent.is_dir():
        raise ArgumentError(f"{out}: expected a folder to write into, found none")
    return out.parent


def _by_neuron(source: Path, folder: Path, weights: str, on_pack: Progress | None) -> Path:
    """A pack with records of neurons: the source itself, or one made of it."""
    from flashload.pack import pack as pack_checkpoint

    if not is_pack(source):
        pack_checkpoint(source, folder / "records.edge", weights, on_pack, neurons="on")
        return folder / "records.edge"
    with PackFile(source) as pack:
        if not sparsity.neuron_layers_of(pack):
            raise ArgumentError(
                f"{source}: expected a pack by neuron, found matrices; give the checkpoint it was made of"
            )
    return source


def _work_bytes(pack: PackFile) -> int:
    """Most of what is held beside the engine: captured rows, kept inputs, scores, w and thresholds of every layer."""
    config = pack.config
    layers, inner, hidden = config.n_layers, config.intermediate_size, config.hidden_size
    captured = layers * _MAX_ROWS * (2 * inner + 2 * hidden + 4)
    kept = 2 * layers * (_INPUT_TOKENS + _WINDOW_TOKENS) * 2 * hidden
    # Weights are learnt before gates are captured; a layer's records are held whole meanwhile.
    records = max((e.bytes for e in pack.entries.values() if e.format in NEURON_FORMATS), default=0)
    scores = 4 * _MAX_ROWS * 4 * inner
    return max(captured, kept + 2 * records) + scores + layers * (16 << 10) * 16 + 8 * layers * inner


def _token_bytes(pack: PackFile) -> int:
    """Weights of all matrices that a token reads; of an embedding that is no head, one row, counted as nothing."""
    tied = pack.config.tied_head
    skipped = {"embed.position"} if tied else {"embed.weight", "embed.position"}
    parts = (".neurons.gates", ".predictor.", ".sparsity.", "medusa.")
    return sum(
        e.bytes
        for e in pack.entries.values()
        if e.rows > 1 and e.name not in skipped and not any(part in e.name for part in parts)
    )


def _split(
    engine: Engine, data: str, n_calibration: int, n_held_out: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Windows of the text, each with the model's begin token, and windows of its last tenth."""
    tokens = engine.tokenizer.encode(data, add_special_tokens=False)
    cut = len(tokens) - round(HELD_OUT_SHARE * len(tokens))
    used, held_out = tokens[:cut][:n_calibration], tokens[cut:][:n_held_out]
    if len(used) < _LEAST_TOKENS or len(held_out) < _LEAST_HELD_OUT:
        raise ArgumentError(
            f"data: expected at least {_LEAST_TOKENS} tokens and {_LEAST_HELD_OUT} in its last tenth, found "
            f"{len(used)} and {len(held_out)}; give a longer text"
        )
    begin = [] if engine.tokenizer.bos_id is None else [engine.tokenizer.bos_id]
    length = engine.plan.context - len(begin)

    def windows(ids: list[int]) -> list[list[int]]:
        return [begin + ids[first : first + length] for first in range(0, len(ids), length)]

    # A window of one token predicts nothing.
    return [w for w in windows(used) if len(w) > 1], [w for w in windows(held_out) if len(w) > 1]


def _first(windows: list[list[int]]) -> list[list[int]]:
    """As many windows as inputs are kept of; all are of one length, the last may be shorter."""
    return windows[: -(-_INPUT_TOKENS // len(windows[0]))]


class _Study:
    """What text says of a model's neurons.

    Args:
        windows, held_out: token ids, read one window at a time.
        n_trials: how often :meth:`trial` will be called, for the progress.
    """

    def __init__(
        self,
        engine: Engine,
        pack: PackFile,
        windows: list[list[int]],
        held_out: list[list[int]],
        n_trials: int,
        on_tokens: Progress | None,
    ) -> None:
        self._engine, self._pack, self._held_out = engine, pack, held_out
        self._activation = f"{pack.config.activation}_mul"
        self._isa = engine.stats()["isa"]
        self._layers = sparsity.neuron_layers_of(pack)
        self._on_tokens = on_tokens
        self._use(None)  # those of the pack, where it has some
        n_used, n_held = (sum(map(len, part)) for part in (windows, held_out))
        self._done, self._total = 0, n_used + n_held * (2 + n_trials) + sum(map(len, _first(windows)))
        self._weights = self._neuron_weights(windows)
        self._scores = self._scores_of(windows)
        self._found = self._scores_of(held_out)
        self._dense_perplexity = self._perplexity()

    def thresholds(self, share: float) -> dict[int, Floats]:
        """Of each layer by neuron, so that this share of all its scores is at most its threshold."""
        bound = sparsity.bound_of(self._scores, share)
        return {layer: sparsity.thresholds_for(bound, w) for layer, w in self._weights.items()}

    def trial(self, share: float) -> Trial:
        """The text held back with neurons left out."""
        config = self._pack.config
        bound = sparsity.bound_of(self._scores, share)
        every = np.zeros((config.n_layers, config.intermediate_size), np.float32)
        for layer, values in self.thresholds(share).items():
            every[layer] = values
        self._use(every)
        try:
            perplexity = self._perplexity()
        finally:
            self._use(None)
        layers = [self._found[layer].below(bound) for layer in self._layers]
        dense, sparse = self._ffn_bytes(layers)
        return Trial(
            share=share,
            skipped=sum(layers) / len(layers),
            layers=layers,
            perplexity=perplexity,
            dense_perplexity=self._dense_perplexity,
            ffn_bytes=sparse,
            dense_ffn_bytes=dense,
        )

    def _use(self, thresholds: Floats | None) -> None:
        with self._engine._serving():
            self._engine._open_core().set_neuron_thresholds(thresholds)

    def _ffn_bytes(self, skipped: list[float]) -> tuple[int, int]:
        """(all, with a share of each layer left out): rows that decide are read of every neuron."""
        dense = sparse = 0.0
        for layer, share in zip(self._layers, skipped, strict=True):
            records = self._pack.entries[f"layers.{layer}.neurons.records"]
            gates = self._pack.entries[f"layers.{layer}.neurons.gates"]
            dense += records.bytes
            sparse += gates.bytes + (1 - share) * (records.bytes - gates.bytes)
        return round(dense), round(sparse)

    def _perplexity(self) -> float:
        total, n = 0.0, 0
        for window in self._held_out:
            scores = [score for score in self._engine.score(window) if score is not None]
            total, n = total - sum(scores), n + len(scores)
            self._tick(len(window))
        return math.exp(total / n)

    def _neuron_weights(self, windows: list[list[int]]) -> dict[int, Floats]:
        config = self._pack.config
        kept: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        rows = self._engine.plan.max_rows
        inputs = np.empty((config.n_layers, rows, config.hidden_size), np.float16)
        norms = np.empty((config.n_layers, rows, 1), np.float32)
        for n in self._captured(_first(windows), inputs=inputs, norms=norms):
            kept.append(inputs[:, :n].copy())
            lengths.append(norms[:, :n, 0].copy())
        x, stream = np.concatenate(kept, axis=1), np.concatenate(lengths, axis=1)
        del inputs, kept
        return {
            layer: sparsity.neuron_weights(
                self._pack,
                layer,
                x[layer].astype(np.float32),
                # A begin token's stream may be a hundred times as long as any other's.
                float(np.median(stream[layer])),
            )
            for layer in self._layers
        }

    def _scores_of(self, windows: list[list[int]]) -> dict[int, Scores]:
        config = self._pack.config
        gates = np.empty((config.n_layers, self._engine.plan.max_rows, config.intermediate_size), np.float16)
        out = {layer: Scores() for layer in self._layers}
        for n in self._captured(windows, gates=gates):
            for layer in self._layers:
                flat = gates[layer, :n].astype(np.float32).reshape(-1)
                active = np.asarray(_edge.op(self._isa, self._activation, flat, None)).reshape(n, -1)
                out[layer].add(np.abs(active) * self._weights[layer])
        return out

    def _captured(self, windows: list[list[int]], **into: Any) -> Iterator[int]:
        """Passes the windows through the model; yields how many rows of the arrays are new."""
        for window in windows:
            with self._engine._serving() as sequence:
                sequence.set_tokens(window[:1])  # so that nothing of an earlier reading is known
                sequence.set_tokens(window)
                while sequence.n_pending:
                    n = sequence.capture(**into)
                    self._tick(n)
                    yield n

    def _tick(self, n: int) -> None:
        self._done = min(self._total, self._done + n)
        if self._on_tokens is not None:
            self._on_tokens(self._done, self._total)
