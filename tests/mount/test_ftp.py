"""A file behind vsftpd through the mount: every byte for every reader, also where its sessions end or stand still."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers
from tests.fakes import named_bytes
from tests.mount.mounted import Mounted, end_within, wait_for
from tests.servers import Server

SIZE = 40_000_017  # more than is read ahead of a reader, and than sockets hold
DATA = named_bytes("ftp", 0, SIZE)

READ = """
import hashlib, os, sys
path, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
digest = hashlib.sha256()
with open(path, "rb", buffering=0) as file:
    file.seek(start)
    while start < stop and (piece := file.read(min(stop - start, 100_000))):
        digest.update(piece)
        start += len(piece)
print(digest.hexdigest())
"""
HERE_AND_THERE = """
import hashlib, os, random, sys
path, seed, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
chance, digest = random.Random(seed), hashlib.sha256()
fd = os.open(path, os.O_RDONLY)
for _ in range(40):
    digest.update(os.pread(fd, chance.randrange(1, 70_000), chance.randrange(size)))
print(digest.hexdigest())
"""


@pytest.fixture
def served(tmp_path: Path) -> Path:
    return servers.old_file(tmp_path / "served", "data", DATA)


@pytest.fixture
def server(request: pytest.FixtureRequest, served: Path, unmounted: Mounted) -> Iterator[Server]:
    """Beside a daemon that ends before it does. As a parameter: bytes a second of each session."""
    with servers.vsftpd(served, rate=getattr(request, "param", 0)) as running:
        unmounted.mount()
        try:
            yield running
        finally:
            unmounted.close_readers()
            unmounted.umount()


def sessions(server: Server) -> list[int]:
    """The processes of the sessions that are under way."""
    return list(map(int, Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()))


def signalled(server: Server, number: signal.Signals) -> None:
    for pid in sessions(server):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def told(reader: subprocess.Popen[bytes]) -> str:
    output, errors = reader.communicate(timeout=60)
    assert reader.returncode == 0, errors.decode()
    return output.decode().strip()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def here_and_there(seed: int) -> str:
    chance, found = random.Random(seed), hashlib.sha256()
    for _ in range(40):
        length, start = chance.randrange(1, 70_000), chance.randrange(SIZE)
        found.update(DATA[start : start + length])
    return found.hexdigest()


def test_readers_of_the_whole_of_parts_and_here_and_there_get_every_byte(server: Server, unmounted: Mounted) -> None:
    path = unmounted.add("file", f"ftp://{server.authority}/data")
    for _ in range(2):
        parts = [(0, SIZE), (0, SIZE), (SIZE // 2, SIZE), (SIZE - 10, SIZE), (12_345_678, 23_456_789)]
        readers = [unmounted.python(READ, path, str(start), str(stop)) for start, stop in parts]
        jumpers = [unmounted.python(HERE_AND_THERE, path, str(seed), str(SIZE)) for seed in range(3)]
        assert [told(reader) for reader in readers] == [digest(DATA[start:stop]) for start, stop in parts]
        assert [told(jumper) for jumper in jumpers] == [here_and_there(seed) for seed in range(3)]
        unmounted.run("evict", "file")


@pytest.mark.parametrize("server", [SIZE // 2], indirect=True)  # or sockets might hold all that is still to come
def test_a_reader_does_not_notice_that_the_sessions_were_killed(server: Server, unmounted: Mounted) -> None:
    path = unmounted.add("file", "--no-probe", "--read-ahead", "1MiB", f"ftp://{server.authority}/data")
    reader = unmounted.start(["cat", path])
    assert reader.stdout is not None
    got = bytearray()
    while len(got) < SIZE:
        if len(got) in (0, 8_000_000, 16_000_000):
            assert sessions(server) or not got, "nothing was under way"
            signalled(server, signal.SIGKILL)
        piece = reader.stdout.read(4_000_000)
        assert piece, reader.stderr.read().decode() if reader.stderr is not None else ""
        got += piece
    assert got == DATA
    assert end_within(reader, 30) == 0


def test_a_server_that_is_gone_leaves_what_came_from_it(served: Path, unmounted: Mounted) -> None:
    unmounted.mount()
    with servers.vsftpd(served) as server:
        path = unmounted.add(
            "file", "--no-probe", "--stall-timeout", "2s", "--read-ahead", "1MiB", f"ftp://{server.authority}/data"
        )
        fd = os.open(path, os.O_RDONLY)
        assert os.pread(fd, 1_000_000, 0) == DATA[:1_000_000]
        running = sessions(server)
    for pid in running:  # vsftpd's sessions outlive it
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    try:
        with pytest.raises(OSError) as caught:
            os.pread(fd, 1000, SIZE - 1000)
        assert caught.value.errno in (errno.EIO, errno.ETIMEDOUT)
        assert os.pread(fd, 1_000_000, 0) == DATA[:1_000_000]
        assert "refused" in str(unmounted.xattr("file", "error"))
    finally:
        os.close(fd)
    unmounted.umount()


def test_a_server_that_stands_still_is_a_stall_and_read_on_when_it_goes_on(server: Server, unmounted: Mounted) -> None:
    path = unmounted.add(
        "file", "--no-probe", "--stall-timeout", "1s", "--read-ahead", "1MiB", f"ftp://{server.authority}/data"
    )
    with path.open("rb", buffering=0) as file:
        assert file.read(1000) == DATA[:1000]
        stopped = [server.pid, *sessions(server)]  # or a new session would serve
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(OSError) as caught:
                os.pread(file.fileno(), 1000, SIZE - 1000)
            assert caught.value.errno == errno.ETIMEDOUT
        finally:
            for pid in stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
    assert told(unmounted.python(READ, path, "0", str(SIZE))) == digest(DATA)


def test_sessions_that_nobody_needs_end(server: Server, unmounted: Mounted) -> None:
    path = unmounted.add("file", "--no-probe", f"ftp://{server.authority}/data")
    assert told(unmounted.python(READ, path, "0", str(SIZE))) == digest(DATA)
    assert sessions(server)
    unmounted.umount()
    wait_for(lambda: not sessions(server), "the server is left")
    unmounted.mount()
