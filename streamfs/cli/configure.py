"""config: the configuration file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import msgspec

from streamfs.cli import types
from streamfs.cli.registry import open_registry
from streamfs.config import FILE_NAME, described, load, read
from streamfs.errors import AlreadyExists, NotFound
from streamfs.home import Home
from streamfs.spec import SCANNERS, redact_url

TEMPLATE = """\
# streamfs: options of the mount, and defaults of streams. Names are those of the options of 'streamfs add' and
# 'streamfs mount'. 'streamfs config check' says what is wrong with this file, 'streamfs config show NAME' what
# counts for a stream. Options of the mount count with the next mount, all others with the next open of a file.
#
# Of several, this one counts: an option given to 'streamfs add', then [stream."NAME"], [folder."NAME"] (the innermost
# first), [host."NAME"] (host:port, host, *.domain), [defaults]. Headers are joined, name by name.

[mount]
# memory = "256MiB"
# spill-threshold = "5MiB"
# cache-dir = "/srv/cache/streamfs"
# cache-size = "10GiB"             # or "none"
# ttl = "1h"
# read-ahead = "8MiB"
# scanners = "@SCANNERS@"
# allow-other = false
# read-only = false
# log-level = "info"
# log-format = "text"

[defaults]
# user-agent = "me/1.0"
# stall-timeout = "60s"            # or "none"
# probe = true
# proxy = "socks5h://127.0.0.1:1080"
# netrc = "~/.netrc"
# cookie-file = "~/cookies.txt"
# cacert = "/etc/ssl/certs/ca-certificates.crt"

# Secrets are read for each request, and never stored or shown: from files, the daemon's environment (${env:NAME}),
# or the credentials of its systemd unit (${credential:NAME}).
# [host."api.example.org"]
# secret-headers = { Authorization = "Bearer ${file:~/.config/example.token}" }
# headers = { Accept-Language = "en" }

# [host."*.lab.example"]
# cert = "~/lab.pem"
# key = "~/lab.key"
# insecure = false
# allow-private = true

# Beware: what a folder has goes to every server that a stream in it names.
# [folder."radio"]
# window = "2h"
# eager = false
# ttl = "10m"                      # how long unused bytes are kept, and ...
# read-ahead = "1MiB"              # ... how far to fetch past readers, instead of what the mount has

# [folder."podcasts"]
# persist = true                   # fetched whole and kept, when they are registered from now on
# size-policy = "zero"

# [stream."radio/one.mp3"]
# window = "1d"
""".replace("@SCANNERS@", ", ".join(SCANNERS))


@click.group(short_help="The configuration file: make, check, show it.")
def config() -> None:
    """The configuration file: options of the mount, defaults of streams by host, folder and name.

    \b
      streamfs config init          # a commented file to begin with
      $EDITOR "$(streamfs config path)"
      streamfs config check
      streamfs config show radio/one.mp3
    """


@config.command()
def path() -> None:
    """Print where the file is.

    \b
      streamfs config path
      $EDITOR "$(streamfs config path)"
    """
    click.echo(os.fsencode(_path()))


@config.command()
def init() -> None:
    """Write a file in which everything is explained and nothing is set yet.

    \b
      streamfs config init
    """
    Home.open()
    try:
        fd = os.open(_path(), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise AlreadyExists(f"{_path()} is there already") from error
    with open(fd, "w", encoding="utf-8") as file:
        file.write(TEMPLATE)
    click.echo(os.fsencode(_path()))


@config.command()
@click.argument("file", required=False, type=click.Path())
def check(file: str | None) -> None:
    """Say all that is wrong with the file (or with FILE), with lines. Exits with 1 if anything is.

    \b
      streamfs config check
    """
    where = Path(file) if file is not None else _path()
    try:
        text = where.read_text("utf-8")
    except FileNotFoundError as error:
        raise NotFound(f"there is no {where}: 'streamfs config init' writes one") from error
    except UnicodeDecodeError as error:
        raise NotFound(f"{where} is not UTF-8") from error
    _, problems = read(text)
    for problem in problems:
        click.echo(described(where, problem).encode("utf-8", "surrogateescape"), err=True)
    if problems:
        raise click.exceptions.Exit(1)


@config.command()
@click.argument("name", required=False, type=types.NAME)
def show(name: str | None) -> None:
    """Show the options of the mount, or those that count for the stream NAME, and where each comes from.

    Secrets are not shown.

    \b
      streamfs config show
      streamfs config show radio/one.mp3
    """
    current = load(_path())
    if name is None:
        for key, value in msgspec.structs.asdict(current.mount_options()).items():
            _line(key, value, "mount" if key in current.mount else "default")
        return
    with open_registry(Home.locate()) as registry:
        spec = next((item.spec for item in registry.registered() if item.spec.name == name), None)
    if spec is None:
        raise NotFound(f"no stream {name!r}")
    for key, (value, place) in current.sources_of(spec).items():
        _line(key, value, place)


def _line(key: str, value: Any, place: str) -> None:
    if key == "headers":
        value = ", ".join(f"{name}: …" for name, _ in value)
    elif key == "secret_headers":
        value = ", ".join(f"{name}: {content}" for name, content in value)
    elif key == "env":
        value = ", ".join(f"{name}=…" for name in value)
    elif key == "proxy":
        value = redact_url(value)
    elif key == "refresh_command":
        value = "…"
    elif isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, tuple):
        value = ", ".join(value)
    shown = "none" if value is None or value is msgspec.UNSET else value
    click.echo(f"{key.replace('_', '-'):<16}  {shown}  ({place})".encode("utf-8", "surrogateescape"))


def _path() -> Path:
    return Home.locate().config / FILE_NAME
