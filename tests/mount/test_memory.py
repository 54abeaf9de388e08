"""Memory first, then the cache directory, within a budget; and no source is read further than readers need."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamfs.control.client import Client
from tests.mount.mounted import Mounted, Tap, checked, wait_for
from tests.mount.origin import ScriptedOrigin

MIB = 1 << 20
SOAK = int(os.environ.get("STREAMFS_SOAK", "1"))


def resident(pid: int, field: str = "VmRSS") -> int:
    """Bytes of memory a process holds (VmRSS), or has held at most (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field}")


def test_below_the_spill_threshold_nothing_is_written(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("small", 5 * MIB, ranged=False)
    path = fs.add("small", document.url)
    assert checked(["cat", path]) == document.bytes()
    assert fs.xattr("small", "state") == "complete"
    assert checked(["cat", path]) == document.bytes()
    assert fs.data_files == []


def test_past_the_spill_threshold_bytes_move_to_one_file_and_stay_right(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("large", 16 * MIB, ranged=False)
    path = fs.add("large", document.url)
    assert checked(["cat", path]) == document.bytes()
    (data,) = wait_for(lambda: fs.data_files, "a data file")
    wait_for(lambda: data.stat().st_blocks * 512 >= 8 * MIB, "most of it is on disk")
    assert data.stat().st_mode & 0o777 == 0o600
    assert checked(["cat", path]) == document.bytes()
    assert checked(["tail", "-c", "100000", path]) == document.bytes(16 * MIB - 100_000)
    assert document.bodies == 1


def test_the_spill_threshold_can_be_set(unmounted: Mounted, origin: ScriptedOrigin) -> None:
    unmounted.mount("--spill-threshold", "1MiB")
    document = origin.add("middling", 3 * MIB)
    path = unmounted.add("middling", document.url)
    assert checked(["cat", path]) == document.bytes()
    wait_for(lambda: unmounted.data_files, "a data file")


def test_the_cache_directory_can_be_set(unmounted: Mounted, origin: ScriptedOrigin, tmp_path: Path) -> None:
    unmounted.mount("--spill-threshold", "1MiB", "--cache-dir", str(tmp_path / "elsewhere"))
    document = origin.add("middling", 3 * MIB)
    path = unmounted.add("middling", document.url)
    assert checked(["cat", path]) == document.bytes()
    wait_for(lambda: list((tmp_path / "elsewhere").glob("*.data")), "a data file there")
    assert unmounted.data_files == []
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o700


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_memory_stays_within_the_budget_while_many_streams_are_read(unmounted: Mounted, tmp_path: Path) -> None:
    streams, size = 20, 50 * MIB if SOAK > 1 else 20 * MIB
    block = os.urandom(MIB)
    expected = hashlib.sha256(block * (size // MIB)).hexdigest().encode()
    (tmp_path / "block").write_bytes(block)
    pid = unmounted.mount("--memory", "64MiB")
    before = resident(pid)
    line = f"for i in $(seq {size // MIB}); do cat {tmp_path / 'block'}; done"
    paths = [unmounted.add(f"s{number}", "--shell", line) for number in range(streams)]
    readers = [unmounted.start(["sha256sum", path]) for path in paths]
    for reader in readers:
        output, errors = reader.communicate(timeout=300)
        assert not errors
        assert output.split()[0] == expected
    # Over the budget: what twenty processes, their pipes' buffers and the allocator cost.
    assert resident(pid, "VmHWM") <= before + (64 + 48) * MIB


def _heap_size(pid: int) -> int:
    """Bytes of address space that a process's heap takes."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    places = [line.split()[0].split("-") for line in lines if line.endswith("[heap]")]
    return sum(int(stop, 16) - int(start, 16) for start, stop in places)


def test_reads_that_wait_keep_no_memory_each(unmounted: Mounted, tap: Tap) -> None:
    """libfuse gives each a buffer of a MiB, of which it fills a page."""
    readers = 96
    pid = unmounted.mount("--memory", "16MiB")
    path = unmounted.add("silent", *tap.argv)
    with Client(unmounted.home / "run" / "control.sock") as client:
        rest = client.call("ping")["tasks"]
        for _ in range(3):  # a round begins with what the one before it has given back
            waiting = [unmounted.start(["cat", path]) for _ in range(readers)]
            wait_for(lambda: client.call("ping")["tasks"] >= rest + readers, "all of them wait")
            for reader in waiting:
                reader.kill()
            for reader in waiting:
                reader.wait()
            wait_for(lambda: client.call("ping")["tasks"] < rest + readers // 2, "none waits")
    assert _heap_size(pid) < readers // 2 * MIB


def _page_faults(pid: int) -> int:
    """How often a process has touched memory that it had to be given first."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[7])


def test_reading_again_what_was_spilled_takes_no_fresh_memory(unmounted: Mounted, origin: ScriptedOrigin) -> None:
    """A read's memory is that of the one before, rather than 256 pages that the system has to find and to clear."""
    pid = unmounted.mount("--spill-threshold", "1MiB")
    size = 32 * MIB
    document = origin.add("large", size)
    path = unmounted.add("large", document.url)
    read = ["dd", f"if={path}", "iflag=direct", "bs=1M", "status=none"]
    for _ in range(2):  # from the source, and from the disk
        assert checked(read) == document.bytes()
    before = _page_faults(pid)
    assert checked(read) == document.bytes()
    assert _page_faults(pid) - before < size // mmap.PAGESIZE // 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MiB, of which the cache leaves 64 free."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    path = tmp_path / "disk"
    path.mkdir()
    checked(["mount", "-t", "tmpfs", "-o", "size=96m,mode=0700", "tmpfs", path])
    yield path
    checked(["umount", "-l", path])


def test_a_disk_that_takes_nothing_is_told_and_holds_up_nobody(
    unmounted: Mounted, origin: ScriptedOrigin, small_disk: Path
) -> None:
    other = small_disk / "other"
    other.write_bytes(bytes(40 * MIB))  # another program has taken more than the cache would leave
    unmounted.mount("--memory", "16MiB", "--spill-threshold", "1MiB", "--cache-dir", str(small_disk / "cache"))
    tell = json.loads(unmounted.run("status", "--json").stdout)
    assert tell["disk_error"] is None
    ranged = origin.add("ranged", 24 * MIB)
    path = unmounted.add("ranged", ranged.url)
    assert checked(["cat", path]) == ranged.bytes()
    tell = json.loads(unmounted.run("status", "--json").stdout)
    assert str(small_disk) in tell["disk_error"]
    assert str(small_disk) in unmounted.run("status").stdout
    findings = json.loads(unmounted.run("doctor", "--json", check=False).stdout)["findings"]
    assert [finding["state"] for finding in findings if finding["check"] == "cache"] == ["problem"]

    block = os.urandom(MIB)
    (small_disk.parent / "block").write_bytes(block)
    hog = unmounted.add("hog", "--shell", f"while cat {small_disk.parent / 'block'}; do :; done")
    with hog.open("rb", buffering=0) as file:
        read = 0
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            while True:
                assert file.read(MIB) == block
                read += 1
        assert read >= 8
        assert checked(["cat", path]) == ranged.bytes()
        small = unmounted.add("small", "--", "seq", "100000")
        assert checked(["cat", small]) == b"".join(b"%d\n" % number for number in range(1, 100_001))
        file.seek(0)
        assert file.read(MIB) == block
    other.unlink()
    wait_for(lambda: json.loads(unmounted.run("status", "--json").stdout)["disk_error"] is None, "the disk serves")
    assert checked(["cat", path]) == ranged.bytes()


_COUNTING = """
import os, sys
total, block = 0, bytes(65536)
with open(sys.argv[1], "wb", buffering=0) as count:
    while True:
        total += os.write(1, block)
        os.pwrite(count.fileno(), b"%d" % total, 0)
"""


@pytest.mark.parametrize("read_ahead", [2 * MIB, 8 * MIB])
def test_a_command_is_not_read_further_than_the_read_ahead(read_ahead: int, unmounted: Mounted, tmp_path: Path) -> None:
    count = tmp_path / "count"
    unmounted.mount("--read-ahead", str(read_ahead))
    path = unmounted.add("endless", "--", "python3", "-c", _COUNTING, count)

    def written() -> int:
        return int(count.read_bytes() or b"0")

    with path.open("rb", buffering=0) as file:
        for furthest in (MIB, 20 * MIB):
            while file.tell() < furthest:
                assert file.read(MIB)
            unmounted.wait_for_state("endless", "paused")
            assert written() <= furthest + read_ahead + 3 * MIB  # a pipe holds 1 MiB, the kernel reads 1 MiB ahead
            assert unmounted.buffered("endless") <= furthest + read_ahead + 2 * MIB
    unmounted.wait_for_state("endless", "paused")
    assert written() <= 20 * MIB + read_ahead + 3 * MIB


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_is_not_read_further_than_the_read_ahead(
    chunked: bool, unmounted: Mounted, origin: ScriptedOrigin
) -> None:
    unmounted.mount("--read-ahead", "2MiB")
    document = origin.add("endless", 500 * MIB, ranged=False, chunked=chunked)
    path = unmounted.add("endless", "--no-probe", document.url)
    with path.open("rb", buffering=0) as file:
        assert file.read(1000) == document.bytes(0, 1000)
        unmounted.wait_for_state("endless", "paused")
        assert unmounted.buffered("endless") <= 8 * MIB
        assert document.sent <= 32 * MIB  # what both ends' sockets hold is not ours to say
