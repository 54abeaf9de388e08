"""What a file's length says, before anything is open, while the source runs, and after its end."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from tests.mount.mounted import Mounted, Tap, checked, end_within, wait_for
from tests.mount.origin import ScriptedOrigin

SIZE = 3_000_017
_HOLD = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print(os.fstat(fd).st_size, flush=True)
sys.stdin.readline()
total = 0
while piece := os.read(fd, 65536):
    total += len(piece)
print(total, os.fstat(fd).st_size, flush=True)
"""


def test_looking_at_files_never_touches_the_origin(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("untouched", SIZE)
    path = fs.add("untouched", "--no-probe", document.url)
    for argv in (
        ["stat", path],
        ["ls", "-laR", fs.mountpoint],
        ["df", fs.mountpoint],
        ["du", "-a", fs.mountpoint],
        ["getfattr", "-d", "-m", "-", path],
        ["find", fs.mountpoint, "-name", "x"],
        ["test", "-r", path],
    ):
        checked(argv)
    fs.run("ls", "-l")
    fs.run("status")
    assert document.requests == []
    assert path.stat().st_size == 0


def test_looking_at_files_does_not_wait_for_an_origin_that_hangs(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("hanging", SIZE, stall_at=0)
    path = fs.add("hanging", "--no-probe", document.url)
    reader = fs.start(["cat", path])
    assert document.stalled.wait(10)
    for argv in (
        ["stat", path],
        ["ls", "-la", fs.mountpoint],
        ["df", fs.mountpoint],
        ["getfattr", "-d", "-m", "-", path],
    ):
        checked(argv, within=5)
    fs.run("ls", "-l")
    assert reader.poll() is None
    document.go.set()
    assert reader.communicate(timeout=20)[0] == document.bytes()


@pytest.mark.parametrize("ranged", [True, False])
def test_adding_a_url_asks_once_for_its_length_and_fetches_nothing(
    ranged: bool, fs: Mounted, origin: ScriptedOrigin
) -> None:
    document = origin.add("probed", 50_000_000, ranged=ranged)
    path = fs.add("probed", document.url)
    wait_for(lambda: path.stat().st_size == document.size, "the probe's answer shows")
    assert len(document.requests) == 1
    assert document.sent < 10_000_000  # at most what sockets hold, never the resource
    assert fs.buffered("probed") == 0
    fs.umount()
    origin.stop()
    fs.mount()
    assert path.stat().st_size == document.size, "the catalogue remembers it"


def test_an_open_learns_the_length_that_an_origin_tells(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("told", SIZE, ranged=False, stall_at=1000)
    path = fs.add("told", "--no-probe", document.url)
    assert path.stat().st_size == 0
    holder = fs.python(_HOLD, path)
    assert holder.stdout is not None
    assert int(holder.stdout.readline()) == SIZE
    assert path.stat().st_size == SIZE
    document.go.set()


def test_an_unknown_length_is_zero_until_the_end_is_known_then_exact(fs: Mounted, tap: Tap) -> None:
    path = fs.add("tap", *tap.argv)
    tap.write(b"a" * 1000)
    holder = fs.start([sys.executable, "-c", _HOLD, path], stdin=subprocess.PIPE)
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert int(holder.stdout.readline()) == 0
    reader = fs.start(["cat", path])
    wait_for(lambda: fs.buffered("tap") == 1000, "the first bytes are there")
    assert path.stat().st_size == 0
    assert fs.xattr("tap", "size") is None
    assert fs.xattr("tap", "progress") == "1000/?"
    tap.write(b"b" * 500)
    tap.close()
    assert reader.communicate(timeout=20)[0] == b"a" * 1000 + b"b" * 500
    wait_for(lambda: path.stat().st_size == 1500, "the end is known")
    assert fs.xattr("tap", "size") == "1500"
    holder.stdin.write(b"\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == b"1500 1500\n", "an old handle reads to the true end, too"
    mapped = "import mmap,sys; f=open(sys.argv[1],'rb'); print(mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ)[:].hex())"
    assert bytes.fromhex(checked([sys.executable, "-c", mapped, path]).decode()) == b"a" * 1000 + b"b" * 500


@pytest.mark.parametrize(
    "argv", [["cat", "PATH"], ["dd", "if=PATH", "bs=64k", "status=none"], ["cp", "PATH", "/dev/stdout"]]
)
def test_programs_read_to_the_true_end_while_the_length_is_unknown(argv: list[str], fs: Mounted, tap: Tap) -> None:
    path = fs.add("tap", *tap.argv)
    reader = fs.start([word.replace("PATH", str(path)) for word in argv])
    expected = b""
    for number in range(20):
        piece = b"%d\n" % number * 500
        tap.write(piece)
        expected += piece
        wait_for(lambda: fs.buffered("tap") == len(expected), "the piece arrived")  # noqa: B023
    assert reader.poll() is None
    tap.close()
    assert reader.communicate(timeout=20)[0] == expected
    assert reader.returncode == 0


def test_size_policy_wait_lets_an_open_wait_for_the_end(fs: Mounted, tap: Tap) -> None:
    path = fs.add("tap", "--size-policy", "wait", *tap.argv)
    opener = fs.start([sys.executable, "-c", _HOLD, path], stdin=subprocess.PIPE)
    tap.write(b"x" * 4000)
    wait_for(lambda: fs.buffered("tap") == 4000, "the open started the command")
    assert opener.poll() is None
    assert path.stat().st_size == 0
    tap.write(b"y" * 4000)
    tap.close()
    assert opener.communicate(b"\n", timeout=20)[0] == b"8000\n8000 8000\n"


def test_size_policy_wait_ends_with_an_error_where_nothing_comes_any_more(fs: Mounted, tap: Tap) -> None:
    path = fs.add("tap", "--size-policy", "wait", "--stall-timeout", "1s", *tap.argv)
    tap.write(b"x" * 10)
    done = fs.start(["cat", path])
    assert end_within(done, 15) == 1
    assert done.stderr is not None
    assert os.strerror(errno.ETIMEDOUT).encode() in done.stderr.read()


class TestDeclaredSize:
    def test_one_that_is_right_is_shown_before_anything_runs_and_proved(self, fs: Mounted, tap: Tap) -> None:
        path = fs.add("tap", "--size", "5000", *tap.argv)
        assert path.stat().st_size == 5000
        reader = fs.start(["cat", path])
        tap.write(b"z" * 5000)
        wait_for(lambda: fs.buffered("tap") == 5000, "all declared bytes are there")
        tap.close()
        assert reader.communicate(timeout=20)[0] == b"z" * 5000
        fs.wait_for_state("tap", "complete")
        assert fs.xattr("tap", "error") is None

    def test_one_that_is_too_large_ends_in_an_error_and_not_in_zeros(self, fs: Mounted) -> None:
        path = fs.add("short", "--size", "5000", "--", "head", "-c", "3000", "/dev/zero")
        with path.open("rb", buffering=0) as file:
            assert file.read(3000) == bytes(3000)
            for _ in range(2):
                with pytest.raises(OSError) as failure:
                    file.read(1)
                assert failure.value.errno == errno.EIO
        assert fs.xattr("short", "state") == "failed"
        assert "3000" in (fs.xattr("short", "error") or "")

    def test_one_that_is_too_small_makes_the_stream_a_failed_one(self, fs: Mounted) -> None:
        path = fs.add("long", "--size", "5000", "--", "head", "-c", "5001", "/dev/zero")
        reader = fs.start(["cat", path])
        assert reader.communicate(timeout=20)[0] == bytes(5000)
        fs.wait_for_state("long", "failed", within=10)
        assert "more than the 5000" in (fs.xattr("long", "error") or "")

    def test_one_that_an_origin_contradicts_is_refused_at_the_open(self, fs: Mounted, origin: ScriptedOrigin) -> None:
        document = origin.add("contradicted", 4000)
        path = fs.add("contradicted", "--size", "5000", document.url)
        with pytest.raises(OSError) as failure:
            path.open("rb")
        assert failure.value.errno == errno.EIO
        assert "declared size is 5000" in (fs.xattr("contradicted", "error") or "")


def test_an_empty_stream_is_an_empty_file(fs: Mounted, origin: ScriptedOrigin) -> None:
    for path in (fs.add("nothing", "--", "true"), fs.add("empty", origin.add("empty", 0).url)):
        assert checked(["cat", path]) == b""
        assert path.stat().st_size == 0
    assert fs.xattr("nothing", "size") == "0"
    assert fs.xattr("empty", "size") == "0"
