"""Texts of the command line to values. What cannot be read is a usage error that says why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import click
from click.shell_completion import CompletionItem

from streamfs.errors import InvalidRequest
from streamfs.options import programs
from streamfs.spec import TRANSFORMS, check_name, check_proxy, parse_duration, parse_size, parse_window

if TYPE_CHECKING:
    AnyType: TypeAlias = click.ParamType[Any]
    TextType: TypeAlias = click.ParamType[str]
else:
    AnyType = TextType = click.ParamType  # a plain class before click 8.4


class Checked(AnyType):
    """A parameter that `parse` reads; its InvalidRequest becomes the usage error. `separator` splits the values of
    a repeatable option in an environment variable."""

    def __init__(self, name: str, parse: Callable[[str], Any], separator: str | None = None) -> None:
        self.name = name
        self._parse = parse
        self.envvar_list_splitter = separator  # type: ignore[misc]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except InvalidRequest as error:
            self.fail(str(error), param, ctx)


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def optional(text: str) -> Any:
        return NONE if text.strip().lower() in ("none", "never", "unlimited") else parse(text)

    return optional


def _parse_header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise InvalidRequest("a header is written 'Name: value'")
    return name.strip(), value.strip()


def _parse_variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidRequest("a variable is written NAME=VALUE")
    return name, value


def _check_window(text: str) -> str:
    parse_window(text)
    return text.strip()


class StreamName(Checked):
    """The name of a stream, completed by the shell from those that are registered."""

    def __init__(self) -> None:
        super().__init__("name", check_name)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
        from streamfs.cli.registry import names_for_completion

        given: object = ctx.params.get(param.name or "")
        chosen = set(given) if isinstance(given, tuple) else set()
        return [CompletionItem(name) for name in names_for_completion(incomplete) if name not in chosen]


class PathText(TextType):
    """A path as it was typed, which is not looked at: that could mean to wait for a daemon that hangs. `kind` is what
    the shell completes, "file" or "dir"."""

    def __init__(self, kind: str) -> None:
        self.name = "text"
        self._kind = kind

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
        return [CompletionItem(incomplete, type=self._kind)]


class Suggested(TextType):
    """Any text, of which `known` are suggested by the shell."""

    def __init__(self, known: Sequence[str]) -> None:
        self.name = "text"
        self._known = known

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
        return [CompletionItem(word) for word in self._known if word.startswith(incomplete)]


NONE = object()
"""The value "none" of an option that has one, to be told from an option that was not given."""

SIZE = Checked("size", parse_size)
DURATION = Checked("duration", parse_duration)
SIZE_OR_NONE = Checked("size", _or_none(parse_size))
DURATION_OR_NONE = Checked("duration", _or_none(parse_duration))
WINDOW = Checked("window", _check_window)
HEADER = Checked("'name: value'", _parse_header, "\n")
VARIABLE = Checked("name=value", _parse_variable, "\n")
NAMES = Checked("names", programs)
PROXY = Checked("url", check_proxy)
NAME = Checked("name", check_name)
STREAM = StreamName()
FILE = PathText("file")
DIRECTORY = PathText("dir")
TRANSFORM = Suggested(TRANSFORMS)
