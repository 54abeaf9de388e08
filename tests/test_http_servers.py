"""HTTP sources against real servers: nginx in several moods, and Python's own, which knows no ranges."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from streamfs.errors import SourceChanged, SourceFailed
from streamfs.sources.base import Facts
from streamfs.sources.http import HttpSource
from streamfs.sources.transports import Transports
from streamfs.spec import StreamOptions, StreamSpec, UrlSource
from tests.servers import make_certificates, nginx

SIZE = 3_000_017


@pytest.fixture(params=["plain", "curl"])
async def transports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Transports]:
    monkeypatch.setenv("STREAMFS_TRANSPORT", request.param)
    async with Transports() as made:
        yield made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "www"
    made.mkdir()
    (made / "file.bin").write_bytes(os.urandom(SIZE))
    (made / "empty").write_bytes(b"")
    (made / "text.txt").write_bytes(b"compressible " * 100_000)
    for path in (*made.iterdir(), made, tmp_path):
        os.utime(path, (1_700_000_000, 1_700_000_000))
        path.chmod(0o755)
    return made


def source(url: str, transports: Transports, **options: object) -> HttpSource:
    options.setdefault("stall_timeout", 10.0)
    made = StreamOptions(**options)  # type: ignore[arg-type]
    return HttpSource(StreamSpec(name="s", source=UrlSource(url), options=made), transports)


async def read(
    made: HttpSource, start: int = 0, stop: int | None = None, expect: Facts | None = None
) -> tuple[int, bytes, bool]:
    """Where the body began, its bytes, and whether its end is proven."""
    got = bytearray()
    view = memoryview(bytearray(50_000))
    with trio.fail_after(20):
        body = await made.open(start, stop, expect)
        try:
            while count := await body.receive_into(view):
                got += view[:count]
        finally:
            await body.aclose()
    return body.start, bytes(got), body.end_proven


async def test_nginx_serves_ranges_over_a_kept_connection(root: Path, transports: Transports) -> None:
    data = (root / "file.bin").read_bytes()
    with nginx(root) as server:
        made = source(f"http://{server.authority}/file.bin", transports)
        facts = await made.probe()
        assert (facts.size, facts.ranged, facts.modified) == (SIZE, True, 1_700_000_000)
        assert facts.validator is not None and facts.validator.startswith('etag:"')
        assert await read(made) == (0, data, True)
        for start in (1, 65_536, SIZE - 1):
            assert await read(made, start, None, facts) == (start, data[start:], True)
        assert await read(made, 1000, 1001, facts) == (1000, data[1000:1001], True)
        assert await read(source(f"http://{server.authority}/empty", transports)) == (0, b"", True)
        with pytest.raises(SourceFailed):
            await made.open(SIZE, None, None)
        with pytest.raises(SourceFailed, match="404"):
            await source(f"http://{server.authority}/nothing", transports).probe()


async def test_nginx_without_ranges_is_read_from_the_start(root: Path, transports: Transports) -> None:
    with nginx(root, ranges=False) as server:
        made = source(f"http://{server.authority}/file.bin", transports)
        facts = await made.probe()
        assert (facts.size, facts.ranged) == (SIZE, False)
        assert await read(made, 1000) == (0, (root / "file.bin").read_bytes(), True)


async def test_nginx_is_not_led_to_compress(root: Path, transports: Transports) -> None:
    with nginx(root, options="gzip on; gzip_types *;") as server:
        made = source(f"http://{server.authority}/text.txt", transports)
        assert (await made.probe()).ranged
        assert await read(made, 13, 26) == (13, b"compressible ", True)


async def test_a_file_replaced_on_nginx_is_another_version(root: Path, transports: Transports) -> None:
    with nginx(root) as server:
        made = source(f"http://{server.authority}/file.bin", transports)
        facts = await made.probe()
        fresh = os.urandom(SIZE)
        (root / "file.new").write_bytes(fresh)
        (root / "file.new").replace(root / "file.bin")
        with pytest.raises(SourceChanged):
            await read(made, 1000, 2000, facts)
        assert await read(made, 1000, 2000) == (1000, fresh[1000:2000], True)


async def test_nginx_without_tags_is_told_apart_by_date_and_length(root: Path, transports: Transports) -> None:
    with nginx(root, options="etag off;") as server:
        made = source(f"http://{server.authority}/file.bin", transports)
        facts = await made.probe()
        assert facts.validator == f"modified:Tue, 14 Nov 2023 22:13:20 GMT;size:{SIZE}"
        assert await read(made, 1000, 2000, facts) == (1000, (root / "file.bin").read_bytes()[1000:2000], True)
        os.utime(root / "file.bin", (1_600_000_000, 1_600_000_000))
        with pytest.raises(SourceChanged):
            await read(made, 1000, 2000, facts)


async def test_nginx_over_tls(root: Path, tmp_path: Path, transports: Transports) -> None:
    (tmp_path / "tls").mkdir()
    certificates = make_certificates(tmp_path / "tls")
    with nginx(root, tls=certificates) as server:
        made = source(f"https://{server.authority}/file.bin", transports, cacert=str(certificates.authority))
        assert await read(made, 5, SIZE) == (5, (root / "file.bin").read_bytes()[5:], True)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def python_server(root: Path) -> Iterator[str]:
    """HTTP/1.0, no ranges, dates without tags."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


async def test_pythons_server_is_read_from_the_start(python_server: str, root: Path, transports: Transports) -> None:
    made = source(f"{python_server}/file.bin", transports)
    assert await made.probe() == Facts(
        size=SIZE,
        validator=f"modified:Tue, 14 Nov 2023 22:13:20 GMT;size:{SIZE}",
        mime="application/octet-stream",
        modified=1_700_000_000,
    )
    assert await read(made, 1000) == (0, (root / "file.bin").read_bytes(), True)
