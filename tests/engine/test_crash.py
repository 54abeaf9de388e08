"""The engine is killed, and its machine loses power, anywhere; what is found afterwards keeps every promise.

STREAMFS_CRASHES=N kills N times (10,000), and cuts the power a quarter as often; each cut leaves five states of the
disk to look at.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamfs.engine.recording import BLOCK, Header, Recording
from tests.crash.killer import CALLS
from tests.crash.life import KEY, SIZE, STREAM, Claims, Life, check, content, scripted
from tests.crash.powercut import Disk, Kill, PowerCut
from tests.fakes import has_direct_writes

CRASHES = int(os.environ.get("STREAMFS_CRASHES", "10000"))
SHARDS = 8  # so that test workers share them
KILLS = -(-CRASHES // SHARDS)  # in one shard
CUTS = -(-CRASHES // 4 // SHARDS)
STATES = 5  # states of the disk looked at after each power cut
ROUNDS = 3  # power cuts in one life
ENTRY = 32  # bytes of one index entry
TELLING = 500  # kills among which each kind of call should be


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: a kill does not care, and no sync waits for a disk."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(prefix="streamfs-crash-", dir=place) as folder:
        yield Path(folder)


@pytest.mark.timeout(60 + KILLS // 10)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_whatever_a_killed_engine_left_is_exactly_what_it_had_written(shard: int, fast_folder: Path) -> None:
    arguments = ["--folder", str(fast_folder), "--count", str(KILLS), "--seed", str(shard + 1)]
    server = subprocess.run(
        [sys.executable, "-m", "tests.crash.killer", *arguments],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    result = json.loads(server.stdout)
    fired = result["fired"]
    print(f"killed {sum(fired.values())} times: {fired}")
    assert not result["wrong"]
    assert sum(fired.values()) >= KILLS > 0
    seen = {"moment", *CALLS} if KILLS >= TELLING else set()
    if not has_direct_writes(fast_folder):
        seen.discard("pwritev")
    assert seen <= set(fired), f"no kill fired at {seen - set(fired)}"


@pytest.mark.timeout(60 + CUTS // 5)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_whatever_a_power_cut_leaves_of_the_disk_keeps_every_promise(
    shard: int, fast_folder: Path, disks: list[Disk]
) -> None:
    cuts, damage, tried = 0, 0, 0
    while cuts < CUTS:
        tried += 1
        chance = random.Random(f"{shard}/{tried}")
        folder = fast_folder / "cache"
        folder.mkdir()
        claims = Claims()
        for _ in range(ROUNDS):
            disks[:] = [Disk(folder)]
            live_until_the_cut(disks[0], claims, chance)
            states = disks.pop().states(chance, STATES)
            for state in states:
                look_at(state, folder, claims, f"life {tried} of shard {shard}")
            damage += lost_something(states)
            cuts += 1
            claims.kept = []
        shutil.rmtree(folder)
    print(f"{cuts} power cuts, {cuts * STATES} states of the disk, {damage} of the cuts lost something")
    assert damage > cuts // 4, "hardly a power cut cost anything"


@pytest.mark.timeout(120)
def test_a_power_cut_at_every_single_call_keeps_every_promise(fast_folder: Path, disks: list[Disk]) -> None:
    """A life that does each thing once, cut before each call that changes the disk, and after the last."""
    folder, cut, damage = fast_folder / "cache", 0, 0
    chance = random.Random(7)
    finished = False
    while not finished:
        cut += 1
        folder.mkdir()
        claims = Claims()
        disks[:] = [Disk(folder)]
        disks[0].stop_at = cut
        try:
            scripted(folder, claims.hear)
            finished = True
        except PowerCut:
            pass
        states = disks.pop().states(chance, 4 * STATES)
        for state in states:
            look_at(state, folder, claims, f"call {cut}")
        damage += lost_something(states)
        shutil.rmtree(folder)
    print(f"{cut} places for a cut, {damage} of them lost something")
    assert cut > 40 and damage > cut // 2


def test_the_word_that_all_is_there_does_not_count_while_something_is_missing(
    fast_folder: Path, disks: list[Disk]
) -> None:
    """A power cut took an entry in the middle and left those behind it, which say that all is there."""
    folder = fast_folder / "cache"
    folder.mkdir()
    path = folder / f"{STREAM}-1.data"
    first = Recording.create(path, Header(key=KEY, generation=1))
    data = memoryview(content(KEY, 1, SIZE))
    first.append([(0, data)])
    first.complete(SIZE)
    index = path.with_name(path.name + ".index")
    raw = index.read_bytes()
    index.write_bytes(raw[: -3 * ENTRY] + bytes(ENTRY) + raw[-2 * ENTRY :])
    lost = 2 * BLOCK  # where what the lost entry spoke of begins
    disks[:] = [Disk(folder)]
    second = Recording.load(path)
    assert second is not None and not second.durable and list(second.present()) == [(0, lost)]
    second.append([(lost, data[lost : lost + 100])])
    states = disks.pop().states(random.Random(1), 200)
    seen = set()
    for state in states:
        look_at(state, folder, Claims(), "the appended entry")
        loaded = Recording.load(path)
        assert loaded is not None and not loaded.durable and loaded.size == SIZE
        seen.add(loaded.present().total)
    assert seen == {lost, lost + 100}, "the entry was lost in none of the cuts, or in each"


def look_at(state: dict[str, bytes], folder: Path, claims: Claims, when: str) -> None:
    """Put the folder into the state, and check it as a restarted daemon would."""
    for path in folder.iterdir():
        path.unlink()
    for name, data in state.items():
        (folder / name).write_bytes(data)
    try:
        check(folder, claims, power_cut=True)
    except AssertionError as error:
        raise AssertionError(f"after the cut of {when}: {error}") from error


def live_until_the_cut(disk: Disk, claims: Claims, chance: random.Random) -> None:
    """Live, be killed and restarted now and then, until the power goes."""
    cut = chance.randint(1, 80)
    life = None
    while True:
        disk.stop_at, disk.stop_with = cut, PowerCut
        kill = disk.calls + chance.randint(1, 40)
        if kill < cut:
            disk.stop_at, disk.stop_with = kill, Kill
        try:
            life = Life(disk.folder, chance.getrandbits(32), claims.hear, claims.generation)
            while True:
                life.go_on()
        except Kill:
            continue
        except PowerCut:
            return
        finally:
            del life
            life = None


def lost_something(states: list[dict[str, bytes]]) -> bool:
    return any(state != states[0] for state in states[1:])
