"""The tab key completes commands, options and the names of streams, in real shells on a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.mounted import Mounted, wait_for

SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'eval "$(streamfs completion bash)"'),
    "zsh": (["zsh", "-f", "-i"], 'autoload -Uz compinit; compinit -u -D; eval "$(streamfs completion zsh)"'),
    "fish": (["fish", "--no-config", "-i"], "streamfs completion fish | source"),
}
TAB, CLEAR = "\t", "\x15"  # the latter empties the line


class Terminal:
    """A shell on a terminal of its own."""

    def __init__(self, argv: list[str], environment: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *argv], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def expect(self, text: str, within: float = 30.0) -> None:
        """Wait until `text` has been shown since the last time."""
        deadline = time.monotonic() + within
        while text not in self.seen:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} was not shown, but {self.seen!r}"
            self.seen += os.read(self._ours, 65536).decode("utf-8", "replace")
        self.seen = self.seen.partition(text)[2]

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        os.close(self._ours)


@pytest.fixture(params=SHELLS)
def terminal(request: pytest.FixtureRequest, unmounted: Mounted, tmp_path: Path) -> Iterator[Terminal]:
    argv, setup = SHELLS[request.param]
    path = f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"
    environment = unmounted.environment | {"PATH": path, "TERM": "xterm", "HOME": str(tmp_path), "PS1": "> "}
    made = Terminal(argv, environment)
    try:
        made.type(f"{setup}; echo 'set' up\r")
        made.expect("set up")
        yield made
    finally:
        made.close()


def test_the_tab_key_completes_commands_and_names(terminal: Terminal, unmounted: Mounted) -> None:
    for name in ("song 1*.flac", "logs/web:1", "logs/db"):
        unmounted.add(name, "--", "true")
    unmounted.mount()
    terminal.type(f"streamfs comp{TAB}")
    terminal.expect("completion")
    terminal.type(f"{CLEAR}streamfs mount --spill{TAB}")
    terminal.expect("-threshold")
    terminal.type(f"{CLEAR}streamfs rm so{TAB}")
    terminal.expect("flac")
    terminal.type(f" logs/w{TAB}")
    terminal.expect("1")
    terminal.type("; echo 'do'ne\r")
    terminal.expect("done")
    wait_for(lambda: unmounted.run("ls").stdout == "logs/db\n", "the completed names are removed")


def complete(unmounted: Mounted, *words: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "streamfs"],
        env=unmounted.environment
        | {
            "COMP_WORDS": " ".join(["streamfs", *words]),
            "COMP_CWORD": str(len(words)),
            "_STREAMFS_COMPLETE": "bash_complete",
        },
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_a_name_is_offered_once(unmounted: Mounted) -> None:
    for name in ("a1", "a2"):
        unmounted.add(name, "--", "true")
    assert complete(unmounted, "persist", "a") == ["plain,a1", "plain,a2"]
    assert complete(unmounted, "persist", "a1", "a") == ["plain,a2"]


def test_what_is_not_a_name_completes_as_what_it_is(unmounted: Mounted) -> None:
    assert complete(unmounted, "mount", "/sr") == ["dir,/sr"]
    assert complete(unmounted, "add", "x", "--netrc", "/et") == ["file,/et"]
    assert complete(unmounted, "add", "x", "--transform", "un") == ["plain,unxz", "plain,unzstd"]
    assert complete(unmounted, "mount", "--log-format", "j") == ["plain,json"]


@pytest.mark.parametrize("running", [True, False])
def test_names_that_a_line_cannot_hold_are_left_out(running: bool, unmounted: Mounted) -> None:
    for name in ("a\nb", "a\udcff", "aü"):
        unmounted.add(name, "--", "true")
    if running:
        unmounted.mount()
    assert complete(unmounted, "rm", "a") == ["plain,aü"]


def test_without_a_home_and_without_an_answer_nothing_is_offered_nor_said(unmounted: Mounted) -> None:
    assert complete(unmounted, "rm", "a") == []
    assert not unmounted.home.exists()
    unmounted.add("a", "--", "true")
    pid = unmounted.mount()
    os.kill(pid, signal.SIGSTOP)
    try:
        assert complete(unmounted, "rm", "a") == []
    finally:
        os.kill(pid, signal.SIGCONT)
