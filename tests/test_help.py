"""Every command's help shows how it is used, with examples that the command line accepts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from streamfs.cli.app import cli


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def command_of(path: tuple[str, ...]) -> click.Command:
    found: click.Command = cli
    for name in path:
        assert isinstance(found, click.Group)
        found = found.commands[name]
    return found


def examples(path: tuple[str, ...]) -> list[str]:
    """The lines of its help that are commands of streamfs, the first of each pipe, continued lines joined."""
    command = command_of(path)
    text = f"{command.help}\n{command.epilog}".replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip().startswith("streamfs ")]


@pytest.mark.parametrize("path", list(commands(cli)), ids=" ".join)
def test_every_help_shows_examples(path: tuple[str, ...]) -> None:
    command = command_of(path)
    shown = re.findall(rf"^ +.*streamfs {' '.join(path)}\b.*$", f"{command.help}\n{command.epilog}", re.MULTILINE)
    assert shown, "its help shows no example"
    with click.Context(command, info_name=path[-1]) as context:
        assert shown[0].strip() in context.get_help(), "click has folded it"


@pytest.mark.parametrize("line", sorted({line for path in commands(cli) for line in examples(path)}))
def test_examples_are_accepted(line: str) -> None:
    """Their options exist and their arguments fit; what they name need not be there."""
    words = shlex.split(line, comments=True)
    for stop in ("|", ">", "<", "&&", "||"):
        if stop in words:
            words = words[: words.index(stop)]
    command: click.Command = cli
    rest = words[1:]
    while isinstance(command, click.Group) and rest and rest[0] in command.commands:
        command, rest = command.commands[rest[0]], rest[1:]
    assert command is not cli, "no such command"
    if "--" in rest:
        rest = rest[: rest.index("--")]
    context = click.Context(command, info_name="x", **command.context_settings)
    parser = command.make_parser(context)
    _, left, _ = parser.parse_args(list(rest))
    assert left == [], "more arguments than the command takes"


def test_no_line_of_the_overview_is_cut_off() -> None:
    shown = CliRunner().invoke(cli, ["--help"], terminal_width=80).output
    assert "..." not in shown.partition("Commands:")[2]
