"""Bytes flipped in the cache of a mounted home: `streamfs verify` names what is damaged, and none is ever served."""

from __future__ import annotations

import random
from pathlib import Path

from tests.fakes import flip_byte
from tests.mount.mounted import Mounted, checked
from tests.mount.origin import ScriptedOrigin

MIB = 1 << 20
BLOCK = 64 * 1024
OPTIONS = ("--spill-threshold", "0", "--memory", "32MiB")
ROUNDS = 4
FLIPS = 6  # in each file and round; some meet in one block


def test_no_flipped_byte_is_read_through_the_mount_and_verify_names_the_stream(
    unmounted: Mounted, origin: ScriptedOrigin, tmp_path: Path
) -> None:
    fs, chance = unmounted, random.Random("damage")
    document = origin.add("url", 2 * MIB + 7)
    (tmp_path / "data").write_bytes(content := random.Random(1).randbytes(2 * MIB + 9))
    fs.mount(*OPTIONS)
    url, command = fs.add("url", document.url), fs.add("command", "--", "cat", tmp_path / "data")
    for name in ("url", "command"):
        fs.run("persist", name)
        fs.wait_for_state(name, "complete")
    whole = {path: path.read_bytes() for path in (fs.home / "cache").iterdir()}
    files = {name: Path(fs.xattr(name, "persisted_path") or "") for name in ("url", "command")}
    told = 0
    for number in range(ROUNDS):
        fs.umount()
        for path, data in whole.items():
            path.write_bytes(data)
        damaged = "url" if number % 2 else "command"
        path = files[damaged] if number < 2 else files[damaged].with_name(files[damaged].name + ".index")
        places = [chance.randrange(path.stat().st_size) for _ in range(FLIPS)]
        for place in places:
            flip_byte(path, place)
        if number < 2:
            verify(fs, damaged, places)
        fs.mount(*OPTIONS)
        if number < 2:
            told += verify(fs, damaged, places)
        assert checked(["cat", url]) == document.bytes()
        for start in range(0, len(content), BLOCK):
            with command.open("rb", buffering=0) as file:
                file.seek(start)
                try:
                    found = file.read(BLOCK)
                except OSError:
                    assert damaged == "command", "the URL alone was damaged"
                else:
                    assert found == content[start : start + len(found)]
        if damaged == "url":
            fs.wait_for_state("url", "complete")  # mended
            assert files["url"].read_bytes() == document.bytes()
    assert told == 2


def verify(fs: Mounted, damaged: str, places: list[int]) -> bool:
    """The stream alone is named, with the first of the places."""
    done = fs.run("verify", check=False)
    assert done.returncode == 1
    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert [name for name, line in lines.items() if line.startswith("DAMAGED")] == [damaged], done.stdout
    start = min(places) - min(places) % BLOCK
    assert f"at bytes {start}-" in lines[damaged]
    return True
