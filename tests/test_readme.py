"""What the README and the page of benchmarks say is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import click
import pytest

import edge
from bench.__main__ import names
from edge.cli import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "DESIGN.md", "bench/README.md", "edge/builtin/MODEL_CARD.md"]


def commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def test_every_command_is_named_and_every_named_command_exists() -> None:
    section = README[README.index("## Commands") : README.index("## From Python")]
    named = set(re.findall(r"`edge ([a-z-]+)", README))
    assert named <= set(commands())
    assert {name for name in commands() if f"`edge {name}" in section or f"`{name}`" in section} == set(
        commands()
    )


def test_every_command_takes_json() -> None:
    for name, command in commands().items():
        assert "--json" in [flag for parameter in command.params for flag in parameter.opts], name


def test_options_of_the_command_table_exist() -> None:
    section = README[README.index("| command | |") : README.index("**Models**")]
    known = {flag for command in commands().values() for p in command.params for flag in p.opts} | {"--help"}
    assert set(re.findall(r"--[a-z][a-z-]+", section)) <= known


def test_calls_of_the_readme_exist() -> None:
    for name in re.findall(r"`edge\.([a-z_]+)", README):
        assert name in (*edge.__all__, "errors"), name
    methods = re.search(r"`engine` has (.*?); errors", README, re.DOTALL)
    assert methods is not None
    for name in re.findall(r"`(\w+)`", methods[1]):
        assert hasattr(edge.Engine, name), name
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        ast.parse(block)


def test_benchmarks_are_all_on_their_page() -> None:
    page = (ROOT / "bench" / "README.md").read_text()
    table = page[: page.index("## How figures are made")]
    # plan_point is a process of plan.
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(names()) - {"plan_point"}
    assert set(re.findall(r"python -m bench ([a-z]\w*)", README)) <= set(names())


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", text):
        assert ((ROOT / page).parent / link).exists(), link
    for path in re.findall(r"`((?:edge|flashload|quant|cpp|tests|bench)/[\w/.*-]+)`", text):
        assert list(ROOT.glob(path.rstrip("/"))), path
