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
from streamfs.sources.http1 import HEAD_LIMIT, Counted, ReplyHead, framing, receive_head, request_head, with_varying
from streamfs.sources.transport import Ending, Identity, Request, TransportError

CONNECTIONS_PER_HOST = 4096
"""A guard against running out of everything, not a queue: each stream has at most 8 fetches, and a low cap would let a
few streams that stall on one host block every other stream of it."""
IDLE_SECONDS = 15.0  # below the 60-75 s after which common servers close, so that stale connections are rare
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
        self._idle_seconds = idle_seconds
        self._connect_seconds = connect_seconds
        self._idle: dict[Destination, list[Connection]] = {}  # the most recently used last
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
        data = with_varying(prepared.head, request.varying)
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
            prepared = _Prepared(key, request_head(request, key.authority, target))
            if len(self._prepared) >= PREPARED:
                self._prepared.clear()
            self._prepared[question] = prepared
        return prepared

    async def _exchange(self, key: Destination, method: str, data: bytes, slots: _Slots) -> PlainResponse:
        reused = self._take_idle(key)
        if reused is not None:
            try:
                return await self._ask(reused, key, method, data, slots)
            except TransportError as error:
                # The server closed it while our request was on its way: that says nothing of the server's health.
                if error.kind != "reset" or reused.heard:
                    raise
        return await self._ask(await self._connect(key), key, method, data, slots)

    async def _ask(
        self, connection: Connection, key: Destination, method: str, data: bytes, slots: _Slots
    ) -> PlainResponse:
        try:
            connection.heard = False
            await connection.send(data)
            head, rest = await receive_head(connection, method, self._scratch)
            return PlainResponse(self, connection, key, slots, method, head, rest)
        except BaseException:
            connection.close()
            raise

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

    def _release(self, key: Destination, slots: _Slots) -> None:
        slots.free.release()
        self._forget(key, slots)

    def _forget(self, key: Destination, slots: _Slots) -> None:
        slots.users -= 1
        if slots.users == 0:
            self._slots.pop((key.tls, key.host, key.port), None)

    def _take_idle(self, key: Destination) -> Connection | None:
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

    def _give_back(self, connection: Connection, key: Destination, *, reuse: bool) -> None:
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


class PlainResponse:
    """One reply: see transport.Response. Used by one task at a time."""

    def __init__(
        self,
        transport: PlainTransport,
        connection: Connection,
        key: Destination,
        slots: _Slots,
        method: str,
        head: ReplyHead,
        rest: bytes,
    ) -> None:
        self.status = head.status
        self.reason = head.reason
        self.http_version = head.version
        self.headers = head.headers
        self.ending: Ending
        self._framing, self.ending = framing(method, head, connection, memoryview(rest))
        self._transport = transport
        self._connection = connection
        self._key = key
        self._slots: _Slots | None = slots
        self._lasting = head.lasting

    async def receive_into(self, view: memoryview) -> int:
        return await self._framing.receive_into(view)

    def receive_ready(self, view: memoryview) -> int:
        """What `receive_into` would give if it did not have to wait; 0 where it would, or must be called to tell.
        Raises TransportError."""
        body = self._framing
        return body.receive_ready(view) if isinstance(body, Counted) else 0

    async def aclose(self, *, reuse: bool = True) -> None:
        """As the protocol says; never waits."""
        slots, self._slots = self._slots, None
        if slots is None:
            return
        reuse = reuse and self._lasting and self._framing.at_end and self.ending != "close"
        self._transport._give_back(self._connection, self._key, reuse=reuse and not self._framing.leftover)
        self._transport._release(self._key, slots)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """All of a request but its varying headers. `head` lacks the empty line at its end."""

    key: Destination
    head: bytes


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
