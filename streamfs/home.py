"""Where streamfs keeps its things, and who owns them.

A home is four directories (configuration, state, cache, run-time files), each 0700 and ours, and one lock. Whoever
holds the lock may change what the home holds: the daemon for its whole life, the command line for one change.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from streamfs.errors import Busy, InvalidRequest, NotPermitted, StreamfsError

HOME_VARIABLE = "STREAMFS_HOME"
SOCKET_NAME = "control.sock"
_RECORDING = re.compile(r"(\d+)-(\d+)\.data")
_LOCK_POLL = 0.02  # seconds; flock has no wait with a deadline, and the holder is most often one short command


class Holder(NamedTuple):
    """Who wrote the lock file last: `socket` is the daemon's control socket, None for a command line's short hold."""

    pid: int
    socket: Path | None
    ending: bool = False
    """It has said that it will soon give the home back."""

    @property
    def stays(self) -> bool:
        """Whether it is no use to wait for it: a daemon that lives and is not about to end."""
        return self.socket is not None and not self.ending and not _is_ending(self.pid)


class Home(NamedTuple):
    """The four directories. `root` is STREAMFS_HOME, None when the XDG directories serve."""

    config: Path
    state: Path
    cache: Path
    run: Path
    root: Path | None = None

    @classmethod
    def locate(cls) -> Self:
        """The home that the environment names. Creates nothing and checks nothing but the run-time directory."""
        named = os.environ.get(HOME_VARIABLE)
        if named:
            root = Path(named).absolute()
            return cls(root / "config", root / "state", root / "cache", root / "run", root)
        import platformdirs  # here, as a home that is named does not need it, and looking must be quick

        places = platformdirs.PlatformDirs("streamfs", appauthor=False)
        state = places.user_state_path.absolute()
        return cls(places.user_config_path.absolute(), state, places.user_cache_path.absolute(), _run_directory(state))

    @classmethod
    def open(cls) -> Self:
        """`locate` and `prepare` in one."""
        home = cls.locate()
        home.prepare()
        return home

    def prepare(self) -> None:
        """Make the directories that are missing, 0700 whatever the umask is, and refuse what is not safe.

        Raises NotPermitted where a directory (or a link to it) belongs to somebody else, or somebody else may write
        to it or replace it; InvalidRequest where it cannot be a directory at all. Own directories that others may
        only read are closed to them.
        """
        if self.root is not None:
            secure_directory(self.root, tighten=False)
        for path in (self.config, self.state, self.cache, self.run):
            secure_directory(path, tighten=True)

    @property
    def catalog_path(self) -> Path:
        return self.state / "catalog.db"

    @property
    def log_path(self) -> Path:
        """The daemon's log; the older part of it has a suffix."""
        return self.state / "daemon.log"

    @property
    def lock_path(self) -> Path:
        return self.state / "lock"

    @property
    def socket_path(self) -> Path:
        """Where a daemon of this home, started with this environment, listens."""
        return self.run / SOCKET_NAME

    def lock(self, wait: float = 0.0) -> HomeLock:
        """Take the home for ourselves, waiting up to `wait` seconds for a command or a daemon that is about to end.
        The home must be prepared. Raises Busy, which names the holder's pid."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(self.lock_path, flags, 0o600)
        except OSError as error:
            raise InvalidRequest(f"cannot open the lock {self.lock_path}: {error.strerror}") from error
        try:
            os.fchmod(fd, 0o600)
            deadline = time.monotonic() + wait
            while not _try_flock(fd):
                holder = self.holder()
                if time.monotonic() >= deadline or (holder is not None and holder.stays):
                    raise Busy(self._busy_text())
                time.sleep(_LOCK_POLL)
            lock = HomeLock(fd)
            lock.record()
        except BaseException:
            os.close(fd)
            raise
        return lock

    def holder(self) -> Holder | None:
        """Who last said that he holds the lock. None when it was given back in order. No proof that he lives."""
        try:
            raw = json.loads(self.lock_path.read_bytes())
            socket = raw["socket"]
            place = None if socket is None else Path(os.fsdecode(socket))
            return Holder(int(raw["pid"]), place, bool(raw.get("ending", False)))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _busy_text(self) -> str:
        holder = self.holder()
        place = self.root or self.state
        if holder is None:
            return f"another streamfs is using {place}"
        kind = "another streamfs command" if holder.socket is None else "a streamfs daemon"
        return f"{kind} (pid {holder.pid}) is using {place}"


class HomeLock:
    """The lock, held from `Home.lock` until `release`, the end of the `with` block or the end of the process.

    It belongs to the open file, so a child made by fork holds it too: the parent may then `abandon` its copy.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def held(self) -> bool:
        return self._fd >= 0

    def record(self, socket: Path | None = None, *, ending: bool = False) -> None:
        """Write down this process as the holder; a daemon calls it again after its fork, with its socket, and when it
        begins to end."""
        entry = {"pid": os.getpid(), "socket": None if socket is None else str(socket), "ending": ending}
        data = json.dumps(entry).encode("ascii")
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)

    def release(self) -> None:
        """Give the home back. Safe to call again."""
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            self.abandon()

    def abandon(self) -> None:
        """Close this process' copy only; a forked child that has one goes on holding the home."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


_EXITING = 0x4  # PF_EXITING, in the kernel's flags of a process


def _is_ending(pid: int) -> bool:
    """Whether the process has ended, or the kernel is about to clean up after it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return True
    return fields[0] in "ZX" or bool(int(fields[6]) & _EXITING)


def recording_name(stream_id: int, generation: int) -> str:
    """The name of a recording's data file in the cache directory; its index is beside it."""
    return f"{stream_id}-{generation}.data"


def recording_of(name: str) -> tuple[int, int] | None:
    """(id of the stream, generation) that a file in the cache directory holds the data of; None for other files."""
    match = _RECORDING.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2]))


def _try_flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise InvalidRequest(f"the file system of the state directory cannot lock files: {error.strerror}") from error
    return True


def _run_directory(state: Path) -> Path:
    """$XDG_RUNTIME_DIR/streamfs, else /run/user/UID/streamfs. Where neither is there and ours alone, a directory
    of the state directory, and never one in /tmp, where anybody may be first to make it."""
    for place in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{os.geteuid()}"):
        if place and place.startswith("/") and _is_private(Path(place)):
            return Path(place) / "streamfs"
    return state / "run"


def _is_private(path: Path) -> bool:
    try:
        info = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o022


def secure_directory(path: Path, *, tighten: bool) -> None:
    """Make `path`, absolute, if it is missing, and check it as `Home.prepare` says. `tighten`: take others' rights to
    read. Raises NotPermitted, InvalidRequest."""
    try:
        _make_directories(path)
        _check_ancestors(path)
        if stat.S_ISLNK(path.lstat().st_mode):
            _check_link(path)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        info = os.fstat(fd)
        if info.st_uid != os.geteuid():
            raise NotPermitted(f"{path} belongs to uid {info.st_uid}, not to you (uid {os.geteuid()}): not used")
        if info.st_mode & 0o022:
            raise NotPermitted(f"others may write to {path}: look what is in it, then 'chmod 700 {path}'")
        if tighten and info.st_mode & 0o077:
            os.fchmod(fd, 0o700)
    finally:
        os.close(fd)


def _unusable(path: Path, error: OSError) -> StreamfsError:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return NotPermitted(f"cannot use the directory {path}: {error.strerror}")
    return InvalidRequest(f"cannot use the directory {path}: {error.strerror}")


def _make_directories(path: Path) -> None:
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = path.parent
    for step in reversed(missing):
        try:
            step.mkdir(0o700)
        except FileExistsError:
            continue  # somebody was quicker; the checks that follow judge what is there now
        step.chmod(0o700)  # the umask may have taken our own rights


def _check_ancestors(path: Path) -> None:
    """Nobody else may swap a directory on the way. (A group that may write to one is trusted, as by ssh's kin on
    systems with one group per user.)"""
    for parent in {*path.parents, *path.resolve().parents}:
        if parent.is_symlink():
            _check_link(parent)
        mode = parent.stat().st_mode
        if mode & 0o002 and not mode & stat.S_ISVTX:
            raise NotPermitted(f"anybody may write to {parent}, and so replace {path}: use another place, or chmod it")


def _check_link(path: Path) -> None:
    owner = path.lstat().st_uid
    if owner not in (0, os.geteuid()):
        raise NotPermitted(f"{path} is a symbolic link that uid {owner} made: not followed")
