"""file:/// URLs. Regular files are ranged; FIFOs, devices and files that do not know their size are one-way.

A file system may hang (a network that is gone, a disk that spins up), so everything that can wait runs in worker
threads, which are left behind when the caller gives up. Such a thread may end much later; it therefore reads into
memory of its own, never into the caller's, and holds the descriptor open for as long as it uses it. What the page
cache holds is read at once in the event loop.
"""

from __future__ import annotations

import contextlib
import errno
import mimetypes
import os
import stat
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote_to_bytes, urlsplit

import trio

from streamfs import descriptors
from streamfs.errors import Closed, SourceChanged, SourceFailed, SourceStalled, StreamfsError
from streamfs.sources.base import Facts
from streamfs.spec import StreamSpec, UrlSource

READ_BYTES = 1 << 20  # at most this much a call: 0.1 ms from the page cache, 0.6 ms by a thread (mostly the hop)
AHEAD_BYTES = 4 << 20  # the kernel is asked to read this far ahead of a read that had to wait for the disk
THREADS = 4  # for one stream; threads that hang with its file system hold up no other stream
CLOCK_TICK = 0.02  # seconds; Linux file times advance in steps of up to 10 ms
PROCFS_BYTES = 4096  # procfs says 0 and sysfs one page as the size of files with any other
_ENCODED = {"gzip": "application/gzip", "bzip2": "application/x-bzip2", "xz": "application/x-xz"}

T = TypeVar("T")


class FileSource:
    """The file of a file:/// URL."""

    def __init__(self, spec: StreamSpec) -> None:
        if not isinstance(spec.source, UrlSource):
            raise TypeError(f"not a URL: {type(spec.source).__name__}")
        self._url = spec.source.url
        self._calls = _Calls(spec.stall_timeout)

    async def open(self, start: int, stop: int | None, expect: Facts | None) -> FileBody | DeviceBody:
        """As the protocol says. A FIFO's body waits for a writer in its first `receive_into`, not here.

        Raises SourceFailed (missing, refused, a directory, a socket), SourceStalled, SourceChanged."""
        path = _path_of(self._url)
        descriptor = Descriptor()
        try:
            opened = await self._calls.run(f"opening {path!r}", lambda: _open(path, descriptor))
            await self._calls.let_clock_pass(opened.changed_at)
            if expect is not None and (expect.validator is None or expect.validator != opened.facts.validator):
                raise SourceChanged(f"{path!r} is not the file it was")
            if not opened.facts.ranged:
                return DeviceBody(descriptor, opened, self._calls)
            size = opened.facts.size
            assert size is not None
            if start >= size and start > 0:
                raise SourceFailed(f"{path!r} has {size} bytes: nothing starts at {start}")
            return FileBody(descriptor, opened, self._calls, start, size if stop is None else min(stop, size))
        except BaseException:
            descriptor.close()
            raise

    def begin(self, start: int, stop: int, expect: Facts) -> None:
        """Files are read in threads, which are always waited for."""

    async def probe(self) -> Facts:
        """The facts of a regular file; `Facts()` for what might change by being opened (a FIFO, a device)."""
        path = _path_of(self._url)
        descriptor = Descriptor()
        try:
            return await self._calls.run(f"looking at {path!r}", lambda: _probe(path, descriptor))
        finally:
            descriptor.close()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class Descriptor:
    """A file descriptor shared by a body and the threads it may have left behind.

    `close` takes effect once no thread is inside `with descriptor as fd`, so that a late thread can never read
    from another file that got the same number; if a thread is still opening, it closes what it has opened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd = -1  # guarded by _lock; -1: not open
        self._users = 0  # guarded by _lock
        self._closing = False  # guarded by _lock

    def open(self, path: str, flags: int) -> None:
        """Raises OSError, and Closed where `close` came first."""
        fd = os.open(path, flags | os.O_CLOEXEC)
        with self._lock:
            if not self._closing:
                self._fd = fd
                return
        os.close(fd)
        raise Closed(f"{path!r} was closed")

    def __enter__(self) -> int:
        with self._lock:
            if self._closing or self._fd < 0:
                raise Closed("the file was closed")
            self._users += 1
            return self._fd

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._users -= 1
            self._close_if_unused()

    def close(self) -> None:
        """Close now, or when the last user leaves. Safe to call again. Trio tasks that wait for the descriptor
        must have been told (notify_closing) before."""
        with self._lock:
            self._closing = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._closing and self._users == 0 and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Calls:
    """Calls into the file system that may hang: in threads of this stream's own, each ended by the stall timeout."""

    def __init__(self, stall_timeout: float | None) -> None:
        self._stall_timeout = stall_timeout
        self._threads = trio.CapacityLimiter(THREADS)

    async def run(self, doing: str, call: Callable[[], T]) -> T:
        """What `call` returns. Its OSError becomes SourceFailed; no answer in time, SourceStalled. The thread of a
        call that was given up runs on, and what it returns is dropped."""
        return await self.within(
            doing, lambda: trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._threads)
        )

    async def within(self, doing: str, awaitable: Callable[[], Awaitable[T]]) -> T:
        try:
            with trio.move_on_after(float("inf") if self._stall_timeout is None else self._stall_timeout):
                return await awaitable()
        except OSError as error:
            raise SourceFailed(f"{doing} failed: {error.strerror}") from error
        raise SourceStalled(f"{doing}: no answer for {self._stall_timeout:g} s")

    async def let_clock_pass(self, changed_at: float | None) -> None:
        """Wait, 20 ms at most, until a further change of a file is sure to get another time than the last one."""
        if changed_at is not None:
            await trio.sleep(min(max(0.0, changed_at + CLOCK_TICK - time.time()), CLOCK_TICK))


class _Opened:
    """What an opened file is. `changed_at`: seconds since the epoch, None where there is no validator."""

    def __init__(self, path: str, facts: Facts, *, pollable: bool = False, bounded: bool = True) -> None:
        self.path = path
        self.facts = facts
        self.pollable = pollable  # waits by readiness (a FIFO) rather than in a thread
        self.bounded = bounded  # its end of file is the end, and not just a writer that has gone
        self.changed_at: float | None = None


class FileBody:
    """Bytes `start` to `stop` of a regular file of known size, from one version of it."""

    end_proven = True

    def __init__(self, descriptor: Descriptor, opened: _Opened, calls: _Calls, start: int, stop: int) -> None:
        self.facts = opened.facts
        self.start = start
        self._descriptor = descriptor
        self._path = opened.path
        self._calls = calls
        self._offset = start
        self._stop = stop
        self._cached_reads = True  # until the file system turns out not to know RWF_NOWAIT
        self._failure: StreamfsError | None = None

    async def receive_into(self, view: memoryview) -> int:
        """As the protocol says. Every read is followed by a look at the file's identity, size and times, and its
        bytes are given only if these are those of the opening: SourceChanged otherwise."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._failure is not None:
            raise self._failure
        try:
            wanted = view[: min(len(view), READ_BYTES, self._stop - self._offset)]
            received = self._read_cached(wanted)
            if received is None:
                received = await self._read_in_thread(wanted)
            else:
                await trio.lowlevel.cancel_shielded_checkpoint()
        except StreamfsError as error:
            self._failure = error
            raise
        self._offset += received
        return received

    def _read_cached(self, wanted: memoryview) -> int | None:
        """Read what the page cache holds, without waiting; None if it holds nothing, or cannot tell. File systems
        that can tell are local: the look at the version does not wait either."""
        if not self._cached_reads:
            return None
        try:
            with self._descriptor as fd:
                received = os.preadv(fd, [wanted], self._offset, os.RWF_NOWAIT) if wanted else 0
                status = os.fstat(fd)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise SourceFailed(f"reading {self._path!r} failed: {error.strerror}") from error
            self._cached_reads = False
            return None
        return self._checked(received, len(wanted), status)

    async def _read_in_thread(self, wanted: memoryview) -> int:
        def read() -> tuple[bytes, os.stat_result]:
            with self._descriptor as fd:
                content = os.pread(fd, len(wanted), self._offset)
                status = os.fstat(fd)
                os.posix_fadvise(fd, self._offset + len(content), AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
                return content, status

        content, status = await self._calls.run(f"reading {self._path!r}", read)
        received = self._checked(len(content), len(wanted), status)
        wanted[:received] = content
        return received

    def _checked(self, received: int, wanted: int, status: os.stat_result) -> int:
        """`received`, if it is of the version that was opened."""
        if _validator(status) != self.facts.validator:
            raise SourceChanged(f"{self._path!r} changed while it was read")
        if received == 0 and wanted > 0:
            raise SourceFailed(f"{self._path!r} ends at {self._offset}, before its size of {self.facts.size}")
        return received

    async def aclose(self) -> None:
        self._failure = self._failure or Closed(f"{self._path!r} was closed")
        self._descriptor.close()
        await trio.lowlevel.cancel_shielded_checkpoint()


class DeviceBody:
    """Whatever comes out of a FIFO, a device or a file of procfs, from where it stands on: one-way."""

    start = 0

    def __init__(self, descriptor: Descriptor, opened: _Opened, calls: _Calls) -> None:
        self.facts = opened.facts
        self.end_proven = False
        self._descriptor = descriptor
        self._path = opened.path
        self._pollable = opened.pollable
        self._bounded = opened.bounded
        self._calls = calls
        self._received = 0
        self._failure: StreamfsError | None = None

    async def receive_into(self, view: memoryview) -> int:
        """As the protocol says. The end of a FIFO, when its last writer has closed it, is not proven."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._failure is not None:
            raise self._failure
        size = self.facts.size
        try:
            wanted = view[: READ_BYTES if size is None else min(READ_BYTES, size - self._received)]
            received = await self._receive(wanted) if wanted else 0
            if received == 0 and size is not None and self._received < size:
                raise SourceFailed(f"{self._path!r} ends at {self._received}, before its size of {size}")
        except StreamfsError as error:
            self._failure = error
            raise
        self._received += received
        self.end_proven = received == 0 and self._bounded
        return received

    async def _receive(self, wanted: memoryview) -> int:
        if self._pollable:
            return await self._calls.within(f"reading {self._path!r}", lambda: self._read_when_ready(wanted))
        # A driver decides how long a read takes. What an abandoned thread read is lost, and the body with it.
        try:
            content = await self._calls.run(f"reading {self._path!r}", lambda: self._read_blocking(len(wanted)))
        except trio.Cancelled:
            self._failure = SourceFailed(f"a read of {self._path!r} was given up, and what it brings is lost")
            raise
        wanted[: len(content)] = content
        return len(content)

    async def _read_when_ready(self, wanted: memoryview) -> int:
        # Wait first: a FIFO that never had a writer reads as ended, but does not poll so.
        while True:
            with self._descriptor as fd:
                try:
                    await trio.lowlevel.wait_readable(fd)
                    received = os.readv(fd, [wanted])
                except BlockingIOError:  # another program reads the same FIFO
                    continue
                except trio.ClosedResourceError:
                    raise Closed(f"{self._path!r} was closed") from None
            await trio.lowlevel.cancel_shielded_checkpoint()
            return received

    def _read_blocking(self, length: int) -> bytes:
        with self._descriptor as fd:
            os.set_blocking(fd, True)
            return os.read(fd, length)

    async def aclose(self) -> None:
        self._failure = self._failure or Closed(f"{self._path!r} was closed")
        if self._pollable:
            with contextlib.suppress(Closed), self._descriptor as fd:  # Closed: by an earlier aclose
                trio.lowlevel.notify_closing(fd)
        self._descriptor.close()
        await trio.lowlevel.cancel_shielded_checkpoint()


def _path_of(url: str) -> str:
    """The path that a file URL names. Raises SourceFailed with one line."""
    parts = urlsplit(url)
    if parts.query or parts.fragment:
        raise SourceFailed("a file URL has no query and no fragment: write ? as %3F and # as %23")
    if parts.scheme.lower() != "file" or parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise SourceFailed("a file URL is file:///ABSOLUTE/PATH")
    raw = unquote_to_bytes(parts.path)
    if b"\0" in raw:
        raise SourceFailed("a file URL cannot hold a NUL byte")
    return os.fsdecode(raw)


def _open(path: str, descriptor: Descriptor) -> _Opened:
    """Open and describe the file (in a thread). Raises OSError, SourceFailed, TooManyFiles."""
    _refuse(path, Path(path).stat().st_mode)  # before opening: the errno of open would say less
    descriptors.take_one_more()  # of those that threads open at this moment, a few may go past it
    descriptor.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    with descriptor as fd:
        status = os.fstat(fd)
        _refuse(path, status.st_mode)
        mime = _mime(path)
        if stat.S_ISREG(status.st_mode):
            if not _knows_its_size(fd, status.st_size):
                return _Opened(path, Facts(mime=mime))
            facts = Facts(
                size=status.st_size, ranged=True, validator=_validator(status), mime=mime, modified=status.st_mtime
            )
            opened = _Opened(path, facts)
            opened.changed_at = max(status.st_mtime, status.st_ctime)
            return opened
        if stat.S_ISBLK(status.st_mode):
            size = os.lseek(fd, 0, os.SEEK_END)
            os.lseek(fd, 0, os.SEEK_SET)
            return _Opened(path, Facts(size=size, mime=mime))
        return _Opened(path, Facts(mime=mime), pollable=stat.S_ISFIFO(status.st_mode), bounded=False)


def _probe(path: str, descriptor: Descriptor) -> Facts:
    status = Path(path).stat()
    _refuse(path, status.st_mode)
    return _open(path, descriptor).facts if stat.S_ISREG(status.st_mode) else Facts()


def _refuse(path: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise SourceFailed(f"{path!r} is a directory: name a file in it")
    if stat.S_ISSOCK(mode):
        raise SourceFailed(f"{path!r} is a socket: streamfs reads files, FIFOs and devices")


def _knows_its_size(fd: int, size: int) -> bool:
    """False for the files of procfs and sysfs, whose size says nothing. Nothing is read of files over a page."""
    return size > PROCFS_BYTES or len(os.pread(fd, PROCFS_BYTES + 1, 0)) == size


def _validator(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def _mime(path: str) -> str | None:
    # The slash keeps a name such as "data:x" from being taken for a URL.
    mime, encoding = mimetypes.guess_type("/" + path.rsplit("/", 1)[1])
    return mime if encoding is None else _ENCODED.get(encoding, "application/octet-stream")
