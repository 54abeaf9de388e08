import errno
import os
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from streamfs.engine.buffer import Buffer, Missing, Writer
from streamfs.engine.pool import LARGE, SMALL, Pool
from streamfs.engine.recording import BLOCK, Header, Recording
from streamfs.engine.store import Gathered
from streamfs.errors import Closed, Damaged, NoSpace, OutsideWindow, SourceChanged, SourceFailed
from tests.fakes import WAIT, Crew, flip_byte, named_bytes, poll_until

SIZE = 3 * LARGE + 321
DATA = named_bytes("buffer", 1, SIZE)
HEADER = Header(key="buffer", generation=1)


def no_room() -> None:
    raise NoSpace("the pool is spent")


def bring(writer: Writer, stop: int, data: bytes = DATA, step: int = 100_000) -> None:
    """Bring the bytes up to `stop`, or until the writer met present ones."""
    while writer.position < stop and not writer.met:
        room = writer.room()
        assert room is not None
        count = min(len(room), step, stop - writer.position)
        room[:count] = data[writer.position : writer.position + count]
        writer.wrote(count)


def filled(pool: Pool, start: int = 0, stop: int = SIZE, **options) -> Buffer:
    buffer = Buffer(pool, **options)
    writer = buffer.writer(start)
    bring(writer, stop)
    writer.close()
    return buffer


def settled(path: Path) -> None:
    buffer = filled(Pool(8 * LARGE))
    buffer.ended(SIZE)
    buffer.record(Recording.create(path, HEADER))
    buffer.settle_for_good()
    buffer.close()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "1-1.data"


# Several writers


def test_writers_at_different_places_fill_one_buffer():
    pool = Pool(8 * LARGE)
    buffer = Buffer(pool)
    writers = [buffer.writer(start) for start in (2 * LARGE, 0, LARGE - 5)]
    for _ in range(40):
        for writer in writers:
            bring(writer, min(writer.position + 40_000, SIZE))
    assert buffer.read_copy(0, SIZE) == DATA
    assert writers[1].met and writers[1].position == LARGE - 5
    for writer in writers:
        writer.close()
    buffer.close()
    assert pool.used == 0


def test_a_writer_stops_where_present_bytes_begin():
    buffer = Buffer(Pool(4 * LARGE))
    ahead, behind = buffer.writer(1000), buffer.writer(0)
    bring(ahead, 2000)
    room = behind.room()
    assert len(room) == 1000
    room[:] = DATA[:1000]
    assert not behind.met
    behind.wrote(1000)
    assert behind.met and len(behind.room()) == 0
    assert buffer.read_copy(0, 2000) == DATA[:2000]


def test_a_writer_that_was_overtaken_while_it_filled_its_room_adds_only_what_is_new():
    pool = Pool(4 * LARGE)
    buffer = Buffer(pool)
    slow, fast = buffer.writer(0), buffer.writer(1000)
    room = slow.room()
    bring(fast, 3000)
    room[:5000] = DATA[:5000]
    slow.wrote(5000)
    assert slow.position == 1000 and slow.met and len(slow.room()) == 0
    assert buffer.buffered == 3000
    assert isinstance(buffer.read_copy(0, 3001), Missing)
    for start, stop in [(0, 3000), (900, 1100), (1200, 2900)]:
        assert buffer.read_copy(start, stop - start) == DATA[start:stop]
    bring(fast, 6000)
    assert buffer.read_copy(0, 6000) == DATA[:6000]
    for writer in (slow, fast):
        writer.close()
    buffer.close()
    assert pool.used == 0


def test_an_overtaken_writer_stays_so_even_if_what_it_met_is_lost():
    """Its body is past its position: what it brought from here on would be out of place."""
    buffer = Buffer(Pool(4 * LARGE))
    buffer.refetchable = True
    slow, fast = buffer.writer(0), buffer.writer(1000)
    room = slow.room()
    bring(fast, SMALL)
    room[:2000] = DATA[:2000]
    slow.wrote(2000)
    fast.close()
    assert buffer.forget_memory() == SMALL - 1000
    assert slow.met and len(slow.room()) == 0


def test_a_writer_that_reaches_a_waiting_one_leaves_it_its_place():
    """The waiting one holds room at exactly the offset where the other arrives."""
    pool = Pool(4 * LARGE)
    buffer = Buffer(pool)
    waiting, arriving = buffer.writer(SMALL), buffer.writer(0)
    held = waiting.room()
    bring(arriving, SMALL)
    room = arriving.room()
    room[:100] = DATA[SMALL : SMALL + 100]
    arriving.wrote(100)
    held[:500] = DATA[SMALL : SMALL + 500]
    waiting.wrote(500)
    assert waiting.met
    bring(arriving, 2 * SMALL)
    assert buffer.read_copy(0, 2 * SMALL) == DATA[: 2 * SMALL]
    for writer in (waiting, arriving):
        writer.close()
    buffer.close()
    assert pool.used == 0


def test_bytes_written_past_a_writer_that_has_brought_nothing_can_be_read():
    buffer = Buffer(Pool(4 * LARGE))
    waiting, other = buffer.writer(500), buffer.writer(0)
    waiting.room()
    bring(other, 1000)
    assert buffer.read_copy(600, 100) == DATA[600:700]
    assert buffer.read_copy(0, 1000) == DATA[:1000]
    waiting.close()
    assert buffer.read_copy(0, 1000) == DATA[:1000]


def test_room_ends_at_the_known_size_and_a_size_learnt_later_cuts_what_was_written():
    buffer = Buffer(Pool(LARGE), size=100)
    writer = buffer.writer(0)
    assert len(writer.room()) == 100
    late = Buffer(Pool(LARGE))
    writer = late.writer(0)
    room = writer.room()
    late.ended(100)
    room[:200] = DATA[:200]
    writer.wrote(200)
    assert writer.position == 100 and writer.met and late.complete
    assert late.read_copy(0, 200) == DATA[:100]


def test_append_past_the_declared_size_fails_with_what_fits_kept():
    buffer = Buffer(Pool(LARGE), size=100)
    with pytest.raises(SourceFailed, match="more than the 100 bytes"):
        buffer.writer(0).append(memoryview(DATA)[:150], no_room)
    assert buffer.read_copy(0, 100) == DATA[:100]


def test_writers_in_many_threads_bring_every_byte_to_its_place():
    pool = Pool(16 * LARGE)
    buffer = Buffer(pool)
    bounds = [0, 5, SMALL, LARGE + 17, 2 * LARGE, 2 * LARGE + 1, SIZE]

    def write(start: int) -> None:
        writer = buffer.writer(start)
        bring(writer, SIZE, step=7777)
        writer.close()

    with Crew() as crew:
        for start in bounds[:-1]:
            crew.start(write, start)
    assert buffer.read_copy(0, SIZE) == DATA
    buffer.close()
    assert pool.used == 0


# Memory


def test_a_spent_pool_gives_no_room_until_memory_comes_back(path):
    pool = Pool(LARGE)
    buffer = Buffer(pool)
    writer = buffer.writer(0)
    bring(writer, LARGE)
    assert writer.room() is None
    with pytest.raises(NoSpace):
        writer.append(memoryview(DATA)[LARGE:], no_room)
    buffer.record(Recording.create(path, HEADER))
    writer.append(memoryview(DATA)[LARGE:], lambda: buffer.spill(SMALL) or buffer.spill(SMALL, all_of_it=True))
    assert pool.used <= pool.budget
    assert buffer.read_copy(0, SIZE) == DATA


def test_what_one_piece_of_memory_holds_is_seen_without_a_look_elsewhere(path):
    buffer = filled(Pool(8 * LARGE), size=SIZE, recording=Recording.create(path, HEADER))
    last = SIZE // LARGE * LARGE
    assert buffer.view(LARGE, LARGE) == DATA[LARGE : 2 * LARGE]
    assert buffer.view(last, LARGE) == DATA[last:], "fewer at the end"
    assert buffer.view(LARGE - 1, 2) is None, "two pieces"
    assert buffer.view(SIZE, 1) is None
    assert buffer.view(0, 0) is None
    assert buffer.spill(LARGE)
    assert buffer.view(0, 1) is None, "on disk"
    buffer.trim(LARGE + SMALL)
    assert buffer.view(LARGE, 1) is None, "out of the window"
    assert buffer.view(LARGE + SMALL, 1) == DATA[LARGE + SMALL : LARGE + SMALL + 1]
    buffer.doom(SourceChanged("another version"))
    assert buffer.view(LARGE + SMALL, 1) is None
    buffer.close()


def test_spilling_moves_bounded_steps_and_nothing_changes_for_readers(path):
    buffer = filled(Pool(8 * LARGE))
    assert buffer.spill() == 0  # nowhere to go
    buffer.record(Recording.create(path, HEADER))
    with pytest.raises(ValueError):
        buffer.record(Recording.anonymous(path.parent))
    moved = 0
    while step := buffer.spill(SMALL):
        assert step <= LARGE  # whole pieces, never the whole buffer
        moved += step
        size = min(20, SIZE - moved + 10)
        assert buffer.read_copy(moved - 10, size) == DATA[moved - 10 : moved + 10]
    assert moved == SIZE and buffer.memory == 0
    assert buffer.read_copy(0, SIZE) == DATA


def test_a_piece_that_a_writer_is_filling_is_not_given_to_another_stream(path):
    """The writer's view must stay its own while bytes move to disk, whoever asks for all of them."""
    pool = Pool(LARGE)
    buffer = Buffer(pool)
    buffer.record(Recording.create(path, HEADER))
    writer = buffer.writer(0)
    bring(writer, 1000)
    room = writer.room()
    assert buffer.spill(all_of_it=True) == 0
    stranger = Buffer(pool)
    other = stranger.writer(0)
    bring(other, LARGE - SMALL)
    assert other.room() is None
    room[:1000] = DATA[1000:2000]
    writer.wrote(1000)
    assert buffer.spill(all_of_it=True) == 2000
    assert stranger.read_copy(0, LARGE - SMALL) == DATA[: LARGE - SMALL]
    bring(writer, 3000)
    assert buffer.read_copy(0, 3000) == DATA[:3000]


def test_a_failed_spill_leaves_the_bytes_in_memory(path, monkeypatch):
    buffer = filled(Pool(8 * LARGE))
    buffer.record(Recording.create(path, HEADER))

    def full(fd, data, offset):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        with pytest.raises(OSError):
            buffer.spill()
    assert buffer.read_copy(0, SIZE) == DATA
    monkeypatch.undo()
    assert buffer.spill() > 0
    assert buffer.read_copy(0, SIZE) == DATA


class HeldRecording:
    """Holds `append` of a real recording until the test lets it go on."""

    def __init__(self, recording: Recording, monkeypatch, *, fail: bool = False) -> None:
        self.reached, self.release = threading.Event(), threading.Event()
        real = recording.append

        def append(runs):
            self.reached.set()
            assert self.release.wait(WAIT)
            if fail:
                raise OSError(errno.EIO, "broken")
            return real(runs)

        monkeypatch.setattr(recording, "append", append)


@pytest.mark.parametrize("fail", [False, True])
def test_closing_during_a_spill_gives_the_pieces_back_only_when_it_is_done(path, monkeypatch, fail):
    """A piece handed to another stream while it is being written would put that stream's bytes into this file."""
    pool = Pool(8 * LARGE)
    buffer = filled(pool)
    recording = Recording.create(path, HEADER)
    buffer.record(recording)
    held = HeldRecording(recording, monkeypatch, fail=fail)
    crew = Crew()
    crew.start(buffer.spill)
    assert held.reached.wait(WAIT)
    buffer.close()
    assert pool.used > 0
    stranger = filled(pool, 0, LARGE)
    held.release.set()
    if fail:
        with pytest.raises(OSError):
            crew.join()
    else:
        crew.join()
    assert pool.used == stranger.memory
    loaded = Buffer(pool, recording=Recording.load(path))
    assert loaded.buffered == (0 if fail else SIZE)
    if not fail:
        assert loaded.read_copy(0, SIZE) == DATA


def test_bytes_are_read_while_they_go_to_disk(path, monkeypatch):
    buffer = filled(Pool(8 * LARGE))
    recording = Recording.create(path, HEADER)
    buffer.record(recording)
    held = HeldRecording(recording, monkeypatch)
    with Crew() as crew:
        crew.start(buffer.spill)
        assert held.reached.wait(WAIT)
        assert buffer.read_copy(0, SIZE) == DATA
        assert buffer.forget_memory() == 0
        held.release.set()
    assert buffer.read_copy(0, SIZE) == DATA


def test_two_threads_that_spill_write_one_after_the_other(path, monkeypatch):
    buffer = filled(Pool(8 * LARGE))
    recording = Recording.create(path, HEADER)
    buffer.record(recording)
    inside = threading.Lock()
    real = recording.append

    def append(runs):
        assert inside.acquire(blocking=False), "two threads append at once"
        try:
            return real(runs)
        finally:
            inside.release()

    monkeypatch.setattr(recording, "append", append)

    def spill() -> int:
        moved = 0
        while step := buffer.spill(SMALL):
            moved += step
        return moved

    crew = Crew()
    for _ in range(4):
        crew.start(spill)
    assert sum(crew.join()) == SIZE
    assert buffer.read_copy(0, SIZE) == DATA


def test_many_threads_read_true_bytes_while_bytes_arrive_and_spill(path):
    pool = Pool(2 * LARGE)
    buffer = Buffer(pool, size=SIZE)
    buffer.record(Recording.create(path, HEADER))
    writer = buffer.writer(0)

    def read(seed: int) -> None:
        position = 0
        while position < SIZE:
            size = min(10_000 + seed * 7919, SIZE - position)
            woken = threading.Event()
            with buffer.enlisted(position, size, woken.set) as waits:
                assert not waits or woken.wait(WAIT)
            found = buffer.read_copy(position, size)
            if not isinstance(found, Missing):
                assert found == DATA[position : position + size]
                position += size

    def spill_some() -> None:
        assert buffer.spill(SMALL) or buffer.spill(SMALL, all_of_it=True) or pool.used < pool.budget

    with Crew() as crew:
        for seed in range(6):
            crew.start(read, seed)
        for start in range(0, SIZE, 50_000):
            writer.append(memoryview(DATA)[start : start + 50_000], spill_some)
            buffer.spill(SMALL)
    writer.close()
    assert buffer.complete and buffer.waiting == 0
    buffer.close()
    assert pool.used == 0


def test_memory_is_forgotten_only_where_the_source_can_give_it_again():
    pool = Pool(8 * LARGE)
    buffer = filled(pool, size=SIZE)
    assert buffer.forget_memory() == 0
    buffer.refetchable = True
    assert buffer.complete
    while buffer.forget_memory(LARGE):
        pass
    assert buffer.buffered == 0 and pool.used == 0 and not buffer.complete
    assert buffer.read_copy(10, 5) == Missing(10)
    writer = buffer.writer(0)
    bring(writer, SIZE)
    assert buffer.read_copy(0, SIZE) == DATA


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_reader_behind_the_window_gets_a_clear_error_and_one_ahead_notices_nothing(path, on_disk):
    pool = Pool(8 * LARGE)
    buffer = filled(pool)
    buffer.record(Recording.create(path, HEADER))
    while on_disk and buffer.spill(all_of_it=True):
        pass
    behind = buffer.look(LARGE - 10, 2 * LARGE)
    memory = pool.used
    floor = 2 * LARGE + 5
    buffer.trim(floor)
    with pytest.raises(OutsideWindow):
        buffer.read_copy(floor - 1, 10)
    assert buffer.read_copy(floor, SIZE - floor) == DATA[floor:]
    if on_disk:
        assert isinstance(behind, Gathered)
        assert buffer.settle(behind, wait=True) is None  # punched out under its hands: never zeros
        assert Recording.load(path).present().next_start(0) == 2 * LARGE
    else:
        assert pool.used < memory
    buffer.close()
    assert pool.used == 0


# The end of a buffer


def test_closing_gives_all_memory_back_once_the_last_writer_left():
    pool = Pool(8 * LARGE)
    buffer = filled(pool)
    writer = buffer.writer(SIZE)
    writer.room()
    buffer.close()
    with pytest.raises(Closed):
        buffer.read_copy(0, 1)
    with pytest.raises(Closed):
        writer.room()
    assert pool.used > 0  # the writer may still be filling its room
    writer.close()
    writer.close()
    assert pool.used == 0
    buffer.close()


def test_closing_a_doomed_buffer_gives_its_memory_back_too():
    pool = Pool(8 * LARGE)
    buffer = filled(pool)
    writer = buffer.writer(SIZE)
    buffer.doom(SourceChanged("another version"))
    with pytest.raises(SourceChanged):
        writer.room()
    buffer.close()
    with pytest.raises(SourceChanged):
        buffer.read_copy(0, 1)
    writer.close()
    assert pool.used == 0


def test_closing_wakes_and_fails_every_waiting_thread():
    buffer = Buffer(Pool(LARGE))

    def read() -> None:
        woken = threading.Event()
        with buffer.enlisted(5, 5, woken.set) as waits:
            assert waits and woken.wait(WAIT)
        with pytest.raises(Closed):
            buffer.read_copy(5, 5)

    with Crew() as crew:
        for _ in range(5):
            crew.start(read)
        poll_until(lambda: buffer.waiting == 5)
        buffer.close()


# Damage


@pytest.mark.parametrize("refetchable", [True, False])
def test_a_flipped_byte_is_never_served(path, refetchable):
    settled(path)
    flip_byte(path, BLOCK + 99)
    pool = Pool(8 * LARGE)
    buffer = Buffer(pool, recording=Recording.load(path))
    buffer.refetchable = refetchable
    assert buffer.complete and buffer.size == SIZE
    if refetchable:
        assert buffer.read_copy(0, SIZE) == Missing(BLOCK)
        writer = buffer.writer(BLOCK)
        bring(writer, SIZE)
        assert writer.position == 2 * BLOCK
        writer.close()
        assert buffer.complete
        assert buffer.read_copy(0, SIZE) == DATA
        buffer.settle_for_good()
        assert Buffer(pool, recording=Recording.load(path)).read_copy(0, SIZE) == DATA
        assert path.read_bytes() == DATA
    else:
        for _ in range(3):
            with pytest.raises(Damaged):
                buffer.read_copy(0, SIZE)
    assert buffer.read_copy(0, BLOCK) == DATA[:BLOCK]
    assert buffer.read_copy(2 * BLOCK, SIZE) == DATA[2 * BLOCK :]


def test_a_truncated_file_loses_whole_extents_and_what_is_left_reads(path):
    settled(path)
    os.truncate(path, 5 * BLOCK + 100)
    buffer = Buffer(Pool(8 * LARGE), recording=Recording.load(path))
    buffer.refetchable = True
    assert buffer.read_copy(0, SIZE) == Missing(5 * BLOCK)
    assert buffer.read_copy(5 * BLOCK, 50) == Missing(5 * BLOCK)  # not in the file as far as anybody can prove
    assert buffer.read_copy(0, 5 * BLOCK) == DATA[: 5 * BLOCK]


def test_damage_found_by_many_readers_at_once_is_dropped_once(path):
    """The second must not take back what was fetched again meanwhile."""
    settled(path)
    flip_byte(path, 10)
    buffer = Buffer(Pool(8 * LARGE), recording=Recording.load(path))
    buffer.refetchable = True
    first, second = buffer.look(0, 100), buffer.look(0, 100)
    assert isinstance(first, Gathered) and isinstance(second, Gathered)
    assert buffer.settle(first, wait=True) is None
    writer = buffer.writer(0)
    bring(writer, BLOCK)
    writer.close()
    assert buffer.settle(second, wait=True) is None
    assert buffer.read_copy(0, SIZE) == DATA
    while buffer.spill(all_of_it=True):
        pass
    assert buffer.read_copy(0, SIZE) == DATA


def test_damage_that_cannot_be_logged_is_still_never_served(path, monkeypatch):
    settled(path)
    flip_byte(path, 10)
    buffer = Buffer(Pool(8 * LARGE), recording=Recording.load(path))
    buffer.refetchable = True

    def full(fd, data):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", full)
    assert buffer.read_copy(0, 10) == Missing(0)
    assert buffer.read_copy(BLOCK, 10) == DATA[BLOCK : BLOCK + 10]
    monkeypatch.undo()
    again = Buffer(Pool(8 * LARGE), recording=Recording.load(path))
    again.refetchable = True
    assert again.read_copy(0, 10) == Missing(0)


def test_damage_is_remembered_after_a_restart(path):
    settled(path)
    flip_byte(path, 10)
    buffer = Buffer(Pool(8 * LARGE), recording=Recording.load(path))
    buffer.refetchable = True
    assert buffer.read_copy(0, 10) == Missing(0)
    assert Buffer(Pool(8 * LARGE), recording=Recording.load(path)).buffered == SIZE - BLOCK


# Durability


def test_settling_makes_it_all_durable_in_order_and_frees_memory(path, monkeypatch):
    pool = Pool(8 * LARGE)
    buffer = filled(pool)
    recording = Recording.create(path, HEADER)
    order = []
    real_write, real_sync = os.pwrite, os.fsync

    def pwrite(fd, data, offset):
        order.append("write")
        return real_write(fd, data, offset)

    def fsync(fd):
        order.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        assert recording.size is None  # nobody is told before it is durable
        real_sync(fd)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fsync", fsync)
    buffer.record(recording)
    with pytest.raises(ValueError):
        buffer.settle_for_good()  # the end is not known
    assert order == []
    buffer.ended(SIZE)
    buffer.settle_for_good()
    assert order[-3:] == [path.name, path.parent.name, path.name + ".index"]
    assert set(order[:-3]) == {"write"}
    assert pool.used == 0
    assert path.read_bytes() == DATA
    assert buffer.read_copy(0, SIZE) == DATA


def test_settling_does_not_wait_for_a_writer_that_holds_room(path):
    pool = Pool(8 * LARGE)
    buffer = Buffer(pool, size=SIZE)
    buffer.record(Recording.create(path, HEADER))
    slow, fast = buffer.writer(0), buffer.writer(100)
    bring(slow, 50)
    room = slow.room()
    bring(fast, SIZE)
    fast.close()
    gap = buffer.writer(50)
    bring(gap, 100)
    gap.close()
    buffer.settle_for_good()
    assert pool.used == SMALL  # the slow one's
    room[:50] = b"?" * 50
    slow.wrote(50)
    assert slow.met
    slow.close()
    assert pool.used == 0
    assert buffer.read_copy(0, SIZE) == DATA


def test_settling_while_another_thread_spills_does_both(path, monkeypatch):
    buffer = filled(Pool(8 * LARGE), size=SIZE)
    recording = Recording.create(path, HEADER)
    buffer.record(recording)
    held = HeldRecording(recording, monkeypatch)
    with Crew() as crew:
        crew.start(buffer.spill, 1)
        assert held.reached.wait(WAIT)
        crew.start(buffer.settle_for_good)
        held.release.set()
    assert Recording.load(path).size == SIZE
    assert path.read_bytes() == DATA


def test_a_buffer_that_is_given_up_while_it_is_made_durable_stops_and_claims_nothing(path, monkeypatch):
    """As when the daemon ends in the middle of gigabytes."""
    monkeypatch.setattr("streamfs.engine.recording._FLUSH_STEP", 64 * 1024)
    buffer = filled(Pool(8 * LARGE), size=SIZE)
    buffer.record(Recording.create(path, HEADER))
    flushed = []

    def flush(fd, offset, length):
        flushed.append(offset)
        if len(flushed) == 2:
            buffer.doom(Closed("the end"))

    monkeypatch.setattr("streamfs.engine.recording._flush_range", flush)
    with pytest.raises(ValueError, match="before it was durable"):
        buffer.settle_for_good()
    assert flushed == [0, 64 * 1024]
    assert not buffer.recording.durable
    assert Recording.load(path).size is None


def test_making_durable_writes_the_data_back_in_steps_first(path, monkeypatch):
    monkeypatch.setattr("streamfs.engine.recording._FLUSH_STEP", 64 * 1024)
    calls = []
    monkeypatch.setattr("streamfs.engine.recording._flush_range", lambda fd, offset, length: calls.append(offset))
    synced = os.fsync
    monkeypatch.setattr("os.fsync", lambda fd: (calls.append("fsync"), synced(fd)))
    buffer = filled(Pool(8 * LARGE), size=SIZE)
    buffer.record(Recording.create(path, HEADER))
    buffer.settle_for_good()
    assert calls[: calls.index("fsync")] == list(range(0, SIZE, 64 * 1024))
    assert Recording.load(path).durable


def test_a_reloaded_recording_goes_on_where_it_was(path):
    first = filled(Pool(8 * LARGE), 0, LARGE)
    first.record(Recording.create(path, HEADER))
    while first.spill(all_of_it=True):
        pass
    del first  # as kill -9 would: nothing was closed or synced
    pool = Pool(8 * LARGE)
    buffer = Buffer(pool, recording=Recording.load(path))
    assert buffer.buffered == LARGE and buffer.size is None
    writer = buffer.writer(LARGE)
    bring(writer, SIZE)
    writer.close()
    buffer.ended(SIZE)
    buffer.settle_for_good()
    again = Buffer(pool, recording=Recording.load(path))
    assert again.complete and again.read_copy(0, SIZE) == DATA


# Waiting under trio


async def test_an_async_read_asks_for_what_is_missing_and_gets_it():
    buffer = Buffer(Pool(8 * LARGE))
    writer = buffer.writer(0)
    bring(writer, 100)
    asked = []

    def demand(missing: int, stop: int) -> None:
        asked.append((missing, stop))
        bring(writer, stop)

    assert await buffer.read_async(50, 100, demand) == DATA[50:150]
    assert await buffer.read_async(50, 100, demand) == DATA[50:150]
    assert asked == [(100, 150)]


async def test_a_demand_that_raises_leaves_no_waiter():
    buffer = Buffer(Pool(LARGE))

    def demand(missing: int, stop: int) -> None:
        raise NoSpace("full")

    with pytest.raises(NoSpace):
        await buffer.read_async(0, 1, demand)
    assert buffer.waiting == 0


async def test_a_cancelled_async_read_leaves_no_waiter():
    buffer = Buffer(Pool(LARGE))
    with trio.CancelScope() as scope:
        await buffer.read_async(0, 1, lambda missing, stop: scope.cancel())
    assert scope.cancelled_caught
    assert buffer.waiting == 0


async def test_bytes_from_a_thread_wake_async_readers():
    buffer = Buffer(Pool(8 * LARGE))
    writer = buffer.writer(0)
    seen = []

    async def read(offset: int) -> None:
        seen.append(bytes(await buffer.read_async(offset, 10)))

    with trio.fail_after(WAIT):
        async with trio.open_nursery() as nursery:
            for offset in (0, 5000, LARGE):
                nursery.start_soon(read, offset)
            await trio.testing.wait_all_tasks_blocked()
            assert buffer.waiting == 3
            await trio.to_thread.run_sync(bring, writer, LARGE + 10)
    assert sorted(seen) == sorted(DATA[o : o + 10] for o in (0, 5000, LARGE))


async def test_async_reads_of_disk_give_the_same_whether_the_page_cache_answers_or_not(path):
    settled(path)
    recording = Recording.load(path)
    buffer = Buffer(Pool(8 * LARGE), recording=recording)
    assert await buffer.read_async(BLOCK - 5, 10) == DATA[BLOCK - 5 : BLOCK + 5]
    recording._nowait = False
    assert await buffer.read_async(BLOCK - 5, 2 * BLOCK) == DATA[BLOCK - 5 : 3 * BLOCK - 5]
    flip_byte(path, 0)
    with pytest.raises(Damaged):
        await buffer.read_async(0, 10)


async def test_an_async_reader_fails_with_the_source_and_recovers_when_it_is_tried_again():
    buffer = Buffer(Pool(LARGE))

    def fail(missing: int, stop: int) -> None:
        buffer.fail(SourceFailed("gone"))

    with pytest.raises(SourceFailed):
        await buffer.read_async(0, 5, fail)
    with pytest.raises(SourceFailed):
        await buffer.read_async(0, 5)
    buffer.retry()
    writer = buffer.writer(0)
    assert await buffer.read_async(0, 5, lambda missing, stop: bring(writer, stop)) == DATA[:5]


def test_first_gap_next_present_and_available_agree():
    buffer = filled(Pool(LARGE), 10, 20)
    assert buffer.first_gap(0) == 0 and buffer.first_gap(10) == 20
    assert buffer.next_present(0) == 10 and buffer.next_present(20) is None
    assert buffer.available(12, 100) == 8 and buffer.available(0, 100) == 0
    assert buffer.missing(10, 10) is None and buffer.missing(15, 10) == 20
    buffer.ended(20)
    assert buffer.first_gap(10) is None and not buffer.complete
    assert buffer.failure is None and not buffer.doomed


def test_a_check_of_everything_ends_when_the_buffer_is_doomed(path, monkeypatch):
    settled(path)
    recording = Recording.load(path)
    buffer = Buffer(Pool(8 * LARGE), recording=recording)
    read = recording.read
    looks = []

    def read_once(*arguments, **named) -> bool:
        looks.append(arguments)
        buffer.doom(Closed("the daemon ends"))
        return read(*arguments, **named)

    monkeypatch.setattr(recording, "read", read_once)
    assert buffer.verify() == (1, [])
    assert len(looks) == 1
    buffer.close()


def test_what_was_not_checked_to_its_end_is_not_made_durable(path, monkeypatch):
    settled(path)
    recording = Recording.load(path)
    recording.suspect = True
    recording.durable = False
    buffer = Buffer(Pool(8 * LARGE), recording=recording)
    read = recording.read

    def read_once(*arguments, **named) -> bool:
        buffer.doom(Closed("the daemon ends"))
        return read(*arguments, **named)

    monkeypatch.setattr(recording, "read", read_once)
    with pytest.raises(ValueError, match="given up"):
        buffer.settle_for_good()
    assert recording.suspect
    assert not recording.durable
    buffer.close()
