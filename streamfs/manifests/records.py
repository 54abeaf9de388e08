"""Lists of streamfs' own: records in JSON (an array, or one a line) and in TOML ([[stream]] tables).

A record is {"name": …, "url" or "command" or "shell": …, "options": {…}, "persist": true}.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamfs import tomllines
from streamfs.errors import InvalidRequest
from streamfs.manifests.model import Item, Manifest
from streamfs.manifests.playlists import decode, lines_of
from streamfs.options import read_options
from streamfs.spec import (
    AnySource,
    CommandSource,
    ShellSource,
    StreamSpec,
    UrlSource,
    check_spec,
)

_SOURCES = ("url", "command", "shell")
_KEYS = {"name", "options", "persist", *_SOURCES}


def read_json(data: bytes, folder: Path | None) -> Manifest:
    """`folder`: where relative paths in options start. Raises InvalidRequest for what is no JSON."""
    text = decode(data)
    return _read(_array(text) if text.lstrip().startswith("[") else _lines(text), folder)


def _array(text: str) -> Iterator[tuple[int, Any]]:
    """The elements of an array, and the line of each: json itself does not tell."""
    decoder = json.JSONDecoder()
    at, counted, line = text.index("[") + 1, 0, 1
    first = True
    while True:
        at = _skip_space(text, at)
        if text[at : at + 1] == "]":
            break
        if not first:
            if text[at : at + 1] != ",":
                raise InvalidRequest(f"not valid JSON, line {text.count(chr(10), 0, at) + 1}: a comma is missing")
            at = _skip_space(text, at + 1)
        first = False
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"not valid JSON, {_where(error, line)}") from error
        yield line, value
    if text[at + 1 :].strip():
        raise InvalidRequest(f"not valid JSON, line {text.count(chr(10), 0, at) + 1}: more follows the array")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in lines_of(text):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"not valid JSON, line {number}: one record a line, or an array of them") from error


def _where(error: Exception, line: int) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}: {error.msg}"
    return f"line {line}: {'nested too deep' if isinstance(error, RecursionError) else 'a number is too long'}"


def read_toml(data: bytes, folder: Path | None) -> Manifest:
    """Raises InvalidRequest for what is no TOML."""
    text = decode(data)
    try:
        document = tomllib.loads(text.replace("\r\n", "\n"))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not valid TOML: {error}") from error
    tables = document.pop("stream", [])
    found = Manifest()
    if document:
        first: dict[str, int] = {}  # the line of each; found in one go, as there may be very many
        for line, _, path in tomllines.statements(text):
            first.setdefault(path[0], line)
        for key in document:
            found.refuse(first.get(key), f"no key is called {key!r}: streams are [[stream]] tables")
    if not isinstance(tables, list):
        found.refuse(tomllines.line_of(text, ("stream",)), "streams are [[stream]] tables, in two brackets")
        tables = []
    lines = _lines_of_tables(text)
    return _read(((next(lines, None), table) for table in tables), folder, found)


def _lines_of_tables(text: str) -> Iterator[int]:
    """Those of the headers [[stream]]. They are looked for by eye, which a text in quotes over several lines might
    deceive: reading each statement for itself would take longer than all the rest."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("[[") and "".join(line.split()).startswith(("[[stream]]", '[["stream"]]')):
            yield number


def _read(records: Iterator[tuple[int | None, Any]], folder: Path | None, found: Manifest | None = None) -> Manifest:
    found = Manifest() if found is None else found
    lines: dict[str, int | None] = {}
    for line, record in records:
        try:
            item = _item(record, line, folder)
        except InvalidRequest as error:
            found.refuse(line, str(error))
            continue
        assert item.name is not None
        if item.name in lines:
            found.refuse(line, f"the name {item.name!r} is there already, in line {lines[item.name]}")
            continue
        lines[item.name] = line
        found.items.append(item)
    return found


def _item(record: Any, line: int | None, folder: Path | None) -> Item:
    """Raises InvalidRequest."""
    if not isinstance(record, dict):
        raise InvalidRequest("not a record of a stream")
    unknown = record.keys() - _KEYS
    if unknown:
        raise InvalidRequest(f"no key is called {min(unknown)!r}; there are {', '.join(sorted(_KEYS))}")
    name, options, persist = record.get("name"), record.get("options", {}), record.get("persist")
    if not isinstance(name, str):
        raise InvalidRequest("a record without its name")
    if not isinstance(options, dict):
        raise InvalidRequest("the options are not a table")
    if persist is not None and not isinstance(persist, bool):
        raise InvalidRequest("persist is true or false")
    spec = StreamSpec(name=name, source=_source(record), options=read_options(options, folder))
    check_spec(spec)
    return Item(spec.source, line, name, options=spec.options, persist=persist)


def _source(record: dict[str, Any]) -> AnySource:
    given = [key for key in _SOURCES if key in record]
    if len(given) != 1:
        raise InvalidRequest("a record has one of url, command and shell")
    value = record[given[0]]
    if given[0] == "command":
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise InvalidRequest("a command is a list of texts")
        return CommandSource(tuple(value))
    if not isinstance(value, str):
        raise InvalidRequest(f"the {given[0]} is not a text")
    return UrlSource(value) if given[0] == "url" else ShellSource(value)
