"""The moment a stream says `complete`, the power may go."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from streamfs.engine.recording import Recording
from tests.crash.powercut import Disk
from tests.sourcefakes import KIB, MIB, Origin, a_filesystem, spec_of

STATES = 40  # of the disk, looked at for each stream that says it is complete


@pytest.mark.parametrize("kind", ["ranged", "one-way", "command"])
async def test_when_it_says_complete_a_power_cut_takes_nothing_of_it(
    kind: str, disks: list[Disk], tmp_path: Path
) -> None:
    origin = Origin("x", size=3 * MIB + 5, ranged=kind == "ranged", told=kind != "command", named=kind == "ranged")
    cache, after = tmp_path / "cache", tmp_path / "after"
    cache.mkdir(mode=0o700)
    after.mkdir()
    disks.append(Disk(cache))
    looked = lost = 0
    async with a_filesystem(tmp_path, {"x": origin}, spill_threshold=256 * KIB) as fs:
        await fs.add([spec_of("x", command=kind == "command")])
        await fs.persist("x", True)
        with trio.fail_after(30):
            while (state := next(iter(fs.streams()))["state"]) != "complete":
                lost += not is_whole(disks[0].states(random.Random(looked), 1)[0], after, origin)
                looked += 1
                await trio.lowlevel.checkpoint()
        assert state == "complete"
        for cut in disks[0].states(random.Random(kind), STATES):
            assert is_whole(cut, after, origin)
        disks.clear()
    assert lost > looked // 2 > 0, "hardly a look came before it was durable"


def is_whole(state: dict[str, bytes], folder: Path, origin: Origin) -> bool:
    """Whether the state of the disk holds the durable recording of all of it, as a restarted daemon finds it."""
    for path in folder.iterdir():
        path.unlink()
    for name, data in state.items():
        (folder / name).write_bytes(data)
    found = Recording.load(folder / "2-1.data")
    return found is not None and found.durable and (folder / "2-1.data").read_bytes() == origin.content()
