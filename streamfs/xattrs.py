"""The extended attributes of a file: what each name says of its stream."""

from __future__ import annotations

from collections.abc import Callable

from streamfs.errors import InvalidRequest
from streamfs.spec import UrlSource, redact_url
from streamfs.stream import Stream

PREFIX = "user.streamfs."
PERSIST = ("user.streamfs.persist", "user.persist")
"""The one attribute that can be set, under its two names."""


def read_all(stream: Stream) -> dict[str, str]:
    """Every attribute that the stream has now."""
    return {name: value for name, read in _READERS.items() if (value := read(stream)) is not None}


def read_one(stream: Stream, name: str) -> str | None:
    """The value of `name`; None where the stream has no such attribute now."""
    read = _READERS.get(name)
    return None if read is None else read(stream)


def parse_persist(value: bytes) -> bool:
    """Raises InvalidRequest for anything but 0 or 1."""
    match value.strip(b" \n\0"):
        case b"1":
            return True
        case b"0":
            return False
    raise InvalidRequest("persist is 1 or 0")


def _persist(stream: Stream) -> str:
    return "1" if stream.entry.persist else "0"


def _progress(stream: Stream) -> str:
    return f"{stream.buffered}/{'?' if stream.size is None else stream.size}"


def _text(value: object) -> str | None:
    return None if value is None or value == "" else str(value)


def _origin(stream: Stream) -> str | None:
    source = stream.entry.spec.source
    return redact_url(source.url) if isinstance(source, UrlSource) else None


_READERS: dict[str, Callable[[Stream], str | None]] = {
    **dict.fromkeys(PERSIST, _persist),
    PREFIX + "progress": _progress,
    PREFIX + "source": lambda s: s.entry.spec.described(),
    PREFIX + "state": lambda s: s.state,
    PREFIX + "size": lambda s: _text(s.size),
    PREFIX + "buffered": lambda s: str(s.buffered),
    PREFIX + "readers": lambda s: str(s.readers),
    PREFIX + "generation": lambda s: _text(s.generation and s.generation.number),
    PREFIX + "error": lambda s: _text(s.problem),
    PREFIX + "exit": lambda s: _text(s.exit_status),
    PREFIX + "stderr": lambda s: _text(s.stderr_tail),
    PREFIX + "validator": lambda s: _text(s.facts.validator),
    PREFIX + "title": lambda s: _text(s.title),
    PREFIX + "sha256": lambda s: _text(s.sha256),
    PREFIX + "end": lambda s: None if s.end_proven else "unproven",
    PREFIX + "persisted_path": lambda s: _text(s.persisted_path),
    "user.mime_type": lambda s: _text(s.facts.mime),
    "user.xdg.origin.url": _origin,
}
