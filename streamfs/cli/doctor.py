"""doctor: what could keep streamfs from working here, and what to do about it."""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import click

from streamfs import mounts
from streamfs.cli import types
from streamfs.cli.registry import connect
from streamfs.errors import Busy, StreamfsError
from streamfs.home import Home

FREE_FLOOR = 1 << 30  # bytes; less free space than this is worth a word
DESCRIPTORS = 4096  # a stalled stream may hold two
_SPINNING_LIBCURL = (8, 20)  # it uses a whole core while a transfer is paused


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    state: Literal["ok", "warning", "problem"]
    detail: str
    advice: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, envvar="STREAMFS_DOCTOR_JSON", help="One JSON document.")
def doctor(as_json: bool) -> None:
    """Check this system: FUSE, rights, libraries, disk, dead mounts.

    Says for each what to do. Exits with 1 if something keeps streamfs from working.
    """
    findings = [finding for check in CHECKS for finding in check()]
    if as_json:
        click.echo(json.dumps({"version": 1, "findings": [asdict(finding) for finding in findings]}))
    else:
        marks = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}
        for finding in findings:
            click.echo(f"{marks[finding.state]}  {finding.check}: {finding.detail}")
            if finding.advice:
                click.echo(f"         -> {finding.advice}")
    if any(finding.state == "problem" for finding in findings):
        raise click.exceptions.Exit(1)


def check_device(path: str = "/dev/fuse") -> Iterator[Finding]:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        yield Finding(
            path, "problem", "missing", "load the module: 'modprobe fuse'; in a container: --device /dev/fuse"
        )
    except OSError as error:
        yield Finding(path, "problem", str(error.strerror), f"give yourself the right: 'chmod 666 {path}' as root")
    else:
        yield Finding(path, "ok", "can be opened")


def check_helper() -> Iterator[Finding]:
    helper = shutil.which("fusermount3")
    if helper is None:
        yield Finding("fusermount3", "problem", "missing", "install it: 'apt-get install fuse3'")
    elif os.geteuid() != 0 and not Path(helper).stat().st_mode & stat.S_ISUID:
        yield Finding("fusermount3", "problem", f"{helper} is not setuid root", f"'chmod u+s {helper}' as root")
    else:
        yield Finding("fusermount3", "ok", helper)


def check_allow_other(path: str = "/etc/fuse.conf") -> Iterator[Finding]:
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    allowed = any(line.strip() == "user_allow_other" for line in lines)
    if allowed or os.geteuid() == 0:
        yield Finding("--allow-other", "ok", "may be used")
    else:
        advice = f"only if you want it: add the line user_allow_other to {path} as root"
        yield Finding("--allow-other", "ok", "is not open to ordinary users here", advice)


def check_home() -> Iterator[Finding]:
    try:
        home = Home.open()
    except StreamfsError as error:
        yield Finding("home", "problem", str(error), "or choose another place: STREAMFS_HOME=DIR")
        return
    yield Finding("home", "ok", f"{home.root or home.state} is yours alone")
    yield from _check_daemon(home)
    free = shutil.disk_usage(home.cache).free
    text = f"{types.human_size(free)} free for the cache in {home.cache}"
    if free < FREE_FLOOR:
        yield Finding("disk", "warning", text, "make room, or mount with --cache-dir on another disk")
    else:
        yield Finding("disk", "ok", text)


def _check_daemon(home: Home) -> Iterator[Finding]:
    try:
        client = connect(home)
        if client is not None:
            with client:
                answer = client.call("ping")
            yield Finding("daemon", "ok", f"pid {answer['pid']} shows the streams at {answer['mountpoint']}")
            return
        with home.lock(wait=1.0):
            from streamfs.catalog import Catalog

            with Catalog(home.catalog_path) as catalog:
                yield Finding("catalogue", "ok", f"{len(catalog.all())} streams")
        yield Finding("daemon", "ok", "none runs", "'streamfs mount DIR' starts one")
    except Busy as error:
        yield Finding("daemon", "warning", str(error), "if that lasts, it hangs: end it")
    except StreamfsError as error:
        yield Finding("daemon", "problem", str(error))


def check_libraries() -> Iterator[Finding]:
    for name, advice in (
        ("pyfuse3", "'apt-get install gcc pkg-config libfuse3-dev python3-dev fuse3', then 'pip install pyfuse3'"),
        ("pycurl", "'pip install pycurl'"),
    ):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            yield Finding(name, "problem", str(error), advice)
            continue
        if name == "pycurl":
            yield _judge_libcurl(module)
        else:
            yield Finding(name, "ok", str(getattr(module, "__version__", "found")))


def _judge_libcurl(pycurl: Any) -> Finding:
    version = str(pycurl.version_info()[1])
    number = tuple(int(part) for part in version.split("-")[0].split(".")[:2])
    if number == _SPINNING_LIBCURL:
        return Finding("libcurl", "problem", f"{version} spins while paused", "'pip install --upgrade pycurl'")
    lacking = sorted({"http", "https", "ftp", "ftps", "sftp"} - set(pycurl.version_info()[8]))
    if lacking:
        return Finding("libcurl", "warning", f"{version} without {', '.join(lacking)}", "'pip install pycurl' has all")
    return Finding("libcurl", "ok", version)


def check_descriptors() -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        advice = f"raise it to {DESCRIPTORS} or more in /etc/security/limits.conf (nofile)"
        yield Finding("open files", "warning", f"at most {hard}", advice)
    else:
        yield Finding("open files", "ok", f"up to {'any number' if hard == resource.RLIM_INFINITY else hard}")


def check_mounts() -> Iterator[Finding]:
    found = [mount.path for mount in mounts.mounts() if mount.is_streamfs]
    dead = [path for path in found if mounts.is_dead(path)]
    for path in dead:
        yield Finding("mounts", "warning", f"{path} has lost its daemon", f"'streamfs umount {path}' clears it")
    if not dead:
        yield Finding("mounts", "ok", ", ".join(found) or "none")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_device,
    check_helper,
    check_allow_other,
    check_libraries,
    check_home,
    check_descriptors,
    check_mounts,
)
