"""Random operations on a Buffer with a recording, against plain bytes.

The model is what was brought: a set of offsets whose bytes may be read. A read gives exactly the stream's bytes,
whose every byte names its stream, generation and offset, or says that some are missing or damaged; nothing else.
"""

import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from streamfs.engine.buffer import Buffer, Missing, Writer
from streamfs.engine.pool import LARGE, SMALL, Pool
from streamfs.engine.recording import BLOCK, Header, Recording
from streamfs.engine.streambuffer import StreamBuffer
from streamfs.errors import Closed, Damaged, OutsideWindow, SourceChanged, SourceFailed
from tests.fakes import flip_byte, named_bytes

EXAMPLES = int(os.environ.get("STREAMFS_EXAMPLES", "2000"))
SHARDS = 4  # so that test workers share them
SIZE = 5 * SMALL + 777
EDGES = sorted({e + d for e in range(0, SIZE + 1, SMALL) for d in (-1, 0, 1) if 0 <= e + d <= SIZE} | {SIZE})
offsets = st.one_of(st.integers(0, SIZE), st.sampled_from(EDGES))
lengths = st.one_of(st.integers(0, 200), st.integers(0, SIZE), st.sampled_from([1, SMALL, SMALL + 1, 2 * SMALL]))

KEY = "model"
bytes_of = lru_cache(maxsize=64)(named_bytes)
STRANGER = named_bytes("stranger", 1, LARGE)


FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
SETTINGS: dict[str, Any] = {
    "stateful_step_count": 40,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}


class Runs:
    """A set of offsets below SIZE, one byte each; as simple as it can be."""

    def __init__(self) -> None:
        self.marks = bytearray(SIZE)

    def add(self, start: int, stop: int) -> None:
        self.marks[start:stop] = b"\1" * (stop - start)

    def discard(self, start: int, stop: int) -> None:
        self.marks[start:stop] = bytes(stop - start)

    def first_gap(self, start: int, stop: int) -> int | None:
        index = self.marks.find(0, start, stop)
        return None if index < 0 else index

    def next_start(self, start: int) -> int | None:
        index = self.marks.find(1, start)
        return None if index < 0 else index

    def stop_of_run(self, start: int) -> int:
        index = self.marks.find(0, start)
        return SIZE if index < 0 else index

    def holds(self, offset: int) -> bool:
        return bool(self.marks[offset])

    @property
    def total(self) -> int:
        return self.marks.count(1)


class BufferMachine(RuleBasedStateMachine):
    @initialize(
        declared=st.booleans(),
        refetchable=st.booleans(),
        recorded=st.sampled_from([True, True, False]),
        windowed=st.sampled_from([False, False, True]),
    )
    def begin(self, declared: bool, refetchable: bool, recorded: bool, windowed: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="streamfs-model-", dir=FAST))
        self.pool = Pool(2 * LARGE)
        self.windowed = windowed
        self.stranger = Buffer(self.pool)
        self.guest = self.stranger.writer(0)
        self.generation = 2
        self.new_generation(declared, refetchable)
        if recorded:
            self.record()

    def new_generation(self, declared: bool, refetchable: bool) -> None:
        self.generation += 1
        self.data = bytes_of(KEY, self.generation, SIZE)
        self.path = self.folder / f"1-{self.generation}.data"
        self.size = SIZE if declared else None
        self.buffer = Buffer(self.pool, size=self.size)
        self.buffer.refetchable = refetchable
        self.refetchable = refetchable
        self.present = Runs()
        self.flipped: set[int] = set()  # offsets whose byte on disk differs; each is in the recording
        self.damaged = Runs()
        self.failed = False
        self.floor = 0
        self.writers: list[tuple[Writer, memoryview | None]] = []

    def teardown(self) -> None:
        if hasattr(self, "buffer"):
            self.buffer.close()
            with pytest.raises(Closed):
                self.buffer.read_copy(0, 1)
            self.close_writers()
            self.guest.close()
            self.stranger.close()
            assert self.pool.used == 0, "memory was lost"
            shutil.rmtree(self.folder)

    def close_writers(self) -> None:
        for writer, _ in self.writers:
            writer.close()
        self.writers.clear()

    # Writing

    @rule(position=offsets, writes=st.lists(st.integers(1, SMALL), max_size=4), stays=st.booleans())
    def enter_writer(self, position: int, writes: list[int], stays: bool) -> None:
        """A writer that brings something at once, and leaves or stays with room in its hands."""
        position = max(position, self.floor)
        if len(self.writers) >= 4:
            self.writers.pop(0)[0].close()
        self.writers.append((self.buffer.writer(position), None))
        for count in writes:
            self.write(-1, count)
        if stays:
            self.ask_for_room(-1)
        else:
            self.leave(-1)

    @rule(position=offsets, ahead=st.sampled_from([0, 1, 100, SMALL // 2, SMALL]), count=st.integers(1, SMALL))
    def two_writers_meet(self, position: int, ahead: int, count: int) -> None:
        """One waits with room in its hands, another writes a little ahead of it or runs into its place."""
        self.enter_writer(position, [], True)
        self.enter_writer(min(position + ahead, SIZE), [count], True)
        self.enter_writer(max(0, position - ahead), [ahead, 1], True)

    @precondition(lambda self: any(held is not None for _, held in self.writers))
    @rule()
    def rooms_are_filled(self) -> None:
        for index, (_, held) in enumerate(self.writers):
            if held is not None:
                self.write(index, SMALL)

    @rule()
    def bring_all_that_is_missing(self) -> None:
        while (gap := self.present.first_gap(self.floor, SIZE)) is not None:
            writer = self.buffer.writer(gap)
            self.writers.append((writer, None))
            self.write(-1, SIZE)
            self.leave(-1)
            if writer.position == gap:
                return  # the pool is spent

    def chosen(self, which: int) -> int | None:
        return which % len(self.writers) if self.writers else None

    def ask_for_room(self, which: int) -> None:
        index = self.chosen(which)
        if index is None:
            return
        writer, held = self.writers[index]
        if held is not None or writer.met:
            return
        room = writer.room()
        if room is not None:
            assert room
            room[:] = b"\xaa" * len(room)  # a network library may scribble over all of it
            self.writers[index] = (writer, room)

    @rule(which=st.integers(0, 3), count=st.one_of(st.integers(1, SMALL), st.just(SMALL)))
    def write(self, which: int, count: int) -> None:
        self.ask_for_room(which)
        index = self.chosen(which)
        if index is None or self.writers[index][1] is None:
            return
        writer, room = self.writers[index]
        assert room is not None
        start = writer.position
        count = min(count, len(room), SIZE - start)
        room[:count] = self.data[start : start + count]
        writer.wrote(count)
        self.writers[index] = (writer, None)
        ahead = self.present.next_start(start)
        end = start + count if ahead is None else min(start + count, ahead)
        assert writer.position == end
        assert writer.met == ((end < SIZE and self.present.holds(end)) or (self.size is not None and end >= SIZE))
        self.present.add(start, end)
        self.damaged.discard(start, end)

    @rule(which=st.integers(0, 3))
    def leave(self, which: int) -> None:
        index = self.chosen(which)
        if index is not None:
            self.writers.pop(index)[0].close()

    @rule(count=st.integers(1, 30), anew=st.booleans())
    def another_stream_takes_memory(self, count: int, anew: bool) -> None:
        if anew:
            self.guest.close()
            self.stranger.close()
            self.stranger = Buffer(self.pool)
            self.guest = self.stranger.writer(0)
        for _ in range(count):
            room = self.guest.room()
            if room is None or self.guest.position + len(room) > LARGE:
                return
            room[:] = STRANGER[self.guest.position : self.guest.position + len(room)]
            self.guest.wrote(len(room))

    # Reading

    @rule(offset=offsets, size=lengths)
    def read_from_what_is_there(self, offset: int, size: int) -> None:
        start = self.present.next_start(offset)
        if start is not None:
            self.read(start, max(1, min(size, self.present.stop_of_run(start) - start)))

    @rule(offset=st.one_of(offsets, st.integers(SIZE, 2 * SIZE)), size=lengths)
    def read(self, offset: int, size: int) -> None:
        stop = offset + size
        if self.size is not None:
            stop = max(offset, min(stop, self.size))
        view = self.buffer.view(offset, size)
        if view is not None:
            assert self.floor <= offset < stop
            assert self.present.first_gap(offset, stop) is None
            assert view == self.data[offset:stop]
        if stop <= offset:
            assert self.buffer.read_copy(offset, size) == b""
            return
        if offset < self.floor:
            with pytest.raises(OutsideWindow):
                self.buffer.read_copy(offset, size)
            return
        while True:
            gap = self.present.first_gap(offset, min(stop, SIZE)) if offset < SIZE else offset
            if gap is None and stop > SIZE:
                gap = SIZE
            if gap is not None:
                if gap < SIZE and self.damaged.holds(gap):
                    with pytest.raises(Damaged):
                        self.buffer.read_copy(offset, size)
                elif self.failed:
                    with pytest.raises(SourceFailed):
                        self.buffer.read_copy(offset, size)
                else:
                    assert self.buffer.read_copy(offset, size) == Missing(gap)
                return
            bad = self.find_damage(offset, stop)
            if bad is None:
                assert self.buffer.read_copy(offset, size) == self.data[offset:stop]
                return
            found = self.buffer.copy(offset, size)
            assert not isinstance(found, bytes), "a flipped byte was served"
            assert not isinstance(found, Missing)
            if self.buffer.settle(found, wait=True) is not None:
                raise AssertionError("a flipped byte was served")
            self.learn_damage()

    def claimed(self) -> Runs:
        """What the buffer says is there."""
        runs, start = Runs(), self.buffer.next_present(0)
        while start is not None:
            stop = start + self.buffer.available(start, SIZE)
            runs.add(start, stop)
            start = self.buffer.next_present(stop)
        return runs

    def find_damage(self, start: int, stop: int) -> int | None:
        recording = self.buffer.recording
        assert recording is not None or not self.flipped
        for offset in self.flipped:
            if any(e.start <= offset < e.stop for e in recording.extents(start, stop)):
                return offset
        return None

    def learn_damage(self) -> None:
        """One flipped byte was found: the extent that held it, one block at most, is no longer claimed."""
        recording = self.buffer.recording
        on_disk = recording.present()
        left = self.claimed()
        found = [o for o in self.flipped if not on_disk.covers(o, o + 1)]
        assert found, "damage was found where none is"
        for offset in found:
            self.flipped.discard(offset)
            low, high = offset - offset % BLOCK, min(offset - offset % BLOCK + BLOCK, SIZE)
            for x in range(low, high):
                if self.present.holds(x) and not left.holds(x):
                    self.present.discard(x, x + 1)
                    if not self.refetchable:
                        self.damaged.add(x, x + 1)
            assert not self.present.holds(offset)

    # The end, failures

    @rule()
    def fail_or_retry(self) -> None:
        self.failed = not self.failed
        if self.failed:
            self.buffer.fail(SourceFailed("the cable"))
        else:
            self.buffer.retry()

    @rule()
    def end(self) -> None:
        self.buffer.ended(SIZE)
        self.size = SIZE

    @rule(size=offsets)
    def end_wrongly(self, size: int) -> None:
        if size != SIZE and (self.size is not None or self.present.next_start(size) is not None):
            with pytest.raises(SourceFailed):
                self.buffer.ended(size)

    # Resting places

    def record(self) -> None:
        self.buffer.record(Recording.create(self.path, Header(key=KEY, generation=self.generation)))

    @precondition(lambda self: self.buffer.recording is None)
    @rule()
    def record_later(self) -> None:
        self.record()

    @rule(most=st.sampled_from([1, SMALL, SIZE]), all_of_it=st.booleans())
    def spill(self, most: int, all_of_it: bool) -> None:
        before = self.buffer.memory
        moved = self.buffer.spill(most, all_of_it=all_of_it)
        assert moved < most + LARGE
        if moved:
            assert self.buffer.memory < before

    @precondition(lambda self: self.refetchable)
    @rule(most=st.sampled_from([1, SMALL, 2 * SMALL]))
    def forget_memory(self, most: int) -> None:
        lost = self.buffer.forget_memory(most)
        left = self.claimed()
        assert lost == self.present.total - left.total or (self.floor and lost > self.present.total - left.total)
        assert not int.from_bytes(left.marks) & ~int.from_bytes(self.present.marks)
        self.present = left

    @precondition(lambda self: self.buffer.recording is not None)
    @rule()
    def settle_for_good(self) -> None:
        if self.buffer.recording.suspect and self.buffer.verify()[1]:
            self.learn_damage()  # settling looks at what an earlier run left, as this does
        if self.size is None or self.present.first_gap(0, SIZE) is not None:
            with pytest.raises(ValueError):
                self.buffer.settle_for_good()
            return
        self.buffer.settle_for_good()
        plain = bytearray(self.path.read_bytes())
        for offset in self.flipped:
            plain[offset] = self.data[offset]
        assert plain == self.data

    @precondition(lambda self: self.buffer.recording is not None)
    @rule(offset=offsets, read=st.booleans())
    def flip_a_byte_on_disk(self, offset: int, read: bool) -> None:
        on_disk = self.buffer.recording.present()
        start = on_disk.next_start(offset)
        if start is not None and start not in self.flipped:
            flip_byte(self.path, start)
            self.flipped.add(start)
            if read:
                self.read(max(0, start - 5), 10)

    @precondition(lambda self: self.buffer.recording is not None)
    @rule(torn=st.integers(0, 31), refetchable=st.booleans())
    def reload_from_disk(self, torn: int, refetchable: bool) -> None:
        """The daemon was killed: what was only in memory is gone, what the index claims is there."""
        on_disk = self.buffer.recording.present()
        ended = self.buffer.recording.size
        self.close_writers()
        self.buffer.close()
        with self.path.with_name(self.path.name + ".index").open("ab") as index:
            index.write(b"\x5a" * torn)
        loaded = Recording.load(self.path)
        assert loaded is not None and loaded.present() == on_disk and loaded.size == ended
        self.buffer = Buffer(self.pool, size=loaded.size, recording=loaded)
        self.buffer.refetchable = self.refetchable = refetchable
        self.size, self.failed, self.floor = loaded.size, False, 0
        self.present, self.damaged = Runs(), Runs()
        for start, stop in on_disk:
            self.present.add(start, stop)

    @precondition(lambda self: self.windowed)
    @rule(floor=offsets)
    def the_past_leaves_the_window(self, floor: int) -> None:
        for writer, _ in [w for w in self.writers if w[0].position < floor]:
            self.writers.pop([w for w, _ in self.writers].index(writer))[0].close()
        self.buffer.trim(floor)
        self.floor = max(self.floor, floor)
        self.present.discard(0, self.floor)
        recording = self.buffer.recording
        if recording is not None:
            on_disk = recording.present()
            self.flipped = {offset for offset in self.flipped if on_disk.covers(offset, offset + 1)}

    @rule(changed=st.booleans(), declared=st.booleans(), refetchable=st.booleans())
    def another_version_or_an_eviction(self, changed: bool, declared: bool, refetchable: bool) -> None:
        """Nothing of the bytes before may ever be read again."""
        if changed:
            self.buffer.doom(SourceChanged("another version"))
            with pytest.raises(SourceChanged):
                self.buffer.read_copy(self.present.next_start(0) or 0, 1)
        recording = self.buffer.recording
        self.close_writers()
        self.buffer.close()
        with pytest.raises(SourceChanged if changed else Closed):
            self.buffer.read_copy(0, 1)
        if recording is not None:
            recording.unlink()
            assert Recording.load(self.path) is None
        self.new_generation(declared, refetchable)

    # What always holds

    @invariant()
    def knows_what_is_there(self) -> None:
        if not hasattr(self, "buffer"):
            return
        assert self.buffer.buffered == self.present.total
        assert self.buffer.size == self.size
        assert self.buffer.complete == (self.size is not None and self.present.first_gap(0, SIZE) is None)
        assert self.pool.used == self.buffer.memory + self.stranger.memory <= self.pool.budget

    @invariant()
    def another_stream_keeps_its_bytes(self) -> None:
        if hasattr(self, "guest"):
            size = self.guest.position
            assert self.stranger.read_copy(0, size) == STRANGER[:size]


@pytest.mark.timeout(60 + EXAMPLES // 5)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_no_sequence_of_events_makes_a_buffer_serve_other_bytes_than_its_own(shard: int) -> None:
    machine = type(f"BufferMachine{shard}", (BufferMachine,), {})  # what failed in one shard is tried there first
    run_state_machine_as_test(machine, settings=settings(max_examples=-(-EXAMPLES // SHARDS), **SETTINGS))


class StreamBufferMachine(RuleBasedStateMachine):
    """Random reads and slices of a StreamBuffer, its chunks and its end being random too."""

    @initialize(
        sizes=st.lists(
            st.one_of(st.integers(0, 9), st.sampled_from([SMALL, SMALL - 1, SMALL + 1, 3 * SMALL])), max_size=40
        ),
        breaks=st.booleans(),
        declared=st.sampled_from([None, 0, -1, 1]),
    )
    def begin(self, sizes: list[int], breaks: bool, declared: int | None) -> None:
        self.length = sum(sizes)
        self.data = named_bytes("stream", 1, self.length)
        self.given = 0
        self.breaks = breaks
        self.size = None if declared is None or self.length + declared < 0 else self.length + declared

        def source():
            for size in sizes:
                self.given += size
                yield self.data[self.given - size : self.given]
            if breaks:
                raise OSError("cable")

        self.buffer = StreamBuffer(source(), size=self.size, max_size=LARGE)

    def expect(self, offset: int, size: int) -> bytes | None:
        """What a read gives; None: it fails."""
        stop = offset + size if self.size is None else min(offset + size, self.size)
        if stop <= offset:
            return b""
        short = stop > self.length
        if short and (self.breaks or (self.size is not None and self.size > self.length)):
            return None
        return self.data[offset:stop]

    @rule(offset=st.integers(0, 9 * SMALL), size=lengths)
    def read(self, offset: int, size: int) -> None:
        expected = self.expect(offset, size)
        before = self.given
        if expected is None:
            with pytest.raises(SourceFailed):
                self.buffer.read(offset, size)
        else:
            assert self.buffer.read(offset, size) == expected
        if not size or offset + size <= before:
            assert self.given == before, "more than needed was pulled"

    @rule(start=st.none() | st.integers(-SIZE, SIZE), stop=st.none() | st.integers(-SIZE, SIZE))
    def cut(self, start: int | None, stop: int | None) -> None:
        plain = (start or 0) >= 0 and stop is not None and stop >= 0
        total = self.length if self.size is None else self.size
        if plain:
            expected = self.expect(start or 0, max(0, stop - (start or 0)))
        else:
            expected = None if self.expect(0, total + 1) is None else self.data[:total][start:stop]
        if expected is None:
            with pytest.raises(SourceFailed):
                self.buffer[start:stop]
        else:
            assert self.buffer[start:stop] == expected

    def teardown(self) -> None:
        if hasattr(self, "buffer"):
            self.buffer.close()
            assert self.buffer._buffer.memory == 0


@pytest.mark.timeout(60 + EXAMPLES // 10)
def test_no_sequence_of_reads_makes_a_stream_buffer_give_other_bytes_than_its_source() -> None:
    run_state_machine_as_test(
        StreamBufferMachine,
        settings=settings(max_examples=-(-EXAMPLES // 4), **(SETTINGS | {"stateful_step_count": 15})),
    )
