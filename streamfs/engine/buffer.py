"""One generation of a stream: who brings bytes, who reads them, threads and trio alike.

`Buffer` is passive: it never fetches. Writers put bytes in (`Writer`); readers get them out; where bytes are
missing a reader calls its `demand` hook and waits. streamfs.engine.streambuffer puts an iterable behind it, and
streamfs.stream puts sources behind it.

Locking: `_lock` guards state and store together. Nothing is awaited and no I/O is done while it is held, and no
other lock is taken but the pool's, which is a leaf. Wakes happen under it, and only signal. `_disk` is held by the one
thread that writes to the recording; it is taken before `_lock`, never after.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import trio

from streamfs.engine.diskreads import DiskReads
from streamfs.engine.pool import Pool
from streamfs.engine.ranges import RangeSet
from streamfs.engine.recording import DamagedExtent, Recording
from streamfs.engine.state import BufferState, Waiter, again
from streamfs.engine.store import Gathered, Segment, Store
from streamfs.errors import Closed, SourceFailed, StreamfsError

Demand = Callable[[int, int], None]
"""Called with (first missing byte, end of the read) before a reader waits, without the lock: make them come."""

SPILL_BATCH = 4 * 1024 * 1024
"""Most bytes one step of spilling writes, so that no step stalls anybody for long."""


class Missing(int):
    """The first byte of a read that is not there yet."""


class Buffer:
    """The received bytes of one generation. All methods may be called from any thread unless they say otherwise."""

    def __init__(
        self,
        pool: Pool,
        *,
        size: int | None = None,
        recording: Recording | None = None,
        disk_reads: DiskReads | None = None,
    ) -> None:
        """`disk_reads`: shared by all buffers of one trio run; only `read_async` uses it."""
        self._lock = threading.Lock()
        self._state = BufferState(size)  # GUARDED_BY _lock
        self._store = Store(pool, recording)  # GUARDED_BY _lock
        self._pool = pool
        self._writers = 0  # GUARDED_BY _lock
        self._closed = False  # GUARDED_BY _lock
        self._disk = threading.Lock()
        self._disk_reads = (disk_reads or DiskReads()).stream()
        self.refetchable = False
        """Whether bytes that are lost here can be had from the source again."""
        self.on_damage: Callable[[], None] | None = None
        """Called after bytes on disk turned out to be damaged, from whichever thread read them, without the lock."""
        if recording is not None:
            self._adopt(recording)

    def _adopt(self, recording: Recording) -> None:
        """Take over what a loaded recording holds."""
        if recording.size is not None:
            self._state.sized(recording.size)
        for start, stop in recording.present():
            self._state.received(start, stop)

    # What is known

    @property
    def size(self) -> int | None:
        return self._state.size

    @property
    def buffered(self) -> int:
        """Bytes present, wherever they rest."""
        return self._state.present.total

    @property
    def memory(self) -> int:
        """Bytes of memory pieces held."""
        return self._store.memory

    @property
    def complete(self) -> bool:
        with self._lock:
            return self._state.complete

    @property
    def failure(self) -> StreamfsError | None:
        return self._state.doomed or self._state.failure

    @property
    def damaged(self) -> bool:
        """Whether some bytes are damaged for good."""
        return bool(self._state.damaged)

    @property
    def doomed(self) -> bool:
        return self._state.doomed is not None

    @property
    def recording(self) -> Recording | None:
        return self._store.recording

    @property
    def growing(self) -> bool:
        """Whether somebody brings bytes."""
        return self._writers > 0

    @property
    def waiting(self) -> int:
        """Readers that wait for bytes."""
        return self._state.waiting

    def places(self) -> tuple[RangeSet, RangeSet]:
        """Copies of what rests in memory and of what rests on disk only."""
        with self._lock:
            memory = RangeSet(self._store.in_memory())
            disk = RangeSet(self._state.present)
        for start, stop in memory:
            disk.discard(start, stop)
        return memory, disk

    def is_waited_for(self, start: int, stop: int | None) -> bool:
        with self._lock:
            return self._state.is_waited_for(start, stop)

    def first_gap(self, start: int) -> int | None:
        """The first missing byte at or after `start`; None where everything up to a known size is there."""
        with self._lock:
            end = self._state.present.run_end(start)
            return None if self._state.size is not None and end >= self._state.size else end

    def next_present(self, start: int) -> int | None:
        """The first present byte at or after `start`."""
        with self._lock:
            return self._state.present.next_start(start)

    def missing(self, offset: int, size: int) -> int | None:
        """The first byte that a read would miss; None where it could be answered. Raises as `look`."""
        with self._lock:
            return self._state.want(offset, size).missing

    def available(self, offset: int, size: int) -> int:
        """How many of `size` bytes from `offset` can be read at once."""
        with self._lock:
            return self._state.available(offset, size)

    # Reading

    def view(self, offset: int, size: int) -> memoryview | None:
        """What `look` gives where that is, not empty, in one piece of memory; None: ask that. Most reads end here."""
        with self._lock:
            state, stop = self._state, offset + size
            if state.doomed is not None or offset < state.floor:
                return None
            if state.size is not None and stop > state.size:
                stop = state.size
            return self._store.view(offset, stop) if offset < stop else None

    def look(self, offset: int, size: int) -> memoryview | Gathered | Missing:
        """Read without waiting. Either a view of `size` bytes (fewer only at the proven end), or a Gathered whose
        disk part is still to be read (`settle`), or the first Missing byte.

        The view is good only as long as `Store.view` says: on the thread that fills pieces, until its next
        await. Others use `read`. Raises the stream's failure, OutsideWindow, Damaged, Closed, SourceChanged.
        """
        with self._lock:
            return self._look(offset, size)

    def _look(self, offset: int, size: int) -> memoryview | Gathered | Missing:
        stop, missing = self._state.want(offset, size)
        if missing is not None:
            return Missing(missing)
        if stop <= offset:
            return memoryview(b"")
        view = self._store.view(offset, stop)
        return view if view is not None else self._store.gather(offset, stop)

    def settle(self, gathered: Gathered, *, wait: bool) -> memoryview | None:
        """Read the disk part of `gathered`: its bytes, or None where it would block (wait=False) or an extent was
        damaged and dropped, so that the read starts anew. To drop one waits for the disk as well."""
        try:
            return gathered.out if gathered.read_disk(wait=wait) else None
        except DamagedExtent as damage:
            if wait:
                self._drop_damaged(damage)
            return None

    def _drop_damaged(self, damage: DamagedExtent) -> None:
        with self._lock:
            recording = self._store.recording
            if recording is None:
                return
            # Another reader may have found it first, and the bytes may be here again: what the table no longer
            # names is not lost by this damage.
            dropped = recording.drop(damage.start, damage.stop)
            for extent in dropped:
                self._state.lost(extent.start, extent.stop, for_good=not self.refetchable)
        if self._disk.acquire(blocking=False):
            try:
                # An index that does not know of the damage claims bytes whose checksum tells the truth when they
                # are read, and the next append tries again.
                with suppress(OSError):
                    recording.log_drops()
            finally:
                self._disk.release()
        if dropped and self.on_damage is not None:
            self.on_damage()

    async def read_async(self, offset: int, size: int, demand: Demand | None = None) -> memoryview:
        """`size` bytes from `offset`, fewer only at the proven end; the view is good until the next await.

        For the trio thread that also fills the pieces. Raises as `look`.
        """
        while True:
            found = self.look(offset, size)
            if isinstance(found, memoryview):
                return found
            if isinstance(found, Gathered):
                view = self.settle(found, wait=False)
                if view is None:
                    del found  # while it waits for its turn it holds nothing
                    view = await self._disk_reads.run(size, partial(self._read_at_rest, offset, size))
                if view is not None:
                    return view
            elif self.refetchable and self._pool.take_fails():
                return await self._read_in_parts(offset, size, demand)
            else:
                await self.wait_async(offset, size, demand)

    def _read_at_rest(self, offset: int, size: int) -> memoryview | None:
        """A copy of what `look` gives, read from the disk where it must be: blocks. None where the read starts anew."""
        found = self.copy(offset, size)
        if isinstance(found, Gathered):
            return self.settle(found, wait=True)
        return None if isinstance(found, Missing) else memoryview(found)

    async def _read_in_parts(self, offset: int, size: int, demand: Demand | None) -> memoryview:
        """As `read_async`, while memory is so short that what is here may be dropped before the rest has come: what is
        here is taken at once, and what comes as soon as it does."""
        parts, end = bytearray(), offset + size
        whole = None if demand is None else (lambda first, _: demand(first, end))
        while (position := offset + len(parts)) < end:
            found = self.look(position, 1)
            if isinstance(found, Missing):
                await self.wait_async(position, 1, whole)
            elif isinstance(found, memoryview) and not found:
                break  # the end
            else:
                parts += await self.read_async(position, max(1, self.available(position, end - position)), demand)
        return memoryview(parts)

    async def wait_async(self, offset: int, size: int, demand: Demand | None = None) -> None:
        """Wait until something changed for a read of `size` at `offset`: then look again."""
        event = trio.Event()
        waiter = self._enlist(offset, size, _trio_wake(event))
        if waiter is None:
            return
        try:
            if demand is not None:
                demand(waiter.missing, offset + size)
            await event.wait()
        finally:
            with self._lock:
                self._state.forget(waiter)

    def _enlist(self, offset: int, size: int, wake: Callable[[], None]) -> Waiter | None:
        with self._lock:
            stop, missing = self._state.want(offset, size)
            if missing is None:
                return None
            waiter = Waiter(missing, stop, wake)
            self._state.wait(waiter)
            return waiter

    def copy(self, offset: int, size: int) -> bytes | Gathered | Missing:
        """As `look`, for any thread: the bytes are copied before anybody can refill their piece."""
        with self._lock:
            found = self._look(offset, size)
            return bytes(found) if isinstance(found, memoryview) else found

    def read_copy(self, offset: int, size: int) -> bytes | Missing:
        """As `copy`, and reads the disk part at once: blocks on it."""
        while True:
            found = self.copy(offset, size)
            if not isinstance(found, Gathered):
                return found
            view = self.settle(found, wait=True)
            if view is not None:
                return bytes(view)

    @contextmanager
    def enlisted(self, offset: int, size: int, wake: Callable[[], None]) -> Iterator[bool]:
        """Registers a waiter for the block's time; gives False where there is nothing to wait for. May raise as
        `look`. `wake` is called at most once and only signals."""
        waiter = self._enlist(offset, size, wake)
        try:
            yield waiter is not None
        finally:
            if waiter is not None:
                with self._lock:
                    self._state.forget(waiter)

    def wake_one(self) -> None:
        with self._lock:
            self._state.wake_one()

    def wake_all(self) -> None:
        with self._lock:
            self._state.wake_all()

    # Writing

    def writer(self, position: int) -> Writer:
        """Somebody who brings the bytes from `position` on. At most one writer per position."""
        with self._lock:
            self._writers += 1
        return Writer(self, position)

    def ended(self, size: int) -> None:
        """The stream's end is proven at `size`. Raises SourceFailed where that contradicts what is known."""
        with self._lock:
            self._state.sized(size)

    def fail(self, error: StreamfsError) -> None:
        """Missing bytes cannot be had: each read of some raises `error`."""
        with self._lock:
            self._state.fail(error)

    def retry(self) -> None:
        """Somebody fetches again: forget an earlier failure."""
        with self._lock:
            self._state.retry()

    def doom(self, error: StreamfsError) -> None:
        """No byte may be read any more, present or not: each read raises `error`."""
        with self._lock:
            self._state.doom(error)

    # Resting places

    def record(self, recording: Recording) -> None:
        """Give the buffer its place on disk; once."""
        with self._lock:
            if self._store.recording is not None:
                raise ValueError("this buffer has a recording already")
            self._store.recording = recording

    def move_to(self, recording: Recording) -> None:
        """Copy what rests on disk to another, empty `recording`, which has its place from then on. Reads go on
        meanwhile. Blocks; gives up where the buffer is doomed. Raises OSError; then everything is where it was."""
        with self._disk:
            with self._lock:
                old = self._store.recording
                extents = old.extents(0, 1 << 63) if old is not None else []
            for extent in extents:
                assert old is not None
                if self.doomed:
                    return
                out = memoryview(bytearray(extent.stop - extent.start))
                try:
                    old.read([extent], out, wait=True)
                except DamagedExtent as damage:
                    self._drop_damaged(damage)
                else:
                    recording.publish(recording.append([(extent.start, out)]))
            with self._lock:
                if self._closed or self._store.recording is not old:
                    return
                lost = recording.present()  # readers may have found damage meanwhile
                for start, stop in [] if old is None else old.present():
                    lost.discard(start, stop)
                for start, stop in lost:
                    recording.drop(start, stop)
                self._store.recording = recording

    def spill(self, most: int = SPILL_BATCH, *, all_of_it: bool = False) -> int:
        """Move about `most` bytes from memory to the recording, in whole pieces: up to a piece more. Returns how many
        moved, 0 where nothing can. What a writer is filling stays, unless `all_of_it`; what it fills at this moment
        stays even then.

        Blocks on the disk and on another thread that spills: call it from a worker thread. Reads go on meanwhile.
        Raises OSError; then the bytes stay in memory.
        """
        with self._disk:
            return self._spill(most, all_of_it=all_of_it)

    def _spill(self, most: int, *, all_of_it: bool, lent: bool = False) -> int:
        """Under `_disk`."""
        with self._lock:
            recording = self._store.recording
            if recording is None:
                return 0
            recording.expected = self._state.size
            segments = self._store.take_spillable(most, all_of_it=all_of_it, lent=lent)
            runs = [(s.start, s.content(s.start, s.stop)) for s in segments]
        if not segments:
            return 0
        try:
            extents = recording.append(runs)
        except BaseException:
            with self._lock:
                self._store.not_spilled(segments)
            raise
        counts = [len(view) for _, view in runs]
        del runs  # no view outlives its piece
        with self._lock:
            self._store.spilled(list(zip(segments, counts, strict=True)), extents)
        return sum(counts)

    def trim(self, floor: int) -> None:
        """What lies before `floor` has left the window: readers there raise OutsideWindow, memory and disk space go
        back, whole pieces and blocks only. Blocks on the disk: call it from a worker thread. Raises OSError."""
        with self._disk:
            with self._lock:
                self._state.raise_floor(floor)
                self._store.drop_before(floor)
                recording = self._store.recording
                past = recording.forget_before(floor) if recording is not None else 0
            if recording is not None:
                recording.punch(past)

    @property
    def has_ahead(self) -> bool:
        """Whether the recording takes disk space for bytes that are still to come."""
        with self._lock:
            recording = self._store.recording
            return recording is not None and recording.unused() is not None

    def give_back_ahead(self) -> None:
        """Give disk space back that was taken for bytes to come, unless somebody brings them. Blocks on the disk: call
        it from a worker thread. Raises OSError."""
        with self._disk:
            with self._lock:
                recording = self._store.recording
                unused = None if recording is None or self._writers else recording.unused()
            if recording is not None and unused is not None:
                recording.give_back_ahead(*unused)

    @property
    def reclaimable(self) -> bool:
        """Whether some bytes rest on disk that the source can give again."""
        recording = self._store.recording
        return self.refetchable and recording is not None and not recording.empty

    def reclaim(self, most: int) -> int:
        """Give back the disk space of about `most` bytes, lowest offsets first, without keeping them anywhere; returns
        how many. Only where the source can give them again. Blocks on the disk: call it from a worker thread. Raises
        OSError where the index cannot be written; the bytes are gone even then."""
        with self._disk:
            with self._lock:
                recording = self._store.recording
                if recording is None or not self.refetchable:
                    return 0
                dropped = recording.drop_first(most)
                for extent in dropped:
                    self._state.present.discard(extent.start, extent.stop)
            recording.log_drops()
            recording.release(dropped)
        return sum(extent.stop - extent.start for extent in dropped)

    def forget_memory(self, most: int = SPILL_BATCH, *, all_of_it: bool = False) -> int:
        """Drop about `most` bytes from memory, in whole pieces, without writing them anywhere; returns how many. Only
        where the source can give them again: what arrived first, as readers are done with that before the rest.
        `all_of_it`: as for `spill`."""
        if not self.refetchable:
            return 0
        with self._lock:
            segments: list[Segment] = self._store.take_spillable(most, all_of_it=all_of_it, oldest=True)
            for segment in segments:
                self._state.present.discard(segment.start, segment.stop)
            self._store.drop_memory(segments)
        return sum(s.filled for s in segments)

    def settle_for_good(self) -> None:
        """Write everything to the recording and make it durable. Blocks. The buffer must be complete and must
        have a recording. Raises OSError, or ValueError where it is not complete; what an earlier run left without
        making it durable is read and checked first, so that it may turn out not to be."""
        recording = self.recording
        if recording is not None and recording.suspect:
            self.verify()
            if self.doomed:
                raise ValueError("the buffer was given up before all of it was checked")
            recording.suspect = False
        with self._disk:
            recording, size = self._settled(spilled=False)
            while self._spill(SPILL_BATCH, all_of_it=True, lent=True):
                pass
            self._settled(spilled=True)
            recording.flush(lambda: self.doomed)
            if self.doomed:
                raise ValueError("the buffer was given up before it was durable")
            recording.complete(size)

    def _settled(self, *, spilled: bool) -> tuple[Recording, int]:
        with self._lock:
            size, recording = self._state.size, self._store.recording
            if size is None or not self._state.complete or recording is None or (spilled and not self._store.empty):
                raise ValueError("only a complete buffer with a recording can be settled")
            return recording, size

    def verify(self) -> tuple[int, list[tuple[int, int]]]:
        """Read every block on disk; damaged ones are dropped, as when a reader finds them. Blocks. Gives how many
        there were, and the (start, stop) of the damaged. Ends early where the buffer is doomed meanwhile: the end of
        the daemon does not wait for gigabytes."""
        with self._lock:
            recording = self._store.recording
            extents = recording.extents(0, 1 << 63) if recording is not None else []
        damaged: list[tuple[int, int]] = []
        for count, extent in enumerate(extents):
            assert recording is not None
            if self.doomed:
                return count, damaged
            out = memoryview(bytearray(extent.stop - extent.start))
            try:
                recording.read([extent], out, wait=True)
            except DamagedExtent as damage:
                self._drop_damaged(damage)
                damaged.append((damage.start, damage.stop))
        return len(extents), damaged

    def close(self) -> None:
        """Give memory back and drop the recording's descriptors. Every read raises Closed from now on."""
        with self._lock:
            if self._state.doomed is None:
                self._state.doom(Closed("the buffer is closed"))
            self._closed = True
            self._state.wake_all()
            if self._writers == 0:
                self._store.clear()
            self._store.recording = None


class Writer:
    """Brings the bytes of one run, in order. Used by one task or thread at a time; close it."""

    def __init__(self, buffer: Buffer, position: int) -> None:
        self._buffer = buffer
        self._closed = False
        self._segment: Segment | None = None  # GUARDED_BY the buffer's _lock
        self._overtaken = False
        self.start = position
        self.position = position

    @property
    def needs_piece(self) -> bool:
        """Whether the next byte needs another piece of memory."""
        segment = self._segment
        return segment is None or segment.sealed

    def room(self, *, beyond: bool = False) -> memoryview | None:
        """Memory for the next bytes, at least one. None where the pool is spent: make room, then ask again, or go
        `beyond` its budget by one small piece.

        The view ends where bytes that are present begin, and at the size; `met` tells when there is none, and the
        view is empty then. Raises Closed, or what else doomed the buffer, once nothing can be read any more.
        """
        buffer = self._buffer
        with buffer._lock:
            if buffer._state.doomed is not None:
                raise again(buffer._state.doomed)
            limit = self._limit()
            if self._overtaken or (limit is not None and limit <= self.position):
                return memoryview(b"")
            segment = buffer._store.room(self._segment, self.position, self.position - self.start, beyond=beyond)
            if segment is None:
                return None
            self._segment = segment
            room = memoryview(segment.piece)[segment.base + segment.filled : segment.capacity]
            return room if limit is None else room[: limit - self.position]

    def _limit(self) -> int | None:
        """Where this writer's bytes are no longer wanted: at present ones, and at the size."""
        limit, size = self._buffer._state.present.next_start(self.position), self._buffer._state.size
        return limit if size is None or (limit is not None and limit < size) else size

    @property
    def met(self) -> bool:
        """Whether the next byte is there already, or is past the known size: nothing is left to bring here."""
        with self._buffer._lock:
            limit = self._limit()
            return self._overtaken or (limit is not None and limit <= self.position)

    def wrote(self, count: int) -> None:
        """The first `count` bytes of `room` are filled: they are present from now on, and who waits is woken.

        Where somebody else brought some of them meanwhile, only those before that count, and this writer has `met`
        them for good: what it was given is past its position.
        """
        buffer = self._buffer
        with buffer._lock:
            if self._segment is None:
                raise ValueError("there was no room to write to")
            limit = self._limit()
            if limit is not None and self.position + count > limit:
                count, self._overtaken = max(0, limit - self.position), True
            buffer._store.wrote(self._segment, count)
            start = self.position
            self.position += count
            buffer._state.received(start, self.position)

    @property
    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Nothing more comes from here. Safe to call again."""
        if self._closed:
            return
        self._closed = True
        buffer = self._buffer
        with buffer._lock:
            if self._segment is not None:
                buffer._store.leave(self._segment)
                self._segment = None
            buffer._writers -= 1
            if buffer._closed and buffer._writers == 0:
                buffer._store.clear()

    def append(self, data: memoryview, make_room: Callable[[], None]) -> None:
        """Bring all of `data`, copying. `make_room` is called, without the lock, while the pool is spent; it
        raises where no room can be made. Raises SourceFailed where `data` goes past the known size. For a buffer's
        only writer: raises ValueError where it meets bytes that somebody else brought."""
        while data:
            view = self.room()
            if view is None:
                make_room()
                continue
            if not view:
                size = self._buffer.size
                if size is None or self.position < size:
                    raise ValueError(f"byte {self.position} is there already")
                raise SourceFailed(f"the source sent more than the {size} bytes that were declared")
            count = min(len(view), len(data))
            view[:count] = data[:count]
            self.wrote(count)
            data = data[count:]


def _trio_wake(event: trio.Event) -> Callable[[], None]:
    """A wake that works from the event's own trio thread and from any other."""
    token = trio.lowlevel.current_trio_token()

    def wake() -> None:
        if trio.lowlevel.in_trio_run() and trio.lowlevel.current_trio_token() is token:
            event.set()
        else:
            with suppress(trio.RunFinishedError):  # then nobody waits any more
                token.run_sync_soon(event.set)

    return wake
