"""Interval arithmetic over byte offsets. Pure data, no locks, no I/O."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Range(NamedTuple):
    """The offsets start <= x < stop."""

    start: int
    stop: int


class RangeSet:
    """A set of offsets held as sorted, disjoint, non-touching ranges.

    INVARIANT: _starts[i] < _stops[i] < _starts[i + 1]; _total is the sum of the lengths.
    Adding at the end of the last range, the usual case, is O(1); otherwise O(log n) to find plus O(n) to insert.
    """

    __slots__ = ("_starts", "_stops", "_total")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._total = 0
        for start, stop in ranges:
            self.add(start, stop)

    def __iter__(self) -> Iterator[Range]:
        return map(Range, self._starts, self._stops)

    def __len__(self) -> int:
        """How many ranges, not how many offsets: see `total`."""
        return len(self._starts)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeSet):
            return NotImplemented
        return self._starts == other._starts and self._stops == other._stops

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"RangeSet({[(r.start, r.stop) for r in self]})"

    @property
    def total(self) -> int:
        """How many offsets are in the set."""
        return self._total

    def add(self, start: int, stop: int) -> None:
        """Put start <= x < stop into the set. An empty range changes nothing."""
        if start >= stop:
            return
        starts, stops = self._starts, self._stops
        if stops and stops[-1] == start:
            stops[-1] = stop
            self._total += stop - start
            return
        first = bisect_left(stops, start)  # the first range that touches or follows
        last = bisect_right(starts, stop)  # one past the last range that touches
        if first < last:
            start = min(start, starts[first])
            stop = max(stop, stops[last - 1])
            self._total -= sum(stops[first:last]) - sum(starts[first:last])
        starts[first:last] = [start]
        stops[first:last] = [stop]
        self._total += stop - start

    def discard(self, start: int, stop: int) -> None:
        """Take start <= x < stop out of the set."""
        if start >= stop:
            return
        starts, stops = self._starts, self._stops
        first = bisect_right(stops, start)
        last = bisect_left(starts, stop)
        if first >= last:
            return
        kept: list[tuple[int, int]] = []
        if starts[first] < start:
            kept.append((starts[first], start))
        if stops[last - 1] > stop:
            kept.append((stop, stops[last - 1]))
        self._total -= sum(stops[first:last]) - sum(starts[first:last])
        self._total += sum(b - a for a, b in kept)
        starts[first:last] = [a for a, _ in kept]
        stops[first:last] = [b for _, b in kept]

    def run_end(self, offset: int) -> int:
        """End of the unbroken run that holds `offset`; `offset` itself where it is not in the set."""
        index = bisect_right(self._starts, offset) - 1
        if index >= 0 and offset < self._stops[index]:
            return self._stops[index]
        return offset

    def next_start(self, offset: int) -> int | None:
        """The smallest member >= offset; None where there is none."""
        index = bisect_right(self._stops, offset)
        if index == len(self._starts):
            return None
        return max(offset, self._starts[index])

    def first_gap(self, start: int, stop: int) -> int | None:
        """The first offset of start <= x < stop that is not in the set; None where all are."""
        end = self.run_end(start)
        return end if end < stop else None

    def covers(self, start: int, stop: int) -> bool:
        return start >= stop or self.run_end(start) >= stop
