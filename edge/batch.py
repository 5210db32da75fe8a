"""Several texts at once: their tokens share every pass over the weights, and texts that end make room for others.

A pass of one text waits for the weights to arrive; the same weights serve the rows of other texts for little more
(continuous batching: Yu et al., "Orca", OSDI 2022). The beginning that all prompts share is computed once and its keys
and values are held once (Kwon et al., "PagedAttention", SOSP 2023, section 4.4).
"""

from __future__ import annotations

import itertools
import secrets
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import _edge

from edge.completion import Chunk, Completion, collect
from edge.config import GenerationConfig, config_from
from edge.meter import Meter
from edge.stream import Stream
from edge.writer import Writer
from flashload.errors import ArgumentError, CancelledError, ContextOverflowError

if TYPE_CHECKING:
    from edge.engine import Engine

#: Texts of one pass when the caller names no number: beyond, a pass takes as much longer as it brings.
MAX_PARALLEL = 16
#: How long the core goes on by itself: a small model's pass is as short as what happens here between two.
_BURST_MS = 4.0


@dataclass
class _Job:
    """One prompt: what is asked, and what it has once it runs."""

    index: int
    tokens: list[int]
    limit: int
    seed: int
    writer: Writer
    text: _edge.Sequence | None = None
    sampler: _edge.Sampler | None = None
    meter: Meter | None = None

    def finish(self) -> Chunk:
        """Its last chunk; what it held goes back to the pool."""
        stats = {} if self.meter is None else self.meter.stats(self.writer.n_generated)
        self.text = None
        return self.writer.finish(stats)


class _Pages:
    """The pages of keys and values that texts which run together share."""

    def __init__(self, engine: Engine) -> None:
        self.page_tokens = engine._open_core().kv_page_tokens
        self.n_pages = self.of(engine.plan.context)

    def of(self, n_tokens: int) -> int:
        return -(-n_tokens // self.page_tokens)

    def own(self, job: _Job, n_shared: int) -> int:
        """Pages a text needs besides the full ones of its first ``n_shared`` tokens."""
        return self.of(len(job.tokens) + job.limit) - n_shared // self.page_tokens


def generate_many(
    engine: Engine,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_parallel: int = MAX_PARALLEL,
    **settings: Any,
) -> list[Completion]:
    """Continues several prompts, whose tokens are computed together; the texts, in the order of the prompts.

    Each is the text :meth:`generate` gives, to the bit: that of prompt ``i`` has the seed ``seed + i``, so that equal
    prompts are several samples. All that run at the same time share the context's tokens; others wait for room.

    Args:
        prompts: as for :meth:`generate`.
        max_parallel: texts computed at the same time.
        settings: the fields of :class:`edge.GenerationConfig`, for all. Without ``max_tokens`` the texts share what the
            context has left. Nothing is speculated, and texts do not shift.

    Raises:
        ArgumentError: no prompts, or a setting that several texts cannot have.
        ContextOverflowError: one of them does not fit the context by itself.
        DiskError, CorruptError: as for :meth:`generate`; nothing is returned.
    """
    stream = stream_many(engine, prompts, max_parallel=max_parallel, **settings)
    chunks: list[list[Chunk]] = [[] for _ in prompts]
    for chunk in stream:
        chunks[chunk.index].append(chunk)
    return [collect(iter(of_one), settings.get("logprobs")) for of_one in chunks]


def stream_many(
    engine: Engine,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_parallel: int = MAX_PARALLEL,
    **settings: Any,
) -> Stream:
    """As :func:`generate_many`, one :class:`edge.Chunk` per token; ``index`` says whose. Each text has a last chunk."""
    config = config_from(settings)
    check(config, max_parallel)
    if isinstance(prompts, str) or not prompts:
        raise ArgumentError(f"prompts: expected a list of at least one prompt, found {prompts!r}")
    tokens = [engine._prompt_tokens(prompt) for prompt in prompts]
    return Stream(engine._turns, chunks_many(engine, tokens, config, max_parallel))


def check(config: GenerationConfig, max_parallel: int) -> None:
    """What several texts cannot have.

    Raises:
        ArgumentError: names the setting.
    """
    if config.overflow != "error":
        raise ArgumentError(f"overflow: expected 'error' for several texts, found {config.overflow!r}")
    if config.speculation not in ("auto", "off"):
        raise ArgumentError(
            f"speculation: expected 'auto' or 'off' for several texts, found {config.speculation!r}"
        )
    if isinstance(max_parallel, bool) or not isinstance(max_parallel, int) or max_parallel < 1:
        raise ArgumentError(f"max_parallel: expected a number of texts above 0, found {max_parallel!r}")


def room(engine: Engine, tokens: list[list[int]]) -> int:
    """Tokens with which each of the prompts can be continued, if need be after the others; below 0: too long."""
    pages = _Pages(engine)
    n_shared = _n_shared(engine, tokens)
    n_own = pages.n_pages - pages.of(n_shared) + n_shared // pages.page_tokens
    return min(n_own * pages.page_tokens, engine.plan.context) - max(map(len, tokens))


def _jobs(
    engine: Engine, tokens: list[list[int]], config: GenerationConfig, n_shared: int, n_parallel: int
) -> deque[_Job]:
    pages = _Pages(engine)
    first = config.seed if config.seed is not None else secrets.randbits(63)
    special = set(engine.tokenizer.special_ids)
    jobs: deque[_Job] = deque()
    n_room = (pages.n_pages - pages.of(n_shared)) // min(n_parallel, len(tokens)) * pages.page_tokens
    for index, ids in enumerate(tokens):
        limit = config.max_tokens
        if limit is None:
            room = n_room + n_shared // pages.page_tokens * pages.page_tokens - len(ids)
            limit = max(0, min(room, engine.plan.context - len(ids)))
        writer = Writer(engine.tokenizer, config, limit, not set(ids) <= special, index)
        job = _Job(index, ids, limit, (first + index) % (1 << 64), writer)
        asked = f"context: prompt {index}: {len(ids)} prompt tokens + {limit} to generate"
        if len(ids) + limit > engine.plan.context or len(ids) >= engine.plan.context:
            raise ContextOverflowError(
                f"{asked} exceed the context of {engine.plan.context} tokens; raise it (context=, --context)"
            )
        n_needed = pages.of(n_shared) + pages.own(job, n_shared)
        if n_needed > pages.n_pages:
            raise ContextOverflowError(
                f"{asked} take {n_needed} pages of {pages.page_tokens} tokens ({pages.of(n_shared)} for the {n_shared} "
                f"tokens that all prompts begin with), the context of {engine.plan.context} tokens has "
                f"{pages.n_pages}; raise it (context=, --context)"
            )
        jobs.append(job)
    return jobs


def chunks_many(
    engine: Engine, tokens: list[list[int]], config: GenerationConfig, max_parallel: int
) -> Generator[Chunk, None, None]:
    """The chunks of :func:`stream_many`, computed as they are read, by whoever has the turn then."""
    trunk = engine._begin()
    engine._prefixes.leave_memory(park=True)
    engine._hold_kv()
    try:
        yield from _texts(engine, trunk, tokens, config, max_parallel)
    finally:
        engine._free_kv()


def _texts(
    engine: Engine,
    trunk: _edge.Sequence,
    tokens: list[list[int]],
    config: GenerationConfig,
    max_parallel: int,
) -> Generator[Chunk, None, None]:
    forks = _forks(engine, tokens)
    n_shared = _n_shared(engine, tokens)
    n_parallel = min(max_parallel, engine.plan.max_rows) if forks else 1
    waiting = _jobs(engine, tokens, config, n_shared, n_parallel)
    running: list[_Job] = []
    try:
        if forks:
            with engine._passes.next():
                trunk.set_tokens(tokens[0][: max(1, n_shared)])
            while n_shared > 0 and trunk.n_pending > 0:
                engine._relieve()
                with engine._passes.next():
                    trunk.advance()
        pages = _Pages(engine)
        while waiting or running:
            while waiting and len(running) < n_parallel:
                n_taken = pages.of(n_shared) + sum(pages.own(job, n_shared) for job in running)
                if running and n_taken + pages.own(waiting[0], n_shared) > pages.n_pages:
                    break
                job = waiting.popleft()
                with engine._passes.next():
                    _start(engine, job, config, trunk.fork(n_shared) if forks else trunk)
                running.append(job)
            yield from _passes(engine, running)
            for job in [job for job in running if job.writer.ended]:
                running.remove(job)
                yield job.finish()
    except CancelledError:
        for job in itertools.chain(running, waiting):
            job.writer.cancel()
            yield job.finish()


def _forks(engine: Engine, tokens: list[list[int]]) -> bool:
    """Whether the texts run side by side."""
    return engine.plan.shares_kv and len(tokens) > 1


def _n_shared(engine: Engine, tokens: list[list[int]]) -> int:
    """Tokens computed once for all."""
    if not _forks(engine, tokens):
        return 0
    # The last token of each prompt is its own: what follows is drawn from its logits.
    return min(_n_common(tokens), min(map(len, tokens)) - 1)


def _n_common(tokens: list[list[int]]) -> int:
    """Tokens that all prompts begin with."""
    return sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*tokens, strict=False)))


def _start(engine: Engine, job: _Job, config: GenerationConfig, text: _edge.Sequence) -> None:
    job.text = text
    job.meter = Meter(engine, job.seed, None)
    job.meter.reused = text.set_tokens(job.tokens)
    job.sampler = _edge.Sampler(config.sampling(job.seed), engine.vocab_size)


def _passes(engine: Engine, running: list[_Job]) -> Generator[Chunk, None, None]:
    """One pass of all that run, or as many as a moment holds; a chunk for each token drawn."""
    active = [job for job in running if not job.writer.ended]
    if not active:
        return
    engine._relieve()
    lanes = [
        (job.text, job.sampler, job.writer.n_left)
        for job in active
        if job.text is not None and job.sampler is not None
    ]
    ends = list(active[0].writer.eos)
    with engine._passes.next():
        # Another budget may have left fewer rows for a pass than there are texts.
        n, core = engine.plan.max_rows, engine._open_core()
        ms = _BURST_MS if len(lanes) <= n else 0.0
        drawn = [of for i in range(0, len(lanes), n) for of in _edge.step(core, lanes[i : i + n], ms, ends)]
    for number in range(max(map(len, drawn))):
        if number > 0:
            engine._relieve()  # who reads may take its time
        for job, tokens in zip(active, drawn, strict=True):
            # Behind a stop string nothing more is wanted.
            if number >= len(tokens) or job.writer.ended:
                continue
            if engine._cancelled:
                raise CancelledError("the texts were cancelled")
            if job.writer.n_generated == 0 and job.meter is not None:
                job.meter.prefilled(len(job.tokens))
            yield job.writer.push(*tokens[number])
