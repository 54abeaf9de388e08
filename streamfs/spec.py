"""What a stream is registered with: its name, its source and its options, each checked.

Plain data (msgspec structs), shared by the command line, the control socket, the catalogue, manifests and the
sources. Nothing here does I/O.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit, urlunsplit

import msgspec

from streamfs.errors import InvalidRequest, NameTooLong

URL_SCHEMES = frozenset({"http", "https", "ftp", "ftps", "sftp", "file"})
NAME_PART_BYTES = 255  # NAME_MAX of Linux file systems
NAME_BYTES = 4095  # PATH_MAX less its NUL
DEFAULT_STALL_TIMEOUT = 60.0  # seconds, for URLs (docs/semantics.md)


class UrlSource(msgspec.Struct, frozen=True, tag="url"):
    """Bytes of a URL. `url` may hold secrets: show it only through `redact_url`."""

    url: str


class CommandSource(msgspec.Struct, frozen=True, tag="command"):
    """Standard output of a command; `argv` is run as it is, without a shell."""

    argv: tuple[str, ...]


class ShellSource(msgspec.Struct, frozen=True, tag="shell"):
    """Standard output of one line given to /bin/sh -c."""

    line: str


AnySource = UrlSource | CommandSource | ShellSource


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Options of one stream, as given with `streamfs add`. Paths are absolute once registered."""

    size: Annotated[int, msgspec.Meta(ge=0)] | None = None  # declared length in bytes
    headers: tuple[tuple[str, str], ...] = ()
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
    cwd: str | None = None
    env: dict[str, str] = {}
    transforms: tuple[str, ...] = ()
    allow_private: bool = False
    refresh_command: tuple[str, ...] | None = None


class StreamSpec(msgspec.Struct, frozen=True, kw_only=True):
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
                return " ".join(argv)
            case ShellSource(line=line):
                return line


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


def check_url(url: str) -> str:
    """`url`, if streamfs can open its kind. Raises InvalidRequest otherwise; never contacts anything."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidRequest(f"not a URL: {redact_url(url)!r} ({error})") from error
    if not parts.scheme:
        raise InvalidRequest(f"not a URL: {url!r} (it starts with no scheme such as http:// or file://)")
    if parts.scheme.lower() not in URL_SCHEMES:
        known = ", ".join(sorted(URL_SCHEMES))
        raise InvalidRequest(f"streamfs cannot open {parts.scheme}: URLs, only {known}")
    if re.search(r"[\x00-\x20\x7f]", url):
        raise InvalidRequest("the URL holds a space or a control character: write it as %20 and the like")
    if parts.scheme.lower() == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise InvalidRequest(f"a file URL is file:///ABSOLUTE/PATH, not {url!r}")
    elif not parts.hostname:
        raise InvalidRequest(f"the URL {redact_url(url)!r} names no host")
    elif port == 0:
        raise InvalidRequest(f"the URL {redact_url(url)!r} has port 0")
    return url


def redact_url(url: str) -> str:
    """`url` without what may be secret: user and password become "…", and so does every query value and the
    fragment. Never raises: what cannot be parsed is shown as its scheme alone."""
    try:
        parts = urlsplit(url)
        netloc = parts.netloc
    except ValueError:
        return url.split(":", 1)[0][:16] + ":…"
    if "@" in netloc:
        netloc = "…@" + netloc.rsplit("@", 1)[1]
    query = "&".join(
        key + "=…" if "=" in pair else "…" for pair in parts.query.split("&") if pair for key in (pair.split("=")[0],)
    )
    return urlunsplit((parts.scheme, netloc, parts.path, query, "…" if parts.fragment else ""))


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
