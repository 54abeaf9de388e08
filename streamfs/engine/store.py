"""Bytes at rest: memory pieces first, then a recording on disk.

The owner's lock (`Buffer._lock`) guards everything here, except that the disk is written (`Recording.append`) and
read (`Gathered.read_disk`) outside it. Where bytes rest never changes what they are: present bytes are immutable, so
a byte may be read from memory or from disk, whichever the table names at that moment.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from streamfs.engine.pool import LARGE, SMALL, Pool
from streamfs.engine.recording import Extent, Recording

_SMALL_PIECES_FIRST = 4 * SMALL
"""A writer that has come this far in one go gets large pieces: a guess that a stream which is read on past 256 KiB
is read on for long."""


class Segment:
    """A memory piece that holds the bytes from `start` to `start + filled`; it is only ever appended to."""

    __slots__ = ("capacity", "filled", "piece", "sealed", "spilling", "start")

    def __init__(self, start: int, piece: bytearray, capacity: int) -> None:
        self.start = start
        self.piece = piece
        self.capacity = capacity  # bytes of the piece that may be used; ends at an aligned offset
        self.filled = 0
        self.sealed = False  # no more is appended: it is full, its writer left, or it goes to disk
        self.spilling = False  # somebody is writing it to disk; INVARIANT: implies sealed

    @property
    def stop(self) -> int:
        return self.start + self.filled

    def content(self) -> memoryview:
        return memoryview(self.piece)[: self.filled]

    def __lt__(self, other: Segment) -> bool:
        return self.start < other.start


@dataclass(slots=True)
class Gathered:
    """The answer to one read that memory alone could not give as a single piece.

    Memory parts are already in `out`; `read_disk` adds the rest.
    """

    out: bytearray
    start: int
    disk: list[list[Extent]] = field(default_factory=list)
    recording: Recording | None = None

    def read_disk(self, *, wait: bool) -> bool:
        """Fill in what rests on disk. False: it would block and `wait` is false. Raises DamagedExtent."""
        if not self.disk:
            return True
        assert self.recording is not None
        view = memoryview(self.out)
        while self.disk:
            run = self.disk[-1]
            base, length = run[0].start, run[-1].stop - run[0].start
            if base >= self.start and base + length <= self.start + len(self.out):
                target = view[base - self.start : base - self.start + length]
                if not self.recording.read(run, target, wait=wait):
                    return False
            else:
                # Extents are checked whole, so the edges of a read come through a piece of their own.
                whole = memoryview(bytearray(length))
                if not self.recording.read(run, whole, wait=wait):
                    return False
                first, last = max(base, self.start), min(base + length, self.start + len(self.out))
                view[first - self.start : last - self.start] = whole[first - base : last - base]
            self.disk.pop()
        return True


class Store:
    """The bytes of one generation."""

    def __init__(self, pool: Pool, recording: Recording | None = None) -> None:
        self._pool = pool
        self.recording = recording
        self._segments: list[Segment] = []  # INVARIANT: sorted by start, disjoint
        self.memory = 0  # bytes of pieces held
        self._open: dict[int, Segment] = {}  # unsealed segments by the offset where they go on

    # Writing

    def room(self, position: int, run: int) -> memoryview | None:
        """Memory for the bytes from `position` on, at least one byte; None where the pool has no piece left.

        `run`: how many bytes the writer brought before, in one go. Nothing is stored until `wrote`.
        """
        segment = self._open.get(position)
        if segment is None:
            size = LARGE if run >= _SMALL_PIECES_FIRST and position % LARGE == 0 else SMALL
            piece = self._pool.take(size)
            if piece is None:
                return None
            segment = Segment(position, piece, size - position % size)
            insort(self._segments, segment)
            self._open[position] = segment
            self.memory += size
        return memoryview(segment.piece)[segment.filled : segment.capacity]

    def wrote(self, position: int, count: int) -> None:
        """The first `count` bytes of the room at `position` now hold the stream's bytes."""
        segment = self._open.pop(position)
        segment.filled += count
        if segment.filled < segment.capacity:
            self._open[position + count] = segment
        else:
            segment.sealed = True

    def leave(self, position: int) -> None:
        """The writer at `position` goes away. Its segment is sealed, or given back where nothing is in it."""
        segment = self._open.pop(position, None)
        if segment is not None:
            segment.sealed = True
            if not segment.filled:
                self._remove(segment)

    # Reading

    def view(self, start: int, stop: int) -> memoryview | None:
        """start..stop as one view of a memory piece; None where they rest in more than one place.

        The view is good until its piece may be refilled: until the lock is released, or, where pieces are filled
        by the same trio thread only, until the next await.
        """
        index = bisect_right(self._segments, start, key=_start_of) - 1
        if index >= 0:
            segment = self._segments[index]
            if stop <= segment.stop:
                return memoryview(segment.piece)[start - segment.start : stop - segment.start]
        return None

    def gather(self, start: int, stop: int) -> Gathered:
        """start..stop, all of it stored, as a copy of what is in memory and a list of what is on disk."""
        gathered = Gathered(bytearray(stop - start), start, recording=self.recording)
        out = memoryview(gathered.out)
        position = start
        index = max(0, bisect_right(self._segments, start, key=_start_of) - 1)
        while position < stop:
            while index < len(self._segments) and self._segments[index].stop <= position:
                index += 1
            segment = self._segments[index] if index < len(self._segments) else None
            if segment is not None and segment.start <= position and segment.filled:
                end = min(stop, segment.stop)
                piece = memoryview(segment.piece)
                out[position - start : end - start] = piece[position - segment.start : end - segment.start]
            else:
                end = stop if segment is None else min(stop, segment.start)
                end = self._gather_disk(gathered, position, end)
            position = end
        return gathered

    def _gather_disk(self, gathered: Gathered, start: int, stop: int) -> int:
        assert self.recording is not None, f"bytes {start} to {stop} are nowhere"
        extents = self.recording.extents(start, stop)
        assert extents, f"bytes {start} to {stop} are nowhere"
        assert extents[0].start <= start, f"byte {start} is nowhere"
        run = [extents[0]]
        for extent in extents[1:]:
            if extent.start != run[-1].stop:
                break
            run.append(extent)
        gathered.disk.append(run)
        return min(stop, run[-1].stop)

    # Moving to disk

    def take_spillable(self, most: int, *, all_of_it: bool = False) -> list[Segment]:
        """Up to `most` bytes of segments to write to disk, lowest offsets first, sealed so that they stay as they
        are. Segments that are still being filled are left out, unless `all_of_it`."""
        chosen: list[Segment] = []
        for segment in self._segments:
            if most <= 0:
                break
            if segment.spilling or not segment.filled or not (segment.sealed or all_of_it):
                continue
            if not segment.sealed:
                segment.sealed = True
                self._open.pop(segment.stop, None)
            segment.spilling = True
            chosen.append(segment)
            most -= segment.filled
        return chosen

    def spilled(self, segments: Sequence[Segment], extents: Sequence[Extent]) -> None:
        """`segments` are on disk: their bytes are read from there from now on, their pieces go back to the pool."""
        if self.recording is not None:  # None: closed while they were being written
            self.recording.publish(extents)
        for segment in segments:
            self._remove(segment)

    def not_spilled(self, segments: Sequence[Segment]) -> None:
        """Writing them failed: the bytes stay in memory."""
        for segment in segments:
            segment.spilling = False

    def drop_memory(self, segments: Sequence[Segment]) -> None:
        """Forget the bytes of sealed segments; the caller takes them out of what is present."""
        for segment in segments:
            self._remove(segment)

    def clear(self) -> None:
        """Give every piece back."""
        for segment in list(self._segments):
            self._remove(segment)
        self._open.clear()

    def _remove(self, segment: Segment) -> None:
        index = bisect_right(self._segments, segment.start, key=_start_of) - 1
        # A new, still empty segment may share its start with none: starts are unique among segments with bytes,
        # and an empty one is removed by its own writer only.
        while index >= 0 and self._segments[index] is not segment:
            index -= 1
        if index < 0:
            return
        del self._segments[index]
        self.memory -= len(segment.piece)
        self._pool.give(segment.piece)


def _start_of(segment: Segment) -> int:
    return segment.start
