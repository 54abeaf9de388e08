"""Waiting until streams are kept: `persist --wait`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from streamfs.cli.looking import Row
from streamfs.cli.progress import Progress, bytes_progress
from streamfs.cli.watching import Glance, Watch
from streamfs.errors import Damaged, NotFound, SourceFailed, StreamfsError, Unreachable
from streamfs.home import Home

_PAUSE = 0.1  # seconds between two looks, which cost next to nothing
_SHARE = 10  # a look at a large board that took a second is followed by so many without one


def persist_and_wait(home: Home, names: Sequence[str], persist: Callable[[], None]) -> None:
    """Call `persist`, which asks the running daemon to keep the streams `names`, and come back once every byte of them
    is durable on disk. Raises what `persist` raises; SourceFailed where a stream failed after that; Unreachable where
    no daemon runs, or it ended; NotFound where a stream was removed. Whatever it raises, streams stay persisted."""
    watch = Watch(home)
    try:
        try:
            before = watch.board().events_held[1] - 1
        except (Unreachable, Damaged) as error:
            persist()
            raise Unreachable(f"the streams will be kept, but there is nothing to wait for: {error}") from error
        persist()
        title = names[0] if len(names) == 1 else f"{len(names)} streams"
        with bytes_progress(title) as progress:
            _Wait(names, before).until_kept(watch, progress)
    finally:
        watch.close()


class _Wait:
    """For streams that are to be kept. `seen`: the number of the last event before that was asked for."""

    def __init__(self, names: Sequence[str], seen: int) -> None:
        self._waiting = dict.fromkeys(names)
        self._ids: dict[str, int] = {}
        self._seen = seen

    def until_kept(self, watch: Watch, progress: Progress) -> None:
        while True:
            began = time.monotonic()
            found = watch.glance()
            if found is not None:
                if found.problem is not None:
                    raise _ended()
                rows = self._rows(found)
                sizes = [row["size"] for row in rows]
                known = None if None in sizes or len(rows) < len(self._waiting) else sum(sizes)
                progress(sum(row["buffered"] for row in rows), known)
                if found.whole and all(row.get("persisted_path") for row in rows):
                    return
                self._look_for_failures(watch, {row["name"] for row in rows if not row.get("persisted_path")})
            time.sleep(max(_PAUSE, (time.monotonic() - began) * _SHARE))

    def _rows(self, found: Glance) -> list[Row]:
        """Their rows. Raises NotFound, and StreamfsError for one that is not to be kept any longer."""
        by_name = {row["name"]: row for row in found.rows}
        for name in self._waiting:
            if name not in self._ids and name in by_name:
                self._ids[name] = by_name[name]["id"]
        by_id = {row["id"]: row for row in found.rows}
        rows = []
        for name in self._waiting:
            row = by_id.get(self._ids.get(name, -1))
            if row is None:
                if found.whole:
                    raise NotFound(f"{name!r} was removed while it was fetched")
                continue
            if not row["persist"]:
                raise StreamfsError(f"{name!r} is not kept any longer: somebody has unpersisted it")
            rows.append(row)
        return rows

    def _look_for_failures(self, watch: Watch, waiting: set[str]) -> None:
        """Raises SourceFailed for the first failure of one of these streams that nobody has seen. Errors of rows are
        no help: they may be of an earlier attempt."""
        try:
            board = watch.board()
        except Unreachable as error:  # since the glance
            raise _ended() from error
        for event in board.events(after=self._seen):
            self._seen = event["seq"]
            if event["event"] in ("failed", "stalled") and event.get("stream") in waiting:
                raise SourceFailed(f"{event['stream']!r} is not whole: {event['error']}")


def _ended() -> Unreachable:
    return Unreachable("the daemon has ended: the streams are kept on with the next mount")
