"""A thousand bytes are flipped in the cache, in data and indexes: not one is served, and each is told."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from streamfs.engine.recording import BLOCK
from streamfs.errors import CommandFailed, Damaged, StreamfsError
from streamfs.filesystem import FileSystem
from tests.fakes import flip_byte
from tests.sourcefakes import KIB, MIB, Origin, a_filesystem, spec_of, until

FLIPS = int(os.environ.get("STREAMFS_FLIPS", "1000"))
SHARDS = 4  # so that test workers share them
SIZE = 5 * BLOCK + 4321
LIMITS = {"spill_threshold": 0, "read_ahead": MIB}
MEANT = 28  # bytes of an index entry that mean something
ENTRY = 32
READ = 8 * KIB  # divides a block


@dataclass
class Seen:
    """What came of the flips."""

    flips: int = 0
    refused: int = 0
    told: int = 0
    mended: int = 0
    silent: list[str] = field(default_factory=list)


def origins() -> dict[str, Origin]:
    """A URL whose origin is there, a URL that was kept and one of no ranges, a command that was kept, and a run that a
    killed daemon left."""
    return {
        "ranged": Origin("ranged", size=SIZE),
        "kept": Origin("kept", size=SIZE),
        "command": Origin("command", size=SIZE, ranged=False, told=False, named=False),
        "cut": Origin("cut", size=SIZE, ranged=False, told=False, named=False),
    }


async def fill(home: Path, served: dict[str, Origin]) -> None:
    """Everything that can be is on disk, as a killed daemon leaves it."""
    async with a_filesystem(home, served, **LIMITS) as fs:
        await fs.add([spec_of(name, command=name in ("command", "cut")) for name in served])
        for name in ("kept", "command"):
            await fs.persist(name, True)
        handles = [(await fs.open_named(name)).handle for name in served]
        for handle in handles:
            for offset in range(0, SIZE, 100 * KIB):
                await fs.read(handle, offset, 100 * KIB)
        rows = {row["name"]: row for row in fs.streams()}
        await until(lambda: all(row["state"] == "complete" for row in fs.streams(["kept", "command"])))
        await until(lambda: all(fs._cache.pool.used == 0 or not g.buffer.memory for g in fs._cache._generations))
        assert len(rows) == len(served)
        shutil.copytree(home / "cache", home / "left")
        for handle in handles:
            fs.release(handle)
    put_back(home)


def put_back(home: Path) -> None:
    shutil.rmtree(home / "cache")
    shutil.copytree(home / "left", home / "cache")


async def read(fs: FileSystem, name: str) -> tuple[bytearray, StreamfsError | None]:
    """All that can be read, with zeros for what is refused, and the last refusal."""
    opened = await fs.open_named(name)
    found, refusal = bytearray(SIZE), None
    for offset in range(0, SIZE, READ):
        try:
            view = await fs.read(opened.handle, offset, READ)
        except StreamfsError as error:
            refusal = error
        else:
            found[offset : offset + len(view)] = view
    fs.release(opened.handle)
    return found, refusal


def check(name: str, origin: Origin, found: bytearray, refusal: StreamfsError | None, seen: Seen) -> None:
    """Only right bytes were served; only what cannot be had again was refused."""
    content = origin.content()
    pieces = [slice(start, start + READ) for start in range(0, SIZE, READ)]
    lost = [piece for piece in pieces if found[piece] != content[piece]]
    assert not any(any(found[piece]) for piece in lost), f"{name}: wrong bytes were served"
    if refusal is not None:
        seen.refused += 1
        assert name in ("command", "cut"), f"{name} was refused: {refusal!r}"
        assert isinstance(refusal, (Damaged, CommandFailed))
        assert len(lost) <= BLOCK // READ or name == "cut", f"{name}: one byte cost {len(lost)} reads"
    else:
        assert not lost
        seen.mended += 1


@pytest.mark.timeout(60 + FLIPS // 10)
@pytest.mark.parametrize("shard", range(SHARDS))
async def test_no_flipped_byte_is_served_and_verify_tells_of_each(shard: int, tmp_path: Path) -> None:
    chance, seen, served = random.Random(f"flips {shard}"), Seen(), origins()
    await fill(tmp_path, served)
    numbers = {name: number for number, name in enumerate(served, 2)}
    while seen.flips < FLIPS // SHARDS:
        names = [name for name in served if chance.random() < 0.7] or ["command"]
        places = {}
        for name in names:
            (data,) = (tmp_path / "cache").glob(f"{numbers[name]}-*.data")
            path = data if chance.random() < 0.5 else data.with_name(data.name + ".index")
            places[name] = path, chance.randrange(path.stat().st_size)
        checked_first = chance.random() < 0.5
        running = chance.random() < 0.3  # flipped under a daemon that has opened it
        async with a_filesystem(tmp_path, served, **LIMITS) as fs:
            if running:
                for name in names:
                    fs.release((await fs.open_named(name)).handle)
                    await fs._streams[numbers[name]].verify()  # whatever it does at first is done
            for path, offset in places.values():
                flip_byte(path, offset)
                seen.flips += 1
            if checked_first:
                await tell(fs, places, running, seen)
            for name in names:
                check(name, served[name], *await read(fs, name), seen)
            await trio.lowlevel.checkpoint()
        put_back(tmp_path)
    print(seen)
    assert not seen.silent, seen.silent
    assert seen.told > FLIPS // SHARDS // 8 and seen.refused and seen.mended


async def tell(fs: FileSystem, places: dict[str, tuple[Path, int]], running: bool, seen: Seen) -> None:
    for row in await fs.verify(places):
        path, offset = places[row["name"]]
        is_index = path.suffix == ".index"
        if is_index and (running or means_nothing(path, offset)):
            continue  # the daemon that has loaded it needs it no more
        if row["ok"]:
            seen.silent.append(f"{row} after a flip of {path.name} at {offset}")
            continue
        seen.told += 1
        if is_index:
            assert "index" in row["detail"]
        else:
            start = offset - offset % BLOCK
            assert "at bytes " in row["detail"]
            places_told = [part.split("-") for part in row["detail"].split("at bytes ")[1].split(", ")]
            assert any(start <= int(a) <= offset < int(b) <= start + BLOCK for a, b in places_told), row


def means_nothing(path: Path, offset: int) -> bool:
    """Whether the byte is the padding of an entry. Entries end with the file."""
    return (offset - path.stat().st_size) % ENTRY >= MEANT
