"""What goes wrong is said in one line on standard error, with an exit code that means it."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.mount.mounted import CLI, Mounted, is_mounted, names_in, wait_for

SOAK = int(os.environ.get("STREAMFS_SOAK", "1"))

USAGE = [
    (["add", "x", "gopher://127.0.0.1/x"], "gopher"),
    (["add", "x", "127.0.0.1/x"], "not a URL"),
    (["add", "x", "http://"], "no host"),
    (["add", "x", "http://127.0.0.1/a b"], "space"),
    (["add", "x", "http://127.0.0.1:0/"], "port 0"),
    (["add", "x", "file://elsewhere/x"], "file:///"),
    (["add", "", "http://127.0.0.1/"], "empty"),
    (["add", "a//b", "http://127.0.0.1/"], "empty part"),
    (["add", "a/../b", "http://127.0.0.1/"], ".."),
    (["add", "/a", "http://127.0.0.1/"], "empty part"),
    (["add", "n" * 256, "http://127.0.0.1/"], "255"),
    (["add", "x"], "URL"),
    (["add", "x", "--"], "command"),
    (["add", "x", "http://127.0.0.1/", "--", "true"], "one source"),
    (["add", "x", "--shell", " "], "empty"),
    (["add", "x", "--size", "many", "http://127.0.0.1/"], "many"),
    (["add", "x", "--size", "-1", "http://127.0.0.1/"], "-1"),
    (["add", "x", "--stall-timeout", "0", "http://127.0.0.1/"], "stall"),
    (["add", "x", "--header", "nonsense", "http://127.0.0.1/"], "Name: value"),
    (["add", "x", "--size-policy", "guess", "http://127.0.0.1/"], "guess"),
    (["add", "x", "--cacert", "/nowhere", "http://127.0.0.1/"], "No such file"),
    (["add", "x", "--cwd", "/nowhere", "--", "true"], "not a directory"),
    (["add", "x", "--insecure", "--", "true"], "URLs only"),
    (["add", "x", "--no-such-option", "http://127.0.0.1/"], "--no-such-option"),
    (["mount"], "MOUNTPOINT"),
    (["mount", "--memory", "lots", "/tmp"], "lots"),
    (["mount", "--memory", "1", "/tmp"], "1MiB"),
    (["rm"], "NAME"),
    (["evict"], "--all"),
    (["no-such-command"], "no-such-command"),
]


@pytest.mark.parametrize(("arguments", "word"), USAGE, ids=lambda value: " ".join(value)[:40] if value else None)
def test_what_makes_no_sense_is_a_usage_error(arguments: list[str], word: str, unmounted: Mounted) -> None:
    assert word in unmounted.refused(*arguments, code=2)
    assert unmounted.run("ls").stdout == ""


@pytest.mark.parametrize("running", [True, False])
def test_what_is_not_there_is_a_failure(running: bool, unmounted: Mounted, tmp_path: Path) -> None:
    if running:
        unmounted.mount()
    unmounted.add("there", "--", "true")
    for arguments in (
        ["rm", "missing"],
        ["rm", "there", "missing"],
        ["mv", "missing", "x"],
        ["persist", "missing"],
        ["unpersist", "missing"],
        ["status", "missing"],
        ["evict", "missing"],
        ["save", "missing", str(tmp_path / "x")],
    ):
        assert "missing" in unmounted.refused(*arguments)
    assert "there" in unmounted.refused("add", "there", "--", "true")
    assert unmounted.run("ls").stdout == "there\n"


class TestMountpoint:
    def test_one_that_is_missing(self, unmounted: Mounted) -> None:
        told = unmounted.refused("mount", unmounted.mountpoint / "nowhere")
        assert "does not exist" in told
        assert "mkdir" in told

    def test_one_that_is_a_file(self, unmounted: Mounted, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert "not a directory" in unmounted.refused("mount", tmp_path / "file")

    def test_one_where_something_is_mounted(self, fs: Mounted, tmp_path: Path) -> None:
        other = Mounted(_made(tmp_path / "other"))
        try:
            assert "mounted" in other.refused("mount", fs.mountpoint)
            assert fs.answers()
        finally:
            other.close()

    @pytest.mark.parametrize("foreground", [[], ["--foreground"]])
    def test_a_mount_that_failed_leaves_nothing_and_can_be_tried_again(
        self, foreground: list[str], unmounted: Mounted, tmp_path: Path
    ) -> None:
        unmounted.refused("mount", tmp_path / "nowhere", *foreground)
        assert "no daemon" in unmounted.refused("umount")
        unmounted.mount()

    def test_one_with_files_in_it_is_used_and_gives_them_back(self, unmounted: Mounted) -> None:
        (unmounted.mountpoint / "mine").write_text("mine")
        unmounted.mount()
        assert names_in(unmounted.mountpoint) == []
        unmounted.umount()
        assert (unmounted.mountpoint / "mine").read_text() == "mine"


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_umount_where_nothing_is_mounted(unmounted: Mounted) -> None:
    assert "no daemon" in unmounted.refused("umount")
    assert "nothing is mounted" in unmounted.refused("umount", unmounted.mountpoint)


def test_umount_of_a_mount_that_is_not_ours(unmounted: Mounted) -> None:
    assert "not a mount of streamfs" in unmounted.refused("umount", "/proc")
    assert is_mounted(Path("/proc"))


def test_a_cache_directory_that_cannot_be_used(unmounted: Mounted, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    unmounted.refused("mount", unmounted.mountpoint, "--cache-dir", tmp_path / "file")
    shared = _made(tmp_path / "shared")
    shared.chmod(0o777)
    assert "700" in unmounted.refused("mount", unmounted.mountpoint, "--cache-dir", shared)
    assert not is_mounted(unmounted.mountpoint)


@pytest.mark.soak
@pytest.mark.parametrize("command", ["umount", *(["ls", "rm"] if SOAK > 1 else [])])
def test_a_daemon_that_does_not_answer_is_an_error_in_the_end(command: str, fs: Mounted) -> None:
    pid = fs.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "it has stopped")
        done = fs.run(*{"ls": ["ls"], "rm": ["rm", "x"], "umount": ["umount"]}[command], check=False, within=60)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_socket_of_a_dead_daemon_is_in_nobodys_way(unmounted: Mounted) -> None:
    unmounted.run("ls")
    (unmounted.home / "run").mkdir(mode=0o700, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(unmounted.home / "run" / "control.sock"))
    unmounted.add("x", "--", "echo", "x")
    unmounted.mount()
    assert (unmounted.mountpoint / "x").read_bytes() == b"x\n"


def test_an_interrupt_has_its_own_exit_code_and_line(fs: Mounted, tmp_path: Path) -> None:
    fs.add("endless", "--", "sleep", "1000")
    process = fs.start([*CLI, "save", "endless", tmp_path / "x"])
    wait_for(lambda: fs.xattr("endless", "readers") == "1", "save reads")
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=10)[1]
    assert process.returncode == 130
    assert errors.decode().splitlines() == ["streamfs: interrupted"]
    assert not list(tmp_path.glob("x*"))
