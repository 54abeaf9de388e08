"""Registering and arranging in the mount itself, by its owner, with the programs that people use."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

from streamfs.board import NAME as BOARD_NAME
from streamfs.board.reader import Board
from tests.mount.mounted import Mounted, checked, names_in, wait_for
from tests.mount.origin import ScriptedOrigin


def failure_of(*argv: str | Path) -> str:
    """What a program that must fail says."""
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode != 0, done.stdout
    return done.stderr


def listed(fs: Mounted) -> list[str]:
    return fs.run("ls").stdout.splitlines()


def test_ln_registers_a_url_as_a_regular_file(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("song.flac", 300_000, mime="audio/flac")
    checked(["ln", "-s", document.url, fs.mountpoint / "mine.flac"])
    path = fs.mountpoint / "mine.flac"
    assert stat.S_ISREG(path.lstat().st_mode)
    assert not path.is_symlink()
    assert checked(["cat", path]) == document.bytes()
    assert fs.status("mine.flac")["source"] == document.url
    wait_for(lambda: path.stat().st_size == 300_000, "its length is asked for, as with add")
    assert fs.xattr("mine.flac", "user.mime_type") == "audio/flac"


def test_ln_into_a_folder_takes_the_name_from_the_url(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("song.flac", 5000)
    checked(["mkdir", fs.mountpoint / "music"])
    checked(["ln", "-s", document.url, fs.mountpoint / "music"])
    assert (fs.mountpoint / "music" / "song.flac").read_bytes() == document.bytes()
    fs.umount()
    fs.mount()
    assert (fs.mountpoint / "music" / "song.flac").read_bytes() == document.bytes()


def test_ln_with_force_takes_the_place_of_a_stream(fs: Mounted, origin: ScriptedOrigin) -> None:
    old, new = origin.add("old", 1000), origin.add("new", 2000)
    path = fs.mountpoint / "file"
    checked(["ln", "-s", old.url, path])
    assert "exists" in failure_of("ln", "-s", new.url, path)
    assert checked(["cat", path]) == old.bytes()
    checked(["ln", "-sf", new.url, path])
    assert checked(["cat", path]) == new.bytes()
    assert listed(fs) == ["file"]


NO_URLS = ["/etc/passwd", "../x", "echo", "sh -c 'touch X'", "gopher://h/x", "javascript:alert(1)", "http://", "x y:"]


def test_a_link_to_anything_but_a_url_is_refused(fs: Mounted) -> None:
    for target in NO_URLS:
        assert "Permission denied" in failure_of("ln", "-s", target, fs.mountpoint / "new"), target
    assert names_in(fs.mountpoint) == []
    assert listed(fs) == []


def test_a_folder_that_was_made_lasts_until_it_is_removed(fs: Mounted) -> None:
    checked(["mkdir", "-p", fs.mountpoint / "a" / "b"])
    fs.add("a/b/stream", "--", "echo", "1")
    fs.run("rm", "a/b/stream")
    assert (fs.mountpoint / "a" / "b").is_dir(), "it outlives its last stream"
    fs.umount()
    fs.mount()
    assert checked(["find", fs.mountpoint, "-mindepth", "1", "-printf", "%P\n"]).split() == [b"a", b"a/b"]
    assert "not empty" in failure_of("rmdir", fs.mountpoint / "a")
    checked(["rmdir", fs.mountpoint / "a" / "b", fs.mountpoint / "a"])
    assert names_in(fs.mountpoint) == []
    fs.umount()
    fs.mount()
    assert names_in(fs.mountpoint) == []


def test_the_name_of_a_folder_is_no_streams(fs: Mounted) -> None:
    checked(["mkdir", fs.mountpoint / "a"])
    assert "is a folder" in fs.refused("add", "a", "--", "true")
    fs.add("stream", "--", "echo", "1")
    assert "exists" in failure_of("mkdir", fs.mountpoint / "stream")
    assert "Not a directory" in failure_of("mkdir", fs.mountpoint / "stream" / "a")
    assert "Not a directory" in failure_of("rmdir", fs.mountpoint / "stream")
    assert "name too long" in failure_of("mkdir", fs.mountpoint / ("x" * 256))


def test_mv_of_a_folder_renames_all_below_at_once(fs: Mounted) -> None:
    for name in ("one", "deep/er/two"):
        fs.add(f"old/{name}", "--", "echo", name)
    checked(["mkdir", fs.mountpoint / "old" / "empty", fs.mountpoint / "other"])
    with (fs.mountpoint / "old" / "one").open("rb") as held:
        checked(["mv", fs.mountpoint / "old", fs.mountpoint / "other"])
        assert held.read() == b"one\n"
    assert listed(fs) == ["other/old/deep/er/two", "other/old/one"]
    fs.umount()
    assert listed(fs) == ["other/old/deep/er/two", "other/old/one"]
    fs.mount()
    assert names_in(fs.mountpoint) == ["other"]
    assert names_in(fs.mountpoint / "other" / "old") == ["deep", "empty", "one"]
    assert (fs.mountpoint / "other" / "old" / "deep" / "er" / "two").read_bytes() == b"deep/er/two\n"
    assert "subdirectory of itself" in failure_of("mv", fs.mountpoint / "other", fs.mountpoint / "other" / "old")


def test_mv_takes_an_empty_folders_place_and_no_others(fs: Mounted) -> None:
    fs.add("from/stream", "--", "echo", "1")
    fs.add("full/stream", "--", "echo", "2")
    checked(["mkdir", fs.mountpoint / "empty", fs.mountpoint / "bare"])
    assert "not empty" in failure_of("mv", "-T", fs.mountpoint / "from", fs.mountpoint / "full")
    checked(["mv", "-T", fs.mountpoint / "from", fs.mountpoint / "empty"])
    checked(["mv", "-T", fs.mountpoint / "bare", fs.mountpoint / "moved"])
    assert names_in(fs.mountpoint) == ["empty", "full", "moved"]
    fs.run("rm", "empty/stream")
    assert names_in(fs.mountpoint) == ["full", "moved"], "the folder that was made gave way to one that was not"


def test_rm_of_a_folder_forgets_all_in_it(fs: Mounted) -> None:
    for name in ("f/a", "f/g/b", "f/g/h/c", "stays"):
        fs.add(name, "--", "echo", name)
    checked(["mkdir", fs.mountpoint / "f" / "empty"])
    checked(["rm", "-r", fs.mountpoint / "f"])
    assert listed(fs) == names_in(fs.mountpoint) == ["stays"]
    fs.umount()
    fs.mount()
    assert names_in(fs.mountpoint) == ["stays"]


def test_what_was_changed_in_the_mount_is_on_the_board_at_once(fs: Mounted) -> None:
    """From which `streamfs ls` and `status` read, without the daemon."""
    for number in range(20):
        fs.add(f"s{number}", "--", "echo", "hello")
    with Board(fs.home / "run" / BOARD_NAME) as board:

        def shown() -> set[str]:
            return {row["name"] for row in board.streams()}

        for number in range(10):
            (fs.mountpoint / f"s{number}").unlink()
            assert f"s{number}" not in shown()
        for number in range(10, 20):
            (fs.mountpoint / f"s{number}").rename(fs.mountpoint / f"t{number}")
            assert f"t{number}" in shown() and f"s{number}" not in shown()
        (fs.mountpoint / "link").symlink_to("http://127.0.0.1:9/x")
        assert "link" in shown()
        os.setxattr(fs.mountpoint / "t10", "user.streamfs.persist", b"1")
        assert board.stream("t10")["persist"]


def test_folders_move_on_the_command_line_with_and_without_a_daemon(fs: Mounted) -> None:
    checked(["mkdir", "-p", fs.mountpoint / "a" / "b"])
    fs.run("mv", "a", "c")
    assert names_in(fs.mountpoint / "c") == ["b"]
    fs.umount()
    fs.run("mv", "c/b", "d")
    fs.mount()
    assert names_in(fs.mountpoint) == ["c", "d"]


def test_a_link_with_a_login_shows_it_nowhere(fs: Mounted) -> None:
    checked(["ln", "-s", "http://user:hush@127.0.0.1:9/x?token=hush", fs.mountpoint / "x"])
    shown = json.dumps(fs.status("x")) + fs.log + str(fs.xattr("x", "source"))
    assert "hush" not in shown
    assert "127.0.0.1:9" in shown
