"""Memory for replies that are put together: from the disk, or from several pieces.

Fresh memory is zeroed first and touches other caches of the processor than what was filled a moment ago, so memory is
used again. But only once nobody can see it any more: who holds a view of a reply, however long, never finds other bytes
in it. Nobody has to say when that is; a bytearray refuses to change its length while there is any view of it.
"""

from __future__ import annotations

import threading
from collections import deque

KEPT = 4 * 1024 * 1024
"""Most bytes kept for the next replies: four of the largest that the kernel asks for, as few are on their way at a
time."""
_STEP = 64 * 1024  # lengths are multiples of it, so that what one reply used serves the next of about its size


class Replies:
    """Thread-safe; its lock is a leaf."""

    def __init__(self, most: int = KEPT) -> None:
        """`most`: bytes kept."""
        self._most = most
        self._lock = threading.Lock()
        self._kept: deque[bytearray] = deque()  # GUARDED_BY _lock. INVARIANT: nobody else knows them but by views
        self._asked = False  # GUARDED_BY _lock. Since the last trim

    @property
    def kept(self) -> int:
        """Bytes of memory kept, in use or not."""
        with self._lock:
            return sum(map(len, self._kept))

    def take(self, size: int) -> memoryview:
        """`size` bytes of undefined content. They are the caller's, and whoever's the caller gives a view of them to,
        until the last such view is gone."""
        length = -(-size // _STEP) * _STEP
        if length > self._most:
            return memoryview(bytearray(size))
        with self._lock:
            self._asked = True
            for memory in self._kept:
                if len(memory) >= size and _is_unseen(memory):
                    return memoryview(memory)[:size]
        fresh = bytearray(length)
        view = memoryview(fresh)[:size]  # before others know of it
        with self._lock:
            self._kept.append(fresh)
            while sum(map(len, self._kept)) > self._most:
                self._kept.popleft()  # who has a view of it keeps it
        return view

    def trim(self) -> None:
        """Keep nothing, unless something was taken since the last call."""
        with self._lock:
            if not self._asked:
                self._kept.clear()
            self._asked = False


def _is_unseen(memory: bytearray) -> bool:
    """Whether there is no view of it."""
    try:
        memory.append(memory.pop())  # raises before it changes anything; moves nothing where it does not
    except BufferError:
        return False
    return True
