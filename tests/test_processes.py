"""What /proc tells: who was told to end, who waits, who has which file open."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streamfs import processes

HOLDS_A_SIGNAL = """
import os, signal, sys
kind = getattr(signal, sys.argv[1])
signal.pthread_sigmask(signal.SIG_BLOCK, {kind})
signal.signal(kind, lambda *_: None)
os.kill(os.getpid(), kind)
print("ready", flush=True)
sys.stdin.read()
"""
HOLDS_A_FILE = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | int(sys.argv[3]))
os.lseek(fd, int(sys.argv[2]), os.SEEK_SET)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def a_process(script: str, *arguments: str) -> Iterator[int]:
    """A process that has said that it is ready, and lives until the block ends."""
    child = subprocess.Popen([sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        try:
            yield child.pid
        finally:
            child.kill()


def gone() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_a_process_that_nobody_told_anything_is_not_ending() -> None:
    assert not processes.is_being_killed(os.getpid())


def test_a_process_that_is_gone_is_told_apart() -> None:
    with pytest.raises(FileNotFoundError):
        processes.is_being_killed(gone())


def test_a_blocked_signal_does_not_count() -> None:
    with a_process(HOLDS_A_SIGNAL, "SIGTERM") as pid:
        assert not processes.is_being_killed(pid)


def masks(own: int = 0, shared: int = 0, blocked: int = 0, threads: int = 1) -> bytes:
    return f"Threads:\t{threads}\nSigPnd:\t{own:016x}\nShdPnd:\t{shared:016x}\nSigBlk:\t{blocked:016x}\n".encode()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL])
def test_a_pending_signal_that_ends_programs_counts(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_read", lambda _: masks(shared=1 << (kind - 1)))
    assert processes.is_being_killed(os.getpid())


@pytest.mark.parametrize("kind", [signal.SIGCHLD, signal.SIGALRM, signal.SIGWINCH, signal.SIGUSR1])
def test_a_pending_signal_that_programs_live_with_does_not(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_read", lambda _: masks(own=1 << (kind - 1)))
    assert not processes.is_being_killed(os.getpid())


def test_a_signal_for_one_thread_of_many_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        task = f"/task/{thread.native_id}/"
        pending = 1 << (signal.SIGKILL - 1)
        monkeypatch.setattr(processes, "_read", lambda path: masks(own=pending if task in path else 0, threads=2))
        assert processes.is_being_killed(os.getpid())
    finally:
        stop.set()
        thread.join()


def test_the_process_of_a_thread() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(processes.process_of(threading.get_native_id())))
    thread.start()
    thread.join()
    assert found == [os.getpid()]
    assert processes.process_of(0) == 0


def test_who_has_a_file_open_and_where(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    info = path.stat()
    device = os.major(info.st_dev), os.minor(info.st_dev)
    with a_process(HOLDS_A_FILE, str(path), "42", "0") as first, a_process(HOLDS_A_FILE, str(path), "7", "0") as second:
        expected = {info.st_ino: {first: frozenset({42}), second: frozenset({7})}}
        assert processes.holders([info.st_ino], None) == expected
        assert processes.holders([info.st_ino, 1], device) in (expected, {})  # overlays show another device number
        assert processes.holders([info.st_ino], (device[0], device[1] + 100_000)) == {}, "of another mount"
        assert processes.holders([info.st_ino + 1], None).get(info.st_ino + 1, {}).keys().isdisjoint({first, second})


def test_only_descriptors_that_are_nonblocking_now_count(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    inode = path.stat().st_ino
    with a_process(HOLDS_A_FILE, str(path), "0", str(os.O_NONBLOCK)) as pid:
        assert processes.is_nonblocking(pid, inode)
        assert not processes.is_nonblocking(pid, inode + 1)
    with a_process(HOLDS_A_FILE, str(path), "0", "0") as pid:
        assert not processes.is_nonblocking(pid, inode)
    assert not processes.is_nonblocking(gone(), inode)


def test_when_a_process_started() -> None:
    before = processes.now()
    with a_process("print('ready', flush=True); import sys; sys.stdin.read()") as pid:
        assert before - 0.02 <= processes.started(pid) <= processes.now()
    assert processes.started(gone()) == 0.0


def test_threads_that_wait_for_no_file_system_do_not_count() -> None:
    with a_process("print('ready', flush=True); import sys; sys.stdin.read()") as pid:
        assert processes.waiting_threads(pid) in (0, None)  # None: it had not come to wait yet
    assert processes.waiting_threads(gone()) is None
