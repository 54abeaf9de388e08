"""The engine is killed, and its machine loses power, anywhere; what is found afterwards keeps every promise.

STREAMFS_CRASHES=N kills N times, and cuts the power as often.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamfs.engine import recording
from tests.crash.killer import CALLS, patch
from tests.crash.life import Claims, Life, check
from tests.crash.powercut import Disk, Kill, PowerCut

CRASHES = int(os.environ.get("STREAMFS_CRASHES", "2000"))
SERVERS = 2  # fork servers at a time
STATES = 5  # states of the disk looked at after each power cut
ROUNDS = 3  # power cuts in one life


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: a kill does not care, and no sync waits for a disk."""
    memory = Path("/dev/shm")
    folder = (memory if os.access(memory, os.W_OK) else tmp_path) / f"streamfs-crash-{os.getpid()}"
    folder.mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.timeout(60 + CRASHES // 20)
def test_whatever_a_killed_engine_left_is_exactly_what_it_had_written(fast_folder: Path) -> None:
    servers = []
    for number in range(SERVERS):
        folder = fast_folder / str(number)
        folder.mkdir()
        arguments = ["--folder", str(folder), "--count", str(CRASHES // SERVERS), "--seed", str(number + 1)]
        command = [sys.executable, "-m", "tests.crash.killer", *arguments]
        servers.append(subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]))
    fired: Counter[str] = Counter()
    wrong: list[str] = []
    for server in servers:
        told, _ = server.communicate()
        assert server.returncode == 0
        result = json.loads(told)
        fired.update(result["fired"])
        wrong += result["wrong"]
    print(f"killed {fired.total()} times: {dict(fired)}")
    assert not wrong
    assert fired.total() >= CRASHES // SERVERS * SERVERS
    seen = {"moment", *CALLS} if CRASHES >= 500 else {"moment"}
    assert seen <= set(fired), f"no kill fired at {seen - set(fired)}"


@pytest.mark.timeout(60 + CRASHES // 20)
def test_whatever_a_power_cut_leaves_of_the_disk_keeps_every_promise(
    fast_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts, damage, tried = 0, 0, 0
    disk: Disk | None = None
    for name in (*CALLS, "_punch_hole"):
        owner = recording if name == "_punch_hole" else os
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be put back
    patch(lambda name, real, arguments: real(*arguments) if disk is None else disk.around(name, real, arguments))
    while cuts < CRASHES:
        tried += 1
        chance = random.Random(tried)
        folder = fast_folder / "cache"
        folder.mkdir()
        claims = Claims()
        for _ in range(ROUNDS):
            disk = Disk(folder)
            live_until_the_cut(disk, claims, chance)
            states = disk.states(chance, STATES)
            disk = None
            for state in states:
                shutil.rmtree(folder)
                folder.mkdir()
                for name, data in state.items():
                    (folder / name).write_bytes(data)
                try:
                    check(folder, claims, power_cut=True)
                except AssertionError as error:
                    raise AssertionError(f"after the cut of life {tried}: {error}") from error
            damage += lost_something(states)
            cuts += 1
            claims.kept = []
        shutil.rmtree(folder)
    print(f"{cuts} power cuts, {cuts * STATES} states of the disk, {damage} of the cuts lost something")
    assert damage > cuts // 4, "hardly a power cut cost anything"


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
