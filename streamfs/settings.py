"""The configuration of a running daemon, which follows its file."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import trio

from streamfs.config import load
from streamfs.errors import InvalidRequest
from streamfs.spec import StreamSpec

log = logging.getLogger(__name__)

LOOK_EVERY = 1.0
"""Seconds for which the file is not looked at again, however many streams are opened."""


class Settings:
    """The configuration of a running daemon: follows the file. For the trio thread."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Raises as `load`."""
        self._path = path
        self._stamp = _stamp(path)
        self._looked = time.monotonic()
        self.config = load(path)

    def effective(self, spec: StreamSpec) -> StreamSpec:
        """As Config.effective, by what the file said when `refresh` last looked."""
        return self.config.effective(spec)

    async def refresh(self) -> None:
        """See whether the file has changed, unless that was done a moment ago. What is wrong with it is logged, and
        what it said before goes on to count."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY:
            return
        self._looked = now
        stamp = await trio.to_thread.run_sync(_stamp, self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self.config = await trio.to_thread.run_sync(load, self._path)
        except InvalidRequest as error:
            log.error("the configuration stays as it was: %s", error)
        else:
            log.info("the configuration was read again")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_mtime_ns, info.st_size, info.st_ino
