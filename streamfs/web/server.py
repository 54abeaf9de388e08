"""Serving: waitress, which is one package without others behind it, bounds connections, headers and slow clients, and
needs no event loop of ours."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

from waitress.server import create_server

from streamfs.errors import Busy, InvalidRequest
from streamfs.web.application import Application

CONNECTIONS = 50
SILENCE = 30  # seconds that a connection may say nothing for


def loopback(host: str) -> str:
    """The address of `host`. Raises InvalidRequest for what other machines could reach."""
    if host == "localhost":
        return "127.0.0.1"
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address == ipaddress.IPv6Address("::1") or (address.version == 4 and address.is_loopback):
            return str(address)
    raise InvalidRequest(f"{host!r} is no loopback address: streams are shown to this machine only (127.0.0.1, ::1)")


def listen(address: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises Busy."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address, port))
    except OSError as error:
        bound.close()
        raise Busy(f"{address} port {port} cannot be had ({error.strerror}): choose another with --port") from error
    return bound


def serve(bound: socket.socket, application: Application, ready: Callable[[str], None]) -> None:
    """Answer until SIGINT, SIGTERM or SIGHUP; only in the main thread. `ready` gets the address to open once
    connections are taken. `application` is called by one thread."""
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # that one waits for another is no news
    address, port = bound.getsockname()[:2]
    with contextlib.closing(bound), _ended_by_signals():
        server = create_server(
            application,
            sockets=[bound],
            threads=1,
            connection_limit=CONNECTIONS,
            channel_timeout=SILENCE,
            cleanup_interval=SILENCE,
            max_request_body_size=1024,
            max_request_header_size=16384,
            ident="streamfs",
        )
        try:
            ready(f"http://[{address}]:{port}/" if ":" in address else f"http://{address}:{port}/")
            server.run()  # returns after a signal
        finally:
            server.close()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """The server ends in order when SystemExit passes through its loop."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
