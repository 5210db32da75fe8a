"""Trains one model of the built-in family.

    python -m edge.builtin.train MODEL --corpora DIR --family DIR [--resume]

MODEL is twin, story, draft or moe (`edge.builtin.recipes`); results go to FAMILY/MODEL. Interrupting (Ctrl-C or
SIGTERM) saves a checkpoint that `--resume` continues.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from edge.builtin.data import load_corpus
from edge.builtin.figure import draw_curve
from edge.builtin.own_text import load_own_text
from edge.builtin.recipes import RECIPES, Settings
from edge.builtin.trainer import Trainer, train
from flashload.errors import ArgumentError, BudgetError, EdgeError


def needed_bytes(settings: Settings) -> int:
    """Memory a run takes, from its shapes: what backward keeps per token, and weights with optimiser state."""
    m = settings.model
    tokens = settings.rows * m.max_position_embeddings
    ffn = m.intermediate_size * (m.num_experts_per_tok if m.num_local_experts else 1)
    kept = m.num_hidden_layers * (
        40 * m.hidden_size + 16 * ffn + 6 * m.num_attention_heads * m.max_position_embeddings
    )
    weights = (
        12
        * m.hidden_size
        * (
            m.vocab_size
            + m.num_hidden_layers * 3 * max(ffn, m.intermediate_size * max(1, m.num_local_experts))
        )
    )
    return tokens * (kept + 20 * m.vocab_size) + weights + (600 << 20)


def check_memory(settings: Settings) -> None:
    """Raises BudgetError when the machine has less memory free than the run needs."""
    needed, free = needed_bytes(settings), psutil.virtual_memory().available
    if free < needed:
        raise BudgetError(f"training needs about {needed >> 20:,} MiB of memory, {free >> 20:,} MiB are free")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m edge.builtin.train", description=__doc__)
    parser.add_argument("model", choices=sorted(RECIPES))
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the corpora")
    parser.add_argument(
        "--family", type=Path, required=True, help="folder of all runs; this one is FAMILY/MODEL"
    )
    parser.add_argument("--resume", action="store_true", help="continue from FAMILY/MODEL/checkpoint.bin")
    parser.add_argument("--steps", type=int, default=0, help="other than the recipe's number of steps")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    return parser.parse_args(argv)


def _prepare(args: argparse.Namespace) -> Trainer:
    settings = replace(RECIPES[args.model], seed=args.seed)
    if args.steps:
        settings = replace(settings, steps=args.steps)
    check_memory(settings)
    own = load_own_text(args.family / settings.teacher / "own") if settings.own_share else None
    for needed in (settings.teacher, settings.upcycle):
        folder = args.family / needed / "hf"
        if needed and not (folder / "config.json").exists():
            raise ArgumentError(f"{folder}: expected a trained model, found none; train {needed} first")
    trainer = Trainer(args.model, settings, load_corpus(args.corpora), args.family, own)
    if args.resume:
        trainer.load()
    elif settings.start:
        trainer.fork()
    return trainer


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        trainer = _prepare(args)
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: signals.append(received))
    status = TextColumn("{task.percentage:.1f}% {task.fields[note]}")
    columns = (TextColumn("{task.description} {task.fields[step]}"), BarColumn(), status)
    with Progress(*columns, TimeElapsedColumn()) as bar:
        task = bar.add_task(args.model, total=1.0, step=trainer.steps_done, note="")

        def show(t: Trainer) -> None:
            bits = f"{t.evals[-1]['bits_per_byte']:.3f} bits/byte" if t.evals else ""
            more = "  ".join(f"{key} {value:.3f}" for key, value in t.objective.state.items())
            note = f"loss {t.losses[-1]:.3f}  {bits}  {more}  {t.tokens_done / t.seconds:,.0f} tok/s"
            bar.update(task, completed=t.progress, step=t.steps_done, note=note)

        finished = train(trainer, show, lambda: bool(signals))
    if not finished:
        print("interrupted: checkpoint saved, continue with --resume", file=sys.stderr)
        return 130
    draw_curve(trainer.out / "curve.json", trainer.out / "curve.png")
    print(f"held-out bits per byte: {trainer.evals[-1]['bits_per_byte']:.4f}; model in {trainer.out / 'hf'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
