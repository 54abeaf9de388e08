"""Who reads the mount's next request: a pipe stands for /dev/fuse, and a loop as pyfuse3's reads from it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from streamfs import turns as module
from streamfs.turns import AT_ONCE, Turns

Handler = Callable[[bytes], Awaitable[None]]


class Loop:
    """pyfuse3's main loop, over `turns` as its trio: a spare task is started when none is in line."""

    def __init__(self, turns: Turns, fd: int, handler: Handler) -> None:
        self.turns = turns
        self.fd = fd
        self.handler = handler
        self.tasks = 0
        self.in_line = 0
        self.empty_reads = 0
        self.exited = False

    async def main(self) -> None:
        async with self.turns.open_nursery() as nursery:
            nursery.start_soon(self.work, nursery, name="first")

    async def work(self, nursery: trio.Nursery) -> None:
        self.tasks += 1
        while self.in_line <= 1 and not self.exited:
            self.in_line += 1
            try:
                async with self.turns.Lock():
                    if self.exited:
                        break
                    await self.turns.lowlevel.wait_readable(self.fd)
            except trio.ClosedResourceError:
                break
            finally:
                self.in_line -= 1
            try:
                request = os.read(self.fd, 1)
            except BlockingIOError:
                self.empty_reads += 1
                self.tasks -= 1
                raise
            self.exited = not request
            if not self.in_line:
                nursery.start_soon(self.work, nursery)
            if not request:
                break
            await self.handler(request)
        self.tasks -= 1


@asynccontextmanager
async def running(handler: Handler, turns: Turns | None = None) -> AsyncIterator[tuple[Loop, int]]:
    ours, theirs = os.pipe()
    loop = Loop(turns or Turns(), ours, handler)
    try:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(loop.main)
                yield loop, theirs
                os.close(theirs)
                theirs = -1  # the end: every task must find out
        assert loop.tasks == 0
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


async def test_requests_that_are_answered_at_once_are_answered_in_order_by_one_task() -> None:
    answered = bytearray()
    tasks = set()
    done = trio.Event()

    async def handler(request: bytes) -> None:
        answered.extend(request)
        tasks.add(trio.lowlevel.current_task())
        if len(answered) == 100:
            done.set()

    async with running(handler) as (_, fd):
        await trio.testing.wait_all_tasks_blocked()
        os.write(fd, bytes(range(100)))
        await done.wait()
    assert answered == bytes(range(100))
    assert len(tasks) == 1


async def test_a_request_that_is_taken_back_before_it_is_read_holds_up_nobody() -> None:
    class TakenBack(Turns):
        taken = 0

        async def wait_readable(self, fd: int) -> None:
            await super().wait_readable(fd)
            if self.taken < 3:
                self.taken += 1
                os.read(fd, 1)

    answered: list[bytes] = []
    turns = TakenBack()

    async def handler(request: bytes) -> None:
        await trio.lowlevel.checkpoint()
        answered.append(request)

    async with running(handler, turns) as (loop, fd):
        for number in range(3):
            os.write(fd, b"x")
            await trio.testing.wait_all_tasks_blocked()
            assert turns.taken == number + 1
        os.write(fd, b"y")
        await trio.testing.wait_all_tasks_blocked()
        assert answered == [b"y"]
        assert loop.tasks <= 2
        assert loop.empty_reads == 3


async def test_a_request_that_is_taken_back_before_its_turn_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that finds nothing ends pyfuse3's task, which leaves a buffer of a MiB behind."""
    seen = 0
    real = trio.lowlevel.wait_readable

    async def seen_and_taken_back(fd: int) -> None:
        nonlocal seen
        await real(fd)
        seen += 1
        if seen <= 3:
            os.read(fd, 1)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", seen_and_taken_back)
    answered: list[bytes] = []
    done = trio.Event()

    async def handler(request: bytes) -> None:
        answered.append(request)
        done.set()

    async with running(handler) as (loop, fd):
        for number in range(3):
            await trio.testing.wait_all_tasks_blocked()
            os.write(fd, b"x")
            await trio.testing.wait_all_tasks_blocked()
            assert seen == number + 1
        await trio.testing.wait_all_tasks_blocked()
        os.write(fd, b"y")
        await done.wait()
        assert answered == [b"y"]
        assert loop.empty_reads == 0


async def test_while_handlers_wait_others_are_answered() -> None:
    gates = [trio.Event() for _ in range(50)]
    begun: list[int] = []
    ended: list[int] = []

    async def handler(request: bytes) -> None:
        begun.append(request[0])
        await gates[request[0]].wait()
        ended.append(request[0])

    async with running(handler) as (_, fd):
        for number in range(50):
            os.write(fd, bytes([number]))
            await trio.testing.wait_all_tasks_blocked()
            assert begun == list(range(number + 1))
        for number in reversed(range(50)):
            gates[number].set()
            await trio.testing.wait_all_tasks_blocked()
        assert ended == list(reversed(range(50)))


async def test_handlers_that_wait_a_little_and_those_that_do_not_can_be_mixed() -> None:
    answered = 0
    done = trio.Event()

    async def handler(request: bytes) -> None:
        nonlocal answered
        for _ in range(request[0] % 3):
            await trio.lowlevel.checkpoint()
        answered += 1
        if answered == 3000:
            done.set()

    async with running(handler) as (_, fd):
        for start in range(0, 3000, 100):
            os.write(fd, bytes((start + i) % 251 for i in range(100)))
            await trio.lowlevel.checkpoint()
        await done.wait()


async def test_a_flood_of_requests_leaves_other_tasks_their_turn() -> None:
    answered = 0
    seen: list[int] = []

    async def handler(request: bytes) -> None:
        nonlocal answered
        answered += 1

    async with running(handler) as (_, fd):
        await trio.testing.wait_all_tasks_blocked()
        os.write(fd, bytes(1000))
        while answered < 1000:
            seen.append(answered)
            await trio.lowlevel.checkpoint()
    assert len(seen) >= 1000 // (AT_ONCE + 1)


async def test_other_tasks_get_their_turn_sooner_where_answers_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = 0
    seen: list[int] = []
    monkeypatch.setattr(module, "AT_MOST", 0.0)  # as if each answer took so long

    async def handler(request: bytes) -> None:
        nonlocal answered
        answered += 1

    async with running(handler) as (_, fd):
        await trio.testing.wait_all_tasks_blocked()
        os.write(fd, bytes(100))
        while answered < 100:
            seen.append(answered)
            await trio.lowlevel.checkpoint()
    assert len(set(seen)) >= 100 // 3  # not one sixteenth


async def test_requests_that_are_there_are_not_waited_for_when_others_had_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answered = waits = 0
    wait_readable = trio.lowlevel.wait_readable

    async def handler(request: bytes) -> None:
        nonlocal answered
        answered += 1

    async def counted(fd: int) -> None:
        nonlocal waits
        waits += 1
        await wait_readable(fd)

    async with running(handler) as (_, fd):
        await trio.testing.wait_all_tasks_blocked()
        monkeypatch.setattr(trio.lowlevel, "wait_readable", counted)
        os.write(fd, bytes(4 * AT_ONCE))
        while answered < 4 * AT_ONCE:
            assert waits == 0
            await trio.lowlevel.checkpoint()


class Clock:
    """In place of the module's time: goes on by a tenth of the time in which a next request is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at_look: Callable[[int], None] = lambda _: None) -> None:
        self.looks = 0
        self._at_look = at_look
        monkeypatch.setattr(module, "_SEVERAL", True)
        monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return 0.0

    def perf_counter(self) -> float:
        self.looks += 1
        self._at_look(self.looks)
        return self.looks * module.NEXT_WITHIN / 10


async def test_what_a_program_asks_next_is_waited_for_on_the_spot(monkeypatch: pytest.MonkeyPatch) -> None:
    turns_of_others = 0
    seen: list[tuple[bytes, int]] = []

    async def other() -> None:
        nonlocal turns_of_others
        while True:
            turns_of_others += 1
            await trio.lowlevel.checkpoint()

    async def handler(request: bytes) -> None:
        seen.append((request, turns_of_others))

    async with running(handler) as (_, fd), trio.open_nursery() as nursery:
        await trio.testing.wait_all_tasks_blocked()
        Clock(monkeypatch, lambda looks: os.write(fd, b"b") if looks == 5 else None)
        nursery.start_soon(other)
        os.write(fd, b"a")
        while len(seen) < 2:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert [request for request, _ in seen] == [b"a", b"b"]
    assert seen[0][1] == seen[1][1], "others had a turn in between"


async def test_where_no_program_asks_so_soon_it_is_seldom_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = 0

    async def handler(request: bytes) -> None:
        nonlocal answered
        answered += 1

    waits: list[int] = []
    async with running(handler) as (_, fd):
        await trio.testing.wait_all_tasks_blocked()
        clock = Clock(monkeypatch)
        for number in range(200):
            before = clock.looks
            os.write(fd, b"x")
            await trio.testing.wait_all_tasks_blocked()
            if clock.looks > before:
                waits.append(number)
    assert answered == 200
    assert waits[:3] == [0, 1, 2]
    assert 3 < len(waits) <= 12, "not given up, or never tried again"


async def test_with_one_processor_nobody_could_ask_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(request: bytes) -> None: ...

    async with running(handler) as (_, fd):
        await trio.testing.wait_all_tasks_blocked()
        clock = Clock(monkeypatch)
        monkeypatch.setattr(module, "_SEVERAL", False)
        os.write(fd, b"x")
        await trio.testing.wait_all_tasks_blocked()
    assert clock.looks == 0


async def test_a_handler_that_fails_ends_the_loop_with_its_failure() -> None:
    async def handler(request: bytes) -> None:
        await trio.lowlevel.checkpoint()
        raise KeyError(request)

    with pytest.raises(BaseExceptionGroup) as raised:
        async with running(handler) as (_, fd):
            await trio.testing.wait_all_tasks_blocked()
            os.write(fd, b"x")
            await trio.sleep_forever()
    assert raised.group_contains(KeyError)


async def test_tasks_in_line_can_be_cancelled() -> None:
    async def handler(request: bytes) -> None:
        await trio.sleep_forever()

    with trio.CancelScope() as scope:
        async with running(handler) as (_, fd):
            os.write(fd, b"xyz")
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
