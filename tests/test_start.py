"""The start of a daemon in the background, as who asked for it sees it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from streamfs import daemon
from streamfs.errors import StreamfsError
from streamfs.home import Home
from streamfs.spec import MountOptions


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "config", tmp_path / "state", tmp_path / "cache", tmp_path / "run", tmp_path)
    home.prepare()
    return home


def start(home: Home, monkeypatch: pytest.MonkeyPatch, says: bytes | None) -> int:
    """Start a daemon that says so much of itself; None: nothing until the call is over. Gives the exit code."""
    until, over = os.pipe()

    def be_daemon(home: Home, lock: object, mountpoint: Path, options: MountOptions, telling: int) -> int:
        if os.fork() == 0:
            if says is None:
                os.read(until, 1)
            else:
                os.write(telling, says)
            os._exit(0)
        return 0

    monkeypatch.setattr(daemon, "_be_daemon", be_daemon)
    try:
        return daemon._start_in_background(home, home.lock(), home.cache, MountOptions())
    finally:
        os.write(over, b"x")
        os.close(over)
        os.close(until)


def test_a_mount_that_answers_is_a_success(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(home, monkeypatch, b"ready\n") == 0


def test_what_the_daemon_says_is_the_reason(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StreamfsError, match=r"^no such luck$"):
        start(home, monkeypatch, b"failed no such luck")


def test_a_daemon_that_ends_without_a_word_is_told_of(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StreamfsError, match=r"ended before the mount answered; see .*daemon\.log"):
        start(home, monkeypatch, b"")


def test_a_daemon_that_says_nothing_is_waited_for_only_so_long(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "START_PATIENCE", 0.1)
    with pytest.raises(StreamfsError, match=r"not answered for 0\.1 s; the daemon goes on trying: see .*\.log"):
        start(home, monkeypatch, None)


def test_a_daemon_that_nobody_waits_for_any_more_goes_on() -> None:
    listening, telling = os.pipe()
    os.close(listening)
    daemon._Readiness(telling).ready("mounted")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(telling)  # let go of, all the same
