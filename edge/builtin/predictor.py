"""Fits the neuron predictors of the sparse target and measures them on held-out text.

    python -m edge.builtin.predictor --family DIR --corpora DIR [--rank N ...]

Reads FAMILY/story/hf; writes edge_predictor.safetensors there and the figures to FAMILY/story/predictor.json.
Without --rank each layer takes the smallest rank with which, on average over the layers, no more than --share of the
neurons are predicted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor

from edge.builtin.activations import Trained, ffn_inputs, held_out_ids, load_trained
from edge.builtin.data import load_corpus
from edge.builtin.evaluate import bits_per_byte
from edge.builtin.held_out import held_out_stories
from edge.builtin.model import Decoder
from edge.builtin.state import write_atomic
from edge.builtin.tokens import RowSource, encode_all
from flashload.errors import ArgumentError, BudgetError, EdgeError
from quant.predictor import Predictor, PredictorFigures, fit_predictor, measure

RANK_STEP = 32  # a rank is a row length of the packed matrices, whose blocks hold 32 values
_ROWS = 8  # sequences computed at once
_SOME_TOKENS = 20_000  # enough to measure shares by


@dataclass(frozen=True)
class FitSettings:
    """How predictors are fitted; ranks empty: found per layer by `share`."""

    ranks: tuple[int, ...] = ()
    recall: float = 0.96  # of open neurons, on training text; held-out text gives a little less
    share: float = 0.12  # of all neurons, predicted on average over the layers
    tokens: int = 120_000
    steps: int = 300
    weigh_misses: bool = False
    seed: int = 7


def check(settings: FitSettings, model: Decoder) -> None:
    """Raises ArgumentError for a model or ranks that cannot be, BudgetError for too little memory."""
    c = model.config
    if c.hidden_act != "relu" or c.num_local_experts:
        raise ArgumentError(
            f"predictor: expected a dense ReLU model, found {c.hidden_act}; train story first"
        )
    if settings.ranks and len(settings.ranks) not in (1, c.num_hidden_layers):
        raise ArgumentError(
            f"predictor: expected one rank or one per layer ({c.num_hidden_layers}), found {len(settings.ranks)}"
        )
    for rank in settings.ranks:
        if rank % RANK_STEP or not 0 < rank <= c.hidden_size:
            raise ArgumentError(
                f"predictor: expected ranks in multiples of {RANK_STEP} up to {c.hidden_size}, found {rank}"
            )
    # Inputs of all layers in half floats; of one layer in floats, with one byte per neuron and token.
    per_token = c.hidden_size * (2 * c.num_hidden_layers + 4) + c.intermediate_size
    needed, free = settings.tokens * per_token + (1 << 30), psutil.virtual_memory().available
    if needed > free:
        raise BudgetError(
            f"predictor: needs about {needed >> 20:,} MiB of memory, {free >> 20:,} MiB are free"
        )


def collect(trained: Trained, stories: Sequence[str], settings: FitSettings) -> list[Tensor]:
    """Inputs of each layer's gate projection on training rows: [tokens, D] in half floats."""
    length = trained.model.config.max_position_embeddings
    source = RowSource(encode_all(trained.tokenizer, stories), length, settings.seed)
    count = max(2, min(settings.tokens // length, source.rows_per_epoch))

    def batches() -> Iterator[Tensor]:
        for first in range(0, count, _ROWS):
            rows = [source.row(n)[:-1] for n in range(first, min(first + _ROWS, count))]
            yield torch.from_numpy(np.stack(rows))

    parts = [[x.half() for x in inputs] for inputs in ffn_inputs(trained.model, batches(), autocast=True)]
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def open_shares(model: Decoder, inputs: Sequence[Tensor]) -> list[float]:
    """Share of the neurons that open, per layer, over the last tokens of its inputs [N, D]."""
    gates = [layer.mlp.gate_proj.weight.detach() for layer in model.layers]
    return [
        (x[-_SOME_TOKENS:].float() @ gate.T > 0).float().mean().item()
        for x, gate in zip(inputs, gates, strict=True)
    ]


def predicted_limits(shares: Sequence[float], wanted: float) -> list[float]:
    """Share of each layer's neurons that may be predicted: all layers as much above what opens."""
    mean = sum(shares) / len(shares)
    if wanted <= mean:
        raise ArgumentError(
            f"predictor: expected a share above the {mean:.1%} of neurons that open, found {wanted:.1%};"
            " give --share or --rank"
        )
    return [share + wanted - mean for share in shares]


def fit_layer(
    model: Decoder,
    index: int,
    x: Tensor,
    settings: FitSettings,
    limit: float = 0.0,
    show: Callable[[float], None] = lambda _: None,
) -> Predictor:
    """The predictor of one layer from its inputs x [N, D].

    Unless a rank is given, the smallest with which at most the share `limit` of the neurons is predicted.
    """
    mlp = model.layers[index].mlp
    gate, up = mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()
    reach = mlp.down_proj.weight.detach().norm(
        dim=0
    )  # [F], what a neuron's value does to the residual stream
    x = x.float()
    active = torch.cat([part @ gate.T > 0 for part in x.split(4096)])

    def cost(rows: Tensor) -> Tensor:
        return (rows @ gate.T).relu() * (rows @ up.T).abs() * reach

    def fit(rank: int) -> Predictor:
        return fit_predictor(
            x,
            active,
            rank,
            gate=gate,
            importance=cost if settings.weigh_misses else None,
            recall=settings.recall,
            steps=settings.steps,
            seed=settings.seed + index,
            show=show,
        )

    if settings.ranks:
        return fit(settings.ranks[index % len(settings.ranks)])
    low, high = (
        1,
        model.config.hidden_size // RANK_STEP,
    )  # in units of RANK_STEP; at full rank nothing is lost
    best = None
    while low < high:
        middle = (low + high) // 2
        found = fit(middle * RANK_STEP)
        if measure(found, x[-_SOME_TOKENS:], active[-_SOME_TOKENS:]).predicted <= limit:
            best, high = found, middle
        else:
            low = middle + 1
    return best if best is not None and best.rank == low * RANK_STEP else fit(low * RANK_STEP)


@contextmanager
def predicting(model: Decoder, predictors: Sequence[Predictor]) -> Iterator[None]:
    """Inside it, neurons that are not predicted open count as closed, whatever their gate says."""

    def hook(predictor: Predictor) -> Any:
        return lambda _module, given, gates: torch.where(predictor.scores(given[0]) > 0, gates, -1.0)

    hooks = [
        layer.mlp.gate_proj.register_forward_hook(hook(predictor))
        for layer, predictor in zip(model.layers, predictors, strict=True)
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def held_out_figures(trained: Trained, predictors: Sequence[Predictor], text: str) -> dict[str, Any]:
    """Per layer and on average: recall, precision, shares predicted and open; bits per byte with and without."""
    stories = held_out_ids(trained, text)
    parts = list(ffn_inputs(trained.model, stories))
    layers: list[PredictorFigures] = []
    for index, predictor in enumerate(predictors):
        x = torch.cat([inputs[index] for inputs in parts])
        gate = trained.model.layers[index].mlp.gate_proj.weight.detach()
        layers.append(measure(predictor, x, x @ gate.T > 0))
    off = bits_per_byte(trained.model, trained.tokenizer, text, trained.bos_id)
    with predicting(trained.model, predictors):
        on = bits_per_byte(trained.model, trained.tokenizer, text, trained.bos_id)
    texts = held_out_stories(text)
    encodings = trained.tokenizer.encode_batch(texts, add_special_tokens=False)
    bytes_per_token = sum(len(story.encode()) for story in texts) / sum(len(e.ids) for e in encodings)
    rows = [{"rank": p.rank, **asdict(f)} for p, f in zip(predictors, layers, strict=True)]
    return {
        "held_out_tokens": sum(len(ids) for ids in stories),
        "layers": [{key: round(value, 4) for key, value in row.items()} for row in rows],
        "mean": {key: round(sum(row[key] for row in rows) / len(rows), 4) for key in rows[0]},
        "bits_per_byte_off": round(off, 5),
        "bits_per_byte_on": round(on, 5),
        "perplexity_ratio": round(2 ** ((on - off) * bytes_per_token), 5),
        "bytes": sum(4 * t.numel() for p in predictors for t in (p.down, p.up, p.bias)),
    }


def save_predictors(folder: Path, predictors: Sequence[Predictor]) -> None:
    """Writes edge_predictor.safetensors: of layer i `layers.{i}.predictor.` down.weight, up.weight and bias."""
    tensors: dict[str, Tensor] = {}
    for index, predictor in enumerate(predictors):
        name = f"layers.{index}.predictor"
        tensors[f"{name}.down.weight"] = predictor.down.contiguous()
        tensors[f"{name}.up.weight"] = predictor.up.contiguous()
        tensors[f"{name}.bias"] = predictor.bias.contiguous()
    temporary = folder / "edge_predictor.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "edge_predictor.safetensors")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m edge.builtin.predictor", description=__doc__)
    parser.add_argument("--family", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--rank", type=int, nargs="+", default=[], help="one, or one per layer")
    parser.add_argument("--recall", type=float, default=FitSettings.recall)
    parser.add_argument("--share", type=float, default=FitSettings.share, help="of neurons predicted")
    parser.add_argument("--tokens", type=int, default=FitSettings.tokens, help="of training text")
    parser.add_argument("--steps", type=int, default=FitSettings.steps)
    parser.add_argument("--weigh-misses", action="store_true", help="by what the missed neuron contributes")
    parser.add_argument("--seed", type=int, default=FitSettings.seed)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fits, writes and measures; returns what predictor.json holds."""
    settings = FitSettings(
        tuple(args.rank), args.recall, args.share, args.tokens, args.steps, args.weigh_misses, args.seed
    )
    folder = args.family / "story" / "hf"
    trained = load_trained(folder)
    check(settings, trained.model)
    corpus = load_corpus(args.corpora, with_books=False)
    n_layers = len(trained.model.layers)
    with Progress() as bar:
        task = bar.add_task("inputs", total=None)
        inputs = collect(trained, corpus.stories, settings)
        bar.remove_task(task)
        limits = [0.0] * n_layers
        if not settings.ranks:
            limits = predicted_limits(open_shares(trained.model, inputs), settings.share)
        predictors = []
        for index in range(n_layers):
            task = bar.add_task(f"layer {index + 1} of {n_layers}", total=1.0)
            predictors.append(
                fit_layer(
                    trained.model,
                    index,
                    inputs[index],
                    settings,
                    limits[index],
                    lambda done, task=task: bar.update(task, completed=done),  # type: ignore[misc]
                )
            )
    save_predictors(folder, predictors)
    figures = {
        "settings": asdict(settings),
        "training_tokens": len(inputs[0]),
        **held_out_figures(trained, predictors, corpus.held_out),
    }
    write_atomic(args.family / "story" / "predictor.json", (json.dumps(figures, indent=1) + "\n").encode())
    return figures


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        figures = run(args)
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("layer  rank  recall  precision  predicted  open")
    for name, row in [*enumerate(figures["layers"]), ("mean", figures["mean"])]:
        shares = "  ".join(f"{row[key]:8.1%}" for key in ("recall", "precision", "predicted", "active"))
        print(f"{name!s:>5}  {row['rank']:4.0f}  {shares}")
    print(
        f"held-out bits per byte: {figures['bits_per_byte_off']:.4f}, with predictors "
        f"{figures['bits_per_byte_on']:.4f} (perplexity x {figures['perplexity_ratio']:.4f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
