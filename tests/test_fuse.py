"""The adapter's own decisions, without a mount: how long the kernel's read-ahead is kept waiting."""

from __future__ import annotations

import errno
from typing import Any

import pyfuse3
import pytest
import trio
import trio.testing

from streamfs.fuse import AHEAD_LONGEST, AHEAD_PATIENCE, Operations
from streamfs.interrupts import Interrupts, Seen

MIB = 1 << 20
PAGE = 4096


class FakeFiles:
    """One open file whose bytes come when they are told to."""

    def __init__(self) -> None:
        self.whole = trio.Event()
        self.partly = False
        self.reads = 0

    def read_now(self, number: int, offset: int, size: int) -> memoryview | None:
        return None

    async def read(self, number: int, offset: int, size: int, *, partial: bool = False) -> memoryview:
        self.reads += 1
        await self.whole.wait()
        return memoryview(bytes(size))

    def has_some(self, number: int, offset: int, size: int) -> bool:
        return self.partly


async def never_ending(*_: Any) -> Seen:
    return Seen([], searched=True)


@pytest.fixture
def files() -> FakeFiles:
    return FakeFiles()


@pytest.fixture
def operations(files: FakeFiles) -> Operations:
    from streamfs.fuse import _OpenFile

    made = Operations(files, Interrupts(never_ending))  # type: ignore[arg-type]
    made.most_ahead = 2
    made._files[1] = _OpenFile(opener=0, inode=1, direct=False, nonblocking=False)
    return made


async def turned_away(operations: Operations, size: int = MIB) -> float:
    """Seconds until a read is refused."""
    began = trio.current_time()
    with pytest.raises(pyfuse3.FUSEError) as refusal:
        await operations.read(pyfuse3.FileHandleT(1), 0, size)
    assert refusal.value.errno == errno.EAGAIN
    return trio.current_time() - began


async def test_a_read_ahead_waits_for_bytes_that_are_all_still_to_come(
    operations: Operations, files: FakeFiles, autojump_clock: trio.testing.MockClock
) -> None:
    """Several megabytes may be on their way before its first; page by page they would cost ten times as much."""
    found: list[memoryview] = []

    async def read() -> None:
        found.append(await operations.read(pyfuse3.FileHandleT(1), 0, MIB))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.sleep(7.5 * AHEAD_PATIENCE)
        files.partly = True
        await trio.sleep(AHEAD_PATIENCE)
        files.whole.set()
    assert bytes(found[0]) == bytes(MIB)


async def test_pages_that_are_there_do_not_wait_for_the_others_of_a_read_ahead(
    operations: Operations, files: FakeFiles, autojump_clock: trio.testing.MockClock
) -> None:
    files.partly = True
    assert await turned_away(operations) == pytest.approx(2 * AHEAD_PATIENCE)
    assert operations._ahead == 0


async def test_a_read_ahead_of_which_nothing_comes_lets_go_of_the_file(
    operations: Operations, files: FakeFiles, autojump_clock: trio.testing.MockClock
) -> None:
    assert await turned_away(operations) == pytest.approx(AHEAD_LONGEST * AHEAD_PATIENCE)
    assert operations._ahead == 0


async def test_past_the_kernels_limit_a_read_ahead_is_turned_away_at_once_and_a_page_waits(
    operations: Operations, files: FakeFiles, autojump_clock: trio.testing.MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(operations.most_ahead):
            nursery.start_soon(turned_away, operations)
        await trio.testing.wait_all_tasks_blocked()
        assert await turned_away(operations) == 0
        with trio.move_on_after(60) as patience:
            await operations.read(pyfuse3.FileHandleT(1), 0, PAGE)
        assert patience.cancelled_caught


async def test_a_defect_in_what_answers_at_once_is_an_error_of_that_read_alone(
    operations: Operations, files: FakeFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def defective(number: int, offset: int, size: int) -> memoryview | None:
        raise ZeroDivisionError

    monkeypatch.setattr(files, "read_now", defective)
    with pytest.raises(pyfuse3.FUSEError) as refused:
        await operations.read(1, 0, PAGE)  # type: ignore[arg-type]
    assert refused.value.errno == errno.EIO
    assert "unforeseen" in caplog.text
