"""llama.cpp through the C functions of llama-cpp-python, on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.peer import USUAL_CONTEXT, LogitsPeer
from edge.tokenizer import Tokenizer
from flashload.errors import EdgeError, ModelFileError

_BATCH = 512
_ERROR_LEVEL = 4


class LlamaRunner:
    """One sequence in one context."""

    def __init__(self, package: Any, model: Path, context: int | None, threads: int) -> None:
        self._lib = package
        self._model = self._context = None
        self.last_error = ""
        # Kept, since llama.cpp calls it as long as it is set.
        self._log = package.llama_log_callback(lambda level, text, data: self._logged(level, text))
        package.llama_log_set(self._log, None)
        package.llama_backend_init()
        params = package.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = package.llama_model_load_from_file(str(model).encode(), params)
        if not self._model:
            raise ModelFileError(
                f"{model}: llama.cpp does not load it: {self.last_error or 'no reason given'}"
            )
        context = context or min(USUAL_CONTEXT, int(package.llama_model_n_ctx_train(self._model)))
        options = package.llama_context_default_params()
        options.n_ctx = context
        options.n_batch = options.n_ubatch = min(_BATCH, context)
        options.n_threads = options.n_threads_batch = threads
        self._context = package.llama_init_from_model(self._model, options)
        if not self._context:
            why = self.last_error
            self.close()
            raise EdgeError(
                f"context: llama.cpp has no room for {context} tokens: {why or 'no reason given'}"
            )
        self.context = context
        self.vocab_size = int(package.llama_vocab_n_tokens(package.llama_model_get_vocab(self._model)))
        self._n_fed = 0

    def _logged(self, level: int, text: bytes | None) -> None:
        if level >= _ERROR_LEVEL and text:
            self.last_error = text.decode(errors="replace").strip() or self.last_error

    def restart(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._n_fed = 0

    def feed(self, tokens: Sequence[int], every: bool = False) -> NDArray[np.float32]:
        rows: list[NDArray[np.float32]] = []
        for begin in range(0, len(tokens), _BATCH):
            part = tokens[begin : begin + _BATCH]
            last = begin + len(part) == len(tokens)
            self._decode(part, every, last)
            if every:
                rows += [self._logits(i) for i in range(len(part))]
        return np.stack(rows) if every else self._logits(-1)

    def _decode(self, tokens: Sequence[int], every: bool, last: bool) -> None:
        lib = self._lib
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i] = token
                batch.pos[i] = self._n_fed + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = every or (last and i + 1 == len(tokens))
            code = lib.llama_decode(self._context, batch)
        finally:
            lib.llama_batch_free(batch)
        if code:
            raise EdgeError(
                f"llama.cpp: llama_decode returned {code}: {self.last_error or 'no reason given'}"
            )
        self._n_fed += len(tokens)

    def _logits(self, row: int) -> NDArray[np.float32]:
        address = ctypes.cast(
            self._lib.llama_get_logits_ith(self._context, row), ctypes.POINTER(ctypes.c_float)
        )
        return np.array(np.ctypeslib.as_array(address, (self.vocab_size,)), np.float32)

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = self._context = None


def open_peer(
    package: Any, model: Path, tokenizer: Tokenizer, context: int | None, threads: int
) -> LogitsPeer:
    """A GGUF file in llama.cpp."""
    runner = LlamaRunner(package, model, context, threads)
    return LogitsPeer("llama.cpp", str(package.__version__), tokenizer, runner)
