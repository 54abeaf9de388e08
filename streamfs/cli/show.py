"""Looking: ls and status."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence

import click

from streamfs.cli import types
from streamfs.cli.looking import Row, look
from streamfs.home import Home

JSON_VERSION = 1
WATCH_INTERVAL = 1.0  # seconds
_JSON_HELP = 'One JSON document: {"version": 1, "streams": [...]}.'


@click.command()
@click.option("-l", "long", is_flag=True, envvar="STREAMFS_LS_L", help="With state, length, cached bytes and source.")
@click.option("--json", "as_json", is_flag=True, envvar="STREAMFS_LS_JSON", help=_JSON_HELP)
def ls(long: bool, as_json: bool) -> None:
    """List the streams. Asks no server."""
    rows = look(Home.locate()).rows
    if as_json:
        _print(document(rows))
    elif long:
        _print(table(rows, ("state", "size", "cached", "", "name", "source")))
    elif sys.stdout.isatty():
        _print("\n".join(types.visible(row["name"]) for row in rows))
    else:
        _print("\n".join(row["name"] for row in rows))


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1, type=types.STREAM)
@click.option("--json", "as_json", is_flag=True, envvar="STREAMFS_STATUS_JSON", help=_JSON_HELP)
@click.option("--watch", is_flag=True, help="Go on, once a second, until Ctrl-C.")
def status(names: tuple[str, ...], as_json: bool, watch: bool) -> None:
    """What the streams are doing: state, length, cached bytes, readers, errors."""

    def show() -> str:
        seen = look(Home.locate(), names)
        if as_json:
            return document(seen.rows, disk_error=seen.disk_error)
        text = table(seen.rows, ("state", "size", "cached", "rate", "readers", "", "name", "error"))
        if seen.disk_error is not None:
            text += f"\n(cache: {types.visible(seen.disk_error)}; memory goes on serving)"
        return text if seen.live else f"{text}\n(no daemon runs: see 'streamfs mount')"

    if watch:
        _watch(show, whole_screen=sys.stdout.isatty() and not as_json)
    else:
        _print(show())


def _watch(show: Callable[[], str], *, whole_screen: bool) -> None:
    """Show again and again until interrupted: in place on a terminal, else one after the other."""
    if not whole_screen:
        while True:
            _print(show())
            sys.stdout.flush()
            time.sleep(WATCH_INTERVAL)
    from rich.live import Live
    from rich.text import Text

    with Live(Text(show()), auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(WATCH_INTERVAL)
            live.update(Text(show()), refresh=True)


def document(rows: Sequence[Row], **more: object) -> str:
    """The machine-readable shape, on one line, in ASCII. `more`: what is said of all streams together."""
    return json.dumps({"version": JSON_VERSION, "streams": rows, **more})


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Lines under a head; the last column is as wide as it is. An empty text without rows."""
    if not rows:
        return ""
    cells = [[column.upper() for column in columns], *([_cell(row, column) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = {columns.index(name) for name in ("size", "cached", "rate", "readers") if name in columns}
    return "\n".join(
        "  ".join(
            text.rjust(width) if at in right else text.ljust(width)
            for at, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def _cell(row: Row, column: str) -> str:
    match column:
        case "size":
            return types.human_size(row.get("size"))
        case "cached":
            return types.human_size(row.get("buffered"))
        case "rate":
            return f"{types.human_size(row['rate'])}/s" if row.get("rate") else ""
        case "":
            return "P" if row.get("persist") else ""
        case _:
            value = row.get(column)
            return "" if value is None else types.visible(str(value))


def _print(text: str) -> None:
    if text:
        click.echo(text.encode("utf-8", "surrogateescape"))
