"""Trains the built-in story model.

    python -m edge.builtin.train --corpora DIR --out DIR [--minutes N] [--resume]

The learning rate follows the share of the time budget that is spent (`--minutes`) or of the steps
(`--steps`): warm-up, a plateau, then a straight line to zero. The model exported is the one with the
lowest held-out bits per byte. Interrupting (Ctrl-C or SIGTERM) saves a checkpoint that `--resume` continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from torch.nn import functional as F

from edge.builtin.data import Corpus, load_corpus
from edge.builtin.evaluate import bits_per_byte
from edge.builtin.figure import draw_curve
from edge.builtin.model import Decoder, ModelConfig, save_hf
from edge.builtin.muon import MuonAdamW
from edge.builtin.state import load_checkpoint, save_checkpoint, write_atomic
from edge.builtin.tokens import RowSource, encode_all, mixed_batch, save_tokenizer, train_tokenizer
from flashload.errors import ArgumentError, EdgeError


@dataclass(frozen=True)
class Settings:
    """One training run. Give `steps` or `minutes`; everything but the machine's speed follows from these."""

    model: ModelConfig = field(default_factory=ModelConfig)
    steps: int = 0  # 0: the time budget rules
    minutes: float = 75.0
    rows: int = 16  # sequences per step, each max_position_embeddings tokens
    seed: int = 1234
    dropout: float = 0.15
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.02  # shares of the run
    plateau: float = 0.35
    book_share: float = 0.5  # of the rows at the start, falling in a line to none...
    book_end: float = 0.6  # ...at this share of the run
    eval_steps: int = 100
    save_seconds: float = 120.0


def rate_scale(progress: float, settings: Settings) -> float:
    """Learning-rate factor in [0, 1] at a share of the run in [0, 1]."""
    if progress < settings.warmup:
        return max(progress / settings.warmup, 0.01)
    return min(1.0, (1.0 - progress) / (1.0 - settings.plateau))


def book_share(progress: float, settings: Settings) -> float:
    """Share of book rows in a batch at a share of the run."""
    return settings.book_share * max(0.0, 1.0 - progress / settings.book_end) if settings.book_end else 0.0


class Trainer:
    """The state of a run: model, optimiser, data position and curve; `step` advances it by one batch."""

    def __init__(self, corpus: Corpus, settings: Settings, out: Path) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.out, self.held_out = settings, out, corpus.held_out
        self.tokenizer: Tokenizer = train_tokenizer(corpus.stories, settings.model.vocab_size)
        length = settings.model.max_position_embeddings
        self.stories = RowSource(encode_all(self.tokenizer, corpus.stories), length, settings.seed)
        books = encode_all(self.tokenizer, corpus.books)
        self.books = RowSource(books, length, settings.seed + 1) if books else None
        self.model = Decoder(settings.model, settings.dropout).train()
        self.optimiser = MuonAdamW(
            self.model.named_parameters(),
            muon_lr=settings.muon_lr,
            adam_lr=settings.adam_lr,
            weight_decay=settings.weight_decay,
        )
        self.run_id = hashlib.sha256(
            json.dumps([asdict(settings), corpus.sha256, corpus.counts], sort_keys=True).encode()
        ).hexdigest()
        self.steps_done, self.seconds = 0, 0.0
        self.rows_used = {"stories": 0, "books": 0}
        self.losses: list[float] = []  # nats per token, one per step
        self.evals: list[dict[str, float]] = []
        self.about: dict[str, Any] = {
            "settings": asdict(settings),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "corpus": {"sha256": corpus.sha256, **corpus.counts, "story_tokens": self.stories.tokens},
        }

    @property
    def progress(self) -> float:
        s = self.settings
        return min(1.0, self.steps_done / s.steps if s.steps else self.seconds / (60 * s.minutes))

    @property
    def tokens_done(self) -> int:
        return self.steps_done * self.settings.rows * self.settings.model.max_position_embeddings

    def step(self) -> float:
        """One batch; returns its loss in nats per token."""
        started, s = time.monotonic(), self.settings
        batch = torch.from_numpy(
            mixed_batch(self.stories, self.books, self.rows_used, s.rows, book_share(self.progress, s))
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        self.optimiser.lr_scale = rate_scale(self.progress, s)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.steps_done += 1
        self.losses.append(loss.item())
        self.seconds += time.monotonic() - started
        return self.losses[-1]

    def evaluate(self) -> float:
        """Held-out bits per byte now; the best so far is exported."""
        started = time.monotonic()
        bits = bits_per_byte(self.model, self.tokenizer, self.held_out, autocast=True)
        if not self.evals or bits < min(e["bits_per_byte"] for e in self.evals):
            self.export()
        self.seconds += time.monotonic() - started
        self.evals.append(
            {
                "step": self.steps_done,
                "minutes": round(self.seconds / 60, 2),
                "tokens": self.tokens_done,
                "story_epochs": round(self.rows_used["stories"] / self.stories.rows_per_epoch, 2),
                "train_nats_per_token": round(sum(self.losses[-50:]) / len(self.losses[-50:]), 4),
                "bits_per_byte": round(bits, 4),
            }
        )
        self.write_curve()
        return bits

    def export(self) -> None:
        """Writes the Hugging Face directory out/hf."""
        save_hf(self.model, self.out / "hf", bos_id=0)
        save_tokenizer(self.tokenizer, self.out / "hf", self.settings.model.max_position_embeddings)

    def write_curve(self) -> None:
        """curve.json: settings, sources and the held-out evaluations."""
        run = {"steps": self.steps_done, "minutes": round(self.seconds / 60, 1), "rows": self.rows_used}
        report = {**self.about, **run, "evals": self.evals}
        write_atomic(self.out / "curve.json", (json.dumps(report, indent=1) + "\n").encode())

    def save(self) -> None:
        state = {
            "run_id": self.run_id,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "rng": torch.get_rng_state(),
            "position": [self.steps_done, self.seconds, self.rows_used, self.losses, self.evals],
        }
        save_checkpoint(self.out / "checkpoint.bin", state)

    def load(self) -> None:
        """Continues from out/checkpoint.bin; an EdgeError if it is damaged or of another run."""
        path = self.out / "checkpoint.bin"
        state = load_checkpoint(path)
        if state["run_id"] != self.run_id:
            raise ArgumentError(f"{path}: checkpoint of other settings or corpora; give another --out")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["rng"])
        self.steps_done, self.seconds, self.rows_used, self.losses, self.evals = state["position"]


def train(
    trainer: Trainer,
    show: Callable[[Trainer], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """Runs the trainer to the end of its budget, with evaluations and checkpoints on the way.

    `stopped` is asked between steps; when it says so, the state is saved and the answer is False.
    """
    saved = time.monotonic()
    while trainer.progress < 1.0:
        if stopped():
            trainer.save()
            return False
        trainer.step()
        if trainer.steps_done % trainer.settings.eval_steps == 0:
            trainer.evaluate()
        if time.monotonic() - saved > trainer.settings.save_seconds:
            trainer.save()
            saved = time.monotonic()
        show(trainer)
    if not trainer.evals or trainer.evals[-1]["step"] != trainer.steps_done:
        trainer.evaluate()
    trainer.save()
    return True


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m edge.builtin.train", description=__doc__)
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, curve and out/hf")
    parser.add_argument("--minutes", type=float, default=75.0, help="time budget (default 75)")
    parser.add_argument("--steps", type=int, default=0, help="step budget instead of a time budget")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = Settings(steps=args.steps, minutes=args.minutes, seed=args.seed)
    try:
        trainer = Trainer(load_corpus(args.corpora), settings, args.out)
        if args.resume:
            trainer.load()
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: signals.append(received))
    status = TextColumn("{task.percentage:.1f}% {task.fields[note]}")
    columns = (TextColumn("step {task.fields[step]}"), BarColumn(), status)
    with Progress(*columns, TimeElapsedColumn()) as bar:
        task = bar.add_task("train", total=1.0, step=trainer.steps_done, note="")

        def show(t: Trainer) -> None:
            bits = f"{t.evals[-1]['bits_per_byte']:.3f} bits/byte" if t.evals else ""
            note = f"loss {t.losses[-1]:.3f}  {bits}  {t.tokens_done / t.seconds:,.0f} tok/s"
            bar.update(task, completed=t.progress, step=t.steps_done, note=note)

        finished = train(trainer, show, lambda: bool(signals))
    if not finished:
        print("interrupted: checkpoint saved, continue with --resume", file=sys.stderr)
        return 130
    draw_curve(args.out / "curve.json", args.out / "curve.png")
    best = min(e["bits_per_byte"] for e in trainer.evals)
    print(f"best held-out bits per byte: {best:.4f}; model in {args.out / 'hf'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
