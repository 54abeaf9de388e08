"""Many streams at once, many registered, many opened one after another. Figures are printed (pytest -s)."""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from streamfs.spec import CommandSource, StreamOptions, StreamSpec, UrlSource
from tests.mount.crowd import SIZE, StallingOrigin, register
from tests.mount.mounted import Mounted, checked
from tests.mount.test_memory import resident

SOAK = int(os.environ.get("STREAMFS_SOAK", "1"))
MIB = 1 << 20
QUIET = StreamOptions(probe=False)
_READ_ALL = """
import hashlib, os, sys, threading
def read(path):
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while part := file.read(65536):
            digest.update(part)
    os.write(1, (path.rsplit("/", 1)[1] + " " + digest.hexdigest() + "\\n").encode())  # a line in one piece
threads = [threading.Thread(target=read, args=(line.strip(),)) for line in sys.stdin]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_hundreds_of_streams_at_once_stay_within_the_budget(unmounted: Mounted, tmp_path: Path) -> None:
    files, commands, size, budget = 500, 200, 256 * 1024, 64 * MIB
    data = os.urandom(size)
    (tmp_path / "data").write_bytes(data)
    url = (tmp_path / "data").as_uri()
    specs = [StreamSpec(name=f"u{number}", source=UrlSource(url), options=QUIET) for number in range(files)]
    argv = ("cat", str(tmp_path / "data"))
    specs += [StreamSpec(name=f"c{number}", source=CommandSource(argv)) for number in range(commands)]
    register(unmounted.home, specs)
    pid = unmounted.mount("--memory", str(budget))
    program = unmounted.start(["python3", "-c", _READ_ALL], stdin=-1)
    paths = "".join(f"{unmounted.mountpoint / spec.name}\n" for spec in specs)
    output, errors = program.communicate(paths.encode(), timeout=200)
    assert not errors, errors.decode()[-2000:]
    digests = dict(line.split() for line in output.decode().splitlines())
    assert digests == {spec.name: hashlib.sha256(data).hexdigest() for spec in specs}
    print(f"{files} files and {commands} commands: {resident(pid, 'VmHWM') // MIB} MiB at most")
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


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_scanner_fetches_little_more_than_it_reads(unmounted: Mounted) -> None:
    origin, count = StallingOrigin(), 10_000 if SOAK > 1 else 1000
    try:
        specs = [
            StreamSpec(name=f"s{number}", source=UrlSource(origin.url(f"plays/{number}")), options=QUIET)
            for number in range(count)
        ]
        register(unmounted.home, specs)
        unmounted.mount()

        def scan(spec: StreamSpec) -> int:
            with (unmounted.mountpoint / spec.name).open("rb", buffering=0) as file:
                return len(file.read(_SCAN))

        with ThreadPoolExecutor(4) as scanners:
            assert sum(scanners.map(scan, specs)) == count * _SCAN
        fetched = sum(unmounted.buffered(spec.name) for spec in specs)
        print(f"{count} files of {SIZE} bytes: {fetched // count} bytes each fetched, {origin.requests} requests")
        assert fetched <= count * (_SCAN + SLACK)
        assert origin.sent <= count * (_SCAN + SLACK)
    finally:
        origin.stop()
