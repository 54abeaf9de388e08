"""What a program meets when a source fails, stalls or changes, and when names go away under it."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from streamfs.fuse import AHEAD_PATIENCE
from tests.mount.mounted import Mounted, Tap, checked, end_within, names_in, wait_for
from tests.mount.origin import ScriptedOrigin

MIB = 1 << 20
_READ = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
for place in sys.argv[2:]:
    offset, size = map(int, place.split(":"))
    try:
        print(len(os.pread(fd, size, offset)))
    except OSError as error:
        print(error.errno)
"""
"""Prints, for each OFFSET:SIZE, how many bytes were read, or the errno."""


def numbers(output: bytes) -> list[int]:
    return [int(line) for line in output.split()]


def read(fs: Mounted, path: Path, *places: str) -> list[int]:
    output, errors = fs.python(_READ, path, *places).communicate(timeout=40)
    assert not errors, errors.decode()
    return numbers(output)


def test_what_a_failed_command_wrote_stays_readable_and_its_end_is_an_error(fs: Mounted) -> None:
    path = fs.add("failing", "--shell", "seq 1 1000; echo oh dear >&2; exit 3")
    output = b"".join(b"%d\n" % number for number in range(1, 1001))
    size = len(output)
    for _ in range(3):
        reader = fs.start(["cat", path])
        assert reader.communicate(timeout=20)[0] == output
        assert reader.returncode == 1
    assert read(fs, path, f"0:{size}", f"{size}:1", f"{size - 5}:5", f"{size}:100", f"{size + 9999}:1") == [
        size,
        errno.EIO,
        5,
        errno.EIO,
        errno.EIO,
    ]
    assert fs.xattr("failing", "exit") == "3"
    assert "3" in (fs.xattr("failing", "error") or "")
    assert fs.xattr("failing", "size") is None
    assert fs.status("failing")["error"]
    copy = fs.start(["cp", path, path.parent.parent / "copy"])
    assert end_within(copy, 20) == 1


def test_a_source_that_died_gives_an_error_beyond_what_arrived_every_time(
    fs: Mounted, origin: ScriptedOrigin, tmp_path: Path
) -> None:
    data = tmp_path / "fifo"
    os.mkfifo(data)
    path = fs.add("dying", "--", "sh", "-c", 'cat "$0"; kill -9 $$', data)
    reader = fs.start(["cat", path])
    with data.open("wb") as fifo:
        fifo.write(b"x" * 50_000)
    assert reader.communicate(timeout=20)[0] == b"x" * 50_000
    assert reader.returncode == 1
    assert read(fs, path, "0:50000", *["50000:1"] * 4, "10:20") == [50_000, *[errno.EIO] * 4, 20]
    assert fs.xattr("dying", "exit") == "137"


def test_an_origin_that_went_away_gives_an_error_and_serves_again_when_it_is_back(
    fs: Mounted, origin: ScriptedOrigin
) -> None:
    document = origin.add("leaving", 30 * MIB)
    path = fs.add("leaving", document.url)
    assert read(fs, path, f"0:{MIB}") == [MIB]
    document.status = 404
    places = [f"0:{MIB // 2}", f"{25 * MIB}:1", f"{25 * MIB}:1"]
    assert read(fs, path, *places) == [MIB // 2, errno.EIO, errno.EIO]
    assert fs.xattr("leaving", "state") == "failed"
    assert "404" in (fs.xattr("leaving", "error") or "")
    document.status = None
    assert checked(["tail", "-c", "1000", path]) == document.bytes(30 * MIB - 1000)
    assert fs.xattr("leaving", "error") is None


def test_a_url_that_is_not_there_fails_at_the_open(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("missing", 1000, status=404)
    path = fs.add("missing", document.url)
    with pytest.raises(OSError) as failure:
        path.open("rb")
    assert failure.value.errno == errno.EIO
    assert "404" in (fs.xattr("missing", "error") or "")
    assert fs.xattr("missing", "state") == "failed"


def test_an_origin_that_is_switched_off_fails_at_the_open(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("off", 1000)
    origin.stop()
    path = fs.add("off", document.url)
    reader = fs.start(["cat", path])
    assert end_within(reader, 60) == 1
    assert fs.xattr("off", "state") == "failed"


@pytest.mark.parametrize("length", ["known", "unknown"])
def test_a_stall_ends_in_a_timeout(length: str, fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("stalling", MIB, ranged=False, chunked=length == "unknown", stall_at=100_000)
    path = fs.add("stalling", "--stall-timeout", "1s", document.url)
    assert read(fs, path, "0:50000", "200000:10") == [50_000, errno.ETIMEDOUT]
    assert read(fs, path, "0:50000") == [50_000], "what arrived stays readable"


def test_a_command_that_stalls_times_out_only_where_that_was_asked_for(fs: Mounted, tap: Tap) -> None:
    path = fs.add("tap", "--stall-timeout", "1s", *tap.argv)
    assert read(fs, path, "0:1", "0:1") == [errno.ETIMEDOUT] * 2
    assert fs.xattr("tap", "state") == "failed"


@pytest.mark.parametrize("ranged", [True, False])
def test_a_changed_origin_makes_old_handles_stale_and_new_opens_see_the_new_bytes(
    ranged: bool, fs: Mounted, origin: ScriptedOrigin
) -> None:
    document = origin.add("changing", 30 * MIB, ranged=ranged)
    path = fs.add("changing", document.url)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert os.pread(fd, 1000, 0) == document.bytes(0, 1000, version=0)
        generation = int(fs.xattr("changing", "generation") or 0)
        document.version = 1
        document.size = 31 * MIB + 5
        wait_for(lambda: _head_of(path) == document.bytes(0, 1000, version=1), "a new open sees the new version", 20)
        with pytest.raises(OSError) as failure:
            os.pread(fd, 1000, 20 * MIB)
        assert failure.value.errno == errno.ESTALE
    finally:
        os.close(fd)
    assert checked(["cat", path]) == document.bytes()
    assert path.stat().st_size == document.size
    assert int(fs.xattr("changing", "generation") or 0) > generation


def _head_of(path: Path) -> bytes:
    return checked(["head", "-c", "1000", path])


def test_a_version_that_changes_while_it_is_fetched_is_never_mixed(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("changing", 30 * MIB)
    path = fs.add("changing", document.url)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert os.pread(fd, 1000, 0) == document.bytes(0, 1000, version=0)
        document.version = 1
        for offset in (20 * MIB, 25 * MIB, 20 * MIB):
            with pytest.raises(OSError) as failure:
                os.pread(fd, 1000, offset)
            assert failure.value.errno == errno.ESTALE
        assert os.pread(os.open(path, os.O_RDONLY), 1000, 20 * MIB) == document.bytes(20 * MIB, 20 * MIB + 1000)
    finally:
        os.close(fd)


def test_evicting_a_stream_leaves_its_readers_with_what_they_have(fs: Mounted, tmp_path: Path) -> None:
    path = fs.add("run", "--", "sh", "-c", 'echo x >> "$0"; cat "$0"; seq 1 100000', tmp_path / "runs")
    expected = b"".join(b"%d\n" % number for number in range(1, 100_001))
    with path.open("rb", buffering=0) as file:
        assert file.read(2) == b"x\n"
        fs.run("evict", "run")
        assert file.readall() == expected
        assert checked(["cat", path]) == b"x\nx\n" + expected, "a new open is a new run"
        file.seek(0)
        assert file.readall() == b"x\n" + expected


@pytest.mark.parametrize("how", ["rm in the mount", "streamfs rm"])
def test_a_removed_stream_stays_readable_for_who_has_it_open(how: str, fs: Mounted, tap: Tap) -> None:
    path = fs.add("tap", *tap.argv)
    tap.write(b"before ")
    with path.open("rb", buffering=0) as file:
        assert file.read(7) == b"before "
        if how == "streamfs rm":
            fs.run("rm", "tap")
        else:
            path.unlink()
        assert not path.exists()
        assert names_in(fs.mountpoint) == []
        assert fs.run("ls").stdout == ""
        assert os.fstat(file.fileno()).st_nlink == 0
        tap.write(b"after")
        assert file.read(5) == b"after"
        tap.close()
        assert file.read(1) == b""
        file.seek(0)
        assert file.readall() == b"before after"


class TestNames:
    def test_changes_on_the_command_line_show_at_once(self, fs: Mounted) -> None:
        fs.add("a/b/one", "--", "echo", "1")
        fs.add("two", "--", "echo", "2")
        assert names_in(fs.mountpoint) == ["a", "two"]
        assert names_in(fs.mountpoint / "a" / "b") == ["one"]
        fs.run("mv", "two", "a/three")
        assert names_in(fs.mountpoint) == ["a"]
        assert names_in(fs.mountpoint / "a") == ["b", "three"]
        assert (fs.mountpoint / "a" / "three").read_bytes() == b"2\n"
        fs.run("rm", "a/b/one", "a/three")
        assert names_in(fs.mountpoint) == []

    def test_changes_in_the_mount_show_on_the_command_line_and_last(self, fs: Mounted) -> None:
        for name in ("one", "two", "folder/three"):
            fs.add(name, "--", "echo", name)
        checked(["mv", fs.mountpoint / "one", fs.mountpoint / "folder" / "four"])
        checked(["mv", fs.mountpoint / "folder" / "three", fs.mountpoint / "five"])
        checked(["rm", fs.mountpoint / "two"])
        assert fs.run("ls").stdout.split() == ["five", "folder/four"]
        checked(["mv", fs.mountpoint / "folder", fs.mountpoint / "directory"])
        assert fs.run("ls").stdout.split() == ["directory/four", "five"]
        fs.umount()
        fs.mount()
        assert fs.run("ls").stdout.split() == ["directory/four", "five"]
        assert (fs.mountpoint / "directory" / "four").read_bytes() == b"one\n"

    def test_a_rename_over_another_stream_replaces_it(self, fs: Mounted) -> None:
        one, two = fs.add("one", "--", "echo", "1"), fs.add("two", "--", "echo", "2")
        with two.open("rb", buffering=0) as old:
            one.rename(two)
            assert two.read_bytes() == b"1\n"
            assert old.read(2) == b"2\n"
        assert names_in(fs.mountpoint) == ["two"]
        assert "exist" in fs.refused("add", "two", "--", "true")

    def test_a_renamed_stream_stays_open_and_keeps_its_bytes(self, fs: Mounted, tmp_path: Path) -> None:
        path = fs.add("old", "--", "sh", "-c", 'echo x >> "$0"; seq 1 1000', tmp_path / "runs")
        with path.open("rb", buffering=0) as file:
            assert file.read(2) == b"1\n"
            path.rename(path.with_name("new"))
            assert file.read(2) == b"2\n"
            assert checked(["tail", "-n", "1", path.with_name("new")]) == b"1000\n"
        assert (tmp_path / "runs").read_text() == "x\n"

    def test_odd_names_are_files_like_any_other(self, fs: Mounted) -> None:
        names = ["späte Größe", "a b\tc", "x" * 255, "%41", "new\nline"]
        for name in names:
            fs.add(name, "--", "echo", "it")
            assert (fs.mountpoint / name).read_bytes() == b"it\n"
        assert names_in(fs.mountpoint) == sorted(names)


def test_nothing_in_the_mount_can_be_written(fs: Mounted) -> None:
    path = fs.add("folder/fixed", "--", "echo", "fixed")
    changes = [
        lambda: os.open(path, os.O_WRONLY),
        lambda: os.open(path, os.O_RDWR),
        lambda: os.open(path, os.O_RDONLY | os.O_TRUNC),
        lambda: os.truncate(path, 0),
        lambda: path.chmod(0o600),
        lambda: os.utime(path),
        lambda: os.open(fs.mountpoint / "new", os.O_CREAT | os.O_WRONLY),
        lambda: (fs.mountpoint / "new").symlink_to("x"),
        lambda: (fs.mountpoint / "new").hardlink_to(path),
        lambda: os.mkfifo(fs.mountpoint / "new"),
    ]
    for number, change in enumerate(changes):
        with pytest.raises(OSError) as failure:
            change()
        assert failure.value.errno in (errno.EACCES, errno.EROFS, errno.EPERM), number
    with pytest.raises(OSError) as failure:
        (fs.mountpoint / "folder").rmdir()
    assert failure.value.errno == errno.ENOTEMPTY
    assert path.read_bytes() == b"fixed\n"
    info = path.stat()
    assert (info.st_mode, info.st_uid, info.st_gid) == (0o100644, os.getuid(), os.getgid())


def test_a_read_with_o_direct_waits_for_a_slow_source(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("slow", 1 << 20, stall_at=256 * 1024)
    path = fs.add("slow", document.url)
    reader = fs.python(
        "import mmap, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)\n"
        "room = mmap.mmap(-1, 65536)\n"
        "print('open', flush=True)\n"
        "assert os.preadv(fd, [room], 512 * 1024) == 65536\n"
        "sys.stdout.buffer.write(room[:])\n",
        path,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"open\n"
    assert document.stalled.wait(10)
    time.sleep(3 * AHEAD_PATIENCE)  # longer than the kernel's own read-ahead would be kept waiting
    document.go.set()
    output, errors = reader.communicate(timeout=30)
    assert not errors, errors.decode()
    assert output == document.bytes(512 * 1024, 576 * 1024)
