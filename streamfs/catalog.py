"""The registered streams, on SQLite.

One owner at a time: whoever opens a catalogue holds the lock of its home, and SQLite's own exclusive lock stands
behind that. A rollback journal with synchronous=FULL: a method that has returned has its change on disk, and one that
raises has changed nothing. Methods take well under a millisecond besides that fsync; they may be called from any
thread, one at a time.

Options rest here with their secrets (headers, URLs with passwords), so the file is 0600.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeAlias, cast

import msgspec

from streamfs.errors import (
    AlreadyExists,
    Busy,
    Damaged,
    InvalidRequest,
    NoSpace,
    NotEmpty,
    NotFound,
    NotPermitted,
    StreamfsError,
)
from streamfs.spec import (
    AnySource,
    Facts,
    IfTaken,
    Registration,
    StreamOptions,
    StreamSpec,
    UrlSource,
    check_name,
    check_spec,
    from_json,
    is_name,
    numbered,
    to_json,
)

FIRST_ID = 2  # ids become inodes, and 1 is the root of every FUSE mount
_APPLICATION_ID = 0x73666373  # "sfcs", in the file's header
_MIGRATIONS: tuple[tuple[str, ...], ...] = (  # entry N takes schema version N to N + 1; never edit a released one
    (
        """
        CREATE TABLE streams (
            id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again, whatever is removed
            name BLOB NOT NULL UNIQUE,             -- bytes, as in a directory, parts joined by '/'
            source TEXT NOT NULL,                  -- JSON
            options TEXT NOT NULL,                 -- JSON
            added REAL NOT NULL,                   -- seconds since the epoch
            persist INTEGER NOT NULL DEFAULT 0,
            size INTEGER,
            mime TEXT,
            validator TEXT,
            modified REAL,
            ranged INTEGER NOT NULL DEFAULT 0,
            probed REAL,                           -- when the five columns above were learnt, NULL: never
            facts_generation INTEGER NOT NULL DEFAULT 0
        )
        """,
        f"INSERT INTO sqlite_sequence (name, seq) VALUES ('streams', {FIRST_ID - 1})",
    ),
    # Folders that were made for themselves, and stay without streams; those of streams' names are nowhere written.
    ("CREATE TABLE folders (name BLOB PRIMARY KEY) WITHOUT ROWID",),
)
SCHEMA_VERSION = len(_MIGRATIONS)
_COLUMNS = (
    "id, name, source, options, added, persist, size, mime, validator, modified, ranged, probed, facts_generation"
)
_Row: TypeAlias = tuple[
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

    def __init__(self, rows: Iterable[_Row] = (), decode: Callable[[_Row], Entry] | None = None) -> None:
        self._held: dict[int, _Row | Entry] = {row[0]: row for row in rows}
        self._decode_row = decode

    def _decode(self, row: _Row) -> Entry:
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
                yield held.id, _key(held.name), held.added

    def look(self, stream_id: int) -> Entry | None:
        """As `get`, without keeping what is decoded for it."""
        held = self._held.get(stream_id)
        return self._decode(held) if isinstance(held, tuple) else held

    def to_be_kept(self) -> list[Entry]:
        """Those that are persisted."""
        return [self[stream_id] for stream_id, held in list(self._held.items()) if _is_kept(held)]


def _is_kept(held: _Row | Entry) -> bool:
    return bool(held[5]) if isinstance(held, tuple) else held.persist


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
        self._guard = threading.Lock()  # guards the connection: one transaction at a time
        _secure_file(path)
        with self._errors():
            # Transactions are begun and ended here, not by the module's own guesses.
            self._database = sqlite3.connect(path, timeout=0.0, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        """Close the file. Safe to call again; no other method may follow."""
        with self._guard:
            self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────

    def all(self) -> list[Entry]:
        """Every entry, in the order of the names' bytes. Raises Damaged if a row makes no sense."""
        with self._guard, self._errors():
            rows = self._database.execute(f"SELECT {_COLUMNS} FROM streams ORDER BY name").fetchall()
        return [self._entry(row) for row in rows]

    def names(self, prefix: str = "") -> list[str]:
        """The names that begin so, in the order of their bytes."""
        key = _key(prefix)
        with self._guard, self._errors():
            rows = self._database.execute(
                "SELECT name FROM streams WHERE name >= ? AND substr(name, 1, ?) = ? ORDER BY name",
                (key, len(key), key),
            ).fetchall()
        return [_name(row[0]) for row in rows]

    def entries(self) -> Entries:
        """All of them, in the order of the names' bytes, decoded when they are needed."""
        with self._guard, self._errors():
            rows = self._database.execute(f"SELECT {_COLUMNS} FROM streams ORDER BY name").fetchall()
        return Entries(rows, self._entry)

    def get(self, name: str) -> Entry:
        """The stream `name`. Raises NotFound."""
        with self._guard, self._errors():
            return self._named(name)

    def by_id(self, stream_id: int) -> Entry:
        """Raises NotFound."""
        with self._guard, self._errors():
            return self._numbered(stream_id)

    @property
    def count(self) -> int:
        with self._guard, self._errors():
            row = self._database.execute("SELECT count(*) FROM streams").fetchone()
        return int(row[0])

    def folders(self) -> list[str]:
        """The folders that were made for themselves, in the order of their names' bytes."""
        with self._guard, self._errors():
            rows = self._database.execute("SELECT name FROM folders ORDER BY name").fetchall()
        return [_name(row[0]) for row in rows]

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
        with self._transaction():
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
            with self._transaction():
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
        with self._transaction():
            if self._find(name) is not None:
                raise AlreadyExists(f"a stream {name!r} exists already")
            self._check_folders(name)
            self._database.execute("INSERT OR IGNORE INTO folders (name) VALUES (?)", (_key(name),))

    def remove_folder(self, name: str) -> None:
        """Forget a folder that `add_folder` made, if there is one. Raises NotEmpty where something is in it."""
        with self._transaction():
            if self._is_inhabited(name):
                raise NotEmpty(f"the folder {name!r} is not empty")
            self._database.execute("DELETE FROM folders WHERE name = ?", (_key(name),))

    def remove(self, names: Iterable[str]) -> list[Entry]:
        """Forget the streams, all of them or none; gives what they were. Raises NotFound."""
        with self._transaction():
            entries = [self._named(name) for name in dict.fromkeys(names)]
            self._database.executemany("DELETE FROM streams WHERE id = ?", [(entry.id,) for entry in entries])
        return entries

    def rename(self, old: str, new: str, replace: bool = False) -> list[Entry]:
        """Give the stream, or every stream of the folder, `old` its new name; ids stay. Gives the changed entries.
        With `replace`, a stream that has the name `new` is removed where `old` is a stream too, and an empty folder
        of that name gives way to a folder.
        Raises NotFound, AlreadyExists for a taken name, InvalidRequest for a name that cannot be or for a folder
        moved into itself."""
        check_name(new)
        with self._transaction():
            entry = self._find(old)
            if entry is not None:
                return self._rename_stream(entry, new, replace)
            return self._rename_folder(old, new, replace)

    def set_persist(self, stream_id: int, on: bool) -> Entry:
        """Raises NotFound."""
        with self._transaction():
            self._database.execute("UPDATE streams SET persist = ? WHERE id = ?", (on, stream_id))
            return self._numbered(stream_id)

    def remember(self, stream_id: int, facts: Facts, generation: int | None = None) -> Entry:
        """Keep what the source says of itself now. `generation` sets `facts_generation`; None counts it up by one
        if these facts are the first, or of another version (validator, or without one the size and time) than those
        remembered. Raises NotFound."""
        with self._transaction():
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
                raise AlreadyExists(f"a stream {spec.name!r} exists already: remove it first, or take another name")
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
                _key(spec.name),
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
        self._database.execute("UPDATE streams SET name = ? WHERE id = ?", (_key(new), entry.id))
        return [self._numbered(entry.id)]

    def _rename_folder(self, old: str, new: str, replace: bool) -> list[Entry]:
        low, high = _below(old)
        inside = self._database.execute("SELECT id, name FROM streams WHERE name >= ? AND name < ?", (low, high))
        moved = [(stream_id, new + _name(name)[len(old) :]) for stream_id, name in inside.fetchall()]
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
            self._database.execute("DELETE FROM folders WHERE name = ?", (_key(new),))
        self._check_place(new)
        self._database.executemany("DELETE FROM folders WHERE name = ?", [(_key(name),) for name in made])
        renamed = [new + name[len(old) :] for name in made]
        for name in (*renamed, *(name for _, name in moved)):
            check_name(name)
        self._database.executemany("INSERT INTO folders (name) VALUES (?)", [(_key(name),) for name in renamed])
        self._database.executemany("UPDATE streams SET name = ? WHERE id = ?", [(_key(n), i) for i, n in moved])
        return [self._numbered(stream_id) for stream_id, _ in moved]

    def _check_place(self, name: str) -> None:
        """A name is a stream's or a folder's, never both."""
        if self._is_folder(name):
            raise AlreadyExists(f"{name!r} is a folder")
        self._check_folders(name)

    def _is_folder(self, name: str) -> bool:
        made = self._database.execute("SELECT 1 FROM folders WHERE name = ?", (_key(name),)).fetchone()
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
            "SELECT name FROM folders WHERE name = ? OR (name >= ? AND name < ?)", (_key(folder), *_below(folder))
        )
        return [_name(row[0]) for row in rows.fetchall()]

    def _check_folders(self, name: str) -> None:
        """The parts of a name before its last are not streams."""
        parts = name.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if self._database.execute("SELECT 1 FROM streams WHERE name = ?", (_key(folder),)).fetchone():
                raise AlreadyExists(f"{folder!r} is a stream, so it cannot be the folder of {name!r}")

    def _find(self, name: str) -> Entry | None:
        row = self._database.execute(f"SELECT {_COLUMNS} FROM streams WHERE name = ?", (_key(name),)).fetchone()
        return None if row is None else self._entry(row)

    def _named(self, name: str) -> Entry:
        entry = self._find(name)
        if entry is None:
            raise NotFound(f"no stream {name!r}")
        return entry

    def _numbered(self, stream_id: int) -> Entry:
        row = self._database.execute(f"SELECT {_COLUMNS} FROM streams WHERE id = ?", (stream_id,)).fetchone()
        if row is None:
            raise NotFound(f"no stream with the id {stream_id}")
        return self._entry(row)

    def _entry(self, row: _Row) -> Entry:
        """Raises Damaged where the row is none that this module wrote."""
        stream_id, name, source, options, added, persist, size, mime, validator, modified, ranged, probed, count = row
        try:
            spec = StreamSpec(
                name=check_name(_name(name)),
                source=from_json(source, _SOURCE),
                options=_NO_OPTIONS if options == "{}" else from_json(options, StreamOptions),
            )
        except (InvalidRequest, TypeError, AttributeError) as error:
            raise Damaged(
                f"row {stream_id} of the catalogue {self.path} is damaged ({error}): "
                f"delete it with \"sqlite3 '{self.path}' 'DELETE FROM streams WHERE id = {stream_id}'\""
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

    # ── the file ─────────────────────────────────────────────────────────────────────────────────────────────

    def _prepare(self) -> None:
        with self._errors():
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.execute("PRAGMA journal_mode = DELETE").fetchone()
            # Takes the lock, plays back the journal of a writer that was killed, and reads the header.
            self._database.execute("BEGIN EXCLUSIVE")
            self._database.execute("COMMIT")
            version = self._number("user_version")
            tables = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if tables and self._number("application_id") != _APPLICATION_ID:
                raise Damaged(f"{self.path} is a database, but no catalogue of streamfs: move it away")
        if version > SCHEMA_VERSION:
            raise InvalidRequest(
                f"the catalogue {self.path} was written by a newer streamfs (schema {version}, this one knows "
                f"{SCHEMA_VERSION}): use that one, or move the file away to start with an empty catalogue"
            )
        if version < SCHEMA_VERSION:
            self._migrate(version)
        with self._errors():
            found = self._database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise self._damaged(found)

    def _migrate(self, version: int) -> None:
        with self._transaction():
            for statements in _MIGRATIONS[version:]:
                for statement in statements:
                    self._database.execute(statement)
            self._database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            self._database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _number(self, pragma: str) -> int:
        return int(self._database.execute(f"PRAGMA {pragma}").fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._guard, self._errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # SQLite itself rolls back on a full disk and its like
                    self._database.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's errors as ours, with what to do."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise self._translated(error) from error

    def _translated(self, error: sqlite3.DatabaseError) -> StreamfsError:
        code: Any = getattr(error, "sqlite_errorcode", None)
        match code and code & 0xFF:
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return Busy(f"another program has the catalogue {self.path} open")
            case sqlite3.SQLITE_FULL:
                return NoSpace(f"no space left for the catalogue {self.path}: nothing was changed")
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
                return NotPermitted(f"cannot write the catalogue {self.path} ({error}): check its rights")
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                return self._damaged(str(error))
        return StreamfsError(f"the catalogue {self.path} failed: {error}")

    def _damaged(self, why: str) -> Damaged:
        return Damaged(
            f"the catalogue {self.path} is damaged ({why}): save what can be saved with "
            f"\"sqlite3 '{self.path}' .recover\", or move the file away to start with an empty catalogue"
        )


_NO_OPTIONS = StreamOptions()
_SOURCE = cast(type[AnySource], AnySource)  # msgspec takes unions, typing calls them no types


def _secure_file(path: Path) -> None:
    """Make `path`, empty and 0600, or see to it that it is an own file that nobody else can read or write."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise NotPermitted(f"cannot open the catalogue {path}: {error.strerror}") from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
            raise NotPermitted(f"the catalogue {path} is not a regular file of yours")
        if stat.S_IMODE(info.st_mode) != 0o600:
            os.fchmod(fd, 0o600)
    finally:
        os.close(fd)


def _key(name: str) -> bytes:
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the name {name!r} cannot be encoded as a file name") from error


def _name(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def _below(folder: str) -> tuple[bytes, bytes]:
    """The names of everything in `folder`, as a half-open range of keys ("0" follows "/" in ASCII)."""
    key = _key(folder)
    return key + b"/", key + b"0"


def _same_version(old: Facts | None, new: Facts) -> bool:
    if old is None or old.validator != new.validator:
        return False
    return new.validator is not None or (old.size, old.modified) == (new.size, new.modified)
