"""`persist --wait` says why it ends, whenever the daemon goes."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from streamfs.cli import waiting
from streamfs.cli.watching import Glance, Watch
from streamfs.errors import Unreachable
from streamfs.home import Home

ROW: dict[str, Any] = {"id": 1, "name": "live", "size": None, "buffered": 5, "persist": True, "persisted_path": None}


class _EndsAfter(Watch):
    """A daemon that ends after so many successful looks at its board."""

    def __init__(self, looks: int) -> None:
        super().__init__(Home.locate())
        self._left = looks

    def board(self) -> Any:
        self._left -= 1
        if self._left < 0:
            raise Unreachable("no daemon runs")
        return _Board()


class _Board:
    pid, changes, whole = 1, 1, True
    facts: ClassVar[dict[str, Any]] = {}

    def streams(self) -> list[dict[str, Any]]:
        return [ROW]

    def events(self, after: int) -> list[dict[str, Any]]:
        return []


@pytest.mark.parametrize("looks", range(4))
def test_a_daemon_that_ends_at_any_look_is_said_to_have_ended(looks: int) -> None:
    wait = waiting._Wait(["live"], 0)
    with pytest.raises(Unreachable, match="the daemon has ended: the streams are kept on"):
        wait.until_kept(_EndsAfter(looks), lambda done, known: None)


def test_a_glance_that_finds_no_daemon_has_a_problem() -> None:
    assert _EndsAfter(0).glance() == Glance([], {}, False, "no daemon runs")
