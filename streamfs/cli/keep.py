"""Bytes: save, evict, verify."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from streamfs.cli import types
from streamfs.cli.progress import Progress, bytes_progress
from streamfs.cli.registry import connect, open_registry
from streamfs.cli.signals import ended_by_signals
from streamfs.cli.tables import JSON_VERSION, visible
from streamfs.errors import InvalidRequest, NoSpace, NotFound, SourceFailed, StreamfsError
from streamfs.home import Home

READ = 1 << 20  # bytes a read asks for: what the kernel takes in one FUSE request


@click.command()
@click.argument("name", type=types.STREAM)
@click.argument("dest", type=click.Path())
def save(name: str, dest: str) -> None:
    """Copy the whole stream NAME to the file DEST.

    Waits for the end. DEST appears whole or not at all; a file that is there keeps its mode. Works without a mount,
    too.
    """
    home = Home.open()
    target = _target(dest)
    client = connect(home)
    with ended_by_signals(), _part_of(target) as (fd, finish), bytes_progress(name) as progress:
        if client is not None:
            with client:
                mountpoint = str(client.call("ping")["mountpoint"])
            size = _copy_from_mount(name, Path(mountpoint) / name, fd, target, progress)
        else:
            size = _copy_offline(home, name, fd, target, progress)
        finish(size)


def _target(dest: str) -> Path:
    """DEST with links followed, so that a link goes on pointing at what is saved. Raises InvalidRequest."""
    target = Path(os.path.realpath(dest))
    try:
        kind = target.stat().st_mode
    except FileNotFoundError:
        if dest.endswith("/") or not target.parent.is_dir():
            raise InvalidRequest(f"cannot save to {dest}: no such directory") from None
        return target
    if stat.S_ISDIR(kind):
        raise InvalidRequest(f"cannot save to {dest}: it is a directory; name a file in it")
    if not stat.S_ISREG(kind):
        raise InvalidRequest(f"cannot save to {dest}: it is not a regular file")
    return target


@contextlib.contextmanager
def _part_of(target: Path) -> Iterator[tuple[int, Callable[[int], None]]]:
    """A file beside `target` to write to, and what makes it `target` once it holds the given number of bytes, synced.
    It is deleted where that is not called."""
    short = os.fsdecode(os.fsencode(target.name)[:200])  # leaves room in the 255 bytes of a name
    part = target.with_name(f"{short}.part-{secrets.token_hex(4)}")
    mode = _mode(target)
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666 if mode is None else 0o600)

    def finish(size: int) -> None:
        written = os.fstat(fd).st_size
        if written != size:
            raise StreamfsError(f"{written} bytes were written where {size} were read: nothing was saved")
        with _write_errors(target):
            os.fsync(fd)
            part.replace(target)
            folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    try:
        if mode is not None:
            with _write_errors(target):
                os.fchmod(fd, mode)
        yield fd, finish
    finally:
        os.close(fd)
        part.unlink(missing_ok=True)  # gone already once it is the target


def _mode(target: Path) -> int | None:
    """Who may do what with the file that is there; None where none is: umask decides then."""
    try:
        return target.stat().st_mode & 0o777
    except FileNotFoundError:
        return None


def _copy_from_mount(name: str, path: Path, fd: int, target: Path, progress: Progress) -> int:
    """Copy through the daemon's mount; gives the number of bytes. Raises what stopped it."""
    try:
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"no stream {name!r}") from error
    except OSError as error:
        raise SourceFailed(f"cannot open {name!r}: {_reason(path, error)}") from error
    try:
        if not stat.S_ISREG(os.fstat(source).st_mode):
            raise InvalidRequest(f"{name!r} is a folder, not a stream")
        buffer = memoryview(bytearray(READ))
        done = 0
        progress(done, _length(source))
        while True:
            try:
                count = os.readv(source, [buffer])
            except OSError as error:
                raise SourceFailed(f"{name!r} failed after {done} bytes: {_reason(source, error)}") from error
            if not count:
                break
            _write(fd, buffer[:count], target)
            done += count
            progress(done, _length(source))
        expected = os.fstat(source).st_size
        if expected not in (0, done):
            raise SourceFailed(f"{name!r} ended after {done} of {expected} bytes: nothing was saved")
        return done
    finally:
        os.close(source)


def _copy_offline(home: Home, name: str, fd: int, target: Path, progress: Progress) -> int:
    try:
        from streamfs import daemon
    except ImportError as error:
        raise StreamfsError(
            f"cannot load the FUSE library ({error}): 'streamfs doctor' says what is missing"
        ) from error
    done = 0

    def write(piece: memoryview) -> None:
        nonlocal done
        _write(fd, piece, target)
        done += len(piece)

    daemon.save_offline(home, name, write, progress)
    return done


def _write(fd: int, piece: memoryview, target: Path) -> None:
    with _write_errors(target):
        while piece:
            piece = piece[os.write(fd, piece) :]


@contextlib.contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NoSpace(f"cannot write {target}: {error.strerror}") from error


def _length(source: int) -> int | None:
    """The stream's length; a file shows 0 while that is not known."""
    return os.fstat(source).st_size or None


def _reason(where: int | Path, error: OSError) -> str:
    """What the daemon says went wrong, or else the errno's text."""
    try:
        told = os.getxattr(where, "user.streamfs.error").decode("utf-8", "replace").strip()
    except OSError:
        told = ""
    return told or error.strerror or str(error)


_CACHE_DIR = click.option(
    "--cache-dir",
    type=types.DIRECTORY,
    metavar="DIR",
    envvar="STREAMFS_MOUNT_CACHE_DIR",
    help="Where the cache is, if mounted with that option and no daemon runs.",
)


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1, type=types.STREAM)
@click.option("--all", "every", is_flag=True, envvar="STREAMFS_EVICT_ALL", help="All streams that are not persisted.")
@_CACHE_DIR
def evict(names: tuple[str, ...], every: bool, cache_dir: str | None) -> None:
    """Drop cached bytes. The streams stay registered and readable."""
    if bool(names) == every:
        raise click.UsageError("give either NAMEs or --all")
    with open_registry(Home.locate(), Path(cache_dir) if cache_dir else None) as registry:
        registry.evict(names, every)


@click.command(short_help="Read cached bytes and check them.")
@click.argument("names", metavar="[NAME]...", nargs=-1, type=types.STREAM)
@click.option("--json", "as_json", is_flag=True, envvar="STREAMFS_VERIFY_JSON", help="One JSON document.")
@_CACHE_DIR
def verify(names: tuple[str, ...], as_json: bool, cache_dir: str | None) -> None:
    """Read the cached bytes of streams (without NAMEs: of all) and check them.

    Exits with 1 if some are damaged. What is damaged is never served: it is fetched again when it is read.
    """
    with open_registry(Home.locate(), Path(cache_dir) if cache_dir else None) as registry:
        results = registry.verify(names)
    if as_json:
        click.echo(json.dumps({"version": JSON_VERSION, "verified": results}))
    else:
        for row in results:
            click.echo(visible(f"{'ok     ' if row['ok'] else 'DAMAGED'}  {row['name']}  {row['detail']}"))
    if not all(row["ok"] for row in results):
        raise click.exceptions.Exit(1)
