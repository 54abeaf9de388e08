"""Endless streams: the past beyond the window is given back, and offsets stay what they are."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from streamfs.cache import Cache
from streamfs.catalog import Catalog
from streamfs.errors import InvalidRequest, OutsideWindow
from streamfs.filesystem import FileSystem
from streamfs.generation import Window
from streamfs.sources.base import Facts
from streamfs.spec import StreamOptions, StreamSpec, UrlSource
from tests.fakes import data_on_disk

MIB = 1 << 20


TILE = random.Random(1).randbytes(1_000_003)
TILES = TILE * 6


def content(start: int, stop: int) -> bytes:
    """What the stream holds: a tile whose length is prime, so that aligned mistakes show."""
    first = start % len(TILE)
    return TILES[first : first + stop - start]


class Radio:
    """A one-way source that sends `step` bytes every `pause` seconds, `total` in all, and never says how many."""

    facts = Facts(mime="audio/mpeg")
    start = 0
    end_proven = False

    def __init__(self, step: int, pause: float, total: int) -> None:
        self._step, self._pause, self._total = step, pause, total
        self._sent = 0
        self._due = 0

    async def open(self, start: int, stop: int | None, expect: Facts | None) -> Radio:
        return self

    def begin(self, start: int, stop: int, expect: Facts) -> None:
        """It never answers on the spot."""

    async def probe(self) -> Facts:
        return self.facts

    async def receive_into(self, view: memoryview) -> int:
        if self._sent == self._total:
            await trio.sleep_forever()
        if self._sent == self._due:
            await trio.sleep(self._pause)
            self._due = min(self._due + self._step, self._total)
        count = min(len(view), self._due - self._sent)
        view[:count] = content(self._sent, self._sent + count)
        self._sent += count
        return count

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def showing(tmp_path: Path, radio: Radio, window: str) -> AsyncIterator[FileSystem]:
    cache_dir = tmp_path / "cache"
    cache_dir.mkdir(mode=0o700)
    with Catalog(tmp_path / "catalog.db") as catalog:
        async with trio.open_nursery() as nursery:
            cache = Cache(
                cache_dir,
                memory=16 * MIB,
                spill_threshold=2 * MIB,
                size=None,
                ttl=1e9,
                is_kept=lambda _: False,
            )
            filesystem = FileSystem(catalog, cache, nursery, make_source=lambda _: radio, read_ahead=MIB)
            nursery.start_soon(cache.run)
            filesystem.load()
            options = StreamOptions(window=window, probe=False)
            await filesystem.add([StreamSpec(name="radio", source=UrlSource(url="http://x/"), options=options)])
            yield filesystem
            await filesystem.aclose()
            nursery.cancel_scope.cancel()


def disk_bytes(tmp_path: Path) -> int:
    return data_on_disk(tmp_path / "cache")


async def test_disk_stays_at_the_window_and_who_is_left_behind_is_told(tmp_path: Path) -> None:
    total, window = 96 * MIB, 8 * MIB
    async with showing(tmp_path, Radio(256 * 1024, 0.0, total), "8MiB") as fs:
        ahead, behind = await fs.open_named("radio"), await fs.open_named("radio")
        assert bytes(await fs.read(behind.handle, 0, 16)) == content(0, 16)
        most = 0
        for offset in range(0, total, MIB):
            assert bytes(await fs.read(ahead.handle, offset, MIB)) == content(offset, offset + MIB)
            most = max(most, disk_bytes(tmp_path))
        assert most <= window + 6 * MIB  # one step of spilling (4 MiB), the window's own step, one piece
        with pytest.raises(OutsideWindow):
            await fs.read(behind.handle, 16, 16)
        inside = total - window // 2
        assert bytes(await fs.read(behind.handle, inside, 4096)) == content(inside, inside + 4096)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A jumping clock would jump while a worker thread works: everything runs in the event loop."""

    async def run_here(function: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_here)


@pytest.mark.usefixtures("no_threads")
async def test_a_day_of_radio_keeps_half_an_hour(tmp_path: Path, autojump_clock: MockClock) -> None:
    rate, day = 16 * 1024, 86_400
    async with showing(tmp_path, Radio(rate * 20, 20.0, rate * day), "30m") as fs:
        reader = await fs.open_named("radio")
        most = 0
        for offset in range(0, rate * day - 4 * MIB, 4 * MIB):
            assert bytes(await fs.read(reader.handle, offset, 4096)) == content(offset, offset + 4096)
            most = max(most, disk_bytes(tmp_path))
        half_an_hour = rate * 1800
        assert most <= half_an_hour * 1.1 + 8 * MIB
        position = rate * day - 4 * MIB
        past = position - half_an_hour // 2
        assert bytes(await fs.read(reader.handle, past, 64)) == content(past, past + 64)
        with pytest.raises(OutsideWindow):
            await fs.read(reader.handle, 0, 1)


async def test_a_reader_that_pauses_does_not_stop_an_endless_url(tmp_path: Path) -> None:
    total = 32 * MIB
    async with showing(tmp_path, Radio(MIB, 0.0, total), "24MiB") as fs:
        reader = await fs.open_named("radio")
        await fs.read(reader.handle, 0, 1)
        # Far more than the read-ahead arrives although nobody asks for it: a sender of live bytes does not wait.
        with trio.fail_after(30):
            while int(fs.get_attribute(fs.lookup(1, b"radio").inode, "user.streamfs.buffered")) < 23 * MIB:
                await trio.lowlevel.checkpoint()


async def test_what_keeps_only_a_window_cannot_be_persisted(tmp_path: Path) -> None:
    async with showing(tmp_path, Radio(MIB, 0.0, MIB), "8MiB") as fs:
        with pytest.raises(InvalidRequest, match="window"):
            await fs.persist("radio", True)


async def test_a_window_moves_in_steps_and_never_back() -> None:
    window = Window("1MiB")
    assert window.advanced(MIB) is None
    assert window.advanced(MIB + 64 * 1024) == 64 * 1024
    assert window.advanced(MIB + 64 * 1024 + 1) is None
    assert window.advanced(3 * MIB) == 2 * MIB


async def test_a_window_of_time_forgets_what_arrived_before_it(autojump_clock: MockClock) -> None:
    window = Window("10s")
    floors = []
    for second in range(60):
        floor = window.advanced(second * MIB)
        if floor is not None:
            floors.append((second, floor))
        await trio.sleep(1)
    assert floors == sorted(floors)
    assert all(9 * MIB <= second * MIB - floor <= 12 * MIB for second, floor in floors)
    assert len(floors) > 40
