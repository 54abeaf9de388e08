"""The group of commands, and what their errors look like: one line on standard error and an exit code."""

from __future__ import annotations

import importlib
import keyword
import os
import sys
from collections.abc import Iterator, MutableMapping, Sequence

import click

from streamfs.cli.completion import COMPLETION_VARIABLE
from streamfs.cli.examples import with_examples
from streamfs.cli.tables import visible
from streamfs.errors import StreamfsError

FAILURE, USAGE, INTERRUPT = 1, 2, 130
DEBUG_VARIABLE = "STREAMFS_DEBUG"
"""Set, it shows the traceback of what went wrong besides its one line."""


_MODULES = {  # of streamfs.cli; in the order in which help lists them
    "mount": ("mount", "umount"),
    "register": ("add", "rm", "mv", "persist", "unpersist"),
    "lists": ("import", "export"),
    "show": ("ls", "status"),
    "top": ("top",),
    "events": ("events",),
    "web": ("web",),
    "keep": ("save", "evict", "verify"),
    "configure": ("config",),
    "logs": ("logs",),
    "systemd": ("systemd",),
    "doctor": ("doctor",),
    "completion": ("completion",),
}


class _Commands(MutableMapping[str, click.Command]):
    """The commands by name. The module of one is loaded when it is asked for: looking must be quick."""

    def __init__(self) -> None:
        self._places = {name: module for module, names in _MODULES.items() for name in names}
        self._loaded: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._loaded:
            module = importlib.import_module(f"streamfs.cli.{self._places[name]}")
            command = getattr(module, name + "_" if keyword.iskeyword(name) else name)
            self._loaded[name] = with_examples(command, name)
        return self._loaded[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._places.setdefault(name, "")
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._places[name]
        self._loaded.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places


@click.group(
    commands=_Commands(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Every option can also be set as STREAMFS_<COMMAND>_<OPTION> in the environment, for example "
    "STREAMFS_MOUNT_MEMORY=1GiB. STREAMFS_HOME=DIR keeps everything that streamfs writes under DIR.",
)
@click.version_option(package_name="streamfs", prog_name="streamfs")
def cli() -> None:
    """Show URLs and the output of commands as ordinary seekable files.

    \b
      streamfs add song.flac https://example.org/song.flac
      streamfs mount ~/streams
      mpv ~/streams/song.flac
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (None: the process' own) and give its exit code: 0, 1 failure, 2 usage,
    130 interrupt."""
    if COMPLETION_VARIABLE in os.environ:
        cli.main(prog_name="streamfs")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with cli.make_context("streamfs", words, auto_envvar_prefix="STREAMFS") as context:
            cli.invoke(context)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        return told(error)
    return 0


def told(error: BaseException) -> int:
    """Tell what ended a command; gives its exit code."""
    match error:
        case click.exceptions.Exit():
            return error.exit_code
        case BrokenPipeError():
            _silence_output()
            return FAILURE
        case click.Abort() | KeyboardInterrupt():
            return _fail("interrupted", INTERRUPT)
        case click.UsageError():
            command = error.ctx.command_path if error.ctx is not None else "streamfs"
            return _fail(f"{_sentence(error.format_message())} (see '{command} --help')", USAGE)
        case click.ClickException():
            return _fail(error.format_message(), error.exit_code)
        case StreamfsError():
            return _fail(str(error), FAILURE)
        case OSError():
            where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
            return _fail(f"{where}{error.strerror or error}", FAILURE)
    # a bug; the person at the terminal still gets one line
    return _fail(f"internal error: {type(error).__name__}: {error} ({DEBUG_VARIABLE}=1 shows where)", FAILURE)


def _sentence(text: str) -> str:
    return text[:-1] if text.endswith(".") else text


def _fail(text: str, code: int) -> int:
    if os.environ.get(DEBUG_VARIABLE):
        import traceback

        traceback.print_exc()
    click.echo(f"streamfs: {visible(' '.join(text.split()))}", err=True)
    return code


def _silence_output() -> None:
    """The reader of our output went away: let the interpreter's last flush go nowhere instead of failing."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
