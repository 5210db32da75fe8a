"""MLC LLM through its stepping engine, which draws by itself: it shows no logits, so some settings have no counterpart.

Its OpenAI-like completions do not say which token was drawn (a name keeps only the visible ASCII of a spelling, and
pieces of a character pass without one), ``mlc_llm.serve.sync_engine`` does.
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edge.backends.peer import USUAL_CONTEXT, Drawn, Peer
from edge.config import GenerationConfig
from edge.tokenizer import Tokenizer
from flashload.errors import ArgumentError, ModelFileError

#: Settings that MLC has no counterpart for, and the values at which none is needed; of log-probabilities it names only
#: the drawn token's by its id.
_ALLOWED = {"top_k": (0, 40), "min_p": (0.0,), "typical_p": (1.0,), "logprobs": (None, 0)}


class MlcPeer(Peer):
    """The folder of a compiled model in ``mlc_llm.serve.sync_engine.SyncMLCEngine``."""

    def __init__(self, package: Any, model: Path, tokenizer: Tokenizer, context: int) -> None:
        version = str(getattr(package, "__version__", "unknown"))
        super().__init__("mlc", version, tokenizer, context, tokenizer.vocab_size)
        self._arrived: deque[tuple[str, Any]] = deque()
        self._requests = map(str, itertools.count())
        try:
            self._data = importlib.import_module("mlc_llm.serve.data")
            self._config = importlib.import_module("mlc_llm.protocol.generation_config").GenerationConfig
            self._engine: Any = importlib.import_module("mlc_llm.serve.sync_engine").SyncMLCEngine(
                str(model), device="auto", mode="interactive", request_stream_callback=self._receive
            )
        except Exception as error:  # what the package raises is not documented
            raise ModelFileError(f"{model}: mlc does not load it: {error}") from error

    def score(self, text: str | Sequence[int]) -> list[float | None]:
        raise ArgumentError("score: mlc shows no log-probabilities of a given text; use another backend")

    def _receive(self, outputs: Sequence[Any]) -> None:
        """The engine's callback: what a step brought, of each request."""
        for output in outputs:
            request, streams = output.unpack()
            self._arrived.extend((request, stream) for stream in streams)

    def _draw(self, tokens: list[int], config: GenerationConfig, seed: int, limit: int) -> Iterator[Drawn]:
        for name, allowed in _ALLOWED.items():
            if getattr(config, name) not in allowed:
                raise ArgumentError(f"{name}: mlc has no such setting, found {getattr(config, name)!r}")
        settings = self._config(
            max_tokens=limit,
            temperature=config.temperature,
            top_p=config.top_p,
            presence_penalty=config.presence_penalty,
            frequency_penalty=config.frequency_penalty,
            repetition_penalty=config.repetition_penalty,
            logit_bias=dict(config.logit_bias) or None,
            seed=seed % (1 << 31),
            logprobs=True,
            debug_config={"ignore_eos": True},  # the text's end is found here, as with every backend
        )
        request = next(self._requests)
        self._arrived.clear()
        self._engine.add_request(
            self._engine.create_request(request, [self._data.TokenData(tokens)], settings)
        )
        ended = False
        try:
            while not ended:
                while not self._arrived:
                    self._engine.step()
                of, stream = self._arrived.popleft()
                if of != request:
                    continue
                ended = stream.finish_reason is not None
                for token, told in zip(
                    stream.delta_token_ids, stream.delta_logprob_json_strs or (), strict=True
                ):
                    yield int(token), float(json.loads(told)["logprob"]), []
        finally:
            if not ended:
                self._engine.abort_request(request)

    def _free(self) -> None:
        self._engine = None


def open_peer(package: Any, model: Path, tokenizer: Tokenizer, context: int | None, threads: int) -> MlcPeer:
    """The folder of a compiled model; it takes its threads from its own settings."""
    return MlcPeer(package, model, tokenizer, context or USUAL_CONTEXT)
