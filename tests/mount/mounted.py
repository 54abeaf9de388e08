"""One home with its real daemon and mount, driven through the real command line; whatever happens, nothing is left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from streamfs.control import Client
from streamfs.errors import Unreachable
from streamfs.home import SOCKET_NAME

CLI = (sys.executable, "-m", "streamfs")
WAIT = 30.0
"""Seconds after which a condition that a test waits for counts as never met."""
_LOOK = 0.01  # seconds between two looks at something that cannot tell when it changes

T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, within: float = WAIT) -> T:
    """The first true value of `condition`. Fails the test where there is none within the time."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        time.sleep(_LOOK)
    return value


def environment(home: Path) -> dict[str, str]:
    """What a command of this home runs with: none of the caller's streamfs settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("STREAMFS_", "XDG_"))}
    return kept | {"STREAMFS_HOME": str(home), "LC_ALL": "C.UTF-8"}


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_mounted(path: Path) -> bool:
    return any(line.split(" ")[4] == str(path) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def processes_with(text: str) -> list[int]:
    """Pids of the processes whose command line or environment holds `text`."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and int(place.name) != os.getpid():
            with contextlib.suppress(OSError):
                if text.encode() in (place / "cmdline").read_bytes() and is_alive(int(place.name)):
                    found.append(int(place.name))
    return found


def end_within(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit code of a process that must end by itself; fails the test where it does not."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{process.args!r} did not end within {seconds:g} s") from None


class Mounted:
    """A home and a mountpoint under `folder`, and everything that is started there."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.mountpoint = folder / "mnt"
        self.mountpoint.mkdir()
        self.environment = environment(self.home)
        self._programs: list[subprocess.Popen[bytes]] = []
        self._daemons: list[int] = []

    # The command line

    def run(self, *arguments: str | Path, check: bool = True, within: float = WAIT) -> subprocess.CompletedProcess[str]:
        """`streamfs ARGUMENTS`, which must end within so many seconds. With `check`, any failure fails the test."""
        done = subprocess.run(
            [*CLI, *map(str, arguments)],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=within,
            check=False,
        )
        assert not check or done.returncode == 0, f"streamfs {' '.join(map(str, arguments))}: {done.stderr}"
        return done

    def refused(self, *arguments: str | Path, code: int = 1) -> str:
        """The one line that a command which must fail writes to standard error."""
        done = self.run(*arguments, check=False)
        assert done.returncode == code, f"exit code {done.returncode}: {done.stderr or done.stdout}"
        assert not done.stdout
        lines = done.stderr.splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("streamfs: ")
        return lines[0].removeprefix("streamfs: ")

    def add(self, name: str, *arguments: str | Path) -> Path:
        """Register a stream; gives the path of its file."""
        self.run("add", name, *arguments)
        return self.mountpoint / name

    def mount(self, *options: str) -> int:
        """`streamfs mount`; gives the daemon's pid. The mount answers when this returns."""
        self.run("mount", self.mountpoint, *options)
        pid = self.pid
        self._daemons.append(pid)
        return pid

    def start_foreground(self, *options: str) -> subprocess.Popen[bytes]:
        """`streamfs mount --foreground`, once its mount answers."""
        process = self.start([*CLI, "mount", str(self.mountpoint), "--foreground", *options])
        self._daemons.append(process.pid)
        wait_for(lambda: is_mounted(self.mountpoint) and self.answers(), "the mount answers")
        return process

    def umount(self, *options: str) -> None:
        self.run("umount", *options)

    def answers(self) -> bool:
        """Whether the daemon takes requests."""
        try:
            with Client(self.home / "run" / SOCKET_NAME, WAIT) as client:
                return "pid" in client.call("ping")
        except Unreachable:
            return False

    def status(self, name: str) -> dict[str, Any]:
        document = json.loads(self.run("status", name, "--json").stdout)
        assert document["version"] == 1
        row: dict[str, Any] = document["streams"][0]
        return row

    # What the mount shows

    def xattr(self, name: str, attribute: str) -> str | None:
        """The value of user.streamfs.ATTRIBUTE (or of a full name); None where there is none (ENODATA)."""
        full = attribute if attribute.startswith("user.") else f"user.streamfs.{attribute}"
        try:
            return os.getxattr(self.mountpoint / name, full).decode()
        except OSError as error:
            assert error.errno == errno.ENODATA, error
            return None

    def buffered(self, name: str) -> int:
        return int(self.xattr(name, "buffered") or 0)

    def wait_for_state(self, name: str, state: str, within: float = WAIT) -> None:
        wait_for(lambda: self.xattr(name, "state") == state, f"{name} is {state}", within)

    # Processes

    @property
    def pid(self) -> int:
        """The daemon's."""
        holder = json.loads((self.home / "state" / "lock").read_bytes())
        return int(holder["pid"])

    @property
    def log(self) -> str:
        path = self.home / "state" / "daemon.log"
        return path.read_text() if path.exists() else ""

    @property
    def data_files(self) -> list[Path]:
        """Spilled bytes: the data files in the cache directory."""
        return sorted((self.home / "cache").glob("*.data"))

    def start(self, argv: Sequence[str | Path], **options: Any) -> subprocess.Popen[bytes]:
        """A program that is ended with the test, at the latest."""
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        process = subprocess.Popen([str(word) for word in argv], env=self.environment, **options)
        self._programs.append(process)
        return process

    def python(self, script: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        """A Python program; whatever may block on the mount belongs into a process of its own."""
        return self.start([sys.executable, "-c", script, *arguments])

    def adopt(self) -> None:
        """See to it that a daemon which was not started by `mount` is ended, too."""
        self._daemons.append(self.pid)

    def close_readers(self) -> None:
        """End the programs that were started here."""
        for process in self._programs:
            if process.poll() is None and process.pid not in self._daemons:
                process.kill()
                process.wait(WAIT)

    def kill(self) -> None:
        """kill -9 for the daemon."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not is_alive(pid), "the daemon is gone")
        wait_for(self._is_dead, "the kernel has ended the connection")  # its other threads end a little later

    def _is_dead(self) -> bool:
        try:
            self.mountpoint.stat()
        except OSError as error:
            return error.errno == errno.ENOTCONN
        return False

    # The end

    def close(self) -> None:
        """Take everything away; then fail where the daemon had left something behind or met a bug of its own."""
        for process in self._programs:
            if process.poll() is None and process.pid not in self._daemons:
                process.kill()
        left = [pid for pid in self._daemons if is_alive(pid)]
        if left or is_mounted(self.mountpoint):
            self.run("umount", "--lazy", *([] if left else [self.mountpoint]), check=False)
        stubborn = [pid for pid in self._daemons if is_alive(pid)]
        for pid in stubborn:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        still_mounted = is_mounted(self.mountpoint)
        if still_mounted:
            subprocess.run(["fusermount3", "-uz", str(self.mountpoint)], capture_output=True, timeout=WAIT, check=False)
        for process in self._programs:
            if process.poll() is None:
                process.kill()
            process.wait(WAIT)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        assert not stubborn, f"the daemon did not end: {self.log}"
        assert not still_mounted, f"the mount stayed: {self.log}"
        assert "Traceback" not in self.log, self.log
        assert "unforeseen" not in self.log, self.log


class Tap:
    """A command whose output the test holds in its hand: it prints what is written to `path`, a FIFO, and ends when
    that is closed."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # read and write: never waits for the other side
        self.argv: tuple[str, ...] = ("--", "cat", str(path))

    def write(self, data: bytes) -> None:
        """At most what a pipe holds (64 KiB) beyond what the command has read."""
        while data:
            data = data[os.write(self._fd, data) :]

    def close(self) -> None:
        """The end of the output, once somebody reads it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def checked(argv: Sequence[str | Path], within: float = WAIT, **options: Any) -> bytes:
    """Standard output of a program that must succeed."""
    environ: Mapping[str, str] = os.environ | {"LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [str(word) for word in argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=within,
        check=False,
        env=environ,
        **options,
    )
    assert done.returncode == 0, f"{argv} ended with {done.returncode}: {done.stderr.decode()[-2000:]}"
    return done.stdout
