"""The mountpoint: what must hold before it is mounted, what is tuned after, and how it is taken away again."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from streamfs import mounts
from streamfs.errors import Busy, InvalidRequest, NotPermitted, StreamfsError

log = logging.getLogger(__name__)

FUSE_DEVICE = Path("/dev/fuse")
MTAB = Path("/etc/mtab")
"""Where fusermount3 looks whether a mount is the caller's, before it unmounts."""
READ_AHEAD_KB = 4096
"""Kernel read-ahead of the mount. With 4 MiB the kernel asks for 1 MiB at a time: cached reads were 2.6 times as fast
as with its default of 128 KiB. Root only; others keep the default."""
MAX_BACKGROUND = 65535
"""Cached reads that may be under way at a time; at the kernel's default of 12, a dozen stalled readers would freeze
everybody's cached reads. Ordinary users get what /sys/module/fuse/parameters/max_user_bgreq allows, some thousands."""
KERNEL_BACKGROUND = 12
"""The kernel's default of it, which stays where it cannot be raised (nobody mounted fusectl, and we are not root)."""
CONNECTIONS = Path("/sys/fs/fuse/connections")
_TOOL_TIMEOUT = 10.0  # seconds for fusermount3 and its like


def check_fuse() -> None:
    """Raises NotPermitted or InvalidRequest with what to do where FUSE cannot be used."""
    if not FUSE_DEVICE.exists():
        raise InvalidRequest(f"{FUSE_DEVICE} is missing: load the fuse module (modprobe fuse) or pass the device in")
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise NotPermitted(f"you may not open {FUSE_DEVICE}: its mode or group must allow it (usually mode 0666)")
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount3") is None:
        raise InvalidRequest("fusermount3 is missing: install the package fuse3")
    if not os.access(MTAB, os.R_OK):  # bare chroots have none; better no mount than one that cannot be taken away
        raise InvalidRequest(f"fusermount3 needs {MTAB} to unmount: as root, 'ln -s /proc/self/mounts {MTAB}'")


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


@contextlib.contextmanager
def changes() -> Iterator[select.epoll]:
    """What becomes readable with each change of our mount table."""
    with open("/proc/self/mountinfo", "rb") as table, select.epoll() as told:
        told.register(table.fileno(), select.EPOLLPRI)
        yield told


def is_listed(device: tuple[int, int]) -> bool:
    """Whether our mount table names a mount of the device."""
    return any(mount.device == device for mount in mounts.mounts())


def tune(mountpoint: Path) -> int:
    """Raise the kernel's limits for the mount, as far as we may; what cannot be set is only logged. Gives how many
    background reads the kernel lets be under way at a time."""
    there = mounts.mounted_at(str(mountpoint))
    if there is None:
        return KERNEL_BACKGROUND
    major, minor = there.device
    _set(Path(f"/sys/class/bdi/{major}:{minor}/read_ahead_kb"), READ_AHEAD_KB)
    connection = CONNECTIONS / str(major << 20 | minor)  # the kernel's own form of a device number
    if not connection.exists() and os.geteuid() == 0:
        allowed = _raise_unseen(connection)
    else:
        allowed = _raise_background(connection)
    if allowed == KERNEL_BACKGROUND:
        log.info("the kernel allows %d background reads at a time: stalled cached readers go page by page", allowed)
    return allowed


def _raise_background(connection: Path) -> int:
    """Raise the limit as far as the kernel lets us."""
    most = MAX_BACKGROUND
    while most > KERNEL_BACKGROUND:
        try:
            (connection / "max_background").write_text(str(most))
        except OSError as error:
            if error.errno != errno.EINVAL:  # that is: more than an ordinary user may have
                log.info("%s stays as it is: %s", connection / "max_background", error.strerror)
                break
            most //= 2
        else:
            _set(connection / "congestion_threshold", most * 3 // 4)
            return most
    return KERNEL_BACKGROUND


def _set(path: Path, value: int) -> None:
    try:
        path.write_text(str(value))
    except OSError as error:
        log.info("%s stays as it is: %s", path, error.strerror)


def _raise_unseen(connection: Path) -> int:
    """Where nobody mounted the fusectl file system, do it in a mount namespace that ends with the command."""
    script = (
        f"mount -t fusectl fusectl {CONNECTIONS}"
        f" && echo {MAX_BACKGROUND} > {connection}/max_background"
        f" && echo {MAX_BACKGROUND * 3 // 4} > {connection}/congestion_threshold"
    )
    command = ["unshare", "--mount", "sh", "-c", script]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.info("the kernel's limits for background reads stay as they are: %s", error)
        return KERNEL_BACKGROUND
    if done.returncode != 0:
        log.info("the kernel's limits for background reads stay as they are: %s", done.stderr.strip())
        return KERNEL_BACKGROUND
    return MAX_BACKGROUND


def unmount_quietly(mountpoint: Path) -> None:
    """Take the mount away at the end of a daemon: at once for new users, for those inside when they leave."""
    try:
        mounts.detach(str(mountpoint), lazy=True)
    except StreamfsError as error:
        log.warning("%s", error)
