"""What the kernel says is mounted, whether it lives, and how it is taken away. Nothing here touches a mount itself:
a daemon that hangs would make us hang."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from streamfs.errors import StreamfsError

_HELPER_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class Mount:
    path: str
    kind: str
    source: str
    device: tuple[int, int]  # major, minor

    @property
    def is_streamfs(self) -> bool:
        return self.kind.startswith("fuse") and "streamfs" in (self.source, self.kind.removeprefix("fuse."))


def mounts() -> list[Mount]:
    """All mounts this process sees, in the kernel's order."""
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        left, _, right = os.fsdecode(line).partition(" - ")
        kind, source = right.split(" ")[:2]
        fields = left.split(" ")
        major, minor = fields[2].split(":")
        found.append(Mount(_unescape(fields[4]), kind, _unescape(source), (int(major), int(minor))))
    return found


def mounted_at(path: str) -> Mount | None:
    """What is mounted at the absolute `path`, the uppermost one. Never touches the mount itself."""
    at = absolute(path)
    return next((mount for mount in reversed(mounts()) if mount.path == at), None)


def absolute(path: str) -> str:
    """`path` without links on the way; its last part, which may be a dead mount, is not looked at."""
    path = os.path.abspath(path)  # noqa: PTH100 - Path.resolve would stat the mount
    parent, name = os.path.split(path)
    return os.path.join(os.path.realpath(parent), name) if name else path  # noqa: PTH118


def is_dead(path: str) -> bool:
    """Whether the mount's daemon has gone. Asked of another process, which a stopped daemon cannot make us wait for."""
    try:
        answer = subprocess.run(
            ["stat", "--", path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, "LC_ALL": "C"},
            timeout=2.0,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    # A daemon that is dying just now aborts what is under way; after that, nothing is connected.
    return any(reason in answer.stderr for reason in (b"not connected", b"connection abort"))


def detach(path: str, *, lazy: bool) -> None:
    """Unmount `path` without its daemon. Raises StreamfsError with what the helper says."""
    helper = shutil.which("fusermount3") or shutil.which("fusermount")
    if helper is not None:
        command = [helper, "-u", *(["-z"] if lazy else []), "--", path]
    else:
        command = ["umount", *(["-l"] if lazy else []), "--", path]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_HELPER_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise StreamfsError(f"'{' '.join(command)}' did not end: try --lazy") from error
    except FileNotFoundError as error:
        raise StreamfsError("fusermount3 is missing: install the package fuse3") from error
    except OSError as error:
        raise StreamfsError(f"cannot run '{' '.join(command)}': {error.strerror}") from error
    if done.returncode != 0:
        said = os.fsdecode(done.stderr).strip().splitlines() or [f"{command[0]} failed"]
        hint = "" if lazy else " (a program still uses it? --lazy detaches it all the same)"
        raise StreamfsError(f"cannot unmount {path}: {said[-1]}{hint}")


def _unescape(text: str) -> str:
    """mountinfo writes space, tab, newline and backslash in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
