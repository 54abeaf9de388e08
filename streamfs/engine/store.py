"""Bytes at rest: memory pieces first, then a recording on disk.

The owner's lock (`Buffer._lock`) guards everything here, except that the disk is written (`Recording.append`) and
read (`Gathered.read_disk`) outside it. Where bytes rest never changes what they are: present bytes are immutable, so
a byte may be read from memory or from disk, whichever the table names at that moment.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from streamfs.engine.pool import LARGE, SMALL, Piece, Pool
from streamfs.engine.recording import Extent, Recording
from streamfs.engine.replies import Replies

_SMALL_PIECES_FIRST = 4 * SMALL
"""A writer that has come this far in one go gets large pieces: a guess that a stream which is read on past 256 KiB
is read on for long."""


class Segment:
    """A memory piece that holds the bytes from `start` to `start + filled`; it is only ever appended to.

    Its first writer alone appends to it, so a writer keeps its segment, and no two writers share a piece.
    """

    __slots__ = ("age", "base", "capacity", "filled", "lent", "piece", "sealed", "spilling", "start")

    def __init__(self, start: int, piece: Piece, capacity: int) -> None:
        self.start = start
        self.piece = piece
        self.base = 0  # where in the piece `start` rests; moves when bytes went to disk under the writer's hands
        self.age = 0  # counts the segments of its store: an older one has the lower number
        self.capacity = capacity  # bytes of the piece that may be used; ends at an aligned offset
        self.filled = 0
        self.sealed = False  # no more is appended: it is full, its writer left, or it goes to disk
        self.lent = False  # its writer holds a view of the rest: the piece cannot be given back
        self.spilling = False  # somebody is writing its bytes to disk; INVARIANT: implies sealed or lent

    @property
    def stop(self) -> int:
        return self.start + self.filled

    def content(self, start: int, stop: int) -> memoryview:
        """The bytes from `start` to `stop`, offsets in the stream."""
        shift = self.base - self.start
        return memoryview(self.piece)[shift + start : shift + stop]


@dataclass(slots=True)
class Gathered:
    """The answer to one read that memory alone could not give as a single piece.

    Memory parts are already in `out`; `read_disk` adds the rest.
    """

    out: memoryview
    start: int
    replies: Replies
    recording: Recording | None
    disk: list[list[Extent]] = field(default_factory=list)

    @property
    def stop(self) -> int:
        return self.start + len(self.out)

    def read_disk(self, *, wait: bool) -> bool:
        """Fill in what rests on disk. False: it would block and `wait` is false. Raises DamagedExtent."""
        if not self.disk:
            return True
        assert self.recording is not None
        while self.disk:
            run = self.disk[-1]
            if not all(self._read_part(part, wait=wait) for part in _without_edges(run, self.start, self.stop)):
                return False
            self.disk.pop()
        return True

    def _read_part(self, part: list[Extent], *, wait: bool) -> bool:
        assert self.recording is not None
        first, last = part[0].start, part[-1].stop
        if first >= self.start and last <= self.stop:
            return self.recording.read(part, self.out[first - self.start : last - self.start], wait=wait)
        # Extents are checked whole, so the edges of a read come through a piece of their own.
        whole = self.replies.take(last - first)
        if not self.recording.read(part, whole, wait=wait):
            return False
        start, stop = max(first, self.start), min(last, self.stop)
        self.out[start - self.start : stop - self.start] = whole[start - first : stop - first]
        return True


class Store:
    """The bytes of one generation."""

    def __init__(self, pool: Pool, recording: Recording | None = None) -> None:
        self._pool = pool
        self.recording = recording
        self._segments: list[Segment] = []  # INVARIANT: sorted by start, disjoint, none empty
        self._starts: list[int] = []  # INVARIANT: of `_segments`; every read looks here
        self._made = 0  # segments so far
        self.memory = 0  # bytes of pieces held, those of still empty segments too
        self._cleared = False  # nothing is kept any more: pieces go back as soon as nobody works on them

    # Writing

    def room(self, segment: Segment | None, position: int, run: int, *, beyond: bool = False) -> Segment | None:
        """A segment that takes the bytes from `position` on: the writer's own `segment` while it has room, or a new
        one; None where the pool has no piece left. Nothing is stored until `wrote`, and the segment is the writer's
        until `leave`.

        `run`: how many bytes the writer brought before, in one go. `beyond`: a small piece may go past the budget.
        """
        if segment is None or segment.sealed:
            size = LARGE if run >= _SMALL_PIECES_FIRST and position % LARGE == 0 and not beyond else SMALL
            piece = self._pool.take(size, beyond=beyond)
            if piece is None:
                return None
            segment = Segment(position, piece, size - position % size)
            self._made += 1
            segment.age = self._made
            self.memory += size
        segment.lent = True
        return segment

    def wrote(self, segment: Segment, count: int) -> None:
        """The next `count` bytes of the room in `segment` hold the stream's bytes; nobody else brought them."""
        if not segment.lent or not 0 <= count <= segment.capacity - segment.base - segment.filled:
            raise ValueError(f"there was no room for {count} bytes")
        segment.lent = False
        if count and not segment.filled:
            index = bisect_right(self._starts, segment.start)
            self._starts.insert(index, segment.start)
            self._segments.insert(index, segment)
        segment.filled += count
        if segment.base + segment.filled >= segment.capacity:
            segment.sealed = True

    def leave(self, segment: Segment) -> None:
        """The writer goes away. Its segment is sealed, or given back where nothing is in it."""
        segment.lent = False
        segment.sealed = True
        if not segment.filled:
            self._give(segment)

    def in_memory(self) -> Iterator[tuple[int, int]]:
        """Where the bytes lie that rest in memory, in order."""
        return ((segment.start, segment.stop) for segment in self._segments if segment.filled)

    # Reading

    def view(self, start: int, stop: int) -> memoryview | None:
        """start..stop as one view of a memory piece; None where they rest in more than one place.

        The view is good until its piece may be refilled: until the lock is released, or, where pieces are filled
        by the same trio thread only, until the next await.
        """
        index = bisect_right(self._starts, start) - 1
        if index >= 0:
            segment = self._segments[index]
            if stop <= segment.start + segment.filled:
                return segment.content(start, stop)
        return None

    def gather(self, start: int, stop: int) -> Gathered:
        """start..stop, all of it stored, as a copy of what is in memory and a list of what is on disk."""
        replies = self._pool.replies
        gathered = Gathered(replies.take(stop - start), start, replies, self.recording)
        out = gathered.out
        position = start
        index = max(0, bisect_right(self._starts, start) - 1)
        while position < stop:
            while index < len(self._segments) and self._segments[index].stop <= position:
                index += 1
            segment = self._segments[index] if index < len(self._segments) else None
            if segment is not None and segment.start <= position:
                end = min(stop, segment.stop)
                out[position - start : end - start] = segment.content(position, end)
            else:
                end = stop if segment is None else min(stop, segment.start)
                end = self._gather_disk(gathered, position, end)
            position = end
        return gathered

    def _gather_disk(self, gathered: Gathered, start: int, stop: int) -> int:
        extents = [] if self.recording is None else self.recording.extents(start, stop)
        if not extents or extents[0].start > start:
            raise RuntimeError(f"byte {start} is marked present, but is nowhere")  # better than zeros
        run = [extents[0]]
        for extent in extents[1:]:
            if extent.start != run[-1].stop:
                break
            run.append(extent)
        gathered.disk.append(run)
        return min(stop, run[-1].stop)

    # Moving to disk

    def take_spillable(
        self, most: int, *, all_of_it: bool = False, lent: bool = False, oldest: bool = False
    ) -> list[Segment]:
        """Segments in pieces of about `most` bytes to write to disk or to drop: whole ones, lowest offsets first, as
        many as it takes to reach `most`; on disk they take no more than their pieces do. They stay as they are until
        `spilled`, `not_spilled` or `drop_memory`.

        Segments that are still being filled are left out, unless `all_of_it`; then they are sealed. Those whose
        writer is filling them at this moment are left out even so, unless `lent`: their piece stays with the writer.
        `oldest`: what arrived first goes first, whatever its offset.
        """
        chosen: list[Segment] = []
        for segment in sorted(self._segments, key=_age_of) if oldest else self._segments:
            if most <= 0:
                break
            if segment.spilling or not (segment.sealed or (all_of_it and (lent or not segment.lent))):
                continue
            segment.sealed = segment.sealed or not segment.lent
            segment.spilling = True
            chosen.append(segment)
            most -= len(segment.piece)
        return chosen

    def spilled(self, runs: Sequence[tuple[Segment, int]], extents: Sequence[Extent]) -> None:
        """The first so many bytes of each segment are on disk: they are read from there from now on, and the pieces
        go back to the pool."""
        if self.recording is not None:  # None: closed while they were being written
            try:
                self.recording.publish(extents)
            except BaseException:
                self.not_spilled([segment for segment, _ in runs])
                raise
        leaving = []
        for segment, count in runs:
            segment.spilling = False
            if segment.sealed and count == segment.filled:
                leaving.append(segment)
                continue
            # Its writer goes on filling it: only what is written leaves, and the piece stays.
            index = self._index_of(segment)
            segment.start += count
            segment.base += count
            segment.filled -= count
            self._starts[index] = segment.start
            if not segment.filled:
                del self._starts[index], self._segments[index]
            elif self._cleared:
                leaving.append(segment)
        self._remove(*leaving)

    def not_spilled(self, segments: Sequence[Segment]) -> None:
        """Writing them failed: the bytes stay in memory."""
        for segment in segments:
            segment.spilling = False
            if self._cleared:
                self._remove(segment)

    def drop_memory(self, segments: Sequence[Segment]) -> None:
        """Forget the bytes of sealed segments; the caller takes them out of what is present."""
        self._remove(*segments)

    def drop_before(self, floor: int) -> None:
        """Forget whole segments before `floor`, but for those that somebody works on: they follow another time."""
        self._remove(*[s for s in self._segments if s.stop <= floor and s.sealed and not s.spilling])

    def clear(self) -> None:
        """Give every piece back, for good; what is being written to disk follows when that is done. No writer may
        be left."""
        self._cleared = True
        self._remove(*[s for s in self._segments if not s.spilling])

    @property
    def empty(self) -> bool:
        """Whether no byte rests in memory."""
        return not self._segments

    def _remove(self, *segments: Segment) -> None:
        for segment in segments:
            index = self._index_of(segment)
            del self._starts[index], self._segments[index]
        self._give(*segments)

    def _index_of(self, segment: Segment) -> int:
        index = bisect_right(self._starts, segment.start) - 1
        if index < 0 or self._segments[index] is not segment:
            raise RuntimeError(f"the piece at byte {segment.start} was given back before")
        return index

    def _give(self, *segments: Segment) -> None:
        """All at once: each time somebody may be woken."""
        self.memory -= sum(len(segment.piece) for segment in segments)
        self._pool.give(*[segment.piece for segment in segments])


def _without_edges(run: list[Extent], start: int, stop: int) -> list[list[Extent]]:
    """`run` in up to three parts: what lies within start..stop, and each extent that sticks out."""
    first, last = int(run[0].start < start), len(run) - int(run[-1].stop > stop)
    parts = (run[:first], run[first:last], run[max(first, last) :])
    return [part for part in parts if part]


def _age_of(segment: Segment) -> int:
    return segment.age
