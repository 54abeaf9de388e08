"""Changing what is registered: add, rm, mv, persist, unpersist."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import msgspec

from streamfs.cli import types
from streamfs.cli.registry import open_registry
from streamfs.errors import InvalidRequest
from streamfs.home import Home
from streamfs.spec import (
    URL_SCHEMES,
    AnySource,
    CommandSource,
    ShellSource,
    StreamOptions,
    StreamSpec,
    UrlSource,
    check_spec,
    check_url,
)

_COMMAND = "streamfs.command"  # in ctx.meta: the words after "--"; absent without one


class _AddCommand(click.Command):
    """Keeps what follows the first "--" away from click, which would drop the "--" and so lose the difference
    between a URL and a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            ctx.meta[_COMMAND] = tuple(args[at + 1 :])
            args = args[:at]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["NAME", "(URL | --shell LINE | -- COMMAND [ARG]...)", "[OPTIONS]"]


@click.command(
    cls=_AddCommand,
    epilog="""Examples:

\b
  A file on the web, and one that needs a login:
    streamfs add song.flac https://example.org/song.flac
    streamfs add report.pdf https://intra.example.org/r.pdf \\
        --secret-header 'Authorization: Bearer ${file:~/.config/intra.token}'
\b
  In a folder, which appears by itself; with the logins of a browser:
    streamfs add films/tour.mp4 https://example.org/tour.mp4 --cookie-file ~/cookies.txt
\b
  An ftp server, sftp, a local file:
    streamfs add debian.iso ftp://ftp.example.org/debian.iso
    streamfs add dump.sql sftp://me@db.example.org/srv/dump.sql
    streamfs add big.log file:///var/log/big.log
\b
  What a command prints; it starts with the first read, once for all readers:
    streamfs add numbers -- seq 1 5000000
    streamfs add pod.log -- kubectl logs -f deploy/web
    streamfs add dump.sql.gz --shell 'ssh db pg_dump shop | gzip'
\b
  Radio, of which the last half hour is kept:
    streamfs add radio.mp3 https://radio.example.org/live --window 30m
""",
)
@click.argument("name", type=types.NAME)
@click.argument("url", required=False)
@click.option("--shell", metavar="LINE", help="Read what LINE prints, run by /bin/sh -c.")
@click.option("--replace", is_flag=True, help="Take the place of a stream of the same name.")
@click.option("--size", type=types.SIZE, help="The exact length, where the source does not tell.")
@click.option(
    "--header",
    "headers",
    type=types.HEADER,
    multiple=True,
    envvar="STREAMFS_ADD_HEADER",
    help="A request header (repeatable).",
)
@click.option(
    "--secret-header",
    "secret_headers",
    type=types.HEADER,
    multiple=True,
    envvar="STREAMFS_ADD_SECRET_HEADER",
    help="One whose value is elsewhere: 'Authorization: Bearer ${file:/PATH}', ${env:NAME}, ${credential:NAME}.",
)
@click.option("--user-agent", metavar="TEXT", help="The User-Agent header.")
@click.option(
    "--cookie-file", type=types.FILE, metavar="FILE", help="Cookies, as browsers' extensions and curl save them."
)
@click.option("--netrc", type=types.FILE, metavar="FILE", help="Logins, in netrc format.")
@click.option("--proxy", type=types.PROXY, help="http://, https:// or socks5h://HOST:PORT")
@click.option(
    "--cacert", type=types.FILE, metavar="FILE", help="Trust the authorities of this PEM file, and no others."
)
@click.option("--cert", type=types.FILE, metavar="FILE", help="Client certificate (PEM).")
@click.option(
    "--key", type=types.FILE, metavar="FILE", help="Key of the client certificate (PEM), if it is not in the same file."
)
@click.option("--insecure", is_flag=True, help="Do not check the server's certificate.")
@click.option(
    "--stall-timeout",
    type=types.DURATION_OR_NONE,
    help="Fail reads when nothing arrives for so long; 'none' waits for ever. [default: 60s, commands: none]",
)
@click.option(
    "--size-policy",
    type=click.Choice(["zero", "wait"]),
    help="While the length is unknown: show 0 (as /proc does), or let open wait for the end. [default: zero]",
)
@click.option("--no-probe", is_flag=True, help="Do not ask the server for the length before the first open.")
@click.option("--window", type=types.WINDOW, help="Keep only the last SIZE or DURATION of an endless stream.")
@click.option("--ttl", type=types.DURATION, help="How long unused bytes are kept. [default: as the mount's]")
@click.option(
    "--read-ahead", type=types.SIZE, help="How far to fetch past the furthest reader. [default: as the mount's]"
)
@click.option("--eager", is_flag=True, help="Start with the mount, not with the first read.")
@click.option(
    "--cwd", type=types.DIRECTORY, metavar="DIR", help="Where the command runs. [default: the current directory]"
)
@click.option("--env", type=types.VARIABLE, multiple=True, help="A variable for the command (repeatable).")
@click.option(
    "--transform",
    "transforms",
    type=types.TRANSFORM,
    metavar="NAME",
    multiple=True,
    envvar="STREAMFS_ADD_TRANSFORM",
    help="Filter the bytes (repeatable).",
)
@click.option("--allow-private", is_flag=True, help="Let a public URL redirect to private addresses.")
@click.option("--refresh-command", metavar="COMMAND", help="Prints a fresh URL when this one has expired.")
@click.pass_context
def add(ctx: click.Context, /, name: str, url: str | None, shell: str | None, replace: bool, **options: Any) -> None:
    """Register a stream as the file NAME of the mount.

    It reads a URL (http, https, ftp, ftps, sftp, file), or what a command prints. A running daemon shows it at once.
    Words after -- are the command and its arguments, run as they are, without a shell.
    """
    source = _source(url, shell, ctx.meta.get(_COMMAND))
    try:
        spec = check_spec(StreamSpec(name=name, source=source, options=_options(source, options)))
    except InvalidRequest as error:
        raise click.UsageError(str(error), ctx) from error
    with open_registry(Home.locate()) as registry:
        registry.add(spec, replace)


def _source(url: str | None, shell: str | None, command: tuple[str, ...] | None) -> AnySource:
    given = [kind for kind, value in (("a URL", url), ("--shell", shell), ("-- COMMAND", command)) if value is not None]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} cannot go together: a stream has one source")
    if command is not None:
        if not command:
            raise click.UsageError("a command must follow the --")
        return CommandSource(command)
    if shell is not None:
        return ShellSource(shell)
    if url is None:
        raise click.UsageError("say where the bytes come from: a URL, --shell LINE, or -- and a command")
    return UrlSource(_checked_url(url))


def _checked_url(url: str) -> str:
    try:
        return check_url(url)
    except InvalidRequest as error:
        hint = ""
        if url.split(":", 1)[0].lower() not in URL_SCHEMES:
            path = Path(url).absolute()
            hint = f"; a local file is {path.as_uri()}" if path.exists() else "; a command goes after --"
        raise click.UsageError(f"{error}{hint}") from error


def _options(source: AnySource, given: dict[str, Any]) -> StreamOptions:
    """The options of the command line as those of a stream; files are made absolute and tried."""
    values = {key: value for key, value in given.items() if value is not None and value is not False and value != ()}
    for key in ("cookie_file", "netrc", "cacert", "cert", "key"):
        if key in values:
            values[key] = _readable_file(f"--{key.replace('_', '-')}", values[key])
    if values.pop("no_probe", False):
        values["probe"] = False
    if "env" in values:
        values["env"] = dict(values["env"])
    if values.get("stall_timeout") is types.NONE:
        values["stall_timeout"] = None
    if "refresh_command" in values:
        values["refresh_command"] = _words(values["refresh_command"])
    if not isinstance(source, UrlSource):
        values["cwd"] = _directory(values.get("cwd", "."))
    return msgspec.structs.replace(StreamOptions(), **values)


def _readable_file(option: str, name: str) -> str:
    path = _absolute(option, name)
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise click.UsageError(f"{option} {name}: {error.strerror}") from error
    return path


def _directory(name: str) -> str:
    path = _absolute("--cwd", name)
    if not Path(path).is_dir():
        raise click.UsageError(f"--cwd {name}: not a directory")
    return path


def _absolute(option: str, name: str) -> str:
    try:
        return str(Path(name).expanduser().absolute())
    except RuntimeError as error:
        raise click.UsageError(f"{option} {name}: nobody knows whose home that is") from error


def _words(line: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(line))
    except ValueError as error:
        raise click.UsageError(f"--refresh-command: {error}") from error


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True, type=types.STREAM)
def rm(names: tuple[str, ...]) -> None:
    """Forget streams and their cached bytes.

    All of them, or none where one is not there. What the sources have is not touched.
    """
    with open_registry(Home.locate()) as registry:
        registry.remove(names)


@click.command()
@click.argument("old", type=types.STREAM)
@click.argument("new", type=types.STREAM)
def mv(old: str, new: str) -> None:
    """Rename the stream, or the folder of streams, OLD to NEW."""
    with open_registry(Home.locate()) as registry:
        registry.rename(old, new)


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True, type=types.STREAM)
@click.option("--wait", is_flag=True, help="Come back when all is on disk, or with 1 when something failed.")
def persist(names: tuple[str, ...], wait: bool) -> None:
    """Fetch all of a stream and keep it.

    The fetch goes on whatever readers do, survives restarts, and is not evicted. Without a running daemon it begins
    with the next mount. --wait shows a bar on a terminal; Ctrl-C ends the wait and not the fetch.
    """
    home = Home.locate()

    def ask() -> None:
        with open_registry(home) as registry:
            registry.persist(names, True)

    if not wait:
        ask()
        return
    from streamfs.cli.waiting import persist_and_wait

    persist_and_wait(home, names, ask)


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True, type=types.STREAM)
def unpersist(names: tuple[str, ...]) -> None:
    """Let a stream's bytes be evicted again."""
    with open_registry(Home.locate()) as registry:
        registry.persist(names, False)
