"""The ftp transport against servers that follow a script: what is said, in which order, and what servers do wrong.

What it has in common with libcurl, over real servers, is in test_curl_files and test_curl_protocols.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from streamfs import descriptors
from streamfs.errors import SourceFailed, SourceStalled, TooManyFiles
from streamfs.sources.ftp import FtpTransport, speaks
from streamfs.sources.http import HttpSource
from streamfs.sources.idle import IdlePool
from streamfs.sources.transport import Request, Response, TransportError
from streamfs.sources.transports import Transports
from streamfs.spec import StreamOptions, StreamSpec, UrlSource
from tests.fakes import named_bytes
from tests.sourcefakes import until

DATA = named_bytes("ftp", 0, 300_000)
LONG = named_bytes("ftp", 1, 32 << 20)  # several times what sockets hold
WITHIN = 20.0  # seconds for whatever must happen
SILENCE, GOODBYE = b"", None
"""In place of a reply: none; the control connection is closed."""


class Scripted:
    """An ftp server. `said` holds what each session was told, in order. `replies`: in place of the usual ones, by the
    first word of a command, or by all of it. What is sent of a file may end early, after `breaks` bytes: with the
    connections (`cut`), or with nothing more."""

    def __init__(self, content: bytes = DATA, **replies: bytes | None) -> None:
        self.content = content
        self.replies: dict[bytes, bytes | None] = {word.encode(): reply for word, reply in replies.items()}
        self.once: dict[bytes, bytes | None] = {}  # the same, for the next command only
        self.greeting = b"220 ready"
        self.slow_login = 0.0  # seconds
        self.forgets_restart = True  # after each file
        self.said: list[list[bytes]] = []
        self.data_peers: list[tuple[str, int]] = []
        self.breaks: int | None = None
        self.cut = True
        self.ended = 0  # sessions
        self.controls: list[trio.SocketStream] = []

    @asynccontextmanager
    async def running(self, host: str = "127.0.0.1") -> AsyncIterator[str]:
        """The beginning of its URLs, without a slash at the end."""
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host=host)
            nursery.start_soon(trio.serve_listeners, self._serve, listeners)
            shown = f"[{host}]" if ":" in host else host
            yield f"ftp://{shown}:{listeners[0].socket.getsockname()[1]}"
            nursery.cancel_scope.cancel()

    @property
    def words(self) -> list[list[bytes]]:
        """The first words alone."""
        return [[command.split()[0] for command in session] for session in self.said]

    async def _serve(self, control: trio.SocketStream) -> None:
        said: list[bytes] = []
        self.said.append(said)
        self.controls.append(control)
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # the other side left
            await control.send_all(self.greeting + b"\r\n")
            session = _Session(self, control, said)
            try:
                await session.talk()
            finally:
                session.close()
        self.ended += 1


class _Session:
    def __init__(self, script: Scripted, control: trio.SocketStream, said: list[bytes]) -> None:
        self._script = script
        self._control = control
        self._said = said
        self._passive: trio.SocketListener | None = None
        self._offset = 0

    async def talk(self) -> None:
        buffer = b""
        async with self._control:
            while received := await self._control.receive_some():
                buffer += received
                while b"\r\n" in buffer:
                    line, _, buffer = buffer.partition(b"\r\n")
                    self._said.append(line)
                    reply = await self._reply(line)
                    if reply is GOODBYE:
                        return
                    if reply:
                        await self._control.send_all(reply + b"\r\n")

    def close(self) -> None:
        if self._passive is not None:
            self._passive.socket.close()

    async def _reply(self, line: bytes) -> bytes | None:
        script = self._script
        word, _, argument = line.partition(b" ")
        if word in script.once:
            return script.once.pop(word)
        for key in (line, word):
            if key in script.replies:
                return script.replies[key]
        match word:
            case b"USER":
                await trio.sleep(script.slow_login)
                return b"331 and the password?"
            case b"PASS":
                return b"230 welcome"
            case b"TYPE":
                return b"200 fine"
            case b"MDTM":
                return b"213 20230101000000"
            case b"SIZE":
                return b"213 %d" % len(script.content)
            case b"EPSV":
                return b"229 go (|||%d|)" % await self._listen()
            case b"PASV":
                return b"227 go (10,9,8,7,%d,%d)" % divmod(await self._listen(), 256)
            case b"REST":
                self._offset = int(argument)
                return b"350 from there"
            case b"RETR":
                return await self._send()
        return b"500 what?"

    async def _listen(self) -> int:
        if self._passive is not None:
            await self._passive.aclose()
        host = self._control.socket.getsockname()[0]
        self._passive = (await trio.open_tcp_listeners(0, host=host))[0]
        return int(self._passive.socket.getsockname()[1])

    async def _send(self) -> bytes | None:
        assert self._passive is not None
        script = self._script
        await self._control.send_all(b"150 here it comes\r\n")
        passive, self._passive = self._passive, None
        offset = self._offset
        if script.forgets_restart:
            self._offset = 0
        breaks, cut = script.breaks, script.cut
        async with passive, await passive.accept() as data:
            script.data_peers.append(data.socket.getpeername()[:2])
            try:
                await data.send_all(script.content[offset:breaks])
                if breaks is None:
                    return b"226 done"
                if cut:
                    return GOODBYE
                await data.receive_some()  # until the other side leaves
            except trio.BrokenResourceError:
                pass
        return b"426 you left" if breaks is None else SILENCE


@pytest.fixture
async def transport() -> AsyncIterator[FtpTransport]:
    made = FtpTransport()
    with trio.fail_after(WITHIN):
        yield made
        await made.aclose()


async def body_of(response: Response, size: int = 70_000) -> bytes:
    got, view = bytearray(), memoryview(bytearray(size))
    while count := await response.receive_into(view):
        got += view[:count]
    return bytes(got)


async def get(transport: FtpTransport, url: str, asked: str | None = None) -> tuple[int, bytes]:
    varying = () if asked is None else (("Range", f"bytes={asked}"),)
    response = await transport.request(Request(url, varying=varying))
    try:
        return response.status, await body_of(response)
    finally:
        await response.aclose()


async def refusal(transport: FtpTransport, url: str) -> tuple[int, str]:
    response = await transport.request(Request(url))
    assert await body_of(response) == b""
    await response.aclose()
    return response.status, response.reason


async def failure(transport: FtpTransport, url: str, asked: str | None = None) -> TransportError:
    with pytest.raises(TransportError) as caught:
        await get(transport, url, asked)
    return caught.value


def source(url: str, transports: Transports, **options: object) -> HttpSource:
    made = StreamOptions(**{"stall_timeout": 10.0} | options)  # type: ignore[arg-type]
    return HttpSource(StreamSpec(name="s", source=UrlSource(url), options=made), transports)


# -- what is said


LOGIN = [b"USER anonymous", b"PASS ftp@example.com", b"TYPE I", b"REST 0"]


async def test_a_session_serves_one_request_after_the_other(transport: FtpTransport) -> None:
    server = Scripted()
    async with server.running() as url:
        assert await get(transport, f"{url}/a/b") == (200, DATA)
        assert await get(transport, f"{url}/a/b", "1000-") == (206, DATA[1000:])
        head = await transport.request(Request(f"{url}/c", method="HEAD"))
        assert (head.status, dict(head.headers)["content-length"]) == (200, str(len(DATA)))
        assert await body_of(head) == b""
    first = [b"EPSV", b"MDTM a/b", b"SIZE a/b", b"RETR a/b"]
    second = [b"EPSV", b"MDTM a/b", b"SIZE a/b", b"REST 1000", b"RETR a/b"]
    assert server.said == [[*LOGIN, *first, *second, b"MDTM c", b"SIZE c"]]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/a%20b/%C3%BC", "a b/ü".encode()),
        ("/ü", "ü".encode()),
        ("/%FF", b"\xff"),
        ("//etc//x", b"/etc/x"),
        ("/%2Fetc/x", b"/etc/x"),
        ("/a%2Fb", b"a/b"),
    ],
)
async def test_a_path_is_said_as_its_bytes_are_from_the_login_or_from_the_root(
    transport: FtpTransport, path: str, said: bytes
) -> None:
    server = Scripted()
    async with server.running() as url:
        assert await get(transport, url + path) == (200, DATA)
    assert server.said[0][-1] == b"RETR " + said


@pytest.mark.parametrize(
    "path", ["/a%0D%0ADELE%20b", "/a%0Ab", "/a%00b", "/a b", "/a\nb", "/", "", "/folder/", "/folder%2F"]
)
async def test_what_is_no_file_or_would_be_more_than_one_command_is_not_said(
    transport: FtpTransport, path: str
) -> None:
    server = Scripted()
    async with server.running() as url:
        assert (await failure(transport, url + path)).kind == "refused"
        assert (await failure(transport, url.replace("//", "//me%0D%0ADELE%20b:x@") + "/a")).kind == "refused"
    assert server.said == []


async def test_a_login_is_that_of_the_url_and_shares_no_session_with_another(transport: FtpTransport) -> None:
    server = Scripted()
    async with server.running() as url:
        for login in ("me%40home:ge%3Aheim@", "you@", "me%40home:ge%3Aheim@", ""):
            assert await get(transport, f"{url.replace('//', '//' + login)}/a") == (200, DATA)
    assert [session[:2] for session in server.said] == [
        [b"USER me@home", b"PASS ge:heim"],
        [b"USER you", b"PASS "],
        LOGIN[:2],
    ]


async def test_the_login_of_the_netrc_file_is_used(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password geheim\n")
    server = Scripted()
    async with server.running() as url, Transports() as transports:
        await source(f"{url}/a", transports, netrc=str(tmp_path / "netrc")).probe()
    assert server.said[0][:2] == [b"USER me", b"PASS geheim"]


@pytest.mark.parametrize("greeting", [b"220-hello\r\n 221 no end\r\n220-more\r\n220 ready", b"120 soon\r\n220 ready"])
async def test_a_reply_of_several_lines_is_one(transport: FtpTransport, greeting: bytes) -> None:
    server = Scripted(USER=b"230-welcome\r\n331 not yet\r\nin\r\n230 now")
    server.greeting = greeting
    async with server.running() as url:
        assert await get(transport, f"{url}/a") == (200, DATA)
    assert b"PASS" not in server.words[0]


@pytest.mark.parametrize(
    ("url", "options", "ours"),
    [
        ("ftp://h/a%20b", StreamOptions(), True),
        ("FTP://u:p@h:2121//a/..b", StreamOptions(insecure=True), True),
        ("ftps://h/a", StreamOptions(), False),
        ("ftp://h/a;type=a", StreamOptions(), False),
        ("ftp://h/a?b", StreamOptions(), False),
        ("ftp://h/a#b", StreamOptions(), False),
        ("ftp://h/a/../b", StreamOptions(), False),
        ("ftp://h/a", StreamOptions(proxy="http://p"), False),
        ("ftp://h/a", StreamOptions(cacert="/ca.pem"), False),
        ("ftp://h/a", StreamOptions(cert="/cert.pem"), False),
        ("http://h/a", StreamOptions(), False),
    ],
)
async def test_what_is_odd_or_needs_tls_or_a_proxy_is_left_to_libcurl(
    url: str, options: StreamOptions, ours: bool
) -> None:
    assert speaks(url, options) == ours
    async with Transports() as transports:
        assert isinstance(transports.pick(url, options), FtpTransport) == ours


@pytest.mark.parametrize(
    ("said", "date"),
    [
        (b"213 20230101000000", "Sun, 01 Jan 2023 00:00:00 GMT"),
        (b"213 20231231235960.123", "Mon, 01 Jan 2024 00:00:00 GMT"),
        (b"213 20230229000000", None),
        (b"213 19691231235959", None),
        (b"213 yesterday", None),
        (b"550 not there", None),
        (b"500 what?", None),
    ],
)
async def test_a_date_is_believed_where_it_is_one(transport: FtpTransport, said: bytes, date: str | None) -> None:
    async with Scripted(MDTM=said).running() as url:
        response = await transport.request(Request(f"{url}/a", method="HEAD"))
        assert dict(response.headers).get("last-modified") == date


@pytest.mark.parametrize(("said", "size"), [(b"213 300000", 300_000), (b"213 a has 12", 12), (b"213 many", None)])
async def test_a_size_is_believed_where_it_is_one(transport: FtpTransport, said: bytes, size: int | None) -> None:
    async with Scripted(SIZE=said).running() as url:
        response = await transport.request(Request(f"{url}/a", method="HEAD"))
        assert dict(response.headers).get("content-length") == (None if size is None else str(size))


async def test_what_a_login_takes_is_told_apart_from_the_delay_of_the_link() -> None:
    server = Scripted()
    server.slow_login = 0.3
    async with server.running() as url, Transports() as transports:
        began = trio.current_time()
        body = await source(f"{url}/a", transports).open(0, None, None)
        assert body.reply_seconds is not None
        assert 0 < body.reply_seconds <= trio.current_time() - began - 0.3
        await body.aclose()


# -- where the data comes from


async def test_data_comes_from_the_host_that_was_asked_whatever_address_it_names(transport: FtpTransport) -> None:
    server = Scripted(EPSV=b"500 what?")
    async with server.running() as url:
        assert await get(transport, f"{url}/a") == (200, DATA)  # the reply to PASV names 10.9.8.7
        assert await get(transport, f"{url}/a") == (200, DATA)
    assert server.words[0].count(b"EPSV") == 1, "what failed once is not tried again"
    assert server.words[0].count(b"PASV") == 2


async def test_pasv_is_tried_where_the_port_of_epsv_takes_nobody(transport: FtpTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    server = Scripted(EPSV=b"229 there (|||%d|)" % port)
    async with server.running() as url:
        assert await get(transport, f"{url}/a") == (200, DATA)


async def test_ipv6_has_epsv_alone(transport: FtpTransport) -> None:
    server = Scripted()
    async with server.running("::1") as url:
        assert await get(transport, f"{url}/a", "5-9") == (206, DATA[5:10])
        assert server.data_peers[0][0] == "::1"
        server.replies[b"EPSV"] = b"522 no"
        assert (await failure(transport, f"{url}/a")).kind == "reset"
    assert all(b"PASV" not in words for words in server.words)


@pytest.mark.parametrize("reply", [b"227 come in", b"227 (1,2,3,4,999,5)", b"227 (1,2,3,4,0,0)", b"500 no"])
async def test_a_reply_that_names_no_port_is_an_error(transport: FtpTransport, reply: bytes) -> None:
    async with Scripted(EPSV=b"229 (|||0|)", PASV=reply).running() as url:
        assert (await failure(transport, f"{url}/a")).kind in ("protocol", "reset")


# -- sessions that are used again


async def test_a_body_that_is_left_early_costs_its_data_connection_only(transport: FtpTransport) -> None:
    server = Scripted(LONG)
    async with server.running() as url:
        for start in (0, 20 << 20, 5):
            response = await transport.request(Request(f"{url}/a", varying=(("Range", f"bytes={start}-"),)))
            view = memoryview(bytearray(1000))
            count = await response.receive_into(view)
            assert view[:count] == LONG[start : start + count]
            await response.aclose()
        assert await get(transport, f"{url}/a", "7-1000000") == (206, LONG[7:1_000_001])
        assert transport.idle_sessions == 1
    assert [words.count(b"USER") for words in server.words] == [1]


async def test_a_session_whose_server_says_nothing_to_that_is_given_up(transport: FtpTransport) -> None:
    server = Scripted()
    server.breaks, server.cut = 1000, False
    async with server.running() as url:
        response = await transport.request(Request(f"{url}/a"))
        assert await response.receive_into(memoryview(bytearray(100))) == 100
        await response.aclose()
        server.breaks = None
        assert await get(transport, f"{url}/a") == (200, DATA)
    assert len(server.said) == 2


async def test_without_reuse_a_session_ends_with_its_response(transport: FtpTransport) -> None:
    server = Scripted()
    async with server.running() as url:
        response = await transport.request(Request(f"{url}/a"))
        await response.aclose(reuse=False)
        await until(lambda: server.ended == 1)
        with pytest.raises(TransportError):
            await response.receive_into(memoryview(bytearray(10)))
    assert transport.idle_sessions == 0


@pytest.mark.parametrize("farewell", [b"", b"421 you said nothing for too long\r\n", b"226 once more\r\n"])
async def test_a_session_that_the_server_ended_or_talks_into_serves_no_more(
    transport: FtpTransport, farewell: bytes
) -> None:
    server = Scripted()
    async with server.running() as url:
        assert await get(transport, f"{url}/a") == (200, DATA)
        await server.controls[0].socket.send(farewell)
        if not farewell.startswith(b"226"):
            await server.controls[0].aclose()
        assert await get(transport, f"{url}/a") == (200, DATA)
    assert len(server.said) == 2


@pytest.mark.parametrize("reply", [b"421 that was too long", GOODBYE])
async def test_a_session_that_ends_at_its_next_command_is_replaced_by_another(
    transport: FtpTransport, reply: bytes | None
) -> None:
    server = Scripted()
    async with server.running() as url:
        assert await get(transport, f"{url}/a") == (200, DATA)
        server.once[b"EPSV"] = reply
        assert await get(transport, f"{url}/a") == (200, DATA)
    assert len(server.said) == 2


async def test_idle_sessions_are_closed_in_time_and_at_the_end() -> None:
    server = Scripted()
    async with server.running() as url:
        short, long = FtpTransport(idle_seconds=0.05), FtpTransport()
        await get(short, f"{url}/a")
        await until(lambda: server.ended == 1)
        assert short.idle_sessions == 0
        await get(long, f"{url}/a")
        held = await long.request(Request(f"{url}/b", method="HEAD"))
        assert long.idle_sessions == 1
        await long.aclose()
        await held.aclose()
        await until(lambda: server.ended == 2)
        assert (await failure(long, f"{url}/a")).kind == "refused"
        await short.aclose()


class Closing:
    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


async def test_each_idle_connection_is_closed_when_its_own_time_is_over(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pool: IdlePool[str, Closing] = IdlePool(10.0)
    first, second, third = Closing(), Closing(), Closing()
    pool.give("a", first)
    await trio.sleep(6)
    pool.give("a", second)
    pool.give("b", third)
    await trio.sleep(5)
    assert (first.closed, second.closed, third.closed, len(pool)) == (True, False, False, 2)
    assert pool.take("a") is second
    assert pool.take("a") is None
    await trio.sleep(6)
    assert (second.closed, third.closed, len(pool)) == (False, True, 0)
    pool.give("a", second)  # after the reaper has ended
    await trio.sleep(11)
    assert second.closed
    pool.close()
    late = Closing()
    pool.give("a", late)
    assert late.closed


# -- refusals


@pytest.mark.parametrize(
    ("replies", "status", "text"),
    [
        ({"SIZE": b"550 not there"}, 404, "no such file, or it is a folder (550 not there)"),
        ({"RETR": b"550 not for you"}, 404, "no such file, or it may not be read (550 not for you)"),
        ({"RETR": b"553 odd name"}, 403, "the file may not be read (553 odd name)"),
        ({"RETR": b"450 in use"}, 503, "the server is busy: 450 in use"),
        ({"EPSV": b"425 no port"}, 503, "the server is busy: 425 no port"),
        ({"USER": b"421 too many"}, 503, "the server is busy: 421 too many"),
        ({"SIZE": b"421 shutting down"}, 503, "the server is busy: 421 shutting down"),
        ({"PASS": b"530 not you, geheim"}, 401, "the login is refused (530)"),
        ({"USER": b"530 not you"}, 401, "the login is refused (530)"),
        ({"PASS": b"332 and the account?"}, 401, "the login is refused (332)"),
        ({"RETR": b"550 geheim\x1b[2J"}, 404, "no such file, or it may not be read (550 ***[2J)"),
    ],
)
async def test_what_a_server_refuses_is_told_without_secrets(
    transport: FtpTransport, replies: dict[str, bytes], status: int, text: str
) -> None:
    server = Scripted(**replies)
    async with server.running() as url:
        assert await refusal(transport, url.replace("//", "//me:geheim@") + "/a") == (status, text)
        server.replies.clear()
        assert await get(transport, url.replace("//", "//me:geheim@") + "/a") == (200, DATA)
    assert len(server.said) == (1 if status == 404 or b"RETR" in server.words[0] or "425" in text else 2)


async def test_a_server_that_cannot_begin_in_the_middle_gives_the_whole(transport: FtpTransport) -> None:
    server = Scripted(REST=b"502 no")
    async with server.running() as url:
        assert await get(transport, f"{url}/a", "1000-") == (200, DATA)
        async with Transports() as transports:
            body = await source(f"{url}/a", transports).open(1000, None, None)
            assert (body.start, body.facts.ranged, body.facts.size) == (0, False, len(DATA))
            assert await body_of(body) == DATA  # type: ignore[arg-type]
            assert body.end_proven
            await body.aclose()
    assert all(session.count(b"REST 1000") == 0 for session in server.said)


async def test_a_server_that_does_not_begin_where_it_said_it_could_is_not_believed(transport: FtpTransport) -> None:
    server = Scripted()
    server.replies[b"REST 1000"] = b"501 too far"
    async with server.running() as url:
        error = await failure(transport, f"{url}/a", "1000-")
        assert (error.kind, error.passing) == ("protocol", False)
        assert "1000" in str(error)
    assert b"RETR" not in server.words[0]


async def test_a_server_that_keeps_to_where_it_began_last_is_told_anew(transport: FtpTransport) -> None:
    server = Scripted()
    server.forgets_restart = False
    async with server.running() as url:
        assert await get(transport, f"{url}/a", "1000-") == (206, DATA[1000:])
        assert await get(transport, f"{url}/a", "0-") == (206, DATA)
        assert await get(transport, f"{url}/a") == (200, DATA)
        server.once[b"RETR"] = b"550 just now"
        assert (await get(transport, f"{url}/a", "1000-"))[0] == 404
        assert await get(transport, f"{url}/a") == (200, DATA)
    assert len(server.said) == 1


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH", b"220-x\r\n" * 20_000, b"HTTP/1.1 400 Bad Request"])
async def test_what_is_no_ftp_server_is_told(transport: FtpTransport, greeting: bytes) -> None:
    server = Scripted()
    server.greeting = greeting
    async with server.running() as url:
        error = await failure(transport, f"{url}/a")
        assert error.kind == "protocol"


@pytest.mark.parametrize("word", ["USER", "TYPE", "EPSV", "MDTM", "SIZE", "RETR"])
async def test_a_server_that_leaves_before_it_answered_is_worth_another_try(transport: FtpTransport, word: str) -> None:
    async with Scripted(**{word: GOODBYE}).running() as url:
        error = await failure(transport, f"{url}/a")
        assert (error.kind, error.passing) == ("reset", True)


# -- bytes that do not come


async def test_a_server_that_dies_in_the_middle_is_truncated_and_gone_on_after(transport: FtpTransport) -> None:
    server = Scripted()
    server.breaks = 200_000
    async with server.running() as url:
        response = await transport.request(Request(f"{url}/a"))
        with pytest.raises(TransportError, match="100000 bytes early") as caught:
            await body_of(response)
        assert caught.value.kind == "truncated"
        await response.aclose()
        assert transport.idle_sessions == 0
        async with Transports() as transports:
            body = await source(f"{url}/a", transports).open(0, None, None)
            got, view = bytearray(), memoryview(bytearray(50_000))
            while count := await body.receive_into(view):
                got += view[:count]
                server.breaks = None
            assert got == DATA
            await body.aclose()


async def test_a_server_that_falls_silent_in_the_middle_is_a_stall() -> None:
    server = Scripted()
    server.breaks, server.cut = 1000, False
    async with server.running() as url, Transports() as transports:
        body = await source(f"{url}/a", transports, stall_timeout=0.5).open(0, None, None)
        got, view = bytearray(), memoryview(bytearray(50_000))
        with pytest.raises(SourceStalled), trio.fail_after(WITHIN):
            while count := await body.receive_into(view):
                got += view[:count]
        assert got == DATA[:1000]
        await body.aclose()


@pytest.mark.parametrize("word", ["USER", "EPSV", "SIZE", "RETR"])
async def test_a_request_to_a_silent_server_is_given_up_at_once_and_leaves_nothing(
    transport: FtpTransport, word: str
) -> None:
    server = Scripted(**{word: SILENCE})
    async with server.running() as url:
        before = _descriptors()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(get, transport, f"{url}/a")
            await until(lambda: bool(server.words and server.words[-1] and server.words[-1][-1] == word.encode()))
            nursery.cancel_scope.cancel()
        await until(lambda: server.ended == 1)
        await until(lambda: _descriptors() <= before + (word != "USER"))  # the server's own listener
        assert transport.idle_sessions == 0
        async with Transports() as transports:
            with pytest.raises(SourceStalled), trio.fail_after(WITHIN):
                await source(f"{url}/a", transports, stall_timeout=0.3).probe()


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.mark.parametrize("spent", [lambda asked: True, lambda asked: asked == 2], ids=["control", "data"])
async def test_a_stream_takes_none_of_the_last_descriptors(
    transport: FtpTransport, monkeypatch: pytest.MonkeyPatch, spent: Callable[[int], bool]
) -> None:
    asked = 0

    def are_short() -> bool:
        nonlocal asked
        asked += 1
        return spent(asked)

    server = Scripted()
    async with server.running() as url:
        monkeypatch.setattr(descriptors, "are_short", are_short)
        with pytest.raises(TooManyFiles):
            await get(transport, f"{url}/a")
        monkeypatch.undo()
        await until(lambda: server.ended == len(server.said))
        assert await get(transport, f"{url}/a") == (200, DATA)


async def test_nobody_there_is_told_and_tried_again_for_a_while() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    async with Transports() as transports:
        with pytest.raises(SourceFailed, match=f"127.0.0.1:{port}: Connection refused"):
            await source(f"ftp://127.0.0.1:{port}/a", transports).probe()
