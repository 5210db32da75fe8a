"""``edge run MODEL PROMPT``: continue a prompt, stream the text, say what it cost."""

from __future__ import annotations

import sys
from typing import Any

import click

from edge.cli.common import (
    json_option,
    load_engine,
    load_options,
    print_json,
    progress_bar,
    refuse_elsewhere,
    sampling_options,
    skeleton_option,
    take_load_options,
    utf8_text,
)
from edge.cli.report import about, changes, details, logprob_fields, logprob_lines, summary

_DEFAULT_TOKENS = 256


@click.command("run")
@click.argument("model")
@click.argument("prompt", required=False, default="")
@click.option(
    "-n", "--max-tokens", type=int, help="Tokens to generate. Default: 256, less if the context ends before."
)
@click.option(
    "--samples",
    type=click.IntRange(1, 256),
    default=1,
    help="Continue the prompt so many times, all at once.",
)
@click.option(
    "--file", "prompt_file", type=click.File("rb"), help="Read the prompt from a file (- for stdin)."
)
@load_options
@click.option(
    "--draft",
    help="A smaller model of the same vocabulary, whose guesses speculation verifies; self: a copy of it.",
)
@sampling_options
@skeleton_option
@click.option("--logprobs", type=int, help="Report each token's log-probability and this many alternatives.")
@click.option("--stats", is_flag=True, help="Say after the text what each phase and each drafter did.")
@json_option
def command(
    model: str,
    prompt: str,
    prompt_file: Any,
    max_tokens: int | None,
    samples: int,
    stats: bool,
    skeleton: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue PROMPT with MODEL (a pack, a GGUF file, a Hugging Face folder, or a shipped model's name)."""
    if prompt and prompt_file is not None:
        raise click.UsageError("--file: expected it or PROMPT, found both")
    prompt = utf8_text(prompt_file, "--file") or prompt
    if samples > 1 and skeleton != "off":
        raise click.UsageError("--samples: expected --skeleton off for several texts")
    load = take_load_options(options) | {"draft": options.pop("draft")}
    refuse_elsewhere(load["backend"], **{"--samples": samples > 1, "--skeleton": skeleton != "off"})
    with load_engine(model, as_json, load) as engine:
        if max_tokens is None:
            room = engine.context - len(engine.tokenizer.encode(prompt, add_special_tokens=True))
            max_tokens = min(_DEFAULT_TOKENS, max(1, room))
        if skeleton != "off":
            from edge.cli.skeleton import run_answer

            run_answer(engine, prompt, skeleton, stats, as_json, max_tokens=max_tokens, **options)
            return
        if samples > 1:
            from edge.cli.samples import run_samples

            run_samples(engine, prompt, samples, as_json, max_tokens=max_tokens, **options)
            return
        with progress_bar("prompt", as_json, unit_bytes=False) as on_progress:
            chunks = engine.stream(prompt, max_tokens=max_tokens, on_progress=on_progress, **options)
            first = next(chunks)
        if as_json:
            _print_result(engine, first, chunks)
            return
        click.echo(prompt, nl=False)
        click.echo(first.text, nl=False)
        seen = [first]
        for chunk in chunks:
            click.echo(chunk.text, nl=False)
            sys.stdout.flush()
            seen.append(chunk)
        click.echo()
        last = seen[-1]
        for line in logprob_lines(engine.tokenizer, (chunk.logprob for chunk in seen)):
            click.echo(line)
        click.echo(summary(last.stats, last.finish_reason or ""), err=True)
        for line in [*engine.notes, *changes(last.stats), *(details(last.stats) if stats else [])]:
            click.echo(f"[{line}]", err=True)


def _print_result(engine: Any, first: Any, chunks: Any) -> None:
    seen = [first, *chunks]
    print_json(
        {
            "text": "".join(chunk.text for chunk in seen),
            "tokens": [chunk.token for chunk in seen if chunk.token is not None],
            "finish_reason": seen[-1].finish_reason,
            **seen[-1].stats,
            **about(engine),
            **logprob_fields(chunk.logprob for chunk in seen),
        }
    )
