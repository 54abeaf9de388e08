"""The plain transport: HTTP/1.1 over trio sockets, with bodies received straight into the caller's memory.

Bytes of an identity body are touched once: the kernel (or OpenSSL) writes them where the caller wants them. Here is
the pool of connections; `connection` makes one and moves its bytes, `http1` knows what they mean.

HTTP/2, proxies and other schemes are the business of streamfs.sources.curl.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import trio

from streamfs.sources.connection import Connection, Destination, connect, tls_context
from streamfs.sources.http1 import HEAD_LIMIT, Counted, HeadReader, ReplyHead, framing, request_head, with_varying
from streamfs.sources.idle import IdlePool
from streamfs.sources.transport import Ending, Identity, Request, TransportError

CONNECTIONS_PER_HOST = 4096
"""A guard against running out of everything, not a queue: each stream has at most 8 fetches, and a low cap would let a
few streams that stall on one host block every other stream of it."""
IDLE_SECONDS = 15.0  # below the 60-75 s after which common servers close, so that stale connections are rare
FIRST_RECEIVE = 8192  # bytes looked at for a head that is waited for on the spot: what is behind it is copied
PREPARED = 1024  # requests kept ready but for what varies; each some hundred bytes
CONNECT_SECONDS = 10.0  # a dead address must leave time to try the next one within a stall timeout

_Question = tuple[str, str, tuple[tuple[str, str], ...], str | None, Identity]
"""What a prepared request is made from."""


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
        self._connect_seconds = connect_seconds
        self._idle: IdlePool[Destination, Connection] = IdlePool(idle_seconds)
        self._slots: dict[tuple[bool, str, int], _Slots] = {}
        self._contexts: dict[Identity, ssl.SSLContext] = {}
        self._prepared: dict[_Question, Prepared] = {}
        # One for all: what lands in it is copied out before any other task can run.
        self._scratch = memoryview(bytearray(HEAD_LIMIT))
        self._closed = False

    async def request(self, request: Request) -> PlainResponse:
        """See transport.Transport. Waits for a free connection slot of the host, without a limit of its own."""
        if self._closed:
            raise TransportError("refused", "the transport is closed")
        prepared = self._prepare(request)
        data = with_varying(prepared.head, request.varying)
        slots = await self._acquire(prepared.key)
        try:
            reused = self._take_idle(prepared.key)
            if reused is not None:
                try:
                    return await Exchange(self, reused, prepared, data, slots).respond()
                except TransportError as error:
                    # The server closed it while our request was on its way: that says nothing of the server's health.
                    if error.kind != "reset" or reused.heard:
                        raise
            connection = await self._connect(prepared.key)
            return await Exchange(self, connection, prepared, data, slots).respond()
        except BaseException:
            self._release(prepared.key, slots)
            raise

    def begin(self, prepared: Prepared, varying: tuple[tuple[str, str], ...]) -> Exchange | None:
        """Send a request without waiting for anything, over a connection that is idle; None where there is none, or it
        does not take the request. `prepared`: of a response that was had before."""
        key = prepared.key
        connection = self._take_idle(key) if self._has_slot(key) else None
        if connection is None:
            return None
        data = with_varying(prepared.head, varying)
        try:
            data = data[connection.send_now(data) :]
        except TransportError:
            connection.close()
            return None
        return Exchange(self, connection, prepared, data, self._take_slot(key))

    async def aclose(self) -> None:
        """Close every idle connection; later requests are refused. Safe to call again."""
        self._closed = True
        self._idle.close()
        await trio.lowlevel.checkpoint()

    @property
    def idle_connections(self) -> int:
        return len(self._idle)

    # -- one exchange

    def _prepare(self, request: Request) -> Prepared:
        question = (request.url, request.method, request.headers, request.address, request.identity)
        prepared = self._prepared.get(question)
        if prepared is None:
            key, target = _destination(request)
            prepared = Prepared(key, request.method, request_head(request, key.authority, target))
            if len(self._prepared) >= PREPARED:
                self._prepared.clear()
            self._prepared[question] = prepared
        return prepared

    async def _connect(self, key: Destination) -> Connection:
        with trio.move_on_after(self._connect_seconds):
            return await connect(key, await self._context(key) if key.tls else None)
        raise TransportError("connect", f"no connection to {key.authority} within {self._connect_seconds:g} s")

    async def _context(self, key: Destination) -> ssl.SSLContext:
        """The TLS settings of an identity, made once: reading the system's bundle takes tens of milliseconds."""
        context = self._contexts.get(key.identity)
        if context is None:
            try:
                context = await trio.to_thread.run_sync(tls_context, key.identity)
            except (OSError, ValueError) as error:
                reason = error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
                raise TransportError("tls", f"the certificate files given cannot be used: {reason}") from error
            self._contexts[key.identity] = context
        return context

    # -- the pool: synchronous, so that nothing comes between a check and its update

    async def _acquire(self, key: Destination) -> _Slots:
        if self._has_slot(key):
            return self._take_slot(key)
        slots = self._slots[key.tls, key.host, key.port]
        slots.users += 1
        try:
            await slots.free.acquire()
        except BaseException:
            self._forget(key, slots)
            raise
        return slots

    def _has_slot(self, key: Destination) -> bool:
        slots = self._slots.get((key.tls, key.host, key.port))
        return slots is None or slots.free.value > 0

    def _take_slot(self, key: Destination) -> _Slots:
        """One that is free."""
        host = (key.tls, key.host, key.port)
        slots = self._slots.get(host)
        if slots is None:
            slots = self._slots[host] = _Slots(trio.Semaphore(self._per_host))
        slots.users += 1
        slots.free.acquire_nowait()
        return slots

    def _release(self, key: Destination, slots: _Slots) -> None:
        slots.free.release()
        self._forget(key, slots)

    def _forget(self, key: Destination, slots: _Slots) -> None:
        slots.users -= 1
        if slots.users == 0:
            self._slots.pop((key.tls, key.host, key.port), None)

    def _take_idle(self, key: Destination) -> Connection | None:
        while (connection := self._idle.take(key)) is not None:
            if connection.silent():
                return connection
            connection.close()  # closed by the server, or it says what nobody asked
        return None

    def _give_back(self, connection: Connection, key: Destination, *, reuse: bool) -> None:
        # Whether the other side has closed it, or talks unasked, is looked at when it is taken again.
        if reuse:
            self._idle.give(key, connection)
        else:
            connection.close()


@dataclass(slots=True)
class _Slots:
    """Permission to hold connections to one host. INVARIANT: `users` counts holders and waiters."""

    free: trio.Semaphore
    users: int = 0


@dataclass(frozen=True, slots=True)
class Prepared:
    """All of a request but its varying headers. `head` lacks the empty line at its end."""

    key: Destination
    method: str
    head: bytes


class Exchange:
    """One request on a connection, and the head of its reply as far as that has come. Whoever has it makes a response
    of it, or closes it; used by one task at a time."""

    def __init__(
        self, transport: PlainTransport, connection: Connection, prepared: Prepared, unsent: bytes, slots: _Slots
    ) -> None:
        connection.heard = False
        self._transport = transport
        self._connection = connection
        self._prepared = prepared
        self._unsent = unsent
        self._slots: _Slots | None = slots  # None: given back, or the response's
        self._reader = HeadReader(prepared.method)

    def response_by(self, until: float) -> PlainResponse | None:
        """The response, if its head comes by `until` (time.perf_counter), for which nobody else gets a turn. None: use
        `response`, or `close`. Raises TransportError; then it is closed."""
        if self._unsent:
            return None
        piece = self._transport._scratch[:FIRST_RECEIVE]
        try:
            while got := self._connection.receive_by(piece, until):
                response = self._heard(piece[:got])
                if response is not None:
                    return response
        except BaseException:
            self.close()
            raise
        return None

    async def response(self) -> PlainResponse:
        """Wait for it. Raises TransportError; then, as where it is cancelled, it is closed."""
        try:
            return await self.respond()
        except BaseException:
            self.close()
            raise

    async def respond(self) -> PlainResponse:
        """As `response`, but where it raises only the connection is closed: the slot is still the caller's."""
        connection, piece = self._connection, self._transport._scratch
        try:
            if self._unsent:
                await connection.send(self._unsent)
                self._unsent = b""
            while True:
                try:
                    got = await connection.receive_into(piece)
                except TransportError as error:
                    raise TransportError("reset", f"no reply: {error}") from error
                if got == 0:
                    raise TransportError("reset", "the connection was closed before a reply")
                response = self._heard(piece[:got])
                if response is not None:
                    return response
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        """Give up. Safe to call again; nothing happens where a response was given."""
        slots, self._slots = self._slots, None
        if slots is not None:
            self._connection.close()
            self._transport._release(self._prepared.key, slots)

    def _heard(self, piece: memoryview) -> PlainResponse | None:
        self._connection.heard = True
        found = self._reader.feed(piece)
        if found is None:
            return None
        assert self._slots is not None
        response = PlainResponse(self._transport, self._connection, self._prepared, self._slots, *found)
        self._slots = None
        return response


class PlainResponse:
    """One reply: see transport.Response. Used by one task at a time."""

    def __init__(
        self,
        transport: PlainTransport,
        connection: Connection,
        prepared: Prepared,
        slots: _Slots,
        head: ReplyHead,
        rest: bytes,
    ) -> None:
        self.status = head.status
        self.reason = head.reason
        self.http_version = head.version
        self.headers = head.headers
        self.ending: Ending
        self._framing, self.ending = framing(prepared.method, head, connection, memoryview(rest))
        self.transport = transport
        self.prepared = prepared
        """The request, for `transport.begin`."""
        self._connection = connection
        self._slots: _Slots | None = slots
        self._lasting = head.lasting

    async def receive_into(self, view: memoryview) -> int:
        return await self._framing.receive_into(view)

    def receive_ready(self, view: memoryview, until: float = 0.0) -> int:
        """What `receive_into` would give if it did not have to wait, or only `until` then, as Connection.receive_by; 0
        where there is more to do, and that must be called. Raises TransportError."""
        body = self._framing
        return body.receive_ready(view, until) if isinstance(body, Counted) else 0

    async def aclose(self, *, reuse: bool = True) -> None:
        """As the protocol says; never waits."""
        self.close(reuse=reuse)

    def close(self, *, reuse: bool = True) -> None:
        """As `aclose`."""
        slots, self._slots = self._slots, None
        if slots is None:
            return
        reuse = reuse and self._lasting and self._framing.at_end and self.ending != "close"
        self.transport._give_back(self._connection, self.prepared.key, reuse=reuse and not self._framing.leftover)
        self.transport._release(self.prepared.key, slots)


def _destination(request: Request) -> tuple[Destination, str]:
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
    return Destination(scheme == "https", host, port, request.address, request.identity), target
