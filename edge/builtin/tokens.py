"""Byte-level BPE tokenizer of the built-in models and the token batches they train on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from edge.builtin.data import END_OF_TEXT


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; id 0 is the one special token, which begins and ends every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_tokens: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


Ids = NDArray[np.int64]


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """Ids of each text, without special tokens."""
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.asarray(encoding.ids, np.int64) for encoding in encodings]


class RowSource:
    """An endless row sequence [length + 1]: texts shuffled anew each epoch, joined by id 0, cut into rows.

    Row n is a function of (texts, seed, n) alone, so a resumed run continues exactly.
    """

    def __init__(self, texts: Sequence[Ids], length: int, seed: int) -> None:
        self._texts = [np.concatenate(([0], ids)) for ids in texts]
        self._length, self._seed = length, seed
        self.tokens = sum(map(len, self._texts))
        self.rows_per_epoch = max(1, (self.tokens - 1) // length)
        self._epoch, self._stream = -1, np.zeros(0, np.int64)

    def row(self, n: int) -> Ids:
        epoch, index = divmod(n, self.rows_per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._texts))
            stream = np.concatenate([self._texts[i] for i in order])
            # A corpus shorter than one row (made-up ones in tests) is repeated up to the length.
            self._stream = np.resize(stream, max(len(stream), self._length + 1))
            self._epoch = epoch
        return self._stream[index * self._length : index * self._length + self._length + 1]


def mixed_batch(
    sources: dict[str, RowSource], used: dict[str, int], rows: int, shares: dict[str, float]
) -> Ids:
    """[rows, length + 1]: of each source its share of the rows, of "stories" what remains.

    A share of a source that is not there falls to the stories. `used` counts the rows taken and is advanced.
    """
    taken = {kind: round(rows * share) for kind, share in shares.items() if kind in sources}
    taken["stories"] = rows - sum(taken.values())
    batch = [sources[kind].row(used[kind] + i) for kind, n in taken.items() for i in range(n)]
    for kind, n in taken.items():
        used[kind] += n
    return np.stack(batch)
