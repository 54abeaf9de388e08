"""The plain transport: HTTP/1.1 over trio sockets, with bodies received straight into the caller's memory.

Bytes of an identity body are touched once: the kernel (or OpenSSL) writes them where the caller wants them.
A receive is tried before it is waited for, because a wait costs more than a receive; a body that never makes us
wait is interrupted by a checkpoint every few receives so that other tasks get their turn.

HTTP/2, proxies and other schemes are the business of streamfs.sources.curl.
"""

from __future__ import annotations

import os
import re
import select
import socket
import ssl
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import h11
import trio

from streamfs.sources.transport import Ending, Identity, Request, TransportError

HEAD_LIMIT = 64 * 1024  # bytes of one reply head; nginx and Apache send a few hundred
TRAILER_LIMIT = 64 * 1024  # bytes of all trailer lines of a chunked body
CHUNK_LINE_LIMIT = 4096  # bytes of one chunk-size line with its extensions
INFORMATIONAL_LIMIT = 16  # 1xx replies before the final one
RECEIVE_AHEAD = 256 * 1024  # bytes read at once while looking for heads and small chunks
TLS_BATCH = 1 << 20  # bytes decrypted at most in one receive; OpenSSL gives one record (16 KiB) at a time
RECEIVES_PER_CHECKPOINT = 4  # with 1 MiB views other tasks wait a few ms at most
CONNECTIONS_PER_HOST = 4096
"""A guard against running out of everything, not a queue: each stream has at most 8 fetches, and a low cap would let a
few streams that stall on one host block every other stream of it."""
IDLE_SECONDS = 15.0  # below the 60-75 s after which common servers close, so that stale connections are rare
PREPARED = 1024  # requests kept ready but for what varies; each some hundred bytes
CONNECT_SECONDS = 10.0  # a dead address must leave time to try the next one within a stall timeout

_HEAD_END = re.compile(rb"\r?\n\r?\n")
_BAD_LENGTH = re.compile(rb"^content-length[ \t]*:(?![ \t]*\d+(?:[ \t]*,[ \t]*\d+)*[ \t]*\r?$).*\n", re.I | re.M)
_USUAL_HEAD = re.compile(
    rb"HTTP/1\.1 (?:20[0-36]|3\d[0-35-9]|4\d\d|5\d\d) [ -~]*\r\n(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[ -~\t]*\r\n)+\r\n"
)
_LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)
_VARYING = re.compile(r"(?:[A-Za-z-]+: [\x21-\x7e\x80-\xff]+\r\n)*")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?", re.S)


_Question = tuple[str, str, tuple[tuple[str, str], ...], str | None, Identity]
"""What a prepared request is made from."""


@dataclass(frozen=True, slots=True)
class _Key:
    """Connections with equal keys are interchangeable."""

    tls: bool
    host: str  # ASCII, without brackets
    port: int
    address: str | None
    identity: Identity

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


class PlainTransport:
    """A pool of HTTP/1.1 connections. Used under one trio run; `aclose` ends the idle ones, and whoever holds a
    response closes that."""

    def __init__(
        self,
        *,
        connections_per_host: int = CONNECTIONS_PER_HOST,
        idle_seconds: float = IDLE_SECONDS,
        connect_seconds: float = CONNECT_SECONDS,
    ) -> None:
        self._per_host = connections_per_host
        self._idle_seconds = idle_seconds
        self._connect_seconds = connect_seconds
        self._idle: dict[_Key, list[_Connection]] = {}  # the most recently used last
        self._slots: dict[tuple[bool, str, int], _Slots] = {}
        self._contexts: dict[Identity, ssl.SSLContext] = {}
        self._prepared: dict[_Question, _Prepared] = {}
        # One for all: what lands in it is copied out before any other task can run.
        self._scratch = memoryview(bytearray(HEAD_LIMIT))
        self._reaper: trio.CancelScope | None = None  # of the system task that runs while anything is idle
        self._closed = False

    async def request(self, request: Request) -> PlainResponse:
        """See transport.Transport. Waits for a free connection slot of the host, without a limit of its own."""
        if self._closed:
            raise TransportError("refused", "the transport is closed")
        prepared = self._prepare(request)
        data = _with_varying(prepared.head, request.varying)
        key = prepared.key
        slots = await self._acquire(key)
        try:
            return await self._exchange(key, request.method, data, slots)
        except BaseException:
            self._release(key, slots)
            raise

    async def aclose(self) -> None:
        """Close every idle connection; later requests are refused. Safe to call again."""
        self._closed = True
        if self._reaper is not None:
            self._reaper.cancel()
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()
        await trio.lowlevel.checkpoint()

    @property
    def idle_connections(self) -> int:
        return sum(map(len, self._idle.values()))

    # -- one exchange

    def _prepare(self, request: Request) -> _Prepared:
        question = (request.url, request.method, request.headers, request.address, request.identity)
        prepared = self._prepared.get(question)
        if prepared is None:
            key, target = _destination(request)
            prepared = _Prepared(key, _request_head(request, key, target))
            if len(self._prepared) >= PREPARED:
                self._prepared.clear()
            self._prepared[question] = prepared
        return prepared

    async def _exchange(self, key: _Key, method: str, data: bytes, slots: _Slots) -> PlainResponse:
        reused = self._take_idle(key)
        if reused is not None:
            try:
                return await self._ask(reused, key, method, data, slots)
            except TransportError as error:
                # The server closed it while our request was on its way: that says nothing of the server's health.
                if error.kind != "reset" or reused.heard:
                    raise
        return await self._ask(await self._connect(key), key, method, data, slots)

    async def _ask(self, connection: _Connection, key: _Key, method: str, data: bytes, slots: _Slots) -> PlainResponse:
        try:
            connection.heard = False
            await connection.send(data)
            head, rest = await _receive_head(connection, method, self._scratch)
            return PlainResponse(self, connection, key, slots, method, head, rest)
        except BaseException:
            connection.close()
            raise

    async def _connect(self, key: _Key) -> _Connection:
        with trio.move_on_after(self._connect_seconds):
            context = await self._context(key) if key.tls else None
            sock = await _dial(key)
            if context is None:
                return _Connection(sock)
            try:
                # Wrapping needs no I/O with do_handshake_on_connect off; it takes the descriptor over.
                secure = context.wrap_socket(sock, server_hostname=key.host, do_handshake_on_connect=False)
            except (OSError, ValueError) as error:
                sock.close()
                raise TransportError("tls", f"no TLS with {key.authority}: {error}") from error
            connection = _TlsConnection(secure)
            try:
                await connection.handshake(key)
            except BaseException:
                connection.close()
                raise
            return connection
        raise TransportError("connect", f"no connection to {key.authority} within {self._connect_seconds:g} s")

    async def _context(self, key: _Key) -> ssl.SSLContext:
        """The TLS settings of an identity, made once: reading the system's bundle takes tens of milliseconds."""
        context = self._contexts.get(key.identity)
        if context is None:
            try:
                context = await trio.to_thread.run_sync(_tls_context, key.identity)
            except (OSError, ValueError) as error:
                reason = error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
                raise TransportError("tls", f"the certificate files given cannot be used: {reason}") from error
            self._contexts[key.identity] = context
        return context

    # -- the pool: synchronous, so that nothing comes between a check and its update

    async def _acquire(self, key: _Key) -> _Slots:
        host = (key.tls, key.host, key.port)
        slots = self._slots.get(host)
        if slots is None:
            slots = self._slots[host] = _Slots(trio.Semaphore(self._per_host))
        slots.users += 1
        try:
            slots.free.acquire_nowait()
            return slots
        except trio.WouldBlock:
            pass
        try:
            await slots.free.acquire()
        except BaseException:
            self._forget(key, slots)
            raise
        return slots

    def _release(self, key: _Key, slots: _Slots) -> None:
        slots.free.release()
        self._forget(key, slots)

    def _forget(self, key: _Key, slots: _Slots) -> None:
        slots.users -= 1
        if slots.users == 0:
            self._slots.pop((key.tls, key.host, key.port), None)

    def _take_idle(self, key: _Key) -> _Connection | None:
        connections = self._idle.get(key, [])
        found = None
        while connections and found is None:
            connection = connections.pop()
            if connection.silent():
                found = connection
            else:  # closed by the server, or it says what nobody asked
                connection.close()
        if not connections:
            self._idle.pop(key, None)
        return found

    def _give_back(self, connection: _Connection, key: _Key, *, reuse: bool) -> None:
        # Whether the other side has closed it, or talks unasked, is looked at when it is taken again.
        if not reuse or self._closed:
            connection.close()
            return
        connection.idle_since = trio.current_time()
        self._idle.setdefault(key, []).append(connection)
        if self._reaper is None:
            self._reaper = trio.CancelScope()
            trio.lowlevel.spawn_system_task(self._reap, self._reaper, name="idle connections")

    async def _reap(self, scope: trio.CancelScope) -> None:
        """Close connections that stayed idle for too long; ends when none is idle."""
        with scope:
            while self._idle:
                oldest = min(connections[0].idle_since for connections in self._idle.values())
                await trio.sleep_until(oldest + self._idle_seconds)
                limit = trio.current_time() - self._idle_seconds
                for key, connections in list(self._idle.items()):
                    while connections and connections[0].idle_since <= limit:
                        connections.pop(0).close()
                    if not connections:
                        del self._idle[key]
        self._reaper = None


@dataclass(slots=True)
class _Slots:
    """Permission to hold connections to one host. INVARIANT: `users` counts holders and waiters."""

    free: trio.Semaphore
    users: int = 0


class _Connection:
    """A connected non-blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.idle_since = 0.0
        self.heard = False  # any byte since the last request was sent
        self._streak = 0  # receives since other tasks last had their turn
        self._poll: select.poll | None = None

    async def send(self, data: bytes) -> None:
        """Send all of `data`. Raises TransportError("reset")."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self.sock.send(rest) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                await trio.lowlevel.wait_writable(self.sock)
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self.sock)
            except OSError as error:
                raise TransportError("reset", f"the connection broke while asking: {_reason(error)}") from error

    async def receive_into(self, view: memoryview) -> int:
        """At least one byte into `view`, or 0 at the end. Raises TransportError("truncated"). A cancelled call
        has received nothing."""
        self._streak += 1
        if self._streak > RECEIVES_PER_CHECKPOINT:
            self._streak = 0
            await trio.lowlevel.checkpoint()
        while True:
            try:
                return self._receive_now(view)
            except (BlockingIOError, ssl.SSLWantReadError):
                self._streak = 0
                await trio.lowlevel.wait_readable(self.sock)
            except ssl.SSLWantWriteError:
                self._streak = 0
                await trio.lowlevel.wait_writable(self.sock)
            except OSError as error:
                raise TransportError("truncated", f"the connection broke: {_reason(error)}") from error

    def receive_ready(self, view: memoryview) -> int:
        """As `receive_into`, but 0 where nothing has arrived, at the end, or where other tasks are due a turn: then
        call that. Raises TransportError."""
        if self._streak >= RECEIVES_PER_CHECKPOINT:
            return 0
        try:
            count = self._receive_now(view)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except OSError as error:
            raise TransportError("truncated", f"the connection broke: {_reason(error)}") from error
        self._streak += 1
        return count

    def _receive_now(self, view: memoryview) -> int:
        return self.sock.recv_into(view)

    def silent(self) -> bool:
        """True while the other side has neither closed nor said anything that waits to be read."""
        if self._poll is None:
            self._poll = select.poll()  # select.select would refuse descriptors over 1023
            self._poll.register(self.sock, select.POLLIN)
        return not self._poll.poll(0)

    def close(self) -> None:
        if self.sock.fileno() != -1:
            trio.lowlevel.notify_closing(self.sock)
            self.sock.close()


class _TlsConnection(_Connection):
    sock: ssl.SSLSocket

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__(sock)
        self._outcome: OSError | int | None = None  # what ended the last batch: a failure, or 0 for the end

    async def handshake(self, key: _Key) -> None:
        while True:
            try:
                self.sock.do_handshake()
                return
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self.sock)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self.sock)
            except ssl.SSLCertVerificationError as error:
                text = f"the certificate of {key.authority} is not valid: {error.verify_message}"
                raise TransportError("tls", text) from error
            except (ssl.SSLError, ValueError) as error:
                raise TransportError("tls", f"no TLS with {key.authority}: {_reason(error)}") from error
            except OSError as error:
                raise TransportError("connect", f"no TLS with {key.authority}: {_reason(error)}") from error

    def _receive_now(self, view: memoryview) -> int:
        """As many records as have arrived, in one go. What ends a batch early is kept for the next call: a reset
        must not turn into an end because some bytes came before it."""
        if self._outcome is not None:
            if isinstance(self._outcome, int):
                return 0
            raise self._outcome
        room = min(len(view), TLS_BATCH)
        got = total = self._read(view)
        while got and total < room:
            try:
                got = self._read(view[total:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return total
            except OSError as error:
                self._outcome = error
                return total
            total += got
        if not got:
            self._outcome = 0
        return total

    def _read(self, view: memoryview) -> int:
        return self.sock.read(len(view), view)  # type: ignore[return-value]  # an int where a buffer is given

    def silent(self) -> bool:
        return not self.sock.pending() and super().silent()


class PlainResponse:
    """One reply: see transport.Response. Used by one task at a time."""

    def __init__(
        self,
        transport: PlainTransport,
        connection: _Connection,
        key: _Key,
        slots: _Slots,
        method: str,
        head: _ReplyHead,
        rest: bytes,
    ) -> None:
        self.status = head.status
        self.reason = head.reason
        self.http_version = head.version
        self.headers = head.headers
        length = head.length
        chunked = head.chunked
        self._framing: _Framing
        if method == "HEAD" or self.status in (204, 304):
            self.ending: Ending = "length"
            self._framing = _Counted(connection, memoryview(rest), 0)
        elif chunked:
            self.ending = "chunked"
            self._framing = _Chunked(connection, memoryview(rest))
        elif length is not None:
            self.ending = "length"
            self._framing = _Counted(connection, memoryview(rest), length)
        else:
            self.ending = "close"
            self._framing = _ToClose(connection, memoryview(rest))
        self._transport = transport
        self._connection = connection
        self._key = key
        self._slots: _Slots | None = slots
        self._lasting = _lasting(self.http_version, self.headers)

    async def receive_into(self, view: memoryview) -> int:
        return await self._framing.receive_into(view)

    def receive_ready(self, view: memoryview) -> int:
        """What `receive_into` would give if it did not have to wait; 0 where it would, or must be called to tell.
        Raises TransportError."""
        framing = self._framing
        return framing.receive_ready(view) if isinstance(framing, _Counted) else 0

    async def aclose(self, *, reuse: bool = True) -> None:
        """As the protocol says; never waits."""
        slots, self._slots = self._slots, None
        if slots is None:
            return
        reuse = reuse and self._lasting and self._framing.at_end and self.ending != "close"
        self._transport._give_back(self._connection, self._key, reuse=reuse and not self._framing.leftover)
        self._transport._release(self._key, slots)


class _Framing:
    """How one body is cut out of the connection's bytes. `leftover`: received with the head and not yet given."""

    def __init__(self, connection: _Connection, leftover: memoryview) -> None:
        self.connection = connection
        self.leftover = leftover
        self.at_end = False

    async def receive_into(self, view: memoryview) -> int:
        raise NotImplementedError

    def _from_leftover(self, view: memoryview) -> int:
        count = min(len(view), len(self.leftover))
        view[:count] = self.leftover[:count]
        self.leftover = self.leftover[count:]
        return count


class _Counted(_Framing):
    def __init__(self, connection: _Connection, leftover: memoryview, length: int) -> None:
        super().__init__(connection, leftover)
        self.left = length
        self.at_end = length == 0

    def receive_ready(self, view: memoryview) -> int:
        if self.at_end:
            return 0
        if len(view) > self.left:
            view = view[: self.left]
        got = self._from_leftover(view) if self.leftover else self.connection.receive_ready(view)
        self.left -= got
        self.at_end = self.left == 0
        return got

    async def receive_into(self, view: memoryview) -> int:
        if self.at_end:
            return 0
        if len(view) > self.left:
            view = view[: self.left]
        got = self._from_leftover(view) if self.leftover else await self.connection.receive_into(view)
        if got == 0:
            raise TransportError("truncated", f"the connection ended {self.left} bytes before the declared length")
        self.left -= got
        self.at_end = self.left == 0
        return got


class _ToClose(_Framing):
    async def receive_into(self, view: memoryview) -> int:
        if self.leftover:
            return self._from_leftover(view)
        if self.at_end:
            return 0
        got = await self.connection.receive_into(view)
        self.at_end = got == 0
        return got


class _Chunked(_Framing):
    """Small chunks are taken out of one large receive, large ones are received where they belong."""

    def __init__(self, connection: _Connection, leftover: memoryview) -> None:
        super().__init__(connection, memoryview(b""))
        size = max(RECEIVE_AHEAD, len(leftover))
        self._buffer = bytearray(size)
        self._buffer[: len(leftover)] = leftover
        self._ahead = memoryview(self._buffer)
        self._from = 0  # INVARIANT: [_from, _to) of the buffer is received and not yet used
        self._to = len(leftover)
        self._left = 0  # data bytes of the current chunk still to give
        self._first = True  # no chunk-size line seen yet, so no line end to expect before the next

    async def receive_into(self, view: memoryview) -> int:
        given = 0
        while True:
            if self.at_end:
                return given
            if self._left == 0:
                line_end = self._line_end(CHUNK_LINE_LIMIT)
                if line_end is None:
                    if given:
                        return given
                    await self._receive_more()
                    continue
                self._begin_chunk(line_end)
                if self._left == 0:
                    if given:  # the trailer is read with the next call: it may not have arrived
                        self._left = -1
                        return given
                    await self._finish()
                continue
            if self._left < 0:
                await self._finish()
                continue
            if self._from < self._to:
                count = min(len(view) - given, self._left, self._to - self._from)
                view[given : given + count] = self._ahead[self._from : self._from + count]
                self._from += count
                self._left -= count
                given += count
                if given == len(view):
                    return given
            elif given:
                return given
            elif self._left >= RECEIVE_AHEAD or self._left >= len(view):
                got = await self.connection.receive_into(view[: min(len(view), self._left)])
                if got == 0:
                    raise _chunked_cut()
                self._left -= got
                return got
            else:
                await self._receive_more()

    def _line_end(self, limit: int) -> int | None:
        """Where the next size line (past the line end that closes the previous chunk) ends, None: not arrived."""
        start = self._from
        if not self._first:
            if self._to - start < 2:
                return None
            if self._buffer[start : start + 2] != b"\r\n":
                raise TransportError("protocol", "the chunked body is malformed: a chunk is longer than it says")
            start += 2
        found = self._buffer.find(b"\n", start, self._to)
        if (self._to if found < 0 else found) - start > limit:
            raise TransportError("protocol", "the chunked body is malformed: an endless chunk-size line")
        return None if found < 0 else found

    def _begin_chunk(self, line_end: int) -> None:
        start = self._from if self._first else self._from + 2
        match = _CHUNK_SIZE.fullmatch(bytes(self._buffer[start:line_end]).rstrip(b"\r"))
        if match is None:
            raise TransportError("protocol", "the chunked body is malformed: a chunk size is not a number")
        self._left = int(match[1], 16)
        self._from = line_end + 1
        self._first = False

    async def _finish(self) -> None:
        """Read the trailer up to its empty line; nothing in it is used."""
        seen = 0
        while True:
            found = self._buffer.find(b"\n", self._from, self._to)
            if found < 0:
                if seen + self._to - self._from > TRAILER_LIMIT:
                    raise TransportError("protocol", "the trailer of the chunked body is too long")
                await self._receive_more()
                continue
            line = bytes(self._buffer[self._from : found]).rstrip(b"\r")
            seen += found + 1 - self._from
            self._from = found + 1
            if seen > TRAILER_LIMIT:
                raise TransportError("protocol", "the trailer of the chunked body is too long")
            if not line:
                break
        self._left = 0
        self.at_end = True
        self.leftover = self._ahead[self._from : self._to]  # no reuse when something follows

    async def _receive_more(self) -> None:
        if self._from:
            rest = self._to - self._from
            self._buffer[:rest] = self._buffer[self._from : self._to]
            self._from, self._to = 0, rest
        got = await self.connection.receive_into(self._ahead[self._to :])
        if got == 0:
            raise _chunked_cut()
        self._to += got


def _chunked_cut() -> TransportError:
    return TransportError("truncated", "the connection ended before the last chunk")


# -- heads


@dataclass(frozen=True, slots=True)
class _Prepared:
    """All of a request but its varying headers. `head` lacks the empty line at its end."""

    key: _Key
    head: bytes


@dataclass(frozen=True, slots=True)
class _ReplyHead:
    """`length`: of the body as declared, None where it is not. `headers`: names in lower case."""

    status: int
    reason: str
    version: str  # "1.0", "1.1" or "icy"
    headers: list[tuple[str, str]]
    length: int | None
    chunked: bool


def _destination(request: Request) -> tuple[_Key, str]:
    """Whom to ask, and the request target."""
    if request.identity.proxy is not None or request.identity.http2:
        raise TransportError("refused", "proxies and HTTP/2 need the curl transport")
    parts = urlsplit(request.url)
    scheme = parts.scheme.lower()
    if scheme not in ("http", "https") or not parts.hostname:
        raise TransportError("refused", f"not for the plain transport: {scheme or 'no scheme'}")
    try:
        host = parts.hostname.encode("idna").decode("ascii") if not parts.hostname.isascii() else parts.hostname
        port = parts.port or (443 if scheme == "https" else 80)
    except ValueError as error:
        raise TransportError("refused", "the URL's host or port is malformed") from error
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._[]|\\^{}`\"<>")
    if parts.query:
        target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?[]|\\^{}`\"<>")
    return _Key(scheme == "https", host, port, request.address, request.identity), target


def _request_head(request: Request, key: _Key, target: str) -> bytes:
    """The request without its varying headers and without the empty line at its end."""
    headers = list(request.headers)
    if not any(name.lower() == "host" for name, _ in headers):
        headers.insert(0, ("Host", key.authority))
    try:
        event = h11.Request(
            method=request.method,
            target=target.encode("ascii"),
            headers=[(name.encode("latin-1"), value.encode("utf-8")) for name, value in headers],
        )
        data = h11.Connection(h11.CLIENT).send(event) or b""
    except (h11.LocalProtocolError, UnicodeError):
        # Without the cause: h11 puts the offending value, perhaps a secret, into its message.
        raise TransportError("refused", "a header or the URL holds characters that cannot be sent") from None
    return data.removesuffix(b"\r\n")


def _with_varying(head: bytes, varying: tuple[tuple[str, str], ...]) -> bytes:
    lines = "".join([f"{name}: {value}\r\n" for name, value in varying])
    if _VARYING.fullmatch(lines) is None:
        raise TransportError("refused", "a header holds characters that cannot be sent")
    return head + lines.encode("latin-1") + b"\r\n"


async def _receive_head(connection: _Connection, method: str, piece: memoryview) -> tuple[_ReplyHead, bytes]:
    """The final reply's head and the bytes received behind it. `piece`: HEAD_LIMIT bytes of scratch, good until the
    next await."""
    buffer = bytearray()
    state: h11.Connection | None = None  # made where a head needs it
    for _ in range(INFORMATIONAL_LIMIT):
        searched = 0
        while (end := _HEAD_END.search(buffer, searched)) is None:
            if len(buffer) > HEAD_LIMIT:
                raise TransportError("protocol", f"the reply's head is longer than {HEAD_LIMIT} bytes")
            if len(buffer) >= 5 and not buffer.startswith((b"HTTP/", b"ICY ")):
                raise TransportError("protocol", "the answer is not HTTP")
            searched = max(0, len(buffer) - 3)
            try:
                got = await connection.receive_into(piece)
            except TransportError as error:
                raise TransportError("reset", f"no reply: {error}") from error
            if got == 0:
                raise TransportError("reset", "the connection was closed before a reply")
            connection.heard = True
            buffer += piece[:got]
        if end.end() > HEAD_LIMIT:
            raise TransportError("protocol", f"the reply's head is longer than {HEAD_LIMIT} bytes")
        text = bytes(buffer[: end.end()])
        del buffer[: end.end()]
        if state is None:
            usual = _usual_head(text)
            if usual is not None:
                return usual, bytes(buffer)
            state = _waiting_for_reply(method)
        text, icy = _tolerated(text)
        try:
            state.receive_data(text)
            event = state.next_event()
        except h11.RemoteProtocolError as error:
            raise TransportError("protocol", f"the reply's head is malformed: {_one_line(str(error))}") from error
        if isinstance(event, h11.Response):
            return _reply_head(event, icy), bytes(buffer)
        if not isinstance(event, h11.InformationalResponse):
            raise TransportError("protocol", "the reply's head is malformed")
    raise TransportError("protocol", "too many provisional replies")


def _usual_head(text: bytes) -> _ReplyHead | None:
    """A head of the form that nearly all replies have, and which leaves nothing to decide; None: let h11 judge it. That
    takes ten times as long, which tells where reads are small."""
    if _USUAL_HEAD.fullmatch(text) is None:
        return None
    first, *lines = text[:-4].decode("ascii").split("\r\n")
    headers = []
    lengths = []
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name == "transfer-encoding":
            return None
        if name == "content-length":
            lengths.append(value)
        headers.append((name, value))
    if len(lengths) != 1 or _LENGTH.fullmatch(lengths[0]) is None:
        return None
    return _ReplyHead(int(first[9:12]), first[13:], "1.1", headers, int(lengths[0]), chunked=False)


def _waiting_for_reply(method: str) -> h11.Connection:
    state = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_LIMIT)
    state.send(h11.Request(method=method, target="/", headers=[("Host", "any")]))
    state.send(h11.EndOfMessage())
    return state


def _reply_head(event: h11.Response, icy: bool) -> _ReplyHead:
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers]
    return _ReplyHead(
        event.status_code,
        bytes(event.reason).decode("latin-1"),
        "icy" if icy else bytes(event.http_version).decode("ascii"),
        headers,
        _declared_length(headers),
        any(name == "transfer-encoding" for name, _ in headers),
    )


def _tolerated(head: bytes) -> tuple[bytes, bool]:
    """`head` as h11 takes it, and whether it is a radio server's: `ICY 200 OK` is HTTP/1.0 by another name. A
    Content-Length that is no number is dropped, and the close then ends the body."""
    icy = head.startswith(b"ICY ")
    if icy:
        head = b"HTTP/1.0 " + head[4:]
    return _BAD_LENGTH.sub(b"", head), icy


def _declared_length(headers: list[tuple[str, str]]) -> int | None:
    for name, value in headers:
        if name == "content-length":
            return int(value)  # h11 has checked it and merged equal repetitions
    return None


def _lasting(version: str, headers: list[tuple[str, str]]) -> bool:
    tokens = {token.strip().lower() for name, value in headers if name == "connection" for token in value.split(",")}
    return (version == "1.1" and "close" not in tokens) or ("keep-alive" in tokens and version != "icy")


# -- dialling


async def _dial(key: _Key) -> socket.socket:
    """A connected non-blocking socket. Raises TransportError("connect")."""
    if key.address is not None:
        family = socket.AF_INET6 if ":" in key.address else socket.AF_INET
        return await _connect_to(family, (key.address, key.port), key)
    try:
        found = await trio.socket.getaddrinfo(key.host, key.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise TransportError("connect", f"the name {key.host} cannot be resolved: {_reason(error)}") from error
    failure = TransportError("connect", f"the name {key.host} has no address")
    for family, _type, _protocol, _name, address in found:
        try:
            return await _connect_to(family, (str(address[0]), *address[1:]), key)
        except TransportError as error:
            failure = error
    raise failure


async def _connect_to(family: int, address: tuple[str | int, ...], key: _Key) -> socket.socket:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise TransportError("connect", f"no socket: {_reason(error)}") from error
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        try:
            sock.connect(address)
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code)) from None
    except OSError as error:
        sock.close()
        raise TransportError("connect", f"no connection to {key.authority}: {_reason(error)}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def _tls_context(identity: Identity) -> ssl.SSLContext:
    """Blocking: reads the certificate files."""
    context = ssl.create_default_context(cafile=identity.cacert)
    context.set_alpn_protocols(["http/1.1"])
    if identity.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if identity.cert is not None:
        # An empty password instead of None: OpenSSL would ask for one on the terminal.
        context.load_cert_chain(identity.cert, identity.key, password=b"")
    return context


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "TLS failure").replace("_", " ").lower()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _one_line(str(error)) or type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
