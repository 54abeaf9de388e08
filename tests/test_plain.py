"""The plain transport against servers that send scripted bytes."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from streamfs.sources.connection import Connection
from streamfs.sources.http1 import HEAD_LIMIT, Chunked
from streamfs.sources.plain import PlainResponse, PlainTransport
from streamfs.sources.transport import Identity, Request, TransportError

Handler = Callable[[trio.SocketStream], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Server:
    def __init__(self, url: str) -> None:
        self.url = url
        self.connections = 0


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[Server]:
    async def handle(stream: trio.SocketStream) -> None:
        made.connections += 1
        try:
            await handler(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client closed first, as some tests want
        finally:
            await trio.aclose_forcefully(stream)

    made = Server("")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            made.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/x"
            nursery.start_soon(trio.serve_listeners, handle, listeners)
            yield made
            nursery.cancel_scope.cancel()


async def head_of(stream: trio.SocketStream) -> bytes:
    """The next request, empty where the client has closed."""
    seen = b""
    while not seen.endswith(b"\r\n\r\n"):
        got = await stream.receive_some(65536)
        if not got:
            return b""
        seen += got
    return seen


def always(*replies: bytes) -> Handler:
    """Answers the requests of a connection in turn, then closes it."""

    async def handler(stream: trio.SocketStream) -> None:
        for reply in replies:
            if not await head_of(stream):
                return
            await stream.send_all(reply)

    return handler


def for_ever(reply: bytes) -> Handler:
    async def handler(stream: trio.SocketStream) -> None:
        while await head_of(stream):
            await stream.send_all(reply)

    return handler


@pytest.fixture
async def transport() -> AsyncIterator[PlainTransport]:
    made = PlainTransport()
    yield made
    await made.aclose()


async def body_of(response: PlainResponse, size: int = 65536) -> bytes:
    got = bytearray()
    view = memoryview(bytearray(size))
    try:
        while count := await response.receive_into(view):
            got += view[:count]
    finally:
        await response.aclose()
    return bytes(got)


async def fetch(transport: PlainTransport, url: str) -> bytes:
    return await body_of(await transport.request(Request(url)))


# -- connections


async def test_a_connection_serves_again_after_its_body_was_read(transport: PlainTransport) -> None:
    async with server(for_ever(OK)) as made:
        for _ in range(5):
            assert await fetch(transport, made.url) == b"ok"
        assert made.connections == 1
        assert transport.idle_connections == 1


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        OK + b"excess",
    ],
)
async def test_a_connection_that_must_not_serve_again_does_not(reply: bytes, transport: PlainTransport) -> None:
    async with server(for_ever(reply)) as made:
        for _ in range(2):
            assert await fetch(transport, made.url) == b"ok"
        assert made.connections == 2


async def test_a_body_left_unread_costs_its_connection(transport: PlainTransport) -> None:
    async with server(for_ever(OK)) as made:
        await (await transport.request(Request(made.url))).aclose()
        assert transport.idle_connections == 0


async def test_identities_do_not_share_connections(transport: PlainTransport) -> None:
    async with server(for_ever(OK)) as made:
        for identity in (Identity(), Identity(insecure=True)):
            await body_of(await transport.request(Request(made.url, identity=identity)))
        assert made.connections == 2


async def test_a_reused_connection_that_was_closed_is_replaced_once(transport: PlainTransport) -> None:
    """The server takes the second request and closes without a word, as one whose keep-alive ran out."""

    async def handler(stream: trio.SocketStream) -> None:
        await head_of(stream)
        await stream.send_all(OK)
        await head_of(stream)

    async with server(handler) as made:
        assert await fetch(transport, made.url) == b"ok"
        assert await fetch(transport, made.url) == b"ok"
        assert made.connections == 2


async def test_a_new_connection_that_breaks_is_not_replaced(transport: PlainTransport) -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await head_of(stream)

    async with server(handler) as made:
        with pytest.raises(TransportError) as raised:
            await transport.request(Request(made.url))
        assert raised.value.kind == "reset"
        assert made.connections == 1


async def test_idle_connections_are_closed_after_a_while() -> None:
    gone = trio.Event()

    async def handler(stream: trio.SocketStream) -> None:
        while await head_of(stream):
            await stream.send_all(OK)
        gone.set()

    transport = PlainTransport(idle_seconds=0.05)
    async with server(handler) as made:
        await fetch(transport, made.url)
        await gone.wait()
        assert transport.idle_connections == 0
        await fetch(transport, made.url)
        await transport.aclose()


async def test_closing_the_transport_closes_what_is_idle_and_refuses_what_comes(transport: PlainTransport) -> None:
    async with server(for_ever(OK)) as made:
        await fetch(transport, made.url)
        await transport.aclose()
        assert transport.idle_connections == 0
        with pytest.raises(TransportError) as raised:
            await transport.request(Request(made.url))
        assert raised.value.kind == "refused"


async def test_requests_beyond_the_cap_of_a_host_wait_for_their_turn() -> None:
    transport = PlainTransport(connections_per_host=2)
    async with server(for_ever(OK)) as made, trio.open_nursery() as nursery:
        held = [await transport.request(Request(made.url)) for _ in range(2)]
        done = trio.Event()

        async def third() -> None:
            assert await fetch(transport, made.url) == b"ok"
            done.set()

        nursery.start_soon(third)
        await trio.testing.wait_all_tasks_blocked()
        assert not done.is_set() and made.connections == 2
        assert await body_of(held[0]) == b"ok"
        await done.wait()
        await held[1].aclose()
        await transport.aclose()
    assert not transport._slots


async def test_a_cancelled_request_gives_its_turn_back() -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await head_of(stream)
        await head_of(stream)

    transport = PlainTransport(connections_per_host=1)
    async with server(silent) as made:
        for _ in range(3):
            with trio.move_on_after(0.05) as scope:
                await transport.request(Request(made.url))
            assert scope.cancelled_caught
    assert not transport._slots


async def test_a_fast_body_leaves_other_tasks_their_turn(transport: PlainTransport) -> None:
    size = 64 << 20
    turns = 0

    async def handler(stream: trio.SocketStream) -> None:
        await head_of(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(64):
            await stream.send_all(bytes(1 << 20))

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with server(handler) as made, trio.open_nursery() as nursery:
        nursery.start_soon(other)
        response = await transport.request(Request(made.url))
        view = memoryview(bytearray(64 << 10))
        receives = 0
        while await response.receive_into(view):
            receives += 1
        nursery.cancel_scope.cancel()
        await response.aclose()
    assert turns >= receives / 8


# -- heads


@pytest.mark.parametrize(
    ("head", "version", "status"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", "1.1", 200),
        (b"HTTP/1.0 206 Partial\r\n\r\n", "1.0", 206),
        (b"HTTP/1.1 200\r\n\r\n", "1.1", 200),
        (b"ICY 200 OK\r\nicy-metaint:0\r\n\r\n", "icy", 200),
        (b"HTTP/1.1 200 OK\nServer: lf only\n\n", "1.1", 200),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 404 No\r\n\r\n", "1.1", 404),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "1.1", 200),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n", "1.1", 200),
    ],
)
async def test_heads_of_real_servers_are_understood(
    head: bytes, version: str, status: int, transport: PlainTransport
) -> None:
    async with server(always(head + b"to the close")) as made:
        response = await transport.request(Request(made.url))
        assert (response.http_version, response.status, response.ending) == (version, status, "close")
        assert await body_of(response) == b"to the close"


@pytest.mark.parametrize(
    "head",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * HEAD_LIMIT + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2 * HEAD_LIMIT,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
    ],
)
async def test_what_is_not_http_or_too_much_of_it_is_a_protocol_error(head: bytes, transport: PlainTransport) -> None:
    async with server(always(head)) as made:
        with pytest.raises(TransportError) as raised:
            await transport.request(Request(made.url))
        assert raised.value.kind == "protocol"


async def test_a_head_that_comes_byte_by_byte_is_put_together(transport: PlainTransport) -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await head_of(stream)
        for byte in OK:
            await stream.send_all(bytes([byte]))

    async with server(handler) as made:
        assert await fetch(transport, made.url) == b"ok"


async def test_the_reply_to_head_has_no_body(transport: PlainTransport) -> None:
    async with server(for_ever(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")) as made:
        for _ in range(2):
            response = await transport.request(Request(made.url, method="HEAD"))
            assert await body_of(response) == b""
        assert made.connections == 1


@pytest.mark.parametrize(
    "request_",
    [
        Request("http://127.0.0.1:1/", identity=Identity(proxy="http://127.0.0.1:3128")),
        Request("http://127.0.0.1:1/", identity=Identity(http2=True)),
        Request("ftp://127.0.0.1:1/"),
        Request("http://127.0.0.1:1/", headers=(("X", "a\r\nb: CANARY"),)),
    ],
)
async def test_what_it_cannot_do_is_refused(request_: Request, transport: PlainTransport) -> None:
    with pytest.raises(TransportError) as raised:
        await transport.request(request_)
    assert raised.value.kind == "refused"
    assert "CANARY" not in str(raised.value)


async def test_a_refused_connection_is_a_failure_to_connect(transport: PlainTransport) -> None:
    with pytest.raises(TransportError) as raised:
        await transport.request(Request("http://127.0.0.1:1/"))
    assert raised.value.kind == "connect"


# -- bodies


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (b"Content-Length: 10\r\n\r\nshort", "truncated"),
        (b"Transfer-Encoding: chunked\r\n\r\na\r\nshort", "truncated"),
        (b"Transfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n", "truncated"),
        (b"Transfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n0\r\n", "truncated"),
        (b"Transfer-Encoding: chunked\r\n\r\n5\r\nlonger\r\n0\r\n\r\n", "protocol"),
        (b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", "protocol"),
        (b"Transfer-Encoding: chunked\r\n\r\n-5\r\nshort\r\n0\r\n\r\n", "protocol"),
        (b"Transfer-Encoding: chunked\r\n\r\n0x5\r\nshort\r\n0\r\n\r\n", "protocol"),
        (b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * 9000, "protocol"),
        (b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", "protocol"),
    ],
)
async def test_a_body_that_breaks_its_promise_is_no_end(reply: bytes, kind: str, transport: PlainTransport) -> None:
    async with server(always(b"HTTP/1.1 200 OK\r\n" + reply)) as made:
        with pytest.raises(TransportError) as raised:
            await fetch(transport, made.url)
        assert raised.value.kind == kind


async def test_a_connection_serves_again_after_a_chunked_body(transport: PlainTransport) -> None:
    reply = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nfirst\r\n3\r\nend\r\n0\r\nTrailer: 1\r\n\r\n"
    )
    async with server(for_ever(reply)) as made:
        for _ in range(3):
            assert await fetch(transport, made.url) == b"firstend"
        assert made.connections == 1


class Scripted(Connection):
    """A connection that gives `data` in pieces of the given sizes, then ends."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data = data
        self._sizes = sizes or [len(data)]
        self._turn = 0

    async def receive_into(self, view: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        count = min(self._sizes[self._turn % len(self._sizes)], len(view), len(self._data))
        self._turn += 1
        view[:count] = self._data[:count]
        self._data = self._data[count:]
        return count


@given(
    chunks=st.lists(st.one_of(st.integers(1, 50), st.integers(1, 700_000)), max_size=6),
    sizes=st.lists(st.one_of(st.integers(1, 9), st.integers(1, 400_000)), min_size=1, max_size=5),
    view_size=st.one_of(st.integers(1, 40), st.integers(1000, 1 << 20)),
    ahead=st.integers(0, 300),
    seed=st.integers(0, 1000),
)
def test_chunks_are_put_together_however_they_arrive(
    chunks: list[int], sizes: list[int], view_size: int, ahead: int, seed: int
) -> None:
    if sum(chunks) > 2000 and (view_size < 1000 or max(sizes) < 1000):
        chunks = [min(chunk, 300) for chunk in chunks]  # or one example takes seconds
    dice = random.Random(seed)
    parts = [dice.randbytes(chunk) for chunk in chunks]
    wire = b"".join(b"%X\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\nNEXT"

    async def run() -> tuple[bytes, bytes]:
        decoder = Chunked(Scripted(wire[ahead:], sizes), bytearray(wire[:ahead]))
        got = bytearray()
        view = memoryview(bytearray(view_size))
        while count := await decoder.receive_into(view):
            got += view[:count]
        return bytes(got), bytes(decoder.leftover)

    got, leftover = trio.run(run)
    assert got == b"".join(parts)
    assert b"NEXT".startswith(leftover)
