"""Text a trained model writes itself, for training what must agree with it (draft, Medusa heads).

    python -m edge.builtin.own_text --family DIR --corpora DIR [--texts N] [--seed N]

Prompts are the first tokens of training stories; half the texts are greedy, half drawn at temperature 0.8. The
texts go to FAMILY/story/own.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from edge.builtin.batch_sampler import continue_batch
from edge.builtin.data import load_corpus
from edge.builtin.hf import load_hf
from edge.builtin.model import Decoder
from edge.builtin.state import write_atomic
from edge.builtin.tokens import Ids, encode_all
from flashload.errors import ArgumentError, CorruptError, EdgeError, ModelFileError

BOS_ID = 0  # begins and ends every text
TEMPERATURES = (0.0, 0.8)
PROMPT_TOKENS = (8, 32)  # shortest and longest prompt, without the begin token

_MAGIC = b"EDGEOWN1"
_DIGEST_BYTES = 32
_FILE = "texts.bin"
_ROWS = 64  # texts sampled at once


@dataclass(frozen=True)
class OwnText:
    """One text: prompt and continuation without begin and end token; `ended` says that the end token came."""

    ids: Ids
    prompt_tokens: int
    temperature: float
    ended: bool

    def row(self) -> Ids:
        """The ids with the begin token and, where it came, the end token."""
        return np.concatenate(([BOS_ID], self.ids, [BOS_ID] if self.ended else [])).astype(np.int64)


def model_sha256(hf: Path) -> str:
    """Of the weights of a Hugging Face directory; ArgumentError when there are none."""
    path = hf / "model.safetensors"
    if not path.exists() or not (hf / "config.json").exists():
        raise ArgumentError(
            f"{hf}: expected a trained model, found none; train it (python -m edge.builtin.train)"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_own_text(folder: Path, texts: Sequence[OwnText], about: dict[str, Any]) -> None:
    """Writes folder/texts.bin: magic, sha256 of the payload, payload (numpy's npz); `about` must be JSON."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        ids=np.concatenate([text.ids for text in texts]).astype(np.uint32),
        lengths=np.array([len(text.ids) for text in texts], np.uint32),
        prompt_tokens=np.array([text.prompt_tokens for text in texts], np.uint32),
        temperatures=np.array([text.temperature for text in texts], np.float32),
        ended=np.array([text.ended for text in texts], np.bool_),
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
    )
    payload = buffer.getvalue()
    write_atomic(folder / _FILE, _MAGIC + hashlib.sha256(payload).digest() + payload)


def read_own_text(folder: Path) -> tuple[list[OwnText], dict[str, Any]]:
    """The texts of a folder and what is known of their making (`target_sha256`, `seed`, ...).

    ArgumentError when there are none, ModelFileError when the file is another, CorruptError when it is damaged.
    """
    path = folder / _FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArgumentError(
            f"{path}: expected the model's own text, found none ({error.strerror}); make it with"
            f" python -m edge.builtin.own_text --family {folder.parent.parent} --corpora DIR"
        ) from error
    if data[: len(_MAGIC)] != _MAGIC:
        raise ModelFileError(f"{path}: expected a model's own text ({_MAGIC!r}), found {data[:8]!r}")
    start = len(_MAGIC) + _DIGEST_BYTES
    if hashlib.sha256(data[start:]).digest() != data[len(_MAGIC) : start]:
        raise CorruptError(f"{path}: own text is damaged (its sha256 differs); delete it and make it again")
    try:
        with np.load(io.BytesIO(data[start:]), allow_pickle=False) as arrays:
            parts = np.split(arrays["ids"].astype(np.int64), np.cumsum(arrays["lengths"])[:-1])
            facts = zip(
                parts,
                arrays["prompt_tokens"].tolist(),
                np.round(arrays["temperatures"].astype(np.float64), 4).tolist(),
                arrays["ended"].tolist(),
                strict=True,
            )
            texts = [OwnText(*fact) for fact in facts]
            about: dict[str, Any] = json.loads(arrays["about"].tobytes())
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ModelFileError(f"{path}: expected a model's own text, found other arrays ({error})") from error
    return texts, about


def load_own_text(folder: Path) -> list[Ids]:
    """The texts of a folder as ids without begin and end token; errors as of `read_own_text`."""
    return [text.ids for text in read_own_text(folder)[0]]


def write_texts(
    model: Decoder,
    stories: Sequence[Ids],
    texts: int,
    new_tokens: int = 256,
    seed: int = 0,
    show: Callable[[int, int], None] = lambda _texts, _tokens: None,
) -> list[OwnText]:
    """Texts of the model after story beginnings, half of them at each temperature, in batches of one prompt length.

    No two start from the same story nor, at one prompt length, from the same tokens. Fewer than asked when the
    stories do not suffice; ArgumentError when no story or text is there to begin with. `show` is told the texts and
    the tokens so far.
    """
    shortest, longest = PROMPT_TOKENS
    random = np.random.default_rng(seed)
    order = [int(n) for n in random.permutation(len(stories)) if len(stories[n]) > longest]
    if texts < 1 or not order:
        raise ArgumentError(
            f"own text: expected at least 1 text and a story of {longest + 1} tokens, found {texts} texts and"
            f" {len(order)} such stories"
        )
    used: set[tuple[int, ...]] = set()
    written: list[OwnText] = []
    sampled = 0

    def count(tokens: int) -> None:
        nonlocal sampled
        sampled += tokens
        show(len(written), sampled)

    while len(written) < texts and order:
        batch = len(written) // _ROWS
        prompt_tokens = int(random.integers(shortest, longest + 1))
        prompts: list[Ids] = []
        while order and len(prompts) < min(_ROWS, texts - len(written)):
            prompt = stories[order.pop()][:prompt_tokens]
            if (key := tuple(prompt.tolist())) not in used:
                used.add(key)
                prompts.append(np.concatenate(([BOS_ID], prompt)))
        if not prompts:
            break
        temperature = TEMPERATURES[batch % len(TEMPERATURES)]
        tokens = min(new_tokens, model.config.max_position_embeddings - prompt_tokens)
        rows = continue_batch(
            model, np.stack(prompts), tokens, temperature, (seed << 20) + batch, BOS_ID, count
        )
        written += [
            OwnText(np.concatenate((prompt[1:], row.ids)), prompt_tokens, temperature, row.ended)
            for prompt, row in zip(prompts, rows, strict=True)
        ]
    return written


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m edge.builtin.own_text", description=__doc__)
    parser.add_argument("--family", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--model", default="story", help="the run in the family whose text it is")
    parser.add_argument("--texts", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of a text, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    hf, out = args.family / args.model / "hf", args.family / args.model / "own"
    try:
        sha256 = model_sha256(hf)
        corpus = load_corpus(args.corpora, with_books=False)
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    model = load_hf(hf).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_file(str(hf / "tokenizer.json"))
    stories = encode_all(tokenizer, corpus.stories)
    started = time.monotonic()
    columns = (TextColumn("own text"), BarColumn(), TextColumn("{task.fields[note]}"))
    try:
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("", total=args.texts, note="")

            def show(texts: int, tokens: int) -> None:
                rate = tokens / (time.monotonic() - started)
                bar.update(task, completed=texts, note=f"{tokens:,} tokens  {rate:,.0f} tok/s")

            texts = write_texts(model, stories, args.texts, args.tokens, args.seed, show)
    except KeyboardInterrupt:
        print("interrupted: nothing written", file=sys.stderr)
        return 130
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - started
    about = {
        "target_sha256": sha256,
        "corpora_sha256": corpus.sha256,
        "seed": args.seed,
        "new_tokens": args.tokens,
        "seconds": round(seconds, 1),
    }
    save_own_text(out, texts, about)
    n_tokens = sum(len(text.ids) - text.prompt_tokens for text in texts)
    ended = sum(text.ended for text in texts) / max(1, len(texts))
    print(
        f"{len(texts):,} texts, {n_tokens:,} sampled tokens, {ended:.0%} ended by themselves, {seconds:.0f} s;"
        f" in {out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
