"""Waits that end once the program that waits was told to."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Sequence

import pytest
import trio
import trio.testing

from streamfs import processes
from streamfs.errors import Interrupted
from streamfs.interrupts import LOOK_EVERY, Interrupts, Seen, Wait, look


class Looks:
    """A look that takes no thread: waits end whose opener `is_over`."""

    def __init__(self) -> None:
        self.over: set[int] = set()
        self.count = 0

    async def __call__(self, waits: Sequence[Wait], device: tuple[int, int] | None, search: Collection[Wait]) -> Seen:
        self.count += 1
        for wait in search:
            wait.holders = {}
        return Seen([wait for wait in waits if wait.opener in self.over], searched=False)


async def waiting(interrupts: Interrupts, pid: int, ended: list[int]) -> None:
    with pytest.raises(Interrupted), interrupts.watch(pid):
        await trio.sleep_forever()
    ended.append(pid)


async def test_waits_of_a_process_that_was_told_to_end_end_and_no_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    looks = Looks()
    interrupts, ended = Interrupts(looks), list[int]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupts.run)
        for pid in (11, 11, 22):
            nursery.start_soon(waiting, interrupts, pid, ended)
        await trio.sleep(1)
        assert ended == []
        looks.over.add(11)
        await trio.sleep(2 * LOOK_EVERY)
        assert ended == [11, 11]
        looks.over.add(22)
        await trio.sleep(2 * LOOK_EVERY)
        assert ended == [11, 11, 22]
        assert not interrupts._waits
        nursery.cancel_scope.cancel()


async def test_a_wait_that_ends_by_itself_is_watched_no_more(autojump_clock: trio.testing.MockClock) -> None:
    interrupts = Interrupts()
    with interrupts.watch(os.getpid()):
        await trio.sleep(1)
    with pytest.raises(KeyError), interrupts.watch(os.getpid()):
        raise KeyError
    assert not interrupts._waits


async def test_without_a_process_there_is_nothing_to_watch() -> None:
    interrupts = Interrupts()
    with interrupts.watch(0):
        assert not interrupts._waits


async def test_nobody_looks_while_nobody_waits(autojump_clock: trio.testing.MockClock) -> None:
    looks = Looks()
    interrupts = Interrupts(looks)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupts.run)
        await trio.sleep(100)
        assert looks.count == 0
        with interrupts.watch(7):
            await trio.sleep(1)
        await trio.sleep(LOOK_EVERY)  # a look may have been under way
        count = looks.count
        assert count >= 3
        await trio.sleep(100)
        assert looks.count == count
        nursery.cancel_scope.cancel()


async def test_a_look_without_a_descriptor_left_is_made_up_for(autojump_clock: trio.testing.MockClock) -> None:
    looks = 0

    async def look(waits: Sequence[Wait], device: tuple[int, int] | None, search: Collection[Wait]) -> Seen:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return Seen(waits, False)

    interrupts = Interrupts(look)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupts.run)
        with pytest.raises(Interrupted), interrupts.watch(7):
            await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert looks == 2


class World:
    """The processes of a test: who ends, who is gone, who waits in the mount, who has which inode open where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ending: set[int] = set()
        self.gone: set[int] = set()
        self.waiting: dict[int, int] = {}
        self.held: dict[int, dict[int, frozenset[int]]] = {}
        self.started: dict[int, float] = {}
        self.searches = 0

        def is_being_killed(pid: int) -> bool:
            if pid in self.gone:
                raise FileNotFoundError(pid)
            return pid in self.ending

        def holders(inodes: Collection[int], device: object) -> dict[int, dict[int, frozenset[int]]]:
            self.searches += 1
            return {inode: pids for inode, pids in self.held.items() if inode in inodes}

        fakes: dict[str, Callable[..., object]] = {
            "is_being_killed": is_being_killed,
            "waiting_threads": lambda pid: None if pid in self.gone else self.waiting.get(pid, 0),
            "holders": holders,
            "started": lambda pid: self.started.get(pid, 0.0),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(processes, name, fake)

    def ended(self, *waits: Wait) -> list[Wait]:
        return list(look(waits, None, [wait for wait in waits if wait.holders is None]).ended)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def a_wait(opener: int, *, inode: int = 5, offset: int = 0, began: float = 10.0, ahead: bool = False) -> Wait:
    return Wait(opener, ahead, inode, offset, 4096, began)


def test_openers_that_wait_themselves_cost_no_search(world: World) -> None:
    waits = [a_wait(pid) for pid in (1, 2)]
    world.waiting = {1: 1, 2: 1}
    world.ending = {2}
    assert world.ended(*waits) == [waits[1]]
    assert world.searches == 0


def test_one_search_finds_the_heirs_of_all_waits_and_is_not_repeated(world: World) -> None:
    orphan, passed_on = a_wait(1, inode=5), a_wait(2, inode=6)
    world.gone = {1}
    world.held = {5: {11: frozenset({0})}, 6: {2: frozenset({0}), 12: frozenset({0})}}
    world.waiting = {11: 1, 12: 1}
    assert world.ended(orphan, passed_on) == []
    world.ending = {12}
    assert world.ended(orphan, passed_on) == [passed_on]
    world.ending = {11}
    assert world.ended(orphan, passed_on) == [orphan]
    assert world.searches == 1


def test_an_heir_that_began_to_live_later_is_not_suspected(world: World) -> None:
    earlier, later = a_wait(1, began=10.0), a_wait(2, began=20.0)
    world.gone = {1, 2}
    world.held = {5: {11: frozenset({0}), 12: frozenset({0})}}
    world.started = {11: 5.0, 12: 15.0}
    world.waiting = {11: 1, 12: 1}
    world.ending = {12}
    assert world.ended(earlier, later) == [later]


def test_of_waits_that_several_may_be_in_one_ends_at_a_time_the_likeliest_first(world: World) -> None:
    there, here = a_wait(1, offset=0), a_wait(1, offset=8192, began=11.0)
    world.gone = {1}
    world.held = {5: {11: frozenset({100}), 12: frozenset({8192})}}
    world.waiting = {11: 1, 12: 1}
    world.ending = {12}
    assert world.ended(there, here) == [here]
    assert world.ended(there) == [there], "who is told to end does so in the end"


def test_a_wait_that_is_too_young_to_be_known_is_looked_into_before_another_is_suspected(world: World) -> None:
    known, young = a_wait(1), a_wait(2, began=20.0)
    world.gone = {1, 2}
    world.held = {5: {11: frozenset({0}), 12: frozenset({8192})}}
    world.waiting = {11: 1, 12: 1}
    known.holders = dict(world.held[5])
    young.offset = 8192
    world.ending = {12}
    assert look([known, young], None, []).ended == [young]


def test_kernel_read_ahead_ends_with_the_process_but_a_plain_wait_goes_on(world: World) -> None:
    ahead, plain = a_wait(1, ahead=True), a_wait(1)
    world.gone = {1}
    world.held = {5: {11: frozenset({0})}}
    assert world.ended(ahead, plain) == [ahead]
