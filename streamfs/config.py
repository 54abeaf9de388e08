"""The configuration file: options of the mount, and defaults of streams by host, by folder and by name.

What a stream was registered with comes first; then, from its own table, its folders' (the innermost first), its host's
and the defaults, each option from the first that has it. Headers are joined, name by name. Nothing of this is kept in
the catalogue: it is looked up when a stream is opened, so a change of the file counts from the next open on. Only
`persist` acts when a stream is registered, because it is a state that `streamfs unpersist` ends.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import msgspec

from streamfs import options as reading
from streamfs import tomllines
from streamfs.errors import InvalidRequest
from streamfs.logs import FORMATS, LEVELS
from streamfs.spec import MountOptions, StreamOptions, StreamSpec, UrlSource, check_name, check_spec

FILE_NAME = "config.toml"

STREAM_KEYS = (
    *("headers", "secret_headers", "user_agent", "cookie_file", "netrc"),
    *("proxy", "cacert", "cert", "key", "insecure", "allow_private"),
    *("stall_timeout", "size_policy", "window", "eager", "probe", "persist"),
    *("ttl", "read_ahead"),
)
"""What a table of defaults may hold. (What a stream is, its source, length and transforms, is its own.)"""
_FOR_COMMANDS = frozenset({"stall_timeout", "size_policy", "window", "eager", "persist", "ttl", "read_ahead"})

Layer: TypeAlias = dict[str, Any]
"""Values by field of StreamOptions, and "persist"."""


def _cache_dir(value: Any) -> str:
    return str(Path(reading.text(value)).expanduser())


def _one_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in choices:
            raise InvalidRequest(f"it is one of {', '.join(choices)}")
        return str(value)

    return read


_MOUNT: dict[str, Callable[[Any], Any]] = {
    "allow_other": reading.flag,
    "memory": reading.size,
    "spill_threshold": reading.size,
    "cache_dir": _cache_dir,
    "cache_size": reading.size_or_none,
    "ttl": reading.duration,
    "read_ahead": reading.size,
    "scanners": reading.programs,
    "read_only": reading.flag,
    "log_level": _one_of(tuple(LEVELS)),
    "log_format": _one_of(tuple(FORMATS)),
}


@dataclass(frozen=True, slots=True)
class Config:
    """What the file says. `streams` and `folders` by name, `hosts` by host, host:port or *.domain."""

    mount: dict[str, Any] = field(default_factory=dict)
    defaults: Layer = field(default_factory=dict)
    hosts: dict[str, Layer] = field(default_factory=dict)
    folders: dict[str, Layer] = field(default_factory=dict)
    streams: dict[str, Layer] = field(default_factory=dict)

    def mount_options(self) -> MountOptions:
        return msgspec.structs.replace(MountOptions(), **self.mount)

    def effective(self, spec: StreamSpec) -> StreamSpec:
        """`spec` with what the tables say beside it. Options of `spec` that are the default count as not given."""
        if not (self.defaults or self.hosts or self.folders or self.streams):
            return spec  # as most often: a large catalogue asks for each of its streams
        merged = {key: value for key, (value, _) in self.sources_of(spec).items() if key != "persist"}
        if merged.get("window") is not None and merged.get("size_policy") == "wait":
            del merged["size_policy"]  # they exclude each other, and a window says more of the stream
        return msgspec.structs.replace(spec, options=msgspec.structs.replace(_NO_OPTIONS, **merged))

    def persists(self, spec: StreamSpec) -> bool:
        """Whether the whole of the stream, which is being registered, is to be kept."""
        found = self.sources_of(spec)
        window, _ = found.get("window", (None, ""))
        return window is None and bool(found.get("persist", (False, ""))[0])

    def sources_of(self, spec: StreamSpec) -> dict[str, tuple[Any, str]]:
        """Each option that counts for the stream, and where it comes from, such as 'host "h.example"'. An option of
        its own is "its own"."""
        found: dict[str, tuple[Any, str]] = {}
        headers: dict[str, tuple[str, str, str, str]] = {}  # by lower name: field, name, value, place
        for place, layer in self._layers(spec):
            for key, value in layer.items():
                if not isinstance(spec.source, UrlSource) and place != OWN and key not in _FOR_COMMANDS:
                    continue
                if key in ("headers", "secret_headers"):
                    for name, content in value:
                        headers.setdefault(name.lower(), (key, name, content, place))
                else:
                    found.setdefault(key, (value, place))
        for kind in ("headers", "secret_headers"):
            chosen = [one for one in headers.values() if one[0] == kind]
            if chosen:
                places = ", ".join(dict.fromkeys(place for *_, place in chosen))
                found[kind] = (tuple((name, value) for _, name, value, _ in chosen), places)
        return found

    def _layers(self, spec: StreamSpec) -> Iterator[tuple[str, Layer]]:
        """The first that has an option has the say."""
        yield OWN, self._own(spec)
        if spec.name in self.streams:
            yield f'stream "{spec.name}"', self.streams[spec.name]
        parts = spec.name.split("/")
        for depth in range(len(parts) - 1, 0, -1):
            folder = "/".join(parts[:depth])
            if folder in self.folders:
                yield f'folder "{folder}"', self.folders[folder]
        if isinstance(spec.source, UrlSource):
            for host in _host_keys(spec.source.url):
                if host in self.hosts:
                    yield f'host "{host}"', self.hosts[host]
        yield "defaults", self.defaults

    def _own(self, spec: StreamSpec) -> Layer:
        own = {name: getattr(spec.options, name) for name in StreamOptions.__struct_fields__}
        return {name: value for name, value in own.items() if value != getattr(_NO_OPTIONS, name)}


OWN = "its own"
_NO_OPTIONS = StreamOptions()


def _host_keys(url: str) -> Iterator[str]:
    """The tables that a URL's host may have, the closest first."""
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    if parts.port is not None:
        yield f"{host}:{parts.port}"
    yield host
    labels = host.split(".")
    for depth in range(1, len(labels)):
        yield "*." + ".".join(labels[depth:])


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with the file. `line`: from 1, None where that cannot be said."""

    line: int | None
    text: str


def read(text: str) -> tuple[Config, list[Problem]]:
    """What a configuration says, and all that is wrong with it, in the order of lines; what is wrong is left out."""
    config = Config()
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return config, [Problem(None, f"not valid TOML: {error}")]
    except RecursionError:
        return config, [Problem(None, "not valid TOML: nested too deep")]
    reader = _Reader(text)
    for key, value in document.items():
        if key not in _SECTIONS:
            reader.refuse((key,), f"no table is called {key!r}; there are {', '.join(_SECTIONS)}")
        elif not isinstance(value, dict):
            reader.refuse((key,), f"{key!r} is a table: [{key}]")
        elif key == "mount":
            config.mount.update(reader.mount(value))
        elif key == "defaults":
            config.defaults.update(reader.layer((key,), value))
        else:
            getattr(config, key + "s").update(reader.tables(key, value))
    return config, sorted(reader.problems, key=lambda problem: problem.line or 0)


_SECTIONS = ("mount", "defaults", "host", "folder", "stream")


class _Reader:
    def __init__(self, text: str) -> None:
        self.problems: list[Problem] = []
        self._text = text

    def refuse(self, path: tuple[str, ...], text: str) -> None:
        self.problems.append(Problem(tomllines.line_of(self._text, path), text))

    def mount(self, table: dict[str, Any]) -> dict[str, Any]:
        values = {}
        for key, value in table.items():
            name = reading.field_name(key)
            if name not in _MOUNT:
                self.refuse(("mount", key), f"no option of the mount is called {key!r}")
                continue
            try:
                values[name] = _MOUNT[name](value)
                if name == "cache_dir" and not values[name].startswith("/"):
                    raise InvalidRequest(f"an absolute path is needed, not {value!r}")
            except (InvalidRequest, RuntimeError) as error:
                values.pop(name, None)
                self.refuse(("mount", key), f"the option {key!r}: {error}")
        return values

    def tables(self, section: str, tables: dict[str, Any]) -> dict[str, Layer]:
        found = {}
        for name, table in tables.items():
            if not isinstance(table, dict):
                self.refuse((section, name), f'a table is needed: [{section}."{name}"]')
                continue
            try:
                key = _check_host(name) if section == "host" else check_name(name)
            except InvalidRequest as error:
                self.refuse((section, name), str(error))
                continue
            found[key] = self.layer((section, name), table)
        return found

    def layer(self, path: tuple[str, ...], table: dict[str, Any]) -> Layer:
        values: Layer = {}
        for key, value in table.items():
            name = reading.field_name(key)
            try:
                if name not in STREAM_KEYS:
                    raise InvalidRequest(f"no option for {path[0]} is called {key!r}")
                if name == "secret_headers" and path[0] == "defaults":
                    raise InvalidRequest(f"{key!r} would go to every server: put it into a [host] or [folder] table")
                if name == "persist":
                    values[name] = reading.flag(value)
                    continue
                values[name] = reading.read_option(key, value)
                check_spec(_probe_of({name: values[name]}))
            except InvalidRequest as error:
                values.pop(name, None)
                self.refuse((*path, key), str(error))
        return values


def _probe_of(values: Layer) -> StreamSpec:
    """Some stream with these options, to have them checked."""
    options = msgspec.structs.replace(_NO_OPTIONS, **values)
    return StreamSpec(name="x", source=UrlSource("http://h/"), options=options)


def _check_host(name: str) -> str:
    host, colon, port = name.lower().rpartition(":")
    if not colon or name.endswith("]"):
        host, port = name.lower(), "1"
    if not host or not port.isdigit() or any(letter in host for letter in "/@ "):
        raise InvalidRequest(f"{name!r} is no host: write h.example, h.example:8080 or *.example")
    return name.lower().replace("[", "").replace("]", "") if "[" in name else name.lower()


def load(path: Path) -> Config:
    """What the file says; nothing where there is none. Raises InvalidRequest, one line with the first that is wrong."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return Config()
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8") from error
    config, problems = read(text)
    if problems:
        more = f" (and {len(problems) - 1} more: 'streamfs config check')" if len(problems) > 1 else ""
        raise InvalidRequest(described(path, problems[0]) + more)
    return config


def described(path: Path, problem: Problem) -> str:
    return f"{path}{'' if problem.line is None else f' line {problem.line}'}: {problem.text}"
