"""What is particular to the output of a command; what it shares with every source is in test_source_contract.py."""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from streamfs.errors import Closed, CommandFailed, SourceFailed, SourceStalled, TooManyFiles
from streamfs.sources import command
from streamfs.sources.base import Facts
from streamfs.sources.command import ProcessBody, ProcessSource
from streamfs.spec import CommandSource, ShellSource, StreamOptions, StreamSpec
from tests.sourcefakes import until


def source(what: str | tuple[str, ...], **options: object) -> ProcessSource:
    """A shell line, or a command as it is."""
    kind = ShellSource(what) if isinstance(what, str) else CommandSource(what)
    return ProcessSource(StreamSpec(name="s", source=kind, options=StreamOptions(**options)))  # type: ignore[arg-type]


@asynccontextmanager
async def running(what: str | tuple[str, ...], **options: object) -> AsyncIterator[ProcessBody]:
    body = await source(what, **options).open(0, None, None)
    try:
        yield body
    finally:
        await body.aclose()


async def line(body: ProcessBody) -> str:
    """What one read gives, as text."""
    room = bytearray(65536)
    return room[: await body.receive_into(memoryview(room))].decode()


async def output(body: ProcessBody) -> str:
    parts = []
    while part := await line(body):
        parts.append(part)
    return "".join(parts)


async def output_of(what: str | tuple[str, ...], **options: object) -> str:
    async with running(what, **options) as body:
        return await output(body)


def alive(pid: int) -> bool:
    """Whether the process runs: a zombie, which only waits for its parent, does not."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return not poll.poll(0)
    finally:
        os.close(pidfd)


# --- how a command is started --------------------------------------------------------------------------------------


async def test_arguments_reach_the_command_as_they_are() -> None:
    arguments = ("$(touch /tmp/x)", "; ls", "a b", "*", "", "--help", "ä", "A=B")
    assert await output_of(("printf", r"[%s]\n", *arguments)) == "".join(f"[{each}]\n" for each in arguments)


async def test_a_program_may_have_an_odd_name(tmp_path: Path) -> None:
    program = tmp_path / "A=--help; x"
    program.write_text("#!/bin/sh\necho ran\n")
    program.chmod(0o755)
    assert await output_of((str(program),)) == "ran\n"
    assert await output_of(("./" + program.name,), cwd=str(tmp_path)) == "ran\n"
    assert await output_of((program.name,), env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}) == "ran\n"


async def test_a_shell_line_is_for_the_shell() -> None:
    assert await output_of('echo "$((6 * 7))" | tr 2 3; true') == "43\n"


async def test_directory_and_environment_are_those_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "inherited")
    folder = tmp_path / "-C a folder"
    folder.mkdir()
    printed = await output_of('/bin/pwd; echo "$OURS $EXTRA"', cwd=str(folder), env={"EXTRA": "x=y z"})
    assert printed == f"{folder}\ninherited x=y z\n"


async def test_standard_input_is_empty() -> None:
    assert await output_of(("cat",)) == ""


async def test_signals_are_as_in_a_fresh_shell() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        printed = await output_of(("grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGHUP, previous)
    assert printed.split() == ["SigBlk:", "0" * 16, "SigIgn:", "0" * 16]


async def test_no_descriptor_of_ours_is_passed_on(tmp_path: Path) -> None:
    ours = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(ours, True)
    try:
        assert await output_of("ls -l /proc/self/fd | grep -c -- '->'") == "4\n"  # 0, 1, 2 and the listing's own
        assert str(tmp_path) not in await output_of(("ls", "-l", "/proc/self/fd"))
    finally:
        os.close(ours)


async def test_it_leads_a_session_of_its_own() -> None:
    pid, _, _, _, group, session, terminal = (await output_of(("cat", "/proc/self/stat"))).split()[:7]
    assert pid == group == session and terminal == "0"


@pytest.mark.parametrize(("ours", "theirs"), [(0o000, "0022"), (0o077, "0077"), (0o022, "0022")])
async def test_the_umask_is_never_looser_than_ours_and_never_lets_others_write(ours: int, theirs: str) -> None:
    previous = os.umask(ours)
    try:
        assert await output_of("umask") == f"{theirs}\n"
    finally:
        os.umask(previous)


async def test_it_works_without_the_helping_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "_launcher", lambda: ())
    assert await output_of("/bin/pwd; echo $X", cwd=str(tmp_path), env={"X": "1"}) == f"{tmp_path}\n1\n"


@pytest.mark.parametrize(
    ("argv", "cwd", "says"),
    [
        (("no-such-command-anywhere",), None, "no such command in PATH"),
        (("/no/such/command",), None, "no such command"),
        (("/etc",), None, "not an executable file"),
        (("/etc/passwd",), None, "not an executable file"),
        (("true",), "/no/such/folder", "does not exist"),
        (("true",), "/etc/passwd", "directory"),
        (("true",), "/\0", "null"),
        (("a\0b",), None, "null"),
        (("echo", "a\0b"), None, "null"),
        (("echo", "\ud800"), None, "surrogate"),
        (("",), None, "empty"),
        ((), None, "empty"),
    ],
)
async def test_what_cannot_be_started_says_why_in_one_line(argv: tuple[str, ...], cwd: str | None, says: str) -> None:
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(SourceFailed, match=says) as caught:
        await source(argv, cwd=cwd).open(0, None, None)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


async def test_what_is_no_folder_in_the_search_path_is_passed_over() -> None:
    search = f"/etc/passwd:/no/such/folder:{os.environ['PATH']}"
    assert await output_of(("echo", "found"), env={"PATH": search}) == "found\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
async def test_another_users_folder_in_the_search_path_is_passed_over(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    search = f"{closed}:/usr/bin:/bin"
    os.seteuid(65534)
    try:
        await trio.to_thread.run_sync(command._check_paths, "true", None, search)
    finally:
        os.seteuid(0)


async def test_without_descriptors_left_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pipe", refuse)
    with pytest.raises(SourceFailed, match="Too many open files"):
        await source(("true",)).open(0, None, None)


async def test_a_probe_runs_nothing(tmp_path: Path) -> None:
    assert await source(f"touch {tmp_path}/ran").probe() == Facts()
    assert os.listdir(tmp_path) == []  # noqa: PTH208


# --- how it ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shell", "status", "says"),
    [
        ("exit 3", 3, "status 3$"),
        ("echo gone wrong >&2; exit 1", 1, "status 1: gone wrong$"),
        (r"printf 'a\n\tb\033[1m\r\nc\n' >&2; exit 1", 1, r"status 1: a b \[1m c$"),
        ("kill -KILL $$", 137, r"status 137 \(SIGKILL\)$"),
        ("kill -TERM $$", 143, r"status 143 \(SIGTERM\)$"),
        ("exit 255", 255, "status 255$"),
        ("no-such-command-in-a-shell", 127, "not found"),
    ],
)
async def test_failing_is_an_error_with_the_status_after_all_bytes(shell: str, status: int, says: str) -> None:
    async with running(f"echo bytes; {shell}") as body:
        assert body.exit_status is None
        assert await line(body) == "bytes\n"
        with pytest.raises(CommandFailed, match=says) as caught:
            await line(body)
        assert caught.value.status == body.exit_status == status
        assert not body.end_proven
    assert body.exit_status == status


async def test_success_is_status_0() -> None:
    async with running("echo said >&2; echo bytes") as body:
        assert await output(body) == "bytes\n"
        assert (body.exit_status, body.end_proven, body.stderr_tail) == (0, True, "said\n")


async def test_ten_megabytes_of_messages_do_no_harm() -> None:
    flood = "head -c 10000000 /dev/zero | tr '\\0' m >&2"
    async with running(f"seq 1 50000; {flood}; echo last words >&2; seq 50001 100000; exit 1") as body:
        received = []
        with pytest.raises(CommandFailed, match=r"mlast words$") as caught:
            while True:
                received.append(await line(body))
        assert "".join(received).split() == [str(n) for n in range(1, 100_001)]
        assert len(body.stderr_tail) == 4096 and body.stderr_tail.endswith("mm" + "last words\n")
        assert len(str(caught.value)) < 500


async def test_a_command_that_closes_its_output_is_waited_for() -> None:
    async with running("echo bytes; exec >&-; sleep 0.2; exit 5") as body:
        with pytest.raises(CommandFailed, match="status 5"):
            await output(body)


async def test_a_command_that_closes_its_output_and_stays_is_a_stall_where_stalls_end() -> None:
    async with running("echo bytes; exec >&-; exec sleep 1000", stall_timeout=2) as body:
        with pytest.raises(SourceStalled, match="closed its output, but runs on"):
            await output(body)


async def test_what_a_grandchild_writes_after_the_command_has_ended_counts() -> None:
    async with running("(sleep 0.2; echo late) & echo early; exit 7") as body:
        assert await line(body) == "early\n"
        assert await line(body) == "late\n"
        with pytest.raises(CommandFailed, match="status 7"):
            await line(body)


async def test_messages_do_not_put_off_a_stall() -> None:
    async with running("while echo busy >&2; do sleep 0.02; done", stall_timeout=2) as body:
        with trio.fail_after(5), pytest.raises(SourceStalled, match="silent"):
            await line(body)
        assert "busy" in body.stderr_tail


async def test_a_line_is_given_when_it_is_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    async with running("echo one; read go < go; echo two", cwd=str(tmp_path)) as body:
        assert await line(body) == "one\n"
        await trio.Path(tmp_path / "go").write_text("\n")
        assert await line(body) == "two\n"


async def test_a_cancelled_read_takes_no_byte() -> None:
    async with running(("seq", "1", "300000")) as body:
        parts = []
        while not body.end_proven:
            with trio.CancelScope() as scope:
                scope.cancel()
                parts.append(await line(body))
            parts.append(await line(body))
        assert "".join(parts).split() == [str(n) for n in range(1, 300_001)]


async def test_a_reader_that_pauses_pauses_the_command(tmp_path: Path) -> None:
    """No more than the pipe holds is produced ahead."""
    async with running(("dd", "if=/dev/zero", "bs=64k", "count=1000")) as body:
        assert await line(body)
        written = [-1, bytes_written(body)]
        while written[-1] != written[-2]:
            await trio.sleep(0.1)  # what would show that it writes on is time alone
            written.append(bytes_written(body))
        assert 0 < written[-1] <= 2 * command.PIPE_BYTES


def bytes_written(body: ProcessBody) -> int:
    """What the command has written so far, as the kernel counts."""
    counters = Path(f"/proc/{body._process.pid}/io").read_text()
    return int(counters.split("wchar: ")[1].split()[0])


# --- how it is ended -----------------------------------------------------------------------------------------------

ENDINGS: dict[str, str] = {
    "plain": "echo $$; exec sleep 1000",
    "grandchild": "sleep 1000 & echo $!; wait",
    "grandchild of an ended command": "sleep 1000 & echo $!",
    "grandchild in a group of its own": "set -m; sleep 1000 & echo $!; wait",
    "grandchild without descriptors": "sleep 1000 >/dev/null 2>&1 & echo $!",
    "stopped": "echo $$; kill -STOP $$",
    "deaf to TERM": "trap '' TERM; echo $$; while :; do sleep 1000; done",
    "deaf grandchild": "(trap '' TERM; exec sleep 1000) & echo $!; wait",
    "busy writing": "echo $$; exec yes",
}


@pytest.mark.parametrize("shell", [pytest.param(shell, id=name) for name, shell in ENDINGS.items()])
async def test_closing_ends_the_whole_session(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "TERM_GRACE", 0.3)
    body = await source(shell).open(0, None, None)
    pid = int((await line(body)).split()[0])
    leader = body._process.pid
    with trio.fail_after(3):
        await body.aclose()
    assert not alive(pid) and not alive(leader)
    assert str(leader) not in os.listdir("/proc"), "a zombie is left"  # noqa: PTH208
    assert body.exit_status is None


@contextmanager
def none_left(spare: int) -> Iterator[list[int]]:
    """This process may open only `spare` files more; gives what takes all others, to be closed."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(spare):
            os.close(taken.pop())
        yield taken
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("spare", [0, 1, 3])
async def test_closing_ends_a_large_session_with_hardly_a_descriptor_left(
    spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The groups of their own can only be found, and be ended for sure, through descriptors: there are fewer of those
    than of processes. What the command itself held becomes free as it ends."""
    monkeypatch.setattr(command, "TERM_GRACE", 0.3)
    body = await source("set -m; for n in 1 2 3 4 5 6 7 8; do sleep 1000 & echo $!; done; wait").open(0, None, None)
    said = ""
    while said.count("\n") < 8:
        said += await line(body)
    with none_left(spare), trio.fail_after(10):
        await body.aclose()
    assert not any(alive(int(pid)) for pid in said.split())


async def test_those_of_a_session_that_have_ended_take_no_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found first, stay until their parent looks at them, and may be many."""
    monkeypatch.setattr(command, "TERM_GRACE", 0.3)
    shell = "for n in $(seq 40); do true & done; set -m; sleep 1000 & echo $!; exec sleep 1000"
    body = await source(shell).open(0, None, None)
    pid = int(await line(body))
    stat = Path(f"/proc/{body._process.pid}/stat")
    await until(lambda: "sleep" in stat.read_text())
    with none_left(3), trio.fail_after(10):
        await body.aclose()
    assert not alive(pid)


async def test_a_trial_of_the_launcher_that_fails_is_not_made_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = 0

    def fails() -> tuple[str, ...]:
        nonlocal trials
        trials += 1
        raise subprocess.TimeoutExpired("env", 10)

    monkeypatch.setattr(command, "_launcher", fails)
    monkeypatch.setattr(command._Trial, "failed", float("-inf"))
    assert [await output_of("echo started") for _ in range(3)] == ["started\n"] * 3
    assert trials == 1


async def test_closing_waits_for_a_descriptor_rather_than_to_leave_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    body = await source("set -m; sleep 1000 & echo $!; wait").open(0, None, None)
    pid = int(await line(body))
    looks, listdir = 0, os.listdir

    def none_at_first(path: str) -> list[str]:
        nonlocal looks
        looks += 1
        if looks <= 3:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return listdir(path)

    with monkeypatch.context() as patch, trio.fail_after(10):
        patch.setattr(os, "listdir", none_at_first)
        await body.aclose()
    assert looks > 3
    assert not alive(pid)


async def test_commands_begun_together_leave_the_daemon_its_last_descriptors() -> None:
    """They are checked in threads, and so all found descriptors before the first had taken one."""
    bodies: list[ProcessBody] = []
    refused: list[str] = []

    async def begin() -> None:
        try:
            bodies.append(await source("exec sleep 1000").open(0, None, None))
        except TooManyFiles as error:
            refused.append(str(error))

    await output_of("true")  # the launcher is known
    try:
        with none_left(100):
            async with trio.open_nursery() as nursery:
                for _ in range(40):
                    nursery.start_soon(begin)
            free = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
            for fd in free:
                os.close(fd)
    finally:
        for body in bodies:
            await body.aclose()
    assert bodies and refused
    assert all("too many files" in said for said in refused)


async def test_a_command_has_five_seconds_to_end_by_itself(tmp_path: Path) -> None:
    script = (
        "trap 'echo tidying >&2; sleep 0.3; echo tidied > done; exit' TERM; echo ready; while :; do sleep 0.05; done"
    )
    async with running(script, cwd=str(tmp_path)) as body:
        assert await line(body) == "ready\n"
    assert "tidying" in body.stderr_tail
    assert (tmp_path / "done").read_text() == "tidied\n"
    assert command.TERM_GRACE == 5.0


async def test_closing_works_when_cancelled() -> None:
    body = await source("sleep 1000 & echo $!; wait").open(0, None, None)
    pid = int(await line(body))
    with trio.CancelScope() as scope:
        scope.cancel()
        await body.aclose()
    assert not alive(pid)


async def test_a_closed_body_gives_nothing_more() -> None:
    body = await source(("seq", "10")).open(0, None, None)
    await body.aclose()
    with pytest.raises(Closed):
        await line(body)
    assert not body.end_proven


async def test_closing_wakes_a_waiting_read() -> None:
    body = await source(("sleep", "1000")).open(0, None, None)

    async def read() -> None:
        with pytest.raises(Closed):
            await line(body)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        await body.aclose()


async def test_cancelling_the_start_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)))
    with trio.CancelScope() as scope:
        scope.cancel()
        await source(("sleep", "1000")).open(0, None, None)
    assert scope.cancelled_caught and started == []


async def test_a_directory_that_does_not_answer_ends_in_a_stall(
    monkeypatch: pytest.MonkeyPatch, hanging: Callable[..., None]
) -> None:
    monkeypatch.setattr(command, "_check_paths", hanging)
    with pytest.raises(SourceStalled, match="could not be looked up"):
        await source(("true",), stall_timeout=0.1).open(0, None, None)


@pytest.fixture
def hanging() -> Iterator[Callable[..., None]]:
    """A function that does not return during the test."""
    release = threading.Event()
    yield lambda *_: release.wait(60)  # type: ignore[misc]
    release.set()


def test_a_command_does_not_outlive_a_killed_owner(tmp_path: Path) -> None:
    owner_script = textwrap.dedent(
        """
        import trio
        from streamfs.sources.command import ProcessSource
        from streamfs.spec import CommandSource, StreamSpec

        async def main():
            argv = ("sh", "-c", "trap '' TERM HUP; echo $$; exec sleep 1000")
            body = await ProcessSource(StreamSpec(name="s", source=CommandSource(argv))).open(0, None, None)
            room = bytearray(100)
            print(room[: await body.receive_into(memoryview(room))].decode(), flush=True)
            await trio.sleep_forever()

        trio.run(main)
        """
    )
    with subprocess.Popen([sys.executable, "-c", owner_script], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            pidfd = os.pidfd_open(int(owner.stdout.readline()))
        finally:
            owner.kill()
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(5000), "the command still runs"
    finally:
        os.close(pidfd)
