"""The daemon: the only trio.run, mount, signals, and the order of shutdown.

`start` checks, forks and reports; `_serve` is the life of the daemon; `save_offline` runs the same file system without
a mount for one command.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import logging
import os
import resource
import select
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

import streamfs
from streamfs import logs, mounting, mounts, turns
from streamfs.board import NAME as BOARD_NAME
from streamfs.board.writer import BoardWriter, EventLog
from streamfs.cache import Cache
from streamfs.catalog import Catalog
from streamfs.config import FILE_NAME, load
from streamfs.control.server import Handler, listen, serve
from streamfs.engine.diskreads import IN_FLIGHT
from streamfs.errors import Busy, InvalidRequest, NoSpace, NotFound, StreamfsError
from streamfs.filesystem import FileSystem
from streamfs.home import Home, HomeLock, secure_directory
from streamfs.interrupts import Interrupts
from streamfs.notify import Notifier
from streamfs.reporter import Reporter
from streamfs.settings import Settings
from streamfs.sources import Transports, make_source
from streamfs.spec import IfTaken, MountOptions, Registration, StreamSpec
from streamfs.watchdog import Watchdog

log = logging.getLogger(__name__)

MAX_TASKS = 100_000
"""Requests in progress at a time. At pyfuse3's default of 99, that many blocked readers would freeze the mount."""
START_PATIENCE = 120.0
"""Seconds that `mount` waits until its daemon's mount answers: a catalogue of 100,000 streams takes one, a disk that
spins up ten."""
LOCK_WAIT = 5.0
"""Seconds to wait for a command that changes the catalogue just now."""
EVENTS_NAME = "events.json"
"""In the state directory: events that were not recycled, for the next daemon, if the board does not last so long."""
SAVE_STEP = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_REQUEST_BUFFERS = (1 << 20) + 2048
"""Bytes between the largest object of ours (a read's, 1 MiB) and libfuse's buffers for requests (a page more)."""


def start(home: Home, mountpoint: Path, options: MountOptions, foreground: bool) -> int:
    """Mount, and serve the mount in the background (or here, with `foreground`, until it ends).

    Returns the exit code: 0 once the mount answers (`foreground`: once it has ended in order). Raises StreamfsError
    where it cannot be mounted; then nothing is left behind.
    """
    mountpoint = Path(os.path.realpath(mountpoint.parent)) / mountpoint.name
    mounting.check_fuse()
    home.prepare()
    lock = home.lock(wait=LOCK_WAIT)
    try:
        mounting.prepare_mountpoint(mountpoint)
        if foreground:
            os.umask(0o077)  # before the first file of ours
            logs.set_up(home.log_path, options.log_level, options.log_format, stderr=sys.stderr)
            return _run(home, lock, mountpoint, options, _Readiness(None))
        return _start_in_background(home, lock, mountpoint, options)
    finally:
        if lock.held:
            lock.release()


class _Readiness:
    """How the daemon tells who started it that the mount answers, or why it never will."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._manager = Notifier()

    def ready(self, status: str) -> None:
        self._tell(b"ready\n")
        self._manager.ready(status)

    def stopping(self, status: str) -> None:
        self._manager.stopping(status)

    def failed(self, reason: str) -> None:
        self._tell(b"failed " + reason.encode("utf-8", "replace"))

    def _tell(self, message: bytes) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            with contextlib.suppress(BrokenPipeError):  # who started it has lost patience; it serves all the same
                os.write(fd, message)
            os.close(fd)


def _start_in_background(home: Home, lock: HomeLock, mountpoint: Path, options: MountOptions) -> int:
    listening, telling = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(listening)
            code = _be_daemon(home, lock, mountpoint, options, telling)
        finally:
            os._exit(code)  # never back into the command line's own clean-up
    os.close(telling)
    os.waitpid(child, 0)  # the first child only forks again
    lock.abandon()
    with open(listening, "rb", buffering=0) as pipe:
        if not select.select([pipe], [], [], START_PATIENCE)[0]:
            raise StreamfsError(
                f"the mount has not answered for {START_PATIENCE:g} s; the daemon goes on trying: see {home.log_path}"
            )
        answer = pipe.read()
    if answer == b"ready\n":
        return 0
    reason = answer.removeprefix(b"failed ").decode("utf-8", "replace").strip()
    raise StreamfsError(reason or f"the daemon ended before the mount answered; see {home.log_path}")


def _be_daemon(home: Home, lock: HomeLock, mountpoint: Path, options: MountOptions, telling: int) -> int:
    os.setsid()
    if os.fork() != 0:
        return 0
    readiness = _Readiness(telling)
    try:
        _detach()
        logs.set_up(home.log_path, options.log_level, options.log_format)
        return _run(home, lock, mountpoint, options, readiness)
    except StreamfsError as error:
        log.error("%s", error)
        readiness.failed(str(error))
    except Exception as error:
        log.exception("the daemon failed")
        readiness.failed(f"the daemon failed: {error!r}; see {home.log_path}")
    return 1


def _detach() -> None:
    """Let go of the terminal and the working directory."""
    os.chdir("/")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    os.umask(0o077)  # before the first file of ours


def _run(home: Home, lock: HomeLock, mountpoint: Path, options: MountOptions, readiness: _Readiness) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold secrets and everybody's bytes
    with contextlib.suppress(OSError):  # a core_pattern that is a pipe pays no heed to the limit: then without memory
        Path("/proc/self/coredump_filter").write_text("0")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    _set_up_heap()
    lock.record(home.socket_path)
    try:
        trio.run(_serve, home, lock, mountpoint, options, readiness)
    except BaseExceptionGroup as group:
        alone = _alone(group)
        if isinstance(alone, StreamfsError):
            raise alone from None  # nurseries wrapped the one line that says why
        raise
    finally:
        lock.release()
    return 0


def _alone(error: BaseException) -> BaseException:
    """The one error in groups of one; the group where there are more."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _set_up_heap() -> None:
    """glibc gives threads heaps of their own, up to eight for each processor, and each keeps what a burst of reads from
    the disk took: some 20 MiB in all after a minute of a hundred readers.

    And each waiting request has a buffer of a MiB, of which it uses a page. A mapping of its own takes no more than
    that page. In the heap, where glibc would soon put them, they rest on memory that was used before: 109 MiB for as
    many readers that wait. With that fixed, what glibc keeps at the heap's end has to be told, too: it would give back
    each read's memory and fetch it anew, 400 page faults a MiB. Other C libraries have no such knobs."""
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _REQUEST_BUFFERS)
        mallopt(_M_TRIM_THRESHOLD, IN_FLIGHT)


@asynccontextmanager
async def _filesystem(home: Home, options: MountOptions) -> AsyncIterator[FileSystem]:
    """A loaded file system, its cache running, all of it closed in the end. The home's lock must be held."""
    directory = Path(options.cache_dir) if options.cache_dir is not None else home.cache
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"cannot use the cache directory {directory}: {error.strerror}") from error
    if directory != home.cache:
        secure_directory(directory, tighten=False)
        _check_private(directory)
    settings = Settings(home.config / FILE_NAME)
    with Catalog(home.catalog_path) as catalog:
        async with Transports() as transports, trio.open_nursery() as nursery:
            filesystem: FileSystem
            cache = Cache(
                directory,
                memory=options.memory,
                spill_threshold=options.spill_threshold,
                size=options.cache_size,
                ttl=options.ttl,
                is_kept=lambda stream_id: filesystem.is_kept(stream_id),
                ttl_of=lambda stream_id: filesystem.ttl_of(stream_id),
            )
            filesystem = FileSystem(
                catalog,
                cache,
                nursery,
                make_source=lambda spec: make_source(spec, transports),
                read_ahead=options.read_ahead,
                settings=settings,
            )
            nursery.start_soon(cache.run)
            try:
                filesystem.load()
                gc.freeze()  # what was loaded stays: with many streams, each look at it for garbage would take long
                yield filesystem
            finally:
                await filesystem.aclose()
                nursery.cancel_scope.cancel()


def _check_private(directory: Path) -> None:
    info = directory.stat()
    if info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise InvalidRequest(f"the cache directory {directory} must be yours alone: chmod 700 it")


async def _serve(home: Home, lock: HomeLock, mountpoint: Path, options: MountOptions, readiness: _Readiness) -> None:
    # Imported here: everything but the mount itself works without pyfuse3.
    import pyfuse3

    from streamfs.fuse import Operations

    watchdog = Watchdog()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals, watchdog.watching():
        async with _filesystem(home, options) as filesystem:
            interrupts = Interrupts()
            operations = Operations(filesystem, interrupts, options.scanners)
            facts = _facts(mountpoint, options)
            board = _make_board(home, facts)
            reporter = Reporter(filesystem, board, facts) if board is not None else None
            if reporter is not None:
                await reporter.fill()
                operations.show = reporter.flush
            _mount(operations, mountpoint, options)
            there = mounts.mounted_at(str(mountpoint))
            interrupts.device = there.device if there is not None else None
            life = _Life(filesystem, mountpoint, reporter, readiness, functools.partial(lock.record, home.socket_path))
            try:
                listener = listen(home.socket_path, lock)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(interrupts.run)
                    nursery.start_soon(watchdog.beat)
                    if reporter is not None:
                        nursery.start_soon(reporter.run)
                    nursery.start_soon(life.until_signal, signals)
                    nursery.start_soon(serve, listener, life.handlers())
                    if there is not None:
                        nursery.start_soon(life.until_detached, there.device)
                    nursery.start_soon(_announce, operations, mountpoint, readiness)
                    turns.install()
                    await life.until_unmounted(pyfuse3.main(max_tasks=MAX_TASKS))
                    nursery.cancel_scope.cancel()
            finally:
                pyfuse3.close(unmount=False)
                if board is not None and reporter is not None:
                    with trio.CancelScope(shield=True):
                        await reporter.flush()
                    await trio.to_thread.run_sync(_close_board, home, board)
                if mounting.is_mounted(mountpoint):
                    await trio.to_thread.run_sync(mounting.unmount_quietly, mountpoint)


def _facts(mountpoint: Path, options: MountOptions) -> dict[str, Any]:
    """What the daemon says of itself on the board."""
    return {
        "pid": os.getpid(),
        "started": time.time(),
        "version": streamfs.__version__,
        "mountpoint": os.fspath(mountpoint),
        "memory": options.memory,
        "cache_size": options.cache_size,
    }


def _make_board(home: Home, facts: dict[str, Any]) -> BoardWriter | None:
    """The board of this daemon, with the events of those before it. None where it cannot be had: everything else works
    without it."""
    path = home.run / BOARD_NAME
    log_ = max(EventLog.of_board(path), EventLog.of_file(home.state / EVENTS_NAME), key=lambda found: found.next)
    try:
        return BoardWriter(path, facts, log_)
    except (OSError, NoSpace) as error:
        log.warning("there will be no board, as %s cannot be written: %s", path, error)
        return None


def _close_board(home: Home, board: BoardWriter) -> None:
    """The run-time directory may not outlive a restart of the machine, but the events shall."""
    try:
        board.event_log.save(home.state / EVENTS_NAME)
    except (OSError, StreamfsError) as error:
        log.warning("the events cannot be kept: %s", error)
    board.close()


def _mount(operations: Any, mountpoint: Path, options: MountOptions) -> None:
    import pyfuse3

    settings = set(pyfuse3.default_options)
    settings |= {"fsname=streamfs", "subtype=streamfs", "default_permissions"}
    if options.allow_other:
        settings.add("allow_other")
    if options.read_only:
        settings.add("ro")
    try:
        pyfuse3.init(operations, str(mountpoint), settings)
    except RuntimeError as error:
        hint = ""
        if options.allow_other and os.geteuid() != 0:
            hint = " (--allow-other needs the line 'user_allow_other' in /etc/fuse.conf)"
        elif not os.access(mountpoint, os.W_OK):
            hint = " (you must be allowed to write there)"
        raise StreamfsError(f"cannot mount on {mountpoint}{hint}: {error}") from error


async def _announce(operations: Any, mountpoint: Path, readiness: _Readiness) -> None:
    """Say that the mount is ready once it really answers."""
    await trio.to_thread.run_sync(os.stat, mountpoint)
    operations.most_ahead = await trio.to_thread.run_sync(mounting.tune, mountpoint) // 2
    log.info("the mount on %s answers", mountpoint)
    readiness.ready(f"shows the streams at {mountpoint}")


class _Life:
    """What ends the daemon, and what the control socket can ask of it."""

    def __init__(
        self,
        filesystem: FileSystem,
        mountpoint: Path,
        reporter: Reporter | None,
        readiness: _Readiness,
        record: Callable[..., None],
    ) -> None:
        """`reporter`: None where there is no board. `record`: HomeLock.record for this daemon."""
        self._fs = filesystem
        self._mountpoint = mountpoint
        self._reporter = reporter
        self._readiness = readiness
        self._record = record
        self._leaving = trio.Event()

    async def until_signal(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            log.info("ending because of %s", signal.Signals(number).name)
            self._leaving.set()

    async def until_detached(self, device: tuple[int, int]) -> None:
        """Leave once our mount table names the mount no more, whoever took it away. After a lazy unmount the kernel
        goes on with the mount for those inside it, and does not tell its daemon."""
        with mounting.changes() as changes:
            while await trio.to_thread.run_sync(mounting.is_listed, device):
                await trio.lowlevel.wait_readable(changes.fileno())
                changes.poll(0)
        log.info("ending: the mount was taken away")
        self._leaving.set()

    async def until_unmounted(self, main: Any) -> None:
        """Serve requests until the mount is gone, or somebody asked us to leave."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._leave, nursery.cancel_scope)
            try:
                await main
            except* ConnectionAbortedError:
                # What the kernel says at an unmount while requests are in its queue, instead of the usual ENODEV.
                log.info("the mount is gone; requests that were under way in the kernel have failed")
            self._readiness.stopping("ending")
            self._begin_to_end()  # ends what threads do for the control socket, which cannot be cancelled
            nursery.cancel_scope.cancel()

    async def _leave(self, requests: trio.CancelScope) -> None:
        await self._leaving.wait()
        self._readiness.stopping(f"unmounting {self._mountpoint}")
        # First the waits: pyfuse3 would not end while a handler is blocked.
        self._begin_to_end()
        if mounting.is_mounted(self._mountpoint):
            await trio.to_thread.run_sync(mounting.unmount_quietly, self._mountpoint)
        with trio.move_on_after(1.0):
            await trio.sleep_forever()  # main ends by itself once the kernel has let go of the mount
        requests.cancel()

    def _begin_to_end(self) -> None:
        self._fs.fail_all()
        self._record(ending=True)  # who wants the home may wait for it

    def handlers(self) -> Mapping[str, Handler]:
        return {
            "ping": self._ping,
            "add": self._shown(self._add),
            "add_many": self._shown(self._add_many),
            "register": self._shown(self._register),
            "export": self._export,
            "remove": self._shown(self._remove),
            "rename": self._shown(self._rename),
            "list": self._list,
            "names": self._names,
            "status": self._status,
            "persist": self._shown(self._persist),
            "evict": self._shown(self._evict),
            "verify": self._verify,
            "acknowledge": self._acknowledge,
            "forget_listener": self._forget_listener,
            "shutdown": self._shutdown,
        }

    def _shown(self, handler: Callable[[dict[str, Any]], Awaitable[Any]]) -> Handler:
        """Who asked for a change finds it on the board once it is answered."""

        async def change_and_show(params: dict[str, Any]) -> Any:
            try:
                return await handler(params)
            finally:
                if self._reporter is not None:
                    await self._reporter.flush()

        return change_and_show

    async def _ping(self, params: dict[str, Any]) -> Any:
        """Who we are, and what we hold now: `tasks` under way, bytes of `memory` handed out, `open` files, and
        in `disk_error` why the cache directory takes nothing."""
        return {
            "pid": os.getpid(),
            "disk_error": self._fs.disk_error,
            "mountpoint": os.fspath(self._mountpoint),
            "version": streamfs.__version__,
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "memory": self._fs.memory_used,
            "open": self._fs.open_files,
        }

    async def _add(self, params: dict[str, Any]) -> Any:
        await self._fs.add([_spec(params["spec"])], replace=bool(params.get("replace", False)))

    async def _add_many(self, params: dict[str, Any]) -> Any:
        specs = [_spec(item) for item in params["specs"]]
        await self._fs.add(specs, replace=bool(params.get("replace", False)), probe=bool(params.get("probe", False)))

    async def _register(self, params: dict[str, Any]) -> Any:
        try:
            asked = msgspec.convert(params, _Register)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"not a list of streams: {error}") from error
        done = await self._fs.register(asked.items, asked.taken, probe=asked.probe, dry_run=asked.dry_run)
        return [(outcome, wanted, entry.name) for outcome, wanted, entry in done]

    async def _export(self, params: dict[str, Any]) -> Any:
        return self._fs.registered()

    async def _remove(self, params: dict[str, Any]) -> Any:
        await self._fs.remove(params["names"])

    async def _rename(self, params: dict[str, Any]) -> Any:
        await self._fs.rename(params["old"], params["new"])

    async def _list(self, params: dict[str, Any]) -> Any:
        return list(self._fs.streams())

    async def _names(self, params: dict[str, Any]) -> Any:
        return self._fs.stream_names(str(params.get("prefix", "")))

    async def _status(self, params: dict[str, Any]) -> Any:
        return list(self._fs.streams(params.get("names") or None))

    async def _persist(self, params: dict[str, Any]) -> Any:
        for name in params["names"]:
            self._fs.named(name)  # all or none
        for name in params["names"]:
            await self._fs.persist(name, bool(params["on"]))

    async def _evict(self, params: dict[str, Any]) -> Any:
        if params.get("all"):
            self._fs.evict_all()
        else:
            for name in params["names"]:
                self._fs.named(name)
            for name in params["names"]:
                self._fs.evict(name)
        await self._fs.removed()

    async def _verify(self, params: dict[str, Any]) -> Any:
        return await self._fs.verify(params.get("names") or None)

    async def _acknowledge(self, params: dict[str, Any]) -> Any:
        self._required_reporter().acknowledge(str(params["listener"]), int(params["seq"]))

    async def _forget_listener(self, params: dict[str, Any]) -> Any:
        self._required_reporter().forget(str(params["listener"]))

    def _required_reporter(self) -> Reporter:
        if self._reporter is None:
            raise NotFound("this daemon has no board, and so no events: its log says why")
        return self._reporter

    async def _shutdown(self, params: dict[str, Any]) -> Any:
        if not params.get("lazy", False):
            await self._refuse_if_busy()
        self._leaving.set()

    async def _refuse_if_busy(self) -> None:
        if self._fs.open_files:
            raise Busy(f"{self._mountpoint} is in use ({self._fs.open_files} open files): close them, or use --lazy")


class _Register(msgspec.Struct, forbid_unknown_fields=True):
    items: list[Registration]
    taken: IfTaken = "refuse"
    probe: bool = False
    dry_run: bool = False


def _spec(raw: Any) -> StreamSpec:
    try:
        return msgspec.convert(raw, StreamSpec)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"not a stream: {error}") from error


def save_offline(
    home: Home,
    name: str,
    write: Callable[[memoryview], None],
    progress: Callable[[int, int | None], None],
) -> None:
    """Read all of a stream without a mount: each piece goes to `write`, in order, in the calling thread; then
    `progress` gets (bytes so far, size or None). Raises StreamfsError, or what `write` raises."""

    async def save() -> None:
        async with _filesystem(home, load(home.config / FILE_NAME).mount_options()) as filesystem:
            opened = await filesystem.open_named(name)
            position = 0
            while piece := await filesystem.read(opened.handle, position, SAVE_STEP):
                write(piece)
                position += len(piece)
                progress(position, filesystem.size_of(opened.handle))
            filesystem.release(opened.handle)

    home.prepare()
    with home.lock(wait=LOCK_WAIT):
        try:
            trio.run(save)
        except BaseExceptionGroup as group:
            # The nursery wraps what went wrong; the command line wants the one error.
            raise _innermost(group) from None


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
