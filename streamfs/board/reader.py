"""Reading a board: no lock, no question to anybody, never a torn record."""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from streamfs.board import layout
from streamfs.board.heap import HEAD, MAGIC, W_LENGTH, W_MAGIC, W_ROOT
from streamfs.errors import Damaged, NotFound, Unreachable

NAME = "board"
_PATIENCE = 0.05
"""Seconds for which a record that does not check is looked at again. A writer is done in microseconds, and leaves none
that does not check even if it is killed; then the file itself is damaged."""


class Board:
    """What a daemon shows of its streams. For one thread; a context manager.

    `path`: the board's file, or the home (a directory) that it belongs to; None: the home of this environment. Looking
    shows what was true at most some tenths of a second ago, or when the daemon was stopped.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        """Raises Unreachable where there is no board, Damaged for a file that is none or of another version."""
        self.path = _locate(path)
        self._map()

    def _map(self) -> None:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Unreachable(f"no board at {self.path} ({error.strerror}): 'streamfs mount' makes one") from error
        try:
            info = os.fstat(fd)
            length = info.st_size & ~7
            if length < HEAD:
                raise Damaged(f"{self.path} is no board")
            self._bytes = mmap.mmap(fd, length, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(fd)
            raise
        self._fd, self._length = fd, length
        self._identity = (info.st_dev, info.st_ino)
        self._words = memoryview(self._bytes).cast("Q")
        if self._words[W_MAGIC] != MAGIC or self._words[layout.W_VERSION] != layout.VERSION:
            self.close()
            raise Damaged(f"{self.path} is no board, or was made by another streamfs")

    def close(self) -> None:
        """Safe to call again."""
        self._words.release()
        self._bytes.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def refresh(self) -> bool:
        """Go over to the board that is at the path now, if another daemon has made one: True where that is so. Raises
        as the constructor; there is nothing more to read then, only to close."""
        try:
            info = self.path.stat()
        except OSError:
            return False
        if (info.st_dev, info.st_ino) == self._identity:
            return False
        before = self._bytes, self._words, self._fd
        try:
            self._map()
        finally:
            if self._bytes is not before[0]:
                before[1].release()
                before[0].close()
                os.close(before[2])
        return True

    # Who writes it

    @property
    def pid(self) -> int:
        """The daemon's."""
        return self._words[layout.W_PID]

    @property
    def live(self) -> bool:
        """Whether the daemon that writes this board has not ended; it may be stopped, or hang."""
        words = self._words
        return words[layout.W_STATE] != layout.CLOSED and layout.born(self.pid) == words[layout.W_BORN] != 0

    @property
    def whole(self) -> bool:
        """Whether every stream is shown: not while the board of a large catalogue is being filled."""
        return self._words[layout.W_STATE] != layout.FILLING

    @property
    def written(self) -> float:
        """When something was last written, in seconds since the epoch."""
        return self._words[layout.W_BEAT] / 1e9

    @property
    def changes(self) -> int:
        """Counts up with everything that is written: where it is the same, nothing else is new."""
        return self._words[layout.W_CHANGES]

    @property
    def facts(self) -> dict[str, Any]:
        """What the daemon says of itself: "mountpoint", "version", "memory", …"""
        return self._pointed(layout.R_FACTS, layout.K_FACTS) or {}

    # Streams

    def streams(self, names: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """What is known of each stream, in the order of their names' bytes; of those with these names, in this order.
        docs/json.md says what the keys mean. Raises NotFound, and Damaged for a board that is not whole."""
        rows = {row["name"]: row for row in self._rows()}
        if names is None:
            return sorted(rows.values(), key=_by_name)
        missing = next((name for name in names if name not in rows), None)
        if missing is not None:
            raise NotFound(f"no stream {missing!r}")
        return [rows[name] for name in dict.fromkeys(names)]

    def stream(self, name: str) -> dict[str, Any]:
        """Raises NotFound."""
        return self.streams((name,))[0]

    def _rows(self) -> Iterator[dict[str, Any]]:
        for slot, offset in enumerate(self._table(layout.R_TABLE)):
            if offset:
                row = self._row(slot, offset)
                if row is not None:
                    yield row

    def _row(self, slot: int, offset: int) -> dict[str, Any] | None:
        """The stream of a slot; None where it was removed meanwhile."""
        data = self._record(offset, layout.K_STREAM, slot)
        deadline = 0.0
        while data is None:
            deadline = self._pause(deadline)
            table = self._table(layout.R_TABLE)
            if slot >= len(table) or not table[slot]:
                return None
            data = self._record(table[slot], layout.K_STREAM, slot)
        return _decoded(data)

    # Events

    def events(self, after: int = 0) -> list[dict[str, Any]]:
        """The events with numbers ("seq") above `after` that the log still holds, oldest first."""
        found: list[dict[str, Any]] = []
        first, following = self.events_held
        ring = self._table(layout.R_RING)
        for seq in range(max(first, after + 1), following):
            event = self._event(seq, ring)
            if event is not None:
                found.append(event)
        return found

    @property
    def events_held(self) -> tuple[int, int]:
        """(number of the oldest event in the log, number that the next event will get)."""
        following = self._root_word(layout.R_NEXT)
        return min(self._root_word(layout.R_FIRST), following), following

    def _event(self, seq: int, ring: list[int]) -> dict[str, Any] | None:
        """None where it was recycled meanwhile, or was lost before."""
        deadline = 0.0
        while True:
            offset = ring[seq % len(ring)] if ring else 0
            if not offset:
                return None
            data = self._record(offset, layout.K_EVENT, seq)
            if data is not None:
                return _decoded(data)
            if seq < self._root_word(layout.R_FIRST):
                return None
            deadline = self._pause(deadline)
            ring = self._table(layout.R_RING)

    @property
    def listeners(self) -> dict[str, int]:
        """Each named listener with the number of the last event it has acknowledged."""
        return self._pointed(layout.R_LISTENERS, layout.K_LISTENERS) or {}

    # Records

    def _pointed(self, word: int, kind: int) -> dict[str, Any] | None:
        deadline = 0.0
        while True:
            offset = self._root_word(word)
            if not offset:
                return None
            data = self._record(offset, kind, 0)
            if data is not None:
                return _decoded(data)
            deadline = self._pause(deadline)

    def _record(self, offset: int, kind: int, number: int) -> bytes | None:
        self._cover(offset + layout.RECORD.size)
        data = layout.unsealed(self._bytes, self._length, offset, kind, number)
        if data is None and self._words[W_LENGTH] > self._length:
            self._cover(self._words[W_LENGTH])
            data = layout.unsealed(self._bytes, self._length, offset, kind, number)
        return data

    def _root_word(self, index: int) -> int:
        root = self._words[W_ROOT]
        self._cover(root + layout.ROOT_BYTES)
        if root % 8 or not HEAD <= root <= self._length - layout.ROOT_BYTES:
            raise Damaged(f"the board {self.path} is damaged")
        return self._words[(root >> 3) + index]

    def _table(self, index: int) -> list[int]:
        """A table of offsets: its first word says how many follow."""
        deadline = 0.0
        while True:
            table = self._root_word(index)
            if not table:
                return []
            self._cover(table + 8)
            if not table % 8 and table <= self._length - 8:
                count = self._words[table >> 3]
                end = table + 8 + 8 * count
                self._cover(min(end, self._words[W_LENGTH]))
                if end <= self._length:
                    found: list[int] = self._words[(table >> 3) + 1 : end >> 3].tolist()
                    if self._root_word(index) == table:  # else it was given back while we copied it
                        return found
            deadline = self._pause(deadline)

    def _cover(self, end: int) -> None:
        """Map what the file has grown by."""
        if end <= self._length or end > self._words[W_LENGTH]:
            return
        length = os.fstat(self._fd).st_size & ~7
        mapped = mmap.mmap(self._fd, length, access=mmap.ACCESS_READ)
        self._words.release()
        self._bytes.close()
        self._bytes, self._length = mapped, length
        self._words = memoryview(mapped).cast("Q")

    def _pause(self, deadline: float) -> float:
        """Give a writer that is at work a moment. Raises Damaged once that was long enough."""
        now = time.monotonic()
        if deadline and now > deadline:
            raise Damaged(f"the board {self.path} is damaged")
        time.sleep(0.0005)
        return deadline or now + _PATIENCE


def _by_name(row: dict[str, Any]) -> bytes:
    return os.fsencode(row["name"])


def _decoded(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise Damaged("the board holds what it should not")
    return value


def _locate(path: str | os.PathLike[str] | None) -> Path:
    if path is None:
        from streamfs.home import Home

        return Home.locate().run / NAME
    found = Path(path)
    return found / "run" / NAME if found.is_dir() else found
