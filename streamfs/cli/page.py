"""The page of `streamfs top`, in textual: a list of streams with their maps, and more of the chosen one.

Three kinds of threads: textual's own draws; one looks at the board (`_Looking`); each change that is asked for has a
short one, as a daemon that hangs must not hold up the page. They meet in messages only.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events, on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.geometry import Size
from textual.message import Message
from textual.screen import ModalScreen
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.timer import Timer
from textual.widgets import Footer, Input, Static

from streamfs.cli import maps
from streamfs.cli.looking import Row
from streamfs.cli.registry import Live, connect
from streamfs.cli.tables import human_size, visible
from streamfs.cli.watching import Glance, Watch
from streamfs.errors import StreamfsError, Unreachable
from streamfs.home import Home

PAUSE = 0.2
"""Seconds between two looks at the board."""
_SHARE = 5  # a look at a large board that took a second is followed by so many without one
_SAID_FOR = 5.0  # seconds that a line about what was done is shown
_SETTLED = 0.3  # seconds after a change of the terminal's size, or a question, until all is laid out and painted again
_PATIENCE = 5.0  # seconds of silence after which a daemon that was asked for something counts as hanging

_GLYPHS: dict[maps.Cell, str] = {"memory": "█", "disk": "▓", "part": "▒", "missing": "·"}
_COLOURS: dict[maps.Cell, str] = {"memory": "bright_green", "disk": "blue", "part": "cyan", "missing": "bright_black"}
_READER, _FETCH = "▼", "▲"
_STATES = {"live": "green", "paused": "yellow", "complete": "bright_blue", "failed": "bold red", "idle": "bright_black"}

Ask = Callable[[Live], None]


class Watching(Protocol):
    """What tells the page of the streams, called from one thread: as `Watch`."""

    def glance(self) -> Glance | None: ...
    def close(self) -> None: ...


class Column(NamedTuple):
    title: str
    width: int
    right: bool = False


COLUMNS = {
    "name": Column("NAME", 12),
    "flags": Column("", 2),
    "map": Column("MAP", 20),
    "state": Column("STATE", 8),
    "cached": Column("CACHED", 10, True),
    "size": Column("SIZE", 10, True),
    "rate": Column("RATE", 12, True),
    "read": Column("READ", 12, True),
    "ahead": Column("AHEAD", 10, True),
    "readers": Column("USERS", 5, True),
}
_FIRST_TO_GO = ("ahead", "cached", "readers", "read", "size", "rate", "state", "flags")
_WIDEST_NAME = 40
_NARROWEST_MAP = 4
_MARGINS = 2  # cells beside the details: one to the left, the bar for scrolling to the right
ORDERS = ("name", "rate", "read", "cached", "size", "readers")


def layout(width: int, longest: int) -> dict[str, int]:
    """Which columns there is room for in `width` cells, and how wide each is. `longest`: the longest name's width."""
    chosen = {key: column.width for key, column in COLUMNS.items()}
    chosen["name"] = max(5, min(longest, COLUMNS["name"].width))
    for key in _FIRST_TO_GO:
        if sum(chosen.values()) + len(chosen) - 1 <= width:
            break
        del chosen[key]
    else:
        chosen["map"] = width - chosen["name"] - 1  # as narrow as it must
        if chosen["map"] < _NARROWEST_MAP:
            return {"name": width}
    spare = width - sum(chosen.values()) - len(chosen) + 1
    wish = max(0, min(longest, _WIDEST_NAME) - chosen["name"])
    chosen["name"] += min(wish, spare // 2)
    chosen["map"] += spare - min(wish, spare // 2)
    return chosen


def ordered(rows: list[Row], order: str, backwards: bool) -> list[Row]:
    """By name, or with the largest first; `backwards`: the other way round."""
    if order == "name":
        return rows[::-1] if backwards else rows  # as the board has them
    key = {"read": "read_rate", "cached": "buffered"}.get(order, order)
    return sorted(rows, key=lambda row: row.get(key) or 0, reverse=not backwards)


def _rate(value: float | None) -> str:
    return f"{human_size(round(value))}/s" if value else ""


def _ahead(row: Row) -> str:
    ahead = max((fetch["ahead"] for fetch in row.get("fetches", ())), default=None)
    return "" if ahead is None else human_size(ahead)


def _cell_text(row: Row, key: str) -> str:
    match key:
        case "name":
            return visible(row["name"])
        case "flags":
            return ("P" if row["persist"] else " ") + ("!" if row.get("error") else " ")
        case "state":
            return str(row["state"])
        case "cached":
            return human_size(row["buffered"])
        case "size":
            return human_size(row["size"])
        case "rate":
            return _rate(row.get("rate"))
        case "read":
            return _rate(row.get("read_rate"))
        case "ahead":
            return _ahead(row)
        case _:
            return str(row["readers"] or "")


def bar(row: Row, width: int, marked: bool = True) -> Text:
    """The map of a stream; `marked`: with its readers in it."""
    readers = maps.marks(row, maps.positions(row), width) if marked else set()
    text = Text(no_wrap=True)
    for at, cell in enumerate(maps.cells(row, width)):
        if at in readers:
            text.append(_READER, Style(color="bright_yellow", bold=True))
        else:
            text.append(_GLYPHS[cell], Style(color=_COLOURS[cell]))
    return text


def details(row: Row, width: int) -> Text:
    """More of one stream: its map is `width` cells wide, and what may be long comes last."""
    text = Text()
    text.append(visible(row["name"]), "bold")
    text.append(f"  {row['state']}", _STATES.get(row["state"], ""))
    text.append(f"  {human_size(row['buffered'])} of {human_size(row['size'])}")
    if row.get("memory"):
        text.append(f", {human_size(row['memory'])} in memory")
    if row["persist"]:
        text.append("  kept" if row.get("persisted_path") else "  to be kept")
    text.append("\n")
    readers, fetches = maps.marks(row, maps.positions(row), width), maps.marks(row, maps.fetching(row), width)
    text.append("".join(_READER if at in readers else " " for at in range(width)) + "\n", "bold bright_yellow")
    text.append_text(bar(row, width, marked=False))
    text.append("\n" + "".join(_FETCH if at in fetches else " " for at in range(width)) + "\n", "bold bright_green")
    if row.get("error"):
        text.append(f"{visible(row['error'])}\n", "bold red")
    who = [
        # A daemon of another version may not know who it is.
        f"{visible(reader.get('program') or '?')} ({reader.get('pid', '?')}) at {reader['at']:,}"
        for reader in row["positions"]
    ]
    if who:
        text.append(f"{_READER} " + "  ".join(who) + "\n")
    for fetch in row["fetches"]:
        until = "the end" if fetch["until"] is None else f"{fetch['until']:,}"
        resting = ", rests" if fetch["resting"] else ""
        text.append(f"{_FETCH} at {fetch['at']:,} to {until}, {human_size(fetch['ahead'])} ahead{resting}\n")
    if row.get("title"):
        text.append(f"plays {visible(row['title'])}\n", "italic")
    text.append(visible(row["source"]), "dim")
    return text


def _complete(row: Row) -> Row:
    """With the keys that only used streams have."""
    return {"positions": [], "fetches": [], "map": None, **row}


class Streams(ScrollView, can_focus=True):
    """The list. Draws what is seen of it, however long it is."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("home,g", "move(-1000000000)", show=False),
        Binding("end,G", "move(1000000000)", show=False),
    ]

    class Chosen(Message):
        """Another stream is the chosen one, or it is another now."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.rows: list[Row] = []
        self.order = "name"
        self._longest = 4
        self._stream: int | None = None  # of the chosen stream; rows move about
        self._at = 0

    @property
    def chosen(self) -> Row | None:
        return self.rows[self._at] if self.rows else None

    def show(self, rows: list[Row], order: str) -> None:
        """Show these. The chosen stream stays chosen wherever it has gone; where it has gone for good, its place."""
        self.rows, self.order = rows, order
        self._longest = max((cell_len(visible(row["name"])) for row in rows), default=4)
        at = next((at for at, row in enumerate(rows) if row["id"] == self._stream), self._at)
        self.virtual_size = Size(0, len(rows) + 1)
        self._choose(at)

    def _choose(self, at: int) -> None:
        self._at = max(0, min(at, len(self.rows) - 1))
        chosen = self.chosen
        self._stream = chosen["id"] if chosen is not None else None
        first, fits = self.scroll_offset.y, max(1, self.size.height - 1)
        if not first <= self._at < first + fits:
            self.scroll_to(y=self._at if self._at < first else self._at - fits + 1, animate=False, immediate=True)
        self.refresh()
        self.post_message(self.Chosen())

    def action_move(self, by: int) -> None:
        self._choose(self._at + by)

    def action_page(self, by: int) -> None:
        self._choose(self._at + by * max(1, self.size.height - 2))

    def on_click(self, event: events.Click) -> None:
        if event.y > 0:
            self._choose(self.scroll_offset.y + event.y - 1)

    def render_line(self, y: int) -> Strip:
        """The head stays where it is; the rows scroll below it."""
        widths = layout(self.size.width, self._longest)
        if y == 0:
            return self._strip(self._head(widths), Style(bold=True, reverse=True))
        at = self.scroll_offset.y + y - 1
        if not 0 <= at < len(self.rows):
            return Strip.blank(self.size.width, self.rich_style)
        return self._strip(self._line(self.rows[at], widths, at == self._at and self.has_focus))

    def _strip(self, text: Text, style: Style = Style()) -> Strip:  # noqa: B008 - a style never changes
        segments = [
            Segment(segment.text, self.rich_style + (segment.style or Style()) + style)
            for segment in text.render(self.app.console)
            if isinstance(segment.style, Style | None) and segment.text != "\n"
        ]
        return Strip(segments).adjust_cell_length(self.size.width, self.rich_style + style)

    def _head(self, widths: dict[str, int]) -> Text:
        titles = []
        for key, width in widths.items():
            title = COLUMNS[key].title + ("*" if key == self.order else "")
            titles.append(_fit(title, width, COLUMNS[key].right))
        return Text(" ".join(titles))

    def _line(self, row: Row, widths: dict[str, int], chosen: bool) -> Text:
        """The text of the chosen one is reversed; its map is not, whose colours say something."""
        line, mark = Text(no_wrap=True), Style(reverse=chosen)
        for key, width in widths.items():
            if line:
                line.append(" ", mark)
            if key == "map":
                line.append_text(bar(row, width))
                continue
            style = _STATES.get(row["state"], "") if key == "state" else "red" if row.get("error") else ""
            cell = _fit(_cell_text(row, key), width, COLUMNS[key].right)
            line.append(cell, mark if chosen else style)
        return line


def _fit(text: str, width: int, right: bool) -> str:
    if cell_len(text) > width:
        return set_cell_size(text, width - 1) + "…" if width > 1 else set_cell_size(text, width)
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


class Question(ModalScreen[bool]):
    """Yes or no; anything but a plain yes is a no."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "yes"),
        Binding("n,escape,enter,q", "answer(False)", "no"),
    ]

    def __init__(self, question: Text) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        with Vertical(id="question"):
            yield Static(self._question)
            yield Static(Text("y  yes      n  no", "bold"))

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)


class Looked(Message):
    def __init__(self, found: Glance) -> None:
        super().__init__()
        self.found = found


class Done(Message):
    """What was asked of the daemon has been done, or not: then `error` says why."""

    def __init__(self, what: str, error: str | None) -> None:
        super().__init__()
        self.what = what
        self.error = error


class _Looking:
    """Looks at the board from a thread of its own, and tells the page what is new."""

    def __init__(self, page: Page, watch: Watching) -> None:
        self._page = page
        self._watch = watch
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="looking", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                try:
                    found = self._watch.glance()
                except (StreamfsError, OSError) as error:
                    found = Glance([], {}, False, str(error))
                if found is not None:
                    self._page.tell(Looked(found))
                self._stop.wait(max(PAUSE, (time.monotonic() - began) * _SHARE))
        finally:
            self._watch.close()


class Page(App[None]):
    """`home`: whose daemon is asked for changes; `watch`: what is shown, closed at the end."""

    CSS = """
    Screen { layout: vertical; }
    #head { height: 1; text-style: bold; }
    #none { height: 1fr; content-align: center middle; display: none; }
    Streams { height: 1fr; min-height: 3; }
    #details {
        height: auto; max-height: 10; border-top: solid $primary; padding-left: 1;
        scrollbar-size-vertical: 1; scrollbar-gutter: stable;
    }
    #more { height: auto; }
    .low #details { max-height: 6; }
    #said { display: none; height: auto; max-height: 3; }
    #filter { display: none; height: 1; border: none; padding: 0; }
    .short #details { display: none; }
    Question { align: center middle; }
    #question { width: auto; max-width: 90%; height: auto; border: heavy $warning; padding: 1 2; background: $surface; }
    #question Static { width: auto; max-width: 100%; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("ctrl+c", "interrupt", show=False, priority=True),
        Binding("ctrl+z", "suspend_process", show=False, priority=True),
        Binding("p", "persist", "persist"),
        Binding("e", "evict", "evict"),
        Binding("delete,d", "remove", "remove", key_display="d"),
        Binding("s", "sort", "sort"),
        Binding("r", "reverse", "reverse"),
        Binding("slash", "filter", "filter", key_display="/"),
        Binding("escape", "clear", show=False),
        Binding("J,shift+down", "details(1)", show=False),
        Binding("K,shift+up", "details(-1)", show=False),
    ]

    def __init__(self, home: Home, watch: Watching) -> None:
        super().__init__()
        self._home = home
        self._looking = _Looking(self, watch)
        self._found = Glance([], {}, False, "looking")
        self._order, self._backwards = ORDERS[0], False
        self._wanted = ""
        self._told: int | None = None  # of whom the details are
        self._hush: Timer | None = None
        self._settling: asyncio.TimerHandle | None = None
        self.interrupted = False

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        yield Static(id="none")
        yield Streams(id="streams")
        with VerticalScroll(id="details", can_focus=False):
            yield Static(id="more")
        yield Static(id="said")
        yield Input(placeholder="part of a name", id="filter", compact=True)
        yield Footer()

    def on_mount(self) -> None:
        self._streams.focus()
        self._looking.start()
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.exit)
            # Without its terminal it just ends: to leave that in order would mean to wait for who reads it no more.
            signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def on_unmount(self) -> None:
        self._looking.stop()

    @contextlib.contextmanager
    def batch_update(self) -> Iterator[None]:
        """Nothing is painted meanwhile, and all of the screen afterwards.

        textual itself does not: what a layout changed is painted a little later, and that is thrown away where a
        batch is under way by then. Each change of the keys in the footer is one, as at the end of a question. A
        terminal that was resized just then would show, until something changes there, what the old size left of the
        old screen.
        """
        with super().batch_update():
            yield
        if self.is_running and self.screen_stack:
            self.screen.refresh()

    def tell(self, message: Message) -> None:
        """From any thread; nobody hears it once the page has gone."""
        with contextlib.suppress(RuntimeError):
            self.post_message(message)

    @property
    def _streams(self) -> Streams:
        return self.query_one(Streams)

    @property
    def shown(self) -> int:
        """How many streams are in the list now."""
        return len(self._streams.rows)

    # What is seen

    @on(Looked)
    def _look(self, message: Looked) -> None:
        self._found = message.found._replace(rows=[_complete(row) for row in message.found.rows])
        self._show()

    def on_resize(self, event: events.Resize) -> None:
        self.screen_stack[0].set_class(event.size.height < 16, "short")
        self.screen_stack[0].set_class(event.size.height < 24, "low")
        self._show()
        self._settle()

    def _settle(self) -> None:
        """Lay out and paint everything anew a little later.

        textual passes a new size on by a timer of 8 ms (Textualize/textual#6471) that never comes where that time is
        over before it begins to wait, and passes none on after that. And a new size during a question lays out what is
        behind it at any moment, as when the keys of the footer are new and not yet as wide as they will be; and that
        width is remembered.
        """
        if self._settling is not None:
            self._settling.cancel()
        self._settling = asyncio.get_running_loop().call_later(_SETTLED, self._settled)

    def _settled(self) -> None:
        if not self.is_running:
            return
        for screen in self.screen_stack:
            screen.post_message(events.Resize(self.size, self.size))
            for widget in screen.query("*"):
                widget.refresh(layout=True)  # each forgets what it remembers of its size
        self.screen.refresh(layout=True)

    def _show(self) -> None:
        found = self._found
        wanted = self._wanted.lower()
        rows = [row for row in found.rows if wanted in row["name"].lower()] if wanted else found.rows
        none = self.query_one("#none", Static)
        none.display = not rows
        none.update(self._nothing())
        self._streams.display = bool(rows)
        self._streams.show(ordered(rows, self._order, self._backwards), self._order)
        self.query_one("#head", Static).update(self._head(len(rows)))

    def _nothing(self) -> Text:
        if self._found.problem == "looking":
            return Text("")
        if self._found.problem is not None:
            problem = visible(self._found.problem)
            return Text(f"{problem}\n'streamfs mount DIR' starts one: waiting for it", justify="center")
        if self._wanted:
            return Text(f"no stream has {visible(self._wanted)!r} in its name")
        return Text("no streams: 'streamfs add NAME URL' registers one")

    def _head(self, shown: int) -> Text:
        found, head = self._found, Text(no_wrap=True, overflow="ellipsis")
        head.append("streamfs ", "bold")
        if not found.live:
            head.append("no daemon", "bold yellow")
            return head
        count = len(found.rows)
        head.append(f"{shown} of {count}" if shown != count else f"{count}")
        head.append(" streams" if found.whole else " streams so far")
        for sign, key in (("↓", "rate"), ("↑", "read_rate")):
            head.append(f"  {sign} {human_size(sum(row.get(key) or 0 for row in found.rows))}/s")
        memory = sum(row.get("memory") or 0 for row in found.rows)
        head.append(f"  memory {human_size(memory)}")
        if found.facts.get("memory"):
            head.append(f" of {human_size(found.facts['memory'])}")
        if found.facts.get("disk_error"):
            head.append(f"  {visible(found.facts['disk_error'])}", "bold red")
        head.append(f"  {visible(str(found.facts.get('mountpoint', '')))}", "dim")
        return head

    @on(Streams.Chosen)
    def _tell_more(self) -> None:
        row, shown = self._streams.chosen, self.query_one("#details", VerticalScroll)
        shown.display = row is not None
        if row is not None:
            self.query_one("#more", Static).update(details(row, max(1, self.size.width - _MARGINS)))
            if row["id"] != self._told:
                shown.scroll_home(animate=False, immediate=True)
            self._told = row["id"]

    def action_details(self, by: int) -> None:
        """Scroll what is told of the chosen stream, where there is no room for all of it."""
        self.query_one("#details", VerticalScroll).scroll_relative(y=by, animate=False, immediate=True)

    # The order and the filter

    def action_sort(self) -> None:
        self._order = ORDERS[(ORDERS.index(self._order) + 1) % len(ORDERS)]
        self._show()

    def action_reverse(self) -> None:
        self._backwards = not self._backwards
        self._show()

    def action_filter(self) -> None:
        field = self.query_one("#filter", Input)
        field.display = True
        field.focus()

    def action_clear(self) -> None:
        field = self.query_one("#filter", Input)
        field.value = ""
        field.display = False
        self._streams.focus()

    @on(Input.Changed, "#filter")
    def _narrow(self, event: Input.Changed) -> None:
        self._wanted = event.value
        self._show()

    @on(Input.Submitted, "#filter")
    def _narrowed(self) -> None:
        self.query_one("#filter", Input).display = bool(self._wanted)
        self._streams.focus()

    # Changes

    def action_persist(self) -> None:
        row = self._streams.chosen
        if row is not None:
            name, on = row["name"], not row["persist"]
            what = f"{name} is kept from now on" if on else f"{name} may be evicted again"
            self._ask(what, lambda daemon: daemon.persist((name,), on))

    def action_evict(self) -> None:
        row = self._streams.chosen
        if row is not None:
            name = row["name"]
            self._ask(f"{name} evicted", lambda daemon: daemon.evict((name,), False))

    def action_remove(self) -> None:
        row = self._streams.chosen
        if row is None:
            return
        stream, name = row["id"], row["name"]

        def answered(yes: bool | None) -> None:
            self._settle()
            if not yes:
                return
            if any(row["id"] == stream and row["name"] == name for row in self._found.rows):
                self._ask(f"{name} removed", lambda daemon: daemon.remove((name,)))
            else:
                self._say(Text("it has gone, or has another name", "bold red"))

        self.push_screen(Question(Text(f"Remove {visible(name)} and its cached bytes?")), answered)

    def _ask(self, what: str, ask: Ask) -> None:
        """Ask the daemon for a change, in a thread: it may not answer."""
        threading.Thread(target=self._asked, args=(what, ask), name="asking", daemon=True).start()

    def _asked(self, what: str, ask: Ask) -> None:
        error = None
        try:
            client = connect(self._home, _PATIENCE)
            if client is None:
                raise Unreachable("no daemon runs")
            with client:
                ask(Live(client))
        except (StreamfsError, OSError) as failure:
            error = str(failure)
        self.tell(Done(what, error))

    @on(Done)
    def _done(self, message: Done) -> None:
        if message.error is None:
            self._say(Text(visible(message.what)))
        else:
            self._say(Text(visible(message.error), "bold red"))

    def _say(self, text: Text) -> None:
        """In a line of its own, for a while: a notice in front of the list would hide all of a narrow one."""
        said = self.query_one("#said", Static)
        said.update(text)
        said.display = True
        if self._hush is not None:
            self._hush.stop()
        self._hush = self.set_timer(_SAID_FOR, functools.partial(said.set_styles, "display: none;"))

    def action_interrupt(self) -> None:
        self.interrupted = True
        self.exit()


def run(home: Home) -> bool:
    """Show the page until it is ended; True where Ctrl-C did that.

    The size is the terminal's own. textual prefers `COLUMNS` and `LINES` (Textualize/textual#6153), which are of
    another time where they are handed on: by a program that uses readline, or by a shell told to export them. No new
    size would ever be taken then.
    """
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)
    page = Page(home, Watch(home))
    page.run()
    return page.interrupted
