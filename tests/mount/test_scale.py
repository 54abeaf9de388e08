"""Many streams at once, many registered, many opened one after another. Figures are printed (pytest -s)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import pytest

from streamfs.spec import CommandSource, StreamOptions, StreamSpec, UrlSource
from tests.mount.crowd import StallingOrigin, register
from tests.mount.mounted import Mounted, checked, processes_with, wait_for
from tests.mount.origin import ScriptedOrigin
from tests.mount.test_memory import resident
from tests.servers import nginx

SOAK = int(os.environ.get("STREAMFS_SOAK", "1"))
MIB = 1 << 20
QUIET = StreamOptions(probe=False)
_READ_TOGETHER = """
import hashlib, os, sys, threading
paths = sys.stdin.readline().split()
everybody = threading.Barrier(len(paths), action=lambda: (os.write(1, b"together\\n"), sys.stdin.readline()))
def read(path):
    with open(path, "rb", buffering=0) as file:
        digest = hashlib.sha256(file.read(4096))
        everybody.wait()
        while part := file.read(65536):
            digest.update(part)
    os.write(1, f"{path} {digest.hexdigest()}\\n".encode())  # a line in one piece
threads = [threading.Thread(target=read, args=(path,)) for path in paths]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
"""Reads every file named in its first line: the first bytes of all of them before it goes on with any, which it does
after the next line."""


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_hundreds_of_streams_read_at_one_moment_stay_within_the_budget(unmounted: Mounted, tmp_path: Path) -> None:
    """500 documents of a web server, fetched in ranges, and 200 commands that run: in the middle of all of them."""
    documents, commands, size, budget = 500, 200, 384 * 1024, 64 * MIB
    data = os.urandom(size)
    with nginx() as server, (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (server.root / "data").write_bytes(data)
        specs = [
            StreamSpec(name=f"u{number}", source=UrlSource(f"http://{server.authority}/data?{number}"), options=QUIET)
            for number in range(documents)
        ]
        argv = ("sh", "-c", 'cat "$0" && flock --shared "$1" true', str(server.root / "data"), lock.name)
        specs += [StreamSpec(name=f"c{number}", source=CommandSource(argv)) for number in range(commands)]
        register(unmounted.home, specs)
        pid = unmounted.mount("--memory", str(budget), "--read-ahead", "64KiB")
        program = unmounted.start([sys.executable, "-c", _READ_TOGETHER], stdin=-1)
        assert program.stdin is not None and program.stdout is not None
        program.stdin.write(" ".join(str(unmounted.mountpoint / spec.name) for spec in specs).encode() + b"\n")
        program.stdin.flush()
        assert program.stdout.readline() == b"together\n"

        def in_the_middle() -> bool:
            rows = json.loads(unmounted.run("ls", "--json").stdout)["streams"]
            return all(row["readers"] == 1 and 0 < row["buffered"] < size for row in rows)

        wait_for(in_the_middle, "each stream shows its reader, and some of its bytes")
        assert len(processes_with(lock.name)) >= commands, "all of them run"
        print(f"{len(specs)} streams half way: {resident(pid) // MIB} MiB")
        fcntl.flock(lock, fcntl.LOCK_UN)
        output, errors = program.communicate(b"go on\n", timeout=200)
    assert not errors, errors.decode()[-2000:]
    digests = dict(line.rsplit("/", 1)[1].split() for line in output.decode().splitlines())
    assert digests == {spec.name: hashlib.sha256(data).hexdigest() for spec in specs}
    print(f"{documents} documents and {commands} commands: {resident(pid, 'VmHWM') // MIB} MiB at most")
    assert resident(pid, "VmHWM") <= budget + 128 * MIB


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_hundred_thousand_streams_can_be_listed_without_a_request(unmounted: Mounted) -> None:
    origin, count = StallingOrigin(), 100_000
    try:
        specs = [
            StreamSpec(
                name=f"d{number % 1000:03}/s{number}", source=UrlSource(origin.url(f"plays/{number}")), options=QUIET
            )
            for number in range(count)
        ]
        register(unmounted.home, specs)
        began = time.monotonic()
        pid = unmounted.mount()
        mounted = time.monotonic()
        assert len(list(unmounted.mountpoint.iterdir())) == 1000
        listed = time.monotonic()
        found = checked(["find", unmounted.mountpoint, "-type", "f", "-size", "0"], within=200).count(b"\n")
        memory = resident(pid) // MIB
        times = (
            f"mount {mounted - began:.2f} s, first ls {listed - mounted:.2f} s, find {time.monotonic() - listed:.1f} s"
        )
        print(f"{count} streams: {times}, {memory} MiB")
        assert found == count
        assert memory < 200
        assert origin.requests == 0
    finally:
        origin.stop()


SLACK = 512 * 1024
"""Bytes a file may cost besides what is read of it: what the kernel and the fetch have asked for ahead."""
_SCAN = 64 * 1024
_SCANNER = """
import sys
from concurrent.futures import ThreadPoolExecutor
def scan(path):
    with open(path, "rb", buffering=0) as file:
        return len(file.read(int(sys.argv[1])))
with ThreadPoolExecutor(4) as threads:
    print(sum(threads.map(scan, sys.stdin.read().splitlines())))
"""


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("program", "slack"), [("anything", SLACK), ("tumblerd", 0)])
def test_a_scanner_fetches_little_more_than_it_reads(
    program: str, slack: int, unmounted: Mounted, tmp_path: Path
) -> None:
    """A thumbnailer, known by its name, fetches not a byte more."""
    origin, count = StallingOrigin(), 10_000 if SOAK > 1 else 500
    try:
        specs = [
            StreamSpec(name=f"s{number}", source=UrlSource(origin.url(f"plays/{number}")), options=QUIET)
            for number in range(count)
        ]
        register(unmounted.home, specs)
        unmounted.mount()
        scanner = unmounted.start([named(program, tmp_path), "-c", _SCANNER, str(_SCAN)], stdin=-1)
        paths = "".join(f"{unmounted.mountpoint / spec.name}\n" for spec in specs)
        output, errors = scanner.communicate(paths.encode(), timeout=600)
        assert output == b"%d\n" % (count * _SCAN), errors.decode()
        fetched = sum(row["buffered"] for row in json.loads(unmounted.run("ls", "--json").stdout)["streams"])
        print(f"{program}: {fetched // count} bytes of each of {count} files fetched, {origin.requests} requests")
        assert fetched <= count * (_SCAN + slack)
        assert origin.sent <= count * (_SCAN + slack)
    finally:
        origin.stop()


def named(name: str, folder: Path) -> Path:
    """A Python that calls itself so."""
    interpreter = folder / name
    interpreter.symlink_to(sys.executable)
    return interpreter


def test_what_only_a_scanner_has_read_goes_first(unmounted: Mounted, origin: ScriptedOrigin, tmp_path: Path) -> None:
    """The film that somebody watched stays, though the thumbnailer came later and read as much."""
    unmounted.mount("--memory", "4MiB", "--spill-threshold", "64KiB", "--cache-size", "20MiB", "--scanners", "looker,x")
    film = origin.add("film", 8 * MIB)
    assert checked(["cat", unmounted.add("film", film.url)]) == film.bytes()
    looker = named("looker", tmp_path)
    read = "import sys; print(len(open(sys.argv[1], 'rb').read()))"
    for number in range(6):
        scanned = origin.add(f"scanned{number}", 4 * MIB)
        path = unmounted.add(f"scanned{number}", scanned.url)
        assert checked([looker, "-c", read, path]) == b"%d\n" % scanned.size
    requests = film.bodies
    assert checked(["cat", unmounted.mountpoint / "film"]) == film.bytes()
    assert film.bodies == requests, "it was evicted"
