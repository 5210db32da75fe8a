"""The command line: ``edge run | chat | pack | train-predictor | sparsify | plan | show | list | verify | doctor``.

Each command lives in the module named here and is imported when it is called, so that ``edge --help`` is quick.
"""

from __future__ import annotations

import sys
from importlib import import_module

import click

_COMMANDS = {
    "run": ("edge.cli.run", "Continue a prompt."),
    "chat": ("edge.cli.chat", "Talk with a model."),
    "pack": ("edge.cli.pack", "Convert a GGUF file or Hugging Face folder to a pack."),
    "train-predictor": ("edge.cli.train_predictor", "Teach a ReLU model's pack which neurons a token opens."),
    "sparsify": ("edge.cli.sparsify", "Find neurons that count little and may be left out."),
    "plan": ("edge.cli.plan", "Show where weights would live inside a budget, without loading."),
    "show": ("edge.cli.show", "Show what a model file holds."),
    "list": ("edge.cli.list", "List shipped and cached models."),
    "verify": ("edge.cli.verify", "Check every byte of a pack."),
    "doctor": ("edge.cli.doctor", "Show what this machine offers and what is missing."),
}


class _Commands(click.Group):
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
    """Entry point: typed errors become one line on stderr and exit status 1; Ctrl-C exits with 130."""
    from flashload.errors import EdgeError

    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except EdgeError as error:
        kind = type(error).__name__
        if "--json" in sys.argv:
            import json

            click.echo(json.dumps({"error": kind, "message": str(error)}))
        click.echo(f"edge: {kind}: {error}", err=True)
        sys.exit(1)
