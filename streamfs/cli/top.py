"""The live page: top."""

from __future__ import annotations

import importlib.util
import sys

import click

from streamfs.errors import StreamfsError
from streamfs.home import Home


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
    if not (sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty()):
        raise StreamfsError("'streamfs top' needs a terminal: 'streamfs status --watch' does not")
    from streamfs.cli.page import run

    if run(Home.locate()):
        raise KeyboardInterrupt
