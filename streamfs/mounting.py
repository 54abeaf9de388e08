"""The mountpoint: what must hold before it is mounted, what is tuned after, and how it is taken away again."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path

from streamfs import mounts
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
    there = mounts.mounted_at(str(mountpoint))
    if there is not None:
        if not there.is_streamfs or not mounts.is_dead(there.path):
            what = "streamfs" if there.is_streamfs else there.kind
            raise Busy(
                f"a file system ({what}) is mounted on {mountpoint} already: unmount it, or take another directory"
            )
        log.warning("clearing away the dead mount on %s", mountpoint)
        mounts.detach(there.path, lazy=True)
    try:
        is_folder = mountpoint.is_dir()
        exists = is_folder or mountpoint.exists()
    except PermissionError as error:
        raise NotPermitted(f"you may not use {mountpoint} as a mountpoint") from error
    if not is_folder:
        what = "is not a directory" if exists else "does not exist: create it with mkdir"
        raise InvalidRequest(f"the mountpoint {mountpoint} {what}")


def is_mounted(mountpoint: Path) -> bool:
    """Whether a streamfs is mounted on `mountpoint`, dead or alive."""
    there = mounts.mounted_at(str(mountpoint))
    return there is not None and there.is_streamfs


def tune(mountpoint: Path) -> None:
    """Raise the kernel's limits for the mount, as far as we may. What cannot be set is only logged."""
    there = mounts.mounted_at(str(mountpoint))
    if there is None:
        return
    major, minor = there.device
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


def unmount_quietly(mountpoint: Path) -> None:
    """Take the mount away at the end of a daemon: at once for new users, for those inside when they leave."""
    try:
        mounts.detach(str(mountpoint), lazy=True)
    except StreamfsError as error:
        log.warning("%s", error)
