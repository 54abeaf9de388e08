"""The pyfuse3 adapter: its types to ours and back, errors to errno, and nothing else."""

from __future__ import annotations

import errno
import functools
import logging
import mmap
import os
import select
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import pyfuse3
import trio
from pyfuse3 import FileHandleT, FileNameT, InodeT, RequestContext, XAttrNameT

from streamfs.errors import NotFound, StreamfsError
from streamfs.filesystem import Attributes, FileSystem, Opened
from streamfs.interrupts import Interrupts
from streamfs.processes import process_of, program_of

log = logging.getLogger(__name__)

AHEAD_PATIENCE = 0.1
"""Seconds in which the rest of a read of several pages for the kernel's cache has to come once some of it is there;
then the kernel comes again for the single pages that programs wait for, which costs both sides far more. A megabyte at
10 MB/s."""
AHEAD_LONGEST = 10
"""Times AHEAD_PATIENCE that such a read waits at most: its first byte may have several megabytes before it, or a slow
reply. But the file stays open to us until then, even if its program has closed it."""
COMM_LETTERS = 15
"""How much of a program's name the kernel keeps."""
_NANOSECONDS = 10**9
_FIRST_LINK = 1 << 60
"""Above every inode of the tree: those of links that turn into files at once."""
_Handler = TypeVar("_Handler", bound=Callable[..., Awaitable[Any]])


def _guarded(handler: _Handler) -> _Handler:
    """Any exception but FUSEError that left a handler would end the whole mount."""

    @functools.wraps(handler)
    async def guarded(*arguments: Any, **named: Any) -> Any:
        try:
            return await handler(*arguments, **named)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise _answer_to(error, handler.__name__) from error

    return guarded  # type: ignore[return-value]


def _answer_to(error: Exception, handler: str) -> pyfuse3.FUSEError:
    """What the kernel is told of an error that is being handled."""
    if isinstance(error, StreamfsError):
        return pyfuse3.FUSEError(error.errno)
    log.exception("%s failed in an unforeseen way", handler)
    return pyfuse3.FUSEError(errno.EIO)


def _shown(handler: _Handler) -> _Handler:
    """Who asked for a change finds it wherever the daemon tells of its streams once the call has returned."""

    @functools.wraps(handler)
    async def change_and_show(operations: Operations, *arguments: Any, **named: Any) -> Any:
        try:
            return await handler(operations, *arguments, **named)
        finally:
            await operations.show()

    return change_and_show  # type: ignore[return-value]


def _program(pid: int) -> str | None:
    """The name of a process that is in a call of ours, as `ps` shows it; None where nothing can be seen of it."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:  # the kernel has it at hand: unlike cmdline it never waits
            return file.read().rstrip(b"\n").decode("utf-8", "backslashreplace")
    except OSError:
        return None


class _OpenFile(NamedTuple):
    opener: int  # pid
    inode: int
    direct: bool  # the kernel passes every read on
    nonblocking: bool  # opened with O_NONBLOCK while its bytes come in: reads give what is there, or EAGAIN


class _Listing(NamedTuple):
    inode: int
    names: list[bytes]  # as they were when the listing was begun, so that its offsets stay good


def _notify(handle: pyfuse3.PollHandle) -> None:
    try:
        handle.notify()
    except OSError as error:
        log.debug("nobody polls any more: %s", error)


class Operations(pyfuse3.Operations):
    """What the kernel asks, answered by a FileSystem."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, filesystem: FileSystem, interrupts: Interrupts, scanners: Iterable[str] = ()) -> None:
        """`scanners`: names of programs that look at many files and read on in few."""
        super().__init__()
        self._scanners = frozenset(name for given in scanners for name in (given, given[:COMM_LETTERS]))
        self._fs = filesystem
        self._interrupts = interrupts
        self._listings: dict[int, _Listing] = {}
        self._files: dict[int, _OpenFile] = {}
        self._next_listing = 1
        self._next_link = _FIRST_LINK
        self._ahead = 0  # cached reads of more than a page that wait
        self.most_ahead = 0
        """How many of those may wait. The kernel counts them as background reads, and at its limit of these nobody
        would be served any more. One that must not wait is refused: the kernel then reads for its program page by
        page, in the foreground, where there is no limit."""
        self._uid, self._gid = os.getuid(), os.getgid()
        self.show: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        """Awaited after each change of streams, before it is answered: puts it where it can be looked up."""

    # Names

    @_guarded
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        found = self._fs.lookup(parent_inode, name)
        self._fs.looked_up(found.inode)
        return self._entry(found)

    @_guarded
    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, count in inode_list:
            self._fs.forget(inode, count)

    @_guarded
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(self._fs.attributes(inode))

    @_guarded
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        number = self._next_listing
        self._next_listing += 1
        self._listings[number] = _Listing(inode, self._fs.names(inode))
        return FileHandleT(number)

    @_guarded
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listings[fh]
        if start_id == 0:  # also for rewinddir(3), which shows what is there by then
            listing = self._listings[fh] = listing._replace(names=self._fs.names(listing.inode))
        for index in range(start_id, len(listing.names)):
            name = listing.names[index]
            try:
                found = self._fs.lookup(listing.inode, name)
            except NotFound:
                continue  # gone since; an error here would end the listing, and unseen: glibc takes ENOENT for the end
            if not pyfuse3.readdir_reply(token, FileNameT(name), self._entry(found), index + 1):
                return
            self._fs.looked_up(found.inode)

    @_guarded
    async def releasedir(self, fh: FileHandleT) -> None:
        self._listings.pop(fh, None)

    @_guarded
    @_shown
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        self._check_owner(ctx)
        await self._fs.unlink(parent_inode, name)

    @_guarded
    @_shown
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        self._check_owner(ctx)
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise pyfuse3.FUSEError(errno.EINVAL)
        replace = not flags & pyfuse3.RENAME_NOREPLACE
        await self._fs.move(parent_inode_old, name_old, parent_inode_new, name_new, replace=replace)

    # Files

    @_guarded
    async def open(self, inode: InodeT, flags: int, ctx: RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise pyfuse3.FUSEError(errno.EACCES)
        sparing = bool(ctx.pid and self._scanners) and not self._scanners.isdisjoint(program_of(ctx.pid))
        with self._interrupts.watch(ctx.pid):
            process = process_of(ctx.pid)
            opened = await self._fs.open(inode, {"pid": process, "program": _program(process)}, sparing=sparing)
        eager = opened.direct and bool(flags & os.O_NONBLOCK)
        # With O_DIRECT programs get the replies to reads themselves, which must then not be those to read-ahead.
        # So for scanners: the kernel would read ahead what they never want.
        direct = opened.direct or sparing or bool(flags & os.O_DIRECT)
        if opened.doubted:
            direct = not self._voids_answers(opened, inode) or direct
        self._files[opened.handle] = _OpenFile(process, inode, direct, eager)
        # Pages may stay in the kernel's cache from open to open: an inode's bytes never change.
        return pyfuse3.FileInfo(fh=FileHandleT(opened.handle), direct_io=direct, keep_cache=not opened.direct)

    async def read(self, fh: FileHandleT, off: int, size: int) -> Any:
        try:
            found = self._fs.read_now(fh, off, size)
        except Exception as bug:
            raise _answer_to(bug, "read") from bug
        return found if found is not None else await self._read(fh, off, size)

    @_guarded
    async def _read(self, fh: FileHandleT, off: int, size: int) -> Any:
        file = self._files[fh]
        with self._interrupts.watch(file.opener, ahead=not file.direct, inode=file.inode, offset=off, size=size):
            if not file.direct:
                return await self._read_cached(fh, off, size)
            return await self._read_direct(file, fh, off, size)

    def _voids_answers(self, opened: Opened, inode: InodeT) -> bool:
        """See to it that the kernel takes in no answer about the inode's attributes that was given before now: it reads
        a reply when the program that asked runs next, and would then skip newer replies to requests that came before.
        Waits for nobody. False: this kernel cannot."""
        try:
            pyfuse3.invalidate_inode(inode, attr_only=True)
        except OSError as error:
            log.warning("the kernel cannot be told that a length is known now: %s", error)
            return False
        self._fs.trust_size(opened.handle)
        return True

    async def _read_direct(self, file: _OpenFile, fh: FileHandleT, off: int, size: int) -> memoryview:
        """Past the kernel's cache, except for a private mapping: what it touches comes as reads of pages, which look
        like a program's own. To those a short reply means zeros up to the end of the page, so only what cannot be a
        page's read is cut short: there is no page below a length of zero, and pages are read whole.

        With O_NONBLOCK it gives what is there, or EAGAIN, where it may; else it waits, as reads of regular files do."""
        unmappable = self._fs.size_of(fh) is None or bool((off | size) % mmap.PAGESIZE)
        if not unmappable or not file.nonblocking or not await self._interrupts.is_nonblocking(file.opener, file.inode):
            return await self._fs.read(fh, off, size, partial=unmappable)
        found = await self._fs.read_available(fh, off, size)
        if found is None:
            raise pyfuse3.FUSEError(errno.EAGAIN)
        return found

    async def _read_cached(self, fh: FileHandleT, off: int, size: int) -> memoryview:
        if size <= mmap.PAGESIZE:
            return await self._fs.read(fh, off, size)
        if self._ahead >= self.most_ahead:
            raise pyfuse3.FUSEError(errno.EAGAIN)  # no program sees this: the kernel comes again for single pages
        self._ahead += 1
        partly = False
        try:
            for _ in range(AHEAD_LONGEST):
                with trio.move_on_after(AHEAD_PATIENCE):
                    return await self._fs.read(fh, off, size)
                if partly:
                    break  # the pages that are there must not wait for the others
                partly = self._fs.has_some(fh, off, size)
        finally:
            self._ahead -= 1
        raise pyfuse3.FUSEError(errno.EAGAIN)

    @_guarded
    async def poll(
        self, inode: InodeT, fh: FileHandleT, poll_handle: pyfuse3.PollHandle | None, ctx: RequestContext
    ) -> int:
        notify = None if poll_handle is None else functools.partial(_notify, poll_handle)
        return select.POLLIN | select.POLLRDNORM if self._fs.is_ready(fh, notify) else 0

    @_guarded
    async def release(self, fh: FileHandleT) -> None:
        self._files.pop(fh, None)
        self._fs.release(fh)

    @_guarded
    async def flush(self, fh: FileHandleT) -> None:
        return

    @_guarded
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        return

    @_guarded
    async def setattr(
        self,
        inode: InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> pyfuse3.EntryAttributes:
        raise pyfuse3.FUSEError(errno.EACCES)

    # Extended attributes

    @_guarded
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        return self._fs.get_attribute(inode, os.fsdecode(name))

    @_guarded
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        return [XAttrNameT(name.encode()) for name in self._fs.list_attributes(inode)]

    @_guarded
    @_shown
    async def setxattr(self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext) -> None:
        self._check_owner(ctx)
        await self._fs.set_attribute(inode, os.fsdecode(name), value)

    @_guarded
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        raise pyfuse3.FUSEError(errno.EACCES)

    # The whole

    @_guarded
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        usage = self._fs.usage()
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = 4096
        answer.f_blocks = usage.total // 4096
        answer.f_bfree = answer.f_bavail = usage.free // 4096
        answer.f_files = usage.files
        answer.f_ffree = answer.f_favail = 0
        answer.f_namemax = 255
        return answer

    @_guarded
    async def access(self, inode: InodeT, mode: int, ctx: RequestContext) -> bool:
        return True  # default_permissions: the kernel checks modes

    @_guarded
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: int, rdev: int, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        raise pyfuse3.FUSEError(errno.EACCES)

    @_guarded
    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        raise pyfuse3.FUSEError(errno.EACCES)

    @_guarded
    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: int, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        self._check_owner(ctx)
        made = await self._fs.make_folder(parent_inode, name)
        self._fs.looked_up(made.inode)
        return self._entry(made)

    @_guarded
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        self._check_owner(ctx)
        await self._fs.remove_folder(parent_inode, name)

    @_guarded
    @_shown
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Registers the URL `target`. The kernel wants to hear of a symbolic link, and gets one for a moment, of an
        inode that is nobody's; it looks the name up before each use, and finds the file."""
        self._check_owner(ctx)
        entry = self._entry(await self._fs.link(parent_inode, name, target))
        entry.st_ino = InodeT(self._next_link)
        self._next_link += 1
        entry.st_mode = pyfuse3.ModeT(0o120777)
        entry.st_size = len(target)
        entry.attr_timeout = 0.0
        return entry

    @_guarded
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        raise pyfuse3.FUSEError(errno.EACCES)

    # Helpers

    def _check_owner(self, ctx: RequestContext) -> None:
        """Only who mounted, or root, changes anything: the kernel's own check knows modes, not streams."""
        if ctx.uid not in (self._uid, 0):
            raise pyfuse3.FUSEError(errno.EACCES)

    def _entry(self, found: Attributes) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = InodeT(found.inode)
        entry.st_mode = pyfuse3.ModeT(0o040755 if found.folder else 0o100644)
        entry.st_nlink = found.links
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_size = found.size
        entry.st_blksize = 1 << 20  # programs that ask (cp, cat) then read in large steps
        entry.st_blocks = (found.size + 511) // 512
        entry.st_mtime_ns = entry.st_atime_ns = int(found.modified * _NANOSECONDS)
        entry.st_ctime_ns = int(found.changed * _NANOSECONDS)
        entry.entry_timeout = 0.0  # names change at once when the catalogue does
        entry.attr_timeout = found.timeout
        return entry
