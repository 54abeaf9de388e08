"""The command line's end of the control socket."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from streamfs.control import wire
from streamfs.errors import NotPermitted, Unreachable

DEFAULT_TIMEOUT = 30.0  # seconds of silence; a daemon at work sends a sign of life every wire.HEARTBEAT


class Client:
    """A connection to the daemon that listens at `path`. For one thread; a context manager.

    `timeout`: seconds without a word after which a call raises Unreachable. A long method does not run into it as
    long as the daemon's event loop lives.
    """

    def __init__(self, path: Path, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Raises Unreachable when nobody listens, NotPermitted when it is not ours to ask."""
        self._path = path
        self._timeout = timeout
        self._socket = _connect(path, timeout)

    def call(self, method: str, /, **params: Any) -> Any:
        """The result of the daemon's `method`, in JSON types. Raises the kind of StreamfsError that it raised there;
        Unreachable when the daemon stopped answering, and the change may then have happened or not."""
        result: Any = None
        for reply in self._exchange(method, params):
            if reply.last:
                result = reply.result
        return result

    def stream(self, method: str, /, **params: Any) -> Iterator[Any]:
        """The items of a streaming `method` as they come. Errors as for `call`. Leaving it early closes the
        connection, which ends the method."""
        finished = False
        try:
            for reply in self._exchange(method, params):
                if reply.item is not msgspec.UNSET:
                    yield reply.item
            finished = True
        finally:
            if not finished:
                self.close()

    def close(self) -> None:
        """Safe to call again."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _exchange(self, method: str, params: dict[str, Any]) -> Iterator[wire.Reply]:
        """Every reply that says something, the last one included."""
        message = wire.pack(wire.Request(method, msgspec.to_builtins(params)), wire.MAX_REQUEST)
        try:
            self._socket.settimeout(self._timeout)
            with contextlib.suppress(BrokenPipeError):  # refused before we asked: the reply says why
                self._socket.sendall(message)
            while True:
                size = wire.body_size(self._receive(wire.PREFIX.size), wire.MAX_REPLY)
                reply = wire.unpack_reply(self._receive(size))
                if reply.error is not None:
                    raise wire.to_error(reply.error)
                if reply.last or reply.item is not msgspec.UNSET:
                    yield reply
                if reply.last:
                    return
        except TimeoutError as error:
            self.close()
            raise Unreachable(
                f"the daemon did not answer for {self._timeout:g} seconds: is it stopped? 'streamfs umount' ends it"
            ) from error
        except OSError as error:
            self.close()
            raise Unreachable(f"the connection to the daemon broke ({error.strerror or error})") from error

    def _receive(self, size: int) -> bytes:
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionError("it closed the connection before it answered")
            view = view[count:]
        return bytes(buffer)


def _connect(path: Path, timeout: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            connection.connect(wire.address(directory, path.name))
        finally:
            os.close(directory)
        _check_server(connection, path)
    except PermissionError as error:
        connection.close()
        raise NotPermitted(f"the daemon's socket {path} is not yours to use") from error
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
        connection.close()
        raise Unreachable(f"no daemon listens at {path}: is anything mounted? ('streamfs mount DIR')") from error
    except OSError as error:
        connection.close()
        raise Unreachable(f"cannot reach the daemon at {path}: {error.strerror or error}") from error
    except BaseException:
        connection.close()
        raise
    return connection


def _check_server(connection: socket.socket, path: Path) -> None:
    """Requests carry secrets: they are for a daemon of our own, or of root, only."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(credentials)
    if uid not in (os.geteuid(), 0):
        raise NotPermitted(f"uid {uid} listens at {path}, not you: not used")


_UCRED = struct.Struct("iII")  # pid, uid, gid, as in unix(7)
