"""Every extended attribute: what it says, when it is missing, and what may be set."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.mount.mounted import Mounted, Tap, checked, wait_for
from tests.mount.origin import ScriptedOrigin

ALWAYS = ["persist", "progress", "source", "state", "buffered", "readers"]


def failure_of(fs: Mounted, name: str, attribute: str, value: bytes) -> int | None:
    """The errno of setting an attribute."""
    try:
        os.setxattr(fs.mountpoint / name, attribute, value)
    except OSError as error:
        return error.errno
    return None


def test_a_url_that_was_read_tells_all_of_itself(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("song", 70_000, mime="audio/flac")
    url = document.url.replace("http://", "http://user:hunter2@") + "?token=s3cret"
    origin.documents["song?token=s3cret"] = document
    path = fs.add("song", url)
    with path.open("rb", buffering=0) as file:
        assert file.read(100) == document.bytes(0, 100)
        assert fs.xattr("song", "readers") == "1"
    checked(["cat", path])
    shown = document.url.replace("http://", "http://***@") + "?token=***"
    expected = {
        "persist": "0",
        "user.persist": "0",
        "progress": "70000/70000",
        "source": shown,
        "state": "complete",
        "size": "70000",
        "buffered": "70000",
        "readers": "0",
        "generation": "1",
        "error": None,
        "exit": None,
        "persisted_path": None,
        "validator": 'etag:"song-0"',
        "user.mime_type": "audio/flac",
        "user.xdg.origin.url": shown,
    }
    assert {name: fs.xattr("song", name) for name in expected} == expected
    listed = checked(["getfattr", "-d", "-m", "-", path]).decode()
    assert "hunter2" not in listed
    assert "s3cret" not in listed
    assert "hunter2" not in fs.log
    assert "s3cret" not in fs.log + fs.run("status").stdout + fs.run("ls", "-l").stdout


def test_a_stream_that_nobody_opened_tells_what_is_known(fs: Mounted) -> None:
    fs.add("quiet", "--", "seq", "3")
    assert {name: fs.xattr("quiet", name) for name in ALWAYS} == {
        "persist": "0",
        "progress": "0/?",
        "source": "seq 3",
        "state": "idle",
        "buffered": "0",
        "readers": "0",
    }
    missing = ["size", "generation", "error", "exit", "validator", "persisted_path", "nonsense", "user.mime_type"]
    assert [fs.xattr("quiet", name) for name in [*missing, "user.xdg.origin.url", "user.other"]] == [None] * 10
    assert set(os.listxattr(fs.mountpoint / "quiet")) == {"user.persist", *(f"user.streamfs.{name}" for name in ALWAYS)}


def test_a_command_tells_how_it_ended(fs: Mounted) -> None:
    for name, line, status in (("good", "echo ok", "0"), ("bad", "exit 3", "3"), ("killed", "kill -TERM $$", "143")):
        path = fs.add(name, "--shell", line)
        fs.start(["cat", path]).wait(20)
        assert fs.xattr(name, "exit") == status
        assert fs.status(name)["exit"] == int(status)
    assert fs.xattr("good", "state") == "complete"
    assert fs.xattr("bad", "state") == fs.xattr("killed", "state") == "failed"


def test_the_state_follows_the_stream(fs: Mounted, tap: Tap) -> None:
    path = fs.add("tap", *tap.argv)
    assert fs.xattr("tap", "state") == "idle"
    reader = fs.start(["cat", path])
    fs.wait_for_state("tap", "live")
    tap.write(b"x")
    wait_for(lambda: fs.buffered("tap") == 1, "a byte arrived")
    assert fs.xattr("tap", "state") == "live"
    tap.close()
    assert reader.communicate(timeout=20)[0] == b"x"
    assert fs.xattr("tap", "state") == "complete"
    endless = fs.add("endless", "--", "cat", "/dev/zero")
    checked(["head", "-c", "1000", endless])
    fs.wait_for_state("endless", "paused")


def test_each_new_run_is_a_generation_of_its_own(fs: Mounted, tmp_path: Path) -> None:
    path = fs.add("run", "--", "sh", "-c", 'echo x >> "$0"; wc -l < "$0"', tmp_path / "runs")
    assert checked(["cat", path]) == b"1\n"
    assert fs.xattr("run", "generation") == "1"
    fs.run("evict", "run")
    assert checked(["cat", path]) == b"2\n"
    assert fs.xattr("run", "generation") == "2"


@pytest.mark.parametrize("value", [b"", b"2", b"-1", b"yes", b"true", b"01", b"1" * 1000])
@pytest.mark.parametrize("attribute", ["user.streamfs.persist", "user.persist"])
def test_a_value_of_persist_that_makes_no_sense_is_refused(attribute: str, value: bytes, fs: Mounted) -> None:
    fs.add("quiet", "--", "seq", "3")
    assert failure_of(fs, "quiet", attribute, value) == errno.EINVAL
    assert fs.xattr("quiet", "persist") == "0"


def test_what_is_read_only_cannot_be_set_or_removed(fs: Mounted) -> None:
    path = fs.add("quiet", "--", "seq", "3")
    names = ["progress", "source", "state", "size", "buffered", "readers", "generation", "error", "exit"]
    names += ["validator", "persisted_path"]
    for name in [*(f"user.streamfs.{name}" for name in names), "user.mime_type", "user.xdg.origin.url", "user.new"]:
        assert failure_of(fs, "quiet", name, b"1") in (errno.EACCES, errno.EPERM, errno.EROFS), name
    for name in ("user.streamfs.source", "user.streamfs.persist"):
        with pytest.raises(OSError) as failure:
            os.removexattr(path, name)
        assert failure.value.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    assert fs.xattr("quiet", "source") == "seq 3"


def test_folders_have_no_attributes(fs: Mounted) -> None:
    fs.add("a/b", "--", "true")
    for folder in (fs.mountpoint, fs.mountpoint / "a"):
        assert os.listxattr(folder) == []
        with pytest.raises(OSError) as failure:
            os.getxattr(folder, "user.streamfs.state")
        assert failure.value.errno == errno.ENODATA
