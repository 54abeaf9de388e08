"""What the tests of POSIX behaviour and of safety share: a mount in a folder that everybody may enter, streams
registered without the cost of a command line, errno as a plain assertion, and programs run as another user."""

# ruff: noqa: PTH118 (system calls as they are)

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamfs.control import Client
from streamfs.spec import AnySource, CommandSource, StreamOptions, StreamSpec, UrlSource
from tests.mount.mounted import WAIT, Mounted, wait_for

STRANGER = 54321
"""A uid that owns nothing."""
LIBC = ctypes.CDLL(None, use_errno=True)


class Posix:
    """A mount whose path any user may walk, and the files behind its streams."""

    def __init__(self, *options: str) -> None:
        # Not pytest's own folder: that one is closed to others, which would make every test of a stranger pass.
        self.folder = Path(tempfile.mkdtemp(prefix="streamfs-posix-"))
        self.folder.chmod(0o755)
        self.originals = self.folder / "originals"
        self.originals.mkdir()
        self.fs = Mounted(self.folder)
        try:
            self.fs.mount(*options)
        except BaseException:
            self.close()
            raise
        self.mountpoint = self.fs.mountpoint
        self._files = 0

    def close(self) -> None:
        try:
            self.fs.close()
        finally:
            shutil.rmtree(self.folder)

    def call(self, method: str, **params: Any) -> Any:
        """A request over the control socket."""
        with Client(self.fs.home / "run" / "control.sock") as client:
            return client.call(method, **params)

    def original(self, data: bytes) -> Path:
        self._files += 1
        path = self.originals / f"{self._files}"
        path.write_bytes(data)
        return path

    def add(self, name: str, source: AnySource, **options: Any) -> Path:
        self.call("add", spec=StreamSpec(name=name, source=source, options=StreamOptions(**options)))
        return self.mountpoint / name

    def file(self, name: str, data: bytes = b"") -> Path:
        """A stream of known length; gives its path once that is shown."""
        path = self.add(name, UrlSource(self.original(data).as_uri()))
        wait_for(lambda: path.stat().st_size == len(data), f"{name} shows its length")
        return path

    def files(self, names: list[str], data: bytes = b"") -> None:
        """Many streams of the same bytes, which are not asked for their length."""
        source = UrlSource(self.original(data).as_uri())
        self.call("add_many", specs=[StreamSpec(name=name, source=source) for name in names])

    def command(self, name: str, *argv: str | Path) -> Path:
        """A stream of unknown length."""
        return self.add(name, CommandSource(tuple(map(str, argv))))

    def remove(self, *names: str) -> None:
        self.call("remove", names=names)

    def names(self) -> set[bytes]:
        """Every stream that the mount shows, by walking it."""
        root = os.fsencode(self.mountpoint)
        return {
            os.path.relpath(os.path.join(folder, name), root) for folder, _, files in os.walk(root) for name in files
        }


@contextlib.contextmanager
def fails(*expected: int) -> Iterator[None]:
    """The block must fail with one of the errnos."""
    try:
        yield
    except OSError as error:
        shown = errno.errorcode.get(error.errno or 0, error.errno)
        assert error.errno in expected, f"{shown} instead of {[errno.errorcode[code] for code in expected]}"
        return
    raise AssertionError(f"it succeeded instead of failing with {[errno.errorcode[code] for code in expected]}")


def outcome(call: str, *arguments: Any, uid: int | None = None) -> Any:
    """What the Python expression `call` gives (JSON types; bytes as hex), in a process of its own, which may use
    `os`, `socket`, `A` (the arguments) and so on; the name of its errno where it raises OSError. As user `uid`."""
    script = (
        "import ctypes, errno, fcntl, json, os, pathlib, shutil, signal, socket, struct, sys\n"
        "A = json.loads(sys.argv[2])\n"
        # The interpreter and its modules may lie where strangers cannot read: so it drops its rights only now.
        "if sys.argv[1] != 'None': os.setgroups([]); os.setresgid(*[int(sys.argv[1])] * 3); "
        "os.setresuid(*[int(sys.argv[1])] * 3)\n"
        "signal.alarm(20)\n"
        "try: result = eval(sys.argv[3])\n"
        "except OSError as error: result = errno.errorcode[error.errno]\n"
        "print(json.dumps(result.hex() if isinstance(result, bytes) else result))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(uid), json.dumps([_plain(a) for a in arguments]), call],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _plain(argument: Any) -> Any:
    return str(argument) if isinstance(argument, Path) else argument


def renameat2(old: Path, new: Path, flags: int) -> None:
    """Raises OSError."""
    at_fdcwd = -100
    if LIBC.renameat2(at_fdcwd, os.fsencode(old), at_fdcwd, os.fsencode(new), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Directory:
    """An open directory with the cookies of telldir(3), which Python does not show."""

    class _Dirent(ctypes.Structure):
        _fields_ = [
            ("d_ino", ctypes.c_uint64),
            ("d_off", ctypes.c_int64),
            ("d_reclen", ctypes.c_uint16),
            ("d_type", ctypes.c_uint8),
            ("d_name", ctypes.c_char * 256),
        ]

    def __init__(self, path: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.opendir.restype = ctypes.c_void_p
        self._libc.readdir.restype = ctypes.POINTER(self._Dirent)
        self._libc.telldir.restype = ctypes.c_long
        self._handle = ctypes.c_void_p(self._libc.opendir(os.fsencode(path)))
        assert self._handle

    def read(self) -> tuple[bytes, int] | None:
        """(name, inode) of the next entry; None at the end."""
        ctypes.set_errno(0)
        entry = self._libc.readdir(self._handle)
        if not entry:
            assert ctypes.get_errno() == 0, os.strerror(ctypes.get_errno())
            return None
        return entry.contents.d_name, entry.contents.d_ino

    def rest(self) -> list[bytes]:
        return [entry[0] for entry in iter(self.read, None)]

    def tell(self) -> int:
        return int(self._libc.telldir(self._handle))

    def seek(self, cookie: int) -> None:
        self._libc.seekdir(self._handle, ctypes.c_long(cookie))

    def rewind(self) -> None:
        self._libc.rewinddir(self._handle)

    def close(self) -> None:
        self._libc.closedir(self._handle)
