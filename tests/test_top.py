"""The page of `streamfs top`: its bars, its columns, and what its keys do, driven by textual's pilot."""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual._compositor import LayoutUpdate
from textual.containers import VerticalScroll
from textual.pilot import Pilot
from textual.widgets import Input, Static
from textual.widgets._footer import FooterKey

from streamfs.cli import maps
from streamfs.cli.app import main
from streamfs.cli.page import COLUMNS, Page, Question, Streams, layout, ordered
from streamfs.cli.watching import Glance
from streamfs.errors import NotPermitted
from streamfs.home import Home
from tests.test_control import Running

MIB = 1 << 20


def row(number: int, name: str, **more: Any) -> dict[str, Any]:
    base = {"id": number, "name": name, "source": f"http://h/{name}", "state": "idle", "size": None, "buffered": 0}
    return {**base, "readers": 0, "persist": False, "error": None, **more}


def mapped(size: int | None, memory: list[list[int]], disk: list[list[int]], **more: Any) -> dict[str, Any]:
    return row(1, "a", size=size, map={"memory": memory, "disk": disk, "joined": False}, **more)


# ── bars ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_bar_shows_memory_disk_parts_and_what_is_missing() -> None:
    found = maps.cells(mapped(100, [[0, 20]], [[20, 35], [90, 100]]), 10)
    assert found == ["memory"] * 2 + ["disk", "part"] + ["missing"] * 5 + ["disk"]


def test_one_byte_of_many_shows_and_is_not_all() -> None:
    assert maps.cells(mapped(1 << 40, [[5, 6]], []), 3) == ["part", "missing", "missing"]
    assert maps.cells(mapped(1 << 40, [[0, (1 << 40) - 1]], []), 3) == ["memory", "memory", "part"]


def test_a_bar_of_an_unknown_length_ends_where_the_bytes_end_and_begins_where_they_begin() -> None:
    live = mapped(None, [[1000, 2000]], [], positions=[{"at": 1500, "pid": 1, "program": "x"}], fetches=[{"at": 2000}])
    assert maps.extent(live) == (1000, 2000)
    assert maps.cells(live, 4) == ["memory"] * 4
    assert maps.marks(live, maps.positions(live), 4) == {2}
    assert maps.marks(live, maps.fetching(live), 4) == {3}


def test_bars_of_nothing() -> None:
    assert maps.cells(row(1, "a"), 3) == ["missing"] * 3
    assert maps.cells(mapped(0, [], [], state="complete"), 2) == ["missing"] * 2
    assert maps.cells(row(1, "a", state="complete", size=9), 2) == ["disk"] * 2
    assert maps.marks(mapped(0, [], []), [0], 5) == set()


@given(
    size=st.integers(1, 200),
    memory=st.sets(st.integers(0, 199)),
    disk=st.sets(st.integers(0, 199)),
    width=st.integers(1, 250),
)
def test_a_bar_says_of_every_cell_what_its_bytes_are(size: int, memory: set[int], disk: set[int], width: int) -> None:
    def runs(places: set[int]) -> list[list[int]]:
        return [[at, at + 1] for at in sorted(places) if at < size]

    here = {at for at in memory | disk if at < size}
    found = maps.cells(mapped(size, runs(memory), runs(disk - memory)), width)
    for cell in range(width):
        touched = set(range(cell * size // width, -(-(cell + 1) * size // width)))
        if touched <= here:
            assert found[cell] in ("memory", "disk")
        elif not touched & here:
            assert found[cell] == "missing"
        else:
            assert found[cell] == "part"


@given(width=st.integers(1, 300), longest=st.integers(1, 255))
def test_columns_fill_the_width_and_never_more(width: int, longest: int) -> None:
    found = layout(width, longest)
    assert sum(found.values()) + len(found) - 1 == width
    assert all(cells > 0 for cells in found.values())
    assert list(found) == [key for key in COLUMNS if key in found]
    assert "name" in found and (width < 17 or "map" in found)


def test_orders() -> None:
    rows = [row(1, "a", rate=5, size=7), row(2, "b"), row(3, "c", rate=9, size=1)]
    names = {
        (order, backwards): "".join(one["name"] for one in ordered(rows, order, backwards))
        for order in ("name", "rate", "size")
        for backwards in (False, True)
    }
    assert names == {
        ("name", False): "abc",
        ("name", True): "cba",
        ("rate", False): "cab",
        ("rate", True): "bac",
        ("size", False): "acb",
        ("size", True): "bca",
    }


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Scripted:
    """In the place of the board: what the test shows."""

    def __init__(self, *rows: dict[str, Any]) -> None:
        self._next: Glance | None = None
        self.closed = threading.Event()
        self.show(*rows)

    def show(self, *rows: dict[str, Any]) -> None:
        self._next = Glance(list(rows), {"memory": 256 * MIB, "mountpoint": "/mnt"}, True, None)

    def end(self) -> None:
        self._next = Glance([], {}, False, "no daemon runs")

    def glance(self) -> Glance | None:
        found, self._next = self._next, None
        return found

    def close(self) -> None:
        self.closed.set()


class Daemon:
    """Notes what it is asked for."""

    def __init__(self, home: Home) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None
        self.running = Running(home, {name: self._handler(name) for name in ("persist", "evict", "remove")})

    def _handler(self, name: str) -> Callable[[dict[str, Any]], Awaitable[None]]:
        async def handler(params: dict[str, Any]) -> None:
            self.asked.append((name, params))
            if self.error is not None:
                raise self.error

        return handler


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("STREAMFS_HOME", str(tmp_path / "home"))
    return Home.open()


@pytest.fixture
def daemon(home: Home) -> Iterator[Daemon]:
    made = Daemon(home)
    with made.running:
        yield made


def on_page(
    home: Home, watch: Scripted, act: Callable[[Pilot[None], Page], Awaitable[None]], size: tuple[int, int] = (120, 30)
) -> Page:
    """Run the page with textual's own event loop while `act` drives it."""
    page = Page(home, watch)

    async def run() -> None:
        async with page.run_test(size=size) as pilot:
            await act(pilot, page)

    asyncio.run(run())
    assert watch.closed.wait(10)
    return page


async def until(pilot: Pilot[None], condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await pilot.pause(0.01)
        await pilot.pause()


def listed(page: Page) -> list[str]:
    return [one["name"] for one in page.query_one(Streams).rows]


def lines(page: Page) -> list[str]:
    """The list as it is drawn."""
    streams = page.query_one(Streams)
    return [streams.render_line(y).text for y in range(streams.size.height)]


def text_of(page: Page, selector: str) -> str:
    return str(page.query_one(selector, Static).render())


def test_every_stream_has_a_line_with_its_bar_and_its_rates(home: Home) -> None:
    reader = {"at": 50, "pid": 4711, "program": "mpv"}
    fetch = {"at": 60, "until": 100, "ahead": 8 * MIB, "resting": True}
    live = mapped(100, [[0, 60]], [], state="live", rate=2048, read_rate=1024, positions=[reader], fetches=[fetch])
    live |= {"name": "film", "buffered": 60, "readers": 1, "memory": 60}
    watch = Scripted(live, row(2, "lost", state="failed", error="the server says 404", persist=True))

    async def act(pilot: Pilot[None], page: Page) -> None:
        await until(pilot, lambda: page.shown == 2)
        head, film, lost, *_ = lines(page)
        assert head.split()[:2] == ["NAME*", "MAP"]
        for shown in ("film", "█", "▼", "·", "live", "100 B", "2.0 KiB/s", "1.0 KiB/s"):
            assert shown in film
        assert "lost" in lost and "P!" in lost and "failed" in lost
        more = text_of(page, "#more")
        for shown in ("film", "60 B of 100 B", "http://h/a", "▲", "mpv (4711) at 50", "8.0 MiB ahead, rests"):
            assert shown in more
        await pilot.press("down")
        assert "the server says 404" in text_of(page, "#more")
        assert "2 streams  ↓ 2.0 KiB/s  ↑ 1.0 KiB/s  memory 60 B of 256.0 MiB" in text_of(page, "#head")

    on_page(home, watch, act)


@pytest.mark.parametrize("size", [(20, 8), (40, 12), (8, 5), (200, 50)])
def test_narrow_terminals_show_what_fits(home: Home, size: tuple[int, int]) -> None:
    names = ["a rather long name of a film.mp4", "日本語の長い名前のファイル.txt", "x\x1b[31m\udcff"]
    watch = Scripted(*(row(number, name) for number, name in enumerate(names)))

    async def act(pilot: Pilot[None], page: Page) -> None:
        await until(pilot, lambda: page.shown == 3)
        streams = page.query_one(Streams)
        for y in range(streams.size.height):
            strip = streams.render_line(y)
            assert strip.cell_length == streams.size.width
            assert "\x1b" not in strip.text and "\udcff" not in strip.text
        assert "a ra" in "".join(lines(page))

    on_page(home, watch, act, size)


@pytest.mark.parametrize(("size", "told"), [((30, 16), 6), ((30, 18), 6), ((60, 23), 6), ((30, 30), 10)])
def test_details_leave_room_for_the_list_and_scroll(home: Home, size: tuple[int, int], told: int) -> None:
    reader = {"at": 50, "pid": 4711, "program": "mpv"}
    source = "https://films.example.org/" + "a-long-way-down/" * 40 + "film.mkv"
    live = mapped(100, [[0, 60]], [], state="live", positions=[reader], error="no route to the host " * 10)
    watch = Scripted(live | {"source": source}, *(row(number, f"n{number}") for number in range(2, 5)))

    async def act(pilot: Pilot[None], page: Page) -> None:
        await until(pilot, lambda: page.shown == 4)
        details = page.query_one("#details", VerticalScroll)
        assert details.outer_size.height == told
        assert [line.split()[0] for line in lines(page)[1:5]] == ["a", "n2", "n3", "n4"]
        seen = "\n".join(strip.text for strip in page.screen._compositor.render_strips()[-told:])
        assert "▼" in seen and "█" in seen and "·" in seen  # its map is what is seen first
        assert "film.mkv" in text_of(page, "#more") and "film.mkv" not in seen
        await pilot.press("J", "J")
        assert details.scroll_offset.y == 2
        await pilot.press("shift+down", "K", "shift+up")
        assert details.scroll_offset.y == 1
        await pilot.press("down")
        assert details.scroll_offset.y == 0  # another stream is told from its beginning

    on_page(home, watch, act, size)


def test_keys_persist_and_evict_the_chosen_stream_wherever_it_moves(home: Home, daemon: Daemon) -> None:
    watch = Scripted(row(1, "a"), row(2, "b", persist=True))

    async def act(pilot: Pilot[None], page: Page) -> None:
        await until(pilot, lambda: page.shown == 2)
        await pilot.press("p")
        await until(pilot, lambda: len(daemon.asked) == 1)
        await pilot.press("down", "p")
        await until(pilot, lambda: len(daemon.asked) == 2)
        watch.show(row(3, "Z"), row(1, "a"), row(2, "b", persist=True))
        await until(pilot, lambda: page.shown == 3)
        await pilot.press("e")
        await until(pilot, lambda: len(daemon.asked) == 3)

    on_page(home, watch, act)
    assert daemon.asked == [
        ("persist", {"names": ["a"], "on": True}),
        ("persist", {"names": ["b"], "on": False}),
        ("evict", {"names": ["b"], "all": False}),
    ]


def test_remove_asks_first(home: Home, daemon: Daemon) -> None:
    watch = Scripted(row(1, "a"), row(2, "b"))

    async def act(pilot: Pilot[None], page: Page) -> None:
        await until(pilot, lambda: page.shown == 2)
        for no in ("n", "escape", "enter", "q"):
            await pilot.press("d")
            await until(pilot, lambda: isinstance(page.screen, Question))
            assert "Remove a and its cached bytes?" in str(page.screen.query(Static).first().render())
            await pilot.press(no)
            await until(pilot, lambda: not isinstance(page.screen, Question))
        assert daemon.asked == []
        await pilot.press("down", "delete")
        await until(pilot, lambda: isinstance(page.screen, Question))
        await pilot.press("y")
        await until(pilot, lambda: daemon.asked)

    on_page(home, watch, act)
    assert daemon.asked == [("remove", {"names": ["b"]})]


def test_a_stream_that_took_the_name_meanwhile_is_not_removed(home: Home, daemon: Daemon) -> None:
    watch = Scripted(row(1, "a"))

    async def act(pilot: Pilot[None], page: Page) -> None:
        await until(pilot, lambda: page.shown == 1)
        await pilot.press("d")
        watch.show(row(2, "a"), row(3, "b"))
        await until(pilot, lambda: len(page._found.rows) == 2)
        await pilot.press("y")
        await until(pilot, lambda: "another name" in text_of(page, "#said"))

    on_page(home, watch, act)
    assert daemon.asked == []


def test_what_the_daemon_refuses_is_said_and_so_is_that_there_is_none(home: Home, daemon: Daemon) -> None:
    watch = Scripted(row(1, "a"))
    daemon.error = NotPermitted("'a' is [b]persisted[/b]")

    def said(page: Page) -> str:
        return text_of(page, "#said")

    async def act(pilot: Pilot[None], page: Page) -> None:
        await until(pilot, lambda: page.shown == 1)
        await pilot.press("e")
        await until(pilot, lambda: said(page))
        assert said(page) == "'a' is [b]persisted[/b]"

    on_page(home, watch, act)
    daemon.running.__exit__(None, None, None)
    watch = Scripted(row(1, "a"))

    async def again(pilot: Pilot[None], page: Page) -> None:
        await until(pilot, lambda: page.shown == 1)
        await pilot.press("p")
        await until(pilot, lambda: said(page))
        assert said(page) == "no daemon runs"

    on_page(home, watch, again)


def test_sorting_and_filtering(home: Home) -> None:
    watch = Scripted(row(1, "Alpha", rate=1), row(2, "beta", rate=3), row(3, "gamma", rate=2))

    async def act(pilot: Pilot[None], page: Page) -> None:
        await until(pilot, lambda: page.shown == 3)
        await pilot.press("s")
        assert listed(page) == ["beta", "gamma", "Alpha"]
        await pilot.press("r")
        assert listed(page) == ["Alpha", "gamma", "beta"]
        await pilot.press("slash", "A", "l", "p")
        await until(pilot, lambda: listed(page) == ["Alpha"])
        assert "1 of 3 streams" in text_of(page, "#head")
        await pilot.press("q", "enter")
        assert page.query_one(Input).value == "Alpq"
        assert "'Alpq'" in text_of(page, "#none")
        await pilot.press("escape")
        await until(pilot, lambda: page.shown == 3)

    on_page(home, watch, act)


def test_a_long_list_is_walked_through_with_its_head_in_place(home: Home) -> None:
    watch = Scripted(*(row(number, f"stream-{number:05}") for number in range(10_000)))

    async def act(pilot: Pilot[None], page: Page) -> None:
        await until(pilot, lambda: page.shown == 10_000)
        await pilot.press("end")
        await until(pilot, lambda: "stream-09999" in lines(page)[-1])
        assert lines(page)[0].startswith("NAME")
        await pilot.press("home", "pagedown")
        await until(pilot, lambda: "stream-00000" not in lines(page)[1] or "stream-00001" in lines(page)[2])
        chosen = page.query_one(Streams).chosen
        assert chosen is not None and 0 < chosen["id"] < 100

    on_page(home, watch, act)


def test_it_waits_for_a_daemon_and_says_so(home: Home) -> None:
    watch = Scripted()
    watch.end()

    async def act(pilot: Pilot[None], page: Page) -> None:
        await until(pilot, lambda: "no daemon runs" in text_of(page, "#none"))
        await pilot.press("p", "e", "d", "down")  # there is nothing to do it to
        watch.show(row(1, "a"))
        await until(pilot, lambda: page.shown == 1)
        assert not page.query_one("#none").display
        watch.end()
        await until(pilot, lambda: page.shown == 0)
        assert "waiting" in text_of(page, "#none")

    on_page(home, watch, act)


def test_all_of_the_screen_is_painted_after_what_kept_it_from_being_painted(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be painted in a batch is thrown away; and a change of the footer's keys is one."""
    watch = Scripted(row(1, "a"), row(2, "b"))
    painted: list[tuple[int, int]] = []
    lost: list[tuple[int, int]] = []

    def display(page: Page, screen: object, update: object) -> None:
        if isinstance(update, LayoutUpdate):
            (lost if page._batch_count else painted).append(update.region.size)

    monkeypatch.setattr(Page, "_display", display)

    async def act(pilot: Pilot[None], page: Page) -> None:
        await until(pilot, lambda: page.shown == 2)
        with page.batch_update():
            await pilot.resize_terminal(30, 18)
            await until(pilot, lambda: (30, 18) in lost)
            assert (30, 18) not in painted
        await until(pilot, lambda: (30, 18) in painted)
        await pilot.pause(0.6)  # until the size counts as settled
        painted.clear()
        with page.batch_update():
            pass
        await until(pilot, lambda: painted)

    on_page(home, watch, act)


def test_a_new_size_counts_though_the_timer_that_passes_it_on_never_comes(home: Home) -> None:
    """As where a busy machine makes textual skip the timer's only tick."""
    watch = Scripted(row(1, "a"), row(2, "b"))

    async def act(pilot: Pilot[None], page: Page) -> None:
        await until(pilot, lambda: page.shown == 2)
        page._resize_timer = page.set_timer(3600, lambda: None)
        for width in (30, 50):
            await pilot.resize_terminal(width, 18)
            await until(pilot, lambda width=width: page._streams.size.width == width)

    on_page(home, watch, act)


def test_keys_in_the_footer_are_whole_though_they_were_laid_out_too_early(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a new size comes to a question while the footer behind it gets its keys anew."""
    watch = Scripted(row(1, "a"), row(2, "b"))
    early: list[FooterKey] = []
    learn = FooterKey._watch_compact

    async def act(pilot: Pilot[None], page: Page) -> None:
        def widths() -> list[int]:
            return [key.size.width for key in page.query(FooterKey)]

        def lay_out_first(key: FooterKey, compact: bool) -> None:
            if not compact:
                page.screen._refresh_layout(page.size)
                page._settle()  # as the new size does that lays it out
                early.append(key)
            learn(key, compact)

        laid_out = 0

        def settled() -> None:
            nonlocal laid_out
            Page._settled(page)
            laid_out += 1

        monkeypatch.setattr(page, "_settled", settled)
        await until(pilot, lambda: page.shown == 2)
        page._settle()
        await until(pilot, lambda: laid_out)  # or what is taken for whole could be too early itself
        whole = widths()
        assert min(whole) > 0
        with monkeypatch.context() as patched:
            patched.setattr(FooterKey, "_watch_compact", lay_out_first)
            page.screen.refresh_bindings()
            await until(pilot, lambda: len(early) >= len(whole))  # or more, where they are made twice
        await until(pilot, lambda: widths() == whole)

    on_page(home, watch, act)


def test_a_reader_of_whom_nothing_is_known_is_shown(home: Home) -> None:
    watch = Scripted(mapped(100, [[0, 60]], [], state="live", positions=[{"at": 1000}]))

    async def act(pilot: Pilot[None], page: Page) -> None:
        await until(pilot, lambda: page.shown == 1)
        await until(pilot, lambda: "? (?) at 1,000" in text_of(page, "#more"))

    on_page(home, watch, act)


@pytest.mark.parametrize(("key", "interrupted"), [("q", False), ("ctrl+c", True)])
def test_keys_end_it(home: Home, key: str, interrupted: bool) -> None:
    async def act(pilot: Pilot[None], page: Page) -> None:
        await until(pilot, lambda: page.shown == 1)
        await pilot.press(key)

    assert on_page(home, Scripted(row(1, "a")), act).interrupted == interrupted


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_a_terminal_it_says_what_else_there_is(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["top"]) == 1
    assert capfd.readouterr() == ("", "streamfs: 'streamfs top' needs a terminal: 'streamfs status --watch' does not\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("streamfs top <&-", "needs a terminal: "),
        ("TERM=dumb streamfs top", "TERM says"),
        ("timeout 60 streamfs top", "timeout: with --foreground"),  # it would be stopped until that is over
    ],
)
def test_in_a_terminal_that_is_no_use_to_it_it_says_so_in_one_line(tmp_path: Path, line: str, said: str) -> None:
    spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(['sh', '-c', sys.argv[1]])))"
    line = line.replace("streamfs", f"{shlex.quote(sys.executable)} -m streamfs")
    environ = os.environ | {"STREAMFS_HOME": str(tmp_path), "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", spawn, line], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environ, check=False
    )
    assert done.returncode == 1
    assert done.stdout.startswith(b"streamfs: ") and done.stdout.count(b"\n") == 1 and said.encode() in done.stdout


def test_without_textual_it_says_how_to_get_it(tmp_path: Path) -> None:
    script = "import sys; sys.modules['textual'] = None; from streamfs.cli import main; sys.exit(main(['top']))"
    environ = os.environ | {"STREAMFS_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("\n") == 1 and "pip install 'streamfs[tui]'" in done.stderr
