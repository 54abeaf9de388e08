"""Persisting: the whole resource is saved with nobody reading, survives what may come, and needs no network after."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import pytest

from tests.mount.mounted import Mounted, Tap, checked, names_in, wait_for
from tests.mount.origin import Document, ScriptedOrigin

MIB = 1 << 20


def persist(path: Path, value: str = "1", name: str = "user.streamfs.persist") -> None:
    checked(["setfattr", "-n", name, "-v", value, path])


def assert_persisted(fs: Mounted, name: str, expected: bytes) -> None:
    """The stream is complete, and a plain file of the same bytes is where it says."""
    fs.wait_for_state(name, "complete")
    place = Path(fs.xattr(name, "persisted_path") or "")
    assert place.is_absolute()
    assert stat.S_ISREG(place.lstat().st_mode)
    assert place.stat().st_size == len(expected)
    assert hashlib.sha256(place.read_bytes()).digest() == hashlib.sha256(expected).digest()
    assert fs.xattr(name, "progress") == f"{len(expected)}/{len(expected)}"


@pytest.mark.parametrize("attribute", ["user.streamfs.persist", "user.persist"])
@pytest.mark.parametrize("size", [0, 1000, 9 * MIB + 1])
def test_setting_the_attribute_saves_everything_with_nobody_reading(
    size: int, attribute: str, fs: Mounted, origin: ScriptedOrigin
) -> None:
    document = origin.add("kept", size)
    path = fs.add("kept", document.url)
    persist(path, "1", attribute)
    assert fs.xattr("kept", "user.persist") == fs.xattr("kept", "persist") == "1"
    assert_persisted(fs, "kept", document.bytes())
    assert document.bodies <= 2
    assert fs.xattr("kept", "readers") == "0"


@pytest.mark.parametrize("kind", ["ranges", "no ranges", "chunked", "command"])
def test_a_persisted_stream_reads_after_a_restart_with_the_origin_switched_off(
    kind: str, fs: Mounted, origin: ScriptedOrigin, tmp_path: Path
) -> None:
    document = origin.add("kept", 7 * MIB + 3, ranged=kind == "ranges", chunked=kind == "chunked")
    if kind == "command":
        (tmp_path / "data").write_bytes(document.bytes())
        path = fs.add("kept", "--", "cat", tmp_path / "data")
    else:
        path = fs.add("kept", document.url)
    fs.run("persist", "kept")
    assert_persisted(fs, "kept", document.bytes())
    origin.stop()
    (tmp_path / "data").unlink(missing_ok=True)
    assert checked(["cat", path]) == document.bytes()
    fs.umount()
    fs.mount()
    assert path.stat().st_size == document.size
    assert checked(["cat", path]) == document.bytes()
    assert_persisted(fs, "kept", document.bytes())


def _memory(fs: Mounted, name: str) -> int:
    """Bytes of it that are in memory alone."""
    (row,) = json.loads(fs.run("status", name, "--json").stdout)["streams"]
    return int(row["memory"])


@pytest.mark.parametrize("how", ["kill -9", "umount"])
def test_a_fetch_that_is_cut_short_goes_on_with_the_next_mount(
    how: str, unmounted: Mounted, origin: ScriptedOrigin
) -> None:
    fs = unmounted
    fs.mount("--spill-threshold", "1MiB")
    document = origin.add("kept", 40 * MIB, stall_at=30 * MIB)
    path = fs.add("kept", document.url)
    persist(path)
    wait_for(lambda: fs.buffered("kept") == 30 * MIB, "30 MiB have arrived")
    wait_for(lambda: _memory(fs, "kept") <= 10 * MIB, "most of it is on disk")
    if how == "umount":
        fs.umount()
    else:
        fs.kill()
    (row,) = json.loads(fs.run("ls", "--json").stdout)["streams"]
    assert row["persist"]
    kept, document.sent = int(row["buffered"]), 0
    assert 10 * MIB <= kept <= 30 * MIB
    document.go.set()
    fs.mount()
    assert_persisted(fs, "kept", document.bytes())
    assert document.sent <= document.size - kept + 2 * MIB, "what was on disk is not fetched again"
    origin.stop()
    assert checked(["cat", path]) == document.bytes()


def test_a_persisted_command_runs_to_its_end_beyond_the_read_ahead(unmounted: Mounted) -> None:
    unmounted.mount("--read-ahead", "1MiB")
    unmounted.add("numbers", "--", "seq", "1", "3000000")
    unmounted.run("persist", "numbers")
    expected = b"".join(b"%d\n" % number for number in range(1, 3_000_001))
    assert_persisted(unmounted, "numbers", expected)
    assert unmounted.xattr("numbers", "exit") == "0"


def test_persisting_without_a_daemon_begins_with_the_next_mount(unmounted: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("kept", MIB)
    unmounted.add("kept", document.url)
    unmounted.run("persist", "kept")
    assert document.requests == []
    unmounted.mount()
    assert_persisted(unmounted, "kept", document.bytes())


def test_persisting_does_not_hold_up_readers_and_shows_its_progress(fs: Mounted, tap: Tap) -> None:
    path = fs.add("tap", *tap.argv)
    persist(path)
    reader = fs.start(["head", "-c", "1000", path])
    tap.write(b"p" * 1000)
    assert reader.communicate(timeout=20)[0] == b"p" * 1000
    assert fs.xattr("tap", "progress") == "1000/?"
    assert fs.xattr("tap", "state") == "live"
    assert fs.xattr("tap", "persisted_path") is None
    tap.write(b"q")
    tap.close()
    assert_persisted(fs, "tap", b"p" * 1000 + b"q")


def test_unpersist_stops_a_fetch_and_gives_eviction_back(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("kept", 60 * MIB, stall_at=10 * MIB)
    path = fs.add("kept", document.url)
    persist(path)
    assert document.stalled.wait(20)
    assert "persisted" in fs.refused("evict", "kept")
    persist(path, "0")
    assert fs.xattr("kept", "persist") == "0"
    document.go.set()
    wait_for(lambda: fs.xattr("kept", "state") in ("idle", "paused"), "the fetch has stopped")
    assert fs.buffered("kept") < document.size
    fs.run("evict", "kept")
    assert fs.buffered("kept") == 0


def test_evict_drops_the_bytes_and_the_file_and_the_stream_reads_on(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("dropped", 9 * MIB)
    path = fs.add("dropped", document.url)
    assert checked(["cat", path]) == document.bytes()
    wait_for(lambda: fs.data_files, "bytes on disk")
    fs.run("evict", "dropped")
    assert fs.data_files == []
    assert fs.xattr("dropped", "buffered") == "0"
    before = document.sent
    assert checked(["cat", path]) == document.bytes()
    assert document.sent - before >= document.size


def test_evict_all_leaves_what_is_persisted(fs: Mounted, origin: ScriptedOrigin) -> None:
    kept, dropped = origin.add("kept", MIB), origin.add("dropped", MIB)
    paths = [fs.add(document.name, document.url) for document in (kept, dropped)]
    persist(paths[0])
    assert_persisted(fs, "kept", kept.bytes())
    checked(["cat", *paths])
    fs.run("evict", "--all")
    assert (fs.buffered("kept"), fs.buffered("dropped")) == (MIB, 0)
    assert_persisted(fs, "kept", kept.bytes())


def test_removing_a_persisted_stream_removes_its_file(fs: Mounted, origin: ScriptedOrigin) -> None:
    document: Document = origin.add("kept", MIB)
    path = fs.add("kept", document.url)
    persist(path)
    assert_persisted(fs, "kept", document.bytes())
    path.unlink()
    wait_for(lambda: not fs.data_files, "the data file is gone")
    assert names_in(fs.mountpoint) == []
