"""The board, followed: of whichever daemon runs, while it runs, and across the end of one and the start of the next."""

from __future__ import annotations

from typing import Any, NamedTuple

from streamfs.board import Board
from streamfs.cli.looking import Row, board_path
from streamfs.errors import Damaged, Unreachable
from streamfs.home import Home


class Glance(NamedTuple):
    """What there was to see. Without a daemon that runs, `problem` says so, and there are no rows. `whole`: whether
    every stream is among the rows. `facts`: of the daemon, as on the board."""

    rows: list[Row]
    facts: dict[str, Any]
    whole: bool
    problem: str | None

    @property
    def live(self) -> bool:
        return self.problem is None


class Watch:
    """Looks at the board of `home` again and again, cheaply where nothing is new. For one thread. `close` ends it."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._board: Board | None = None
        self._seen: object = None

    def board(self) -> Board:
        """The board of the daemon that runs. Raises Unreachable where none does, Damaged."""
        if self._board is not None and not self._board.live:
            self.close()
        if self._board is None:
            board = Board(board_path(self._home))
            if not board.live:
                board.close()
                raise Unreachable("no daemon runs")
            self._board = board
        return self._board

    def glance(self) -> Glance | None:
        """What is there now; None where that is what the last call gave."""
        try:
            board = self.board()
            now = (board.pid, board.changes, board.whole)
            if now == self._seen:
                return None
            found = Glance(board.streams(), board.facts, board.whole, None)
        except Unreachable:
            return self._without("no daemon runs")
        except Damaged as error:
            self.close()
            return self._without(str(error))
        self._seen = now
        return found

    def _without(self, problem: str) -> Glance | None:
        if self._seen == problem:
            return None
        self._seen = problem
        return Glance([], {}, False, problem)

    def close(self) -> None:
        """Safe to call again; a later look begins anew."""
        board, self._board = self._board, None
        if board is not None:
            board.close()
