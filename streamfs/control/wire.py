"""Messages of the control socket, without I/O.

A message is a length (4 bytes, big endian) and that many bytes of JSON. A client sends a `Request` and reads `Reply`s
until one with `last`; then it may send the next. Before that come the items of a streaming method, and empty replies,
which say that the daemon is still at work on it.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from streamfs import errors
from streamfs.errors import CommandFailed, InvalidRequest, StreamfsError
from streamfs.spec import from_json, to_json

VERSION = 1
MAX_REQUEST = 64 << 20  # bytes; a hundred thousand streams registered at once take some 30 MiB
MAX_REPLY = 256 << 20  # bytes; a listing of a hundred thousand streams takes some 40 MiB
HEARTBEAT = 5.0  # seconds without a reply after which the server says that it is still at work
PREFIX = struct.Struct(">I")


class Request(msgspec.Struct, omit_defaults=True):
    method: str
    params: dict[str, Any] = {}
    version: int = 0  # 0 only where the sender gave none


class Failure(msgspec.Struct, omit_defaults=True):
    """A StreamfsError. `kinds`: its class' name, then its bases', so that an older reader finds one it knows."""

    kinds: tuple[str, ...]
    text: str
    status: int | None = None  # of a CommandFailed


class Reply(msgspec.Struct, omit_defaults=True):
    """`item` is set in the middle of a streaming method, `result` or `error` in the last reply."""

    version: int = 0
    last: bool = False
    result: Any = None
    item: Any = msgspec.UNSET
    error: Failure | None = None


def pack(message: Request | Reply, limit: int) -> bytes:
    """The bytes to send. Raises InvalidRequest when they are more than `limit`, TypeError for what is not JSON."""
    message.version = VERSION
    body = to_json(message)
    if len(body) > limit:
        raise InvalidRequest(f"the message of {len(body)} bytes is over the limit of {limit}: ask for less at once")
    return PREFIX.pack(len(body)) + body


def body_size(prefix: bytes, limit: int) -> int:
    """How many bytes follow the four of `prefix`. Raises InvalidRequest when that is more than `limit`."""
    (size,) = PREFIX.unpack(prefix)
    if size > limit:
        raise InvalidRequest(f"a message of {size} bytes is over the limit of {limit}")
    return int(size)


def unpack_request(body: bytes) -> Request:
    """Raises InvalidRequest."""
    request = from_json(body, Request)
    _check_version(request.version, "the command line")
    return request


def unpack_reply(body: bytes) -> Reply:
    """Raises InvalidRequest."""
    reply = from_json(body, Reply)
    _check_version(reply.version, "the daemon")
    return reply


def _check_version(version: int, sender: str) -> None:
    if version != VERSION:
        raise InvalidRequest(
            f"{sender} is of another streamfs (protocol {version}, here {VERSION}): unmount and mount again"
        )


def to_failure(error: StreamfsError) -> Failure:
    kinds = tuple(kind.__name__ for kind in type(error).__mro__ if issubclass(kind, StreamfsError))
    return Failure(kinds, str(error), error.status if isinstance(error, CommandFailed) else None)


def to_error(failure: Failure) -> StreamfsError:
    """The error to raise: of the first of the kinds known here."""
    for name in failure.kinds:
        kind = getattr(errors, name, None)
        if kind is CommandFailed:
            return CommandFailed(failure.text, 1 if failure.status is None else failure.status)
        if isinstance(kind, type) and issubclass(kind, StreamfsError):
            return kind(failure.text)
    return StreamfsError(failure.text)


def address(directory_fd: int, name: str) -> str:
    """A path of the socket `name` in an open directory that fits the 107 bytes of a socket address, however long
    the directory's own path is."""
    return f"/proc/self/fd/{directory_fd}/{name}"
