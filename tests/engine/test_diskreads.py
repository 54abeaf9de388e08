"""Reads that wait for the disk take turns, and a disk that hangs under one stream ends nobody else's."""

import threading
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from streamfs.engine.buffer import Buffer
from streamfs.engine.diskreads import PER_STREAM, DiskReads, Reply
from streamfs.engine.pool import LARGE, Pool
from streamfs.engine.recording import BLOCK, Header, Recording
from tests.fakes import WAIT, named_bytes
from tests.sourcefakes import until

SIZE = LARGE
PATIENT = 3600.0


def content(number: int) -> bytes:
    return named_bytes("disk reads", number, SIZE)


def at_rest(folder, number: int, reads: DiskReads) -> Buffer:
    """A buffer all of whose bytes are on disk alone."""
    path, pool = folder / f"{number}-1.data", Pool(2 * LARGE)
    buffer = Buffer(pool, size=SIZE)
    writer = buffer.writer(0)
    writer.append(memoryview(content(number)), make_room=lambda: None)
    writer.close()
    buffer.record(Recording.create(path, Header(key=str(number), generation=1)))
    buffer.settle_for_good()
    buffer.close()
    return Buffer(pool, recording=Recording.load(path), disk_reads=reads)


class Disk:
    """Nothing of a recording is in the page cache, and its reads wait while their recording hangs."""

    def __init__(self, monkeypatch) -> None:
        self.hanging: dict[Recording, threading.Event] = {}
        self.now = self.most = 0
        self._lock = threading.Lock()
        real = Recording.read

        def read(recording, extents, out, *, wait):
            if not wait:
                return False
            with self._counted(len(out)):
                if recording in self.hanging:
                    assert self.hanging[recording].wait(WAIT)
                return real(recording, extents, out, wait=True)

        monkeypatch.setattr(Recording, "read", read)

    @contextmanager
    def _counted(self, size):
        with self._lock:
            self.now += size
            self.most = max(self.most, self.now)
        try:
            yield
        finally:
            with self._lock:
                self.now -= size

    def hang(self, buffer: Buffer) -> threading.Event:
        assert buffer.recording is not None
        return self.hanging.setdefault(buffer.recording, threading.Event())


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


async def test_over_all_streams_no_more_bytes_wait_for_the_disk_than_may(tmp_path, disk):
    most = 3 * LARGE
    reads = DiskReads(most, PATIENT)
    buffers = [at_rest(tmp_path, number, reads) for number in range(8)]
    right = []

    async def read(number: int, offset: int, size: int) -> None:
        got = await buffers[number].read_async(offset, size)
        right.append(bytes(got) == content(number)[offset : offset + size])

    with trio.fail_after(WAIT):
        async with trio.open_nursery() as nursery:
            for number in range(len(buffers)):
                for offset, size in ((0, SIZE), (1, SIZE - 2), (BLOCK - 1, 2), (100_000, 300_000), (5, 1)):
                    nursery.start_soon(read, number, offset, size)
    assert right == [True] * 40
    assert LARGE <= disk.most <= most
    assert reads.taken == 0
    for buffer in buffers:
        buffer.close()


async def test_a_stream_whose_disk_hangs_holds_up_others_once_and_no_longer_than_their_patience(tmp_path, disk):
    patience = 0.5
    reads = DiskReads(2 * LARGE, patience)
    stuck, healthy = at_rest(tmp_path, 1, reads), at_rest(tmp_path, 2, reads)
    release = disk.hang(stuck)
    with trio.fail_after(WAIT):
        async with trio.open_nursery() as nursery:
            for _ in range(3 * PER_STREAM):
                nursery.start_soon(stuck.read_async, 0, SIZE - 1)
            await until(lambda: disk.now)
            began = trio.current_time()
            for offset in range(0, SIZE, BLOCK // 4):
                got = await healthy.read_async(offset, BLOCK // 4)
                assert bytes(got) == content(2)[offset : offset + BLOCK // 4]
            assert trio.current_time() - began < 32 * patience  # one wait of theirs each would be 64
            release.set()
    assert reads.taken == 0
    stuck.close()
    healthy.close()


async def test_a_reader_of_a_disk_that_hangs_can_be_interrupted_and_its_turn_ends_with_the_disks_answer(tmp_path, disk):
    reads = DiskReads(LARGE, PATIENT)
    stuck, healthy = at_rest(tmp_path, 1, reads), at_rest(tmp_path, 2, reads)
    release = disk.hang(stuck)
    with trio.move_on_after(0.1) as interrupted, trio.fail_after(WAIT):
        await stuck.read_async(0, SIZE)
    assert interrupted.cancelled_caught
    assert reads.taken  # its memory is still the thread's
    with trio.move_on_after(0.1) as in_line:
        await healthy.read_async(0, SIZE)
    assert in_line.cancelled_caught
    release.set()
    with trio.fail_after(WAIT):
        assert bytes(await healthy.read_async(0, SIZE)) == content(2)
        assert bytes(await stuck.read_async(0, SIZE)) == content(1)
    assert reads.taken == 0
    stuck.close()
    healthy.close()


async def test_turns_come_in_order_and_who_gives_up_holds_nobody_up(autojump_clock):
    reads = DiskReads(10, 60)
    order = []

    async def take(name: str, size: int) -> Reply:
        reply = await reads.take(size)
        order.append(name)
        return reply

    first = await take("first", 6)
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as giving_up:
            async with trio.open_nursery() as inner:
                inner.start_soon(take, "too large now", 9)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(take, "small", 4)
                await trio.testing.wait_all_tasks_blocked()
                assert order == ["first"]  # small ones do not overtake
                giving_up.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert order == ["first", "small"]
        began = trio.current_time()
        nursery.start_soon(take, "patient", 9)
    assert trio.current_time() - began == pytest.approx(60)  # then the others count no longer
    assert reads.taken == 9
    reads.give(first)
    assert reads.taken == 9


async def test_a_reply_larger_than_all_that_may_wait_goes_alone(autojump_clock):
    reads = DiskReads(10, 60)
    large = await reads.take(1000)
    assert reads.taken == 1000
    with trio.move_on_after(59) as waiting:
        await reads.take(1)
    assert waiting.cancelled_caught
    reads.give(large)
    assert reads.taken == 0
