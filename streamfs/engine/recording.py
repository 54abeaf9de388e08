"""The on-disk form of a buffer: a plain data file and an index of what in it is good.

The data file holds every byte at its own offset in the stream, sparse where nothing arrived. The index is
append-only: a header that names the stream, the generation and its facts, and that counts only under the file's own
name, then fixed-size entries. A DATA entry carries a CRC32C over key, generation, offset and data, so that no byte of
another stream, version or place can be taken for this one; a DROP entry takes a range back; an END entry states the
proven size. Each entry carries a checksum of its own, over key and generation too: loading passes over those that do
not check, torn or damaged. A lost DATA entry loses its bytes alone, and a lost DROP entry makes a claim that the
checksum of the data refutes. Header and END are there twice, so that no single damaged byte costs more than a block.

Nothing needs the order in which the kernel writes the two files: an entry whose data did not reach the disk fails
its checksum when read. Only `complete` makes durable promises: it syncs the data and the folder, and then says END in
the index and syncs that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import time
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import msgspec
from crc32c import crc32c

from streamfs.engine.ranges import RangeSet

BLOCK = 64 * 1024
"""Most bytes one DATA entry covers; extents end at multiples of it. Reading one byte from disk checks one extent:
64 KiB cost some 10 microseconds, and a GiB takes 512 KiB of index."""

_MAGIC = b"streamfs recording 3\n"
_OLDER_MAGIC = b"streamfs recording 2\n"  # one head, not bound to the file's name; read, and never made
_SALT = 8  # random bytes in the head of each index
_ENTRY = struct.Struct("<QQIII4x")  # offset, length, CRC of the data, kind, CRC of the entry
_CHECKED = struct.Struct("<QQII")  # what the CRC of the entry is of
_OFFSET = struct.Struct("<Q")
_DATA, _DROP, _END = 1, 2, 3

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_uint]
_SYNC_RANGE = 0x1 | 0x2 | 0x4  # wait for what is being written, write, and wait for that
_FLUSH_STEP = 16 * 1024 * 1024
"""Bytes written back between two looks whether that is still wanted: a slow disk takes a second for them."""
_SYNC_BEGIN = 0x2  # begin to write, wait for nothing
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 0x01, 0x02
PAGES_STAY = 16 * 1024 * 1024
"""Bytes written last whose pages stay in the kernel's memory even where nobody is expected to read them: the disk is
still writing them, and only what is written can be let go. A guess at what disks take in a tenth of a second."""
_PAGES_FOLLOWED = 256 * 1024 * 1024  # bytes of pages that wait to be let go; of what is past that the kernel takes care
DIRECT = 4096
"""Bytes that a write past the page cache (O_DIRECT) must be a multiple of, in length, offset and address: the largest
block of disks in use."""
_NOT_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.EMFILE, errno.ENFILE, errno.ENOENT}
"""What such writes answer where they cannot be: the file system has none, the disk's blocks are larger, the bytes do
not lie at a page, no descriptor is left, there is no /proc."""
_HINTS_OVER, _HINT_PATIENCE = 64 * 1024 * 1024, 0.5
"""Over so many bytes hints may take so many seconds. A disk that keeps them waiting longer may be slower than what
comes in: then the kernel takes in as much as it likes, and no hints are given for the next _PAGES_FOLLOWED bytes."""


_KEEP_LOCK = 0
"""For crc32c: it keeps the interpreter's lock. A block takes it 3 microseconds; a thread that has given the lock up may
wait for it a thousand times as long."""


class DamagedExtent(Exception):
    """An extent on disk does not match its checksum, or cannot be read. Not an error for users: the buffer
    decides whether it can be fetched again."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__(f"bytes {start} to {stop} of the recording are damaged")
        self.start = start
        self.stop = stop


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a recording says of itself. `key` names the stream and its source; `facts` is the caller's JSON."""

    key: str
    generation: int
    facts: msgspec.Raw = msgspec.Raw(b"{}")


class Extent(NamedTuple):
    start: int
    stop: int
    crc: int


class _File:
    """An open descriptor that closes when nobody refers to it any more.

    Readers in worker threads keep a reference while they read, so that an eviction can never hand their
    descriptor's number to another file under them.
    """

    __slots__ = ("fd",)

    def __init__(self, path: str | os.PathLike[str], flags: int) -> None:
        self.fd = -1
        self.fd = os.open(path, flags | os.O_CLOEXEC, 0o600)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class Recording:
    """One generation on disk.

    `append` and `read` may run in any thread; one thread appends at a time. The table of extents (`publish`,
    `drop`, `extents`) is guarded by the lock of the buffer that owns the recording.
    """

    def __init__(self, data: _File, index: _File | None, header: Header, path: Path | None, salt: bytes = b"") -> None:
        self.header = header
        self.path = path  # of the data file; None where it is anonymous
        self.size: int | None = None  # proven by an END entry
        self.durable = False
        """Whether `complete` has come to its end, and nothing was written or taken back since."""
        self._data = data
        self._index = index
        self._seed = crc32c(f"{header.key}\0{header.generation}\0".encode() + salt)
        self._starts = array("Q")  # INVARIANT: sorted; extents are disjoint
        self._stops = array("Q")
        self._crcs = array("I")
        self._drops: deque[Extent] = deque()  # taken out of the table, not yet out of the index
        self.suspect = False
        """Whether it was loaded without a proof that its data reached the disk: to be verified before `complete`."""
        self.unread = 0
        """Bytes of the index that did not check when it was loaded: torn by a crash, or damaged."""
        self._ragged = False  # the index has a bad tail behind the place for the next entry
        self.ahead = 0
        """Most bytes that an append allocates past what it writes in sequence, which makes later ones faster. The owner
        chooses, as disk space is taken by it."""
        self.passed = 0
        """No reader is expected to ask soon for what lies before this offset: its pages need not stay in the kernel's
        memory once they are on disk, and make room for the next. The owner moves it."""
        self._pages: deque[tuple[int, int]] = deque()  # (start, stop) of what was written, oldest first
        self._paged = 0  # INVARIANT: bytes in `_pages`
        self._hinted, self._hint_seconds = 0, 0.0  # bytes written with hints, and how long those took; begun anew often
        self._unhinted = 0  # bytes still to be written before hints are given again
        self.expected: int | None = None
        """The stream's size, where it is known: nothing is allocated past it. The owner tells."""
        self._past = 0  # extents before this were forgotten
        self._punched = 0  # disk space before this was given back
        self._allocated = 0  # the data file is allocated up to here, for sequential appends
        self._nowait = True

    # Making and loading

    @classmethod
    def create(cls, path: Path, header: Header) -> Recording:
        """A new, empty recording at `path` (data) and `path` + ".index". Replaces what was there. Raises OSError."""
        index_path = _index_path(path)
        for old in (index_path, path):
            old.unlink(missing_ok=True)
        data = _File(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        index = _File(index_path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        encoded = msgspec.json.encode(header)
        # Two recordings of one name and generation are told apart, too, should blocks of a removed one show through.
        salt = os.urandom(_SALT)
        check = _header_check(path, salt + encoded)
        _write_all(index.fd, 2 * (_MAGIC + struct.pack("<II", len(encoded), check) + salt + encoded))
        return cls(data, index, header, path, salt)

    @classmethod
    def anonymous(cls, folder: str | os.PathLike[str]) -> Recording:
        """A recording without names or index in `folder`; it goes when the object goes. Raises OSError."""
        try:
            data = _File(folder, os.O_RDWR | os.O_TMPFILE)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                raise
            # This file system knows no unnamed files.
            path = Path(folder, f"streamfs-{os.urandom(8).hex()}")
            data = _File(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            path.unlink()
        recording = cls(data, None, Header(key=os.urandom(16).hex(), generation=0), None)
        recording.ahead = 16 << 20  # nobody counts its space; from the first write on at most twice what is there
        return recording

    @classmethod
    def load(cls, path: Path) -> Recording | None:
        """The recording at `path`, as far as its index is whole; None where there is none that can be trusted.

        Data is not read here: each extent is checked when it is read. Nothing is changed before the first `append`.
        Raises OSError where reading fails.
        """
        try:
            data = _File(path, os.O_RDWR)
            index = _File(_index_path(path), os.O_RDWR)
        except FileNotFoundError:
            return None
        raw = _read_all(index.fd)
        head = _read_head(path, raw, 0)
        older = head is not None and raw.startswith(_OLDER_MAGIC)
        second = raw.find(_MAGIC, 1) if head is None else head.length
        again = head if older else _read_head(path, raw, second)
        found = head or again
        if found is None or second != found.length:
            return None
        recording = cls(data, index, found.header, path, found.salt)
        if head is None or again is None:
            recording.unread = found.length
        good = recording._replay(raw, found.length if older else 2 * found.length)
        recording._ragged = good < len(raw)
        os.lseek(index.fd, good, os.SEEK_SET)
        if recording.durable:
            os.fsync(index.fd)  # the writer was perhaps killed between its last entry and this
            if older:
                _sync_folder(path.parent)  # which came last then
        recording.suspect = not recording.durable
        recording._allocated = os.fstat(data.fd).st_size
        return recording

    def _replay(self, raw: bytes, position: int) -> int:
        """Apply the entries from `position` on; gives where the last good one ends."""
        good, ended = position, False
        self.unread += max(0, len(raw) - position)
        for at in range(position, len(raw) - _ENTRY.size + 1, _ENTRY.size):
            offset, length, crc, kind, check = _ENTRY.unpack_from(raw, at)
            if check != self._entry_check(offset, length, crc, kind):
                continue
            good, ended = at + _ENTRY.size, kind == _END
            self.unread -= _ENTRY.size
            if kind == _DATA:
                self._remove(offset, offset + length)  # a drop may have gone unlogged
                self.publish([Extent(offset, offset + length, crc)])
            elif kind == _DROP:
                self._remove(offset, offset + length)
            elif kind == _END:
                self.size = offset
        # Entries that were passed over may have been of bytes that are claimed by none now.
        self.durable = ended and sum(self._stops) - sum(self._starts) == self.size
        return good

    # Writing

    def append(self, runs: Sequence[tuple[int, memoryview]]) -> list[Extent]:
        """Write runs of (offset, bytes) into the data file and the index; returns the extents to `publish`.

        Blocks. Raises OSError, and then nothing of `runs` counts.
        """
        extents: list[Extent] = []
        self.durable = False
        left = self.ahead
        paged: list[tuple[int, int]] = []  # (start, stop) of what the kernel has pages of
        for offset, views in _stretches(runs):
            stop = offset + sum(map(len, views))
            left -= self._allocate(offset, stop - offset, left)
            done = self._write_direct(offset, views) if stop <= self.passed and not self._unhinted else offset
            if done < stop:
                paged.append((done, stop))
            for view in views:
                if done < offset + len(view):
                    skipped = max(0, done - offset)
                    _pwrite_all(self._data.fd, view[skipped:], offset + skipped)
                extents += self._extents_of(offset, view)
                offset += len(view)
        self.log_drops()
        self._log([(e.start, e.stop - e.start, e.crc, _DATA) for e in extents])
        if self.passed:
            self._let_pages_go(paged)
        return extents

    def _extents_of(self, start: int, view: memoryview) -> Iterator[Extent]:
        done = 0
        while done < len(view):
            end = min(done + BLOCK - (start + done) % BLOCK, len(view))
            yield Extent(start + done, start + end, self._crc(start + done, view[done:end]))
            done = end

    def _write_direct(self, start: int, views: Sequence[memoryview]) -> int:
        """Write past the page cache, where no reader is expected: the kernel would find pages, fill them and let them
        go again for nothing, which costs more than all else that is done with a byte. Gives how far it came, in whole
        blocks; the rest is to go the usual way. Raises OSError."""
        views = [] if start % DIRECT else list(takewhile(_is_whole, views))
        if not views:
            return start
        began = time.monotonic()
        try:
            # The file itself: somebody may have put another in the place of its name.
            direct = _File(f"/proc/self/fd/{self._data.fd}", os.O_WRONLY | os.O_DIRECT)
            done = os.pwritev(direct.fd, views, start)
        except OSError as error:
            if error.errno in _NOT_DIRECT:
                return start
            raise
        self._took(done, time.monotonic() - began)
        return start + done - done % DIRECT

    def _took(self, count: int, seconds: float) -> None:
        """A hint, or a write that waits for the disk, has taken so long: on a slow one there are none for a while."""
        self._hinted += count
        self._hint_seconds += seconds
        if self._hinted >= _HINTS_OVER:
            self._unhinted = _PAGES_FOLLOWED if self._hint_seconds > _HINT_PATIENCE else 0
            self._hinted, self._hint_seconds = 0, 0.0

    def _let_pages_go(self, paged: Iterable[tuple[int, int]]) -> None:
        """The kernel keeps what is written in memory until that is short. Where it is never read that costs dearly:
        each page is a fresh one. So it is told to begin writing at once, and a while later to let go of what readers
        have passed. Only hints: a refusal changes nothing."""
        written = _joined(paged)
        total = sum(stop - start for start, stop in written)
        self._pages.extend(written)
        self._paged += total
        self._unhinted = max(0, self._unhinted - total)
        leaving = _joined(self._leaving_pages())
        if self._unhinted:
            return
        began = time.monotonic()
        for start, stop in written:
            _libc.sync_file_range(self._data.fd, start, stop - start, _SYNC_BEGIN)
        for start, stop in leaving:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._data.fd, start, stop - start, os.POSIX_FADV_DONTNEED)
        self._took(total, time.monotonic() - began)

    def _leaving_pages(self) -> Iterator[tuple[int, int]]:
        """What of the pages has had time to be written and was passed by all readers: they are followed no longer."""
        while self._paged > PAGES_STAY:
            start, stop = self._pages[0]
            if stop > self.passed and self._paged <= _PAGES_FOLLOWED:
                break  # a reader is still to come here
            self._pages.popleft()
            self._paged -= stop - start
            if stop <= self.passed:
                yield start, stop

    def _allocate(self, offset: int, length: int, most: int) -> int:
        """fallocate ahead of sequential appends: 2.4 times faster than letting each write extend the file. Gives how
        many bytes past the run it took, `most` at most."""
        end = offset + length
        if not most or offset > self._allocated or end <= self._allocated or length < BLOCK:
            return 0  # sparse, small, or there already
        ahead = min(max(length, self._allocated), most)
        if self.expected is not None:
            ahead = max(0, min(ahead, self.expected - end))
        try:
            # This moves the file's end past its content; `complete` cuts the file to its size.
            os.posix_fallocate(self._data.fd, self._allocated, end - self._allocated + ahead)
            self._allocated = end + ahead
            return ahead
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSPC, errno.EFBIG):
                raise
            self._allocated = end  # the write itself will say if there is no room
            return 0

    def give_back_ahead(self, used: int, end: int) -> None:
        """Give back what is allocated ahead, for `unused` (used, end). Blocks. Not while another thread appends. Raises
        OSError."""
        if used == end:
            os.ftruncate(self._data.fd, end)
        else:
            _punch_hole(self._data.fd, used, self._allocated)
        self._allocated = used

    def flush(self, is_over: Callable[[], bool]) -> None:
        """Bring the data to the disk in steps, until `is_over`: a sync of gigabytes could not be stopped when the
        daemon has to end. Promises nothing, `complete` does; blocks. Raises OSError."""
        for offset in range(0, os.fstat(self._data.fd).st_size, _FLUSH_STEP):
            if is_over():
                return
            _flush_range(self._data.fd, offset, _FLUSH_STEP)

    def complete(self, size: int) -> None:
        """State that all of 0..size is here and make it durable: data, then the folder, then the index. Blocks.

        Raises OSError, also where somebody removed the files; then the recording is not complete.
        """
        os.ftruncate(self._data.fd, size)
        self._allocated = min(self._allocated, size)
        os.fsync(self._data.fd)
        if self._index is not None and self.path is not None:
            # The names first: they could lead to files of an earlier attempt otherwise, while the index says END.
            self.check_names()
            _sync_folder(self.path.parent)
            self.log_drops()
            self._log(2 * [(size, 0, 0, _END)])
            os.fsync(self._index.fd)
        self.size = size
        self.durable = not self._drops  # a reader may have found damage meanwhile

    def check_names(self) -> None:
        """Raises OSError where its names do not lead to its files: it is `durable` no more then. Blocks."""
        if self._index is not None and self.path is not None:
            try:
                _check_named(self.path, self._data.fd)
                _check_named(_index_path(self.path), self._index.fd)
            except OSError:
                self.durable = False
                raise

    def log_drops(self) -> None:
        """Write to the index what `drop` took back. One thread at a time, as `append`. Raises OSError; then it is
        still to be written."""
        count = len(self._drops)  # others may add to it meanwhile
        if count:
            self._log([(e.start, e.stop - e.start, 0, _DROP) for e in list(self._drops)[:count]])
            for _ in range(count):
                self._drops.popleft()

    def _log(self, entries: Sequence[tuple[int, int, int, int]]) -> None:
        if self._index is None:
            return
        packed = b"".join([_ENTRY.pack(*entry, self._entry_check(*entry)) for entry in entries])
        good = os.lseek(self._index.fd, 0, os.SEEK_CUR)
        if self._ragged:
            # No sync is needed: should a power cut bring the tail back, it does not check any better than it did.
            os.ftruncate(self._index.fd, good)
            self._ragged = False
        try:
            _write_all(self._index.fd, packed)
        except OSError:
            # A torn entry would hide everything appended after it.
            with contextlib.suppress(OSError):
                os.ftruncate(self._index.fd, good)
            os.lseek(self._index.fd, good, os.SEEK_SET)
            raise

    # The table of extents, under the owner's lock

    def publish(self, extents: Sequence[Extent]) -> None:
        starts, stops, crcs = self._starts, self._stops, self._crcs
        for start, stop, crc in extents:
            at = bisect_left(starts, start) if starts and starts[-1] > start else len(starts)
            starts.insert(at, start)
            stops.insert(at, stop)
            crcs.insert(at, crc)

    def extents(self, start: int, stop: int) -> list[Extent]:
        """The extents that overlap start..stop, in order."""
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop)
        return list(map(Extent, self._starts[first:last], self._stops[first:last], self._crcs[first:last]))

    def present(self) -> RangeSet:
        """All bytes that extents cover."""
        return RangeSet(zip(self._starts, self._stops, strict=True))

    def drop(self, start: int, stop: int) -> list[Extent]:
        """Take start..stop back, whole extents only: those that overlap it no longer count, and are returned. The
        index learns of it with `log_drops`."""
        removed = self._remove(start, stop)
        if removed:
            self.durable = False
            self._drops.extend(removed)
        return removed

    @property
    def empty(self) -> bool:
        """Whether no extent counts."""
        return not self._starts

    def unused(self) -> tuple[int, int] | None:
        """Where what is allocated ahead begins, and where the last of all bytes ends; None where nothing is."""
        below = bisect_left(self._starts, self._allocated)
        used = self._stops[below - 1] if below else 0
        return (used, self._stops[-1] if self._stops else 0) if used < self._allocated else None

    def drop_first(self, most: int) -> list[Extent]:
        """As `drop`, of about `most` bytes: the extents with the lowest offsets."""
        count = total = 0
        while count < len(self._starts) and total < most:
            total += self._stops[count] - self._starts[count]
            count += 1
        return self.drop(0, self._stops[count - 1]) if count else []

    def _remove(self, start: int, stop: int) -> list[Extent]:
        removed = self.extents(start, stop)
        if removed:
            first = bisect_right(self._stops, start)
            for column in (self._starts, self._stops, self._crcs):
                del column[first : first + len(removed)]
        return removed

    def forget_before(self, floor: int) -> int:
        """Take all whole extents before `floor` back; returns where what is left begins, for `punch`."""
        count = bisect_right(self._stops, floor)
        if count:
            self._past = self._stops[count - 1]
            for column in (self._starts, self._stops, self._crcs):
                del column[:count]
        return self._past

    def punch(self, floor: int) -> None:
        """Give the disk space before `floor` back; offsets stay. Blocks. Where the file system cannot, the space stays
        taken. Not while another thread appends. Raises OSError where the index cannot be written."""
        if floor > self._punched:
            self._log([(0, floor, 0, _DROP)])
            _punch_hole(self._data.fd, self._punched, floor)
            self._punched = floor

    def release(self, dropped: Sequence[Extent]) -> None:
        """Give the disk space of dropped extents back. Blocks. Where the file system cannot, the space stays taken.
        Not while another thread appends: the bytes may be on their way again."""
        start = stop = 0
        for extent in dropped:
            if extent.start != stop:
                _punch_hole(self._data.fd, start, stop)
                start = extent.start
            stop = extent.stop
        _punch_hole(self._data.fd, start, stop)

    # Reading

    def read(self, extents: Sequence[Extent], out: memoryview, *, wait: bool) -> bool:
        """Fill `out` with the bytes of `extents`, which follow one another, and check every one.

        `wait=False` takes only what the page cache has and never blocks: False where that is not all, and the
        caller asks again with wait=True in a worker thread. Raises DamagedExtent.
        """
        start = extents[0].start
        length = extents[-1].stop - start
        view = out[:length]
        if not wait and not self._nowait:
            return False
        flags = 0 if wait else os.RWF_NOWAIT
        done = 0
        while done < length:
            try:
                count = os.preadv(self._data.fd, [view[done:]], start + done, flags)
            except OSError as error:
                if not wait:
                    self._nowait = error.errno not in (errno.EOPNOTSUPP, errno.EINVAL)
                    return False
                raise _damaged(extents, start + done) from error
            if count == 0:
                raise _damaged(extents, start + done)
            done += count
            if not wait and done < length:
                return False
        for first, last, crc in extents:
            if self._crc(first, view[first - start : last - start]) != crc:
                raise DamagedExtent(first, last)
        return True

    def _crc(self, offset: int, data: memoryview) -> int:
        return crc32c(data, crc32c(_OFFSET.pack(offset), self._seed, _KEEP_LOCK), _KEEP_LOCK)

    def _entry_check(self, offset: int, length: int, crc: int, kind: int) -> int:
        # Seeded, so that an entry of a removed index that the file system let show through is none of ours.
        return crc32c(_CHECKED.pack(offset, length, crc, kind), self._seed, _KEEP_LOCK)

    @property
    def disk_bytes(self) -> int:
        """Disk space the data and the index take now, in bytes."""
        files = (self._data,) if self._index is None else (self._data, self._index)
        return sum(os.fstat(file.fd).st_blocks * 512 for file in files)

    def unlink(self) -> None:
        """Remove both names. Open readers keep what they hold. Raises OSError other than "not there"."""
        if self.path is not None:
            unlink_recording(self.path)


def disk_bytes(path: Path) -> int:
    """Disk space that the recording whose data file is `path` takes, in bytes. Raises OSError."""
    return sum(file.stat().st_blocks * 512 for file in (path, _index_path(path)))


def unlink_recording(path: Path) -> None:
    """Remove a recording by the path of its data file; the index first, so that no index outlives its data."""
    _index_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _damaged(extents: Sequence[Extent], offset: int) -> DamagedExtent:
    """The damage of the whole extent that holds `offset`."""
    extent = next(e for e in extents if e.start <= offset < e.stop)
    return DamagedExtent(extent.start, extent.stop)


class _Head(NamedTuple):
    header: Header
    salt: bytes
    length: int  # of the whole head in the index


def _read_head(path: Path, raw: bytes, at: int) -> _Head | None:
    """The head at `at` in the index; None where there is none that checks."""
    fixed = at + len(_MAGIC) + 8 + _SALT
    older = at == 0 and raw.startswith(_OLDER_MAGIC)
    if at < 0 or len(raw) < fixed or not (older or raw.startswith(_MAGIC, at)):
        return None
    length, check = struct.unpack_from("<II", raw, at + len(_MAGIC))
    salt, encoded = raw[fixed - _SALT : fixed], raw[fixed : fixed + length]
    expected = crc32c(salt + encoded) if older else _header_check(path, salt + encoded)
    if len(encoded) != length or expected != check:
        return None
    try:
        return _Head(msgspec.json.decode(encoded, type=Header), salt, fixed + length - at)
    except msgspec.MsgspecError:
        return None


def _header_check(path: Path, content: bytes) -> int:
    # Seeded with the file's name: after a power cut a new file may hold the blocks of a removed one, head and all.
    return crc32c(content, crc32c(os.fsencode(path.name)))


def _index_path(path: Path) -> Path:
    return path.with_name(path.name + ".index")


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _flush_range(fd: int, offset: int, length: int) -> None:
    if _libc.sync_file_range(fd, offset, length, _SYNC_RANGE) != 0:
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP):  # then fsync has it all to do
            raise OSError(code, os.strerror(code))


def _pwrite_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(fd, view, offset)
        view = view[count:]
        offset += count


def _read_all(fd: int) -> bytes:
    chunks = []
    while chunk := os.read(fd, 1 << 20):
        chunks.append(chunk)
    return b"".join(chunks)


def _check_named(path: Path, fd: int) -> None:
    """Raises OSError where `path` does not lead to the open file."""
    if not os.path.samestat(path.stat(), os.fstat(fd)):
        raise FileNotFoundError(errno.ENOENT, "another file has taken its place", str(path))


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_whole(view: memoryview) -> bool:
    return len(view) % DIRECT == 0


def _stretches(runs: Iterable[tuple[int, memoryview]]) -> list[tuple[int, list[memoryview]]]:
    """Runs of (offset, bytes); those that follow one another as one."""
    found: list[tuple[int, list[memoryview]]] = []
    end = -1
    for offset, view in runs:
        if offset == end:
            found[-1][1].append(view)
        else:
            found.append((offset, [view]))
        end = offset + len(view)
    return found


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, stop) of ranges; those that follow one another as one. Each is a call for which a thread may have to wait
    for its turn in the interpreter."""
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def _punch_hole(fd: int, start: int, stop: int) -> None:
    # Python offers no fallocate with flags. A refusal is not an error: the space is only given back later.
    if stop > start:
        _libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, start, stop - start)
