"""Options of a stream as people write them in lists and in the configuration, to those of a specification.

Sizes may be "5MiB", times "30s", headers a table; names have "-" or "_". Every error is one line that names the option.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from streamfs.errors import InvalidRequest
from streamfs.spec import StreamOptions, parse_duration, parse_size, parse_window

FILES = ("cookie_file", "netrc", "cacert", "cert", "key")
"""Options that name a local file."""
_SINGULAR = {"header": "headers", "secret_header": "secret_headers", "transform": "transforms"}


def field_name(key: str) -> str:
    """The option that `key` names: "Stall-Timeout" and "header" as on the command line, or as in the code."""
    name = key.replace("-", "_").lower()
    return _SINGULAR.get(name, name)


def read_options(given: Mapping[str, Any], base: Path | None = None) -> StreamOptions:
    """The options in `given`, as JSON or TOML have them. Relative paths start at `base`; without one they are refused.
    Raises InvalidRequest."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = field_name(key)
        if name in values:
            raise InvalidRequest(f"the option {key!r} is there twice")
        values[name] = read_option(key, value, base)
    return msgspec.structs.replace(StreamOptions(), **values)


def read_option(key: str, value: Any, base: Path | None = None) -> Any:
    """One value, of the field `field_name(key)`. Raises InvalidRequest."""
    name = field_name(key)
    reader = _READERS.get(name)
    if reader is None:
        raise InvalidRequest(f"no option is called {key!r}")
    try:
        value = reader(value)
    except InvalidRequest as error:
        raise InvalidRequest(f"the option {key!r}: {error}") from error
    if name in (*FILES, "cwd") and value is not None:
        value = _absolute(key, value, base)
    return value


def _absolute(key: str, path: str, base: Path | None) -> str:
    try:
        path = str(Path(path).expanduser())
    except RuntimeError as error:
        raise InvalidRequest(f"the option {key!r}: {error}") from error
    if not path.startswith("/"):
        if base is None:
            raise InvalidRequest(f"the option {key!r} must be an absolute path, not {path!r}")
        path = os.path.normpath(base / path)
    return path


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"a text is needed, not {_kind(value)}")
    return value


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"true or false is needed, not {_kind(value)}")
    return value


def size(value: Any) -> int:
    if isinstance(value, str):
        return parse_size(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequest(f"a size is needed, such as '5MiB' or plain bytes, not {_kind(value)}")
    return value


def programs(value: Any) -> tuple[str, ...]:
    """Names of programs, from a list or a text with commas; "none" for no program."""
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise InvalidRequest(f"names of programs are needed, not {_kind(value)}")
    names = tuple(name.strip() for name in listed if name.strip())
    if any("/" in name for name in names):
        raise InvalidRequest("programs are given by their names, without folders")
    return () if names == ("none",) else names


def size_or_none(value: Any) -> int | None:
    return None if _is_none(value) else size(value)


def duration(value: Any) -> float:
    if isinstance(value, str):
        return parse_duration(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise InvalidRequest(f"a duration is needed, such as '30s' or plain seconds, not {_kind(value)}")
    return float(value)


def _stall_timeout(value: Any) -> float | None:
    return None if value is None or _is_none(value) else duration(value)


def _is_none(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() in ("none", "never", "unlimited")


def _policy(value: Any) -> str:
    if value not in ("zero", "wait"):
        raise InvalidRequest("it is 'zero' or 'wait'")
    return str(value)


def _window(value: Any) -> str | None:
    if value is None or _is_none(value):
        return None
    window = str(value) if isinstance(value, int) and not isinstance(value, bool) else text(value).strip()
    parse_window(window)
    return window


def _headers(value: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(value, dict):
        return tuple((name, text(content)) for name, content in value.items())
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise InvalidRequest(f"a table of headers is needed, not {_kind(value)}")
    return tuple(_header(one) for one in value)


def _header(value: Any) -> tuple[str, str]:
    if isinstance(value, list) and len(value) == 2:
        return text(value[0]), text(value[1])
    name, colon, content = text(value).partition(":")
    if not colon or not name.strip():
        raise InvalidRequest("a header is written 'Name: value'")
    return name.strip(), content.strip()


def _variables(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"a table of variables is needed, not {_kind(value)}")
    return {name: text(content) for name, content in value.items()}


def _names(value: Any) -> tuple[str, ...]:
    return tuple(text(one) for one in value) if isinstance(value, list) else (text(value),)


def _words(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, list):
        return tuple(text(word) for word in value)
    try:
        return tuple(shlex.split(text(value)))
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "a table"}
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")


_READERS: dict[str, Callable[[Any], Any]] = {
    "size": lambda value: None if value is None else size(value),
    "headers": _headers,
    "secret_headers": _headers,
    "user_agent": text,
    "cookie_file": text,
    "netrc": text,
    "proxy": text,
    "cacert": text,
    "cert": text,
    "key": text,
    "insecure": flag,
    "stall_timeout": _stall_timeout,
    "size_policy": _policy,
    "probe": flag,
    "window": _window,
    "eager": flag,
    "ttl": lambda value: None if value is None else duration(value),
    "read_ahead": lambda value: None if value is None else size(value),
    "cwd": text,
    "env": _variables,
    "transforms": _names,
    "allow_private": flag,
    "refresh_command": _words,
}
assert set(_READERS) == set(StreamOptions.__struct_fields__)
