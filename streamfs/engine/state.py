"""What a buffer knows, without its bytes: which are present, where the end is, what failed, who waits.

All transitions of a buffer live here. No locks, no I/O, no threads: `streamfs.engine.buffer` calls every method
under its lock, and tests are plain asserts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from streamfs.engine.ranges import RangeSet
from streamfs.errors import Damaged, OutsideWindow, SourceFailed, StreamfsError, told


class Want(NamedTuple):
    """The answer to one read. `stop` is where it ends once clipped to a known size; `missing` is its first
    absent byte, None when all of start..stop is present."""

    stop: int
    missing: int | None


class Waiter:
    """One reader that waits until start..stop is present, the end is known before it, or something failed.

    `wake` is called once, under the buffer's lock: it must only signal.
    """

    __slots__ = ("missing", "stop", "wake")

    def __init__(self, missing: int, stop: int, wake: Callable[[], None]) -> None:
        self.missing = missing  # INVARIANT: absent from `present` while the waiter is registered
        self.stop = stop
        self.wake = wake


class BufferState:
    """State of one generation of a stream.

    `present`: bytes that can be read now. `size`: the total, as declared by the source or proven by its end; None
    while unknown. `floor`: the first byte that is kept; what lies before it has left the window.
    `failure`: why missing bytes cannot be had; present bytes stay readable. `doomed`: nothing can be read any more.
    """

    def __init__(self, size: int | None = None) -> None:
        self.present = RangeSet()
        self.damaged = RangeSet()  # bytes that were present and failed their checksum, and cannot be had again
        self.size = size
        self.floor = 0
        self.failure: StreamfsError | None = None
        self.doomed: StreamfsError | None = None
        self._waiters: dict[Waiter, None] = {}  # ordered: first come, first woken

    # What a reader asks

    def want(self, start: int, size: int) -> Want:
        """Can `size` bytes from `start` be read? Raises what a reader must see instead of an answer.

        An empty result (stop <= start) is the proven end, or size 0.
        """
        if self.doomed is not None:
            raise again(self.doomed)
        stop = start + size
        if self.size is not None and stop > self.size:
            stop = max(start, self.size)
        if stop <= start:
            return Want(start, None)
        if start < self.floor:
            raise OutsideWindow(f"byte {start} has left the window, which now begins at {self.floor}")
        missing = self.present.first_gap(start, stop)
        if missing is not None:
            if self.damaged and self.damaged.run_end(missing) > missing:
                raise Damaged(f"the cached bytes at {missing} are damaged and cannot be fetched again")
            if self.failure is not None:
                raise again(self.failure)
        return Want(stop, missing)

    def available(self, start: int, size: int) -> int:
        """How many of `size` bytes from `start` are present without a gap."""
        if self.doomed is not None or start < self.floor:
            return 0
        return min(self.present.run_end(start) - start, size)

    @property
    def complete(self) -> bool:
        """Whether every byte from 0 to a known size is present."""
        return self.size is not None and self.present.covers(0, self.size)

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    def is_waited_for(self, start: int, stop: int | None) -> bool:
        """Whether some reader waits for a byte of start..stop (None: to the end)."""
        return any(w.missing >= start and (stop is None or w.missing < stop) for w in self._waiters)

    # What happens

    def wait(self, waiter: Waiter) -> None:
        self._waiters[waiter] = None

    def forget(self, waiter: Waiter) -> None:
        self._waiters.pop(waiter, None)

    def wake_one(self) -> None:
        """Wake the reader that has waited longest, to look again (a puller's hand-over)."""
        for waiter in self._waiters:
            del self._waiters[waiter]
            waiter.wake()
            return

    def wake_all(self) -> None:
        """Wake every reader, to look again."""
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters:
            waiter.wake()

    def received(self, start: int, stop: int) -> None:
        """start..stop are stored and readable. Wakes exactly the readers that this satisfies."""
        self.present.add(start, stop)
        if self.damaged:
            self.damaged.discard(start, stop)
        if not self._waiters:
            return
        satisfied = []
        for waiter in self._waiters:
            if start <= waiter.missing < stop:
                end = waiter.stop if self.size is None else min(waiter.stop, self.size)
                missing = self.present.first_gap(waiter.missing, end)
                if missing is None:
                    satisfied.append(waiter)
                else:
                    waiter.missing = missing
        for waiter in satisfied:
            del self._waiters[waiter]
            waiter.wake()

    def sized(self, size: int) -> None:
        """The size became known (declared, or proven by the end). Raises SourceFailed where it contradicts what
        is known: bytes past it, or another size before."""
        if self.size is not None and self.size != size:
            raise SourceFailed(f"the source ended at byte {size}, but had declared {self.size} bytes")
        if self.present.next_start(size) is not None:
            raise SourceFailed(f"the source declared {size} bytes after sending more")
        self.size = size
        self.wake_all()

    def lost(self, start: int, stop: int, *, for_good: bool) -> None:
        """Stored bytes turned out to be gone or damaged. `for_good`: they cannot be fetched again."""
        self.present.discard(start, stop)
        if for_good:
            self.damaged.add(start, stop)
        self.wake_all()

    def fail(self, error: StreamfsError) -> None:
        """Missing bytes cannot be had: every reader that needs some raises `error`, each time."""
        self.failure = error
        self.wake_all()

    def retry(self) -> None:
        """Forget a failure: somebody is trying again."""
        self.failure = None

    def doom(self, error: StreamfsError) -> None:
        """Nothing may be read from now on: the version is stale, or the buffer is closed."""
        self.doomed = told(error)
        self.wake_all()

    def raise_floor(self, floor: int) -> None:
        """Everything before `floor` left the window."""
        if floor > self.floor:
            self.floor = floor
            self.present.discard(0, floor)
            self.wake_all()


def again(error: StreamfsError) -> StreamfsError:
    """A fresh exception that says the same, chained to the first: one instance raised in many readers would grow
    a traceback in each."""
    copy = told(error)
    copy.__cause__ = error.__cause__ or error
    return copy
