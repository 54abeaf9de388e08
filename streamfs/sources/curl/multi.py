"""libcurl's multi interface under trio: many transfers, one driver task, no threads.

`TransferLoop` owns the multi handle, an epoll set of libcurl's sockets and the driver, a trio system task that
starts with the first transfer and ends with `aclose` or the trio run. `Transfer` is one easy handle: its bytes, its
pauses, its end. Nothing here knows HTTP; see `transport`.

How bytes move. libcurl hands over at most 16 KiB a callback. While a reader waits in `receive_into`, the callback
copies straight into the reader's view, and into a bounded backlog otherwise; when that is full it pauses the
transfer, which then costs no CPU until the reader has drained it. The reader is woken once for everything that one
pass of the driver brought. All of this happens in synchronous code of one thread: between two awaits nothing else
touches the state, and the callbacks run no code but their own.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import select
import socket
from collections import deque
from collections.abc import Callable

import pycurl
import trio

logger = logging.getLogger(__name__)

BACKLOG_LIMIT = 1 << 20  # bytes held for a reader that is behind; libcurl itself holds up to RECEIVE_SIZE more
RECEIVE_SIZE = 128 << 10  # bytes of one recv(); 128 KiB gave 2.2 GB/s over loopback, 16 KiB 1.3, 512 KiB 1.9
_EVENTS_PER_PASS = 64  # a guess: fairness between libcurl's sockets and the other tasks
_BROKEN_LIBCURL = range(0x081400, 0x081500)  # 8.20.x spins at full load while a transfer is paused


class CurlFailure(Exception):
    """libcurl ended a transfer: its CURLE_ number and its sentence."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class LoopClosed(Exception):
    """The loop was closed, or its driver broke, while the transfer was under way."""


def unusable_reason(version_number: int | None = None) -> str | None:
    """Why the libcurl at hand cannot be used, None where it can. `version_number`: 0xXXYYZZ, default: the real one."""
    number = int(pycurl.version_info()[2]) if version_number is None else version_number
    if number in _BROKEN_LIBCURL:
        return "libcurl 8.20 wastes a whole CPU on every paused transfer: install another version"
    return None


class Transfer:
    """One easy handle on a loop. Used by one task; `close` may be called at any time, from any task of the run.

    The owner sets the options (all but WRITEFUNCTION and BUFFERSIZE), then calls `start`.
    """

    def __init__(self, loop: TransferLoop) -> None:
        self.easy = pycurl.Curl()
        self.received = 0  # bytes handed over by libcurl
        self.failure: Exception | None = None  # set once, with `done`
        self.done = False  # libcurl has ended the transfer; the backlog may still hold bytes
        self.hold_at: int | None = None  # stop before libcurl's own end once `received` is this much; see `settle`
        self.held = False  # ... and that has happened: all bytes are here, the server's closing word is not asked for
        self._loop = loop
        self._started = False
        self._closed = False
        # INVARIANT: _backlog_size == sum(len(chunk) for chunk in _backlog), and at most BACKLOG_LIMIT
        # as long as libcurl hands over no more than that in one callback (it gives 16 KiB)
        self._backlog: deque[memoryview] = deque()
        self._backlog_size = 0
        self._paused = False
        self._waiter: trio.lowlevel.Task | None = None
        self._waiting_for: Callable[[], bool] | None = None  # None: for bytes or the end
        # INVARIANT: bytes 0.._filled of _view are the next ones in order; a view is set only while the backlog is empty
        self._view: memoryview | None = None
        self._filled = 0
        self.easy.setopt(pycurl.NOSIGNAL, 1)
        self.easy.setopt(pycurl.BUFFERSIZE, RECEIVE_SIZE)
        self.easy.setopt(pycurl.WRITEFUNCTION, self._on_data, use_memoryview=True)

    def start(self) -> None:
        """Hand the transfer to the driver. Raises LoopClosed."""
        self._loop.add(self)
        self._started = True

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds or the transfer is done. It is looked at after every pass that brought
        something for this transfer, and is to depend on nothing but its callbacks."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if not (self.done or condition()):
            self._waiting_for = condition
            await self._wait()

    async def receive_into(self, view: memoryview) -> int:
        """Put at least one byte at the front of `view` (not empty) and return how many; 0 once libcurl has declared
        the transfer complete, or it is `held`. Raises CurlFailure or LoopClosed after the bytes that came before it.
        A cancelled call has taken no byte."""
        await trio.lowlevel.checkpoint_if_cancelled()
        count = self._drain_into(view)
        if self._paused and self._backlog_size <= BACKLOG_LIMIT // 2:
            count += self._resume_into(view[count:])
        if count:
            return count
        if not (self.done or self.held):
            self._view, self._filled = view, 0
            try:
                await self._wait()
                count = self._filled
            finally:
                self._view = None
        if count == 0 and self.failure is not None:
            raise self.failure
        return count

    async def settle(self, word_timeout: float, farewell_timeout: float) -> None:
        """After `held`: let libcurl end the transfer in order, so that its connection can serve again.

        libcurl waits for the closing word of an ftp or sftp server (226, the reply to a close) inside its own call
        and so holds up every task. It is therefore let go only when the word has arrived, or `word_timeout` seconds
        later, and may then spend `farewell_timeout` seconds. An expired wait shows as CURLE_OPERATION_TIMEDOUT."""
        if self.held and not self.done:
            await self._readable(word_timeout)
            if not self._closed:
                await self._release(farewell_timeout)

    async def _release(self, farewell_timeout: float) -> None:
        elapsed = self.easy.getinfo(pycurl.TOTAL_TIME_T) // 1000  # milliseconds
        self.easy.setopt(pycurl.TIMEOUT_MS, elapsed + int(farewell_timeout * 1000))
        try:
            self.easy.pause(pycurl.PAUSE_CONT)
        except pycurl.error as error:
            self.finish(CurlFailure(*_code_and_text(error)))
        await self.wait_until(lambda: False)

    async def _readable(self, timeout: float) -> None:
        """Wait until the (control) connection has something to say, at most `timeout` seconds."""
        fd = self.easy.getinfo(pycurl.ACTIVESOCKET)
        if fd < 0:
            return
        # A descriptor of our own: libcurl may close its one meanwhile.
        with socket.socket(fileno=os.dup(fd)) as connection, trio.move_on_after(timeout):
            await trio.lowlevel.wait_readable(connection)

    def abandon_connection(self) -> None:
        """Shut down the connection of an ended transfer, so that libcurl finds it dead instead of reusing it; not if
        another transfer has it by now. For connections that carry one transfer at a time."""
        if self.done and not self._closed and not self._loop.connection_in_use(self):
            self._shut_down()

    def cut_connection(self) -> None:
        """Shut down the connection of a transfer that has not ended, where libcurl's farewell would block: libssh2
        waits for the server's answers in `close`. For connections that carry one transfer at a time."""
        if self._started and not self.done and not self._closed:
            self._shut_down()

    def _shut_down(self) -> None:
        fd = self.easy.getinfo(pycurl.ACTIVESOCKET)
        if fd >= 0:
            with socket.socket(fileno=os.dup(fd)) as connection, contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take the transfer off the loop at once; an unfinished one loses its connection (or HTTP/2 stream).
        Safe to call again."""
        if self._closed:
            return
        self._closed = True
        if self._started:
            self._loop.remove(self)
        self.finish(LoopClosed("the transfer is closed"))
        self._backlog.clear()
        self._backlog_size = 0
        self.easy.close()

    def finish(self, failure: Exception | None) -> None:
        """The loop's word that the transfer has ended, well (None) or not. Only the first one counts."""
        if not self.done:
            self.done = True
            self.failure = failure
            self.wake()

    def touch(self) -> None:
        """For callbacks: the waiting task is to be looked at when this pass of the driver is over."""
        self._loop.touched.add(self)

    def wake(self) -> None:
        """Let the waiting task go on, if what it waits for has come."""
        if self._waiter is None:
            return
        if not self.done:
            if self._waiting_for is not None:
                if not self._waiting_for():
                    return
            elif self._filled == 0 and not self.held:
                return
        waiter, self._waiter, self._waiting_for = self._waiter, None, None
        trio.lowlevel.reschedule(waiter)

    async def _wait(self) -> None:
        if self._waiter is not None:
            raise trio.BusyResourceError("another task waits for this transfer")
        self._waiter = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            # Bytes are copied into a view and the task woken in one synchronous pass: nothing is lost here. But the
            # task itself goes on only later, and what comes until then must not go into its view.
            self._waiter = self._waiting_for = self._view = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _on_data(self, data: memoryview) -> int:
        """libcurl's write callback: takes all of `data`, or none of it and the transfer pauses."""
        size = len(data)
        if self.held:
            return size  # the last piece once more, after the pause that held it
        taken = 0
        if self._view is not None and self._filled < len(self._view):
            taken = min(size, len(self._view) - self._filled)
        if self._backlog and self._backlog_size + size - taken > BACKLOG_LIMIT:
            self._paused = True
            return pycurl.WRITEFUNC_PAUSE  # type: ignore[no-any-return]
        if taken:
            assert self._view is not None
            self._view[self._filled : self._filled + taken] = data if taken == size else data[:taken]
            self._filled += taken
        if taken < size:
            self._backlog.append(memoryview(bytes(data[taken:])))
            self._backlog_size += size - taken
        self.received += size
        self.touch()
        if self.hold_at is not None and self.received >= self.hold_at:
            # Taken, and yet refused: libcurl keeps it, pauses, and does not go on to its blocking farewell.
            self.held = True
            return pycurl.WRITEFUNC_PAUSE  # type: ignore[no-any-return]
        return size

    def _drain_into(self, view: memoryview) -> int:
        count = 0
        while self._backlog and count < len(view):
            chunk = self._backlog[0]
            size = min(len(chunk), len(view) - count)
            view[count : count + size] = chunk[:size]
            count += size
            if size == len(chunk):
                self._backlog.popleft()
            else:
                self._backlog[0] = chunk[size:]
        self._backlog_size -= count
        return count

    def _resume_into(self, view: memoryview) -> int:
        """Go on after a pause; what libcurl had kept arrives at once, into `view` where the backlog is empty."""
        self._paused = False
        if not self._backlog and len(view):
            self._view, self._filled = view, 0
        try:
            self.easy.pause(pycurl.PAUSE_CONT)
        except pycurl.error as error:
            self.finish(CurlFailure(*_code_and_text(error)))
        count = self._filled if self._view is not None else 0
        self._view = None
        return count


class TransferLoop:
    """The multi handle and its driver. Belongs to one trio run, bound when the first transfer starts.

    `host_connections`: connections to one host at a time; further transfers wait for one of them to end, so the
    caller's timeout must cover that wait. HTTP/2 transfers share one connection and do not wait.
    """

    def __init__(self, host_connections: int) -> None:
        self.touched: set[Transfer] = set()  # transfers whose callbacks ran in this pass
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._on_socket)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._on_timer)
        self._multi.setopt(pycurl.M_MAX_HOST_CONNECTIONS, host_connections)
        self._multi.setopt(pycurl.M_PIPELINING, pycurl.PIPE_MULTIPLEX)
        self._transfers: dict[pycurl.Curl, Transfer] = {}
        self._epoll = select.epoll()
        self._interest: dict[int, int] = {}  # socket -> epoll mask; what _epoll holds
        self._deadline = math.inf  # when libcurl wants its timer, in trio's time
        self._sleep: trio.CancelScope | None = None  # the driver's wait, while it waits
        self._driver: trio.CancelScope | None = None
        self._driver_ended: trio.Event | None = None
        self._closed = False
        self._multi_closed = False

    @property
    def active(self) -> int:
        """How many transfers libcurl holds at this moment, paused ones included."""
        return len(self._transfers)

    def add(self, transfer: Transfer) -> None:
        if self._closed:
            raise LoopClosed("the transport is closed")
        if self._driver is None:
            self._driver = trio.CancelScope()
            self._driver_ended = trio.Event()
            trio.lowlevel.spawn_system_task(self._drive, self._driver, self._driver_ended, name="libcurl driver")
        self._transfers[transfer.easy] = transfer
        self._multi.add_handle(transfer.easy)

    def remove(self, transfer: Transfer) -> None:
        if self._transfers.pop(transfer.easy, None) is not None and not self._multi_closed:
            self._multi.remove_handle(transfer.easy)

    def connection_in_use(self, ended: Transfer) -> bool:
        """Whether a transfer that has not ended uses the last connection of one that has."""
        number = ended.easy.getinfo(pycurl.CONN_ID)
        others = (other for other in self._transfers.values() if not other.done)
        return any(other.easy.getinfo(pycurl.CONN_ID) == number for other in others)

    async def aclose(self) -> None:
        """End every transfer with LoopClosed, stop the driver, close every connection, also when cancelled.
        Safe to call again."""
        self._end_transfers(LoopClosed("the transport is closed"))
        if self._driver is not None and self._driver_ended is not None:
            self._driver.cancel()
            with trio.CancelScope(shield=True):
                await self._driver_ended.wait()
        await trio.lowlevel.checkpoint_if_cancelled()
        self._close_multi()

    def _end_transfers(self, failure: Exception) -> None:
        self._closed = True
        for transfer in list(self._transfers.values()):
            self.remove(transfer)
            transfer.finish(failure)

    def _close_multi(self) -> None:
        if not self._multi_closed:
            self._multi_closed = True
            self._multi.close()
            self._epoll.close()

    async def _drive(self, scope: trio.CancelScope, ended: trio.Event) -> None:
        """The driver task: everything libcurl does outside of add, remove and pause happens here."""
        failure: Exception = LoopClosed("the transport is closed")
        try:
            with scope:
                while True:
                    with trio.CancelScope(deadline=self._deadline) as self._sleep:
                        await trio.lowlevel.wait_readable(self._epoll.fileno())
                    self._sleep = None
                    self._pass()
        except Exception as error:
            # An exception that leaves a system task ends the whole program: every transfer gets it instead.
            logger.exception("the libcurl driver broke")
            failure = LoopClosed(f"the libcurl driver broke: {error!r}")
        finally:
            self._sleep = None
            self._end_transfers(failure)
            self._close_multi()
            ended.set()

    def _pass(self) -> None:
        """Let libcurl act on what is ready, then wake exactly the tasks it brought something."""
        if trio.current_time() >= self._deadline:
            self._deadline = math.inf
            self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
        for fd, events in self._epoll.poll(0, _EVENTS_PER_PASS):
            # An earlier action of this pass may have closed this socket.
            if fd in self._interest:
                self._multi.socket_action(fd, _select_mask(events))
        self._collect_ended()
        touched, self.touched = self.touched, set()
        for transfer in touched:
            transfer.wake()

    def _collect_ended(self) -> None:
        queued = 1
        while queued:
            queued, complete, failed = self._multi.info_read()
            for easy in complete:
                self._ended(easy, None)
            for easy, code, text in failed:
                self._ended(easy, CurlFailure(code, text))

    def _ended(self, easy: pycurl.Curl, failure: Exception | None) -> None:
        transfer = self._transfers.get(easy)
        if transfer is not None:
            transfer.finish(failure)

    def _on_socket(self, what: int, fd: int, _multi: object, _data: object) -> None:
        if what == pycurl.POLL_REMOVE:
            if self._interest.pop(fd, None) is not None:
                _unregister(self._epoll, fd)
            return
        mask = 0
        if what in (pycurl.POLL_IN, pycurl.POLL_INOUT):
            mask |= select.EPOLLIN
        if what in (pycurl.POLL_OUT, pycurl.POLL_INOUT):
            mask |= select.EPOLLOUT
        try:
            self._epoll.modify(fd, mask)
        except FileNotFoundError:
            # New, or closed and opened again under the same number.
            self._epoll.register(fd, mask)
        self._interest[fd] = mask

    def _on_timer(self, milliseconds: int) -> None:
        if self._multi_closed or self._closed:
            return
        self._deadline = math.inf if milliseconds < 0 else trio.current_time() + milliseconds / 1000
        if self._sleep is not None:
            self._sleep.deadline = self._deadline


def _select_mask(events: int) -> int:
    mask = 0
    if events & (select.EPOLLIN | select.EPOLLHUP):
        mask |= pycurl.CSELECT_IN
    if events & select.EPOLLOUT:
        mask |= pycurl.CSELECT_OUT
    if events & select.EPOLLERR:
        mask |= pycurl.CSELECT_ERR
    return mask


def _unregister(epoll: select.epoll, fd: int) -> None:
    try:
        epoll.unregister(fd)
    except FileNotFoundError:
        return  # already closed: the kernel has forgotten it
    except OSError as error:
        if error.errno != errno.EBADF:
            raise


def _code_and_text(error: pycurl.error) -> tuple[int, str]:
    code, text = (*error.args, "")[:2]
    return (int(code) if isinstance(code, int) else 0), str(text)
