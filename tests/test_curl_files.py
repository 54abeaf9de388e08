"""Files of ftp, ftps and sftp servers, by libcurl and by the ftp transport: replies dressed as HTTP, from vsftpd and
OpenSSH."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import BinaryIO

import pytest
import trio

from streamfs.sources.curl import CurlTransport
from streamfs.sources.ftp import FtpTransport
from streamfs.sources.transport import Identity, Request, Response, Transport, TransportError
from tests import servers
from tests.servers import Certificates, Server

MIB = 1 << 20
SMALL = random.Random(1).randbytes(300_001)
BIG = random.Random(2).randbytes(12 * MIB + 17)
MODIFIED = 1_700_000_001


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    for name, content in (("small", SMALL), ("big", BIG), ("empty", b""), ("a b#?%.bin", SMALL)):
        (folder / name).write_bytes(content)
        os.utime(folder / name, (MODIFIED, MODIFIED))
    return folder


@pytest.fixture(scope="module")
def ftp(root: Path) -> Iterator[Server]:
    with servers.vsftpd(root) as server:
        yield server


@pytest.fixture(scope="module")
def ftps(root: Path, certificates: Certificates) -> Iterator[Server]:
    with servers.vsftpd(root, tls=certificates) as server:
        yield server


@pytest.fixture(scope="module")
def sftp(root: Path) -> Iterator[Server]:
    with servers.sshd(root) as server:
        yield server


@dataclass(frozen=True)
class Site:
    """One of the servers: `base` + "/name" is a file's URL, `other` the same by a name that only a pin resolves."""

    base: str
    other: str
    identity: Identity
    server: Server


@pytest.fixture(params=["ftp", "ftp-own", "ftps", "sftp"])
def site(request: pytest.FixtureRequest, certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> Site:
    scheme = request.param.removesuffix("-own")
    server: Server = request.getfixturevalue(scheme)
    folder, identity = "", Identity()
    if request.param == "ftps":
        identity = Identity(cacert=str(certificates.authority))
    elif request.param == "sftp":
        folder, identity = str(server.root), Identity(key=str(server.files["key"]))
        monkeypatch.setenv("STREAMFS_KNOWN_HOSTS", str(server.files["known_hosts"]))
    base = f"{scheme}://{server.authority}{folder}"
    return Site(base, f"{scheme}://pinned.test:{server.port}{folder}", identity, server)


@pytest.fixture
async def transport(request: pytest.FixtureRequest) -> AsyncIterator[Transport]:
    """libcurl's, but where the site says otherwise."""
    own = hasattr(request.node, "callspec") and request.node.callspec.params.get("site") == "ftp-own"
    made: Transport = FtpTransport() if own else CurlTransport()
    yield made
    await made.aclose()


@pytest.fixture(params=[CurlTransport, FtpTransport])
async def either(request: pytest.FixtureRequest) -> AsyncIterator[Transport]:
    """Each transport that speaks ftp."""
    made: Transport = request.param()
    yield made
    await made.aclose()


async def get(
    transport: Transport, site: Site, name: str, *headers: tuple[str, str], method: str = "GET"
) -> tuple[Response, bytes]:
    request = Request(f"{site.base}/{name}", headers=headers, identity=site.identity, method=method)  # type: ignore[arg-type]
    return await take(transport, request)


async def take(transport: Transport, request: Request) -> tuple[Response, bytes]:
    response = await transport.request(request)
    try:
        return response, await body_of(response)
    finally:
        await response.aclose()


async def body_of(response: Response) -> bytes:
    memory = memoryview(bytearray(100_000))
    received = bytearray()
    while count := await response.receive_into(memory):
        received += memory[:count]
    return bytes(received)


async def test_a_whole_file_with_size_and_date(transport: Transport, site: Site) -> None:
    response, body = await get(transport, site, "small")
    headers = dict(response.headers)
    assert (response.status, response.ending) == (200, "length")
    assert headers["content-length"] == str(len(SMALL))
    assert headers["last-modified"] == formatdate(MODIFIED, usegmt=True)
    assert headers["accept-ranges"] == "bytes"
    assert body == SMALL


@pytest.mark.parametrize(
    ("asked", "first", "end"),
    [
        ("bytes=0-", 0, len(SMALL)),
        ("bytes=1000-", 1000, len(SMALL)),
        ("bytes=1000-1999", 1000, 2000),
        ("bytes=0-0", 0, 1),
        ("bytes=299000-999999999", 299_000, len(SMALL)),
        ("bytes=-5", len(SMALL) - 5, len(SMALL)),
        (f"bytes={len(SMALL) - 1}-", len(SMALL) - 1, len(SMALL)),
        (f"bytes=7-{len(SMALL) - 1}", 7, len(SMALL)),
    ],
)
async def test_a_range_gives_206_and_just_those_bytes(
    transport: Transport, site: Site, asked: str, first: int, end: int
) -> None:
    response, body = await get(transport, site, "small", ("Range", asked))
    headers = dict(response.headers)
    assert response.status == 206
    assert headers["content-range"] == f"bytes {first}-{end - 1}/{len(SMALL)}"
    assert headers["content-length"] == str(end - first)
    assert body == SMALL[first:end]


async def test_many_ranges_in_a_row_rebuild_the_file(transport: Transport, site: Site) -> None:
    step = 1_500_000
    rebuilt = b""
    for first in range(0, len(BIG), step):
        _, body = await get(transport, site, "big", ("Range", f"bytes={first}-{first + step - 1}"))
        rebuilt += body
    assert rebuilt == BIG


@pytest.mark.parametrize("offset", [0, 1, 1000])
async def test_a_range_past_the_end_gives_416_with_the_size(transport: Transport, site: Site, offset: int) -> None:
    response, body = await get(transport, site, "small", ("Range", f"bytes={len(SMALL) + offset}-"))
    assert (response.status, body) == (416, b"")
    assert dict(response.headers)["content-range"] == f"bytes */{len(SMALL)}"


@pytest.mark.parametrize(
    ("condition", "status"),
    [(formatdate(MODIFIED, usegmt=True), 206), (formatdate(MODIFIED - 1, usegmt=True), 200), ('"tag"', 200)],
)
async def test_if_range_gives_the_part_of_the_known_version_only(
    transport: Transport, site: Site, condition: str, status: int
) -> None:
    response, body = await get(transport, site, "small", ("Range", "bytes=5-9"), ("If-Range", condition))
    assert response.status == status
    assert body == (SMALL[5:10] if status == 206 else SMALL)


async def test_an_empty_file_has_length_0(transport: Transport, site: Site) -> None:
    response, body = await get(transport, site, "empty")
    assert (response.status, body) == (200, b"")
    assert dict(response.headers)["content-length"] == "0"


async def test_head_gives_the_facts_alone(transport: Transport, site: Site) -> None:
    response, body = await get(transport, site, "small", method="HEAD")
    assert (response.status, body) == (200, b"")
    assert dict(response.headers)["content-length"] == str(len(SMALL))


async def test_escapes_in_the_path_are_undone(transport: Transport, site: Site) -> None:
    _, body = await get(transport, site, "a%20b%23%3F%25.bin")
    assert body == SMALL


@pytest.mark.parametrize("name", ["none", "nofolder/none"])
async def test_a_missing_file_is_404(transport: Transport, site: Site, name: str) -> None:
    response, body = await get(transport, site, name)
    assert (response.status, body) == (404, b"")


async def test_a_folder_is_refused(transport: Transport, site: Site) -> None:
    with pytest.raises(TransportError) as caught:
        await get(transport, site, "")
    assert caught.value.kind == "refused"


async def test_the_pinned_address_is_dialled_for_control_and_data(transport: Transport, site: Site) -> None:
    request = Request(f"{site.other}/small", address="127.0.0.1", identity=site.identity)
    _, body = await take(transport, request)
    assert body == SMALL


async def test_a_slow_reader_gets_every_byte_and_does_not_slow_another(transport: Transport, site: Site) -> None:
    behind = await transport.request(Request(f"{site.base}/big", identity=site.identity))
    with trio.fail_after(20):
        _, body = await get(transport, site, "big")
    assert body == BIG
    assert await body_of(behind) == BIG
    await behind.aclose()


async def test_a_cancelled_transfer_is_gone_and_the_next_one_works(transport: Transport, site: Site) -> None:
    for _ in range(3):
        response = await transport.request(Request(f"{site.base}/big", identity=site.identity))
        assert await response.receive_into(memoryview(bytearray(10))) > 0
        if isinstance(transport, CurlTransport):
            assert transport.active_transfers == 1
        await response.aclose()
        if isinstance(transport, CurlTransport):
            assert transport.active_transfers == 0
    _, body = await get(transport, site, "small")
    assert body == SMALL


async def test_whole_files_reuse_the_logged_in_connection(transport: Transport, site: Site) -> None:
    before = logins(site.server)
    for _ in range(3):
        await get(transport, site, "small")
    assert logins(site.server) - before == 1


async def test_a_reader_who_stops_at_the_known_length_leaves_the_connection_too(
    transport: Transport, site: Site
) -> None:
    before = logins(site.server)
    for _ in range(3):
        response = await transport.request(Request(f"{site.base}/small", identity=site.identity))
        received = 0
        while received < len(SMALL):
            received += await response.receive_into(memoryview(bytearray(len(SMALL))))
        await response.aclose()
    assert logins(site.server) - before == 1


def logins(server: Server) -> int:
    log = server.log()
    return log.count("OK LOGIN") + log.count("Accepted publickey")


@pytest.mark.parametrize("site", ["ftp", "ftps", "sftp"], indirect=True)
@pytest.mark.parametrize("kind", ["http", "socks"])
async def test_a_proxy_carries_file_transfers(transport: Transport, site: Site, kind: str) -> None:
    start = servers.http_proxy if kind == "http" else servers.socks_proxy
    with start() as proxy:
        scheme = "http" if kind == "http" else "socks5h"
        plain = site.identity
        identity = Identity(proxy=f"{scheme}://{proxy.authority}", cacert=plain.cacert, key=plain.key)
        _, body = await take(transport, Request(f"{site.base}/small", identity=identity))
        assert str(site.server.port) in proxy.log()
    assert body == SMALL


# -- logins and host keys


async def test_a_refused_ftp_login_is_401(either: Transport, ftp: Server) -> None:
    response, _ = await take(either, Request(f"ftp://somebody:wrong@{ftp.authority}/small"))
    assert response.status == 401
    assert "wrong" not in response.reason


async def test_a_refused_ssh_key_is_401(transport: Transport, sftp: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMFS_KNOWN_HOSTS", str(sftp.files["known_hosts"]))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    identity = Identity(key=str(sftp.files["stranger"]))
    response, _ = await take(transport, Request(f"sftp://{sftp.authority}{sftp.root}/small", identity=identity))
    assert response.status == 401


async def test_a_default_ssh_key_is_found(
    transport: Transport, sftp: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("STREAMFS_KNOWN_HOSTS", raising=False)
    folder = tmp_path / ".ssh"
    folder.mkdir()
    shutil.copy(sftp.files["key"], folder / "id_ed25519")
    shutil.copy(sftp.files["known_hosts"], folder / "known_hosts")
    _, body = await take(transport, Request(f"sftp://{sftp.authority}{sftp.root}/small"))
    assert body == SMALL


@pytest.mark.parametrize("file", ["empty", "missing"])
async def test_an_unknown_host_key_is_refused(
    transport: Transport, sftp: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str
) -> None:
    known = tmp_path / "known_hosts"
    if file == "empty":
        known.touch()
    monkeypatch.setenv("STREAMFS_KNOWN_HOSTS", str(known))
    before = logins(sftp)
    with pytest.raises(TransportError) as caught:
        await take(transport, sftp_request(sftp))
    assert caught.value.kind == "tls"
    assert "not in" in str(caught.value)
    assert str(known) in str(caught.value)
    assert logins(sftp) == before
    assert (known.read_text() if known.exists() else "") == ""


def sftp_request(server: Server, *, insecure: bool = False) -> Request:
    identity = Identity(key=str(server.files["key"]), insecure=insecure)
    return Request(f"sftp://{server.authority}{server.root}/small", identity=identity)


async def test_a_changed_host_key_is_refused(
    transport: Transport, sftp: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = (sftp.home / "stranger.pub").read_text().split()
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{sftp.port} {other[0]} {other[1]}\n")
    monkeypatch.setenv("STREAMFS_KNOWN_HOSTS", str(known))
    before = logins(sftp)
    with pytest.raises(TransportError) as caught:
        await take(transport, sftp_request(sftp))
    assert caught.value.kind == "tls"
    assert "another than the one" in str(caught.value)
    assert logins(sftp) == before


async def test_a_hashed_known_hosts_file_is_understood(
    transport: Transport, sftp: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = tmp_path / "known_hosts"
    shutil.copy(sftp.files["known_hosts"], known)
    argv = [servers.program("ssh-keygen"), "-q", "-H", "-f", str(known)]
    await trio.run_process(argv, capture_stdout=True, capture_stderr=True)
    assert "127.0.0.1" not in known.read_text()
    monkeypatch.setenv("STREAMFS_KNOWN_HOSTS", str(known))
    _, body = await take(transport, sftp_request(sftp))
    assert body == SMALL


async def test_insecure_skips_the_host_key_and_lends_its_connection_to_nobody(
    transport: Transport, sftp: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STREAMFS_KNOWN_HOSTS", str(tmp_path / "none"))
    _, body = await take(transport, sftp_request(sftp, insecure=True))
    assert body == SMALL
    with pytest.raises(TransportError) as caught:
        await take(transport, sftp_request(sftp))
    assert caught.value.kind == "tls"


async def test_an_ftps_server_of_an_unknown_authority_is_a_tls_error(transport: Transport, ftps: Server) -> None:
    with pytest.raises(TransportError) as caught:
        await take(transport, Request(f"ftps://{ftps.authority}/small"))
    assert caught.value.kind == "tls"


@pytest.mark.parametrize("scheme", ["ftp", "ftps", "sftp"])
async def test_nobody_there_is_a_connect_error(transport: Transport, scheme: str) -> None:
    with pytest.raises(TransportError) as caught:
        await take(transport, Request(f"{scheme}://127.0.0.1:{servers.free_port()}/small"))
    assert caught.value.kind == "connect"


# -- servers that break off or lie


@dataclass(frozen=True)
class ScriptedFtp:
    """An FTP server with one file. It says `size` (None: knows no SIZE), sends `sent` from the REST offset on, and
    then says `final`; None: closes the control connection, "": says nothing more and keeps it open."""

    size: int | None
    sent: bytes
    final: bytes | None = b"226 done"
    date: bytes = b"213 20230101000000"

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serve in threads, because libcurl may block this one; gives the file's URL."""
        opened: list[socket.socket] = []
        threads: list[threading.Thread] = []

        def accept() -> None:
            while True:
                try:
                    connection = listener.accept()[0]
                except OSError:
                    return  # closed below
                opened.append(connection)
                threads.append(threading.Thread(target=self._control, args=(connection,)))
                threads[-1].start()

        listener = socket.create_server(("127.0.0.1", 0))
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield f"ftp://127.0.0.1:{listener.getsockname()[1]}/file"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            acceptor.join()
            for connection in opened:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()

    def _control(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines, contextlib.suppress(ConnectionError):
            self._talk(connection, lines)

    def _talk(self, connection: socket.socket, lines: BinaryIO) -> None:
        offset = 0
        passive: socket.socket | None = None
        connection.sendall(b"220 ready\r\n")
        for line in lines:
            word, _, argument = line.strip().partition(b" ")
            reply = b"500 what?"
            match word.upper():
                case b"USER":
                    reply = b"230 welcome"
                case b"PWD":
                    reply = b'257 "/"'
                case b"TYPE" | b"CWD":
                    reply = b"200 fine"
                case b"MDTM":
                    reply = self.date
                case b"SIZE" if self.size is not None:
                    reply = b"213 %d" % self.size
                case b"EPSV":
                    passive = socket.create_server(("127.0.0.1", 0))
                    reply = b"229 go (|||%d|)" % passive.getsockname()[1]
                case b"REST":
                    offset = int(argument)
                    reply = b"350 from there"
                case b"RETR" if passive is not None:
                    connection.sendall(b"150 here it comes\r\n")
                    with passive, passive.accept()[0] as data:
                        data.sendall(self.sent[offset:])
                    if self.final is None:
                        return
                    if not self.final:
                        continue
                    reply = self.final
            connection.sendall(reply + b"\r\n")


async def test_an_ftp_body_shorter_than_its_size_is_truncated(either: Transport) -> None:
    with ScriptedFtp(size=1000, sent=b"x" * 400, final=b"226 done").serving() as url:
        response = await either.request(Request(url))
        view = memoryview(bytearray(1000))
        assert await response.receive_into(view) == 400
        for _ in range(2):
            with pytest.raises(TransportError) as caught:
                await response.receive_into(view)
            assert caught.value.kind == "truncated"
        await response.aclose()


async def test_a_silent_ftp_server_at_the_end_holds_up_nobody_and_no_byte(either: Transport) -> None:
    gaps = []

    async def tick() -> None:
        while True:
            before = trio.current_time()
            await trio.sleep(0.01)
            gaps.append(trio.current_time() - before)

    with ScriptedFtp(size=100_000, sent=b"x" * 100_000, final=b"").serving() as url:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tick)
            with trio.fail_after(5):
                _, body = await take(either, Request(url))
            nursery.cancel_scope.cancel()
    assert body == b"x" * 100_000
    assert max(gaps) < 1


async def test_a_silent_sftp_server_at_the_end_holds_up_nobody_and_no_byte(
    transport: Transport, sftp: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMFS_KNOWN_HOSTS", str(sftp.files["known_hosts"]))
    response = await transport.request(sftp_request(sftp))
    received = bytearray()
    memory = memoryview(bytearray(len(SMALL)))
    while len(received) < len(SMALL):
        received += memory[: await response.receive_into(memory)]
    stopped = descendants(sftp.pid)
    assert stopped
    try:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        assert await response.receive_into(memory) == 0
        await response.aclose()
        assert time.monotonic() - began < 5
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert received == SMALL


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [found for child in children for found in descendants(child)]


async def test_a_complaint_after_the_last_ftp_byte_is_heard(either: Transport) -> None:
    with ScriptedFtp(size=400, sent=b"x" * 400, final=b"451 disk error").serving() as url:
        response = await either.request(Request(url))
        with pytest.raises(TransportError) as caught:
            await body_of(response)
        assert caught.value.kind == "truncated"
        await response.aclose()


@pytest.mark.parametrize("final", [None, b"426 broken off", b"451 disk error"])
async def test_an_ftp_body_without_size_that_the_server_breaks_off_is_truncated(
    either: Transport, final: bytes | None
) -> None:
    with ScriptedFtp(size=None, sent=b"x" * 400, final=final).serving() as url:
        response = await either.request(Request(url))
        assert (response.status, "content-length" in dict(response.headers)) == (200, False)
        with pytest.raises(TransportError) as caught:
            await body_of(response)
        assert caught.value.kind == "truncated"
        await response.aclose()


async def test_an_ftp_body_without_size_has_its_end_confirmed(either: Transport) -> None:
    with ScriptedFtp(size=None, sent=b"x" * 400, final=b"226 done").serving() as url:
        response, body = await take(either, Request(url, headers=(("Range", "bytes=10-"),)))
    assert (response.status, response.ending, len(body)) == (200, "chunked", 400)


async def test_an_ftp_server_without_dates_gives_none(either: Transport) -> None:
    with ScriptedFtp(size=400, sent=b"x" * 400, final=b"226 done", date=b"500 what?").serving() as url:
        response, body = await take(either, Request(url))
    assert ("last-modified" in dict(response.headers), len(body)) == (False, 400)


async def test_an_ftp_body_longer_than_its_size_is_never_taken_for_whole(either: Transport) -> None:
    with ScriptedFtp(size=400, sent=b"x" * 1000, final=b"226 done").serving() as url:
        response = await either.request(Request(url))
        try:
            body = await body_of(response)
        except TransportError as error:
            assert error.kind == "truncated"
        else:
            assert len(body) == 400
        await response.aclose()


async def test_a_busy_ftp_server_is_503(either: Transport) -> None:
    async def busy(stream: trio.SocketStream) -> None:
        await stream.send_all(b"421 too many users\r\n")
        await stream.receive_some()

    async with trio.open_nursery() as nursery:
        opened = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, busy, opened)
        url = f"ftp://127.0.0.1:{opened[0].socket.getsockname()[1]}/file"
        response, _ = await take(either, Request(url))
        nursery.cancel_scope.cancel()
    assert response.status == 503
