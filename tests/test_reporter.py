"""The reporter: the board follows the file system, and only what changed is written."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from streamfs import reporter as module
from streamfs.board import Board
from streamfs.board.writer import BoardWriter
from streamfs.engine.ranges import RangeSet
from streamfs.filesystem import FileSystem
from streamfs.reporter import MOST_RANGES, Reporter
from tests.sourcefakes import MIB, Origin, a_filesystem, spec_of, until


class Counting(BoardWriter):
    """A board that counts how often each stream was written."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.puts: dict[int, int] = {}

    def put(self, stream_id: int, row: Any) -> bool:
        self.puts[stream_id] = self.puts.get(stream_id, 0) + 1
        return super().put(stream_id, row)


@asynccontextmanager
async def reported(tmp_path: Path, fs: FileSystem) -> AsyncIterator[tuple[Counting, Board]]:
    with Counting(tmp_path / "board", {}) as board, Board(tmp_path / "board") as reader:
        keeper = Reporter(fs, board, {})
        await keeper.fill()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.run)
            await until(lambda: reader.whole)
            yield board, reader
            nursery.cancel_scope.cancel()


async def read_all(fs: FileSystem, name: str) -> None:
    opened = await fs.open_named(name)
    position = 0
    while piece := await fs.read(opened.handle, position, MIB):
        position += len(piece)
    fs.release(opened.handle)


async def test_only_what_changed_is_written(tmp_path: Path) -> None:
    served = {name: Origin(name, size=MIB) for name in "abc"}
    async with a_filesystem(tmp_path, served) as fs:
        entries = await fs.add([spec_of(name) for name in served])
        async with reported(tmp_path, fs) as (board, reader):
            await read_all(fs, "a")
            await until(lambda: reader.stream("a")["state"] == "complete" and reader.stream("a")["rate"] == 0)
            a, b, c = (entry.id for entry in entries)
            assert board.puts[a] >= 2
            assert max(board.puts[b], board.puts[c]) <= 2, "when they were added, at most"

            async def still() -> bool:
                """Nothing happens, and nothing is written, for half a second."""
                before = dict(board.puts), reader.changes
                await trio.sleep(0.5)
                return (dict(board.puts), reader.changes) == before

            # The round that wrote the last rows may still have to tell so.
            assert await still() or await still()


async def test_a_large_catalogue_is_filled_beside_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 10)
    async with a_filesystem(tmp_path, {f"s{n}": Origin(f"s{n}", size=1) for n in range(500)}) as fs:
        await fs.add([spec_of(f"s{n}") for n in range(500)])
        fs.news.take()
        with BoardWriter(tmp_path / "board", {}) as board, Board(tmp_path / "board") as reader:
            keeper = Reporter(fs, board, {})
            await keeper.fill()
            assert not reader.whole
            assert len(reader.streams()) == 10
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keeper.run)
                await until(lambda: reader.whole)
                nursery.cancel_scope.cancel()
            assert len(reader.streams()) == 500


async def test_who_flushes_waits_for_what_another_has_begun_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE", 0)  # others have a turn after each row
    async with a_filesystem(tmp_path, {}) as fs:
        with BoardWriter(tmp_path / "board", {}) as board, Board(tmp_path / "board") as reader:
            keeper = Reporter(fs, board, {})
            await keeper.fill()
            await fs.add([spec_of(f"s{n}") for n in range(20)])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keeper.flush)
                while not reader.streams():
                    await trio.lowlevel.checkpoint()
                assert len(reader.streams()) < 20
                await keeper.flush()
                assert len(reader.streams()) == 20


async def test_what_is_flushed_is_on_the_board(tmp_path: Path) -> None:
    async with a_filesystem(tmp_path, {"a": Origin("a", size=1), "b": Origin("b", size=1)}) as fs:
        with BoardWriter(tmp_path / "board", {}) as board, Board(tmp_path / "board") as reader:
            keeper = Reporter(fs, board, {})
            await keeper.fill()
            await fs.add([spec_of("a")])
            await keeper.flush()
            await fs.rename("a", "b")
            await keeper.flush()
            assert [row["name"] for row in reader.streams()] == ["b"]
            await fs.remove(["b"])
            await keeper.flush()
            assert reader.streams() == []
            assert [(event["event"], event["stream"]) for event in reader.events()] == [
                ("registered", "a"),
                ("renamed", "b"),
                ("removed", "b"),
            ]


async def test_a_full_disk_shows_among_the_facts(tmp_path: Path) -> None:
    async with a_filesystem(tmp_path, {}) as fs, reported(tmp_path, fs) as (_, reader):
        fs._cache._disk_failed(OSError(errno.ENOSPC, "it is full"))
        await until(lambda: "it is full" in (reader.facts.get("disk_error") or ""))
        assert reader.facts["counts"] == {"disk_error": 1}
        fs._cache.disk_error = None
        await until(lambda: reader.facts["disk_error"] is None)
        assert reader.facts["counts"] == {"disk_error": 1}


def test_many_runs_become_few_by_joining_across_the_shortest_gaps() -> None:
    few = RangeSet((n * 10, n * 10 + 5) for n in range(MOST_RANGES))
    assert module._ranges(few) == [[start, stop] for start, stop in few]
    many = RangeSet()
    for n in range(1000):
        many.add(n * 100, n * 100 + 90)
        many.add(n * 100 + 91, n * 100 + 95)
    many.discard(30_000, 60_000)
    even = RangeSet((n * 10, n * 10 + 5) for n in range(1000))
    assert len(module._ranges(even)) == MOST_RANGES
    found = module._ranges(many)
    assert len(found) <= MOST_RANGES
    assert found[0][0] == 0
    assert found[-1][1] == 99_995
    assert all(start < stop for start, stop in found)
    assert not any(start < 45_000 < stop for start, stop in found), "the longest gap stays"
