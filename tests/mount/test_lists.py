"""import and export through the real command line, with and without a daemon, from files, pipes and servers."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import time
from pathlib import Path

import pytest

from tests.mount.mounted import CLI, Mounted, checked, names_in, wait_for
from tests.mount.origin import ScriptedOrigin
from tests.servers import nginx

MANY = 10_000
SECONDS = 30.0
"""An import of MANY takes about a second; a busy machine gets much more."""


def listed(fs: Mounted) -> list[str]:
    return fs.run("ls").stdout.splitlines()


def told(fs: Mounted, *arguments: str | Path) -> list[str]:
    """Standard error of an import that must fail."""
    done = fs.run("import", *arguments, check=False)
    assert done.returncode == 1, done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize("live", [True, False])
def test_a_playlist_becomes_files_that_play(
    unmounted: Mounted, origin: ScriptedOrigin, tmp_path: Path, live: bool
) -> None:
    fs, songs = unmounted, [origin.add(f"dir/{n}.mp3", 3000 + n) for n in range(3)]
    if live:
        fs.mount()
    local = tmp_path / "local file.mp3"
    local.write_bytes(b"here")
    lines = ["#EXTM3U", *(f"#EXTINF:1,Song {n}\n{song.url}" for n, song in enumerate(songs)), local.name]
    (tmp_path / "list.m3u8").write_text("\n".join(lines))
    assert fs.run("import", tmp_path / "list.m3u8", "--into", "my/list").stdout == "4 added\n"
    if not live:
        fs.mount()
    folder = fs.mountpoint / "my" / "list"
    assert names_in(folder) == ["Song 0.mp3", "Song 1.mp3", "Song 2.mp3", "local file.mp3"]
    assert not any(song.requests for song in songs), "servers are not asked"
    assert (folder / "Song 1.mp3").read_bytes() == songs[1].bytes()
    assert (folder / "local file.mp3").read_bytes() == b"here"
    assert fs.run("import", tmp_path / "list.m3u8", "--into", "my/list").stdout == "4 unchanged\n"


def test_with_probe_lengths_are_known_soon(fs: Mounted, origin: ScriptedOrigin, tmp_path: Path) -> None:
    song = origin.add("song.mp3", 4321)
    (tmp_path / "list").write_text(song.url + "\n")
    fs.run("import", tmp_path / "list", "--probe")
    wait_for(lambda: (fs.mountpoint / "song.mp3").stat().st_size == 4321, "its length is known")
    assert song.bodies == 0


def test_a_playlist_from_a_server_names_what_is_beside_it(fs: Mounted, origin: ScriptedOrigin) -> None:
    song = origin.add("deep/song.mp3", 1000)
    text = "[playlist]\nFile1=deep/song.mp3\nTitle1=A song\nFile2=file:///etc/passwd\n"
    listing = origin.add("list.pls", data=text.encode())
    lines = told(fs, listing.url)
    assert lines[0] == f"{listing.url}:4: a list from the net may not name files of this machine"
    assert "nothing was imported" in lines[1]
    assert listed(fs) == []
    fs.run("import", listing.url, "--skip-bad")
    assert listed(fs) == ["A song.mp3"]
    assert (fs.mountpoint / "A song.mp3").read_bytes() == song.bytes()


def test_references_start_where_redirects_led_to(fs: Mounted, tmp_path: Path) -> None:
    (tmp_path / "served" / "deep").mkdir(parents=True)
    (tmp_path / "served" / "deep" / "list.m3u").write_text("song.mp3\n")
    (tmp_path / "served" / "deep" / "song.mp3").write_text("la")
    with nginx(tmp_path / "served", locations="location = /moved { return 302 /deep/list.m3u; }") as server:
        fs.run("import", f"http://{server.authority}/moved", "--format", "m3u")
        assert (fs.mountpoint / "song.mp3").read_text() == "la"


def test_progress_shows_on_a_terminal_alone(fs: Mounted, origin: ScriptedOrigin, tmp_path: Path) -> None:
    feed = origin.add("feed.xml", data=b"<rss><channel><title>S</title></channel></rss>")
    episode = origin.add("feed2.xml", data=b'<rss><channel><item><enclosure url="a.mp3"/></item></channel></rss>')
    opml = tmp_path / "pods.opml"
    opml.write_text(f'<opml><body><outline xmlUrl="{feed.url}"/><outline xmlUrl="{episode.url}"/></body></opml>')
    assert fs.run("import", opml, "--dry-run").stderr == ""
    master, slave = pty.openpty()
    try:
        done = subprocess.run(
            [*CLI, "import", str(opml)], env=fs.environment | {"TERM": "xterm"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=slave, timeout=30, check=False,
        )  # fmt: skip
        shown = os.read(master, 65536)
    finally:
        os.close(master)
        os.close(slave)
    assert (done.returncode, done.stdout) == (0, b"1 added\n")
    assert b"feeds" in shown


def test_podcasts_come_with_their_episodes(fs: Mounted, origin: ScriptedOrigin, tmp_path: Path) -> None:
    episode = origin.add("audio/1.mp3", 5000, mime="audio/mpeg")
    items = "".join(
        f'<item><title>{title}</title><enclosure url="audio/1.mp3?{n}" length="{size}" type="audio/mpeg"/></item>'
        for n, (title, size) in enumerate((("One: it begins", 5000), ("Two", 0), ("Wrong", 4999)))
    )
    feed = origin.add("feed.xml", data=f"<rss><channel><title>The Show</title>{items}</channel></rss>".encode())
    gone = f"{feed.url}.gone"
    origin.documents |= {f"audio/1.mp3?{n}": episode for n in range(3)}
    opml = tmp_path / "pods.opml"
    opml.write_text(
        f'<opml><body><outline text="Tech">\n<outline text="x" xmlUrl="{feed.url}"/>\n'
        f'<outline text="Gone" xmlUrl="{gone}"/></outline></body></opml>'
    )
    lines = told(fs, opml)
    assert lines[0].startswith(f"{opml}:3: the feed {gone}: ") and "404" in lines[0]
    assert listed(fs) == []
    assert "3 added" in fs.run("import", opml, "--skip-bad", "--into", "podcasts").stdout
    show = fs.mountpoint / "podcasts" / "Tech" / "The Show"
    assert names_in(show) == ["One: it begins.mp3", "Two.mp3", "Wrong.mp3"]
    assert [(show / name).stat().st_size for name in names_in(show)] == [5000, 0, 4999], "as the feed says"
    assert fs.xattr("podcasts/Tech/The Show/Two.mp3", "user.mime_type") == "audio/mpeg"
    assert not episode.requests
    copy = tmp_path / "copy"
    first = subprocess.run(["cp", show / "Wrong.mp3", copy], capture_output=True, timeout=30, check=False)
    assert first.returncode != 0 or copy.read_bytes() == episode.bytes(), "never cut short in silence"
    checked(["cp", show / "Wrong.mp3", copy])
    assert copy.read_bytes() == episode.bytes()
    for name in names_in(show):
        assert (show / name).read_bytes() == episode.bytes(), "whatever the feed says"
    assert (show / "Wrong.mp3").stat().st_size == 5000


def test_a_feed_from_a_server_is_a_folder(fs: Mounted, origin: ScriptedOrigin) -> None:
    feed = origin.add(
        "feed", data=b'<rss><channel><title>S</title><item><enclosure url="/e/1.ogg"/></item></channel></rss>'
    )
    fs.run("import", feed.url)
    assert listed(fs) == ["S/1.ogg"]


def test_an_hls_playlist_is_refused_in_words(fs: Mounted, tmp_path: Path) -> None:
    (tmp_path / "live.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\na.ts\n")
    assert "media playlist of HLS" in fs.refused("import", tmp_path / "live.m3u8")


def test_commands_are_registered_only_where_that_is_said(fs: Mounted, tmp_path: Path) -> None:
    listing = tmp_path / "list.toml"
    listing.write_text(
        '[[stream]]\nname = "a"\ncommand = ["echo", "1"]\n[[stream]]\nname = "b"\nshell = "echo 2"\n'
        '[[stream]]\nname = "c"\nurl = "http://127.0.0.1:9/"\noptions = { refresh-command = "touch /x" }\n'
    )
    lines = told(fs, listing)
    assert [line.rpartition(":")[0] for line in lines[:3]] == [f"{listing}:{n}" for n in (1, 4, 7)]
    assert all("--allow-commands" in line for line in lines[:3])
    assert listed(fs) == []
    fs.run("import", listing, "--allow-commands")
    assert [(fs.mountpoint / name).read_bytes() for name in "ab"] == [b"1\n", b"2\n"]


def test_names_that_are_taken(fs: Mounted, tmp_path: Path) -> None:
    fs.add("a.txt", "--", "echo", "old")
    listing = tmp_path / "list.json"
    url = (tmp_path / "new").as_uri()
    (tmp_path / "new").write_text("new")
    listing.write_text(json.dumps([{"name": "b", "url": url}, {"name": "a.txt", "url": url}]))
    assert "'a.txt'" in told(fs, listing)[-1]
    assert listed(fs) == ["a.txt"], "all or none"
    assert "1 added, 1 renamed" in fs.run("import", listing, "--rename", "--dry-run").stdout
    assert listed(fs) == ["a.txt"], "a dry run changes nothing"
    assert fs.run("import", listing, "--skip").stdout == "1 added, 1 skipped\n"
    assert (fs.mountpoint / "a.txt").read_bytes() == b"old\n"
    assert fs.run("import", listing, "--rename").stdout == "1 unchanged, 1 renamed\n"
    assert (fs.mountpoint / "a (2).txt").read_bytes() == b"new"
    with (fs.mountpoint / "a.txt").open("rb", buffering=0) as held:
        assert fs.run("import", listing, "--replace").stdout == "1 unchanged, 1 replaced\n"
        assert (fs.mountpoint / "a.txt").read_bytes() == b"new"
        assert held.read() == b"old\n", "who has it open keeps the old one"
    assert "cannot go together" in fs.refused("import", listing, "--skip", "--replace", code=2)


def test_an_export_is_imported_elsewhere_as_it_was(fs: Mounted, tmp_path: Path) -> None:
    fs.add("x/one", "--env", "A=b", "--", "sh", "-c", "echo $A")
    fs.add("two", "http://me:hush@127.0.0.1:9/x?token=hush", "--header", "X: hush", "--no-probe", "--window", "30m")
    fs.add("three", "file:///etc/hostname")
    fs.run("persist", "three")
    exported = fs.run("export")
    assert "may be secret" in exported.stderr
    (tmp_path / "second").mkdir()
    other = Mounted(tmp_path / "second")
    try:
        done = subprocess.run(
            [*CLI, "import", "-", "--allow-commands"],
            input=exported.stdout, env=other.environment, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "3 added\n"), done.stderr
        assert other.run("export").stdout == exported.stdout
        other.mount()
        assert other.run("export").stdout == exported.stdout
        assert (other.mountpoint / "x" / "one").read_bytes() == b"b\n"
        other.wait_for_state("three", "complete")
    finally:
        other.close()
    for kind in ("json", "jsonl", "toml", "m3u"):
        bare = fs.run("export", "--no-secrets", "--format", kind)
        assert "hush" not in bare.stdout + bare.stderr
    assert [json.loads(line)["name"] for line in fs.run("export", "--format", "jsonl", "x").stdout.splitlines()] == [
        "x/one"
    ]
    assert "no stream or folder" in fs.refused("export", "nothing")


@pytest.mark.parametrize("live", [True, False])
def test_ten_thousand_streams_are_imported_in_seconds(unmounted: Mounted, tmp_path: Path, live: bool) -> None:
    fs = unmounted
    if live:
        fs.mount()
    records = [{"name": f"f{n % 100}/s{n}", "url": f"http://127.0.0.1:9/{n}"} for n in range(MANY)]
    (tmp_path / "many.json").write_text(json.dumps(records))
    began = time.monotonic()
    assert fs.run("import", tmp_path / "many.json", within=SECONDS).stdout == f"{MANY} added\n"
    took = time.monotonic() - began
    assert took < SECONDS
    assert len(listed(fs)) == MANY
    if live:
        assert sum(len(names_in(folder)) for folder in fs.mountpoint.iterdir()) == MANY
    print(f"{took:.2f} s")
