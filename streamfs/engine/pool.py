"""Memory pieces that are reused, within one budget.

Fresh memory is dear: filling a new piece costs about ten times as much as filling one that was touched before
(1 against 11 GB/s where this was measured), so pieces go back to a free list and are handed out again.

A piece is a mapping of its own: it begins at a page, as writing past the page cache (O_DIRECT) asks for, and goes back
to the system when it is dropped, which pieces between other objects of the heap do not.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable

from streamfs.engine.replies import Replies

Piece = mmap.mmap

SMALL = 64 * 1024
"""Bytes of a small piece: the start of a stream and every far seek begin with these, so that thousands of slow
or barely read streams fit the budget."""
LARGE = 1024 * 1024
"""Bytes of a large piece: the largest read the kernel sends (256 pages), so that an aligned read is one piece."""


class Pool:
    """Pieces of SMALL or LARGE bytes; all of them together stay within `budget` bytes, but for what is taken `beyond`.

    Thread-safe; its lock is a leaf: nothing else is locked and nothing waits while it is held. `on_give` is
    called without this lock, from whichever thread gave pieces back and perhaps under a buffer's lock, so that who
    waits for memory can be woken: it must only signal.
    """

    def __init__(
        self, budget: int, on_give: Callable[[], None] | None = None, *, replies: Replies | None = None
    ) -> None:
        if budget < LARGE:
            raise ValueError(f"a memory budget under {LARGE} bytes holds no piece")
        self.budget = budget
        self.on_give = on_give
        self.replies = Replies() if replies is None else replies
        """Besides the budget: memory for replies that no single piece can give."""
        self._lock = threading.Lock()
        self._free: dict[int, deque[Piece]] = {SMALL: deque(), LARGE: deque()}  # GUARDED_BY _lock
        self._used = 0  # GUARDED_BY _lock. INVARIANT: _idle is 0 where _used is past the budget
        self._idle = 0  # GUARDED_BY _lock
        self._dry = False  # GUARDED_BY _lock. The system had no memory, and nothing was given back since
        self._unneeded = 0  # GUARDED_BY _lock. Bytes that were idle all the time since the last trim

    @property
    def used(self) -> int:
        """Bytes in pieces that are handed out."""
        return self._used

    def take(self, size: int, *, beyond: bool = False) -> Piece | None:
        """A piece of `size` (SMALL or LARGE) bytes with undefined content; None where the budget is spent, unless
        the caller may go `beyond` it, and where the system has no more: no memory, or no more mappings (65,530 by
        default, of which neighbours count as one). `beyond`: raises MemoryError there."""
        with self._lock:
            free = self._free[size]
            if free:
                self._idle -= size
                self._unneeded = min(self._unneeded, self._idle)
                self._used += size
                return free.pop()
            if self._used + size > self.budget and not beyond:
                return None
            self._shed(self._used + self._idle + size - self.budget)
            self._used += size
        try:
            return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            with self._lock:
                self._used -= size
                self._dry = True
            if beyond:
                raise MemoryError(f"the system has no memory left: {error}") from error
            return None

    def give(self, *pieces: Piece) -> None:
        """Hand pieces back; the caller keeps no view of them."""
        with self._lock:
            self._dry = self._dry and not pieces
            for piece in pieces:
                size = len(piece)
                self._used -= size
                if self._used + self._idle + size <= self.budget:
                    self._idle += size
                    self._free[size].append(piece)
        if pieces and self.on_give is not None:
            self.on_give()

    def take_fails(self) -> bool:
        """Whether no LARGE piece can be had now."""
        with self._lock:
            return not self._free[LARGE] and (self._dry or self._used + LARGE > self.budget)

    def trim(self, most: int) -> bool:
        """Return about `most` bytes to the system of what nobody has asked for since a call gave False. True: there is
        more, to be asked for again; each MiB takes the system some 0.1 ms. So for what is kept for replies."""
        with self._lock:
            before = self._idle
            unneeded = self._unneeded
            self._shed(min(unneeded, most))
            left = unneeded - (before - self._idle)
            self._unneeded = left if left > 0 else self._idle
        if left <= 0:
            self.replies.trim()
        return left > 0

    def _shed(self, excess: int) -> None:
        while excess > 0 and self._idle:
            size = LARGE if self._free[LARGE] else SMALL
            self._free[size].popleft()
            self._idle -= size
            excess -= size
        self._unneeded = min(self._unneeded, self._idle)
