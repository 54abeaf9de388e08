"""Reports an event loop that stands still: everybody's reads stand with it, and only a stack says why."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import trio

log = logging.getLogger(__name__)

BEAT_EVERY = 0.25
"""Seconds between signs of life."""
STALLED_AFTER = 1.0
"""Seconds without one that are reported. A guess: far above what any handler may take, far below what users bear."""


class Watchdog:
    """A thread that looks at the loop. `watching` starts and ends it; `beat` must run as a task meanwhile."""

    def __init__(self) -> None:
        self._beaten = time.monotonic()
        self._watched: int | None = None
        self._enough = threading.Event()
        self.stalls = 0
        """How many stalls were reported."""

    async def beat(self) -> None:
        """Give signs of life, for ever."""
        while True:
            self._beaten = time.monotonic()
            await trio.sleep(BEAT_EVERY)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the calling thread for the block's time."""
        self._watched = threading.get_ident()
        self._beaten = time.monotonic()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._enough.set()
            thread.join()

    def _watch(self) -> None:
        reported = 0.0
        while not self._enough.wait(BEAT_EVERY):
            beaten = self._beaten
            silent = time.monotonic() - beaten
            if silent >= STALLED_AFTER and beaten != reported:
                reported = beaten  # once a stall
                self.stalls += 1
                log.error("the event loop has stood still for %.1f s, at\n%s", silent, self._stack())
            elif reported and beaten != reported:
                log.warning("the event loop goes on")
                reported = 0.0

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._watched or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else "(no stack)"
