"""Which transport carries a URL, and the ones that are open."""

from __future__ import annotations

import os
from types import TracebackType
from urllib.parse import urlsplit

import trio

from streamfs.errors import InvalidRequest
from streamfs.sources import addresses, ftp
from streamfs.sources.apart import ApartTransport
from streamfs.sources.ftp import FtpResponse, FtpTransport
from streamfs.sources.plain import PlainResponse, PlainTransport
from streamfs.sources.transport import Response, Transport
from streamfs.spec import StreamOptions

FILE_THREADS = 16  # for the ftp and sftp servers that are in use: one each while there are no more
FILE_SCHEMES = ("ftp", "ftps", "sftp")


class Transports:
    """The transports of one daemon, shared by its sources. Close it after them."""

    def __init__(self) -> None:
        self.resolver = addresses.Resolver()
        self._plain: Transport | None = None
        self._ftp: Transport | None = None
        self._curl: Transport | None = None
        self._files: dict[int, Transport] = {}
        self._forced = os.environ.get("STREAMFS_TRANSPORT") or None
        if self._forced not in (None, "plain", "curl"):
            raise InvalidRequest(f"STREAMFS_TRANSPORT is plain or curl, not {self._forced!r}")

    def pick(self, url: str, options: StreamOptions) -> Transport:
        """The transport that carries `url`: plain for HTTP without a proxy, one of their own for files of ftp servers
        in clear, libcurl for all else."""
        if self._forced != "curl" and ftp.speaks(url, options):
            if self._ftp is None:
                self._ftp = FtpTransport()
            return self._ftp
        simple = urlsplit(url).scheme.lower() in ("http", "https") and options.proxy is None
        if self._forced == "plain" or (simple and self._forced is None):
            if self._plain is None:
                self._plain = PlainTransport()
            return self._plain
        from streamfs.sources.curl import CurlTransport  # here: most daemons never need libcurl

        parts = urlsplit(url)
        if parts.scheme.lower() in FILE_SCHEMES:
            # libcurl may stand still with a silent server of these: not here, and not with another server's streams.
            place = hash(parts.netloc.rpartition("@")[2].lower()) % FILE_THREADS
            if place not in self._files:
                self._files[place] = ApartTransport(CurlTransport)
            return self._files[place]
        if self._curl is None:
            self._curl = CurlTransport()
        return self._curl

    async def aclose(self) -> None:
        async with trio.open_nursery() as nursery:
            for transport in (self._plain, self._ftp, self._curl, *self._files.values()):
                if transport is not None:
                    nursery.start_soon(self._close, transport)

    @staticmethod
    async def _close(transport: Transport) -> None:
        with trio.move_on_after(5, shield=True):  # also while being cancelled
            await transport.aclose()

    async def __aenter__(self) -> Transports:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


async def close(response: Response, *, reuse: bool = False) -> None:
    """Close also while being cancelled; two seconds are plenty for giving back a connection."""
    if isinstance(response, PlainResponse | FtpResponse):
        await response.aclose(reuse=reuse)  # which never waits
        return
    with trio.move_on_after(2, shield=True):
        await response.aclose(reuse=reuse)
