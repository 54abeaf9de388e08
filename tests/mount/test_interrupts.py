"""A reader that waits for a stalled source can be told to stop, and holds nobody up meanwhile."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.mount.mounted import Mounted, checked, end_within, wait_for
from tests.mount.origin import Document, ScriptedOrigin

MIB = 1 << 20
PROMISED = 1.0
"""Seconds within which a reader that was told to stop has ended."""
SLACK = 1.0
"""Seconds that a busy machine may take to notice."""


def stalled_reader(
    fs: Mounted, origin: ScriptedOrigin, length: str, argv: list[str]
) -> tuple[subprocess.Popen[bytes], Document, Path]:
    """A program that waits in a read of a stream whose first 100,000 bytes have arrived."""
    document = origin.add("stalled", 8 * MIB, ranged=False, chunked=length == "unknown", stall_at=100_000)
    path = fs.add("stalled", document.url)
    reader = fs.start([word.replace("PATH", str(path)) for word in argv])
    assert document.stalled.wait(20)
    wait_for(lambda: fs.buffered("stalled") == 100_000, "all that was sent has arrived")
    wait_for(lambda: _waits(reader.pid), "the reader waits in the kernel")
    return reader, document, path


def _waits(pid: int) -> bool:
    """Whether the process waits for an answer of the file system."""
    places = Path("/proc").glob(f"{pid}/task/*/wchan")
    return any(place.read_text() not in ("", "0") for place in places)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("length", ["known", "unknown"])
@pytest.mark.parametrize("program", ["cat", "dd", "threads"])
def test_a_blocked_reader_ends_at_once(
    program: str, length: str, number: signal.Signals, fs: Mounted, origin: ScriptedOrigin
) -> None:
    threads = (
        "import os,sys,threading\n"
        "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "ts = [threading.Thread(target=os.pread, args=(fd, 10, n << 20)) for n in range(1, 5)]\n"
        "[t.start() for t in ts]; [t.join() for t in ts]\n"
    )
    argv = {
        "cat": ["cat", "PATH"],
        "dd": ["dd", "if=PATH", "bs=64k", "status=none"],
        "threads": ["python3", "-c", threads, "PATH"],
    }[program]
    reader, _, path = stalled_reader(fs, origin, length, argv)
    other = fs.start(["cat", path])
    reader.send_signal(number)
    assert end_within(reader, PROMISED + SLACK) == -number
    assert other.poll() is None, "others go on"
    assert checked(["cat", fs.add("quick", "--", "echo", "quick")], within=5) == b"quick\n"
    origin.documents["stalled"].go.set()
    assert other.communicate(timeout=30)[0] == origin.documents["stalled"].bytes()


def test_a_process_that_is_killed_while_it_opens_a_stream_ends_at_once(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("hanging", MIB, stall_at=0)
    path = fs.add("hanging", "--no-probe", "--size-policy", "wait", document.url)
    document.chunked, document.ranged = True, False
    opener = fs.start(["cat", path])
    assert document.stalled.wait(20)
    wait_for(lambda: _waits(opener.pid), "it waits")
    opener.kill()
    assert end_within(opener, PROMISED + SLACK) == -signal.SIGKILL


def test_a_reader_that_handles_a_signal_goes_on_reading(fs: Mounted, origin: ScriptedOrigin) -> None:
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGUSR1, lambda *_: None)\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "total = 0\n"
        "while piece := os.read(fd, 1 << 20): total += len(piece)\n"
        "print(total)\n"
    )
    reader, document, _ = stalled_reader(fs, origin, "unknown", ["python3", "-c", script, "PATH"])
    reader.send_signal(signal.SIGUSR1)
    assert checked(["cat", fs.add("quick", "--", "echo", "quick")], within=5) == b"quick\n"
    assert reader.poll() is None
    document.go.set()
    assert reader.communicate(timeout=30)[0] == b"%d\n" % document.size


@pytest.mark.parametrize("length", ["known", "unknown"])
def test_a_hundred_blocked_readers_hold_nobody_up(length: str, fs: Mounted, origin: ScriptedOrigin) -> None:
    reader, document, path = stalled_reader(fs, origin, length, ["cat", "PATH"])
    readers = [reader, *(fs.start(["tail", "-c", "+4000001", path]) for _ in range(100))]
    wait_for(lambda: fs.xattr("stalled", "readers") == "101", "all have it open")
    quick = origin.add("quick", 3 * MIB)
    assert checked(["cat", fs.add("quick", quick.url)], within=15) == quick.bytes()
    checked(["ls", "-la", fs.mountpoint], within=5)
    for waiting in readers[1:]:
        waiting.terminate()
    for waiting in readers[1:]:
        end_within(waiting, 10)
    document.go.set()
    assert reader.communicate(timeout=30)[0] == document.bytes()
