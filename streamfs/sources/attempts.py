"""How often something is tried again, and how long is waited in between."""

from __future__ import annotations

import random

import trio

from streamfs.errors import SourceFailed
from streamfs.spec import redact_url

ATTEMPTS = 10  # requests that bring no new byte before a body gives up
FIRST_ATTEMPTS = 4  # connections tried before a source that never answered is called unreachable (about 1 s)
PROBE_ATTEMPTS = 3
BACKOFF_FIRST = 0.1  # seconds; doubles with each failure
BACKOFF_CAP = 5.0  # seconds; ten attempts then take some 20 s, within the default stall timeout
RETRY_AFTER_CAP = 30.0  # seconds that a server may make us wait


class Attempts:
    """Counts requests that brought nothing, and waits between them."""

    def __init__(self, url: str, limit: int, connecting_limit: int) -> None:
        self._url = url
        self._limit = limit
        self._connecting_limit = connecting_limit
        self._failures = 0
        self._why = ""

    @property
    def last(self) -> str:
        """Ready to end a sentence: why the last attempt failed, empty if none did."""
        return f" (before that: {self._why})" if self._why else ""

    def progress(self) -> None:
        self._failures = 0
        self._why = ""

    async def failed(self, why: str, after: float | None = None, *, connecting: bool = False) -> None:
        """Wait before the next attempt: jittered exponential backoff, and as long as the server asks for, within
        RETRY_AFTER_CAP. Raises SourceFailed where there is none left."""
        self._failures += 1
        self._why = why
        if self._failures >= (self._connecting_limit if connecting else self._limit):
            raise SourceFailed(f"{redact_url(self._url)}: {why} (gave up after {self._failures} attempts)")
        await trio.sleep(backoff(self._failures, after, random.random()))


def backoff(failures: int, after: float | None, chance: float) -> float:
    """Seconds to wait after so many failures in a row; `chance` in [0, 1) spreads clients apart."""
    own = min(BACKOFF_CAP, BACKOFF_FIRST * 2.0 ** (failures - 1)) * (0.5 + chance / 2)
    return own if after is None else max(own, min(after, RETRY_AFTER_CAP))
