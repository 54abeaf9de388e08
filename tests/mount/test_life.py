"""How the daemon comes and goes: nothing is left behind, and what a dead one left is cleared."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.mounted import (
    CLI,
    Mounted,
    Tap,
    checked,
    end_within,
    is_alive,
    is_mounted,
    names_in,
    processes_with,
    wait_for,
)
from tests.mount.origin import ScriptedOrigin


def assert_nothing_left(fs: Mounted, pid: int) -> None:
    assert not is_alive(pid)
    assert not is_mounted(fs.mountpoint)
    assert not (fs.home / "run" / "control.sock").exists()
    assert names_in(fs.mountpoint) == []


@pytest.fixture
def busy(fs: Mounted, tmp_path: Path) -> Path:
    """A running command whose whole family has this path in its arguments."""
    mark = tmp_path / "mark"
    mark.touch()
    path = fs.add("family", "--", "sh", "-c", 'tail -f "$0" & sh -c "tail -f $0; true" & wait', mark)
    fs.start(["cat", path])
    wait_for(lambda: len(processes_with(str(mark))) >= 4, "the family runs")
    return mark


def test_mount_returns_when_the_mount_answers(unmounted: Mounted) -> None:
    unmounted.add("early", "--", "echo", "early")
    pid = unmounted.mount()
    assert (unmounted.mountpoint / "early").read_bytes() == b"early\n"
    assert is_alive(pid)
    assert os.getsid(pid) != os.getsid(0), "it has a session of its own"
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    for number in (0, 1, 2):
        assert Path(f"/proc/{pid}/fd/{number}").readlink() == Path("/dev/null")


def test_umount_leaves_nothing(fs: Mounted) -> None:
    fs.add("read", "--", "echo", "it")
    assert (fs.mountpoint / "read").read_bytes() == b"it\n"
    pid = fs.pid
    fs.umount()
    assert_nothing_left(fs, pid)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "umount --lazy", "fusermount3 -u"])
def test_an_end_leaves_no_process_no_mount_and_no_socket(how: str, fs: Mounted, busy: Path) -> None:
    pid = fs.pid
    if how.startswith("SIG"):
        os.kill(pid, signal.Signals[how])
    elif how.startswith("umount"):
        fs.umount("--lazy")
    else:
        fs.close_readers()
        checked(["fusermount3", "-u", fs.mountpoint])
    wait_for(lambda: not is_alive(pid), "the daemon has ended", 15)
    wait_for(lambda: not processes_with(str(busy)), "the command's whole family has ended", 15)
    assert_nothing_left(fs, pid)


def test_kill_9_ends_the_commands_too_and_the_next_mount_clears_the_dead_one(fs: Mounted, tmp_path: Path) -> None:
    path = fs.add("endless", "--", "cat", "/dev/zero", tmp_path / "mark")
    checked(["head", "-c", "10", path])
    assert processes_with(str(tmp_path / "mark"))
    fs.kill()
    wait_for(lambda: not processes_with(str(tmp_path / "mark")), "the command has ended", 10)
    assert is_mounted(fs.mountpoint)
    with pytest.raises(OSError) as failure:
        names_in(fs.mountpoint)
    assert failure.value.errno == errno.ENOTCONN
    fs.mount()
    assert names_in(fs.mountpoint) == ["endless"]
    assert sum(str(fs.mountpoint) in line for line in Path("/proc/self/mountinfo").read_text().splitlines()) == 1
    checked(["head", "-c", "10", path])


def test_umount_clears_a_dead_mount(fs: Mounted) -> None:
    fs.kill()
    assert str(fs.mountpoint) in fs.refused("umount")
    fs.umount(str(fs.mountpoint))
    assert not is_mounted(fs.mountpoint)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_foreground_stays_and_ends_in_order_on_a_signal(number: signal.Signals, unmounted: Mounted) -> None:
    process = unmounted.start_foreground()
    path = unmounted.add("read", "--", "echo", "it")
    assert path.read_bytes() == b"it\n"
    assert process.poll() is None
    process.send_signal(number)
    assert end_within(process, 10) == 0
    assert_nothing_left(unmounted, process.pid)


def test_foreground_ends_in_order_by_umount(unmounted: Mounted) -> None:
    process = unmounted.start_foreground()
    unmounted.umount()
    assert end_within(process, 10) == 0
    assert_nothing_left(unmounted, process.pid)


def test_an_end_fails_readers_that_wait(fs: Mounted, tap: Tap) -> None:
    path = fs.add("tap", *tap.argv)
    reader = fs.start(["cat", path])
    fs.wait_for_state("tap", "live")
    os.kill(fs.pid, signal.SIGTERM)
    assert end_within(reader, 10) == 1


_STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(100000)
"""


def test_a_second_daemon_on_the_same_home_is_refused(fs: Mounted, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    told = fs.refused("mount", tmp_path / "other")
    assert str(fs.pid) in told
    assert not is_mounted(tmp_path / "other")
    assert fs.answers()


def test_a_mount_right_after_the_end_of_another_waits_for_it(fs: Mounted) -> None:
    """With a command that has to be waited for, too."""
    path = fs.add("stubborn", "--", "python3", "-c", _STUBBORN)
    fs.start(["cat", path])
    wait_for(lambda: fs.buffered("stubborn") == len("deaf\n"), "the command pays no heed to SIGTERM")
    first = fs.pid
    os.kill(first, signal.SIGTERM)
    assert fs.mount() != first
    assert names_in(fs.mountpoint) == ["stubborn"]


def test_two_homes_have_a_daemon_each(fs: Mounted, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    other = Mounted(tmp_path / "second")
    try:
        other.mount()
        other.add("there", "--", "true")
        fs.add("here", "--", "true")
        assert names_in(fs.mountpoint) == ["here"]
        assert names_in(other.mountpoint) == ["there"]
    finally:
        other.close()


def test_umount_of_a_busy_mount_is_refused_and_lazy_does_it(fs: Mounted) -> None:
    path = fs.add("open", "--", "echo", "it")
    pid = fs.pid
    file = path.open("rb", buffering=0)
    try:
        assert file.read(1) == b"i"
        told = fs.refused("umount")
        assert "in use" in told
        assert "--lazy" in told
        assert path.read_bytes() == b"it\n", "it goes on"
        fs.umount("--lazy")
        assert not is_alive(pid)
        assert not is_mounted(fs.mountpoint)
        with pytest.raises(OSError):
            file.read(1)
    finally:
        with contextlib.suppress(OSError):  # the file system is gone, and close says so
            file.close()


def test_umount_from_within_the_mount_is_refused_or_done_but_never_half_done(fs: Mounted) -> None:
    fs.add("folder/file", "--", "echo", "it")
    pid = fs.pid
    sleeper = fs.start([sys.executable, "-c", "import sys; sys.stdin.read()"], cwd=fs.mountpoint, stdin=subprocess.PIPE)
    done = fs.run("umount", check=False)
    if done.returncode == 0:
        assert not is_alive(pid)
        assert not is_mounted(fs.mountpoint)
    else:
        assert "in use" in done.stderr
        assert fs.answers()
    assert sleeper.poll() is None


def test_the_catalogue_can_be_changed_without_a_daemon(unmounted: Mounted) -> None:
    unmounted.add("one", "--", "echo", "1")
    unmounted.add("two", "--", "echo", "2")
    unmounted.run("mv", "one", "three")
    unmounted.run("rm", "two")
    assert unmounted.run("ls").stdout == "three\n"
    unmounted.mount()
    assert names_in(unmounted.mountpoint) == ["three"]
    assert (unmounted.mountpoint / "three").read_bytes() == b"1\n"


def test_save_works_without_a_daemon(unmounted: Mounted, origin: ScriptedOrigin, tmp_path: Path) -> None:
    document = origin.add("offline", 2_000_003)
    unmounted.add("offline", document.url)
    unmounted.run("save", "offline", tmp_path / "saved")
    assert (tmp_path / "saved").read_bytes() == document.bytes()
    unmounted.add("bad", "--shell", "echo part; exit 4")
    assert "4" in unmounted.refused("save", "bad", tmp_path / "never")
    assert not list(tmp_path.glob("never*"))


def test_save_of_a_stream_that_fails_leaves_nothing(fs: Mounted, tmp_path: Path) -> None:
    fs.add("bad", "--shell", "echo part; exit 4")
    assert "4" in fs.refused("save", "bad", tmp_path / "never")
    assert not list(tmp_path.glob("never*"))


def test_the_daemon_keeps_nobody_waiting_who_started_it(unmounted: Mounted) -> None:
    """Whoever reads the output of `mount` gets its end when it returns, not when the daemon ends."""
    done = subprocess.run(
        [*CLI, "mount", str(unmounted.mountpoint)],
        env=unmounted.environment,
        capture_output=True,
        timeout=20,
        check=True,
    )
    assert done.stdout == done.stderr == b""
    unmounted.adopt()


def test_everything_that_streamfs_keeps_is_private(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("secret", 8 << 20)
    checked(["cat", fs.add("secret", document.url)])
    wait_for(lambda: fs.data_files, "bytes on disk")
    for place in (fs.home, *fs.home.rglob("*")):
        mode = place.lstat().st_mode & 0o777
        assert mode & 0o077 == 0, f"{place} is {mode:o}"


_TOLD_OF_REQUESTS_THAT_ARE_NONE = """
import sys
import trio
from streamfs import turns

async def wait_readable(self, fd, *, real=turns.Turns.wait_readable):
    if self._poll is None:
        return await real(self, fd)
    await trio.lowlevel.checkpoint()

turns.Turns.wait_readable = wait_readable
from streamfs.cli import main
sys.argv = ["streamfs", "mount", sys.argv[1], "--foreground"]
main()
"""


def test_requests_that_the_kernel_takes_back_before_they_are_read_hold_up_nobody(unmounted: Mounted, tap: Tap) -> None:
    path = unmounted.add("slow", *tap.argv)
    unmounted.python(_TOLD_OF_REQUESTS_THAT_ARE_NONE, unmounted.mountpoint)
    wait_for(lambda: is_mounted(unmounted.mountpoint) and unmounted.answers(), "the mount answers")
    reader = unmounted.start(["cat", path])
    tap.write(b"what comes while nothing is asked of the mount")
    wait_for(lambda: unmounted.status("slow")["buffered"] > 0, "the bytes arrived")
    tap.close()
    assert reader.communicate(timeout=30)[0] == b"what comes while nothing is asked of the mount"
    unmounted.umount()
