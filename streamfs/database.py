"""The catalogue's file: an SQLite database, its schema, and what SQLite's errors mean.

One owner at a time: whoever opens a catalogue holds the lock of its home, and SQLite's own exclusive lock stands
behind that. A rollback journal with synchronous=FULL: a transaction that has ended is on disk. The file is 0600.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from streamfs.errors import Busy, Damaged, InvalidRequest, NoSpace, NotPermitted, StreamfsError

FIRST_ID = 2  # ids become inodes, and 1 is the root of every FUSE mount
APPLICATION_ID = 0x73666373  # "sfcs", in the file's header
MIGRATIONS: tuple[tuple[str, ...], ...] = (  # entry N takes schema version N to N + 1; never edit a released one
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
SCHEMA_VERSION = len(MIGRATIONS)


class Database:
    """The database in the file `path`, made if it is missing. From any thread, one at a time: each use of `execute`
    stands in a `with reading()` or `with transaction()`."""

    def __init__(self, path: Path) -> None:
        """Raises Damaged for a file that is no catalogue or is corrupt, InvalidRequest for one that a newer streamfs
        wrote, Busy where another process has it open, NotPermitted where it is not ours."""
        self.path = path
        self._guard = threading.Lock()  # guards the connection: one transaction at a time
        _secure_file(path)
        with self._errors():
            # Transactions are begun and ended here, not by the module's own guesses.
            self._connection = sqlite3.connect(path, timeout=0.0, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the file. Safe to call again; nothing else may follow."""
        with self._guard:
            self._connection.close()

    def execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        return self._connection.execute(statement, values)

    def execute_many(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        self._connection.executemany(statement, rows)

    def _prepare(self) -> None:
        with self._errors():
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("PRAGMA journal_mode = DELETE").fetchone()
            # Takes the lock, plays back the journal of a writer that was killed, and reads the header.
            self._connection.execute("BEGIN EXCLUSIVE")
            self._connection.execute("COMMIT")
            version = self.number("user_version")
            tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if tables and self.number("application_id") != APPLICATION_ID:
                raise Damaged(f"{self.path} is a database, but no catalogue of streamfs: move it away")
        if version > SCHEMA_VERSION:
            raise InvalidRequest(
                f"the catalogue {self.path} was written by a newer streamfs (schema {version}, this one knows "
                f"{SCHEMA_VERSION}): use that one, or move the file away to start with an empty catalogue"
            )
        if version < SCHEMA_VERSION:
            self._migrate(version)
        with self._errors():
            found = self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise self._damaged(found)

    def _migrate(self, version: int) -> None:
        with self.transaction():
            for statements in MIGRATIONS[version:]:
                for statement in statements:
                    self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def number(self, pragma: str) -> int:
        """What a pragma says."""
        return int(self._connection.execute(f"PRAGMA {pragma}").fetchone()[0])

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Nobody else uses the connection within; SQLite's errors come as ours."""
        with self._guard, self._errors():
            yield

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """As `reading`; what was changed is on disk afterwards, or, where something is raised, nothing was changed."""
        with self._guard, self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite itself rolls back on a full disk and its like
                    self._connection.execute("ROLLBACK")
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
