"""Reads that must wait for the disk: how many bytes of them may be under way at a time, over all streams.

Such a read holds its reply from before the disk is asked until the reply is sent, besides the pool's budget. So it
takes its turn first: among the reads of its own stream, so that a stream with many readers takes no other's place, and
then among those of all streams, first come, first served.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, cast

import trio

from streamfs.engine.recording import BLOCK

IN_FLIGHT = 16 * 1024 * 1024
"""Bytes of replies that wait for the disk at a time: sixteen of the largest, more than a disk gains from."""
PATIENCE = 5.0
"""Seconds after which a read that the disk has not answered no longer counts: a disk that hangs under some streams
would hold up those of every other."""
PER_STREAM = 4
"""Reads of one stream at a time."""

_T = TypeVar("_T")


@dataclass(eq=False, slots=True)
class Reply:
    """One that waits for its turn, or for the disk."""

    size: int
    turn: trio.Event = field(default_factory=trio.Event)
    began: float = 0.0  # its turn; by trio.current_time()


class DiskReads:
    """The reads of all streams of one trio run that wait for the disk."""

    def __init__(self, most: int = IN_FLIGHT, patience: float = PATIENCE) -> None:
        """`most` in bytes, `patience` in seconds."""
        self.taken = 0
        """Bytes of the replies under way that count. INVARIANT: `most` at most, or those of one alone."""
        self._most = most
        self._patience = patience
        self._under_way: dict[Reply, None] = {}  # in the order in which they began
        self._line: deque[Reply] = deque()

    def stream(self) -> StreamReads:
        """The reads of one more stream."""
        return StreamReads(self)

    async def take(self, size: int) -> Reply:
        """Wait for the turn of a reply of `size` bytes, which `give` ends."""
        reply = Reply(size)
        self._line.append(reply)
        self._pass_on()
        try:
            while not reply.turn.is_set():
                with trio.move_on_after(self._patience):
                    await reply.turn.wait()
                self._write_off(trio.current_time() - self._patience)
        except BaseException:
            self.give(reply)
            raise
        return reply

    def give(self, reply: Reply) -> None:
        """Its turn ends, or it waits for it no longer."""
        if reply in self._under_way:
            self._end(reply)
        elif not reply.turn.is_set():
            self._line.remove(reply)
        self._pass_on()

    def _write_off(self, before: float) -> None:
        for reply in [each for each in self._under_way if each.began <= before]:
            self._end(reply)
        self._pass_on()

    def _end(self, reply: Reply) -> None:
        del self._under_way[reply]
        self.taken -= reply.size

    def _pass_on(self) -> None:
        while self._line and (not self.taken or self.taken + self._line[0].size <= self._most):
            reply = self._line.popleft()
            self._under_way[reply] = None
            self.taken += reply.size
            reply.began = trio.current_time()
            reply.turn.set()


class StreamReads:
    """Those of one stream."""

    def __init__(self, everybody: DiskReads) -> None:
        self._everybody = everybody
        self._own = trio.CapacityLimiter(PER_STREAM)

    async def run(self, size: int, read: Callable[[], _T]) -> _T:
        """`read()` in a worker thread, which reads for a reply of `size` bytes, once it is its turn. When cancelled,
        the thread is left to itself: it keeps its turn until the disk has answered. Raises as `read`."""
        # For trio a limiter is what can be acquired and released: it is released when the thread ends, left or not.
        turn = cast("trio.CapacityLimiter", _Turn(self._own, self._everybody, size + 2 * BLOCK))
        return await trio.to_thread.run_sync(read, limiter=turn, abandon_on_cancel=True)


class _Turn:
    def __init__(self, own: trio.CapacityLimiter, everybody: DiskReads, size: int) -> None:
        self._own = own
        self._everybody = everybody
        self._size = size
        self._reply: Reply | None = None

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        await self._own.acquire_on_behalf_of(borrower)
        try:
            self._reply = await self._everybody.take(self._size)
        except BaseException:
            self._own.release_on_behalf_of(borrower)
            raise

    def release_on_behalf_of(self, borrower: object) -> None:
        assert self._reply is not None
        self._everybody.give(self._reply)
        self._own.release_on_behalf_of(borrower)
