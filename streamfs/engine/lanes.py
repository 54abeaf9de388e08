"""Several fetches side by side ahead of one reader: how many, where, and whether that pays. Decisions only.

Over a link whose delay limits what one connection carries, the bytes ahead of a sequential reader are cut into
segments, each a fetch of its own: a lane. Lanes are begun as the reader goes on, never twice for one place. Two rounds
of each width are timed: where more lanes did not bring bytes faster, there are fewer again, or one fetch as before.
"""

from __future__ import annotations

SEGMENT = 8 * 1024 * 1024
"""Bytes of one lane: some 80 ms of a line of 100 MB/s, so that a request's round trip does not outweigh it. A guess."""
WIDTHS = (4, 8)
"""Lanes tried, one width after the other. Two would bring no more than one fetch that never waits for a reply."""
GAIN = 1.25
"""How many times faster than before a width must bring bytes to be kept."""
RETRY = 64 * 1024 * 1024
"""Bytes that one fetch brings before lanes are tried again that did not pay: it may have been the machine, busy for a
moment. Twice as many before each further trial, which takes some 64 MiB and no longer than without. A guess."""
LEAST_LATENCY = 0.005
"""Seconds to a reply from which lanes are tried: below, one connection is not limited by its round trips."""


class Lanes:
    """The lanes ahead of one reader. Times in seconds of any clock that goes forward."""

    def __init__(self, start: int, rate: float, now: float) -> None:
        """From `start` on; one fetch brought `rate` bytes a second."""
        self.next = start
        """Where the next lane begins. INVARIANT: everything from the first lane's start to here was given to a lane."""
        self.reader = start  # how far the reader has asked
        self.over = False
        """Whether they did not pay: those under way go on to their ends, no more are begun."""
        self._level = 0
        self._settled = False
        self._best = rate
        self._began = now
        self._bytes = self._ended = 0  # since then

    @property
    def width(self) -> int:
        """How many there may be at a time."""
        return WIDTHS[self._level]

    def place(self, active: int, size: int) -> tuple[int, int] | None:
        """Start and stop of the lane to begin next while `active` are under way; None: none now."""
        if self.over or active >= self.width or self.next >= min(size, self.reader + self.width * SEGMENT):
            return None
        stop = (self.next // SEGMENT + 1) * SEGMENT
        return self.next, min(size, stop if stop - self.next > SEGMENT // 4 else stop + SEGMENT)

    def finished(self, count: int, now: float) -> None:
        """A lane has brought all of its segment, `count` bytes."""
        self._bytes += count
        self._ended += 1
        if self._settled or self._ended < 2 * self.width:
            return
        rate = self._bytes / max(now - self._began, 1e-6)
        if rate >= GAIN * self._best:
            self._best = rate
            self._settled = self._level + 1 == len(WIDTHS)
            self._level = min(self._level + 1, len(WIDTHS) - 1)
        elif self._level:
            self._level -= 1
            self._settled = True
        else:
            self.over = True
        self._began, self._bytes, self._ended = now, 0, 0
