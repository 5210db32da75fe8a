"""The state of a training run, advanced a batch at a time; saved, resumed, forked and exported."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from edge.builtin.data import Corpus
from edge.builtin.evaluate import bits_per_byte
from edge.builtin.hf import load_hf, save_hf
from edge.builtin.model import Decoder
from edge.builtin.muon import MuonAdamW
from edge.builtin.objectives import Balanced, Distil, Objective, Plain, Sparse
from edge.builtin.recipes import Settings
from edge.builtin.state import load_checkpoint, save_checkpoint, write_atomic
from edge.builtin.tokens import Ids, RowSource, encode_all, mixed_batch, save_tokenizer, train_tokenizer
from edge.builtin.upcycle import upcycle
from flashload.errors import ArgumentError


def rate_scale(progress: float, settings: Settings) -> float:
    """Learning-rate factor in [0, 1] at a share of the run in [0, 1]."""
    if progress < settings.warmup:
        return max(progress / settings.warmup, 0.01)
    return min(1.0, (1.0 - progress) / (1.0 - settings.plateau))


def book_share(progress: float, settings: Settings) -> float:
    """Share of book rows in a batch at a share of the run."""
    return settings.book_share * max(0.0, 1.0 - progress / settings.book_end) if settings.book_end else 0.0


def _objective(settings: Settings, family: Path, device: torch.device) -> Objective:
    fit: Objective = Balanced() if settings.model.num_local_experts else Plain()
    if settings.teacher:
        teacher = load_hf(family / settings.teacher / "hf").to(device)
        fit = Distil(teacher, settings.text_share, settings.teacher_from)
    return Sparse(settings.sparsity, fit) if settings.sparsity else fit


class Trainer:
    """A run of one recipe in family/<name>; `own` are texts a teacher wrote, as ids."""

    def __init__(
        self, name: str, settings: Settings, corpus: Corpus, family: Path, own: list[Ids] | None = None
    ) -> None:
        torch.manual_seed(settings.seed)
        self.name, self.settings, self.family, self.held_out = name, settings, family, corpus.held_out
        self.out = family / name
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer: Tokenizer = train_tokenizer(corpus.stories, settings.model.vocab_size)
        length = settings.model.max_position_embeddings
        self.sources = {
            "stories": RowSource(encode_all(self.tokenizer, corpus.stories), length, settings.seed)
        }
        books = encode_all(self.tokenizer, corpus.books)
        if books:
            self.sources["books"] = RowSource(books, length, settings.seed + 1)
        if own:
            self.sources["own"] = RowSource(own, length, settings.seed + 2)
        self.objective = _objective(settings, family, self.device)
        model = Decoder(settings.model, settings.dropout)
        if settings.upcycle:
            upcycle(model, load_hf(family / settings.upcycle / "hf"), settings.seed)
        self.model = model.to(self.device).train()
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
        self.rows_used = dict.fromkeys(self.sources, 0)
        self.losses: list[float] = []  # nats per token, one per step
        self.evals: list[dict[str, float]] = []
        self.about: dict[str, Any] = {
            "model": name,
            "settings": asdict(settings),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "corpus": {
                "sha256": corpus.sha256,
                **corpus.counts,
                "tokens": {kind: source.tokens for kind, source in self.sources.items()},
            },
        }

    @property
    def progress(self) -> float:
        return min(1.0, self.steps_done / self.settings.steps)

    @property
    def tokens_done(self) -> int:
        return self.steps_done * self.settings.rows * self.settings.model.max_position_embeddings

    def _batch(self) -> torch.Tensor:
        s = self.settings
        shares = {"books": book_share(self.progress, s), "own": s.own_share}
        batch = mixed_batch(self.sources, self.rows_used, s.rows, shares)
        return torch.from_numpy(batch).to(self.device)

    def step(self) -> float:
        """One batch; returns its next-token loss in nats per token."""
        started = time.monotonic()
        batch = self._batch()
        with torch.autocast(self.device.type, torch.bfloat16):
            minimised, loss = self.objective.loss(self.model, batch, self.progress)
        minimised.backward()
        self.optimiser.lr_scale = rate_scale(self.progress, self.settings)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.steps_done += 1
        self.losses.append(loss.item())
        self.seconds += time.monotonic() - started
        if self.settings.fork and self.steps_done == round(self.settings.fork * self.settings.steps):
            save_checkpoint(self.out / "fork.bin", self._state())
        return self.losses[-1]

    def evaluate(self) -> float:
        """Held-out bits per byte now, noted in the curve; the model as it is now is exported."""
        started = time.monotonic()
        bits = bits_per_byte(self.model, self.tokenizer, self.held_out, autocast=True)
        self.export()
        self.seconds += time.monotonic() - started
        epochs = self.rows_used["stories"] / self.sources["stories"].rows_per_epoch
        self.evals.append(
            {
                "step": self.steps_done,
                "minutes": round(self.seconds / 60, 2),
                "tokens": self.tokens_done,
                "story_epochs": round(epochs, 2),
                "train_nats_per_token": round(sum(self.losses[-50:]) / len(self.losses[-50:]), 4),
                "bits_per_byte": round(bits, 4),
                **{key: round(value, 4) for key, value in self.objective.state.items()},
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

    def _state(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "objective": self.objective.state,
            "rng": torch.get_rng_state(),
            "position": [self.steps_done, self.seconds, self.rows_used, self.losses, self.evals],
        }

    def save(self) -> None:
        save_checkpoint(self.out / "checkpoint.bin", self._state())

    def _take(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["rng"])
        self.steps_done, self.seconds, self.rows_used, self.losses, self.evals = state["position"]

    def load(self) -> None:
        """Continues from out/checkpoint.bin; an EdgeError if it is damaged or of another run."""
        path = self.out / "checkpoint.bin"
        state = load_checkpoint(path)
        if state["run_id"] != self.run_id:
            raise ArgumentError(f"{path}: checkpoint of other settings or corpora; give another --family")
        self._take(state)
        self.objective.state.update(state["objective"])

    def fork(self) -> None:
        """Starts from the fork of the model that the recipe names: its weights, optimiser and place in the data."""
        path = self.family / self.settings.start / "fork.bin"
        if not path.exists():
            raise ArgumentError(
                f"{path}: expected the fork of {self.settings.start}, found none; train that first"
            )
        self._take(load_checkpoint(path))


def train(
    trainer: Trainer,
    show: Callable[[Trainer], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """Runs the trainer to the end of its steps, with evaluations and checkpoints on the way.

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
