"""The service manager is told through its socket, wherever that is; what is wrong with it harms nothing."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from streamfs.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        name = str(tmp_path / "notify") if request.param == "path" else f"@streamfs-{os.getpid()}"
        bound.bind("\0" + name[1:] if name.startswith("@") else name)
        bound.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield bound


def test_the_manager_hears_of_the_beginning_and_the_end(manager: socket.socket) -> None:
    notifier = Notifier()
    notifier.ready("two\nlines")
    assert manager.recv(4096).decode().split("\n") == ["READY=1", f"MAINPID={os.getpid()}", "STATUS=two lines"]
    notifier.stopping("ending")
    assert manager.recv(4096) == b"STOPPING=1\nSTATUS=ending"


def test_the_commands_of_streams_do_not_inherit_the_socket(manager: socket.socket) -> None:
    Notifier()
    assert "NOTIFY_SOCKET" not in os.environ


def test_without_a_manager_nothing_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Notifier().ready("x")
    assert not caplog.records


@pytest.mark.parametrize("name", ["vsock:2:3", "@"])
def test_an_address_of_another_kind_is_logged(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    Notifier().ready("x")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_manager_that_went_away_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    Notifier().ready("x")
    assert "READY=1" in caplog.text


def test_a_manager_that_does_not_read_stops_nobody(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("streamfs.notify._PATIENCE", 0.05)
    notifier = Notifier()
    for _ in range(2000):
        if caplog.records:
            break
        notifier.ready("x")
    assert "timed out" in caplog.text
