"""Exchanges in a thread of their own: what stands still there holds up nobody here."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from streamfs.sources.apart import PIECE, PIECES, ApartTransport
from streamfs.sources.curl import CurlTransport
from streamfs.sources.transport import Ending, Request, Response, Transport, TransportError
from tests.fakes import WAIT, named_bytes
from tests.sourcefakes import until
from tests.test_curl_files import ScriptedFtp

URL = "ftp://there/file"
AT_A_TIME = 100_000
"""Bytes that come into a piece at most."""


class Far:
    """What is on the other side: a body that is given in pieces, and ways to stand still."""

    def __init__(
        self, body: bytes = b"", *, fails: TransportError | None = None, breaks: TransportError | None = None
    ) -> None:
        """`fails` in place of a response, `breaks` in place of the body's end."""
        self.body = body
        self.fails = fails
        self.breaks = breaks
        self.given = 0
        self.stuck = threading.Event()
        self.go = threading.Event()
        self.go.set()
        self.closed = threading.Event()
        self.ended = threading.Event()
        self.threads: set[int] = set()

    @asynccontextmanager
    async def make(self) -> AsyncIterator[Transport]:
        try:
            yield _FarTransport(self)
        finally:
            self.ended.set()

    def stand_still(self) -> None:
        """As libcurl: inside a call, so that the whole loop waits."""
        self.threads.add(threading.get_ident())
        if not self.go.is_set():
            self.stuck.set()
            assert self.go.wait(WAIT)


class _FarTransport:
    def __init__(self, far: Far) -> None:
        self._far = far

    async def request(self, request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        self._far.stand_still()
        if self._far.fails is not None:
            raise self._far.fails
        return _FarResponse(self._far)

    async def aclose(self) -> None: ...


class _FarResponse:
    status, reason, http_version = 200, "OK", "1.1"
    ending: Ending = "length"

    def __init__(self, far: Far) -> None:
        self._far = far
        self._at = 0
        self.headers: list[tuple[str, str]] = [("x", "y")]

    async def receive_into(self, view: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        self._far.stand_still()
        piece = self._far.body[self._at : self._at + min(len(view), AT_A_TIME)]
        view[: len(piece)] = piece
        self._at += len(piece)
        self._far.given = self._at
        if not piece and self._far.breaks is not None:
            raise self._far.breaks
        return len(piece)

    async def aclose(self, *, reuse: bool = True) -> None:
        self._far.closed.set()


async def body_of(response: Response, size: int = 70_000) -> bytes:
    got, view = bytearray(), memoryview(bytearray(size))
    while count := await response.receive_into(view):
        got += view[:count]
    return bytes(got)


async def happened(event: threading.Event) -> None:
    assert await trio.to_thread.run_sync(event.wait, WAIT)


async def test_a_body_comes_through_whole_and_from_another_thread() -> None:
    data = named_bytes("apart", 0, 3 * PIECE + 17)
    far = Far(data)
    transport = ApartTransport(far.make)
    response = await transport.request(Request(URL))
    assert (response.status, response.headers, response.ending) == (200, [("x", "y")], "length")
    assert await body_of(response) == data
    await response.aclose()
    assert far.closed.is_set()
    assert threading.get_ident() not in far.threads
    await transport.aclose()
    assert far.ended.is_set()


async def test_the_other_loop_runs_ahead_of_its_reader_by_so_many_pieces_and_no_further() -> None:
    data = named_bytes("apart", 1, 3 * PIECES * AT_A_TIME)
    far = Far(data)
    transport = ApartTransport(far.make)
    response = await transport.request(Request(URL))
    first = memoryview(bytearray(10))
    assert await response.receive_into(first) == 10
    await until(lambda: response._they_wait)
    assert far.given == PIECES * AT_A_TIME
    assert bytes(first) + await body_of(response) == data
    await response.aclose()
    await transport.aclose()


async def test_a_response_may_be_closed_while_the_other_loop_has_no_piece_to_fill() -> None:
    far = Far(bytes(2 * PIECES * AT_A_TIME))
    transport = ApartTransport(far.make)
    response = await transport.request(Request(URL))
    assert await response.receive_into(memoryview(bytearray(10))) == 10
    await until(lambda: response._they_wait)
    with trio.fail_after(WAIT):
        await response.aclose()
        assert far.closed.is_set()
        await transport.aclose()
    assert far.ended.is_set(), "nothing is left that would keep the loop"


async def test_what_came_before_a_failure_is_given_before_it_is_told() -> None:
    data = named_bytes("apart", 2, 3 * AT_A_TIME)
    transport = ApartTransport(Far(data, breaks=TransportError("truncated", "the line broke")).make)
    response = await transport.request(Request(URL))
    got, view = bytearray(), memoryview(bytearray(70_000))
    with pytest.raises(TransportError, match="the line broke"):
        while count := await response.receive_into(view):
            got += view[:count]
    assert got == data
    with pytest.raises(TransportError, match="the line broke"):
        await response.receive_into(view)
    await response.aclose()
    await transport.aclose()


async def test_what_stands_still_there_holds_up_nobody_here_and_loses_no_byte() -> None:
    data = named_bytes("apart", 0, 500)
    far = Far(data)
    transport = ApartTransport(far.make)
    response = await transport.request(Request(URL))
    far.go.clear()
    view = memoryview(bytearray(100))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(response.receive_into, view)
        await happened(far.stuck)  # this loop runs on, or it could not tell
        nursery.cancel_scope.cancel()
    assert bytes(view) == bytes(100), "a cancelled call touches nothing"
    far.go.set()
    assert await body_of(response) == data
    await transport.aclose()


async def test_a_response_that_comes_too_late_is_given_back() -> None:
    far = Far(b"late")
    transport = ApartTransport(far.make)
    far.go.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.request, Request(URL))
        await happened(far.stuck)
        nursery.cancel_scope.cancel()
    far.go.set()
    await happened(far.closed)
    await transport.aclose()


async def test_errors_come_through() -> None:
    transport = ApartTransport(Far(fails=TransportError("connect", "nobody there")).make)
    with pytest.raises(TransportError, match="nobody there") as caught:
        await transport.request(Request(URL))
    assert caught.value.kind == "connect"
    await transport.aclose()


async def test_a_thread_that_is_stuck_is_left_behind_and_its_callers_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamfs.sources.apart.END_WITHIN", 0.1)
    far = Far(b"never")
    transport = ApartTransport(far.make)
    response = await transport.request(Request(URL))
    far.go.clear()

    async def read() -> None:
        with pytest.raises(TransportError):
            await response.receive_into(memoryview(bytearray(10)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await happened(far.stuck)
        await transport.aclose()
    await response.aclose()
    far.go.set()
    await happened(far.ended)


async def test_a_silent_ftp_server_at_an_end_of_no_known_place_holds_up_nobody() -> None:
    """libcurl waits in its own call for the closing word: seconds in which everybody else goes on."""
    transport, beats = ApartTransport(CurlTransport), 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await trio.sleep(0.02)
            beats += 1

    with ScriptedFtp(size=None, sent=b"x" * 400, final=b"").serving() as url:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat)
            response = await transport.request(Request(url))
            with pytest.raises(TransportError):
                await body_of(response)
            assert beats > 50, "the loop stood still"
            nursery.cancel_scope.cancel()
    await response.aclose()
    await transport.aclose()
