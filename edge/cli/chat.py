"""``edge chat MODEL``: a conversation in the terminal; turns already computed are kept."""

from __future__ import annotations

import sys
from typing import Any

import click

from edge.cli.common import (
    json_option,
    load_engine,
    load_options,
    print_json,
    refuse_elsewhere,
    sampling_options,
    skeleton_option,
    take_load_options,
)
from edge.cli.report import changes, summary


@click.command("chat")
@click.argument("model")
@click.option(
    "-n", "--max-tokens", type=int, help="Tokens per answer at most. Default: until the context is full."
)
@click.option("--system", help="System message.")
@click.option(
    "--template", type=click.File("r"), help="A chat template (Jinja) to use instead of the model's."
)
@load_options
@sampling_options
@skeleton_option
@json_option
def command(
    model: str, system: str | None, template: Any, skeleton: str, as_json: bool, **options: Any
) -> None:
    """Talk with MODEL. With --json, each line of stdin is a user message and each line of stdout an answer."""
    load = take_load_options(options)
    refuse_elsewhere(load["backend"], **{"--skeleton": skeleton != "off"})
    text = None if template is None else template.read()
    messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    interactive = sys.stdin.isatty() and not as_json
    with load_engine(model, as_json, load) as engine:
        while True:
            if interactive:
                click.echo("> ", nl=False)
            line = sys.stdin.readline()
            if not line:
                return
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line.rstrip("\n")})
            if skeleton != "off":
                from edge.cli.skeleton import chat_answer

                text_of_answer = chat_answer(engine, messages, skeleton, text, as_json, **options)
                messages.append({"role": "assistant", "content": text_of_answer})
                continue
            parts: list[str] = []
            last = None
            for last in engine.chat(messages, stream=True, template=text, **options):
                parts.append(last.text)
                if not as_json:
                    click.echo(last.text, nl=False)
                    sys.stdout.flush()
            assert last is not None
            messages.append({"role": "assistant", "content": "".join(parts)})
            if as_json:
                print_json({"text": "".join(parts), "finish_reason": last.finish_reason, **last.stats})
            else:
                click.echo()
                click.echo(summary(last.stats, last.finish_reason or ""), err=True)
                for line in changes(last.stats):
                    click.echo(f"[{line}]", err=True)
