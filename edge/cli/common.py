"""What several commands share: options, progress bars, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from edge.backends import BACKENDS
from flashload.errors import ArgumentError, DiskError
from flashload.plan_kv import KV, KV_TYPES

if TYPE_CHECKING:
    from edge.engine import Engine

_LOAD = (
    "memory",
    "context",
    "threads",
    "device",
    "weights",
    "io",
    "kv",
    "kv_type",
    "sparsity",
    "predictor",
    "exact",
    "backend",
)
#: Of a prompt or template: more than the longest context holds.
_MAX_TEXT_BYTES = 256 << 20
_F = TypeVar("_F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
memory_option = click.option(
    "--memory", help="Ceiling for the whole process, such as 2GiB. Default: most of what is free."
)
threads_option = click.option("--threads", type=int, help="Compute threads. Default: all cores.")
weights_option = click.option(
    "--weights",
    default="keep",
    show_default=True,
    type=click.Choice(["keep", "q8", "q4"]),
    help="How a checkpoint is packed, when it has to be.",
)
kv_option = click.option(
    "--kv",
    default="auto",
    show_default=True,
    type=click.Choice(KV),
    help="Keys and values of the context: in memory, or partly in a file on a drive (flash).",
)
kv_type_option = click.option(
    "--kv-type",
    default="f16",
    show_default=True,
    type=click.Choice(KV_TYPES),
    help="What keys and values are held as: 8 bits take half the memory of f16, 4 bits about a quarter.",
)
sparsity_option = click.option(
    "--sparsity",
    default="off",
    show_default=True,
    type=click.Choice(["off", "on"]),
    help="Leave out the neurons that count little, as edge sparsify found them.",
)


class _Predictor(click.ParamType[str | float]):
    """A name, or a share as a number."""

    name = "auto|on|off|lean|SHARE"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> str | float:
        try:
            return float(value)
        except ValueError:
            return str(value)


predictor_option = click.option(
    "--predictor",
    default="auto",
    show_default=True,
    type=_Predictor(),
    help="Who says which neurons of a sparse model count: its predictor where memory is short, always, never; lean: "
    "it does, and only so many are read as keep this share of the energy (0.95).",
)

backend_option = click.option(
    "--backend",
    default="edge",
    show_default=True,
    type=click.Choice(["edge", *BACKENDS]),
    help="Another runtime that is installed; it reads its own files and takes --context and --threads alone.",
)

skeleton_option = click.option(
    "--skeleton",
    default="off",
    show_default=True,
    type=click.Choice(["off", "auto", "on"]),
    help="Write the points of an answer first, then all at once: never, for questions that suit, always.",
)


def load_options(function: _F) -> _F:
    """Options of every command that loads a model."""
    for option in reversed(
        [
            memory_option,
            click.option(
                "--context", type=int, help="Tokens of context. Default: the model's, at most 4096."
            ),
            threads_option,
            click.option("--device", default="auto", show_default=True, help="auto or cpu."),
            weights_option,
            click.option("--io", default="auto", show_default=True, help="auto, io_uring or pread."),
            kv_option,
            kv_type_option,
            sparsity_option,
            predictor_option,
            click.option(
                "--exact", is_flag=True, help="Nothing that changes the text: neither predictor nor sparsity."
            ),
            backend_option,
        ]
    ):
        function = option(function)
    return function


def take_load_options(options: dict[str, Any]) -> dict[str, Any]:
    """Removes from a command's options those of :func:`load_options`, and returns them."""
    return {key: options.pop(key) for key in _LOAD}


def refuse_elsewhere(backend: str, **given: bool) -> None:
    """Raises ArgumentError for the first flag that is given and that only edge's own engine has."""
    for flag in (flag for flag, is_given in given.items() if is_given and backend != "edge"):
        raise ArgumentError(f"{flag}: only edge's own engine has it; leave it out with {backend}")


def sampling_options(function: _F) -> _F:
    """Options of every command that draws tokens; names and defaults of GenerationConfig."""
    for option in reversed(
        [
            click.option("--temperature", type=float, default=0.8, show_default=True),
            click.option("--top-k", type=int, default=40, show_default=True),
            click.option("--top-p", type=float, default=0.95, show_default=True),
            click.option("--min-p", type=float, default=0.0, show_default=True),
            click.option("--typical-p", type=float, default=1.0, show_default=True),
            click.option("--repetition-penalty", type=float, default=1.0, show_default=True),
            click.option("--presence-penalty", type=float, default=0.0, show_default=True),
            click.option("--frequency-penalty", type=float, default=0.0, show_default=True),
            click.option(
                "--seed", type=int, help="The same seed gives the same text. Default: drawn, and printed."
            ),
            click.option(
                "--stop", multiple=True, help="End the text at this string; may be given several times."
            ),
            click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-text token."),
            click.option(
                "--overflow",
                default="error",
                show_default=True,
                type=click.Choice(["error", "shift"]),
                help="When the context is full: fail, or drop the oldest text.",
            ),
            click.option(
                "--speculation",
                default="auto",
                show_default=True,
                help="auto, off, or one of lookup, draft, self, medusa, lookahead.",
            ),
        ]
    ):
        function = option(function)
    return function


def print_json(value: Any) -> None:
    """One JSON object on stdout, its characters escaped where stdout cannot have them."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, default=str)
    click.echo(text)


def utf8_text(file: BinaryIO | None, option: str) -> str | None:
    """What a file given with ``option`` holds; None without one.

    Raises:
        ArgumentError: it is no UTF-8, or larger than any context.
        DiskError: it cannot be read.
    """
    if file is None:
        return None
    try:
        data = file.read(_MAX_TEXT_BYTES + 1)
        if len(data) > _MAX_TEXT_BYTES:
            raise ArgumentError(f"{option}: expected at most {_MAX_TEXT_BYTES} bytes of text, found more")
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{option}: expected UTF-8 text, found byte {error.start} that is not") from None
    except OSError as error:
        raise DiskError(f"{option}: cannot be read: {error.strerror}") from error


@contextmanager
def progress_bar(title: str, quiet: bool, unit_bytes: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that appears with the first call of the yielded (done, total) function."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    count = DownloadColumn(binary_units=True) if unit_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = None

        def update(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = progress.add_task(title, total=total)
            progress.update(task, completed=done, total=total)

        yield update


def load_engine(model: str, quiet: bool, options: dict[str, Any]) -> Engine:
    """Loads a model for a command: the budget bounds the whole process, packing shows a bar."""
    from edge.loading import load

    with progress_bar("packing", quiet) as on_pack, progress_bar("loading", quiet) as on_load:
        return load(model, whole_process=True, on_pack=on_pack, on_load=on_load, **options)


def conversion_line(conversion: dict[str, Any]) -> str:
    """One line of a pack report: which weights changed format, and what that cost."""
    from flashload.machine import format_bytes

    before, after = format_bytes(conversion["bytes_before"]), format_bytes(conversion["bytes_after"])
    names = ", ".join(conversion["names"][:3]) + (" ..." if conversion["weights"] > 3 else "")
    kinds = f"{conversion['from']} -> {conversion['to']}"
    return f"converted {kinds}: {conversion['weights']} weights, {before} -> {after} ({names})"
