"""A home and a mount for each test, origins, and media made once."""

from __future__ import annotations

import os
import pwd
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.mounted import Mounted, Tap, checked
from tests.mount.origin import ScriptedOrigin
from tests.mount.posix_tools import Posix


@pytest.fixture
def unmounted(tmp_path: Path) -> Iterator[Mounted]:
    """A home without a daemon, which a test may start; everything is ended after it."""
    made = Mounted(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def fs(unmounted: Mounted) -> Mounted:
    """A running daemon with the default options."""
    unmounted.mount()
    return unmounted


@pytest.fixture(scope="module")
def posix() -> Iterator[Posix]:
    made = Posix()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def origin() -> Iterator[ScriptedOrigin]:
    made = ScriptedOrigin()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def tap(tmp_path: Path) -> Iterator[Tap]:
    made = Tap(tmp_path / "tap")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def user() -> Iterator[str]:
    """The name of an ordinary user, there for the time of the tests. Only root can ask for it."""
    name = f"streamfs-test-{os.getpid()}"
    subprocess.run(["/usr/sbin/useradd", "--system", "--no-create-home", name], check=True, capture_output=True)
    try:
        yield name
    finally:
        subprocess.run(["/usr/sbin/userdel", name], check=True, capture_output=True)


@pytest.fixture
def folder(user: str) -> Iterator[Path]:
    """A folder of the user's, in a place that the user can reach."""
    made = Path(subprocess.run(["mktemp", "-d"], check=True, capture_output=True, text=True).stdout.strip())
    account = pwd.getpwnam(user)
    os.chown(made, account.pw_uid, account.pw_gid)
    try:
        yield made
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", made], check=True)


SECONDS = 8
"""How long the media play."""
_NOISE = ("-f", "lavfi", "-i", f"anoisesrc=d={SECONDS}:c=pink:seed=7:r=44100")
_PICTURE = ("-f", "lavfi", "-i", f"testsrc2=d={SECONDS}:s=640x360:r=25")
_CODECS = ("-c:v", "mpeg4", "-q:v", "3", "-c:a", "mp2", "-shortest")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with noise.flac, film.mp4 (its index at the end), film.mkv, film.ts and things.zip."""
    folder = tmp_path_factory.mktemp("library")
    folder.chmod(0o755)
    ffmpeg = ("ffmpeg", "-v", "error", "-nostdin")
    checked([*ffmpeg, *_NOISE, "-ac", "2", folder / "noise.flac"])
    checked([*ffmpeg, *_NOISE, *_PICTURE, *_CODECS, folder / "film.mkv"])
    for name in ("film.mp4", "film.ts"):
        checked([*ffmpeg, "-i", folder / "film.mkv", "-c", "copy", folder / name])
    film = (folder / "film.mp4").read_bytes()
    assert film.index(b"moov") > film.index(b"mdat"), "the index must be at the end"
    with zipfile.ZipFile(folder / "things.zip", "w") as things:
        for name in ("noise.flac", "film.mp4"):
            things.write(folder / name, name)
        things.writestr("numbers.txt", "\n".join(map(str, range(200_000))), zipfile.ZIP_DEFLATED)
    return folder
