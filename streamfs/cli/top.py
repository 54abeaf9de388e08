"""The live page: top."""

from __future__ import annotations

import importlib.util
import os
import sys

import click

from streamfs.errors import StreamfsError
from streamfs.home import Home

_TOO_PLAIN = ("dumb", "unknown")  # values of TERM


@click.command()
def top() -> None:
    """Show what all streams do, live.

    Each has a map of its bytes: in memory, on disk, here in part, missing, and where its readers are.

    Keys: the arrows choose a stream, p keeps it or no longer (persist), e evicts, Delete removes it after asking,
    s and r choose the order, / filters by name, J and K (or Shift with an arrow) scroll what is told of the chosen one,
    q ends. Works beside a daemon that hangs, and waits where none runs.
    Needs textual: pip install 'streamfs[tui]'
    """
    if importlib.util.find_spec("textual") is None:
        raise StreamfsError("'streamfs top' needs textual: pip install 'streamfs[tui]' (pipx inject streamfs textual)")
    # A stream that is closed is none at all.
    if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise StreamfsError("'streamfs top' needs a terminal: 'streamfs status --watch' does not")
    if os.environ.get("TERM") in _TOO_PLAIN:
        raise StreamfsError("'streamfs top' needs a terminal that can paint, and TERM says that this one cannot")
    if _in_background(sys.stdin.fileno()):  # its first byte would stop it, and nothing be shown
        raise StreamfsError("'streamfs top' needs its terminal in the foreground (of timeout: with --foreground)")
    from streamfs.cli.page import run

    if run(Home.locate()):
        raise KeyboardInterrupt


def _in_background(terminal: int) -> bool:
    """Whether another group of processes has the terminal; of one that is not our own, none of them has it."""
    try:
        return os.tcgetpgrp(terminal) != os.getpgrp()
    except OSError:
        return False
