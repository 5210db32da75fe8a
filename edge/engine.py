"""The engine: a loaded model, its requests, and what they cost."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal, overload

import _edge

from edge import batch, forks, live, session, speculation
from edge.completion import Chunk, Completion, collect
from edge.config import GenerationConfig, config_from
from edge.meter import Meter
from edge.prefixes import Prefixes
from edge.prompt import check_context, has_begun, prompt_ids
from edge.stream import Passes, Stream, Turns
from edge.tokenizer import Tokenizer
from edge.writer import Writer
from flashload.errors import CancelledError, EdgeError
from flashload.plan import Plan

Progress = Callable[[int, int], None]


class Engine:
    """A model in memory, made by :func:`edge.load`.

    Requests may come from any thread and are served one after the other; :meth:`cancel` may be called from any.

    Attributes:
        plan: where the weights live and how many bytes each part takes.
        tokenizer: text to ids and back.
        metadata: what the pack says of the model and its source.
    """

    def __init__(
        self,
        core: _edge.Engine,
        plan: Plan,
        tokenizer: Tokenizer,
        metadata: Mapping[str, Any],
        load_seconds: float,
        drafting: speculation.Drafting | None = None,
        memory: live.LiveMemory | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.plan = plan
        self.tokenizer = tokenizer
        self.metadata = metadata
        self.load_seconds = load_seconds
        self._core: _edge.Engine | None = core
        self._sequence: _edge.Sequence | None = _edge.Sequence(core)
        self._drafting: speculation.Drafting | None = drafting or speculation.Drafting()
        self._speculators: speculation.Speculators | None = speculation.Speculators(
            core, plan.context, self._drafting
        )
        self._memory = memory
        self._prefixes = Prefixes() if prefixes is None else prefixes
        self._turns = Turns()
        self._passes = Passes()
        # No Event, whose own lock a signal handler that calls cancel() may find taken by what it interrupts.
        self._cancelled = False
        self._loaded_by = os.getpid()
        forks.watch(self)

    # -- requests ---------------------------------------------------------------------------------------------------

    def generate(
        self, prompt: str | Sequence[int], *, on_progress: Progress | None = None, **settings: Any
    ) -> Completion:
        """Continues ``prompt`` and returns the whole text.

        Args:
            prompt: text (special tokens of the vocabulary are added as the model wants them), or token ids as they are.
            on_progress: called with (prompt tokens done, prompt tokens) after each prompt chunk.
            settings: the fields of :class:`edge.GenerationConfig`.

        Raises:
            ArgumentError: a setting is out of range.
            ContextOverflowError: prompt and ``max_tokens`` exceed the context; names both numbers.
            DiskError, CorruptError: the drive failed or bytes do not match their checksum; the engine stays usable.
        """
        return collect(self.stream(prompt, on_progress=on_progress, **settings), settings.get("logprobs"))

    def stream(
        self, prompt: str | Sequence[int], *, on_progress: Progress | None = None, **settings: Any
    ) -> Stream:
        """As :meth:`generate`, one :class:`edge.Chunk` per token; the last one carries finish_reason and stats."""
        config = config_from(settings)
        tokens = self._prompt_tokens(prompt)
        continues = has_begun(tokens, self.tokenizer)
        return Stream(self._turns, self._chunks(tokens, config, on_progress, continues))

    @overload
    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, stream: Literal[False] = False, **settings: Any
    ) -> Completion: ...

    @overload
    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, stream: Literal[True], **settings: Any
    ) -> Stream: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        template: str | None = None,
        on_progress: Progress | None = None,
        **settings: Any,
    ) -> Completion | Stream:
        """Answers a conversation of ``{"role": ..., "content": ...}`` messages through the model's chat template.

        Text inside messages never yields special tokens. Turns already computed are not computed again.

        Raises:
            TemplateError: the model has no template and none is given, or the template fails or exceeds its limits.
        """
        from edge.chat import prompt_tokens

        config = config_from(settings)
        tokens = prompt_tokens(self.tokenizer, messages, template=template)
        chunks = Stream(self._turns, self._chunks(tokens, config, on_progress, continues=False))
        return chunks if stream else collect(chunks, config.logprobs)

    def score(self, text: str | Sequence[int]) -> list[float | None]:
        """Natural log-probability of each token given those before it; None for the first, which nothing precedes."""
        tokens = self._prompt_tokens(text)
        with self._serving() as sequence:
            check_context(len(tokens), 0, self.plan.context)
            return [None, *sequence.score(tokens)]

    def logits(self, prompt: str | Sequence[int]) -> Any:
        """The logits [vocab_size] (float32 ndarray) of the token after ``prompt``."""
        tokens = self._prompt_tokens(prompt)
        with self._serving() as sequence:
            sequence.set_tokens(tokens)
            return sequence.logits()

    def forget(self) -> None:
        """Drops the texts of earlier requests: the next one shares no beginning with them."""
        with self._serving():
            self._prefixes.clear()
            self._sequence = None  # its memory goes before the new one's is taken
            self._sequence = _edge.Sequence(self._open_core())

    def cancel(self) -> None:
        """Ends the running request within one layer: its finish_reason is "cancelled". Safe from any thread."""
        self._cancelled = True
        core = self._core  # close() may take it away meanwhile
        if core is not None:
            core.cancel()

    generate_many, stream_many = batch.generate_many, batch.stream_many
    save_session, load_session = session.save_session, session.load_session
    set_memory = live.set_memory

    @property
    def context(self) -> int:
        """Tokens that fit, prompt and text together."""
        return self.plan.context

    # -- life -------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Bytes by use (a draft model's under "draft"), flash traffic and cache hits since load."""
        stats = dict(self._open_core().stats())
        if self._drafting is not None and self._drafting.draft is not None:
            used_bytes = self._drafting.draft.stats()["used_bytes"]
            stats["by_tag"] = stats["by_tag"] | {"draft": used_bytes}
            for key in ("used_bytes", "peak_bytes", "budget_bytes"):
                stats[key] += used_bytes
        return stats

    def prepare(self) -> None:
        """Makes what the first request would make otherwise, the drafters of ``speculation="auto"``, and times them."""
        with self._serving():
            assert self._speculators is not None
            self._speculators.measure()

    def can_draft(self, drafter: str) -> bool:
        """Whether ``speculation=drafter`` has what it needs: a draft model, a copy, heads that came with the model."""
        return self._drafting is not None and self._drafting.has(drafter)

    @property
    def memory_changes(self) -> list[dict[str, Any]]:
        """Every change of the budget since load, those that a request saw also in its stats: ``from_bytes`` and
        ``to_bytes``, ``placement``, ``reason`` ("asked", or what the pressure was), and ``error`` where one failed."""
        return [] if self._memory is None else list(self._memory.changes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be had inside the budget, and what of texts parked on a drive failed, a sentence each."""
        return (*(() if self._drafting is None else self._drafting.notes), *self._prefixes.notes)

    def close(self) -> None:
        """Returns all memory. Waits for a running request; call :meth:`cancel` first to cut it short.

        An unfinished stream of this thread, or a cancelled one that nobody reads, ends with it.
        """
        with closing(self._turns.take_last(lambda: self._cancelled)), self._passes.between():
            self._prefixes.close()
            self._speculators = None
            self._drafting = None
            self._sequence = None
            self._core = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _open_core(self) -> _edge.Engine:
        if self._core is not None:
            return self._core
        if self._loaded_by != os.getpid():
            raise EdgeError(
                f"engine: loaded by process {self._loaded_by} before it forked; load the model in this one too"
            )
        raise EdgeError("engine: closed; load the model again")

    def left_behind(self) -> object:
        """In the child of a fork: closed from now on, and nothing of it is freed."""
        kept = (self._core, self._sequence, self._speculators, self._drafting, self._prefixes, self._memory)
        self._core = self._sequence = self._speculators = self._drafting = self._memory = None
        self._prefixes, self._turns, self._passes = Prefixes(), Turns(), Passes()
        return kept

    def _begin(self) -> _edge.Sequence:
        """What the request whose turn it is works with; a cancel that came before it is forgotten."""
        core = self._open_core()
        self._cancelled = False
        core.resume()
        assert self._sequence is not None
        return self._sequence

    @contextmanager
    def _serving(self) -> Iterator[_edge.Sequence]:
        with closing(self._turns.take()), self._passes.next():
            yield self._begin()

    def _part_with_drafters(self, keep_draft: bool) -> speculation.Drafting:
        """Gives the drafters' memory back; returns what is left to draft with."""
        assert self._speculators is not None and self._drafting is not None
        self._speculators.forget()
        draft, is_copy = self._drafting.draft, self._drafting.draft_is_copy
        self._drafting = speculation.Drafting(draft if keep_draft else None, draft_is_copy=is_copy)
        return self._drafting

    def _settle(self, plan: Plan, drafting: speculation.Drafting) -> None:
        """The plan in place from now on, and what there is to draft with."""
        assert self._speculators is not None
        self.plan, self._drafting = plan, drafting
        self._speculators.renew(drafting)

    def _hold_kv(self) -> None:
        """While several texts share pages, keys and values stay in memory or on a drive, wherever they are."""
        if self._memory is not None:
            with self._passes.next():
                self._memory.holds_kv = True

    def _free_kv(self) -> None:
        """They may move again."""
        if self._memory is not None:
            self._passes.when_free(partial(setattr, self._memory, "holds_kv", False))

    def _at_prefix(self, tokens: list[int]) -> _edge.Sequence:
        """What a request begins with: the text that shares most with it, of this and earlier requests."""
        assert self._sequence is not None
        core, shares = self._open_core(), self.plan.shares_kv
        self._sequence = self._prefixes.begin(core, self._sequence, tokens, shares)
        return self._sequence

    def _relieve(self, n_rows: int = speculation.MOST_ROWS) -> None:
        """Before a pass: gives way where others need memory, and earlier texts where its rows need pages."""
        if len(self._prefixes):
            with self._passes.next():
                self._make_room(n_rows)
        self._give_way()

    def _make_room(self, n_rows: int) -> None:
        """Within a pass's turn: earlier texts leave where its rows need pages."""
        if len(self._prefixes):
            self._prefixes.make_room(self._open_core(), n_rows)

    def _give_way(self) -> None:
        """Before a pass: gives memory that others need, or takes it back."""
        if self._memory is not None and self._memory.due:
            with self._passes.between():
                self._memory.relieve(self)

    def _prompt_tokens(self, prompt: str | Sequence[int]) -> list[int]:
        return prompt_ids(prompt, self.tokenizer, self.vocab_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding (at least the tokenizer's vocabulary)."""
        return int(self.metadata["config"]["vocab_size"])

    def _chunks(
        self, tokens: list[int], config: GenerationConfig, on_progress: Progress | None, continues: bool
    ) -> Generator[Chunk, None, None]:
        """One text, checked now and computed as it is read, by whoever has the turn then."""
        if config.overflow == "error":
            check_context(len(tokens), config.max_tokens or 0, self.plan.context)
        elif len(tokens) >= self.plan.context:
            tokens = tokens[:1] + tokens[len(tokens) - self.plan.context // 2 :]
        limit = config.max_tokens
        if limit is None:
            limit = max(0, self.plan.context - len(tokens))
        seed = config.seed if config.seed is not None else secrets.randbits(63)
        writer = Writer(self.tokenizer, config, limit, continues)
        return self._generate(tokens, seed, config, writer, on_progress)

    def _generate(
        self,
        tokens: list[int],
        seed: int,
        config: GenerationConfig,
        writer: Writer,
        on_progress: Progress | None,
    ) -> Generator[Chunk, None, None]:
        self._begin()
        settings = speculation.parse(config.speculation)
        speculators = self._speculators if settings is not None else None
        if settings is not None and speculators is not None:
            with self._passes.next():
                speculators.configured(settings)
        meter = Meter(self, seed, speculators)
        sampler = _edge.Sampler(config.sampling(seed), self.vocab_size)
        try:
            with self._passes.next():
                sequence = self._at_prefix(tokens)
                meter.reused = sequence.set_tokens(tokens)
            # The last token's pass belongs to the prompt: its logits are what the first token is drawn from.
            n_new, start = sequence.n_pending, time.perf_counter()
            while not writer.ended and sequence.n_pending > 0:
                self._relieve(min(sequence.n_pending, self.plan.max_rows))
                with self._passes.next():
                    sequence.advance()
                if on_progress is not None:
                    on_progress(len(tokens) - sequence.n_pending, len(tokens))
            meter.prefilled(len(tokens))
            self._prefixes.computed(n_new, time.perf_counter() - start)
            ends = list(writer.eos)
            while not writer.ended:
                self._give_way()
                with self._passes.next():
                    self._make_room(speculation.MOST_ROWS)
                    if sequence.n_tokens >= self.plan.context:
                        sequence.shift(1, self.plan.context // 2)
                    n_kept = n_before = sequence.n_tokens
                    if settings is None or speculators is None:
                        drawn = [sequence.next(sampler)]
                    else:
                        speculator = speculators.configured(settings, begins=False)
                        drawn = speculator.step(sequence, sampler, writer.n_left, ends)
                        del speculator  # a change of the budget gives its memory back
                try:
                    for one in drawn:
                        n_kept += 1
                        yield writer.push(*one)
                        if writer.ended:
                            break
                finally:
                    # What came after a stop string, or was never read, did not happen.
                    if n_kept < n_before + len(drawn):
                        self._passes.when_free(partial(sequence.truncate, n_kept))
        except CancelledError:
            writer.cancel()
        yield writer.finish(meter.stats(writer.n_generated))
