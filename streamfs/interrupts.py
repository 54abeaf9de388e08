"""Readers that were told to stop. pyfuse3 shows no FUSE INTERRUPT, so a process that waits in a read of ours would
survive even SIGKILL. What can be seen is in /proc: a signal that asks it to end stays pending while it waits.

One task looks at all waits together, in one hop to a thread, four times a second. pyfuse3 tells who opened a file and
not who reads it, and these may be two: a shell opens what `cat < file` reads. So once a wait has lasted for a look and
its opener does not wait itself, one search through all processes finds who else has the file open; the search serves
all such waits, and each wait needs but one, as a reader had the descriptor before it began to wait.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from streamfs import processes
from streamfs.errors import Interrupted

log = logging.getLogger(__name__)

LOOK_EVERY = 0.25
"""Seconds between looks: a reader is gone well within the second that is promised."""
LEAST_REST = 10
"""Looking may take one part in so many of a processor: where a look takes long, the next one comes later."""
MOST_REST = 0.5  # seconds, so that the promise holds with some thousands of processes


@dataclass(slots=True, eq=False)
class Wait:
    """One request that waits for bytes."""

    opener: int
    """Pid of who opened the file."""
    ahead: bool
    """It may be the kernel that waits, reading ahead: no program waits for this one."""
    inode: int
    """Of the file that is read; 0: nobody but the opener can be the one that waits."""
    offset: int
    size: int
    began: float
    """By the clock of processes.now."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    holders: dict[int, frozenset[int]] | None = None
    """Who else may wait, with the positions of their descriptors; None: not known yet. Set by `look`."""

    @property
    def candidates(self) -> set[int]:
        return {self.opener, *(self.holders or ())}

    def positions(self, pid: int) -> frozenset[int]:
        """What the process's descriptors of the file point to."""
        return (self.holders or {}).get(pid, frozenset())


class Seen(NamedTuple):
    """What one look found."""

    ended: Sequence[Wait]
    """Waits of programs that were told to end, or are gone."""
    searched: bool
    """Whether all processes were looked at."""


def look(waits: Sequence[Wait], device: tuple[int, int] | None, search: Collection[Wait]) -> Seen:
    """Look at the programs of all `waits`; for those in `search` also at who has their files open. Blocks."""
    searched = _search(waits, device, search)
    ended, gone = set(), set()
    for pid in {pid for wait in waits for pid in wait.candidates}:
        try:
            if processes.is_being_killed(pid):
                ended.add(pid)
        except FileNotFoundError:
            gone.add(pid)
        except OSError as error:
            log.debug("cannot look at process %d: %s", pid, error)
    # Whoever ends may be in a wait that is too young for the search: that is to be known before another is suspected.
    inodes = {wait.inode for wait in waits if wait.holders and not ended.isdisjoint(wait.candidates)}
    young = [wait for wait in waits if wait.holders is None and wait.inode in inodes]
    searched |= bool(young) and _search(waits, device, young)
    over = [wait for wait in waits if wait.ahead and wait.opener in gone]
    return Seen([*over, *_of_ended(waits, ended, gone)], searched)


def _search(waits: Sequence[Wait], device: tuple[int, int] | None, search: Collection[Wait]) -> bool:
    """Find the `holders` of the waits in `search`. Gives whether all processes were looked at for that."""
    counts = Counter(wait.opener for wait in waits if not wait.ahead)
    itself = {}
    for opener in {wait.opener for wait in search}:
        waiting = processes.waiting_threads(opener)
        itself[opener] = waiting is not None and waiting >= max(1, counts[opener])
    asked = []
    for wait in search:
        if itself[wait.opener]:
            wait.holders = {}
        else:
            asked.append(wait)
    if not asked:
        return False
    found = processes.holders({wait.inode for wait in asked}, device)
    started = {pid: processes.started(pid) for pids in found.values() for pid in pids}
    for wait in asked:  # nobody is in a wait that began before its program did
        there = found.get(wait.inode, {})
        wait.holders = {pid: at for pid, at in there.items() if started[pid] <= wait.began}
    return True


def _of_ended(waits: Sequence[Wait], ended: set[int], gone: set[int]) -> Iterator[Wait]:
    """The waits that the processes `ended` are in. Where others may be in them, too, it is one wait a look, the
    likeliest first, until the process is gone: whoever else is in it gets EINTR though nobody told it anything."""
    others = {p for wait in waits if not ended.isdisjoint(wait.candidates) for p in wait.candidates} - ended - gone
    waiting = {pid for pid in others if processes.waiting_threads(pid) != 0}
    for pid in ended:
        mine = [wait for wait in waits if pid in wait.candidates]
        sure = [wait for wait in mine if waiting.isdisjoint(wait.candidates)]
        yield from sure or _likeliest(pid, mine)


def _likeliest(pid: int, waits: Sequence[Wait]) -> Sequence[Wait]:
    """The one of the waits, none of them for sure, that the process is in: one at a place its descriptors point to,
    and the first of these, as it waited from then on."""
    return sorted(waits, key=lambda wait: (not _points_at(wait.positions(pid), wait), wait.began))[:1]


def _points_at(positions: Collection[int], wait: Wait) -> bool:
    return any(wait.offset <= position < wait.offset + max(1, wait.size) for position in positions)


Look = Callable[[Sequence[Wait], tuple[int, int] | None, Collection[Wait]], Awaitable[Seen]]


class Interrupts:
    """Watches programs that wait in a handler; `run` must be running."""

    def __init__(self, look: Look | None = None) -> None:
        """`look`: as the function of that name, but awaited; the default runs that in a thread."""
        self.device: tuple[int, int] | None = None
        """The mount's device number, once it is known."""
        self._look = look or self._look_in_a_thread
        self._waits: dict[Wait, None] = {}
        self._some = trio.Event()
        self._threads = trio.CapacityLimiter(1)
        self._asking = trio.CapacityLimiter(4)

    @contextmanager
    def watch(self, pid: int, *, ahead: bool = False, inode: int = 0, offset: int = 0, size: int = 0) -> Iterator[None]:
        """Raises Interrupted out of the block once process `pid` (or a thread's id) was told to end, or, with an
        `inode`, another one that waits in this read of the `inode`. pid 0: no watch. `ahead`: it may be the kernel
        that waits, reading ahead: then also once a process that is there now is gone."""
        if not pid:
            yield
            return
        wait = Wait(pid, ahead and processes.exists(pid), inode, offset, size, processes.now())
        wait.holders = None if inode else {}
        with wait.scope:
            self._waits[wait] = None
            self._some.set()
            try:
                yield
            finally:
                del self._waits[wait]
        if wait.scope.cancelled_caught:
            raise Interrupted("the reading program was told to stop")

    async def is_nonblocking(self, pid: int, inode: int) -> bool:
        """As processes.is_nonblocking, in a thread: a program may have thousands of descriptors."""
        return await trio.to_thread.run_sync(
            processes.is_nonblocking, pid, inode, limiter=self._asking, abandon_on_cancel=True
        )

    async def run(self) -> None:
        """Look at who waits, for ever; sleeps while nobody does."""
        rest = LOOK_EVERY
        while True:
            if not self._waits:
                self._some = trio.Event()
                await self._some.wait()
            await trio.sleep(rest)
            if not self._waits:
                continue
            began = processes.now()
            waits = list(self._waits)
            search = [wait for wait in waits if wait.holders is None and began - wait.began >= LOOK_EVERY / 2]
            try:
                seen = await self._look(waits, self.device, search)
            except OSError as error:  # out of descriptors or memory: some come back as others finish
                log.warning("cannot look for readers that were told to end: %s", error)
                rest = MOST_REST
                continue
            for wait in seen.ended:
                wait.scope.cancel()
            took = processes.now() - began
            if seen.searched:
                log.debug("looked for who else reads %d files: %.0f ms", len(search), took * 1000)
            rest = min(max(LOOK_EVERY, LEAST_REST * took), MOST_REST)

    async def _look_in_a_thread(
        self, waits: Sequence[Wait], device: tuple[int, int] | None, search: Collection[Wait]
    ) -> Seen:
        return await trio.to_thread.run_sync(look, waits, device, search, limiter=self._threads, abandon_on_cancel=True)
