"""One connection to one server: dialled, with TLS where it is asked for, non-blocking.

A receive is tried before it is waited for, because a wait costs more than a receive; a body that never makes us
wait is interrupted by a checkpoint every few receives so that other tasks get their turn. What a server that is near
sends within a moment can be waited for on the spot (`receive_by`), which costs less than to tell trio of it.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import time
from dataclasses import dataclass

import trio

from streamfs import descriptors
from streamfs.sources.transport import Identity, TransportError

TLS_BATCH = 1 << 20  # bytes decrypted at most in one receive; OpenSSL gives one record (16 KiB) at a time
RECEIVES_PER_CHECKPOINT = 4  # with 1 MiB views other tasks wait a few ms at most


@dataclass(frozen=True, slots=True)
class Destination:
    """Whom to ask, and as whom. Connections to equal ones are interchangeable."""

    tls: bool
    host: str  # ASCII, without brackets
    port: int
    address: str | None
    identity: Identity

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


class Connection:
    """A connected non-blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
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
                raise TransportError("reset", f"the connection broke while asking: {reason(error)}") from error

    def send_now(self, data: bytes) -> int:
        """Send what can be sent without waiting; how many bytes that were. Raises TransportError("reset")."""
        try:
            return self.sock.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return 0
        except OSError as error:
            raise TransportError("reset", f"the connection broke while asking: {reason(error)}") from error

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
                raise TransportError("truncated", f"the connection broke: {reason(error)}") from error

    def receive_ready(self, view: memoryview) -> int:
        """As `receive_into`, but 0 where nothing has arrived, at the end, or where other tasks are due a turn: then
        call that. Raises TransportError."""
        if self._streak >= RECEIVES_PER_CHECKPOINT:
            return 0
        count = self._receive_if_there(view)
        self._streak += count > 0
        return count

    def receive_by(self, view: memoryview, until: float) -> int:
        """As `receive_ready`, but nobody else gets a turn until something has arrived, or it is `until` by
        time.perf_counter: for what comes within some dozen microseconds, and little of it."""
        while not self._has_arrived():
            if time.perf_counter() >= until:
                return 0
        return self._receive_if_there(view)

    def _receive_if_there(self, view: memoryview) -> int:
        try:
            return self._receive_now(view)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except OSError as error:
            raise TransportError("truncated", f"the connection broke: {reason(error)}") from error

    def _receive_now(self, view: memoryview) -> int:
        return self.sock.recv_into(view)

    def silent(self) -> bool:
        """True while the other side has neither closed nor said anything that waits to be read."""
        return not self._has_arrived()

    def _has_arrived(self) -> bool:
        """Whether a receive would tell something: bytes, the end, or why there are none."""
        if self._poll is None:
            self._poll = select.poll()  # select.select would refuse descriptors over 1023
            self._poll.register(self.sock, select.POLLIN)
        return bool(self._poll.poll(0))

    def close(self) -> None:
        if self.sock.fileno() != -1:
            trio.lowlevel.notify_closing(self.sock)
            self.sock.close()


class TlsConnection(Connection):
    sock: ssl.SSLSocket

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__(sock)
        self._outcome: OSError | int | None = None  # what ended the last batch: a failure, or 0 for the end

    async def handshake(self, destination: Destination) -> None:
        while True:
            try:
                self.sock.do_handshake()
                return
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self.sock)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self.sock)
            except ssl.SSLCertVerificationError as error:
                text = f"the certificate of {destination.authority} is not valid: {error.verify_message}"
                raise TransportError("tls", text) from error
            except (ssl.SSLError, ValueError) as error:
                raise TransportError("tls", f"no TLS with {destination.authority}: {reason(error)}") from error
            except OSError as error:
                raise TransportError("connect", f"no TLS with {destination.authority}: {reason(error)}") from error

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

    def _has_arrived(self) -> bool:
        return self.sock.pending() > 0 or super()._has_arrived()


async def connect(destination: Destination, context: ssl.SSLContext | None) -> Connection:
    """A connection, with TLS where there is a `context`. Raises TransportError("connect" or "tls"), TooManyFiles."""
    sock = await _dial(destination)
    if context is None:
        return Connection(sock)
    try:
        # Wrapping needs no I/O with do_handshake_on_connect off; it takes the descriptor over.
        secure = context.wrap_socket(sock, server_hostname=destination.host, do_handshake_on_connect=False)
    except (OSError, ValueError) as error:
        sock.close()
        raise TransportError("tls", f"no TLS with {destination.authority}: {error}") from error
    connection = TlsConnection(secure)
    try:
        await connection.handshake(destination)
    except BaseException:
        connection.close()
        raise
    return connection


async def _dial(destination: Destination) -> socket.socket:
    """A connected non-blocking socket. Raises TransportError("connect"), TooManyFiles."""
    if destination.address is not None:
        family = socket.AF_INET6 if ":" in destination.address else socket.AF_INET
        return await _connect_to(family, (destination.address, destination.port), destination)
    try:
        found = await trio.socket.getaddrinfo(destination.host, destination.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise TransportError("connect", f"the name {destination.host} cannot be resolved: {reason(error)}") from error
    failure = TransportError("connect", f"the name {destination.host} has no address")
    for family, _type, _protocol, _name, address in found:
        try:
            return await _connect_to(family, (str(address[0]), *address[1:]), destination)
        except TransportError as error:
            failure = error
    raise failure


async def _connect_to(family: int, address: tuple[str | int, ...], destination: Destination) -> socket.socket:
    """Raises TransportError("connect"), TooManyFiles."""
    descriptors.take_one_more()
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise TransportError("connect", f"no socket: {reason(error)}") from error
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
        raise TransportError("connect", f"no connection to {destination.authority}: {reason(error)}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def tls_context(identity: Identity) -> ssl.SSLContext:
    """The TLS settings of an identity. Blocking: reads the certificate files; OSError or ValueError where it cannot."""
    context = ssl.create_default_context(cafile=identity.cacert)
    context.set_alpn_protocols(["http/1.1"])
    if identity.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if identity.cert is not None:
        # An empty password instead of None: OpenSSL would ask for one on the terminal.
        context.load_cert_chain(identity.cert, identity.key, password=b"")
    return context


def reason(error: BaseException) -> str:
    """Why, in one line."""
    if isinstance(error, ssl.SSLError):
        return (error.reason or "TLS failure").replace("_", " ").lower()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__
