"""The board, of whichever daemon runs now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from streamfs.board import Board
from streamfs.errors import Damaged, Unreachable

NO_DAEMON = "no daemon runs"


class Seen(NamedTuple):
    """One look. Without a daemon there are no rows and no facts: what the last one left is true no longer.

    `why`: why nothing can be seen; None while a daemon runs. `rows`, `facts`: as Board has them. `written`: when the
    daemon last wrote something, in seconds since the epoch. `whole`: whether every stream is among the rows.
    """

    why: str | None
    rows: list[dict[str, Any]]
    facts: dict[str, Any]
    written: float
    whole: bool

    @property
    def up(self) -> bool:
        return self.why is None


class Watch:
    """Looks at the board, over the ends and starts of daemons. For one thread."""

    def __init__(self, where: Callable[[], Path]) -> None:
        """`where` tells the path of the board, which may change with the daemon."""
        self._where = where
        self._board: Board | None = None
        self._rows: list[dict[str, Any]] = []
        self._changes = -1  # the board's counter before the rows were read; -1: they were not

    def close(self) -> None:
        """Safe to call again."""
        board, self._board, self._changes, self._rows = self._board, None, -1, []
        if board is not None:
            board.close()

    def look(self) -> Seen:
        """What is so now. Reads the rows again only where something was written. Raises nothing that the board, or
        its absence, is the cause of: `why` tells."""
        try:
            board = self._current()
            if not board.live:
                return Seen(NO_DAEMON, [], {}, 0.0, False)
            whole, written, changes = board.whole, board.written, board.changes
            if changes != self._changes:
                self._rows = board.streams()
                self._changes = changes
            return Seen(None, self._rows, board.facts, written, whole)
        except Unreachable:
            self.close()
            return Seen(NO_DAEMON, [], {}, 0.0, False)
        except Damaged as error:
            self.close()
            return Seen(str(error), [], {}, 0.0, False)

    def _current(self) -> Board:
        path = self._where()
        if self._board is not None and self._board.path != path:
            self.close()
        if self._board is None:
            self._board = Board(path)
        if self._board.refresh():
            self._changes = -1
        return self._board
