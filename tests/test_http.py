"""Identity, redirects, refreshed URLs and TLS of HTTP sources, over both transports."""

from __future__ import annotations

import datetime
import logging
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trustme

from streamfs.errors import NotPermitted, SourceChanged, SourceFailed, StreamfsError
from streamfs.sources import addresses, attempts, http
from streamfs.sources.base import Facts
from streamfs.sources.http import HttpSource
from streamfs.sources.transports import Transports
from streamfs.spec import StreamOptions, StreamSpec, UrlSource
from tests.faults.origin import DEFAULT_SIZE, Origin, content, serving

Running = tuple[Origin, str]


@pytest.fixture
async def origin() -> AsyncIterator[Running]:
    async with serving() as running:
        yield running


@pytest.fixture
async def elsewhere() -> AsyncIterator[Running]:
    """A second origin: same host, other port."""
    async with serving() as running:
        yield running


@pytest.fixture(params=["plain", "curl"])
async def transports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Transports]:
    monkeypatch.setenv("STREAMFS_TRANSPORT", request.param)
    monkeypatch.setattr(attempts, "BACKOFF_FIRST", 0.002)
    async with Transports() as made:
        yield made


def source(url: str, transports: Transports, **options: object) -> HttpSource:
    options.setdefault("stall_timeout", 5.0)
    made = StreamOptions(**options)  # type: ignore[arg-type]
    return HttpSource(StreamSpec(name="s", source=UrlSource(url), options=made), transports)


async def read(made: HttpSource, start: int = 0, stop: int | None = None, expect: Facts | None = None) -> bytes:
    got = bytearray()
    view = memoryview(bytearray(50_000))
    with trio.fail_after(20):
        body = await made.open(start, stop, expect)
        try:
            while count := await body.receive_into(view):
                got += view[:count]
        finally:
            await body.aclose()
    return bytes(got)


async def asked_with(made: HttpSource) -> dict[str, str]:
    """The request headers that the origin's fault=echo saw, names in lower case."""
    lines = (await read(made)).decode().splitlines()
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


def told(error: BaseException | None) -> str:
    """All that a logged traceback would show of an error and its causes, but for the lines of code."""
    texts = []
    while error is not None:
        texts.append(repr(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n".join(texts)


# -- who we say we are


async def test_a_request_asks_for_plain_bytes_and_says_who_asks(origin: Running, transports: Transports) -> None:
    seen = await asked_with(source(f"{origin[1]}/e?fault=echo", transports))
    assert seen["accept-encoding"] == "identity"
    assert seen["range"] == "bytes=0-"
    assert seen["user-agent"].startswith("streamfs/")
    assert seen["host"] == origin[1].removeprefix("http://")


async def test_the_options_of_identity_reach_the_origin(
    origin: Running, transports: Transports, tmp_path: Path
) -> None:
    cookies = tmp_path / "cookies"
    cookies.write_text(
        "# Netscape HTTP Cookie File\n"
        "127.0.0.1\tFALSE\t/\tFALSE\t4000000000\tsession\tabc\n"
        "other.example\tFALSE\t/\tFALSE\t4000000000\tsession\twrong\n"
    )
    seen = await asked_with(
        source(
            f"{origin[1]}/e?fault=echo",
            transports,
            headers=(("X-Token", "t0"), ("Range", "bytes=5-6")),
            user_agent="Tester/1",
            cookie_file=str(cookies),
        )
    )
    assert (seen["x-token"], seen["user-agent"], seen["cookie"]) == ("t0", "Tester/1", "session=abc")
    assert seen["range"] == "bytes=0-"


async def test_a_login_comes_from_the_url_or_the_netrc_file(
    origin: Running, transports: Transports, tmp_path: Path
) -> None:
    base = origin[1].removeprefix("http://")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password hunter2\n")
    right = content("s", 0, 0, DEFAULT_SIZE)
    assert await read(source(f"http://user:hunter2@{base}/s?fault=login", transports)) == right
    assert await read(source(f"http://{base}/s?fault=login", transports, netrc=str(netrc))) == right
    with pytest.raises(SourceFailed, match="401"):
        await read(source(f"http://user:wrong@{base}/s?fault=login", transports, netrc=str(netrc)))


@pytest.mark.parametrize("option", ["netrc", "cookie_file"])
@pytest.mark.parametrize("text", ["machine h login u passwrd CANARY\n", None])
async def test_an_unreadable_file_of_secrets_is_named_and_not_quoted(
    option: str, text: str | None, origin: Running, transports: Transports, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SourceFailed, match="file") as raised:
        await read(source(f"{origin[1]}/s", transports, **{option: str(path)}))
    assert "CANARY" not in told(raised.value)


async def test_a_header_cannot_smuggle_another(origin: Running, transports: Transports) -> None:
    with pytest.raises(SourceFailed) as raised:
        await read(source(f"{origin[1]}/s", transports, headers=(("X-A", "b\r\nX-Evil: CANARY"),)))
    assert "CANARY" not in told(raised.value)
    assert not origin[0].log


# -- redirects


async def test_secrets_do_not_follow_a_redirect_to_another_origin(
    origin: Running, elsewhere: Running, transports: Transports, tmp_path: Path
) -> None:
    cookies = tmp_path / "cookies"
    cookies.write_text("# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t4000000000\tsession\tCANARY\n")
    netrc = tmp_path / "netrc"
    netrc.write_text("default login user password CANARY\n")
    base = origin[1].removeprefix("http://")
    made = source(
        f"http://user:CANARY@{base}/s?fault=redirect-to",
        transports,
        headers=(("X-Target", f"{elsewhere[1]}/e?fault=echo"), ("X-Token", "CANARY")),
        cookie_file=str(cookies),
        netrc=str(netrc),
    )
    seen = await asked_with(made)
    assert "CANARY" not in repr(seen) and "authorization" not in seen
    assert seen["user-agent"].startswith("streamfs/")
    home = {name.lower(): value for name, value in origin[0].log[0][1].items()}
    assert {"authorization", "cookie", "x-token"} <= home.keys()


async def test_a_redirect_within_the_origin_keeps_the_login(origin: Running, transports: Transports) -> None:
    base = origin[1].removeprefix("http://")
    target = f"{origin[1]}/s?fault=login"
    made = source(f"http://user:hunter2@{base}/s?fault=redirect-to", transports, headers=(("X-Target", target),))
    assert await read(made) == content("s", 0, 0, DEFAULT_SIZE)


async def test_the_end_of_a_redirect_is_asked_directly_until_it_fails(origin: Running, transports: Transports) -> None:
    target = f"{origin[1]}/s?fault=404&times=0"
    made = source(f"{origin[1]}/s?fault=redirect-once", transports)
    for start in (0, 1000, 2000):
        await read(made, start, start + 10)
    assert sum("redirect-once" in path for path, _ in origin[0].log) == 1
    made._landing = http._Landing(target, True, trio.current_time() + 60)
    assert await read(made, 5, 10) == content("s", 0, 5, 10)
    assert sum("redirect-once" in path for path, _ in origin[0].log) == 2


@pytest.fixture
def public_origin(origin: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    """`origin`, which now counts as public under its number 127.0.0.1; other loopback addresses stay private."""
    truly = addresses.is_private
    monkeypatch.setattr(addresses, "is_private", lambda address: address != "127.0.0.1" and truly(address))
    return origin


@pytest.mark.parametrize(
    "host", ["127.0.0.2", "[::1]", "[::ffff:127.0.0.2]", "2130706434", "0x7f.2", "127.2", "169.254.169.254", "10.0.0.1"]
)
async def test_a_public_url_may_not_redirect_to_a_private_address(
    host: str, public_origin: Running, transports: Transports
) -> None:
    made = source(f"{public_origin[1]}/s?fault=redirect-to", transports, headers=(("X-Target", f"http://{host}:9/x"),))
    with pytest.raises(NotPermitted, match="private"):
        await read(made)


async def test_a_private_target_is_reached_where_it_is_allowed(
    public_origin: Running, elsewhere: Running, transports: Transports
) -> None:
    target = elsewhere[1].replace("127.0.0.1", "0x7f000001") + "/s"
    made = source(
        f"{public_origin[1]}/s?fault=redirect-to", transports, headers=(("X-Target", target),), allow_private=True
    )
    assert await read(made) == content("s", 0, 0, DEFAULT_SIZE)


async def test_the_address_that_was_checked_is_the_one_dialled(
    origin: Running, transports: Transports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that only our resolver knows: were it resolved again, nothing would be found."""

    async def resolve(self: addresses.Resolver, url: str) -> list[str]:
        await trio.lowlevel.checkpoint()
        return ["127.0.0.1"]

    monkeypatch.setattr(addresses.Resolver, "resolve", resolve)
    port = origin[1].rsplit(":", 1)[1]
    assert await read(source(f"http://known-here-only.invalid:{port}/s", transports)) == content(
        "s", 0, 0, DEFAULT_SIZE
    )
    assert origin[0].log[0][1]["host"] == f"known-here-only.invalid:{port}"


async def test_the_next_address_is_tried_where_one_does_not_answer(
    origin: Running, transports: Transports, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(self: addresses.Resolver, url: str) -> list[str]:
        await trio.lowlevel.checkpoint()
        return ["127.0.0.77", "127.0.0.1"]

    monkeypatch.setattr(addresses.Resolver, "resolve", resolve)
    assert await read(source(f"{origin[1]}/s", transports)) == content("s", 0, 0, DEFAULT_SIZE)


# -- a fresh URL


def printer(tmp_path: Path, text: str) -> tuple[str, ...]:
    script = tmp_path / "refresh.py"
    script.write_text(f"print({text!r})")
    return (sys.executable, str(script))


@pytest.mark.parametrize("fault", ["403", "404", "login"])
async def test_an_expired_url_is_replaced_by_a_fresh_one(
    fault: str, origin: Running, transports: Transports, tmp_path: Path
) -> None:
    command = printer(tmp_path, f"{origin[1]}/s?token=new")
    made = source(f"{origin[1]}/s?fault={fault}", transports, refresh_command=command)
    assert await read(made, 1000) == content("s", 0, 1000, DEFAULT_SIZE)


async def test_a_fresh_url_with_other_bytes_is_another_version(
    origin: Running, transports: Transports, tmp_path: Path
) -> None:
    facts = await source(f"{origin[1]}/s", transports).probe()
    command = printer(tmp_path, f"{origin[1]}/s?version=1")
    made = source(f"{origin[1]}/s?fault=403", transports, refresh_command=command)
    with pytest.raises(SourceChanged):
        await read(made, 1000, None, facts)


async def test_a_fresh_url_of_another_origin_gets_its_own_login_and_not_the_streams_secrets(
    origin: Running, elsewhere: Running, transports: Transports, tmp_path: Path
) -> None:
    fresh = elsewhere[1].replace("http://", "http://user:hunter2@") + "/e?fault=echo"
    made = source(
        f"{origin[1]}/s?fault=403",
        transports,
        refresh_command=printer(tmp_path, fresh),
        headers=(("X-Token", "CANARY"), ("Authorization", "Bearer CANARY")),
    )
    seen = await asked_with(made)
    assert seen["authorization"] == "Basic dXNlcjpodW50ZXIy"
    assert "CANARY" not in repr(seen)


@pytest.mark.parametrize("text", ["", "not a url", "file:///etc/passwd", "http://127.0.0.1:1/CANARY x"])
async def test_a_refresh_that_brings_nothing_useful_fails_the_source(
    text: str, origin: Running, transports: Transports, tmp_path: Path
) -> None:
    made = source(f"{origin[1]}/s?fault=403", transports, refresh_command=printer(tmp_path, text))
    with pytest.raises((SourceFailed, NotPermitted)):
        await read(made)


async def test_a_refresh_command_that_fails_does_not_show_its_output(origin: Running, transports: Transports) -> None:
    command = ("/bin/sh", "-c", "echo CANARY >&2; echo CANARY; exit 3")
    with pytest.raises(SourceFailed, match="refresh command") as raised:
        await read(source(f"{origin[1]}/s?fault=403", transports, refresh_command=command))
    assert "CANARY" not in str(raised.value)


# -- TLS


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    made = trustme.CA()
    made.cert_pem.write_to_path(tmp_path / "ca.pem")
    return made


def server_context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    return context


@pytest.mark.parametrize("query", ["", "fault=rst-body", "fault=chunked&fault=cut-body", "fault=close-delimited"])
async def test_tls_carries_the_same_bytes(
    query: str, authority: trustme.CA, tmp_path: Path, transports: Transports
) -> None:
    async with serving(server_context(authority.issue_cert("127.0.0.1"))) as (_, base):
        made = source(f"{base}/s?{query}", transports, cacert=str(tmp_path / "ca.pem"))
        assert await read(made) == content("s", 0, 0, DEFAULT_SIZE)
        assert await read(made, 777, 99_999) == content("s", 0, 777, 99_999)


@pytest.mark.parametrize("fault", ["wrong host", "expired", "unknown authority"])
async def test_a_certificate_that_proves_nothing_is_refused_unless_told_otherwise(
    fault: str, authority: trustme.CA, tmp_path: Path, transports: Transports
) -> None:
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    made = {
        "wrong host": lambda: authority.issue_cert("other.example"),
        "expired": lambda: authority.issue_cert("127.0.0.1", not_after=yesterday),
        "unknown authority": lambda: trustme.CA().issue_cert("127.0.0.1"),
    }[fault]()
    async with serving(server_context(made)) as (seen, base):
        with pytest.raises(SourceFailed):
            await read(source(f"{base}/s", transports, cacert=str(tmp_path / "ca.pem")))
        assert not seen.log
        assert await read(source(f"{base}/s", transports, insecure=True)) == content("s", 0, 0, DEFAULT_SIZE)


async def test_a_client_certificate_is_shown(authority: trustme.CA, tmp_path: Path, transports: Transports) -> None:
    context = server_context(authority.issue_cert("127.0.0.1"))
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    client = authority.issue_cert("me@example.org")
    client.private_key_and_cert_chain_pem.write_to_path(tmp_path / "me.pem")
    ca = str(tmp_path / "ca.pem")
    async with serving(context) as (_, base):
        made = source(f"{base}/s", transports, cacert=ca, cert=str(tmp_path / "me.pem"))
        assert await read(made) == content("s", 0, 0, DEFAULT_SIZE)


# -- secrets


@pytest.mark.parametrize(
    "query",
    [
        "fault=404",
        "fault=range-off-by-one",
        "fault=multipart",
        "fault=rst-head",
        "fault=500",
        "fault=no-http",
        "fault=huge-head",
        "fault=redirect-loop",
        "fault=redirect-deeper",
        "fault=redirect-file",
        "fault=redirect-nonsense",
        "fault=gzip-broken",
        "fault=stall-head",
        "fault=cut-body&fault=changes",
        "fault=bad-chunk&fault=ignore-range",
    ],
)
async def test_no_error_and_no_log_line_shows_a_secret(
    query: str, origin: Running, transports: Transports, caplog: pytest.LogCaptureFixture
) -> None:
    base = origin[1].removeprefix("http://")
    made = source(
        f"http://user:CANARY@{base}/s?{query}&token=CANARY#CANARY",
        transports,
        headers=(("X-Token", "CANARY"), ("Authorization", "Bearer CANARY")),
        stall_timeout=0.5,
    )
    with caplog.at_level(logging.DEBUG), pytest.raises(StreamfsError) as raised:
        await read(made)
    assert "CANARY" not in told(raised.value)
    assert "CANARY" not in caplog.text
    assert base in str(raised.value)


async def test_an_unreachable_origin_is_a_failure_soon(transports: Transports) -> None:
    with trio.fail_after(10), pytest.raises(SourceFailed, match="gave up after 4 attempts"):
        await source("http://127.0.0.1:1/s", transports).open(0, None, None)
