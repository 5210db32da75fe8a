"""``python -m edge``, and the ``edge`` command: Ctrl-C ends it in one line from the first import on."""

from __future__ import annotations

import sys


def main() -> None:
    """The command line; see :func:`edge.cli.main` for the exit status."""
    try:
        from edge.cli import main as run_command

        run_command()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
