"""``edge chat MODEL``: a conversation in the terminal; turns already computed are kept."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from edge.chat import choose_template
from edge.cli.common import (
    json_option,
    load_engine,
    load_options,
    print_json,
    refuse_elsewhere,
    sampling_options,
    skeleton_option,
    take_load_options,
    utf8_text,
)
from edge.cli.report import changes, summary

if TYPE_CHECKING:
    from edge.engine import Engine


@click.command("chat")
@click.argument("model")
@click.option(
    "-n", "--max-tokens", type=int, help="Tokens per answer at most. Default: until the context is full."
)
@click.option("--system", help="System message.")
@click.option(
    "--template", type=click.File("rb"), help="A chat template (Jinja) to use instead of the model's."
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
    text = utf8_text(template, "--template")
    messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    interactive = sys.stdin.isatty() and not as_json
    with load_engine(model, as_json, load) as engine:
        if skeleton == "off":
            choose_template(engine.tokenizer, text)  # a model without one is refused before the first message
        for line in _lines(interactive):
            messages.append({"role": "user", "content": line})
            if skeleton != "off":
                from edge.cli.skeleton import chat_answer

                answer = chat_answer(engine, messages, skeleton, text, as_json, **options)
            else:
                answer = _answer(engine, messages, text, as_json, interactive, **options)
            messages.append({"role": "assistant", "content": answer})


def _lines(interactive: bool) -> Iterator[str]:
    """The user's messages: lines of stdin that are not empty."""
    while True:
        if interactive:
            click.echo("> ", nl=False)
        line = sys.stdin.readline()
        if not line:
            if interactive:
                click.echo()
            return
        if line.strip():
            yield line.rstrip("\n")


def _answer(
    engine: Engine,
    messages: list[dict[str, str]],
    template: str | None,
    as_json: bool,
    interactive: bool,
    **settings: Any,
) -> str:
    """One answer, shown while it is written; Ctrl-C ends it, and with it the command unless someone can go on."""
    text, last = "", None
    try:
        for last in engine.chat(messages, stream=True, template=template, **settings):
            text += last.text
            if not as_json:
                click.echo(last.text, nl=False)
                sys.stdout.flush()
    except KeyboardInterrupt:
        if not interactive:
            raise
        click.echo("\n[stopped; Ctrl-D ends the conversation]", err=True)
        return text
    assert last is not None
    if as_json:
        print_json({"text": text, "finish_reason": last.finish_reason, **last.stats})
        return text
    click.echo()
    click.echo(summary(last.stats, last.finish_reason or ""), err=True)
    for line in changes(last.stats):
        click.echo(f"[{line}]", err=True)
    return text
