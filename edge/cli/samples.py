"""``edge run --samples N``: several continuations of one prompt, computed together."""

from __future__ import annotations

from typing import Any

import click

from edge.cli.common import print_json
from edge.cli.report import about, changes, logprob_fields, logprob_lines, summary
from flashload.errors import ArgumentError


def run_samples(engine: Any, prompt: str, n: int, as_json: bool, **settings: Any) -> None:
    """Prints ``n`` texts, each under a line that says its seed; a given seed is the first one's.

    Raises:
        ArgumentError: a setting that several texts cannot have.
    """
    if settings["speculation"] not in ("auto", "off"):
        raise ArgumentError(
            f"--samples: expected --speculation auto or off, found {settings['speculation']!r}"
        )
    found = engine.generate_many([prompt] * n, **settings)
    if as_json:
        samples = [
            {"text": one.text, "tokens": one.tokens, "finish_reason": one.finish_reason} for one in found
        ]
        for sample, one in zip(samples, found, strict=True):
            sample |= one.stats | logprob_fields(one.logprobs or ())
        print_json({"samples": samples, **about(engine)})
        return
    for number, one in enumerate(found, 1):
        click.echo(f"--- {number} of {n}, seed {one.stats['seed']}")
        click.echo(prompt + one.text)
        for line in logprob_lines(engine.tokenizer, one.logprobs or ()):
            click.echo(line)
    for one in found:
        click.echo(summary(one.stats, one.finish_reason), err=True)
    for line in [*engine.notes, *changes(found[-1].stats)]:
        click.echo(f"[{line}]", err=True)
