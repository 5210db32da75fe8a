"""MLC LLM through its engine, which draws by itself: it shows no logits, so some settings have no counterpart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edge.backends.peer import USUAL_CONTEXT, Drawn, Peer
from edge.config import GenerationConfig
from edge.tokenizer import Tokenizer
from flashload.errors import ArgumentError, ModelFileError

#: Settings that MLC's completions know, and those it has no counterpart for but at these values.
_DEFAULTS = {"top_k": (0, 40), "min_p": (0.0,), "typical_p": (1.0,), "repetition_penalty": (1.0,)}
_MOST_LOGPROBS = 5


class MlcPeer(Peer):
    """The folder of a compiled model in ``mlc_llm.MLCEngine``."""

    def __init__(self, package: Any, model: Path, tokenizer: Tokenizer, context: int) -> None:
        version = str(getattr(package, "__version__", "unknown"))
        super().__init__("mlc", version, tokenizer, context, tokenizer.vocab_size)
        try:
            self._engine = package.MLCEngine(str(model), device="auto", mode="interactive")
        except Exception as error:  # what the package raises is not documented
            raise ModelFileError(f"{model}: mlc does not load it: {error}") from error
        self._model = str(model)

    def score(self, text: str | Sequence[int]) -> list[float | None]:
        raise ArgumentError("score: mlc shows no log-probabilities of a given text; use another backend")

    def _draw(self, tokens: list[int], config: GenerationConfig, seed: int, limit: int) -> Iterator[Drawn]:
        for name, allowed in _DEFAULTS.items():
            if getattr(config, name) not in allowed:
                raise ArgumentError(f"{name}: mlc has no such setting, found {getattr(config, name)!r}")
        n_top = config.logprobs or 0
        if n_top > _MOST_LOGPROBS:
            raise ArgumentError(f"logprobs: expected at most {_MOST_LOGPROBS} with mlc, found {n_top}")
        replies = self._engine.completions.create(
            prompt=tokens,
            model=self._model,
            stream=True,
            max_tokens=limit,
            temperature=config.temperature,
            top_p=config.top_p,
            presence_penalty=config.presence_penalty,
            frequency_penalty=config.frequency_penalty,
            logit_bias={str(token): bias for token, bias in config.logit_bias.items()} or None,
            seed=seed % (1 << 31),
            logprobs=True,
            top_logprobs=n_top,
        )
        for reply in replies:
            for choice in reply.choices:
                for item in choice.logprobs.content if choice.logprobs is not None else ():
                    top = [(self._id_of(other), float(other.logprob)) for other in item.top_logprobs]
                    yield self._id_of(item), float(item.logprob), top

    def _id_of(self, item: Any) -> int:
        """The token behind a log-probability, which names it by its spelling."""
        found = self.tokenizer.token_to_id(item.token)
        if found is None:
            ids = self.tokenizer.encode(item.token, add_special_tokens=False)
            found = ids[0] if len(ids) == 1 else None
        if found is None or math.isnan(item.logprob):
            raise ModelFileError(
                f"{self._model}: mlc named a token that its tokenizer.json lacks: {item.token!r}"
            )
        return found

    def _free(self) -> None:
        self._engine.terminate()


def open_peer(package: Any, model: Path, tokenizer: Tokenizer, context: int | None, threads: int) -> MlcPeer:
    """The folder of a compiled model; it takes its threads from its own settings."""
    return MlcPeer(package, model, tokenizer, context or USUAL_CONTEXT)
