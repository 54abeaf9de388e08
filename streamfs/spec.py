"""What a stream is registered with: its name, its source and its options, each checked.

Plain data (msgspec structs), shared by the command line, the control socket, the catalogue, manifests and the
sources. Nothing here does I/O. The structs are `gc=False`: they hold no cycles, and a hundred thousand of them would
make every collection slow.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

import msgspec

from streamfs.errors import InvalidRequest, NameTooLong

URL_SCHEMES = frozenset({"http", "https", "ftp", "ftps", "sftp", "file"})
NAME_PART_BYTES = 255  # NAME_MAX of Linux file systems
NAME_BYTES = 4095  # PATH_MAX less its NUL
TRANSFORMS = ("bunzip2", "digest", "gunzip", "icy", "unxz", "unzstd")
DEFAULT_STALL_TIMEOUT = 60.0  # seconds, for URLs (docs/semantics.md)


class UrlSource(msgspec.Struct, frozen=True, tag="url", gc=False):
    """Bytes of a URL. `url` may hold secrets: show it only through `redact_url`."""

    url: str


class CommandSource(msgspec.Struct, frozen=True, tag="command", gc=False):
    """Standard output of a command; `argv` is run as it is, without a shell."""

    argv: tuple[str, ...]


class ShellSource(msgspec.Struct, frozen=True, tag="shell", gc=False):
    """Standard output of one line given to /bin/sh -c."""

    line: str


AnySource = UrlSource | CommandSource | ShellSource


class StreamOptions(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, gc=False
):
    """Options of one stream, as given with `streamfs add`. Paths are absolute once registered."""

    size: Annotated[int, msgspec.Meta(ge=0)] | None = None  # declared length in bytes
    headers: tuple[tuple[str, str], ...] = ()
    secret_headers: tuple[tuple[str, str], ...] = ()  # values refer to files and the like: as check_reference says
    user_agent: str | None = None
    cookie_file: str | None = None  # Netscape format
    netrc: str | None = None  # path of the netrc file to use
    proxy: str | None = None  # http://, https://, socks5://, socks5h:// URL
    cacert: str | None = None  # PEM bundle that replaces the system's
    cert: str | None = None  # PEM client certificate (with key, unless `key`)
    key: str | None = None
    insecure: bool = False
    stall_timeout: float | msgspec.UnsetType | None = msgspec.UNSET  # seconds; None waits for ever
    size_policy: Literal["zero", "wait"] = "zero"
    probe: bool = True
    window: str | None = None  # "2GiB" or "30m"
    eager: bool = False
    ttl: float | None = None  # seconds that cached bytes are kept after their last use; None: as the mount says
    read_ahead: int | None = None  # bytes past the furthest reader; None: as the mount says
    cwd: str | None = None
    env: dict[str, str] = {}
    transforms: tuple[str, ...] = ()
    allow_private: bool = False
    refresh_command: tuple[str, ...] | None = None


IfTaken: TypeAlias = Literal["refuse", "skip", "replace", "rename"]
"""What an import does with a name that is a stream's already."""


class StreamSpec(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One registered stream: name, source, options."""

    name: str
    source: AnySource
    options: StreamOptions = StreamOptions()

    @property
    def stall_timeout(self) -> float | None:
        """Seconds without a byte before a read fails with ETIMEDOUT; None: never."""
        if self.options.stall_timeout is not msgspec.UNSET:
            return self.options.stall_timeout
        return DEFAULT_STALL_TIMEOUT if isinstance(self.source, UrlSource) else None

    def described(self) -> str:
        """The source as a listing may show it, secrets redacted."""
        match self.source:
            case UrlSource(url=url):
                return redact_url(url)
            case CommandSource(argv=argv):
                return redact_text(shlex.join(argv))
            case ShellSource(line=line):
                return redact_text(line)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a source said of its bytes in one reply.

    `size`: the exact total length in bytes, None while unknown; never a guess.
    `ranged`: bodies may start at any offset, and bytes of two bodies with the same validator are of one version.
    `validator`: names the version: bytes under equal validators are equal. None: no two bodies can be compared,
    so such a source is never `ranged`.
    `modified`: seconds since the epoch, None when not told. `mime`: "audio/flac", without parameters.
    """

    size: int | None = None
    ranged: bool = False
    validator: str | None = None
    mime: str | None = None
    modified: float | None = None


class Registration(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One entry of a list to import. `facts`: what the list says of its bytes, to be shown until the source tells
    better; with them it is not asked by itself. `persist`: keep its whole; None: as the configuration says."""

    spec: StreamSpec
    facts: Facts | None = None
    persist: bool | None = None


SCANNERS = (
    "tumblerd",
    "ffmpegthumbnailer",
    "totem-video-thumbnailer",
    "gnome-video-thumbnailer",
    "gdk-pixbuf-thumbnailer",
    "evince-thumbnailer",
    "gst-thumbnailers",
    "glycin-thumbnailer",
    "baloo_file",
    "baloo_file_extractor",
    "tracker-miner-fs-3",
    "tracker-extract-3",
    "localsearch-3",
    "localsearch-extractor-3",
    "recollindex",
    "minidlnad",
)
"""Thumbnailers and indexers of the usual desktops: they open whatever they see."""


class MountOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the daemon mounts and what it may use. Sizes in bytes, `ttl` in seconds."""

    allow_other: bool = False  # other users may read the mount
    memory: int = 256 << 20  # of all streams together
    spill_threshold: int = 5 << 20  # of one stream, before its bytes move to the cache directory
    cache_dir: str | None = None  # absolute; None: the home's own
    cache_size: int | None = 10 << 30  # of everything evictable in the cache directory; None: no limit
    ttl: float = 3600.0  # how long cached bytes are kept after their last use
    read_ahead: int = 8 << 20  # how far past the furthest reader a source is read
    scanners: tuple[str, ...] = SCANNERS  # programs for which nothing is read ahead and nothing stays in the cache
    read_only: bool = False  # nothing can be renamed, removed or marked through the mount
    log_level: str = "info"  # the least that is logged
    log_format: str = "text"  # or "json"


_T = TypeVar("_T")


def to_json(value: Any) -> bytes:
    """`value` (JSON types, msgspec structs) as JSON in ASCII or UTF-8. Text that came from file names or arguments
    that are not UTF-8 (lone surrogates) is kept, as \\udcXX. Raises TypeError for what JSON cannot hold."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(value), separators=(",", ":")).encode("ascii")


@functools.cache  # making one costs several times a short decoding
def _decoder(kind: Any) -> Any:
    return msgspec.json.Decoder(kind)


def from_json(data: bytes | str, kind: type[_T]) -> _T:
    """The value of type `kind` that `to_json` wrote. Raises InvalidRequest where it is not one."""
    try:
        decoder: msgspec.json.Decoder[_T] = _decoder(cast(Any, kind))
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        try:
            return msgspec.convert(json.loads(data), kind)
        except (ValueError, msgspec.MsgspecError, RecursionError):  # a ValueError only from msgspec 0.20 on
            raise InvalidRequest(f"not a valid {getattr(kind, '__name__', 'source')}: {error}") from error


def check_spec(spec: StreamSpec) -> StreamSpec:
    """`spec`, if it can be registered: name, source and every option checked for itself, without I/O.
    Raises InvalidRequest (or NameTooLong) with one line that says what is wrong."""
    check_name(spec.name)
    is_url = isinstance(spec.source, UrlSource)
    match spec.source:
        case UrlSource(url=url):
            check_url(url)
        case CommandSource(argv=argv):
            if not argv or not argv[0]:
                raise InvalidRequest("the command is empty")
            for word in argv:
                _check_no_nul("the command", word)
        case ShellSource(line=line):
            if not line.strip():
                raise InvalidRequest("the shell line is empty")
            _check_no_nul("the shell line", line)
    options = spec.options
    for field in _URL_ONLY if not is_url else _COMMAND_ONLY:
        if getattr(options, field) != getattr(_NO_OPTIONS, field):
            kind = "URLs" if not is_url else "commands"
            raise InvalidRequest(f"the option --{field.rstrip('s').replace('_', '-')} is for {kind} only")
    for header, value in options.headers:
        if not _TOKEN.fullmatch(header):
            raise InvalidRequest(f"not a header name: {header!r}")
        if _CONTROL.search(value):
            raise InvalidRequest(f"the value of the header {header} holds a control character")
    for header, value in options.secret_headers:
        if not _TOKEN.fullmatch(header):
            raise InvalidRequest(f"not a header name: {header!r}")
        check_reference(value)
    if options.user_agent is not None and _CONTROL.search(options.user_agent):
        raise InvalidRequest("the user agent holds a control character")
    for key, value in options.env.items():
        if not key or "=" in key:
            raise InvalidRequest(f"not the name of an environment variable: {key!r}")
        _check_no_nul("the environment", key + value)
    for field in ("cookie_file", "netrc", "cacert", "cert", "key", "cwd"):
        path = getattr(options, field)
        if path is not None:
            _check_no_nul("a path", path)
            if not path.startswith("/"):
                raise InvalidRequest(f"--{field.replace('_', '-')} must be an absolute path, not {path!r}")
    if options.proxy is not None:
        check_proxy(options.proxy)
    if options.stall_timeout is not msgspec.UNSET and options.stall_timeout is not None and options.stall_timeout <= 0:
        raise InvalidRequest("the stall timeout must be more than 0")
    if options.window is not None:
        parse_window(options.window)
        if options.size_policy == "wait":
            raise InvalidRequest("--window is for streams without an end: no open can wait for that (--size-policy)")
    check_transforms(options.transforms)
    if options.refresh_command is not None and not options.refresh_command:
        raise InvalidRequest("the refresh command is empty")
    return spec


REFERENCE = re.compile(r"\$\{(file|env|credential):([^}]+)\}")
"""Where a secret is: ${file:/PATH}, ${env:VARIABLE} of the daemon, ${credential:NAME} of its systemd unit."""


def check_reference(value: str) -> str:
    """The value of a secret header: text with one reference or more, whose secrets are read for each request and kept
    nowhere. Raises InvalidRequest."""
    rest, count = REFERENCE.subn("", value)
    if not count or "${" in rest:
        raise InvalidRequest("a secret header refers to its secret: ${file:PATH}, ${env:NAME} or ${credential:NAME}")
    for kind, place in REFERENCE.findall(value):
        if kind == "file" and not place.startswith(("/", "~")):
            raise InvalidRequest(f"${{file:PATH}} is an absolute path, not {place!r}")
    if _CONTROL.search(value):
        raise InvalidRequest("a secret header holds a control character")
    return value


def check_transforms(names: tuple[str, ...]) -> tuple[str, ...]:
    """`names`, if each is a transform's and they can follow one another. Raises InvalidRequest."""
    for name in names:
        if name not in TRANSFORMS:
            raise InvalidRequest(f"no transform is called {name!r}; there are {', '.join(TRANSFORMS)}")
    if "icy" in names[1:]:
        raise InvalidRequest("the transform icy must be the first: the server counts the bytes that it sends")
    return names


def _check_no_nul(what: str, text: str) -> None:
    if "\0" in text:
        raise InvalidRequest(f"{what} holds a NUL byte")


_NO_OPTIONS = StreamOptions()
_URL_ONLY = (
    "headers",
    "secret_headers",
    "user_agent",
    "cookie_file",
    "netrc",
    "proxy",
    "cacert",
    "cert",
    "key",
    "insecure",
    "allow_private",
    "refresh_command",
)
_COMMAND_ONLY = ("cwd", "env")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_NAME_PART = rb"(?!\.{1,2}(?:/|\Z))[^/\0]{1,255}"
_NAME = re.compile(rb"%b(?:/%b)*" % (_NAME_PART, _NAME_PART))
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # all but the tab


def check_name(name: str) -> str:
    """`name`, if it can be a stream's: parts joined by "/", none empty, "." or "..", no NUL, each part at most
    255 bytes of UTF-8. Raises InvalidRequest or NameTooLong with one line that says what is wrong."""
    try:
        raw = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the name {name!r} cannot be encoded as a file name") from error
    if not raw:
        raise InvalidRequest("a name cannot be empty")
    if b"\0" in raw:
        raise InvalidRequest(f"the name {name!r} holds a NUL byte")
    if len(raw) > NAME_BYTES:
        raise NameTooLong(f"the name {name[:40]!r}… is longer than {NAME_BYTES} bytes")
    for part in raw.split(b"/"):
        if not part:
            raise InvalidRequest(f"the name {name!r} has an empty part: no leading, trailing or double '/'")
        if part in (b".", b".."):
            raise InvalidRequest(f"the name {name!r} has a part {part.decode()!r}, which means a folder")
        if len(part) > NAME_PART_BYTES:
            raise NameTooLong(f"a part of the name {name[:40]!r}… is longer than {NAME_PART_BYTES} bytes")
    return name


def is_name(raw: bytes) -> bool:
    """Whether `check_name` lets the name of these bytes pass; several times as fast."""
    return len(raw) <= NAME_BYTES and _NAME.fullmatch(raw) is not None


def numbered(name: str) -> Iterator[str]:
    """`name` with (2), (3), … before its ending, in a form that fits."""
    folder, slash, last = name.rpartition("/")
    stem, dot, ending = last.rpartition(".")
    if not stem or not re.fullmatch(r"[A-Za-z0-9]{1,8}", ending):
        stem, dot, ending = last, "", ""
    for number in itertools.count(2):
        tail = f" ({number}){dot}{ending}"
        yield folder + slash + cut(stem, NAME_PART_BYTES - len(tail.encode("utf-8", "surrogateescape"))) + tail


def cut(text: str, size: int) -> str:
    """As much of `text` as `size` bytes of UTF-8 hold, in whole characters."""
    raw = text.encode("utf-8", "surrogateescape")
    return text if len(raw) <= size else raw[:size].decode("utf-8", "ignore")


def check_url(url: str) -> str:
    """`url`, if streamfs can open its kind. Raises InvalidRequest otherwise; never contacts anything."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidRequest(f"not a URL: {redact_url(url)!r} ({error})") from error
    if not parts.scheme:
        raise InvalidRequest(f"not a URL: {redact_url(url)!r} (it starts with no scheme such as http:// or file://)")
    if parts.scheme.lower() not in URL_SCHEMES:
        known = ", ".join(sorted(URL_SCHEMES))
        raise InvalidRequest(f"streamfs cannot open {parts.scheme}: URLs, only {known}")
    if re.search(r"[\x00-\x20\x7f]", url):
        raise InvalidRequest("the URL holds a space or a control character: write it as %20 and the like")
    if parts.scheme.lower() == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise InvalidRequest(f"a file URL is file:///ABSOLUTE/PATH, not {redact_url(url)!r}")
    elif not parts.hostname:
        raise InvalidRequest(f"the URL {redact_url(url)!r} names no host")
    elif port == 0:
        raise InvalidRequest(f"the URL {redact_url(url)!r} has port 0")
    return url


def redact_url(url: str) -> str:
    """`url` without what may be secret: user and password become "***", and so does every query value and the
    fragment; plain characters, as getfattr shows a value with others as base64. Never raises: what cannot be parsed is
    shown as its scheme alone."""
    try:
        parts = urlsplit(url)
        netloc = parts.netloc
    except ValueError:
        return url.split(":", 1)[0][:16] + ":***"
    if "@" in netloc:
        netloc = "***@" + netloc.rsplit("@", 1)[1]
    query = "&".join(
        key + "=***" if "=" in pair else "***"
        for pair in parts.query.split("&")
        if pair
        for key in (pair.split("=")[0],)
    )
    return urlunsplit((parts.scheme, netloc, parts.path, query, "***" if parts.fragment else ""))


def redact_text(text: str) -> str:
    """`text` with every URL in it redacted as `redact_url` does."""
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+", lambda match: redact_url(match[0]), text)


PROXY_SCHEMES = frozenset({"http", "https", "socks4", "socks4a", "socks5", "socks5h"})


def check_proxy(url: str) -> str:
    """`url`, if it can be a proxy's. Raises InvalidRequest otherwise."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise InvalidRequest(f"not the URL of a proxy: {redact_url(url)!r} ({error})") from error
    if parts.scheme.lower() not in PROXY_SCHEMES or not parts.hostname or re.search(r"[\x00-\x20\x7f]", url):
        known = ", ".join(f"{scheme}://" for scheme in sorted(PROXY_SCHEMES))
        raise InvalidRequest(f"not the URL of a proxy: {redact_url(url)!r} (one of {known} and a host)")
    return url


_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "kib": 1 << 10,
    "m": 1000**2,
    "mb": 1000**2,
    "mib": 1 << 20,
}
_SIZE_UNITS |= {"g": 1000**3, "gb": 1000**3, "gib": 1 << 30, "t": 1000**4, "tb": 1000**4, "tib": 1 << 40}
_DURATION_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Bytes meant by "5MiB", "10GiB", "64k" or a plain number. Raises InvalidRequest."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _SIZE_UNITS:
        raise InvalidRequest(f"not a size: {text!r} (write 5MiB, 10GiB or plain bytes)")
    return (
        round(float(match[1]) * _SIZE_UNITS[match[2].lower()])
        if "." in match[1]
        else (int(match[1]) * _SIZE_UNITS[match[2].lower()])
    )


def parse_duration(text: str) -> float:
    """Seconds meant by "30s", "2h", "1.5m", "250ms" or a plain number of seconds. Raises InvalidRequest."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _DURATION_UNITS:
        raise InvalidRequest(f"not a duration: {text!r} (write 30s, 2h or plain seconds)")
    return float(match[1]) * _DURATION_UNITS[match[2].lower()]


def parse_window(text: str) -> tuple[Literal["bytes"], int] | tuple[Literal["seconds"], float]:
    """How much of the past "2GiB" (bytes) or "30m" (seconds) keeps. A plain number means bytes, and a small "m"
    minutes. Raises InvalidRequest, also for 0."""
    unit = text.strip().lstrip("0123456789.").strip()
    if unit in ("ms", "s", "m", "h", "d"):
        seconds = parse_duration(text)
        if seconds > 0:
            return "seconds", seconds
    else:
        try:
            size = parse_size(text)
        except InvalidRequest as error:
            raise InvalidRequest(f"not a window: {text!r} (write 2GiB or 30m)") from error
        if size > 0:
            return "bytes", size
    raise InvalidRequest("the window must be more than 0")
