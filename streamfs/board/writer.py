"""Writing a board: for the one daemon that holds the home.

Nothing here waits for a disk: pages of the file go there when the kernel likes. A board is never repaired. Whoever
starts makes a new one, takes over the events that nobody has acknowledged yet, and puts it in the old one's place.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from streamfs.board import layout
from streamfs.board.heap import W_ROOT, Heap
from streamfs.board.reader import Board
from streamfs.errors import InvalidRequest, NoSpace, NotFound, StreamfsError

MOST_EVENTS = 16384
"""Events the log holds at most, for the slowest of its listeners."""
MOST_EVENT_BYTES = 4 << 20
"""Bytes these may take."""
HISTORY = 256
"""Events that stay though every listener has acknowledged them, for whoever looks without a name."""
MOST_LISTENERS = 256
MOST_BYTES = 1 << 30
"""Bytes the file may grow to: a hundred thousand streams take some 60 MiB."""
_FIRST_SLOTS = 64


@dataclass(slots=True)
class EventLog:
    """Events and who has acknowledged them, as they are carried from one board to the next."""

    next: int = 0
    """The number of the next event; 0: no log was found."""
    events: list[dict[str, Any]] = field(default_factory=list)
    listeners: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of_board(cls, path: Path) -> Self:
        """The log of a board that an earlier writer left, however it ended; an empty one where there is none."""
        try:
            with Board(path) as board:
                return cls(board.events_held[1], board.events(), board.listeners)
        except (StreamfsError, ValueError, OSError):
            return cls()

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """The log that `save` wrote; an empty one where there is none that can be read."""
        try:
            return msgspec.convert(json.loads(path.read_bytes()), cls)
        except (OSError, ValueError, msgspec.ValidationError):
            return cls()

    def save(self, path: Path) -> None:
        """Write it to a file, durably. Blocks; raises OSError."""
        part = path.with_name(path.name + ".part")
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(_encoded({"next": self.next, "events": self.events, "listeners": self.listeners}))
            file.flush()
            os.fsync(fd)
        part.replace(path)


class BoardWriter:
    """The board at `path`, from now on. For one thread. Methods take microseconds and do no I/O of their own, but for
    the growing of the file."""

    def __init__(
        self, path: Path, facts: Mapping[str, Any], log: EventLog | None = None, *, limit: int = MOST_BYTES
    ) -> None:
        """`facts`: what the daemon says of itself. `log`: what it goes on with. Raises OSError, NoSpace; what was at
        `path` is then as it was."""
        self.path = path
        self._heap: Heap
        self._slots: dict[int, int] = {}  # of each stream that is shown
        self._free: list[int] = []  # slots that nobody has
        self._capacity = 0
        self._missing: set[int] = set()  # streams for which there was no room
        self._complete = False
        self._sizes: deque[int] = deque()  # bytes of the events in the log, oldest first
        self._event_bytes = 0
        self._listeners: dict[str, int] = {}
        part = path.with_name(f"{path.name}.part")
        part.unlink(missing_ok=True)
        self._heap = Heap.create(part, limit)
        try:
            self._lay_out(facts, log or EventLog())
            part.replace(path)
        except BaseException:
            self._heap.close()
            part.unlink(missing_ok=True)
            raise

    def _lay_out(self, facts: Mapping[str, Any], log: EventLog) -> None:
        heap = self._heap
        root = heap.take(layout.ROOT_BYTES)
        heap.bytes[root : root + layout.ROOT_BYTES] = bytes(layout.ROOT_BYTES)
        self._root = root >> 3
        self._store(layout.R_FACTS, layout.K_FACTS, facts)
        self._grow_table(_FIRST_SLOTS)
        ring = self._new_table(MOST_EVENTS)
        # Milliseconds since the epoch, so that no number comes again where the log of an earlier time was lost.
        begin = log.next or int(time.time() * 1000)
        words = heap.words
        words[self._root + layout.R_RING] = ring
        words[self._root + layout.R_FIRST] = words[self._root + layout.R_NEXT] = begin
        events = _latest_run(log.events, begin)
        if events:
            words[self._root + layout.R_FIRST] = words[self._root + layout.R_NEXT] = events[0]["seq"]
        for event in events:
            self._append(event["seq"], _encoded(event))
        self._listeners = dict(log.listeners)
        self._store(layout.R_LISTENERS, layout.K_LISTENERS, self._listeners)
        words = heap.words
        words[self._root + layout.R_NEXT] = begin
        words[W_ROOT] = root
        words[layout.W_PID] = os.getpid()
        words[layout.W_BORN] = layout.born(os.getpid())
        words[layout.W_STATE] = layout.FILLING
        words[layout.W_VERSION] = layout.VERSION
        self.stamp()

    def close(self) -> None:
        """Nothing is written any more; the file stays, with what it says last. Safe to call again."""
        if not self._heap.closed:
            self._heap.words[layout.W_STATE] = layout.CLOSED
            self.stamp()
            self._heap.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def stamp(self) -> None:
        """Say that something was written just now. Call it once after a lot of changes."""
        words = self._heap.words
        words[layout.W_BEAT] = time.time_ns()
        words[layout.W_STREAMS] = len(self._slots)
        words[layout.W_CHANGES] += 1

    def set_facts(self, facts: Mapping[str, Any]) -> None:
        """The daemon says this of itself from now on. Raises NoSpace."""
        self._store(layout.R_FACTS, layout.K_FACTS, facts)

    # Streams

    def put(self, stream_id: int, row: Mapping[str, Any]) -> bool:
        """Show the stream as `row` from now on. False where there is no room: then it is not shown at all, and the
        board says that it is not whole."""
        slot = self._slots.get(stream_id)
        try:
            if slot is None:
                slot = self._take_slot()
                self._slots[stream_id] = slot
            self._point(self._table_word(slot), layout.K_STREAM, slot, _encoded(row))
        except NoSpace:
            self.drop(stream_id)
            self._missing.add(stream_id)
            self._tell_state()
            return False
        if self._missing:
            self._missing.discard(stream_id)
            self._tell_state()
        return True

    def drop(self, stream_id: int) -> None:
        """The stream is there no more."""
        slot = self._slots.pop(stream_id, None)
        if slot is not None:
            self._point(self._table_word(slot), 0, 0, None)
            self._free.append(slot)
        if self._missing:
            self._missing.discard(stream_id)
            self._tell_state()

    def complete(self) -> None:
        """Every stream has been put once."""
        self._complete = True
        self._tell_state()

    def _tell_state(self) -> None:
        whole = self._complete and not self._missing
        self._heap.words[layout.W_STATE] = layout.COMPLETE if whole else layout.FILLING

    def _take_slot(self) -> int:
        if not self._free:
            self._grow_table(2 * self._capacity)
        return self._free.pop()

    def _grow_table(self, capacity: int) -> None:
        new = self._new_table(capacity)
        words = self._heap.words
        old = words[self._root + layout.R_TABLE]
        if old:
            at, there = (old >> 3) + 1, (new >> 3) + 1
            words[there : there + self._capacity] = words[at : at + self._capacity]
        words[self._root + layout.R_TABLE] = new
        if old:
            self._heap.give(old)
        self._free.extend(range(capacity - 1, self._capacity - 1, -1))
        self._capacity = capacity

    def _new_table(self, count: int) -> int:
        heap = self._heap
        table = heap.take(8 + 8 * count)
        heap.bytes[table : table + 8 + 8 * count] = bytes(8 + 8 * count)
        heap.words[table >> 3] = count
        return table

    def _table_word(self, slot: int) -> int:
        return (self._heap.words[self._root + layout.R_TABLE] >> 3) + 1 + slot

    # Events

    def log(self, event: Mapping[str, Any]) -> int:
        """Append an event; gives the number ("seq") it got. Where there is no room for it, it counts as missed."""
        seq: int = self._heap.words[self._root + layout.R_NEXT]
        self._append(seq, _encoded({"seq": seq, **event}))
        return seq

    def _append(self, seq: int, data: bytes) -> None:
        heap = self._heap
        if len(self._sizes) >= MOST_EVENTS:
            self._recycle_one()
        try:
            size = self._point(self._ring_word(seq), layout.K_EVENT, seq, data)
        except NoSpace:
            while self._sizes:
                self._recycle_one()
            heap.words[self._root + layout.R_FIRST] = heap.words[self._root + layout.R_NEXT] = seq + 1
            return
        heap.words[self._root + layout.R_NEXT] = seq + 1
        self._sizes.append(size)
        self._event_bytes += size
        self._recycle()

    def acknowledge(self, listener: str, seq: int) -> None:
        """The listener has got every event up to number `seq`: what all listeners have got is recycled. A listener is
        known from its first acknowledgement on. Raises InvalidRequest for a number that no event has yet, or where
        there are too many listeners."""
        following: int = self._heap.words[self._root + layout.R_NEXT]
        if not 0 <= seq < following:
            raise InvalidRequest(f"there is no event {seq} yet")
        known = self._listeners.get(listener)
        if known is None and len(self._listeners) >= MOST_LISTENERS:
            raise InvalidRequest(f"there are {MOST_LISTENERS} listeners already: 'streamfs events --forget NAME'")
        if known is None or seq > known:
            self._set_listeners({**self._listeners, listener: seq})

    def forget(self, listener: str) -> None:
        """There is no such listener any more. Raises NotFound."""
        if listener not in self._listeners:
            raise NotFound(f"no listener {listener!r}")
        self._set_listeners({name: seq for name, seq in self._listeners.items() if name != listener})

    def _set_listeners(self, listeners: dict[str, int]) -> None:
        self._store(layout.R_LISTENERS, layout.K_LISTENERS, listeners)
        self._listeners = listeners
        self._recycle()

    @property
    def event_log(self) -> EventLog:
        """A copy of the log, to go on with elsewhere."""
        with Board(self.path) as board:
            return EventLog(board.events_held[1], board.events(), dict(self._listeners))

    def _recycle(self) -> None:
        words = self._heap.words
        acknowledged = min(self._listeners.values(), default=words[self._root + layout.R_NEXT])
        while self._sizes and (
            self._event_bytes > MOST_EVENT_BYTES
            or (len(self._sizes) > HISTORY and words[self._root + layout.R_FIRST] <= acknowledged)
        ):
            self._recycle_one()

    def _recycle_one(self) -> None:
        words = self._heap.words
        seq = words[self._root + layout.R_FIRST]
        words[self._root + layout.R_FIRST] = seq + 1  # first, so that readers know why it is not there
        self._point(self._ring_word(seq), 0, 0, None)
        self._event_bytes -= self._sizes.popleft()

    def _ring_word(self, seq: int) -> int:
        return (self._heap.words[self._root + layout.R_RING] >> 3) + 1 + seq % MOST_EVENTS

    # Records

    def _store(self, word: int, kind: int, value: Any) -> None:
        self._point(self._root + word, kind, 0, _encoded(value))

    def _point(self, word: int, kind: int, number: int, data: bytes | None) -> int:
        """Make the word (by index; it must not move while the file grows) point at a new record, or at nothing, and
        give back what it pointed at. Gives the new record's bytes. Raises NoSpace; then all is as it was."""
        heap = self._heap
        new = size = 0
        if data is not None:
            size = layout.RECORD.size + len(data)
            new = heap.take(size)
            heap.bytes[new : new + size] = layout.sealed(new, kind, number, data)
        words = heap.words
        old = words[word]
        words[word] = new
        if old:
            heap.give(old)
        return size


def _latest_run(events: list[dict[str, Any]], following: int) -> list[dict[str, Any]]:
    """Those of the events whose numbers go without a hole up to `following`."""
    for event in reversed(events):
        if event["seq"] != following - 1:
            break
        following -= 1
    return [event for event in events if event["seq"] >= following]


def _encoded(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:  # names that are not UTF-8: JSON has them as \udcXX
        return json.dumps(value, separators=(",", ":")).encode("ascii")
