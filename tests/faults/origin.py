"""An HTTP origin that misbehaves on request.

`http://127.0.0.1:PORT/STREAM?size=N&fault=NAME&fault=NAME&…` is a file of N bytes. Its bytes are a keyed function of
(stream, version, offset), so that any 16 of them name where they came from. A fault changes the plan of one reply;
several faults in one URL change it one after another. Parameters: `at` (bytes of body before a fault strikes),
`times` (how many requests it strikes, 0: all), `version`. The count of requests is kept for each path and query, so a
test that wants a fresh count adds `id=…`.

Run alone, for tests in other processes: `python -m tests.faults.origin --port 0` prints its port.
"""

from __future__ import annotations

import argparse
import collections
import functools
import gzip
import hashlib
import re
import socket
import ssl
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from urllib.parse import parse_qs, urlsplit

import h11
import trio

BLOCK = 4096
PIECE = 64 * 1024
MODIFIED = 1_700_000_000  # seconds since the epoch
DEFAULT_SIZE = 200_000
INFINITE = 1 << 60


@functools.lru_cache(maxsize=256)
def _block(stream: str, version: int, index: int) -> bytes:
    return hashlib.shake_128(f"{stream}\0{version}\0{index}".encode()).digest(BLOCK)


def content(stream: str, version: int, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a version of a stream."""
    if stop <= start:
        return b""
    first, last = start // BLOCK, (stop - 1) // BLOCK
    data = b"".join(_block(stream, version, index) for index in range(first, last + 1))
    return data[start - first * BLOCK : stop - first * BLOCK]


def whose(data: bytes, stream: str, size: int, versions: int = 4) -> str:
    """Where `data` (its first 16 bytes) comes from, for the message of a failing test."""
    for version in range(versions):
        found = content(stream, version, 0, size).find(data[:16])
        if found >= 0:
            return f"version {version} at offset {found}"
    return f"nowhere in {stream}: {data[:16]!r}"


@dataclass
class Plan:
    """One reply, before it is sent."""

    stream: str
    size: int
    version: int
    start: int
    stop: int
    ranged: bool  # a Range header was there and is obeyed
    count: int  # requests for this URL before this one
    at: int
    request: dict[str, str]
    status: int = 200
    line: bytes = b""  # replaces the status line
    headers: dict[str, str] = field(default_factory=dict)
    extra_head: bytes = b""
    framing: str = "length"
    prefix: bytes = b""  # before the body
    body: bytes | None = None  # instead of content
    suffix: bytes = b""  # after the body
    send: int | None = None  # bytes of body sent before `ending` strikes; None: all
    ending: str = "keep"  # keep, fin, rst, stall
    wait: bool = False  # for ever, before the head
    silent_end: str = ""  # fin or rst instead of a head
    drip: int = 0  # bytes a piece
    bad_chunk: bool = False

    @classmethod
    def honest(cls, stream: str, request: dict[str, str], parameters: dict[str, list[str]], count: int) -> Plan:
        size = int(parameters.get("size", [str(DEFAULT_SIZE)])[0])
        version = int(parameters.get("version", ["0"])[0])
        at = int(parameters.get("at", ["50000"])[0])
        plan = cls(stream, size, version, 0, size, False, count, at, request)
        plan.describe()
        return plan

    def describe(self) -> None:
        """Set validators, then obey Range and If-Range as an honest server would."""
        self.headers.update(
            {
                "ETag": f'"{self.stream}-{self.version}"',
                "Last-Modified": formatdate(MODIFIED + self.version, usegmt=True),
                "Content-Type": "audio/flac; rate=44100",
            }
        )
        self.choose_range()

    def choose_range(self) -> None:
        self.start, self.stop, self.ranged, self.status = 0, self.size, False, 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.request.get("range", ""))
        pinned = self.request.get("if-range")
        current = (self.headers.get("ETag"), self.headers.get("Last-Modified"))
        self.headers.pop("Content-Range", None)
        if match is None or (pinned is not None and pinned not in current):
            return
        start = int(match[1])
        stop = min(int(match[2]) + 1 if match[2] else self.size, self.size)
        if start >= self.size:
            self.status, self.body, self.start, self.stop = 416, b"no such range", 0, 0
            self.headers["Content-Range"] = f"bytes */{self.size}"
            return
        self.start, self.stop, self.ranged, self.status = start, stop, True, 206
        self.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{self.size}"

    def whole(self) -> None:
        """Ignore the range."""
        self.start, self.stop, self.ranged, self.status, self.body = 0, self.size, False, 200, None
        self.headers.pop("Content-Range", None)

    def refuse(self, status: int, **headers: str) -> None:
        self.whole()
        self.line = b""
        self.status, self.body = status, b"an error page, which is nobody's content"
        self.headers = {"Content-Type": "text/html", **{k.replace("_", "-"): v for k, v in headers.items()}}

    def strike(self, ending: str) -> None:
        self.send, self.ending = self.at, ending


Fault = Callable[[Plan], None]
FAULTS: dict[str, Fault] = {}


def fault(name: str) -> Callable[[Fault], Fault]:
    def register(function: Fault) -> Fault:
        FAULTS[name] = function
        return function

    return register


def _simple(name: str, change: Fault) -> None:
    FAULTS[name] = change


_simple("stall-head", lambda plan: setattr(plan, "wait", True))
_simple("stall-body", lambda plan: plan.strike("stall"))
_simple("rst-body", lambda plan: plan.strike("rst"))
_simple("cut-body", lambda plan: plan.strike("fin"))
_simple("rst-head", lambda plan: setattr(plan, "silent_end", "rst"))
_simple("cut-head", lambda plan: setattr(plan, "silent_end", "fin"))
_simple("drip", lambda plan: setattr(plan, "drip", 997))
_simple("chunked", lambda plan: setattr(plan, "framing", "chunked"))
_simple("close-delimited", lambda plan: setattr(plan, "framing", "close"))
_simple("excess", lambda plan: setattr(plan, "suffix", b"EXCESS" * 1000))
_simple("ignore-range", Plan.whole)
_simple("bad-chunk", lambda plan: (setattr(plan, "framing", "chunked"), setattr(plan, "bad_chunk", True))[0])
_simple("429", lambda plan: plan.refuse(429))
_simple("503", lambda plan: plan.refuse(503))
_simple("500", lambda plan: plan.refuse(500))
_simple("403", lambda plan: plan.refuse(403))
_simple("404", lambda plan: plan.refuse(404))
_simple("429-seconds", lambda plan: plan.refuse(429, Retry_After="1"))
_simple("503-date", lambda plan: plan.refuse(503, Retry_After=formatdate(None, usegmt=True)))
_simple("503-far-date", lambda plan: plan.refuse(503, Retry_After="Fri, 31 Dec 2100 23:59:59 GMT"))
_simple("redirect-loop", lambda plan: plan.refuse(302, Location="/loop-b?fault=redirect-back"))
_simple("redirect-back", lambda plan: plan.refuse(302, Location="/loop-a?fault=redirect-loop"))
_simple("redirect-deeper", lambda plan: plan.refuse(302, Location=f"/deeper{plan.stream}?fault=redirect-deeper"))
_simple("redirect-file", lambda plan: plan.refuse(302, Location="file:///etc/passwd"))
_simple("redirect-ftp", lambda plan: plan.refuse(302, Location="ftp://127.0.0.1/etc/passwd"))
_simple("redirect-nonsense", lambda plan: plan.refuse(302, Location="http://[broken"))
_simple("redirect-once", lambda plan: plan.refuse(302, Location=f"/{plan.stream}?size={plan.size}"))
_simple("redirect-to", lambda plan: plan.refuse(302, Location=plan.request["x-target"]))
_simple("huge-head", lambda plan: setattr(plan, "extra_head", b"X-Filler: " + b"x" * 300_000 + b"\r\n"))
_simple("no-http", lambda plan: setattr(plan, "line", b"SSH-2.0-OpenSSH_9.2"))
_simple("bad-length", lambda plan: plan.headers.update({"Content-Length": "many"}))
_simple(
    "long-length", lambda plan: (plan.headers.update({"Content-Length": str(plan.stop - plan.start + 9)}), fin(plan))[0]
)
_simple("short-length", lambda plan: plan.headers.update({"Content-Length": str((plan.stop - plan.start) // 2)}))
_simple("two-lengths", lambda plan: setattr(plan, "extra_head", b"Content-Length: 17\r\n"))


def fin(plan: Plan) -> None:
    """Send everything, then close."""
    plan.send, plan.ending = plan.stop - plan.start, "fin"


@fault("http10")
def _http10(plan: Plan) -> None:
    plan.whole()
    plan.line, plan.framing = b"HTTP/1.0 200 OK", "close"


@fault("icy")
def _icy(plan: Plan) -> None:
    plan.whole()
    plan.line, plan.framing = b"ICY 200 OK", "close"
    plan.headers = {"icy-name": "radio", "Content-Type": "audio/mpeg"}


@fault("no-validator")
def _no_validator(plan: Plan) -> None:
    for name in ("ETag", "Last-Modified"):
        plan.headers.pop(name, None)
    plan.choose_range()


@fault("weak-validator")
def _weak(plan: Plan) -> None:
    plan.headers["ETag"] = "W/" + plan.headers["ETag"]
    plan.choose_range()


@fault("date-only")
def _date_only(plan: Plan) -> None:
    plan.headers.pop("ETag", None)
    plan.choose_range()


@fault("changes")
def _changes(plan: Plan) -> None:
    """Another version of equal size from the second request on."""
    if plan.count:
        plan.version += 1
        plan.describe()


@fault("changes-secretly")
def _changes_secretly(plan: Plan) -> None:
    """Another version with equal size and time; only the tag, where there is one, tells."""
    if plan.count:
        plan.version += 1
        plan.describe()
        plan.headers["Last-Modified"] = formatdate(MODIFIED, usegmt=True)
        plan.choose_range()


@fault("changes-size")
def _changes_size(plan: Plan) -> None:
    if plan.count:
        plan.version += 1
        plan.size -= 1000
        plan.describe()


@fault("ignores-if-range")
def _ignores_if_range(plan: Plan) -> None:
    plan.request = {name: value for name, value in plan.request.items() if name != "if-range"}
    plan.choose_range()


@fault("range-off-by-one")
def _off_by_one(plan: Plan) -> None:
    if plan.ranged:
        plan.headers["Content-Range"] = f"bytes {plan.start + 1}-{plan.stop}/{plan.size + 1}"


@fault("range-short-by-one")
def _short_by_one(plan: Plan) -> None:
    if plan.ranged:
        plan.headers["Content-Range"] = f"bytes {plan.start}-{plan.stop - 2}/{plan.size}"


@fault("wrong-total")
def _wrong_total(plan: Plan) -> None:
    if plan.ranged:
        plan.headers["Content-Range"] = f"bytes {plan.start}-{plan.stop - 1}/{plan.size + 7}"


@fault("impossible-total")
def _impossible_total(plan: Plan) -> None:
    if plan.ranged:
        plan.headers["Content-Range"] = f"bytes {plan.start}-{plan.stop - 1}/{plan.stop - 1}"


@fault("unknown-total")
def _unknown_total(plan: Plan) -> None:
    if plan.ranged:
        plan.headers["Content-Range"] = f"bytes {plan.start}-{plan.stop - 1}/*"


@fault("no-content-range")
def _no_content_range(plan: Plan) -> None:
    plan.headers.pop("Content-Range", None)


@fault("part-whole-body")
def _part_whole_body(plan: Plan) -> None:
    """Says 206 and names the range, but sends the file from its first byte."""
    if plan.ranged:
        plan.start, plan.stop = 0, plan.size


@fault("less-than-asked")
def _less(plan: Plan) -> None:
    if plan.ranged and plan.stop - plan.start > plan.at:
        plan.stop = plan.start + plan.at
        plan.headers["Content-Range"] = f"bytes {plan.start}-{plan.stop - 1}/{plan.size}"


@fault("more-than-asked")
def _more(plan: Plan) -> None:
    if plan.ranged:
        plan.stop = plan.size
        plan.headers["Content-Range"] = f"bytes {plan.start}-{plan.stop - 1}/{plan.size}"


@fault("multipart")
def _multipart(plan: Plan) -> None:
    if plan.ranged:
        data = content(plan.stream, plan.version, plan.start, plan.stop)
        told = plan.headers.pop("Content-Range").encode()
        plan.body = b"--sep\r\nContent-Range: " + told + b"\r\n\r\n" + data + b"\r\n--sep--\r\n"
        plan.headers["Content-Type"] = "multipart/byteranges; boundary=sep"


def _encoded(name: str, encode: Callable[[bytes], bytes]) -> Fault:
    def change(plan: Plan) -> None:
        plan.whole()
        plan.body = encode(content(plan.stream, plan.version, 0, plan.size))
        plan.headers["Content-Encoding"] = name

    return change


_simple("gzip", _encoded("gzip", lambda data: gzip.compress(data[:70000]) + gzip.compress(data[70000:])))
_simple("deflate", _encoded("deflate", zlib.compress))
_simple("raw-deflate", _encoded("deflate", lambda data: zlib.compress(data)[2:-4]))
_simple("gzip-broken", _encoded("gzip", lambda data: gzip.compress(data)[:-2000] + b"x" * 2000))
_simple("brotli", _encoded("br", lambda data: data))


@fault("gzip-parts")
def _gzip_parts(plan: Plan) -> None:
    """Ranges of the encoded form."""
    data = gzip.compress(content(plan.stream, plan.version, 0, plan.size), mtime=0)
    size, plan.size = plan.size, len(data)
    plan.choose_range()
    plan.size = size
    plan.body = data[plan.start : plan.stop] if plan.status != 416 else plan.body
    plan.headers["Content-Encoding"] = "gzip"


@fault("416")
def _416(plan: Plan) -> None:
    if "range" in plan.request:
        plan.refuse(416)


@fault("416-lying")
def _416_lying(plan: Plan) -> None:
    """A total that was never true."""
    if "range" in plan.request:
        plan.refuse(416, Content_Range="bytes */17")


@fault("infinite")
def _infinite(plan: Plan) -> None:
    plan.size = INFINITE
    plan.whole()
    plan.framing = "close"


@fault("live")
def _live(plan: Plan) -> None:
    """A radio: every connection gives other bytes, from now on, without an end."""
    plan.size, plan.version = INFINITE, plan.count
    plan.headers = {"Content-Type": "audio/mpeg"}
    plan.whole()
    plan.framing = "close"


@fault("login")
def _login(plan: Plan) -> None:
    """Only with the right login."""
    if plan.request.get("authorization") != "Basic dXNlcjpodW50ZXIy":  # user:hunter2
        plan.refuse(401, WWW_Authenticate="Basic realm=x")


@fault("echo")
def _echo(plan: Plan) -> None:
    """The body is what was asked."""
    plan.whole()
    plan.body = "\n".join(f"{name}: {value}" for name, value in plan.request.items()).encode()
    plan.headers = {}


class Origin:
    """The server. `log` holds (path and query, request headers) of every request."""

    def __init__(self) -> None:
        self.log: list[tuple[str, dict[str, str]]] = []
        self.connections = 0
        self._counts: collections.Counter[str] = collections.Counter()

    async def serve(self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> None:
        """One connection."""
        self.connections += 1
        try:
            while await self._one_request(stream):
                pass
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
            pass  # the client left, as some faults make it do
        finally:
            with trio.move_on_after(1, shield=True):
                await trio.aclose_forcefully(stream)

    async def _one_request(self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> bool:
        connection = h11.Connection(h11.SERVER)
        while (event := connection.next_event()) is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(PIECE))
        if not isinstance(event, h11.Request):
            return False
        request = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
        target = event.target.decode("ascii")
        self.log.append((target, request))
        parts = urlsplit(target)
        parameters = parse_qs(parts.query)
        plan = Plan.honest(parts.path.strip("/"), request, parameters, self._counts[target])
        self._counts[target] += 1
        times = int(parameters.get("times", ["0"])[0])
        if not times or plan.count < times:
            for name in parameters.get("fault", []):
                FAULTS[name](plan)
        return await self._send(stream, plan, head_only=event.method == b"HEAD")

    async def _send(
        self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream], plan: Plan, *, head_only: bool
    ) -> bool:
        if plan.wait:
            await _until_gone(stream)
            return False
        if plan.silent_end:
            _end(stream, plan.silent_end)
            return False
        await stream.send_all(_head(plan))
        if head_only:
            return True
        sent = 0
        for piece in _pieces(plan):
            if plan.send is not None and sent + len(piece) >= plan.send:
                await stream.send_all(_framed(plan, piece[: plan.send - sent]))
                if plan.ending == "stall":
                    await _until_gone(stream)
                _end(stream, plan.ending)
                return False
            await stream.send_all(_framed(plan, piece))
            sent += len(piece)
            if plan.drip:
                await trio.sleep(0.001)
        if plan.framing == "chunked":
            await stream.send_all(b"zz\r\n" if plan.bad_chunk else b"0\r\nX-Trailer: 1\r\n\r\n")
        await stream.send_all(plan.suffix)
        return plan.framing != "close" and not plan.suffix and plan.headers.get("Content-Length") is None


def _head(plan: Plan) -> bytes:
    lines = [plan.line or b"HTTP/1.1 %d Whatever" % plan.status]
    headers = dict(plan.headers)
    if plan.framing == "length":
        length = plan.stop - plan.start if plan.body is None else len(plan.body)
        headers.setdefault("Content-Length", str(length))
    elif plan.framing == "chunked":
        headers["Transfer-Encoding"] = "chunked"
    else:
        headers["Connection"] = "close"
    headers.setdefault("Date", formatdate(usegmt=True))
    lines += [f"{name}: {value}".encode("latin-1") for name, value in headers.items()]
    return b"\r\n".join(lines) + b"\r\n" + plan.extra_head + b"\r\n"


def _pieces(plan: Plan) -> Iterator[bytes]:
    step = plan.drip or PIECE
    if plan.body is not None:
        for offset in range(0, len(plan.body), step):
            yield plan.body[offset : offset + step]
        return
    for offset in range(plan.start, plan.stop, step):
        yield content(plan.stream, plan.version, offset, min(offset + step, plan.stop))


def _framed(plan: Plan, piece: bytes) -> bytes:
    return b"%x;note=1\r\n%b\r\n" % (len(piece), piece) if plan.framing == "chunked" and piece else piece


def _end(stream: trio.SocketStream | trio.SSLStream[trio.SocketStream], how: str) -> None:
    sock = stream.transport_stream.socket if isinstance(stream, trio.SSLStream) else stream.socket
    if how == "rst":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def _until_gone(stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> None:
    while await stream.receive_some(PIECE):
        pass


@asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[Origin, str]]:
    """A running origin and its base URL."""
    origin = Origin()

    async def handle(stream: trio.SocketStream) -> None:
        if tls is None:
            await origin.serve(stream)
        else:
            await origin.serve(trio.SSLStream(stream, tls, server_side=True, https_compatible=True))

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            functools.partial(trio.serve_tcp, handle, 0, host="127.0.0.1", handler_nursery=nursery)
        )
        port = listeners[0].socket.getsockname()[1]
        yield origin, f"{'http' if tls is None else 'https'}://127.0.0.1:{port}"
        nursery.cancel_scope.cancel()


async def _main(port: int) -> None:
    origin = Origin()
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            functools.partial(trio.serve_tcp, origin.serve, port, host="127.0.0.1", handler_nursery=nursery)
        )
        print(listeners[0].socket.getsockname()[1], flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An HTTP origin that misbehaves on request; prints its port.")
    parser.add_argument("--port", type=int, default=0)
    trio.run(_main, parser.parse_args().port)
