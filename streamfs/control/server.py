"""The daemon's end of the control socket, under trio.

`serve` runs every connection in a task of its own; within it one request is answered after the other. Nothing that a
client does, and no bug of a handler, ends the server.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import trio

from streamfs.control import wire
from streamfs.errors import InvalidRequest, NotFound, NotPermitted, StreamfsError
from streamfs.home import HomeLock

log = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[dict[str, Any]], Awaitable[Any] | AsyncIterator[Any]]
"""Gets the params. An awaited result is the reply; an async iterator's items are sent as they come. What it gives
must be JSON types or msgspec structs. A StreamfsError goes to the client; any other exception is logged here and
reported there as a fault of the daemon. A streaming handler is cancelled when its client goes away, any other runs
to its end."""

IDLE_TIMEOUT = 60.0  # seconds that a connection may stay without a request
TRANSFER_TIMEOUT = 30.0  # seconds that one message may take either way
_CLEANUP = 5.0  # seconds that a streaming handler gets to clean up once its client has gone
MAX_CLIENTS = 128  # connections at a time; later ones wait in the listen queue
_BACKLOG = 128
_UCRED = struct.Struct("iII")  # pid, uid, gid, as in unix(7)


class Listener:
    """A bound control socket; its file goes when it is closed."""

    def __init__(self, path: Path, bound: socket.socket) -> None:
        self.path = path
        self._identity = _identity(path)
        self.trio = trio.SocketListener(trio.socket.from_stdlib_socket(bound))

    def close(self) -> None:
        """Stop listening and remove the socket's file, if it is still ours. Safe to call again."""
        self.trio.socket.close()
        with contextlib.suppress(FileNotFoundError):
            if _identity(self.path) == self._identity:
                self.path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def listen(path: Path, lock: HomeLock) -> Listener:
    """Bind the control socket at `path`, 0600, in a private directory that exists (`Home.prepare`). A socket that a
    dead daemon left is replaced, which only the holder of the home may do: hence `lock`. Call it inside trio.
    Raises InvalidRequest."""
    if not lock.held:
        raise ValueError("the home is not locked")
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _remove_stale(path)
            os.fchmod(bound.fileno(), 0o600)  # bind gives the file these rights, less the umask: never open to others
            bound.bind(wire.address(directory, path.name))
            os.chmod(path.name, 0o600, dir_fd=directory)  # and this gives back what the umask took
        finally:
            os.close(directory)
        bound.listen(_BACKLOG)
        return Listener(path, bound)
    except OSError as error:
        bound.close()
        raise InvalidRequest(f"cannot listen at {path}: {error.strerror}") from error
    except BaseException:
        bound.close()
        raise


def _remove_stale(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise InvalidRequest(f"{path} is in the way of the control socket: move it away")
        path.unlink()


async def serve(
    listener: Listener,
    handlers: Mapping[str, Handler],
    *,
    idle_timeout: float = IDLE_TIMEOUT,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer until cancelled, then close the listener and every connection."""
    server = _Server(handlers, idle_timeout)
    with listener:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                await server.places.acquire()
                stream = await _accept(listener)
                nursery.start_soon(server.attend, stream)


async def _accept(listener: Listener) -> trio.SocketStream:
    while True:
        try:
            return await listener.trio.accept()
        except OSError as error:  # out of descriptors or memory: some come back as others finish
            log.error("the control socket cannot take a connection: %s", error)
            await trio.sleep(0.1)


class _Gone(Exception):
    """The client went away, or takes nothing any more."""


class _Connection:
    """Whole messages over a stream; several tasks may send."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._sending = trio.Lock()

    @property
    def is_allowed(self) -> bool:
        """Whether the peer is of our own uid, or root."""
        credentials = self._stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        assert isinstance(credentials, bytes)
        _, uid, _ = _UCRED.unpack(credentials)
        return uid in (os.geteuid(), 0)

    async def send(self, message: bytes) -> None:
        """Raises _Gone."""
        try:
            with trio.fail_after(TRANSFER_TIMEOUT):
                async with self._sending:
                    await self._stream.send_all(message)
        except (trio.BrokenResourceError, trio.TooSlowError) as error:
            raise _Gone from error

    async def receive(self, idle_timeout: float) -> wire.Request | None:
        """The next request; None at the end of the connection, and after `idle_timeout` seconds without one.
        Raises _Gone, and InvalidRequest for what is not a request: what follows it cannot be trusted either."""
        prefix = bytearray()
        try:
            with trio.move_on_after(idle_timeout) as waiting:
                prefix += await self._stream.receive_some(wire.PREFIX.size)
            if waiting.cancelled_caught or not prefix:
                return None
            with trio.fail_after(TRANSFER_TIMEOUT):
                await self._fill(prefix, wire.PREFIX.size)
                body = bytearray()
                await self._fill(body, wire.body_size(bytes(prefix), wire.MAX_REQUEST))
        except (trio.BrokenResourceError, trio.TooSlowError) as error:
            raise _Gone from error
        return wire.unpack_request(bytes(body))

    async def hangup(self) -> None:
        """Return when the client closes the connection, or sends what it should not send now."""
        with contextlib.suppress(trio.BrokenResourceError):
            await self._stream.receive_some(1)

    async def _fill(self, buffer: bytearray, size: int) -> None:
        while len(buffer) < size:
            piece = await self._stream.receive_some(min(size - len(buffer), 1 << 20))
            if not piece:
                raise _Gone
            buffer += piece


class _Server:
    def __init__(self, handlers: Mapping[str, Handler], idle_timeout: float) -> None:
        self.places = trio.Semaphore(MAX_CLIENTS)
        self._handlers = handlers
        self._idle_timeout = idle_timeout

    async def attend(self, stream: trio.SocketStream) -> None:
        """One connection, from the check of its peer to its end. Holds one of `places`."""
        connection = _Connection(stream)
        try:
            async with stream:
                if connection.is_allowed:
                    await self._converse(connection)
                else:
                    await connection.send(_pack_failure(NotPermitted("this daemon is not yours")))
        except _Gone:
            log.debug("a control client went away")
        except Exception:
            log.exception("a control connection failed")
        finally:
            self.places.release()

    async def _converse(self, connection: _Connection) -> None:
        while True:
            try:
                request = await connection.receive(self._idle_timeout)
            except InvalidRequest as error:
                await connection.send(_pack_failure(error))
                return
            if request is None:
                return
            await connection.send(await self._answer(connection, request))

    async def _answer(self, connection: _Connection, request: wire.Request) -> bytes:
        """Run the handler, and give its last reply. Raises _Gone if the client left in the middle of a stream."""
        done = trio.Event()
        last: bytes | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_show_life, connection, done)
            try:
                last = await self._run(connection, request)
            except _Gone:
                last = None  # raised below: out here a nursery would wrap it
            finally:
                done.set()
        if last is None:
            raise _Gone
        return last

    async def _run(self, connection: _Connection, request: wire.Request) -> bytes:
        """Raises _Gone; everything else that is wrong is in the reply."""
        try:
            handler = self._handlers.get(request.method)
            if handler is None:
                raise NotFound(f"the daemon knows no request {request.method!r}")
            outcome = handler(request.params)
            if isinstance(outcome, AsyncIterator):
                await _run_stream(connection, outcome)
                return wire.pack(wire.Reply(last=True), wire.MAX_REPLY)
            return wire.pack(wire.Reply(last=True, result=await outcome), wire.MAX_REPLY)
        except _Gone:
            raise
        except Exception as error:
            return _pack_failure(_presentable(request.method, error))


async def _run_stream(connection: _Connection, items: AsyncIterator[Any]) -> None:
    """Send every item. Raises what the iterator raises, and _Gone."""
    error: Exception | None = None
    gone = False
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            nonlocal gone
            await connection.hangup()
            gone = True
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            async for item in items:
                await connection.send(wire.pack(wire.Reply(item=item), wire.MAX_REPLY))
        except Exception as caught:
            error = caught  # raised below: out here a nursery would wrap it
        finally:
            nursery.cancel_scope.cancel()
            if isinstance(items, AsyncGenerator):
                with trio.CancelScope(deadline=trio.current_time() + _CLEANUP, shield=True):
                    await items.aclose()
    if error is not None:
        raise error
    if gone:
        raise _Gone


async def _show_life(connection: _Connection, done: trio.Event) -> None:
    """Send an empty reply now and then until `done`. The client's leaving is none of our business."""
    message = wire.pack(wire.Reply(), wire.MAX_REPLY)
    with contextlib.suppress(_Gone):
        while True:
            with trio.move_on_after(wire.HEARTBEAT):
                await done.wait()
                return
            await connection.send(message)


def _presentable(method: str, error: Exception) -> StreamfsError:
    """What a client may hear of `error`: all of a StreamfsError; of a bug only its kind, for its text may hold
    anything. A bug goes to the log."""
    cause: BaseException = error
    while isinstance(cause, BaseExceptionGroup) and len(cause.exceptions) == 1:
        cause = cause.exceptions[0]
    if isinstance(cause, StreamfsError):
        return cause
    log.error("the request %r failed", method, exc_info=error)
    return StreamfsError(f"the daemon failed at {method!r} ({type(cause).__name__}): its log says more")


def _pack_failure(error: StreamfsError) -> bytes:
    return wire.pack(wire.Reply(last=True, error=wire.to_failure(error)), wire.MAX_REPLY)


def _identity(path: Path) -> tuple[int, int]:
    info = path.lstat()
    return info.st_dev, info.st_ino
