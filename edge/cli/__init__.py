"""The command line: ``edge run | chat | pack | train-predictor | sparsify | plan | show | list | verify | doctor``.

Each command lives in the module named here and is imported when it is called, so that ``edge --help`` is quick.
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from typing import Any, NoReturn

import click

_COMMANDS = {
    "run": ("edge.cli.run", "Continue a prompt."),
    "chat": ("edge.cli.chat", "Talk with a model."),
    "pack": ("edge.cli.pack", "Convert a GGUF file or Hugging Face folder to a pack."),
    "train-predictor": ("edge.cli.train_predictor", "Teach a ReLU model's pack which neurons a token opens."),
    "sparsify": ("edge.cli.sparsify", "Find neurons that count little and may be left out."),
    "plan": ("edge.cli.plan", "Show where weights would live inside a budget, without loading."),
    "show": ("edge.cli.show", "Show what a model file holds."),
    "list": ("edge.cli.list_models", "List shipped and cached models."),
    "verify": ("edge.cli.verify", "Check every byte of a pack."),
    "doctor": ("edge.cli.doctor", "Show what this machine offers and what is missing."),
}


class _NobodyReads(Exception):
    """Whoever read stdout is gone."""


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # click would make status 1 of it, which says that something failed.
            raise _NobodyReads from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command = import_module(_COMMANDS[name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.command(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="edge")
def cli() -> None:
    """Run a language model inside the memory you name."""


def main() -> None:
    """Entry point.

    Exit status: 0, 1 for typed errors (one line on stderr), 2 for usage, 130 after Ctrl-C, 143 after SIGTERM, 141 when
    nobody reads stdout any more. With ``--json`` errors are one JSON object on stdout besides.
    """
    from edge.cli.streams import discard_output, open_streams
    from flashload.errors import EdgeError

    open_streams()
    # By default it would end the process where it stands, and leave half-written files behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        _tell_json("UsageError", error.format_message())
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except _NobodyReads:
        discard_output()
        sys.exit(141)
    except EdgeError as error:
        _fail(type(error).__name__, str(error))
    except MemoryError:
        _fail("BudgetError", "the system refused this process more memory")
    except OSError as error:
        discard_output()
        _fail("DiskError", f"{error.filename or 'output'}: {error.strerror or error}")


def _fail(kind: str, message: str) -> NoReturn:
    _tell_json(kind, message)
    click.echo(f"edge: {kind}: {message}", err=True)
    sys.exit(1)


def _tell_json(kind: str, message: str) -> None:
    if "--json" in sys.argv:
        from edge.cli.common import print_json

        print_json({"error": kind, "message": message})
