"""What every foreign runtime shares with an engine: requests one at a time, streams, chats, stop strings, counts."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any, Protocol

import _edge
import numpy as np
from numpy.typing import NDArray

from edge.completion import Chunk, Completion, collect
from edge.config import GenerationConfig, config_from
from edge.prompt import check_context, has_begun, prompt_ids
from edge.stream import Stream, Turns
from edge.tokenizer import Tokenizer
from edge.watch import Progress
from edge.writer import Writer
from flashload.errors import ArgumentError, EdgeError
from flashload.machine import peak_rss_bytes

#: A token, its log-probability under the model, and the most likely ids with theirs.
Drawn = tuple[int, float, list[tuple[int, float]]]


#: Tokens of context where nobody says.
USUAL_CONTEXT = 4096


class Peer(ABC):
    """A model in another runtime, with the calls of :class:`edge.Engine` that do not speak of memory.

    Requests may come from any thread and are served one after the other; :meth:`cancel` may be called from any.

    Attributes:
        backend: its name; ``version`` of its package.
        context: tokens that fit, prompt and text together.
        notes: as :attr:`edge.Engine.notes`; none.
        tokenizer: edge's, made from the model's own files.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self, backend: str, version: str, tokenizer: Tokenizer, context: int, vocab_size: int
    ) -> None:
        self.backend = backend
        self.version = version
        self.tokenizer = tokenizer
        self.context = context
        self.vocab_size = vocab_size
        self.load_seconds = 0.0
        self._turns = Turns()
        self._cancelled = False
        self._closed = False

    # -- requests: as edge.Engine has them --------------------------------------------------------------------------

    def generate(
        self, prompt: str | Sequence[int], *, on_progress: Progress | None = None, **settings: Any
    ) -> Completion:
        """See :meth:`edge.Engine.generate`; the prompt is one step."""
        return collect(self.stream(prompt, on_progress=on_progress, **settings), settings.get("logprobs"))

    def stream(
        self, prompt: str | Sequence[int], *, on_progress: Progress | None = None, **settings: Any
    ) -> Stream:
        """See :meth:`edge.Engine.stream`; the prompt is one step."""
        tokens = prompt_ids(prompt, self.tokenizer, self.vocab_size)
        begun = has_begun(tokens, self.tokenizer)
        return self._streamed(tokens, config_from(settings), begun, on_progress)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        template: str | None = None,
        on_progress: Progress | None = None,
        **settings: Any,
    ) -> Completion | Stream:
        """See :meth:`edge.Engine.chat`."""
        from edge.chat import prompt_tokens

        config = config_from(settings)
        tokens = prompt_tokens(self.tokenizer, messages, template=template)
        chunks = self._streamed(tokens, config, False, on_progress)
        return chunks if stream else collect(chunks, config.logprobs)

    @abstractmethod
    def score(self, text: str | Sequence[int]) -> list[float | None]:
        """See :meth:`edge.Engine.score`."""

    def cancel(self) -> None:
        """Ends the running request after its token. Safe from any thread."""
        self._cancelled = True

    def stats(self) -> dict[str, Any]:
        """What is known of a foreign runtime: its name and the memory of the process."""
        return {"backend": self.backend, "version": self.version, "peak_memory_bytes": peak_rss_bytes()}

    def close(self) -> None:
        """Gives the model back. May be called twice."""
        with closing(self._turns.take_last(lambda: self._cancelled)):
            if not self._closed:
                self._closed = True
                self._free()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- what a runtime brings --------------------------------------------------------------------------------------

    @abstractmethod
    def _draw(self, tokens: list[int], config: GenerationConfig, seed: int, limit: int) -> Iterator[Drawn]:
        """At most ``limit`` tokens of the text that goes on after ``tokens``, the first after the prompt's pass."""

    @abstractmethod
    def _free(self) -> None:
        """Returns what the runtime holds."""

    # -- inside -----------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise EdgeError("engine: closed; load the model again")

    def _streamed(
        self, tokens: list[int], config: GenerationConfig, continues: bool, on_progress: Progress | None
    ) -> Stream:
        if config.speculation not in ("auto", "off"):
            raise ArgumentError(
                f"speculation: expected auto or off with {self.backend}, found {config.speculation!r}"
            )
        if config.overflow != "error":
            raise ArgumentError(f"overflow: expected error with {self.backend}, found {config.overflow!r}")
        check_context(len(tokens), config.max_tokens or 0, self.context)
        return Stream(self._turns, self._chunks(tokens, config, continues, on_progress))

    def _chunks(
        self, tokens: list[int], config: GenerationConfig, continues: bool, on_progress: Progress | None
    ) -> Generator[Chunk, None, None]:
        self._check_open()
        self._cancelled = False
        limit = config.max_tokens if config.max_tokens is not None else self.context - len(tokens)
        seed = config.seed if config.seed is not None else secrets.randbits(63)
        writer = Writer(self.tokenizer, config, limit, continues)
        start = first = time.perf_counter()
        if not writer.ended:
            for drawn in self._draw(tokens, config, seed, limit):
                if writer.n_generated == 0:
                    first = time.perf_counter()
                    if on_progress is not None:
                        on_progress(len(tokens), len(tokens))
                yield writer.push(*drawn)
                if self._cancelled and not writer.ended:
                    writer.cancel()
                if writer.ended:
                    break
        yield writer.finish(self._stats(len(tokens), writer.n_generated, seed, first - start, first))

    def _stats(
        self, n_prompt: int, n_generated: int, seed: int, prefill: float, first: float
    ) -> dict[str, Any]:
        decode = time.perf_counter() - first
        passes = max(0, n_generated - 1)
        return {
            **self.stats(),
            "prompt_tokens": n_prompt,
            "generated_tokens": n_generated,
            "seed": seed,
            "load_seconds": self.load_seconds,
            "prefill_seconds": prefill,
            "decode_seconds": decode,
            "prefill_tokens_per_second": n_prompt / prefill if prefill > 0 else 0.0,
            "decode_tokens_per_second": passes / decode if decode > 0 else 0.0,
        }


class Runner(Protocol):
    """A runtime that shows its logits."""

    vocab_size: int
    context: int

    def restart(self) -> None:
        """Forgets the text."""
        ...

    def feed(self, tokens: Sequence[int], every: bool = False) -> NDArray[np.float32]:
        """Logits after ``tokens``, which follow what was fed: [vocab_size], or of ``every`` one [n, vocab_size]."""
        ...

    def close(self) -> None: ...


class LogitsPeer(Peer):
    """A peer whose tokens edge's samplers draw: the same settings mean the same as with edge's own engine."""

    _SCORE_ROWS = 64

    def __init__(self, backend: str, version: str, tokenizer: Tokenizer, runner: Runner) -> None:
        super().__init__(backend, version, tokenizer, runner.context, runner.vocab_size)
        self._runner = runner

    def score(self, text: str | Sequence[int]) -> list[float | None]:
        tokens = prompt_ids(text, self.tokenizer, self.vocab_size)
        check_context(len(tokens), 0, self.context)
        scores: list[float | None] = [None]
        with closing(self._turns.take()):
            self._check_open()
            self._runner.restart()
            for begin in range(0, len(tokens) - 1, self._SCORE_ROWS):
                part = tokens[begin : min(begin + self._SCORE_ROWS, len(tokens) - 1)]
                logits = self._runner.feed(part, every=True).astype(np.float64)
                top = logits.max(axis=1, keepdims=True)
                norm = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
                following = tokens[begin + 1 : begin + 1 + len(part)]
                scores += [float(v) for v in logits[np.arange(len(part)), following] - norm]
        return scores

    def logits(self, prompt: str | Sequence[int]) -> NDArray[np.float32]:
        """See :meth:`edge.Engine.logits`."""
        tokens = prompt_ids(prompt, self.tokenizer, self.vocab_size)
        check_context(len(tokens), 0, self.context)
        with closing(self._turns.take()):
            self._check_open()
            self._runner.restart()
            return self._runner.feed(tokens)

    def _draw(self, tokens: list[int], config: GenerationConfig, seed: int, limit: int) -> Iterator[Drawn]:
        sampler = _edge.Sampler(config.sampling(seed), self.vocab_size)
        text = list(tokens)
        self._runner.restart()
        logits = self._runner.feed(text)
        for i in range(limit):
            if i > 0:
                logits = self._runner.feed(text[-1:])
            drawn = sampler.sample(logits, text, len(text))
            text.append(drawn[0])
            yield drawn

    def _free(self) -> None:
        self._runner.close()
