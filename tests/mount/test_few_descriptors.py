"""A daemon that may have few files open: the streams that find none left say so, and everything else goes on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from streamfs.spec import CommandSource, StreamOptions, StreamSpec, UrlSource
from tests.mount.crowd import StallingOrigin, register
from tests.mount.mounted import CLI, WAIT, Mounted, checked, is_alive, is_mounted, wait_for

MOST = 64
"""Descriptors of the daemon."""
MANY = 60
"""Streams, each of which takes one or more."""
READER = """
import os, sys
path = sys.argv[1]
try:
    fd = os.open(path, os.O_RDONLY)
    os.read(fd, 6)
    os.read(fd, 1 << 20)
except OSError as error:
    print(error.errno)
"""


@dataclass
class Crowd:
    """Readers of more streams than the daemon may open files for."""

    fs: Mounted
    kind: str
    readers: dict[str, subprocess.Popen[str]]
    """The one of each stream."""
    failed: list[str]
    """Streams that found no descriptor left; the others are being received."""


@pytest.fixture(params=["command", "url"])
def crowd(request: pytest.FixtureRequest, unmounted: Mounted) -> Iterator[Crowd]:
    fs, kind, origin = unmounted, str(request.param), StallingOrigin()
    try:
        quiet = StreamOptions(probe=False, stall_timeout=600.0)
        command = CommandSource(("sh", "-c", "printf 'hello\n'; exec sleep 1000"))
        sources = {f"s{n}": command if kind == "command" else UrlSource(origin.url(f"s{n}")) for n in range(MANY)}
        register(fs.home, [StreamSpec(name=name, source=source, options=quiet) for name, source in sources.items()])
        mount = ["prlimit", f"--nofile={MOST}", *CLI, "mount", str(fs.mountpoint)]
        subprocess.run(mount, env=fs.environment, check=True, timeout=WAIT)
        fs.adopt()
        readers = {name: fs.python(READER, fs.mountpoint / name) for name in sources}
        failed = [name for name in sources if _fails_or_waits(fs, name, kind)]
        assert 0 < len(failed) < MANY
        yield Crowd(fs, kind, readers, failed)
    finally:
        fs.close_readers()
        origin.stop()


def test_streams_beyond_the_limit_of_descriptors_fail_in_words_and_the_others_go_on(
    crowd: Crowd, tmp_path: Path
) -> None:
    fs = crowd.fs
    local = tmp_path / "local"
    local.write_bytes(b"local")
    for name, reader in crowd.readers.items():
        if name in crowd.failed:
            told = int(reader.communicate(timeout=WAIT)[0])
            assert told in ((errno.EIO, errno.ENFILE) if crowd.kind == "command" else (errno.ENFILE,))
            assert "too many files" in (fs.xattr(name, "error") or "").lower()
        else:
            assert reader.poll() is None, "a reader of a stream that was begun did not go on waiting"
    # ... and nothing hangs: the socket answers, the catalogue is written, files are listed, readers can be killed.
    fs.run("status", "s0", "--json")
    fs.add("another", local.as_uri())
    fs.run("mv", "another", "moved")
    assert len(checked(["ls", "-l", fs.mountpoint]).splitlines()) == MANY + 2
    waiting = next(reader for name, reader in crowd.readers.items() if name not in crowd.failed)
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(WAIT) != 0
    fs.close_readers()
    for name in crowd.failed[:2]:
        fs.run("rm", name)
    fs.run("evict", "--all")
    wait_for(lambda: _read(fs.mountpoint / "moved") == b"local", "streams work again once others are done")


def test_a_daemon_without_descriptors_for_its_streams_still_has_some_to_end_with(crowd: Crowd) -> None:
    """To end commands, to unmount, to keep its events: all of which happens at one time."""
    fs = crowd.fs
    pid = fs.pid
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not is_alive(pid), "the daemon ends")
    assert not is_mounted(fs.mountpoint)
    for name, reader in crowd.readers.items():
        assert reader.wait(WAIT) == 0, name  # told by an error
    assert "the daemon failed" not in fs.log and "cannot" not in fs.log, fs.log


def _fails_or_waits(fs: Mounted, name: str, kind: str) -> bool:
    """Whether it has failed, once it has either failed or is being received: of commands, that is seen by bytes."""

    def state() -> str | None:
        told = fs.xattr(name, "state")
        begun = fs.buffered(name) > 0 if kind == "command" else fs.xattr(name, "readers") == "1"
        return told if told == "failed" or begun else None

    return wait_for(state, f"{name} has begun or failed") == "failed"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError as error:
        assert error.errno in (errno.ENFILE, errno.EIO)
        return None
