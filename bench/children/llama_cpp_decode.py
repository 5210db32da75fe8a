"""Times llama.cpp on one model; the interpreter needs llama-cpp-python and nothing else of this project.

Keys of the request: see ``main``; the rest: ``protocol``. Only the low-level API is used: one ``llama_decode`` per
token and an argmax over the logits, so neither Python nor a sampler takes part in the figure.
"""

from __future__ import annotations

import ctypes
import random
import time
from typing import Any

import llama_cpp as lc
import numpy as np
from protocol import Spent, emit, read_bytes, run

LOAD_MODES = {
    "mmap": lc.LLAMA_LOAD_MODE_MMAP,
    "none": lc.LLAMA_LOAD_MODE_NONE,
    "direct": lc.LLAMA_LOAD_MODE_DIRECT_IO,
    "auto": lc.LLAMA_LOAD_MODE_AUTO,
}


class Session:
    """A loaded model with one sequence."""

    def __init__(self, request: dict) -> None:
        self._silence = lc.llama_log_callback(lambda level, text, data: self._log(level, text))
        self.last_error = ""
        lc.llama_log_set(self._silence, None)
        lc.llama_backend_init()
        params = lc.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = LOAD_MODES[request["load_mode"]]
        params.use_extra_bufts = request["repack"]
        self.model = lc.llama_model_load_from_file(request["model"].encode(), params)
        if not self.model:
            raise RuntimeError(f"does not load: {self.last_error}")
        self.vocab = lc.llama_model_get_vocab(self.model)
        self.n_vocab = lc.llama_vocab_n_tokens(self.vocab)
        options = lc.llama_context_default_params()
        options.n_ctx = request["context"]
        options.n_batch = options.n_ubatch = max(32, min(512, request["prompt_tokens"]))
        options.n_threads = options.n_threads_batch = request["threads"]
        self.n_batch = options.n_batch
        self.context = lc.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"no context of {request['context']} tokens: {self.last_error}")

    def _log(self, level: int, text: bytes) -> None:
        if level >= 4 and text:  # GGML_LOG_LEVEL_ERROR
            self.last_error = text.decode(errors="replace").strip() or self.last_error

    def feed(self, tokens: list[int]) -> int:
        """Runs the tokens; returns the most likely next one."""
        for start in range(0, len(tokens), self.n_batch):
            part = tokens[start : start + self.n_batch]
            array = (lc.llama_token * len(part))(*part)
            code = lc.llama_decode(self.context, lc.llama_batch_get_one(array, len(part)))
            if code:
                raise RuntimeError(f"llama_decode returned {code}: {self.last_error}")
        logits = lc.llama_get_logits_ith(self.context, -1)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, (self.n_vocab,)).argmax())

    def clear(self) -> None:
        lc.llama_memory_clear(lc.llama_get_memory(self.context), True)


def main(request: dict[str, Any]) -> None:
    # model, threads, context, prompt_tokens, tokens, seed, load_mode, repack
    opened = start = time.perf_counter()
    session = Session(request)
    emit(event="loaded", seconds=time.perf_counter() - start, version=lc.__version__, read_bytes=read_bytes())
    numbers = random.Random(request["seed"])
    prompt = [numbers.randrange(3, session.n_vocab) for _ in range(request["prompt_tokens"])]
    session.feed([3 if prompt[0] != 3 else 4, *prompt[1:]])
    first_token_seconds = time.perf_counter() - opened
    session.clear()
    emit(event="warm")
    start = time.perf_counter()
    token = session.feed(prompt)
    prefill_seconds = time.perf_counter() - start
    generated, spent = [token], Spent()
    start = time.perf_counter()
    for i in range(request["tokens"]):
        token = session.feed([token])
        generated.append(token)
        emit(event="token", n=i + 1, seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    emit(
        event="result",
        decode_tokens_per_second=request["tokens"] / seconds,
        prefill_tokens_per_second=len(prompt) / prefill_seconds,
        first_token_seconds=first_token_seconds,
        tokens=generated,
        info=lc.llama_print_system_info().decode(errors="replace").strip(),
        **spent.per_token(request["tokens"]),
    )


if __name__ == "__main__":
    run(main)
