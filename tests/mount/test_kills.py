"""The mounted daemon is killed at any moment, while programs read, streams are persisted and registered; after each
restart every byte is checked. STREAMFS_KILLS=N kills N times (10)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.mount.mounted import Mounted, is_alive, wait_for
from tests.mount.origin import ScriptedOrigin

KILLS = int(os.environ.get("STREAMFS_KILLS", "10"))
MIB = 1 << 20
SIZE = 3 * MIB + 777
LATEST = 0.6
"""Seconds after which the kill comes, at the latest."""
OPTIONS = ("--spill-threshold", "256KiB", "--read-ahead", "512KiB")

READER = """
import os, random, sys, threading
mountpoint, truth, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
size = {size}
versions = {{}}
for name in sorted(os.listdir(truth)):
    stream, number = name.rsplit(".", 1)
    versions.setdefault(stream, []).append(open(os.path.join(truth, name), "rb").read())
wrong, read = [], [0]

def follow(stream, chance):
    while True:
        try:
            fd = os.open(os.path.join(mountpoint, stream), os.O_RDONLY)
        except OSError as error:
            if error.errno in (107, 103, 2):  # the daemon is gone
                return
            continue
        may_be = versions[stream]
        try:
            position = 0
            for _ in range(40):
                offset = position if chance.random() < 0.8 else chance.randrange(size)
                piece = os.pread(fd, chance.choice([100, 4096, 65536, 200000]), offset)
                may_be = [v for v in may_be if v[offset : offset + len(piece)] == piece]
                if not may_be:
                    wrong.append((stream, offset, len(piece)))
                    return
                read[0] += len(piece)
                position = (offset + len(piece)) % size
        except OSError as error:
            if error.errno in (107, 103):
                return
        finally:
            os.close(fd)

threads = [threading.Thread(target=follow, args=(stream, random.Random(f"{{seed}} {{stream}}"))) for stream in versions]
for thread in threads:
    thread.start()
print("reading", flush=True)
for thread in threads:
    thread.join()
print(len(wrong), read[0], wrong[:3], flush=True)
"""


@dataclass
class Figures:
    kills: int = 0
    bytes_read_before: int = 0
    bytes_checked_after: int = 0
    states: Counter[str] = field(default_factory=Counter)
    """What the streams had come to when they were looked at after a restart."""
    kept: int = 0
    """Streams that had said "complete" before the kill."""


class Home:
    """Streams of each kind, and the versions of their bytes as files in `truth`."""

    def __init__(self, fs: Mounted, origin: ScriptedOrigin, folder: Path) -> None:
        self.fs = fs
        self.truth = folder / "truth"
        self.truth.mkdir()
        self.run = folder / "run"
        self.runs = 0
        self.figures = Figures()
        for name, ranged in (("ranged", True), ("kept", True), ("oneway", False)):
            document = origin.add(name, SIZE, ranged=ranged)
            fs.add(name, document.url)
            (self.truth / f"{name}.0").write_bytes(document.bytes())
        for name in ("command", "kept-command"):
            # A little at a time, so that a kill finds it at work.
            script = f"dd if={self.run} bs=64k count=30 2>/dev/null; sleep 0.2; tail -c +{30 * 65536 + 1} {self.run}"
            fs.add(name, "--shell", script)
        self.begin_runs()

    def begin_runs(self) -> None:
        """Each run of a command from now on writes other bytes than those before."""
        self.runs += 1
        data = random.Random(self.runs).randbytes(SIZE)
        self.run.with_name("next").write_bytes(data)
        self.run.with_name("next").replace(self.run)
        for name in ("command", "kept-command"):
            (self.truth / f"{name}.{self.runs}").write_bytes(data)
            (self.truth / f"{name}.{self.runs - 8}").unlink(missing_ok=True)

    def versions(self, name: str) -> list[bytes]:
        return [path.read_bytes() for path in sorted(self.truth.glob(f"{name}.*"))]

    def kill_at_work(self, chance: random.Random) -> None:
        reader = self.fs.python(
            READER.format(size=SIZE), self.fs.mountpoint, self.truth, str(chance.randrange(1 << 30))
        )
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"reading\n"
        complete = []
        persisting = [self.fs.mountpoint / name for name in ("kept", "kept-command")]
        if chance.random() < 0.5:
            for path in persisting:
                os.setxattr(path, "user.streamfs.persist", b"1")
        time.sleep(chance.random() * LATEST)
        for path in persisting:
            if os.getxattr(path, "user.streamfs.state") == b"complete":
                complete += [path.name] if os.getxattr(path, "user.streamfs.persist") == b"1" else []
        pid = self.fs.pid
        os.kill(pid, signal.SIGKILL)
        self.figures.kills += 1
        wait_for(lambda: not is_alive(pid), "the daemon is gone")
        try:
            told, errors = reader.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            raise AssertionError("a reader hangs though its daemon is gone") from None
        assert reader.returncode == 0, errors
        wrong, read, which = told.split(None, 2)
        assert int(wrong) == 0, f"wrong bytes were read: {which!r}"
        self.figures.bytes_read_before += int(read)
        self.check_files(complete)

    def check_files(self, complete: list[str]) -> None:
        """What was reported complete is a plain file of the whole, though nobody has touched it since the kill."""
        rows = {row["name"]: row for row in json.loads(self.fs.run("ls", "--json").stdout)["streams"]}
        for name in complete:
            assert rows[name]["state"] == "complete", f"{name} had been reported complete"
            data = [path.read_bytes() for path in self.fs.data_files if path.stat().st_size == SIZE]
            assert any(d in data for d in self.versions(name))
            self.figures.kept += 1

    def check_all(self) -> None:
        """After a restart: each byte that is served is right, of one version, and what fails is what may fail."""
        for name in ("ranged", "kept", "oneway", "command", "kept-command"):
            path = self.fs.mountpoint / name
            state = os.getxattr(path, "user.streamfs.state").decode()
            found, failed = read_all(path)
            self.figures.states[f"{name} {state}{' cut' if failed else ''}"] += 1
            self.figures.bytes_checked_after += len(found)
            versions = self.versions(name)
            if failed:
                persisted = os.getxattr(path, "user.streamfs.persist") == b"1"
                assert "command" in name and not persisted, f"{name} cannot be read: {failed}"
                assert any(version.startswith(found) for version in versions), f"{name} mixes runs"
                self.fs.run("evict", name)
                found, failed = read_all(path)
                assert failed is None
            assert found in versions, f"{name} is wrong"


def read_all(path: Path) -> tuple[bytes, OSError | None]:
    """What can be read from the start, and what ended it."""
    found = bytearray()
    with path.open("rb", buffering=0) as file:
        while True:
            try:
                piece = file.read(256 * 1024)
            except OSError as error:
                return bytes(found), error
            if not piece:
                return bytes(found), None
            found += piece


@pytest.mark.timeout(120 + 10 * KILLS)
def test_whenever_the_daemon_is_killed_the_next_one_serves_right_bytes(
    unmounted: Mounted, origin: ScriptedOrigin, tmp_path: Path
) -> None:
    chance = random.Random(f"kills {KILLS}")
    unmounted.mount(*OPTIONS)
    home = Home(unmounted, origin, tmp_path)
    for number in range(KILLS):
        home.kill_at_work(chance)
        home.begin_runs()
        unmounted.mount(*OPTIONS)
        home.check_all()
        for name in ("kept", "kept-command"):
            if number % 3 == 2:
                os.setxattr(unmounted.mountpoint / name, "user.streamfs.persist", b"0")
        unmounted.run("evict", "--all")
    print(home.figures)
    assert home.figures.kills == KILLS > 0
    assert home.figures.bytes_read_before and home.figures.bytes_checked_after
