"""The daemon as a service: what a service manager is told, and when."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.mounted import CLI, Mounted, is_mounted


@pytest.fixture
def manager(unmounted: Mounted, tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(tmp_path / "notify"))
        bound.settimeout(30)
        unmounted.environment["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        yield bound


def told(manager: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in manager.recv(4096).decode().splitlines())


def test_ready_is_said_once_the_mount_answers_and_stopping_when_it_ends(
    unmounted: Mounted, manager: socket.socket
) -> None:
    unmounted.add("environment", "--", "env")
    process = unmounted.start([*CLI, "mount", unmounted.mountpoint, "--foreground"])
    first = told(manager)
    assert first["READY"] == "1"
    assert first["MAINPID"] == str(process.pid)
    assert str(unmounted.mountpoint) in first["STATUS"]
    assert b"NOTIFY_SOCKET" not in (unmounted.mountpoint / "environment").read_bytes()
    process.send_signal(signal.SIGTERM)
    assert told(manager)["STOPPING"] == "1"
    assert process.wait(10) == 0
    assert not is_mounted(unmounted.mountpoint)


def test_a_mount_that_fails_is_never_ready(unmounted: Mounted, manager: socket.socket) -> None:
    unmounted.refused("mount", unmounted.mountpoint / "nowhere", "--foreground")
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(4096)


def test_a_daemon_in_the_background_names_itself_as_the_main_process(
    unmounted: Mounted, manager: socket.socket
) -> None:
    pid = unmounted.mount()
    assert told(manager)["MAINPID"] == str(pid)
    assert pid != os.getpid()


def test_an_umount_by_hand_is_an_orderly_end(unmounted: Mounted, manager: socket.socket) -> None:
    process = unmounted.start([*CLI, "mount", unmounted.mountpoint, "--foreground"])
    assert told(manager)["READY"] == "1"
    unmounted.umount()
    assert told(manager)["STOPPING"] == "1"
    assert process.wait(10) == 0
