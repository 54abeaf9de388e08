"""The configuration through a real mount and a server that insists on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamfs.settings import LOOK_EVERY
from tests.mount.mounted import Mounted, wait_for
from tests.mount.origin import ScriptedOrigin
from tests.servers import Server, nginx

TOKEN = "hush-0123456789"


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Server]:
    """nginx that serves only who sends the token, and says so in its log otherwise."""
    root = tmp_path / "served"
    root.mkdir()
    (root / "file").write_text("secret content")
    guard = f'location / {{ if ($http_authorization != "Bearer {TOKEN}") {{ return 403; }} }}'
    with nginx(root, locations=guard) as server:
        yield server


def configure(fs: Mounted, text: str) -> Path:
    path = Path(fs.run("config", "path").stdout.strip())
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("table", ["host", "folder", "stream"])
def test_a_server_gets_the_secret_that_the_configuration_refers_to(
    unmounted: Mounted, guarded: Server, tmp_path: Path, table: str
) -> None:
    fs, token = unmounted, tmp_path / "token"
    token.write_text(TOKEN + "\n")
    name = {"host": guarded.authority, "folder": "mine", "stream": "mine/file"}[table]
    configure(fs, f'[{table}."{name}"]\nsecret-headers = {{ Authorization = "Bearer ${{file:{token}}}" }}\n')
    fs.mount()
    path = fs.add("mine/file", f"http://{guarded.authority}/file")
    assert path.read_text() == "secret content"
    shown = fs.run("config", "show", "mine/file").stdout
    assert f'({table} "{name}")' in shown and f"${{file:{token}}}" in shown
    everything = shown + fs.run("export").stdout + fs.run("status", "--json").stdout + fs.log
    kept = [file for file in fs.home.rglob("*") if file.is_file()]
    assert TOKEN not in everything
    assert not any(TOKEN.encode() in file.read_bytes() for file in kept), "it is written down nowhere"
    if table != "host":
        other = fs.add("theirs", f"http://{guarded.authority}/file")
        with pytest.raises(OSError):
            other.read_bytes()


def test_a_stream_can_refer_to_its_secret_itself(unmounted: Mounted, guarded: Server) -> None:
    fs = unmounted
    fs.environment["MY_TOKEN"] = TOKEN
    fs.mount()
    path = fs.add("x", f"http://{guarded.authority}/file", "--secret-header", "Authorization: Bearer ${env:MY_TOKEN}")
    assert path.read_text() == "secret content"
    missing = fs.add("y", f"http://{guarded.authority}/file", "--secret-header", "Authorization: ${env:NO_TOKEN}")
    with pytest.raises(OSError):
        missing.read_bytes()
    assert "${env:NO_TOKEN} is not set" in (fs.xattr("y", "error") or "")
    assert "refers to its secret" in fs.refused("add", "z", "http://h/", "--secret-header", "A: plain", code=2)


def test_a_change_of_the_file_counts_from_the_next_open_on(unmounted: Mounted, guarded: Server, tmp_path: Path) -> None:
    fs = unmounted
    fs.mount()
    path = fs.add("file", "--no-probe", f"http://{guarded.authority}/file")
    with pytest.raises(OSError):
        path.read_bytes()
    token = tmp_path / "token"
    token.write_text("wrong")
    written = configure(fs, f'[host."127.0.0.1"]\nsecret-headers = {{ Authorization = "Bearer ${{file:{token}}}" }}\n')

    def can_be_read() -> bool:
        try:
            return path.read_text() == "secret content"
        except OSError:
            return False

    assert not can_be_read()
    token.write_text(TOKEN)
    wait_for(can_be_read, f"the file is looked at after {LOOK_EVERY} s, and the secret each time")
    written.write_text("[host]\nnonsense = 1\n")
    wait_for(lambda: can_be_read() and "line 2" in fs.log, "what is wrong is logged, and what was right goes on")
    assert "config.toml line 2" in fs.run("config", "check", check=False).stderr


def test_a_wrong_file_stops_the_mount_with_one_line(unmounted: Mounted) -> None:
    configure(unmounted, "[mount]\nmemory = '1MiB'\nmemroy = 1\n")
    line = unmounted.refused("mount", unmounted.mountpoint)
    assert "config.toml line 3: no option of the mount is called 'memroy'" in line


def test_the_mount_has_its_options_from_the_file_and_the_command_line_first(
    unmounted: Mounted, origin: ScriptedOrigin, tmp_path: Path
) -> None:
    fs = unmounted
    configure(fs, f'[mount]\ncache-dir = "{tmp_path}/cache"\nspill-threshold = "64KiB"\nread-only = true\n')
    (tmp_path / "cache").mkdir(mode=0o700)
    fs.mount()
    document = origin.add("big", 3 << 20)
    path = fs.add("big", document.url)
    assert path.read_bytes() == document.bytes()
    wait_for(lambda: list((tmp_path / "cache").glob("*.data")), "bytes are spilled where the file says")
    with pytest.raises(OSError):
        path.unlink()
    fs.umount()
    (tmp_path / "other").mkdir(mode=0o700)
    fs.mount("--cache-dir", str(tmp_path / "other"))
    assert path.read_bytes() == document.bytes()
    wait_for(lambda: list((tmp_path / "other").glob("*.data")), "the command line comes first")


def test_what_a_folder_keeps_is_kept_however_it_is_registered(
    unmounted: Mounted, origin: ScriptedOrigin, tmp_path: Path
) -> None:
    fs = unmounted
    configure(fs, "[folder.kept]\npersist = true\n")
    urls = [origin.add(f"d{n}", 5000 + n).url for n in range(4)]
    fs.add("kept/offline", urls[0])
    fs.mount()
    fs.add("kept/live", urls[1])
    os.symlink(urls[2], fs.mountpoint / "kept" / "linked")  # noqa: PTH211  (a Path would change the URL)
    (tmp_path / "list").write_text(urls[3] + "\n")
    fs.run("import", tmp_path / "list", "--into", "kept")
    fs.add("not", urls[0])
    for name in ("kept/offline", "kept/live", "kept/linked", "kept/d3"):
        fs.wait_for_state(name, "complete")
        assert fs.xattr(name, "persist") == "1"
    assert fs.xattr("not", "persist") == "0"


def test_folders_have_their_own_time_to_live_and_read_ahead(unmounted: Mounted, origin: ScriptedOrigin) -> None:
    fs = unmounted
    configure(fs, '[mount]\nttl = "1s"\n[folder.near]\nread-ahead = "256KiB"\n[folder.keep]\nttl = "1h"\n')
    fs.mount()
    for name in ("gone", "keep/here"):
        assert fs.add(name, origin.add(name.replace("/", "-"), 5000).url).read_bytes()
    own = fs.add("own", origin.add("own", 5000).url, "--ttl", "2h")
    assert own.read_bytes()
    wait_for(lambda: fs.buffered("gone") == 0, "what the mount keeps for a second goes")
    assert fs.buffered("keep/here") == 5000 and fs.buffered("own") == 5000
    shown = fs.run("config", "show", "keep/here").stdout
    assert 'folder "keep"' in shown and "ttl" in shown

    def come(name: str) -> int:
        """Bytes that came of an endless command whose first byte was read, once it rests."""
        with open(fs.add(name, "--shell", "yes"), "rb", buffering=0) as file:
            assert file.read(1) == b"y"

            def resting() -> bool:
                fetches = fs.status(name)["fetches"]
                return bool(fetches) and fetches[0]["resting"]

            wait_for(resting, "it is read ahead no further")
            return fs.buffered(name)

    near, far = come("near/yes"), come("far/yes")
    assert 256 * 1024 <= near <= 3 << 20
    assert far >= 8 << 20


def test_a_renamed_stream_gets_the_defaults_of_its_new_folder(
    unmounted: Mounted, guarded: Server, tmp_path: Path
) -> None:
    fs = unmounted
    configure(fs, f'[folder.in]\nheaders = {{ Authorization = "Bearer {TOKEN}" }}\n')
    fs.mount()
    path = fs.add("out", f"http://{guarded.authority}/file", "--no-probe")
    with pytest.raises(OSError):
        path.read_bytes()
    fs.run("mv", "out", "in/side")
    assert (fs.mountpoint / "in" / "side").read_text() == "secret content"


def test_a_file_to_begin_with(unmounted: Mounted) -> None:
    fs = unmounted
    path = Path(fs.run("config", "init").stdout.strip())
    assert path.stat().st_mode & 0o777 == 0o600
    assert "there already" in fs.refused("config", "init")
    fs.run("config", "check")
    assert "memory" in fs.run("config", "show").stdout
