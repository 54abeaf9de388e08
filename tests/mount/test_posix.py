"""The mount is a well-behaved read-only file system: names, attributes, errors, seeking, listings."""

# ruff: noqa: PTH101, PTH102, PTH104, PTH106, PTH108, PTH116, PTH208, PTH211 (system calls as they are)

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import random
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamfs.spec import UrlSource
from tests.mount.mounted import checked, end_within, wait_for
from tests.mount.posix_tools import LIBC, Directory, Posix, fails, outcome, renameat2

DATA = random.Random(5).randbytes(700_001)
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4


@pytest.fixture
def folder(posix: Posix, request: pytest.FixtureRequest) -> str:
    """A folder name of the test's own."""
    return f"t{abs(hash(request.node.nodeid)) % 10**9}"


@contextlib.contextmanager
def opened(path: Path, flags: int = 0) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        yield fd
    finally:
        os.close(fd)


def whole(fd: int) -> bytes:
    return b"".join(iter(lambda: os.read(fd, 1 << 20), b""))


# Paths


def test_names_that_cannot_be_are_refused_as_posix_says(posix: Posix, folder: str) -> None:
    path = posix.file(f"{folder}/file", DATA)
    with fails(errno.ENAMETOOLONG):
        os.stat(path.parent / ("n" * 256))
    with fails(errno.ENOENT):
        os.stat(path.parent / ("n" * 255))
    with fails(errno.ENAMETOOLONG):
        os.rename(path, path.parent / ("n" * 256))
    with fails(errno.ENAMETOOLONG):
        os.unlink(path.parent / ("n" * 256))
    with fails(errno.ENAMETOOLONG):
        os.stat(f"{path.parent}{'/n' * 2100}")
    with fails(errno.ENOENT):
        os.stat(path.parent / "absent" / "file")
    with fails(errno.ENOTDIR):
        os.stat(path / "below")
    with fails(errno.ENOTDIR):
        os.stat(f"{path}/")
    with fails(errno.ENOTDIR):
        os.listdir(path)
    with fails(errno.ENOTDIR):
        os.rmdir(path)
    with fails(errno.EISDIR):
        os.unlink(path.parent)
    with fails(errno.EISDIR), opened(path.parent) as fd:
        os.read(fd, 1)


def test_dots_lead_where_they_do_elsewhere(posix: Posix, folder: str) -> None:
    path = posix.file(f"{folder}/sub/file", DATA)
    assert os.stat(f"{path.parent}/.").st_ino == os.stat(path.parent).st_ino
    assert os.stat(f"{path.parent}/..").st_ino == os.stat(path.parent.parent).st_ino
    assert os.stat(f"{posix.mountpoint}/..").st_ino == os.stat(posix.folder).st_ino
    assert os.stat(f"{path.parent}/../sub/./file").st_ino == os.stat(path).st_ino


def test_symbolic_links_from_outside_work_and_loops_end(posix: Posix, folder: str) -> None:
    path = posix.file(f"{folder}/file", DATA)
    links = posix.folder / f"links-{folder}"
    links.mkdir()
    (links / "good").symlink_to(path)
    (links / "folder").symlink_to(path.parent)
    (links / "a").symlink_to(links / "b")
    (links / "b").symlink_to(links / "a")
    assert (links / "good").read_bytes() == DATA
    assert (links / "folder" / "file").stat().st_ino == path.stat().st_ino
    with fails(errno.ELOOP):
        os.stat(links / "a" / "file")
    with fails(errno.ELOOP):
        os.open(links / "good", os.O_RDONLY | os.O_NOFOLLOW)


# Writing


def _write_calls() -> dict[str, Callable[[Path], Any]]:
    return {
        "open for writing": lambda p: os.open(p, os.O_WRONLY),
        "open for both": lambda p: os.open(p, os.O_RDWR),
        "open for appending": lambda p: os.open(p, os.O_WRONLY | os.O_APPEND),
        "open truncating": lambda p: os.open(p, os.O_RDONLY | os.O_TRUNC),
        "create": lambda p: os.open(p.parent / "new", os.O_WRONLY | os.O_CREAT, 0o644),
        "create to read": lambda p: os.open(p.parent / "new", os.O_RDONLY | os.O_CREAT, 0o644),
        "temporary file": lambda p: os.open(p.parent, os.O_RDWR | os.O_TMPFILE, 0o600),
        "mknod": lambda p: os.mknod(p.parent / "new", 0o644 | stat.S_IFREG),
        "fifo": lambda p: os.mkfifo(p.parent / "new"),
        "symlink": lambda p: os.symlink("target", p.parent / "new"),
        "link": lambda p: os.link(p, p.parent / "new"),
        "truncate": lambda p: os.truncate(p, 3),
        "chmod": lambda p: os.chmod(p, 0o600),
        "chmod of a folder": lambda p: os.chmod(p.parent, 0o700),
        "chown": lambda p: os.chown(p, 12, 12),
        "utimes": lambda p: os.utime(p, (1, 1)),
        "touch": lambda p: os.utime(p),
        "setxattr": lambda p: os.setxattr(p, "user.mine", b"1"),
        "setxattr of a reading": lambda p: os.setxattr(p, "user.streamfs.size", b"1"),
        "removexattr": lambda p: os.removexattr(p, "user.streamfs.persist"),
    }


@pytest.mark.parametrize("call", _write_calls())
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_writing_is_refused_and_changes_nothing(known: bool, call: str, posix: Posix, folder: str) -> None:
    name = f"{folder}/file"
    path = posix.file(name, DATA) if known else posix.command(name, "cat", posix.original(DATA))
    before, names = path.stat(), os.listdir(path.parent)
    # A file system that has no such thing at all may say that instead.
    with fails(errno.EACCES, errno.EROFS, *([errno.EOPNOTSUPP] if call == "temporary file" else [])):
        _write_calls()[call](path)
    assert os.listdir(path.parent) == names
    assert path.stat() == before
    assert path.read_bytes() == DATA


def test_making_what_is_there_already_is_refused_as_posix_says(posix: Posix, folder: str) -> None:
    path = posix.file(f"{folder}/file", DATA)
    with opened(path, os.O_CREAT) as fd:
        assert os.pread(fd, 4, 0) == DATA[:4]
    for call in (
        lambda: os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL),
        lambda: os.mkdir(path),
        lambda: os.mkdir(path.parent),
        lambda: os.mkfifo(path),
        lambda: os.symlink("x", path),
    ):
        with fails(errno.EEXIST):
            call()


def test_a_descriptor_for_reading_does_not_write(posix: Posix, folder: str) -> None:
    with opened(posix.file(f"{folder}/file", DATA)) as fd:
        for call in (
            lambda: os.write(fd, b"x"),
            lambda: os.pwrite(fd, b"x", 3),
            lambda: os.posix_fallocate(fd, 0, 10),
        ):
            with fails(errno.EBADF, errno.EINVAL):
                call()
        with fails(errno.EINVAL, errno.EBADF):
            os.ftruncate(fd, 1)
        with fails(errno.EACCES, errno.EROFS):
            os.fchmod(fd, 0o600)
        os.fsync(fd)
        os.fdatasync(fd)
        assert whole(fd) == DATA


# Attributes


def test_a_file_says_what_it_is(posix: Posix, folder: str) -> None:
    path = posix.file(f"{folder}/file", DATA)
    info = path.stat()
    assert stat.S_ISREG(info.st_mode) and stat.S_IMODE(info.st_mode) == 0o644
    assert (info.st_uid, info.st_gid, info.st_nlink) == (os.getuid(), os.getgid(), 1)
    assert info.st_blocks == -(-len(DATA) // 512)
    top = path.parent.stat()
    assert stat.S_ISDIR(top.st_mode) and stat.S_IMODE(top.st_mode) == 0o755
    assert os.access(path, os.R_OK) and not os.access(path, os.X_OK)


def test_links_of_a_folder_count_its_folders(posix: Posix, folder: str) -> None:
    for name in ("file", "a/file", "b/file", "b/c/file"):
        posix.file(f"{folder}/{name}", b"x")
    top = posix.mountpoint / folder
    assert top.stat().st_nlink == 4
    assert (top / "a").stat().st_nlink == 2
    assert (top / "b").stat().st_nlink == 3
    posix.remove(f"{folder}/b/c/file")
    assert (top / "b").stat().st_nlink == 2
    root = posix.mountpoint.stat().st_nlink
    posix.file(f"{folder}-other/file")
    assert posix.mountpoint.stat().st_nlink == root + 1


def test_a_folder_shows_when_its_names_changed(posix: Posix, folder: str) -> None:
    posix.file(f"{folder}/a", b"x")
    top = posix.mountpoint / folder
    seen = [top.stat().st_mtime_ns]

    def changed() -> None:
        seen.append(top.stat().st_mtime_ns)
        assert seen[-1] > seen[-2]

    posix.file(f"{folder}/b", b"x")
    changed()
    os.rename(top / "b", top / "c")
    changed()
    os.unlink(top / "c")
    changed()
    (top / "a").read_bytes()
    assert top.stat().st_mtime_ns == seen[-1]


def test_the_time_of_a_file_is_that_of_its_source(posix: Posix, folder: str) -> None:
    original = posix.original(DATA)
    os.utime(original, ns=(10**18, 10**18 + 123_000_000))
    path = posix.add(f"{folder}/file", UrlSource(original.as_uri()))
    wait_for(lambda: path.stat().st_size, "the length is known")
    assert path.stat().st_mtime == pytest.approx(10**9 + 0.123, abs=1e-3)
    assert path.read_bytes() == DATA
    assert path.stat().st_mtime == pytest.approx(10**9 + 0.123, abs=1e-3)


def test_inode_numbers_are_never_used_again(posix: Posix, folder: str) -> None:
    top = posix.mountpoint / folder
    posix.file(f"{folder}/stays", b"x")
    seen: set[int] = {(top / "stays").stat().st_ino, top.stat().st_ino}

    def fresh(path: Path) -> int:
        inode = path.stat().st_ino
        assert inode not in seen
        seen.add(inode)
        return inode

    for turn in range(15):
        path = posix.command(f"{folder}/churn", "echo", str(turn))
        fresh(path)
        assert path.read_bytes() == b"%d\n" % turn
        kept = path.stat().st_ino
        posix.call("evict", names=[f"{folder}/churn"])
        assert path.read_bytes() == b"%d\n" % turn
        assert path.stat().st_ino == kept or fresh(path)
        os.rename(path, top / "moved")
        assert (top / "moved").stat().st_ino in seen
        posix.remove(f"{folder}/moved")
        inner = posix.file(f"{folder}/inner{turn % 2}/file", b"x")
        fresh(inner)
        fresh(inner.parent)
        posix.remove(f"{folder}/inner{turn % 2}/file")


def test_an_evicted_command_gets_another_inode_with_its_next_run(posix: Posix, folder: str) -> None:
    path = posix.command(f"{folder}/run", "sh", "-c", "date +%N")
    first, inode = path.read_bytes(), path.stat().st_ino
    with opened(path) as fd:
        posix.call("evict", names=[f"{folder}/run"])
        second = path.read_bytes()
        assert first != second
        assert path.stat().st_ino != inode
        assert whole(fd) == first
        assert os.fstat(fd).st_ino == inode


def test_the_listing_and_stat_agree_on_inodes_and_kinds(posix: Posix, folder: str) -> None:
    for name in ("a", "b", "sub/c"):
        posix.file(f"{folder}/{name}", b"x")
    for entry in os.scandir(posix.mountpoint / folder):
        info = os.stat(entry.path)
        assert entry.inode() == info.st_ino
        assert entry.is_dir() == stat.S_ISDIR(info.st_mode)
    listing = Directory(posix.mountpoint / folder)
    try:
        for name, inode in iter(listing.read, None):
            assert inode == (posix.mountpoint / folder / name.decode()).stat().st_ino
    finally:
        listing.close()


def test_the_size_of_the_file_system_makes_sense(posix: Posix, folder: str) -> None:
    posix.file(f"{folder}/file", DATA)
    shown, disk = os.statvfs(posix.mountpoint), os.statvfs(posix.fs.home)
    assert shown.f_namemax == 255
    assert shown.f_bsize == shown.f_frsize == 4096
    assert 0 < shown.f_bavail <= shown.f_bfree <= shown.f_blocks
    assert shown.f_blocks * shown.f_frsize == pytest.approx(disk.f_blocks * disk.f_frsize, abs=1 << 20)
    assert shown.f_files >= 1 and shown.f_ffree == 0
    checked(["df", "-P", posix.mountpoint])
    checked(["df", "-i", posix.mountpoint])


# Removing and renaming


def test_a_removed_file_stays_readable_where_it_is_open(posix: Posix, folder: str) -> None:
    posix.file(f"{folder}/other")
    path = posix.file(f"{folder}/file", DATA)
    with opened(path) as fd:
        assert os.pread(fd, 10, 0) == DATA[:10]
        os.unlink(path)
        with fails(errno.ENOENT):
            os.stat(path)
        info = os.fstat(fd)
        assert (info.st_nlink, info.st_size) == (0, len(DATA))
        assert whole(fd) == DATA
        again = posix.file(f"{folder}/file", b"another")
        assert again.stat().st_ino != info.st_ino
        assert again.read_bytes() == b"another"
        assert os.pread(fd, 100, 650_000) == DATA[650_000:650_100]


def test_a_removed_command_stays_readable_where_it_is_open(posix: Posix, folder: str) -> None:
    path = posix.command(f"{folder}/run", "sh", "-c", "echo one; cat; echo two")
    with opened(path) as fd:
        assert os.read(fd, 4) == b"one\n"
        os.unlink(path)
        assert os.fstat(fd).st_nlink == 0
        assert whole(fd) == b"two\n"
    assert not path.exists()


def test_removing_the_last_file_leaves_a_folder_that_can_be_removed(posix: Posix, folder: str) -> None:
    for name in ("a", "sub/deep/b", "sub/c"):
        posix.file(f"{folder}/{name}", b"x")
    with fails(errno.ENOTEMPTY):
        os.rmdir(posix.mountpoint / folder)
    checked(["rm", "-r", posix.mountpoint / folder])
    assert not (posix.mountpoint / folder).exists()
    assert posix.file(f"{folder}", b"now a file").read_bytes() == b"now a file"
    posix.remove(folder)


def test_a_folder_emptied_by_rm_makes_way_for_streams(posix: Posix, folder: str) -> None:
    os.unlink(posix.file(f"{folder}/sub/a", b"x"))
    assert posix.file(f"{folder}/sub", b"a file now").read_bytes() == b"a file now"
    os.unlink(posix.mountpoint / folder / "sub")
    assert posix.file(f"{folder}/sub/a", b"a folder again").read_bytes() == b"a folder again"
    os.unlink(posix.mountpoint / folder / "sub/a")
    os.rename(posix.file(f"{folder}/b", b"b"), posix.mountpoint / folder / "sub" / "a")
    assert (posix.mountpoint / folder / "sub" / "a").read_bytes() == b"b"


def test_a_file_alone_in_its_folder_can_be_renamed(posix: Posix, folder: str) -> None:
    path = posix.file(f"{folder}/only", DATA)
    os.rename(path, path.parent / "renamed")
    assert os.listdir(path.parent) == ["renamed"]
    assert (path.parent / "renamed").read_bytes() == DATA
    posix.call("rename", old=f"{folder}/renamed", new=f"{folder}/again")
    assert os.listdir(path.parent) == ["again"]
    assert (path.parent / "again").read_bytes() == DATA


def test_renaming_over_a_stream_replaces_it_but_for_who_has_it_open(posix: Posix, folder: str) -> None:
    new, old = posix.file(f"{folder}/new", DATA), posix.file(f"{folder}/sub/old", DATA[::-1])
    inode, replaced = new.stat().st_ino, old.stat().st_ino
    with opened(old) as fd, opened(new) as moving:
        assert os.pread(fd, 5, 0) == DATA[::-1][:5]
        os.rename(new, old)
        assert os.fstat(fd).st_ino == replaced
        assert os.fstat(fd).st_nlink == 0
        assert whole(fd) == DATA[::-1]
        assert os.fstat(moving).st_nlink == 1
        assert whole(moving) == DATA
    assert old.stat().st_ino == inode
    assert old.read_bytes() == DATA
    assert not new.exists()


def test_renaming_keeps_the_inode_and_moves_between_folders(posix: Posix, folder: str) -> None:
    path = posix.file(f"{folder}/a/file", DATA)
    posix.file(f"{folder}/b/other", b"x")
    inode = path.stat().st_ino
    target = posix.mountpoint / folder / "b" / "moved"
    os.rename(path, target)
    assert target.stat().st_ino == inode
    assert target.read_bytes() == DATA
    os.rename(target, target)
    assert target.stat().st_ino == inode


def test_rename_flags_are_obeyed_or_refused(posix: Posix, folder: str) -> None:
    a, b = posix.file(f"{folder}/a", b"a"), posix.file(f"{folder}/b", b"b")
    with fails(errno.EEXIST):
        renameat2(a, b, RENAME_NOREPLACE)
    for flags in (RENAME_EXCHANGE, RENAME_WHITEOUT):
        with fails(errno.EINVAL, errno.ENOSYS, errno.EPERM):
            renameat2(a, b, flags)
    assert (a.read_bytes(), b.read_bytes()) == (b"a", b"b")
    renameat2(a, a.parent / "c", RENAME_NOREPLACE)
    assert (a.parent / "c").read_bytes() == b"a"
    assert not a.exists()


def test_a_folder_is_renamed_with_all_that_is_in_it(posix: Posix, folder: str) -> None:
    for name in ("old/a", "old/sub/b"):
        posix.file(f"{folder}/{name}", name.encode())
    top = posix.mountpoint / folder
    inodes = {name: (top / "old" / name).stat().st_ino for name in ("a", "sub", "sub/b", ".")}
    inside = os.open(top / "old", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.rename(top / "old", top / "new")
        assert sorted(os.listdir(inside)) == ["a", "sub"]
        assert os.fstat(inside).st_ino == inodes["."]
    finally:
        os.close(inside)
    assert os.listdir(top) == ["new"]
    assert {name: (top / "new" / name).stat().st_ino for name in inodes} == inodes
    assert (top / "new" / "sub" / "b").read_bytes() == b"old/sub/b"


def test_a_folder_moves_neither_into_itself_nor_over_others(posix: Posix, folder: str) -> None:
    for name in ("one/a", "two/b"):
        posix.file(f"{folder}/{name}", name.encode())
    file = posix.file(f"{folder}/file", b"x")
    top = posix.mountpoint / folder
    with fails(errno.EINVAL):
        os.rename(top / "one", top / "one" / "inside")
    with fails(errno.ENOTEMPTY):
        os.rename(top / "one", top / "two")
    os.unlink(posix.file(f"{folder}/empty/x"))
    with fails(errno.ENOTEMPTY):
        os.rename(top / "empty", top / "two")
    os.rename(top / "empty", top / "moved")
    os.unlink(posix.file(f"{folder}/other/x"))
    os.rename(top / "moved", top / "other")
    assert os.listdir(top / "other") == []
    os.rename(top / "one", top / "other")
    os.rename(top / "other", top / "one")
    with fails(errno.ENOTDIR):
        os.rename(top / "one", file)
    with fails(errno.EISDIR):
        os.rename(file, top / "one")
    with fails(errno.ENOENT):
        os.rename(file, top / "absent" / "x")
    with fails(errno.EXDEV):
        os.rename(file, posix.folder / "outside")
    assert sorted(os.listdir(top)) == ["file", "one", "two"]
    assert os.listdir(top / "one") == ["a"]


# Reading and seeking


def test_seeking_in_a_file_of_known_length(posix: Posix, folder: str) -> None:
    with opened(posix.file(f"{folder}/file", DATA)) as fd:
        assert os.lseek(fd, 0, os.SEEK_END) == len(DATA)
        assert os.lseek(fd, -5, os.SEEK_CUR) == len(DATA) - 5
        assert os.read(fd, 100) == DATA[-5:]
        assert os.lseek(fd, 10, os.SEEK_DATA) == 10
        assert os.lseek(fd, 10, os.SEEK_HOLE) == len(DATA)
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            with fails(errno.ENXIO):
                os.lseek(fd, len(DATA), whence)
        with fails(errno.EINVAL):
            os.lseek(fd, -1, os.SEEK_SET)
        assert os.lseek(fd, 1 << 40, os.SEEK_SET) == 1 << 40
        assert os.read(fd, 10) == b""


def test_seeking_in_a_file_of_unknown_length(posix: Posix, folder: str) -> None:
    path = posix.command(f"{folder}/run", "cat", posix.original(DATA))
    with opened(path) as fd:
        assert os.fstat(fd).st_size == 0
        assert os.lseek(fd, 0, os.SEEK_END) == 0
        assert os.lseek(fd, 600_000, os.SEEK_SET) == 600_000
        assert os.read(fd, 10) == DATA[600_000:600_010]
        assert os.pread(fd, 10, len(DATA)) == b""
        assert os.lseek(fd, 0, os.SEEK_SET) == 0
        assert whole(fd) == DATA
    assert path.stat().st_size == len(DATA)
    with opened(path) as fd:
        assert os.lseek(fd, -3, os.SEEK_END) == len(DATA) - 3
        assert os.read(fd, 10) == DATA[-3:]


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_reads_at_the_limits_of_offsets_and_lengths(known: bool, posix: Posix, folder: str) -> None:
    name = f"{folder}/file"
    path = posix.file(name, DATA) if known else posix.command(name, "cat", posix.original(DATA))
    with opened(path) as fd:
        assert os.pread(fd, 0, 0) == b""
        assert os.pread(fd, 0, len(DATA) + 5) == b""
        assert os.pread(fd, 10, len(DATA)) == b""
        assert os.pread(fd, 10, len(DATA) - 1) == DATA[-1:]
        for offset in (1 << 31, 1 << 32, 1 << 47, 1 << 62, (1 << 63) - (1 << 21), (1 << 63) - 2, (1 << 63) - 1):
            try:
                assert os.pread(fd, 4096, offset) == b""
            except OSError as error:
                assert error.errno in (errno.EINVAL, errno.EOVERFLOW)
        with fails(errno.EINVAL):
            os.pread(fd, 1, -1)
        assert os.preadv(fd, [bytearray(3), bytearray(0), bytearray(4)], 7) == 7
        assert os.pread(fd, 8, 0) == DATA[:8]


def test_direct_reads_give_the_same_bytes(posix: Posix, folder: str) -> None:
    path = posix.file(f"{folder}/file", DATA)
    with opened(path, os.O_DIRECT) as fd, mmap.mmap(-1, 1 << 20) as aligned:
        assert os.preadv(fd, [aligned], 0) == len(DATA)
        assert aligned[: len(DATA)] == DATA
        assert os.preadv(fd, [memoryview(aligned)[:4096]], 8192) == 4096
        assert aligned[:4096] == DATA[8192:12288]
        del aligned


def test_a_file_of_known_length_can_be_mapped(posix: Posix, folder: str) -> None:
    with opened(posix.file(f"{folder}/file", DATA)) as fd:
        for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
            with mmap.mmap(fd, 0, flags, mmap.PROT_READ) as mapped:
                assert mapped[:] == DATA
        with fails(errno.EACCES):
            mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as copy:
            copy[:4] = b"mine"
        assert os.pread(fd, 4, 0) == DATA[:4]


def test_a_shared_map_of_unknown_length_is_a_clean_error(posix: Posix, folder: str) -> None:
    LIBC.mmap.restype = ctypes.c_void_p
    failed = ctypes.c_void_p(-1).value
    with opened(posix.command(f"{folder}/run", "cat", posix.original(DATA))) as fd:
        mapped = LIBC.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
        assert mapped == failed
        assert ctypes.get_errno() == errno.ENODEV
        assert whole(fd) == DATA


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_the_kernel_copies_out_of_the_mount(known: bool, posix: Posix, folder: str, tmp_path: Path) -> None:
    name = f"{folder}/file"
    path = posix.file(name, DATA) if known else posix.command(name, "cat", posix.original(DATA))

    # Linux since 6.5 takes a size of 0 at its word where it splices, as it does for files in /proc.
    expected = {DATA} if known else {DATA, b""}
    assert sent(path, tmp_path / "sent") in expected
    assert spliced(path) in expected

    with opened(path) as source, open(tmp_path / "copied", "wb") as target:
        try:
            while os.copy_file_range(source, target.fileno(), 1 << 20):
                pass
        except OSError as error:  # then programs fall back to reading; a copy cut short they could not see
            assert error.errno in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP)
        else:
            assert (tmp_path / "copied").read_bytes() == DATA
    checked(["cp", path, tmp_path / "cp"])
    assert (tmp_path / "cp").read_bytes() == DATA
    # By now the length is known in any case.
    assert sent(path, tmp_path / "sent") == spliced(path) == DATA


def sent(path: Path, target: Path) -> bytes:
    with opened(path) as source, open(target, "wb") as file:
        while os.sendfile(file.fileno(), source, None, 1 << 20):
            pass
    return target.read_bytes()


def spliced(path: Path) -> bytes:
    received = bytearray()
    out, into = os.pipe()
    try:
        with opened(path) as source:
            while os.splice(source, into, 65536):
                received += os.read(out, 1 << 20)
    finally:
        os.close(out)
        os.close(into)
    return bytes(received)


def test_nothing_is_copied_into_the_mount(posix: Posix, folder: str) -> None:
    path = posix.file(f"{folder}/file", DATA)
    with fails(errno.EACCES, errno.EROFS):
        (path.parent / "new").write_bytes(b"x")
    with fails(errno.EACCES, errno.EROFS):
        path.write_bytes(b"x")
    assert path.read_bytes() == DATA


def test_a_duplicate_shares_the_offset_and_another_open_does_not(posix: Posix, folder: str) -> None:
    path = posix.command(f"{folder}/run", "cat", posix.original(DATA))
    with opened(path) as fd, opened(path) as other:
        duplicate = os.dup(fd)
        try:
            assert os.read(fd, 100) == DATA[:100]
            assert os.read(duplicate, 100) == DATA[100:200]
            assert os.read(other, 100) == DATA[:100]
        finally:
            os.close(duplicate)
        assert os.read(fd, 100) == DATA[200:300]
        assert os.fstat(fd).st_ino == os.fstat(other).st_ino


def test_a_descriptor_outlives_who_opened_it(posix: Posix, folder: str) -> None:
    """A thread that opened the file and ended, or a process that passed it on, must not end a wait of another."""
    # read(2) itself: Python's own would hide an EINTR.
    program = (
        "import ctypes, os, sys, threading\n"
        "libc, buffer, fds = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(100), []\n"
        "opener = threading.Thread(target=lambda: fds.append(os.open(sys.argv[1], os.O_RDONLY)))\n"
        "opener.start(); opener.join()\n"
        "if sys.argv[2] == 'process' and os.fork(): os._exit(0)\n"
        "while count := libc.read(fds[0], buffer, 100):\n"
        "    if count < 0: sys.exit(os.strerror(ctypes.get_errno()))\n"
        "    os.write(1, buffer.raw[:count])\n"
    )
    for passed_to in ("thread", "process"):
        path = posix.command(f"{folder}/{passed_to}", "sh", "-c", "echo one; sleep 1; echo two")
        assert checked([sys.executable, "-c", program, path, passed_to]) == b"one\ntwo\n"


def test_locks_do_not_hang(posix: Posix, folder: str) -> None:
    path = posix.file(f"{folder}/file", DATA)
    with opened(path) as fd, opened(path) as other:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with fails(errno.EWOULDBLOCK):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        call = "fcntl.lockf(os.open(A[0], os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)"
        assert outcome(call, path) is None


# Names


NAMES = [
    *(b"caf\xe9", b"\xff\xfe\x80", b"new\nline", b"tab\there", b" leading", b"trailing ", b"-dash", b"--help"),
    *(b"*?[a]", b"$HOME", b"`id`", b"a;b", b"a|b", b"a&b", b"'", b'"', b"\\", b"~", b"#", b"...", b".hidden"),
    *(b"\x01\x7f", "\u202egnp.exe".encode(), "e\u0301".encode(), "\u00e9".encode(), b"n" * 255, "ü".encode() * 127),
    *(b"con", b"a:b", b"%00", b"%2e%2e"),
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_any_name_that_can_be_is_shown_as_it_is(name: bytes, posix: Posix, folder: str) -> None:
    posix.files([os.fsdecode(folder.encode() + b"/" + name)], DATA)
    top = os.fsencode(posix.mountpoint) + b"/" + folder.encode()
    assert os.listdir(top) == [name]
    with open(top + b"/" + name, "rb") as file:
        assert file.read() == DATA
    os.rename(top + b"/" + name, top + b"/plain")
    os.rename(top + b"/plain", top + b"/" + name)
    assert os.listdir(top) == [name]
    os.unlink(top + b"/" + name)
    assert not os.path.lexists(top + b"/" + name)


# Listings


def test_five_thousand_names_are_listed_once_each_wherever_a_listing_starts(posix: Posix, folder: str) -> None:
    names = [f"n{number:05}" for number in range(5000)]
    posix.files([f"{folder}/{name}" for name in names])
    assert sorted(os.listdir(posix.mountpoint / folder)) == names
    listing = Directory(posix.mountpoint / folder)
    try:
        order, cookies = [], []
        while True:
            cookies.append(listing.tell())
            entry = listing.read()
            if entry is None:
                break
            order.append(entry[0].decode())
        assert sorted(order) == names
        for at in (4999, 0, 2500, 1, 333, 5000):
            listing.seek(cookies[at])
            assert [name.decode() for name in listing.rest()] == order[at:]
        listing.rewind()
        assert len(listing.rest()) == 5000
    finally:
        listing.close()
    posix.remove(*(f"{folder}/{name}" for name in names))


def test_a_listing_that_is_rewound_shows_what_is_there_now(posix: Posix, folder: str) -> None:
    for name in ("a", "b"):
        posix.file(f"{folder}/{name}", b"x")
    listing = Directory(posix.mountpoint / folder)
    try:
        assert sorted(listing.rest()) == [b"a", b"b"]
        posix.file(f"{folder}/c", b"x")
        posix.remove(f"{folder}/a")
        listing.rewind()
        assert sorted(listing.rest()) == [b"b", b"c"]
    finally:
        listing.close()


def test_what_goes_while_it_is_listed_does_not_end_the_listing(posix: Posix, folder: str) -> None:
    names = [f"n{number:04}" for number in range(1000)]
    posix.files([f"{folder}/{name}" for name in names])
    listing = Directory(posix.mountpoint / folder)
    try:
        first = listing.read()
        assert first is not None
        posix.remove(*(f"{folder}/{name}" for name in names[1::2]))
        rest = [first[0], *listing.rest()]
        assert len(rest) == len(set(rest))
        assert {name.encode() for name in names[::2]} <= set(rest)
    finally:
        listing.close()
    assert sorted(os.listdir(posix.mountpoint / folder)) == names[::2]


def test_listings_are_whole_while_names_come_and_go(posix: Posix, folder: str) -> None:
    stable = [f"stable{number:03}" for number in range(200)]
    posix.files([f"{folder}/{name}" for name in stable])
    top = posix.mountpoint / folder
    stop = threading.Event()
    failures: list[BaseException] = []

    def churn() -> None:
        try:
            for turn in itertools.count():
                if stop.is_set():
                    return
                posix.files([f"{folder}/churn{turn}-{number}" for number in range(20)])
                posix.remove(*(f"{folder}/churn{turn}-{number}" for number in range(20)))
        except BaseException as error:
            failures.append(error)
            raise

    changing = threading.Thread(target=churn)
    changing.start()
    try:
        for _ in range(30):
            found = os.listdir(top)
            assert len(found) == len(set(found))
            assert {name for name in found if name.startswith("stable")} == set(stable)
            checked_sizes = [entry.stat().st_size for entry in os.scandir(top) if entry.name.startswith("stable")]
            assert len(checked_sizes) == len(stable)
    finally:
        stop.set()
        changing.join()
    assert not failures


# Programs


def test_rsync_transfers_nothing_the_second_time(posix: Posix, folder: str, tmp_path: Path) -> None:
    for name in ("a", "sub/b"):
        posix.file(f"{folder}/{name}", DATA)
    posix.command(f"{folder}/run", "cat", posix.original(DATA)).read_bytes()  # its length is known from now on

    def transferred() -> int:
        said = checked(["rsync", "-a", "--stats", f"{posix.mountpoint / folder}/", tmp_path / "copy/"]).decode()
        (line,) = [line for line in said.splitlines() if line.startswith("Number of regular files transferred:")]
        return int(line.split(":")[1].replace(",", ""))

    assert transferred() == 3
    assert (tmp_path / "copy/sub/b").read_bytes() == (tmp_path / "copy/run").read_bytes() == DATA
    assert transferred() == 0


def test_make_rebuilds_when_the_source_is_newer_and_only_then(posix: Posix, folder: str, tmp_path: Path) -> None:
    original = posix.original(DATA)
    os.utime(original, (10**9, 10**9))
    path = posix.add(f"{folder}/input", UrlSource(original.as_uri()))
    generated = posix.command(f"{folder}/generated", "echo", "x")
    (tmp_path / "Makefile").write_text(f"out: {path} {generated}\n\tcat $^ > out\n")
    assert b"cat" in checked(["make", "-C", tmp_path])
    assert (tmp_path / "out").read_bytes() == DATA + b"x\n"
    assert b"up to date" in checked(["make", "-C", tmp_path])
    original.write_bytes(DATA[:1000])
    future = time.time() + 100
    os.utime(original, (future, future))
    assert path.read_bytes() == DATA[:1000]  # an open asks the source; stat does not
    assert b"cat" in checked(["make", "-C", tmp_path])
    assert (tmp_path / "out").read_bytes() == DATA[:1000] + b"x\n"


def test_find_and_tar_walk_it_all_without_complaint(posix: Posix, folder: str, tmp_path: Path) -> None:
    for name in ("a", "b/c", "b/d/e", "f/g/h/i"):
        posix.file(f"{folder}/{name}", DATA)
    top = posix.mountpoint / folder
    found = checked(["find", top, "-noleaf", "-type", "f", "-size", "+1k"]).split()
    assert len(found) == len(checked(["find", top, "-type", "f"]).split()) == 4
    process = posix.fs.start(["tar", "-C", posix.mountpoint, "-cf", tmp_path / "all.tar", folder])
    assert end_within(process, 30) == 0
    assert process.stderr is not None and process.stderr.read() == b""
    checked(["tar", "-C", posix.mountpoint, "--compare", "-f", tmp_path / "all.tar"])
