"""URL sources over libcurl and real servers: ftp in clear, with explicit and with implicit TLS, sftp, http through
proxies, HTTP/2; and over the transport that plain ftp has of its own (`ftp-own`)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from streamfs.errors import SourceChanged, SourceFailed
from streamfs.sources.base import Facts
from streamfs.sources.curl import KNOWN_HOSTS_VARIABLE
from streamfs.sources.http import HttpSource
from streamfs.sources.httpbody import HttpBody
from streamfs.sources.transports import Transports
from streamfs.spec import StreamOptions, StreamSpec, UrlSource
from tests import servers
from tests.servers import Certificates, Server

MIB = 1 << 20
DATA = random.Random(1).randbytes(3_000_017)
BIG = random.Random(2).randbytes(32 * MIB + 17)  # several times what sockets and libcurl hold
OLD = 1_700_000_000
"""A modification time long enough ago to name a version."""

FILE_KINDS = ["ftp", "ftp-own", "ftp-tls", "ftps", "sftp"]
PROXIED_KINDS = ["http-proxy", "connect-proxy", "socks5", "socks5h"]
KINDS = [*FILE_KINDS, *PROXIED_KINDS, "h2"]


def put(path: Path, data: bytes, modified: int = OLD) -> None:
    """`data` as the file at `path`, whole at once."""
    made = path.with_name(path.name + ".new")
    made.write_bytes(data)
    made.chmod(0o644)
    os.utime(made, (modified, modified))
    made.rename(path)


@dataclass(frozen=True)
class Place:
    """A server and how a stream reaches it. `name` is relative to `root` in every method."""

    kind: str
    server: Server
    root: Path
    prefix: str  # of every URL
    options: dict[str, object] = field(default_factory=dict)
    proxy: Server | None = None

    def url(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def source(self, name: str, transports: Transports, **options: object) -> HttpSource:
        return source(self.url(name), transports, **self.options | options)

    def connections(self) -> int:
        """How many connections the server has been asked over so far."""
        log = self.server.log()
        match self.kind:
            case "sftp":
                return log.count("Accepted publickey")
            case "ftp" | "ftp-own" | "ftp-tls" | "ftps":
                return log.count("OK LOGIN")
        return len(set((self.server.home / "connections.log").read_text().split()))


def source(url: str, transports: Transports, **options: object) -> HttpSource:
    made = StreamOptions(**{"stall_timeout": 20.0} | options)  # type: ignore[arg-type]
    return HttpSource(StreamSpec(name="s", source=UrlSource(url), options=made), transports)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    for parent in (folder, *folder.parents[:3]):
        parent.chmod(0o755)
    put(folder / "data", DATA)
    put(folder / "a b%c", DATA[:1000])
    put(folder / "big", BIG)
    put(folder / "empty", b"")
    return folder


@pytest.fixture(scope="module")
def places(root: Path, certificates: Certificates) -> Iterator[Callable[[str], Place]]:
    """Places by kind, each started when first asked for."""
    started: dict[str, Place] = {}
    logged = "log_format connection '$connection'; access_log connections.log connection;"
    with ExitStack() as stack:

        def nginx(tls: Certificates | None = None) -> Server:
            return stack.enter_context(servers.nginx(root, tls=tls, http2=tls is not None, options=logged))

        def made(kind: str) -> Place:
            trusting: dict[str, object] = {"cacert": str(certificates.authority)}
            match kind:
                case "ftp" | "ftp-own":
                    server = stack.enter_context(servers.vsftpd(root))
                    return Place(kind, server, root, f"ftp://{server.authority}")
                case "ftp-tls":
                    server = stack.enter_context(servers.vsftpd(root, tls=certificates, explicit=True))
                    return Place(kind, server, root, f"ftp://{server.authority}", trusting)
                case "ftps":
                    server = stack.enter_context(servers.vsftpd(root, tls=certificates))
                    return Place(kind, server, root, f"ftps://{server.authority}", trusting)
                case "sftp":
                    server = stack.enter_context(servers.sshd(root))
                    key: dict[str, object] = {"key": str(server.files["key"])}
                    return Place(kind, server, root, f"sftp://{server.authority}{root}", key)
                case "h2":
                    server = nginx(certificates)
                    return Place(kind, server, root, f"https://{server.authority}", trusting)
            secure = kind == "connect-proxy"
            server = nginx(certificates if secure else None)
            proxy = stack.enter_context(servers.socks_proxy() if "socks" in kind else servers.http_proxy())
            through = {"proxy": f"{kind if 'socks' in kind else 'http'}://{proxy.authority}"}
            prefix = f"{'https' if secure else 'http'}://{server.authority}"
            return Place(kind, server, root, prefix, through | (trusting if secure else {}), proxy)

        def place(kind: str) -> Place:
            if kind not in started:
                started[kind] = made(kind)
            return started[kind]

        yield place


@pytest.fixture
def place(request: pytest.FixtureRequest, places: Callable[[str], Place], monkeypatch: pytest.MonkeyPatch) -> Place:
    """The place of the kind that the test is parametrized with; its transport is libcurl but where the
    kind says otherwise, its host key known."""
    found = places(request.param)
    if found.kind != "ftp-own":
        monkeypatch.setenv("STREAMFS_TRANSPORT", "curl")
    if found.kind == "sftp":
        monkeypatch.setenv(KNOWN_HOSTS_VARIABLE, str(found.server.files["known_hosts"]))
    return found


@pytest.fixture
async def transports(place: Place) -> AsyncIterator[Transports]:
    async with Transports() as made:
        yield made


everywhere = pytest.mark.parametrize("place", KINDS, indirect=True)
over_file_protocols = pytest.mark.parametrize("place", FILE_KINDS, indirect=True)
over_sftp = pytest.mark.parametrize("place", ["sftp"], indirect=True)


async def rest_of(body: HttpBody) -> bytes:
    got = bytearray()
    view = memoryview(bytearray(100_000))
    with trio.fail_after(30):
        while count := await body.receive_into(view):
            got += view[:count]
    return bytes(got)


async def read(
    made: HttpSource, start: int = 0, stop: int | None = None, expect: Facts | None = None
) -> tuple[int, bytes, bool]:
    """Where the body began, its bytes, and whether its end is proven."""
    with trio.fail_after(30):
        body = await made.open(start, stop, expect)
    try:
        return body.start, await rest_of(body), body.end_proven
    finally:
        await body.aclose()


async def failure_of(made: HttpSource) -> str:
    """The one line that says why it cannot be opened, which must come at once."""
    with trio.fail_after(10), pytest.raises(SourceFailed) as caught:
        await read(made)
    text = str(caught.value)
    assert "\n" not in text
    return text


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


# -- bytes and facts


@everywhere
async def test_a_whole_file_is_byte_exact(place: Place, transports: Transports) -> None:
    assert await read(place.source("data", transports)) == (0, DATA, True)
    assert await read(place.source("empty", transports)) == (0, b"", True)
    if place.proxy is not None:
        assert str(place.server.port) in place.proxy.log()


@everywhere
async def test_a_name_with_escapes_is_found(place: Place, transports: Transports) -> None:
    assert await read(place.source("a%20b%25c", transports)) == (0, DATA[:1000], True)


@everywhere
async def test_every_part_of_a_file_is_byte_exact(place: Place, transports: Transports) -> None:
    made = place.source("data", transports)
    facts = await made.probe()
    end = len(DATA)
    for start, stop in [(1_234_567, None), (end - 1, None), (end - 1, end), (0, 1), (70_000, 70_001), (5, 2_000_000)]:
        # To end an exchange with a file server in the middle costs its login, so it goes on.
        given = DATA[start:] if place.kind in FILE_KINDS else DATA[start:stop]
        assert await read(made, start, stop, facts) == (start, given, True)
    with pytest.raises(SourceFailed, match=f"{end}"):
        await read(made, end)


@everywhere
async def test_the_facts_are_those_of_the_file(place: Place, transports: Transports) -> None:
    made = place.source("data", transports)
    probed = await made.probe()
    body = await made.open(10, None, None)
    await body.aclose()
    assert probed == body.facts
    assert (probed.size, probed.ranged, probed.modified) == (len(DATA), True, OLD)
    assert probed.validator is not None
    other = await place.source("big", transports).probe()
    assert (other.size, other.validator == probed.validator) == (len(BIG), False)


@pytest.mark.parametrize("place", ["h2"], indirect=True)
async def test_https_over_libcurl_speaks_http_2(place: Place, transports: Transports) -> None:
    await read(place.source("data", transports))
    assert '"GET /data HTTP/2.0" 206' in place.server.log()


# -- versions


@everywhere
async def test_a_file_replaced_between_two_opens_is_another_version(place: Place, transports: Transports) -> None:
    name = f"replaced-{place.kind}"
    put(place.root / name, DATA)
    made = place.source(name, transports)
    facts = await made.probe()
    put(place.root / name, DATA[::-1], OLD + 10)
    with pytest.raises(SourceChanged):
        await read(made, 1000, None, facts)
    assert await read(made, 1000) == (1000, DATA[::-1][1000:], True)
    put(place.root / name, DATA[:-1], OLD + 10)
    with pytest.raises(SourceChanged):
        await read(made, 1000, None, await place.source("data", transports).probe())


# -- broken connections


class Relay:
    """Passes TCP connections on to `port` until they are cut."""

    def __init__(self, target: int, nursery: trio.Nursery) -> None:
        self.target = target
        self.port = 0
        self.accepted = 0
        self._nursery = nursery
        self._scopes: list[trio.CancelScope] = []

    async def listen(self) -> None:
        listeners = await trio.open_tcp_listeners(0, host=servers.HOST)
        self.port = int(listeners[0].socket.getsockname()[1])
        self._nursery.start_soon(trio.serve_listeners, self._serve, listeners)

    def cut(self) -> bool:
        """Whether there was something to cut."""
        scopes, self._scopes = self._scopes, []
        for scope in scopes:
            scope.cancel()
        return bool(scopes)

    async def _serve(self, near: trio.SocketStream) -> None:
        self.accepted += 1
        far = await trio.open_tcp_stream(servers.HOST, self.target)
        async with near, far, trio.open_nursery() as nursery:
            self._scopes.append(nursery.cancel_scope)
            nursery.start_soon(self._pass_on, near, far, nursery)
            nursery.start_soon(self._pass_on, far, near, nursery)

    async def _pass_on(self, source: trio.SocketStream, sink: trio.SocketStream, nursery: trio.Nursery) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # either side may go first
            while data := await source.receive_some(65536):
                await sink.send_all(data)
        nursery.cancel_scope.cancel()


def session_processes(server: Server) -> list[int]:
    """The processes that a forking server has made, and theirs."""
    found, parents = [], [server.pid]
    while parents:
        children = Path(f"/proc/{parents[0]}/task/{parents[0]}/children")
        with contextlib.suppress(FileNotFoundError):
            parents += map(int, children.read_text().split())
        found.append(parents.pop(0))
    return found[1:]


@contextlib.asynccontextmanager
async def cuttable(place: Place) -> AsyncIterator[tuple[str, Callable[[], bool]]]:
    """The prefix of URLs, and a way to cut every connection, which says whether there was one: by its processes where
    the server forks, else by a relay before it."""
    if place.kind in FILE_KINDS:

        def kill() -> bool:
            sessions = session_processes(place.server)
            for pid in sessions:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return bool(sessions)

        yield place.prefix, kill
        return
    async with trio.open_nursery() as nursery:
        relay = Relay(place.server.port, nursery)
        await relay.listen()
        yield place.prefix.replace(f":{place.server.port}", f":{relay.port}"), relay.cut
        assert relay.accepted > 1
        nursery.cancel_scope.cancel()


@everywhere
@pytest.mark.parametrize("start", [0, 5 * MIB + 3])
async def test_a_body_goes_on_after_its_connection_was_cut(place: Place, transports: Transports, start: int) -> None:
    async with cuttable(place) as (prefix, cut):
        body = await source(f"{prefix}/big", transports, **place.options).open(start, None, None)
        view = memoryview(bytearray(MIB))
        got = b""
        for _ in range(2):
            wanted = len(got) + MIB
            while len(got) < wanted or not cut():  # what had arrived before the first cut is given first
                got += view[: await body.receive_into(view)]
                assert len(got) < len(BIG) - start
        got += await rest_of(body)
        await body.aclose()
        await transports.aclose()
    assert got == BIG[start:]
    assert body.end_proven


@everywhere
async def test_a_file_replaced_while_its_connection_was_cut_is_not_mixed(place: Place, transports: Transports) -> None:
    name = f"mixed-{place.kind}"
    put(place.root / name, BIG)
    async with cuttable(place) as (prefix, cut):
        body = await source(f"{prefix}/{name}", transports, **place.options).open(0, None, None)
        view = memoryview(bytearray(MIB))
        got = bytearray(view[: await body.receive_into(view)])
        put(place.root / name, BIG[::-1], OLD + 10)
        assert cut()
        with pytest.raises(SourceChanged):
            while count := await body.receive_into(view):
                got += view[:count]
        await body.aclose()
        await transports.aclose()
    assert got == BIG[: len(got)]
    assert len(got) < len(BIG)


@over_file_protocols
async def test_a_server_that_is_gone_fails_with_one_line(place: Place, transports: Transports) -> None:
    port = servers.free_port()
    url = place.url("data").replace(f":{place.server.port}", f":{port}")
    assert f":{port}" in await failure_of(source(url, transports, **place.options))


# -- many at once, and what is left


@everywhere
async def test_two_bodies_at_once_do_not_disturb_each_other(place: Place, transports: Transports) -> None:
    made = place.source("big", transports)
    first, second = await made.open(0, None, None), await made.open(7 * MIB, None, None)
    got = [bytearray(), bytearray()]
    view = memoryview(bytearray(300_000))
    for _ in range(20):
        for body, into in zip((first, second), got, strict=True):
            into += view[: await body.receive_into(view)]
    got[1] += await rest_of(second)  # while the first one waits, full
    got[0] += await rest_of(first)
    await first.aclose()
    await second.aclose()
    assert got[0] == BIG
    assert got[1] == BIG[7 * MIB :]


async def at_rest(transports: Transports) -> None:
    """Wait until no transfer is under way: those of files end in threads of their own, soon after."""
    if transports._ftp is not None:
        return  # nothing there goes on by itself
    loops = [transport._loop for transport in transports._files.values()]  # type: ignore[attr-defined]
    carriers = [transports._curl, *(loop.transport for loop in loops)]
    carriers = [carrier for carrier in carriers if carrier is not None]
    assert carriers, "nothing went through libcurl"
    with trio.fail_after(10):
        while any(carrier.active_transfers for carrier in carriers):  # type: ignore[attr-defined]  # noqa: ASYNC110
            await trio.sleep(0.01)


@everywhere
async def test_cancelled_reads_leave_nothing_behind(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(3)

    async def interrupted(transports: Transports) -> None:
        with trio.move_on_after(chance.uniform(0, 0.15)):
            body = await place.source("big", transports).open(chance.randrange(MIB), None, None)
            try:
                await body.receive_into(memoryview(bytearray(1000)))
                await trio.sleep_forever()
            finally:
                await body.aclose()

    async def round_of_reads() -> None:
        async with Transports() as transports:
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(interrupted, transports)
            await at_rest(transports)
            assert (await read(place.source("data", transports)))[1] == DATA

    await round_of_reads()  # libraries open files of their own the first time
    before = descriptors()
    await round_of_reads()
    assert descriptors() == before


@pytest.mark.parametrize("place", [*FILE_KINDS, "h2"], indirect=True)
async def test_reads_to_the_end_use_one_connection(place: Place, transports: Transports) -> None:
    before = place.connections()
    made = place.source("data", transports)
    facts = await made.probe()
    await at_rest(transports)  # only then can the next have its connection
    if place.kind in ("ftp", "ftp-tls", "ftps"):
        await transports.pick(place.url("data"), StreamOptions()).aclose()  # a part of a file costs its connection
        before = place.connections()
    for start in (0, 1000, len(DATA) - 1):
        assert (await read(made, start, None, facts))[1] == DATA[start:]
        await at_rest(transports)
    assert place.connections() - before == 1


# -- refusals


@everywhere
async def test_a_missing_file_is_told_in_one_line(place: Place, transports: Transports) -> None:
    for name in ("missing", "missing/too"):
        text = await failure_of(place.source(name, transports))
        assert place.url(name).split("@")[-1] in text
        assert "404" in text if place.kind not in FILE_KINDS else "no such file" in text


def with_login(url: str, login: str) -> str:
    return url.replace("://", f"://{login}@")


@over_file_protocols
async def test_a_refused_login_is_told_in_one_line_without_the_password(place: Place, transports: Transports) -> None:
    url = with_login(place.url("data"), "somebody:ge%3Aheim")
    options = place.options
    if place.kind == "sftp":
        options = {"key": str(place.server.files["stranger"])}
    text = await failure_of(source(url, transports, **options))
    assert "login is refused" in text
    assert "heim" not in text
    assert "somebody" not in text


@over_file_protocols
async def test_a_folder_fails_at_once_with_one_line(place: Place, transports: Transports) -> None:
    (place.root / "folder").mkdir(exist_ok=True)
    (place.root / "empty-folder").mkdir(exist_ok=True)
    (place.root / "folder" / "file").write_bytes(b"data")
    made = place.source("folder", transports)
    for name in ("folder/", "folder", "empty-folder"):
        text = await failure_of(place.source(name, transports))
        assert "a folder" in text.removeprefix(place.url(name))
        assert "attempts" not in text, "what cannot get better is not tried again"
    with pytest.raises(SourceFailed, match="a folder"):
        await made.probe()
    await at_rest(transports)
    assert (await read(place.source("folder/file", transports)))[1] == b"data"


@pytest.mark.parametrize("place", ["ftp-tls", "ftps", "connect-proxy", "h2"], indirect=True)
async def test_a_certificate_that_nobody_vouches_for_is_refused(
    place: Place, transports: Transports, tmp_path: Path
) -> None:
    stranger = servers.make_certificates(tmp_path)
    text = await failure_of(place.source("data", transports, cacert=str(stranger.authority)))
    assert "certificate" in text
    made = place.source("data", transports, cacert=str(stranger.authority), insecure=True)
    assert (await read(made))[1] == DATA  # told to take any


@pytest.mark.parametrize("place", ["ftp", "ftp-own"], indirect=True)
async def test_explicit_tls_is_demanded_not_tried(
    place: Place, transports: Transports, certificates: Certificates
) -> None:
    assert (await read(place.source("data", transports)))[1] == DATA  # leaves a connection in clear
    text = await failure_of(place.source("data", transports, cacert=str(certificates.authority)))
    assert "TLS" in text or "SSL" in text


# -- host keys


@over_sftp
async def test_an_unknown_host_key_is_refused(
    place: Place, transports: Transports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await read(place.source("data", transports)))[1] == DATA
    for name in ("nobody", "missing"):
        (tmp_path / "nobody").touch()
        monkeypatch.setenv(KNOWN_HOSTS_VARIABLE, str(tmp_path / name))
        async with Transports() as fresh:
            text = await failure_of(place.source("data", fresh))
        assert "host key is not in" in text
        assert str(tmp_path / name) in text


@over_sftp
async def test_a_changed_host_key_is_refused(
    place: Place, transports: Transports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = place.server.files["stranger"].with_suffix(".pub").read_text().split()
    known = tmp_path / "known_hosts"
    known.write_text(f"[{servers.HOST}]:{place.server.port} {other[0]} {other[1]}\n")
    monkeypatch.setenv(KNOWN_HOSTS_VARIABLE, str(known))
    text = await failure_of(place.source("data", transports))
    assert "host key is another" in text
    assert known.read_text().count("\n") == 1
    assert (await read(place.source("data", transports, insecure=True)))[1] == DATA
    assert "host key is another" in await failure_of(place.source("data", transports))  # lent nobody's connection


# -- proxies


@pytest.mark.parametrize("place", ["http-proxy", "connect-proxy"], indirect=True)
async def test_a_proxy_that_wants_a_login_gets_it_and_its_refusal_is_told_at_once(
    place: Place, transports: Transports
) -> None:
    with servers.http_proxy(login=("me", "geheim")) as proxy:
        good, bad, none = (f"http://{login}{proxy.authority}" for login in ("me:geheim@", "me:falsch@", ""))
        assert (await read(place.source("data", transports, proxy=good)))[1] == DATA
        for refused in (bad, none):
            text = await failure_of(place.source("data", transports, proxy=refused))
            assert "attempts" not in text, "it was tried again"
            if place.kind == "connect-proxy":
                assert "the proxy refuses the login" in text
            else:
                assert "401" in text or "407" in text
            assert "falsch" not in text


@pytest.mark.parametrize("place", PROXIED_KINDS, indirect=True)
async def test_a_proxy_that_is_gone_fails_with_one_line(place: Place, transports: Transports) -> None:
    port = servers.free_port()
    scheme = place.kind if "socks" in place.kind else "http"
    await failure_of(place.source("data", transports, proxy=f"{scheme}://me:geheim@127.0.0.1:{port}"))


@over_file_protocols
@pytest.mark.parametrize("scheme", ["http", "socks5h"])
async def test_file_protocols_pass_through_proxies(place: Place, transports: Transports, scheme: str) -> None:
    with servers.http_proxy() if scheme == "http" else servers.socks_proxy() as proxy:
        made = place.source("data", transports, proxy=f"{scheme}://{proxy.authority}")
        assert await read(made, 1000) == (1000, DATA[1000:], True)
        assert str(place.server.port) in proxy.log()


# -- servers that fall silent


@pytest.mark.parametrize("place", ["ftp", "ftp-own", "ftps", "sftp", "h2"], indirect=True)
async def test_giving_up_a_body_is_quick_when_the_server_is_silent(place: Place) -> None:
    """The loop is not held up, either: closing a body is one synchronous step of libcurl."""
    stopped: list[int] = []
    transports = Transports()
    try:
        body = await place.source("big", transports).open(0, None, None)
        await read(place.source("data", transports))  # leaves an idle connection
        stopped = session_processes(place.server) or [place.server.pid]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        await body.aclose()
        assert time.monotonic() - began < 0.9  # libssh2's farewell would take a second
        await transports.aclose()
        assert time.monotonic() - began < 5  # libssh2 waits a second for each idle connection
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
