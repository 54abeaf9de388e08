"""Standard output of a command, as a one-way source: every run is a version of its own.

A command runs in a session of its own, so that its whole family can be ended together. It is started through two
small system programs where they exist (`env`, coreutils; `setpriv`, util-linux): they put back the default signal
handling, change the directory, and have the kernel end the command when this process dies, even by SIGKILL. They
do so after the first exec, which is all that the event loop waits for: a directory or program on a file system that
does not answer (or on our own mount) cannot hold it up. What the kernel does not end on our death: grandchildren,
and programs that gain privileges; they meet SIGPIPE at their next write.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import select
import shutil
import signal
import stat
import subprocess
import threading
import time
from pathlib import Path

import trio

from streamfs import descriptors
from streamfs.errors import Closed, CommandFailed, SourceChanged, SourceFailed, SourceStalled, StreamfsError
from streamfs.sources.base import Facts
from streamfs.spec import DEFAULT_STALL_TIMEOUT, CommandSource, ShellSource, StreamSpec

PIPE_BYTES = 1 << 20  # the kernel's default limit for a pipe of an ordinary user (/proc/sys/fs/pipe-max-size)
STDERR_TAIL = 4096  # bytes kept of what the command says on standard error
TERM_GRACE = 5.0  # seconds between SIGTERM and SIGKILL
KILL_GRACE = 2.0  # seconds for the kernel to end what got SIGKILL; only sleep in a driver takes longer
_STDERR_READ = 1 << 16  # bytes a read; a default pipe holds no more
_STDERR_READS = 16  # reads a wake-up at most, so that a flood of messages leaves time for other tasks
_MESSAGE_TAIL = 300  # characters of standard error quoted in an error
_TRIAL_AGAIN = 60.0  # seconds after a trial of the launcher that failed, in which there is no other
_SPENT_RETRY = 0.05  # seconds between two looks for what is left of a session, where descriptors have run out

_log = logging.getLogger(__name__)


class ProcessSource:
    """Runs `spec.source` (a CommandSource as it is, a ShellSource by /bin/sh -c) once for every `open`."""

    def __init__(self, spec: StreamSpec) -> None:
        match spec.source:
            case CommandSource(argv=argv):
                self._argv = argv
            case ShellSource(line=line):
                self._argv = ("/bin/sh", "-c", line)
            case _:
                raise TypeError(f"not a command: {type(spec.source).__name__}")
        self._cwd = spec.options.cwd
        self._extra_environment = spec.options.env
        self._stall_timeout = spec.stall_timeout
        # Checks of paths run in threads that may hang with their file system; they hold up this stream's alone.
        self._threads = trio.CapacityLimiter(4)

    async def open(self, start: int, stop: int | None, expect: Facts | None) -> ProcessBody:
        """Start the command. The body begins at 0 whatever `start` says and runs to the end whatever `stop` says.

        Raises SourceFailed where the command cannot be started, and SourceChanged when asked to continue
        (`expect`): what another run prints is another version."""
        if expect is not None:
            raise SourceChanged("a command's output cannot be continued by running it again")
        environment = os.environ | self._extra_environment
        patience = DEFAULT_STALL_TIMEOUT if self._stall_timeout is None else self._stall_timeout
        with trio.move_on_after(patience):
            launcher, umask = await trio.to_thread.run_sync(
                _prepare, self._argv, self._cwd, environment, abandon_on_cancel=True, limiter=self._threads
            )
            # No await from here on: a started process always has its body.
            return _start(self._argv, launcher, self._cwd, environment, umask, self._stall_timeout)
        raise SourceStalled(f"the command {self._argv[0]!r} could not be looked up within {patience:g} s")

    def begin(self, start: int, stop: int, expect: Facts) -> None:
        """There is one run, and no place in it to ask for."""

    async def probe(self) -> Facts:
        """Nothing can be known without running the command."""
        await trio.lowlevel.checkpoint()
        return Facts()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class ProcessBody:
    """The output of one running command. Its end is proven by exit status 0."""

    facts = Facts()
    start = 0

    def __init__(self, process: subprocess.Popen[bytes], stdout: int, stderr: int, stall_timeout: float | None) -> None:
        """Takes over the process (a session leader) and both descriptors (non-blocking read ends)."""
        self._process = process
        self._stall_timeout = stall_timeout
        self._stdout = stdout
        self._stderr: int | None = stderr
        self._tail = b""
        self._failure: StreamfsError | None = None
        self._closed = False
        self.exit_status: int | None = None
        """As a shell shows it (128 + N for signal N) once the command has ended by itself; None before, and None
        for ever where `aclose` had to end it."""
        self.end_proven = False
        with contextlib.ExitStack() as undo:
            self._pidfd = os.pidfd_open(process.pid)
            undo.callback(os.close, self._pidfd)
            # Standard output and error, and later error and the exit, are waited for as one descriptor.
            self._events = select.epoll()
            undo.callback(self._events.close)
            self._events.register(stdout, select.EPOLLIN)
            self._events.register(stderr, select.EPOLLIN)
            undo.pop_all()

    @property
    def stderr_tail(self) -> str:
        """The last 4 KiB of standard error that have been read so far."""
        return self._tail.decode("utf-8", "replace")

    async def receive_into(self, view: memoryview) -> int:
        """As the protocol says. 0: every process that held the output has closed it, and the command ended with
        status 0. Raises CommandFailed for another status, SourceStalled, Closed after `aclose`.
        Bytes are never lost to a cancellation."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._closed:
            raise Closed("the command's output was closed")
        if self._failure is not None:
            raise self._failure
        if self.end_proven:
            return 0
        try:
            return await self._receive(view)
        except StreamfsError as error:
            self._failure = error
            raise

    async def _receive(self, view: memoryview) -> int:
        with trio.move_on_after(float("inf") if self._stall_timeout is None else self._stall_timeout):
            while True:
                received = self._read_stdout(view)
                if received:
                    # Shielded: what has been taken from the pipe must reach the caller.
                    await trio.lowlevel.cancel_shielded_checkpoint()
                    return received
                if received == 0 and self._has_exited():
                    break
                await self._wait_for_events()
        if self.exit_status is None:
            state = "is silent" if self._stdout >= 0 else "has closed its output, but runs on"
            raise SourceStalled(f"the command {state} for {self._stall_timeout:g} s")
        self._drain_stderr()
        if self.exit_status != 0:
            raise CommandFailed(self._failure_text(), self.exit_status)
        self.end_proven = True
        return 0

    def _read_stdout(self, view: memoryview) -> int | None:
        """Bytes put into `view`; 0 once the output has ended, None while there is nothing to read."""
        if self._stdout < 0:
            return 0
        try:
            received = os.readv(self._stdout, [view])
        except BlockingIOError:
            return None
        except OSError as error:
            raise SourceFailed(f"reading the command's output failed: {error.strerror}") from error
        if received == 0:
            os.close(self._stdout)  # this unregisters it as well: nobody else holds this end
            self._stdout = -1
            self._events.register(self._pidfd, select.EPOLLIN)
        return received

    def _has_exited(self) -> bool:
        """Look for the exit status. The process stays a zombie until `aclose`: so long its number, which is its
        session's too, cannot come to mean somebody else."""
        result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if result is None:
            return False
        self.exit_status = result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status
        return True

    async def _wait_for_events(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self._events.fileno())
        except trio.ClosedResourceError:
            raise Closed("the command's output was closed") from None
        self._drain_stderr()

    def _drain_stderr(self) -> None:
        """Read what has been said on standard error and keep its tail. Never waits."""
        for _ in range(_STDERR_READS):
            if self._stderr is None:
                return
            try:
                said = os.read(self._stderr, _STDERR_READ)
            except BlockingIOError:
                return
            if not said:
                os.close(self._stderr)
                self._stderr = None
                return
            self._tail = (self._tail + said)[-STDERR_TAIL:]

    def _failure_text(self) -> str:
        assert self.exit_status is not None
        status = str(self.exit_status)
        if self.exit_status > 128:
            with contextlib.suppress(ValueError):  # a program may well return 200 by itself
                status = f"{status} ({signal.Signals(self.exit_status - 128).name})"
        said = "".join(c if c.isprintable() else " " for c in self.stderr_tail)
        said = " ".join(said.split())
        if len(said) > _MESSAGE_TAIL:
            said = "…" + said[-_MESSAGE_TAIL:]
        return f"the command ended with status {status}" + (f": {said}" if said else "")

    async def aclose(self) -> None:
        """End the command and everything in its session: SIGTERM, and SIGKILL after 5 s, or at once when cancelled.
        Returns when they are gone, within 7 s, and within 2 s of a cancellation."""
        if self._closed:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        self._closed = True
        trio.lowlevel.notify_closing(self._events.fileno())
        self._events.close()
        try:
            _signal_group(self._process.pid, signal.SIGTERM)
            self._close_stdout()  # nobody reads: as at the end of `| head`, SIGPIPE for whoever writes on
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._drain_stderr_to_the_end)
                with trio.move_on_after(TERM_GRACE):
                    await _signal_until_gone(self._process.pid, signal.SIGTERM)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await _kill_session(self._process.pid)
            self._close_stdout()
            self._drain_stderr()
            if self._stderr is not None:
                os.close(self._stderr)
                self._stderr = None
            os.close(self._pidfd)
            if self._process.poll() is None:
                _log.warning("process %d survives SIGKILL; it is left to itself", self._process.pid)

    async def _drain_stderr_to_the_end(self) -> None:
        """Last words must not end in SIGPIPE: a shell says "Terminated" before it runs its trap."""
        self._drain_stderr()
        while self._stderr is not None:
            await trio.lowlevel.wait_readable(self._stderr)
            self._drain_stderr()

    def _close_stdout(self) -> None:
        if self._stdout >= 0:
            os.close(self._stdout)
            self._stdout = -1


def _prepare(argv: tuple[str, ...], cwd: str | None, environment: dict[str, str]) -> tuple[tuple[str, ...], int]:
    """Check in a thread that the command can be started; what to start it through, and the umask to start it with.
    Raises SourceFailed with one line that says what is wrong, TooManyFiles."""
    if not argv or not argv[0]:
        raise SourceFailed("the command is empty")
    try:
        _check_paths(argv[0], cwd, environment.get("PATH", os.defpath))
    except ValueError as error:  # a NUL byte or a lone surrogate
        raise SourceFailed(f"cannot run {argv[0]!r}: {error}") from error
    try:
        return _tried_launcher(), _umask()
    except OSError as error:
        if error.errno in descriptors.SPENT:
            raise descriptors.too_many() from error
        raise SourceFailed(f"cannot run {argv[0]!r}: {error.strerror}") from error


def _check_paths(program: str, cwd: str | None, search: str) -> None:
    """Raises SourceFailed, and ValueError for a path that no file can have. What may not be looked at, such as
    another user's folder in PATH, counts as missing: execvp(3) passes over it as well."""
    if cwd is not None and _mode(cwd) is None:
        raise SourceFailed(f"cannot run the command in {cwd!r}: the directory does not exist")
    if cwd is not None and not stat.S_ISDIR(_mode(cwd) or 0):
        raise SourceFailed(f"cannot run the command in {cwd!r}: not a directory")
    if cwd is not None and not os.access(cwd, os.X_OK):
        raise SourceFailed(f"cannot run the command in {cwd!r}: the directory is closed to this user")
    entries = [""] if "/" in program else search.split(os.pathsep)
    candidates = [str(Path(cwd or ".", entry, program)) for entry in entries]
    found = [(path, mode) for path in candidates if (mode := _mode(path)) is not None]
    if any(stat.S_ISREG(mode) and os.access(path, os.X_OK) for path, mode in found):
        return
    if found:
        raise SourceFailed(f"cannot run {program!r}: it is not an executable file")
    raise SourceFailed(f"cannot run {program!r}: no such command" + ("" if "/" in program else " in PATH"))


def _mode(path: str) -> int | None:
    try:
        return Path(path).stat().st_mode
    except OSError:
        return None


class _Trial:
    """Of the launcher. One does for all who wait for it, instead of one each, with its pipes."""

    lock = threading.Lock()
    failed = float("-inf")  # when the latest did; guarded by `lock`


def _tried_launcher() -> tuple[str, ...]:
    """`_launcher()`; empty where its trial fails, and for a while after that. Raises OSError where descriptors have
    run out."""
    with _Trial.lock:
        if time.monotonic() - _Trial.failed < _TRIAL_AGAIN:
            return ()
        try:
            return _launcher()
        except (OSError, subprocess.SubprocessError) as error:
            if isinstance(error, OSError) and error.errno in descriptors.SPENT:
                raise
            _log.warning("starting commands without setpriv, whose trial failed: %s", error)
            _Trial.failed = time.monotonic()
            return ()


@functools.cache
def _launcher() -> tuple[str, ...]:
    """The programs to start a command through (see the head of this file); empty where they do not do it all.
    The death signal goes by the thread that started the command: start only from trio's own."""
    env, setpriv, true = (shutil.which(name, path="/usr/bin:/bin") for name in ("env", "setpriv", "true"))
    if env is None or setpriv is None or true is None:
        return ()
    launcher = (env, "--default-signal", "--chdir=/", setpriv, "--pdeathsig", "KILL", "--")
    trial = subprocess.run([*launcher, true], stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=10)
    return (env, "--default-signal", setpriv, "--pdeathsig", "KILL", "--") if trial.returncode == 0 else ()


def _umask() -> int:
    """This process's umask, made to forbid writing by group and others."""
    status = Path("/proc/self/status").read_text()  # os.umask() could only be read by changing it for all threads
    own = next((line.split()[1] for line in status.splitlines() if line.startswith("Umask:")), "022")
    return int(own, 8) | 0o022


def _start(
    argv: tuple[str, ...],
    launcher: tuple[str, ...],
    cwd: str | None,
    environment: dict[str, str],
    umask: int,
    stall_timeout: float | None,
) -> ProcessBody:
    """Start the process; about 1 ms (vfork). Raises SourceFailed, TooManyFiles."""
    descriptors.take_one_more()
    if launcher and cwd is not None:
        launcher = (*launcher[:2], f"--chdir={cwd}", *launcher[2:])
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as childs:
        try:
            stdout, child_stdout = _pipe(undo, childs)
            stderr, child_stderr = _pipe(undo, childs)
            with contextlib.suppress(OSError):  # over the user's share of pipe memory: a small pipe serves too
                fcntl.fcntl(stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            process = subprocess.Popen(
                [*launcher, *argv],
                stdin=subprocess.DEVNULL,
                stdout=child_stdout,
                stderr=child_stderr,
                cwd=None if launcher else cwd,
                env=environment,
                start_new_session=True,
                umask=umask,
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL byte or a lone surrogate
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise SourceFailed(f"cannot run {argv[0]!r}: {reason}") from error
        undo.callback(_kill_at_once, process)
        try:
            body = ProcessBody(process, stdout, stderr, stall_timeout)
        except OSError as error:
            raise SourceFailed(f"cannot watch {argv[0]!r}: {error.strerror}") from error
        undo.pop_all()
        return body


def _pipe(undo: contextlib.ExitStack, childs: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe with a non-blocking read end, which `undo` closes, and a write end, which `childs` closes."""
    ours, theirs = os.pipe()
    undo.callback(os.close, ours)
    childs.callback(os.close, theirs)
    os.set_blocking(ours, False)
    return ours, theirs


def _kill_at_once(process: subprocess.Popen[bytes]) -> None:
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(leader: int, signum: signal.Signals) -> None:
    """Signal the process group that `leader`, not yet reaped, leads. A stopped process is woken to receive it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or risen to rights above ours
        os.killpg(leader, signum)
        os.killpg(leader, signal.SIGCONT)


async def _kill_session(leader: int) -> None:
    """Whatever is left of the session gets SIGKILL, and KILL_GRACE to end."""
    _signal_group(leader, signal.SIGKILL)  # first what needs no descriptor
    with trio.move_on_after(KILL_GRACE) as patience:
        await _signal_until_gone(leader, signal.SIGKILL)
    if patience.cancelled_caught:
        _log.warning("of the session of process %d something may be left: it is left to itself", leader)


async def _signal_until_gone(leader: int, signum: signal.Signals) -> None:
    """Signal every process of the session once, those that appear meanwhile too, until none is left alive."""
    signalled: set[int] = set()
    while True:
        with contextlib.ExitStack() as opened:
            living = await _session_members(leader, opened)
            if not living:
                return
            for pid, pidfd in living.items():
                if pid not in signalled:
                    signalled.add(pid)
                    _signal_member(leader, pid, pidfd, signum)
            for pidfd in living.values():
                await trio.lowlevel.wait_readable(pidfd)


def _signal_member(leader: int, pid: int, pidfd: int, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if pid != leader:  # the leader was signalled with its group
            signal.pidfd_send_signal(pidfd, signum)
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)


async def _session_members(leader: int, opened: contextlib.ExitStack) -> dict[int, int]:
    """Process numbers of the session that are alive (zombies are not), each with its pidfd, which `opened` closes.
    Where descriptors are short, some of them; empty only if there are none. Where descriptors have run out, it waits
    for one."""
    living: dict[int, int] = {}
    while not living:
        try:
            for pid in (await _look_at_processes()).get(leader, ()):
                if living and descriptors.are_short():
                    break
                pidfd = _open_living(leader, pid)
                if pidfd is not None:
                    opened.callback(os.close, pidfd)
                    living[pid] = pidfd
            break
        except OSError as error:
            if error.errno not in descriptors.SPENT:
                raise
            if not living:
                await trio.sleep(_SPENT_RETRY)
    return living


def _open_living(leader: int, pid: int) -> int | None:
    """A pidfd, to be closed; None where the process has ended, or is not of the session. Raises OSError where
    descriptors have run out."""
    pidfd: int | None = None
    try:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            pidfd = os.pidfd_open(pid)
            # Looked at again through the pidfd: the number may have passed to another process in between.
            if os.getsid(pid) == leader and not _has_ended(pidfd):
                found, pidfd = pidfd, None
                return found
    finally:
        if pidfd is not None:
            os.close(pidfd)
    return None


class _Look:
    """One look at all processes, for everybody who asks before it begins."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.sessions: dict[int, list[int]] | None = None  # process numbers by session; None: it failed


_next_look: _Look | None = None


async def _look_at_processes() -> dict[int, list[int]]:
    """Process numbers by session, as they are after the call. One system call a process of the machine, so a
    thousand commands that end together share a look. Raises OSError where descriptors have run out."""
    global _next_look
    while _next_look is not None:
        others = _next_look
        with trio.CancelScope(shield=True):
            await others.done.wait()
        if others.sessions is not None:
            return others.sessions
    look = _next_look = _Look()
    try:
        await trio.lowlevel.cancel_shielded_checkpoint()
        _next_look = None
        sessions: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):  # noqa: PTH208 (half the cost of Path.iterdir, and procfs never waits)
            if entry.isdecimal():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    sessions.setdefault(os.getsid(int(entry)), []).append(int(entry))
        look.sessions = sessions
    finally:
        _next_look = None
        look.done.set()
    return sessions


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
