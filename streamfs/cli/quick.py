"""ls and status as they are asked most, without what the other commands need.

A prompt or a script may ask every second, and to load click and what reads options takes longer than to look. Only
words that need no thought are answered here, and only what the board tells; everything else, and every failure, is done
and said in full by streamfs.cli.app.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from streamfs.cli.looking import Seen, at_board
from streamfs.cli.tables import listing, overview
from streamfs.errors import StreamfsError
from streamfs.home import Home

_FLAGS = {"ls": {"-l", "--json"}, "status": {"--json"}}
_SETTINGS = ("STREAMFS_LS_", "STREAMFS_STATUS_", "_STREAMFS_COMPLETE")
"""What variables begin with that stand for options."""


def answer(words: Sequence[str]) -> str | None:
    """What the command line of these words prints; None: that must be found out in full. Raises nothing."""
    command, rest = words[0] if words else "", words[1:]
    flags = _FLAGS.get(command)
    names = [word for word in rest if not word.startswith("-")]
    if flags is None or not flags.issuperset(set(rest) - set(names)) or (names and command == "ls"):
        return None
    if any(variable.startswith(_SETTINGS) for variable in os.environ):
        return None
    try:
        seen = at_board(Home.locate(), names)
    except (StreamfsError, OSError):
        return None
    if seen is None:
        return None
    return _text(command, rest, seen)


def _text(command: str, flags: Sequence[str], seen: Seen) -> str:
    as_json = "--json" in flags
    if command == "status":
        return overview(seen, as_json=as_json)
    return listing(seen.rows, long="-l" in flags, as_json=as_json)
