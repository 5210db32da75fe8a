"""ONNX Runtime through onnxruntime-genai: the folder of a model it made (genai_config.json), on the CPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.peer import USUAL_CONTEXT, LogitsPeer
from edge.tokenizer import Tokenizer
from flashload.errors import ArgumentError, ModelFileError


class OnnxRunner:
    """One generator, used for its passes alone."""

    def __init__(self, package: Any, model: Path, context: int | None, threads: int) -> None:
        settings = _settings(model)
        self.vocab_size = int(settings["vocab_size"])
        longest = int(settings.get("context_length", context or USUAL_CONTEXT))
        if context is not None and context > longest:
            raise ArgumentError(f"context: expected at most the model's {longest} tokens, found {context}")
        self.context = context or min(USUAL_CONTEXT, longest)
        self._package = package
        config = package.Config(str(model))
        config.clear_providers()
        config.overlay(
            json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}})
        )
        try:
            self._model = package.Model(config)
        except Exception as error:  # what the package raises is not documented
            raise ModelFileError(f"{model}: onnxruntime does not load it: {error}") from error
        self._params = package.GeneratorParams(self._model)
        self._params.set_search_options(max_length=self.context)
        self._generator: Any = None

    def restart(self) -> None:
        self._generator = self._package.Generator(self._model, self._params)

    def feed(self, tokens: Sequence[int], every: bool = False) -> NDArray[np.float32]:
        if not every:
            return self._pass(tokens)
        # Of a pass it shows the last row alone.
        return np.stack([self._pass([token]) for token in tokens])

    def _pass(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self._generator.append_tokens(np.asarray(tokens, np.int32))
        logits: NDArray[np.float32] = np.array(self._generator.get_logits(), np.float32)
        last: NDArray[np.float32] = logits.reshape(-1, self.vocab_size)[-1]
        return last

    def close(self) -> None:
        self._generator = self._params = self._model = None


def _settings(model: Path) -> dict[str, Any]:
    path = model / "genai_config.json"
    try:
        settings = json.loads(path.read_text("utf-8"))["model"]
        int(settings["vocab_size"])
    except OSError as error:
        why = f"expected the folder of a model for onnxruntime-genai: {error.strerror}"
        raise ModelFileError(f"{path}: {why}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path}: expected model.vocab_size, found none ({error})") from None
    return dict(settings)


def open_peer(
    package: Any, model: Path, tokenizer: Tokenizer, context: int | None, threads: int
) -> LogitsPeer:
    """The folder of an ONNX model in onnxruntime-genai."""
    runner = OnnxRunner(package, model, context, threads)
    return LogitsPeer("onnxruntime", str(package.__version__), tokenizer, runner)
