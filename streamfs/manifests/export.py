"""Registered streams as a list that `parse` reads again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from streamfs.errors import InvalidRequest
from streamfs.manifests import WRITTEN
from streamfs.spec import CommandSource, Registration, ShellSource, StreamOptions, StreamSpec, UrlSource

_SECRET_OPTIONS = ("headers", "env")
"""Options whose values may be secrets. (Others refer to files, and the files are not exported.)"""


def record_of(item: Registration) -> dict[str, Any]:
    """The record of one stream: name, source, options that are not the default, persist."""
    spec = item.spec
    record: dict[str, Any] = {"name": spec.name}
    match spec.source:
        case UrlSource(url=url):
            record["url"] = url
        case CommandSource(argv=argv):
            record["command"] = list(argv)
        case ShellSource(line=line):
            record["shell"] = line
    options = msgspec.to_builtins(spec.options)
    if options:
        record["options"] = options
    if item.persist:
        record["persist"] = True
    return record


def write(items: Iterable[Registration], kind: str) -> str:
    """The list in the format `kind`. M3U has only the URLs and their names. Raises InvalidRequest for what a format
    cannot hold."""
    match kind:
        case "json":
            return "[" + ",".join("\n" + json.dumps(record_of(item)) for item in items) + "\n]\n"
        case "jsonl":
            return "".join(json.dumps(record_of(item)) + "\n" for item in items)
        case "toml":
            return "\n".join(_table(record_of(item)) for item in items)
        case "m3u":
            return "#EXTM3U\n" + "".join(_entry(item.spec) for item in items if isinstance(item.spec.source, UrlSource))
    raise InvalidRequest(f"no format is called {kind!r}; there are {', '.join(WRITTEN)}")


def _table(record: dict[str, Any]) -> str:
    options = record.pop("options", {})
    lines = ["[[stream]]", *(f"{key} = {_value(value)}" for key, value in record.items())]
    if options:
        lines += ["[stream.options]", *(f"{key} = {_value(value)}" for key, value in options.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    match value:
        case None:
            return '"none"'
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(f"TOML cannot hold {value!r}, which is not UTF-8: use --format json") from error
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case dict():
            return "{ " + ", ".join(f"{_value(key)} = {_value(one)}" for key, one in value.items()) + " }"
    return "[" + ", ".join(map(_value, value)) + "]"


def _entry(spec: StreamSpec) -> str:
    assert isinstance(spec.source, UrlSource)
    shown = re.sub(r"\s", " ", spec.name).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    folder, _, title = shown.rpartition("/")
    group = ' group-title="{}"'.format(folder.replace('"', "'").replace("/", ";")) if folder else ""
    return f"#EXTINF:-1{group},{title}\n{spec.source.url}\n"


def holds_secrets(spec: StreamSpec) -> bool:
    """Whether an export of the stream shows what may be secret: see `without_secrets`."""
    return without_secrets(spec) != spec


def without_secrets(spec: StreamSpec) -> StreamSpec:
    """The stream without request headers, variables of its command, and, in every URL, without user, password, query
    and fragment. Words of a command that are secrets by themselves cannot be told from others, and stay."""
    source = spec.source
    match source:
        case UrlSource(url=url):
            source = UrlSource(_bare(url))
        case CommandSource(argv=argv):
            source = CommandSource(tuple(map(_bare_urls, argv)))
        case ShellSource(line=line):
            source = ShellSource(_bare_urls(line))
    bare: dict[str, Any] = {field: getattr(StreamOptions(), field) for field in _SECRET_OPTIONS}
    if spec.options.proxy is not None:
        bare["proxy"] = _bare(spec.options.proxy)
    if spec.options.refresh_command is not None:
        bare["refresh_command"] = tuple(map(_bare_urls, spec.options.refresh_command))
    return msgspec.structs.replace(spec, source=source, options=msgspec.structs.replace(spec.options, **bare))


def _bare(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.split(":", 1)[0] + ":"
    if "@" not in parts.netloc and not parts.query and not parts.fragment:
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _bare_urls(text: str) -> str:
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+", lambda match: _bare(match[0]), text)
