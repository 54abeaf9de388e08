"""The libcurl transport over http and https: nginx, proxies, and origins that misbehave."""

from __future__ import annotations

import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from streamfs.sources import curl
from streamfs.sources.curl import CurlTransport
from streamfs.sources.curl.multi import BACKLOG_LIMIT, unusable_reason
from streamfs.sources.transport import Identity, Request, TransportError
from tests import servers
from tests.servers import Certificates, Server

MIB = 1 << 20
SMALL = random.Random(1).randbytes(300_001)
BIG = random.Random(2).randbytes(24 * MIB + 17)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "small.flac").write_bytes(SMALL)
    (folder / "big").write_bytes(BIG)
    (folder / "empty").touch()
    return folder


@pytest.fixture(scope="module")
def nginx(root: Path) -> Iterator[Server]:
    with servers.nginx(root) as server:
        yield server


@pytest.fixture(scope="module")
def nginx_tls(root: Path, certificates: Certificates) -> Iterator[Server]:
    with servers.nginx(root, tls=certificates, http2=True) as server:
        yield server


@pytest.fixture
async def transport() -> AsyncIterator[CurlTransport]:
    async with CurlTransport() as made:
        yield made


async def body_of(response: curl.CurlResponse, size: int = 64 << 10) -> bytes:
    """The rest of the body; each receive uses a fresh part of the memory around its view to show overruns."""
    memory = bytearray(size + 8)
    received = bytearray()
    while True:
        memory[size:] = b"guarded!"
        count = await response.receive_into(memoryview(memory)[:size])
        assert memory[size:] == b"guarded!"
        if count == 0:
            return bytes(received)
        received += memory[:count]


async def get(transport: CurlTransport, url: str, **options: object) -> tuple[curl.CurlResponse, bytes]:
    response = await transport.request(Request(url, **options))  # type: ignore[arg-type]
    try:
        return response, await body_of(response)
    finally:
        await response.aclose()


Handler = Callable[[trio.SocketStream, bytes], Awaitable[None]]


@asynccontextmanager
async def origin(handle: Handler) -> AsyncIterator[str]:
    """A server that reads one request head per connection, hands it to `handle` and then closes. Gives its URL."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            head = b""
            while b"\r\n\r\n" not in head:
                received = await stream.receive_some()
                if not received:
                    return
                head += received
            await handle(stream, head)

    async with trio.open_nursery() as nursery:
        opened = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, opened)
        yield f"http://127.0.0.1:{opened[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


def answering(reply: bytes) -> Handler:
    async def handle(stream: trio.SocketStream, head: bytes) -> None:
        await stream.send_all(reply)

    return handle


# -- whole bodies and ranges


async def test_a_whole_body_arrives_byte_exact_with_its_head(transport: CurlTransport, nginx: Server) -> None:
    response, body = await get(transport, f"http://{nginx.authority}/small.flac")
    assert (response.status, response.reason, response.http_version) == (200, "OK", "1.1")
    assert response.ending == "length"
    headers = dict(response.headers)
    assert headers["content-length"] == str(len(SMALL))
    assert headers["content-type"] == "audio/flac"
    assert headers["accept-ranges"] == "bytes"
    assert body == SMALL


async def test_a_range_gives_206_and_just_those_bytes(transport: CurlTransport, nginx: Server) -> None:
    response, body = await get(
        transport, f"http://{nginx.authority}/small.flac", headers=(("Range", "bytes=1000-1999"),)
    )
    assert response.status == 206
    assert dict(response.headers)["content-range"] == f"bytes 1000-1999/{len(SMALL)}"
    assert body == SMALL[1000:2000]


async def test_a_server_without_ranges_is_reported_as_it_answers(transport: CurlTransport, root: Path) -> None:
    with servers.nginx(root, ranges=False) as server:
        url = f"http://{server.authority}/small.flac"
        response, body = await get(transport, url, headers=(("Range", "bytes=1000-1999"),))
    assert response.status == 200
    assert body == SMALL


async def test_an_empty_body_ends_at_once(transport: CurlTransport, nginx: Server) -> None:
    response, body = await get(transport, f"http://{nginx.authority}/empty")
    assert (response.status, body) == (200, b"")


async def test_head_gives_the_length_and_no_body(transport: CurlTransport, nginx: Server) -> None:
    response, body = await get(transport, f"http://{nginx.authority}/small.flac", method="HEAD")
    assert dict(response.headers)["content-length"] == str(len(SMALL))
    assert body == b""


async def test_a_missing_file_is_a_reply_not_an_error(transport: CurlTransport, nginx: Server) -> None:
    response, body = await get(transport, f"http://{nginx.authority}/none")
    assert response.status == 404
    assert b"404" in body


async def test_a_redirect_is_not_followed(transport: CurlTransport) -> None:
    reply = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    async with origin(answering(reply)) as url:
        response, _ = await get(transport, url)
    assert response.status == 302
    assert dict(response.headers)["location"] == "http://127.0.0.1:1/"


@pytest.mark.parametrize("size", [1, 4096, 1_000_003])
async def test_any_buffer_size_gives_the_same_bytes(transport: CurlTransport, nginx: Server, size: int) -> None:
    name, whole = ("small.flac", SMALL) if size == 1 else ("big", BIG)
    whole = whole[:5000] if size == 1 else whole
    headers = (("Range", f"bytes=0-{len(whole) - 1}"),)
    response = await transport.request(Request(f"http://{nginx.authority}/{name}", headers=headers))
    assert await body_of(response, size) == whole
    await response.aclose()


async def test_a_reader_that_changes_its_pace_and_buffers_gets_every_byte(
    transport: CurlTransport, nginx: Server
) -> None:
    chance = random.Random(3)
    response = await transport.request(Request(f"http://{nginx.authority}/big"))
    received = bytearray()
    memory = bytearray(3 * MIB)
    while count := await response.receive_into(memoryview(memory)[: chance.choice((1, 7, 16384, 100_000, 3 * MIB))]):
        received += memory[:count]
        if chance.random() < 0.02:
            await trio.sleep(0.01)  # the point of this test: the backlog fills and the transfer pauses
    assert received == BIG
    await response.aclose()


# -- connections


async def test_finished_exchanges_leave_their_connection_for_the_next(transport: CurlTransport, root: Path) -> None:
    log_format = "log_format c '$connection $connection_requests'; access_log /dev/stdout c;"
    with servers.nginx(root, options=log_format) as server:
        for _ in range(5):
            await get(transport, f"http://{server.authority}/small.flac")
        assert len({line.split()[0] for line in await connection_lines(server, 5)}) == 1


async def test_a_connection_given_back_without_reuse_is_not_used_again(transport: CurlTransport, root: Path) -> None:
    log_format = "log_format c '$connection $connection_requests'; access_log /dev/stdout c;"
    with servers.nginx(root, options=log_format) as server:
        for _ in range(3):
            response = await transport.request(Request(f"http://{server.authority}/small.flac"))
            await body_of(response)
            await response.aclose(reuse=False)
        assert len({line.split()[0] for line in await connection_lines(server, 3)}) == 3


async def connection_lines(server: Server, count: int) -> list[str]:
    """The `count` lines that nginx logs, each of them a little after its reply."""
    with trio.fail_after(20):
        while True:
            text = await trio.Path(server.home / "output.log").read_text()
            lines = [line for line in text.splitlines() if line]
            if len(lines) >= count and text.endswith("\n"):
                assert len(lines) == count
                return lines
            await trio.sleep(0.01)


async def test_no_more_than_the_allowed_connections_to_one_host(root: Path) -> None:
    busy = 0
    most = 0
    release = trio.Event()

    async def hold(stream: trio.SocketStream, head: bytes) -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        if busy == 2:
            release.set()
        await release.wait()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        busy -= 1

    async with CurlTransport(host_connections=2) as transport, origin(hold) as url, trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(get, transport, url)
    assert most == 2


async def test_the_pinned_address_is_dialled_and_the_name_is_kept(
    transport: CurlTransport, nginx_tls: Server, certificates: Certificates
) -> None:
    identity = Identity(cacert=str(certificates.authority))
    url = f"https://pinned.test:{nginx_tls.port}/small.flac"
    response, body = await get(transport, url, address="127.0.0.1", identity=identity)
    assert (response.status, body) == (200, SMALL)


async def test_requests_pinned_to_different_addresses_share_no_connection(transport: CurlTransport) -> None:
    peers = []

    async def handle(stream: trio.SocketStream, head: bytes) -> None:
        peers.append(stream.socket.getsockname()[0])
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await stream.receive_some()  # keep the connection open until the other side ends it

    async with trio.open_nursery() as nursery:
        opened = await trio.open_tcp_listeners(0, host="0.0.0.0")
        port = opened[0].socket.getsockname()[1]

        async def serve(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            await handle(stream, b"")

        nursery.start_soon(trio.serve_listeners, serve, opened)
        for address in ("127.0.0.1", "127.0.0.2"):
            await get(transport, f"http://same.test:{port}/", address=address)
        nursery.cancel_scope.cancel()
    assert peers == ["127.0.0.1", "127.0.0.2"]


# -- tls, http/2


async def test_http2_bodies_are_byte_exact_and_share_one_connection(
    transport: CurlTransport, nginx_tls: Server, certificates: Certificates
) -> None:
    identity = Identity(cacert=str(certificates.authority), http2=True)
    bodies = []

    async def fetch() -> None:
        response, body = await get(transport, f"https://{nginx_tls.authority}/big", identity=identity)
        bodies.append((response.http_version, response.ending, body == BIG))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(fetch)
    assert bodies == [("2", "length", True)] * 4


async def test_a_paused_http2_stream_does_not_hold_up_its_neighbour(
    transport: CurlTransport, nginx_tls: Server, certificates: Certificates
) -> None:
    identity = Identity(cacert=str(certificates.authority), http2=True)
    request = Request(f"https://{nginx_tls.authority}/big", identity=identity)
    behind = await transport.request(request)
    with trio.fail_after(20):
        for _ in range(3):
            _, body = await get(transport, request.url, identity=identity)
            assert body == BIG
    assert await body_of(behind) == BIG
    await behind.aclose()


async def test_an_unknown_authority_is_a_tls_error(transport: CurlTransport, nginx_tls: Server) -> None:
    with pytest.raises(TransportError) as caught:
        await get(transport, f"https://{nginx_tls.authority}/small.flac")
    assert caught.value.kind == "tls"


async def test_a_wrong_name_is_a_tls_error_and_insecure_accepts_it(
    transport: CurlTransport, nginx_tls: Server, certificates: Certificates
) -> None:
    url = f"https://other.test:{nginx_tls.port}/small.flac"
    with pytest.raises(TransportError) as caught:
        await get(transport, url, address="127.0.0.1", identity=Identity(cacert=str(certificates.authority)))
    assert caught.value.kind == "tls"
    _, body = await get(transport, url, address="127.0.0.1", identity=Identity(insecure=True))
    assert body == SMALL
    with pytest.raises(TransportError) as caught:  # the unchecked connection is lent to nobody
        await get(transport, url, address="127.0.0.1", identity=Identity(cacert=str(certificates.authority)))
    assert caught.value.kind == "tls"


async def test_ssl_cert_file_names_the_trusted_authorities(
    transport: CurlTransport, nginx_tls: Server, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    _, body = await get(transport, f"https://{nginx_tls.authority}/small.flac")
    assert body == SMALL


async def test_a_client_certificate_is_shown_where_it_is_asked_for(
    transport: CurlTransport, root: Path, certificates: Certificates
) -> None:
    trusted = str(certificates.authority)
    with servers.nginx(root, tls=certificates, client_certificates=True) as server:
        url = f"https://{server.authority}/small.flac"
        refused, _ = await get(transport, url, identity=Identity(cacert=trusted))
        identity = Identity(cacert=trusted, cert=str(certificates.client))
        accepted, body = await get(transport, url, identity=identity)
    assert (refused.status, accepted.status, body) == (400, 200, SMALL)


async def test_tls_to_a_server_that_speaks_none_is_a_tls_error(transport: CurlTransport, nginx: Server) -> None:
    with pytest.raises(TransportError) as caught:
        await get(transport, f"https://{nginx.authority}/")
    assert caught.value.kind == "tls"


async def test_a_connection_lost_in_the_handshake_is_worth_another_try(transport: CurlTransport) -> None:
    async with trio.open_nursery() as nursery:
        opened = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def serve(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            await stream.aclose()

        nursery.start_soon(trio.serve_listeners, serve, opened)
        with pytest.raises(TransportError) as caught:
            await get(transport, f"https://127.0.0.1:{opened[0].socket.getsockname()[1]}/")
        nursery.cancel_scope.cancel()
    assert caught.value.kind == "reset"


async def test_an_http2_stream_that_is_reset_is_truncated(
    transport: CurlTransport, root: Path, certificates: Certificates
) -> None:
    short = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 1000)
    async with origin(short) as url:
        locations = f"location /short {{ proxy_pass {url}; proxy_buffering off; }}"
        with servers.nginx(root, tls=certificates, http2=True, locations=locations) as server:
            identity = Identity(cacert=str(certificates.authority), http2=True)
            response = await transport.request(Request(f"https://{server.authority}/short", identity=identity))
            assert response.http_version == "2"
            with pytest.raises(TransportError) as caught:
                await body_of(response)
            await response.aclose()
    assert caught.value.kind == "truncated"


async def test_http2_without_a_length_has_a_proven_end(
    transport: CurlTransport, root: Path, certificates: Certificates
) -> None:
    chunked = answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
    async with origin(chunked) as url:
        locations = f"location /chunked {{ proxy_pass {url}; proxy_http_version 1.1; }}"
        with servers.nginx(root, tls=certificates, http2=True, locations=locations) as server:
            identity = Identity(cacert=str(certificates.authority), http2=True)
            response, body = await get(transport, f"https://{server.authority}/chunked", identity=identity)
    assert (response.http_version, response.ending, body) == ("2", "chunked", b"hello")


# -- proxies


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_an_http_proxy_carries_plain_and_tunnelled_requests(
    transport: CurlTransport, nginx: Server, nginx_tls: Server, certificates: Certificates, scheme: str
) -> None:
    server = nginx if scheme == "http" else nginx_tls
    with servers.http_proxy() as proxy:
        identity = Identity(proxy=f"http://{proxy.authority}", cacert=str(certificates.authority))
        response, body = await get(transport, f"{scheme}://{server.authority}/small.flac", identity=identity)
        log = proxy.log()
    assert (response.status, body) == (200, SMALL)
    assert all("established" not in value for _, value in response.headers)
    assert str(server.port) in log


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
async def test_a_socks_proxy_carries_requests(transport: CurlTransport, nginx: Server, scheme: str) -> None:
    with servers.socks_proxy() as proxy:
        identity = Identity(proxy=f"{scheme}://{proxy.authority}")
        response, body = await get(transport, f"http://{nginx.authority}/small.flac", identity=identity)
        log = proxy.log()
    assert (response.status, body) == (200, SMALL)
    assert str(nginx.port) in log


async def test_a_dead_proxy_is_a_connect_error(transport: CurlTransport, nginx: Server) -> None:
    for scheme in ("http", "socks5h"):
        with pytest.raises(TransportError) as caught:
            identity = Identity(proxy=f"{scheme}://127.0.0.1:{servers.free_port()}")
            await get(transport, f"http://{nginx.authority}/", identity=identity)
        assert caught.value.kind == "connect"


async def test_proxies_of_the_environment_are_not_used(
    transport: CurlTransport, nginx: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{servers.free_port()}")
    _, body = await get(transport, f"http://{nginx.authority}/small.flac")
    assert body == SMALL


async def test_no_proxy_of_the_environment_does_not_bypass_ours(
    transport: CurlTransport, nginx: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(TransportError):
        identity = Identity(proxy=f"http://127.0.0.1:{servers.free_port()}")
        await get(transport, f"http://{nginx.authority}/", identity=identity)


# -- what is sent


async def test_the_request_has_our_headers_and_asks_for_no_compression(transport: CurlTransport) -> None:
    heads = []

    async def handle(stream: trio.SocketStream, head: bytes) -> None:
        heads.append(head.decode().split("\r\n"))
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with origin(handle) as url:
        headers = (("Range", "bytes=0-"), ("X-Empty", ""), ("User-Agent", "streamfs"), ("Cookie", "a=b"))
        await get(transport, f"{url}/a%20b?q=1#part", headers=headers)
    assert heads[0][0] == "GET /a%20b?q=1 HTTP/1.1"
    for line in ("Range: bytes=0-", "X-Empty:", "User-Agent: streamfs", "Cookie: a=b", "Accept-Encoding: identity"):
        assert line in heads[0]


async def test_a_compressed_body_is_handed_over_as_it_is(transport: CurlTransport) -> None:
    body = b"\x1f\x8b not really gzip"
    reply = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    async with origin(answering(reply)) as url:
        _, received = await get(transport, url)
    assert received == body


@pytest.mark.parametrize(
    ("url", "headers"),
    [
        ("gopher://127.0.0.1/", ()),
        ("file:///etc/passwd", ()),
        ("http://127.0.0.1/a b", ()),
        ("http://127.0.0.1:99999/", ()),
        ("http://127.0.0.1/", (("X", "a\r\nY: b"),)),
        ("http://127.0.0.1/", (("X: Y", "a"),)),
    ],
)
async def test_what_must_not_be_sent_is_refused(
    transport: CurlTransport, url: str, headers: tuple[tuple[str, str], ...]
) -> None:
    with pytest.raises(TransportError) as caught:
        await get(transport, url, headers=headers)
    assert caught.value.kind == "refused"
    assert transport.active_transfers == 0


# -- heads and ends of all kinds


async def test_a_radio_server_that_says_icy_is_understood(transport: CurlTransport) -> None:
    reply = b"ICY 200 OK\r\nicy-name: Radio\r\nicy-metaint:16000\r\n\r\nmusic"
    async with origin(answering(reply)) as url:
        response, body = await get(transport, url)
    assert (response.status, response.http_version, response.ending) == (200, "icy", "close")
    assert response.headers == [("icy-name", "Radio"), ("icy-metaint", "16000")]
    assert body == b"music"


async def test_interim_replies_and_trailers_leave_no_trace(transport: CurlTransport) -> None:
    reply = (
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 Fine\r\nTransfer-Encoding: chunked\r\nA: 1\r\n\r\n"
        b"3\r\nabc\r\n0\r\nTrailer-Field: 1\r\n\r\n"
    )
    async with origin(answering(reply)) as url:
        response, body = await get(transport, url)
    assert (response.status, response.reason, response.ending) == (200, "Fine", "chunked")
    assert response.headers == [("transfer-encoding", "chunked"), ("a", "1")]
    assert body == b"abc"


async def test_a_body_without_length_ends_with_the_connection(transport: CurlTransport) -> None:
    async with origin(answering(b"HTTP/1.0 200 OK\r\n\r\nall of it")) as url:
        response, body = await get(transport, url)
    assert (response.http_version, response.ending, body) == ("1.0", "close", b"all of it")


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n",
    ],
)
async def test_a_body_that_ends_early_gives_its_bytes_and_then_truncated(
    transport: CurlTransport, reply: bytes
) -> None:
    async with origin(answering(reply)) as url:
        response = await transport.request(Request(url))
        view = memoryview(bytearray(100))
        count = await response.receive_into(view)
        assert view[:count] == b"short"
        for _ in range(2):  # every time, never an end
            with pytest.raises(TransportError) as caught:
                await response.receive_into(view)
            assert caught.value.kind == "truncated"
        await response.aclose()


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (b"", "reset"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "reset"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 60_000 + b"\r\n", "protocol"),
    ],
)
async def test_a_head_that_is_none_is_an_error_of_its_kind(transport: CurlTransport, reply: bytes, kind: str) -> None:
    async def handle(stream: trio.SocketStream, head: bytes) -> None:
        try:
            await stream.send_all(reply)
        except trio.BrokenResourceError:
            return  # the client has read enough of it

    async with origin(handle) as url:
        with pytest.raises(TransportError) as caught:
            await get(transport, url)
    assert caught.value.kind == kind


async def test_nobody_there_is_a_connect_error(transport: CurlTransport) -> None:
    with pytest.raises(TransportError) as caught:
        await get(transport, f"http://127.0.0.1:{servers.free_port()}/")
    assert caught.value.kind == "connect"


async def test_an_unknown_name_is_a_connect_error(transport: CurlTransport) -> None:
    with pytest.raises(TransportError) as caught:
        await get(transport, "http://does-not-exist.invalid/")
    assert caught.value.kind == "connect"


async def test_errors_hold_no_secrets(transport: CurlTransport) -> None:
    with pytest.raises(TransportError) as caught:
        await get(transport, f"http://me:geheim@127.0.0.1:{servers.free_port()}/?token=zauber")
    assert "geheim" not in str(caught.value)
    assert "zauber" not in str(caught.value)


# -- pauses, cancellation, closing


async def test_a_paused_transfer_costs_no_cpu_and_resumes_byte_exact(transport: CurlTransport, nginx: Server) -> None:
    response = await transport.request(Request(f"http://{nginx.authority}/big"))
    await trio.sleep(0.3)  # the backlog fills, the transfer pauses

    async def spent() -> float:
        before = time.process_time()
        await trio.sleep(0.5)
        return time.process_time() - before

    # What turns round and round does so in each of them; what else this process does is over in one.
    assert min([await spent() for _ in range(3)]) < 0.05
    transfer = response._transfer
    assert transfer is not None
    assert BACKLOG_LIMIT - 16384 < transfer.received <= BACKLOG_LIMIT
    assert await body_of(response) == BIG
    await response.aclose()


async def test_a_slow_reader_does_not_slow_another(transport: CurlTransport, nginx: Server) -> None:
    slow = [await transport.request(Request(f"http://{nginx.authority}/big")) for _ in range(3)]
    with trio.fail_after(10):
        for _ in range(5):
            _, body = await get(transport, f"http://{nginx.authority}/big")
            assert body == BIG
    for response in slow:
        assert await body_of(response) == BIG
        await response.aclose()


async def test_bytes_are_given_as_they_arrive(transport: CurlTransport) -> None:
    go_on = trio.Event()

    async def handle(stream: trio.SocketStream, head: bytes) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\none")
        await go_on.wait()
        await stream.send_all(b"two")

    async with origin(handle) as url:
        response = await transport.request(Request(url))
        view = memoryview(bytearray(100))
        assert view[: await response.receive_into(view)] == b"one"
        go_on.set()
        assert view[: await response.receive_into(view)] == b"two"
        assert await response.receive_into(view) == 0
        await response.aclose()


async def test_a_cancelled_request_is_gone_from_libcurl_and_its_connection_closed(transport: CurlTransport) -> None:
    asked, closed = trio.Event(), trio.Event()

    async def silent(stream: trio.SocketStream, head: bytes) -> None:
        asked.set()
        assert await stream.receive_some() == b""
        closed.set()

    async with origin(silent) as url:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(get, transport, url)
            await asked.wait()
            assert transport.active_transfers == 1
            nursery.cancel_scope.cancel()
        assert transport.active_transfers == 0
        with trio.fail_after(5):
            await closed.wait()


async def test_a_cancelled_receive_loses_no_byte(transport: CurlTransport) -> None:
    go_on = trio.Event()

    async def handle(stream: trio.SocketStream, head: bytes) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n")
        await go_on.wait()
        await stream.send_all(b"sixsix")

    async with origin(handle) as url:
        response = await transport.request(Request(url))
        with trio.move_on_after(0.05) as scope:
            await response.receive_into(memoryview(bytearray(100)))
        assert scope.cancelled_caught
        go_on.set()
        assert await body_of(response) == b"sixsix"
        await response.aclose()


async def test_bytes_that_come_after_a_cancellation_and_before_its_task_goes_on_are_kept(
    transport: CurlTransport,
) -> None:
    """Both happen in one turn of trio, where the driver comes before the task."""

    async def handle(stream: trio.SocketStream, head: bytes) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n")
        await trio.sleep_forever()

    async with origin(handle) as url:
        response = await transport.request(Request(url))
        assert response._transfer is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(response.receive_into, memoryview(bytearray(100)))
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
            assert response._transfer._on_data(memoryview(b"six")) == 3
        view = memoryview(bytearray(100))
        assert bytes(view[: await response.receive_into(view)]) == b"six"
        await response.aclose()


async def test_many_cancelled_transfers_leave_nothing_behind(transport: CurlTransport, nginx: Server) -> None:
    chance = random.Random(4)

    async def one() -> None:
        with trio.move_on_after(chance.uniform(0, 0.05)):
            response = await transport.request(Request(f"http://{nginx.authority}/big"))
            try:
                await body_of(response)
            finally:
                await response.aclose()

    async with trio.open_nursery() as nursery:
        for _ in range(60):
            nursery.start_soon(one)
    assert transport.active_transfers == 0
    _, body = await get(transport, f"http://{nginx.authority}/big")
    assert body == BIG


async def test_closing_the_transport_ends_readers_and_refuses_requests(nginx: Server) -> None:
    kinds = []
    transport = CurlTransport()

    async def read_slowly() -> None:
        response = await transport.request(Request(f"http://{nginx.authority}/limited/big"))
        waiting.set()
        with pytest.raises(TransportError) as caught:
            await body_of(response)
        kinds.append(caught.value.kind)
        await response.aclose()

    waiting = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_slowly)
        await waiting.wait()
        await transport.aclose()
    await transport.aclose()
    assert kinds == ["truncated"]
    with pytest.raises(TransportError) as caught:
        await get(transport, f"http://{nginx.authority}/small.flac")
    assert caught.value.kind == "reset"


def test_a_transport_left_open_ends_with_its_trio_run_and_leaves_no_descriptors(nginx: Server) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    async def leave_open() -> None:
        transport = CurlTransport()
        response = await transport.request(Request(f"http://{nginx.authority}/big"))
        assert await response.receive_into(memoryview(bytearray(1))) == 1

    trio.run(leave_open)
    before = descriptors()
    for _ in range(3):
        trio.run(leave_open)
    assert descriptors() == before


def test_a_cancelled_close_still_closes(nginx: Server) -> None:
    async def main() -> None:
        transport = CurlTransport()
        await get(transport, f"http://{nginx.authority}/small.flac")
        with trio.CancelScope() as scope:
            scope.cancel()
            await transport.aclose()
        assert transport.active_transfers == 0
        with pytest.raises(TransportError):
            await get(transport, f"http://{nginx.authority}/small.flac")

    trio.run(main)


async def test_two_readers_of_one_response_are_refused(transport: CurlTransport) -> None:
    async def silent(stream: trio.SocketStream, head: bytes) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n")
        await trio.sleep_forever()

    async with origin(silent) as url, trio.open_nursery() as nursery:
        response = await transport.request(Request(url))
        nursery.start_soon(response.receive_into, memoryview(bytearray(1)))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await response.receive_into(memoryview(bytearray(1)))
        nursery.cancel_scope.cancel()
    await response.aclose()


@pytest.mark.parametrize(
    ("number", "usable"), [(0x081400, False), (0x081401, False), (0x081500, True), (0x081302, True)]
)
def test_libcurl_8_20_is_refused(number: int, usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (unusable_reason(number) is None) is usable
    monkeypatch.setattr("streamfs.sources.curl.transport.unusable_reason", lambda: unusable_reason(number))
    if usable:
        CurlTransport()
    else:
        with pytest.raises(TransportError) as caught:
            CurlTransport()
        assert caught.value.kind == "refused"
