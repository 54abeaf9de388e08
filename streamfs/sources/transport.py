"""The narrow HTTP transport that streamfs.sources.http stands on. It knows no meaning: no redirects, no retries,
no validation, no cookies; one request, one reply.

Three makings follow it: `plain` (HTTP/1.1 over our own sockets), `ftp` (in clear, likewise) and `curl` (libcurl:
HTTP/2, proxies, ftps, sftp).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from streamfs.errors import StreamfsError

Ending = Literal["length", "chunked", "close"]
"""How the end of a body was told: declared length met, terminating chunk, or a bare close, which proves nothing."""


class TransportError(StreamfsError):
    """The exchange broke. `kind`:
    "connect": no connection (name, route, refusal); "tls": handshake or certificate; "reset": broken before
    a reply head; "truncated": the body ended before its declared end; "protocol": not HTTP, or over a limit;
    "refused": an option or address that must not be used."""

    def __init__(self, kind: Literal["connect", "tls", "reset", "truncated", "protocol", "refused"], text: str) -> None:
        super().__init__(text)
        self.kind = kind

    @property
    def passing(self) -> bool:
        """Whether another try may help."""
        return self.kind in ("connect", "reset", "truncated")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who we are to the other side, and whom we trust. Equal identities may share connections."""

    proxy: str | None = None
    cacert: str | None = None
    cert: str | None = None
    key: str | None = None
    insecure: bool = False
    http2: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """`address`: the IP that was checked for this URL and must be the one dialled; None: resolve freely
    (a proxy does the resolving). Header names in any case; Host, if absent, comes from the URL. `varying`: headers that
    differ from request to request (Range), sent after the others, so that a transport can prepare all else once."""

    url: str
    method: Literal["GET", "HEAD"] = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    varying: tuple[tuple[str, str], ...] = ()
    address: str | None = None
    identity: Identity = field(default_factory=Identity)


class Response(Protocol):
    status: int
    reason: str
    http_version: str  # "1.0", "1.1", "2", "icy"
    headers: list[tuple[str, str]]  # names in lower case, in the order received
    ending: Ending  # what the head says the body's end will rest on

    async def receive_into(self, view: memoryview) -> int:
        """At least one byte of the body (chunking removed, nothing decoded); 0 at its end as `ending` tells.
        Raises TransportError("truncated" or "protocol")."""

    async def aclose(self, *, reuse: bool = True) -> None:
        """Give the connection back: to the pool where the body was read to its end and reuse is allowed,
        closed otherwise."""


class Transport(Protocol):
    async def request(self, request: Request) -> Response:
        """Send and return once the head of a final reply (not 1xx) is in. Raises TransportError."""

    async def aclose(self) -> None: ...
