"""The limits hold at every moment, with files open: each change of what is held is looked at when it happens."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from msgspec.structs import replace

from streamfs import cache as cache_module
from streamfs.engine.pool import LARGE, SMALL, Pool
from streamfs.engine.recording import BLOCK, Header, Recording
from streamfs.errors import NoSpace
from streamfs.stream import Handle, Stream
from tests.fakes import refuse_writes
from tests.sourcefakes import KIB, MIB, Origin, a_house, until
from tests.test_generation import check, read_all

SOAK = int(os.environ.get("STREAMFS_SOAK", "1"))
FETCHES = 8  # of one file at a time


def on_disk(directory: Path, kept: set[int] | None = None) -> int:
    """Bytes that the recordings take; without those of streams in `kept`."""
    total = 0
    for entry in os.scandir(directory):
        if kept is None or int(entry.name.split("-")[0]) not in kept:
            try:
                total += os.stat(entry.path).st_blocks * 512  # noqa: PTH116 (scandir's own may be an older one)
            except FileNotFoundError:
                continue
    return total


class Watch:
    """Looks at memory whenever a piece is handed out or comes back, and at the disk whenever something was written."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.kept: set[int] = set()
        self.most_memory = self.most_disk = 0
        self.least_free = 1 << 62
        self.looks = 0
        self._guard = threading.Lock()
        for name in ("take", "give"):
            patch.setattr(Pool, name, self._after(getattr(Pool, name), self._look_at_memory))
        for name in ("pwrite", "pwritev", "write", "posix_fallocate"):
            patch.setattr(os, name, self._after(getattr(os, name), self._look_at_disk))

    def _after(self, method: Callable[..., Any], look: Callable[[Any], None]) -> Callable[..., Any]:
        def wrapped(subject: Any, *arguments: Any, **more: Any) -> Any:
            try:
                return method(subject, *arguments, **more)
            finally:
                look(subject)

        return wrapped

    def _look_at_memory(self, pool: Pool) -> None:
        with pool._lock:
            held = pool._used + pool._idle
            assert sum(map(len, (*pool._free[SMALL], *pool._free[LARGE]))) == pool._idle
        with self._guard:
            self.most_memory = max(self.most_memory, held)
            self.looks += 1

    def _look_at_disk(self, _: int) -> None:
        with self._guard:
            self.most_disk = max(self.most_disk, on_disk(self.directory, self.kept))
            disk = os.statvfs(self.directory)
            self.least_free = min(self.least_free, disk.f_bavail * disk.f_frsize)
            self.looks += 1


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    (tmp_path / "cache").mkdir()
    return Watch(tmp_path / "cache", monkeypatch)


async def use(stream: Stream, origin: Origin, chance: random.Random, rounds: int) -> None:
    """What a program may do: read on, here and there, again, and leave. Every byte must be right; where there is no
    room for a stream that can be had only once, it says so."""
    for _ in range(rounds):
        try:
            handle = await stream.open()
        except NoSpace:
            assert not origin.ranged
            stream.evict()
            continue
        try:
            offset = chance.randrange(origin.size)
            for _ in range(chance.randrange(1, 12)):
                size = chance.choice((1, 4 * KIB, 100_000, MIB))
                await check(handle, origin, offset, size)
                offset = (offset + size) % origin.size if chance.random() < 0.7 else chance.randrange(origin.size)
        except NoSpace:
            assert not origin.ranged, "what can be fetched again must not fail for want of room"
        finally:
            handle.close()
        if chance.random() < 0.1 or stream.error is not None:
            stream.evict()
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("seed", range(4 * SOAK))
async def test_memory_and_disk_keep_within_their_limits_at_every_moment(
    seed: int, tmp_path: Path, watch: Watch
) -> None:
    chance = random.Random(seed)
    memory, quota = chance.choice((4, 8, 16)) * MIB, chance.choice((12, 24)) * MIB
    threshold = chance.choice((0, 256 * KIB, 2 * MIB))
    origins = [
        Origin(f"s{n}", size=chance.randrange(1, 6 * MIB), ranged=n % 3 > 0, piece=chance.choice((4 * KIB, MIB)))
        for n in range(18)
    ]
    async with a_house(tmp_path / "cache", memory=memory, size=quota, spill_threshold=threshold) as house:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number, origin in enumerate(origins):
                    stream = house.stream(origin, command=not origin.ranged)
                    nursery.start_soon(use, stream, origin, random.Random(seed * 1000 + number), 4)
        fetches = sum(FETCHES if origin.ranged else 1 for origin in origins)
        assert watch.most_memory <= memory + fetches * BLOCK
        assert watch.most_disk <= quota
        assert watch.looks > 100
        assert house.cache.disk_used <= quota + BLOCK


# Who gives, and who gets no more


async def fill(stream: Stream, origin: Origin) -> Handle:
    """An open file of which all is on disk, or as much of it as may be."""
    handle = await stream.open()
    for offset in range(0, origin.size, MIB):
        await check(handle, origin, offset, MIB)
    return handle


async def test_an_open_stream_that_can_be_fetched_again_gives_its_disk_space_to_one_that_cannot(tmp_path: Path) -> None:
    ranged, live = Origin("ranged", size=12 * MIB, piece=MIB), Origin("live", size=12 * MIB, ranged=False, piece=MIB)
    async with a_house(tmp_path, memory=6 * MIB, size=16 * MIB, spill_threshold=0) as house:
        giving = await fill(house.stream(ranged), ranged)
        before = giving.generation.buffer.buffered
        with trio.fail_after(20):
            taking = await fill(house.stream(live, command=True), live)
            for offset in (0, 5 * MIB, 11 * MIB):
                await check(taking, live, offset, MIB)
            assert giving.generation.buffer.buffered < before
            for offset in range(0, ranged.size, MIB):
                await check(giving, ranged, offset, MIB)
        assert house.cache.disk_used <= 16 * MIB
        giving.close()
        taking.close()


async def test_a_persisted_stream_takes_no_bytes_from_another_persisted_one(tmp_path: Path) -> None:
    async with a_house(tmp_path, memory=8 * MIB, size=8 * MIB, spill_threshold=0) as house:
        kept, other = Origin("kept", size=6 * MIB, piece=MIB), Origin("other", size=6 * MIB, ranged=False, piece=MIB)
        stream = house.stream(kept, persist=True)
        house.kept.add(stream.entry.id)
        stream.set_entry(stream.entry)
        await until(lambda: stream.state == "complete")
        handle = await fill(house.stream(other, command=True), other)
        assert stream.persisted_path is not None
        assert stream.persisted_path.read_bytes() == kept.content()
        handle.close()


def refusing(code: int) -> Callable[..., Any]:
    def write(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return write


async def test_a_stream_whose_bytes_can_go_nowhere_is_alone_in_getting_no_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_house(tmp_path, spill_threshold=MIB, memory=16 * MIB) as house:
        refuse_writes(monkeypatch, refusing(errno.ENOSPC))
        hog = Origin("hog", size=64 * MIB, ranged=False, piece=MIB)
        greedy = await house.stream(hog, command=True).open()
        with trio.fail_after(20):
            with pytest.raises(NoSpace):
                for offset in range(0, hog.size, MIB):
                    await check(greedy, hog, offset, MIB)
            held = greedy.generation.buffer.buffered
            assert held >= 8 * MIB
            # It stays open and keeps what it has; the others share the rest.
            others = [Origin("ranged", size=24 * MIB, piece=MIB), Origin("small", size=900 * KIB, ranged=False)]
            for origin in others:
                assert await read_all(house.stream(origin, command=not origin.ranged), 200_000) == origin.content()
            for offset in range(0, held - MIB, MIB):
                await check(greedy, hog, offset, MIB)
            for _ in range(2):
                with pytest.raises(NoSpace):
                    await greedy.read(held, 1)
        assert house.cache.pool.used <= 16 * MIB
        greedy.close()


async def test_readers_of_ranges_go_on_when_all_memory_is_being_received_just_now(tmp_path: Path) -> None:
    """Each of these fetches hangs with a piece in its hands, and nothing can be moved."""
    stalls = {at: trio.Event() for at in (70 * KIB, 1100 * KIB, 2 * MIB + 1)}
    origins = [Origin(f"s{n}", size=4 * MIB, stalls={at: event}) for n, (at, event) in enumerate(stalls.items())]
    async with a_house(tmp_path, memory=MIB, spill_threshold=0) as house:
        handles = [await house.stream(origin).open() for origin in origins]
        async with trio.open_nursery() as nursery:
            for handle, origin in zip(handles, origins, strict=True):
                nursery.start_soon(check, handle, origin, 0, 3 * MIB)
            last = Origin("last", size=2 * MIB)
            with trio.fail_after(20):
                assert await read_all(house.stream(last), 50_000) == last.content()
            for event in stalls.values():
                event.set()
        assert house.cache.pool.used <= MIB + (len(origins) + 1) * SMALL
        for handle in handles:
            handle.close()


# What counts anew


async def test_what_is_persisted_no_more_counts_at_once(tmp_path: Path) -> None:
    async with a_house(tmp_path, memory=8 * MIB, size=4 * MIB, spill_threshold=0) as house:
        origin = Origin("kept", size=6 * MIB, piece=MIB)
        stream = house.stream(origin, persist=True)
        house.kept.add(stream.entry.id)
        stream.set_entry(stream.entry)
        await until(lambda: stream.state == "complete")
        assert house.cache.disk_used == 0
        handle = await stream.open()
        stream.entry = replace(stream.entry, persist=False)
        house.kept.clear()
        house.cache.recount()
        await until(lambda: house.cache.disk_used <= 4 * MIB)
        for offset in range(0, origin.size, MIB):
            await check(handle, origin, offset, MIB)
        handle.close()


async def test_an_open_one_way_stream_that_is_over_the_quota_goes_when_it_is_closed(tmp_path: Path) -> None:
    async with a_house(tmp_path, memory=8 * MIB, size=4 * MIB, spill_threshold=0) as house:
        origin = Origin("kept", size=6 * MIB, ranged=False, piece=MIB)
        stream = house.stream(origin, command=True, persist=True)
        house.kept.add(stream.entry.id)
        stream.set_entry(stream.entry)
        await until(lambda: stream.state == "complete")
        handle = await stream.open()
        stream.entry = replace(stream.entry, persist=False)
        house.kept.clear()
        house.cache.recount()
        await trio.testing.wait_all_tasks_blocked(0.05)
        await check(handle, origin, 0, MIB)  # it cannot be had again, so it is kept as long as somebody reads it
        handle.close()
        await until(lambda: house.cache.disk_used == 0)


async def test_a_smaller_cache_than_that_of_the_last_run_holds_from_the_start(tmp_path: Path) -> None:
    for number in range(2, 8):
        recording = Recording.create(tmp_path / f"{number}-1.data", Header(key="k", generation=1))
        recording.append([(0, memoryview(bytes(MIB)))])
        os.utime(tmp_path / f"{number}-1.data", (number * 1000, number * 1000))
    async with a_house(tmp_path, size=3 * MIB) as house:
        house.cache.scan(range(2, 8))
        assert on_disk(tmp_path) <= 3 * MIB
        assert [number for number in range(2, 8) if house.cache.has_dormant(number)] == [6, 7]


# Disks that are really full, gone or read-only


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path)], check=True)

    def remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.path)], check=True)

    def free(self) -> int:
        disk = os.statvfs(self.path)
        return disk.f_bavail * disk.f_frsize

    def fill(self) -> None:
        """Another program takes all that is left."""
        with open(self.path / "other", "wb") as other:
            os.posix_fallocate(other.fileno(), 0, self.free())

    def empty(self) -> None:
        (self.path / "other").unlink()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    monkeypatch.setattr(cache_module, "DISK_RETRY", 0.1)
    made = Disk(tmp_path / "disk", 96 * MIB)
    yield made
    subprocess.run(["umount", "-l", str(made.path)], check=True)


async def test_the_cache_leaves_the_floor_of_the_disk_free_at_every_moment(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = disk.path / "cache"
    cache.mkdir()
    watch = Watch(cache, monkeypatch)
    async with a_house(cache, memory=8 * MIB, spill_threshold=0) as house:
        async with trio.open_nursery() as nursery:
            for number in range(6):
                origin = Origin(f"s{number}", size=9 * MIB, ranged=number % 2 == 0, piece=MIB)
                stream = house.stream(origin, command=not origin.ranged)
                nursery.start_soon(use, stream, origin, random.Random(number), 5)
        assert watch.looks > 100
        assert watch.least_free >= cache_module.FREE_FLOOR


@pytest.mark.parametrize("how", ["full", "read-only", "removed"])
async def test_memory_serves_while_the_disk_does_not_and_the_disk_serves_again_afterwards(
    how: str, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = disk.path / "cache"
    monkeypatch.setattr(cache_module, "FREE_FLOOR", -1 << 40)  # so that it is the disk that says no
    async with a_house(cache, memory=32 * MIB, spill_threshold=MIB) as house:
        before = Origin("before", size=6 * MIB, ranged=False, piece=MIB)
        if how == "read-only":
            before.size = 0  # a file system on which files are being written cannot be made read-only
        reading = await fill(house.stream(before, command=True), before)
        await until(lambda: reading.generation.buffer.memory <= MIB)
        if how == "full":
            disk.fill()
        elif how == "read-only":
            disk.remount("ro")
        else:
            shutil.rmtree(cache)
        during = [Origin(f"d{n}", size=4 * MIB, ranged=n == 0, piece=MIB) for n in range(2)]
        streams = [house.stream(origin, command=not origin.ranged) for origin in during]
        handles = [await fill(stream, origin) for stream, origin in zip(streams, during, strict=True)]
        await until(lambda: house.cache.disk_error is not None)
        assert str(cache) in str(house.cache.disk_error)
        assert all(str(house.cache.disk_error) in str(stream.problem) for stream in streams)
        for offset in range(0, before.size, MIB):
            await check(reading, before, offset, MIB)  # what was on disk can still be read
        if how == "full":
            disk.empty()
        elif how == "read-only":
            disk.remount("rw")
        else:
            cache.mkdir(mode=0o700)
        await until(lambda: house.cache.disk_error is None)
        await until(lambda: all(handle.generation.buffer.memory <= MIB for handle in handles))
        for handle, origin in zip(handles, during, strict=True):
            for offset in range(0, origin.size, MIB):
                await check(handle, origin, offset, MIB)
            handle.close()
        assert all(stream.problem is None for stream in streams)
        reading.close()


async def test_a_disk_that_serves_again_is_noticed_though_nothing_is_to_be_written(disk: Disk) -> None:
    cache = disk.path / "cache"
    async with a_house(cache, memory=16 * MIB, spill_threshold=MIB) as house:
        disk.remount("ro")
        stream = house.stream(Origin("gone", size=4 * MIB, piece=MIB))
        (await fill(stream, Origin("gone", size=4 * MIB))).close()
        await until(lambda: house.cache.disk_error is not None)
        stream.evict()
        disk.remount("rw")
        await until(lambda: house.cache.disk_error is None)
        assert not list(cache.iterdir())


@pytest.mark.parametrize("ranged", [True, False], ids=["ranged", "one-way"])
@pytest.mark.parametrize("whole", [True, False], ids=["settled", "under way"])
async def test_what_is_persisted_is_kept_again_once_a_deleted_cache_directory_is_back(
    whole: bool, ranged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamfs.stream.PERSIST_RETRY", (0.01, 0.02))
    monkeypatch.setattr(cache_module, "DISK_RETRY", 0.1)
    cache = tmp_path / "cache"
    async with a_house(cache, memory=32 * MIB, spill_threshold=0) as house:
        rest = trio.Event()
        origin = Origin("kept", size=6 * MIB + 321, ranged=ranged, piece=MIB, stalls={4 * MIB: rest})
        stream = house.stream(origin, command=not ranged, persist=True)
        house.kept.add(stream.entry.id)
        stream.set_entry(stream.entry)
        await until(lambda: stream.buffered == 4 * MIB and house.cache.pool.used <= MIB)
        if whole:
            rest.set()
            await until(lambda: stream.state == "complete")
        shutil.rmtree(cache)
        rest.set()
        if whole:
            stream.set_entry(stream.entry)  # asked for once more
        await until(lambda: isinstance(stream.error, NoSpace))
        assert str(cache) in str(stream.error)
        handle = await stream.open()
        for offset in range(0, origin.size, MIB):
            await check(handle, origin, offset, MIB)  # out of files that have no names any more
        opens = len(origin.opens)
        cache.mkdir(mode=0o700)
        await until(lambda: stream.state == "complete" and stream.error is None)
        assert stream.persisted_path is not None
        assert stream.persisted_path.read_bytes() == origin.content()
        assert len(origin.opens) == opens, "what was here had to be fetched again"
        for offset in range(0, origin.size, MIB):
            await check(handle, origin, offset, MIB)
        handle.close()
        found = Recording.load(stream.persisted_path)
        assert found is not None and found.durable and found.present().total == origin.size
        assert sorted(path.name for path in cache.iterdir()) == ["2-1.data", "2-1.data.index"]
    assert stream.problem is None


async def test_damage_that_shows_while_a_recording_without_names_is_kept_again_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamfs.stream.PERSIST_RETRY", (0.01, 0.02))
    cache = tmp_path / "cache"
    async with a_house(cache, memory=32 * MIB, spill_threshold=0) as house:
        rest = trio.Event()
        origin = Origin("kept", size=6 * MIB, piece=MIB, stalls={4 * MIB: rest})
        stream = house.stream(origin, persist=True)
        house.kept.add(stream.entry.id)
        stream.set_entry(stream.entry)
        await until(lambda: stream.buffered == 4 * MIB and house.cache.pool.used <= MIB)
        (data,) = cache.glob("*.data")
        with data.open("r+b") as file:
            file.seek(MIB + 5)
            file.write(b"damaged")
        shutil.rmtree(cache)
        cache.mkdir(mode=0o700)
        rest.set()
        await until(lambda: stream.state == "complete" and stream.error is None)
        assert stream.persisted_path is not None
        assert stream.persisted_path.read_bytes() == origin.content()
