"""What happens to streams, collected for whoever shows it (streamfs.reporter). Costs next to nothing where nobody does.

Everything here runs in the trio thread, and only takes notes: nothing is awaited, nothing is written.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

MOST_EVENTS = 20_000
"""Events that wait to be collected: more than the log on the board holds."""


class News:
    """Which streams changed, and what was worth telling."""

    def __init__(self) -> None:
        self.changed: set[int] = set()
        """Ids of streams that are not any more as they were when somebody last looked."""
        self.events: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)
        """Oldest first: "time" in seconds since the epoch, "event", "id" of the stream, "stream" (its name) where it
        may not be asked for later, and what belongs to the event."""
        self.on_news: Callable[[bool], None] | None = None
        """Called when the first change or event comes in since the last look; with True where it should not wait."""
        self._urgent = False
        self.counts: Counter[str] = Counter()
        """How often since the daemon began: by the name of an event, and what is no event of a stream ("refused": an
        open that failed, "disk_error": bytes that the cache directory did not take). Numbers never go down."""

    def count(self, what: str) -> None:
        """It happened once more."""
        self.counts[what] += 1
        self.wake()

    def wake(self) -> None:
        """Something that is of no stream is another now."""
        if self.on_news is not None:
            self.on_news(False)

    def touch(self, stream_id: int) -> None:
        """Something about the stream is another now: bytes, readers, state."""
        if not self.changed and self.on_news is not None:
            self.on_news(False)
        self.changed.add(stream_id)

    def tell(self, event: str, stream_id: int, *, stream: str | None = None, **details: Any) -> None:
        """An event of the stream. `stream`: its name, where it has just lost it."""
        self.counts[event] += 1
        found = {"time": round(time.time(), 3), "event": event, "id": stream_id, "stream": stream, **details}
        self.events.append(found)
        self.changed.add(stream_id)
        if not self._urgent and self.on_news is not None:
            self._urgent = True
            self.on_news(True)

    def take(self) -> tuple[set[int], list[dict[str, Any]]]:
        """Everything so far, which is news no more."""
        changed, events = self.changed.copy(), list(self.events)
        self.changed.clear()
        self.events.clear()
        self._urgent = False
        return changed, events
