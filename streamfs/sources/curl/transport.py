"""The libcurl transport: http(s) here, files of other servers in `files`."""

from __future__ import annotations

import re
from types import TracebackType

import pycurl

from streamfs.sources.curl.failures import failure_of
from streamfs.sources.curl.files import exchange_file
from streamfs.sources.curl.multi import Transfer, TransferLoop, unusable_reason
from streamfs.sources.curl.options import HTTP, Target, apply, apply_http
from streamfs.sources.curl.response import CurlResponse, start
from streamfs.sources.transport import Ending, Request, TransportError

HOST_CONNECTIONS = 4096  # a guard, not a queue: see plain.CONNECTIONS_PER_HOST
_STATUS_LINE = re.compile(r"(HTTP/(?=[0-9])|ICY)(\d(?:\.\d)?)?\s+(\d{3})(.*)")


class CurlTransport:
    """A `transport.Transport` over libcurl. Give it back with `aclose` (or `async with`).

    It needs no nursery: its one task is a trio system task, started by the first request and ended by `aclose` or
    at the end of the trio run. One transport belongs to one trio run. Connections are kept and reused; a request
    that finds `host_connections` busy ones to its host waits until one of them is free or the caller gives up.
    Proxies come from `Identity` alone, never from the environment.

    Raises TransportError("refused") where the libcurl at hand cannot be used.
    """

    def __init__(self, *, host_connections: int = HOST_CONNECTIONS) -> None:
        reason = unusable_reason()
        if reason is not None:
            raise TransportError("refused", reason)
        self._loop = TransferLoop(host_connections)

    @property
    def active_transfers(self) -> int:
        """Transfers libcurl holds now: requests under way and responses not yet closed."""
        return self._loop.active

    async def request(self, request: Request) -> CurlResponse:
        """See `transport.Transport.request`. A cancelled request is gone from libcurl at once."""
        target = Target.of(request)
        if target.scheme in HTTP:
            return await self._http(target)
        return await exchange_file(self._loop, target)

    async def aclose(self) -> None:
        """End every transfer (their readers get TransportError) and close every connection, within seconds."""
        await self._loop.aclose()

    async def __aenter__(self) -> CurlTransport:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _http(self, target: Target) -> CurlResponse:
        transfer = Transfer(self._loop)
        try:
            head = _Head(transfer)
            apply(target, transfer.easy)
            apply_http(target, transfer.easy)
            transfer.easy.setopt(pycurl.HEADERFUNCTION, head.on_line)
            start(transfer, target)
            await transfer.wait_until(lambda: head.complete)
            if not head.complete:
                raise failure_of(target, transfer, answered=False)
            bodyless = target.request.method == "HEAD" or head.status in (204, 304)
            length = 0 if bodyless else head.content_length
            return CurlResponse(
                transfer, target, head.status, head.reason, head.version, head.headers, head.ending, length
            )
        except BaseException:
            transfer.close()
            raise


class _Head:
    """Collects the lines of the final reply head; interim (1xx) heads and trailers are dropped."""

    def __init__(self, transfer: Transfer) -> None:
        self.complete = False
        self.status = 0
        self.reason = ""
        self.version = ""
        self.headers: list[tuple[str, str]] = []
        self._transfer = transfer

    def on_line(self, raw: bytes) -> None:
        """libcurl's header callback: one line with its ending, the empty one after the last."""
        if self.complete:
            return  # a trailer
        line = raw.decode("latin-1").rstrip("\r\n")
        if not line:
            self.complete = self.status >= 200
            if self.complete:
                self._transfer.touch()
        elif (match := _STATUS_LINE.match(line)) and (self.status < 200 or not self.version):
            self.version = "icy" if match[1] == "ICY" else match[2]
            self.status, self.reason, self.headers = int(match[3]), match[4].strip(), []
        elif line[0] in " \t" and self.headers:
            name, value = self.headers[-1]
            self.headers[-1] = (name, f"{value} {line.strip()}")
        else:
            name, colon, value = line.partition(":")
            if colon:
                self.headers.append((name.strip().lower(), value.strip()))

    @property
    def ending(self) -> Ending:
        codings = self._values("transfer-encoding")
        if codings and codings[-1].rsplit(",", 1)[-1].strip().lower() == "chunked":
            return "chunked"
        if self._values("content-length"):
            return "length"
        return "chunked" if self.version in ("2", "3") else "close"

    @property
    def content_length(self) -> int | None:
        """What the body's length must be, None where its end does not rest on it."""
        values = self._values("content-length")
        if self.ending != "length" or not re.fullmatch(r"\d{1,18}", values[-1]):
            return None
        return int(values[-1])

    def _values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]
