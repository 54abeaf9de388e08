"""Waits that end once the program that waits was told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from streamfs.errors import Interrupted
from streamfs.interrupts import LOOK_EVERY, Interrupts, _is_being_killed

HOLDS_A_SIGNAL = """
import os, signal, sys
kind = getattr(signal, sys.argv[1])
signal.pthread_sigmask(signal.SIG_BLOCK, {kind})
if sys.argv[2] == "handled":
    signal.signal(kind, lambda *_: None)
os.kill(os.getpid(), kind)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def a_process(kind: str) -> Iterator[int]:
    """A process that lives until the block ends, with a blocked signal pending."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_SIGNAL, kind, "handled"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        try:
            yield child.pid
        finally:
            child.kill()


async def waiting(interrupts: Interrupts, pid: int, ended: list[int]) -> None:
    with pytest.raises(Interrupted), interrupts.watch(pid):
        await trio.sleep_forever()
    ended.append(pid)


async def test_waits_of_a_process_that_was_told_to_end_end_and_no_others(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    told: set[int] = set()
    monkeypatch.setattr("streamfs.interrupts._is_being_killed", told.__contains__)
    interrupts, ended = Interrupts(), list[int]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupts.run)
        for pid in (11, 11, 22):
            nursery.start_soon(waiting, interrupts, pid, ended)
        await trio.sleep(1)
        assert ended == []
        told.add(11)
        await trio.sleep(2 * LOOK_EVERY)
        assert ended == [11, 11]
        told.add(22)
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


async def test_nobody_looks_while_nobody_waits(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    looked: list[int] = []
    monkeypatch.setattr("streamfs.interrupts._is_being_killed", looked.append)
    interrupts = Interrupts()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupts.run)
        await trio.sleep(100)
        assert looked == []
        with interrupts.watch(7):
            await trio.sleep(1)
        await trio.sleep(LOOK_EVERY)  # a look may have been under way
        count = len(looked)
        assert count >= 3
        await trio.sleep(100)
        assert len(looked) == count
        nursery.cancel_scope.cancel()


async def test_kernel_read_ahead_ends_with_the_process_but_a_plain_wait_goes_on(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    def gone(pid: int) -> bool:
        raise FileNotFoundError(pid)

    monkeypatch.setattr("streamfs.interrupts._is_being_killed", gone)
    interrupts = Interrupts()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupts.run)
        with pytest.raises(Interrupted), interrupts.watch(os.getpid(), ahead=True):
            await trio.sleep_forever()
        with interrupts.watch(os.getpid()):
            await trio.sleep(10)
        nursery.cancel_scope.cancel()


def test_a_process_that_nobody_told_anything_is_not_ending() -> None:
    assert not _is_being_killed(os.getpid())


def test_a_process_that_is_gone_is_told_apart() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(FileNotFoundError):
        _is_being_killed(child.pid)


def test_a_blocked_signal_does_not_count() -> None:
    with a_process("SIGTERM") as pid:
        assert not _is_being_killed(pid)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL])
def test_a_pending_signal_that_ends_programs_counts(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = f"SigPnd:\t{0:016x}\nShdPnd:\t{1 << (kind - 1):016x}\nSigBlk:\t{0:016x}\n"
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda _: masks.encode())
    assert _is_being_killed(os.getpid())


@pytest.mark.parametrize("kind", [signal.SIGCHLD, signal.SIGALRM, signal.SIGWINCH, signal.SIGUSR1])
def test_a_pending_signal_that_programs_live_with_does_not(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = f"SigPnd:\t{1 << (kind - 1):016x}\nShdPnd:\t{0:016x}\nSigBlk:\t{0:016x}\n"
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda _: masks.encode())
    assert not _is_being_killed(os.getpid())


def test_the_process_of_a_thread() -> None:
    assert Interrupts.process_of(os.getpid()) == os.getpid()
    assert Interrupts.process_of(0) == 0
