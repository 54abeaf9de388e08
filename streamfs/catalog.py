"""The registered streams: what is known of them, and every change.

A method that has returned has its change on disk, and one that raises has changed nothing. Methods take well under a
millisecond besides that fsync; they may be called from any thread, one at a time.

Options rest here with their secrets (headers, URLs with passwords).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

import msgspec

from streamfs.database import Database
from streamfs.entries import COLUMNS, Entries, Entry, Row, entry_of, key_of, name_of
from streamfs.errors import AlreadyExists, InvalidRequest, NotEmpty, NotFound
from streamfs.spec import Facts, IfTaken, Registration, StreamSpec, check_name, check_spec, numbered, to_json


class Registered(NamedTuple):
    """What became of one entry of an import. `wanted`: the name it came with."""

    outcome: Literal["added", "unchanged", "skipped", "replaced", "renamed"]
    wanted: str
    entry: Entry


class _Undone(Exception):
    """Ends a transaction that was only tried."""


class Catalog:
    """The catalogue in the file `path`, made if it is missing. `path`'s directory must be private."""

    def __init__(self, path: Path) -> None:
        """Raises Damaged for a file that is no catalogue or is corrupt, InvalidRequest for one that a newer streamfs
        wrote, Busy where another process has it open, NotPermitted where it is not ours."""
        self.path = path
        self._database = Database(path)

    def close(self) -> None:
        """Close the file. Safe to call again; no other method may follow."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────

    def all(self) -> list[Entry]:
        """Every entry, in the order of the names' bytes. Raises Damaged if a row makes no sense."""
        with self._database.reading():
            rows = self._database.execute(f"SELECT {COLUMNS} FROM streams ORDER BY name").fetchall()
        return [self._entry(row) for row in rows]

    def names(self, prefix: str = "") -> list[str]:
        """The names that begin so, in the order of their bytes."""
        key = key_of(prefix)
        with self._database.reading():
            rows = self._database.execute(
                "SELECT name FROM streams WHERE name >= ? AND substr(name, 1, ?) = ? ORDER BY name",
                (key, len(key), key),
            ).fetchall()
        return [name_of(row[0]) for row in rows]

    def entries(self) -> Entries:
        """All of them, in the order of the names' bytes, decoded when they are needed."""
        with self._database.reading():
            rows = self._database.execute(f"SELECT {COLUMNS} FROM streams ORDER BY name").fetchall()
        return Entries(rows, self._entry)

    def get(self, name: str) -> Entry:
        """The stream `name`. Raises NotFound."""
        with self._database.reading():
            return self._named(name)

    def by_id(self, stream_id: int) -> Entry:
        """Raises NotFound."""
        with self._database.reading():
            return self._numbered(stream_id)

    @property
    def count(self) -> int:
        with self._database.reading():
            row = self._database.execute("SELECT count(*) FROM streams").fetchone()
        return int(row[0])

    def folders(self) -> list[str]:
        """The folders that were made for themselves, in the order of their names' bytes."""
        with self._database.reading():
            rows = self._database.execute("SELECT name FROM folders ORDER BY name").fetchall()
        return [name_of(row[0]) for row in rows]

    # ── changing ─────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, spec: StreamSpec, replace: bool = False) -> Entry:
        """Register a stream. With `replace` one of the same name gives way, id and all, unless it is the same stream
        already, which then stays as it is. Raises AlreadyExists for a taken name, for a name that is a folder of
        others and for one below a stream; InvalidRequest for what `check_spec` does not let pass."""
        return self.add_many((spec,), replace)[0]

    def add_many(self, specs: Iterable[StreamSpec], replace: bool = False) -> list[Entry]:
        """`add` for many, all of them or none."""
        checked = [check_spec(spec) for spec in specs]
        now = time.time()
        with self._database.transaction():
            return [self._insert(spec, now, replace) for spec in checked]

    def register(self, items: Iterable[Registration], taken: IfTaken, *, dry_run: bool = False) -> list[Registered]:
        """Register the streams of a list, all of them or none. One that is there already as it is stays so; of
        another one of its name `taken` says: "refuse" (AlreadyExists, for all), "skip", "replace", or "rename", which
        gives the new one the name "x (2)", unless its source is there under that name. Facts that an item has count
        as known. With `dry_run` nothing is changed; ids are then without meaning. Raises as `add`."""
        checked = [(item, check_spec(item.spec)) for item in items]
        now = time.time()
        done: list[Registered] = []
        try:
            with self._database.transaction():
                clashes: list[str] = []
                for item, spec in checked:
                    registered = self._register(item, spec, now, taken)
                    if registered is None:
                        clashes.append(spec.name)
                    else:
                        done.append(registered)
                if clashes:
                    more = f" and {len(clashes) - 1} others" if len(clashes) > 1 else ""
                    raise AlreadyExists(f"streams of these names exist already: {clashes[0]!r}{more}")
                if dry_run:
                    raise _Undone
        except _Undone:
            pass
        return done

    def add_folder(self, name: str) -> None:
        """Make a folder that stays without streams. Raises AlreadyExists where the name, or a part of it, is a
        stream's; as check_name."""
        check_name(name)
        with self._database.transaction():
            if self._find(name) is not None:
                raise AlreadyExists(f"a stream {name!r} exists already")
            self._check_folders(name)
            self._database.execute("INSERT OR IGNORE INTO folders (name) VALUES (?)", (key_of(name),))

    def remove_folder(self, name: str) -> None:
        """Forget a folder that `add_folder` made, if there is one. Raises NotEmpty where something is in it."""
        with self._database.transaction():
            if self._is_inhabited(name):
                raise NotEmpty(f"the folder {name!r} is not empty")
            self._database.execute("DELETE FROM folders WHERE name = ?", (key_of(name),))

    def remove(self, names: Iterable[str]) -> list[Entry]:
        """Forget the streams, all of them or none; gives what they were. Raises NotFound."""
        with self._database.transaction():
            entries = [self._named(name) for name in dict.fromkeys(names)]
            self._database.execute_many("DELETE FROM streams WHERE id = ?", [(entry.id,) for entry in entries])
        return entries

    def rename(self, old: str, new: str, replace: bool = False) -> list[Entry]:
        """Give the stream, or every stream of the folder, `old` its new name; ids stay. Gives the changed entries.
        With `replace`, a stream that has the name `new` is removed where `old` is a stream too, and an empty folder
        of that name gives way to a folder.
        Raises NotFound, AlreadyExists for a taken name, InvalidRequest for a name that cannot be or for a folder
        moved into itself."""
        check_name(new)
        with self._database.transaction():
            entry = self._find(old)
            if entry is not None:
                return self._rename_stream(entry, new, replace)
            return self._rename_folder(old, new, replace)

    def set_persist(self, stream_id: int, on: bool) -> Entry:
        """Raises NotFound."""
        with self._database.transaction():
            self._database.execute("UPDATE streams SET persist = ? WHERE id = ?", (on, stream_id))
            return self._numbered(stream_id)

    def remember(self, stream_id: int, facts: Facts, generation: int | None = None) -> Entry:
        """Keep what the source says of itself now. `generation` sets `facts_generation`; None counts it up by one
        if these facts are the first, or of another version (validator, or without one the size and time) than those
        remembered. Raises NotFound."""
        with self._database.transaction():
            entry = self._numbered(stream_id)
            if generation is None:
                generation = entry.facts_generation + (not _same_version(entry.facts, facts))
            self._database.execute(
                "UPDATE streams SET size = ?, mime = ?, validator = ?, modified = ?, ranged = ?, probed = ?,"
                " facts_generation = ? WHERE id = ?",
                (
                    facts.size,
                    facts.mime,
                    facts.validator,
                    facts.modified,
                    facts.ranged,
                    time.time(),
                    generation,
                    stream_id,
                ),
            )
            return self._numbered(stream_id)

    # ── within a transaction ─────────────────────────────────────────────────────────────────────────────────

    def _insert(self, spec: StreamSpec, now: float, replace: bool) -> Entry:
        taken = self._find(spec.name)
        if taken is not None:
            if not replace:
                raise AlreadyExists(f"a stream {spec.name!r} exists already: take another name, or add --replace")
            if taken.spec == spec:
                return taken
            self._database.execute("DELETE FROM streams WHERE id = ?", (taken.id,))
        return self._put(spec, now)

    def _put(self, spec: StreamSpec, now: float, facts: Facts | None = None, persist: bool = False) -> Entry:
        """A new row, under a name that no stream has."""
        self._check_place(spec.name)
        known = facts or Facts()
        probed = None if facts is None else now
        cursor = self._database.execute(
            "INSERT INTO streams (name, source, options, added, persist, size, mime, probed)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                key_of(spec.name),
                to_json(spec.source).decode(),
                to_json(spec.options).decode(),
                now,
                persist,
                known.size,
                known.mime,
                probed,
            ),
        )
        assert cursor.lastrowid is not None
        kept = None if facts is None else Facts(size=known.size, mime=known.mime)
        return Entry(id=cursor.lastrowid, spec=spec, added=now, persist=persist, facts=kept, probed=probed)

    def _register(self, item: Registration, spec: StreamSpec, now: float, taken: IfTaken) -> Registered | None:
        """None where the name is taken and must not be."""
        outcome: Literal["added", "replaced", "renamed"] = "added"
        wanted = spec.name
        found = self._find(wanted)
        if found is not None:
            if found.spec == spec or (taken == "rename" and found.spec.source == spec.source):
                return Registered("unchanged", wanted, found)
            if taken == "refuse":
                return None
            if taken == "skip":
                return Registered("skipped", wanted, found)
            if taken == "replace":
                self._database.execute("DELETE FROM streams WHERE id = ?", (found.id,))
                outcome = "replaced"
        if taken == "rename" and (found is not None or self._is_folder(wanted)):
            name = next(name for name in numbered(wanted) if not self._find(name) and not self._is_folder(name))
            spec = msgspec.structs.replace(spec, name=check_name(name))
            outcome = "renamed"
        return Registered(outcome, wanted, self._put(spec, now, item.facts, bool(item.persist)))

    def _rename_stream(self, entry: Entry, new: str, replace: bool) -> list[Entry]:
        if new == entry.name:
            return []
        taken = self._find(new)
        if taken is not None:
            if not replace:
                raise AlreadyExists(f"a stream {new!r} exists already")
            self._database.execute("DELETE FROM streams WHERE id = ?", (taken.id,))
        self._check_place(new)
        self._database.execute("UPDATE streams SET name = ? WHERE id = ?", (key_of(new), entry.id))
        return [self._numbered(entry.id)]

    def _rename_folder(self, old: str, new: str, replace: bool) -> list[Entry]:
        low, high = _below(old)
        inside = self._database.execute("SELECT id, name FROM streams WHERE name >= ? AND name < ?", (low, high))
        moved = [(stream_id, new + name_of(name)[len(old) :]) for stream_id, name in inside.fetchall()]
        made = self._made_folders(old)
        if not moved and not made:
            raise NotFound(f"no stream or folder {old!r}")
        if new == old:
            return []
        if new.startswith(old + "/"):
            raise InvalidRequest(f"the folder {old!r} cannot be moved into itself")
        if self._find(new) is not None:
            raise AlreadyExists(f"a stream {new!r} exists already")
        if replace and not self._is_inhabited(new):
            self._database.execute("DELETE FROM folders WHERE name = ?", (key_of(new),))
        self._check_place(new)
        self._database.execute_many("DELETE FROM folders WHERE name = ?", [(key_of(name),) for name in made])
        renamed = [new + name[len(old) :] for name in made]
        for name in (*renamed, *(name for _, name in moved)):
            check_name(name)
        self._database.execute_many("INSERT INTO folders (name) VALUES (?)", [(key_of(name),) for name in renamed])
        self._database.execute_many("UPDATE streams SET name = ? WHERE id = ?", [(key_of(n), i) for i, n in moved])
        return [self._numbered(stream_id) for stream_id, _ in moved]

    def _check_place(self, name: str) -> None:
        """A name is a stream's or a folder's, never both."""
        if self._is_folder(name):
            raise AlreadyExists(f"{name!r} is a folder")
        self._check_folders(name)

    def _is_folder(self, name: str) -> bool:
        made = self._database.execute("SELECT 1 FROM folders WHERE name = ?", (key_of(name),)).fetchone()
        return made is not None or self._is_inhabited(name)

    def _is_inhabited(self, folder: str) -> bool:
        """Whether a stream, or a folder that was made, is below `folder`."""
        within = _below(folder)
        return any(
            self._database.execute(f"SELECT 1 FROM {table} WHERE name >= ? AND name < ?", within).fetchone()
            for table in ("streams", "folders")
        )

    def _made_folders(self, folder: str) -> list[str]:
        """`folder` itself and those below it, as far as they were made."""
        rows = self._database.execute(
            "SELECT name FROM folders WHERE name = ? OR (name >= ? AND name < ?)", (key_of(folder), *_below(folder))
        )
        return [name_of(row[0]) for row in rows.fetchall()]

    def _check_folders(self, name: str) -> None:
        """The parts of a name before its last are not streams."""
        parts = name.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if self._database.execute("SELECT 1 FROM streams WHERE name = ?", (key_of(folder),)).fetchone():
                raise AlreadyExists(f"{folder!r} is a stream, so it cannot be the folder of {name!r}")

    def _find(self, name: str) -> Entry | None:
        row = self._database.execute(f"SELECT {COLUMNS} FROM streams WHERE name = ?", (key_of(name),)).fetchone()
        return None if row is None else self._entry(row)

    def _named(self, name: str) -> Entry:
        entry = self._find(name)
        if entry is None:
            raise NotFound(f"no stream {name!r}")
        return entry

    def _numbered(self, stream_id: int) -> Entry:
        row = self._database.execute(f"SELECT {COLUMNS} FROM streams WHERE id = ?", (stream_id,)).fetchone()
        if row is None:
            raise NotFound(f"no stream with the id {stream_id}")
        return self._entry(row)

    def _entry(self, row: Row) -> Entry:
        """Raises Damaged."""
        return entry_of(row, self.path)


def _below(folder: str) -> tuple[bytes, bytes]:
    """The names of everything in `folder`, as a half-open range of keys ("0" follows "/" in ASCII)."""
    key = key_of(folder)
    return key + b"/", key + b"0"


def _same_version(old: Facts | None, new: Facts) -> bool:
    if old is None or old.validator != new.validator:
        return False
    return new.validator is not None or (old.size, old.modified) == (new.size, new.modified)
