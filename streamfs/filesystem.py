"""The file system: names to streams, handles, attributes. No FUSE types: `streamfs.fuse` adapts it, tests use it as
it is, and so do `save` and the control socket.

Everything runs in the trio thread. Looking (lookup, attributes, listings, xattrs) never awaits anything; only `open`
and `read` wait for sources, each for its own stream.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgspec
import trio

from streamfs import xattrs
from streamfs.cache import Cache
from streamfs.catalog import Catalog, Registered
from streamfs.entries import Entries, Entry
from streamfs.errors import (
    AlreadyExists,
    Closed,
    Damaged,
    InvalidRequest,
    IsDirectory,
    NameTooLong,
    NoAttribute,
    NotDirectory,
    NotEmpty,
    NotFound,
    NotPermitted,
    SourceChanged,
    StreamfsError,
)
from streamfs.generation import Context
from streamfs.settings import Settings
from streamfs.sources.base import Facts, Source
from streamfs.spec import NAME_PART_BYTES, IfTaken, Registration, StreamSpec, UrlSource, check_name, check_url
from streamfs.stream import Handle, Opener, Stream
from streamfs.tree import File, Folder, Node, Tree, is_bare, is_lasting

log = logging.getLogger(__name__)

KNOWN_FOR = 3600.0
"""Seconds the kernel may keep the attributes of a file whose size is known: an inode's size never changes again."""
PROBES = 8
"""Probes under way at a time."""
PROBES_AT_START = 256
"""Streams added while no daemon ran that are probed when one starts; a larger catalogue is not probed at all, so that
mounting it costs no host a flood."""
SHOWN_AT_ONCE = 200
"""Streams of a list that are shown in one go: some milliseconds in which nobody else is served."""
LOOK_STEP = 64
"""Entries decoded at a time after the start: well under a millisecond of the event loop."""
CLOSE_WITHIN = 4.0
"""Seconds all streams together have to give back connections and processes at the end."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Attributes:
    """What `stat` shows. Times in seconds since the epoch; `timeout`: seconds the kernel may believe it."""

    inode: int
    folder: bool
    size: int
    links: int
    modified: float
    changed: float
    timeout: float


class Opened(NamedTuple):
    """`direct`: the kernel must not cache and must pass every read on. So it is while the length is unknown, and while
    bytes of a one-way source still come in: a page of the cache is there as a whole or not at all, and bytes that
    have arrived would wait for those that have not.

    `doubted`: the kernel was told a length of 0 while it was unknown, and must be told now to believe no such answer
    any more: one that a slow program takes in late would otherwise be the end of the file to cached reads."""

    handle: int
    direct: bool
    doubted: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """For statfs, in bytes."""

    total: int
    free: int
    files: int


class _Poll:
    """Waits until a handle is ready, and whom to tell then."""

    def __init__(self, when_ready: Callable[[], None]) -> None:
        self.when_ready = when_ready
        self.scope = trio.CancelScope()


class FileSystem:
    """One catalogue shown as files. Made inside a running trio; `aclose` it."""

    def __init__(
        self,
        catalog: Catalog,
        cache: Cache,
        nursery: trio.Nursery,
        *,
        make_source: Callable[[StreamSpec], Source],
        read_ahead: int,
        settings: Settings | None = None,
    ) -> None:
        """`read_ahead` in bytes. `settings`: what streams get besides their own options. Fetches, probes and persisting
        run in `nursery`."""
        self._catalog = catalog
        self._cache = cache
        self._nursery = nursery
        self._make_source = make_source
        self._settings = settings
        self._context = Context(
            nursery, cache, read_ahead, self._remember, settings, make_source if settings is not None else None
        )
        self.news = cache.news
        """What happens to the streams, for whoever shows it."""
        self._tree = Tree()
        self._entries = Entries()
        self._streams: dict[int, Stream] = {}  # made when first needed
        self._removed: dict[int, Stream] = {}  # gone from the catalogue, but still open
        self._handles: dict[int, tuple[Handle, File]] = {}
        self._eager: dict[int, Handle] = {}  # what is held open from the start, by stream id
        self._polls: dict[int, _Poll] = {}  # by handle
        self._numbers = itertools.count(1)
        self._catalog_turn = trio.CapacityLimiter(1)
        self._probing = trio.CapacityLimiter(PROBES)
        self._started = time.time()
        self._closing = False

    def load(self) -> None:
        """Show what the catalogue holds, and go on with what is to be persisted. Blocks shortly; raises as Catalog."""
        self._entries = self._catalog.entries()
        self._tree.load(self._entries.names())
        for folder in self._catalog.folders():
            self._tree.add_folder(folder, when=self._started)
        self._cache.scan(self._entries)
        for entry in self._entries.to_be_kept():
            self._stream(entry.id).set_entry(entry)
        self._in_background(self._look_through)

    async def _look_through(self) -> None:
        """Start what is to be started without anybody asking; tell of what is damaged. Decodes each entry, so that
        it is done beside everything else."""
        unprobed: list[int] = []
        for count, stream_id in enumerate(list(self._entries)):
            if count % LOOK_STEP == 0:
                await trio.lowlevel.checkpoint()
            try:
                entry = self._entries.look(stream_id)
            except Damaged as error:
                log.error("%s", error)
                continue
            if entry is None:
                continue  # removed meanwhile
            spec = self._effective(entry.spec)
            if spec.options.eager:
                self._in_background(self._start_eagerly, self._stream(stream_id))
            if entry.probed is None and _wants_probe(spec):
                unprobed.append(stream_id)
        if len(unprobed) <= PROBES_AT_START:
            for stream_id in unprobed:
                if stream_id in self._entries:
                    self._in_background(self._probe, self._stream(stream_id))

    # Looking

    def lookup(self, parent: int, name: bytes) -> Attributes:
        """Raises NotFound, NotDirectory, NameTooLong."""
        folder = self._folder(parent)
        if name == b".":
            return self._attributes(folder)
        if name == b"..":
            return self._attributes(folder.parent or folder)
        _check_length(name)
        node = self._tree.child(folder, name)
        return self._attributes(node if isinstance(node, Folder) else self._current_file(node))

    def _current_file(self, file: File) -> File:
        """`file`, or its successor where its version was evicted or replaced: programs such as cp refuse a file whose
        inode changes between the stat and the open."""
        stream = self._streams.get(file.stream_id)
        if file.generation is None or (stream is not None and stream.generation is file.generation):
            return file
        return self._tree.succeed(file)

    def looked_up(self, inode: int) -> None:
        """The kernel holds one more reference to the inode."""
        self._tree.looked_up(self._tree.node(inode))

    def forget(self, inode: int, count: int) -> None:
        self._tree.forget(inode, count)

    def attributes(self, inode: int) -> Attributes:
        """Raises NotFound."""
        return self._attributes(self._tree.node(inode))

    def names(self, inode: int) -> list[bytes]:
        """The names in a folder now, without "." and "..". Raises NotFound, NotDirectory."""
        return list(self._folder(inode).children)

    def usage(self) -> Usage:
        try:
            disk = os.statvfs(self._cache.directory)
        except OSError:
            return Usage(0, 0, len(self._entries))
        return Usage(disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize, len(self._entries))

    def _attributes(self, node: Node) -> Attributes:
        if isinstance(node, Folder):
            modified = node.modified or self._started
            return Attributes(node.inode, True, 4096, 2 + node.folders, modified, modified, 0.0)
        entry = self._entries.get(node.stream_id)
        stream = self._streams.get(node.stream_id) or self._removed.get(node.stream_id)
        if node.generation is not None:
            facts = node.generation.facts
            size = node.generation.buffer.size
            timeout = KNOWN_FOR if size is not None else 0.0
        else:
            facts = stream.facts if stream is not None else (entry and entry.facts) or Facts()
            size = stream.size if stream is not None else None if entry is None else entry.size
            timeout = 0.0
        node.told = size or node.told
        if not node.told:
            node.doubted = True
        added = entry.added if entry is not None else stream.entry.added if stream is not None else self._started
        return Attributes(
            inode=node.inode,
            folder=False,
            size=node.told,
            links=1 if node.folder is not None else 0,
            modified=facts.modified if facts.modified is not None else added,
            changed=added,
            timeout=timeout,
        )

    def _folder(self, inode: int) -> Folder:
        node = self._tree.node(inode)
        if not isinstance(node, Folder):
            raise NotDirectory("not a folder")
        return node

    def _stream_of(self, inode: int) -> Stream:
        node = self._tree.node(inode)
        if isinstance(node, Folder):
            raise NoAttribute("a folder has no stream")
        removed = self._removed.get(node.stream_id)
        return removed if removed is not None else self._stream(node.stream_id)

    def _stream(self, stream_id: int) -> Stream:
        stream = self._streams.get(stream_id)
        if stream is None:
            entry = self._entries.get(stream_id)
            if entry is None:
                raise NotFound("the stream was removed")
            stream = self._streams[stream_id] = Stream(
                entry, self._make_source(self._effective(entry.spec)), self._context
            )
        return stream

    # Files

    async def open(self, inode: int, opener: Opener | None = None, *, sparing: bool = False) -> Opened:
        """Open a file. Waits until the length is known where the source can tell, at most the stall timeout. `opener`:
        who reads, to be told of; None: this very process. `sparing`: as for Handle.

        Raises the source's failure; SourceChanged (ESTALE) where the name now stands for another version: the kernel
        then looks the name up again, gets the new inode, and comes back with that.
        """
        if self._closing:
            raise Closed("streamfs is shutting down")
        file = self._tree.node(inode)
        if isinstance(file, Folder):
            raise IsDirectory("a folder")
        if opener is None:
            opener = Opener(pid=os.getpid(), program=None)
        try:
            handle = await self._stream(file.stream_id).open(opener, sparing=sparing)
        except StreamfsError:
            self.news.count("refused")
            raise
        try:
            self._bind(file, handle)
        except BaseException:
            handle.close()
            raise
        number = next(self._numbers)
        self._handles[number] = (handle, file)
        self.news.tell("opened", file.stream_id, **opener)
        return Opened(number, direct=handle.incoming, doubted=file.doubted and not handle.incoming)

    def trust_size(self, number: int) -> None:
        """The kernel has no size of this open file in hand but the right one."""
        self._handles[number][1].doubted = False

    def _bind(self, file: File, handle: Handle) -> None:
        """Make sure that the inode and the handle mean the same version, now and for good."""
        generation = handle.generation
        size = handle.size
        if file.generation is None and (file.told in (0, size)):
            file.generation = generation
        elif file.generation is not generation:
            successor = self._tree.succeed(file)
            while successor.generation not in (None, generation):
                successor = self._tree.succeed(successor)
            successor.generation = generation
            raise SourceChanged("the file has a new version")

    def read_now(self, number: int, offset: int, size: int) -> memoryview | None:
        """As Handle.read_now; None also for a handle that is not open."""
        opened = self._handles.get(number)
        return None if opened is None else opened[0].read_now(offset, size)

    async def read(self, number: int, offset: int, size: int, *, partial: bool = False) -> memoryview:
        """As Handle.read. Raises NotFound for a handle that is not open."""
        return await self._handle(number).read(offset, size, partial=partial)

    async def read_available(self, number: int, offset: int, size: int) -> memoryview | None:
        """As Handle.read_available."""
        return await self._handle(number).read_available(offset, size)

    def has_some(self, number: int, offset: int, size: int) -> bool:
        """As Handle.has_some."""
        return self._handle(number).has_some(offset, size)

    def is_ready(self, number: int, when_ready: Callable[[], None] | None = None) -> bool:
        """Whether a read where the last one ended would be answered at once. If not, `when_ready` is called once it
        would; a later call's replaces it."""
        handle = self._handle(number)
        if handle.ready_at(handle.position):
            return True
        if when_ready is not None:
            poll = self._polls.get(number)
            if poll is None:
                poll = self._polls[number] = _Poll(when_ready)
                self._in_background(self._wait_ready, number, handle, poll)
            poll.when_ready = when_ready
        return False

    async def _wait_ready(self, number: int, handle: Handle, poll: _Poll) -> None:
        with poll.scope:
            try:
                await handle.wait_until_ready()
            except StreamfsError as error:
                log.debug("polling ends: %s", error)  # the read that follows raises it
            self._polls.pop(number, None)
            poll.when_ready()

    def _handle(self, number: int) -> Handle:
        opened = self._handles.get(number)
        if opened is None:
            raise NotFound("not an open file")
        return opened[0]

    def release(self, number: int) -> None:
        opened = self._handles.pop(number, None)
        if opened is None:
            return
        handle, file = opened
        poll = self._polls.pop(number, None)
        if poll is not None:
            poll.scope.cancel()  # or it would go on asking for bytes that nobody wants
        handle.close()
        if handle.opener is not None:
            self.news.tell("closed", file.stream_id, **handle.opener)

    # Extended attributes

    def get_attribute(self, inode: int, name: str) -> bytes:
        """Raises NoAttribute."""
        value = xattrs.read_one(self._stream_of(inode), name)
        if value is None:
            raise NoAttribute(f"no attribute {name!r}")
        return os.fsencode(value)

    def list_attributes(self, inode: int) -> list[str]:
        if isinstance(self._tree.node(inode), Folder):
            return []
        return list(xattrs.read_all(self._stream_of(inode)))

    async def set_attribute(self, inode: int, name: str, value: bytes) -> None:
        """Only persist can be set. Raises InvalidRequest for a bad value, NotPermitted for other attributes."""
        stream = self._stream_of(inode)
        if name not in xattrs.PERSIST:
            raise NotPermitted(f"{name} cannot be set")
        await self._persist(stream.entry.id, xattrs.parse_persist(value))

    # Changes, by the mount's owner or through the control socket

    async def add(self, specs: Iterable[StreamSpec], *, replace: bool = False, probe: bool = True) -> list[Entry]:
        """Register streams, all or none; they show at once. Raises as Catalog.add_many."""
        await self._look_at_settings()
        entries = await self._change(self._catalog.add_many, list(specs), replace)
        fresh = [entry for entry in entries if entry.id not in self._entries]
        for entry in entries:
            self._show(entry, probe=probe and entry.probed is None)
        for entry in fresh:
            if self._persists(entry.spec):
                await self._persist(entry.id, True)
        return entries

    async def _look_at_settings(self) -> None:
        if self._settings is not None:
            await self._settings.refresh()

    def _effective(self, spec: StreamSpec) -> StreamSpec:
        return spec if self._settings is None else self._settings.effective(spec)

    def _persists(self, spec: StreamSpec) -> bool:
        return self._settings is not None and self._settings.config.persists(spec)

    async def register(
        self, items: Iterable[Registration], taken: IfTaken, *, probe: bool = False, dry_run: bool = False
    ) -> list[Registered]:
        """Register the streams of a list, all or none; they show at once. `probe`: ask the sources of those that are
        new. Raises as Catalog.register."""
        await self._look_at_settings()
        items = [
            msgspec.structs.replace(item, persist=self._persists(item.spec)) if item.persist is None else item
            for item in items
        ]
        method = functools.partial(self._catalog.register, dry_run=dry_run)
        # As `_change`; and nobody else changes the catalogue before all of it shows, which is done step by step.
        with trio.CancelScope(shield=True):
            async with self._catalog_turn:
                done = await trio.to_thread.run_sync(method, items, taken, limiter=trio.CapacityLimiter(1))
                shown = [] if dry_run else [one.entry for one in done if one.outcome not in ("unchanged", "skipped")]
                for number, entry in enumerate(shown, 1):
                    self._show(entry, probe=probe)
                    if number % SHOWN_AT_ONCE == 0:
                        await trio.lowlevel.checkpoint()
        return done

    def _show(self, entry: Entry, *, probe: bool) -> None:
        """A new entry of the catalogue."""
        old = self._find(entry.name)
        if isinstance(old, File) and old.stream_id != entry.id:
            self._drop(self._entries[old.stream_id], keep_folders=True)  # its folder gets the other one
        self.news.tell("registered", entry.id)
        self._entries[entry.id] = entry
        self._tree.add(entry)
        if entry.persist:
            self._stream(entry.id).set_entry(entry)
        spec = self._effective(entry.spec)
        if probe and _wants_probe(spec):
            self._in_background(self._probe, self._stream(entry.id))
        if spec.options.eager:
            self._in_background(self._start_eagerly, self._stream(entry.id))

    async def link(self, parent: int, name: bytes, target: bytes) -> Attributes:
        """`ln -s URL NAME` in the mount: registers the URL. Raises AlreadyExists, NameTooLong, NotPermitted for a
        target that is no URL which streamfs can open."""
        _check_length(name)
        folder = self._folder(parent)
        if name in folder.children:
            raise AlreadyExists("the name is taken")
        try:
            source = UrlSource(check_url(os.fsdecode(target)))
        except InvalidRequest as error:
            raise NotPermitted(f"links are made to URLs only: {error}") from error
        (entry,) = await self.add([StreamSpec(name=self._tree.path_of(folder, name), source=source)])
        return self._attributes(self._tree.file_of(entry.id))

    async def make_folder(self, parent: int, name: bytes) -> Attributes:
        """`mkdir` in the mount: a folder that stays until it is removed. Raises AlreadyExists, NameTooLong."""
        _check_length(name)
        folder = self._folder(parent)
        if name in folder.children:
            raise AlreadyExists("the name is taken")
        path = self._tree.path_of(folder, name)
        await self._change(self._catalog.add_folder, path)
        return self._attributes(self._tree.add_folder(path))

    async def remove(self, names: Iterable[str]) -> None:
        """Forget streams, all or none. Who has one open keeps what is there. Raises NotFound."""
        for entry in await self._change(self._catalog.remove, list(names)):
            self._drop(entry)

    async def unlink(self, parent: int, name: bytes) -> None:
        """`rm` in the mount. Raises NotFound, IsDirectory."""
        folder = self._folder(parent)
        if isinstance(self._tree.child(folder, name), Folder):
            raise IsDirectory("a folder")
        for entry in await self._change(self._catalog.remove, [self._tree.path_of(folder, name)]):
            self._drop(entry, keep_folders=True)

    async def remove_folder(self, parent: int, name: bytes) -> None:
        """`rmdir` in the mount, for an empty folder. Raises NotFound, NotDirectory, NotEmpty."""
        folder = self._folder(parent)
        node = self._tree.child(folder, name)
        if not isinstance(node, Folder):
            raise NotDirectory("not a folder")
        if node.children:
            raise NotEmpty("the folder is not empty")
        if node.lasting:
            await self._change(self._catalog.remove_folder, self._tree.path_of(folder, name))
            node.lasting = False
        if node.parent is not None and node.parent.children.get(node.name) is node:  # nobody else removed it meanwhile
            self._tree.remove_folder(node)

    async def rename(self, old: str, new: str, *, replace: bool = False, keep_folders: bool = False) -> None:
        """Rename a stream or a folder of streams. `keep_folders`: one that this empties stays. Raises as
        Catalog.rename."""
        check_name(new)
        moved = await self._change(self._catalog.rename, old, new, replace)
        there = self._find(new)
        if isinstance(there, File) and moved and all(entry.id != there.stream_id for entry in moved):
            self._drop(self._entries[there.stream_id], keep_folders=True)  # its folder gets the other one
        folder = self._find(old)
        if isinstance(folder, Folder):
            self._tree.move(folder, new, keep_folders=keep_folders)
        for entry in moved:
            before = self._entries.get(entry.id)
            self.news.tell("renamed", entry.id, stream=entry.name, old=before.name if before is not None else old)
            self._replace_entry(entry)
            if not isinstance(folder, Folder):
                self._tree.add(entry, keep_folders=keep_folders)

    async def move(self, parent: int, name: bytes, new_parent: int, new_name: bytes, *, replace: bool) -> None:
        """`mv` in the mount, as rename(2). Raises NotFound, AlreadyExists, IsDirectory, NotDirectory, NotEmpty,
        NameTooLong."""
        _check_length(new_name)
        source, target = self._folder(parent), self._folder(new_parent)
        node = self._tree.child(source, name)
        there = target.children.get(new_name)
        if there is not None and not replace:
            raise AlreadyExists("the name is taken")
        if isinstance(there, Folder) and not isinstance(node, Folder):
            raise IsDirectory("the name is a folder's")
        if isinstance(there, File) and isinstance(node, Folder):
            raise NotDirectory("the name is a file's")
        if isinstance(there, Folder) and there is not node and there.children:
            raise NotEmpty("the folder of that name is not empty")
        old, new = self._tree.path_of(source, name), self._tree.path_of(target, new_name)
        if isinstance(node, Folder) and is_bare(node) and not is_lasting(node):  # the catalogue knows nothing of it
            if isinstance(there, Folder) and there is not node and there.lasting:
                await self._change(self._catalog.remove_folder, new)
            self._tree.move(node, check_name(new), keep_folders=True)
        else:
            await self.rename(old, new, replace=replace, keep_folders=True)

    async def persist(self, name: str, on: bool) -> None:
        """Start or stop keeping the whole resource. Raises NotFound, InvalidRequest where only a window is kept."""
        await self._persist(self.named(name).id, on)

    async def _persist(self, stream_id: int, on: bool) -> None:
        entry = self._entries.get(stream_id)
        if on and entry is not None and self._effective(entry.spec).options.window is not None:
            raise InvalidRequest(f"{entry.name!r} keeps only a window of its past: its whole cannot be persisted")
        self._replace_entry(await self._change(self._catalog.set_persist, stream_id, on))
        if not on:
            self._cache.recount()

    def evict(self, name: str) -> None:
        """Drop the stream's cached bytes. Raises NotFound, NotPermitted where it is persisted."""
        entry = self.named(name)
        self._let_go_eager(entry.id)
        self._stream(entry.id).evict()

    def evict_all(self) -> None:
        """Drop all cached bytes but those of persisted streams."""
        for entry in self._entries.values():
            if not entry.persist and (entry.id in self._streams or self._cache.has_dormant(entry.id)):
                self.evict(entry.name)

    async def removed(self) -> None:
        """Wait until what was evicted is gone from the disk, too."""
        await self._cache.removed()

    async def verify(self, names: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """Check every cached block of the streams (None: of all) that are on disk; damaged ones are dropped.
        Gives {"name", "ok", "detail"} for each."""
        entries = self._entries.values() if names is None else [self.named(name) for name in names]
        return [await self._verified(entry) for entry in entries]

    async def _verified(self, entry: Entry) -> dict[str, Any]:
        stream = self._stream(entry.id)
        verified = await stream.verify()
        return {"name": entry.name, "ok": verified.ok, "detail": str(verified)}

    @property
    def disk_error(self) -> str | None:
        """Why the cache directory cannot take bytes now; None while it can."""
        return self._cache.disk_error

    @property
    def open_files(self) -> int:
        return len(self._handles)

    @property
    def memory_used(self) -> int:
        """Bytes of the memory budget that are handed out now."""
        return self._cache.pool.used

    def size_of(self, number: int) -> int | None:
        """The length of an open file, None while unknown."""
        return self._handles[number][0].size

    def is_kept(self, stream_id: int) -> bool:
        """Whether the stream is persisted."""
        entry = self._entries.get(stream_id)
        return entry is not None and entry.persist

    def ttl_of(self, stream_id: int) -> float | None:
        """Seconds that the stream's own bytes are kept after their last use; None: as long as the mount's."""
        entry = self._entries.get(stream_id)
        if entry is None:
            return None
        spec = entry.spec if self._settings is None else self._settings.effective(entry.spec)
        return spec.options.ttl

    def named(self, name: str) -> Entry:
        """Raises NotFound."""
        node = self._find(name)
        if node is None:
            raise NotFound(f"no stream {name!r}")
        if isinstance(node, Folder):
            raise NotFound(f"{name!r} is a folder, not a stream")
        return self._entries[node.stream_id]

    def _find(self, name: str) -> Node | None:
        node: Node | None = self._tree.root
        for part in os.fsencode(name).split(b"/"):
            node = node.children.get(part) if isinstance(node, Folder) else None
        return node

    async def open_named(self, name: str) -> Opened:
        """As `open`, by name, of whatever version is current, for this very process."""
        while True:
            try:
                return await self.open(self._tree.file_of(self.named(name).id).inode)
            except SourceChanged:
                continue  # as the kernel does: look the name up again, it is another inode now

    def stream_names(self, prefix: str = "") -> list[str]:
        """The names of streams that begin so, in the order of their bytes."""
        return sorted((e.name for e in self._entries.values() if e.name.startswith(prefix)), key=os.fsencode)

    def streams(self, names: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
        """What `ls --json` and `status --json` say of each stream, in the order of names."""
        entries = (
            sorted(self._entries.values(), key=lambda e: os.fsencode(e.name))
            if names is None
            else [self.named(name) for name in names]
        )
        return (self._described(entry) for entry in entries)

    def registered(self) -> list[Registration]:
        """Every stream as it was registered, secrets and all, in the order of names."""
        entries = sorted(self._entries.values(), key=lambda e: os.fsencode(e.name))
        return [Registration(spec=entry.spec, persist=entry.persist) for entry in entries]

    @property
    def ids(self) -> list[int]:
        """Of every stream."""
        return list(self._entries)

    def name_of(self, stream_id: int) -> str | None:
        """None where it is not registered any more, or its row is damaged."""
        with contextlib.suppress(Damaged):
            entry = self._entries.look(stream_id)
            return None if entry is None else entry.name
        return None

    def look(self, stream_id: int) -> tuple[dict[str, Any], Stream | None] | None:
        """What `status --json` says of a stream, and the stream itself where it was ever used; None where it was
        removed, or its row in the catalogue is damaged."""
        with contextlib.suppress(Damaged):
            entry = self._entries.look(stream_id)
            return None if entry is None else (self._described(entry), self._streams.get(stream_id))
        return None

    def _described(self, entry: Entry) -> dict[str, Any]:
        stream = self._streams.get(entry.id)
        shown = entry.described()
        if stream is not None:
            problem = stream.problem
            shown |= {
                "state": stream.state,
                "size": stream.size,
                "buffered": stream.buffered,
                "readers": stream.readers,
                "error": str(problem) if problem is not None else None,
                "mime": stream.facts.mime,
                "modified": stream.facts.modified,
                "generation": stream.generation.number if stream.generation is not None else None,
                "exit": stream.exit_status,
                "stderr": stream.stderr_tail or None,
                "persisted_path": str(stream.persisted_path) if stream.persisted_path is not None else None,
            }
        return shown

    def _drop(self, entry: Entry, *, keep_folders: bool = False) -> None:
        """The catalogue has forgotten the entry: so do we, but for those who have it open."""
        self._entries.discard(entry.id)
        self.news.tell("removed", entry.id, stream=entry.name)
        self._tree.remove(entry.id, keep_folders=keep_folders)
        self._let_go_eager(entry.id)
        stream = self._streams.pop(entry.id, None)
        if stream is None:
            self._cache.forget_dormant(entry.id)
            return
        stream.remove()
        self._removed[entry.id] = stream
        self._in_background(self._see_off, stream)

    async def _see_off(self, stream: Stream) -> None:
        """Give back what a removed stream holds once nobody has it open."""
        await stream.unread()
        self._removed.pop(stream.entry.id, None)
        await stream.aclose()

    def _replace_entry(self, entry: Entry) -> None:
        if entry.id not in self._entries:
            return  # removed meanwhile
        self._entries[entry.id] = entry
        self.news.touch(entry.id)
        stream = self._streams.get(entry.id)
        if stream is not None:
            stream.set_entry(entry)
        elif entry.persist:
            self._stream(entry.id).set_entry(entry)

    async def _change(self, method: Callable[..., T], *arguments: Any) -> T:
        """Run one catalogue transaction in a worker thread: it waits for the disk. What follows it must not be cut
        off by a cancelled request, or the mount would show another state than the catalogue."""
        with trio.CancelScope(shield=True):
            result = await trio.to_thread.run_sync(method, *arguments, limiter=self._catalog_turn)
        return result

    # In the background

    def _in_background(self, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        self._nursery.start_soon(self._guarded, work, *arguments)

    async def _guarded(self, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """A defect in `work` is logged, and ends nothing else."""
        try:
            await work(*arguments)
        except Exception:
            log.exception("%s failed in an unforeseen way", work.__qualname__)

    def _remember(self, stream_id: int, facts: Facts) -> None:
        if not self._closing:
            self._in_background(self._keep_facts, stream_id, facts)

    async def _keep_facts(self, stream_id: int, facts: Facts) -> None:
        try:
            self._replace_entry(await self._change(self._catalog.remember, stream_id, facts))
        except NotFound:
            log.debug("stream %d was removed before its facts were kept", stream_id)
        except StreamfsError as error:
            log.warning("cannot keep what stream %d said of itself: %s", stream_id, error)

    async def _probe(self, stream: Stream) -> None:
        async with self._probing:
            await stream.probe()

    async def _start_eagerly(self, stream: Stream) -> None:
        """Start the stream and hold it as a reader would that wants its first byte, though it is none."""
        try:
            handle = await stream.open()
        except StreamfsError as error:
            log.warning("cannot start stream %d: %s", stream.entry.id, error)
            return
        if stream.entry.id in self._eager or self._entries.get(stream.entry.id) is None:
            handle.close()
            return
        self._eager[stream.entry.id] = handle
        handle.generation.demand(0, 1)

    def _let_go_eager(self, stream_id: int) -> None:
        handle = self._eager.pop(stream_id, None)
        if handle is not None:
            handle.close()

    def fail_all(self) -> None:
        """Every open file fails from now on: the mount is about to end."""
        self._closing = self._context.closing = True
        for stream in (*self._streams.values(), *self._removed.values()):
            stream.interrupt(Closed("streamfs is shutting down"))

    async def aclose(self) -> None:
        """Give everything back: connections, processes, memory. Bounded by CLOSE_WITHIN seconds."""
        self.fail_all()
        with trio.move_on_after(CLOSE_WITHIN, shield=True) as patience:
            async with trio.open_nursery() as nursery:
                for stream in (*self._streams.values(), *self._removed.values()):
                    nursery.start_soon(self._guarded, stream.aclose)
        if patience.cancelled_caught:
            log.warning("some sources did not end within %g s", CLOSE_WITHIN)


def _wants_probe(spec: StreamSpec) -> bool:
    return spec.options.probe and isinstance(spec.source, UrlSource)


def _check_length(name: bytes) -> None:
    if len(name) > NAME_PART_BYTES:
        raise NameTooLong(f"a name is at most {NAME_PART_BYTES} bytes")
