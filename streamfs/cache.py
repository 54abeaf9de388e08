"""What is kept and what goes: the memory budget, the disk quota, least recently used first, time to live, persist.

One task (`Cache.run`) moves bytes from memory to disk and evicts; everybody else only asks it (`grew`, `memory`).
Everything here runs in the trio thread; disk work goes to worker threads of its own limiters, so that a disk that hangs
holds up nobody but those who wait for it.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from streamfs import descriptors
from streamfs.engine.buffer import SPILL_BATCH, Buffer
from streamfs.engine.diskreads import DiskReads
from streamfs.engine.pool import LARGE, Pool
from streamfs.engine.recording import Header, Recording, disk_bytes, unlink_recording
from streamfs.errors import Damaged, NoSpace, told
from streamfs.home import recording_name, recording_of
from streamfs.news import News

log = logging.getLogger(__name__)

BACKLOG = 32 * 1024 * 1024
"""Bytes one stream may hold in memory past the spill threshold while the disk catches up, however short memory is: a
guess at what smooths a disk's pauses without starving other streams. Half of what is free it may hold in any case."""
ROOMY, ROOMY_FOR = 4 << 30, 0.25
"""A disk that had ROOMY bytes to spare is not asked again for so many seconds, in which no disk takes as much: each
question is a hop to a thread, and would come once for every step of spilling."""
ROOMY_CACHE = 256 * 1024 * 1024
"""A quota of so many bytes is not felt where a step takes LARGE_BATCH."""
LARGE_BATCH = 32 * 1024 * 1024
"""Most bytes of one step of spilling where the disk is behind: each costs turns of trio, in which the disk rests."""
FREE_FLOOR = 64 * 1024 * 1024
"""Bytes the cache leaves free on its file system, so that it is never the one that fills the disk to the brim."""
DISK_RETRY = 5.0
"""Seconds after which a cache directory that took no bytes is tried again."""
DISK_PATIENCE = 120.0
"""Seconds without an answer of the disk, after which who waits for memory is told that it hangs. A disk that is only
slow may be syncing gigabytes meanwhile."""
_STEP = SPILL_BATCH + LARGE  # most bytes one step of spilling takes on disk
_TRIM_STEP = 16 * 1024 * 1024  # bytes given back to the system between two turns of others
_TTL_CHECKS = 4  # per time to live
_TTL_CHECK_EVERY = 15.0  # seconds, at most, between two looks: streams may have shorter times than the mount's
_TTL_SHARE = 50  # a look that took a second is followed by so many without one

T = TypeVar("T")


class _DiskHangs(Exception):
    """What would make room does not come to its end."""


class Cached(Protocol):
    """A generation, as the cache needs to know it."""

    stream_id: int
    number: int
    buffer: Buffer
    used: float
    """When it was last read, by time.monotonic()."""

    @property
    def header(self) -> Header: ...

    @property
    def windowed(self) -> bool:
        """Whether its past is given back as it goes on."""

    @property
    def in_use(self) -> bool:
        """Whether a handle or a persisting fetch holds it."""

    @property
    def kept(self) -> bool:
        """Whether the user asked to persist it."""

    @property
    def passed(self) -> int:
        """What lies before this offset is behind everybody who reads it."""

    def drop(self) -> None:
        """Forget it: close its buffer and let go of it."""


@dataclass(slots=True)
class _Dormant:
    """A recording of an earlier run that nobody has opened yet."""

    path: Path
    bytes: int
    used: float


class Cache:
    """All cached bytes of one daemon. `directory` must exist and be private."""

    def __init__(
        self,
        directory: Path,
        *,
        memory: int,
        spill_threshold: int,
        size: int | None,
        ttl: float,
        is_kept: Callable[[int], bool],
        ttl_of: Callable[[int], float | None] = lambda _: None,
    ) -> None:
        """`memory`, `spill_threshold`, `size` in bytes (size None: as much as the disk has), `ttl` in seconds.
        `is_kept` tells whether a stream, by id, is persisted, `ttl_of` its own time to live, None where it has none."""
        self.directory = directory
        self.spill_threshold = spill_threshold
        self.size = size
        self.ttl = ttl
        self._disk_error: str | None = None
        self.pool = Pool(memory, on_give=self._gave)
        self.disk_reads = DiskReads()
        self.news = News()
        """What happens to the streams, for whoever shows it."""
        self._is_kept = is_kept
        self._ttl_of = ttl_of
        self._generations: dict[Cached, int] = {}  # with the bytes each takes on disk
        self._disowned: set[Cached] = set()  # INVARIANT: of `_generations`
        self._resting: set[Cached] = set()  # they have disk space to give back
        self._dormant: dict[int, _Dormant] = {}
        self._numbers: dict[int, int] = {}  # the highest generation of each stream that `scan` met
        self._wanted = trio.Event()  # wakes `run`
        self._moved = trio.Event()  # wakes who waits for memory; replaced at each use
        self._begun = self._done = 0  # passes of `run`
        self._roomy_until = 0.0  # by time.monotonic()
        self._promised = 0  # bytes that may be written now, and are not measured yet
        self._promising = trio.Lock()
        self._refusals = 0  # how often the disk took nothing
        self._excess = False  # more may be on disk than is allowed
        self._stuck = 0  # counts passes of `run` that found nothing to move for those who wait
        self._waiting = 0  # fetches that wait for memory
        self._hangs = False  # a step of `run` has not ended for DISK_PATIENCE
        self._watching = 0  # tasks that wait for `_moved`
        self._asked = 0  # how often one began to
        self._sharing = 0  # fetches that wait until others have their share
        self._moves = 0  # steps that took bytes out of memory
        self._doomed: deque[Recording | Path] = deque()  # to be removed; the first may be under way
        self._came_to_remove = trio.Event()  # wakes the task that removes; replaced each time
        self._removed = trio.Event()  # set when none is left to remove; replaced when there is
        self._threads = trio.CapacityLimiter(2)
        self._remover = trio.CapacityLimiter(1)
        self._creating = trio.Lock()
        self._token: trio.lowlevel.TrioToken | None = None

    @property
    def disk_error(self) -> str | None:
        """Why the cache directory cannot take bytes now; None while it can."""
        return self._disk_error

    @disk_error.setter
    def disk_error(self, error: str | None) -> None:
        if error != self._disk_error:
            self._disk_error = error
            self.news.wake()
            for generation in self._generations:
                self.news.touch(generation.stream_id)  # some of them say so

    # Members

    def scan(self, known: Iterable[int]) -> None:
        """Find the recordings of earlier runs; remove those of streams that are not `known`. Blocks; raises OSError."""
        ids = set(known)
        newest: dict[int, tuple[int, Path]] = {}
        with os.scandir(self.directory) as listing:
            entries = list(listing)
        for entry in entries:
            path = Path(entry.path)
            named = recording_of(entry.name)
            if named is None:
                is_index = path.suffix == ".index" and recording_of(path.stem) is not None
                if is_index and not path.with_suffix("").exists():
                    path.unlink(missing_ok=True)  # a power cut took the data's name alone
                continue
            stream_id, number = named
            if not path.with_name(path.name + ".index").exists():
                unlink_recording(path)  # it was being made or removed: it must not stand for a whole one
                continue
            older = newest.get(stream_id)
            if stream_id not in ids:
                unlink_recording(path)
            elif older is None or number > older[0]:
                newest[stream_id] = (number, path)
                if older is not None:
                    unlink_recording(older[1])
            else:
                unlink_recording(path)
        now, wall = time.monotonic(), time.time()
        for stream_id, (number, path) in newest.items():
            self._numbers[stream_id] = number
            age = max(0.0, wall - path.stat().st_mtime)
            self._dormant[stream_id] = _Dormant(path, disk_bytes(path), now - age)
        while self.size is not None and self.disk_used > self.size and self._evict_one():
            pass  # the limit may be another than that of the earlier run

    def has_dormant(self, stream_id: int) -> bool:
        return stream_id in self._dormant

    def last_number(self, stream_id: int) -> int:
        """The highest generation of the stream that earlier runs left on disk; 0 where there was none."""
        return self._numbers.get(stream_id, 0)

    def last_used(self, stream_id: int) -> float:
        """When the recording that an earlier run left for the stream was last used, by time.monotonic(); -inf where
        there is none."""
        dormant = self._dormant.get(stream_id)
        return float("-inf") if dormant is None else dormant.used

    async def wake_dormant(self, stream_id: int, key: str) -> Recording | None:
        """The recording an earlier run left for the stream, if it is of the source `key`; it is the caller's now.
        Raises Damaged where there was one that cannot be read at all, and is gone now; TooManyFiles."""
        if stream_id in self._dormant:
            await self.spare_descriptors()
        dormant = self._dormant.get(stream_id)
        if dormant is None:
            return None
        try:
            # Until it is loaded it stays where it is: a reader that gives up must not make it be forgotten.
            recording = await trio.to_thread.run_sync(Recording.load, dormant.path, limiter=self._threads)
            if self._dormant.get(stream_id) is not dormant:
                return None  # evicted meanwhile
            del self._dormant[stream_id]
            if recording is None or recording.header.key != key:
                self.discard(dormant.path)
            if recording is None:
                log.warning("the recording %s has no index that can be read: it was dropped", dormant.path)
                raise Damaged("its recording had no index that could be read, and was dropped")
            if recording.header.key != key:
                return None
        except OSError as error:
            if error.errno in descriptors.SPENT:
                raise descriptors.too_many() from error  # nothing is wrong with it
            log.warning("cannot read the recording %s: %s", dormant.path, error)
            self._dormant.pop(stream_id, None)
            return None
        return recording

    def forget_dormant(self, stream_id: int) -> None:
        dormant = self._dormant.pop(stream_id, None)
        if dormant is not None:
            self.discard(dormant.path)

    def enter(self, generation: Cached) -> None:
        """Look after a generation's bytes from now on."""
        self._generations[generation] = _disk_bytes(generation)

    def leave(self, generation: Cached, *, unlink: bool = True) -> None:
        """The generation is gone; its recording too, unless another run shall find it."""
        self._generations.pop(generation, None)
        self._disowned.discard(generation)
        self._resting.discard(generation)
        recording = generation.buffer.recording
        if unlink and recording is not None:
            self.discard(recording)

    def disown(self, generation: Cached) -> None:
        """The generation was evicted or removed, but somebody still reads it: from now on its bytes rest in files
        without names, so that no later run finds them."""
        if generation in self._generations:
            self._disowned.add(generation)
        if generation.buffer.recording is not None:
            self.discard(generation.buffer.recording)

    def discard(self, doomed: Recording | Path) -> None:
        """Remove a recording, in a worker thread: a large one takes the disk a while. `removed` waits for it."""
        self._doomed.append(doomed)
        if self._token is None:
            _remove_all(self._doomed)  # before and after `run` nobody is held up
            return
        if self._removed.is_set():
            self._removed = trio.Event()
        self._came_to_remove.set()

    async def removed(self) -> None:
        """Wait until everything that was discarded is gone from the disk."""
        while self._doomed:
            await self._removed.wait()

    async def _remove(self) -> None:
        while True:
            await self._came_to_remove.wait()
            self._came_to_remove = trio.Event()
            await trio.to_thread.run_sync(_remove_all, self._doomed, limiter=self._remover)
            if not self._doomed:
                self._removed.set()

    @property
    def disk_used(self) -> int:
        """Bytes on disk of everything that may be evicted."""
        loaded = sum(size for generation, size in self._generations.items() if not generation.kept)
        return loaded + sum(d.bytes for stream_id, d in self._dormant.items() if not self._is_kept(stream_id))

    # What fetches ask

    async def spare_descriptors(self) -> None:
        """Call before a source or a recording is opened: where descriptors are short, cached bytes that nobody uses
        give theirs back, those used least recently first. Raises TooManyFiles where that does not help."""
        while descriptors.are_short():
            loaded = [g for g, size in self._generations.items() if size and not g.in_use and not g.kept]
            oldest = min(loaded, key=lambda g: g.used, default=None)
            if oldest is None:
                raise descriptors.too_many()
            oldest.drop()
            await self.removed()  # its files are closed only then

    def grew(self, generation: Cached) -> None:
        """Call after a fetch brought bytes: starts spilling past the threshold."""
        if generation.buffer.memory > self.spill_threshold:
            self._wanted.set()

    def rests(self, generation: Cached) -> None:
        """Call when nothing fetches any more: the disk space that was taken for bytes to come is given back."""
        if generation.buffer.has_ahead:
            self._resting.add(generation)
            self._wanted.set()

    def released(self) -> None:
        """Call when something may go that had to stay: its last reader has left, or it is not persisted any more."""
        if self._excess:
            self._wanted.set()

    def recount(self) -> None:
        """Call when what counts has changed: more may be on disk now than is allowed."""
        self._excess = True
        self._wanted.set()

    def is_ready(self, generation: Cached) -> bool:
        """Whether `ready` would not wait."""
        return generation.buffer.memory <= self._most_in_memory() or self.disk_error is not None

    async def ready(self, generation: Cached) -> None:
        """Wait while the generation's backlog of bytes to spill is too long. Ends when the disk has caught up, or has
        turned out not to take more, or to hang."""
        while not self.is_ready(generation):
            try:
                await self._wait_for_move()
            except _DiskHangs:
                return

    def _most_in_memory(self) -> int:
        return self.spill_threshold + max(BACKLOG, (self.pool.budget - self.pool.used) // 2)

    def is_scarce_for(self, generation: Cached) -> bool:
        """Whether the next piece of memory should be others': what cannot be had again, and therefore goes nowhere but
        to disk, leaves a quarter of all, or three pieces, where it is past its threshold; an eighth, or two, where the
        disk takes nothing. That is enough for those who can give back what they hold."""
        if generation.buffer.refetchable or self.pool.used + LARGE <= self.pool.budget // 2:
            return False
        if generation.buffer.memory > self.spill_threshold:
            return self._stays_over(4, 3)
        return self.disk_error is not None and self._stays_over(8, 2)

    def _stays_over(self, parts: int, pieces: int) -> bool:
        """Whether another piece of what cannot be had again would leave others less than one of so many parts of the
        memory, or less than so many pieces."""
        others = min(max(self.pool.budget // parts, pieces * LARGE), self.pool.budget // 2)
        return sum(map(_memory_for_good, self._generations)) + LARGE > self.pool.budget - others

    async def share(self, generation: Cached) -> None:
        """Call where memory `is_scarce_for` it: waits until it is not. Raises NoSpace where nothing can be moved: one
        stream must not take the last piece from all."""
        self._sharing += 1
        try:
            while self.is_scarce_for(generation):
                moves = self._moves
                await self._whole_pass()
                if self._moves == moves and self.is_scarce_for(generation) and not self._evict_memory():
                    raise self._no_room()
        except _DiskHangs:
            raise self._no_room() from None
        finally:
            self._sharing -= 1

    async def _whole_pass(self) -> None:
        """Wait until `run` has tried everything, from now on."""
        target = self._begun + 1
        while self._done < target:
            self._wanted.set()
            await self._until_moved()

    async def memory(self, generation: Cached) -> bool:
        """Wait until the pool may have a piece again. Where nothing can be moved or dropped, a generation whose bytes
        can be had again may go beyond the budget by one small piece (True), as all that is in memory of its kind is
        being received just now; for others raises NoSpace. Where the disk hangs, it goes on in what it has itself, or
        raises NoSpace where that cannot be had again."""
        self._waiting += 1
        self._asked += 1
        try:
            if not await self._wait_for_move():
                return False
            if generation.buffer.refetchable:
                return True
            raise self._no_room()
        except _DiskHangs:
            if generation.buffer.forget_memory(LARGE, all_of_it=True):
                return False  # it goes on in what it has itself
            raise self._no_room() from None
        finally:
            self._waiting -= 1

    def _no_room(self) -> NoSpace:
        return NoSpace(f"no room for more bytes of this stream: {self.disk_error or 'everything in memory is in use'}")

    async def _wait_for_move(self) -> bool:
        """Wait until something was moved; True: `run` found that nothing can be."""
        stuck = self._stuck
        self._wanted.set()
        await self._until_moved()
        return self._stuck != stuck

    async def _until_moved(self) -> None:
        """Raises _DiskHangs."""
        self._watching += 1
        try:
            with trio.move_on_after(0.0 if self._hangs else DISK_PATIENCE) as patience:
                await self._moved.wait()
        finally:
            self._watching -= 1
        if patience.cancelled_caught:
            self._hangs = True
            self.disk_error = self.disk_error or f"the disk of {self.directory} does not answer"
            raise _DiskHangs

    def _gave(self) -> None:
        # The pool calls this from whichever thread gave pieces back. To wake trio costs more than all else here, so it
        # is left out while nobody waits. Who begins to wait meanwhile has asked for a pass, and its end is announced.
        if self._token is not None and self._watching:
            self._token.run_sync_soon(self._announce, idempotent=True)

    def _step_ended(self) -> None:
        self._hangs = False
        self._announce()

    def _announce(self) -> None:
        moved, self._moved = self._moved, trio.Event()
        moved.set()

    async def trim(self, generation: Cached, floor: int) -> None:
        """What lies before `floor` has left the generation's window. Never raises OSError: `disk_error` tells."""
        try:
            await self._on_disk(generation, lambda: generation.buffer.trim(floor))
        except OSError as error:
            self._disk_failed(error)

    async def settle(self, generation: Cached) -> None:
        """Write all of a complete generation to disk and make it durable. Raises NoSpace, and where the generation is
        complete no more what took its bytes away."""
        try:
            lost = await self._has_lost_its_names(generation)
            async with self._room_to_settle(generation, _disk_bytes(generation) if lost else 0):
                if lost:
                    await self._move(generation)
                await self._give_recording(generation, 0)  # its size is known by now
                await self._on_disk(generation, generation.buffer.settle_for_good)
        except OSError as error:
            self._disk_failed(error)
            raise NoSpace(f"cannot keep the stream in {self.directory}: {error.strerror}") from error
        except ValueError as error:
            failure = generation.buffer.failure or Damaged("cached bytes were lost while they were kept")
            raise told(failure) from error

    async def is_in_place(self, generation: Cached) -> bool:
        """Whether the names of a generation's recording, if it has one, still lead to it: somebody may have deleted
        the cache directory. Where that cannot be told, they do."""
        try:
            return not await self._has_lost_its_names(generation)
        except OSError:
            return True

    async def _has_lost_its_names(self, generation: Cached) -> bool:
        """Raises OSError."""
        recording = generation.buffer.recording
        if recording is None or generation in self._disowned:
            return False
        try:
            await trio.to_thread.run_sync(recording.check_names, limiter=self._threads)
        except (FileNotFoundError, NotADirectoryError):
            return True
        return False

    async def _move(self, generation: Cached) -> None:
        """Give what rests in files without names a recording that has them. Raises OSError."""
        async with self._creating:
            path = self.directory / recording_name(generation.stream_id, generation.number)
            new = await trio.to_thread.run_sync(Recording.create, path, generation.header, limiter=self._threads)
            try:
                await self._on_disk(generation, lambda: generation.buffer.move_to(new))
            finally:
                is_taken = generation.buffer.recording is new and generation in self._generations
                if not is_taken or generation in self._disowned:
                    self.discard(new)

    async def _on_disk(self, generation: Cached, work: Callable[[], T]) -> T:
        """Do disk work of a generation in a worker thread; what it takes on disk is measured after it, even where it
        failed. Raises as `work`."""
        measured: list[int] = []

        def measuring() -> T:
            try:
                return work()
            finally:
                measured.append(_disk_bytes(generation))

        try:
            return await trio.to_thread.run_sync(measuring, limiter=self._threads)
        finally:
            if measured and generation in self._generations:
                self._generations[generation] = measured[-1]
            self.news.touch(generation.stream_id)

    # The one task

    async def run(self) -> None:
        """Move bytes to disk as memory asks for it; evict what has outlived its time. Runs until cancelled."""
        self._token = trio.lowlevel.current_trio_token()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._expire)
                nursery.start_soon(self._remove)
                while True:
                    with trio.move_on_after(DISK_RETRY if self.disk_error is not None else float("inf")) as patience:
                        await self._wanted.wait()
                    self._wanted = trio.Event()
                    await self._pass(retry=patience.cancelled_caught)
        finally:
            self._token = None
            _remove_all(self._doomed)

    async def _pass(self, *, retry: bool) -> None:
        self._begun += 1
        refusals, failed = self._refusals, self.disk_error is not None
        try:
            await self._make_room()
            if retry and self.disk_error is not None and self._refusals == refusals:
                await self._try_disk()
            if failed and self.disk_error is None:
                self._wanted.set()  # what was tried before it served again has its turn
        except Exception:
            # A defect here must end neither the daemon nor the wait of whoever asked for memory.
            log.exception("making room failed in an unforeseen way")
            self._stuck += 1
        self._done = self._begun
        self._step_ended()

    async def _try_disk(self) -> None:
        """Nothing had to be written: see whether the directory takes bytes again."""
        try:
            await trio.to_thread.run_sync(_write_a_little, self.directory, limiter=self._threads)
        except OSError as error:
            self._disk_failed(error)
        else:
            if await self._fits(_STEP, counted=True):
                self.disk_error = None

    async def _make_room(self) -> None:
        if self._excess:
            await self._keep_within()
        tried: set[Cached] = set()
        moved, asked = False, self._asked
        while True:
            generation = self._heaviest(tried)
            if generation is None:
                break
            if await self._shrink(generation):
                moved = True
                self._moves += 1
            else:
                tried.add(generation)
            self._step_ended()
        await self._give_back_ahead()
        # Where there is memory now, those who wait have not seen it yet, and come back if it is not enough; for those
        # who asked meanwhile, everything is tried once more.
        helped = moved or asked != self._asked or not self.pool.take_fails()
        if self._waiting and not helped and not self._evict_memory():
            self._stuck += 1

    async def _give_back_ahead(self) -> None:
        while self._resting:
            generation = self._resting.pop()
            try:
                await self._on_disk(generation, generation.buffer.give_back_ahead)
            except OSError as error:
                self._disk_failed(error)

    async def _keep_within(self) -> None:
        """Take back what is on disk past the limit: it counts anew, or had to stay until now."""
        while not await self._fits(0, counted=True):
            if not self._evict_one() and not await self._reclaim():
                return  # until somebody closes what is open
        self._excess = False

    def _heaviest(self, tried: set[Cached]) -> Cached | None:
        """Who gives memory next: the one with the most, if it is past its threshold or somebody waits for memory."""
        everybody = bool(self._waiting) and self.pool.take_fails()
        for_good = bool(self._sharing) and self._stays_over(4, 3)

        def gives(g: Cached) -> bool:
            pressed = everybody or (for_good and not g.buffer.refetchable)
            return g not in tried and g.buffer.memory > (0 if pressed else self.spill_threshold)

        return max(filter(gives, self._generations), key=lambda g: g.buffer.memory, default=None)

    async def _shrink(self, generation: Cached) -> bool:
        """Move some of the generation's bytes out of memory; False where none could be."""
        pressed = bool(self._waiting) and self.pool.take_fails()
        sealing = pressed or (bool(self._sharing) and not generation.buffer.refetchable)
        most = self._batch(generation)  # it may grow while room is made
        try:
            async with self._room_to_spill(generation, most + LARGE) as ahead:
                if ahead is not None:
                    await self._give_recording(generation, ahead)
                    moved = await self._on_disk(generation, lambda: self._spill(generation.buffer, most, sealing))
                    if moved:
                        self.disk_error = None
                    return moved > 0
        except OSError as error:
            self._disk_failed(error)
        # Without a disk memory serves as long as there is some, and gives no more than it takes: readers may be
        # waiting for the rest.
        return pressed and generation.buffer.forget_memory(LARGE, all_of_it=True) > 0

    def _batch(self, generation: Cached) -> int:
        """Bytes for one step of spilling. More go at once where the disk is behind, though not all, so that a fetch
        goes on meanwhile; but not where so many would matter to the quota or the disk."""
        behind = generation.buffer.memory - self.spill_threshold
        roomy = time.monotonic() < self._roomy_until and (self.size is None or self.size >= ROOMY_CACHE)
        most = max(SPILL_BATCH, min(behind // 2, LARGE_BATCH)) if roomy else SPILL_BATCH
        return min(generation.buffer.memory, most)

    @staticmethod
    def _spill(buffer: Buffer, most: int, sealing: bool) -> int:
        return buffer.spill(most) or (buffer.spill(most, all_of_it=True) if sealing else 0)

    async def _give_recording(self, generation: Cached, ahead: int) -> None:
        """Raises OSError."""
        if generation.buffer.recording is None:
            async with self._creating:  # two of one name would take each other's files away
                if generation.buffer.recording is None and not generation.buffer.doomed:
                    await self._create(generation)
        recording = generation.buffer.recording
        if recording is not None:
            recording.ahead = ahead
            recording.passed = generation.passed

    async def _create(self, generation: Cached) -> None:
        create, path = Recording.create, self.directory / recording_name(generation.stream_id, generation.number)
        if descriptors.are_short():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        if generation in self._disowned:
            recording = await trio.to_thread.run_sync(Recording.anonymous, self.directory, limiter=self._threads)
        else:
            recording = await trio.to_thread.run_sync(create, path, generation.header, limiter=self._threads)
        if generation in self._generations:
            generation.buffer.record(recording)
        if recording.path is not None and (generation not in self._generations or generation in self._disowned):
            self.discard(recording)  # it was evicted meanwhile

    @asynccontextmanager
    async def _room_to_spill(self, generation: Cached, step: int) -> AsyncIterator[int | None]:
        """For the block's time the quota and the disk have room for `step` more bytes, taken from others if need be,
        and nobody else is promised the same. Gives how many bytes may be allocated ahead besides; None: there is no
        room."""
        async with _held(self._promising):
            ahead = None if generation.buffer.doomed else await self._admit(generation, step)
            promised = 0 if ahead is None else step + ahead
            self._promised += promised
        try:
            yield ahead
        finally:
            self._promised -= promised

    @asynccontextmanager
    async def _room_to_settle(self, generation: Cached, besides: int) -> AsyncIterator[None]:
        """As `_room_to_spill`, for all that a kept generation has in memory, and so many bytes besides. Raises OSError
        where there is no room."""
        async with self._promising:
            while not await self._fits(promised := generation.buffer.memory + besides, counted=False):
                if not self._evict_one(besides=generation) and not await self._reclaim(besides=generation):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._promised += promised
        try:
            yield
        finally:
            self._promised -= promised

    async def _admit(self, generation: Cached, step: int) -> int | None:
        """Have room for `step` bytes. Gives how many may be allocated ahead besides; None where there is no room."""
        counted = not generation.kept
        ahead = step if generation.buffer.growing and not generation.windowed else 0
        while not await self._fits(step + ahead, counted=counted):
            if not self._evict_one(besides=generation):
                break
        else:
            return ahead
        # What could be fetched again must not take the place of what could be, too: they would go round in a circle.
        while not await self._fits(step, counted=counted):
            if (generation.buffer.refetchable and counted) or not await self._reclaim(besides=generation):
                self._refuse(step, counted=counted)
                return None
        return 0

    def _refuse(self, step: int, *, counted: bool) -> None:
        self._refusals += 1
        self.news.count("disk_error")
        if counted and self.size is not None and self.disk_used + step + self._promised > self.size:
            reason = "the cache is full and nothing in it can go"
        else:
            reason = f"the disk of {self.directory} is full and nothing in the cache can go"
        self.disk_error = self.disk_error or reason

    async def _fits(self, step: int, *, counted: bool) -> bool:
        step += self._promised
        if counted and self.size is not None and self.disk_used + step > self.size:
            return False
        await self.removed()  # what was evicted has its space back only then
        if step <= ROOMY // 2 and time.monotonic() < self._roomy_until:
            return True
        try:
            disk = await trio.to_thread.run_sync(os.statvfs, self.directory, limiter=self._threads)
        except OSError:
            return True  # writing will tell what is wrong
        free = disk.f_bavail * disk.f_frsize - step - FREE_FLOOR
        if free >= ROOMY:
            self._roomy_until = time.monotonic() + ROOMY_FOR
        return free >= 0

    async def _reclaim(self, besides: Cached | None = None) -> bool:
        """Take some disk space back from an open stream that can fetch the bytes again, the one read least recently
        first. False: there is none."""
        while True:
            giving = [
                g
                for g, size in self._generations.items()
                if size and g is not besides and not g.kept and g.buffer.reclaimable
            ]
            oldest = min(giving, key=lambda g: g.used, default=None)
            if oldest is None:
                return False
            before = self._generations[oldest]
            try:
                await self._on_disk(oldest, partial(oldest.buffer.reclaim, _STEP))
            except OSError as error:
                self._disk_failed(error)
                return False
            if self._generations.get(oldest, 0) < before:
                return True

    def _evict_one(self, besides: Cached | None = None) -> bool:
        """Drop what was not used for longest, of what takes disk and may go. False: there is nothing."""
        loaded = [
            g for g, size in self._generations.items() if size and g is not besides and not g.in_use and not g.kept
        ]
        oldest = min(loaded, key=lambda g: g.used, default=None)
        dormant = [(d.used, i) for i, d in self._dormant.items() if not self._is_kept(i)]
        sleeper = min(dormant, default=None)
        if oldest is not None and (sleeper is None or oldest.used <= sleeper[0]):
            oldest.drop()
            return True
        if sleeper is not None:
            self._evict_dormant(sleeper[1])
            return True
        return False

    def _evict_memory(self) -> bool:
        """Drop a whole unused generation for its memory. False: there is none."""
        loaded = [g for g in self._generations if g.buffer.memory and not g.in_use and not g.kept]
        oldest = min(loaded, key=lambda g: g.used, default=None)
        if oldest is not None:
            oldest.drop()
        return oldest is not None

    def _disk_failed(self, error: OSError) -> None:
        self._refusals += 1
        self.news.count("disk_error")
        text = f"the cache directory {self.directory} cannot be written: {error.strerror or error}"
        if text != self.disk_error:
            log.error("%s", text)
        self.disk_error = text
        if error.errno == errno.ENOSPC:
            self._roomy_until = 0.0
            self._evict_one()

    async def _expire(self) -> None:
        took = 0.0
        while True:
            await trio.sleep(max(min(self.ttl / _TTL_CHECKS, _TTL_CHECK_EVERY), took * _TTL_SHARE, 0.1))
            began = time.monotonic()
            try:
                self.expire(began)
                took = time.monotonic() - began
                while self.pool.trim(_TRIM_STEP):
                    await trio.lowlevel.checkpoint()
            except Exception:  # a defect in one generation's end must not end the daemon
                log.exception("dropping what is too old failed in an unforeseen way")
                took = time.monotonic() - began

    def expire(self, now: float) -> None:
        """Drop everything that at `now` (time.monotonic()) was not used for its time to live, and that nobody holds and
        nobody asked to keep."""
        for generation in list(self._generations):
            if not generation.in_use and not generation.kept and self._is_old(generation.stream_id, generation, now):
                generation.drop()
        for stream_id, dormant in list(self._dormant.items()):
            if not self._is_kept(stream_id) and self._is_old(stream_id, dormant, now):
                self._evict_dormant(stream_id)

    def _is_old(self, stream_id: int, cached: Cached | _Dormant, now: float) -> bool:
        own = self._ttl_of(stream_id)
        return cached.used + (self.ttl if own is None else own) < now

    def _evict_dormant(self, stream_id: int) -> None:
        self.forget_dormant(stream_id)
        self.news.tell("evicted", stream_id)


@asynccontextmanager
async def _held(lock: trio.Lock) -> AsyncIterator[None]:
    """Without a turn of trio where nobody else holds it."""
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _memory_for_good(generation: Cached) -> int:
    return 0 if generation.buffer.refetchable else generation.buffer.memory


def _disk_bytes(generation: Cached) -> int:
    recording = generation.buffer.recording
    return 0 if recording is None else recording.disk_bytes


def _remove_all(doomed: deque[Recording | Path]) -> None:
    """Blocks. A recording that nobody reads is closed here, too: that is what gives its space back."""
    while doomed:
        path = doomed[0] if isinstance(doomed[0], Path) else doomed[0].path
        try:
            if path is not None:
                unlink_recording(path)
        except OSError as error:
            log.warning("cannot remove %s: %s", path, error)
        doomed.popleft()


def _write_a_little(directory: Path) -> None:
    """Raises OSError where nothing can be written in `directory`."""
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        os.pwrite(file.fileno(), bytes(4096), 0)
