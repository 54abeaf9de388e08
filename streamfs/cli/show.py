"""Looking: ls and status."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import click

from streamfs.cli import types
from streamfs.cli.looking import look
from streamfs.cli.tables import listing, overview, put
from streamfs.home import Home

WATCH_INTERVAL = 1.0  # seconds
_JSON_HELP = 'One JSON document: {"version": 1, "streams": [...]}.'


@click.command()
@click.option("-l", "long", is_flag=True, envvar="STREAMFS_LS_L", help="With state, length, cached bytes and source.")
@click.option("--json", "as_json", is_flag=True, envvar="STREAMFS_LS_JSON", help=_JSON_HELP)
def ls(long: bool, as_json: bool) -> None:
    """List the streams. Asks no server."""
    put(listing(look(Home.locate()).rows, long=long, as_json=as_json))


@click.command(short_help="What the streams are doing now.")
@click.argument("names", metavar="[NAME]...", nargs=-1, type=types.STREAM)
@click.option("--json", "as_json", is_flag=True, envvar="STREAMFS_STATUS_JSON", help=_JSON_HELP)
@click.option("--watch", is_flag=True, help="Go on, once a second, until Ctrl-C.")
def status(names: tuple[str, ...], as_json: bool, watch: bool) -> None:
    """What the streams are doing: state, length, cached bytes, readers, errors."""

    def show() -> str:
        return overview(look(Home.locate(), names), as_json=as_json)

    if watch:
        _watch(show, whole_screen=sys.stdout.isatty() and not as_json)
    else:
        put(show())


def _watch(show: Callable[[], str], *, whole_screen: bool) -> None:
    """Show again and again until interrupted: in place on a terminal, else one after the other."""
    if not whole_screen:
        while True:
            put(show())
            sys.stdout.flush()
            time.sleep(WATCH_INTERVAL)
    from rich.live import Live
    from rich.text import Text

    with Live(Text(show()), auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(WATCH_INTERVAL)
            live.update(Text(show()), refresh=True)
