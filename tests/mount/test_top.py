"""`streamfs top` in a real terminal, over a real mount; and waiting until streams are kept."""

from __future__ import annotations

import os
import pty
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import named_bytes, read_terminal
from tests.mount.mounted import CLI, WAIT, Mounted, Tap, end_within, is_alive, wait_for
from tests.mount.origin import ScriptedOrigin

MIB = 1 << 20


class Terminal:
    """A tmux of our own with one window, in which a command runs."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        # A size that is of no terminal: what a program that uses readline (an interactive Python, say) hands on.
        wrong = {"COLUMNS": "80", "LINES": "24"}
        self._environ = {**environ, **wrong, "TMUX_TMPDIR": str(folder), "TERM": "xterm-256color"}
        self._environ.pop("TMUX", None)

    def tmux(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            ["tmux", "-L", "streamfs-test", "-f", "/dev/null", *arguments],
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def run(self, argv: list[str], width: int, height: int) -> None:
        """Start it; what it ends with is shown after it."""
        line = f"{shlex.join(argv)}; echo ended with $?; exec sleep 600"
        self.tmux("new-session", "-d", "-x", str(width), "-y", str(height), "sh", "-c", line)

    def shown(self) -> str:
        return self.tmux("capture-pane", "-p")

    def wait(self, *texts: str) -> None:
        def look() -> bool:
            shown = self.shown()
            return all(text in shown for text in texts)

        try:
            wait_for(look, f"{texts} on the screen")
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.shown()}") from None

    def keys(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def resize(self, width: int, height: int) -> None:
        self.tmux("resize-window", "-x", str(width), "-y", str(height))

    def close(self) -> None:
        self.tmux("kill-server", check=False)


@pytest.fixture
def terminal(unmounted: Mounted, tmp_path: Path) -> Iterator[Terminal]:
    (tmp_path / "tmux").mkdir(mode=0o700)
    made = Terminal(tmp_path / "tmux", unmounted.environment)
    try:
        yield made
    finally:
        made.close()


def test_top_in_a_terminal_waits_for_a_daemon_and_shows_and_changes_its_streams(
    unmounted: Mounted, tmp_path: Path, tap: Tap, terminal: Terminal
) -> None:
    fs = unmounted
    terminal.run([*CLI, "top"], 100, 30)
    terminal.wait("no daemon runs", "streamfs mount DIR")
    fs.mount()
    terminal.wait("no streams")
    (tmp_path / "data").write_bytes(named_bytes("data", 0, 3 * MIB))
    fs.add("data", (tmp_path / "data").as_uri()).read_bytes()
    live = fs.add("live", *tap.argv)
    with open(live, "rb", buffering=0) as file:
        tap.write(b"x" * 2000)
        assert len(file.read(1500)) == 1500
        terminal.wait("data", "complete", "3.0 MiB", "live", "?", "▼", "█")
        terminal.keys("Down")
        terminal.wait(f"({os.getpid()}) at 1,500")
        terminal.keys("Up", "p")
        fs.wait_for_state("data", "complete")
        wait_for(lambda: fs.xattr("data", "persist") == "1", "p persists")
        terminal.wait("  kept")  # in the details
        terminal.keys("p")
        wait_for(lambda: fs.xattr("data", "persist") == "0", "p again unpersists")
        terminal.keys("e")
        wait_for(lambda: fs.buffered("data") == 0, "e evicts")
        terminal.keys("d")
        terminal.wait("Remove data and its cached bytes?")
        terminal.resize(30, 18)
        terminal.wait("┏", "┓", "y  yes", "q quit")  # all of the question
        terminal.keys("n")
        terminal.resize(120, 40)
        terminal.wait("data ", "AHEAD", "▼", "q quit")  # all of the list
        wait_for(lambda: "Remove data" not in terminal.shown(), "the question is over")
        terminal.keys("d")
        terminal.wait("Remove data")
        terminal.keys("y")
        wait_for(lambda: not (fs.mountpoint / "data").exists(), "d and y remove")
    fs.umount()
    terminal.wait("no daemon")
    fs.mount()
    terminal.wait("live")
    terminal.keys("q")
    terminal.wait("ended with 0")


def test_top_beside_a_daemon_that_is_stopped_shows_the_last_and_ends_at_once(fs: Mounted, terminal: Terminal) -> None:
    fs.add("a", "--", "true")
    os.kill(fs.pid, signal.SIGSTOP)
    try:
        terminal.run([*CLI, "top"], 80, 24)
        terminal.wait("a ", "idle")
        terminal.keys("p")
        terminal.keys("C-c")
        terminal.wait("streamfs: interrupted", "ended with 130")
    finally:
        os.kill(fs.pid, signal.SIGCONT)


def test_top_tells_of_a_stream_that_is_being_kept_and_has_no_reader(
    fs: Mounted, origin: ScriptedOrigin, terminal: Terminal
) -> None:
    document = origin.add("kept", 9 * MIB, stall_at=5 * MIB)
    path = fs.add("kept", document.url)
    os.setxattr(path, "user.streamfs.persist", b"1")
    assert document.stalled.wait(WAIT)
    terminal.run([*CLI, "top"], 100, 30)
    terminal.wait("kept", "live", "to be kept", "q quit")
    assert fs.xattr("kept", "readers") == "0"
    row = fs.status("kept")
    assert (row["readers"], row["positions"]) == (0, [])
    document.go.set()
    wait_for(lambda: fs.xattr("kept", "persisted_path"), "it is kept")
    terminal.keys("q")
    terminal.wait("ended with 0")


def test_top_ends_with_its_terminal(fs: Mounted, terminal: Terminal) -> None:
    fs.add("a", "--", "true")
    terminal.run([*CLI, "top"], 80, 24)
    terminal.wait("a ", "q quit")
    shell = int(terminal.tmux("list-panes", "-F", "#{pane_pid}"))
    top = int(Path(f"/proc/{shell}/task/{shell}/children").read_text().split()[0])
    terminal.tmux("kill-server")
    wait_for(lambda: not is_alive(top), "it ends")


# ── persist --wait ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_persist_waits_until_every_byte_is_on_disk_and_is_quiet(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("kept", 9 * MIB, stall_at=5 * MIB)
    small = origin.add("small", 1000)
    fs.add("kept", document.url)
    fs.add("small", small.url)
    waiting = fs.start([*CLI, "persist", "--wait", "kept", "small"])
    assert document.stalled.wait(WAIT)
    assert waiting.poll() is None
    document.go.set()
    assert waiting.communicate(timeout=WAIT) == (b"", b"")
    assert waiting.returncode == 0
    for name, wanted in (("kept", document), ("small", small)):
        assert Path(fs.xattr(name, "persisted_path") or "").read_bytes() == wanted.bytes()
    done = fs.run("persist", "--wait", "kept")  # nothing is left to wait for
    assert (done.stdout, done.stderr) == ("", "")


def test_ctrl_c_ends_the_wait_and_not_the_fetch(fs: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("kept", 9 * MIB, stall_at=5 * MIB)
    fs.add("kept", document.url)
    waiting = fs.start([*CLI, "persist", "--wait", "kept"])
    assert document.stalled.wait(WAIT)
    waiting.send_signal(signal.SIGINT)
    assert waiting.communicate(timeout=WAIT) == (b"", b"streamfs: interrupted\n")
    assert waiting.returncode == 130
    document.go.set()
    wait_for(lambda: fs.xattr("kept", "persisted_path"), "the fetch went on")


def test_what_fails_while_it_is_waited_for_is_one_line(fs: Mounted, tmp_path: Path, tap: Tap) -> None:
    fs.add("broken", "--shell", "echo some; echo why >&2; exit 3")
    for _ in range(2):  # the second time there is an error already; it counts once it has happened again
        assert "'broken' is not whole" in fs.refused("persist", "--wait", "broken")
    assert fs.xattr("broken", "persist") == "1"
    (tmp_path / "data").write_bytes(b"mended")
    fs.run("unpersist", "broken")
    fs.run("add", "broken", "--replace", (tmp_path / "data").as_uri())
    fs.run("persist", "--wait", "broken")
    fs.add("live", *tap.argv)
    for command, said in (
        (["unpersist", "live"], "'live' is not kept any longer"),
        (["rm", "live"], "'live' was removed"),
        (["umount"], "the daemon has ended"),
    ):
        if command == ["umount"]:
            fs.add("live", *tap.argv)
        waiting = fs.start([*CLI, "persist", "--wait", "live"])
        wait_for(lambda: fs.xattr("live", "state") == "live" and fs.xattr("live", "persist") == "1", "it is fetched")
        fs.run(*command)
        assert end_within(waiting, WAIT) == 1
        assert waiting.stderr is not None
        assert said in waiting.stderr.read().decode()


def test_waiting_without_a_daemon_says_that_nothing_comes(unmounted: Mounted, origin: ScriptedOrigin) -> None:
    document = origin.add("kept", 1000)
    unmounted.add("kept", document.url)
    assert "nothing to wait for" in unmounted.refused("persist", "--wait", "kept")
    assert "no stream 'lost'" in unmounted.refused("persist", "--wait", "lost")
    unmounted.mount()
    wait_for(lambda: unmounted.xattr("kept", "persisted_path"), "it is kept with the next mount")


def test_on_a_terminal_a_bar_shows_how_far_it_is(fs: Mounted, origin: ScriptedOrigin) -> None:
    fs.add("kept", origin.add("kept", 3 * MIB).url)
    ours, theirs = pty.openpty()
    waiting = fs.start([*CLI, "persist", "--wait", "kept"], stderr=theirs)
    os.close(theirs)
    shown = read_terminal(ours)
    assert end_within(waiting, WAIT) == 0
    assert b"kept" in shown and b"MiB" in shown


def test_bars_are_for_terminals_only(fs: Mounted, origin: ScriptedOrigin, tmp_path: Path) -> None:
    document = origin.add("data", 3 * MIB)
    fs.add("data", document.url)
    feed = tmp_path / "feeds.opml"
    item = f'<item><title>one</title><enclosure url="{document.url}"/></item>'
    podcast = origin.add("feed", 0, data=f"<rss><channel><title>f</title>{item}</channel></rss>".encode())
    feed.write_text(f'<opml><body><outline type="rss" text="f" xmlUrl="{podcast.url}"/></body></opml>')
    for command in (["save", "data", tmp_path / "out"], ["persist", "--wait", "data"], ["import", feed]):
        done = fs.run(*command)
        assert "\x1b" not in done.stdout + done.stderr and "━" not in done.stdout + done.stderr
        assert not done.stderr, command
    assert len(podcast.requests) >= 1
