"""A registered stream while the daemon runs: which generation is current, who has it open, what is persisted.

A `Stream` has at most one current `Generation`; older ones live on only in the handles that hold them. Everything
here runs in the trio thread, so a check and the update that follows it are atomic unless an await stands between.
"""

from __future__ import annotations

import hashlib
import logging
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import msgspec
import trio

from streamfs.engine.fetches import FIRST_AHEAD, SPARING
from streamfs.engine.state import again
from streamfs.entries import Entry
from streamfs.errors import (
    Closed,
    CommandFailed,
    Damaged,
    NoSpace,
    NotFound,
    NotPermitted,
    SourceChanged,
    SourceFailed,
    StreamfsError,
    told,
)
from streamfs.generation import Context, Generation, State, tell_failure
from streamfs.sources.base import Body, Facts, Source
from streamfs.spec import StreamSpec, UrlSource

log = logging.getLogger(__name__)

FRESH = 2.0
"""Seconds for which a version that the source confirmed is not asked for again while somebody has it open."""
REVALIDATE = 5.0
"""Most seconds a new open waits to hear whether cached bytes are still current; then the cached ones serve."""
WAIT_FOR_END = 60.0
"""Most seconds without a new byte that an open waits for the end under --size-policy wait, where the stream has no
stall timeout of its own."""
PERSIST_RETRY = (1.0, 60.0)
"""Seconds before persisting is tried again after a failure: the first, and the most; each is twice the last."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What a check of a stream's bytes on disk came to."""

    blocks: int
    """Those looked at."""
    damaged: list[tuple[int, int]]
    """Where bytes were damaged, as (start, stop)."""
    index: str | None
    """What was wrong with the index, since it was last asked."""

    @property
    def ok(self) -> bool:
        return not self.damaged and self.index is None

    def __str__(self) -> str:
        said = [self.index] if self.index else []
        if self.damaged:
            said.append(f"{len(self.damaged)} of {self.blocks} blocks on disk were damaged, at bytes {self._places()}")
        else:
            said.append(f"{self.blocks} blocks on disk are whole")
        return "; ".join(said)

    def _places(self) -> str:
        return ", ".join(f"{a}-{b}" for a, b in self.damaged[:4]) + (", …" if len(self.damaged) > 4 else "")


class Opener(TypedDict):
    """Who has a file open."""

    pid: int
    program: str | None
    """Its name; None where it cannot be seen."""


class Handle:
    """An open file: reads of one generation. Close it. `opener`: who reads; None: nobody, the daemon itself holds the
    generation, which is then as much in use as with a reader. `sparing`: nothing is read ahead for it, and what it
    reads does not count as used, so that the cache lets go of that first."""

    def __init__(self, stream: Stream, generation: Generation, opener: Opener | None, *, sparing: bool = False) -> None:
        self._stream = stream
        self._generation = generation
        self._closed = False
        self._sparing = sparing
        self.position = 0
        """Where the last read ended: what poll(2) asks about, as it names no offset."""
        self.opener = opener
        self._since = generation.failures
        generation.opened()
        stream.open_handles.add(self)
        stream.news.touch(stream.entry.id)
        self._use()

    def _use(self) -> None:
        if not self._sparing:
            self._generation.used = time.monotonic()

    @property
    def generation(self) -> Generation:
        return self._generation

    @property
    def size(self) -> int | None:
        return self._generation.buffer.size

    @property
    def incoming(self) -> bool:
        """Whether the length is unknown, or bytes of a one-way source are still to come."""
        generation = self._generation
        return self.size is None or not (generation.facts.ranged or generation.buffer.complete)

    def read_now(self, offset: int, size: int) -> memoryview | None:
        """What `read` would give, where that takes no wait but a moment; None where it does, or fails."""
        view = self._generation.read_now(offset, size, self._since, sparing=self._sparing)
        if view is not None:
            self._gave(offset, view)
        return view

    async def read(self, offset: int, size: int, *, partial: bool = False) -> memoryview:
        """Exactly `size` bytes from `offset`, fewer only at the proven end; the view is good until the next await.

        Raises what stands in their way. With `partial`, bytes that come before the failure are given first, and
        only a read of none of them raises.
        """
        try:
            view = await self._generation.read(offset, size, self._since, sparing=self._sparing)
        except StreamfsError:
            count = self._generation.buffer.available(offset, size) if partial else 0
            if not count:
                raise
            view = await self._generation.read(offset, count, self._since, sparing=self._sparing)
        self._gave(offset, view)
        return view

    def _gave(self, offset: int, view: memoryview) -> None:
        self.position = offset + len(view)
        self._stream.served += len(view)
        self._stream.news.touch(self._stream.entry.id)

    async def read_available(self, offset: int, size: int) -> memoryview | None:
        """Up to `size` bytes from `offset` that are there, without waiting for the source; None where there are none
        yet. Empty at the proven end. Raises what stands in their way."""
        count = self._generation.buffer.available(offset, size)
        if not count and not self.ready_at(offset):
            self._generation.demand(offset, offset + size, self._since)
            return None
        return await self.read(offset, count or 1)

    def has_some(self, offset: int, size: int) -> bool:
        """Whether a byte of `size` from `offset` has arrived."""
        first = self._generation.buffer.next_present(offset)
        return first is not None and first < offset + size

    def ready_at(self, offset: int) -> bool:
        """Whether a read at `offset` would be answered at once, be it by the end or an error."""
        try:
            return self._generation.buffer.missing(offset, 1) is None or self._since != self._generation.failures
        except StreamfsError:
            return True

    async def wait_until_ready(self) -> None:
        """Wait until a read at `position` would be answered at once. The bytes there are fetched meanwhile."""
        while not self.ready_at(self.position):
            await self._generation.wait(self.position, self._since)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._stream.open_handles.discard(self)
            self._stream.news.touch(self._stream.entry.id)
            self._generation.handles -= 1
            self._use()
            if not self._generation.handles:
                self._generation.released()
                self._stream.released(self._generation)


class Stream:
    """One registered stream while the daemon runs."""

    def __init__(self, entry: Entry, source: Source, context: Context) -> None:
        self.entry = entry
        self.source = source
        self.context = context
        self._made_for = self.spec  # what `source` was made of
        self._old_sources: list[Source] = []  # whose bodies may still be read
        self.news = context.cache.news
        self.open_handles: set[Handle] = set()
        self.served = 0
        """Bytes given to readers."""
        self.generation: Generation | None = None
        self._error: StreamfsError | None = None
        self._orphans: list[Generation] = []  # evicted or removed, but still read
        self._opening = trio.Lock()
        self._refused: tuple[float, StreamfsError] | None = None  # when the last attempt to open began, if it failed
        self._opens: set[trio.CancelScope] = set()  # of those who wait in `open`
        self._ended: StreamfsError | None = None
        """Why it cannot be opened any more: the stream was removed, or the daemon ends."""
        self._unread = trio.Event()  # set when the last handle is closed, or an open has ended
        self._persisting: trio.CancelScope | None = None
        self._last_number = max(entry.facts_generation, context.cache.last_number(entry.id))
        self._token = trio.lowlevel.current_trio_token()
        self._index_damage: str | None = None  # what was found when an earlier run's recording was loaded
        self._unanswered = float("-inf")  # when, by time.monotonic(), the source was last asked in vain

    @property
    def error(self) -> StreamfsError | None:
        """Why the last attempt to open, fetch or persist failed."""
        return self._error

    @error.setter
    def error(self, error: StreamfsError | None) -> None:
        self._error = None if error is None else told(error)
        if error is not None and not isinstance(error, Closed):
            tell_failure(self.news, self.entry.id, error)

    @property
    def spec(self) -> StreamSpec:
        """What it was registered with, and the defaults that the configuration has for it."""
        settings = self.context.settings
        return self.entry.spec if settings is None else settings.effective(self.entry.spec)

    async def _follow_settings(self) -> None:
        """See to it that the source asks with the options that count now."""
        if self.context.settings is None:
            return
        await self.context.settings.refresh()
        spec = self.spec
        if self.context.make_source is not None and _asking(spec) != _asking(self._made_for):
            self._old_sources.append(self.source)
            self.source = self.context.make_source(spec)
        self._made_for = spec

    @property
    def key(self) -> str:
        """Names the stream and its source in recordings: another source under the same id is another key."""
        source = msgspec.json.encode([msgspec.to_builtins(self.entry.spec.source), self.entry.spec.options.transforms])
        return f"{self.entry.id}:{hashlib.sha256(source).hexdigest()[:32]}"

    @property
    def is_url(self) -> bool:
        return isinstance(self.entry.spec.source, UrlSource)

    # Opening

    async def open(self, opener: Opener | None = None, *, sparing: bool = False) -> Handle:
        """A handle on the current version, which is asked for where that is due. Bounded by the stall timeout.
        `opener`, `sparing`: as for Handle.
        Raises SourceFailed and its kinds where there is neither a source nor cached bytes."""
        if self._ended is not None:
            raise again(self._ended)
        with trio.CancelScope() as scope:
            self._opens.add(scope)
            try:
                await self._follow_settings()
                handle = await self._open_in_turn(time.monotonic(), opener, sparing)
            finally:
                self._opens.discard(scope)
                self._unread.set()
        if scope.cancelled_caught:
            raise again(self._ended or Closed("streamfs is shutting down"))
        generation = handle.generation
        if self.spec.options.size_policy == "wait" and handle.incoming:
            try:
                await generation.fetch_all(self.spec.stall_timeout or WAIT_FOR_END)
            except BaseException:
                handle.close()
                raise
        return handle

    async def _open_in_turn(self, asked: float, opener: Opener | None, sparing: bool) -> Handle:
        """Who waited in line takes the failure of an attempt that began after it came: else each in a long line would
        wait anew for a source that does not answer."""
        async with self._opening:
            if self._refused is not None and self._refused[0] >= asked:
                raise again(self._refused[1])
            began, self._refused = time.monotonic(), None
            try:
                return Handle(self, await self._current(sparing), opener, sparing=sparing)
            except StreamfsError as error:
                self._refused = (began, told(error))
                raise

    async def _current(self, sparing: bool) -> Generation:
        try:
            while True:
                generation = self.generation or await self._revive()
                if generation is None or not await self._is_current(generation):
                    generation = await self._renew(SPARING if sparing else FIRST_AHEAD)
                if self._ended is not None:
                    raise again(self._ended)  # `aclose` follows and takes care of what is here
                if generation is self.generation:
                    break  # it was not evicted while the source was asked
        except StreamfsError as error:
            self.error = error
            raise
        if generation.buffer.failure is not None and self.is_url:
            generation.buffer.retry()
        self.error = None
        return generation

    async def _is_current(self, generation: Generation) -> bool:
        """Whether a new open may use the generation. Asks the source where its last word is not fresh."""
        if generation.buffer.doomed:
            return False
        if not self.is_url or (generation.settled and generation.kept):
            return True
        if generation.handles and time.monotonic() - generation.validated < FRESH:
            return True
        if generation.facts.validator is None:
            # Nothing to compare by. What is whole, or still comes in, is one version for sure; a rest is not.
            return generation.buffer.complete or generation.fetching
        if generation.buffer.buffered and time.monotonic() - self._unanswered < FRESH:
            return True  # or those who wait in line would each wait for a source that does not answer
        facts: Facts | None = None
        with trio.move_on_after(REVALIDATE if generation.buffer.buffered else float("inf")):
            try:
                await self.context.cache.spare_descriptors()
                facts = await self.source.probe()
            except NotPermitted:
                raise
            except StreamfsError as error:
                if not generation.buffer.buffered:
                    raise
                log.info("stream %d: the source cannot be asked (%s); cached bytes serve", self.entry.id, error)
        if facts is None:
            self._unanswered = time.monotonic()
            return True
        generation.validated = time.monotonic()
        if facts.validator == generation.facts.validator:
            return True
        self.changed(generation, SourceChanged("the source has a new version; open the file again"))
        return False

    async def _revive(self) -> Generation | None:
        """The generation that an earlier run recorded, where its bytes can be used."""
        used = self.context.cache.last_used(self.entry.id)
        try:
            recording = await self.context.cache.wake_dormant(self.entry.id, self.key)
        except Damaged as error:
            self._index_damage = str(error)
            return None
        if recording is None:
            return None
        if recording.unread:
            self._index_damage = f"{recording.unread} bytes of its index were damaged or torn"
            log.warning("the recording %s: %s", recording.path, self._index_damage)
        # No later run may take the number of an earlier one, whether that one's bytes are used or not.
        self._last_number = max(self._last_number, recording.header.generation)
        try:
            facts = msgspec.json.decode(recording.header.facts, type=Facts)
            generation = Generation(self, recording.header.generation, facts, recording)
        except (msgspec.MsgspecError, SourceFailed) as error:
            log.warning("the recording %s contradicts itself: %s", recording.path, error)
            self.context.cache.discard(recording)
            return None
        if generation.settled or (facts.ranged and facts.validator is not None):
            pass
        elif recording.size is not None and self.entry.persist:
            # It was whole once. What was damaged since then cannot be had again; the rest is still what was to be kept.
            if not generation.buffer.complete:
                text = "some of the kept bytes are damaged: 'streamfs unpersist' and 'streamfs evict' start it anew"
                generation.buffer.fail(Damaged(text))
        elif generation.buffer.buffered and self._shows_what_a_cut_run_left():
            # Nobody can continue it: it is a finished generation, as one whose command was killed.
            text = "the run was cut short when streamfs was killed: 'streamfs evict' it for a new run"
            generation.buffer.fail(CommandFailed(text, 128 + signal.SIGKILL))
        else:
            # A body without versions that was cut short can never be continued, and a new open asks for it anew.
            generation.buffer.close()
            self.context.cache.discard(recording)
            return None
        generation.validated = float("-inf")
        generation.used = used
        self._install(generation)
        return generation

    def _shows_what_a_cut_run_left(self) -> bool:
        """Whether what a killed daemon left of a command's run is shown, rather than a new run begun: that one would
        take its place. Who asked for the whole, for what is live or for a start with the daemon wants the new run."""
        options = self.entry.spec.options
        return not (self.is_url or self.entry.persist or options.window is not None or options.eager)

    async def _renew(self, first: int) -> Generation:
        """A new generation, from a new run or request, which asks a ranged source for its `first` bytes."""
        options = self.entry.spec.options
        body: Body | None = None
        latency = 0.0
        facts = Facts()
        if self.is_url:
            await self.context.cache.spare_descriptors()
            asked = trio.current_time()
            body = await self.source.open(0, first, None)
            latency = trio.current_time() - asked
            facts = body.facts
        if options.size is not None:
            if body is not None and facts.size not in (None, options.size):
                with trio.CancelScope(shield=True):
                    await body.aclose()
                raise SourceFailed(f"the source has {facts.size} bytes, but its declared size is {options.size}")
            facts = Facts(options.size, facts.ranged, facts.validator, facts.mime, facts.modified)
        if self._ended is not None:
            # The daemon ends: what is here is for the next one, though it can be read no more in this.
            if body is not None:
                with trio.CancelScope(shield=True):
                    await body.aclose()
            raise again(self._ended)
        self._part_with_current()
        self._last_number += 1
        generation = Generation(self, self._last_number, facts)
        self._install(generation)
        if body is not None:
            generation.begin(body, first, latency)
            self._learned(facts)
        return generation

    def _install(self, generation: Generation) -> None:
        self.generation = generation
        self.news.touch(self.entry.id)
        self.context.cache.enter(generation)

    def _learned(self, facts: Facts) -> None:
        if facts != self.entry.facts:
            self.context.remember(self.entry.id, facts)

    async def probe(self) -> None:
        """Ask the source for its facts, for the catalogue. Never raises StreamfsError: `error` tells."""
        try:
            await self._follow_settings()
            await self.context.cache.spare_descriptors()
            self._learned(await self.source.probe())
            self.error = None
        except StreamfsError as error:
            self.error = error

    # Changes

    def changed(self, generation: Generation, why: SourceChanged) -> None:
        """The source serves another version now: handles on this one get ESTALE, new opens the new one."""
        generation.stop(why)
        self._forget(generation)

    def let_go(self, generation: Generation) -> None:
        """Evict a generation that nobody uses."""
        generation.stop(Closed("the cached bytes were evicted"))
        self._forget(generation)

    def _forget(self, generation: Generation) -> None:
        self.context.cache.leave(generation)
        self.news.touch(self.entry.id)
        generation.buffer.close()
        if self.generation is generation:
            self.generation = None

    def evict(self) -> None:
        """Drop all cached bytes; open handles go on with what they have, new opens start anew.
        Raises NotPermitted where the stream is persisted."""
        if self.entry.persist:
            raise NotPermitted(f"{self.entry.name!r} is persisted: 'streamfs unpersist' it first")
        cached = self.buffered
        if cached or self.context.cache.has_dormant(self.entry.id):
            self.news.tell("evicted", self.entry.id, bytes=cached or None)
        self.context.cache.forget_dormant(self.entry.id)
        self._part_with_current()

    def remove(self) -> None:
        """The stream was removed from the catalogue: its cached bytes go, open handles keep what they have."""
        self._ended = NotFound(f"{self.entry.name!r} was removed")
        self._stop_persisting()
        for scope in self._opens:
            scope.cancel()
        self.context.cache.forget_dormant(self.entry.id)
        self._part_with_current()

    def _part_with_current(self) -> None:
        generation, self.generation = self.generation, None
        if generation is None:
            return
        if generation.handles:
            self._orphans.append(generation)  # readers keep their version; it goes when the last of them closes
            self.context.cache.disown(generation)
        else:
            self.let_go(generation)

    def damaged(self) -> None:
        """Cached bytes turned out to be damaged (called from any thread): what is persisted is made whole again."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._persist_again)

    def _persist_again(self) -> None:
        if self._ended is None and self.generation is not None and not self.generation.settled:
            self.set_entry(self.entry)

    def released(self, generation: Generation) -> None:
        """The last handle on `generation` was closed: one that was evicted while it was read can go now."""
        if generation in self._orphans:
            self._orphans.remove(generation)
            self.let_go(generation)
        self._unread.set()
        self.context.cache.released()

    async def unread(self) -> None:
        """Wait until nobody has the stream open or waits for that; for one that was removed."""
        while self.open_handles or self._opens:
            self._unread = trio.Event()
            await self._unread.wait()

    async def verify(self) -> Verified:
        """Read every block on disk and drop those that are damaged."""
        async with self._opening:
            generation = self.generation or await self._revive()
        index, self._index_damage = self._index_damage, None  # what it cost is as if it had never been there
        if generation is None:
            return Verified(0, [], index)
        verify = generation.buffer.verify
        blocks, damaged = await trio.to_thread.run_sync(verify, limiter=trio.CapacityLimiter(1))
        return Verified(blocks, damaged, index)

    # Persisting

    def set_entry(self, entry: Entry) -> None:
        """The catalogue has a new row for this stream (name, persist or facts)."""
        self.entry = entry
        self.news.touch(entry.id)
        if entry.persist and self._persisting is None:
            self._persisting = trio.CancelScope()
            self.context.nursery.start_soon(self._persist, self._persisting)
        elif not entry.persist:
            self._stop_persisting()

    def _stop_persisting(self) -> None:
        if self._persisting is not None:
            self._persisting.cancel()
            self._persisting = None

    async def _persist(self, scope: trio.CancelScope) -> None:
        delay, most = PERSIST_RETRY
        with scope:
            while True:
                began = self.generation.buffer.buffered if self.generation else 0
                try:
                    if await self._persist_once():
                        break
                except CommandFailed as error:
                    self.error = error
                    break
                except Damaged as error:
                    self.error = error
                    if self.generation is None or self.generation.buffer.damaged:
                        break  # and not to be had again
                except (StreamfsError, OSError) as error:
                    self.error = error if isinstance(error, StreamfsError) else NoSpace(str(error))
                    log.warning("stream %d cannot be persisted yet: %s", self.entry.id, error)
                except Exception as bug:
                    log.exception("persisting stream %d failed in an unforeseen way", self.entry.id)
                    self.error = SourceFailed(f"internal error: {bug!r} (see the log)")
                    break
                if self.generation is not None and self.generation.buffer.buffered > began:
                    delay = PERSIST_RETRY[0]
                await trio.sleep(delay)
                delay = min(delay * 2, most)
        if self._persisting is scope:
            self._persisting = None

    async def _persist_once(self) -> bool:
        handle = await self.open()
        generation = handle.generation
        try:
            if not generation.settled or not await self.context.cache.is_in_place(generation):
                await generation.fetch_all()
                await generation.settle()
            self.error = None
            return True
        finally:
            handle.close()

    # What is told

    @property
    def state(self) -> State:
        if self.generation is not None:
            return self.generation.state
        if self.error is not None:
            return "failed"
        return "idle"

    @property
    def facts(self) -> Facts:
        """What is known of the bytes: of the current generation, else what the catalogue remembers."""
        if self.generation is not None:
            return self.generation.facts
        return self.entry.facts or Facts()

    @property
    def size(self) -> int | None:
        """The exact length, None while unknown; the catalogue's memory of it before anything was opened."""
        if self.generation is not None:
            return self.generation.buffer.size
        return self.entry.size

    @property
    def buffered(self) -> int:
        """Bytes present, in memory or on disk."""
        return self.generation.buffer.buffered if self.generation is not None else 0

    @property
    def readers(self) -> int:
        """Open files, those on older versions too. What the daemon itself holds open is not among them."""
        return sum(handle.opener is not None for handle in self.open_handles)

    @property
    def problem(self) -> StreamfsError | None:
        """Why bytes are missing, or why the last attempt to get at the source failed; None while all is well."""
        if self.generation is None:
            return self.error
        buffer, cache = self.generation.buffer, self.context.cache
        if buffer.failure is not None or self.error is not None:
            return buffer.failure or self.error
        if buffer.damaged:
            return Damaged("some cached bytes are damaged and cannot be fetched again: 'streamfs evict' the stream")
        if cache.disk_error is not None and buffer.memory > cache.spill_threshold:
            return NoSpace(f"its bytes stay in memory: {cache.disk_error}")
        return None

    @property
    def exit_status(self) -> int | None:
        """How the command ended, as a shell shows it; None while it runs or for a URL."""
        return self.generation.exit_status if self.generation is not None else None

    @property
    def stderr_tail(self) -> str:
        return self.generation.stderr_tail if self.generation is not None else ""

    @property
    def title(self) -> str | None:
        """What a radio stream plays, as far as it was received; None where nothing told."""
        return self.generation.title if self.generation is not None else None

    @property
    def sha256(self) -> str | None:
        """What the transform `digest` found, once all bytes are here; None before and without it."""
        return self.generation.sha256 if self.generation is not None else None

    @property
    def end_proven(self) -> bool:
        """False where the known end rests on nothing but a closed connection."""
        return self.generation is None or self.generation.end_proven

    @property
    def persisted_path(self) -> Path | None:
        """Where the whole resource rests as a plain file; None until it is complete and durable."""
        generation = self.generation
        if generation is not None and generation.settled and generation.buffer.recording is not None:
            return generation.buffer.recording.path
        return None

    def interrupt(self, error: StreamfsError) -> None:
        """The daemon is about to end: every read fails, every fetch stops."""
        self._ended = self._ended or error
        self._stop_persisting()
        for scope in self._opens:
            scope.cancel()
        for generation in (*self._orphans, self.generation):
            if generation is not None:
                generation.stop(error)

    async def aclose(self) -> None:
        """The daemon ends: fetches stop, readers fail, recordings stay for the next run."""
        self._stop_persisting()
        for generation in [*self._orphans, *([self.generation] if self.generation else [])]:
            generation.stop(Closed("streamfs is shutting down"))
            self.context.cache.leave(generation, unlink=generation in self._orphans or not self._is_worth_keeping())
            generation.buffer.close()
        self.generation = None
        for source in (*self._old_sources, self.source):
            await source.aclose()

    def _is_worth_keeping(self) -> bool:
        generation = self.generation
        if generation is None or isinstance(self._ended, NotFound):
            return False
        recording = generation.buffer.recording
        was_whole = self.entry.persist and recording is not None and recording.size is not None
        return generation.settled or generation.facts.ranged or was_whole


def _asking(spec: StreamSpec) -> StreamSpec:
    """What of a specification its source is made of: all but the name."""
    return msgspec.structs.replace(spec, name="")
