"""A transport whose exchanges run in an event loop of their own, in a thread of its own.

libcurl waits for some words of ftp and sftp servers inside its own calls, and a server that says nothing would stop
everybody's reads with them. Here it stops nothing but this thread: who waits for an answer can give up at any time, and
what comes too late is given back there.

Bytes come through pieces of memory of the response's own, never into the reader's, which may be another's by the time
that a call which was given up ends.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

from streamfs.sources.transport import Ending, Request, Response, Transport, TransportError

log = logging.getLogger(__name__)

PIECE = 256 * 1024
"""Bytes of a piece of memory that crosses. libcurl receives up to 128 KiB at a time."""
PIECES = 4
"""Of one response: one is filled while another is emptied, and two that are ready let either loop be late. A guess."""
END_WITHIN = 2.0
"""Seconds `aclose` waits for the thread. One that is stuck in a call of libcurl's is left behind: it holds nothing but
its connections, and ends when the call does, or with the program."""

T = TypeVar("T")


Maker = Callable[[], contextlib.AbstractAsyncContextManager[Transport]]


class ApartTransport:
    """`transport.Transport`. `make` is called in the thread, which the first request starts and `aclose` ends."""

    def __init__(self, make: Maker) -> None:
        self._make = make
        self._loop: _Loop | None = None

    async def request(self, request: Request) -> ApartResponse:
        """See `transport.Transport.request`."""
        if self._loop is None or self._loop.ended:
            self._loop = _Loop(self._make)
        loop = self._loop
        await loop.begun()

        async def give_back(response: Response) -> None:
            await response.aclose(reuse=False)

        call = loop.call(lambda: loop.transport.request(request), give_back)
        return ApartResponse(loop, await call.result())

    async def aclose(self) -> None:
        """End every exchange and the thread, in END_WITHIN seconds at the most."""
        if self._loop is not None:
            await self._loop.aclose()


class ApartResponse:
    """See `transport.Response`.

    Pieces go round: the other loop fills them, ours empties them. Each loop wakes the other only where that waits, so
    that a hop to the other thread is not paid for each piece."""

    def __init__(self, loop: _Loop, response: Response) -> None:
        self.status = response.status
        self.reason = response.reason
        self.http_version = response.http_version
        self.headers = response.headers
        self.ending: Ending = response.ending
        self._loop = loop
        self._response = response
        self._receiving: _Call[None] | None = None
        self._made = 0  # pieces, PIECES at most
        # Each end of these belongs to one loop. Who finds one empty sets its flag and looks again before it waits;
        # who puts something in looks at the flag afterwards: so no wake is lost.
        self._full: deque[tuple[memoryview, int]] = deque()  # (piece, bytes in it), in order
        self._empty: deque[memoryview] = deque()
        self._we_wait = self._they_wait = False
        self._come = trio.Event()  # to us
        self._back = trio.Event()  # to the other loop
        self._taken = 0  # bytes of the first of `_full`

    async def receive_into(self, view: memoryview) -> int:
        """See `transport.Response.receive_into`. A cancelled call has taken no byte."""
        if self._receiving is None:
            self._receiving = self._loop.call(self._receive, ended=self._wake_us)
        if self._full:
            await trio.lowlevel.checkpoint()
        elif not await self._wait_for_a_piece(self._receiving):
            return 0
        count = 0
        while self._full and count < len(view):
            piece, there = self._full[0]
            size = min(len(view) - count, there - self._taken)
            view[count : count + size] = piece[self._taken : self._taken + size]
            count += size
            self._taken += size
            if self._taken == there:
                self._give_back(piece)
        return count

    async def aclose(self, *, reuse: bool = True) -> None:
        """See `transport.Response.aclose`. It happens also where nobody waits for its end any more."""
        if self._receiving is not None:
            self._receiving.give_up()
        with contextlib.suppress(TransportError):  # the loop has ended, and everything in it
            await self._loop.call(lambda: self._response.aclose(reuse=reuse)).result(keep=True)

    async def _wait_for_a_piece(self, receiving: _Call[None]) -> bool:
        """False: the body has ended well. Raises what ended it otherwise."""
        while not self._full:
            if receiving.ended:
                await receiving.result()
                return False
            self._come, self._we_wait = trio.Event(), True
            if not self._full:
                await self._come.wait()
        return True

    def _wake_us(self) -> None:
        self._come.set()

    def _give_back(self, piece: memoryview) -> None:
        self._full.popleft()
        self._taken = 0
        self._empty.append(piece)
        if self._they_wait:
            self._they_wait = False
            self._loop.tell(lambda: self._back.set())

    # In the other loop

    async def _receive(self) -> None:
        while count := await self._response.receive_into(piece := await self._empty_piece()):
            self._full.append((piece, count))
            if self._we_wait:
                self._we_wait = False
                self._loop.tell_us(self._wake_us)

    async def _empty_piece(self) -> memoryview:
        if not self._empty and self._made < PIECES:
            self._made += 1
            return memoryview(bytearray(PIECE))
        while not self._empty:
            self._back, self._they_wait = trio.Event(), True
            if not self._empty:
                await self._back.wait()
        return self._empty.popleft()


class _Call(Generic[T]):
    """Something that is done in the other loop, and awaited in this one."""

    def __init__(
        self, loop: _Loop, give_back: Callable[[T], Awaitable[None]] | None, ended: Callable[[], None] | None
    ) -> None:
        """`ended` is called in our loop once it has."""
        self._loop = loop
        self._tell_ended = ended
        self._done = trio.Event()
        self._outcome: tuple[T] | Exception | None = None
        self._scope = trio.CancelScope()
        self._unwanted = False  # belongs to the other loop, as `_came`
        self._came: tuple[T] | None = None
        self._give_back = give_back

    async def result(self, *, keep: bool = False) -> T:
        """What came of it. Raises what it raised. Where this wait is cancelled, the call is given up, or, with `keep`,
        goes on and may be awaited again."""
        try:
            await self._done.wait()
        except trio.Cancelled:
            if not keep:
                self.give_up()
            raise
        assert self._outcome is not None
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome[0]

    @property
    def ended(self) -> bool:
        return self._done.is_set()

    def give_up(self) -> None:
        """Nobody wants what comes of it."""
        self._loop.tell(self._give_up)

    def end(self, outcome: tuple[T] | Exception) -> None:
        """In our own loop: there it is."""
        self._outcome = self._outcome or outcome
        self._done.set()
        if self._tell_ended is not None:
            self._tell_ended()

    # In the other loop

    async def run(self, work: Callable[[], Awaitable[T]]) -> None:
        outcome: tuple[T] | Exception = TransportError("reset", "the exchange was given up")
        with self._scope:
            try:
                outcome = (await work(),)
            except Exception as error:
                outcome = error
        if self._unwanted and isinstance(outcome, tuple) and self._give_back is not None:
            await self._give_back(outcome[0])
        self._came = outcome if isinstance(outcome, tuple) else None
        self._loop.answer(self, outcome)

    def _give_up(self) -> None:
        self._unwanted = True
        self._scope.cancel()
        if self._came is not None and self._give_back is not None:
            self._loop.spawn(self._give_back, self._came[0])


class _Loop:
    """The thread and what runs in it. Made in a trio run, whose tasks await its calls."""

    transport: Transport

    def __init__(self, make: Maker) -> None:
        self.ended = False
        self._ours = trio.lowlevel.current_trio_token()
        self._theirs: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._stop: trio.Event | None = None
        self._begun, self._gone = trio.Event(), trio.Event()
        self._calls: set[_Call[object]] = set()
        self._thread = threading.Thread(target=self._run, args=(make,), name="file transfers", daemon=True)
        self._thread.start()

    async def begun(self) -> None:
        """Raises TransportError where it cannot begin, or has ended."""
        await self._begun.wait()
        if self.ended:
            raise TransportError("reset", "file transfers have ended")

    def call(
        self,
        work: Callable[[], Awaitable[T]],
        give_back: Callable[[T], Awaitable[None]] | None = None,
        *,
        ended: Callable[[], None] | None = None,
    ) -> _Call[T]:
        """Begin `work` in the other loop; `give_back` gets a result there that nobody waits for any more; `ended` is
        called in ours once it has ended."""
        call = _Call(self, give_back, ended)
        self._calls.add(call)  # type: ignore[arg-type]
        if not self.tell(lambda: self.spawn(call.run, work)):
            self._take(call, TransportError("reset", "file transfers have ended"))
        return call

    def tell(self, work: Callable[[], None]) -> bool:
        """Run `work` in the other loop, soon. False: that has ended."""
        if self.ended or self._theirs is None:
            return False
        try:
            self._theirs.run_sync_soon(work)
        except trio.RunFinishedError:
            return False
        return True

    async def aclose(self) -> None:
        await self._begun.wait()
        self.tell(lambda: self._stop.set() if self._stop is not None else None)
        with trio.move_on_after(END_WITHIN, shield=True) as patience:
            await self._gone.wait()
        if patience.cancelled_caught:
            log.warning("a file transfer is stuck in a wait for its server; it ends with the program")
            self._end_calls()

    def _take(self, call: _Call[T], outcome: tuple[T] | Exception) -> None:
        self._calls.discard(call)
        call.end(outcome)

    def _end_calls(self) -> None:
        self.ended = True
        for call in list(self._calls):
            self._take(call, TransportError("reset", "file transfers have ended"))
        self._begun.set()

    # In the thread

    def answer(self, call: _Call[T], outcome: tuple[T] | Exception) -> None:
        self.tell_us(lambda: self._take(call, outcome))

    def spawn(self, work: Callable[..., Awaitable[None]], *arguments: object) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(work, *arguments)

    def tell_us(self, work: Callable[[], None]) -> None:
        """Run `work` in our loop, soon."""
        with contextlib.suppress(trio.RunFinishedError):  # then nobody waits
            self._ours.run_sync_soon(work)

    def _run(self, make: Maker) -> None:
        try:
            trio.run(self._main, make)
        except Exception:
            log.exception("the loop of file transfers broke")
        finally:
            self.tell_us(self._end_calls)
            self.tell_us(self._gone.set)

    async def _main(self, make: Maker) -> None:
        self._stop = trio.Event()
        async with make() as self.transport, trio.open_nursery() as self._nursery:
            self._theirs = trio.lowlevel.current_trio_token()
            self.tell_us(self._begun.set)
            await self._stop.wait()
            self._nursery.cancel_scope.cancel()
