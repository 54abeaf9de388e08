"""Many programs at one stream: the source runs once, who waits costs nothing, lines arrive when they are written."""

from __future__ import annotations

import hashlib
import os
import select
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.mount.mounted import Mounted, Tap, wait_for
from tests.mount.origin import ScriptedOrigin

MIB = 1 << 20
SOAK = int(os.environ.get("STREAMFS_SOAK", "1"))
PROGRAMS = 64
SIZE = (50 if SOAK > 1 else 5) * 10**6

_SOURCE = """
import os, sys
with open(sys.argv[1], "a") as starts:
    starts.write("started\\n")
with open(sys.argv[2], "rb") as content:
    while piece := content.read(1 << 20):
        sys.stdout.buffer.write(piece)
"""


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["command", "url"])
def test_sixty_four_programs_read_one_run_of_the_source(
    kind: str, fs: Mounted, origin: ScriptedOrigin, tmp_path: Path
) -> None:
    document = origin.add("shared", SIZE, ranged=False)
    starts = tmp_path / "starts"
    if kind == "command":
        (tmp_path / "content").write_bytes(document.bytes())
        path = fs.add("shared", "--", sys.executable, "-c", _SOURCE, starts, tmp_path / "content")
    else:
        path = fs.add("shared", "--no-probe", document.url)
    expected = hashlib.sha256(document.bytes()).hexdigest().encode()
    began = time.monotonic()
    readers = [fs.start(["sha256sum", path]) for _ in range(PROGRAMS)]
    found = [reader.communicate(timeout=500) for reader in readers]
    print(f"{PROGRAMS} x {SIZE} bytes of a {kind}: {time.monotonic() - began:.1f} s")
    assert [errors for _, errors in found] == [b""] * PROGRAMS
    assert [output.split()[0] for output, _ in found] == [expected] * PROGRAMS
    if kind == "command":
        assert starts.read_text() == "started\n"
    else:
        assert document.bodies == 1
        # An open that comes late asks whether the version is still this one: that reply has a body, which is cut short.
        assert SIZE <= document.sent < 2 * SIZE


def test_programs_that_wait_cost_no_processor_time(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("stalled", 8 * MIB, ranged=False, chunked=True, stall_at=MIB)
    path = fs.add("stalled", "--no-probe", document.url)
    readers = [fs.start(["cat", path], stdout=subprocess.DEVNULL) for _ in range(PROGRAMS)]
    assert document.stalled.wait(20)
    wait_for(lambda: fs.xattr("stalled", "readers") == str(PROGRAMS), "all have it open")
    pids = [fs.pid, *(reader.pid for reader in readers)]

    def spent() -> float:
        return sum(map(processor_seconds, pids))

    def idle() -> bool:
        """For a second: the daemon looks four times whether one was told to end. Waiting that costs processor time
        costs it all the time."""
        before, began = spent(), time.monotonic()
        time.sleep(1)
        return spent() - before < 0.1 * (time.monotonic() - began)

    wait_for(idle, "nobody reads any more, and nobody is busy")
    document.go.set()
    assert [reader.wait(60) for reader in readers] == [0] * PROGRAMS


_FOLLOWER = """
import os, select, sys, time
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_NONBLOCK)
poll = select.{how}()
poll.register(fd, select.POLLIN)
print("open", flush=True)
while True:
    poll.poll()
    try:
        piece = os.read(fd, 65536)
    except BlockingIOError:
        continue
    if not piece:
        break
    print(time.monotonic_ns(), piece.decode(), end="", flush=True)
"""


@pytest.mark.parametrize("how", ["poll", "epoll"])
def test_lines_reach_who_follows_them_as_they_are_written(how: str, fs: Mounted, tap: Tap) -> None:
    path = fs.add("log", *tap.argv)
    followers = [fs.python(_FOLLOWER.format(how=how), path) for _ in range(4)]
    for follower in followers:
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"open\n"
    delays: list[float] = []
    for number in range(30 * SOAK):
        line = f"line {number}\n".encode()
        written = time.monotonic_ns()
        tap.write(line)
        for follower in followers:
            assert follower.stdout is not None
            assert select.select([follower.stdout], [], [], 20)[0], "the line does not arrive"
            seen, _, text = follower.stdout.readline().partition(b" ")
            assert text == line
            delays.append((int(seen) - written) / 1e6)
        time.sleep(max(0.0, (0.2 if SOAK > 1 else 0.05) - (time.monotonic_ns() - written) / 1e9))
    tap.close()
    assert [follower.wait(20) for follower in followers] == [0] * len(followers)
    print(f"{how}: median {statistics.median(delays):.2f} ms, most {max(delays):.2f} ms")
    assert statistics.median(delays) < 50


def test_cached_reads_stay_quick_while_the_source_hangs(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("hanging", 32 * MIB, ranged=False, stall_at=8 * MIB)
    path = fs.add("hanging", "--no-probe", document.url)
    waiting = [fs.start(["cat", path], stdout=subprocess.DEVNULL) for _ in range(16)]
    assert document.stalled.wait(20)
    wait_for(lambda: fs.buffered("hanging") == 8 * MIB, "all that was sent has arrived")
    taken: list[float] = []
    guard = threading.Lock()

    def read(seed: int) -> None:
        with path.open("rb", buffering=0) as file:
            for number in range(250):
                offset = (number * 7919 + seed * 104_729) * 64 % (8 * MIB - 4096)
                began = time.perf_counter()
                piece = os.pread(file.fileno(), 4096, offset)
                passed = (time.perf_counter() - began) * 1000
                assert piece == document.bytes(offset, offset + 4096)
                with guard:
                    taken.append(passed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(taken) == 1000
    taken.sort()
    print(f"cached reads of 4 KiB: median {taken[500]:.2f} ms, p99 {taken[990]:.2f} ms, most {taken[-1]:.2f} ms")
    assert taken[500] < 20
    assert all(reader.poll() is None for reader in waiting)
    document.go.set()
    assert [reader.wait(60) for reader in waiting] == [0] * 16
