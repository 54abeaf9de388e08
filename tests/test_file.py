"""What is particular to file URLs; what they share with every source is in test_source_contract.py."""

from __future__ import annotations

import errno
import gc
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from streamfs.errors import Closed, SourceChanged, SourceFailed, SourceStalled
from streamfs.sources.base import Facts
from streamfs.sources.file import DeviceBody, FileBody, FileSource
from streamfs.spec import StreamOptions, StreamSpec, UrlSource


def source(url: str | Path, stall_timeout: float | None = 5.0) -> FileSource:
    options = StreamOptions(stall_timeout=stall_timeout)
    text = url.as_uri() if isinstance(url, Path) else url
    return FileSource(StreamSpec(name="s", source=UrlSource(text), options=options))


@asynccontextmanager
async def opened(url: str | Path, start: int = 0, stop: int | None = None) -> AsyncIterator[FileBody | DeviceBody]:
    body = await source(url).open(start, stop, None)
    try:
        yield body
    finally:
        await body.aclose()


async def some(body: FileBody | DeviceBody, size: int = 1 << 16) -> bytes:
    room = bytearray(size)
    return bytes(room[: await body.receive_into(memoryview(room))])


async def everything(body: FileBody | DeviceBody) -> bytes:
    parts = []
    while part := await some(body):
        parts.append(part)
    return b"".join(parts)


def open_descriptors() -> list[str]:
    gc.collect()  # what earlier tests left to the collector must not go in between
    return sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208


# --- which file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [b"a b", b"100%", b"what?#;x=1", b"\xff\xfe", "käse".encode(), b"data:,x", b"a\nb"])
async def test_a_path_is_percent_decoded(name: bytes, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(b"content")
    async with opened(path) as body:
        assert await everything(body) == b"content"
    async with opened(path.as_uri().replace("file://", "FILE://localhost")) as body:
        assert await everything(body) == b"content"


@pytest.fixture
def socket_path(tmp_path: Path) -> Iterator[Path]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        yield tmp_path / "socket"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file:///no/such/file", "No such file"),
        ("file:///etc", "is a directory"),
        ("file:///etc/passwd/x", "Not a directory"),
        ("file:///etc/passwd?x=1", "%3F"),
        ("file:///etc/passwd#x", "%23"),
        ("file:///etc/%00", "NUL"),
        ("file://otherhost/etc/passwd", "ABSOLUTE"),
        ("http:///etc/passwd", "ABSOLUTE"),
    ],
)
async def test_what_cannot_be_opened_says_why_in_one_line(url: str, says: str) -> None:
    before = open_descriptors()
    for use in (lambda: source(url).open(0, None, None), source(url).probe):
        with pytest.raises(SourceFailed, match=says) as caught:
            await use()
        assert "\n" not in str(caught.value)
    assert open_descriptors() == before


async def test_a_socket_is_refused(socket_path: Path) -> None:
    with pytest.raises(SourceFailed, match="is a socket"):
        await source(socket_path).open(0, None, None)


@pytest.mark.parametrize(
    ("name", "mime"),
    [
        ("a.mp3", "audio/mpeg"),
        ("a.tar.gz", "application/gzip"),
        ("a.txt.xz", "application/x-xz"),
        ("a.txt.Z", "application/octet-stream"),
        ("data:x,y.mp4", "video/mp4"),
        ("README", None),
    ],
)
async def test_the_type_is_told_by_the_name(name: str, mime: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert (await source(tmp_path / name).probe()).mime == mime


async def test_an_empty_file_has_a_proven_end_at_once(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    async with opened(tmp_path / "f") as body:
        assert body.facts.size == 0
        assert await some(body) == b"" and body.end_proven


async def test_a_closed_body_gives_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    for path in (tmp_path / "f", Path("/dev/zero")):
        body = await source(path).open(0, None, None)
        await body.aclose()
        with pytest.raises(Closed):
            await some(body)


async def test_offsets_go_beyond_32_bits(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(5 << 40)
        os.pwrite(file.fileno(), b"far out", 4 << 40)
    async with opened(tmp_path / "sparse", (4 << 40) - 1, (4 << 40) + 8) as body:
        assert await everything(body) == b"\0far out\0"


# --- which version -------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, 1000)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rewrite_keeping_size_and_time(path: Path) -> None:
    times = path.stat()
    path.write_bytes(b"B" * times.st_size)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(b"B" * path.stat().st_size)
    other.rename(path)


CHANGES = pytest.mark.parametrize("change", [truncate, append, rewrite_keeping_size_and_time, replace])


@CHANGES
@pytest.mark.parametrize("cached", [True, False])
async def test_a_change_while_reading_is_an_error_and_never_bytes(change, cached: bool, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "f"
    path.write_bytes(b"A" * 500_000)
    async with opened(path) as body:
        assert isinstance(body, FileBody)
        body._cached_reads = cached
        assert await some(body) == b"A" * 65536
        change(path)
        with pytest.raises(SourceChanged, match="changed while it was read"):
            await some(body)


@CHANGES
async def test_a_change_after_the_last_byte_is_noticed_before_the_end(change, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "f"
    path.write_bytes(b"A" * 5000)
    async with opened(path) as body:
        assert await some(body) == b"A" * 5000
        change(path)
        with pytest.raises(SourceChanged):
            await some(body)


@CHANGES
async def test_a_change_between_openings_is_noticed(change, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "f"
    path.write_bytes(b"A" * 5000)
    async with opened(path) as body:
        facts = body.facts
    change(path)
    before = open_descriptors()
    with pytest.raises(SourceChanged, match="not the file it was"):
        await source(path).open(10, None, facts)
    assert open_descriptors() == before


async def test_a_change_right_after_opening_is_noticed(tmp_path: Path) -> None:
    """File times advance in steps: a body must not trust times that the present step may give again."""
    path = tmp_path / "f"
    for _ in range(20):
        path.write_bytes(b"A" * 5000)
        async with opened(path) as body:
            with path.open("r+b") as file:
                file.write(b"B" * 5000)
            with pytest.raises(SourceChanged):
                await some(body)


# --- files without a size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/proc/self/status", "/sys/kernel/mm/transparent_hugepage/enabled"])
async def test_what_misstates_its_size_is_one_way_and_whole(path: str) -> None:
    async with opened(Path(path), 10) as body:
        assert body.facts == Facts() and body.start == 0
        content = await everything(body)
        assert content and content.endswith(b"\n") and content.count(b"\0") == 0
        assert body.end_proven


async def test_a_device_gives_what_it_has() -> None:
    async with opened(Path("/dev/zero")) as body:
        assert await some(body, 5000) == bytes(5000)
        assert not body.end_proven
    async with opened(Path("/dev/null")) as body:
        assert await some(body) == b""
        assert not body.end_proven


async def test_a_device_of_which_a_read_was_given_up_fails_rather_than_to_skip_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with opened(Path("/dev/zero")) as body:
        assert isinstance(body, DeviceBody)
        hang = Hang(monkeypatch, "read")
        hang.only_for = body._descriptor._fd
        with trio.move_on_after(0.1) as scope:
            await some(body, 100)
        assert scope.cancelled_caught
        hang.release.set()
        with pytest.raises(SourceFailed, match="given up"):
            await some(body, 100)


async def test_a_fifo_waits_for_its_writer_and_ends_unproven_with_it(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with opened(fifo) as body:
        with trio.move_on_after(0.05) as scope:
            await some(body)
        assert scope.cancelled_caught, "no writer yet is not the end"
        content = os.urandom(500_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, fifo.write_bytes, content)
            assert await everything(body) == content
        assert not body.end_proven


async def test_probing_a_fifo_does_not_open_it(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with trio.fail_after(5):
        assert await source(fifo).probe() == Facts()


async def test_closing_wakes_a_read_that_waits_for_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = open_descriptors()
    body = await source(tmp_path / "fifo").open(0, None, None)

    async def read() -> None:
        with pytest.raises(Closed):
            await some(body)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        await body.aclose()
    assert open_descriptors() == before


# --- file systems that make one wait -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EOPNOTSUPP])
async def test_bytes_that_are_not_in_the_page_cache_come_by_a_thread(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(3_000_001)
    (tmp_path / "f").write_bytes(content)

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", refuse)
    async with opened(tmp_path / "f", 5) as body:
        assert await everything(body) == content[5:]


async def test_a_read_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"x" * 100)

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", refuse)
    async with opened(tmp_path / "f") as body:
        with pytest.raises(SourceFailed, match="Input/output error"):
            await some(body)


class Hang:
    """Makes one of the system calls wait until the test releases it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        self.release = threading.Event()
        self.closed = threading.Event()
        real, close = getattr(os, call), os.close
        self.only_for: object = None

        def hanging(first: object, *rest: object) -> object:
            if first == self.only_for:
                self.release.wait(60)
            return real(first, *rest)

        def closing(fd: int) -> None:
            close(fd)
            self.closed.set()

        monkeypatch.setattr(os, call, hanging)
        monkeypatch.setattr(os, "close", closing)


async def test_a_hanging_read_stalls_alone_and_its_thread_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hangs").write_bytes(b"x" * 10_000)
    (tmp_path / "works").write_bytes(b"y" * 10_000)
    before = open_descriptors()
    body = await source(tmp_path / "hangs", stall_timeout=0.1).open(0, None, None)
    assert isinstance(body, FileBody)
    body._cached_reads = False
    hang = Hang(monkeypatch, "pread")
    hang.only_for = body._descriptor._fd
    view = memoryview(bytearray(10_000))
    with pytest.raises(SourceStalled):
        await body.receive_into(view)
    async with opened(tmp_path / "works") as other:
        assert isinstance(other, FileBody)
        other._cached_reads = False
        assert await everything(other) == b"y" * 10_000
    hang.closed.clear()
    await body.aclose()
    assert open_descriptors() != before, "the descriptor stays while the thread may use it"
    hang.release.set()
    assert await trio.to_thread.run_sync(hang.closed.wait, 5)
    assert open_descriptors() == before
    assert bytes(view) == bytes(10_000)


@pytest.mark.parametrize("gives_up", ["stall", "cancel"])
async def test_a_hanging_open_can_be_given_up_and_leaks_nothing(
    gives_up: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hangs"
    path.write_bytes(b"x" * 10_000)
    before = open_descriptors()
    hang = Hang(monkeypatch, "open")
    hang.only_for = str(path)
    if gives_up == "stall":
        with pytest.raises(SourceStalled, match="opening"):
            await source(path, stall_timeout=0.1).open(0, None, None)
    else:
        with trio.move_on_after(0.1) as scope:
            await source(path).open(0, None, None)
        assert scope.cancelled_caught
    hang.release.set()
    assert await trio.to_thread.run_sync(hang.closed.wait, 5)
    assert open_descriptors() == before
