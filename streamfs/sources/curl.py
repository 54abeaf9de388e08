"""The libcurl transport: HTTP/2, proxies, ftp, ftps and sftp, and http(s) like the plain one.

Replies of ftp, ftps and sftp are dressed as HTTP: 200 or 206 with exact Content-Length, Content-Range and
Last-Modified; 416 past the end; 404 for a missing file, 401 for a refused login, 403 for a refused file, 503 for a
server that is busy. Their sizes and dates come from an exchange without a body, and the one that carries the body
must tell the same, or the file was replaced between the two.

ftps is TLS from the first byte (implicit). An ftp identity with a `cacert` or `cert` demands AUTH TLS (explicit), for
the login and for the data; a server that cannot is refused.

How ends are proven (`Response.ending`): "length" by libcurl's count and ours; "chunked" also for HTTP/2 without a
Content-Length (END_STREAM; a stream that is reset is an error) and for ftp without a size (the server's 226 reply);
"close" where nothing but the closed connection tells.
"""

from __future__ import annotations

import errno
import os
import pwd
import re
import ssl
import time
from dataclasses import dataclass, replace
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

import pycurl
import trio

from streamfs.sources.curlmulti import CurlFailure, LoopClosed, Transfer, TransferLoop, unusable_reason
from streamfs.sources.transport import Ending, Identity, Request, TransportError

HOST_CONNECTIONS = 4096  # a guard, not a queue: see plain.CONNECTIONS_PER_HOST
# After the last byte of an ftp or sftp file, in seconds; all three are guesses. During the last two libcurl may block
# the program, where the server is silent.
CLOSING_WORD_TIMEOUT = 0.1
FAREWELL_TIMEOUT = 0.25
UNSIZED_RESPONSE_TIMEOUT = 10  # of every reply of an ftp server that names no size
KNOWN_HOSTS_VARIABLE = "STREAMFS_KNOWN_HOSTS"

_Kind = Literal["connect", "tls", "reset", "truncated", "protocol", "refused"]

_SCHEMES = {
    "http": pycurl.PROTO_HTTP,
    "https": pycurl.PROTO_HTTPS,
    "ftp": pycurl.PROTO_FTP,
    "ftps": pycurl.PROTO_FTPS,
    "sftp": pycurl.PROTO_SFTP,
}
_PROXY_SCHEMES = frozenset({"http", "https", "socks4", "socks4a", "socks5", "socks5h"})
_HTTP = frozenset({"http", "https"})
_BUNDLES = (  # of distributions, for Python builds that know none
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
_DEFAULT_SSH_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")  # the order of OpenSSH, less what libssh2 cannot read
_SUPPRESS_CONNECT_HEADERS = 265  # CURLOPT_…, which pycurl does not name
_KNOWN_HOST_OK, _KNOWN_HOST_MISMATCH = pycurl.KHMATCH_OK, pycurl.KHMATCH_MISMATCH

# CURLE_ numbers; pycurl names only some of them.
_CONNECT = frozenset({5, 6, 7, 15, 45, 89, 96, 97})  # names, refusals, interfaces, QUIC, the proxy's own handshake
_TLS = frozenset({35, 53, 54, 58, 59, 60, 64, 66, 77, 80, 82, 83, 90, 91, 98})
_REFUSED = frozenset({3, 4, 43, 48})  # malformed URL, option or scheme this libcurl does not have
_BROKEN = frozenset({16, 18, 28, 52, 55, 56, 81, 92, 95})  # the connection or HTTP/2 stream ended too early
_LOGIN_DENIED, _ACCESS_DENIED, _FILE_NOT_FOUND, _RETR_FAILED, _SSH, _TIMED_OUT = 67, 9, 78, 19, 79, 28
_SSL_CONNECT = 35
_FTP_DATA = frozenset({10, 12, 13, 14, 17, 30, 31})  # data connection or a command before RETR refused
_WRONG_FTP_REPLY = 8
_BUSY_REPLIES = frozenset({421, 425, 450, 451, 452})


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
        target = _Target.of(request)
        if target.scheme in _HTTP:
            return await self._http(target)
        return await self._file(target)

    async def aclose(self) -> None:
        """End every transfer (their readers get TransportError) and close every connection, within seconds."""
        await self._loop.aclose()

    async def __aenter__(self) -> CurlTransport:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # -- http, https

    async def _http(self, target: _Target) -> CurlResponse:
        transfer = Transfer(self._loop)
        try:
            head = _Head(transfer)
            _apply(target, transfer.easy)
            _apply_http(target, transfer.easy)
            transfer.easy.setopt(pycurl.HEADERFUNCTION, head.on_line)
            _start(transfer, target)
            await transfer.wait_until(lambda: head.complete)
            if not head.complete:
                raise _error(target, transfer, answered=False)
            bodyless = target.request.method == "HEAD" or head.status in (204, 304)
            length = 0 if bodyless else head.content_length
            return CurlResponse(
                transfer, target, head.status, head.reason, head.version, head.headers, head.ending, length
            )
        except BaseException:
            transfer.close()
            raise

    # -- ftp, ftps, sftp

    async def _file(self, target: _Target) -> CurlResponse:
        if target.parts.path.endswith("/") or not target.parts.path:
            raise TransportError("refused", f"{target.shown}: the URL names a folder, not a file")
        known = await self._stat(target)
        if isinstance(known, _Refusal):
            return _bare_response(target, known.status, known.text)
        chosen = _choose(target.request, known)
        headers = known.headers()
        if chosen is None:
            return _bare_response(target, 416, "past the end", [("content-range", f"bytes */{known.size}"), *headers])
        status, length = 200, known.size
        if isinstance(chosen, _Span):
            status, length = 206, chosen.length
            headers.append(("content-range", f"bytes {chosen.first}-{chosen.last}/{known.size}"))
        if length is not None:
            headers.append(("content-length", str(length)))
        if target.request.method == "HEAD" or length == 0:
            return _bare_response(target, status, "OK", headers)
        transfer = Transfer(self._loop)
        try:
            refusal = await self._begin_file(target, transfer, known, chosen if isinstance(chosen, _Span) else None)
            if refusal is not None:
                _close(target, transfer)
                return _bare_response(target, refusal.status, refusal.text)
            if length is None and transfer.done and transfer.failure is None and transfer.received == 0:
                length = 0  # sftp names no size for an empty file
                headers.append(("content-length", "0"))
            ending: Ending = "length" if length is not None else "chunked"
            return CurlResponse(transfer, target, status, "OK", "1.1", headers, ending, length)
        except BaseException:
            _close(target, transfer)
            raise

    async def _stat(self, target: _Target) -> _FileFacts | _Refusal:
        """Size and modification time, by an exchange without a body; it leaves its connection for the next one."""
        transfer = Transfer(self._loop)
        try:
            verdict = _prepare_file(target, transfer)
            transfer.easy.setopt(pycurl.NOBODY, 1)
            _start(transfer, target)
            await transfer.wait_until(lambda: False)
            if transfer.failure is not None:
                return _refusal_or_raise(target, transfer, verdict)
            return _FileFacts.told_by(transfer.easy)
        finally:
            _close(target, transfer)

    async def _begin_file(
        self, target: _Target, transfer: Transfer, known: _FileFacts, span: _Span | None
    ) -> _Refusal | None:
        """Start the body; None once its first bytes, or its end, are there and the file is still the known one."""
        easy = transfer.easy
        verdict = _prepare_file(target, transfer)
        if span is not None and span.last + 1 == known.size:
            easy.setopt(pycurl.RESUME_FROM_LARGE, span.first)  # ends in order, so the connection can be reused
        elif span is not None:
            easy.setopt(pycurl.RANGE, f"{span.first}-{span.last}")
        transfer.hold_at = known.size if span is None else span.length
        if transfer.hold_at is None:
            # No telling which piece is the last, so libcurl waits for the server's closing word by itself.
            easy.setopt(pycurl.FTP_RESPONSE_TIMEOUT, UNSIZED_RESPONSE_TIMEOUT)
        _start(transfer, target)
        await transfer.wait_until(lambda: transfer.received > 0)
        if transfer.failure is not None and transfer.received == 0:
            if await self._is_folder(target, transfer.failure):
                raise TransportError("refused", f"{target.shown}: the URL names a folder, not a file")
            return _refusal_or_raise(target, transfer, verdict)
        now = _FileFacts.told_by(easy)
        expected = known.size if span is None else span.length
        # An empty file has no length to tell (libcurl says -1): that it ended without a byte says it.
        same_length = now.size == expected or (not expected and transfer.done and transfer.received == 0)
        if not same_length or now.modified != known.modified:
            raise TransportError("reset", f"{target.shown}: the file changed while it was being opened")
        return None

    async def _is_folder(self, target: _Target, failure: BaseException) -> bool:
        """Whether that is why a file could not be read. An sftp server opens a folder like a file, and then fails to
        read it in the words of any other failure: only a folder can be listed."""
        if target.scheme != "sftp" or not isinstance(failure, CurlFailure) or failure.code != _SSH:
            return False
        parts = target.parts._replace(path=target.parts.path + "/")
        listed = _Target.of(replace(target.request, url=parts.geturl()))
        transfer = Transfer(self._loop)
        try:
            _prepare_file(listed, transfer)
            transfer.easy.setopt(pycurl.DIRLISTONLY, 1)
            _start(transfer, listed)
            await transfer.wait_until(lambda: transfer.received > 0)
            return transfer.received > 0  # each has at least the names "." and ".."
        finally:
            _close(listed, transfer)


class CurlResponse:
    """A reply, see `transport.Response`. Used by one task at a time; `aclose` from anywhere in the run."""

    def __init__(
        self,
        transfer: Transfer | None,
        target: _Target,
        status: int,
        reason: str,
        http_version: str,
        headers: list[tuple[str, str]],
        ending: Ending,
        length: int | None,
    ) -> None:
        self.status = status
        self.reason = reason
        self.http_version = http_version
        self.headers = headers
        self.ending = ending
        self._transfer = transfer  # None: no body
        self._target = target
        self._length = length  # of the body, where declared
        self._closed = False

    async def receive_into(self, view: memoryview) -> int:
        """See `transport.Response.receive_into`. A cancelled call has taken no byte."""
        if self._closed:
            raise TransportError("reset", f"{self._target.shown}: the response is closed")
        transfer = self._transfer
        if transfer is None:
            await trio.lowlevel.checkpoint()
            return 0
        try:
            count = await transfer.receive_into(view)
            if count == 0:
                await self._settle(transfer)
        except (CurlFailure, LoopClosed) as error:
            raise _error(self._target, transfer, answered=True) from error
        if count == 0 and self._length is not None and transfer.received != self._length:
            text = f"the body has {transfer.received} bytes where {self._length} were declared"
            raise TransportError("truncated", f"{self._target.shown}: {text}")
        return count

    async def _settle(self, transfer: Transfer) -> None:
        """All bytes of a file are here: hear the server's closing word, if it comes soon. Its complaint counts, its
        silence costs the connection only."""
        await transfer.settle(CLOSING_WORD_TIMEOUT, FAREWELL_TIMEOUT)
        failure = transfer.failure
        if transfer.held and isinstance(failure, CurlFailure) and failure.code != _TIMED_OUT:
            raise failure

    async def aclose(self, *, reuse: bool = True) -> None:
        """Take the transfer off libcurl at once; an unfinished one loses its connection. Without `reuse` the
        connection of a finished HTTP/1 transfer is shut down too, unless another transfer has it by now."""
        if self._closed:
            return
        self._closed = True
        transfer = self._transfer
        if transfer is not None:
            try:
                if reuse:
                    # A reader who knows the length need not have asked for the end.
                    await transfer.settle(CLOSING_WORD_TIMEOUT, FAREWELL_TIMEOUT)
                elif self.http_version != "2":
                    transfer.abandon_connection()
            finally:
                _close(self._target, transfer)
        await trio.lowlevel.checkpoint_if_cancelled()


# -- what is asked


@dataclass(frozen=True, slots=True)
class _Target:
    """A request with its URL taken apart. `shown` names it in messages: scheme and host, no secret."""

    request: Request
    parts: SplitResult
    scheme: str
    shown: str

    @classmethod
    def of(cls, request: Request) -> _Target:
        """Raises TransportError("refused") for a URL that cannot be asked for."""
        try:
            parts = urlsplit(request.url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise TransportError("refused", f"not a URL ({error})") from None
        scheme = parts.scheme.lower()
        if scheme not in _SCHEMES or not host:
            raise TransportError("refused", f"libcurl is not used for {scheme}: URLs without a host or of that kind")
        if scheme not in pycurl.version_info()[8]:
            raise TransportError("refused", f"this libcurl was built without {scheme} (see `curl-config --protocols`)")
        if re.search(r"[\x00-\x20\x7f]", request.url):
            raise TransportError("refused", "the URL holds a space or a control character")
        shown = f"{scheme}://{host}" + (f":{port}" if port else "")
        return cls(request, parts, scheme, shown)

    @property
    def identity(self) -> Identity:
        return self.request.identity

    def redact(self, text: str) -> str:
        """`text` of libcurl or a server, without the passwords and the query that might be repeated in it."""
        proxy = urlsplit(self.identity.proxy) if self.identity.proxy else None
        for secret in (self.parts.password, self.parts.query, proxy.password if proxy else None):
            if secret:
                text = text.replace(secret, "…").replace(unquote(secret), "…")
        return text


def _start(transfer: Transfer, target: _Target) -> None:
    try:
        transfer.start()
    except LoopClosed as error:
        raise TransportError("reset", f"{target.shown}: {error}") from error


def _close(target: _Target, transfer: Transfer) -> None:
    if target.scheme == "sftp":
        transfer.cut_connection()
    transfer.close()


def _apply(target: _Target, easy: pycurl.Curl) -> None:
    """The options that every scheme shares."""
    request = target.request
    easy.setopt(pycurl.URL, request.url.encode())
    easy.setopt(pycurl.PROTOCOLS, _SCHEMES[target.scheme])
    easy.setopt(pycurl.FOLLOWLOCATION, 0)
    easy.setopt(pycurl.NETRC, 0)
    easy.setopt(pycurl.TCP_KEEPALIVE, 1)
    if request.address is not None:
        address = f"[{request.address}]" if ":" in request.address else request.address
        # Whatever host and port the URL has: that port at this address, with the URL's name for TLS and SSH.
        easy.setopt(pycurl.CONNECT_TO, [f"::{address}:"])
    _apply_proxy(target, easy)
    if target.scheme in ("https", "ftps") or (request.identity.proxy or "").lower().startswith("https:"):
        _apply_tls(target, easy)


def _apply_proxy(target: _Target, easy: pycurl.Curl) -> None:
    proxy = target.identity.proxy
    easy.setopt(pycurl.PROXY, "" if proxy is None else proxy.encode())  # "": not the environment's either
    easy.setopt(pycurl.NOPROXY, "")
    if proxy is None:
        return
    if urlsplit(proxy).scheme.lower() not in _PROXY_SCHEMES:
        known = ", ".join(sorted(_PROXY_SCHEMES))
        raise TransportError("refused", f"the proxy is to be a URL of one of these kinds: {known}")
    easy.setopt(_SUPPRESS_CONNECT_HEADERS, 1)
    if target.scheme not in _HTTP:
        easy.setopt(pycurl.HTTPPROXYTUNNEL, 1)


def _apply_tls(target: _Target, easy: pycurl.Curl) -> None:
    identity = target.identity
    easy.setopt(pycurl.SSLVERSION, pycurl.SSLVERSION_TLSv1_2)
    if identity.insecure:
        for option in (pycurl.SSL_VERIFYPEER, pycurl.SSL_VERIFYHOST, pycurl.PROXY_SSL_VERIFYPEER):
            easy.setopt(option, 0)
        easy.setopt(pycurl.PROXY_SSL_VERIFYHOST, 0)
    else:
        bundle = identity.cacert or _system_bundle()
        easy.setopt(pycurl.CAINFO, bundle)
        easy.setopt(pycurl.PROXY_CAINFO, bundle)
    if identity.cert is not None:
        easy.setopt(pycurl.SSLCERT, identity.cert)
        easy.setopt(pycurl.SSLKEY, identity.key or identity.cert)


def _system_bundle() -> str:
    """The file of trusted authorities: SSL_CERT_FILE (which libcurl does not read), Python's, a distribution's."""
    paths = ssl.get_default_verify_paths()
    for candidate in (os.environ.get("SSL_CERT_FILE"), paths.cafile, *_BUNDLES):
        if candidate and Path(candidate).is_file():
            return candidate
    raise TransportError("tls", "no file of trusted authorities found: install ca-certificates, or give --cacert")


def _apply_http(target: _Target, easy: pycurl.Curl) -> None:
    request = target.request
    fields = [*request.headers, *request.varying]
    names = {name.lower() for name, _ in fields}
    if "accept-encoding" not in names:
        fields.append(("Accept-Encoding", "identity"))
    easy.setopt(pycurl.HTTPHEADER, [_header_line(name, value) for name, value in fields])
    easy.setopt(pycurl.HEADEROPT, pycurl.HEADER_SEPARATE)  # ours are for the origin, not for CONNECT
    easy.setopt(pycurl.HTTP_CONTENT_DECODING, 0)
    easy.setopt(pycurl.HTTP200ALIASES, ["ICY 200 OK"])
    easy.setopt(pycurl.HTTP09_ALLOWED, 0)
    if request.identity.http2:
        easy.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_2TLS)
        easy.setopt(pycurl.PIPEWAIT, 1)
    else:
        easy.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
    if request.method == "HEAD":
        easy.setopt(pycurl.NOBODY, 1)


def _header_line(name: str, value: str) -> bytes:
    if not re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name) or re.search(r"[\x00\r\n]", value):
        raise TransportError("refused", f"the header {name!r} cannot be sent: line break or bad name")
    try:
        # An empty value is written with a semicolon: "Name:" would remove the header instead.
        return (f"{name}: {value}" if value.strip() else f"{name};").encode("latin-1")
    except UnicodeEncodeError as error:
        raise TransportError("refused", f"the header {name!r} holds characters beyond latin-1") from error


@dataclass
class _HostKeyVerdict:
    """What the known-hosts file said of an ssh server: one of KHMATCH_*, None while not asked."""

    match: int | None = None
    file: str = ""


def _prepare_file(target: _Target, transfer: Transfer) -> _HostKeyVerdict:
    easy = transfer.easy
    _apply(target, easy)
    if target.scheme == "ftp" and (target.identity.cacert or target.identity.cert):
        easy.setopt(pycurl.USE_SSL, pycurl.USESSL_ALL)
        _apply_tls(target, easy)
    easy.setopt(pycurl.OPT_FILETIME, 1)
    easy.setopt(pycurl.HEADERFUNCTION, _ignore_line)
    return _apply_ssh(target, easy) if target.scheme == "sftp" else _HostKeyVerdict()


def _ignore_line(line: bytes) -> None:
    """Replies of an FTP server reach us as libcurl's verdicts."""


def _apply_ssh(target: _Target, easy: pycurl.Curl) -> _HostKeyVerdict:
    identity = target.identity
    verdict = _HostKeyVerdict(file=os.environ.get(KNOWN_HOSTS_VARIABLE) or str(Path.home() / ".ssh/known_hosts"))

    def judge_host_key(known: object, found: object, match: int) -> int:
        verdict.match = match
        accepted = match == _KNOWN_HOST_OK or identity.insecure
        return pycurl.KHSTAT_FINE if accepted else pycurl.KHSTAT_REJECT  # type: ignore[no-any-return]

    easy.setopt(pycurl.SSH_KNOWNHOSTS, verdict.file)
    easy.setopt(pycurl.SSH_KEYFUNCTION, judge_host_key)
    if identity.insecure:
        # libcurl would lend this unchecked connection to requests that insist on the check.
        easy.setopt(pycurl.FRESH_CONNECT, 1)
        easy.setopt(pycurl.FORBID_REUSE, 1)
    if target.parts.username is None:
        easy.setopt(pycurl.USERNAME, pwd.getpwuid(os.geteuid()).pw_name)
    key = identity.key or identity.cert or _default_ssh_key()
    if key is not None:
        easy.setopt(pycurl.SSH_PRIVATE_KEYFILE, key)
    return verdict


def _default_ssh_key() -> str | None:
    folder = Path.home() / ".ssh"
    return next((str(folder / name) for name in _DEFAULT_SSH_KEYS if (folder / name).is_file()), None)


# -- what is answered


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


_STATUS_LINE = re.compile(r"(HTTP/(?=[0-9])|ICY)(\d(?:\.\d)?)?\s+(\d{3})(.*)")


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A file server's no, in HTTP's terms."""

    status: int
    text: str


@dataclass(frozen=True, slots=True)
class _FileFacts:
    size: int | None
    modified: int | None  # seconds since the epoch

    @classmethod
    def told_by(cls, easy: pycurl.Curl) -> _FileFacts:
        size, modified = easy.getinfo(pycurl.CONTENT_LENGTH_DOWNLOAD_T), easy.getinfo(pycurl.FILETIME_T)
        return cls(size if size >= 0 else None, modified if modified >= 0 else None)

    def headers(self) -> list[tuple[str, str]]:
        told = [("date", formatdate(time.time(), usegmt=True))]
        if self.modified is not None:
            told.append(("last-modified", formatdate(self.modified, usegmt=True)))
        if self.size is not None:
            told.append(("accept-ranges", "bytes"))
        return told


@dataclass(frozen=True, slots=True)
class _Span:
    """The bytes first..last, both included, of a file whose size is known."""

    first: int
    last: int

    @property
    def length(self) -> int:
        return self.last - self.first + 1


def _choose(request: Request, known: _FileFacts) -> _Span | Literal["whole"] | None:
    """What to send for the Range header, as RFC 9110 has it; None: nothing of the file is in the range."""
    asked = _header(request, "range")
    match = re.fullmatch(r"\s*bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", asked or "", re.I)
    if match is None or known.size is None or not (match[1] or match[2]) or not _range_applies(request, known):
        return "whole"
    if not match[1]:
        first, last = max(0, known.size - int(match[2])), known.size - 1
    else:
        first, last = int(match[1]), min(int(match[2]) if match[2] else known.size, known.size - 1)
        if match[2] and int(match[2]) < first:
            return "whole"
    return _Span(first, last) if first < known.size and first <= last else None


def _range_applies(request: Request, known: _FileFacts) -> bool:
    """Whether If-Range, which can only be a date here, names the modification time exactly."""
    condition = _header(request, "if-range")
    if condition is None:
        return True
    try:
        return known.modified is not None and parsedate_to_datetime(condition).timestamp() == known.modified
    except ValueError:
        return False


def _header(request: Request, name: str) -> str | None:
    return next((value for key, value in (*request.headers, *request.varying) if key.lower() == name), None)


def _bare_response(
    target: _Target, status: int, reason: str, headers: list[tuple[str, str]] | None = None
) -> CurlResponse:
    """A reply without a body. Its headers speak of the file, as those of a HEAD do."""
    return CurlResponse(None, target, status, reason, "1.1", headers or [], "length", 0)


# -- what goes wrong


def _refusal_or_raise(target: _Target, transfer: Transfer, verdict: _HostKeyVerdict) -> _Refusal:
    """The HTTP status for a file server's refusal; raises TransportError for everything else."""
    failure = transfer.failure
    if isinstance(failure, CurlFailure):
        text = target.redact(failure.text)
        reply = transfer.easy.getinfo(pycurl.RESPONSE_CODE) if target.scheme != "sftp" else 0
        if reply in _BUSY_REPLIES:
            return _Refusal(503, f"the server is busy ({reply}): {text}")
        if failure.code == _LOGIN_DENIED:
            return _Refusal(401, f"the login is refused ({text})")
        if failure.code == _FILE_NOT_FOUND:
            or_folder = "" if target.scheme == "sftp" else ", or it is a folder"  # which has no size for ftp either
            return _Refusal(404, f"no such file{or_folder} ({text})")
        if failure.code in (_ACCESS_DENIED, _RETR_FAILED):
            if reply == 550:  # FTP says so of what is missing and of what is forbidden
                return _Refusal(404, f"no such file, or it may not be read ({text})")
            return _Refusal(403, f"the file may not be read ({text})")
        if verdict.match not in (None, _KNOWN_HOST_OK) and not target.identity.insecure:
            raise TransportError("tls", _host_key_text(target, verdict)) from failure
    raise _error(target, transfer, answered=False) from failure


def _host_key_text(target: _Target, verdict: _HostKeyVerdict) -> str:
    if verdict.match == _KNOWN_HOST_MISMATCH:
        return (
            f"{target.shown}: the server's host key is another than the one in {verdict.file}: somebody may be in "
            "between; remove the old key if you know why it changed"
        )
    return f"{target.shown}: the server's host key is not in {verdict.file}: connect once with ssh to check and add it"


def _error(target: _Target, transfer: Transfer, *, answered: bool) -> TransportError:
    """The TransportError for the way `transfer` ended. `answered`: the reply's head had been given out."""
    failure = transfer.failure
    if not isinstance(failure, CurlFailure):
        text = str(failure) if failure is not None else "the exchange ended without a reply"
        return TransportError("truncated" if answered else "reset", f"{target.shown}: {text}")
    text = target.redact(failure.text) or pycurl.easy_strerror(failure.code)
    if target.identity.proxy is not None and not answered:
        refusal = transfer.easy.getinfo(pycurl.HTTP_CONNECTCODE)
        if refusal in (401, 407):  # tinyproxy says 401
            return TransportError("refused", f"{target.shown}: the proxy refuses the login ({refusal})")
        if 400 <= refusal < 500:
            return TransportError("refused", f"{target.shown}: the proxy refuses to connect ({refusal})")
    return TransportError(_kind(target, transfer, failure, answered), f"{target.shown}: {text}")


def _kind(target: _Target, transfer: Transfer, failure: CurlFailure, answered: bool) -> _Kind:
    code = failure.code
    broken: _Kind = "truncated" if answered else "reset"
    if code in _REFUSED:
        return "refused"
    if code == _SSL_CONNECT and _cut_off(transfer, failure):
        return broken
    if code in _TLS:
        return "tls"
    if code in _CONNECT:
        return "connect"
    if code == _TIMED_OUT and transfer.easy.getinfo(pycurl.CONNECT_TIME) == 0:
        return "connect"
    if code in _BROKEN:
        return "protocol" if "chunk" in failure.text and "malformed" in failure.text.lower() else broken
    if target.scheme not in _HTTP and code in (*_FTP_DATA, _SSH, _WRONG_FTP_REPLY, _RETR_FAILED, _ACCESS_DENIED):
        return broken
    return "protocol"


def _cut_off(transfer: Transfer, failure: CurlFailure) -> bool:
    """Whether a TLS handshake failed because the connection went away: worth another try, unlike other failures."""
    gone = (errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT)
    return transfer.easy.getinfo(pycurl.OS_ERRNO) in gone or any(
        sign in failure.text for sign in ("SSL_ERROR_SYSCALL", "unexpected eof", "Connection reset")
    )
