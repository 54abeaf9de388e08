"""Sources behind transforms: alone, and as files of a file system (without a mount), over commands, files and HTTP."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import random
import shlex
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from streamfs.cache import Cache
from streamfs.catalog import Catalog
from streamfs.errors import CommandFailed, InvalidRequest, NoAttribute, SourceChanged, SourceFailed, StreamfsError
from streamfs.filesystem import FileSystem
from streamfs.sources import Transports, make_source, transformed
from streamfs.sources.base import Facts, Source
from streamfs.sources.transformed import TransformedSource
from streamfs.spec import (
    TRANSFORMS,
    AnySource,
    CommandSource,
    ShellSource,
    StreamOptions,
    StreamSpec,
    UrlSource,
    check_spec,
)
from tests.sourcefakes import until

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CONTENT = random.Random(8).randbytes(400_000) + b"text that repeats " * 100_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PACKED: dict[str, bytes] = {
    "gunzip": gzip.compress(CONTENT, mtime=0),
    "bunzip2": bz2.compress(CONTENT),
    "unxz": lzma.compress(CONTENT, preset=1),
    "unzstd": zstd.compress(CONTENT, options={zstd.CompressionParameter.checksum_flag: 1}),
}
every_decoder = pytest.mark.parametrize("name", PACKED)


def spec(source: AnySource, *transforms: str, **options: Any) -> StreamSpec:
    options.setdefault("stall_timeout", 10.0)
    return check_spec(StreamSpec(name="s", source=source, options=StreamOptions(transforms=transforms, **options)))


def cat(path: Path, after: str = "true") -> ShellSource:
    return ShellSource(f"cat {shlex.quote(str(path))}; {after}")


def stored(folder: Path, data: bytes) -> Path:
    path = folder / "data"
    path.write_bytes(data)
    return path


async def collect(source: Source, sizes: Callable[[], int] = lambda: 100_000) -> tuple[bytes, StreamfsError | None]:
    """All the bytes of one body, read `sizes()` at a time, and the error that ended it."""
    got = bytearray()
    with trio.fail_after(30):
        body = await source.open(0, None, None)
        try:
            while True:
                view = memoryview(bytearray(sizes()))
                count = await body.receive_into(view)
                if not count:
                    assert body.end_proven
                    return bytes(got), None
                got += view[:count]
        except StreamfsError as error:
            with pytest.raises(type(error)):  # again, and never an end
                await body.receive_into(memoryview(bytearray(1)))
            return bytes(got), error
        finally:
            await body.aclose()


# The source alone


@every_decoder
async def test_a_commands_output_is_decoded_into_views_of_any_size(name: str, tmp_path: Path) -> None:
    path = stored(tmp_path, PACKED[name])
    chance = random.Random(3)
    async with Transports() as transports:
        source = make_source(spec(cat(path), name), transports)
        for sizes in (lambda: 1 << 20, lambda: chance.randint(1, 50_000)):
            assert await collect(source, sizes) == (CONTENT, None)


@every_decoder
async def test_a_truncated_source_fails_after_what_could_be_decoded(name: str, tmp_path: Path) -> None:
    path = stored(tmp_path, PACKED[name][:-3])
    async with Transports() as transports:
        got, error = await collect(make_source(spec(UrlSource(path.as_uri()), name), transports))
    assert type(error) is SourceFailed
    assert CONTENT.startswith(got) and (len(got) > 300_000 or name == "bunzip2")


@every_decoder
async def test_damage_fails_where_it_is_found(name: str, tmp_path: Path) -> None:
    damaged = bytearray(PACKED[name])
    damaged[len(damaged) - 12] ^= 0x10
    path = stored(tmp_path, bytes(damaged))
    async with Transports() as transports:
        _, error = await collect(make_source(spec(UrlSource(path.as_uri()), name), transports))
    assert type(error) is SourceFailed


async def test_a_command_that_fails_is_not_an_end_although_its_output_was_whole(tmp_path: Path) -> None:
    path = stored(tmp_path, PACKED["gunzip"])
    async with Transports() as transports:
        source = make_source(spec(cat(path, "echo gone >&2; exit 3"), "gunzip", "digest"), transports)
        assert isinstance((await collect(source))[1], CommandFailed)
        body = await source.open(0, None, None)
        assert isinstance(body, transformed.TransformedBody)
        with pytest.raises(CommandFailed):
            while await body.receive_into(memoryview(bytearray(1 << 20))):
                pass
        assert (body.exit_status, body.stderr_tail, body.sha256) == (3, "gone\n", None)
        await body.aclose()


async def test_what_could_be_decoded_is_given_before_more_is_waited_for(tmp_path: Path) -> None:
    first = stored(tmp_path, gzip.compress(b"first"))
    source_spec = spec(cat(first, "exec sleep 1000"), "gunzip", stall_timeout=2)
    async with Transports() as transports:
        got, error = await collect(make_source(source_spec, transports))
    assert got == b"first"
    assert isinstance(error, SourceFailed) and "silent" in str(error)


async def test_facts_name_the_version_and_the_transforms_but_no_size(tmp_path: Path) -> None:
    path = stored(tmp_path, PACKED["gunzip"])
    async with Transports() as transports:
        plain = await make_source(spec(UrlSource(path.as_uri())), transports).probe()
        source = make_source(spec(UrlSource(path.as_uri()), "gunzip", "digest"), transports)
        facts = await source.probe()
        assert facts == Facts(validator=f"gunzip,digest:{plain.validator}", modified=plain.modified)
        body = await source.open(1000, 2000, facts)
        assert (body.start, body.facts) == (0, facts)
        await body.aclose()
        for other in (plain.validator, f"digest:{plain.validator}", "gunzip,digest:another"):
            with pytest.raises(SourceChanged):
                await source.open(0, None, Facts(validator=other))


async def test_other_tasks_get_their_turn_while_much_is_decoded(tmp_path: Path) -> None:
    path = stored(tmp_path, gzip.compress(bytes(256 << 20), 9))
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with Transports() as transports, trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        body = await make_source(spec(UrlSource(path.as_uri()), "gunzip"), transports).open(0, None, None)
        view = memoryview(bytearray(64 << 20))
        total = longest = 0
        while count := await body.receive_into(view):
            total += count
            longest = max(longest, count)
        await body.aclose()
        nursery.cancel_scope.cancel()
    assert total == 256 << 20
    assert longest < len(view), "one call went on until its view was full"
    assert turns > 20


async def test_a_cancelled_read_loses_no_bytes(tmp_path: Path) -> None:
    for name in ("gunzip", "bunzip2"):
        path = stored(tmp_path, PACKED[name])
        async with Transports() as transports:
            body = await make_source(spec(cat(path), name), transports).open(0, None, None)
            got = bytearray()
            view = memoryview(bytearray(70_000))
            ended = False
            attempts = 0
            while not ended:
                attempts += 1
                with trio.CancelScope() as scope:
                    scope.deadline = trio.current_time() + (attempts % 5) / 5000
                    while count := await body.receive_into(view):
                        got += view[:count]
                    ended = True
            await body.aclose()
        assert attempts > 1
        assert got == CONTENT


# Registration


def test_each_registered_name_has_its_transform() -> None:
    assert set(TRANSFORMS) == {*transformed._DECODERS, "icy"}


def test_an_unknown_transform_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match=r"'rot13'.*bunzip2, digest, gunzip, icy, unxz, unzstd"):
        spec(UrlSource("http://a.test/"), "gunzip", "rot13")


def test_icy_can_only_be_the_first() -> None:
    assert spec(UrlSource("http://a.test/"), "icy", "digest").options.transforms == ("icy", "digest")
    with pytest.raises(InvalidRequest, match="first"):
        spec(UrlSource("http://a.test/"), "digest", "icy")


async def test_without_transforms_a_source_is_as_it_was() -> None:
    async with Transports() as transports:
        assert not isinstance(make_source(spec(CommandSource(("true",))), transports), TransformedSource)


# As files


@asynccontextmanager
async def a_filesystem(home: Path, *specs: StreamSpec) -> AsyncIterator[FileSystem]:
    """A loaded file system on `home` over real sources, with these streams added unless they are there."""
    directory = home / "cache"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with Catalog(home / "catalog") as catalog:
        async with Transports() as transports, trio.open_nursery() as nursery:
            filesystem: FileSystem
            cache = Cache(
                directory,
                memory=64 << 20,
                spill_threshold=1 << 20,
                size=None,
                ttl=3600.0,
                is_kept=lambda stream_id: filesystem.is_kept(stream_id),
            )
            filesystem = FileSystem(
                catalog, cache, nursery, make_source=lambda s: make_source(s, transports), read_ahead=1 << 20
            )
            nursery.start_soon(cache.run)
            try:
                filesystem.load()
                if specs:
                    await filesystem.add(specs, probe=False)
                with trio.fail_after(60):
                    yield filesystem
            finally:
                await filesystem.aclose()
                nursery.cancel_scope.cancel()


async def read_all(filesystem: FileSystem, number: int) -> bytes:
    got = bytearray()
    while piece := await filesystem.read(number, len(got), 131_072):
        got += piece
    return bytes(got)


def attribute(filesystem: FileSystem, name: str) -> str | None:
    inode = filesystem.lookup(1, b"s").inode
    try:
        return filesystem.get_attribute(inode, f"user.streamfs.{name}").decode()
    except NoAttribute:
        return None


@every_decoder
@pytest.mark.parametrize("kind", ["command", "file"])
async def test_a_file_shows_decoded_bytes_and_their_digest(name: str, kind: str, tmp_path: Path) -> None:
    path = stored(tmp_path, PACKED[name])
    source: AnySource = cat(path) if kind == "command" else UrlSource(path.as_uri())
    async with a_filesystem(tmp_path / "home", spec(source, name, "digest")) as filesystem:
        opened = await filesystem.open_named("s")
        assert opened.direct
        assert bytes(await filesystem.read(opened.handle, 1_000_000, 1000)) == CONTENT[1_000_000:1_001_000]
        assert await read_all(filesystem, opened.handle) == CONTENT
        assert (attribute(filesystem, "sha256"), attribute(filesystem, "size")) == (SHA256, str(len(CONTENT)))
        filesystem.release(opened.handle)


async def test_the_digest_is_not_shown_before_everything_is_there(tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    path = stored(tmp_path, CONTENT)
    waits = f"until [ -e {shlex.quote(str(go_on))} ]; do sleep 0.05; done"
    async with a_filesystem(tmp_path / "home", spec(cat(path, waits), "digest")) as filesystem:
        opened = await filesystem.open_named("s")
        last = bytes(await filesystem.read(opened.handle, len(CONTENT) - 5, 5))
        assert (last, attribute(filesystem, "sha256")) == (CONTENT[-5:], None)
        go_on.touch()
        assert await read_all(filesystem, opened.handle) == CONTENT
        assert attribute(filesystem, "sha256") == SHA256
        filesystem.release(opened.handle)


async def test_a_persisted_file_keeps_its_digest_over_a_restart(tmp_path: Path) -> None:
    path = stored(tmp_path, PACKED["gunzip"])
    home = tmp_path / "home"
    async with a_filesystem(home, spec(cat(path), "gunzip", "digest")) as filesystem:
        await filesystem.persist("s", True)
        opened = await filesystem.open_named("s")
        assert await read_all(filesystem, opened.handle) == CONTENT
        await until(lambda: attribute(filesystem, "persisted_path") is not None)
        filesystem.release(opened.handle)
    path.unlink()
    async with a_filesystem(home) as filesystem:
        opened = await filesystem.open_named("s")
        assert await read_all(filesystem, opened.handle) == CONTENT
        assert attribute(filesystem, "sha256") == SHA256
        kept = attribute(filesystem, "persisted_path")
        assert kept is not None and hashlib.sha256(await trio.Path(kept).read_bytes()).hexdigest() == SHA256
        filesystem.release(opened.handle)


async def test_damage_gives_an_error_every_time_and_leaves_what_came_before(tmp_path: Path) -> None:
    path = stored(tmp_path, PACKED["gunzip"] + b"damage")
    source_spec = spec(cat(path), "gunzip", "digest")
    async with a_filesystem(tmp_path / "home", source_spec) as filesystem:
        opened = await filesystem.open_named("s")
        assert bytes(await filesystem.read(opened.handle, 0, len(CONTENT))) == CONTENT
        for _ in range(3):
            with pytest.raises(SourceFailed, match="gzip"):
                await filesystem.read(opened.handle, len(CONTENT), 1)
        assert bytes(await filesystem.read(opened.handle, 500_000, 10)) == CONTENT[500_000:500_010]
        assert attribute(filesystem, "sha256") is None
        filesystem.release(opened.handle)


async def test_a_declared_size_is_that_of_the_output(tmp_path: Path) -> None:
    path = stored(tmp_path, PACKED["gunzip"])
    for size in (len(CONTENT), len(CONTENT) + 1):
        source_spec = spec(UrlSource(path.as_uri()), "gunzip", size=size)
        async with a_filesystem(tmp_path / f"home-{size}", source_spec) as filesystem:
            opened = await filesystem.open_named("s")
            assert filesystem.size_of(opened.handle) == size
            if size == len(CONTENT):
                assert await read_all(filesystem, opened.handle) == CONTENT
            else:
                with pytest.raises(SourceFailed):
                    await read_all(filesystem, opened.handle)
            filesystem.release(opened.handle)


async def test_a_new_version_behind_a_transform_is_told_apart(tmp_path: Path) -> None:
    path = stored(tmp_path, gzip.compress(b"old content"))
    async with a_filesystem(tmp_path / "home", spec(UrlSource(path.as_uri()), "gunzip")) as filesystem:
        old = await filesystem.open_named("s")
        assert await read_all(filesystem, old.handle) == b"old content"
        filesystem.release(old.handle)
        path.write_bytes(gzip.compress(b"the newer content"))
        new = await filesystem.open_named("s")
        assert await read_all(filesystem, new.handle) == b"the newer content"
        filesystem.release(new.handle)


# Over HTTP


class Radio:
    """An HTTP/1.0 server on loopback. With `metaint`, whoever asks for metadata gets it, at this distance."""

    def __init__(self, content: bytes, metaint: int | None = None, status: bytes = b"ICY 200 OK") -> None:
        self.content = content
        self.metaint = metaint
        self.status = status
        self.titles: dict[int, str] = {}  # by number of the block
        self.heads: list[str] = []
        self.hold_at: int | None = None  # block before which the server waits for `go_on`
        self.go_on = trio.Event()

    async def serve(self, stream: trio.SocketStream) -> None:
        head = b""
        try:
            while not head.endswith(b"\r\n\r\n"):
                received = await stream.receive_some()
                if not received:
                    return
                head += received
            self.heads.append(head.decode("latin-1").lower())
            await self._reply(stream, "icy-metadata: 1\r\n" in self.heads[-1])
        except trio.BrokenResourceError:
            return  # the other side may leave at any time
        finally:
            await trio.aclose_forcefully(stream)

    async def _reply(self, stream: trio.SocketStream, asked: bool) -> None:
        kind = b"\r\nContent-Type: audio/mpeg\r\n"
        if not (asked and self.metaint):
            length = b"Content-Length: %d\r\n\r\n" % len(self.content)
            await stream.send_all(b"HTTP/1.1 200 OK" + kind + length + self.content)
            return
        await stream.send_all(self.status + kind + b"icy-metaint: %d\r\n\r\n" % self.metaint)
        for number, start in enumerate(range(0, len(self.content), self.metaint)):
            if number == self.hold_at:
                await self.go_on.wait()
            sound = self.content[start : start + self.metaint]
            title = self.titles.get(number)
            text = b"" if title is None else f"StreamTitle='{title}';".encode()
            text += bytes(-len(text) % 16)
            block = bytes([len(text) // 16]) + text if len(sound) == self.metaint else b""
            await stream.send_all(sound + block)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Gives its URL."""
        async with trio.open_nursery() as nursery:
            serve: Callable[..., Awaitable[None]] = partial(trio.serve_tcp, self.serve, 0, host="127.0.0.1")
            listeners = await nursery.start(serve)
            yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/radio"
            nursery.cancel_scope.cancel()


@pytest.fixture(params=["plain", "curl"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("STREAMFS_TRANSPORT", request.param)
    return str(request.param)


SOUND = random.Random(5).randbytes(100_003)


@pytest.mark.parametrize("status", [b"ICY 200 OK", b"HTTP/1.0 200 OK"])
async def test_radio_metadata_becomes_the_title_and_is_not_in_the_bytes(
    transport: str, status: bytes, tmp_path: Path
) -> None:
    radio = Radio(SOUND, 8000, status)
    radio.titles = {0: "Ärtist - First", 3: "Second's"}
    radio.hold_at = 3
    async with (
        radio.running() as url,
        a_filesystem(tmp_path / "home", spec(UrlSource(url), "icy", "digest")) as filesystem,
    ):
        opened = await filesystem.open_named("s")
        assert bytes(await filesystem.read(opened.handle, 0, 24_000)) == SOUND[:24_000]
        assert attribute(filesystem, "title") == "Ärtist - First"
        radio.go_on.set()
        assert await read_all(filesystem, opened.handle) == SOUND
        assert attribute(filesystem, "title") == "Second's"
        assert attribute(filesystem, "sha256") == hashlib.sha256(SOUND).hexdigest()
        assert attribute(filesystem, "end") == "unproven"
        mime = filesystem.get_attribute(filesystem.lookup(1, b"s").inode, "user.mime_type")
        assert mime == b"audio/mpeg"
        filesystem.release(opened.handle)
    assert len(radio.heads) == 1


async def test_bytes_of_a_server_without_metadata_pass_unchanged(transport: str, tmp_path: Path) -> None:
    radio = Radio(SOUND)
    async with radio.running() as url, a_filesystem(tmp_path / "home", spec(UrlSource(url), "icy")) as filesystem:
        opened = await filesystem.open_named("s")
        assert await read_all(filesystem, opened.handle) == SOUND
        assert (attribute(filesystem, "title"), attribute(filesystem, "end")) == (None, None)
        filesystem.release(opened.handle)
    assert "icy-metadata: 1" in radio.heads[0]


async def test_metadata_is_asked_for_only_where_it_is_taken_out(transport: str, tmp_path: Path) -> None:
    radio = Radio(SOUND, 8000)
    async with radio.running() as url, a_filesystem(tmp_path / "home", spec(UrlSource(url))) as filesystem:
        opened = await filesystem.open_named("s")
        assert await read_all(filesystem, opened.handle) == SOUND
        filesystem.release(opened.handle)
    assert all("icy-metadata" not in head for head in radio.heads)


async def test_a_compressed_file_is_decoded_from_http(transport: str, tmp_path: Path) -> None:
    radio = Radio(PACKED["unzstd"])
    source_spec = spec(CommandSource(("true",)), "unzstd", "digest")
    async with radio.running() as url:
        source_spec = msgspec.structs.replace(source_spec, source=UrlSource(url))
        async with a_filesystem(tmp_path / "home", source_spec) as filesystem:
            opened = await filesystem.open_named("s")
            assert await read_all(filesystem, opened.handle) == CONTENT
            assert attribute(filesystem, "sha256") == SHA256
            filesystem.release(opened.handle)


async def test_metadata_that_moves_in_a_second_reply_is_another_version(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks; the server, asked again, now mixes metadata in, where there was none before."""
    monkeypatch.setattr("streamfs.sources.attempts.BACKOFF_FIRST", 0.002)

    class Turncoat(Radio):
        async def _reply(self, stream: trio.SocketStream, asked: bool) -> None:
            if len(self.heads) == 1:
                length = b"Content-Length: %d\r\n\r\n" % len(self.content)
                await stream.send_all(b"HTTP/1.1 200 OK\r\n" + length + self.content[:50_000])
            else:
                await super()._reply(stream, asked)

    radio = Turncoat(SOUND, 8000, b"HTTP/1.0 200 OK")
    async with radio.running() as url, Transports() as transports:
        got, error = await collect(make_source(spec(UrlSource(url), "icy"), transports))
    assert SOUND.startswith(got) and isinstance(error, SourceChanged)
    assert len(radio.heads) == 2
