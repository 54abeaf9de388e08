"""What `streamfs doctor` looks at. Each check is a generator of findings; where a path or a value can be wrong on a
system, it is a parameter."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from streamfs import mounting, mounts
from streamfs.cli.registry import connect
from streamfs.cli.tables import human_size
from streamfs.errors import Busy, StreamfsError, Unreachable
from streamfs.home import Home

FREE_FLOOR = 1 << 30  # bytes; less free space than this is worth a word
DESCRIPTORS = 4096  # a stalled stream may hold two
BACKGROUND_READS = 256  # of one user; fewer, and that many stalled readers of complete files stop the others
ANSWER_WITHIN = 5.0  # seconds for the daemon
EARLIEST = 1_750_000_000  # seconds since the epoch; a clock before June 2025 is wrong, and no certificate holds then
HELPER = Path("/sbin/mount.streamfs")
_SPINNING_LIBCURL = (8, 20)  # it uses a whole core while a transfer is paused


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    state: Literal["ok", "warning", "problem"]
    detail: str
    advice: str = ""


Check = Callable[[], Iterator[Finding]]


def findings() -> list[Finding]:
    """What all the checks found, in their order."""
    return [finding for check in CHECKS for finding in _found_by(check)]


def _found_by(check: Check) -> Iterator[Finding]:
    """Where a check may not look, the others still do."""
    try:
        yield from check()
    except OSError as error:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        yield Finding(name, "warning", f"cannot be checked: {error}", "ask again as another user, perhaps as root")


# ── FUSE ─────────────────────────────────────────────────────────────────────────────────────────────────────────


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


def check_helper(mtab: Path = mounting.MTAB) -> Iterator[Finding]:
    helper = shutil.which("fusermount3")
    if helper is None:
        yield Finding("fusermount3", "problem", "missing", "install it: 'apt-get install fuse3'")
    elif os.geteuid() != 0 and not Path(helper).stat().st_mode & stat.S_ISUID:
        yield Finding("fusermount3", "problem", f"{helper} is not setuid root", f"'chmod u+s {helper}' as root")
    elif os.geteuid() != 0 and not os.access(mtab, os.R_OK):
        advice = f"'ln -s /proc/self/mounts {mtab}' as root"
        yield Finding("fusermount3", "problem", f"it needs {mtab}, which is missing", advice)
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


def check_mount_helper(path: Path = HELPER) -> Iterator[Finding]:
    """What `mount -t streamfs` and /etc/fstab need. Root runs it: nobody else may be able to change it."""
    stranger = _not_roots(path.resolve()) if path.exists() else None
    if stranger is not None:
        detail = f"root runs {path}, but {stranger} is not root's alone"
        advice = "install streamfs for the whole system, and link that: see docs/installing.md"
        yield Finding("mount helper", "warning", detail, advice)
    elif path.exists():
        yield Finding("mount helper", "ok", f"{path}: /etc/fstab may name the type streamfs")
    elif path.is_symlink():
        advice = f"'ln -sf /usr/local/bin/mount.streamfs {path}' as root, or wherever root's streamfs is"
        yield Finding("mount helper", "warning", f"{path} leads nowhere", advice)
    else:
        advice = "only for /etc/fstab: docs/installing.md says how"
        yield Finding("mount helper", "ok", "not installed", advice)


def _not_roots(path: Path) -> Path | None:
    """The first part of `path` that somebody but root owns, or may write."""
    for part in (path, *path.parents):
        info = part.stat()
        if info.st_uid != 0 or (info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX):
            return part
    return None


def check_mounts() -> Iterator[Finding]:
    found = [mount.path for mount in mounts.mounts() if mount.is_streamfs]
    dead = [path for path in found if mounts.is_dead(path)]
    for path in dead:
        yield Finding("mounts", "warning", f"{path} has lost its daemon", f"'streamfs umount {path}' clears it")
    if not dead:
        yield Finding("mounts", "ok", ", ".join(found) or "none")


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────


def check_descriptors() -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        advice = f"raise it to {DESCRIPTORS} or more in /etc/security/limits.conf (nofile)"
        yield Finding("open files", "warning", f"at most {hard}", advice)
    else:
        yield Finding("open files", "ok", f"up to {'any number' if hard == resource.RLIM_INFINITY else hard}")


def check_background(
    most: Path = Path("/sys/module/fuse/parameters/max_user_bgreq"), connections: Path = mounting.CONNECTIONS
) -> Iterator[Finding]:
    """How many reads of complete files may wait at a time before they stop each other."""
    if os.geteuid() == 0:
        yield Finding("background reads", "ok", f"up to {mounting.MAX_BACKGROUND}")
        return
    if not os.path.ismount(connections):
        advice = f"'mount -t fusectl fusectl {connections}' as root"
        detail = f"{mounting.KERNEL_BACKGROUND} at a time: {connections} is not mounted"
        yield Finding("background reads", "warning", detail, advice)
        return
    try:
        allowed = int(most.read_text())
    except (OSError, ValueError):
        yield Finding("background reads", "ok", "the kernel does not say how many")
        return
    if allowed < BACKGROUND_READS:
        advice = f"'echo 8192 > {most}' as root"
        yield Finding("background reads", "warning", f"at most {allowed} for ordinary users", advice)
    else:
        yield Finding("background reads", "ok", f"up to {allowed}")


# ── libraries and the network ────────────────────────────────────────────────────────────────────────────────────


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


def check_certificates() -> Iterator[Finding]:
    paths = ssl.get_default_verify_paths()
    place = os.environ.get(paths.openssl_cafile_env) or paths.cafile or paths.capath
    known = ssl.create_default_context().cert_store_stats()["x509_ca"]
    if known or (paths.capath and any(Path(paths.capath).iterdir())):
        yield Finding("certificates", "ok", f"from {place}")
    else:
        advice = "'apt-get install ca-certificates'; for one server of your own: 'streamfs add --cacert FILE'"
        yield Finding("certificates", "warning", "no authorities are known: https and ftps will fail", advice)


def check_clock(now: float | None = None) -> Iterator[Finding]:
    now = time.time() if now is None else now
    said = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if now < EARLIEST:
        yield Finding(
            "clock", "warning", f"it says {said}: certificates will not be valid", "set it: 'date -s', or ntp"
        )
    else:
        yield Finding("clock", "ok", said)


# ── the home ─────────────────────────────────────────────────────────────────────────────────────────────────────


def check_home() -> Iterator[Finding]:
    try:
        home = Home.open()
    except StreamfsError as error:
        yield Finding("home", "problem", str(error), "or choose another place: STREAMFS_HOME=DIR")
        return
    yield Finding("home", "ok", f"{home.root or home.state} is yours alone")
    yield from _check_run_directory(home)
    yield from _check_daemon(home)
    free = shutil.disk_usage(home.cache).free
    text = f"{human_size(free)} free for the cache in {home.cache}"
    if free < FREE_FLOOR:
        yield Finding("disk", "warning", text, "make room, or mount with --cache-dir on another disk")
    else:
        yield Finding("disk", "ok", text)


def _check_run_directory(home: Home) -> Iterator[Finding]:
    named = os.environ.get("XDG_RUNTIME_DIR")
    if home.root is None and named and home.run.parent != Path(named):
        advice = f"it must be a directory of yours that nobody else may write: 'chmod 700 {named}'"
        yield Finding("run-time files", "warning", f"in {home.run}: XDG_RUNTIME_DIR={named} cannot be used", advice)
    else:
        yield Finding("run-time files", "ok", f"in {home.run}")


def _check_daemon(home: Home) -> Iterator[Finding]:
    try:
        client = connect(home, ANSWER_WITHIN)
        if client is not None:
            with client:
                answer = client.call("ping")
            yield Finding("daemon", "ok", f"pid {answer['pid']} shows the streams at {answer['mountpoint']}")
            if answer.get("disk_error"):
                advice = "make room, or see to its rights: memory serves meanwhile, and the disk is tried again"
                yield Finding("cache", "problem", str(answer["disk_error"]), advice)
            return
        with home.lock(wait=1.0):
            from streamfs.catalog import Catalog

            with Catalog(home.catalog_path) as catalog:
                yield Finding("catalogue", "ok", f"{len(catalog.all())} streams")
        yield Finding("daemon", "ok", "none runs", "'streamfs mount DIR' starts one")
    except Busy as error:
        yield Finding("daemon", "warning", str(error), "if that lasts, it hangs: end it")
    except Unreachable as error:
        yield Finding("daemon", "problem", str(error), "'streamfs umount --lazy', and 'streamfs logs' says what it did")
    except StreamfsError as error:
        yield Finding("catalogue", "problem", str(error))


CHECKS: tuple[Check, ...] = (
    check_device,
    check_helper,
    check_allow_other,
    check_mount_helper,
    check_libraries,
    check_certificates,
    check_clock,
    check_home,
    check_descriptors,
    check_background,
    check_mounts,
)
