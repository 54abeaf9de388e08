"""Where things are, and who owns them."""

from __future__ import annotations

import multiprocessing
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from streamfs.errors import Busy, InvalidRequest, NotPermitted
from streamfs.home import Home

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to act as another user")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("STREAMFS_HOME", str(tmp_path / "home"))
    return Home.open()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def directories(home: Home) -> list[Path]:
    return [home.config, home.state, home.cache, home.run]


def test_streamfs_home_holds_everything(home: Home, tmp_path: Path) -> None:
    assert directories(home) == [tmp_path / "home" / name for name in ("config", "state", "cache", "run")]
    assert home.socket_path == tmp_path / "home/run/control.sock"


def test_without_it_the_xdg_directories_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMFS_HOME", "")
    (tmp_path / "runtime").mkdir(mode=0o700)
    for variable, name in (("CONFIG_HOME", "c"), ("STATE_HOME", "s"), ("CACHE_HOME", "k"), ("RUNTIME_DIR", "runtime")):
        monkeypatch.setenv(f"XDG_{variable}", str(tmp_path / name))
    assert directories(Home.open()) == [tmp_path / name / "streamfs" for name in ("c", "s", "k", "runtime")]


@pytest.mark.parametrize("runtime", [None, "missing", "relative", "open"])
def test_a_runtime_directory_that_cannot_be_used_is_replaced_by_one_of_our_own_and_never_in_tmp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str | None
) -> None:
    monkeypatch.delenv("STREAMFS_HOME", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "s"))
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    if runtime is None:
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    else:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime if runtime == "relative" else str(tmp_path / runtime))
    usual = Path(f"/run/user/{os.geteuid()}")
    usable = usual.is_dir() and usual.stat().st_uid == os.geteuid() and not usual.stat().st_mode & 0o022
    assert Home.locate().run == (usual / "streamfs" if usable else tmp_path / "s/streamfs/run")


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_directories_and_lock_are_private_under_any_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    monkeypatch.setenv("STREAMFS_HOME", str(tmp_path / "new" / "deep" / "home"))
    before = os.umask(umask)
    try:
        home = Home.open()
        home.lock().release()
    finally:
        os.umask(before)
    parents = [tmp_path / "new", tmp_path / "new/deep", tmp_path / "new/deep/home"]
    assert [mode(path) for path in (*parents, *directories(home))] == [0o700] * 7
    assert mode(home.lock_path) == 0o600


def test_own_directories_that_others_may_read_are_closed(home: Home) -> None:
    home.cache.chmod(0o755)
    home.prepare()
    assert mode(home.cache) == 0o700


@pytest.mark.parametrize("rights", [0o770, 0o702, 0o777])
@pytest.mark.parametrize("which", ["root", "state", "cache", "run", "config"])
def test_a_directory_that_others_may_write_to_is_refused(home: Home, which: str, rights: int) -> None:
    getattr(home, which).chmod(rights)
    with pytest.raises(NotPermitted, match="chmod 700"):
        home.prepare()


def test_a_home_below_a_directory_that_anybody_may_change_is_refused(home: Home, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(NotPermitted, match="replace"):
        home.prepare()
    tmp_path.chmod(0o1777)
    home.prepare()


@needs_root
@pytest.mark.parametrize("which", ["root", "state", "cache", "run"])
def test_a_foreign_directory_is_refused(home: Home, which: str) -> None:
    os.chown(getattr(home, which), NOBODY, -1)
    with pytest.raises(NotPermitted, match=f"belongs to uid {NOBODY}"):
        home.prepare()


@pytest.mark.parametrize("which", ["root", "state", "cache", "run"])
def test_an_own_link_is_followed_and_a_strangers_is_refused(home: Home, tmp_path: Path, which: str) -> None:
    path: Path = getattr(home, which)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    home.prepare()
    if os.geteuid() == 0:
        os.chown(path, NOBODY, -1, follow_symlinks=False)
        with pytest.raises(NotPermitted, match="symbolic link"):
            home.prepare()


def test_an_own_link_to_an_open_directory_is_refused(home: Home, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    home.cache.rmdir()
    home.cache.symlink_to(tmp_path / "open")
    with pytest.raises(NotPermitted, match="others may write"):
        home.prepare()


def test_what_cannot_be_a_directory_is_refused(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.cache.rmdir()
    home.cache.write_text("a file")
    with pytest.raises(InvalidRequest, match="Not a directory"):
        home.prepare()
    home.cache.unlink()
    home.cache.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InvalidRequest, match="No such file"):
        home.prepare()
    monkeypatch.setenv("STREAMFS_HOME", "/proc/1/streamfs")
    with pytest.raises((InvalidRequest, NotPermitted)):
        Home.open()


def test_one_lock_at_a_time_and_the_holder_is_named(home: Home) -> None:
    with home.lock() as lock:
        with pytest.raises(Busy, match=rf"another streamfs command \(pid {os.getpid()}\)"):
            home.lock()
        lock.record(home.socket_path)
        with pytest.raises(Busy, match="a streamfs daemon"):
            home.lock()
        holder = home.holder()
        assert holder is not None
        assert (holder.pid, holder.socket) == (os.getpid(), home.socket_path)
    assert home.holder() is None
    home.lock().release()


def test_waiting_for_the_lock_ends_when_it_is_given_back(home: Home) -> None:
    lock = home.lock()
    timer = threading.Timer(0.1, lock.release)
    timer.start()
    home.lock(wait=10).release()
    timer.join()


def _hold(home: Home, ready: Any) -> None:
    lock = home.lock()
    ready.put(lock.held)
    threading.Event().wait()


def test_the_lock_of_a_killed_process_is_free(home: Home) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.SimpleQueue()
    child = context.Process(target=_hold, args=(home, ready))
    child.start()
    assert ready.get()
    with pytest.raises(Busy, match=f"pid {child.pid}"):
        home.lock()
    child.kill()
    child.join(10)
    home.lock().release()


def test_a_forked_child_goes_on_holding_what_the_parent_abandons(home: Home) -> None:
    lock = home.lock()
    begin_end, tell = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            lock.record(home.socket_path)
            os.write(tell[1], b"x")
            os.read(begin_end[0], 1)
        finally:
            os._exit(0)
    os.read(tell[0], 1)
    lock.abandon()
    with pytest.raises(Busy, match=f"daemon.*pid {pid}"):
        home.lock()
    os.write(begin_end[1], b"x")
    os.waitpid(pid, 0)
    home.lock().release()
    for fd in (*begin_end, *tell):
        os.close(fd)


def test_a_lock_file_that_is_a_link_is_not_opened(home: Home, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    home.lock_path.symlink_to(tmp_path / "precious")
    with pytest.raises(InvalidRequest, match="cannot open the lock"):
        home.lock()
    assert (tmp_path / "precious").read_text() == "x"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x", "socket": 1}', '{"pid": 1}', "\xff"])
def test_a_lock_file_that_makes_no_sense_names_nobody(home: Home, text: str) -> None:
    home.lock_path.write_bytes(text.encode("latin-1"))
    assert home.holder() is None


def test_it_is_no_use_to_wait_for_a_daemon_that_stays(home: Home) -> None:
    with home.lock() as lock:
        lock.record(home.socket_path)
        with pytest.raises(Busy, match="a streamfs daemon"):
            home.lock(wait=3600.0)  # the test's own limit is less


def test_a_daemon_that_is_about_to_end_is_waited_for(home: Home) -> None:
    first = home.lock()
    first.record(home.socket_path, ending=True)
    timer = threading.Timer(0.1, first.release)
    timer.start()
    try:
        home.lock(wait=60.0).release()
    finally:
        timer.join()
