"""A daemon that may have few files open: the streams that find none left say so, and everything else goes on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from streamfs.spec import CommandSource, StreamOptions, StreamSpec, UrlSource
from tests.mount.crowd import StallingOrigin, register
from tests.mount.mounted import CLI, WAIT, Mounted, checked, is_alive, wait_for

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


@pytest.mark.parametrize("kind", ["command", "url"])
def test_streams_beyond_the_limit_of_descriptors_fail_in_words_and_the_others_go_on(
    kind: str, unmounted: Mounted, tmp_path: Path
) -> None:
    fs, origin = unmounted, StallingOrigin()
    try:
        local = tmp_path / "local"
        local.write_bytes(b"local")
        quiet = StreamOptions(probe=False, stall_timeout=600.0)
        source = CommandSource(("sh", "-c", "printf 'hello\n'; exec sleep 1000"))
        specs = [
            StreamSpec(
                name=f"s{n}", source=source if kind == "command" else UrlSource(origin.url(f"s{n}")), options=quiet
            )
            for n in range(MANY)
        ]
        register(fs.home, specs)
        mount = ["prlimit", f"--nofile={MOST}", *CLI, "mount", str(fs.mountpoint)]
        subprocess.run(mount, env=fs.environment, check=True, timeout=WAIT)
        fs.adopt()
        pid = fs.pid
        readers = [fs.python(READER, fs.mountpoint / spec.name) for spec in specs]
        failed = [spec.name for spec in specs if _fails_or_waits(fs, spec.name, kind)]
        assert 0 < len(failed) < MANY
        for spec, reader in zip(specs, readers, strict=True):
            if spec.name in failed:
                told = int(reader.communicate(timeout=WAIT)[0])
                assert told in ((errno.EIO, errno.ENFILE) if kind == "command" else (errno.ENFILE,))
                assert "too many files" in (fs.xattr(spec.name, "error") or "").lower()
            else:
                assert reader.poll() is None, "a reader of a stream that was begun did not go on waiting"
        # ... and nothing hangs: the socket answers, the catalogue is written, files are listed, readers can be killed.
        fs.run("status", "s0", "--json")
        fs.add("another", local.as_uri())
        fs.run("mv", "another", "moved")
        assert len(checked(["ls", "-l", fs.mountpoint]).splitlines()) == MANY + 2
        waiting = next(reader for spec, reader in zip(specs, readers, strict=True) if spec.name not in failed)
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(WAIT) != 0
        fs.close_readers()
        for name in failed[:2]:
            fs.run("rm", name)
        fs.run("evict", "--all")
        wait_for(lambda: _read(fs.mountpoint / "moved") == b"local", "streams work again once others are done")
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not is_alive(pid), "the daemon ends")
    finally:
        fs.close_readers()
        origin.stop()


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
