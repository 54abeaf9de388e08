"""The mountpoint: what must hold before it is mounted, what is tuned after, and how it is taken away again."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import subprocess
from pathlib import Path

from streamfs.errors import Busy, InvalidRequest, NotPermitted, StreamfsError

log = logging.getLogger(__name__)

FUSE_DEVICE = Path("/dev/fuse")
READ_AHEAD_KB = 4096
"""Kernel read-ahead of the mount. With 4 MiB the kernel asks for 1 MiB at a time: cached reads were 2.6 times as fast
as with its default of 128 KiB. Root only; others keep the default."""
MAX_BACKGROUND = 65535
"""Cached reads that may be under way at a time; at the kernel's default of 12, a dozen stalled readers would freeze
everybody's cached reads."""
_CONNECTIONS = Path("/sys/fs/fuse/connections")
_TOOL_TIMEOUT = 10.0  # seconds for fusermount3 and its like


def check_fuse() -> None:
    """Raises NotPermitted or InvalidRequest with what to do where FUSE cannot be used."""
    if not FUSE_DEVICE.exists():
        raise InvalidRequest(f"{FUSE_DEVICE} is missing: load the fuse module (modprobe fuse) or pass the device in")
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise NotPermitted(f"you may not open {FUSE_DEVICE}: its mode or group must allow it (usually mode 0666)")
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise InvalidRequest("fusermount3 is missing: install the package fuse3")


def prepare_mountpoint(mountpoint: Path) -> None:
    """See to it that `mountpoint` is an existing directory where nothing is mounted; a streamfs mount whose daemon
    died is cleared away. Raises InvalidRequest, NotPermitted, Busy."""
    try:
        is_folder = mountpoint.is_dir() if not is_dead(mountpoint) else _clear_dead(mountpoint)
    except PermissionError as error:
        raise NotPermitted(f"you may not use {mountpoint} as a mountpoint") from error
    if not is_folder:
        what = "is not a directory" if mountpoint.exists() else "does not exist: create it with mkdir"
        raise InvalidRequest(f"the mountpoint {mountpoint} {what}")
    if is_mounted(mountpoint):
        raise Busy(f"something is mounted on {mountpoint} already: unmount it, or take another directory")


def _clear_dead(mountpoint: Path) -> bool:
    log.warning("clearing away the dead mount on %s", mountpoint)
    unmount(mountpoint, lazy=True)
    if is_dead(mountpoint):
        raise Busy(f"a dead mount on {mountpoint} cannot be cleared: run 'fusermount3 -uz {mountpoint}'")
    return mountpoint.is_dir()


def is_dead(mountpoint: Path) -> bool:
    """Whether a FUSE mount is there that no daemon serves any more."""
    try:
        mountpoint.stat()
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def is_mounted(mountpoint: Path) -> bool:
    """Whether `mountpoint` is the root of some mount. Asks /proc only, never the mount."""
    return _mount_of(mountpoint) is not None


def _mount_of(mountpoint: Path) -> tuple[int, int] | None:
    """(major, minor) of the device mounted last on `mountpoint`."""
    # realpath would stat the mount itself; its parent is enough.
    target = os.fsencode(os.path.realpath(mountpoint.parent) + "/" + mountpoint.name).replace(b"//", b"/")
    found = None
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields = line.split(b" ")
        if _unescape(fields[4]) == target:
            major, minor = fields[2].split(b":")
            found = (int(major), int(minor))
    return found


def _unescape(field: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)


def tune(mountpoint: Path) -> None:
    """Raise the kernel's limits for the mount, as far as we may. What cannot be set is only logged."""
    device = _mount_of(mountpoint)
    if device is None:
        return
    major, minor = device
    _set(Path(f"/sys/class/bdi/{major}:{minor}/read_ahead_kb"), READ_AHEAD_KB)
    connection = _CONNECTIONS / str(major << 20 | minor)  # the kernel's own form of a device number
    limits = {
        connection / "congestion_threshold": MAX_BACKGROUND * 3 // 4,
        connection / "max_background": MAX_BACKGROUND,
    }
    if not connection.exists() and os.geteuid() == 0:
        _set_unseen(limits)
    else:
        for path, value in limits.items():
            _set(path, value)


def _set(path: Path, value: int) -> None:
    try:
        path.write_text(str(value))
    except OSError as error:
        log.info("%s stays as it is: %s", path, error.strerror)


def _set_unseen(limits: dict[Path, int]) -> None:
    """Where nobody mounted the fusectl file system, do it in a mount namespace that ends with the command."""
    script = f"mount -t fusectl fusectl {_CONNECTIONS}"
    script += "".join(f" && echo {value} > {path}" for path, value in limits.items())
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=_TOOL_TIMEOUT, check=False
    )
    if done.returncode != 0:
        log.info("the kernel's limits for background reads stay as they are: %s", done.stderr.strip())


def unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Take the mount away. `lazy`: at once for new users, for those inside when they leave. Raises Busy where somebody
    uses it, StreamfsError where it cannot be done."""
    tool = shutil.which("fusermount3")
    if tool is not None:
        command = [tool, "-u", *(["-z"] if lazy else []), "--", str(mountpoint)]
    elif os.geteuid() == 0:
        command = ["umount", *(["-l"] if lazy else []), str(mountpoint)]
    else:
        raise InvalidRequest("fusermount3 is missing: install the package fuse3")
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_TIMEOUT, check=False)
    if done.returncode == 0:
        return
    reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
    if "busy" in reason:
        raise Busy(f"{mountpoint} is in use: close what has it open, or unmount with --lazy")
    raise StreamfsError(f"cannot unmount {mountpoint}: {reason}")


def unmount_quietly(mountpoint: Path) -> None:
    """The last resort at the end of a daemon."""
    with contextlib.suppress(StreamfsError, subprocess.TimeoutExpired):
        unmount(mountpoint, lazy=True)
