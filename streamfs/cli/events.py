"""events: what happens to the streams, from the log on the board."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any

import click

from streamfs.board import Board
from streamfs.cli.looking import board_path
from streamfs.cli.signals import ended_by_signals
from streamfs.cli.tables import visible
from streamfs.errors import Busy, Unreachable
from streamfs.home import Home

LOOK_EVERY = 0.1  # seconds between two looks at the board's counter, which is reading one number
ANSWER_WITHIN = 5.0  # seconds the daemon has to take an acknowledgement
NAME_BYTES = 100  # of a listener's name
_LOCKS = "listeners.lock"
Event = dict[str, Any]


def _listener_name(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    if name is not None and not (name.isprintable() and 0 < len(os.fsencode(name)) <= NAME_BYTES):
        raise click.BadParameter(f"a listener's name is 1 to {NAME_BYTES} bytes of text")
    return name


@click.command(short_help="What happened: opened, failed, complete …")
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens from now on, until Ctrl-C.")
@click.option(
    "--listener",
    metavar="NAME",
    callback=_listener_name,
    help="Only what this listener has not got yet, and remember that it has it now.",
)
@click.option("--forget", metavar="NAME", callback=_listener_name, help="There is no such listener any more.")
@click.option("--json", "as_json", is_flag=True, envvar="STREAMFS_EVENTS_JSON", help="Lines of JSON.")
def events(follow: bool, listener: str | None, forget: str | None, as_json: bool) -> None:
    """What happened to the streams: registered, opened, fetching, stalled, failed, complete, persisted, evicted …

    A listener gets every event once, over its own restarts and the daemon's. One that stays away for long is told
    how many it missed ("missed").
    """
    home = Home.open()
    if forget is not None:
        if follow or listener is not None:
            raise click.UsageError("--forget goes with no other option")
        _ask(home, "forget_listener", listener=forget)
        return
    with contextlib.ExitStack() as stack:
        if listener is not None:
            stack.enter_context(_alone(home, listener))
        stack.enter_context(ended_by_signals())
        reader = stack.enter_context(_Reader(home, listener))
        _print_all(reader, follow, as_json)


def _print_all(reader: _Reader, follow: bool, as_json: bool) -> None:
    try:
        while True:
            for event in reader.new():
                line = json.dumps(event) if as_json else _line(event)
                sys.stdout.buffer.write(line.encode("utf-8", "surrogateescape") + b"\n")
                sys.stdout.buffer.flush()
                reader.written(event)
            if not follow:
                break
            with contextlib.suppress(Unreachable):  # another daemon may come; what was written is known here
                reader.acknowledge()
            reader.wait()
    finally:
        reader.acknowledge()


class _Reader:
    """Where one listener (or somebody without a name, None) stands in the log."""

    def __init__(self, home: Home, listener: str | None) -> None:
        self._home = home
        self._listener = listener
        self._board = Board(board_path(home))
        self._seen = -1  # the board's counter at the last look
        first, _ = self._board.events_held
        known = self._board.listeners.get(listener) if listener is not None else None
        self._position = first - 1 if known is None else known
        self._acknowledged = known
        if listener is not None and known is None:
            self.acknowledge()  # from now on events are kept for it

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._board.close()

    def new(self) -> Iterator[Event]:
        """The events since the last one written. Where some were recycled before they were read, one says how many."""
        self._seen = self._board.changes
        found = self._board.events(self._position)
        first = found[0]["seq"] if found else self._board.events_held[0]
        if first > self._position + 1:
            yield {"time": round(time.time(), 3), "event": "missed", "count": first - self._position - 1}
            self._position = first - 1
        yield from found

    def written(self, event: Event) -> None:
        """Who listens has the event."""
        self._position = max(self._position, event.get("seq", 0))

    def acknowledge(self) -> None:
        """Tell the daemon how far the listener is. Raises Unreachable."""
        if self._listener is not None and self._acknowledged != self._position:
            _ask(self._home, "acknowledge", listener=self._listener, seq=self._position)
            self._acknowledged = self._position

    def wait(self) -> None:
        """Until there may be something new. Raises Damaged where the next daemon's board cannot be read."""
        while self._board.changes == self._seen:
            time.sleep(LOOK_EVERY)
            with contextlib.suppress(Unreachable):
                if self._board.refresh():
                    return


def _ask(home: Home, method: str, **params: Any) -> None:
    from streamfs.cli.registry import connect

    client = connect(home, ANSWER_WITHIN)
    if client is None:
        raise Unreachable("no daemon runs, which alone can remember what a listener has got: see 'streamfs mount'")
    with client:
        client.call(method, **params)


@contextlib.contextmanager
def _alone(home: Home, listener: str) -> Iterator[None]:
    """Two at a time under one name would each get a part. The lock ends with the process."""
    fd = os.open(home.run / _LOCKS, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, zlib.crc32(os.fsencode(listener)))
        except (BlockingIOError, PermissionError) as error:
            raise Busy(f"another 'streamfs events' listens as {listener!r}") from error
        yield
    finally:
        os.close(fd)


_KNOWN = ("seq", "time", "event", "stream", "pid", "program")


def _line(event: Event) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    if event["event"] == "missed":
        return f"{when}  {'missed':<10}  {event['count']} events"
    who = ""
    if event.get("pid") is not None:
        who = f"  by {event.get('program') or '?'} ({event['pid']})"
    rest = "".join(f"  {key} {value}" for key, value in event.items() if key not in _KNOWN and value is not None)
    return visible(f"{when}  {event['event']:<10}  {event.get('stream') or '?'}{who}{rest}")
