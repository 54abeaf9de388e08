"""Any program reads any kind of source byte for byte: before anything has arrived, and again when all has."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mount.mounted import Mounted, checked
from tests.mount.origin import ScriptedOrigin
from tests.servers import Server, nginx

SOURCES = ["ranges", "no-ranges", "chunked", "command", "file"]
LENGTH_TOLD = {"ranges", "no-ranges", "file"}
"""Sources that tell their length before their end."""
RANGED = {"ranges", "file"}
"""Sources that are cached by the kernel from the first open on."""


@dataclass
class World:
    """One daemon with servers of every kind before it; every test adds streams of its own."""

    fs: Mounted
    library: Path
    servers: dict[str, Server]
    origin: ScriptedOrigin
    numbers: Iterator[int]

    def stream(self, kind: str, name: str, *options: str) -> Path:
        """A fresh stream of the library's file `name`."""
        original = self.library / name
        shown = f"{kind}/{next(self.numbers)}-{name}"
        match kind:
            case "ranges" | "no-ranges":
                return self.fs.add(shown, *options, f"http://{self.servers[kind].authority}/{name}")
            case "chunked":
                document = self.origin.add(name, data=original.read_bytes(), chunked=True, ranged=False)
                return self.fs.add(shown, *options, document.url)
            case "command":
                return self.fs.add(shown, *options, "--", "cat", original)
        return self.fs.add(shown, *options, original.as_uri())


@pytest.fixture(scope="module")
def world(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    fs = Mounted(tmp_path_factory.mktemp("world"))
    origin = ScriptedOrigin()
    try:
        with nginx(library) as ranges, nginx(library, ranges=False) as no_ranges:
            fs.mount("--spill-threshold", "1MiB")
            yield World(fs, library, {"ranges": ranges, "no-ranges": no_ranges}, origin, itertools.count())
    finally:
        fs.close()
        origin.stop()


Program = Callable[[Path, Path], object]
"""Called with a file and a folder to write to; gives what is to be equal for the stream and its original."""

_MAP = """
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as file:
    access = {"shared": mmap.MAP_SHARED, "private": mmap.MAP_PRIVATE}[sys.argv[2]]
    with mmap.mmap(file.fileno(), 0, flags=access, prot=mmap.PROT_READ) as view:
        print(len(view), view[-7:].hex(), hashlib.sha256(view).hexdigest(), view[len(view) // 2])
"""
_ZIP = """
import hashlib, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as things:
    assert things.testzip() is None
    for name in reversed(things.namelist()):
        print(name, hashlib.sha256(things.read(name)).hexdigest())
"""
_RANDOM = """
import hashlib, random, sys
size, chosen, digest = int(sys.argv[2]), random.Random(5), hashlib.sha256()
with open(sys.argv[1], "rb", buffering=0) as file:
    for _ in range(200):
        file.seek(chosen.randrange(size + 1000))
        digest.update(file.read(chosen.choice((1, 511, 4096, 70_000))))
print(digest.hexdigest())
"""


def _copied(argv: list[str]) -> Program:
    def run(path: Path, folder: Path) -> object:
        target = folder / f"copy-{len(list(folder.iterdir()))}"
        checked([*argv, path, target])
        return hashlib.sha256(target.read_bytes()).hexdigest()

    return run


def _printed(*argv: str) -> Program:
    """PATH in `argv` stands for the file."""
    return lambda path, folder: checked([word.replace("PATH", str(path)) for word in argv])


def _sha256sum(path: Path, folder: Path) -> object:
    return checked(["sha256sum", path]).split()[0]


def _random_reads(path: Path, folder: Path) -> object:
    size = {".flac": "noise.flac", ".mp4": "film.mp4"}[path.suffix]
    return checked([sys.executable, "-c", _RANDOM, path, str(SIZES[size])])


SIZES: dict[str, int] = {}


@pytest.fixture(autouse=True)
def _sizes(library: Path) -> None:
    SIZES.update({path.name: path.stat().st_size for path in library.iterdir()})


WAIT_FOR_LENGTH = ("--size-policy", "wait")
"""For programs that look for the end of an open file first, where the source does not tell its length: ffmpeg looks
there for the index of an MP4, and zipfile for its directory."""

READERS: dict[str, tuple[str, Program]] = {
    "cp": ("film.mp4", _copied(["cp"])),
    "cat": ("film.mp4", _printed("cat", "PATH")),
    "sha256sum": ("film.mkv", _sha256sum),
    "head": ("film.mp4", _printed("head", "-c", "1234567", "PATH")),
    "tail": ("film.mp4", _printed("tail", "-c", "77777", "PATH")),
    "dd": ("film.mp4", _printed("dd", "if=PATH", "status=none", "bs=64k", "skip=17", "count=5")),
    "dd-bytes": (
        "film.mp4",
        _printed("dd", "if=PATH", "status=none", "iflag=skip_bytes,count_bytes", "skip=1000003", "count=123457"),
    ),
    "dd-direct": ("film.mp4", _printed("dd", "if=PATH", "status=none", "bs=1M", "iflag=direct")),
    "unzip": ("things.zip", _printed("unzip", "-p", "PATH", "numbers.txt")),
    "zipfile": ("things.zip", _printed(sys.executable, "-c", _ZIP, "PATH")),
    "random-reads": ("film.mp4", _random_reads),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("program", READERS)
def test_a_program_reads_a_stream_as_it_reads_the_original(
    program: str, kind: str, world: World, tmp_path: Path
) -> None:
    name, run = READERS[program]
    expected = run(world.library / name, tmp_path)
    path = world.stream(kind, name, *(WAIT_FOR_LENGTH if program == "zipfile" else ()))
    if program == "unzip" and kind not in LENGTH_TOLD:
        checked(["cat", path])  # it asks for the length before it opens the file, when nobody knows it yet
    assert run(path, tmp_path) == expected, "while it comes in"
    checked(["cat", path])
    assert path.stat().st_size == SIZES[name]
    assert run(path, tmp_path) == expected, "when all has arrived"


MAPPERS = ["shared", "private"]


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("sharing", MAPPERS)
def test_a_mapping_shows_the_bytes_once_the_length_is_known(sharing: str, kind: str, world: World) -> None:
    argv = [sys.executable, "-c", _MAP]
    expected = checked([*argv, world.library / "film.mp4", sharing])
    path = world.stream(kind, "film.mp4")
    if kind not in RANGED:
        checked(["cat", path])  # what still comes in from a one-way source is not in the kernel's cache
    assert checked([*argv, path, sharing]) == expected
    assert checked([*argv, path, sharing]) == expected


@pytest.mark.parametrize("kind", SOURCES)
def test_rsync_copies_a_stream_whose_length_is_known(kind: str, world: World, tmp_path: Path) -> None:
    path = world.stream(kind, "noise.flac")
    if kind in LENGTH_TOLD:
        with path.open("rb"):
            pass  # an open learns the length
    else:
        checked(["cat", path])
    checked(["rsync", "--times", path, tmp_path / "copy"])
    assert (tmp_path / "copy").read_bytes() == (world.library / "noise.flac").read_bytes()
    # A second run finds nothing to do, by size and time.
    assert b"noise" not in checked(["rsync", "--times", "--itemize-changes", "--checksum", path, tmp_path / "copy"])


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("name", ["noise.flac", "film.mp4", "film.mkv", "film.ts"])
def test_ffprobe_finds_what_is_in_each_container(name: str, kind: str, world: World) -> None:
    argv = ["ffprobe", "-v", "error", "-of", "json", "-show_entries", "format=duration,nb_streams,format_name"]

    def found(path: Path) -> object:
        return json.loads(checked([*argv, path]))["format"]

    # The index of film.mp4 and the last time stamp of film.ts are at the end, which is found by the length.
    path = world.stream(kind, name, *(WAIT_FOR_LENGTH if name in ("film.mp4", "film.ts") else ()))
    assert found(path) == found(world.library / name)


@pytest.mark.parametrize("kind", SOURCES)
def test_ffmpeg_seeks_to_the_last_picture_of_a_film(kind: str, world: World) -> None:
    def picture(path: Path) -> bytes:
        argv = ["ffmpeg", "-v", "error", "-nostdin", "-ss", "7.4", "-i", path]
        return checked([*argv, "-frames:v", "1", "-an", "-f", "md5", "-"])

    expected = picture(world.library / "film.mp4")
    assert b"MD5=" in expected
    path = world.stream(kind, "film.mp4", *WAIT_FOR_LENGTH)
    assert picture(path) == expected
    assert picture(path) == expected


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("name", ["noise.flac", "film.mp4"])
def test_mpv_plays_a_stream_to_its_end(name: str, kind: str, world: World) -> None:
    path = world.stream(kind, name, *(WAIT_FOR_LENGTH if name == "film.mp4" else ()))
    told = checked(["mpv", "--no-config", "--vo=null", "--ao=null", "--ao-null-untimed=yes", "--untimed", path])
    assert b"Exiting... (End of file)" in told
    assert world.fs.xattr(str(path.relative_to(world.fs.mountpoint)), "error") is None


@pytest.mark.parametrize("kind", SOURCES)
def test_save_writes_the_whole_stream(kind: str, world: World, tmp_path: Path) -> None:
    path = world.stream(kind, "film.mkv")
    world.fs.run("save", str(path.relative_to(world.fs.mountpoint)), tmp_path / "saved")
    assert (tmp_path / "saved").read_bytes() == (world.library / "film.mkv").read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]
