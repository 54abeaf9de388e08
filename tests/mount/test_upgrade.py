"""A home of an older streamfs keeps its streams and its persisted bytes; one of a newer streamfs is left alone."""

from __future__ import annotations

import json
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

import pytest

from streamfs.database import SCHEMA_VERSION
from streamfs.engine.recording import DamagedExtent, Recording
from tests.mount.mounted import Mounted

FIXTURE = Path(__file__).parents[1] / "fixtures" / "home-0.1.0.tar.xz"
DATA = bytes((7 * at + at // 256) % 256 for at in range(300_000))
NUMBERS = "".join(f"{number}\n" for number in range(1, 50_001)).encode()
KEPT = {"kept/url.bin": DATA, "kept/numbers": NUMBERS}
IDS = {"kept/url.bin": 2, "kept/numbers": 3, "part.bin": 4, "live": 5, "radio": 6, "ünïcode name": 7}


@pytest.fixture
def older(unmounted: Mounted) -> Mounted:
    with tarfile.open(FIXTURE) as archive:
        if hasattr(tarfile, "data_filter"):  # not in Debian 12's Python 3.11.2
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(unmounted.home.parent)
    assert schema(unmounted) == 1
    return unmounted


def schema(home: Mounted) -> int:
    with sqlite3.connect(home.home / "state" / "catalog.db") as database:
        (version,) = database.execute("PRAGMA user_version").fetchone()
    database.close()
    return int(version)


def rows(home: Mounted) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(home.run("ls", "--json").stdout)["streams"]}


def test_the_streams_and_what_was_kept_are_the_same(older: Mounted) -> None:
    before = rows(older)
    assert sorted(before) == sorted(IDS)
    assert {name: before[name]["buffered"] for name in KEPT} == {name: len(data) for name, data in KEPT.items()}
    assert {name for name in before if before[name]["persist"]} == set(KEPT)
    assert before["part.bin"]["size"] == len(DATA)
    assert older.run("verify", *KEPT).returncode == 0
    older.mount()
    for name, data in KEPT.items():
        assert (older.mountpoint / name).read_bytes() == data
        assert older.xattr(name, "state") == "complete"
        assert Path(older.xattr(name, "persisted_path") or "").read_bytes()[: len(data)] == data
    assert {name: (older.mountpoint / name).stat().st_ino for name in IDS} == IDS
    assert (older.mountpoint / "live").read_bytes() == b"one\ntwo\n"
    assert (older.mountpoint / "ünïcode name").read_bytes() == Path("/etc/hostname").read_bytes()
    older.run("verify", *KEPT)
    older.umount()
    assert schema(older) == SCHEMA_VERSION
    after = rows(older)
    assert {name: after[name]["source"] for name in IDS} == {name: before[name]["source"] for name in IDS}


def test_the_options_are_the_same(older: Mounted) -> None:
    older.run("ls")
    with sqlite3.connect(older.home / "state" / "catalog.db") as database:
        options = {
            name.decode(): json.loads(text) for name, text in database.execute("SELECT name, options FROM streams")
        }
    database.close()
    assert options["kept/url.bin"]["headers"] == [["X-Token", "abc"]]
    assert options["kept/url.bin"]["user_agent"] == "old"
    assert options["live"]["env"] == {"A": "b"}
    assert options["live"]["cwd"] == "/"
    assert (options["radio"]["window"], options["radio"]["probe"]) == ("30m", False)


def test_it_can_be_changed_and_grow(older: Mounted) -> None:
    older.run("mv", "kept/numbers", "numbers")
    older.run("rm", "radio")
    older.mount()
    new = older.add("new", "--", "echo", "new")
    assert new.read_bytes() == b"new\n"
    assert new.stat().st_ino > max(IDS.values())
    assert (older.mountpoint / "numbers").read_bytes() == NUMBERS


def test_what_a_newer_one_wrote_is_refused_and_left_as_it_is(older: Mounted) -> None:
    path = older.home / "state" / "catalog.db"
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    database.close()
    before = {file: file.read_bytes() for file in (path, *(older.home / "cache").iterdir())}
    for command in (["ls"], ["mount", older.mountpoint], ["rm", "live"], ["persist", "live"]):
        told = older.refused(*map(str, command))
        assert "newer streamfs" in told
        assert str(path) in told
        assert "move" in told
    assert {file: file.read_bytes() for file in (path, *(older.home / "cache").iterdir())} == before
    path.rename(path.with_suffix(".newer"))
    assert older.run("ls").stdout == ""


def test_damage_in_an_older_recording_is_found_as_ever(older: Mounted) -> None:
    path = older.home / "cache" / "2-1.data"
    whole = Recording.load(path)
    assert whole is not None and whole.durable
    with open(path, "r+b") as file:
        file.seek(70_000)
        file.write(b"?")
    bad = [extent for extent in whole.extents(0, len(DATA)) if not read(whole, extent)]
    assert [(extent.start, extent.stop) for extent in bad] == [(65_536, 131_072)]
    index = path.with_name(path.name + ".index")
    raw = bytearray(index.read_bytes())
    raw[40] ^= 1
    index.write_bytes(raw)
    assert Recording.load(path) is None


def read(recording: Recording, extent: Any) -> bool:
    try:
        recording.read([extent], memoryview(bytearray(extent.stop - extent.start)), wait=True)
    except DamagedExtent:
        return False
    return True
