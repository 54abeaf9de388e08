"""systemd: a unit that keeps a mount running."""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from streamfs import mounts
from streamfs.cli import types
from streamfs.cli.mount import mount
from streamfs.errors import AlreadyExists, NotFound, NotPermitted
from streamfs.home import HOME_VARIABLE

_MARK = "# Written by 'streamfs systemd'."
_SYSTEM_UNITS = Path("/etc/systemd/system")

_WHY_SO_OPEN = """\
# An ordinary user mounts through fusermount3, which is setuid root, and the mount must be seen outside. So nothing
# stands here that sets NoNewPrivileges (as do the Restrict… and SystemCall… settings) or makes a mount namespace of its
# own (Private…, Protect…, ReadOnlyPaths): with either, nobody would see a mount.
"""


@click.command(
    short_help="Print, or install, a unit that mounts by itself.", context_settings={"ignore_unknown_options": True}
)
@click.argument("mountpoint", type=types.DIRECTORY)
@click.argument("options", metavar="[MOUNT OPTION]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--system", is_flag=True, help="A unit of the whole system, not of your own session.")
@click.option("--run-as", metavar="USER", help="With --system: whose streams these are. [default: root]")
@click.option("--name", default="streamfs", show_default=True, help="What the unit is called.")
@click.option("--install", is_flag=True, help="Write the unit where systemd looks for it, instead of printing it.")
def systemd(
    mountpoint: str, options: tuple[str, ...], system: bool, run_as: str | None, name: str, install: bool
) -> None:
    """Print, or install, a systemd unit that mounts at every login or boot.

    The daemon is started again when it fails. Options of 'streamfs mount' can follow.

    \b
      streamfs systemd ~/streams --install
      streamfs systemd ~/streams --memory 1GiB --install
      sudo streamfs systemd /srv/streams --system --run-as media --allow-other --install
    """
    if run_as is not None and not system:
        raise click.UsageError("--run-as goes with --system")
    if not name or not all(character.isalnum() or character in "-_.@" for character in name):
        raise click.UsageError(f"{name!r} is no name for a unit: letters, digits, '-', '_' and '.' only")
    at = mounts.absolute(mountpoint)
    mount.make_context("mount", [at, *options]).close()  # raises for what mount would not take
    account = _account(run_as) if run_as is not None else None
    text = unit(at, options, system=system, user=account.pw_name if account is not None else None)
    if install:
        _install(text, name, system)
    else:
        click.echo(text, nl=False)


def unit(mountpoint: str, options: Sequence[str] = (), *, system: bool, user: str | None = None) -> str:
    """The text of a unit; for the whole `system`, as `user`, else root."""
    start = [*_program(), "mount", "--foreground", mountpoint, *options]
    helper = shutil.which("fusermount3") or "/usr/bin/fusermount3"
    service = [
        "Type=notify",
        f"ExecStartPre=-{_line([shutil.which('mkdir') or '/bin/mkdir', '-p', mountpoint])}",
        f"ExecStart={_line(start)}",
        f"ExecStopPost=-{_line([helper, '-uqz', mountpoint])}",
        # The daemon ends the commands of streams itself; what is left after a while is killed.
        "KillMode=mixed",
        "TimeoutStopSec=20",
        "Restart=on-failure",
        "RestartSec=2",
        "OOMPolicy=continue",
        "UMask=0077",
        "LimitCORE=0",
        "LimitNOFILE=524288",
    ]
    if user is not None:
        service.append(f"User={user}")
    home = os.environ.get(HOME_VARIABLE)
    if home:
        service.append(f"Environment={_word(f'{HOME_VARIABLE}={Path(home).absolute()}')}")
    if system:
        service += ["DevicePolicy=closed", "DeviceAllow=/dev/fuse rw", "KeyringMode=private"]
    if user is not None:
        service.append("CapabilityBoundingSet=CAP_SYS_ADMIN CAP_SETUID CAP_SETGID CAP_DAC_READ_SEARCH")
    network = "Wants=network-online.target\nAfter=network-online.target\n" if system else ""
    return (
        f"{_MARK}\n[Unit]\nDescription=streamfs on {_plain(mountpoint)}\nDocumentation=man:streamfs(1)\n{network}"
        f"\n[Service]\n{chr(10).join(service)}\n{_WHY_SO_OPEN}"
        f"\n[Install]\nWantedBy={'multi-user.target' if system else 'default.target'}\n"
    )


def _program() -> list[str]:
    """How systemd is to start this streamfs."""
    script = Path(sys.executable).with_name("streamfs")
    return [str(script)] if os.access(script, os.X_OK) else [sys.executable, "-P", "-m", "streamfs"]


def _plain(text: str) -> str:
    return text.replace("%", "%%").replace("\n", " ")


def _line(words: Sequence[str]) -> str:
    return " ".join(_word(word).replace("$", "$$") for word in words)


def _word(word: str) -> str:
    """As systemd.syntax(7) and systemd.service(5) want it."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("\n", "\\n")
    return f'"{escaped}"' if not word or any(character in " \t'\"\\;\n" for character in word) else escaped


def _account(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(user)
    except KeyError as error:
        raise NotFound(f"there is no user {user!r}") from error


def _install(text: str, name: str, system: bool) -> None:
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"
    path = (_SYSTEM_UNITS if system else own) / f"{name}.service"
    if system and os.geteuid() != 0:
        raise NotPermitted(f"only root may write {path}: use sudo, or leave out --system")
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        raise AlreadyExists(f"{path} is there, and 'streamfs systemd' did not write it: choose another --name")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.chmod(0o644)
    new.replace(path)
    control = "systemctl" if system else "systemctl --user"
    click.echo(f"wrote {path}; now: {control} daemon-reload && {control} enable --now {name}")
    if not system:
        click.echo("to keep it running while you are not logged in: loginctl enable-linger")
