"""Keeps the board: writes what changed, some times a second, beside everything else that the daemon does.

Streams say that they changed (streamfs.news); a task here looks at those, and only those, and writes their rows.
Whatever it does takes a bounded share of the event loop's time.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Collection
from operator import itemgetter
from typing import Any

import trio

from streamfs.board.writer import BoardWriter
from streamfs.engine.ranges import RangeSet
from streamfs.errors import NoSpace
from streamfs.filesystem import FileSystem
from streamfs.stream import Stream

log = logging.getLogger(__name__)

PAUSE = 0.1
"""Seconds between two rounds while bytes come in."""
URGENT_PAUSE = 0.01
"""Seconds between two rounds where something happened that people wait to see: an event."""
SHARE = 20
"""A round that took a second is followed by a pause of so many at least, but for urgent ones: the loop gives the board
a twentieth of its time."""
URGENT_SHARE = 4
SLICE = 0.002
"""Seconds of work after which others get their turn."""
AT_ONCE = 1000
"""Streams that are put on a new board before the mount answers; the rest of a larger catalogue follows in the
background, with `SHARE` of the time."""
MOST_RANGES = 128
"""Runs of bytes that a row tells of each of memory and disk; of more, those with the smallest gaps are joined."""
MOST_READERS = 64
"""Readers whose positions a row tells."""
_RATE_OVER = 0.5  # seconds, at least, that a rate is measured over
_FETCHES_AGAIN = 5.0  # seconds without a fetch after which the next is worth an event


class Reporter:
    """The board of one file system. Everything runs in the trio thread."""

    def __init__(self, filesystem: FileSystem, board: BoardWriter, facts: dict[str, Any]) -> None:
        """`facts`: what the daemon says of itself, besides "disk_error" and "counts" (as News.counts)."""
        self._fs = filesystem
        self._facts = facts | {"disk_error": None, "counts": {}}
        self._board = board
        self._woken = trio.Event()
        self._woken.set()  # there may be news from before we listened, of which nobody is told again
        self._hurry = trio.Event()
        self._lives: dict[int, _Life] = {}  # of streams that were used since the daemon began
        self._moving: set[int] = set()  # those of them whose rates must go down if nothing comes
        self._full = False
        self._writing = trio.Lock()
        filesystem.news.on_news = self._wake

    async def fill(self) -> None:
        """Put every stream on a board that is new."""
        ids = self._fs.ids
        await self._put_all(ids[:AT_ONCE], 0)
        if len(ids) <= AT_ONCE:
            self._finish_filling()

    def _finish_filling(self) -> None:
        self._board.complete()
        self._board.stamp()

    async def run(self) -> None:
        """Go on until cancelled."""
        async with trio.open_nursery() as nursery:
            if len(self._fs.ids) > AT_ONCE:
                nursery.start_soon(self._fill_the_rest)
            while True:
                with trio.move_on_after(2 * _RATE_OVER if self._moving else float("inf")):
                    await self._woken.wait()
                await self._round()

    async def _fill_the_rest(self) -> None:
        await self._put_all(self._fs.ids[AT_ONCE:], SHARE)
        self._finish_filling()

    async def _round(self) -> None:
        self._woken = trio.Event()
        urgent, self._hurry = self._hurry.is_set(), trio.Event()
        began = time.perf_counter()
        await self.flush()
        cost = time.perf_counter() - began
        if urgent:
            await trio.sleep(max(URGENT_PAUSE, cost * URGENT_SHARE))
        with trio.move_on_after(max(PAUSE, cost * SHARE)):
            await self._hurry.wait()

    def _wake(self, urgent: bool) -> None:
        self._woken.set()
        if urgent:
            self._hurry.set()

    def _tell_facts(self) -> None:
        self._facts |= self._moving_facts()
        try:
            self._board.set_facts(self._facts)
            self._board.stamp()
        except NoSpace as error:
            log.warning("the board cannot tell why the cache takes nothing: %s", error)

    def _moving_facts(self) -> dict[str, Any]:
        return {"disk_error": self._fs.disk_error, "counts": dict(self._fs.news.counts)}

    def acknowledge(self, listener: str, seq: int) -> None:
        """As BoardWriter.acknowledge."""
        self._board.acknowledge(listener, seq)
        self._board.stamp()

    def forget(self, listener: str) -> None:
        """As BoardWriter.forget."""
        self._board.forget(listener)
        self._board.stamp()

    async def flush(self) -> None:
        """Write all that changed up to now, whoever may have begun to write it."""
        async with self._writing:
            await self._flush()

    async def _flush(self) -> None:
        changed, events = self._fs.news.take()
        changed.update(stream_id for stream_id in self._moving if self._lives[stream_id].rates_are_due())
        for event in events:
            event["stream"] = event["stream"] or self._fs.name_of(event["id"])
            self._board.log(_told(event))
        if changed:
            await self._put_all(changed, 0)
            self._board.stamp()
        if any(self._facts[key] != value for key, value in self._moving_facts().items()):
            self._tell_facts()

    async def _put_all(self, ids: Collection[int], share: int) -> None:
        began = time.perf_counter()
        for stream_id in ids:
            self._put(stream_id)
            worked = time.perf_counter() - began
            if worked > SLICE:
                await trio.sleep(worked * share)
                began = time.perf_counter()

    def _put(self, stream_id: int) -> None:
        found = self._fs.look(stream_id)
        if found is None:
            self._lives.pop(stream_id, None)
            self._moving.discard(stream_id)
            self._board.drop(stream_id)
            return
        row, stream = found
        row["id"] = stream_id
        if stream is not None:
            life = self._lives.get(stream_id)
            if life is None:
                life = self._lives[stream_id] = _Life()
            row |= _details(stream)
            row |= life.seen(stream)
            for event in life.events(stream, row):
                self._fs.news.counts[event["event"]] += 1
                self._board.log({"time": round(time.time(), 3), **event, "stream": row["name"]})
            if life.moves:
                self._moving.add(stream_id)
            else:
                self._moving.discard(stream_id)
                if stream.generation is None and not stream.open_handles:
                    del self._lives[stream_id]  # nothing needs to be remembered
        if not self._board.put(stream_id, row) and not self._full:
            self._full = True
            log.warning("there is no room for the board to grow: 'streamfs status' asks the daemon instead")


class _Life:
    """What a stream was when it was last looked at, for what only shows in comparison."""

    def __init__(self) -> None:
        self._at = time.monotonic()
        self._counts = (0, 0)
        self._generation: int | None = None
        self._known: int | None = None  # the generation whose events were told last
        self._rates = (0.0, 0.0)
        self._fetched = float("-inf")
        self._received = 0
        self._complete = self._persisted = False

    @property
    def moves(self) -> bool:
        """Whether a rate is told that must go down if nothing comes."""
        return self._rates != (0.0, 0.0)

    def rates_are_due(self) -> bool:
        return time.monotonic() - self._at >= _RATE_OVER

    def seen(self, stream: Stream) -> dict[str, Any]:
        """The rates, in bytes a second over the last moments: what came from the source, what readers got."""
        now = time.monotonic()
        generation = stream.generation
        number = generation.number if generation is not None else None
        received = generation.received if generation is not None else 0
        if number != self._generation:
            self._generation, self._counts = number, (0, self._counts[1])
        counts = (received, stream.served)
        passed = now - self._at
        if passed >= _RATE_OVER or not self.moves:
            span = max(passed, 0.1) if self.moves else max(min(passed, 1.0), 0.1)
            news = [max(0, count - before) / span for count, before in zip(counts, self._counts, strict=True)]
            old = self._rates if passed < 5 else (0.0, 0.0)
            self._rates = (_smooth(old[0], news[0]), _smooth(old[1], news[1]))
            self._at, self._counts = now, counts
        return {"rate": round(self._rates[0]), "read_rate": round(self._rates[1])}

    def events(self, stream: Stream, row: dict[str, Any]) -> list[dict[str, Any]]:
        """What became of the stream since the last look."""
        found: list[dict[str, Any]] = []
        generation = stream.generation
        if generation is None:
            self._complete = self._persisted = False
            return found
        now = time.monotonic()
        complete = generation.buffer.complete
        persisted = row["persist"] and row["persisted_path"] is not None
        if self._known != generation.number:
            self._known, self._received, self._fetched = generation.number, 0, float("-inf")
            # What an earlier run had brought is no news.
            self._complete, self._persisted = (complete, persisted) if not generation.received else (False, False)
        if generation.fetching or generation.received > self._received:
            if now - self._fetched > _FETCHES_AGAIN:
                found.append({"event": "fetching", "size": row["size"]})
            self._fetched, self._received = now, generation.received
        if complete and not self._complete:
            found.append({"event": "complete", "size": row["size"]})
        if persisted and not self._persisted:
            found.append({"event": "persisted", "path": row["persisted_path"]})
        self._complete, self._persisted = complete, persisted
        return found


def _smooth(old: float, new: float) -> float:
    if new == 0 or old == 0:
        return new
    return 0.5 * old + 0.5 * new


def _details(stream: Stream) -> dict[str, Any]:
    """What a row tells beyond `status --json` of earlier days: where bytes rest, who reads where, what is fetched."""
    generation = stream.generation
    shown: dict[str, Any] = {
        "served": stream.served,
        "title": stream.title,
        "positions": [
            {"at": at, **opener}
            for at, opener in sorted(
                ((handle.position, handle.opener) for handle in stream.open_handles if handle.opener is not None),
                key=itemgetter(0),
            )[:MOST_READERS]
        ],
    }
    if generation is None:
        nothing = {"memory": [], "disk": [], "joined": False}
        return shown | {"received": 0, "memory": 0, "map": nothing, "fetches": []}
    memory, disk = generation.buffer.places()
    return shown | {
        "received": generation.received,
        "memory": memory.total,
        "map": {
            "memory": _ranges(memory),
            "disk": _ranges(disk),
            "joined": max(len(memory), len(disk)) > MOST_RANGES,
        },
        "fetches": [
            {"at": fetch.position, "until": fetch.limit, "ahead": fetch.ahead, "resting": fetch.resting}
            for fetch in generation.plan.fetches
        ],
    }


def _ranges(places: RangeSet) -> list[list[int]]:
    """The ranges as [start, stop], at most MOST_RANGES: where there are more, short gaps are left out."""
    found = [[start, stop] for start, stop in places]
    if len(found) <= MOST_RANGES:
        return found
    longest = heapq.nlargest(MOST_RANGES - 1, range(1, len(found)), key=lambda i: found[i][0] - found[i - 1][1])
    joined = []
    first = 0
    for following in (*sorted(longest), len(found)):
        joined.append([found[first][0], found[following - 1][1]])
        first = following
    return joined


def _told(event: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key != "id"}
