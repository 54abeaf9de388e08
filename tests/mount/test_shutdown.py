"""However the daemon is ended, with readers blocked and commands running, it ends soon and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.mounted import Mounted, end_within, is_alive, is_mounted, processes_with, wait_for
from tests.mount.origin import ScriptedOrigin

WITHIN = 5.0
MIB = 1 << 20
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
if len(sys.argv) < 4:
    subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[1], sys.argv[2], "grandchild"])
time.sleep(100000)
"""
"""A command that ignores SIGTERM, and has a child that does so too."""
_SLEEPER = "python3 -c 'import time; time.sleep(100000)'"


@pytest.fixture
def busy(fs: Mounted, origin: ScriptedOrigin, tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Blocked readers of every kind of stream; a recording half written, a persist under way."""
    marker = str(tmp_path / "marker")
    fs.add("stubborn", "--", "python3", "-c", STUBBORN, STUBBORN, marker)
    fs.add("plain", "--", "sleep", "100000")
    fs.add("shell", "--shell", f"head -c 9000000 /dev/zero; {_SLEEPER} {marker} & wait")
    fs.add("ranged", origin.add("ranged", 20 * MIB, stall_at=12 * MIB).url)
    fs.add("one-way", origin.add("one-way", 20 * MIB, ranged=False, chunked=True, stall_at=12 * MIB).url)
    fs.add("silent", "--no-probe", origin.add("silent", MIB, stall_at=1).url)
    fs.run("persist", "ranged")
    names = ("stubborn", "plain", "shell", "ranged", "one-way", "silent")
    readers = [fs.start(["cat", fs.mountpoint / name], stdout=subprocess.DEVNULL) for name in names]
    wait_for(lambda: all(int(fs.xattr(name, "readers") or 0) for name in names), "all are being read")
    wait_for(lambda: fs.buffered("ranged") == fs.buffered("one-way") == 12 * MIB, "all that comes has come")
    wait_for(lambda: len(processes_with(marker)) == 4, "the commands and their children run")
    assert all(reader.poll() is None for reader in readers)
    yield readers
    for pid in processes_with(marker):  # what commands had started outlives a daemon that was killed
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def nothing_is_left(fs: Mounted, pid: int, readers: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    wait_for(lambda: not is_alive(pid), "the daemon has ended", within=WITHIN)
    for reader in readers:
        assert end_within(reader, WITHIN) == 1, "a blocked reader must get an error"
    wait_for(lambda: not processes_with(str(tmp_path / "marker")), "no command is left", within=WITHIN)
    assert not is_mounted(fs.mountpoint)
    assert not (fs.home / "run" / "control.sock").exists(), "the socket is left"
    left = {path.name for path in (fs.home / "cache").iterdir()}
    assert all(name.startswith("5-") for name in left), f"only what another run can go on with may stay, not {left}"


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "fusermount3 -uz", "umount -l", "streamfs umount --lazy"])
def test_the_daemon_ends_within_seconds_and_leaves_nothing(
    how: str, fs: Mounted, busy: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    pid = fs.pid
    if how.startswith("SIG"):
        os.kill(pid, signal.Signals[how])
    elif how == "streamfs umount --lazy":
        fs.umount("--lazy")
    else:
        subprocess.run([*how.split(), str(fs.mountpoint)], check=True, timeout=WITHIN)
    nothing_is_left(fs, pid, busy, tmp_path)


@pytest.mark.parametrize("command", [["fusermount3", "-u"], ["umount"]])
def test_a_busy_mount_is_reported_and_goes_on(
    command: list[str], fs: Mounted, busy: list[subprocess.Popen[bytes]]
) -> None:
    done = subprocess.run([*command, str(fs.mountpoint)], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode != 0
    assert "busy" in done.stderr
    assert "in use (6 open files)" in fs.refused("umount")
    assert all(reader.poll() is None for reader in busy)


def test_an_idle_mount_can_be_taken_away_from_outside(fs: Mounted) -> None:
    fs.add("it", "--", "echo", "it")
    assert (fs.mountpoint / "it").read_bytes() == b"it\n"
    pid = fs.pid
    subprocess.run(["fusermount3", "-u", str(fs.mountpoint)], check=True, timeout=WITHIN)
    wait_for(lambda: not is_alive(pid), "the daemon has ended", within=WITHIN)
    assert not (fs.home / "run" / "control.sock").exists()


def test_after_kill_9_readers_end_and_the_next_mount_works(
    fs: Mounted, busy: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    fs.kill()
    for reader in busy:
        assert end_within(reader, WITHIN) == 1
    fs.mount()
    names = sorted(path.name for path in fs.mountpoint.iterdir())
    assert "ranged" in names
    assert fs.run("ls").stdout.split() == names
