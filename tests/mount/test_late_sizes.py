"""What the kernel learns late of a length that was unknown: no program may take that for the end of the file."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.mounted import WAIT, Mounted, Tap, checked, wait_for

CONTENT = b"all there is\n" * 1000

_IDLE = """
import os, sys
fd = os.open(sys.argv[1], os.O_PATH)
os.sched_setaffinity(0, {int(sys.argv[2])})
print("ready", flush=True)
sys.stdin.readline()
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
size = os.fstat(fd).st_size
os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
print(size, flush=True)
"""
"""Asks for the length, and takes the answer into the kernel's books when its processor has nothing else to do."""
_READER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print("open", flush=True)
sys.stdin.readline()
print(len(os.pread(fd, 1 << 20, 0)), flush=True)
"""
_BUSY = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
print("busy", flush=True)
while True:
    pass
"""


@pytest.fixture
def processor(fs: Mounted) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Programs that keep a processor busy; they end with the test, and the daemon goes on."""
    busy: list[subprocess.Popen[bytes]] = []
    yield busy
    os.kill(fs.pid, signal.SIGCONT)
    for program in busy:
        program.kill()
        program.wait()


def test_an_answer_that_comes_late_to_who_asked_while_the_length_was_unknown_ends_no_file_early(
    fs: Mounted, tap: Tap, processor: list[subprocess.Popen[bytes]]
) -> None:
    number = str(min(os.sched_getaffinity(0)))
    path, daemon = fs.add("log", "--size-policy", "wait", *tap.argv), fs.pid
    tap.write(CONTENT)
    reader = Program(fs, _READER, path)
    wait_for(lambda: fs.status("log")["buffered"] == len(CONTENT), "the run has begun, and the open waits for its end")
    late = Program(fs, _IDLE, path, number)
    assert late.says() == "ready"
    os.kill(daemon, signal.SIGSTOP)
    late.go_on()
    wait_for(lambda: _asks_the_daemon(late.pid), "it has asked for the length")
    for _ in range(3):
        busy = Program(fs, _BUSY, number)
        processor.append(busy.process)
        assert busy.says() == "busy"
    os.kill(daemon, signal.SIGCONT)
    checked(["stat", fs.mountpoint])  # asked later, so that it is answered later
    tap.close()
    wait_for(lambda: fs.status("log")["state"] == "complete", "the length is known")
    assert reader.says() == "open"
    os.kill(daemon, signal.SIGSTOP)
    reader.go_on()
    wait_for(lambda: _asks_the_daemon(reader.pid), "it asks for the length, which is known by now")
    for program in processor:
        program.kill()
    assert late.says() == "0", "it did not come late"
    os.kill(daemon, signal.SIGCONT)
    assert reader.says() == str(len(CONTENT)), "the end of the file came early"


class Program:
    """One that waits for our word."""

    def __init__(self, fs: Mounted, script: str, *arguments: str | Path) -> None:
        self.process = fs.start([sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE)
        self.pid = self.process.pid

    def says(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], WAIT)[0], "it says nothing"
        return self.process.stdout.readline().decode().rstrip("\n")

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()


def _asks_the_daemon(pid: int) -> bool:
    """Whether a thread of the process waits for the answer to a request."""
    places = [(task / "wchan").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return any("request_wait" in place for place in places)
