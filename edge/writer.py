"""From drawn tokens to chunks of text: decoding, stop strings, ends of text, and the limit of one request."""

from __future__ import annotations

from typing import Any

from edge.completion import Chunk, StopScanner, TokenLogprob
from edge.config import GenerationConfig
from edge.tokenizer import StreamDecoder, Tokenizer


class Writer:
    """One text in the making, outside the core.

    Attributes:
        eos: the tokens that end it.
        n_generated: tokens pushed.
    """

    def __init__(
        self, tokenizer: Tokenizer, config: GenerationConfig, limit: int, continues: bool, index: int = 0
    ) -> None:
        """
        Args:
            limit: tokens after which it ends.
            continues: it goes on a text that has begun (:class:`edge.tokenizer.StreamDecoder`).
            index: its chunks' :attr:`edge.Chunk.index`.
        """
        self.eos = frozenset() if config.ignore_eos else frozenset(tokenizer.eos_ids)
        self.n_generated = 0
        self._limit = limit
        self._index = index
        self._with_logprobs = config.logprobs is not None
        self._decoder = StreamDecoder(tokenizer, continues=continues)
        self._scanner = StopScanner(config.stop)
        self._reason: str | None = None if limit > 0 else "length"

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be drawn."""
        return self._reason is not None

    @property
    def n_left(self) -> int:
        """Tokens it may still be pushed."""
        return self._limit - self.n_generated

    def push(self, token: int, logprob: float, top: list[tuple[int, float]]) -> Chunk:
        """The chunk of a drawn token, as the core's samplers report it."""
        self.n_generated += 1
        text = ""
        if token in self.eos:
            self._reason = "stop"
        else:
            text = self._scanner.push(self._decoder.push(token))
            if self._scanner.stopped:
                self._reason = "stop"
            elif self.n_left <= 0:
                self._reason = "length"
        detail = TokenLogprob(token, logprob, tuple(top)) if self._with_logprobs else None
        return Chunk(text, token, detail, index=self._index)

    def cancel(self) -> None:
        """It ends here, unfinished."""
        self._reason = "cancelled"

    def finish(self, stats: dict[str, Any]) -> Chunk:
        """The last chunk: what was held back, why the text ended, and what it cost."""
        text = (
            ""
            if self._scanner.stopped
            else self._scanner.push(self._decoder.finish()) + self._scanner.finish()
        )
        return Chunk(text, finish_reason=self._reason or "length", stats=stats, index=self._index)
