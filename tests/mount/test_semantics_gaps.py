"""Sentences of docs/semantics.md that no other test proves, over a real mount."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.mount.mounted import Mounted, Tap, checked, wait_for
from tests.mount.origin import ScriptedOrigin

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p

_POLL = """
import os, select, sys
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_NONBLOCK)
print("opened", flush=True)
if sys.argv[2] == "epoll":
    watch = select.epoll()
    watch.register(fd, select.EPOLLIN)
    wait = lambda: bool(watch.poll(20))
elif sys.argv[2] == "poll":
    watch = select.poll()
    watch.register(fd, select.POLLIN)
    wait = lambda: bool(watch.poll(20_000))
else:
    wait = lambda: bool(select.select([fd], [], [], 20)[0])
while wait():
    piece = os.read(fd, 4096)
    print(len(piece), flush=True)
    if not piece:
        break
"""


@pytest.mark.parametrize("how", ["poll", "select", "epoll"])
def test_a_file_of_unknown_length_can_be_polled(how: str, fs: Mounted, tap: Tap) -> None:
    path = fs.add("tap", *tap.argv)
    program = fs.python(_POLL, path, how)
    assert program.stdout is not None
    assert program.stdout.readline() == b"opened\n"
    for size in (1, 100, 7):
        tap.write(b"x" * size)
        assert int(program.stdout.readline()) == size
    tap.close()
    assert program.stdout.readline() == b"0\n", "the end is something to read, too"
    assert program.wait(20) == 0


def test_with_o_nonblock_a_file_of_unknown_length_gives_what_is_there_or_eagain(fs: Mounted, tap: Tap) -> None:
    path = fs.add("tap", *tap.argv)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(BlockingIOError):
            os.read(fd, 100)
        tap.write(b"some")
        wait_for(lambda: fs.buffered("tap") == 4, "the bytes arrived")
        assert os.read(fd, 100) == b"some"
        with pytest.raises(BlockingIOError):
            os.read(fd, 100)
    finally:
        os.close(fd)


_PRIVATE_PAGES = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | (os.O_NONBLOCK if sys.argv[2] == "nonblocking" else 0))
mapped = mmap.mmap(fd, int(sys.argv[3]), mmap.MAP_PRIVATE, mmap.PROT_READ)
for page in range(len(mapped) // mmap.PAGESIZE):
    os.write(1, mapped[page * mmap.PAGESIZE : (page + 1) * mmap.PAGESIZE])
"""


@pytest.mark.parametrize("flags", ["blocking", "nonblocking"])
def test_a_private_mapping_of_what_broke_off_has_its_bytes_and_never_zeros_for_others(
    flags: str, fs: Mounted, origin: ScriptedOrigin
) -> None:
    document = origin.add("breaking", 10 * PAGE, ranged=False, die_at=5 * PAGE + 1000)
    path = fs.add("breaking", document.url)
    program = fs.python(_PRIVATE_PAGES, path, flags, str(document.size))
    shown, _ = program.communicate(timeout=60)
    assert program.returncode == -signal.SIGBUS, "what cannot be read must not look like bytes"
    assert len(shown) == 5 * PAGE
    assert shown == document.bytes(0, 5 * PAGE)


def test_what_comes_in_from_a_one_way_source_cannot_be_mapped_shared_until_all_is_there(
    fs: Mounted, origin: ScriptedOrigin
) -> None:
    document = origin.add("coming", 500_000, ranged=False, stall_at=100_000)
    path = fs.add("coming", document.url)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert os.fstat(fd).st_size == document.size
        mapped = LIBC.mmap(None, ctypes.c_size_t(PAGE), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
        assert mapped == ctypes.c_void_p(-1).value
        assert ctypes.get_errno() == errno.ENODEV
    finally:
        os.close(fd)
    document.go.set()
    assert checked(["cat", path]) == document.bytes()
    fs.wait_for_state("coming", "complete")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as shown:
        assert shown[:] == document.bytes()


def test_pages_of_a_ranged_source_that_are_there_do_not_wait_for_those_that_are_not(
    fs: Mounted, origin: ScriptedOrigin
) -> None:
    document = origin.add("hanging", 8 << 20, stall_at=100 * PAGE + 17)
    path = fs.add("hanging", document.url)
    waiting = fs.start(["cat", path])
    assert document.stalled.wait(20)
    wait_for(lambda: fs.buffered("hanging") >= 100 * PAGE, "all whole pages have arrived")
    assert checked(["head", "-c", str(100 * PAGE), path], within=10) == document.bytes(0, 100 * PAGE)
    assert waiting.poll() is None
    document.go.set()
    assert waiting.communicate(timeout=30)[0] == document.bytes()


def test_the_last_words_of_a_command_are_told(fs: Mounted) -> None:
    path = fs.add("bad", "--shell", "echo out; echo went wrong >&2; exit 3")
    failed = fs.start(["cat", path])
    assert failed.communicate(timeout=20)[0] == b"out\n"
    assert failed.returncode == 1
    assert "went wrong" in (fs.xattr("bad", "stderr") or "")
    assert fs.xattr("bad", "end") is None


def test_zipfile_reads_a_command_whose_length_open_waits_for(fs: Mounted, library: Path) -> None:
    path = fs.add("things.zip", "--size-policy", "wait", "--", "cat", library / "things.zip")
    script = "import sys, zipfile; print(sorted(zipfile.ZipFile(sys.argv[1]).namelist()))"
    assert b"numbers.txt" in checked([sys.executable, "-c", script, path])
