"""HTTP/1.1 on one connection: how a request is written, a reply's head read, and its body cut out of the bytes.

Heads of the usual form are read here, all others by h11. Bytes of a body go straight into the caller's memory, but
for chunks too small to be worth a receive each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import h11

from streamfs.sources.connection import Connection, reason
from streamfs.sources.transport import Ending, Request, TransportError

HEAD_LIMIT = 64 * 1024  # bytes of one reply head; nginx and Apache send a few hundred
TRAILER_LIMIT = 64 * 1024  # bytes of all trailer lines of a chunked body
CHUNK_LINE_LIMIT = 4096  # bytes of one chunk-size line with its extensions
INFORMATIONAL_LIMIT = 16  # 1xx replies before the final one
RECEIVE_AHEAD = 256 * 1024  # bytes read at once while looking for heads and small chunks

_HEAD_END = re.compile(rb"\r?\n\r?\n")
_BAD_LENGTH = re.compile(rb"^content-length[ \t]*:(?![ \t]*\d+(?:[ \t]*,[ \t]*\d+)*[ \t]*\r?$).*\n", re.I | re.M)
_USUAL_HEAD = re.compile(
    rb"HTTP/1\.1 (?:20[0-36]|3\d[0-35-9]|4\d\d|5\d\d) [ -~]*\r\n(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[ -~\t]*\r\n)+\r\n"
)
_LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)
_VARYING = re.compile(r"(?:[A-Za-z-]+: [\x21-\x7e\x80-\xff]+\r\n)*")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?", re.S)


# -- heads


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """`length`: of the body as declared, None where it is not. `headers`: names in lower case."""

    status: int
    reason: str
    version: str  # "1.0", "1.1" or "icy"
    headers: list[tuple[str, str]]
    length: int | None
    chunked: bool

    @property
    def lasting(self) -> bool:
        """Whether the connection may serve again."""
        told = {
            token.strip().lower() for name, value in self.headers if name == "connection" for token in value.split(",")
        }
        return (self.version == "1.1" and "close" not in told) or ("keep-alive" in told and self.version != "icy")


def request_head(request: Request, authority: str, target: str) -> bytes:
    """The request without its varying headers and without the empty line at its end. `authority`: the Host where none
    is given. Raises TransportError("refused")."""
    headers = list(request.headers)
    if not any(name.lower() == "host" for name, _ in headers):
        headers.insert(0, ("Host", authority))
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


def with_varying(head: bytes, varying: tuple[tuple[str, str], ...]) -> bytes:
    """The whole request: `head` is `request_head`'s, `varying` come last. Raises TransportError("refused")."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in varying])
    if _VARYING.fullmatch(lines) is None:
        raise TransportError("refused", "a header holds characters that cannot be sent")
    return head + lines.encode("latin-1") + b"\r\n"


class HeadReader:
    """Finds the final reply's head in what is received after a request by `method`."""

    def __init__(self, method: str) -> None:
        self._method = method
        self._buffer = bytearray()
        self._searched = 0
        self._state: h11.Connection | None = None  # made where a head needs it
        self._provisional = 0  # replies so far

    def feed(self, data: memoryview) -> tuple[ReplyHead, bytes] | None:
        """Take what was received: the head and the bytes received behind it; None while more of it is to come. Raises
        TransportError("protocol")."""
        if not self._buffer and self._state is None:
            received = bytes(data)
            usual = _USUAL_HEAD.match(received)
            head = None if usual is None else _usual_head(usual[0])
            if usual is not None and head is not None:
                return head, received[usual.end() :]
        self._buffer += data
        while (text := self._next()) is not None:
            head = self._read(text)
            if head is not None:
                return head, bytes(self._buffer)
            self._provisional += 1
            if self._provisional >= INFORMATIONAL_LIMIT:
                raise TransportError("protocol", "too many provisional replies")
        return None

    def _next(self) -> bytes | None:
        """The bytes of the next head, taken out of the buffer."""
        buffer = self._buffer
        end = _HEAD_END.search(buffer, self._searched)
        if end is None:
            if len(buffer) > HEAD_LIMIT:
                raise TransportError("protocol", f"the reply's head is longer than {HEAD_LIMIT} bytes")
            if len(buffer) >= 5 and not buffer.startswith((b"HTTP/", b"ICY ")):
                raise TransportError("protocol", "the answer is not HTTP")
            self._searched = max(0, len(buffer) - 3)
            return None
        if end.end() > HEAD_LIMIT:
            raise TransportError("protocol", f"the reply's head is longer than {HEAD_LIMIT} bytes")
        text = bytes(buffer[: end.end()])
        del buffer[: end.end()]
        self._searched = 0
        return text

    def _read(self, text: bytes) -> ReplyHead | None:
        """None where it is a provisional reply's."""
        if self._state is None:
            usual = _usual_head(text) if _USUAL_HEAD.fullmatch(text) else None
            if usual is not None:
                return usual
            self._state = _waiting_for_reply(self._method)
        text, icy = _tolerated(text)
        try:
            self._state.receive_data(text)
            event = self._state.next_event()
        except h11.RemoteProtocolError as error:
            raise TransportError("protocol", f"the reply's head is malformed: {reason(error)}") from error
        if isinstance(event, h11.Response):
            return _reply_head(event, icy)
        if not isinstance(event, h11.InformationalResponse):
            raise TransportError("protocol", "the reply's head is malformed")
        return None


def _usual_head(text: bytes) -> ReplyHead | None:
    """A head that is a _USUAL_HEAD, as nearly all are, and leaves nothing to decide; None: let h11 judge it. That takes
    ten times as long, which tells where reads are small."""
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
    return ReplyHead(int(first[9:12]), first[13:], "1.1", headers, int(lengths[0]), chunked=False)


def _waiting_for_reply(method: str) -> h11.Connection:
    state = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_LIMIT)
    state.send(h11.Request(method=method, target="/", headers=[("Host", "any")]))
    state.send(h11.EndOfMessage())
    return state


def _reply_head(event: h11.Response, icy: bool) -> ReplyHead:
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers]
    return ReplyHead(
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


# -- bodies


def framing(method: str, head: ReplyHead, connection: Connection, leftover: memoryview) -> tuple[Framing, Ending]:
    """How the body of this reply is cut out of the connection's bytes, and what its end rests on."""
    if method == "HEAD" or head.status in (204, 304):
        return Counted(connection, leftover, 0), "length"
    if head.chunked:
        return Chunked(connection, leftover), "chunked"
    if head.length is not None:
        return Counted(connection, leftover, head.length), "length"
    return ToClose(connection, leftover), "close"


class Framing:
    """How one body is cut out of the connection's bytes. `leftover`: received with the head and not yet given."""

    def __init__(self, connection: Connection, leftover: memoryview) -> None:
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


class Counted(Framing):
    def __init__(self, connection: Connection, leftover: memoryview, length: int) -> None:
        super().__init__(connection, leftover)
        self.left = length
        self.at_end = length == 0

    def receive_ready(self, view: memoryview, until: float = 0.0) -> int:
        """As Connection.receive_ready or, with a moment, Connection.receive_by."""
        if self.at_end:
            return 0
        if len(view) > self.left:
            view = view[: self.left]
        if self.leftover:
            got = self._from_leftover(view)
        else:
            got = self.connection.receive_by(view, until) if until else self.connection.receive_ready(view)
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


class ToClose(Framing):
    async def receive_into(self, view: memoryview) -> int:
        if self.leftover:
            return self._from_leftover(view)
        if self.at_end:
            return 0
        got = await self.connection.receive_into(view)
        self.at_end = got == 0
        return got


class Chunked(Framing):
    """Small chunks are taken out of one large receive, large ones are received where they belong."""

    def __init__(self, connection: Connection, leftover: memoryview) -> None:
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
