"""What every source promises (streamfs.sources.base), checked of each making of it.

A making is offered in up to three behaviours: "whole" gives its content and ends, "broken" gives part of it and then
breaks, "silent" gives part of it and then nothing more. To put a further source under the contract, write its offers
and add them to WHOLE, BROKEN and SILENT.
"""

from __future__ import annotations

import bz2
import contextlib
import lzma
import os
import random
import re
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import msgspec
import pytest
import trio

from streamfs.errors import SourceChanged, SourceFailed, SourceStalled, StreamfsError
from streamfs.sources import Transports, make_source
from streamfs.sources.base import Body, Facts, Source
from streamfs.sources.command import ProcessSource
from streamfs.sources.file import FileSource
from streamfs.spec import CommandSource, ShellSource, StreamOptions, StreamSpec, UrlSource

CONTENT = random.Random(20).randbytes(3_000_017)
GIVEN = 200_003  # bytes of CONTENT that the broken and the silent give
PATIENCE = StreamOptions(stall_timeout=1.0)  # in which a busy machine answers


@dataclass(frozen=True)
class Subject:
    source: Source
    ranged: bool
    """Bodies may start anywhere, the size is known, and versions can be told apart."""
    break_it: Callable[[], None] = lambda: None
    """Makes a "broken" one break, after the first bytes have been read."""


Making = Literal["plain", "curl"]
Kind = Literal["ranged", "length", "chunked"]
Offer = Callable[[Path], AbstractAsyncContextManager[Subject]]


def _content_file(folder: Path, length: int = len(CONTENT)) -> Path:
    path = folder / "content"
    path.write_bytes(CONTENT[:length])
    return path


@asynccontextmanager
async def command(folder: Path) -> AsyncIterator[Subject]:
    argv = ("cat", str(_content_file(folder)))
    yield Subject(ProcessSource(StreamSpec(name="s", source=CommandSource(argv))), ranged=False)


def shell(after: str, length: int = len(CONTENT)) -> Offer:
    @asynccontextmanager
    async def offer(folder: Path) -> AsyncIterator[Subject]:
        _content_file(folder, length)
        options = msgspec.structs.replace(PATIENCE, cwd=str(folder))
        spec = StreamSpec(name="s", source=ShellSource(f"cat content | cat; {after}"), options=options)
        yield Subject(ProcessSource(spec), ranged=False)

    return offer


@asynccontextmanager
async def file(folder: Path) -> AsyncIterator[Subject]:
    path = _content_file(folder)
    source = FileSource(StreamSpec(name="s", source=UrlSource(path.as_uri()), options=PATIENCE))
    yield Subject(source, ranged=True, break_it=lambda: os.truncate(path, GIVEN))


@asynccontextmanager
async def fifo_with_a_silent_writer(folder: Path) -> AsyncIterator[Subject]:
    path = folder / "fifo"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)  # both ends: opening needs no reader, and the writer stays
    try:
        os.write(writer, CONTENT[:4096])
        yield Subject(FileSource(StreamSpec(name="s", source=UrlSource(path.as_uri()), options=PATIENCE)), ranged=False)
    finally:
        os.close(writer)


def packed(transforms: tuple[str, ...], content: bytes, after: str | None = None) -> Offer:
    """CONTENT out of a stored file `content` that is packed; `after` it, a shell's output, where it is not a file's."""

    @asynccontextmanager
    async def offer(folder: Path) -> AsyncIterator[Subject]:
        path = folder / "packed"
        path.write_bytes(content)
        options = msgspec.structs.replace(PATIENCE, transforms=transforms, cwd=str(folder))
        made = UrlSource(path.as_uri()) if after is None else ShellSource(f"cat packed; {after}")
        async with Transports() as transports:
            source = make_source(StreamSpec(name="s", source=made, options=options), transports)
            yield Subject(source, ranged=False)
            await source.aclose()

    return offer


def gzip_begun() -> bytes:
    """A gzip file that breaks off after GIVEN bytes of CONTENT."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return packer.compress(CONTENT[:GIVEN]) + packer.flush(zlib.Z_SYNC_FLUSH)


class Origin:
    """A small HTTP/1.1 server of CONTENT on loopback. It speaks for one test; tests/faults has the one that lies."""

    def __init__(self, kind: Kind, given: int, silent: bool) -> None:
        self._kind = kind
        self._given = given  # bytes of CONTENT that a reply gives before it breaks off or falls silent
        self._silent = silent
        self.gone = False  # 404 from now on

    async def serve(self, stream: trio.SocketStream) -> None:
        head = b""
        with contextlib.suppress(trio.BrokenResourceError):  # the other side may leave at any time
            while received := await stream.receive_some():
                head += received
                if head.endswith(b"\r\n\r\n"):
                    if not await self._reply(stream, head):
                        return
                    head = b""

    async def _reply(self, stream: trio.SocketStream, head: bytes) -> bool:
        """Answer one request; whether the connection goes on."""
        if self.gone:
            await stream.send_all(b"HTTP/1.1 404 Gone\r\nContent-Length: 0\r\n\r\n")
            return True
        asked = re.search(rb"\r\n[Rr]ange: bytes=(\d+)-(\d*)\r\n", head) if self._kind == "ranged" else None
        start = int(asked[1]) if asked else 0
        stop = min(int(asked[2]) + 1, len(CONTENT)) if asked and asked[2] else len(CONTENT)
        if start >= len(CONTENT):
            await stream.send_all(
                b"HTTP/1.1 416 No\r\nContent-Range: bytes */%d\r\nContent-Length: 0\r\n\r\n" % len(CONTENT)
            )
            return True
        lines = [b"HTTP/1.1 206 Part" if asked else b"HTTP/1.1 200 OK"]
        if asked:
            lines.append(b"Content-Range: bytes %d-%d/%d" % (start, stop - 1, len(CONTENT)))
        if self._kind == "ranged":
            lines += [b'ETag: "one"', b"Accept-Ranges: bytes"]
        lines.append(
            b"Transfer-Encoding: chunked" if self._kind == "chunked" else b"Content-Length: %d" % (stop - start)
        )
        await stream.send_all(b"\r\n".join(lines) + b"\r\n\r\n")
        content = CONTENT[start : min(stop, self._given)]
        for offset in range(0, len(content), 100_003):
            part = content[offset : offset + 100_003]
            await stream.send_all(b"%x\r\n%s\r\n" % (len(part), part) if self._kind == "chunked" else part)
        if stop > self._given:
            if self._silent:
                await trio.sleep_forever()
            self.gone = True
            return False
        if self._kind == "chunked":
            await stream.send_all(b"0\r\n\r\n")
        return True


def http(
    transport: Making,
    kind: Kind,
    given: int = len(CONTENT),
    *,
    silent: bool = False,
    transforms: tuple[str, ...] = (),
) -> Offer:
    @asynccontextmanager
    async def offer(folder: Path) -> AsyncIterator[Subject]:
        origin = Origin(kind, given, silent)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STREAMFS_TRANSPORT", transport)
            transports = Transports()
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, origin.serve, 0, host="127.0.0.1"))
            url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/content"
            options = msgspec.structs.replace(PATIENCE, transforms=transforms)
            source = make_source(StreamSpec(name="s", source=UrlSource(url), options=options), transports)
            async with transports:
                yield Subject(source, ranged=kind == "ranged" and not transforms)
                await source.aclose()
            nursery.cancel_scope.cancel()

    return offer


WHOLE: dict[str, Offer] = {"command": command, "shell": shell("true"), "file": file}
BROKEN: dict[str, Offer] = {"shell": shell("exit 3", GIVEN), "killed": shell("kill -9 $$", GIVEN), "file": file}
SILENT: dict[str, Offer] = {
    "shell": shell("exec sleep 1000", GIVEN),
    "shell without output": shell("exec >&-; exec sleep 1000", GIVEN),
    "fifo": fifo_with_a_silent_writer,
}
for _transport in get_args(Making):
    for _kind in get_args(Kind):
        WHOLE[f"{_transport}-{_kind}"] = http(_transport, _kind)
        BROKEN[f"{_transport}-{_kind}"] = http(_transport, _kind, GIVEN)
        SILENT[f"{_transport}-{_kind}"] = http(_transport, _kind, GIVEN, silent=True)
WHOLE |= {
    "gunzip": packed(("gunzip",), zlib.compress(CONTENT, 1, 31), "true"),
    "bunzip2 of a file": packed(("bunzip2",), bz2.compress(CONTENT, 1)),
    "unxz and digest": packed(("unxz", "digest"), lzma.compress(CONTENT, preset=0)),
    "digest of ranges": http("plain", "ranged", transforms=("digest",)),
}
BROKEN |= {
    "gunzip cut off": packed(("gunzip",), gzip_begun()),
    "gunzip of a command that fails": packed(("gunzip", "digest"), zlib.compress(CONTENT, 1, 31), "exit 3"),
    "digest of ranges": http("curl", "ranged", GIVEN, transforms=("digest",)),
}
SILENT |= {
    "gunzip": packed(("gunzip",), gzip_begun(), "exec sleep 1000"),
    "digest of chunks": http("plain", "chunked", GIVEN, silent=True, transforms=("digest",)),
}


def offered(offers: dict[str, Offer]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("offer", [pytest.param(offer, id=name) for name, offer in offers.items()])


async def receive(body: Body, view_size: int = 1 << 16, limit: int | None = None) -> bytes:
    """What `body` gives up to its end, or until `limit` bytes are there. Checks that no byte is written but those
    that are told."""
    received = bytearray()
    room = bytearray(view_size + 2)
    while limit is None or len(received) < limit:
        room[:] = b"\xa5" * len(room)
        view = memoryview(room)[1:-1]
        if limit is not None:
            view = view[: limit - len(received)]
        count = await body.receive_into(view)
        assert 0 <= count <= len(view)
        if count == 0:
            break
        received += view[:count]
        assert room[0] == 0xA5 and room[-1] == 0xA5, "bytes beside the view were written"
    return bytes(received)


@asynccontextmanager
async def opened(source: Source, start: int = 0, stop: int | None = None, expect: Facts | None = None):  # type: ignore[no-untyped-def]
    body = await source.open(start, stop, expect)
    try:
        yield body
    finally:
        await body.aclose()


def held_resources() -> tuple[set[str], set[str]]:
    """Open descriptors (by what they refer to) and child processes of this process."""
    descriptors = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            descriptors.add(f"{entry.name} {entry.readlink()}")
    children = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a worker thread that ends
            children.update((task / "children").read_text().split())
    return descriptors, children


async def check_that_nothing_is_left(offer: Offer, folder: Path, use: Callable[[Subject], Awaitable[None]]) -> None:
    """`use` holds no more at its end, with bodies, source and server closed, than at its beginning. Its first run,
    which may fill caches and start worker threads, does not count."""
    for run in ("first", "second"):
        before = held_resources()
        (folder / run).mkdir()
        async with offer(folder / run) as subject:
            await use(subject)
    assert held_resources() == before


# --- whole ---------------------------------------------------------------------------------------------------------


@offered(WHOLE)
async def test_gives_every_byte_and_a_proven_end(offer: Offer, tmp_path: Path) -> None:
    async with offer(tmp_path) as subject, opened(subject.source) as body:
        assert body.start == 0
        assert await receive(body) == CONTENT
        assert body.end_proven
        assert await body.receive_into(memoryview(bytearray(10))) == 0, "the end stays the end"


@offered(WHOLE)
async def test_fills_views_of_any_size(offer: Offer, tmp_path: Path) -> None:
    async with offer(tmp_path) as subject, opened(subject.source) as body:
        received = await receive(body, 1, limit=300)
        received += await receive(body, 7, limit=2100)
        received += await receive(body, 4099, limit=500_000)
        received += await receive(body, 5 << 20)
        assert received == CONTENT


@offered(WHOLE)
async def test_two_bodies_at_once_do_not_disturb_each_other(offer: Offer, tmp_path: Path) -> None:
    async with offer(tmp_path) as subject, opened(subject.source) as first, opened(subject.source) as second:
        parts: list[tuple[bytes, bytes]] = []
        while not parts or parts[-1] != (b"", b""):
            parts.append((await receive(first, 40_001, limit=40_001), await receive(second, 70_001, limit=70_001)))
        assert b"".join(part for part, _ in parts) == CONTENT
        assert b"".join(part for _, part in parts) == CONTENT


@offered(WHOLE)
async def test_a_body_from_the_middle_starts_there_or_says_that_it_starts_at_0(offer: Offer, tmp_path: Path) -> None:
    async with offer(tmp_path) as subject:
        for start, stop in [(0, 5), (1, 2), (5000, 6000), (len(CONTENT) - 1, None), (77, len(CONTENT) + 9)]:
            async with opened(subject.source, start, stop) as body:
                received = await receive(body)
                assert body.end_proven
                if subject.ranged:
                    assert (body.start, received) == (start, CONTENT[start:stop])
                else:
                    assert (body.start, received) == (0, CONTENT), "what is one-way goes on to the end"


@offered(WHOLE)
async def test_what_starts_past_the_end_fails_or_starts_at_0(offer: Offer, tmp_path: Path) -> None:
    async with offer(tmp_path) as subject:
        for start in (len(CONTENT), len(CONTENT) + 1000):
            if subject.ranged:
                with pytest.raises(SourceFailed):
                    await subject.source.open(start, None, None)
            else:
                async with opened(subject.source, start) as body:
                    assert body.start == 0


@offered(WHOLE)
async def test_facts_are_exact_and_agree_with_the_probe(offer: Offer, tmp_path: Path) -> None:
    async with offer(tmp_path) as subject:
        probed = await subject.source.probe()
        async with opened(subject.source) as body:
            assert body.facts.ranged == subject.ranged
            assert body.facts.size in ((len(CONTENT),) if subject.ranged else (len(CONTENT), None))
            assert not body.facts.ranged or body.facts.validator is not None
            if subject.ranged:
                assert probed == body.facts
            assert probed.size in (body.facts.size, None)


@offered(WHOLE)
async def test_a_version_is_continued_only_as_itself(offer: Offer, tmp_path: Path) -> None:
    async with offer(tmp_path) as subject:
        async with opened(subject.source) as body:
            facts = body.facts
        if subject.ranged:
            async with opened(subject.source, 1_000_000, None, facts) as body:
                assert await receive(body) == CONTENT[1_000_000:]
            other = replace(facts, validator=f"{facts.validator}-of-before")
            with pytest.raises(SourceChanged):
                await subject.source.open(1_000_000, None, other)
        else:
            # Versions cannot be told apart: refuse, or give all of it for whoever wants to compare.
            with contextlib.suppress(SourceChanged):
                async with opened(subject.source, 0, None, facts) as body:
                    assert (body.start, await receive(body)) == (0, CONTENT)


@offered(WHOLE)
async def test_a_fast_source_lets_other_tasks_in(offer: Offer, tmp_path: Path) -> None:
    async with offer(tmp_path) as subject, opened(subject.source) as body:
        await receive(body, 10, limit=10)
        with trio.CancelScope() as scope:
            scope.cancel()
            for _ in range(1000):
                assert await body.receive_into(memoryview(bytearray(1000)))
        assert scope.cancelled_caught


@offered(WHOLE)
async def test_a_body_may_be_closed_at_any_time_and_again(offer: Offer, tmp_path: Path) -> None:
    async with offer(tmp_path) as subject:
        for length in (0, 1000, len(CONTENT) + 1):
            body = await subject.source.open(0, None, None)
            assert await receive(body, 1000, limit=length) == CONTENT[:length]
            await body.aclose()
            await body.aclose()


@offered(WHOLE)
async def test_nothing_is_left_after_the_end(offer: Offer, tmp_path: Path) -> None:
    async def use(subject: Subject) -> None:
        async with opened(subject.source) as body:
            await receive(body)

    await check_that_nothing_is_left(offer, tmp_path, use)


# --- broken --------------------------------------------------------------------------------------------------------


@offered(BROKEN)
async def test_a_break_is_an_error_after_the_right_bytes_never_an_end(offer: Offer, tmp_path: Path) -> None:
    async with offer(tmp_path) as subject, opened(subject.source) as body:
        received = bytearray(await receive(body, 1000, limit=1000))
        subject.break_it()
        room = memoryview(bytearray(1 << 16))
        with pytest.raises((SourceFailed, SourceChanged)) as caught:
            while count := await body.receive_into(room):
                received += room[:count]
        assert CONTENT.startswith(received)
        assert not isinstance(caught.value, SourceStalled)
        assert "\n" not in str(caught.value)
        with pytest.raises(type(caught.value)):
            await body.receive_into(room)


@offered(BROKEN)
async def test_nothing_is_left_after_a_break(offer: Offer, tmp_path: Path) -> None:
    async def use(subject: Subject) -> None:
        async with opened(subject.source) as body:
            await receive(body, 1000, limit=1000)
            subject.break_it()
            with pytest.raises(StreamfsError):
                await receive(body)

    await check_that_nothing_is_left(offer, tmp_path, use)


# --- silent --------------------------------------------------------------------------------------------------------


@offered(SILENT)
async def test_silence_ends_in_a_stall_after_the_timeout(offer: Offer, tmp_path: Path) -> None:
    async with offer(tmp_path) as subject, opened(subject.source) as body:
        received = b""
        with trio.fail_after(10), pytest.raises(SourceStalled):
            while True:
                received += await receive(body, limit=1)  # the first byte, then what is there
                last_byte = trio.current_time()
                received += await receive(body, limit=len(CONTENT))
        assert CONTENT.startswith(received) and received
        assert trio.current_time() - last_byte >= 0.99
        with pytest.raises(SourceStalled):
            await body.receive_into(memoryview(bytearray(1)))


@offered(SILENT)
async def test_a_cancelled_read_leaves_nothing_behind(offer: Offer, tmp_path: Path) -> None:
    async def use(subject: Subject) -> None:
        with trio.CancelScope() as scope:
            async with opened(subject.source) as body:
                await receive(body, limit=4096)
                scope.deadline = trio.current_time() + 0.1
                await receive(body)
        assert scope.cancelled_caught

    await check_that_nothing_is_left(offer, tmp_path, use)
