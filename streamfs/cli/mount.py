"""mount and umount."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from streamfs import mounts
from streamfs.cli import types
from streamfs.cli.registry import connect
from streamfs.config import FILE_NAME, Config, load
from streamfs.control import Client
from streamfs.errors import Busy, InvalidRequest, StreamfsError, Unreachable
from streamfs.home import Home
from streamfs.logs import FORMATS, LEVELS
from streamfs.spec import MountOptions

END_WITHIN = 10.0  # seconds that the daemon may take to end
_LOOK = 0.05  # seconds between two looks at the mount table, which tells nobody that it changed


@click.command()
@click.argument("mountpoint", type=types.DIRECTORY)
@click.option("--foreground", is_flag=True, help="Stay, and log to standard error.")
@click.option("--allow-other", is_flag=True, default=None, help="Let other users read the mount.")
@click.option("--memory", type=types.SIZE, help="Memory for the bytes of all streams. [default: 256MiB]")
@click.option(
    "--spill-threshold", type=types.SIZE, help="A stream with more than this moves to the cache. [default: 5MiB]"
)
@click.option("--cache-dir", type=types.DIRECTORY, metavar="DIR", help="Where the cache is. [default: in the home]")
@click.option(
    "--cache-size", type=types.SIZE_OR_NONE, help="What it may hold besides persisted streams. [default: 10GiB]"
)
@click.option("--ttl", type=types.DURATION, help="How long unused bytes are kept. [default: 1h]")
@click.option("--read-ahead", type=types.SIZE, help="How far to fetch past the furthest reader. [default: 8MiB]")
@click.option(
    "--scanners",
    type=types.NAMES,
    help="Programs, or 'none', for which nothing is read ahead and nothing kept. [default: thumbnailers, indexers]",
)
@click.option("--read-only", is_flag=True, default=None, help="Refuse rm, mv and setfattr inside the mount.")
@click.option("--log-level", type=click.Choice(LEVELS), help="The least that 'streamfs logs' shows. [default: info]")
@click.option("--log-format", type=click.Choice(FORMATS), help="Lines of text, or an object a line. [default: text]")
def mount(mountpoint: str, foreground: bool, **given: Any) -> None:
    """Show the streams under the directory MOUNTPOINT.

    Returns when the mount answers; a daemon goes on in the background until 'streamfs umount'.

    \b
      streamfs mount ~/streams
      streamfs mount /srv/streams --allow-other --memory 1GiB --cache-size 100GiB
    """
    home = Home.open()
    options = mount_options(given, load(home.config / FILE_NAME))
    try:
        from streamfs import daemon
    except ImportError as error:
        raise StreamfsError(
            f"cannot load the FUSE library ({error}): 'streamfs doctor' says what is missing"
        ) from error
    code = daemon.start(home, Path(mounts.absolute(mountpoint)), options, foreground)
    if code:
        raise click.exceptions.Exit(code)


def mount_options(given: dict[str, Any], config: Config | None = None) -> MountOptions:
    """The options of the command line; what was not given is as the configuration says, else the default."""
    values = {key: None if value is types.NONE else value for key, value in given.items() if value is not None}
    if given.get("cache_dir") is not None:
        values["cache_dir"] = str(Path(given["cache_dir"]).absolute())
    options = msgspec.structs.replace((config or Config()).mount_options(), **values)
    if options.memory < 1 << 20:
        raise click.UsageError("--memory must be at least 1MiB")
    return options


@click.command()
@click.argument("mountpoint", required=False, type=types.DIRECTORY)
@click.option("--lazy", is_flag=True, help="Also while programs have files open: they get errors.")
def umount(mountpoint: str | None, lazy: bool) -> None:
    """End the daemon and its mount.

    Waits until both have gone. MOUNTPOINT is needed only for a mount whose daemon has died.
    """
    home = Home.open()
    client = connect(home, END_WITHIN)
    if client is None:
        _umount_without_daemon(home, mountpoint, lazy)
        return
    with client:
        try:
            mine = _mountpoint_of(client)
        except Unreachable:  # it hangs: the kernel has to help
            mine = mounts.absolute(mountpoint) if mountpoint is not None else _only_mount()
            _detach(mine, lazy)
        else:
            if mountpoint is not None and mounts.absolute(mountpoint) != mine:
                _detach(mounts.absolute(mountpoint), lazy)
                return
            with contextlib.suppress(Unreachable):  # it may be gone before its answer is here
                client.call("shutdown", lazy=lazy)
    _wait_for_end(home, mine)


def _mountpoint_of(client: Client) -> str:
    answer = client.call("ping")
    return str(answer["mountpoint"])


def _umount_without_daemon(home: Home, mountpoint: str | None, lazy: bool) -> None:
    if mountpoint is not None:
        _detach(mounts.absolute(mountpoint), lazy)
        return
    dead = [mount.path for mount in mounts.mounts() if mount.is_streamfs and mounts.is_dead(mount.path)]
    hint = "".join(f"; 'streamfs umount {path}' clears what a dead one left" for path in dead)
    raise Unreachable(f"no daemon runs in {home.root or home.state}{hint}")


def _only_mount() -> str:
    found = [mount.path for mount in mounts.mounts() if mount.is_streamfs]
    if len(found) != 1:
        raise Unreachable("the daemon does not answer: say which MOUNTPOINT to detach")
    return found[0]


def _detach(path: str, lazy: bool) -> None:
    """Take away a mount whose daemon cannot be asked."""
    found = mounts.mounted_at(path)
    if found is None:
        raise InvalidRequest(f"nothing is mounted at {path}")
    if not found.is_streamfs:
        raise InvalidRequest(f"{path} is not a mount of streamfs but of {found.source} ({found.kind})")
    mounts.detach(path, lazy=lazy or mounts.is_dead(path))


def _wait_for_end(home: Home, mountpoint: str) -> None:
    """The lock is free when the daemon's process has gone."""
    deadline = time.monotonic() + END_WITHIN
    try:
        home.lock(wait=END_WITHIN).release()
    except Busy as error:
        raise Busy(f"{error}: it has not ended within {END_WITHIN:g} seconds ('kill -9' ends it)") from error
    while (left := mounts.mounted_at(mountpoint)) is not None and left.is_streamfs:
        if time.monotonic() >= deadline:
            mounts.detach(mountpoint, lazy=True)
            return
        time.sleep(_LOOK)
