"""The board of a real daemon: looked at while the daemon is stopped, its events over restarts of everybody."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamfs import Board
from streamfs.errors import Unreachable
from tests.fakes import named_bytes
from tests.mount.mounted import CLI, Mounted, Tap, end_within, wait_for
from tests.mount.origin import ScriptedOrigin

MIB = 1 << 20
Event = dict[str, Any]


@contextlib.contextmanager
def stopped(fs: Mounted) -> Iterator[None]:
    """The daemon does not run, as far as anybody can tell, for the block's time."""
    os.kill(fs.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(fs.pid, signal.SIGCONT)


def events(fs: Mounted, *options: str) -> list[Event]:
    return [json.loads(line) for line in fs.run("events", "--json", *options).stdout.splitlines()]


def told(found: list[Event], stream: str | None = None) -> list[str]:
    return [event["event"] for event in found if stream is None or event.get("stream") == stream]


def file_of(folder: Path, name: str, size: int) -> str:
    path = folder / name
    path.write_bytes(named_bytes(name, 0, size))
    return path.as_uri()


def row_when(fs: Mounted, name: str, **wanted: Any) -> dict[str, Any]:
    """The row of the board once it says so."""
    with Board(fs.home) as board:

        def look() -> dict[str, Any] | None:
            row = board.stream(name)
            return row if all(row.get(key) == value for key, value in wanted.items()) else None

        found = wait_for(look, f"{name} shows {wanted}")
        assert found is not None
        return found


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["ls", "-l"], ["status", "a"], ["ls", "--json"]])
def test_looking_works_while_the_daemon_is_stopped(fs: Mounted, tmp_path: Path, command: list[str]) -> None:
    """In about a tenth of a second on a free machine. What is held here is the processor time of the whole program: on
    a busy one nobody can promise more."""
    (fs.add("a", file_of(tmp_path, "a", MIB))).read_bytes()
    row_when(fs, "a", state="complete", readers=0)
    with stopped(fs):
        costs = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            shown = fs.run(*command, within=20).stdout
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            assert "complete" in shown
            assert "no daemon" not in shown
    assert min(costs) < 0.4, costs


def test_a_change_shows_as_soon_as_its_command_has_ended(fs: Mounted, tmp_path: Path) -> None:
    fs.add("a", file_of(tmp_path, "a", 10), "--no-probe")
    with Board(fs.home) as board:
        assert board.whole
        assert [row["name"] for row in board.streams()] == ["a"]
        fs.run("mv", "a", "b")
        fs.run("add", "c", "--", "true")
        assert [row["name"] for row in board.streams()] == ["b", "c"]
        fs.run("rm", "b")
        assert [row["name"] for row in board.streams()] == ["c"]
        fs.run("persist", "c")
        assert board.stream("c")["persist"]


def test_a_row_tells_where_bytes_rest_and_what_came(fs: Mounted, tap: Tap) -> None:
    path = fs.add("live", *tap.argv)
    tap.write(b"abcdef")
    with open(path, "rb", buffering=0) as file:
        assert file.read(3) == b"abc"
        row = row_when(fs, "live", buffered=6)
        assert row["map"] == {"memory": [[0, 6]], "disk": [], "joined": False}
        assert (row["received"], row["memory"], row["size"]) == (6, 6, None)
        tap.close()
        row_when(fs, "live", state="complete", size=6)
    row_when(fs, "live", readers=0, positions=[])


def test_positions_and_rates_follow_a_reader(fs: Mounted, tap: Tap) -> None:
    path = fs.add("live", *tap.argv)
    with open(path, "rb", buffering=0) as file:
        tap.write(b"x" * 5000)
        assert len(os.read(file.fileno(), 4000)) > 0
        row = row_when(fs, "live", readers=1)
        assert [place["pid"] for place in row["positions"]] == [os.getpid()]
        row_when(fs, "live", positions=[{**row["positions"][0], "at": file.tell()}])
        tap.write(b"x" * 5000)
        with Board(fs.home) as board:
            wait_for(lambda: board.stream("live")["rate"] > 0, "a rate")
            wait_for(lambda: board.stream("live")["rate"] == 0, "it goes down when nothing comes")
        tap.close()


def test_memory_and_disk_are_told_apart(fs: Mounted, tmp_path: Path) -> None:
    path = fs.add("big", file_of(tmp_path, "big", 12 * MIB))
    path.read_bytes()
    fs.run("persist", "big")
    row = row_when(fs, "big", state="complete", memory=0)
    assert row["map"] == {"memory": [], "disk": [[0, 12 * MIB]], "joined": False}
    assert row["persisted_path"] == str(fs.data_files[0])


def test_a_daemon_that_starts_makes_the_board_from_what_is_there(unmounted: Mounted, tmp_path: Path) -> None:
    unmounted.run("add", "a", file_of(tmp_path, "a", MIB))
    unmounted.run("persist", "a")
    with pytest.raises(Unreachable):
        Board(unmounted.home)
    unmounted.mount()
    row_when(unmounted, "a", state="complete", size=MIB, buffered=MIB, persist=True)
    unmounted.kill()
    with Board(unmounted.home) as board:
        assert not board.live
        unmounted.run("umount", unmounted.mountpoint)
        (unmounted.home / "run" / "board").write_bytes(b"\xff" * 100_000)  # whatever became of it
        unmounted.mount()
        assert board.refresh()
        assert board.live
    row_when(unmounted, "a", state="complete", size=MIB, buffered=MIB)


def test_without_a_daemon_the_old_board_is_not_believed(fs: Mounted, tmp_path: Path) -> None:
    fs.add("a", file_of(tmp_path, "a", 10))
    fs.umount()
    fs.run("add", "b", "--", "true")
    assert fs.run("ls").stdout.split() == ["a", "b"]
    assert "no daemon runs" in fs.run("status").stdout


# Events


def test_the_life_of_a_stream_is_told(fs: Mounted, tmp_path: Path) -> None:
    path = fs.add("a", file_of(tmp_path, "a", MIB))
    subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True, timeout=30)
    row_when(fs, "a", state="complete", readers=0)
    fs.run("persist", "a")
    fs.wait_for_state("a", "complete")
    wait_for(lambda: "persisted" in told(events(fs)), "persisted")
    fs.run("unpersist", "a")
    fs.run("mv", "a", "b")
    fs.run("evict", "b")
    fs.run("rm", "b")
    found = events(fs)
    assert told(found, "a") == ["registered", "opened", "fetching", "complete", "closed", "persisted"] or told(
        found, "a"
    ) == ["registered", "opened", "fetching", "closed", "complete", "persisted"]
    assert told(found, "b") == ["renamed", "evicted", "removed"]
    opened = next(event for event in found if event["event"] == "opened")
    assert opened["program"] == "cat"
    assert opened["pid"] > 0
    assert [event["seq"] for event in found] == list(range(found[0]["seq"], found[0]["seq"] + len(found)))
    assert all(abs(event["time"] - time.time()) < 600 for event in found)


def test_failures_and_stalls_are_told(fs: Mounted, origin: ScriptedOrigin, tap: Tap) -> None:
    failing = fs.add("failing", "--", "sh", "-c", "echo x; exit 3")
    with pytest.raises(OSError):
        failing.read_bytes()
    stalling = fs.add("stalling", "--stall-timeout", "0.2s", *tap.argv)
    with pytest.raises(OSError):
        stalling.read_bytes()
    wait_for(lambda: "stalled" in told(events(fs), "stalling"), "stalled")
    failed = next(event for event in events(fs) if event["event"] == "failed")
    assert failed["stream"] == "failing"
    assert "status 3" in failed["error"]


def test_listeners_get_each_event_once_over_their_restarts_and_the_daemons(fs: Mounted) -> None:
    got: dict[str, list[Event]] = {"a": [], "b": []}
    for name in got:
        got[name] += events(fs, "--listener", name)
    for number in range(12):
        fs.add(f"s{number}", "--", "true")
        if number % 3 == 0:
            got["a"] += events(fs, "--listener", "a")
        if number == 4:
            fs.umount()
            fs.mount()
        if number == 8:
            fs.kill()
            fs.run("umount", fs.mountpoint)
            fs.mount()
    for name in got:
        got[name] += events(fs, "--listener", name)
        assert [e["stream"] for e in got[name] if e["event"] == "registered"] == [f"s{n}" for n in range(12)]
        numbers = [event["seq"] for event in got[name]]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_the_log_outlives_the_run_time_directory(fs: Mounted) -> None:
    fs.add("a", "--", "true")
    assert told(events(fs, "--listener", "x")) == ["registered"]
    fs.add("b", "--", "true")
    fs.umount()
    (fs.home / "run" / "board").unlink()
    fs.mount()
    assert [event["stream"] for event in events(fs, "--listener", "x")] == ["b"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_follower_that_is_ended_goes_on_where_it_was(fs: Mounted, number: int) -> None:
    seen: list[str] = []
    for round_ in range(3):
        follower = fs.start([*CLI, "events", "--follow", "--listener", "x", "--json"])
        assert follower.stdout is not None
        for name in ("a", "b"):
            fs.add(f"{name}{round_}", "--", "true")
            seen.append(json.loads(follower.stdout.readline())["stream"])
        fs.add(f"c{round_}", "--", "true")  # may come in time or not, but never twice
        follower.send_signal(number)
        rest = follower.stdout.read()
        seen += [json.loads(line)["stream"] for line in rest.splitlines()]
        assert end_within(follower, 30) in (130, 128 + number)
        if len(seen) % 3:
            found = [event["stream"] for event in events(fs, "--listener", "x")]
            assert found == [f"c{round_}"]
            seen += found
    assert seen == [f"{name}{round_}" for round_ in range(3) for name in "abc"]


def test_a_listener_that_was_away_for_long_is_told_what_it_missed(fs: Mounted, tmp_path: Path) -> None:
    assert events(fs, "--listener", "dead") == []
    entries = [{"name": f"many/{number}", "command": ["true"]} for number in range(20_000)]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    fs.run("import", "--allow-commands", tmp_path / "list.json", within=120)
    missed, *rest = events(fs, "--listener", "dead")
    assert missed["event"] == "missed"
    assert "seq" not in missed
    assert missed["count"] + len(rest) == 20_000
    assert rest[-1]["stream"] == "many/19999"
    assert events(fs, "--listener", "dead") == []


def test_two_at_a_time_under_one_name_are_refused(fs: Mounted) -> None:
    follower = fs.start([*CLI, "events", "--follow", "--listener", "x", "--json"])
    fs.add("a", "--", "true")
    assert follower.stdout is not None
    assert follower.stdout.readline()
    assert "another 'streamfs events' listens as 'x'" in fs.refused("events", "--listener", "x")
    follower.terminate()
    end_within(follower, 30)


def test_a_listener_needs_a_daemon_and_can_be_forgotten(fs: Mounted) -> None:
    events(fs, "--listener", "x")
    fs.run("events", "--forget", "x")
    assert "no listener 'x'" in fs.refused("events", "--forget", "x")
    fs.refused("events", "--forget", "x", "--follow", code=2)
    fs.refused("events", "--listener", "", code=2)
    fs.umount()
    assert "no daemon runs" in fs.refused("events", "--listener", "x")
    assert fs.run("events").returncode == 0


def test_events_are_lines_for_people_too(fs: Mounted, tmp_path: Path) -> None:
    path = fs.add("a", file_of(tmp_path, "a", 10))
    subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True, timeout=30)
    wait_for(lambda: "closed" in told(events(fs)), "closed")
    lines = fs.run("events").stdout.splitlines()
    assert any("registered  a" in line for line in lines)
    assert any("opened      a  by cat (" in line for line in lines)
