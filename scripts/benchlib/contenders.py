"""streamfs and its peers, each mounted for the time of a block, and how each is made cold."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchlib.origin import KINDS, Missing, Origin
from streamfs import mounting
from streamfs.control import Client

START_WITHIN = 30.0  # seconds until a mount must answer
END_WITHIN = 10.0  # seconds from SIGTERM to SIGKILL
_LOOK = 0.02  # seconds between two looks at the mount table, which tells nobody that it changed


@dataclass(frozen=True)
class Mounted:
    """One mounted file system. `pid` is its daemon's."""

    name: str
    root: Path
    pid: int

    def path(self, name: str) -> Path:
        return self.root / name

    def cold(self, name: str) -> None:
        """Nothing of the file is held: neither by the daemon (these peers keep nothing) nor in the kernel."""
        drop_pages(self.path(name))


@dataclass(frozen=True)
class Streamfs(Mounted):
    home: Path

    def add(self, name: str, *arguments: str) -> None:
        streamfs(self.home, "add", "--replace", "--no-probe", name, *arguments)

    def cold(self, name: str) -> None:
        """Evicted; what is opened next is another inode, of which the kernel holds no page."""
        self.call("evict", names=[name])

    def call(self, method: str, **parameters: object) -> object:
        with Client(self.home / "run" / "control.sock") as client:
            return client.call(method, **parameters)


def drop_pages(path: Path) -> None:
    """Make the kernel forget the pages of one file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def streamfs(home: Path, *arguments: str) -> None:
    argv = [sys.executable, "-m", "streamfs", *arguments]
    done = subprocess.run(argv, env=_environment(home), capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"streamfs {' '.join(arguments)}: {done.stderr.strip()}")


def _environment(home: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "STREAMFS_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2]), **more}


@contextmanager
def mounted_streamfs(origin: Origin, scratch: Path, *options: str, transport: str | None = None) -> Iterator[Streamfs]:
    """A daemon of its own with every URL of the origin registered as KIND/NAME. `transport`: plain or curl; None: what
    streamfs takes by itself."""
    home = Path(tempfile.mkdtemp(prefix="home-", dir=scratch))
    mountpoint = Path(tempfile.mkdtemp(prefix="streamfs-", dir=scratch))
    argv = [sys.executable, "-m", "streamfs", "mount", "--foreground", *options, str(mountpoint)]
    forced = {} if transport is None else {"STREAMFS_TRANSPORT": transport}
    with _mounted(argv, mountpoint, scratch, env=_environment(home, **forced)) as pid:
        found = Streamfs("streamfs", mountpoint, pid, home)
        authority = str(origin.certificates.authority)
        for kind in KINDS if origin.far_port is not None else KINDS[:-1]:
            more = ["--cacert", authority] if kind in ("tls", "http2") else []
            for name in (origin.big, origin.part):
                found.add(f"{kind}/{name}", origin.url(kind, name), *more)
        yield found


@contextmanager
def mounted_rclone(origin: Origin, kind: str, scratch: Path) -> Iterator[Mounted]:
    """As it comes, without a cache of its own on disk (its default)."""
    program = _program("rclone", "rclone")
    mountpoint = Path(tempfile.mkdtemp(prefix="rclone-", dir=scratch))
    if kind == "ftp":
        remote = [":ftp:", "--ftp-host=127.0.0.1", f"--ftp-port={origin.ftp.port}", "--ftp-user=anonymous"]
        word = subprocess.run([program, "obscure", "x"], capture_output=True, text=True, timeout=20, check=True).stdout
        remote.append(f"--ftp-pass={word.strip()}")
    else:
        remote = [":http:", f"--http-url={origin.url(kind, '')}", f"--ca-cert={origin.certificates.authority}"]
    argv = [program, "mount", *remote, str(mountpoint), "--read-only", "--config=/dev/null"]
    with _mounted(argv, mountpoint, scratch) as pid:
        yield Mounted("rclone", mountpoint, pid)


@contextmanager
def mounted_httpfs2(origin: Origin, scratch: Path) -> Iterator[Mounted]:
    """Mounts one file each; `root` holds links to them."""
    program = _program("httpfs2", "httpfs2")
    root = Path(tempfile.mkdtemp(prefix="httpfs2-", dir=scratch))
    with ExitStack() as stack:
        pid = 0
        for name in (origin.big, origin.part):
            mountpoint = Path(tempfile.mkdtemp(prefix="httpfs2-one-", dir=scratch))
            argv = [program, "-c", "/dev/null", "-f", origin.url("plain", name), str(mountpoint)]
            pid = stack.enter_context(_mounted(argv, mountpoint, scratch))
            (root / name).symlink_to(mountpoint / name)
        yield Mounted("httpfs2", root, pid)


@contextmanager
def mounted_bare(source: str | int, mode: str, scratch: Path) -> Iterator[Mounted]:
    """The least that a file system in Python can be: the ceiling. `source`: a URL, or the size of a file in memory;
    `mode`: direct or cached."""
    mountpoint = Path(tempfile.mkdtemp(prefix="bare-", dir=scratch))
    argv = [sys.executable, str(Path(__file__).with_name("bare.py")), str(mountpoint), str(source), mode]
    with _mounted(argv, mountpoint, scratch) as pid:
        yield Mounted("bare pyfuse3", mountpoint, pid)


@contextmanager
def mounted_memfs(size: int, mode: str, scratch: Path) -> Iterator[Mounted]:
    """The C program: `mode` is direct or cached. The kernel is tuned for it as for streamfs."""
    program = scratch / "memfs"
    if not program.exists():
        _build(program)
    mountpoint = Path(tempfile.mkdtemp(prefix="memfs-", dir=scratch))
    with _mounted([str(program), str(mountpoint), str(size), mode], mountpoint, scratch) as pid:
        mounting.tune(mountpoint)
        yield Mounted("C libfuse", mountpoint, pid)


def _build(program: Path) -> None:
    if shutil.which("gcc") is None or shutil.which("pkg-config") is None:
        raise Missing("no C compiler for the C libfuse program: apt-get install gcc pkg-config libfuse3-dev")
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True, timeout=20, check=False
    )
    if flags.returncode:
        raise Missing("libfuse3's headers are missing: apt-get install libfuse3-dev")
    source = Path(__file__).with_name("memfs.c")
    subprocess.run(["gcc", "-O2", "-o", str(program), str(source), *flags.stdout.split()], timeout=60, check=True)


def _program(name: str, package: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        raise Missing(f"{name} is not installed: apt-get install {package}")
    return found


@contextmanager
def _mounted(argv: Sequence[str], mountpoint: Path, scratch: Path, env: dict[str, str] | None = None) -> Iterator[int]:
    """Run a program that mounts and stays; gives its pid once the mount is there. Ended and unmounted in the end."""
    with open(scratch / f"{mountpoint.name}.log", "ab") as log:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
        )  # its own session: Ctrl-C is for us, who end everything in order
    try:
        _wait_for_mount(process, mountpoint, Path(log.name))
        yield process.pid
    finally:
        _end(process, mountpoint)


def _is_mounted(mountpoint: Path) -> bool:
    with open("/proc/self/mounts") as mounts:
        return any(line.split()[1] == str(mountpoint) for line in mounts)


def _wait_for_mount(process: subprocess.Popen[bytes], mountpoint: Path, log: Path) -> None:
    deadline = time.monotonic() + START_WITHIN
    while not _is_mounted(mountpoint):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{' '.join(map(str, process.args))} did not mount:\n{log.read_text()}")  # type: ignore[arg-type]
        time.sleep(_LOOK)
    mountpoint.stat()


def _end(process: subprocess.Popen[bytes], mountpoint: Path) -> None:
    if _is_mounted(mountpoint):
        subprocess.run(["umount", "--lazy", str(mountpoint)], capture_output=True, timeout=20, check=False)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
