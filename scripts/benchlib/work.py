"""What is timed. Each function does one piece of work and gives seconds (or what it says)."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

LIMIT = 300.0  # seconds after which a piece of work has failed


def run(argv: Sequence[str | Path], stdin: int | BinaryIO = subprocess.DEVNULL) -> float:
    """Run a command that must succeed."""
    began = time.perf_counter()
    done = subprocess.run(argv, stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=LIMIT)
    seconds = time.perf_counter() - began
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{' '.join(map(str, argv))} ended with {done.returncode}: {text}")
    return seconds


def shell(line: str) -> float:
    return run(["sh", "-c", line])


def dd(path: Path) -> float:
    return run(["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none"])


def dd_direct(path: Path) -> float:
    """Past the kernel's page cache, as dd itself asks for it."""
    return run(["dd", f"if={path}", "of=/dev/null", "bs=1M", "iflag=direct", "status=none"])


def dd_open(fd: int) -> float:
    """From the beginning of an open file, through this very descriptor."""
    os.lseek(fd, 0, os.SEEK_SET)
    return run(["dd", "of=/dev/null", "bs=1M", "status=none"], stdin=fd)


def cat(path: Path) -> float:
    return run(["cat", path])


def cp(path: Path) -> float:
    return run(["cp", path, "/dev/null"])


def sha256sum(path: Path) -> float:
    return run(["sha256sum", path])


def curl(url: str, *options: str) -> float:
    return run(["curl", "--silent", "--fail", "--output", "/dev/null", *options, url])


def crowd(path: Path, readers: int) -> float:
    """`readers` programs read all of it at the same time."""
    began = time.perf_counter()
    argv = ["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none"]
    with ExitStack() as stack:
        crowd = [stack.enter_context(subprocess.Popen(argv)) for _ in range(readers)]
        try:
            codes = [reader.wait(LIMIT) for reader in crowd]
        except BaseException:
            for reader in crowd:
                reader.kill()
            raise
    if any(codes):
        raise RuntimeError(f"{sum(map(bool, codes))} of {readers} readers failed on {path}")
    return time.perf_counter() - began


def random_reads(path: Path, size: int, step: int, seconds: float) -> float:
    """Reads of `step` bytes at aligned random places, none twice, for about `seconds`; gives reads a second."""
    places = random.Random(size).sample(range(size // step), min(size // step, 200_000))
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead: what is counted is what was asked
        count, began = 0, time.perf_counter()
        for place in places:
            if len(os.pread(fd, step, place * step)) != step:
                raise RuntimeError(f"a short read of {path}")
            count += 1
            if time.perf_counter() - began > seconds:
                break
        return count / (time.perf_counter() - began)
    finally:
        os.close(fd)


def first_byte(path: Path) -> float:
    """Open, read one byte, close."""
    began = time.perf_counter()
    fd = os.open(path, os.O_RDONLY)
    try:
        if len(os.pread(fd, 1, 0)) != 1:
            raise RuntimeError(f"no byte in {path}")
        return time.perf_counter() - began
    finally:
        os.close(fd)


def seek(path: Path, offset: int) -> float:
    """In an open file of which the beginning was read: a byte far away."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.pread(fd, 1, 0)
        began = time.perf_counter()
        os.pread(fd, 1, offset)
        return time.perf_counter() - began
    finally:
        os.close(fd)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_memory(pid: int) -> int:
    """The most bytes the process ever had resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no VmHWM for process {pid}")
