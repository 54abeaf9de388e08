"""mount.streamfs: what mount(8) calls for the type streamfs, from /etc/fstab or by hand.

mount(8) looks for it in /sbin. Options are those of `streamfs mount`, plus `uid=` and `home=`; what concerns only
mount(8), systemd or the kernel's flags is passed over.
"""

from __future__ import annotations

import getopt
import os
import pwd
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from streamfs import mounts
from streamfs.home import HOME_VARIABLE

PROGRAM = "mount.streamfs"
SOURCE = "streamfs"
"""The first field of a line in fstab: what the kernel names as the source of the mount, so that `mount -a` finds it."""
USAGE, FAILED = 1, 32  # exit codes, as in mount(8)

_VALUES = (
    "memory",
    "spill-threshold",
    "cache-dir",
    "cache-size",
    "ttl",
    "read-ahead",
    "scanners",
    "log-level",
    "log-format",
)
_FLAGS = {"allow_other": "--allow-other", "ro": "--read-only", "rw": None}
_OWNER = ("uid", "user")
_OF_MOUNT = "defaults auto noauto user nouser users nousers owner noowner group nogroup nofail _netdev"
# Files here are never executable, setuid or devices, and have no access times.
_OF_THE_KERNEL = (
    "exec noexec suid nosuid dev nodev sync async dirsync atime noatime diratime nodiratime relatime norelatime "
    "strictatime nostrictatime lazytime nolazytime silent loud mand nomand iversion noiversion"
)
_WITHOUT_EFFECT = frozenset((*_OF_MOUNT.split(), *_OF_THE_KERNEL.split()))
_STANDARD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class _Refused(Exception):
    """The one line that goes to standard error, without the program's name."""


@dataclass
class _Request:
    """`arguments` are those of `streamfs mount`, after the mountpoint."""

    arguments: list[str] = field(default_factory=list)
    user: str | None = None
    home: str | None = None


def main(words: Sequence[str] | None = None) -> int:
    """Mount as mount(8) asks with `SOURCE TARGET [-sfnv] [-o OPTIONS]`; its exit codes: 0, 1 for what makes no sense
    or is not allowed, 32 for a mount that failed."""
    try:
        return _run(list(sys.argv[1:] if words is None else words))
    except _Refused as refusal:
        print(f"{PROGRAM}: {refusal}", file=sys.stderr)
        return USAGE


def _run(words: list[str]) -> int:
    try:
        switches, places = getopt.gnu_getopt(words, "sfnvho:t:N:", ["help"])
    except getopt.GetoptError as error:
        raise _Refused(f"{error} (usage: {PROGRAM} {SOURCE} MOUNTPOINT [-sfnv] [-o OPTIONS])") from error
    given = {switch for switch, _ in switches}
    if given & {"-h", "--help"}:
        print(f"usage: {PROGRAM} {SOURCE} MOUNTPOINT [-sfnv] [-o OPTIONS]\n\nCalled by mount(8); see streamfs(1).")
        return 0
    if "-N" in given:
        raise _Refused("mounting into another namespace is not possible: use 'nsenter' or 'ip netns exec'")
    if len(places) != 2:
        raise _Refused(f"usage: {PROGRAM} {SOURCE} MOUNTPOINT [-sfnv] [-o OPTIONS]")
    source, target = places
    if os.path.basename(source) != SOURCE:  # noqa: PTH119 - mount(8) makes it a path where there is a file of that name
        raise _Refused(f"the source must be '{SOURCE}', not {source!r}: streams are registered with 'streamfs add'")
    options = ",".join(value for switch, value in switches if switch == "-o")
    request = parse_options(options, sloppy="-s" in given)
    account = _account(request.user)
    command = [sys.executable, "-P", "-m", "streamfs", "mount", mounts.absolute(target), *request.arguments]
    if "-v" in given:
        print(f"{PROGRAM}: as {account.pw_name}: streamfs {' '.join(command[4:])}")
    return 0 if "-f" in given else _mount(command, account, request.home)


def parse_options(text: str, *, sloppy: bool = False) -> _Request:
    """Options as they stand in fstab. Unknown ones are refused, with `sloppy` passed over."""
    request = _Request()
    for option in _split(text):
        name, equals, value = option.partition("=")
        plain = name.replace("_", "-")
        if name in _FLAGS and not equals:
            flag = _FLAGS[name]
            if flag is not None:
                request.arguments.append(flag)
        elif plain in _VALUES and value:
            request.arguments.append(f"--{plain}={value}")
        elif name in _OWNER and value:
            request.user = value
        elif name == "home" and value.startswith("/"):
            request.home = value
        elif name == "remount":
            raise _Refused("options of a running mount cannot be changed: unmount it, and mount it again")
        elif not (option in _WITHOUT_EFFECT or name == "comment" or name.startswith(("x-", "X-")) or sloppy):
            raise _Refused(_unknown(option, name, plain))
    return request


def _unknown(option: str, name: str, plain: str) -> str:
    if plain in (*_VALUES, "uid", "home"):
        return f"the option {name} needs a value{' that begins with /' if name == 'home' else ''}: {option!r}"
    return f"unknown option {option!r} (known: {', '.join((*_VALUES, 'uid', 'home', 'allow_other', 'ro'))})"


def _split(text: str) -> list[str]:
    """At commas that are not between double quotes."""
    parts, part, quoted = [], "", False
    for character in text:
        if character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            parts.append(part)
            part = ""
        else:
            part += character
    if quoted:
        raise _Refused(f"a quote is not closed in the options {text!r}")
    return [option for option in (*parts, part) if option]


def _account(user: str | None) -> pwd.struct_passwd:
    """Whom the daemon is to run as: `user`, a name or a number; None for whoever called."""
    try:
        if user is None:
            return pwd.getpwuid(os.geteuid())
        account = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except KeyError as error:
        raise _Refused(f"there is no user {user or os.geteuid()!r}") from error
    if account.pw_uid != os.geteuid() and os.geteuid() != 0:
        raise _Refused(f"only root can mount for {account.pw_name}")
    return account


def _mount(command: list[str], account: pwd.struct_passwd, home: str | None) -> int:
    other = account.pw_uid != os.geteuid()
    environment = _environment(account) if other else {**os.environ, "HOME": os.environ.get("HOME", account.pw_dir)}
    if home is not None:
        environment[HOME_VARIABLE] = home
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            cwd="/",
            env=environment,
            user=account.pw_uid if other else None,
            group=account.pw_gid if other else None,
            extra_groups=os.getgrouplist(account.pw_name, account.pw_gid) if other else None,
            check=False,
        )
    except PermissionError as error:
        raise _Refused(
            f"{account.pw_name} may not run {command[0]}: install streamfs where that user can reach it"
        ) from error
    return {0: 0, 2: USAGE}.get(done.returncode, FAILED)


def _environment(account: pwd.struct_passwd) -> dict[str, str]:
    """What a daemon of somebody else starts with: nothing of ours but the language."""
    language = {key: value for key, value in os.environ.items() if key == "LANG" or key.startswith("LC_")}
    return {
        **language,
        "PATH": _STANDARD_PATH,
        "HOME": account.pw_dir,
        "USER": account.pw_name,
        "LOGNAME": account.pw_name,
        "SHELL": account.pw_shell or "/bin/sh",
    }
