"""What /proc tells of other processes. Everything here blocks as long as it takes, which grows with the number of
processes and of their descriptors: call it from worker threads. Nothing here touches the mount itself, or any file of
another file system, so none of it can hang on one.

What may not be looked at (processes of other users, where we are not root) is left out without a word.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

from streamfs import descriptors

log = logging.getLogger(__name__)

_TOLD_TO_END = sum(
    1 << (number - 1) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL, signal.SIGTERM)
)
"""Bits of the signals in /proc's masks. The kernel sets SIGKILL's for any signal that is fatal; the others stay pending
where the program has a handler (dd, Python), which runs only once its read has ended. Other signals are left to wait:
a program that handles SIGALRM or SIGCHLD does not expect a read of a file to fail with EINTR."""
_MASK = re.compile(rb"^(SigPnd|ShdPnd|SigBlk):\s*([0-9a-f]+)$", re.MULTILINE)
_THREADS = re.compile(rb"^Threads:\s*(\d+)$", re.MULTILINE)
_NO_FILE = ("socket:", "pipe:", "anon_inode:", "/dev/", "/memfd:", "net:", "mnt:")
"""What the links of descriptors begin with that are no files of any mount."""
_IN_A_MOUNT = re.compile(r"fuse|request_wait|folio|page")
"""Where the kernel says a thread sleeps that waits for an answer of a FUSE daemon, or for a page that one brings."""


def process_of(thread: int) -> int:
    """The process of a thread that lives now: threads end before the files they opened. 0 for 0."""
    try:
        status = _read(f"/proc/{thread}/status") if thread else b""
    except OSError as error:
        log.debug("cannot look at thread %d: %s", thread, error)
        return thread
    return next((int(line[5:]) for line in status.splitlines() if line.startswith(b"Tgid:")), thread)


def program_of(pid: int) -> set[str]:
    """The names that the process (or a thread) goes by: what it calls itself, of which the kernel keeps 15 letters, and
    the file it was started from."""
    names = set()
    with contextlib.suppress(OSError):
        names.add(os.fsdecode(_read(f"/proc/{pid}/comm").rstrip(b"\n")))
    with contextlib.suppress(OSError):
        names.add(os.path.basename(os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")))  # noqa: PTH115, PTH119
    return names


def is_being_killed(pid: int) -> bool:
    """Whether a fatal signal waits for the process. Raises OSError, FileNotFoundError where it is gone."""
    try:
        status = _read(f"/proc/{pid}/status")
    except ProcessLookupError as error:
        raise FileNotFoundError(*error.args) from error
    if _has_fatal(status):
        return True
    threads = _THREADS.search(status)
    if threads is not None and int(threads[1]) <= 1:
        return False
    return any(_has_fatal(status) for status in _of_tasks(pid, "status"))


def _has_fatal(status: bytes) -> bool:
    masks = {name: int(value, 16) for name, value in _MASK.findall(status)}
    pending = masks.get(b"SigPnd", 0) | masks.get(b"ShdPnd", 0)
    return bool(pending & ~masks.get(b"SigBlk", 0) & _TOLD_TO_END)


def waiting_threads(pid: int) -> int | None:
    """How many threads of the process wait for a file system to answer; None where the kernel does not say, and for a
    process that is gone."""
    count = 0
    try:
        for place in _of_tasks(pid, "wchan"):
            if place in (b"", b"0"):
                return None  # it runs just now, or the kernel does not tell
            count += _IN_A_MOUNT.search(place.decode("ascii", "replace")) is not None
    except OSError:
        return None
    return count


def holders(inodes: Collection[int], device: tuple[int, int] | None) -> dict[int, dict[int, frozenset[int]]]:
    """Which processes have files of the mount open: {inode: {pid: the positions of its descriptors there}}.
    `device`: the mount's (major, minor); None: inode numbers alone must do. Finds nothing before Linux 5.14, which
    does not tell the inodes of descriptors. Raises OSError where it could not look at all."""
    found: defaultdict[int, dict[int, frozenset[int]]] = defaultdict(dict)
    ours = os.getpid()
    for name in os.listdir("/proc"):  # noqa: PTH208 - thousands of names
        if not name.isdigit() or (pid := int(name)) == ours:
            continue
        try:
            for inode, positions in _held(pid, inodes, device).items():
                found[inode][pid] = frozenset(positions)
        except OSError as error:
            if error.errno in descriptors.SPENT:
                raise  # it may well be one of them
            continue  # gone meanwhile, or not ours to look at
    return dict(found)


def _held(pid: int, inodes: Collection[int], device: tuple[int, int] | None) -> dict[int, list[int]]:
    held: defaultdict[int, list[int]] = defaultdict(list)
    mounts: set[int] | None = None  # the ids that the mount has where the process is
    for number in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(f"/proc/{pid}/fd/{number}").startswith(_NO_FILE):  # noqa: PTH115
                continue
            fields = _descriptor(pid, number)
            inode = int(fields.get("ino", "0"))
            if inode not in inodes:
                continue
            if device is not None:
                mounts = _ids_of(pid, device) if mounts is None else mounts
                if int(fields["mnt_id"]) not in mounts:
                    continue
            held[inode].append(int(fields["pos"]))
    return held


def _ids_of(pid: int, device: tuple[int, int]) -> set[int]:
    number = b"%d:%d" % device
    lines = (line.split(b" ", 3) for line in _read(f"/proc/{pid}/mountinfo").splitlines())
    return {int(fields[0]) for fields in lines if fields[2] == number}


def is_nonblocking(pid: int, inode: int) -> bool:
    """Whether every descriptor that the process has on the inode is O_NONBLOCK now. Players open with it and take it
    back (F_SETFL) once they see a regular file, and pyfuse3 does not pass a read's own flags on. Before Linux 5.14
    nothing names the inode, and reads wait as those of regular files do."""
    flags = []
    try:
        for number in os.listdir(f"/proc/{pid}/fdinfo"):  # noqa: PTH208
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                fields = _descriptor(pid, number)
                if int(fields.get("ino", "0")) == inode:
                    flags.append(int(fields["flags"], 8))
    except OSError as error:
        log.debug("cannot look at the descriptors of process %d: %s", pid, error)
        return False
    return bool(flags) and all(flag & os.O_NONBLOCK for flag in flags)


def _descriptor(pid: int, number: str) -> dict[str, str]:
    """The fields of one descriptor. Reading them asks no file system."""
    text = _read(f"/proc/{pid}/fdinfo/{number}").decode("utf-8", "replace")
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def _of_tasks(pid: int, name: str) -> Iterator[bytes]:
    for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # this thread has ended
            yield _read(f"/proc/{pid}/task/{task}/{name}")


def _read(path: str) -> bytes:
    """A whole file of /proc, which is read in one go unless it is long."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = part = os.read(fd, 65536)
        while part:
            part = os.read(fd, 65536)
            text += part
        return text
    finally:
        os.close(fd)


def now() -> float:
    """Seconds since the machine was started, as `started` counts them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def started(pid: int) -> float:
    """When the process started, by `now`; 0.0 where that cannot be seen."""
    try:
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    except OSError:
        return 0.0
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
