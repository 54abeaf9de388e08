"""StreamBuffer: random access to any iterable of bytes-like chunks.

Pull-driven: the reader that needs more bytes pulls them, one reader at a time; the others wait for theirs and one
of them takes over when the puller has what it wanted. No thread of its own, nothing is read ahead.
"""

from __future__ import annotations

import io
import operator
import tempfile
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, SupportsIndex

import trio

from streamfs.engine.buffer import Buffer, Missing
from streamfs.engine.pool import LARGE, Pool
from streamfs.engine.recording import Recording
from streamfs.engine.replies import Replies
from streamfs.errors import Closed, NoSpace, SourceFailed, StreamfsError

BytesLike = bytes | bytearray | memoryview
_END: Any = object()

DEFAULT_MAX_SIZE = 5 * 1024**2


class StreamBuffer:
    """Reads of a one-way stream at any offset, by any number of threads and trio tasks.

    `stream`: an iterable of bytes-like chunks of any length. It is started by the first read, pulled one chunk at a
    time and only as far as reads need, by one reader at a time; if it has a `close` method, that is called in the
    end. `size`: the declared length in bytes; another length turns out to be SourceFailed. `max_size`: bytes kept in
    memory; what goes past it moves, in steps of at most 1 MiB, to an unnamed file in the temporary directory. At
    least 1 MiB is used.

    Bytes that have arrived never wait for the source. If the stream raises, bytes that arrived stay readable, and
    every read beyond them raises SourceFailed with the original as its cause.
    """

    def __init__(self, stream: Iterable[BytesLike], size: int | None = None, max_size: int = DEFAULT_MAX_SIZE) -> None:
        if size is not None and size < 0:
            raise ValueError("size is a length: it cannot be negative")
        if max_size < 0:
            raise ValueError("max_size cannot be negative")
        self._stream = stream
        self._chunks = iter(stream)
        self._buffer = Buffer(Pool(max(max_size, LARGE), replies=Replies(most=0)), size=size)
        self._writer = self._buffer.writer(0)
        self._turn = threading.Lock()  # held by the reader that pulls; guards _chunks, _writer and _ended
        self._ended = False
        self._closed = False
        self._limiter: tuple[trio.lowlevel.TrioToken, trio.CapacityLimiter] | None = None  # of the latest trio run

    # What is known

    @property
    def size(self) -> int | None:
        """The length in bytes: as declared, or as the end proved; None while unknown."""
        return self._buffer.size

    @property
    def buffered(self) -> int:
        """Bytes that have arrived."""
        return self._buffer.buffered

    @property
    def complete(self) -> bool:
        """Whether all bytes have arrived and the end is known."""
        return self._buffer.complete

    # Reading

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer only at the end of the stream, none at or past it.

        Blocks until they have arrived; size 0 pulls nothing. Raises ValueError for a negative argument, SourceFailed
        where the stream broke before the last byte asked for, Closed after `close`.
        """
        offset, size = _checked(offset, size)
        try:
            while True:
                found = self._buffer.read_copy(offset, size)
                if not isinstance(found, Missing):
                    return found
                self._advance(offset, size)
        except BaseException:
            self._look_again_if_idle()  # this reader may have been the one that was woken to take over
            raise

    async def aread(self, offset: int, size: int) -> bytes:
        """As `read`, for trio: pulling happens in a worker thread. A cancelled read leaves the stream as it is;
        a pull that hangs goes on in its thread, to the end of its chunk, and what it brings is kept."""
        offset, size = _checked(offset, size)
        await trio.lowlevel.checkpoint()
        wanted = threading.Event()
        wanted.set()
        try:
            while True:
                found: Any = self._buffer.copy(offset, size)
                if isinstance(found, bytes):
                    return found
                if not isinstance(found, Missing):  # some of it rests on disk
                    found = await trio.to_thread.run_sync(self._buffer.read_copy, offset, size, limiter=self._threads())
                    if isinstance(found, bytes):
                        return found
                elif self._turn.locked():
                    await self._buffer.wait_async(offset, size, self._look_again_if_idle)
                else:
                    await trio.to_thread.run_sync(
                        self._pull_if_free, offset, size, wanted.is_set, limiter=self._threads(), abandon_on_cancel=True
                    )
        except BaseException:
            wanted.clear()
            self._look_again_if_idle()  # as in `read`
            raise

    def _threads(self) -> trio.CapacityLimiter:
        # A limiter belongs to one run: what a run left behind in a pull that hangs is not the next one's loss.
        token, known = trio.lowlevel.current_trio_token(), self._limiter
        if known is None or known[0] is not token:
            known = self._limiter = (token, trio.CapacityLimiter(8))
        return known[1]

    def __getitem__(self, index: SupportsIndex | slice) -> bytes | int:
        """`buf[a:b]` gives bytes and `buf[i]` an int, as for `bytes`. Negative and open ends read to the end of the
        stream. Raises ValueError for a step other than 1, IndexError for an index past the end."""
        if isinstance(index, slice):
            return self._slice(index)
        position = operator.index(index)
        if position < 0:
            position += self._drain()
            if position < 0:
                raise IndexError("index out of range")
        found = self.read(position, 1)
        if not found:
            raise IndexError("index out of range")
        return found[0]

    def _slice(self, index: slice) -> bytes:
        if index.step is not None and operator.index(index.step) != 1:
            raise ValueError("a stream is read forwards: the step must be 1")
        start = 0 if index.start is None else operator.index(index.start)
        stop = None if index.stop is None else operator.index(index.stop)
        if start < 0 or stop is None or stop < 0:
            start, stop, _ = slice(start, stop).indices(self._drain())
        return self.read(start, stop - start) if stop > start else b""

    def _drain(self) -> int:
        """Pull everything; the length."""
        while (gap := self._buffer.first_gap(0)) is not None:
            self.read(gap, 1)
        self._buffer.missing(0, 0)  # raises where the buffer is closed
        assert self._buffer.size is not None
        return self._buffer.size

    def open(self) -> StreamHandle:
        """A read-only binary file over the stream with a position of its own. Closing it leaves the buffer open."""
        return StreamHandle(self)

    # Pulling

    def _advance(self, offset: int, size: int) -> None:
        """Bring the read nearer to its bytes: pull them, or wait for who does. Then look again."""
        if self._pull_if_free(offset, size):
            return
        woken = threading.Event()
        with self._buffer.enlisted(offset, size, woken.set) as waits:
            if waits:
                self._look_again_if_idle()
                woken.wait()

    def _look_again_if_idle(self, _missing: int = 0, _stop: int = 0) -> None:
        """Closes the gap between losing the turn to a puller and being enlisted: if that puller left in between,
        nobody pulls, so wake a waiter (perhaps this one) to take over."""
        if not self._turn.locked():
            self._buffer.wake_one()

    def _pull_if_free(self, offset: int, size: int, wanted: Callable[[], bool] = lambda: True) -> bool:
        """Pull chunks until the read can be answered, or is no longer wanted. False: somebody else is pulling."""
        if not self._turn.acquire(blocking=False):
            return False
        try:
            while wanted() and not self._ended and self._buffer.missing(offset, size) is not None:
                self._pull_one()
        except StreamfsError:
            pass  # the buffer holds it, and every reader that it concerns raises it on its next look
        finally:
            self._turn.release()
            self._buffer.wake_one()
            self._finish_if_closed()
        return True

    def _pull_one(self) -> None:
        try:
            chunk = next(self._chunks, _END)
            if chunk is _END:
                self._ended = True
                self._buffer.ended(self._writer.position)
                return
            self._writer.append(memoryview(chunk).cast("B"), self._make_room)
        except Closed:
            raise
        except StreamfsError as error:
            self._fail(error)
        except BaseException as error:
            # An interrupt, too, may have ended the stream's generator: what follows would look like a clean end.
            failure = SourceFailed(f"the stream broke at byte {self._writer.position}: {error!r}")
            failure.__cause__ = error
            self._fail(failure)
            if not isinstance(error, Exception):
                raise

    def _fail(self, error: StreamfsError) -> None:
        self._ended = True
        self._buffer.fail(error)

    def _make_room(self) -> None:
        try:
            if self._buffer.recording is None:
                self._buffer.record(Recording.anonymous(tempfile.gettempdir()))
            moved = self._buffer.spill(LARGE) or self._buffer.spill(LARGE, all_of_it=True)
        except OSError as error:
            raise NoSpace(f"no room on disk for the stream's bytes: {error.strerror}") from error
        if not moved:
            raise NoSpace("no memory piece can be moved to disk")

    # The end

    def close(self) -> None:
        """Give memory and disk back and close the stream. Readers, waiting ones too, raise Closed. A pull that is
        under way in another thread ends with its chunk, and the stream is closed then. Safe to call again."""
        self._closed = True
        self._buffer.close()
        self._finish_if_closed()

    def _finish_if_closed(self) -> None:
        """Whoever gives the turn back looks, so that either `close` or the last puller finishes."""
        if self._closed and self._turn.acquire(blocking=False):
            try:
                self._finish()
            finally:
                self._turn.release()

    def _finish(self) -> None:
        """Under `_turn`, after `close`."""
        if self._writer.is_closed:
            return
        self._ended = True
        self._writer.close()
        for closable in (self._chunks, self._stream):
            close = getattr(closable, "close", None)
            if callable(close):
                close()
                break

    def __enter__(self) -> StreamBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StreamHandle(io.RawIOBase):
    """A read-only, seekable raw file over a StreamBuffer. One thread at a time, as for any file object."""

    def __init__(self, source: StreamBuffer) -> None:
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """The new position. io.SEEK_END reads the stream to its end. Raises ValueError below 0."""
        self._check_open()
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(whence)
        if whence == io.SEEK_END:
            base = self._source._drain()
        if base is None:
            raise ValueError(f"whence is 0, 1 or 2, not {whence}")
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}, before the start")
        self._position = base + offset
        return self._position

    def readinto(self, target: Any) -> int:
        """Fill `target`, less only at the end of the stream; returns how many bytes."""
        self._check_open()
        view = memoryview(target).cast("B")
        found = self._source.read(self._position, len(view))
        view[: len(found)] = found
        self._position += len(found)
        return len(found)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")


def _checked(offset: int, size: int) -> tuple[int, int]:
    offset, size = operator.index(offset), operator.index(size)
    if offset < 0 or size < 0:
        raise ValueError(f"offset and size cannot be negative (got {offset} and {size})")
    return offset, size
