"""The ftp transport: files of ftp servers in clear, dressed as HTTP (`filereplies`).

What is wanted is said over the control connection, a command and its reply at a time. The bytes come over a connection
of their own, always to the host of the control connection, and are received straight into the caller's memory. A body
that is left early costs its data connection only: what the server says to that is heard when the session serves again.

A path is named whole, from the folder of the login (`RETR a/b`) or, where it begins with %2F, from the root. TLS,
proxies and URLs with a meaning of libcurl's own are the business of streamfs.sources.curl: see `speaks`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from urllib.parse import unquote_to_bytes, urlsplit

import trio

from streamfs.sources.connection import Connection, Destination, connect, reason
from streamfs.sources.filereplies import BUSY_REPLIES, FileFacts, FileHead, Refusal, head_of
from streamfs.sources.idle import IdlePool
from streamfs.sources.transport import Ending, Identity, Request, TransportError
from streamfs.spec import StreamOptions

CONNECT_SECONDS = 10.0  # as plain.CONNECT_SECONDS
REPLY_SECONDS = 120.0  # what curl gives a server for each reply; whoever asks is mostly less patient
CLOSING_SECONDS = 0.1  # for the word after the last of so many bytes: a complaint counts, silence does not. A guess
UNSIZED_CLOSING_SECONDS = 10.0  # for the same where only this word proves the end. A guess
OWED_SECONDS = (
    1.0  # for the word to an exchange that is over, before a session is given up. A guess; a login takes longer
)
IDLE_SECONDS = 30.0  # a guess: servers allow few sessions at a time, and each login takes several round trips
REPLY_LIMIT = 64 * 1024  # bytes of one reply

_LINE = re.compile(rb"(\d{3})(?:([ -])(.*))?", re.S)
_EXTENDED = re.compile(r".*\(([!-~])\1\1(\d{1,5})\1\)")
_PASSIVE = re.compile(r".*?(\d{1,3}),(\d{1,3}),(\d{1,3}),(\d{1,3}),(\d{1,3}),(\d{1,3})")
_SIZE = re.compile(r"(?:.*\D)?(\d{1,18})\s*")
_DATE = re.compile(r"\s*(\d{4})(\d\d)(\d\d)(\d\d)(\d\d)([0-5]\d|60)(?:\.\d*)?\s*")
_OF_CURL = re.compile(r";type=|[?#]|/\.\.?(/|$)")
"""In URLs: how the file is sent, what comes after its path, and folders that are no folders."""


def speaks(url: str, options: StreamOptions) -> bool:
    """Whether this transport carries `url`."""
    tls = options.cacert is not None or options.cert is not None
    return urlsplit(url).scheme.lower() == "ftp" and not (tls or options.proxy or _OF_CURL.search(url))


class FtpTransport:
    """A `transport.Transport`: a pool of sessions. Used under one trio run; `aclose` ends the idle ones, and whoever
    holds a response closes that."""

    def __init__(self, *, idle_seconds: float = IDLE_SECONDS) -> None:
        self._idle: IdlePool[_Place, _Session] = IdlePool(idle_seconds)
        self._closed = False

    @property
    def idle_sessions(self) -> int:
        return len(self._idle)

    async def request(self, request: Request) -> FtpResponse:
        """See `transport.Transport.request`."""
        if self._closed:
            raise TransportError("refused", "the transport is closed")
        place, path = _asked(request)
        try:
            session = await self._rested(place)
            if session is not None:
                try:
                    return await self._exchange(session, request, path)
                except TransportError:
                    if session.heard:
                        raise  # else the server had ended it meanwhile, which says nothing of its health
            return await self._exchange(await _logged_in(place), request, path)
        except _RefusedError as no:
            return FtpResponse(FileHead(no.refusal.status, no.refusal.text, [], 0))

    async def aclose(self) -> None:
        """Close every idle session; later requests are refused. Safe to call again."""
        self._closed = True
        self._idle.close()
        await trio.lowlevel.checkpoint()

    def give_back(self, session: _Session) -> None:
        """It has no more to do; what the server owes it may still come."""
        session.leave_data()
        self._idle.give(session.place, session)

    async def _rested(self, place: _Place) -> _Session | None:
        """A session that is logged in already, if there is one."""
        with trio.move_on_after(OWED_SECONDS):
            while (session := self._idle.take(place)) is not None:
                try:
                    if await session.is_ready():
                        return session
                except BaseException:
                    session.close()
                    raise
                session.close()
        return None

    async def _exchange(self, session: _Session, request: Request, path: bytes) -> FtpResponse:
        try:
            if request.method == "GET":
                await session.open_data()  # first, so that nothing takes time between the file's version and its bytes
            head = head_of(request, await session.facts(path), ranged=session.restarts)
            if request.method == "HEAD" or head.length == 0:
                self.give_back(session)
                return FtpResponse(head)
            await session.retrieve(path, head.span.first if head.span is not None else 0)
            return FtpResponse(head, session, self)
        except _RefusedError:
            self.give_back(session)
            raise
        except BaseException:
            session.close()
            raise


class FtpResponse:
    """One reply: see `transport.Response`. Used by one task at a time."""

    http_version = "1.1"

    def __init__(self, head: FileHead, session: _Session | None = None, transport: FtpTransport | None = None) -> None:
        """Without a session, and so without a body, or with the session that brings it, to go back to `transport`."""
        self.status = head.status
        self.reason = head.reason
        self.headers = head.headers
        self.ending: Ending = "chunked" if head.length is None else "length"  # the server's word, or so many bytes
        self.reply_seconds = session.reply_seconds if session is not None else 0.0
        """What the quickest of the server's replies took: a login and many questions say nothing of the link."""
        self._session = session
        self._transport = transport
        self._left = head.length if session is not None else 0  # bytes of the body; None: until the server says so
        self._ended = session is None  # ... and nothing more is to be heard
        self._to_end = head.span is None or head.span.to_end
        self._failure: TransportError | None = None

    async def receive_into(self, view: memoryview) -> int:
        """See `transport.Response.receive_into`. A cancelled call has taken no byte."""
        if self._failure is not None:
            raise self._failure
        if self._ended:
            await trio.lowlevel.checkpoint()
            return 0
        session = self._session
        if session is None or session.data is None:
            raise TransportError("reset", "the response is closed")
        count = 0 if self._left == 0 else await session.data.receive_into(view[: self._left])
        if count == 0:
            await self._end(session)
        elif self._left is not None:
            self._left -= count
        return count

    def receive_ready(self, view: memoryview) -> int:
        """What `receive_into` would give if it did not have to wait; 0 where it would, or must be called to tell.
        Raises TransportError."""
        session = self._session
        if session is None or session.data is None or self._left == 0 or self._failure is not None:
            return 0
        count = session.data.receive_ready(view[: self._left])
        if self._left is not None:
            self._left -= count
        return count

    async def aclose(self, *, reuse: bool = True) -> None:
        """As the protocol says; never waits."""
        session, self._session = self._session, None
        if session is None or self._transport is None:
            return
        if reuse and self._failure is None:
            self._transport.give_back(session)
        else:
            session.close()

    async def _end(self, session: _Session) -> None:
        """The body has no more bytes. Raises TransportError("truncated") where it should have."""
        if self._left == 0 and not self._to_end:
            self._ended = True  # the server would go on
            return
        word = await session.last_word(CLOSING_SECONDS if self._left is not None else UNSIZED_CLOSING_SECONDS)
        why = f": {word}" if word is not None else ""
        if self._left:
            self._failure = TransportError("truncated", f"the file ended {self._left} bytes early{why}")
        elif self._left is None and word is None:
            self._failure = TransportError("truncated", "the server does not say that the file was whole")
        elif word is not None and not word.well:
            self._failure = TransportError("truncated", f"the server broke off{why}")
        if self._failure is not None:
            raise self._failure
        self._ended = True


@dataclass(frozen=True, slots=True)
class _Place:
    """Where to log in, and as whom. Sessions of equal ones are interchangeable."""

    destination: Destination
    user: bytes
    password: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Reply:
    code: int
    text: str  # of its last line

    def __str__(self) -> str:
        return f"{self.code} {self.text}".rstrip()

    @property
    def well(self) -> bool:
        return 200 <= self.code < 300


class _RefusedError(Exception):
    """The server's no."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.refusal = Refusal(status, text)


class _Session:
    """A control connection, and the data connection of the exchange that is under way."""

    def __init__(self, control: Connection, host: str, place: _Place) -> None:
        """`host`: the number that `control` leads to; data connections go there, whatever is said."""
        self.place = place
        self.data: Connection | None = None
        self.restarts = False  # whether the server can begin anywhere in a file
        self.reply_seconds = float("inf")  # the least that a reply took since it last began to serve
        self.heard = True  # any reply since it last began to serve
        self._owed = False  # the word that ends the last exchange
        self._extended = True  # EPSV works, as far as is known
        self._control = control
        self._host = host
        self._offset = 0  # what the server was told last
        self._received = bytearray()
        self._scratch = memoryview(bytearray(4096))

    async def log_in(self) -> None:
        """Raises TransportError, _RefusedError."""
        reply = await self._reply()
        while reply.code < 200:
            reply = await self._reply()
        self._check(reply, 220, 230)
        if reply.code != 230:
            reply = await self._ask(b"USER " + self.place.user)
            if reply.code == 331:
                reply = await self._ask(b"PASS " + self.place.password)
            if not reply.well:
                self._check_busy(reply)
                raise _RefusedError(401, f"the login is refused ({reply.code})")
        reply = await self._ask(b"TYPE I")
        if not reply.well:
            self._check(reply, 200)
        self.restarts = (await self._ask(b"REST 0")).code == 350

    async def is_ready(self) -> bool:
        """Whether it can serve again, as far as can be seen. Waits for what the server owes it."""
        if self._owed and await self.last_word(OWED_SECONDS) is None:
            return False
        self.heard, self.reply_seconds = False, float("inf")
        return not self._received and self._control.silent()

    async def open_data(self) -> None:
        """Make the data connection of the next exchange. Raises TransportError, _RefusedError, TooManyFiles."""
        if self._extended:
            reply = await self._ask(b"EPSV")
            self._check_busy(reply)
            match = _EXTENDED.match(reply.text) if reply.code == 229 else None
            try:
                if match is not None:
                    self.data = await _dial(replace(self._data_destination, port=_port(int(match[2]))))
                    return
            except TransportError:
                if ":" in self._host:
                    raise
            self._extended = False  # perhaps there is something in between that knows PASV only
        if ":" in self._host:
            raise TransportError("reset", f"the server makes no data connections over IPv6: {reply}")
        reply = await self._ask(b"PASV")
        self._check(reply, 227)
        match = _PASSIVE.match(reply.text)
        if match is None:
            raise TransportError("protocol", f"no address in the reply to PASV: {reply}")
        self.data = await _dial(replace(self._data_destination, port=_port(int(match[5]) * 256 + int(match[6]))))

    async def facts(self, path: bytes) -> FileFacts:
        """Raises TransportError, _RefusedError."""
        modified = _seconds(await self._ask(b"MDTM " + path))
        reply = await self._ask(b"SIZE " + path)
        if reply.code == 550:
            raise _RefusedError(404, f"no such file, or it is a folder ({self._shown(reply)})")
        self._check_busy(reply)
        match = _SIZE.fullmatch(reply.text) if reply.code == 213 else None
        return FileFacts(int(match[1]) if match is not None else None, modified)

    async def retrieve(self, path: bytes, first: int) -> None:
        """Begin an exchange: the data connection brings the file from byte `first` on. Raises TransportError,
        _RefusedError."""
        if first != 0 or self._offset != 0:  # also 0: some servers go by it until they are told otherwise
            self._offset = first
            reply = await self._ask(b"REST %d" % first)
            self._check_busy(reply)
            if reply.code != 350:
                raise TransportError("protocol", f"the server does not begin at byte {first}: {self._shown(reply)}")
        reply = await self._ask(b"RETR " + path)
        if reply.code < 200:
            self._owed = True
            return
        self._check_busy(reply)
        if reply.code == 550:  # also of what may not be read
            raise _RefusedError(404, f"no such file, or it may not be read ({self._shown(reply)})")
        if reply.well:
            raise TransportError("protocol", f"the server sends nothing and says {self._shown(reply)}")
        raise _RefusedError(403, f"the file may not be read ({self._shown(reply)})")

    async def last_word(self, seconds: float) -> _Reply | None:
        """What the server says of the exchange that is over; None: nothing for `seconds`, or never more."""
        try:
            with trio.move_on_after(seconds):
                reply = await self._next_reply()
                self._owed = False
                return reply
        except TransportError:
            pass  # the session is of no use any more, as will be seen when it is to serve again
        return None

    def leave_data(self) -> None:
        """The exchange is over for us."""
        if self.data is not None:
            self.data.close()
            self.data = None

    def close(self) -> None:
        self.leave_data()
        self._control.close()

    # -- commands and replies

    async def _ask(self, command: bytes) -> _Reply:
        """The reply to one command. Raises TransportError, and _RefusedError where it is the session's end."""
        if self._received:
            raise TransportError("reset", "the server said something that nobody had asked")
        began = trio.current_time()
        await self._control.send(command + b"\r\n")
        reply = await self._reply()
        self.reply_seconds = min(self.reply_seconds, trio.current_time() - began)
        if reply.code == 421:
            if not self.heard:
                raise TransportError("reset", f"the server had ended the session: {reply}")
            self._check_busy(reply)
        self.heard = True
        return reply

    def _check(self, reply: _Reply, *codes: int) -> None:
        self._check_busy(reply)
        if reply.code not in codes:
            raise TransportError("reset", f"the server said {self._shown(reply)} where {codes[0]} was to come")

    def _check_busy(self, reply: _Reply) -> None:
        if reply.code in BUSY_REPLIES:
            raise _RefusedError(503, f"the server is busy: {self._shown(reply)}")

    def _shown(self, reply: _Reply) -> str:
        password = self.place.password.decode(errors="replace")
        return str(reply).replace(password, "***") if password else str(reply)

    async def _reply(self) -> _Reply:
        with trio.move_on_after(REPLY_SECONDS):
            return await self._next_reply()
        raise TransportError("reset", f"the server did not reply within {REPLY_SECONDS:g} s")

    async def _next_reply(self) -> _Reply:
        """A cancelled call has lost nothing."""
        while (found := _first_reply(self._received)) is None:
            if len(self._received) > REPLY_LIMIT:
                raise TransportError("protocol", f"a reply of the server is longer than {REPLY_LIMIT} bytes")
            try:
                count = await self._control.receive_into(self._scratch)
            except TransportError as error:
                raise TransportError("reset", f"no reply: {error}") from error
            if count == 0:
                raise TransportError("reset", "the server closed the control connection")
            self._received += self._scratch[:count]
        reply, length = found
        del self._received[:length]
        return reply

    @property
    def _data_destination(self) -> Destination:
        return replace(self.place.destination, address=self._host)


async def _logged_in(place: _Place) -> _Session:
    """Raises TransportError, _RefusedError, TooManyFiles."""
    control = await _dial(place.destination)
    try:
        session = _Session(control, control.sock.getpeername()[0], place)
    except OSError as error:
        control.close()
        raise TransportError("reset", f"the connection broke at once: {reason(error)}") from error
    try:
        await session.log_in()
    except BaseException:
        session.close()
        raise
    return session


async def _dial(destination: Destination) -> Connection:
    """Raises TransportError("connect"), TooManyFiles."""
    with trio.move_on_after(CONNECT_SECONDS):
        return await connect(destination, None)
    raise TransportError("connect", f"no connection to {destination.authority} within {CONNECT_SECONDS:g} s")


def _asked(request: Request) -> tuple[_Place, bytes]:
    """Whom to ask, and the file's path as it is said. Raises TransportError("refused")."""
    try:
        parts = urlsplit(request.url)
        host = (parts.hostname or "").encode("idna").decode("ascii")
        port = parts.port or 21
    except ValueError as error:
        raise TransportError("refused", "the URL's host or port is malformed") from error
    if re.search(r"[\x00-\x20\x7f]", request.url):
        raise TransportError("refused", "the URL holds a space or a control character")
    if parts.scheme.lower() != "ftp" or not host or request.identity.proxy is not None:
        raise TransportError("refused", "not for the ftp transport")
    user, password = b"anonymous", b"ftp@example.com"  # as curl
    if parts.username is not None:
        user, password = unquote_to_bytes(parts.username), unquote_to_bytes(parts.password or "")
    name = unquote_to_bytes(parts.path[1:])
    if any(byte < 0x20 for byte in user + password + name):
        raise TransportError("refused", "the URL's login or path holds a control character")
    if not name or name.endswith(b"/"):
        raise TransportError("refused", "the URL names a folder, not a file")
    root = b"/" if name.startswith(b"/") else b""
    path = root + b"/".join(filter(None, name.split(b"/")))
    return _Place(Destination(False, host, port, request.address, Identity()), user, password), path


def _first_reply(received: bytearray) -> tuple[_Reply, int] | None:
    """The first whole reply, and how many bytes it takes; None: there is none yet. Raises TransportError("protocol")
    where that is no reply."""
    code, start = b"", 0
    while (end := received.find(b"\n", start)) >= 0:
        match = _LINE.fullmatch(bytes(received[start:end]).rstrip())
        start = end + 1
        if match is None and not code:
            raise TransportError("protocol", "the answer is not ftp")
        if match is None or (code and match[1] != code):
            continue  # of several lines
        if match[2] != b"-":
            text = (match[3] or b"").decode(errors="replace")
            return _Reply(int(match[1]), "".join(filter(str.isprintable, text))[:200]), start
        code = match[1]
    return None


def _seconds(reply: _Reply) -> int | None:
    """The date in a reply to MDTM, since the epoch; None: there is none."""
    match = _DATE.fullmatch(reply.text) if reply.code == 213 else None
    if match is None:
        return None
    # Not by strptime, whose first call imports for some ms.
    year, month, day, hour, minute, second = map(int, match.groups())
    try:
        seconds = int(datetime(year, month, day, hour, minute, tzinfo=UTC).timestamp()) + second
    except ValueError:
        return None
    return seconds if seconds >= 0 else None


def _port(number: int) -> int:
    if not 0 < number < 65536:
        raise TransportError("protocol", f"the server names the port {number} for its data")
    return number
