"""What is kept and what goes: threshold, budget, quota, least recently used, time to live, and disks that fail."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from streamfs import cache, descriptors
from streamfs.engine.buffer import SPILL_BATCH
from streamfs.engine.recording import Header, Recording
from streamfs.errors import Closed, NoSpace, TooManyFiles
from streamfs.stream import Stream
from tests.fakes import data_on_disk, named_bytes, refuse_writes
from tests.sourcefakes import KIB, MIB, Origin, a_house, settled, until
from tests.test_generation import check, read_all

TTL = 3600.0
"""Of a_house."""
PREALLOCATED = 16 * MIB
"""Bytes a recording may take ahead of what is written to it."""


def refuse(code: int) -> Callable[..., int]:
    def write(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return write


async def closed(stream: Stream) -> None:
    """Let the stream's resting fetch go."""
    generation = stream.generation
    assert generation is not None
    for scope in list(generation._scopes.values()):
        scope.cancel()
    await until(lambda: not generation.fetching)


# Spilling


async def test_below_the_threshold_nothing_is_written(tmp_path: Path) -> None:
    origin = Origin(size=MIB)
    async with a_house(tmp_path, spill_threshold=2 * MIB) as house:
        await read_all(house.stream(origin))
        await trio.sleep(0.02)
        assert not any(tmp_path.iterdir())  # noqa: ASYNC240


@pytest.mark.parametrize("ranged", [True, False])
async def test_past_the_threshold_bytes_move_to_disk_and_read_the_same(ranged: bool, tmp_path: Path) -> None:
    origin = Origin(size=12 * MIB, ranged=ranged)
    async with a_house(tmp_path, spill_threshold=2 * MIB) as house:
        stream = house.stream(origin)
        handle = await stream.open()
        for offset in range(0, origin.size, MIB):
            await check(handle, origin, offset, MIB)
        await until(lambda: handle.generation.buffer.memory <= 2 * MIB)
        for offset in range(0, origin.size, 777_777):
            await check(handle, origin, offset, MIB)
        assert origin.sent == origin.size
        handle.close()


async def test_what_was_spilled_and_the_kernel_has_is_read_without_a_wait(tmp_path: Path) -> None:
    origin = Origin(size=4 * MIB)
    async with a_house(tmp_path, spill_threshold=0) as house:
        handle = await house.stream(origin).open()
        for offset in range(0, origin.size, MIB):
            await check(handle, origin, offset, MIB)
        await until(lambda: handle.generation.buffer.memory == 0)
        await check(handle, origin, 0, origin.size)  # from the disk: from now on the kernel has the pages
        assert handle.read_now(MIB // 2, MIB) == origin.content()[MIB // 2 : MIB * 3 // 2]
        handle.close()


@pytest.mark.parametrize("told", [True, False])
async def test_a_stream_that_came_to_its_end_takes_no_more_disk_than_its_bytes(told: bool, tmp_path: Path) -> None:
    origin = Origin(size=20 * MIB, ranged=False, told=told, piece=MIB)
    async with a_house(tmp_path, memory=8 * MIB, spill_threshold=MIB, size=100 * MIB) as house:
        stream = house.stream(origin)
        handle = await stream.open()
        for offset in range(0, origin.size, MIB):
            await check(handle, origin, offset, MIB)
        await read_all(stream)
        await until(lambda: not handle.generation.buffer.has_ahead)
        await until(lambda: house.cache.disk_used <= origin.size + MIB // 8)
        assert data_on_disk(tmp_path) <= origin.size + 64 * KIB, "but for the file system's own"
        await check(handle, origin, 0, MIB)
        await check(handle, origin, origin.size - MIB, MIB)
        handle.close()


async def test_while_the_disk_is_behind_a_stream_takes_half_of_what_memory_is_free_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, real = threading.Event(), Recording.append

    def waiting(recording: Recording, runs: Any) -> Any:
        assert goes_on.wait(30)
        return real(recording, runs)

    monkeypatch.setattr(Recording, "append", waiting)
    monkeypatch.setattr(cache, "BACKLOG", MIB)
    origin = Origin("much", size=40 * MIB, piece=MIB)
    other = Origin("other", size=4 * MIB, piece=MIB)
    async with a_house(tmp_path, memory=30 * MIB, spill_threshold=MIB, read_ahead=40 * MIB) as house:
        stream = house.stream(origin)
        handle = await stream.open()
        buffer = handle.generation.buffer
        async with trio.open_nursery() as nursery:
            nursery.start_soon(handle.generation.fetch_all)
            await until(lambda: buffer.memory > 10 * MIB)  # m = threshold + (budget - m) / 2, and a piece
            await settled()
            assert buffer.memory <= 13 * MIB
            assert await read_all(house.stream(other)) == other.content(), "others have memory while the disk waits"
            goes_on.set()
        assert await read_all(stream) == origin.content()
        assert origin.sent == origin.size
        handle.close()


async def test_many_streams_share_a_small_budget_without_a_wrong_byte_or_a_lack_of_space(tmp_path: Path) -> None:
    origins = [Origin(f"s{i}", size=3 * MIB, ranged=i % 2 == 0, piece=MIB) for i in range(8)]
    async with a_house(tmp_path, memory=4 * MIB, spill_threshold=MIB, read_ahead=MIB) as house:

        async def read(origin: Origin) -> None:
            assert await read_all(house.stream(origin), 200_000) == origin.content()
            assert house.cache.pool.used <= 4 * MIB

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for origin in origins:
                    nursery.start_soon(read, origin)
        assert [origin.sent for origin in origins] == [origin.size for origin in origins]


async def test_a_wait_for_memory_ends_without_error_where_memory_was_freed(tmp_path: Path) -> None:
    for attempt in range(30):  # the order of the two tasks is the scheduler's choice
        origin = Origin(f"s{attempt}", size=4 * MIB, ranged=False, piece=MIB)
        directory = tmp_path / str(attempt)
        async with a_house(directory, memory=2 * MIB) as house:
            assert await read_all(house.stream(origin), 100_000) == origin.content()


# Quota, order, age


async def test_the_quota_holds_and_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    quota = 24 * MIB
    async with a_house(tmp_path, size=quota, spill_threshold=0, memory=8 * MIB) as house:
        streams = []
        for number in range(5):
            origin = Origin(f"s{number}", size=8 * MIB, piece=MIB)
            stream = house.stream(origin)
            assert await read_all(stream, MIB) == origin.content()
            assert data_on_disk(tmp_path) <= quota + SPILL_BATCH + PREALLOCATED
            streams.append(stream)
            await closed(stream)
        alive = [stream.generation is not None for stream in streams]
        assert alive == sorted(alive), "one used earlier was kept and one used later went"
        assert not alive[0]
        assert alive[-1]


async def test_reading_again_makes_a_stream_the_last_to_go(tmp_path: Path) -> None:
    async with a_house(tmp_path, spill_threshold=0) as house:
        streams = [house.stream(Origin(f"s{number}", size=MIB)) for number in range(3)]
        for stream in streams:
            await read_all(stream)
            await closed(stream)
        await until(lambda: all(house.cache._generations[s.generation] for s in streams if s.generation))
        await read_all(streams[0])
        await closed(streams[0])
        gone = []
        while house.cache._evict_one():
            gone += [number for number, s in enumerate(streams) if s.generation is None and number not in gone]
        assert gone == [1, 2, 0]


async def test_what_is_open_or_persisted_is_not_evicted(tmp_path: Path) -> None:
    async with a_house(tmp_path, spill_threshold=0) as house:
        opened, kept = house.stream(Origin("open")), house.stream(Origin("kept"), persist=True)
        house.kept.add(kept.entry.id)
        handle = await opened.open()
        await read_all(kept)
        await closed(kept)
        await until(lambda: house.cache._generations[handle.generation] >= 0)
        assert not house.cache._evict_one()
        house.cache.expire(time.monotonic() + TTL + 1)
        assert opened.generation is not None
        assert kept.generation is not None
        handle.close()


async def test_what_outlived_its_time_goes(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    origin = Origin()
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        await read_all(stream)
        house.cache.expire(time.monotonic() + TTL - 10)
        assert stream.generation is not None
        house.cache.expire(time.monotonic() + TTL + 1)
        assert stream.generation is None
        await settled()
        assert house.cache.pool.used == 0


async def test_a_stream_may_have_a_time_of_its_own(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with a_house(tmp_path, ttl_of={2: 10.0, 3: TTL * 10}.get) as house:
        short, long, usual = (house.stream(Origin(name=name)) for name in "abc")
        for stream in (short, long, usual):
            await read_all(stream)
        now = time.monotonic()
        for after, left in ((9, [short, long, usual]), (11, [long, usual]), (TTL + 1, [long]), (TTL * 10 + 1, [])):
            house.cache.expire(now + after)
            assert [stream for stream in (short, long, usual) if stream.generation is not None] == left
        await settled()


# Recordings of earlier runs


def record(directory: Path, stream_id: int, number: int, key: str = "k", size: int = 200_000) -> Path:
    path = directory / f"{stream_id}-{number}.data"
    recording = Recording.create(path, Header(key=key, generation=number))
    recording.append([(0, memoryview(named_bytes("s", number, size)))])
    return path


async def test_a_scan_keeps_the_newest_recording_of_each_known_stream(tmp_path: Path) -> None:
    paths = {key: record(tmp_path, *key) for key in ((2, 1), (2, 10), (2, 9), (3, 1), (4, 1))}
    (tmp_path / "notes.txt").write_text("not ours")
    async with a_house(tmp_path) as house:
        house.cache.scan([2, 3])
        assert {key for key, path in paths.items() if path.exists()} == {(2, 10), (3, 1)}
        assert (tmp_path / "notes.txt").exists()
        assert house.cache.disk_used >= 400_000
        assert not house.cache.has_dormant(4)


async def test_a_scan_removes_halves_of_recordings_and_nothing_else(tmp_path: Path) -> None:
    """A power cut, or a daemon killed while it made or removed one, leaves either file alone."""
    whole, no_index, no_data, odd = (record(tmp_path, number, 1) for number in (2, 3, 4, 5))
    no_index.with_name(no_index.name + ".index").unlink()
    no_data.unlink()
    odd.rename(tmp_path / "5-x.data")
    async with a_house(tmp_path) as house:
        house.cache.scan([2, 3, 4, 5])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["2-1.data", "2-1.data.index", "5-x.data"]  # noqa: ASYNC240
        assert [house.cache.has_dormant(number) for number in (2, 3, 4, 5)] == [True, False, False, False]
        assert house.cache.last_number(2) == 1
        assert whole.exists()


async def test_a_recording_of_another_source_is_not_used(tmp_path: Path) -> None:
    path = record(tmp_path, 2, 1)
    async with a_house(tmp_path) as house:
        house.cache.scan([2])
        assert await house.cache.wake_dormant(2, "another") is None
        await house.cache.removed()
        assert not path.exists()


async def test_a_reader_that_gives_up_while_a_recording_is_loaded_does_not_lose_it(tmp_path: Path) -> None:
    path = record(tmp_path, 2, 1)
    async with a_house(tmp_path) as house:
        house.cache.scan([2])
        with trio.CancelScope() as scope:
            scope.cancel()
            await house.cache.wake_dormant(2, "k")
        assert scope.cancelled_caught
        assert path.exists()
        recording = await house.cache.wake_dormant(2, "k")
        assert recording is not None
        assert recording.present().total == 200_000


async def test_a_recording_that_is_evicted_while_it_is_loaded_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, 2, 1)
    async with a_house(tmp_path) as house:
        house.cache.scan([2])
        load = Recording.load

        def evicting(path: Path) -> Recording | None:
            loaded = load(path)
            trio.from_thread.run_sync(house.cache.forget_dormant, 2)
            return loaded

        monkeypatch.setattr(Recording, "load", evicting)
        assert await house.cache.wake_dormant(2, "k") is None


async def test_dormant_recordings_go_by_age_too(tmp_path: Path) -> None:
    path, kept = record(tmp_path, 2, 1), record(tmp_path, 3, 1)
    os.utime(path, (0, 0))
    os.utime(kept, (0, 0))
    async with a_house(tmp_path) as house:
        house.kept.add(3)
        house.cache.scan([2, 3])
        house.cache.expire(time.monotonic())
        assert not path.exists()
        assert kept.exists()


# Disks that fail


def make_useless(how: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "removed":
        shutil.rmtree(directory)
    else:
        refuse_writes(monkeypatch, refuse(errno.ENOSPC if how == "full" else errno.EROFS))


HOWS = ["removed", "full", "read-only"]


@pytest.mark.parametrize("how", HOWS)
async def test_without_a_disk_memory_goes_on_serving(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "cache"
    async with a_house(directory, spill_threshold=MIB, memory=32 * MIB) as house:
        make_useless(how, directory, monkeypatch)
        for ranged in (True, False):
            origin = Origin(f"s{ranged}", size=4 * MIB, ranged=ranged)
            stream = house.stream(origin)
            handle = await stream.open()  # what nobody has open goes where the disk is full
            assert await read_all(stream, MIB) == origin.content()
            await until(lambda: house.cache.disk_error is not None)
            assert isinstance(stream.problem, NoSpace)
            assert str(directory) in str(stream.problem)
            handle.close()
        assert str(directory) in str(house.cache.disk_error)


@pytest.mark.parametrize("how", HOWS)
async def test_without_a_disk_ranged_streams_drop_memory_and_fetch_again(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "cache"
    async with a_house(directory, spill_threshold=MIB, memory=4 * MIB) as house:
        make_useless(how, directory, monkeypatch)
        origin = Origin(size=16 * MIB, piece=MIB)
        stream = house.stream(origin)
        with trio.fail_after(10):
            for _ in range(2):
                assert await read_all(stream, MIB) == origin.content()
        assert house.cache.pool.used <= 4 * MIB


@pytest.mark.parametrize("how", HOWS)
async def test_without_a_disk_a_one_way_stream_gets_no_space_alone(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "cache"
    async with a_house(directory, spill_threshold=MIB, memory=4 * MIB) as house:
        make_useless(how, directory, monkeypatch)
        big = Origin("big", size=16 * MIB, ranged=False, piece=MIB)
        handle = await house.stream(big, command=True).open()
        with trio.fail_after(10), pytest.raises(NoSpace):
            for offset in range(0, big.size, 100_000):
                await check(handle, big, offset, 100_000)
        await check(handle, big, 0, MIB)  # what arrived stays
        with pytest.raises(NoSpace):
            await handle.read(big.size - 1, 1)
        handle.close()
        small = Origin("small", size=16 * MIB)
        with trio.fail_after(10):
            assert await read_all(house.stream(small), 100_000) == small.content()


async def test_several_readers_share_too_little_memory_without_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_house(tmp_path, spill_threshold=MIB, memory=4 * MIB) as house:
        make_useless("read-only", tmp_path, monkeypatch)
        origin = Origin(size=8 * MIB)
        stream = house.stream(origin)
        handle = await stream.open()
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:

                async def read(start: int) -> None:
                    for offset in range(start, start + 2 * MIB, 256 * KIB):
                        await check(handle, origin, offset, 256 * KIB)

                for place in range(4):
                    nursery.start_soon(read, place * 2 * MIB)
        handle.close()


async def test_a_disk_that_recovers_takes_bytes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_house(tmp_path, spill_threshold=MIB, memory=32 * MIB) as house:
        with monkeypatch.context() as patch:
            make_useless("full", tmp_path, patch)
            await read_all(house.stream(Origin("a", size=4 * MIB, ranged=False)))
            await until(lambda: house.cache.disk_error is not None)
        stream = house.stream(Origin("b", size=4 * MIB, ranged=False))
        await read_all(stream)
        await until(lambda: house.cache.disk_error is None)


async def test_a_cache_that_is_full_of_what_is_open_leaves_no_wait_without_an_end(tmp_path: Path) -> None:
    async with a_house(tmp_path, spill_threshold=0, memory=4 * MIB, size=6 * MIB) as house:
        handles = []
        with trio.fail_after(20):
            for number in range(3):
                origin = Origin(f"s{number}", size=8 * MIB, ranged=False, piece=MIB)
                handle = await house.stream(origin, command=True).open()
                handles.append(handle)
                try:
                    for offset in range(0, origin.size, MIB):
                        await check(handle, origin, offset, MIB)
                except NoSpace:
                    continue
            assert data_on_disk(tmp_path) <= 6 * MIB + SPILL_BATCH + PREALLOCATED
        assert house.cache.disk_error is not None
        for handle in handles:
            handle.close()


async def test_a_defect_while_making_room_ends_neither_the_cache_nor_who_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_house(tmp_path, memory=2 * MIB) as house:
        with monkeypatch.context() as patch:

            def defective(_: object) -> None:
                raise ValueError("a defect")

            patch.setattr(house.cache, "_heaviest", defective)
            with trio.fail_after(5), pytest.raises(NoSpace):
                await read_all(house.stream(Origin("a", size=8 * MIB, ranged=False)))
        assert "unforeseen" in caplog.text
        origin = Origin("b", size=8 * MIB, ranged=False)
        assert await read_all(house.stream(origin)) == origin.content()


async def test_closing_while_bytes_move_to_disk_gives_every_piece_back(tmp_path: Path) -> None:
    async with a_house(tmp_path, spill_threshold=0) as house:
        origin = Origin(size=16 * MIB, piece=MIB)
        stream = house.stream(origin)
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(Closed):
                    while True:
                        await read_all(stream)

            nursery.start_soon(read)
            await until(lambda: any(tmp_path.iterdir()))
            stream.interrupt(Closed("the end"))
        await stream.aclose()
        await until(lambda: house.cache.pool.used == 0)


# Descriptors that run out


async def test_without_a_descriptor_left_a_recording_is_kept_and_the_open_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, 2, 1)
    async with a_house(tmp_path) as house:
        house.cache.scan([2])

        def none_left(path: Path) -> Recording | None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        for what, how in ((Recording, ("load", none_left)), (descriptors, ("are_short", lambda: True))):
            with monkeypatch.context() as patch:
                patch.setattr(what, *how)
                with pytest.raises(TooManyFiles):
                    await house.cache.wake_dormant(2, "k")
        assert await house.cache.wake_dormant(2, "k") is not None


async def test_cached_bytes_that_nobody_uses_give_their_descriptors_to_who_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_house(tmp_path, spill_threshold=0) as house:
        streams = []
        for number in range(4):
            origin = Origin(f"s{number}", size=MIB)
            streams.append(house.stream(origin))
            await read_all(streams[-1])
            await until(lambda: not house.cache.pool.used)
            await closed(streams[-1])
        used = await streams[0].open()
        taken = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        monkeypatch.setattr(descriptors, "are_short", lambda: len(os.listdir("/proc/self/fd")) > taken - 3)  # noqa: PTH208
        await house.cache.spare_descriptors()
        assert [stream.buffered > 0 for stream in streams] == [True, False, False, True]
        monkeypatch.setattr(descriptors, "are_short", lambda: True)
        other = house.stream(Origin("other"))
        with pytest.raises(TooManyFiles, match="doctor"):
            await other.open()
        await check(used, Origin("s0", size=MIB), 0, MIB)
        used.close()


async def test_without_a_descriptor_left_memory_goes_on_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamfs.cache.DISK_RETRY", 0.05)
    async with a_house(tmp_path, spill_threshold=MIB, memory=32 * MIB) as house:
        origin = Origin(size=4 * MIB, ranged=False, piece=256 * KIB)
        handle = await house.stream(origin, command=True).open()
        with monkeypatch.context() as patch:
            await check(handle, origin, 0, 1)
            patch.setattr(descriptors, "are_short", lambda: True)
            for offset in range(0, origin.size, MIB):
                await check(handle, origin, offset, MIB)
            await until(lambda: "Too many open files" in (house.cache.disk_error or ""))
            assert not any(tmp_path.iterdir())  # noqa: ASYNC240
        await until(lambda: house.cache.disk_error is None and handle.generation.buffer.memory <= MIB)
        for offset in range(0, origin.size, MIB):
            await check(handle, origin, offset, MIB)
        handle.close()


def test_descriptors_are_short_before_the_last_is_taken() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
        with pytest.raises(OSError, match="Too many"):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        assert descriptors.are_short()
        for _ in range(31):
            os.close(taken.pop())
        assert descriptors.are_short()
        for _ in range(2):
            os.close(taken.pop())
        assert not descriptors.are_short()
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_a_disk_that_hangs_in_a_write_fails_who_needs_it_in_words_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, real = threading.Event(), Recording.append

    def hanging(recording: Recording, runs: Any) -> Any:
        assert answers.wait(30)
        return real(recording, runs)

    monkeypatch.setattr(Recording, "append", hanging)
    monkeypatch.setattr(cache, "DISK_PATIENCE", 0.2)
    one_way = Origin("one-way", size=20 * MIB, ranged=False, piece=MIB)
    ranged = Origin("ranged", size=20 * MIB, piece=MIB)
    async with a_house(tmp_path, memory=8 * MIB, spill_threshold=MIB) as house:
        handle = await house.stream(one_way).open()
        with trio.fail_after(20), pytest.raises(NoSpace, match="does not answer"):
            for offset in range(0, one_way.size, MIB):
                await check(handle, one_way, offset, MIB)
        await check(handle, one_way, 0, MIB)  # what has come stays
        assert house.cache.disk_error is not None
        with trio.fail_after(20):
            await read_all(house.stream(ranged))
        answers.set()
        await until(lambda: house.cache.disk_error is None)
        await check(handle, one_way, 0, MIB)
        handle.close()
