"""The command line, as people and scripts meet it: through click's runner and as real processes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from streamfs import mounts
from streamfs.board import NAME
from streamfs.board.writer import BoardWriter
from streamfs.catalog import Catalog
from streamfs.cli import checks, events, keep, tables, types
from streamfs.cli.app import cli, main
from streamfs.cli.checks import Finding, check_device
from streamfs.cli.mount import mount_options
from streamfs.control import server
from streamfs.engine.recording import Header, Recording
from streamfs.errors import AlreadyExists, Damaged, NotFound, SourceFailed
from streamfs.home import Home
from streamfs.spec import CommandSource, MountOptions, ShellSource, StreamSpec, UrlSource, from_json, to_json
from tests.fakes import flip_byte, read_terminal
from tests.test_control import Running

PROGRAM = Path(sys.executable).with_name("streamfs")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    for variable in list(os.environ):
        if variable.startswith("STREAMFS_"):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("STREAMFS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return Home.open()


def run(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[bytes]:
    """The program itself."""
    return subprocess.run(
        [PROGRAM, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
    )


def ok(*arguments: str, capfd: pytest.CaptureFixture[str]) -> str:
    """main() in this process: what it printed, and that it went well."""
    code = main(arguments)
    out, err = capfd.readouterr()
    assert (code, err) == (0, "")
    return out


def fails(*arguments: str, code: int, capfd: pytest.CaptureFixture[str]) -> str:
    """main() in this process: its one line on standard error."""
    assert main(arguments) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("streamfs: ") and err.endswith("\n") and err.count("\n") == 1
    return err


def registered(home: Home) -> list[StreamSpec]:
    with Catalog(home.catalog_path) as catalog:
        return [entry.spec for entry in catalog.all()]


# ── without a daemon ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_url_is_added_with_its_options(home: Home, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cookies.txt").write_text("")
    url = "https://u:p@h.example/x?token=1"
    out = ok(
        *("add", "a/b", url, "--size", "5MiB", "--header", "A: b:c", "--header", "D:", "--stall-timeout", "none"),
        *("--cookie-file", "cookies.txt", "--no-probe", "--insecure", "--allow-private"),
        *("--size-policy", "wait", "--proxy", "socks5h://p:1", "--transform", "gunzip", "--transform", "digest"),
        capfd=capfd,
    )
    assert out == ""
    (spec,) = registered(home)
    assert (spec.name, spec.source) == ("a/b", UrlSource(url))
    options = spec.options
    assert (options.size, options.headers) == (5 << 20, (("A", "b:c"), ("D", "")))
    assert (options.stall_timeout, options.probe, options.insecure, options.allow_private) == (None, False, True, True)
    assert options.cookie_file == str(tmp_path / "cookies.txt")
    assert (options.size_policy, options.window, options.proxy) == ("wait", None, "socks5h://p:1")
    assert (options.transforms, options.cwd) == (("gunzip", "digest"), None)


def test_a_file_in_the_home_of_nobody_is_refused(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ("add", "a", "http://h.example/a", "--netrc", "~nobody-of-that-name/netrc")
    assert "--netrc ~nobody-of-that-name/netrc" in fails(*argv, code=2, capfd=capfd)


def test_what_a_strangers_list_says_is_shown_without_control_characters(
    home: Home, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    listing = tmp_path / "list.json"
    listing.write_text(json.dumps([{"name": "a\x1b[2Jb", "url": "http://h.example/a"}]))
    assert "a\\x1b[2Jb" in ok("import", str(listing), "--dry-run", capfd=capfd)
    listing.write_text(json.dumps([{"name": "a", "x\x1b[2Jy": 1}, 5]))
    assert main(["import", str(listing)]) == 1
    assert "\x1b" not in capfd.readouterr().err


def test_events_end_in_words_where_the_next_daemons_board_cannot_be_read(home: Home) -> None:
    where = home.run / NAME
    with BoardWriter(where, {}), events._Reader(home, None) as reader:
        assert list(reader.new()) == []
        other = where.with_name("other")
        other.write_bytes(bytes(8192))  # of another version
        other.rename(where)
        with pytest.raises(Damaged, match="made by another streamfs"):
            reader.wait()


def test_a_check_that_may_not_look_keeps_the_others_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_somewhere() -> Iterator[Finding]:
        Path("/dev/null/there").stat()
        yield Finding("somewhere", "ok", "was looked at")

    monkeypatch.setattr(checks, "CHECKS", (check_somewhere, checks.check_clock))
    failed, clock = checks.findings()
    assert (failed.check, failed.state) == ("somewhere", "warning")
    assert "/dev/null/there" in failed.detail
    assert clock.check == "clock"


def test_without_streams_status_says_what_to_do(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    first, second = capfd.readouterr().out.splitlines()
    assert "no streams" in first and "no daemon runs" in second


def test_a_window_is_kept_and_excludes_waiting_for_an_end(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    ok("add", "radio", "http://h.example/live", "--window", "30m", capfd=capfd)
    assert registered(home)[0].options.window == "30m"
    argv = ("add", "other", "http://h.example/live", "--window", "30m", "--size-policy", "wait")
    line = fails(*argv, code=2, capfd=capfd)
    assert "--window" in line


@pytest.mark.parametrize(
    "argv",
    [["seq", "5"], ["sh", "-c", "a  b; c"], ["--", "--size"], ["x", "--", "y"], ["x", "", "\udce9"], ["-l"]],
)
def test_a_commands_words_are_kept_as_they_are(
    home: Home, tmp_path: Path, argv: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    ok("add", "n", "--env", "A=b=c", "--size", "3", "--", *argv, capfd=capfd)
    (spec,) = registered(home)
    assert spec.source == CommandSource(tuple(argv))
    assert (spec.options.cwd, spec.options.env, spec.options.size) == (str(tmp_path), {"A": "b=c"}, 3)


def test_a_shell_line_is_opt_in_and_size_zero_is_a_size(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    ok("add", "n", "--shell", "seq 1 | tac", "--size", "0", "--cwd", "/", capfd=capfd)
    (spec,) = registered(home)
    assert (spec.source, spec.options.cwd, spec.options.size) == (ShellSource("seq 1 | tac"), "/", 0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["n"], "say where the bytes come from"),
        (["n", "http://h/", "--shell", "x"], "cannot go together"),
        (["n", "http://h/", "--", "x"], "cannot go together"),
        (["n", "--shell", "x", "--", "y"], "cannot go together"),
        (["n", "--"], "a command must follow"),
        (["n", "http://h/", "more"], "unexpected extra argument"),
        (["n", "--", ""], "the command is empty"),
        (["n", "tail"], "a command goes after --"),
        (["n", "gopher://h/"], "cannot open gopher"),
        (["n", "http://"], "names no host"),
        (["../n", "http://h/"], "means a folder"),
        (["x" * 256, "http://h/"], "longer than 255"),
        (["n", "http://h/", "--size", "big"], "not a size"),
        (["n", "http://h/", "--window", "0"], "more than 0"),
        (["n", "http://h/", "--header", "nope"], "Name: value"),
        (["n", "http://h/", "--header", "A\nB: c"], "not a header name"),
        (["n", "http://h/", "--env", "A=b"], "for commands only"),
        (["n", "http://h/", "--cookie-file", "missing"], "No such file"),
        (["n", "http://h/", "--cacert", "/"], "Is a directory"),
        (["n", "--cwd", "missing", "--", "x"], "not a directory"),
        (["n", "--env", "A", "--", "x"], "NAME=VALUE"),
        (["n", "--header", "A: b", "--", "x"], "for URLs only"),
        (["n", "http://h/", "--stall-timeout", "0"], "more than 0"),
        (["n", "http://h/", "--nonsense"], "--nonsense"),
        ([], "Missing argument"),
    ],
)
def test_what_cannot_be_added_is_a_usage_error_of_one_line(
    home: Home, arguments: list[str], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert text.lower() in fails("add", *arguments, code=2, capfd=capfd).lower()
    assert registered(home) == []


def test_a_local_file_named_as_a_url_gets_the_url_to_use(
    home: Home, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a b").write_text("")
    assert f"file://{tmp_path}/a%20b" in fails("add", "n", "a b", code=2, capfd=capfd)


def test_every_option_reads_the_environment(
    home: Home, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STREAMFS_ADD_STALL_TIMEOUT", "5s")
    monkeypatch.setenv("STREAMFS_ADD_HEADER", "A: b c\nD: e")
    monkeypatch.setenv("STREAMFS_LS_JSON", "1")
    ok("add", "n", "http://h/", capfd=capfd)
    (spec,) = registered(home)
    assert (spec.stall_timeout, spec.options.headers) == (5.0, (("A", "b c"), ("D", "e")))
    assert json.loads(ok("ls", capfd=capfd))["version"] == 1


def test_registering_life(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "f/x", "f/y"):
        ok("add", name, "http://h/", capfd=capfd)
    assert "exists already" in fails("add", "a", "http://h/", code=1, capfd=capfd)
    assert "is a folder" in fails("add", "f", "http://h/", code=1, capfd=capfd)
    ok("add", "a", "http://h/2", "--replace", capfd=capfd)
    ok("mv", "f", "g", capfd=capfd)
    ok("persist", "g/x", "a", capfd=capfd)
    ok("unpersist", "a", capfd=capfd)
    assert ok("ls", capfd=capfd) == "a\ng/x\ng/y\n"
    rows = json.loads(ok("ls", "--json", capfd=capfd))
    assert rows["version"] == 1
    assert [(row["name"], row["persist"]) for row in rows["streams"]] == [("a", False), ("g/x", True), ("g/y", False)]
    assert "no stream 'nix'" in fails("rm", "a", "nix", code=1, capfd=capfd)
    ok("rm", "a", "g/y", capfd=capfd)
    assert ok("ls", capfd=capfd) == "g/x\n"


def test_the_json_shape_is_the_documented_one_and_holds_no_secret(
    home: Home, capfd: pytest.CaptureFixture[str]
) -> None:
    ok("add", "n", "http://me:canary@h/?t=canary", "--header", "A: canary", "--size", "7", capfd=capfd)
    for command in (["ls", "--json"], ["status", "--json"], ["status", "n", "--json"]):
        text = ok(*command, capfd=capfd)
        (row,) = json.loads(text)["streams"]
        wanted = {"state": "idle", "size": 7, "buffered": 0, "readers": 0, "persist": False, "error": None}
        assert wanted.items() <= row.items()
        assert "canary" not in text
    for command in (["ls", "-l"], ["status"]):
        assert "canary" not in ok(*command, capfd=capfd)
    assert "no stream 'x'" in fails("status", "x", code=1, capfd=capfd)


def test_control_characters_of_names_do_not_reach_the_table(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    ok("add", "a\x1b[31m\n", "http://h/", capfd=capfd)
    assert "a\\x1b[31m\\x0a" in ok("ls", "-l", capfd=capfd)


def test_the_cache_is_shown_verified_evicted_and_removed_without_a_daemon(
    home: Home, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        ok("add", name, "http://h/", capfd=capfd)
    with Catalog(home.catalog_path) as catalog:
        ids = {entry.name: entry.id for entry in catalog.all()}
        catalog.set_persist(ids["b"], True)
    for name in ("a", "b"):
        path = home.cache / f"{ids[name]}-1.data"
        recording = Recording.create(path, Header(key=f"{ids[name]}:x", generation=1))
        recording.publish(recording.append([(0, memoryview(b"z" * 5000))]))
        recording.complete(5000)
    rows = json.loads(ok("ls", "--json", capfd=capfd))["streams"]
    assert [(row["state"], row["buffered"], row["size"]) for row in rows] == [("complete", 5000, 5000)] * 2
    assert "5000 bytes are right" in ok("verify", capfd=capfd)

    with open(home.cache / f"{ids['a']}-1.data", "r+b") as file:
        file.write(b"!")
    assert main(["verify"]) == 1
    assert "DAMAGED  a  0 bytes are right; 5000 are damaged, at bytes 0-5000\n" in capfd.readouterr().out
    flip_byte(home.cache / f"{ids['b']}-1.data.index", 40)
    assert main(["verify", "b"]) == 1
    assert "DAMAGED  b  5000 bytes are right; " in (told := capfd.readouterr().out)
    assert "bytes of the index are damaged" in told

    assert "persisted" in fails("evict", "b", code=1, capfd=capfd)
    ok("evict", "--all", capfd=capfd)
    assert sorted(path.name for path in home.cache.iterdir()) == [f"{ids['b']}-1.data", f"{ids['b']}-1.data.index"]
    ok("rm", "b", capfd=capfd)
    assert list(home.cache.iterdir()) == []
    assert "either NAMEs or --all" in fails("evict", code=2, capfd=capfd)


def test_an_unsafe_home_is_refused_in_one_line(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    home.state.chmod(0o777)
    assert "others may write" in fails("ls", code=1, capfd=capfd)


def test_a_damaged_catalogue_is_refused_in_one_line(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    home.catalog_path.write_bytes(b"x" * 10_000)
    assert "move the file away" in fails("ls", code=1, capfd=capfd)


def test_a_bug_is_one_line_too(home: Home, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Home, "locate", lambda: 1 / 0)
    assert "internal error: ZeroDivisionError" in fails("ls", code=1, capfd=capfd)
    monkeypatch.setenv("STREAMFS_DEBUG", "1")
    assert main(["ls"]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_help_is_there_for_every_command() -> None:
    runner = CliRunner()
    for name in cli.commands:
        result: Result = runner.invoke(cli, [name, "--help"], prog_name="streamfs")
        assert result.exit_code == 0
        assert result.output.startswith(f"Usage: streamfs {name}")
    text = runner.invoke(cli, ["add", "--help"]).output
    assert "(URL | --shell LINE | -- COMMAND [ARG]...)" in text
    assert "streamfs add numbers -- seq 1 5000000" in text


# ── as a process ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_exit_codes_and_streams_of_the_program(home: Home) -> None:
    assert (run("ls").returncode, run("add", "n").returncode, run("rm", "n").returncode) == (0, 2, 1)
    unknown = run("frobnicate")
    assert unknown.returncode == 2 and unknown.stdout == b"" and unknown.stderr.startswith(b"streamfs: ")
    assert run().returncode == 2
    assert run("--version").stdout.startswith(b"streamfs")
    module = subprocess.run([sys.executable, "-m", "streamfs", "--version"], capture_output=True, check=True)
    assert module.stdout.startswith(b"streamfs")


def test_names_that_are_no_utf8_go_in_and_come_out(home: Home) -> None:
    done = subprocess.run([PROGRAM, b"add", b"caf\xe9", b"--", b"cat", b"\xe9"], check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert run("ls").stdout == b"caf\xe9\n"
    assert json.loads(run("ls", "--json").stdout)["streams"][0]["name"] == "caf\udce9"


def test_the_listing_loads_nothing_heavy(home: Home) -> None:
    script = (
        "import sys, streamfs; before = set(sys.modules); from streamfs.cli import main;"
        "main(['add', 'a', 'http://h/']); main(['ls', '-l']);"
        "sys.exit(bool({'trio', 'pyfuse3', 'pycurl', 'rich', 'h11', 'streamfs.sources'} & (set(sys.modules) - before)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_a_reader_that_leaves_early_is_no_traceback(home: Home) -> None:
    with Catalog(home.catalog_path) as catalog:
        catalog.add_many(StreamSpec(name=f"s{i}", source=UrlSource("http://h/" + "x" * 100)) for i in range(5000))
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([PROGRAM, "ls", "-l"], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_ctrl_c_ends_watching_with_130(home: Home) -> None:
    child = subprocess.Popen(
        [PROGRAM, "status", "--watch", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert json.loads(child.stdout.readline()) == {"version": 1, "streams": [], "disk_error": None}
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=10)
    assert (child.returncode, err) == (130, "streamfs: interrupted\n")


def test_many_programs_add_at_once_and_every_stream_is_there(home: Home) -> None:
    children = [subprocess.Popen([PROGRAM, "add", f"s{i}", "http://h/"]) for i in range(8)]
    assert [child.wait(60) for child in children] == [0] * 8
    assert [spec.name for spec in registered(home)] == [f"s{i}" for i in range(8)]


# ── with a daemon ────────────────────────────────────────────────────────────────────────────────────────────────


class Daemon:
    """What the commands ask of a daemon, recorded; `answers` holds results, or errors to raise."""

    def __init__(self, home: Home, mountpoint: Path) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {
            "ping": {"pid": os.getpid(), "mountpoint": str(mountpoint), "version": "0"},
            "list": [{"name": "a", "source": "s", "state": "live", "size": None, "buffered": 9, "readers": 2}],
            "status": [{"name": "b", "source": "s", "state": "failed", "error": "it broke"}],
            "verify": [{"name": "a", "ok": False, "detail": "2 bytes"}],
        }
        methods = ("ping", "add", "add_many", "remove", "rename", "list", "status", "persist", "evict", "verify")
        self.handlers: dict[str, server.Handler] = {name: self._handler(name) for name in methods}
        self.running = Running(home, self.handlers)

    def _handler(self, name: str) -> server.Handler:
        async def handler(params: dict[str, Any]) -> Any:
            self.asked.append((name, params))
            answer = self.answers.get(name)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return handler


@pytest.fixture
def daemon(home: Home, tmp_path: Path) -> Iterator[Daemon]:
    (tmp_path / "mnt").mkdir()
    daemon = Daemon(home, tmp_path / "mnt")
    with daemon.running:
        yield daemon


def test_changes_go_to_a_running_daemon(daemon: Daemon, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ok("add", "n", "--", "seq", "5", capfd=capfd)
    ((method, params),) = daemon.asked
    spec = from_json(to_json(params["spec"]), StreamSpec)
    assert (method, spec.name, spec.source, spec.options.cwd) == (
        "add",
        "n",
        CommandSource(("seq", "5")),
        str(tmp_path),
    )
    daemon.asked.clear()
    for command in (["rm", "a", "b"], ["mv", "a", "b"], ["persist", "a"], ["unpersist", "a"], ["evict", "--all"]):
        ok(*command, capfd=capfd)
    assert daemon.asked == [
        ("remove", {"names": ["a", "b"]}),
        ("rename", {"old": "a", "new": "b"}),
        ("persist", {"names": ["a"], "on": True}),
        ("persist", {"names": ["a"], "on": False}),
        ("evict", {"names": [], "all": True}),
    ]


def test_what_a_daemon_says_is_shown(daemon: Daemon, capfd: pytest.CaptureFixture[str]) -> None:
    assert json.loads(ok("ls", "--json", capfd=capfd)) == {"version": 1, "streams": daemon.answers["list"]}
    assert "live" in ok("ls", "-l", capfd=capfd)
    text = ok("status", "b", capfd=capfd)
    assert "it broke" in text and "no daemon runs" not in text
    assert main(["verify", "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["verified"] == daemon.answers["verify"]


def test_a_daemons_errors_are_one_line(daemon: Daemon, capfd: pytest.CaptureFixture[str]) -> None:
    daemon.answers |= {"add": AlreadyExists("it is there"), "remove": NotFound("it is not"), "list": {"odd": 1}}
    assert fails("add", "n", "http://h/", code=1, capfd=capfd) == "streamfs: it is there\n"
    assert fails("rm", "n", code=1, capfd=capfd) == "streamfs: it is not\n"
    assert "makes no sense" in fails("ls", code=1, capfd=capfd)


def test_the_daemons_socket_is_found_where_it_says_it_listens(
    daemon: Daemon, home: Home, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    home.socket_path.rename(elsewhere)
    home.lock_path.write_text(json.dumps({"pid": os.getpid(), "socket": str(elsewhere)}))
    assert ok("ls", capfd=capfd) == "a\n"
    elsewhere.rename(home.socket_path)


# ── save ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_save_copies_all_and_leaves_nothing_else(
    daemon: Daemon, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = os.urandom(keep.READ * 2 + 12345)
    (tmp_path / "mnt/a").write_bytes(data)
    (tmp_path / "out").mkdir()
    dest = tmp_path / "out" / ("d" * 250)
    before = os.umask(0o022)
    try:
        assert ok("save", "a", str(dest), capfd=capfd) == ""
    finally:
        os.umask(before)
    assert dest.read_bytes() == data
    assert stat.S_IMODE(dest.stat().st_mode) == 0o644
    assert list(dest.parent.iterdir()) == [dest]


def test_a_saved_file_and_its_folder_are_synced_in_that_order(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mnt/a").write_bytes(b"all of it")
    (tmp_path / "out").mkdir()
    dest, order = tmp_path / "out" / "dest", []
    real = os.fsync

    def note(fd: int) -> None:
        order.append((Path(f"/proc/self/fd/{fd}").readlink().name.split(".part-")[0], dest.exists()))
        real(fd)

    monkeypatch.setattr(os, "fsync", note)
    ok("save", "a", str(dest), capfd=capfd)
    assert order == [("dest", False), ("out", True)]


def test_save_replaces_a_file_and_follows_a_link(
    daemon: Daemon, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mnt/a").write_bytes(b"new")
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "target").chmod(0o600)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    ok("save", "a", "link", capfd=capfd)
    assert (tmp_path / "target").read_bytes() == b"new"
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o600  # what was private stays so
    assert (tmp_path / "link").is_symlink()


def test_what_is_saved_over_a_private_file_is_private_from_the_first_byte_on(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    target.chmod(0o4600)
    with keep._part_of(target) as (fd, finish):
        assert os.fstat(fd).st_mode & 0o7777 == 0o600  # nor does it become another's program
        os.write(fd, b"new")
        finish(3)
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o7777 == 0o600


@pytest.mark.parametrize(
    ("dest", "text"),
    [("mnt", "a directory"), ("missing/x", "no such directory"), ("/dev/null", "a regular file")],
)
def test_save_refuses_what_cannot_be_replaced(
    daemon: Daemon, tmp_path: Path, dest: str, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mnt/a").write_bytes(b"x")
    assert text in fails("save", "a", dest, code=1, capfd=capfd)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "mnt"]


@contextlib.contextmanager
def failing_reads(monkeypatch: pytest.MonkeyPatch, after: int, error: Callable[[], BaseException]) -> Iterator[None]:
    reads = 0
    real = os.readv

    def readv(fd: int, buffers: Any) -> int:
        nonlocal reads
        reads += 1
        if reads > after:
            raise error()
        return real(fd, buffers)

    with monkeypatch.context() as patch:
        patch.setattr(os, "readv", readv)
        yield


def test_a_save_that_fails_says_why_and_leaves_dest_as_it_was(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source, dest = tmp_path / "mnt/a", tmp_path / "out"
    source.write_bytes(b"x" * (keep.READ + 1))
    dest.write_bytes(b"old")
    with contextlib.suppress(OSError):
        os.setxattr(source, "user.streamfs.error", b"the server hung up")
    with failing_reads(monkeypatch, 1, lambda: OSError(5, "Input/output error")):
        line = fails("save", "a", "out", code=1, capfd=capfd)
    assert f"after {keep.READ} bytes" in line
    assert "the server hung up" in line or "Input/output error" in line
    with failing_reads(monkeypatch, 1, KeyboardInterrupt):
        assert fails("save", "a", "out", code=130, capfd=capfd) == "streamfs: interrupted\n"
    assert "no stream 'nix'" in fails("save", "nix", "out", code=1, capfd=capfd)
    assert dest.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "mnt", "out"]


def test_an_early_end_is_no_success(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mnt/a").write_bytes(b"x" * (keep.READ * 2))
    real, reads = os.readv, iter([True, False])
    monkeypatch.setattr(os, "readv", lambda fd, buffers: real(fd, buffers) if next(reads) else 0)
    assert "ended after" in fails("save", "a", "out", code=1, capfd=capfd)
    assert not (tmp_path / "out").exists()


def test_a_terminated_save_leaves_no_part(daemon: Daemon, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mnt/a")
    (tmp_path / "out").mkdir()
    child = subprocess.Popen([PROGRAM, "save", "a", "out/x"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not list((tmp_path / "out").iterdir()):  # the part shows that it waits in its open
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    child.terminate()
    child.communicate(timeout=10)
    assert child.returncode == 128 + signal.SIGTERM
    assert list((tmp_path / "out").iterdir()) == []


def test_on_a_terminal_a_bar_shows_the_progress(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "mnt/a").write_bytes(b"x" * 3_000_000)
    ours, theirs = pty.openpty()
    child = subprocess.Popen([PROGRAM, "save", "a", "out"], stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    shown = read_terminal(ours)
    assert child.wait(20) == 0
    assert b"MiB" in shown or b"MB" in shown
    assert (tmp_path / "out").stat().st_size == 3_000_000


def test_without_a_daemon_the_stream_is_read_here(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from streamfs import daemon

    def save_offline(home: Home, name: str, write: Callable[[memoryview], None], progress: keep.Progress) -> None:
        write(memoryview(b"some "))
        progress(5, None)
        write(memoryview(b"bytes"))
        if name == "bad":
            raise SourceFailed("it broke off")

    monkeypatch.setattr(daemon, "save_offline", save_offline)
    ok("save", "good", "out", capfd=capfd)
    assert (tmp_path / "out").read_bytes() == b"some bytes"
    assert fails("save", "bad", "out", code=1, capfd=capfd) == "streamfs: it broke off\n"
    assert (tmp_path / "out").read_bytes() == b"some bytes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]


# ── mount, umount, doctor ────────────────────────────────────────────────────────────────────────────────────────


def test_mount_hands_its_options_to_the_daemon(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from streamfs import daemon

    calls: list[tuple[Any, ...]] = []

    def start(*arguments: Any) -> int:
        calls.append(arguments)
        return len(calls) - 1

    monkeypatch.setattr(daemon, "start", start)
    monkeypatch.setenv("STREAMFS_MOUNT_READ_AHEAD", "1MiB")
    options = ("--memory", "1GiB", "--cache-size", "none", "--ttl", "2h", "--cache-dir", "cache", "--allow-other")
    ok("mount", "mnt", "--foreground", *options, capfd=capfd)
    wanted = MountOptions(
        allow_other=True,
        memory=1 << 30,
        cache_size=None,
        ttl=7200,
        cache_dir=str(tmp_path / "cache"),
        read_ahead=1 << 20,
    )
    assert calls == [(home, tmp_path / "mnt", wanted, True)]
    assert main(["mount", "mnt"]) == 1
    assert calls[1][3] is False
    assert "not a size" in fails("mount", "mnt", "--memory", "x", code=2, capfd=capfd)
    assert "at least 1MiB" in fails("mount", "mnt", "--memory", "5", code=2, capfd=capfd)


def test_mount_options_keep_their_defaults() -> None:
    assert mount_options({"memory": None, "cache_dir": None, "allow_other": False}) == MountOptions()
    assert mount_options({"cache_size": types.NONE}).cache_size is None


def test_umount_tells_what_cannot_be_unmounted(home: Home, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "no daemon runs" in fails("umount", code=1, capfd=capfd)
    assert "nothing is mounted" in fails("umount", str(tmp_path), code=1, capfd=capfd)
    assert "not a mount of streamfs" in fails("umount", "/proc", code=1, capfd=capfd)


def test_umount_waits_until_the_daemon_has_gone(home: Home, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    daemon = Daemon(home, tmp_path / "mnt")

    async def shutdown(params: dict[str, Any]) -> None:
        daemon.asked.append(("shutdown", params))
        daemon.running.stop_soon()

    daemon.handlers["shutdown"] = shutdown
    with daemon.running:
        ok("umount", "--lazy", capfd=capfd)
        home.lock().release()
    assert daemon.asked[-1] == ("shutdown", {"lazy": True})


def test_the_mount_table_is_read_with_its_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (
        b"22 1 0:21 / / rw shared:1 - ext4 /dev/sda1 rw\n"
        b"99 22 0:50 / /mnt/a\\040b\\134 rw,nosuid shared:9 master:1 - fuse.streamfs streamfs rw,user_id=0\n"
        b"98 22 0:51 / /mnt/c rw - fuse.sshfs h:/ rw\n"
    )
    monkeypatch.setattr(Path, "read_bytes", lambda self: table)
    found = mounts.mounts()
    assert [(mount.path, mount.is_streamfs) for mount in found] == [
        ("/", False),
        ("/mnt/a b\\", True),
        ("/mnt/c", False),
    ]
    assert mounts.mounted_at("/mnt/c/../c") == found[2]


def test_doctor_tells_what_is_wrong_and_what_to_do(home: Home, tmp_path: Path) -> None:
    done = run("doctor", "--json")
    findings = json.loads(done.stdout)["findings"]
    problems = [finding for finding in findings if finding["state"] == "problem"]
    assert done.returncode == (1 if problems else 0)
    assert {"home", "libcurl", "disk", "daemon", "mounts"} <= {finding["check"] for finding in findings}
    home.cache.chmod(0o777)
    text = run("doctor")
    assert text.returncode == 1
    assert b"PROBLEM  home: others may write" in text.stdout and b"->" in text.stdout
    (finding,) = check_device(str(tmp_path / "missing"))
    assert isinstance(finding, Finding)
    assert (finding.state, "modprobe fuse" in finding.advice) == ("problem", True)


@pytest.mark.parametrize(
    ("size", "text"), [(None, "?"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")]
)
def test_sizes_for_people(size: int | None, text: str) -> None:
    assert tables.human_size(size) == text
