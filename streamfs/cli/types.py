"""Texts of the command line to values. What cannot be read is a usage error that says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from streamfs.errors import InvalidRequest
from streamfs.spec import check_name, check_proxy, parse_duration, parse_size, parse_window


class Checked(click.ParamType[Any]):
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


NONE = object()
"""The value "none" of an option that has one, to be told from an option that was not given."""

SIZE = Checked("size", parse_size)
DURATION = Checked("duration", parse_duration)
SIZE_OR_NONE = Checked("size", _or_none(parse_size))
DURATION_OR_NONE = Checked("duration", _or_none(parse_duration))
WINDOW = Checked("window", _check_window)
HEADER = Checked("'name: value'", _parse_header, "\n")
VARIABLE = Checked("name=value", _parse_variable, "\n")
PROXY = Checked("url", check_proxy)
NAME = Checked("name", check_name)


def human_size(size: int | None) -> str:
    """ "1.5 MiB"; "?" for an unknown one."""
    if size is None:
        return "?"
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
