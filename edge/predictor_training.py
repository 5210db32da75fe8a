"""Training neuron predictors for any model with dense ReLU layers that the engine runs.

"LLM in a flash" (arXiv 2312.11514, section 3.1). The engine itself runs the text, inside the budget, and shows what
every feed-forward layer saw; each layer is then fitted by itself, in a process that gives its memory back; the pack is
written again with the predictors in it, and run over held-out text.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge.calibration import Row, capture, capture_bytes, perplexity, read_text, split_text, token_rows
from edge.host import default_memory_bytes
from edge.loading import load
from edge.models import resolve_model
from edge.predictor_work import WorkFolder
from flashload.arch import DecoderConfig
from flashload.bind import bind
from flashload.cache import cache_folder
from flashload.checkpoint import open_checkpoint
from flashload.errors import ArgumentError, BudgetError, EdgeError
from flashload.format import PackFile, is_pack
from flashload.machine import format_bytes, parse_bytes, rss_bytes, trim_memory
from flashload.neuron_use import measure_falloff
from flashload.pack import pack
from flashload.pack_layout import xxh3
from flashload.pack_predictor import BITS, add_predictors
from quant.predictor_memory import TORCH_BYTES, fit_bytes, most_tokens, token_bytes

if TYPE_CHECKING:
    from edge.engine import Engine

RANK_STEP = 32  # a row of the packed matrices is whole blocks of 32 values
_DEFAULT_TOKENS = 100_000
_LEAST_TOKENS, _LEAST_HELD_OUT_TOKENS, _MOST_HELD_OUT_TOKENS = 2_000, 200, 20_000
#: Rows are this long, or as long as the model reads.
_ROW_TOKENS = 512
#: Rank of the paper's predictors, in the hidden size: 128 of 4096, and 1024 in the last four of 32 layers.
_RANK_SHARE, _LAST_RANK_SHARE, _LAST_LAYERS_SHARE = 32, 4, 8

#: A line of the process that fits: layer, rank, thousandths.
_PROGRESS = re.compile(r"(\d+) (\d+) (\d+)\n")
#: Told (stage, done, total).
Stages = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LayerReport:
    """One layer's predictor as stored, measured on held-out text.

    Attributes:
        recall: of the open neurons those predicted.
        precision: of the predicted neurons those open.
        predicted, active: of all neurons those predicted, those open.
        bytes: the predictor's.
    """

    rank: int
    recall: float
    precision: float
    predicted: float
    active: float
    bytes: int


@dataclass(frozen=True)
class PredictorReport:
    """What training made.

    Attributes:
        path, file_bytes: the pack.
        tokens, held_out_tokens: fitted to, and measured on.
        perplexity, perplexity_predicted: of the held-out text without and with the predictors.
        predictor_bytes: of all layers together.
        seconds: that it took.
    """

    path: Path
    file_bytes: int
    tokens: int
    held_out_tokens: int
    layers: list[LayerReport]
    perplexity: float
    perplexity_predicted: float
    predictor_bytes: int
    seconds: float

    @property
    def mean(self) -> LayerReport:
        """Over the layers."""
        n = len(self.layers)
        sums = {key: sum(getattr(layer, key) for layer in self.layers) for key in asdict(self.layers[0])}
        return LayerReport(
            **{key: total // n if key in ("rank", "bytes") else total / n for key, total in sums.items()}
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            **asdict(self),
            "path": str(self.path),
            "mean": asdict(self.mean),
            "perplexity_ratio": self.perplexity_predicted / self.perplexity,
        }


def default_ranks(hidden: int, n_layers: int) -> list[int]:
    """Small ones, and larger ones in the last layers, as the paper found them for OPT-6.7B, in this model's size."""
    last = max(1, n_layers // _LAST_LAYERS_SHARE)

    def rank(share: int) -> int:
        return min(-(-hidden // (share * RANK_STEP)) * RANK_STEP, hidden // RANK_STEP * RANK_STEP)

    return [rank(_RANK_SHARE)] * (n_layers - last) + [rank(_LAST_RANK_SHARE)] * last


def _config(path: Path) -> DecoderConfig:
    if is_pack(path):
        with PackFile(path) as file:
            return file.config
    with open_checkpoint(path) as checkpoint:
        return bind(checkpoint).config


def _check(config: DecoderConfig, ranks: Sequence[int], recall: float, bits: str) -> None:
    if config.activation != "relu" or config.n_experts:
        kind = "a mixture of experts" if config.n_experts else f"activation {config.activation}"
        raise ArgumentError(
            f"train-predictor: expected a model with dense ReLU layers, whose closed neurons are exactly zero, found "
            f"{config.family} with {kind}; edge sparsify leaves out what counts little in others"
        )
    if config.hidden_size < RANK_STEP:
        raise ArgumentError(
            f"train-predictor: expected a hidden size of {RANK_STEP} or more, found {config.hidden_size}"
        )
    if ranks and len(ranks) not in (1, config.n_layers):
        raise ArgumentError(f"rank: expected one, or one per layer ({config.n_layers}), found {len(ranks)}")
    for rank in ranks:
        if rank % RANK_STEP or not 0 < rank <= config.hidden_size:
            raise ArgumentError(
                f"rank: expected multiples of {RANK_STEP} up to {config.hidden_size}, found {rank}"
            )
    if not 0 < recall < 1:
        raise ArgumentError(f"recall: expected a share between 0 and 1, found {recall}")
    if bits not in BITS:
        raise ArgumentError(f"bits: expected one of {', '.join(BITS)}, found {bits!r}")


def _output(model: str | os.PathLike[str], source: Path, out: str | os.PathLike[str] | None) -> Path:
    """The pack to write: ``out``, or beside the model, or (a shipped one, a folder without leave) in the cache."""
    if out is None:
        beside = Path(model).exists() and os.access(source.resolve().parent, os.W_OK)
        folder = source.resolve().parent if beside else cache_folder()
        path = folder / f"{source.resolve().stem}-predictor.edge"
    else:
        path = Path(out).expanduser()
    if path.exists():
        raise ArgumentError(f"out: {path} exists; name another file (--out), or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _n_tokens(asked: int | None, room_bytes: int, memory_bytes: int, config: DecoderConfig, rank: int) -> int:
    """Tokens to fit to: as many as asked for, or as fit."""
    hidden, neurons = config.hidden_size, config.intermediate_size
    wanted = _LEAST_TOKENS if asked is None else asked
    if wanted < _LEAST_TOKENS:
        raise ArgumentError(f"tokens: expected at least {_LEAST_TOKENS:,}, found {wanted:,}")
    most = most_tokens(room_bytes, hidden, neurons, rank)
    if wanted > most:
        needed = memory_bytes - room_bytes + fit_bytes(wanted, hidden, neurons, rank)
        refusal = BudgetError(
            f"memory: {memory_bytes} bytes ({format_bytes(memory_bytes)}) are too few: fitting a layer of {neurons} "
            f"neurons to {wanted:,} tokens needs {needed} bytes ({format_bytes(needed)}); fewer tokens need less"
        )
        refusal.floor_bytes = needed
        raise refusal
    return min(most, _DEFAULT_TOKENS) if asked is None else asked


def train_predictor(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    memory: int | str | None = None,
    threads: int | None = None,
    weights: str = "keep",
    ranks: Sequence[int] = (),
    recall: float = 0.95,
    bits: str = "q8",
    tokens: int | None = None,
    steps: int = 300,
    seed: int = 0,
    whole_process: bool = False,
    on_progress: Stages = lambda stage, done, total: None,
) -> PredictorReport:
    """Trains a predictor for every feed-forward layer of a ReLU model and writes a pack with them.

    Interrupted, it leaves a folder ``.NAME.training`` beside the pack to be, with which the same call goes on.

    Args:
        model: a pack, a GGUF file, a Hugging Face folder, or a shipped model's name; it stays as it is.
        data: a UTF-8 text file; texts in it may be parted by ``<|endoftext|>``. Its last tenth is held out.
        out: the pack to write; None: ``NAME-predictor.edge`` beside the model, or in the cache for a shipped one.
        memory: ceiling, as for :func:`edge.load`, of running the model and of fitting alike.
        weights: "keep", "q8" or "q4": how a checkpoint is packed.
        ranks: one, or one per layer, multiples of 32; empty: from the paper's, doubled as long as that saves more
            bytes of records than it adds.
        recall: of the open neurons, to be predicted in every layer; sets the thresholds.
        bits: "q8" or "q4", of the stored predictors.
        tokens: to fit to; None: as many as memory holds, at most 100,000.
        steps: of the optimiser, per fit.
        on_progress: told (stage, done, total).

    Raises:
        ArgumentError: torch is not installed, a model without dense ReLU layers, too little text, a bad setting, or a
            pack that exists already.
        BudgetError: memory is too small for running the model or for fitting a layer.
        ModelFileError, DiskError: as of :func:`edge.load`.
    """
    start = time.perf_counter()
    if find_spec("torch") is None:
        raise ArgumentError("train-predictor: fitting needs torch, found none; pip install 'edge[train]'")
    source = resolve_model(model)
    config = _config(source)
    _check(config, ranks, recall, bits)
    path = _output(model, source, out)
    n_layers, hidden, neurons = config.n_layers, config.hidden_size, config.intermediate_size
    held_bytes = rss_bytes() if whole_process else 0
    memory_bytes = default_memory_bytes() + held_bytes if memory is None else parse_bytes(memory)
    first_ranks = list(ranks) * (n_layers // len(ranks)) if ranks else default_ranks(hidden, n_layers)
    last_rank = 0 if ranks else hidden // (2 * RANK_STEP) * RANK_STEP
    room_bytes = memory_bytes - held_bytes - TORCH_BYTES
    n_tokens = _n_tokens(tokens, room_bytes, memory_bytes, config, max(*first_ranks, last_rank))

    text = read_text(data)
    manifest = {
        "model": _identity(source),
        "data": f"{xxh3(text.encode()):016x}",
        "weights": weights,
        "tokens": n_tokens,
        "fit": {
            "first_ranks": first_ranks, "last_rank": last_rank, "recall": recall, "bits": bits, "steps": steps,
            "seed": seed, "threads": threads,
        },
    }  # fmt: skip
    work = WorkFolder(path.with_name(f".{path.stem}.training"))
    work.begin(manifest)
    if not work.base.exists():
        _make_base(source, work.base, weights, on_progress)
    length = min(_ROW_TOKENS, config.max_positions)

    def run(memory_bytes: int, predictor: str) -> Engine:
        return load(
            work.base if predictor == "off" else path,
            memory=memory_bytes,
            context=length,
            threads=threads,
            predictor=predictor,
            whole_process=whole_process,
        )

    rows = _rows(work.base, text, length, n_tokens, seed, data)
    if work.captured is None:
        with run(memory_bytes - capture_bytes(n_layers, hidden, neurons), "off") as engine:
            _capture(work, engine, rows, config, on_progress)
        trim_memory()
    _fit(work, n_layers, on_progress)
    reports, file_bytes = _write(work, path, n_layers, neurons, on_progress)
    with run(memory_bytes, "on") as engine:
        predicted = perplexity(engine, rows["held-out"], _stage(on_progress, "held-out text, predicted"))
    captured = work.captured
    assert captured is not None
    work.remove()
    return PredictorReport(
        path=path,
        file_bytes=file_bytes,
        tokens=captured["tokens"],
        held_out_tokens=captured["held_out_tokens"],
        layers=reports,
        perplexity=captured["perplexity"],
        perplexity_predicted=predicted,
        predictor_bytes=sum(layer.bytes for layer in reports),
        seconds=time.perf_counter() - start,
    )


def _write(
    work: WorkFolder, path: Path, n_layers: int, neurons: int, on_progress: Stages
) -> tuple[list[LayerReport], int]:
    """The pack with every layer's predictor; what each is worth, and the size of the file."""
    done = [found for layer in range(n_layers) if (found := work.layer(layer)) is not None]
    reports = [LayerReport(rank=stored.down.rows, bytes=stored.bytes, **found) for stored, found in done]
    facts = {
        key: round(sum(getattr(r, key) for r in reports) / n_layers, 4)
        for key in ("recall", "predicted", "active")
    }
    if falloff := measure_falloff([work.open_rows("held-out", i, neurons) for i in range(n_layers)]):
        facts["falloff"] = falloff
    file_bytes = add_predictors(
        work.base,
        path,
        {i: stored for i, (stored, _) in enumerate(done)},
        facts,
        _stage(on_progress, "writing"),
    )
    return reports, file_bytes


def _stage(on_progress: Stages, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(stage, done, total)


def _identity(source: Path) -> list[Any]:
    """What tells one model from another without reading all of it."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]


def _make_base(source: Path, base: Path, weights: str, on_progress: Stages) -> None:
    """The model by neuron, without predictors: what is run and what they are added to."""
    if is_pack(source):
        add_predictors(source, base, {}, None, _stage(on_progress, "packing by neuron"))
    else:
        pack(source, base, weights, _stage(on_progress, "packing by neuron"), neurons="on")


def _rows(
    base: Path, text: str, length: int, n_tokens: int, seed: int, data: object
) -> Mapping[str, list[Row]]:
    from edge.tokenizer import Tokenizer

    with PackFile(base) as file:
        tokenizer = Tokenizer(file.vocab())
    fit, held_out = split_text(text)
    n_held_out = min(_MOST_HELD_OUT_TOKENS, n_tokens // 4)
    rows = {
        "fit": token_rows(tokenizer, fit, length, n_tokens, seed),
        "held-out": token_rows(tokenizer, held_out, length, n_held_out),
    }
    found = {part: sum(map(len, of)) for part, of in rows.items()}
    if found["fit"] < _LEAST_TOKENS or found["held-out"] < _LEAST_HELD_OUT_TOKENS:
        raise ArgumentError(
            f"data: {data}: expected text of at least {_LEAST_TOKENS:,} tokens, and {_LEAST_HELD_OUT_TOKENS} in its "
            f"last tenth, found {found['fit']:,} and {found['held-out']:,}"
        )
    return rows


def _capture(
    work: WorkFolder,
    engine: Engine,
    rows: Mapping[str, list[Row]],
    config: DecoderConfig,
    on_progress: Stages,
) -> None:
    stages = {"fit": "running the text", "held-out": "running held-out text"}
    counts = {part: sum(map(len, of)) for part, of in rows.items()}
    per_token = config.n_layers * token_bytes(config.hidden_size, config.intermediate_size)
    for part, of in rows.items():
        blocks = capture(engine, of, _stage(on_progress, stages[part]))
        work.write_rows(part, blocks, config.n_layers, counts[part] * per_token)
    exact = perplexity(engine, rows["held-out"], _stage(on_progress, "held-out text, exact"))
    work.finish_capture({"tokens": counts["fit"], "held_out_tokens": counts["held-out"], "perplexity": exact})


def _fit_command(work: WorkFolder) -> list[str]:
    return [sys.executable, "-m", "edge.predictor_fit", str(work.path)]


def _fit(work: WorkFolder, n_layers: int, on_progress: Stages) -> None:
    """Runs ``edge.predictor_fit`` until every layer is in the folder.

    Raises:
        ArgumentError: a layer cannot be fitted.
        EdgeError: the process was killed; what it had finished is kept.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            _fit_command(work), env=environment, stdout=subprocess.PIPE, stderr=said, text=True
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if match := _PROGRESS.match(line):
                    layer, rank, done = map(int, match.groups())
                    on_progress(f"layer {layer + 1} of {n_layers}, rank {rank}", done, 1000)
            code = child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
        if code < 0:
            raise EdgeError(
                f"train-predictor: the process that fits was killed by signal {-code}, as the system does when memory "
                "is short; run it again to go on with the next layer"
            )
        if code:
            said.seek(0)
            lines = said.read().strip().splitlines() or [f"ended with status {code}"]
            raise ArgumentError(f"train-predictor: {lines[-1]}")
