"""Whose turn it is to read the mount's next request: pyfuse3's main loop with fewer steps of trio for each.

pyfuse3 has a pool of tasks that take turns: one waits for the next request, one more stands in line behind it, and
where a request is read the one in line takes over. So each request costs two steps of trio and two looks for events,
though most are answered at once and the task that answered could just as well read the next. Here the turn goes on
only when the task that had it waits for something else, and whether a request is there already is asked before trio is.

pyfuse3 finds what it needs of trio through a name in its module (its own asyncio mode replaces that); `install`
puts a `Turns` there.
"""

from __future__ import annotations

import os
import select
import time
import types
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from typing import Any

import trio

AT_ONCE = 16
"""Requests read one after another before other tasks get their turn: about a millisecond's worth."""
AT_MOST = 2e-3
"""Seconds after which they get it in any case: a read whose source answers on the spot (streamfs.sources.prompt) takes
as long as ten others."""
NEXT_WITHIN = 100e-6
"""Seconds in which the next request of a program that reads in small steps is waited for on the spot: 10 to 90
microseconds go by until it has been woken and asks again; to sleep takes a round of trio, 50 of the processor, and as
long to be woken."""
_MISSES = 3  # in a row, after which no program seems to read so
_LOOK_AGAIN = 64  # requests after which it is tried once more
_SEVERAL = len(os.sched_getaffinity(0)) > 1  # processors: with one alone, nobody could ask meanwhile


class _Nursery:
    """Starts pyfuse3's tasks, and sees when one of them waits."""

    def __init__(self, nursery: trio.Nursery, turns: Turns) -> None:
        self._nursery = nursery
        self._turns = turns

    def start_soon(self, work: Callable[..., Awaitable[Any]], *arguments: Any, name: object = None) -> None:
        # pyfuse3 hands the nursery that it was given to each task it starts: that must be this one.
        self._nursery.start_soon(self._run, work, arguments, name=name)

    async def _run(self, work: Callable[..., Awaitable[Any]], arguments: tuple[Any, ...]) -> None:
        try:
            while True:
                try:
                    await _stepwise(work(*arguments), self._turns.pass_on)
                    return
                except BlockingIOError:
                    # The kernel took a request back, of a program that was killed, after it had said that there is one.
                    # pyfuse3 ends its task at that, so it begins anew; the only one who raises this is its own reading.
                    # Its buffer of a MiB is lost, as nobody but that task knew it: 4 KiB of memory, or a MiB where it
                    # was part of what the daemon had used before. `wait_readable` makes it rare.
                    self._turns.pass_on()
        finally:
            self._turns.pass_on()


@types.coroutine
def _stepwise(work: Awaitable[Any], between: Callable[[], None]) -> Generator[Any, Any, None]:
    """As `await work`; `between` is called whenever it is about to wait."""
    steps = work.__await__()
    sent = None
    while True:
        try:
            asked = steps.send(sent)
        except StopIteration:
            return
        between()
        sent = yield asked


class Turns:
    """What pyfuse3 calls `trio`, `trio.Lock` and `trio.lowlevel`. Belongs to one trio run.

    INVARIANT: where a task is in line, somebody has the turn, or the task that had it is running: that takes the turn
    again, or passes it on before it waits or ends.
    """

    ClosedResourceError = trio.ClosedResourceError

    def __init__(self) -> None:
        self._taken = False
        self._line: deque[trio.lowlevel.Task] = deque()
        self._poll: select.poll | None = None
        self._streak = 0
        self._began = 0.0  # by time.monotonic: the streak
        self._misses = 0  # times in a row that no request came on the spot
        self.lowlevel = self

    # trio.Lock, of which pyfuse3 makes one

    def Lock(self) -> Turns:
        return self

    async def __aenter__(self) -> None:
        if not self._taken:
            self._taken = True
            return
        task = trio.lowlevel.current_task()
        self._line.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._line.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)  # the turn is taken for it by who passed it on

    async def __aexit__(self, *_: object) -> None:
        self._taken = False

    def pass_on(self) -> None:
        """The running task waits or ends: unless somebody has the turn, the next in line gets it."""
        if not self._taken and self._line:
            self._taken = True
            trio.lowlevel.reschedule(self._line.popleft())

    # trio.lowlevel

    async def wait_readable(self, fd: int) -> None:
        if self._poll is None:
            os.set_blocking(fd, False)  # or a request that is taken back would leave everybody waiting for the next
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)
        # What is seen may be taken back while this task waits: it is asked once more, right before reading.
        while True:
            if not self._is_there(self._poll):
                self._streak = 0
                await trio.lowlevel.wait_readable(fd)
            elif self._is_over():
                self._streak = 0
                await trio.lowlevel.checkpoint()  # to wait for what is there already would cost twice as much
            else:
                break
        if not self._streak:
            self._began = time.monotonic()
        self._streak += 1

    def _is_over(self) -> bool:
        """Whether it is other tasks' turn."""
        return self._streak >= AT_ONCE or (self._streak > 0 and time.monotonic() - self._began >= AT_MOST)

    def _is_there(self, poll: select.poll) -> bool:
        """Whether a request is there, or comes on the spot where they have come so."""
        if poll.poll(0):
            return True
        if not self._streak or not _SEVERAL:
            return False  # trio has just waited, or there is nobody to wait for
        if self._misses >= _MISSES:
            self._misses = (self._misses + 1) % _LOOK_AGAIN
            return False
        until = time.perf_counter() + NEXT_WITHIN
        while time.perf_counter() < until:
            os.sched_yield()  # the program may be waiting for this very processor
            if poll.poll(0):
                self._misses = 0
                return True
        self._misses += 1
        return False

    @staticmethod
    def notify_closing(fd: int) -> None:
        trio.lowlevel.notify_closing(fd)

    @staticmethod
    def current_task() -> trio.lowlevel.Task:
        return trio.lowlevel.current_task()

    @staticmethod
    def current_trio_token() -> trio.lowlevel.TrioToken:
        return trio.lowlevel.current_trio_token()

    # trio

    @asynccontextmanager
    async def open_nursery(self) -> AsyncIterator[_Nursery]:
        async with trio.open_nursery() as nursery:
            yield _Nursery(nursery, self)


def install() -> Turns:
    """Give pyfuse3 a fresh one, for the main loop that starts next."""
    import pyfuse3

    turns = Turns()
    pyfuse3.trio = turns  # type: ignore[attr-defined]
    return turns
