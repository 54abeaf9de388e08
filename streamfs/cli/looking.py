"""What the streams do, without asking the daemon where its board tells. Loads next to nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from streamfs.board import NAME, Board
from streamfs.errors import Damaged, Unreachable
from streamfs.home import Home

Row: TypeAlias = dict[str, Any]
"""One element of "streams" in the JSON shape: docs/json.md says what it holds."""


class Seen(NamedTuple):
    """`live`: whether a daemon runs. `disk_error`: why its cache directory takes nothing, None while it does."""

    rows: list[Row]
    live: bool
    disk_error: str | None


def look(home: Home, names: Sequence[str] = ()) -> Seen:
    """The streams of these names, or all. From the board, which a daemon that hangs or is stopped cannot hold up;
    where there is none that is whole, from whoever can tell. Raises as `open_registry`, NotFound."""
    with contextlib.suppress(Unreachable, Damaged):
        seen = at_board(home, names)
        if seen is not None:
            return seen
    from streamfs.cli.registry import open_registry

    with open_registry(home) as registry:
        rows = registry.status(names) if names else registry.everything()
        return Seen(rows, registry.live, registry.disk_error())


def at_board(home: Home, names: Sequence[str] = ()) -> Seen | None:
    """As `look`, from the board alone; None where it does not show everything. Raises Unreachable, Damaged,
    NotFound."""
    with open_board(home) as board:
        if board.live and board.whole:
            return Seen(board.streams(names or None), True, board.facts.get("disk_error"))
    return None


@contextlib.contextmanager
def open_board(home: Home) -> Iterator[Board]:
    """The board of the daemon that runs, or ran last. Raises Unreachable, Damaged."""
    with Board(board_path(home)) as board:
        yield board


def board_path(home: Home) -> Path:
    """Where the board is: beside the daemon's socket, which may be elsewhere than this environment says."""
    holder = home.holder()
    recorded = holder.socket if holder is not None else None
    return home.run / NAME if recorded is None else recorded.parent / NAME
