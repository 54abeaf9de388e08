"""Connections that rest until they are wanted again, or for too long."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

import trio


class Closable(Protocol):
    def close(self) -> None:
        """At once, without waiting."""


K = TypeVar("K", bound=Hashable)
C = TypeVar("C", bound=Closable)


class IdlePool(Generic[K, C]):
    """Connections by what makes them interchangeable. Used under one trio run, all of it synchronous but for one system
    task, which runs while anything rests."""

    def __init__(self, seconds: float) -> None:
        """Each is closed after it has rested for `seconds`."""
        self._seconds = seconds
        self._resting: dict[K, list[tuple[float, C]]] = {}  # since when; the most recently used last
        self._reaper: trio.CancelScope | None = None
        self._closed = False

    def __len__(self) -> int:
        return sum(map(len, self._resting.values()))

    def give(self, key: K, connection: C) -> None:
        """It is the pool's from now on."""
        if self._closed:
            connection.close()
            return
        self._resting.setdefault(key, []).append((trio.current_time(), connection))
        if self._reaper is None:
            self._reaper = trio.CancelScope()
            trio.lowlevel.spawn_system_task(self._reap, self._reaper, name="idle connections")

    def take(self, key: K) -> C | None:
        """The one that was used last; it is the caller's. Its other side may be gone meanwhile."""
        found = self._resting.get(key)
        if not found:
            return None
        connection = found.pop()[1]
        if not found:
            del self._resting[key]
        return connection

    def close(self) -> None:
        """Close all, and from now on whatever is given. Safe to call again."""
        self._closed = True
        if self._reaper is not None:
            self._reaper.cancel()
        for resting in self._resting.values():
            for _, connection in resting:
                connection.close()
        self._resting.clear()

    async def _reap(self, scope: trio.CancelScope) -> None:
        with scope:
            while self._resting:
                oldest = min(resting[0][0] for resting in self._resting.values())
                await trio.sleep_until(oldest + self._seconds)
                limit = trio.current_time() - self._seconds
                for key, resting in list(self._resting.items()):
                    while resting and resting[0][0] <= limit:
                        resting.pop(0)[1].close()
                    if not resting:
                        del self._resting[key]
        self._reaper = None
