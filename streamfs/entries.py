"""Registered streams, as the catalogue holds them and everybody else sees them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, cast

import msgspec

from streamfs.errors import Damaged, InvalidRequest
from streamfs.spec import (
    AnySource,
    Facts,
    StreamOptions,
    StreamSpec,
    UrlSource,
    check_name,
    from_json,
    is_name,
)

COLUMNS = "id, name, source, options, added, persist, size, mime, validator, modified, ranged, probed, facts_generation"
Row: TypeAlias = tuple[
    int,
    bytes,
    str,
    str,
    float,
    int,
    int | None,
    str | None,
    str | None,
    float | None,
    int,
    float | None,
    int,
]


class Entry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One registered stream. `id` is never given to another stream, removed or not: it can serve as the inode."""

    id: int
    spec: StreamSpec
    added: float  # seconds since the epoch
    persist: bool = False
    facts: Facts | None = None  # what the source last said of itself; None: it was never asked
    probed: float | None = None  # when it said so, in seconds since the epoch
    facts_generation: int = 0  # counts the versions that were seen; 0: none yet

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def size(self) -> int | None:
        """The length in bytes, as declared or as the source last said; None where neither did."""
        if self.spec.options.size is not None:
            return self.spec.options.size
        return self.facts.size if self.facts is not None else None

    def described(self) -> dict[str, Any]:
        """The row of `ls --json` and `status --json`, as it is while nothing of the stream is cached or open."""
        return {
            "name": self.name,
            "source": self.spec.described(),
            "state": "idle",
            "size": self.size,
            "buffered": 0,
            "readers": 0,
            "persist": self.persist,
            "error": None,
            "kind": "url" if isinstance(self.spec.source, UrlSource) else "command",
            "mime": self.facts.mime if self.facts is not None else None,
            "modified": self.facts.modified if self.facts is not None else None,
        }


class Entries:
    """Entries by id. Those that the file held are decoded when somebody first asks for them: of many, most are never
    asked for, and all of them take seconds. Asking for one raises Damaged where its row makes no sense."""

    def __init__(self, rows: Iterable[Row] = (), decode: Callable[[Row], Entry] | None = None) -> None:
        self._held: dict[int, Row | Entry] = {row[0]: row for row in rows}
        self._decode_row = decode

    def _decode(self, row: Row) -> Entry:
        assert self._decode_row is not None, "without rows"
        return self._decode_row(row)

    def __getitem__(self, stream_id: int) -> Entry:
        held = self._held[stream_id]
        if isinstance(held, tuple):
            held = self._held[stream_id] = self._decode(held)
        return held

    def __setitem__(self, stream_id: int, entry: Entry) -> None:
        self._held[stream_id] = entry

    def __contains__(self, stream_id: int) -> bool:
        return stream_id in self._held

    def __iter__(self) -> Iterator[int]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def get(self, stream_id: int) -> Entry | None:
        return self[stream_id] if stream_id in self._held else None

    def discard(self, stream_id: int) -> None:
        self._held.pop(stream_id, None)

    def values(self) -> list[Entry]:
        """All but those whose rows make no sense."""
        found = []
        for stream_id in list(self._held):
            with contextlib.suppress(Damaged):
                found.append(self[stream_id])
        return found

    def names(self) -> Iterator[tuple[int, bytes, float]]:
        """(id, name, when it was added) of each, in the order they were read. Decodes nothing; raises Damaged for a
        name that no stream can have."""
        for held in self._held.values():
            if isinstance(held, tuple):
                if not (isinstance(held[1], bytes) and is_name(held[1])):
                    self._decode(held)
                yield held[0], held[1], held[4]
            else:
                yield held.id, key_of(held.name), held.added

    def look(self, stream_id: int) -> Entry | None:
        """As `get`, without keeping what is decoded for it."""
        held = self._held.get(stream_id)
        return self._decode(held) if isinstance(held, tuple) else held

    def to_be_kept(self) -> list[Entry]:
        """Those that are persisted."""
        return [self[stream_id] for stream_id, held in list(self._held.items()) if _is_kept(held)]


def _is_kept(held: Row | Entry) -> bool:
    return bool(held[5]) if isinstance(held, tuple) else held.persist


_NO_OPTIONS = StreamOptions()
_SOURCE = cast(type[AnySource], AnySource)  # msgspec takes unions, typing calls them no types


def entry_of(row: Row, path: Path) -> Entry:
    """The entry of a row of the catalogue in `path`. Raises Damaged where it is none that `Catalog` wrote."""
    stream_id, name, source, options, added, persist, size, mime, validator, modified, ranged, probed, count = row
    try:
        spec = StreamSpec(
            name=check_name(name_of(name)),
            source=from_json(source, _SOURCE),
            options=_NO_OPTIONS if options == "{}" else from_json(options, StreamOptions),
        )
    except (InvalidRequest, TypeError, AttributeError) as error:
        raise Damaged(
            f"row {stream_id} of the catalogue {path} is damaged ({error}): "
            f"delete it with \"sqlite3 '{path}' 'DELETE FROM streams WHERE id = {stream_id}'\""
        ) from error
    facts = None if probed is None else Facts(size, bool(ranged), validator, mime, modified)
    return Entry(
        id=stream_id,
        spec=spec,
        added=added,
        persist=bool(persist),
        facts=facts,
        probed=probed,
        facts_generation=count,
    )


def key_of(name: str) -> bytes:
    """A name as the catalogue has it. Raises InvalidRequest."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the name {name!r} cannot be encoded as a file name") from error


def name_of(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")
