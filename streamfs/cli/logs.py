"""logs: what the daemon wrote down."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import BinaryIO, NoReturn

import click

from streamfs.errors import NotFound
from streamfs.home import Home
from streamfs.logs import files

_LOOK = 0.2  # seconds between two looks at a file that tells nobody when it grows


@click.command()
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    metavar="N",
    help="How many of the last lines.",
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
def logs(lines: int, follow: bool) -> None:
    """Show the daemon's log.

    It is there after the daemon has ended, too. 'streamfs mount --log-level debug' writes more, '--log-format json'
    one object a line.
    """
    path = Home.locate().log_path
    if follow:
        _follow(path, lines)
    try:
        with open(path, "rb") as file:
            _write(_end(path, file.read(), lines))
    except FileNotFoundError as error:
        raise NotFound(f"there is no log at {path}: 'streamfs mount' begins one") from error


def _end(path: Path, newest: bytes, lines: int) -> bytes:
    """The last `lines` lines of the log whose current file holds `newest`."""
    older, _ = files(path)
    before = older.read_bytes() if older.exists() else b""
    return b"".join((before + newest).splitlines(keepends=True)[-lines:]) if lines else b""


def _follow(path: Path, lines: int) -> NoReturn:
    """Print the last lines, and then what is added to the file `path` and to those that take its place."""
    first = True
    while True:
        try:
            with open(path, "rb") as file:
                if first:
                    _write(_end(path, file.read(), lines))
                    first = False
                while _is(file, path):
                    _write(file.read())
                    time.sleep(_LOOK)
                _write(file.read())  # what came before it was set aside
        except FileNotFoundError:
            first = False
            time.sleep(_LOOK)


def _is(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _write(data: bytes) -> None:
    if data:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
