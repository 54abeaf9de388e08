"""Readers of stalled streams hold up nobody, and each of them can be stopped alone.

What a blocked crowd leaves of everybody else's speed is printed (pytest -s), not judged: the tests prove that
everything goes on while all of the crowd are still blocked.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.mount.crowd import Mode
from tests.mount.mounted import Mounted, Tap, end_within, is_alive, wait_for
from tests.mount.origin import ScriptedOrigin

COUNT = 1000 if int(os.environ.get("STREAMFS_SOAK", "1")) > 1 else 200
NOBODY = 65534
PACKAGE = Path(__file__).parents[2]
MIB = 1 << 20
SLACK = 1.0
"""Seconds that a busy machine may take besides the second that is promised."""

_AS_NOBODY = f"""
set -e
mount --make-rprivate /
if [ "$1" = raised ]; then mount -t fusectl fusectl /sys/fs/fuse/connections; fi
if [ "$1" = fixed ] && mountpoint -q /sys/fs/fuse/connections; then umount /sys/fs/fuse/connections; fi
mknod -m 666 "$2/fuse" c 10 229
mount --bind "$2/fuse" /dev/fuse
shift 2
exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups \\
    --inh-caps +dac_read_search --ambient-caps +dac_read_search -- "$@"
"""
"""An ordinary user's program, in a mount namespace that ends with it. It may read and enter what is only root's, as the
interpreter may rest there; that has no part in what FUSE allows."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that an ordinary user can reach too."""
    with tempfile.TemporaryDirectory(prefix="streamfs-crowd-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def crowd(folder: Path, mode: Mode, count: int, *before: str | Path) -> dict[str, Any]:
    """Run tests.mount.crowd: what it measured, having checked that all goes on and all ends."""
    folder.mkdir(exist_ok=True)
    command = [*before, sys.executable, "-B", "-m", "tests.mount.crowd"]
    command += ["--folder", folder, "--count", str(count), "--mode", mode]
    done = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    figures: dict[str, Any] = json.loads(done.stdout)
    print(f"{mode}, {figures}")
    assert figures["blocked"] == count
    return figures


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.parametrize("mode", ["cached", "direct"])
def test_everything_goes_on_beside_blocked_readers(mode: Mode, folder: Path) -> None:
    crowd(folder, mode, COUNT)


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("mode", "limit"), [("cached", "raised"), ("cached", "fixed"), ("direct", "fixed")], ids=lambda value: str(value)
)
def test_the_same_for_an_ordinary_user_whatever_the_kernels_limit(
    mode: Mode, limit: Literal["raised", "fixed"], folder: Path
) -> None:
    """`fixed`: nobody mounted fusectl, so that the kernel stays at 12 background reads at a time."""
    place = folder / "nobody"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    as_nobody = ["unshare", "--mount", "sh", "-c", _AS_NOBODY, "sh", limit, str(folder)]
    assert crowd(place, mode, COUNT if COUNT > 200 else COUNT // 2, *as_nobody)["uid"] == NOBODY


_READER = """
import os, signal, sys, threading
path, kind = sys.argv[1:]
got = []
def read():
    fd = os.open(path, os.O_RDONLY)
    print("reading", flush=True)
    os.read(fd, 100)
if kind == "threads":
    threading.Thread(target=read).start()
    threading.Event().wait()
elif kind == "opened by a thread that ended":
    def opening():
        got.append(os.open(path, os.O_RDONLY))
    opener = threading.Thread(target=opening)
    opener.start()
    opener.join()
    print("reading", flush=True)
    os.read(got[0], 100)
elif kind.startswith("page fault"):
    import mmap
    fd = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
    if kind != "page fault":
        import ctypes
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        place = libc.mmap(None, ctypes.c_size_t(4096), 1, 2, fd, ctypes.c_long(0))
        mapped.close()  # Python's mapping keeps a descriptor of its own
        os.close(fd)
    if kind == "page fault, inherited" and os.fork():
        os.wait()
        sys.exit()
    print(os.getpid() if kind == "page fault, inherited" else "reading", flush=True)
    mapped[0] if kind == "page fault" else ctypes.string_at(place, 1)
else:
    read()
"""
_DEFAULT = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"


def stalled(fs: Mounted, origin: ScriptedOrigin, tap: Tap, mode: Mode) -> Path:
    if mode == "direct":
        return fs.add("stalled", *tap.argv)
    return fs.add("stalled", "--no-probe", origin.add("stalled", MIB, stall_at=1).url)


def reading(fs: Mounted, path: Path, kind: str) -> subprocess.Popen[bytes]:
    """A program that waits for bytes of `path`."""
    program = fs.python(_DEFAULT + _READER, path, kind)
    assert program.stdout is not None
    assert program.stdout.readline() == b"reading\n"
    wait_for(lambda: _waits_in_the_mount(program.pid), "it waits for bytes")
    return program


def _waits_in_the_mount(pid: int) -> bool:
    """Whether a thread of the process sleeps in a request to a FUSE daemon, or for a page that one brings."""
    stacks = [(task / "wchan").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return any("fuse" in stack or "folio" in stack or "request" in stack for stack in stacks)


def _waits_for_its_input(pid: int) -> bool:
    """As _waits_in_the_mount, but not for a page of its own program, as it may while it begins."""
    call = Path(f"/proc/{pid}/syscall").read_text()  # read(0): its number, on x86 and on others, and its arguments
    return call.startswith(("0 0x0 ", "63 0x0 ")) and _waits_in_the_mount(pid)


KINDS = ["one thread", "threads", "opened by a thread that ended", "page fault", "page fault, file closed"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["cached", "direct"])
def test_a_blocked_program_ends_when_it_is_told_to_and_no_other(
    mode: Mode, kind: str, number: signal.Signals, fs: Mounted, origin: ScriptedOrigin, tap: Tap
) -> None:
    if mode == "direct" and kind.startswith("page fault"):
        pytest.skip("a file of unknown length cannot be mapped: its size is 0")
    path = stalled(fs, origin, tap, mode)
    other = fs.start(["cat", path])
    wait_for(lambda: _waits_in_the_mount(other.pid), "another waits for bytes")
    told = reading(fs, path, kind)
    told.send_signal(number)
    assert end_within(told, 10) == -number
    assert other.poll() is None
    wait_for(lambda: fs.xattr("stalled", "readers") == "1", "its file is closed")
    if mode == "direct":
        tap.write(b"at last")
        wait_for(lambda: fs.buffered("stalled") == 7, "it has arrived")
        tap.close()
        assert other.communicate(timeout=20)[0] == b"at last"
    else:
        document = origin.documents["stalled"]
        document.go.set()
        assert other.communicate(timeout=20)[0] == document.bytes()
    assert other.returncode == 0


def test_a_program_that_has_only_a_mapping_that_it_inherited_ends_with_the_stall_timeout(
    fs: Mounted, origin: ScriptedOrigin
) -> None:
    """Nothing tells that it waits: neither did it open the file, nor has it a descriptor."""
    document = origin.add("stalled", MIB, stall_at=1)
    path = fs.add("stalled", "--no-probe", "--stall-timeout", "2s", document.url)
    program = fs.python(_DEFAULT + _READER, path, "page fault, inherited")
    assert program.stdout is not None
    child = int(program.stdout.readline())
    wchan = Path(f"/proc/{child}/wchan")
    wait_for(lambda: "request" in wchan.read_text(), "it waits for its page itself, and not for what is read ahead")
    os.kill(child, signal.SIGKILL)
    assert program.wait(20) == 0
    wait_for(lambda: fs.xattr("stalled", "readers") == "0", "its file is closed")


_HANDLER = """
import os, signal, sys
said = []
signal.signal(signal.SIGUSR1, lambda *_: os.write(2, b"handled\\n"))
signal.siginterrupt(signal.SIGUSR1, False)
fd = os.open(sys.argv[1], os.O_RDONLY)
print("reading", flush=True)
data = b""
while part := os.read(fd, 65536):
    data += part
sys.stdout.buffer.write(data)
"""


@pytest.mark.parametrize("mode", ["cached", "direct"])
def test_a_program_that_handles_its_signals_goes_on_reading(
    mode: Mode, fs: Mounted, origin: ScriptedOrigin, tap: Tap
) -> None:
    path = stalled(fs, origin, tap, mode)
    program = fs.python(_HANDLER, path)
    assert program.stdout is not None
    assert program.stdout.readline() == b"reading\n"
    wait_for(lambda: _waits_in_the_mount(program.pid), "it waits for bytes")
    for _ in range(3):
        program.send_signal(signal.SIGUSR1)
        wait_for(lambda: _waits_in_the_mount(program.pid), "it waits again")
    if mode == "direct":
        tap.write(b"at last")
        wait_for(lambda: fs.buffered("stalled") == 7, "it has arrived")
        tap.close()
        expected = b"at last"
    else:
        document = origin.documents["stalled"]
        expected = document.bytes()
        document.go.set()
    output, errors = program.communicate(timeout=20)
    assert output == expected
    assert b"handled" in errors
    assert program.returncode == 0


_HEIR = """
import ctypes, os, sys
libc, buffer = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(65536)
os.write(1, b"%d\\n" % os.getpid())
data = b""
while (count := libc.read(0, buffer, 65536)) > 0:
    data += buffer.raw[:count]
os.write(1, data if count == 0 else b"failed: %d" % ctypes.get_errno())
"""
"""Unlike Python, it does not try again after EINTR."""
_PASSED_ON = {
    "the opener is gone": 'exec 3< "$0"; "$1" -c "$2" <&3 & exit',
    "the opener waits for its child": 'exec 3< "$0"; "$1" -c "$2" <&3; true',
    "the opener has it open and goes on": 'exec 3< "$0"; "$1" -c "$2" <&3 & exec 1>&-; exec sleep 1000',
}


class TestAFileThatWasPassedOn:
    """Who reads is not who opened, and the kernel tells only who opened."""

    def heir(self, fs: Mounted, path: Path, how: str) -> tuple[subprocess.Popen[bytes], int]:
        """What opened the file, and the pid of what reads it."""
        script = _DEFAULT + _HEIR
        shell = fs.start(["sh", "-c", _PASSED_ON[how], path, sys.executable, script])
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        if how == "the opener is gone":
            wait_for(lambda: shell.poll() is not None, "the opener has ended")
        wait_for(lambda: _waits_for_its_input(pid), "the heir waits")
        return shell, pid

    @pytest.mark.parametrize(
        ("mode", "how", "number"),
        [
            *((mode, how, signal.SIGKILL) for mode in ("cached", "direct") for how in _PASSED_ON),
            ("cached", "the opener is gone", signal.SIGTERM),
            ("direct", "the opener is gone", signal.SIGINT),
        ],
    )
    def test_its_reader_ends_when_it_is_told_to_and_no_other(
        self, mode: Mode, how: str, number: signal.Signals, fs: Mounted, origin: ScriptedOrigin, tap: Tap
    ) -> None:
        path = stalled(fs, origin, tap, mode)
        other, other_pid = self.heir(fs, path, "the opener is gone")
        itself = fs.start(["cat", path])
        wait_for(lambda: _waits_in_the_mount(itself.pid), "another waits for bytes")
        _, pid = self.heir(fs, path, how)
        os.kill(pid, number)
        wait_for(lambda: not is_alive(pid), "the heir ends", within=10)
        assert is_alive(other_pid)
        assert itself.poll() is None
        if mode == "direct":
            tap.write(b"at last")
            wait_for(lambda: fs.buffered("stalled") == 7, "it has arrived")
            tap.close()
            expected = b"at last"
        else:
            origin.documents["stalled"].go.set()
            expected = origin.documents["stalled"].bytes()
        assert itself.communicate(timeout=20)[0] == expected
        assert other.communicate(timeout=20)[0] == expected

    def test_it_is_seen_within_the_second(self, fs: Mounted, tap: Tap) -> None:
        """Both for a wait that has begun just now, and for one that is known already."""
        path = fs.add("stalled", *tap.argv)
        took = []
        for _ in range(2):
            _, pid = self.heir(fs, path, "the opener is gone")
            began = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: not is_alive(pid), "the heir ends", within=10)  # type: ignore[misc]
            took.append(time.monotonic() - began)
        assert max(took) < 1 + SLACK, took

    @pytest.mark.parametrize("mode", ["cached", "direct"])
    def test_its_reader_ends_with_the_daemon(self, mode: Mode, fs: Mounted, origin: ScriptedOrigin, tap: Tap) -> None:
        _, pid = self.heir(fs, stalled(fs, origin, tap, mode), "the opener is gone")
        fs.umount("--lazy")
        wait_for(lambda: not is_alive(pid), "the heir ends", within=10)

    def test_its_reader_ends_when_the_stream_fails(self, fs: Mounted, tap: Tap) -> None:
        path = fs.add("stalled", "--stall-timeout", "1s", *tap.argv)
        shell = fs.start(["sh", "-c", 'exec 3< "$0"; cat <&3 & exit', path], stdout=subprocess.DEVNULL)
        assert end_within(shell, 10) == 0
        wait_for(lambda: fs.xattr("stalled", "readers") == "0", "the heir ends", within=10)
