"""Reads here and there of a server that answers on the spot, and of one that does not. The server has a thread of its
own, as nothing else of the event loop runs while its reply is waited for."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from streamfs import generation
from streamfs.cache import Cache
from streamfs.engine.fetches import MANY_JUMPS
from streamfs.entries import Entry
from streamfs.errors import SourceChanged
from streamfs.sources import prompt
from streamfs.sources.http import HttpSource
from streamfs.sources.prompt import LOOK_AGAIN, MISSES, NEAR, Patience
from streamfs.sources.transports import Transports
from streamfs.spec import StreamOptions, StreamSpec, UrlSource
from streamfs.stream import Handle, Stream
from tests.fakes import WAIT, Gate, named_bytes
from tests.sourcefakes import KIB, MIB, a_house

SIZE = 32 * MIB
AT = 3 * MIB + 4096
Reply = Callable[[socket.socket, bytes, bytes], None]
"""Called with the connection, the head and the body; it sends what it likes."""


class Near:
    """A server of ranges of one file. `replies`: how the next requests are answered; the others are as they should."""

    def __init__(self) -> None:
        self.content = named_bytes("near", 1, SIZE)
        self.tag = '"one"'
        self.asked: list[tuple[int, int]] = []
        self.connections = 0
        self.replies: deque[Reply] = deque()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/file"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the end
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                self._open.add(connection)
                thread = threading.Thread(target=self._serve, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, contextlib.suppress(OSError):
            while request := self._request(connection):
                found = re.search(rb"Range: bytes=(\d+)-(\d*)", request)
                assert found is not None
                start, stop = int(found[1]), int(found[2]) + 1 if found[2] else SIZE
                stop = min(stop, SIZE)
                self.asked.append((start, stop))
                lines = [
                    "HTTP/1.1 206 Partial Content",
                    f"Content-Length: {stop - start}",
                    f"Content-Range: bytes {start}-{stop - 1}/{SIZE}",
                    f"ETag: {self.tag}",
                ]
                head = "\r\n".join([*lines, "", ""]).encode()
                reply = self.replies.popleft() if self.replies else whole
                reply(connection, head, self.content[start:stop])

    @staticmethod
    def _request(connection: socket.socket) -> bytes:
        seen = b""
        while not seen.endswith(b"\r\n\r\n"):
            got = connection.recv(65536)
            if not got:
                return b""
            seen += got
        return seen

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT)
            assert not thread.is_alive()


def whole(connection: socket.socket, head: bytes, body: bytes) -> None:
    connection.sendall(head + body)


def in_pieces(connection: socket.socket, head: bytes, body: bytes) -> None:
    for piece in (head[:20], head[20:], body[:1], body[1:]):
        connection.sendall(piece)


def after(gate: Gate, cut: int | None = None) -> Reply:
    """Nothing, or all up to byte `cut` of the body, until the gate opens; then the rest."""

    def reply(connection: socket.socket, head: bytes, body: bytes) -> None:
        first = b"" if cut is None else head + body[:cut]
        connection.sendall(first)
        gate.reached.set()
        assert gate.opened.wait(WAIT)
        connection.sendall((head + body)[len(first) :])

    return reply


def broken_off(cut: int | None = None) -> Reply:
    """The connection ends without a word, or after byte `cut` of the body."""

    def reply(connection: socket.socket, head: bytes, body: bytes) -> None:
        if cut is not None:
            connection.sendall(head + body[:cut])
        connection.shutdown(socket.SHUT_RDWR)

    return reply


def busy(connection: socket.socket, head: bytes, body: bytes) -> None:
    connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")


@pytest.fixture
def near() -> Iterator[Near]:
    made = Near()
    yield made
    made.close()


@pytest.fixture
def moment(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how long a reply is waited for: WAIT for one that is sure to come, or little for one that is not."""
    monkeypatch.setattr(prompt, "NEAR", WAIT)  # however busy the machine is
    monkeypatch.setattr(prompt, "SEVERAL", True)
    return lambda seconds: monkeypatch.setattr(prompt, "MOMENT", seconds)


@asynccontextmanager
async def jumping(near: Near, directory: Path) -> AsyncIterator[Handle]:
    """A reader that has read at so many places that it is taken to read here and there."""
    async with a_house(directory) as house, Transports() as transports:
        spec = StreamSpec(
            name="near", source=UrlSource(near.url), options=StreamOptions(probe=False, stall_timeout=WAIT)
        )
        entry = Entry(id=2, spec=spec, added=0.0, persist=False)
        stream = Stream(entry, HttpSource(spec, transports), house.context)
        house.streams.append(stream)
        handle = await stream.open()
        for place in range(MANY_JUMPS + 1):
            offset = (8 + 2 * place) * MIB
            assert bytes(await handle.read(offset, KIB)) == near.content[offset : offset + KIB]
        # A request more frees the place of a fetch that rests, so that there is one for those that follow.
        offset = SIZE - 64 * KIB
        assert bytes(await handle.read(offset, KIB)) == near.content[offset : offset + KIB]
        near.asked.clear()
        with trio.fail_after(WAIT):
            yield handle
        handle.close()


def read_now(handle: Handle, near: Near, offset: int, size: int) -> bool:
    """Whether the bytes come at once; they must be the right ones."""
    found = handle.read_now(offset, size)
    assert found is None or found == near.content[offset : offset + size]
    return found is not None


async def test_a_near_server_is_read_here_and_there_without_a_turn_of_the_loop(
    near: Near, tmp_path: Path, moment: Callable[[float], None]
) -> None:
    moment(WAIT)
    async with jumping(near, tmp_path) as handle:
        before = near.connections
        places = [(AT + number * 300 * KIB, size) for number, size in enumerate([1, 4096, 65536, 100 * KIB, 4096])]
        near.replies.extend([whole, in_pieces, in_pieces])
        assert all(read_now(handle, near, offset, size) for offset, size in places)
        assert near.asked == [(offset, offset + size) for offset, size in places], "no more than what was asked"
        assert near.connections == before
        assert all(read_now(handle, near, offset, size) for offset, size in places)
        assert len(near.asked) == len(places), "bytes that are there are not asked for again"
        assert not handle.generation.fetching or handle.generation.state == "paused"


@pytest.mark.parametrize("cut", [None, 0, 1, 3000])
async def test_what_does_not_come_on_the_spot_is_waited_for_over_the_same_request(
    cut: int | None, near: Near, tmp_path: Path, moment: Callable[[float], None]
) -> None:
    moment(0.02)
    async with jumping(near, tmp_path) as handle:
        gate = Gate()
        near.replies.append(after(gate, cut))
        assert not read_now(handle, near, AT, 4096)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, gate.await_reached)
        gate.open()
        assert bytes(await handle.read(AT, 4096)) == near.content[AT : AT + 4096]
        assert near.asked == [(AT, AT + 4096)]


async def test_a_reader_that_gives_up_leaves_what_was_begun_for_the_next(
    near: Near, tmp_path: Path, moment: Callable[[float], None]
) -> None:
    moment(0.02)
    async with jumping(near, tmp_path) as handle:
        gate = Gate()
        near.replies.append(after(gate, 100))
        assert not read_now(handle, near, AT, 4096)
        with trio.move_on_after(0):
            await handle.read(AT, 4096)
        gate.open()
        assert bytes(await handle.read(AT, 4096)) == near.content[AT : AT + 4096]
        assert near.asked == [(AT, AT + 4096)]


async def test_the_end_comes_while_a_reply_is_still_due(
    near: Near, tmp_path: Path, moment: Callable[[float], None]
) -> None:
    """What is left over then `a_house` finds: a piece of memory, or a task that would not end."""
    moment(0.02)
    gate = Gate()
    async with jumping(near, tmp_path) as handle:
        near.replies.append(after(gate, 100))
        assert not read_now(handle, near, AT, 4096)
    gate.open()


@pytest.mark.parametrize("reply", [broken_off(), broken_off(0), broken_off(3000), busy])
async def test_a_server_that_fails_on_the_spot_is_asked_again_with_patience(
    reply: Reply, near: Near, tmp_path: Path, moment: Callable[[float], None]
) -> None:
    moment(WAIT)
    async with jumping(near, tmp_path) as handle:
        near.replies.append(reply)
        assert not read_now(handle, near, AT, 4096)
        assert bytes(await handle.read(AT, 4096)) == near.content[AT : AT + 4096]
        assert read_now(handle, near, AT + MIB, 4096), "and the next comes on the spot again"


async def test_another_version_is_never_mixed_in(near: Near, tmp_path: Path, moment: Callable[[float], None]) -> None:
    moment(WAIT)
    async with jumping(near, tmp_path) as handle:
        near.tag = '"two"'
        assert not read_now(handle, near, AT, 4096)
        with pytest.raises(SourceChanged):
            await handle.read(AT, 4096)


@pytest.mark.parametrize(
    "lie",
    [
        (b"206 Partial Content", b"200 OK"),
        (b"bytes %d-" % AT, b"bytes %d-" % (AT + 1)),
        (b"/%d" % SIZE, b"/%d" % (SIZE + 1)),
        (b"ETag", b"X-ETag"),
        (b"ETag", b"Content-Encoding: gzip\r\nETag"),
    ],
)
async def test_a_reply_that_is_not_quite_what_was_asked_is_not_believed(
    lie: tuple[bytes, bytes], near: Near, tmp_path: Path, moment: Callable[[float], None]
) -> None:
    def lying(connection: socket.socket, head: bytes, body: bytes) -> None:
        assert head.replace(*lie) != head
        connection.sendall(head.replace(*lie) + bytes(len(body)))

    moment(WAIT)
    async with jumping(near, tmp_path) as handle:
        near.replies.append(lying)
        assert not read_now(handle, near, AT, 4096)
        assert bytes(await handle.read(AT, 4096)) == near.content[AT : AT + 4096]


async def test_a_server_that_is_far_is_not_waited_for_on_the_spot(
    near: Near, tmp_path: Path, moment: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    moment(WAIT)
    monkeypatch.setattr(prompt, "NEAR", 0.0)
    async with jumping(near, tmp_path) as handle:
        assert not read_now(handle, near, AT, 4096)
        assert near.asked == []
        assert bytes(await handle.read(AT, 4096)) == near.content[AT : AT + 4096]


async def test_a_large_read_and_one_that_goes_on_are_left_to_a_fetch(
    near: Near, tmp_path: Path, moment: Callable[[float], None]
) -> None:
    moment(WAIT)
    async with jumping(near, tmp_path) as handle:
        assert not read_now(handle, near, AT, 129 * KIB)
        assert read_now(handle, near, AT + MIB, 4096)
        assert not read_now(handle, near, AT + MIB + 4096, 4096), "its reader reads on, so more than that is brought"
        assert bytes(await handle.read(AT + MIB + 4096, 4096)) == near.content[AT + MIB + 4096 :][:4096]


async def test_after_the_last_close_the_cache_is_told_that_nothing_is_fetched_any_more(
    near: Near, tmp_path: Path, moment: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    moment(WAIT)
    monkeypatch.setattr(generation, "IDLE", 0.0)
    rested: list[object] = []
    async with jumping(near, tmp_path) as handle:
        while handle.generation.fetching:
            await handle.generation._fetch_ended.wait()
        assert read_now(handle, near, AT, 4096)
        monkeypatch.setattr(Cache, "rests", lambda _, told: rested.append(told))
        told = handle.generation
        handle.close()
        assert rested == [told]


def test_patience_is_for_near_servers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "SEVERAL", True)
    patience = Patience()
    assert not patience.worth(), "nothing is known yet"
    patience.answered(2 * NEAR)
    assert not patience.worth()
    patience.answered(NEAR / 2)
    assert patience.worth()


def test_there_is_no_patience_with_one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "SEVERAL", False)
    patience = Patience()
    patience.answered(NEAR / 2)
    assert not patience.worth()


def test_patience_ends_after_misses_and_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "SEVERAL", True)
    patience = Patience()
    patience.answered(NEAR / 2)
    for _ in range(MISSES - 1):
        assert patience.worth()
        patience.tried(came=False)
    patience.tried(came=True)
    for _ in range(MISSES):
        assert patience.worth()
        patience.tried(came=False)
    skipped = [patience.worth() for _ in range(LOOK_AGAIN)]
    assert skipped.index(True) == LOOK_AGAIN - MISSES
