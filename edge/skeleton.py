"""Skeleton-of-Thought: the points of an answer first, then all of them written at once.

Ning et al., arXiv 2307.15337: a model lists the points of its answer, and the points are continued in parallel. Here
they are one batch (:mod:`edge.batch`): the question and the skeleton are computed once, and a pass over the weights
brings every point forward. The answer is not the one the model would have written in one go, so a router decides which
questions are asked that way (:mod:`edge.routing`), and nothing here is used unless it is called.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edge import batch, routing
from edge.chat import Message, check_messages, prompt_segments
from edge.completion import Chunk, collect
from edge.config import GenerationConfig, config_from
from edge.meter import Meter
from edge.skeleton_prompts import (
    MAX_POINTS,
    MIN_POINTS,
    SKELETON_REPLY,
    choice_prompt,
    parse_choice,
    parse_skeleton,
    point_prompt,
    point_reply,
    skeleton_prompt,
)
from edge.stream import Stream
from flashload.errors import ArgumentError, CancelledError, ContextOverflowError

if TYPE_CHECKING:
    from edge.engine import Engine

ROUTERS = ("classifier", "prompt", "always", "never")
#: Tokens of a skeleton and of a point, and the fewest a point is worth being asked for.
SKELETON_TOKENS, POINT_TOKENS, MIN_POINT_TOKENS = 160, 96, 16
_CHOICE_TOKENS = 8


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: the points, a paragraph each, in order; or the plain answer.
        points: the text of each point, its number and title included; empty for a plain answer.
        finish_reason: "stop", "length" (a text ran into its limit) or "cancelled".
        stats: as :attr:`edge.Completion.stats`, of the points together or of the plain answer, and under "skeleton":
            ``mode`` ("points" or "plain"), ``why``, ``router``, ``titles``, ``point_tokens`` (of each), and the seconds
            of router, skeleton and points; ``points_tokens_per_second``; ``sequential_seconds``, what the points would
            take one after the other at the speed of the skeleton (None when the skeleton was given).
    """

    text: str
    points: tuple[str, ...]
    finish_reason: str
    stats: dict[str, Any]


@dataclass
class _Told:
    """What a request says of itself in the end."""

    mode: str = "plain"
    why: str = ""
    titles: list[str] = field(default_factory=list)
    point_tokens: list[int] = field(default_factory=list)
    router_seconds: float = 0.0
    skeleton_seconds: float = 0.0
    points_seconds: float = 0.0
    seconds_per_token: float | None = None

    def stats(self, router: str) -> dict[str, Any]:
        n_tokens = sum(self.point_tokens)
        pace = self.seconds_per_token
        return {
            "mode": self.mode,
            "why": self.why,
            "router": router,
            "titles": self.titles,
            "point_tokens": self.point_tokens,
            "router_seconds": self.router_seconds,
            "skeleton_seconds": self.skeleton_seconds,
            "points_seconds": self.points_seconds,
            "points_tokens_per_second": n_tokens / self.points_seconds if self.points_seconds > 0 else 0.0,
            "sequential_seconds": None if pace is None else pace * n_tokens,
        }


class SkeletonOfThought:
    """Answers questions with an engine, point by point where that suits.

    >>> SkeletonOfThought(engine).answer("What helps against stress?", temperature=0).text

    Args:
        router: who decides: "classifier" (words of the question, English), "prompt" (the model itself, one short
            reply), "always" or "never".
        point_tokens: the longest a point may become; ``max_tokens`` bounds it too.
        max_parallel: points computed at the same time.
        template: a chat template to use instead of the model's. Without any, prompts are plain text.

    Raises:
        ArgumentError: an unknown router, a number out of range.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        router: str = "classifier",
        point_tokens: int = POINT_TOKENS,
        max_parallel: int = MAX_POINTS,
        template: str | None = None,
    ) -> None:
        if router not in ROUTERS:
            raise ArgumentError(f"router: expected one of {', '.join(ROUTERS)}, found {router!r}")
        if isinstance(point_tokens, bool) or not isinstance(point_tokens, int) or point_tokens < 1:
            raise ArgumentError(f"point_tokens: expected a number above 0, found {point_tokens!r}")
        batch.check(GenerationConfig(), max_parallel)
        self._engine = engine
        self._router = router
        self._point_tokens = point_tokens
        self._max_parallel = max_parallel
        self._template = template
        self._has_template = template is not None or bool(engine.tokenizer.config.get("chat_template"))

    def answer(
        self, question: str | Sequence[Message], *, skeleton: Sequence[str] | None = None, **settings: Any
    ) -> Answer:
        """The whole answer.

        Args:
            question: text, or a conversation whose last message is the user's (the model then needs a chat template).
            skeleton: titles of the points, known already: neither router nor model is asked for them.
            settings: the fields of :class:`edge.GenerationConfig`. ``max_tokens`` bounds the plain answer, and each
                point; ``stop`` applies to both. Point ``i`` has the seed ``seed + i``.

        Raises:
            ArgumentError: an empty question, a setting that several texts cannot have.
            ContextOverflowError: the question does not fit the context, or a given skeleton leaves no room for points.
            DiskError, CorruptError: as for :meth:`edge.Engine.generate`.
        """
        return gather(self.stream(question, skeleton=skeleton, **settings))

    def stream(
        self, question: str | Sequence[Message], *, skeleton: Sequence[str] | None = None, **settings: Any
    ) -> Stream:
        """As :meth:`answer`, chunk by chunk.

        A point's chunks have its number from 0 as ``index``; its first is its number and title, its last has a
        finish_reason. A plain answer has index 0. The last chunk of all has index -1, and the answer's finish_reason
        and stats; :func:`in_order` puts the texts one after the other.
        """
        config = config_from(settings)
        batch.check(replace(config, speculation="off"), self._max_parallel)
        asked, history = self._asked(question)
        titles = None if skeleton is None else _given(skeleton)
        if config.seed is None:
            config = replace(config, seed=secrets.randbits(63))
        return Stream(self._engine._turns, self._answer(asked, history, config, titles))

    def point_prompts(self, question: str | Sequence[Message], skeleton: Sequence[str]) -> list[list[int]]:
        """The token ids that each point of ``skeleton`` is continued from; equal but for their ends."""
        asked, history = self._asked(question)
        return self._point_prompts(asked, history, _given(skeleton))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _asked(self, question: str | Sequence[Message]) -> tuple[str, list[dict[str, Any]]]:
        if isinstance(question, str):
            messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
        else:
            messages = check_messages(question)
        asked = messages[-1]["content"]
        if messages[-1]["role"] != "user" or not isinstance(asked, str) or not asked.strip():
            raise ArgumentError("question: expected text that is not empty, as the user's last message")
        if len(messages) > 1 and not self._has_template:
            raise ArgumentError("question: a conversation needs a chat template, and this model has none")
        return asked, messages[:-1]

    def _prompt(self, history: Sequence[Message], text: str, reply: str) -> list[int]:
        """Ids of a prompt that asks ``text`` and has the model's turn begin with ``reply``."""
        engine = self._engine
        if not self._has_template:
            return engine._prompt_tokens(f"{text}\n{reply}" if reply else text)
        messages = [*history, {"role": "user", "content": text}]
        segments = prompt_segments(engine.tokenizer, messages, template=self._template)
        return engine.tokenizer.encode_segments([*segments, (reply, False)] if reply else segments)

    def _point_prompts(
        self, asked: str, history: Sequence[Message], titles: Sequence[str]
    ) -> list[list[int]]:
        return [
            self._prompt(history, point_prompt(asked, titles, number), point_reply(titles, number))
            for number in range(1, len(titles) + 1)
        ]

    def _write(self, tokens: list[int], config: GenerationConfig, continues: bool) -> Iterator[Chunk]:
        return self._engine._chunks(tokens, config, None, continues)

    def _go_on(self, chunk: Chunk | None) -> None:
        """A cancel that came in one phase ends the next ones too."""
        if self._engine._cancelled or (chunk is not None and chunk.finish_reason == "cancelled"):
            raise CancelledError("the answer was cancelled")

    def _short(
        self, tokens: list[int], config: GenerationConfig, n_tokens: int
    ) -> tuple[str, dict[str, Any]]:
        """A short text for this module's own use, and its stats; empty when the context has no room for it."""
        n_tokens = min(n_tokens, self._engine.plan.context - len(tokens))
        if n_tokens < 1:
            return "", {}
        asked = replace(config, max_tokens=n_tokens, stop=(), logprobs=None, ignore_eos=False)
        chunks = list(self._write(tokens, asked, continues=True))
        self._go_on(chunks[-1])
        written = collect(iter(chunks), None)
        return written.text, written.stats

    def _route(self, asked: str, config: GenerationConfig) -> tuple[bool, str]:
        """Whether to answer point by point, and why."""
        if self._router in ("always", "never"):
            return self._router == "always", f"the router is {self._router!r}"
        if self._router == "classifier":
            found = routing.shipped().probability(asked)
            return found >= 0.5, f"the classifier gives points {found:.0%}"
        greedy = replace(config, temperature=0.0)
        reply, _ = self._short(self._prompt([], choice_prompt(asked), ""), greedy, _CHOICE_TOKENS)
        letter = parse_choice(reply)
        return letter == "A", f"asked, the model replied {letter or reply.strip()[:40]!r}"

    def _sketch(
        self, asked: str, history: Sequence[Message], config: GenerationConfig, told: _Told
    ) -> list[str]:
        """The titles of the points; none when there is no usable skeleton."""
        prompt = self._prompt(history, skeleton_prompt(asked), SKELETON_REPLY)
        text, stats = self._short(prompt, config, SKELETON_TOKENS)
        titles = parse_skeleton(SKELETON_REPLY + text)
        if len(titles) < MIN_POINTS:
            told.why = f"no usable skeleton: {len(titles)} points, expected at least {MIN_POINTS}"
            return []
        told.seconds_per_token = stats["decode_seconds"] / max(1, stats["generated_tokens"] - 1)
        return titles

    def _answer(
        self, asked: str, history: Sequence[Message], config: GenerationConfig, given: list[str] | None
    ) -> Generator[Chunk, None, None]:
        self._engine._begin()
        told = _Told(why="the skeleton was given")
        clock = time.perf_counter
        stats: dict[str, Any] = {}
        reason = "stop"
        try:
            titles = given or []
            if given is None:
                start = clock()
                suits, told.why = self._route(asked, config)
                told.router_seconds = clock() - start
                if suits:
                    start = clock()
                    titles = self._sketch(asked, history, config, told)
                    told.skeleton_seconds = clock() - start
            prompts = self._point_prompts(asked, history, titles)
            room = batch.room(self._engine, prompts) if prompts else 0
            if prompts and room < MIN_POINT_TOKENS:
                told.why = (
                    f"the context of {self._engine.plan.context} tokens leaves {max(0, room)} to each of "
                    f"{len(titles)} points, expected at least {MIN_POINT_TOKENS}"
                )
                if given is not None:
                    raise ContextOverflowError(f"skeleton: {told.why}; raise it (context=, --context)")
                prompts = []
            self._go_on(None)
            if prompts:
                chunks = self._points(prompts, titles, config, room, told)
            else:
                chunks = self._write(self._prompt(history, asked, ""), config, not self._has_template)
            for chunk in chunks:
                if chunk.finish_reason is not None:
                    reason = max(reason, chunk.finish_reason, key=("stop", "length", "cancelled").index)
                    stats = chunk.stats
                yield chunk
        except CancelledError:
            reason = "cancelled"
        yield Chunk("", finish_reason=reason, stats=stats | {"skeleton": told.stats(self._router)}, index=-1)

    def _points(
        self,
        prompts: list[list[int]],
        titles: list[str],
        config: GenerationConfig,
        room: int,
        told: _Told,
    ) -> Iterator[Chunk]:
        """All points at once; the last chunk's stats are those of the points together."""
        told.mode, told.titles = "points", titles
        told.point_tokens = [0] * len(titles)
        for index in range(len(titles)):
            yield Chunk(point_reply(titles, index + 1), index=index)
        assert config.seed is not None
        meter = Meter(self._engine, config.seed, None)
        asked = point_settings(config, len(titles), min(self._point_tokens, room))
        start = time.perf_counter()
        n_left = len(titles)
        first = True
        for chunk in batch.chunks_many(self._engine, prompts, asked, self._max_parallel):
            if first:
                meter.prefilled(sum(map(len, prompts)))
                first = False
            told.point_tokens[chunk.index] += chunk.token is not None
            told.points_seconds = time.perf_counter() - start
            if chunk.finish_reason is not None:
                meter.reused += chunk.stats.get("reused_tokens", 0)
                n_left -= 1
                if n_left == 0:
                    chunk = replace(chunk, stats=meter.stats(sum(told.point_tokens)))
            yield chunk


def point_settings(config: GenerationConfig, n_points: int, n_tokens: int) -> GenerationConfig:
    """What the points are generated with: a point is a paragraph, and ends where the next one would begin."""
    ends = ["\n\n", *(f"\n{number}." for number in range(1, n_points + 2))]
    limit = n_tokens if config.max_tokens is None else min(config.max_tokens, n_tokens)
    return replace(config, max_tokens=limit, stop=(*config.stop, *ends), speculation="off")


def gather(chunks: Iterator[Chunk]) -> Answer:
    """The answer that the chunks of :meth:`SkeletonOfThought.stream` make."""
    texts: dict[int, list[str]] = {}
    last = Chunk("")
    for last in chunks:
        texts.setdefault(last.index, []).append(last.text)
    told = last.stats.get("skeleton", {})
    joined = {index: "".join(parts) for index, parts in texts.items() if index >= 0}
    points = tuple(joined[i].rstrip() for i in sorted(joined)) if told.get("mode") == "points" else ()
    text = "\n\n".join(points) if points else joined.get(0, "")
    return Answer(text, points, last.finish_reason or "length", last.stats)


def in_order(chunks: Iterator[Chunk]) -> Iterator[str]:
    """The text of an answer as it can be printed: the first unfinished point as it grows, the next when it has ended.

    Joined, it is the answer's text but for white space at the ends of points; the last chunk is not part of it.
    """
    held: dict[int, list[str]] = {}
    ended: set[int] = set()
    now = 0
    for chunk in chunks:
        if chunk.index < 0:
            continue
        if chunk.finish_reason is not None:
            ended.add(chunk.index)
        if chunk.index != now:
            held.setdefault(chunk.index, []).append(chunk.text)
            continue
        yield chunk.text
        while now in ended:
            now += 1
            if now in held:
                yield "\n\n" + "".join(held.pop(now))


def _given(skeleton: Sequence[str]) -> list[str]:
    if (
        isinstance(skeleton, str)
        or not isinstance(skeleton, Sequence)
        or not 1 <= len(skeleton) <= MAX_POINTS
    ):
        raise ArgumentError(f"skeleton: expected 1 to {MAX_POINTS} titles, found {skeleton!r}")
    titles = [title.strip() if isinstance(title, str) else "" for title in skeleton]
    if not all(titles) or any("\n" in title for title in titles):
        raise ArgumentError(f"skeleton: expected titles of one line that are not empty, found {skeleton!r}")
    return titles
