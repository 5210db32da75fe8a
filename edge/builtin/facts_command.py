"""The command line that figures of a trained model on held-out text share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edge.builtin.activations import Trained, load_trained
from edge.builtin.data import load_held_out
from edge.builtin.state import write_atomic
from flashload.errors import EdgeError

Figures = dict[str, Any]


def run(
    argv: list[str] | None,
    *,
    prog: str,
    model: str,
    facts: Callable[[Trained, str], Figures],
    show: Callable[[Figures], str],
    draw: Callable[[Figures, Path], None] | None = None,
) -> int:
    """Measures one model of the family on the held-out text, prints it, and writes what was asked for.

    Args:
        model: its folder under that of all runs.
        draw: draws the figures to a file, where --figure names one.

    Returns:
        The exit code.
    """
    files = "--json also writes them" if draw is None else "--json and --figure also write them"
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=f"Prints the facts; {files}.")
    parser.add_argument("--family", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    if draw is not None:
        parser.add_argument("--figure", type=Path, help="file for the curves")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        figures = facts(load_trained(args.family / model / "hf"), load_held_out(args.corpora))
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(show(figures))
    if args.json:
        write_atomic(args.json, (json.dumps(figures, indent=1) + "\n").encode())
    if draw is not None and args.figure:
        draw(figures, args.figure)
    return 0
