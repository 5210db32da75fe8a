"""``--skeleton``: answers whose points are written at once, on the terminal and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from edge.cli.common import print_json
from edge.cli.report import about, summary
from edge.skeleton import Answer, SkeletonOfThought, gather, in_order

if TYPE_CHECKING:
    from edge.chat import Message
    from edge.completion import Chunk
    from edge.engine import Engine

#: --skeleton -> the router behind it.
ROUTER = {"auto": "classifier", "on": "always"}


def run_answer(
    engine: Engine, question: str, mode: str, with_details: bool, as_json: bool, **settings: Any
) -> None:
    """``edge run --skeleton``."""
    found = _answer(SkeletonOfThought(engine, router=ROUTER[mode]), question, as_json, settings)
    if as_json:
        print_json({**_fields(found), **about(engine)})
        return
    for line in [*engine.notes, *(details(found.stats["skeleton"]) if with_details else [])]:
        click.echo(f"[{line}]", err=True)


def chat_answer(
    engine: Engine,
    messages: Sequence[Message],
    mode: str,
    template: str | None,
    as_json: bool,
    **settings: Any,
) -> str:
    """One answer of ``edge chat --skeleton``; returns its text."""
    thinker = SkeletonOfThought(engine, router=ROUTER[mode], template=template)
    found = _answer(thinker, messages, as_json, settings)
    if as_json:
        print_json(_fields(found))
    return found.text


def _fields(found: Answer) -> dict[str, Any]:
    return {
        "text": found.text,
        "points": list(found.points),
        "finish_reason": found.finish_reason,
        **found.stats,
    }


def _answer(
    thinker: SkeletonOfThought, question: str | Sequence[Message], as_json: bool, settings: dict[str, Any]
) -> Answer:
    """The answer; unless JSON is asked for, shown while it is written, with what it cost below."""
    stream = thinker.stream(question, **settings)
    if as_json:
        return gather(stream)
    seen: list[Chunk] = []
    if sys.stdout.isatty():
        _show_growing(_kept(stream, seen))
        found = gather(iter(seen))
    else:
        for text in in_order(_kept(stream, seen)):
            click.echo(text, nl=False)
            sys.stdout.flush()
        click.echo()
        found = gather(iter(seen))
    if "placement" in found.stats:
        click.echo(summary(found.stats, found.finish_reason), err=True)
    told = found.stats["skeleton"]
    click.echo(f"[{told['mode']}: {told['why']}]", err=True)
    return found


def _kept(stream: Iterator[Chunk], seen: list[Chunk]) -> Iterator[Chunk]:
    for chunk in stream:
        seen.append(chunk)
        yield chunk


def _show_growing(stream: Iterator[Chunk]) -> None:
    """All points at once on a terminal, each growing in its place."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    texts: dict[int, str] = {}
    # What is higher than the screen is shown whole when it is finished.
    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        for chunk in stream:
            if chunk.index >= 0:
                texts[chunk.index] = texts.get(chunk.index, "") + chunk.text
                live.update(Text("\n\n".join(texts[i] for i in sorted(texts))), refresh=True)


def details(told: dict[str, Any]) -> list[str]:
    """What each phase took, a line each."""
    lines = [f"router: {told['router']}, {told['router_seconds']:.3f} s"]
    if told["skeleton_seconds"]:
        lines.append(f"skeleton: {len(told['titles'])} points, {told['skeleton_seconds']:.3f} s")
    if told["titles"]:
        pace = told["sequential_seconds"]
        alone = "" if pace is None else f"; one after the other about {pace:.3f} s"
        lines.append(
            f"points: {sum(told['point_tokens'])} tokens, {told['points_tokens_per_second']:.1f} tok/s, "
            f"{told['points_seconds']:.3f} s{alone}"
        )
    return lines
