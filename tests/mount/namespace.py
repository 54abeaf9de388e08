"""Shell scripts that run as root in a mount namespace of their own: what they mount and change under /etc is gone with
their last process, and nobody else ever sees it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
SCRATCH = "/mnt/scratch"
"""A folder of the namespace's own, for the script."""


def run_in_namespace(
    script: str, *, files: Mapping[str, str] | None = None, within: float = 90.0
) -> subprocess.CompletedProcess[str]:
    """Run `script` with sh, where `files` (absolute path to content) stand in for what is there, /sbin/NAME is the
    program NAME of this environment for each console script, and every user can reach the interpreter."""
    prepare = [
        "set -e",
        "mount -t tmpfs -o mode=755 tmpfs /mnt",
        f"mkdir -m 755 {SCRATCH} /mnt/sbin",
        *_opened([Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), PACKAGE]),
        *(f"ln -s {shlex.quote(str(program))} /mnt/sbin/" for program in _programs()),
        "mknod -m 666 /mnt/fuse c 10 229",  # as it is on ordinary systems
        "mount --bind /mnt/fuse /dev/fuse",
        "mount -t overlay -o lowerdir=/mnt/sbin:/usr/sbin overlay /usr/sbin",
    ]
    for number, (path, content) in enumerate((files or {}).items()):
        prepare += [f"printf %s {shlex.quote(content)} > /mnt/file{number}", f"[ -e {path} ] || touch {path}"]
        prepare += [f"mount --bind /mnt/file{number} {path}"]
    return subprocess.run(
        [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--propagation=slave",
            "sh",
            "-c",
            "\n".join([*prepare, script]),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=within,
        check=False,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": SCRATCH},
        cwd="/",
    )


def _programs() -> list[Path]:
    return [path for path in (Path(sys.prefix) / "bin").iterdir() if path.name in ("streamfs", "mount.streamfs")]


def _opened(paths: list[Path]) -> list[str]:
    """Show `paths` where they are, without the closed folders above them."""
    lines: list[str] = []
    closed = {path: _uppermost_closed(path) for path in paths}
    kept = {path: f"/mnt/kept{number}" for number, path in enumerate(paths) if closed[path] is not None}
    for path, place in kept.items():
        lines += [f"mkdir {place}", f"mount --rbind {shlex.quote(str(path))} {place}"]
    for folder in dict.fromkeys(folder for folder in closed.values() if folder is not None):
        lines.append(f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(folder))}")
    for path, place in sorted(kept.items()):
        lines += [f"mkdir -p {shlex.quote(str(path))}", f"mount --rbind {place} {shlex.quote(str(path))}"]
    return lines


def _uppermost_closed(path: Path) -> Path | None:
    return next((parent for parent in reversed(path.parents) if not parent.stat().st_mode & 0o001), None)
