"""Readers that were told to stop. pyfuse3 shows no FUSE INTERRUPT, so a process that waits in a read of ours would
survive even SIGKILL. What can be seen is in /proc: a signal that asks it to end stays pending while it waits.

One task looks at all waiting processes together, so a thousand waits cost one look each, not a task each. The
process that opened a file is taken for the one that reads; where another does the reading (a file passed on), it is
not seen. A process cannot be gone while it waits here, so where the opener is gone, somebody else waits, and goes on
waiting; but the kernel's own read-ahead, which it may have left behind, does not.
"""

from __future__ import annotations

import logging
import re
import signal
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from streamfs.errors import Interrupted

log = logging.getLogger(__name__)

LOOK_EVERY = 0.25
"""Seconds between looks: a reader is gone well within the second that is promised."""
_TOLD_TO_END = sum(
    1 << (number - 1) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL, signal.SIGTERM)
)
"""Bits of the signals in /proc's masks. The kernel sets SIGKILL's for any signal that is fatal; the others stay pending
where the program has a handler (dd, Python), which runs only once its read has ended. Other signals are left to wait:
a program that handles SIGALRM or SIGCHLD does not expect a read of a file to fail with EINTR."""
_MASK = re.compile(rb"^(SigPnd|ShdPnd|SigBlk):\s*([0-9a-f]+)$", re.MULTILINE)


class Interrupts:
    """Watches processes that wait in a handler; `run` must be running."""

    def __init__(self) -> None:
        self._waits: defaultdict[int, dict[trio.CancelScope, bool]] = defaultdict(dict)  # with `ahead` of each
        self._some = trio.Event()

    @staticmethod
    def process_of(thread: int) -> int:
        """The process of a thread that lives now: threads end before the files they opened. 0 for 0."""
        try:
            status = Path(f"/proc/{thread}/status").read_bytes() if thread else b""
        except OSError as error:
            log.debug("cannot look at thread %d: %s", thread, error)
            return thread
        return next((int(line[5:]) for line in status.splitlines() if line.startswith(b"Tgid:")), thread)

    @contextmanager
    def watch(self, pid: int, *, ahead: bool = False) -> Iterator[None]:
        """Raises Interrupted out of the block once process `pid` (or a thread's id) was told to end. 0: no watch.
        `ahead`: it may be the kernel that waits, reading ahead: then also once a process that is there now is gone."""
        ahead = ahead and Path(f"/proc/{pid}").exists()
        if not pid:
            yield
            return
        with trio.CancelScope() as scope:
            self._waits[pid][scope] = ahead
            self._some.set()
            try:
                yield
            finally:
                waits = self._waits[pid]
                waits.pop(scope, None)
                if not waits:
                    del self._waits[pid]
        if scope.cancelled_caught:
            raise Interrupted("the reading program was told to stop")

    async def run(self) -> None:
        """Look at who waits, for ever; sleeps while nobody does."""
        while True:
            if not self._waits:
                self._some = trio.Event()
                await self._some.wait()
            await trio.sleep(LOOK_EVERY)
            for pid in list(self._waits):
                await trio.lowlevel.checkpoint()  # some 50 microseconds each: with thousands, others come first
                ended = gone = False
                try:
                    ended = _is_being_killed(pid)
                except FileNotFoundError:
                    gone = True
                except OSError as error:
                    log.debug("cannot look at process %d: %s", pid, error)
                    continue
                for scope, ahead in list(self._waits.get(pid, {}).items()):
                    if ahead if gone else ended:
                        scope.cancel()


def _is_being_killed(pid: int) -> bool:
    """Whether a fatal signal waits for the process. Reading /proc never blocks. Raises OSError, FileNotFoundError
    where it is gone."""
    for task in list(Path(f"/proc/{pid}/task").iterdir()):
        try:
            status = (task / "status").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue  # this thread has ended
        masks = {name: int(value, 16) for name, value in _MASK.findall(status)}
        pending = masks.get(b"SigPnd", 0) | masks.get(b"ShdPnd", 0)
        if pending & ~masks.get(b"SigBlk", 0) & _TOLD_TO_END:
            return True
    return False
