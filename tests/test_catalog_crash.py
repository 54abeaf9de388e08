"""The catalogue's program is killed, and its machine loses power, anywhere: each change is there or not, never a half,
and what was reported is there. STREAMFS_CATALOG_KILLS=N kills N times (200)."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streamfs.catalog import Catalog
from streamfs.errors import AlreadyExists, NotFound
from streamfs.sources.base import Facts
from streamfs.spec import StreamSpec, UrlSource
from tests.crash.powercut import Disk
from tests.test_docs import ROOT

KILLS = int(os.environ.get("STREAMFS_CATALOG_KILLS", "200"))
CHANGES = 40  # in one life
STATES = 6  # of the disk, looked at for each call
NAMES = ("a", "b", "folder/a", "folder/b", "other")

Picture = list[tuple[int, str, str, bool, int | None]]


def spec(name: str, url: str) -> StreamSpec:
    return StreamSpec(name=name, source=UrlSource(url))


def change(catalog: Catalog, chance: random.Random) -> None:
    """Something that users do, to the whole list or a stream; some of it is refused."""
    name, url = chance.choice(NAMES), f"http://h.example/{chance.randrange(1000)}"
    changes: list[Callable[[], object]] = [
        lambda: catalog.add(spec(name, url), replace=chance.random() < 0.5),
        lambda: catalog.add_many([spec(f"many/{n}", f"{url}/{n}" * 40) for n in range(20)], replace=True),
        lambda: catalog.rename(name, chance.choice(NAMES), replace=chance.random() < 0.5),
        lambda: catalog.rename(*chance.sample(["folder", "many", "moved"], 2)),
        lambda: catalog.remove([name]),
        lambda: catalog.remove([e.name for e in catalog.all() if e.name.startswith("many/")]),
        lambda: catalog.set_persist(catalog.get(name).id, chance.random() < 0.5),
        lambda: catalog.remember(catalog.get(name).id, Facts(chance.randrange(1000), True, url)),
    ]
    with contextlib.suppress(AlreadyExists, NotFound):
        chance.choices(changes, [4, 1, 2, 1, 1, 1, 2, 2])[0]()


def live(path: Path, seed: int, tell: int) -> None:
    """Begin each change with a byte to `tell`, and end it with one."""
    chance = random.Random(seed)
    with Catalog(path) as catalog:
        for _ in range(CHANGES):
            os.write(tell, b"<")
            change(catalog, chance)
            os.write(tell, b">")


def picture(catalog: Catalog) -> Picture:
    return [
        (e.id, e.name, str(e.spec.source), e.persist, None if e.facts is None else e.facts.size) for e in catalog.all()
    ]


def pictures(path: Path, seed: int) -> Iterator[Picture]:
    """What the catalogue is after no change, one, two, …: by the same changes, undisturbed."""
    chance = random.Random(seed)
    with Catalog(path) as catalog:
        yield picture(catalog)
        for _ in range(CHANGES):
            change(catalog, chance)
            yield picture(catalog)


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Path]:
    memory = Path("/dev/shm")
    place = (memory if os.access(memory, os.W_OK) else tmp_path) / f"streamfs-catalog-{os.getpid()}"
    place.mkdir(mode=0o700)
    yield place
    for file in place.iterdir():
        file.unlink()
    place.rmdir()


def test_whenever_its_program_is_killed_each_change_is_there_or_not(fast: Path, tmp_path: Path) -> None:
    seeds = range(8)
    expected = {seed: list(pictures(tmp_path / f"catalog{seed}", seed)) for seed in seeds}
    path, chance, between = fast / "catalog", random.Random("kills"), 0
    for number in range(KILLS):
        for file in fast.iterdir():
            file.unlink()
        seed = number % len(seeds)
        reading, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                live(path, seed, tell)
            finally:
                os._exit(1)
        os.close(tell)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            told = b""
            wanted = chance.randrange(2 * CHANGES)
            while len(told) < wanted and (more := pipe.read(wanted - len(told))):
                told += more
            time.sleep(chance.random() * 0.002)
            os.kill(pid, signal.SIGKILL)
            while more := pipe.read(4096):
                told += more
        os.waitpid(pid, 0)
        with Catalog(path) as catalog:
            found = picture(catalog)
        begun, done = told.count(b"<"), told.count(b">")
        between += begun > done
        assert found in expected[seed][done : begun + 1], f"life {number}: after {done} of {begun} changes"
    assert between > KILLS // 10, "hardly a kill came in the middle of a change"


CALL = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)")


def traced(script: str, *arguments: str | Path) -> Iterator[tuple[str, list[str], int]]:
    """The calls that change files of a Python program which must succeed: name, arguments, result. Strings are hex."""
    log = Path(arguments[0]).with_name("trace")
    calls = "openat,pwrite64,write,ftruncate,fsync,fdatasync,unlink,rename,close,mmap"
    command = ["strace", "-f", "-xx", "-s", "1000000", "-e", f"trace={calls}", "-o", str(log)]
    program = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run([*command, *program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    with log.open() as lines:
        for line in lines:
            if match := CALL.match(line):
                yield match[1], match[2].split(", "), int(match[3])


def unhex(quoted: str) -> bytes:
    assert quoted.startswith('"') and quoted.endswith('"'), quoted[-20:]
    return bytes.fromhex(quoted[1:-1].replace("\\x", ""))


SCRIPT = """
import sys
from pathlib import Path
from tests.test_catalog_crash import live
live(Path(sys.argv[1]), int(sys.argv[2]), 2)
"""


def test_whenever_the_power_goes_each_change_is_there_or_not_and_what_was_reported_stays(tmp_path: Path) -> None:
    """What SQLite really writes and syncs is followed; every state that a power cut may leave is opened."""
    folder, state_folder = tmp_path / "home", tmp_path / "state"
    folder.mkdir()
    state_folder.mkdir()
    seed, chance = 3, random.Random(3)
    disk, told = Disk(folder), b""
    expected = list(pictures(tmp_path / "undisturbed", seed))
    seen, lost, refused = 0, 0, 0
    for name, arguments, result in traced(SCRIPT, folder / "catalog", str(seed)):
        if result < 0:
            continue
        if name == "write" and arguments[0] == "2":
            told += unhex(arguments[1])
            continue
        before = disk.calls
        follow(disk, name, arguments, result)
        if disk.calls == before or not told:
            continue
        begun, done = told.count(b"<"), told.count(b">")
        if begun > CHANGES // 2:
            break  # half of them have done each thing that there is
        possible = expected[done : begun + 1]
        for state in disk.states(chance, STATES):
            for file in state_folder.iterdir():
                file.unlink()
            for file_name, data in state.items():
                (state_folder / file_name).write_bytes(data)
            with Catalog(state_folder / "catalog") as catalog:
                found = picture(catalog)
            assert found in possible, f"after {done} of {begun} changes, at call {disk.calls} ({name})"
            seen += 1
            lost += found == expected[done] != expected[begun]
    print(f"{seen} states of the disk at {disk.calls} calls; {lost} were without the change under way")
    assert seen > 500 and lost > 50, (seen, lost, refused)


def follow(disk: Disk, name: str, arguments: list[str], result: int) -> None:
    if name == "openat":
        path = Path(os.fsdecode(unhex(arguments[1])))
        disk.closed(result)
        if path == disk.folder or path.parent == disk.folder:
            disk.opened(path, result)
    elif name == "close":
        disk.closed(int(arguments[0]))
    elif name == "unlink":
        path = Path(os.fsdecode(unhex(arguments[0])))
        if path.parent == disk.folder:
            disk.called("unlink", (path,), result)
    elif name == "pwrite64":
        disk.called("pwrite", (int(arguments[0]), unhex(arguments[1]), int(arguments[3])), result)
    elif name == "ftruncate":
        disk.called("ftruncate", (int(arguments[0]), int(arguments[1])), result)
    elif name in ("fsync", "fdatasync"):
        disk.called("fsync", (int(arguments[0]),), result)
    else:
        assert name == "mmap" or int(arguments[0]) not in disk._opened, f"{name} is not followed"
