"""One source, many readers; what has arrived never waits; what is not asked for is not fetched."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from tests.mount.mounted import Mounted, Tap, checked, wait_for
from tests.mount.origin import ScriptedOrigin

READERS = 20
MIB = 1 << 20


def test_twenty_programs_start_a_command_once(fs: Mounted, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    path = fs.add("numbers", "--", "sh", "-c", 'echo started >> "$0"; seq 1 1000000', starts)
    readers = [fs.start(["sha256sum", path]) for _ in range(READERS)]
    results = {reader.communicate(timeout=60)[0].split()[0] for reader in readers}
    expected = hashlib.sha256(b"".join(b"%d\n" % number for number in range(1, 1_000_001))).hexdigest()
    assert results == {expected.encode()}
    assert starts.read_text() == "started\n"


@pytest.mark.parametrize("ranged", [True, False])
def test_twenty_programs_fetch_a_url_once(ranged: bool, fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("shared", 12 * MIB + 7, ranged=ranged)
    path = fs.add("shared", "--no-probe", document.url)
    readers = [fs.start(["sha256sum", path]) for _ in range(READERS)]
    results = {reader.communicate(timeout=60)[0].split()[0].decode() for reader in readers}
    assert results == {hashlib.sha256(document.bytes()).hexdigest()}
    if ranged:
        assert document.sent <= document.size + 2 * MIB
    else:
        assert document.sent == document.size
        assert document.bodies == 1


def test_readers_are_counted(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("counted", MIB, stall_at=MIB // 2)
    path = fs.add("counted", document.url)
    assert fs.xattr("counted", "readers") == "0"
    readers = [fs.start(["cat", path]) for _ in range(3)]
    wait_for(lambda: fs.xattr("counted", "readers") == "3", "three readers")
    assert fs.status("counted")["readers"] == 3
    document.go.set()
    for reader in readers:
        assert reader.communicate(timeout=20)[0] == document.bytes()
    wait_for(lambda: fs.xattr("counted", "readers") == "0", "all have left")


@pytest.mark.parametrize("length", ["known", "unknown"])
@pytest.mark.parametrize("count", [1, 300_000, 999_999])
def test_bytes_that_have_arrived_are_read_while_the_source_hangs(
    count: int, length: str, fs: Mounted, origin: ScriptedOrigin
) -> None:
    document = origin.add("hanging", 8 * MIB, ranged=False, chunked=length == "unknown", stall_at=1_000_000)
    path = fs.add("hanging", document.url)
    waiting = fs.start(["cat", path])
    assert document.stalled.wait(20)
    wait_for(lambda: fs.buffered("hanging") == 1_000_000, "all that was sent has arrived")
    assert checked(["head", "-c", str(count), path], within=5) == document.bytes(0, count)
    skip = ["dd", f"if={path}", "status=none", "bs=1000", "skip=700", "count=300"]
    assert checked(skip, within=5) == document.bytes(700_000, 1_000_000)
    assert waiting.poll() is None
    document.go.set()
    assert waiting.communicate(timeout=30)[0] == document.bytes()


def test_small_reads_get_the_last_byte_that_arrived_while_the_source_hangs(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("hanging", 8 * MIB, ranged=False, stall_at=999_999)
    path = fs.add("hanging", document.url)
    argv = ["dd", f"if={path}", "status=none", "bs=4001", "iflag=count_bytes", "count=999999"]
    assert checked(argv, within=10) == document.bytes(0, 999_999)
    assert not document.go.is_set()
    document.go.set()


def test_output_of_a_command_is_read_as_it_is_written(fs: Mounted, tap: Tap) -> None:
    path = fs.add("lines", *tap.argv)
    reader = fs.start(["dd", f"if={path}", "status=none", "bs=7"])  # a read gives exactly what it asked for
    assert reader.stdout is not None
    for number in range(10):
        line = b"line %d\n" % number
        tap.write(line)
        assert reader.stdout.readline() == line
    tap.close()
    assert reader.communicate(timeout=20)[0] == b""


def test_a_seek_in_a_ranged_source_does_not_read_what_lies_between(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("huge", 2000 * MIB)
    path = fs.add("huge", document.url)
    for offset in (1500 * MIB + 3, 700 * MIB, 1999 * MIB, 0):
        argv = ["dd", f"if={path}", "status=none", "iflag=skip_bytes,count_bytes", f"skip={offset}", "count=5000"]
        assert checked(argv) == document.bytes(offset, offset + 5000)
    assert checked(["tail", "-c", "1000", path]) == document.bytes(document.size - 1000)
    # Five places: each costs at most the kernel's read-ahead, one window, and what sockets hold of an ended reply.
    assert document.sent < 64 * MIB
    assert fs.buffered("huge") < 64 * MIB


@pytest.mark.parametrize("kind", ["no ranges", "chunked", "command"])
def test_a_one_way_source_seeks_both_ways(kind: str, fs: Mounted, origin: ScriptedOrigin, tmp_path: Path) -> None:
    document = origin.add("oneway", 20 * MIB, ranged=False, chunked=kind == "chunked")
    if kind == "command":
        (tmp_path / "data").write_bytes(document.bytes())
        path = fs.add("oneway", "--", "cat", tmp_path / "data")
    else:
        path = fs.add("oneway", document.url)
    chosen = random.Random(11)
    offsets = [15 * MIB, 3 * MIB, 20 * MIB - 100, 0, *(chosen.randrange(20 * MIB) for _ in range(20))]
    with path.open("rb", buffering=0) as file:
        for offset in offsets:
            file.seek(offset)
            assert file.read(1000) == document.bytes(offset, offset + 1000)
        file.seek(20 * MIB)
        assert file.read(10) == b""
        file.seek(21 * MIB)
        assert file.read(10) == b""
    assert document.bodies <= 1
