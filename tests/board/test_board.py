"""The board: what its writer shows is what readers find, whole, whatever becomes of the writer."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import streamfs
from streamfs.board import Board, writer
from streamfs.board.heap import Heap
from streamfs.board.writer import HISTORY, MOST_EVENT_BYTES, MOST_EVENTS, BoardWriter, EventLog
from streamfs.errors import Damaged, InvalidRequest, NotFound, Unreachable
from tests.fakes import Crew, flip_byte, poll_until


def row(name: str, **more: object) -> dict[str, object]:
    return {"name": name, **more}


def heap_of(board: BoardWriter) -> Heap:
    return board._heap


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "board"


class BoardAgainstDict(RuleBasedStateMachine):
    """Streams come, change and go, events are told and acknowledged; a reader that stays finds what a dict holds."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "board"
        self.writer = BoardWriter(self.path, {"mountpoint": "/m"})
        self.reader = Board(self.path)
        self.rows: dict[int, dict[str, object]] = {}
        self.events = [0]
        self.acknowledged: dict[str, int] = {}

    @rule(number=st.integers(1, 300), size=st.integers(0, 5000), text=st.text(max_size=20))
    def put(self, number: int, size: int, text: str) -> None:
        self.rows[number] = row(f"{text}/{number}", filler="x" * size)
        assert self.writer.put(number, self.rows[number])

    @rule(number=st.integers(1, 300))
    def drop(self, number: int) -> None:
        self.rows.pop(number, None)
        self.writer.drop(number)

    @rule(first=st.integers(1000, 2000), count=st.integers(1, 200))
    def many(self, first: int, count: int) -> None:
        for number in range(first, first + count):
            self.rows[number] = row(f"many/{number}")
            self.writer.put(number, self.rows[number])

    @rule(size=st.integers(0, 3000))
    def log(self, size: int) -> None:
        seq = self.writer.log({"event": "e", "filler": "x" * size})
        self.events.append(seq)

    @rule(listener=st.sampled_from("abc"), back=st.integers(0, 20))
    def acknowledge(self, listener: str, back: int) -> None:
        seq = self.events[max(0, len(self.events) - 1 - back)]
        if seq:
            self.writer.acknowledge(listener, seq)
            self.acknowledged[listener] = max(seq, self.acknowledged.get(listener, 0))

    @rule()
    def restart(self) -> None:
        """Another writer takes over, as after a kill: from what the last one left."""
        log = EventLog.of_board(self.path)
        heap_of(self.writer)._release()
        self.writer = BoardWriter(self.path, {"mountpoint": "/m"}, log)
        for number, shown in self.rows.items():
            self.writer.put(number, shown)
        assert self.reader.refresh()

    @invariant()
    def the_reader_finds_it(self) -> None:
        if not hasattr(self, "writer"):
            return
        found = {shown["name"]: shown for shown in self.reader.streams()}
        assert found == {shown["name"]: shown for shown in self.rows.values()}
        assert [event["seq"] for event in self.reader.events()] == self.events[1:]
        assert self.reader.listeners == self.acknowledged

    def teardown(self) -> None:
        if hasattr(self, "writer"):
            heap_of(self.writer).check()
            self.reader.close()
            self.writer.close()
            self.folder.cleanup()


BoardAgainstDict.TestCase.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)
TestBoardAgainstDict = BoardAgainstDict.TestCase


def test_a_board_says_who_writes_it(path: Path) -> None:
    with BoardWriter(path, {"mountpoint": "/m"}) as board, Board(path) as reader:
        assert (reader.pid, reader.live, reader.whole) == (os.getpid(), True, False)
        assert reader.facts == {"mountpoint": "/m"}
        board.complete()
        assert reader.whole
        assert abs(reader.written - time.time()) < 60
        before = reader.changes
        board.stamp()
        assert reader.changes == before + 1
        board.close()
        assert not reader.live
    assert path.stat().st_mode & 0o777 == 0o600


def test_names_are_asked_for_in_any_order(path: Path) -> None:
    with BoardWriter(path, {}) as board, Board(path) as reader:
        for number, name in enumerate(("b", "a", "ä", "not utf-8: \udcff")):
            board.put(number, row(name))
        assert [shown["name"] for shown in reader.streams()] == ["a", "b", "not utf-8: \udcff", "ä"]
        assert [shown["name"] for shown in reader.streams(("b", "a"))] == ["b", "a"]
        assert reader.stream("ä") == row("ä")
        with pytest.raises(NotFound):
            reader.streams(("a", "c"))


def test_the_library_opens_the_board_of_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("STREAMFS_HOME", str(tmp_path))
    with BoardWriter(tmp_path / "run" / "board", {}) as board:
        board.put(1, row("a"))
        for found in (streamfs.Board(), streamfs.Board(tmp_path), streamfs.Board(tmp_path / "run" / "board")):
            with found:
                assert found.stream("a") == row("a")


def test_what_is_no_board_is_refused_in_words(path: Path) -> None:
    with pytest.raises(Unreachable, match="no board at"):
        Board(path)
    for content in (b"", b"x" * 10_000):
        path.write_bytes(content)
        with pytest.raises(Damaged, match="is no board"):
            Board(path)
    assert EventLog.of_board(path) == EventLog()


def test_a_reader_follows_a_board_that_grows(path: Path) -> None:
    with BoardWriter(path, {}) as board, Board(path) as reader:
        for number in range(2000):
            board.put(number, row(f"{number:05}", filler="y" * 3000))
        assert len(reader.streams()) == 2000
        assert path.stat().st_size > 6_000_000


def test_changing_the_same_streams_for_long_does_not_grow_the_board(path: Path) -> None:
    chance = random.Random(3)
    with BoardWriter(path, {}) as board:
        for _ in range(2):
            for _ in range(20_000):
                board.put(chance.randrange(50), row("name", filler="z" * chance.randrange(2000)))
            size = path.stat().st_size
        assert path.stat().st_size == size < 2_000_000
        heap_of(board).check()


def test_a_board_without_room_says_that_it_is_not_whole_until_it_is(path: Path) -> None:
    with BoardWriter(path, {}, limit=400_000) as board, Board(path) as reader:
        board.complete()
        assert board.put(1, row("small"))
        assert not board.put(2, row("large", filler="x" * 400_000))
        assert not reader.whole
        assert [shown["name"] for shown in reader.streams()] == ["small"]
        assert board.put(2, row("large", filler="x" * 1000))
        assert reader.whole
        assert len(reader.streams()) == 2


def test_damage_is_never_read_as_a_stream(path: Path) -> None:
    with BoardWriter(path, {}) as board, Board(path) as reader:
        board.put(1, row("victim", filler="v" * 100))
        at = path.read_bytes().index(b"vvvv")
        flip_byte(path, at)
        with pytest.raises(Damaged):
            reader.streams()


WRITER = """
import os, random, sys
from streamfs.board.writer import BoardWriter, EventLog
from pathlib import Path
path = Path(sys.argv[1])
chance = random.Random(int(sys.argv[2]))
board = BoardWriter(path, {"n": 1}, EventLog.of_board(path))
for number in range(100):
    board.put(number, {"name": str(number), "filler": "", "length": 0})
board.complete()
print("ready", flush=True)
while True:
    number, length = chance.randrange(100), chance.randrange(3000)
    if number >= 90 and chance.random() < 0.5:
        board.drop(number)
    board.put(number, {"name": str(number), "filler": chr(97 + number % 26) * length, "length": length})
    if chance.random() < 0.2:
        seq = board.log({"event": "e", "filler": "f" * length, "length": length})
        board.acknowledge("slow", seq - seq % 50)
"""


def consistent(board: Board) -> int:
    """Every row and event says of itself what it must; gives how many were looked at."""
    rows, events = board.streams(), board.events()
    names = {shown["name"] for shown in rows}
    assert {str(number) for number in range(90)} <= names, "a stream that stayed is missing"
    assert len(names) == len(rows)
    for shown in rows:
        assert shown["filler"] == chr(97 + int(shown["name"]) % 26) * shown["length"]
    numbers = [event["seq"] for event in events]
    assert all(event["filler"] == "f" * event["length"] for event in events)
    assert numbers == sorted(set(numbers))
    return len(rows)


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_writer_leaves_what_readers_read_rightly(path: Path, seed: int) -> None:
    """Readers read while the writer writes; it is killed at any moment, and what it left is whole. The next one goes on
    with its events."""
    following = 0
    for life in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(seed * 100 + life)], stdout=subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"

            def read_on(running: subprocess.Popen[bytes] = process) -> int:
                looks = 0
                with Board(path) as board:
                    while running.poll() is None:
                        looks += consistent(board) > 0
                return looks

            with Crew() as crew:
                crew.start(read_on)
                crew.start(read_on)
                time.sleep(random.Random(seed * 7 + life).uniform(0.1, 0.4))
                process.send_signal(signal.SIGKILL)
                process.wait(30)
                assert all(looks > 0 for looks in crew.join())
        finally:
            process.kill()
            process.wait(30)
            process.stdout.close()
        with Board(path) as board:
            consistent(board)
            assert not board.live
            first, after = board.events_held
            assert first <= after
            assert after >= following
            assert [event["seq"] for event in board.events()] == list(range(first, after))
            following = after


def test_a_reader_reads_while_the_writer_is_stopped_at_any_moment(path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), "1"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with Board(path) as board:
            for _ in range(200):
                process.send_signal(signal.SIGSTOP)
                os.waitpid(process.pid, os.WUNTRACED)
                consistent(board)
                assert board.live
                process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()


# Events


def numbers(events: list[dict[str, object]]) -> list[object]:
    return [event["n"] for event in events]


def test_two_listeners_get_every_event_once(path: Path) -> None:
    with BoardWriter(path, {}) as board, Board(path) as reader:
        got: dict[str, list[object]] = {"a": [], "b": []}
        first = reader.events_held[1]
        for name in got:
            board.acknowledge(name, first - 1)
        chance = random.Random(5)
        for n in range(3000):
            board.log({"n": n, "filler": "x" * chance.randrange(100)})
            for name, events in got.items():
                if chance.random() < 0.05:
                    new = reader.events(after=reader.listeners[name])
                    events += numbers(new)
                    board.acknowledge(name, new[-1]["seq"]) if new else None
        for name, events in got.items():
            events += numbers(reader.events(after=reader.listeners[name]))
        assert got["a"] == got["b"] == list(range(3000))


def test_what_all_have_acknowledged_is_recycled(path: Path) -> None:
    with BoardWriter(path, {}) as board, Board(path) as reader:
        begin = reader.events_held[1]
        board.acknowledge("a", begin - 1)
        board.acknowledge("b", begin - 1)
        for n in range(2 * HISTORY):
            last = board.log({"n": n})
        assert len(reader.events()) == 2 * HISTORY
        board.acknowledge("a", last)
        assert len(reader.events()) == 2 * HISTORY
        board.acknowledge("b", last)
        assert numbers(reader.events()) == list(range(HISTORY, 2 * HISTORY))


@pytest.mark.parametrize("size", [1, 5000])
def test_a_dead_listener_cannot_make_the_board_grow_past_its_cap(path: Path, size: int) -> None:
    with BoardWriter(path, {}) as board, Board(path) as reader:
        begin = reader.events_held[1]
        board.acknowledge("dead", begin - 1)
        for n in range(MOST_EVENTS + 5000 if size == 1 else 3000):
            board.log({"n": n, "filler": "x" * size})
        first, following = reader.events_held
        assert first > begin, "it has missed some"
        assert following - first <= MOST_EVENTS
        assert reader.listeners == {"dead": begin - 1}
        assert sum(len(json.dumps(event)) for event in reader.events()) <= MOST_EVENT_BYTES
        assert path.stat().st_size < 4 * MOST_EVENT_BYTES
        heap_of(board).check()


def test_the_log_goes_on_over_restarts_and_over_a_board_that_is_lost(path: Path, tmp_path: Path) -> None:
    with BoardWriter(path, {}) as board:
        last = [board.log({"n": n}) for n in range(5)][-1]
        board.acknowledge("a", last - 2)
        board.event_log.save(tmp_path / "events.json")
    for log in (EventLog.of_board(path), EventLog.of_file(tmp_path / "events.json")):
        with BoardWriter(path, {}, log) as board, Board(path) as reader:
            assert reader.listeners == {"a": last - 2}
            assert numbers(reader.events(after=last - 2)) == [3, 4]
            assert board.log({"n": 5}) == last + 1
    assert EventLog.of_file(tmp_path / "none") == EventLog()


def test_a_number_never_comes_again_though_the_log_is_lost(path: Path) -> None:
    with BoardWriter(path, {}) as board:
        first = board.log({})
    poll_until(lambda: time.time() * 1000 > first + 1)
    with BoardWriter(path, {}) as board:
        assert board.log({}) > first


def test_listeners_can_be_forgotten_and_acknowledge_only_what_was(path: Path) -> None:
    with BoardWriter(path, {}) as board, Board(path) as reader:
        last = board.log({})
        board.acknowledge("a", last)
        board.acknowledge("a", last - 1)
        assert reader.listeners == {"a": last}
        with pytest.raises(InvalidRequest):
            board.acknowledge("a", last + 1)
        board.forget("a")
        with pytest.raises(NotFound):
            board.forget("a")
        assert reader.listeners == {}


def test_there_are_not_too_many_listeners(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MOST_LISTENERS", 2)
    with BoardWriter(path, {}) as board:
        last = board.log({})
        for name in ("a", "b", "a"):
            board.acknowledge(name, last)
        with pytest.raises(InvalidRequest, match="2 listeners already"):
            board.acknowledge("c", last)


def test_a_refresh_that_fails_keeps_no_file_open(path: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    for wrong in (b"", bytes(8192)):
        with BoardWriter(path, {}), Board(path) as reader:
            other = path.with_name("other")
            other.write_bytes(wrong)
            other.rename(path)
            with pytest.raises(Damaged):
                reader.refresh()
    assert descriptors() == before
