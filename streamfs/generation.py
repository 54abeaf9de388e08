"""One version of a stream's bytes: its buffer, and the fetches that fill it.

Everything here runs in the trio thread, so a check and the update that follows it are atomic unless an await stands
between them.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import msgspec
import trio

from streamfs.cache import Cache
from streamfs.engine.buffer import Buffer, Missing, Writer
from streamfs.engine.fetches import Fetch, FetchPlan
from streamfs.engine.lanes import SEGMENT
from streamfs.engine.pool import LARGE
from streamfs.engine.recording import BLOCK, Header, Recording
from streamfs.engine.state import again
from streamfs.engine.store import Gathered
from streamfs.entries import Entry
from streamfs.errors import NoSpace, SourceChanged, SourceFailed, SourceStalled, StreamfsError, told
from streamfs.news import News
from streamfs.settings import Settings
from streamfs.sources.base import Body, Facts, Prompt, Source
from streamfs.spec import StreamSpec, parse_window

log = logging.getLogger(__name__)

LINGER = 0.5
"""Seconds a fetch that nobody needs is kept for a reader that comes back (players reopen)."""
LANE_PATIENCE = 2.0
"""Seconds a lane may wait for its reply: a server that lets a client have few connections at a time keeps the others
waiting, or turns them away, and one connection would then be faster."""
IDLE = 5.0
"""Seconds a resting fetch of a ranged source keeps its connection for a reader that has the stream open."""
CLOSE_SOON = 1.0
"""Seconds a body gets to give back its connection or process when the daemon ends; then it is cut short."""
_COMPARE = 64 * 1024  # bytes at a time, when a restarted one-way source is compared with what is there

AT_ONCE = 128 * 1024
"""Most bytes of a read that may be brought on the spot: more take longer than others should wait."""

_WINDOW_STEP = 1024 * 1024  # bytes by which a window moves: each move costs a hop to the disk's thread
_MARKS = 256  # moments remembered in a window of time

_FAR = 1 << 62  # past every byte
_DIGEST = "user.streamfs.sha256"

State = Literal["idle", "live", "paused", "complete", "failed"]


@dataclass
class Context:
    """What all streams of a daemon share."""

    nursery: trio.Nursery
    cache: Cache
    read_ahead: int  # bytes
    remember: Callable[[int, Facts], None]
    """Told (stream id, facts) whenever a source said something new; must not block."""
    settings: Settings | None = None
    """Defaults from the configuration file; None: there are none."""
    make_source: Callable[[StreamSpec], Source] | None = None
    """Called when the configuration gives a stream other options; None: its source stays what it is."""
    lanes: int = 0
    """Lanes of all streams under way (streamfs.engine.lanes)."""
    closing: bool = False
    """The daemon ends: commands that ignore SIGTERM are not waited for."""

    @property
    def most_lanes(self) -> int:
        """How many lanes all streams together may have: a quarter of memory, as they run far ahead of their readers."""
        return self.cache.pool.budget // 4 // SEGMENT


class Window:
    """How much of an endless stream's past is kept: so many bytes, or what arrived in so many seconds."""

    def __init__(self, text: str) -> None:
        unit, amount = parse_window(text)
        self._bytes = int(amount) if unit == "bytes" else None
        self._seconds = amount if unit == "seconds" else None
        self._marks: deque[tuple[float, int]] = deque()  # (when, position), at most _MARKS in a window
        self._floor = 0

    def advanced(self, position: int) -> int | None:
        """The stream has come to `position`: where the window now begins, or None while it is not worth moving."""
        floor = position - self._bytes if self._bytes is not None else self._passed(position)
        step = _WINDOW_STEP if self._bytes is None else min(_WINDOW_STEP, max(BLOCK, self._bytes // 16))
        if floor < self._floor + step:
            return None
        self._floor = floor
        return floor

    def _passed(self, position: int) -> int:
        assert self._seconds is not None
        now, marks = trio.current_time(), self._marks
        if not marks or now - marks[-1][0] >= self._seconds / _MARKS:
            marks.append((now, position))
        floor = self._floor
        while marks and marks[0][0] < now - self._seconds:
            floor = marks.popleft()[1]
        return floor


class Reader(Protocol):
    """A handle that is open."""

    position: int
    """Where its last read ended."""

    @property
    def generation(self) -> Generation: ...


class Owner(Protocol):
    """The stream that a generation belongs to."""

    entry: Entry
    source: Source
    context: Context

    @property
    def key(self) -> str: ...

    @property
    def spec(self) -> StreamSpec: ...

    @property
    def is_url(self) -> bool: ...

    @property
    def open_handles(self) -> Set[Reader]:
        """Of every generation."""

    def changed(self, generation: Generation, why: SourceChanged) -> None: ...

    def let_go(self, generation: Generation) -> None: ...

    def damaged(self) -> None: ...


class Generation:
    """One version of a stream's bytes. Followed by the cache (`streamfs.cache.Cached`)."""

    def __init__(self, stream: Owner, number: int, facts: Facts, recording: Recording | None = None) -> None:
        self._stream = stream
        self._context = stream.context
        self.stream_id = stream.entry.id
        self.number = number
        self.facts = facts
        cache = self._context.cache
        self.buffer = Buffer(cache.pool, size=facts.size, recording=recording, disk_reads=cache.disk_reads)
        self.buffer.refetchable = facts.ranged
        self.buffer.on_damage = stream.damaged
        self._settled = recording is not None and recording.durable
        self.plan = FetchPlan(ranged=facts.ranged, read_ahead=self._read_ahead)
        self.handles = 0
        self.failures = 0
        """Fetches that have failed."""
        self._failure: StreamfsError | None = None  # the latest
        self.received = 0  # bytes that came from the source
        self._news = self._context.cache.news
        self.used = float("-inf")  # until a reader comes that counts
        self.validated = time.monotonic()
        self.exit_status: int | None = None
        self.stderr_tail = ""
        self._title: str | None = None
        self._sha256 = None if recording is None else _kept_digest(recording)
        self._body: Body | None = None  # of the latest fetch that runs
        self.end_proven = True
        window = stream.spec.options.window
        self._window = Window(window) if window is not None and not facts.ranged else None
        self._fetch_ended = trio.Event()  # replaced each time
        self._left = 0.0  # trio's time when the last handle was closed
        self._wanting_all = 0  # calls of `fetch_all` under way
        self._latency: float | None = None  # seconds the last request took to its reply
        self._end_probe = memoryview(bytearray(1))  # where a byte past the declared end would land
        self._scopes: dict[Fetch, trio.CancelScope] = {}
        self._allowed: dict[Fetch, trio.Event] = {}  # wakes a resting fetch when its limit moved

    @property
    def _read_ahead(self) -> int:
        own = self._stream.spec.options.read_ahead
        return self._context.read_ahead if own is None else own

    def opened(self) -> None:
        """A handle is on it from now on: the options that count now are those of its fetches."""
        self.handles += 1
        self.plan.allow_ahead(self._read_ahead)

    # What the cache asks

    @property
    def header(self) -> Header:
        facts = msgspec.Raw(msgspec.json.encode(self.facts))
        return Header(key=self._stream.key, generation=self.number, facts=facts)

    @property
    def windowed(self) -> bool:
        """Whether the past is given back, so that disk space must not be taken ahead."""
        return self._window is not None

    @property
    def in_use(self) -> bool:
        return self.handles > 0 or self.plan.greedy

    @property
    def kept(self) -> bool:
        return self._stream.entry.persist

    @property
    def passed(self) -> int:
        return min((handle.position for handle in self._stream.open_handles if handle.generation is self), default=_FAR)

    def drop(self) -> None:
        self._news.tell("evicted", self.stream_id, bytes=self.buffer.buffered)
        self._stream.let_go(self)

    # What readers do

    def read_now(self, offset: int, size: int, since: int, *, sparing: bool = False) -> memoryview | None:
        """The bytes, if all are at hand, in our memory or the kernel's, or come on the spot; the view is good until the
        next await. None: use `read`. `since`: as for `demand`. `sparing`: nothing is read ahead for it, and it does not
        count as use."""
        found = self.buffer.view(offset, size)
        if found is None:
            found = self._gathered_now(offset, size, since, sparing)
        if found is not None and not sparing:
            self.used = time.monotonic()
            if self.plan.fetches:
                self._follow(offset + len(found))
        return found

    def _gathered_now(self, offset: int, size: int, since: int, sparing: bool) -> memoryview | None:
        """As `read_now`, where no single piece of memory has it all."""
        try:
            found = self.buffer.look(offset, size)
            if isinstance(found, Missing) and not sparing and since == self.failures:
                self._bring_now(int(found), offset + size)
                found = self.buffer.look(offset, size)
        except StreamfsError:
            return None
        if isinstance(found, Gathered):
            return self.buffer.settle(found, wait=False)
        return None if isinstance(found, Missing) else found

    async def read(self, offset: int, size: int, since: int, *, sparing: bool = False) -> memoryview:
        """As Buffer.read_async; bytes are fetched as they are needed. `since`: as for `demand`."""
        if sparing:
            return await self.buffer.read_async(offset, size, partial(self.demand, since=since, sparing=True))
        self.used = time.monotonic()
        view = await self.buffer.read_async(offset, size, partial(self.demand, since=since))
        if self.plan.fetches:
            self._follow(offset + len(view))
        return view

    async def wait(self, offset: int, since: int) -> None:
        """Wait for the byte at `offset`, or for any reason to look again. Raises the stream's failure."""
        await self.buffer.wait_async(offset, 1, partial(self.demand, since=since))

    def demand(self, missing: int, stop: int, since: int | None = None, *, sparing: bool = False) -> None:
        """A reader waits for missing..stop: see to it that a fetch brings them. `sparing`: nothing is read ahead.

        `since`: what `failures` was when the reader opened the file; None: it is a new attempt. Raises the latest
        failure where there was one since then: a later open has the source asked again, and readers from before it
        would wait as long once more, one after the other where the kernel lets only one of them ask for a page."""
        if since is not None and since != self.failures and self._failure is not None:
            raise again(self._failure)
        if not sparing:
            self.used = time.monotonic()
        self._see_to(self.plan.demand(missing, stop, sparing=sparing), missing)

    def _bring_now(self, missing: int, stop: int) -> None:
        """Where a program reads here and there and its source answers on the spot, bring missing..stop before this
        returns, without a task; what takes longer is left to a fetch, as ever."""
        if stop - missing > AT_ONCE or not self._context.cache.is_ready(self):
            return
        ends = (stop, self.buffer.size, self.buffer.next_present(missing))
        stop = min(end for end in ends if end is not None)
        fetch = self.plan.jump(missing, stop)
        if fetch is None:
            return
        body = self._stream.source.begin(missing, stop, self.facts)
        if body is None:
            self.plan.withdraw(fetch)
            return
        try:
            self._take_now(fetch, body)
        except BaseException:
            body.close_now()
            self.plan.ended(fetch)
            raise
        if fetch.resting:
            body.close_now()
            self.plan.ended(fetch)
        else:
            self._run(fetch, body, stop)

    def _take_now(self, fetch: Fetch, body: Prompt) -> None:
        """Move what comes on the spot into the buffer, as far as memory is there."""
        writer = self.buffer.writer(fetch.position)
        try:
            while not fetch.resting and (room := writer.room()):
                count = body.receive_now(room)
                if not count:
                    break
                writer.wrote(count)
                fetch.position = writer.position
                self.received += count
                self.validated = time.monotonic()
        finally:
            writer.close()
        self._context.cache.grew(self)

    def _see_to(self, fetch: Fetch | None, missing: int) -> None:
        if fetch is None:
            spare = self.plan.spare(missing)
            if spare is not None:
                self._cancel(spare)  # its end wakes the readers, and they demand again
        elif fetch not in self._scopes:
            self._run(fetch)
        self._fill_lanes()
        self._ring()

    def _fill_lanes(self) -> None:
        """Begin the lanes that are due, within what all streams together may have."""
        context = self._context
        while self.plan.lanes is not None and not self.plan.lanes.over and self.in_use and not self.buffer.doomed:
            if context.lanes >= context.most_lanes:
                if not any(fetch.stop is not None for fetch in self._scopes):
                    self.plan.give_up_lanes()  # nothing would bring what its reader waits for
                    self.buffer.wake_all()
                return
            lane = self.plan.lane(self.buffer.size)
            if lane is None:
                return
            context.lanes += 1
            self._run(lane)

    def _follow(self, stop: int) -> None:
        front = self.buffer.available(stop, 1 << 62) + stop
        if self.plan.follow(stop, front) is not None:
            self._ring()

    def released(self) -> None:
        """The last handle was closed: fetches stop where they are, and end unless somebody comes back."""
        self.plan.release()
        self._ring()
        self._left = trio.current_time()
        if not self._scopes:
            self._context.cache.rests(self)  # what came on the spot had no fetch whose end would tell
        if self._scopes and self._stream.is_url:
            self._context.nursery.start_soon(self._end_unneeded)

    async def _end_unneeded(self) -> None:
        """Fetches that rest end by themselves; one that waits for a silent source would not."""
        linger = LINGER if self.facts.ranged else IDLE
        await trio.sleep(linger)
        if not self.in_use and trio.current_time() - self._left >= linger:
            for scope in self._scopes.values():
                scope.cancel()

    @property
    def settled(self) -> bool:
        """Complete, on disk and durable; not while bytes that were damaged there are mended in memory alone."""
        recording = self.buffer.recording
        return self._settled and recording is not None and recording.durable and self.buffer.complete

    async def settle(self) -> None:
        """Make the complete bytes durable. Raises as Cache.settle."""
        await self._context.cache.settle(self)
        await trio.to_thread.run_sync(self._keep_digest)
        self._settled = True  # last: who sees `complete` finds nothing under way any more

    async def fetch_all(self, progress_within: float | None = None) -> None:
        """Bring every byte up to the end. Raises the stream's failure, and SourceStalled where nothing arrives for
        `progress_within` seconds, NoSpace where bytes had to be dropped meanwhile for want of room."""
        self._wanting_all += 1
        self.plan.want_all()
        self._ring()
        reached = 0
        try:
            while True:
                gap = self.buffer.first_gap(0)
                if gap is not None and gap < reached:  # to fetch them again at once would go on for ever
                    raise NoSpace(f"no room to keep the whole: {self._context.cache.disk_error or 'bytes were lost'}")
                with trio.move_on_after(progress_within or float("inf")) as patience:
                    if gap is None:
                        await self._see_the_end()
                        return
                    reached = gap
                    # Whoever counts seconds looks at each arrival; otherwise one wake per piece is enough.
                    await self.buffer.wait_async(gap, 1 if progress_within else LARGE, self.demand)
                if patience.cancelled_caught:
                    raise SourceStalled(f"nothing arrived for {progress_within:g} s")
        finally:
            self._wanting_all -= 1
            if not self._wanting_all:
                self.plan.want_no_more()
                self._ring()
                self.buffer.wake_all()  # readers that a fetch without limits was to serve ask for themselves now

    async def _see_the_end(self) -> None:
        """All declared bytes are here; whether a one-way source really ends there, and well, its fetch finds out."""
        while self._scopes and not self.facts.ranged:
            await self._fetch_ended.wait()
        if self.buffer.failure is not None:
            raise again(self.buffer.failure)

    # Fetching

    def _allow_live(self, fetch: Fetch) -> None:
        """The sender of an endless URL drops whoever does not keep up, so it is read while anybody has it open; what
        nobody read in time leaves by the window."""
        if self._window is not None and self._stream.is_url and self.handles:
            fetch.limit = None

    def begin(self, body: Body, size: int, latency: float) -> None:
        """Use the body of an opening request, which starts at 0, asked for `size` bytes and took `latency` seconds."""
        self._latency = _reply_seconds(body, latency)
        self._run(self.plan.first(size), body, size)

    def _run(self, fetch: Fetch, body: Body | None = None, size: int = 0) -> None:
        self._scopes[fetch] = trio.CancelScope()
        self._news.touch(self.stream_id)
        self._context.nursery.start_soon(self._guarded, fetch, body, size)

    async def _guarded(self, fetch: Fetch, body: Body | None, size: int) -> None:
        """The one place where a fetch ends, whatever happened in it: no exception goes further than its stream."""
        error: StreamfsError | None = None
        failed = False
        try:
            with self._scopes[fetch]:
                await self._fetch(fetch, body, size)
        except SourceChanged as change:
            if self._window is None:
                self._stream.changed(self, change)
            # An endless stream that was interrupted never continues; what is in the window stays readable.
            error = change if self._window is None else SourceFailed(f"the stream was interrupted: {change}")
        except StreamfsError as failure:
            failed = True
            if fetch.stop is None:
                error = failure
            else:  # who waits for the rest of the lane asks for it alone, and meets what stands in the way
                log.info("stream %d: one of several requests at a time failed: %s", self.stream_id, failure)
        except Exception as bug:
            log.exception("a fetch of stream %d failed in an unforeseen way", self.stream_id)
            error = SourceFailed(f"internal error: {bug!r} (see the log)")
        finally:
            self._scopes.pop(fetch)
            self._news.touch(self.stream_id)
            self._allowed.pop(fetch, None)
            self.plan.ended(fetch)
            if fetch.stop is not None:
                self._context.lanes -= 1
                self.plan.lane_ended(fetch, trio.current_time(), failed=failed)
                self._fill_lanes()
            if not self._scopes:
                self._context.cache.rests(self)
            ended, self._fetch_ended = self._fetch_ended, trio.Event()
            ended.set()
            if error is not None and not self.buffer.doomed:
                self.failures += 1
                self._failure = told(error)
                self.buffer.fail(self._failure)
                tell_failure(self._news, self.stream_id, error)
            else:
                self.buffer.wake_all()  # those that this fetch was to serve ask for another

    async def _fetch(self, fetch: Fetch, body: Body | None, size: int) -> None:
        stop = size if self.facts.ranged else None  # where the body of an opening request ends
        try:
            while True:
                if body is None:
                    if fetch.done or not await self._may_go_on(fetch):
                        return
                    gap = self.buffer.first_gap(fetch.position)
                    if gap is None:
                        return
                    if self.facts.ranged and gap > fetch.position:
                        if self.plan.is_served(gap, fetch):
                            return
                        fetch.position = gap
                        continue  # it may be further than readers need
                    body, stop = await self._open(fetch)
                self._body = body
                finished = await self._drain(fetch, body, stop)
                if finished:
                    return
                await body.aclose()
                body = None
        finally:
            if body is not None:
                self._note_exit(body)
                with trio.move_on_after(CLOSE_SOON if self._context.closing else float("inf"), shield=True):
                    await body.aclose()

    async def _open(self, fetch: Fetch) -> tuple[Body, int | None]:
        """A body that goes on where the fetch is, and where it was asked to stop."""
        began = trio.current_time()
        facts = self.facts
        stop: int | None = None
        if facts.ranged:
            self._spread(fetch)
            stop = self._end_of_request(fetch)
            body: Body | None = None
            await self._context.cache.spare_descriptors()
            with trio.move_on_after(LANE_PATIENCE if fetch.stop is not None else float("inf")):
                body = await self._stream.source.open(fetch.position, stop, facts)
            if body is None:
                raise SourceStalled(f"no reply within {LANE_PATIENCE:g} s")
            if body.start != fetch.position:
                with trio.CancelScope(shield=True):
                    await body.aclose()
                raise SourceChanged("the source no longer serves ranges")
        else:
            await self._context.cache.spare_descriptors()
            body = await self._stream.source.open(0, None, facts if self._stream.is_url else None)
        self.validated = time.monotonic()
        self._latency = _reply_seconds(body, trio.current_time() - began)
        return body, stop

    def _end_of_request(self, fetch: Fetch) -> int | None:
        """No further than to what is there already: a body that is left before its end costs its connection. None: to
        the end."""
        there = self.buffer.next_present(fetch.position)
        ends = [end for end in (self.plan.end_of_request(fetch), there) if end is not None]
        if not ends:
            return None
        return min(ends) if self.facts.size is None else min(*ends, self.facts.size)

    def _spread(self, fetch: Fetch) -> None:
        """Go on in lanes, if that may pay."""
        if self._may_spread(fetch):
            self.plan.spread(fetch, self.buffer.size, trio.current_time())
            self._context.lanes += 1
            self._fill_lanes()

    def _may_spread(self, fetch: Fetch) -> bool:
        return self._context.lanes < self._context.most_lanes and self.plan.may_spread(fetch, self.buffer.size)

    async def _drain(self, fetch: Fetch, body: Body, stop: int | None) -> bool:
        """Move the body's bytes into the buffer. True: this fetch has nothing more to do; False: the body ended where
        its range ended, or met bytes that are there, and another may follow."""
        while True:
            if not self.facts.ranged:
                await self._compare(fetch, body)
            writer = self.buffer.writer(fetch.position)
            try:
                finished = await self._pump(fetch, body, writer, stop)
            finally:
                writer.close()
            if finished or self.facts.ranged:
                return finished

    async def _pump(self, fetch: Fetch, body: Body, writer: Writer, stop: int | None) -> bool:
        cache, buffer = self._context.cache, self.buffer
        began, first = trio.current_time(), writer.position
        beyond = False
        while True:
            if fetch.done:
                return False
            paused = trio.current_time()
            if not await self._is_wanted(fetch, writer):
                return True
            began += trio.current_time() - paused  # what the reader or the disk take says nothing of the source
            if writer.needs_piece and cache.is_scarce_for(self):
                await cache.share(self)
            if writer.met and not self._at_size(writer):
                return False  # what follows is there
            view = self._end_probe if self._at_size(writer) else writer.room(beyond=beyond)
            if view is None:
                beyond = await cache.memory(self)
                continue
            beyond = False
            if fetch.limit is not None:
                view = view[: max(1, fetch.limit - fetch.position)]
            count = await body.receive_into(view)
            if count == 0:
                self._measure(writer.position - first, trio.current_time() - began)
                return self._body_ended(body, writer, stop)
            if view is self._end_probe or self._at_size(writer):
                raise SourceFailed(f"the source sent more than the {buffer.size} bytes it had declared")
            writer.wrote(count)
            fetch.position = writer.position
            self.received += count
            self._news.touch(self.stream_id)
            if stop is not None and fetch.position > stop:
                # To leave a body that goes on past what was asked is dear: only for lanes.
                self._measure(writer.position - first, trio.current_time() - began)
                if self._may_spread(fetch):
                    return False
                stop = self._end_of_request(fetch)
            if self._window is not None and (floor := self._window.advanced(fetch.position)):
                await cache.trim(self, floor)

    async def _is_wanted(self, fetch: Fetch, writer: Writer) -> bool:
        """Wait while the fetch rests, or the disk is behind. False: more is wanted no longer."""
        cache = self._context.cache
        if fetch.resting and not self._at_size(writer) and not await self._may_go_on(fetch):
            return False
        if self.buffer.memory > cache.spill_threshold:
            cache.grew(self)
            await cache.ready(self)
        return True

    def _at_size(self, writer: Writer) -> bool:
        """Whether all declared bytes of a one-way body are in, so that only its end is still to be seen."""
        return self.buffer.size is not None and writer.position >= self.buffer.size

    def _body_ended(self, body: Body, writer: Writer, stop: int | None) -> bool:
        size = self.buffer.size
        # Where the length is unknown, the end of the range that was asked for says nothing of the stream's end.
        if self.facts.ranged and (writer.position < size if size is not None else stop == writer.position):
            return False
        if size is not None and writer.position < size:
            raise SourceFailed(f"the source ended at byte {writer.position} of {size}")
        self.end_proven = body.end_proven
        self.buffer.ended(writer.position)
        return True

    async def _compare(self, fetch: Fetch, body: Body) -> None:
        """A one-way source was started again: what it sends anew must be what is there. Leaves the fetch at the
        first byte that is not."""
        position = fetch.position
        scratch = memoryview(bytearray(_COMPARE))
        while (here := self.buffer.available(position, _COMPARE)) > 0:
            count = await body.receive_into(scratch[:here])
            if count == 0:
                raise SourceChanged(f"the source ended at byte {position}, before what it had sent earlier")
            known = await self.buffer.read_async(position, count)
            if known.tobytes() != scratch[:count].tobytes():
                raise SourceChanged(f"the source sent other bytes than before, from byte {position} on")
            position += count
        fetch.position = position

    async def _may_go_on(self, fetch: Fetch) -> bool:
        """Wait while the fetch rests. False: it rested too long, and its connection is wanted no more."""
        self._allow_live(fetch)
        if fetch.resting and not fetch.ahead:
            return False  # one of many here and there: its place and its connection are for the next
        if fetch.resting and self.plan.crowded:
            self.buffer.wake_all()  # a reader that found every fetch busy can have this one's place
        while fetch.resting:
            event = self._allowed[fetch] = trio.Event()
            patience = self._patience()
            with trio.move_on_after(patience):
                await event.wait()
                continue
            if fetch.resting and self._patience() <= patience:
                return False
        return True

    def _patience(self) -> float:
        """Seconds a fetch may rest. A command's run cannot be had again, and an open one-way URL not without reading
        all of it anew: those are kept."""
        if self.facts.ranged:
            return IDLE if self.handles else LINGER
        if self.handles or not self._stream.is_url:
            return float("inf")
        return IDLE

    def _ring(self) -> None:
        for fetch, event in self._allowed.items():
            if not fetch.resting or not self.handles:
                event.set()

    def _measure(self, count: int, seconds: float) -> None:
        if count >= _COMPARE and seconds > 0 and self._latency is not None:
            self.plan.measured(self._latency, count / seconds, count)

    def _note_exit(self, body: Body) -> None:
        status = getattr(body, "exit_status", None)
        if status is not None:
            self.exit_status = status
        self.stderr_tail = getattr(body, "stderr_tail", "") or self.stderr_tail
        self._title = getattr(body, "title", None) or self._title
        self._sha256 = getattr(body, "sha256", None) or self._sha256
        if self._body is body:
            self._body = None

    @property
    def title(self) -> str | None:
        """What the body says is playing now, or said last."""
        return getattr(self._body, "title", None) or self._title

    @property
    def sha256(self) -> str | None:
        """What the body's digest came to; None until all bytes are here."""
        return self._sha256 if self.buffer.complete else None

    def _keep_digest(self) -> None:
        """Write the digest beside the settled bytes, for the next run, as an attribute of the data file. A file system
        without such attributes keeps none."""
        recording = self.buffer.recording
        if self.sha256 is not None and recording is not None and recording.path is not None:
            with suppress(OSError):
                os.setxattr(recording.path, _DIGEST, self.sha256.encode())

    def _cancel(self, fetch: Fetch) -> None:
        self._scopes[fetch].cancel()

    def stop(self, error: StreamfsError) -> None:
        """End every fetch; no byte can be read any more."""
        self.buffer.doom(error)
        for scope in self._scopes.values():
            scope.cancel()

    @property
    def fetching(self) -> bool:
        return bool(self._scopes)

    @property
    def state(self) -> State:
        if self.settled:
            return "complete"
        if self.buffer.failure is not None or self.buffer.damaged:
            return "failed"  # also where all declared bytes are here, and the source sent more
        if self.buffer.complete and not self.kept:
            return "complete"
        if self._scopes:
            return "paused" if all(fetch.resting for fetch in self._scopes) else "live"
        return "live" if self.plan.greedy or self.buffer.complete else "idle"


def tell_failure(news: News, stream_id: int, error: StreamfsError) -> None:
    """The event of a failure that readers get."""
    news.tell("stalled" if isinstance(error, SourceStalled) else "failed", stream_id, error=str(error))


def _reply_seconds(body: Body, opening: float) -> float:
    """Seconds that the source takes to reply, where `opening` the body took so many: the body may know better, as a
    login says nothing of the link."""
    told = getattr(body, "reply_seconds", None)
    return opening if told is None else float(told)


def _kept_digest(recording: Recording) -> str | None:
    if recording.path is None:
        return None
    with suppress(OSError):  # most have none
        return os.getxattr(recording.path, _DIGEST).decode("ascii", "replace")
    return None
