"""What must hold of a mountpoint before anything is mounted there. Nothing is mounted here."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamfs import mounting
from streamfs.errors import Busy, InvalidRequest, NotPermitted


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    mounting.prepare_mountpoint(tmp_path)
    assert not mounting.is_mounted(tmp_path)


def test_a_folder_that_is_missing_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"nowhere does not exist: create it with mkdir"):
        mounting.prepare_mountpoint(tmp_path / "nowhere")


def test_a_file_is_no_mountpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="is not a directory"):
        mounting.prepare_mountpoint(tmp_path / "file")


def test_where_something_else_is_mounted_streamfs_does_not_go() -> None:
    with pytest.raises(Busy, match="mounted on /proc already"):
        mounting.prepare_mountpoint(Path("/proc"))
    assert not mounting.is_mounted(Path("/proc"))


def test_a_missing_fuse_device_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounting, "FUSE_DEVICE", tmp_path / "fuse")
    with pytest.raises(InvalidRequest, match="modprobe fuse"):
        mounting.check_fuse()


def test_a_fuse_device_that_is_not_ours_to_open_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "fuse"
    device.write_text("")
    monkeypatch.setattr(mounting, "FUSE_DEVICE", device)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(NotPermitted, match="you may not open"):
        mounting.check_fuse()


def test_tuning_and_unmounting_where_nothing_is_mounted_do_nothing(tmp_path: Path) -> None:
    mounting.tune(tmp_path)
    mounting.unmount_quietly(tmp_path)


def test_a_limit_that_cannot_be_set_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    mounting._set(tmp_path / "missing" / "read_ahead_kb", 4096)
    assert "stays as it is" in caplog.text
    mounting._set(tmp_path / "limit", 7)
    assert (tmp_path / "limit").read_text() == "7"
