"""When a command runs, and that nothing of it is left afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mount.mounted import Mounted, is_alive, wait_for

_FAMILY = 'echo $$ >> "$0"; sleep 1000 & echo $! >> "$0"; while echo line; do :; done'


def pids(family: Path) -> list[int]:
    return [int(line) for line in family.read_text().split()] if family.exists() else []


@pytest.mark.parametrize("how", ["evict", "rm", "rm in the mount", "umount"])
def test_a_command_runs_from_the_first_read_until_its_stream_goes_and_its_children_go_with_it(
    how: str, fs: Mounted, tmp_path: Path
) -> None:
    family = tmp_path / "family"
    path = fs.add("family", "--", "sh", "-c", _FAMILY, family)
    path.stat()
    fs.run("status", "family")
    fs.xattr("family", "state")
    with path.open("rb", buffering=0) as file:
        assert not family.exists(), "it runs although nobody has read"
        assert file.read(5) == b"line\n"
        fs.wait_for_state("family", "paused")  # nobody reads on
    running = wait_for(lambda: pids(family) if len(pids(family)) == 2 else [], "both have started")
    assert all(map(is_alive, running)), "paused is not ended"
    if how == "rm in the mount":
        path.unlink()
    elif how == "umount":
        fs.umount()
    else:
        fs.run(how, "family")
    wait_for(lambda: not any(map(is_alive, running)), "all of the session is gone", within=12)
    assert pids(family) == running


def test_each_run_is_a_generation_of_its_own(fs: Mounted, tmp_path: Path) -> None:
    count = tmp_path / "count"
    path = fs.add("runs", "--", "sh", "-c", 'echo run >> "$0"; wc -l < "$0"', count)
    seen = []
    for _ in range(3):
        with path.open("rb") as file:
            seen.append((int(file.read()), int(fs.xattr("runs", "generation") or 0)))
        with path.open("rb") as again:
            assert int(again.read()) == seen[-1][0], "a run that is there is not run again"
        fs.run("evict", "runs")
    assert [run for run, _ in seen] == [1, 2, 3]
    generations = [generation for _, generation in seen]
    assert generations == sorted(set(generations))


def test_an_eager_command_starts_with_the_mount(unmounted: Mounted, tmp_path: Path) -> None:
    family = tmp_path / "family"
    unmounted.run("add", "eager", "--eager", "--", "sh", "-c", _FAMILY, family)
    assert not family.exists()
    unmounted.mount()
    running = wait_for(lambda: pids(family) if len(pids(family)) == 2 else [], "it has started")
    unmounted.umount()
    wait_for(lambda: not any(map(is_alive, running)), "it ends with the mount", within=12)
