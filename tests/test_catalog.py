"""The catalogue: what is registered stays registered, whole and alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from streamfs.catalog import Catalog
from streamfs.database import FIRST_ID, SCHEMA_VERSION
from streamfs.entries import Entry
from streamfs.errors import (
    AlreadyExists,
    Busy,
    Damaged,
    InvalidRequest,
    NameTooLong,
    NotEmpty,
    NotFound,
    NotPermitted,
    StreamfsError,
)
from streamfs.sources.base import Facts
from streamfs.spec import CommandSource, Registration, ShellSource, StreamOptions, StreamSpec, UrlSource


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.db"


@pytest.fixture
def catalog(path: Path) -> Iterator[Catalog]:
    with Catalog(path) as catalog:
        yield catalog


def spec(name: str, url: str = "http://127.0.0.1/x", **options: Any) -> StreamSpec:
    return StreamSpec(name=name, source=UrlSource(url), options=StreamOptions(**options))


def names(catalog: Catalog) -> list[str]:
    return [entry.name for entry in catalog.all()]


def test_what_was_added_is_there_after_reopening(path: Path) -> None:
    specs = [
        spec("a", headers=(("Authorization", "Bearer s3cret"),), stall_timeout=None, window="30m"),
        StreamSpec(
            name="b/c", source=CommandSource(("seq", "1", "ü \udce9")), options=StreamOptions(cwd="/", env={"A": "b"})
        ),
        StreamSpec(name="d\udcff", source=ShellSource("seq 1 | tac")),
    ]
    with Catalog(path) as catalog:
        added = catalog.add_many(specs)
    with Catalog(path) as catalog:
        assert catalog.all() == added
        assert [entry.spec for entry in added] == specs
        assert catalog.get("d\udcff") == catalog.by_id(added[2].id) == added[2]
        assert catalog.count == 3
    assert all(abs(entry.added - time.time()) < 60 for entry in added)


def test_entries_come_in_the_order_of_the_names_bytes(catalog: Catalog) -> None:
    catalog.add_many(map(spec, ("z", "ä", "a/b", "a-", "Z")))
    assert names(catalog) == ["Z", "a-", "a/b", "z", "ä"]


def test_ids_start_past_the_root_inode_and_are_never_used_again(path: Path) -> None:
    with Catalog(path) as catalog:
        first = catalog.add(spec("a"))
        assert first.id == FIRST_ID > 1
        catalog.remove(["a"])
    with Catalog(path) as catalog:
        second = catalog.add(spec("a"))
        third = catalog.add(spec("a", "http://127.0.0.1/other"), replace=True)
        assert first.id < second.id < third.id
        assert catalog.count == 1


def test_replacing_a_stream_by_itself_changes_nothing(catalog: Catalog) -> None:
    before = catalog.set_persist(catalog.add(spec("a")).id, True)
    assert catalog.add(spec("a"), replace=True) == before
    assert catalog.add(spec("a", size=3), replace=True).persist is False


@pytest.mark.parametrize(("there", "new"), [("a", "a"), ("a", "a/b"), ("a", "a/b/c"), ("a/b", "a"), ("a/b/c", "a/b")])
def test_a_name_is_a_streams_or_a_folders_never_both(catalog: Catalog, there: str, new: str) -> None:
    catalog.add(spec(there))
    with pytest.raises(AlreadyExists):
        catalog.add(spec(new, "http://127.0.0.1/y"))
    if there != new:
        with pytest.raises(AlreadyExists):
            catalog.add(spec(new), replace=True)
    catalog.add_many(map(spec, ("a-", "a0", "aa", "b")))  # near in the order of bytes, but no clash
    assert there in names(catalog)


def test_many_are_added_all_or_none(catalog: Catalog) -> None:
    catalog.add(spec("taken"))
    for bad in (spec("taken", "http://127.0.0.1/y"), spec(""), spec("new1/x"), spec("a", "gopher://x")):
        with pytest.raises(StreamfsError):
            catalog.add_many([spec("new1"), spec("new2"), bad])
        assert names(catalog) == ["taken"]


@pytest.mark.parametrize("name", ["", "/", "/a", "a/", "a//b", ".", "a/..", "x\0y"])
def test_names_that_cannot_be_are_refused(catalog: Catalog, name: str) -> None:
    catalog.add(spec("ok"))
    with pytest.raises(InvalidRequest):
        catalog.add(spec(name))
    with pytest.raises(InvalidRequest):
        catalog.rename("ok", name)


def test_many_are_removed_all_or_none(catalog: Catalog) -> None:
    catalog.add_many(map(spec, ("a", "b", "c")))
    with pytest.raises(NotFound, match="'x'"):
        catalog.remove(["a", "x"])
    assert catalog.count == 3
    assert [entry.name for entry in catalog.remove(["c", "a", "c"])] == ["c", "a"]
    assert names(catalog) == ["b"]


def test_what_is_not_there_is_not_found(catalog: Catalog) -> None:
    catalog.add(spec("folder/a"))
    for call in (
        lambda: catalog.get("folder"),
        lambda: catalog.by_id(999),
        lambda: catalog.remove(["folder"]),
        lambda: catalog.rename("x", "y"),
        lambda: catalog.set_persist(999, True),
        lambda: catalog.remember(999, Facts()),
    ):
        with pytest.raises(NotFound):
            call()


def test_a_stream_is_renamed_and_keeps_its_id_and_facts(catalog: Catalog) -> None:
    entry = catalog.remember(catalog.add(spec("a")).id, Facts(size=5))
    assert [moved.name for moved in catalog.rename("a", "b/c")] == ["b/c"]
    moved = catalog.get("b/c")
    assert (moved.id, moved.facts) == (entry.id, Facts(size=5))
    assert catalog.rename("b/c", "b/c") == []


def test_a_folder_moves_with_all_that_is_in_it_and_nothing_else(catalog: Catalog) -> None:
    catalog.add_many(map(spec, ("a/x", "a/y/z", "a-/x", "a0", "ab/x")))
    catalog.rename("a", "new/place")
    assert names(catalog) == ["a-/x", "a0", "ab/x", "new/place/x", "new/place/y/z"]


def test_renames_that_clash_are_refused_and_change_nothing(catalog: Catalog) -> None:
    catalog.add_many(map(spec, ("a", "b", "f/x", "g/x", "f/long/" + "n" * 255)))
    before = catalog.all()
    for old, new, error in (
        ("a", "b", AlreadyExists),
        ("a", "f", AlreadyExists),
        ("a", "b/c", AlreadyExists),
        ("a", "a/c", AlreadyExists),
        ("f", "g", AlreadyExists),
        ("f", "a", AlreadyExists),
        ("f", "a/f", AlreadyExists),
        ("f", "f/g", InvalidRequest),
        ("f", "/".join(["d" * 255] * 15), NameTooLong),
    ):
        with pytest.raises(error):
            catalog.rename(old, new)
        assert catalog.all() == before


def test_a_rename_may_replace_a_stream_but_no_folder(catalog: Catalog) -> None:
    catalog.add_many(map(spec, ("a", "b", "f/x")))
    kept = catalog.get("a").id
    catalog.rename("a", "b", replace=True)
    assert [(entry.name, entry.id) for entry in catalog.all()] == [("b", kept), ("f/x", kept + 2)]
    with pytest.raises(AlreadyExists):
        catalog.rename("b", "f", replace=True)
    with pytest.raises(AlreadyExists):
        catalog.rename("f", "b", replace=True)


def test_facts_are_remembered_and_versions_counted(path: Path) -> None:
    full = Facts(size=5, ranged=True, validator='"x"', mime="audio/flac", modified=12.5)
    with Catalog(path) as catalog:
        entry = catalog.add(spec("a"))
        assert (entry.facts, entry.probed, entry.facts_generation) == (None, None, 0)
        assert catalog.remember(entry.id, full).facts_generation == 1
        assert catalog.remember(entry.id, full).facts_generation == 1
        assert catalog.remember(entry.id, Facts(size=5, validator='"y"')).facts_generation == 2
        assert catalog.remember(entry.id, Facts(size=5)).facts_generation == 3
        assert catalog.remember(entry.id, Facts(size=6)).facts_generation == 4
        assert catalog.remember(entry.id, full, generation=9).facts_generation == 9
    with Catalog(path) as catalog:
        entry = catalog.get("a")
        assert entry.facts == full
        assert entry.probed is not None and abs(entry.probed - time.time()) < 60
        assert entry.facts_generation == 9


def test_persist_is_remembered(path: Path) -> None:
    with Catalog(path) as catalog:
        entry = catalog.add(spec("a"))
        assert catalog.set_persist(entry.id, True).persist
    with Catalog(path) as catalog:
        assert catalog.get("a").persist
        assert not catalog.set_persist(entry.id, False).persist


def test_the_file_and_its_journal_are_private_under_any_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        with Catalog(path) as catalog:
            catalog.add(spec("a"))
            catalog._database.execute("BEGIN IMMEDIATE")
            catalog._database.execute("DELETE FROM streams")
            files = [path, *path.parent.glob("catalog.db-*")]
            modes = [stat.S_IMODE(file.stat().st_mode) for file in files]
            catalog._database.execute("ROLLBACK")
    finally:
        os.umask(before)
    assert modes == [0o600, 0o600]
    path.chmod(0o644)
    Catalog(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_durability_is_asked_of_sqlite(catalog: Catalog) -> None:
    catalog.add(spec("a"))
    assert catalog._database.number("synchronous") == 2  # FULL
    assert catalog._database.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_links_and_foreign_files_are_refused(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "target")
    with pytest.raises(NotPermitted):
        Catalog(path)
    assert not (tmp_path / "target").exists()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(NotPermitted):
        Catalog(path)
    if os.geteuid() == 0:
        path.unlink()
        path.touch()
        os.chown(path, 65534, -1)
        with pytest.raises(NotPermitted):
            Catalog(path)


def test_there_is_one_owner(catalog: Catalog, path: Path) -> None:
    with pytest.raises(Busy, match="has the catalogue"):
        Catalog(path)


def test_a_newer_schema_is_refused_with_the_way_out_and_left_alone(path: Path) -> None:
    Catalog(path).close()
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(InvalidRequest, match=r"newer streamfs.*move the file away"):
        Catalog(path)
    assert path.read_bytes() == before


def test_another_programs_database_is_refused(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.execute("CREATE TABLE precious (x)")
    before = path.read_bytes()
    with pytest.raises(Damaged, match="no catalogue of streamfs"):
        Catalog(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_with_the_way_out(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to be read as one" * 100)
    with pytest.raises(Damaged, match=r"\.recover.*move the file away"):
        Catalog(path)


@pytest.mark.parametrize("at", [0.15, 0.35, 0.5, 0.75, 0.95])
def test_a_torn_catalogue_is_refused_or_gives_only_what_was_added(path: Path, at: float) -> None:
    with Catalog(path) as catalog:
        added = {entry.name: entry for entry in catalog.add_many(spec(f"s{i}") for i in range(2000))}
    data = bytearray(path.read_bytes())
    page = int(at * len(data)) // 4096 * 4096
    data[page : page + 4096] = os.urandom(4096)
    path.write_bytes(data)
    with pytest.raises(Damaged, match="damaged"), Catalog(path) as catalog:
        assert all(added[entry.name] == entry for entry in catalog.all())


def test_a_catalogue_with_a_damaged_page_is_refused_when_it_is_opened_not_when_it_is_needed(path: Path) -> None:
    with Catalog(path) as catalog:
        catalog.add_many(spec(f"s{i}") for i in range(2000))
    data = bytearray(path.read_bytes())
    page = len(data) // 2 // 4096 * 4096
    data[page : page + 4096] = os.urandom(4096)
    path.write_bytes(data)
    with pytest.raises(Damaged, match="move the file away"):
        Catalog(path)


@pytest.mark.parametrize(
    "change",
    [
        "name = CAST('../evil' AS BLOB)",
        "name = 'text'",
        "source = '{}'",
        'source = \'{"type":"url"\'',
        "source = 7",
        "options = '{\"unheard\": 1}'",
    ],
)
def test_a_row_that_makes_no_sense_is_refused_with_the_way_out(path: Path, change: str) -> None:
    with Catalog(path) as catalog:
        entry = catalog.add(spec("a"))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute(f"UPDATE streams SET {change}")
    with Catalog(path) as catalog, pytest.raises(Damaged, match=f"DELETE FROM streams WHERE id = {entry.id}"):
        catalog.all()


def test_an_empty_file_is_a_new_catalogue(path: Path) -> None:
    path.touch()
    with Catalog(path) as catalog:
        assert catalog.all() == []


def test_a_full_disk_changes_nothing(path: Path) -> None:
    with Catalog(path) as catalog:
        catalog.add(spec("a"))
        catalog._database.execute(f"PRAGMA max_page_count = {catalog._database.number('page_count')}")
        with pytest.raises(StreamfsError, match="no space left"):
            catalog.add_many(spec(f"x{i}") for i in range(1000))
        assert names(catalog) == ["a"]
        catalog.remove(["a"])  # goes on


def _add_for_ever(path: Path, told: int) -> None:
    with Catalog(path) as catalog:
        for number in range(1_000_000):
            catalog.add_many(spec(f"s{number}/{part}") for part in "abc")
            os.write(told, b".")


def test_every_change_that_was_reported_survives_a_kill_and_none_is_half_there(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for round_ in range(5):
        path.unlink(missing_ok=True)
        read, write = os.pipe()
        child = context.Process(target=_add_for_ever, args=(path, write))
        child.start()
        os.close(write)
        told = 0
        while told < 20 + round_:
            told += len(os.read(read, 1))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(10)
        while chunk := os.read(read, 4096):
            told += len(chunk)
        os.close(read)
        with Catalog(path) as catalog:
            numbers = [int(entry.name[1:].split("/")[0]) for entry in catalog.all()]
        assert len(numbers) == 3 * len(set(numbers))
        assert len(set(numbers)) in (told, told + 1)


def test_ten_thousand_are_added_and_a_hundred_thousand_loaded_in_time(path: Path) -> None:
    with Catalog(path) as catalog:
        start = time.perf_counter()
        catalog.add_many(spec(f"f{i // 1000}/s{i}") for i in range(10_000))
        assert time.perf_counter() - start < 5
        catalog.add_many(spec(f"g{i // 1000}/s{i}", headers=(("A", "b"),)) for i in range(90_000))
    start = time.perf_counter()
    with Catalog(path) as catalog:
        assert len(catalog.all()) == 100_000
    assert time.perf_counter() - start < 3  # some 0.5 s on an idle machine


PARTS = st.sampled_from(["a", "b", "a-", "a0"])
NAMES = st.lists(PARTS, min_size=1, max_size=3).map("/".join)


# ── folders that were made, and lists ────────────────────────────────────────────────────────────────────────────


def test_a_folder_that_was_made_has_its_name_alone(catalog: Catalog) -> None:
    catalog.add_folder("a/b")
    catalog.add_folder("a/b")
    for name in ("a", "a/b"):
        with pytest.raises(AlreadyExists):
            catalog.add(spec(name))
    catalog.add(spec("a/b/c"))
    for name in ("a/b/c", "a/b/c/d"):
        with pytest.raises(AlreadyExists):
            catalog.add_folder(name)
    with pytest.raises(NotEmpty):
        catalog.remove_folder("a/b")
    catalog.remove(["a/b/c"])
    with pytest.raises(NotEmpty):
        catalog.remove_folder("a")
    catalog.remove_folder("a/b")
    assert catalog.folders() == []


def test_folders_that_were_made_move_with_the_one_they_are_in(catalog: Catalog) -> None:
    for name in ("a", "a/b", "target"):
        catalog.add_folder(name)
    with pytest.raises(AlreadyExists):
        catalog.rename("a", "target")
    assert catalog.rename("a", "target", replace=True) == []
    assert catalog.folders() == ["target", "target/b"]
    with pytest.raises(InvalidRequest):
        catalog.rename("target", "target/b/c")


def item(name: str, url: str = "http://h.example/", **settings: object) -> Registration:
    return Registration(spec=StreamSpec(name=name, source=UrlSource(url)), **settings)  # type: ignore[arg-type]


def test_a_list_is_registered_whole_or_not_at_all(catalog: Catalog) -> None:
    catalog.add(item("b", "http://other.example/").spec)
    with pytest.raises(AlreadyExists, match="'b'"):
        catalog.register([item("a"), item("b")], "refuse")
    with pytest.raises(AlreadyExists, match="is a stream"):
        catalog.register([item("a"), item("b/c")], "rename")
    with pytest.raises(InvalidRequest):
        catalog.register([item("a"), item("..")], "refuse")
    assert [entry.name for entry in catalog.all()] == ["b"]


@pytest.mark.parametrize(
    ("taken", "outcomes", "names"),
    [
        ("skip", ["added", "skipped", "unchanged"], {"a": "1", "b.mp3": "old", "c": "same"}),
        ("replace", ["added", "replaced", "unchanged"], {"a": "1", "b.mp3": "2", "c": "same"}),
        ("rename", ["added", "renamed", "unchanged"], {"a": "1", "b.mp3": "old", "b (2).mp3": "2", "c": "same"}),
    ],
)
def test_names_that_are_taken(catalog: Catalog, taken: Any, outcomes: list[str], names: dict[str, str]) -> None:
    url = "http://h.example/{}".format
    catalog.add_many([item("b.mp3", url("old")).spec, item("c", url("same")).spec])
    items = [item("a", url("1")), item("b.mp3", url("2")), item("c", url("same"))]
    tried = catalog.register(items, taken, dry_run=True)
    assert len(catalog.all()) == 2, "trying changes nothing"
    done = catalog.register(items, taken)
    assert [one.outcome for one in done] == [one.outcome for one in tried] == outcomes
    assert {e.name: e.spec.source.url.rpartition("/")[2] for e in catalog.all()} == names  # type: ignore[union-attr]
    again = catalog.register(items, taken)
    assert {one.outcome for one in again} <= {"unchanged", "skipped", "renamed"}


def test_what_a_list_says_of_its_bytes_is_remembered(catalog: Catalog) -> None:
    catalog.register([item("a", facts=Facts(size=7, mime="audio/mpeg"), persist=True), item("b")], "refuse")
    a, b = catalog.all()
    assert (a.facts, a.persist) == (Facts(size=7, mime="audio/mpeg"), True)
    assert a.probed is not None
    assert (b.facts, b.persist, b.probed) == (None, False, None)


def test_a_catalogue_of_the_first_schema_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with Catalog(path) as old:
        old.add(spec("a"))
    with sqlite3.connect(path) as raw:
        raw.execute("DROP TABLE folders")
        raw.execute("PRAGMA user_version = 1")
    raw.close()
    with Catalog(path) as new:
        new.add_folder("f")
        assert [entry.name for entry in new.all()] == ["a"]


class AgainstADict(RuleBasedStateMachine):
    """The catalogue does what a dict of names does, under the rule that no name is a prefix folder of another."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.catalog = Catalog(Path(self.folder.name) / "catalog.db")
        self.model: dict[str, int] = {}

    def teardown(self) -> None:
        self.catalog.close()
        self.folder.cleanup()

    def clashes(self, name: str, among: set[str]) -> bool:
        return any(other == name or other.startswith(name + "/") or name.startswith(other + "/") for other in among)

    @rule(name=NAMES)
    def add(self, name: str) -> None:
        if self.clashes(name, set(self.model)):
            with pytest.raises(AlreadyExists):
                self.catalog.add(spec(name))
        else:
            self.model[name] = self.catalog.add(spec(name)).id

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name in self.model:
            self.catalog.remove([name])
            del self.model[name]
        else:
            with pytest.raises(NotFound):
                self.catalog.remove([name])

    @rule(old=NAMES, new=NAMES)
    def rename(self, old: str, new: str) -> None:
        moved = [name for name in self.model if name == old or name.startswith(old + "/")]
        rest = set(self.model) - set(moved)
        into_itself = new.startswith(old + "/")
        out_of_itself = old.startswith(new + "/")  # `new` is the folder that `old` is in
        bad = not moved or into_itself or out_of_itself or (new != old and self.clashes(new, rest))
        if bad:
            with pytest.raises((NotFound, AlreadyExists, InvalidRequest)):
                self.catalog.rename(old, new)
        else:
            self.catalog.rename(old, new)
            ids = {new + name[len(old) :]: self.model.pop(name) for name in moved}
            self.model |= ids

    @invariant()
    def agrees(self) -> None:
        entries: list[Entry] = self.catalog.all()
        assert {entry.name: entry.id for entry in entries} == self.model


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_entries_are_decoded_when_they_are_needed_and_a_damaged_row_harms_no_other(path: Path) -> None:
    with Catalog(path) as catalog:
        good, bad, kept = catalog.add_many([spec("good"), spec("bad"), spec("kept")])
        catalog.set_persist(kept.id, True)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE streams SET source = '[' WHERE id = ?", (bad.id,))
    with Catalog(path) as catalog:
        entries = catalog.entries()
    assert [name for _, name, _ in entries.names()] == [b"bad", b"good", b"kept"]
    assert entries[good.id] == entries.get(good.id) == entries.look(good.id) == good
    assert [entry.id for entry in entries.to_be_kept()] == [kept.id]
    assert [entry.id for entry in entries.values()] == [good.id, kept.id]
    with pytest.raises(Damaged, match="DELETE FROM streams"):
        entries.get(bad.id)
    assert bad.id in entries
    entries.discard(bad.id)
    assert list(entries) == [good.id, kept.id]
    assert entries.get(bad.id) is None


@pytest.mark.parametrize("name", ["text", b"../x", b"a//b", b"", b"a\0", b"x" * 256])
def test_a_name_that_no_stream_can_have_is_refused_when_it_is_loaded(name: bytes | str, path: Path) -> None:
    with Catalog(path) as catalog:
        catalog.add(spec("it"))
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE streams SET name = ?", (name,))
    with Catalog(path) as catalog, pytest.raises(Damaged, match="DELETE FROM streams"):
        list(catalog.entries().names())
