"""Every block of docs/cookbook.md is run as it stands, with servers of this machine in place of those it names."""

from __future__ import annotations

import gzip
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.mount.mounted import Mounted, checked, names_in
from tests.mount.origin import ScriptedOrigin

PAGE = (Path(__file__).parents[2] / "docs" / "cookbook.md").read_text()
INTRODUCTION, *SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
RECIPES = {section.split("\n", 1)[0]: re.findall(r"^```(\w+)\n(.*?)^```", section, re.S | re.M) for section in SECTIONS}
WITHIN = 60.0  # seconds for one block


class Kitchen:
    """A home directory with a mount in it, as the page assumes, and programs that stand for those of others."""

    def __init__(self, fs: Mounted, folder: Path) -> None:
        self.fs = fs
        self.home = folder / "user"
        self.work = folder / "work"
        self._programs = folder / "programs"
        for place in (self.home / "streams", self.work, self._programs):
            place.mkdir(parents=True)
        fs.mountpoint = self.home / "streams"
        here = Path(sys.executable).parent
        fs.environment |= {"HOME": str(self.home), "PATH": f"{self._programs}:{here}:{os.environ['PATH']}"}
        self.places: dict[str, str] = {}
        """What the page calls a server, and where it is."""

    def program(self, name: str, script: str) -> None:
        path = self._programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def prepare(self) -> None:
        """The block that the whole page assumes."""
        ((language, block),) = re.findall(r"^```(\w+)\n(.*?)^```", INTRODUCTION, re.S | re.M)
        assert language == "sh"
        self._run(["bash", "-euo", "pipefail", "-c", block])
        self.fs.adopt()

    def cook(self, title: str) -> list[str]:
        """Run all blocks of a recipe; what each printed."""
        return [self.run(language, block) for language, block in RECIPES[title]]

    def run(self, language: str, block: str) -> str:
        for name, place in self.places.items():
            block = block.replace(name, place)
        assert "example.org/" not in block, "a server without a stand-in"
        argv = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[language]
        return self._run([*argv, block])

    def _run(self, argv: list[str]) -> str:
        done = subprocess.run(
            argv, cwd=self.work, env=self.fs.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=WITHIN, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{argv[-1]}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture
def kitchen(unmounted: Mounted, tmp_path: Path) -> Kitchen:
    made = Kitchen(unmounted, tmp_path)
    made.prepare()
    made.program("mpv", f'exec {shutil.which("mpv")} --no-config --vo=null --ao=null --untimed --length=1 "$@"')
    return made


class Endless:
    """A server that answers with `headers` and what `pieces` gives, for ever."""

    def __init__(self, headers: dict[str, str], pieces: Callable[[], Iterator[bytes]]) -> None:
        stopping = self._stopping = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                self.send_response(200)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in pieces():
                    if stopping.wait(0.005):
                        return
                    try:
                        self.wfile.write(piece)
                    except OSError:
                        return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def radio(library: Path, tmp_path: Path) -> Iterator[Endless]:
    sound = checked(
        ["ffmpeg", "-v", "error", "-nostdin", "-i", library / "noise.flac", "-c:a", "mp2", "-f", "mp2", "-"]
    )
    gap = 8192
    title = b"StreamTitle='Some song';"
    metadata = bytes([(len(title) + 15) // 16]) + title.ljust((len(title) + 15) // 16 * 16, b"\0")

    def pieces() -> Iterator[bytes]:
        position = 0
        while True:
            yield (sound * 2)[position : position + gap] + metadata
            position = (position + gap) % len(sound)

    made = Endless({"Content-Type": "audio/mpeg", "icy-metaint": str(gap)}, pieces)
    try:
        yield made
    finally:
        made.stop()


def test_radio_that_waits_for_you(kitchen: Kitchen, radio: Endless, origin: ScriptedOrigin) -> None:
    stations = "#EXTM3U\n" + "".join(f"#EXTINF:-1,Station {n}\n{radio.url}/{n}\n" for n in (1, 2))
    listing = origin.add("stations.m3u", data=stations.encode())
    kitchen.places = {
        "https://radio.example.org/live": radio.url + "/live",
        "https://radio.example.org/stations.m3u": listing.url,
    }
    heard, shown = kitchen.cook("Radio that waits for you")
    assert "AO: [null]" in heard
    assert heard.endswith("Some song")
    assert shown.splitlines() == ["2 added", "Station 1", "Station 2"]
    assert 'window            2h  (folder "radio")' in kitchen.fs.run("config", "show", "radio/Station 1").stdout


def test_a_camera(kitchen: Kitchen, library: Path, tmp_path: Path) -> None:
    argv = ["ffmpeg", "-v", "error", "-nostdin", "-i", library / "film.mkv", "-frames:v", "30"]
    checked([*argv, "-pix_fmt", "yuvj420p", tmp_path / "frame-%02d.jpg"])
    frames = [path.read_bytes() for path in sorted(tmp_path.glob("frame-*.jpg"))]

    def pieces() -> Iterator[bytes]:
        while True:
            for frame in frames:
                head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(frame)
                yield head + frame + b"\r\n"

    camera = Endless({"Content-Type": "multipart/x-mixed-replace; boundary=frame"}, pieces)
    try:
        kitchen.places = {"http://camera.example.org": camera.url}
        kitchen.cook("A camera")
        assert (kitchen.work / "door.jpg").read_bytes()[:2] == b"\xff\xd8"
        told = checked(["ffprobe", "-v", "error", "-show_entries", "format=duration", kitchen.work / "door.mkv"])
        assert 0.5 < float(told.split(b"duration=")[1].split()[0]) < 2
        held = kitchen.fs.status("door.mjpeg")
        assert (held["state"], held["readers"]) == ("live", 0), "it comes in, whoever looks"
    finally:
        camera.stop()


def test_a_folder_of_podcasts(kitchen: Kitchen, library: Path, origin: ScriptedOrigin) -> None:
    sound = checked(
        ["ffmpeg", "-v", "error", "-nostdin", "-i", library / "noise.flac", "-c:a", "mp2", "-f", "mp2", "-"]
    )
    one, two = (origin.add(f"{name}.mp3", data=sound, mime="audio/mpeg") for name in ("one", "two"))
    items = "".join(
        f"<item><title>{title}</title>"
        f'<enclosure url="{document.url}" length="{document.size}" type="audio/mpeg"/></item>'
        for title, document in (("One", one), ("Two", two))
    )
    feed = origin.add("feed.xml", data=f"<rss><channel><title>The Show</title>{items}</channel></rss>".encode())
    kitchen.places = {"https://pods.example.org/feed.xml": feed.url}
    (told,) = kitchen.cook("A folder of podcasts")
    assert told.count(f" {len(sound)} ") == 2, "their lengths are listed"
    kitchen.fs.wait_for_state("podcasts/The Show/Two.mp3", "complete")
    assert one.requests, "it was played"


def test_the_logs_of_a_pod_as_a_file(kitchen: Kitchen) -> None:
    runs = kitchen.work / "runs"
    kitchen.program(
        "kubectl",
        f'echo "$*" >> {shlex.quote(str(runs))}\n'
        "i=0; while [ $i -lt 100 ]; do echo $i INFO; echo $i ERROR; i=$((i+1)); done; echo the end",
    )
    (told,) = kitchen.cook("The logs of a pod as a file")
    assert told.splitlines() == ["100", "the end"]
    assert runs.read_text() == "logs --since=24h deploy/web\n", "one run served both readers"


def test_a_compressed_log_seen_decompressed(kitchen: Kitchen, origin: ScriptedOrigin) -> None:
    lines = [f"host - {n} {500 if n % 10 == 0 else 200} -" for n in range(50_000)]
    document = origin.add("access.log.gz", data=gzip.compress("\n".join([*lines, "last"]).encode()))
    kitchen.places = {"https://logs.example.org/access.log.gz": document.url}
    (told,) = kitchen.cook("A compressed log, seen decompressed")
    assert told.split() == ["5000", "last"]


def test_one_file_of_a_remote_zip(kitchen: Kitchen, origin: ScriptedOrigin) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("films/one.bin", os.urandom(30 << 20))
        archive.writestr("docs/readme.txt", "read me\n")
        archive.writestr("films/two.bin", os.urandom(30 << 20))
    document = origin.add("big.zip", data=packed.getvalue())
    kitchen.places = {"https://files.example.org/big.zip": document.url}
    (told,) = kitchen.cook("One file of a remote zip")
    assert "films/two.bin" in told
    assert told.endswith("read me\n")
    assert kitchen.fs.buffered("big.zip") < 4 << 20
    assert document.sent < document.size / 4, f"{document.sent} of {document.size} bytes were sent"


def test_a_database_dump_through_ssh(kitchen: Kitchen) -> None:
    dump = "CREATE TABLE goods (id int);\n" + "INSERT INTO goods VALUES (1);\n" * 5000
    (kitchen.home / "dump.sql").write_text(dump)
    kitchen.program("ssh", '[ "$*" = "db.example.org pg_dump shop" ] && cat ~/dump.sql')
    ((language, block),) = RECIPES["A database dump through ssh"]
    kitchen.places = {}
    told = kitchen.run(language, block)
    assert told.splitlines()[0] == "CREATE TABLE goods (id int);"
    assert (kitchen.work / "shop.sql").read_text() == dump
    kitchen.program("ssh", "head -c 100000 ~/dump.sql; echo lost >&2; exit 255")
    kitchen.fs.run("evict", "shop.sql")
    assert "255" in kitchen.fs.refused("save", "shop.sql", kitchen.work / "half.sql")
    assert names_in(kitchen.work) == ["shop.sql"]


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("duckdb", "pandas", "pyarrow"))), reason="needs the extra [cookbook]"
)
def test_duckdb_and_pandas_on_a_remote_parquet_file(kitchen: Kitchen, origin: ScriptedOrigin, tmp_path: Path) -> None:
    script = (
        "import duckdb, sys; duckdb.sql(\"COPY (SELECT ['Bergen', 'Oslo'][range % 2 + 1] AS city, range % 7 AS price,"
        " md5(range::VARCHAR) || md5((range + 1)::VARCHAR) AS note FROM range(400000))"
        ' TO \'" + sys.argv[1] + "\' (FORMAT parquet)")'
    )
    checked([sys.executable, "-c", script, tmp_path / "trips.parquet"], within=WITHIN)
    document = origin.add("trips.parquet", data=(tmp_path / "trips.parquet").read_bytes())
    kitchen.places = {"https://data.example.org/trips.parquet": document.url}
    _, told = kitchen.cook("duckdb and pandas on a remote parquet file")
    total = sum(n % 7 for n in range(400_000))
    assert told.splitlines() == ["[('Bergen', 200000), ('Oslo', 200000)]", str(total)]
    assert document.sent < document.size / 2, f"{document.sent} of {document.size} bytes were sent"


def test_every_recipe_has_its_test() -> None:
    names = {re.sub(r"\W+", "_", title.lower()).strip("_") for title in RECIPES}
    assert {f"test_{name}" for name in names} == {name for name in globals() if name.startswith("test_")} - {
        "test_every_recipe_has_its_test"
    }
    assert all(RECIPES.values())
