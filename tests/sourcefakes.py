"""A source that follows a script, and streams and file systems over it. Every byte is a function of stream, version
and offset, so that bytes of another place, version or stream show."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import trio
import trio.testing

from streamfs.cache import Cache
from streamfs.catalog import Catalog
from streamfs.entries import Entry
from streamfs.errors import SourceChanged, SourceFailed, StreamfsError
from streamfs.filesystem import FileSystem
from streamfs.generation import Context
from streamfs.sources.base import Facts
from streamfs.spec import CommandSource, StreamOptions, StreamSpec, UrlSource
from streamfs.stream import Stream
from tests.fakes import named_bytes

KIB, MIB = 1 << 10, 1 << 20

bytes_of = lru_cache(maxsize=64)(named_bytes)
"""bytes_of(name, version, size)"""


@dataclass
class Origin:
    """What a fake source serves, and what was asked of it.

    `size` bytes of `version`, at most `piece` at a time. `told`: facts name the size. `named`: versions have
    validators. `stalls`: offsets where a body hangs until the event. `failures`: offsets where a body raises.
    `length`: where bodies end, if that is not at `size`.
    """

    name: str = "s"
    size: int = 1 * MIB
    ranged: bool = True
    told: bool = True
    named: bool = True
    piece: int = 64 * KIB
    version: int = 1
    length: int | None = None
    exit_status: int | None = None
    stalls: dict[int, trio.Event] = field(default_factory=dict)
    failures: dict[int, StreamfsError] = field(default_factory=dict)
    open_gate: trio.Event | None = None
    probe_gate: trio.Event | None = None
    refuses: BaseException | None = None  # raised by open and probe alike
    opens: list[tuple[int, int | None]] = field(default_factory=list)
    probes: int = 0
    sent: int = 0
    bodies: int = 0  # open now
    closed: int = 0

    def content(self, version: int | None = None) -> bytes:
        return bytes_of(self.name, self.version if version is None else version, self.size)

    @property
    def facts(self) -> Facts:
        return Facts(
            size=self.size if self.told else None,
            ranged=self.ranged,
            validator=f"v{self.version}" if self.named else None,
            mime="audio/flac",
        )

    def change(self) -> None:
        """Another version from now on; bodies under way go on with theirs."""
        self.version += 1


class FakeBody:
    def __init__(self, origin: Origin, start: int, stop: int | None) -> None:
        self._origin = origin
        self._content = origin.content()
        self._stop = origin.size if origin.length is None else origin.length
        if stop is not None:
            self._stop = min(self._stop, stop)
        self.facts = origin.facts
        self.start = start
        self.position = start
        self.end_proven = True
        self.exit_status: int | None = None
        self.reply_seconds: float | None = None
        self._closed = False
        origin.bodies += 1

    async def receive_into(self, view: memoryview) -> int:
        assert len(view) > 0, "there must be room for a byte"
        assert not self._closed
        origin = self._origin
        await trio.lowlevel.checkpoint()
        while (stall := origin.stalls.get(self.position)) is not None and not stall.is_set():
            await stall.wait()
        if self.position in origin.failures:
            raise origin.failures[self.position]
        if self.position >= self._stop:
            self.exit_status = origin.exit_status
            return 0
        marks = [at for at in (*origin.stalls, *origin.failures) if at > self.position]
        stop = min([self._stop, self.position + origin.piece, self.position + len(view), *marks])
        chunk = self._content[self.position : stop]
        chunk += b"+" * (stop - self.position - len(chunk))  # past the declared size
        view[: len(chunk)] = chunk
        self.position = stop
        origin.sent += len(chunk)
        return len(chunk)

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._origin.bodies -= 1
            self._origin.closed += 1
        await trio.lowlevel.checkpoint()


class FakeSource:
    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.closed = False

    async def open(self, start: int, stop: int | None, expect: Facts | None) -> FakeBody:
        origin = self.origin
        origin.opens.append((start, stop))
        await trio.lowlevel.checkpoint()
        if origin.open_gate is not None:
            await origin.open_gate.wait()
        if origin.refuses is not None:
            raise origin.refuses
        if expect is not None and expect.validator != origin.facts.validator:
            raise SourceChanged("another version")
        if start > origin.size or (start and start == origin.size and origin.told):
            raise SourceFailed("nothing there")
        return FakeBody(origin, start, stop) if origin.ranged else FakeBody(origin, 0, None)

    def begin(self, start: int, stop: int, expect: Facts) -> None:
        """It never answers on the spot."""

    async def probe(self) -> Facts:
        self.origin.probes += 1
        await trio.lowlevel.checkpoint()
        if self.origin.probe_gate is not None:
            await self.origin.probe_gate.wait()
        if self.origin.refuses is not None:
            raise self.origin.refuses
        return self.origin.facts

    async def aclose(self) -> None:
        self.closed = True


def spec_of(name: str = "s", *, command: bool = False, **options: Any) -> StreamSpec:
    options.setdefault("probe", False)
    source = CommandSource(("cat",)) if command else UrlSource(f"http://origin.test/{name}")
    return StreamSpec(name=name, source=source, options=StreamOptions(**options))


class House:
    """A cache and its streams, without a catalogue."""

    def __init__(self, directory: Path, nursery: trio.Nursery, read_ahead: int, cache: dict[str, Any]) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self.kept: set[int] = set()
        settings: dict[str, Any] = {"memory": 64 * MIB, "spill_threshold": 1 << 40, "size": None, "ttl": 3600.0}
        self.cache = Cache(directory, **(settings | cache), is_kept=self.kept.__contains__)
        self.context = Context(nursery, self.cache, read_ahead, lambda *_: None)
        self.streams: list[Stream] = []
        self.origins: list[Origin] = []

    def stream(self, origin: Origin, *, command: bool = False, persist: bool = False, **options: Any) -> Stream:
        number = 2 + len(self.streams)
        entry = Entry(id=number, spec=spec_of(origin.name, command=command, **options), added=0.0, persist=persist)
        stream = Stream(entry, FakeSource(origin), self.context)
        self.streams.append(stream)
        self.origins.append(origin)
        return stream


@asynccontextmanager
async def a_house(directory: Path, *, read_ahead: int = MIB, **cache: Any) -> AsyncIterator[House]:
    """Streams over one cache. At the end nothing may be left: no task, no body, no piece."""
    async with trio.open_nursery() as nursery:
        house = House(directory, nursery, read_ahead, cache)
        nursery.start_soon(house.cache.run)
        yield house
        for stream in house.streams:
            await stream.aclose()
        nursery.cancel_scope.cancel()
    assert house.cache.pool.used == 0, "memory pieces were not given back"
    assert [origin.bodies for origin in house.origins] == [0] * len(house.origins), "bodies were left open"


@asynccontextmanager
async def a_filesystem(home: Path, origins: dict[str, Origin], **settings: Any) -> AsyncIterator[FileSystem]:
    """A loaded file system on `home`, whose streams are served by the origin of their name. Nothing may be left."""
    cache_dir = home / "cache"
    cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    read_ahead = settings.pop("read_ahead", MIB)
    limits: dict[str, Any] = {"memory": 64 * MIB, "spill_threshold": 5 * MIB, "size": None, "ttl": 3600.0} | settings
    with Catalog(home / "catalog") as catalog:
        async with trio.open_nursery() as nursery:
            filesystem: FileSystem
            cache = Cache(cache_dir, **limits, is_kept=lambda stream_id: filesystem.is_kept(stream_id))
            filesystem = FileSystem(
                catalog, cache, nursery, make_source=lambda spec: FakeSource(origins[spec.name]), read_ahead=read_ahead
            )
            nursery.start_soon(cache.run)
            filesystem.load()
            try:
                yield filesystem
            finally:
                await filesystem.aclose()
                nursery.cancel_scope.cancel()
    assert cache.pool.used == 0, "memory pieces were not given back"
    assert all(origin.bodies == 0 for origin in origins.values()), "bodies were left open"


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until `condition` holds; for what no event tells. For tests on the real clock."""
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)


async def settled() -> None:
    """Let every task go as far as it can without the clock."""
    await trio.testing.wait_all_tasks_blocked()
