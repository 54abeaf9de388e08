"""The file system without a mount: names, inodes, handles, attributes, and what a restart finds."""

from __future__ import annotations

import errno
import functools
from pathlib import Path

import pytest
import trio

from streamfs.catalog import Catalog
from streamfs.errors import (
    AlreadyExists,
    Closed,
    Damaged,
    InvalidRequest,
    IsDirectory,
    NameTooLong,
    NoAttribute,
    NotDirectory,
    NotFound,
    NotPermitted,
    SourceChanged,
    SourceFailed,
    SourceStalled,
    StreamfsError,
)
from streamfs.filesystem import FileSystem
from streamfs.spec import CommandSource, StreamSpec
from streamfs.tree import ROOT
from tests.fakes import flip_byte
from tests.sourcefakes import MIB, FakeSource, Origin, a_filesystem, spec_of, until


def inode_of(filesystem: FileSystem, name: str) -> int:
    at = ROOT
    for part in name.encode().split(b"/"):
        at = filesystem.lookup(at, part).inode
    return at


async def read(filesystem: FileSystem, name: str, size: int = 1 << 30) -> bytes:
    opened = await filesystem.open_named(name)
    found = bytearray()
    try:
        while len(found) < size and (piece := await filesystem.read(opened.handle, len(found), MIB)):
            found += piece
    finally:
        filesystem.release(opened.handle)
    return bytes(found[:size])


def origins(*names: str, **settings: object) -> dict[str, Origin]:
    return {name: Origin(name, **settings) for name in names}  # type: ignore[arg-type]


async def test_looking_at_names_attributes_and_listings_asks_no_source(tmp_path: Path) -> None:
    served = origins("a/x", "a/b/y", "z")
    async with a_filesystem(tmp_path, served) as fs:
        await fs.add([spec_of("a/x"), spec_of("a/b/y"), spec_of("z", size=77)])
        assert sorted(fs.names(ROOT)) == [b"a", b"z"]
        folder = fs.lookup(ROOT, b"a")
        assert folder.folder
        assert sorted(fs.names(folder.inode)) == [b"b", b"x"]
        assert fs.lookup(folder.inode, b"..").inode == ROOT
        assert fs.lookup(folder.inode, b".").inode == folder.inode
        assert fs.lookup(ROOT, b"z").size == 77
        assert fs.lookup(folder.inode, b"x").size == 0
        assert fs.usage().files == 3
        for name in fs.list_attributes(inode_of(fs, "z")):
            fs.get_attribute(inode_of(fs, "z"), name)
        assert [(o.opens, o.probes) for o in served.values()] == [([], 0)] * 3


async def test_each_kind_of_wrong_name_has_its_error(tmp_path: Path) -> None:
    async with a_filesystem(tmp_path, origins("a/x", "z")) as fs:
        await fs.add([spec_of("a/x"), spec_of("z")])
        folder, file = inode_of(fs, "a"), inode_of(fs, "z")
        with pytest.raises(NotFound):
            fs.lookup(ROOT, b"nothing")
        with pytest.raises(NotDirectory):
            fs.lookup(file, b"x")
        with pytest.raises(NameTooLong):
            fs.lookup(ROOT, b"n" * 256)
        with pytest.raises(IsDirectory):
            await fs.open(folder)
        with pytest.raises(IsDirectory):
            await fs.unlink(ROOT, b"a")
        with pytest.raises(NotFound):
            await fs.open(424242)
        with pytest.raises(NotFound):
            await fs.read(99, 0, 1)
        with pytest.raises(AlreadyExists):
            await fs.add([spec_of("z/under", size=1)])
        with pytest.raises(AlreadyExists):
            await fs.move(ROOT, b"z", folder, b"x", replace=False)
        with pytest.raises(IsDirectory):
            await fs.move(ROOT, b"z", ROOT, b"a", replace=True)
        with pytest.raises(NotDirectory):
            await fs.move(ROOT, b"a", ROOT, b"z", replace=True)
        assert fs.read_now(99, 0, 1) is None
        fs.release(99)


async def test_a_length_that_is_known_makes_the_open_cached_and_the_size_exact(tmp_path: Path) -> None:
    async with a_filesystem(tmp_path, origins("x", size=300_000)) as fs:
        await fs.add([spec_of("x")])
        opened = await fs.open(inode_of(fs, "x"))
        found = fs.attributes(inode_of(fs, "x"))
        assert (opened.direct, found.size) == (False, 300_000)
        assert found.timeout > 60
        fs.release(opened.handle)


async def test_an_unknown_length_shows_zero_and_is_direct_until_the_end_is_known(tmp_path: Path) -> None:
    served = origins("x", size=300_000, ranged=False, told=False)
    async with a_filesystem(tmp_path, served) as fs:
        await fs.add([spec_of("x", command=True)])
        inode = inode_of(fs, "x")
        opened = await fs.open(inode)
        found = fs.attributes(inode)
        assert (opened.direct, found.size, found.timeout) == (True, 0, 0.0)
        assert bytes(await fs.read(opened.handle, 0, 1 << 20)) == served["x"].content()
        assert fs.attributes(inode).size == 300_000
        again = await fs.open(inode)
        assert not again.direct
        fs.release(opened.handle)
        fs.release(again.handle)


async def test_a_new_version_is_a_new_inode_and_the_old_one_says_stale(tmp_path: Path) -> None:
    served = origins("x")
    async with a_filesystem(tmp_path, served) as fs:
        await fs.add([spec_of("x")])
        old = inode_of(fs, "x")
        fs.looked_up(old)
        first = await fs.open(old)
        await fs.read(first.handle, 0, 10)
        served["x"].change()
        served["x"].size = 2 * MIB
        fs._handles[first.handle][0].generation.validated = float("-inf")
        for _ in range(2):  # whoever comes with the old inode, however often
            with pytest.raises(SourceChanged):
                await fs.open(old)
        new = inode_of(fs, "x")
        assert new != old
        second = await fs.open(new)
        assert bytes(await fs.read(second.handle, MIB, 10)) == served["x"].content(2)[MIB : MIB + 10]
        assert fs.attributes(old).size == MIB
        assert fs.attributes(new).size == 2 * MIB
        with pytest.raises(SourceChanged):
            await fs.read(first.handle, 0, 10)
        fs.release(first.handle)
        fs.release(second.handle)
        fs.forget(old, 1)
        with pytest.raises(NotFound):
            fs.attributes(old)


async def test_a_remembered_size_that_is_wrong_is_never_shown_on_the_open_inode(tmp_path: Path) -> None:
    served = origins("x", size=1000)
    async with a_filesystem(tmp_path, served) as fs:
        await fs.add([spec_of("x")])
        await read(fs, "x")
        await until(lambda: fs.named("x").facts is not None)
    served["x"].change()
    served["x"].size = 2000
    async with a_filesystem(tmp_path, served) as fs:
        inode = inode_of(fs, "x")
        assert fs.attributes(inode).size == 1000
        with pytest.raises(SourceChanged):
            await fs.open(inode)
        assert await read(fs, "x") == served["x"].content(2)


async def test_a_removed_file_stays_readable_for_who_has_it_open_and_then_everything_of_it_goes(
    tmp_path: Path,
) -> None:
    served = origins("x", size=4 * MIB)
    async with a_filesystem(tmp_path, served) as fs:
        await fs.add([spec_of("x")])
        inode = inode_of(fs, "x")
        fs.looked_up(inode)
        opened = await fs.open(inode)
        await fs.unlink(ROOT, b"x")
        with pytest.raises(NotFound):
            fs.lookup(ROOT, b"x")
        assert bytes(await fs.read(opened.handle, 3 * MIB, 100)) == served["x"].content()[3 * MIB : 3 * MIB + 100]
        assert fs.attributes(inode).links == 0
        with pytest.raises(NotFound):
            await fs.open(inode)
        fs.release(opened.handle)
        await until(lambda: not fs._removed and served["x"].bodies == 0)


async def test_attributes_of_a_removed_file_touch_no_stream_that_took_its_name(tmp_path: Path) -> None:
    async with a_filesystem(tmp_path, origins("x")) as fs:
        await fs.add([spec_of("x")])
        inode = inode_of(fs, "x")
        fs.looked_up(inode)
        opened = await fs.open(inode)
        await fs.remove(["x"])
        await fs.add([spec_of("x")])
        with pytest.raises(NotFound):
            await fs.set_attribute(inode, "user.streamfs.persist", b"1")
        assert not fs.named("x").persist
        fs.release(opened.handle)


async def test_concurrent_replacements_leave_one_stream(tmp_path: Path) -> None:
    async with a_filesystem(tmp_path, origins("d/x")) as fs:
        await fs.add([spec_of("d/x", size=1)])

        async def replace(size: int) -> None:
            await fs.add([spec_of("d/x", size=size)], replace=True)

        async with trio.open_nursery() as nursery:
            for size in range(2, 8):
                nursery.start_soon(replace, size)
        assert [shown["name"] for shown in fs.streams()] == ["d/x"]
        shown = fs.lookup(inode_of(fs, "d"), b"x")
        assert shown.size == next(iter(fs.streams()))["size"]
    with Catalog(tmp_path / "catalog") as catalog:
        assert [entry.spec.options.size for entry in catalog.all()] == [shown.size]


async def test_a_rename_over_a_stream_replaces_it(tmp_path: Path) -> None:
    served = origins("x", "d/y")
    async with a_filesystem(tmp_path, served) as fs:
        await fs.add([spec_of("x"), spec_of("d/y")])
        folder, moved = inode_of(fs, "d"), inode_of(fs, "x")
        await fs.move(ROOT, b"x", folder, b"y", replace=True)
        assert fs.names(ROOT) == [b"d"]
        assert inode_of(fs, "d/y") == moved
        assert [shown["name"] for shown in fs.streams()] == ["d/y"]
        await fs.rename("d", "e/f")
        assert inode_of(fs, "e/f/y") == moved
        assert fs.names(ROOT) == [b"e"]


@pytest.mark.parametrize(
    "error", [SourceFailed("gone"), SourceStalled("silent"), NotPermitted("a private address")], ids=type
)
async def test_an_open_that_fails_says_why_and_leaves_nothing_open(error: StreamfsError, tmp_path: Path) -> None:
    served = origins("x")
    served["x"].refuses = error
    async with a_filesystem(tmp_path, served) as fs:
        await fs.add([spec_of("x")])
        with pytest.raises(type(error)) as raised:
            await fs.open(inode_of(fs, "x"))
        assert raised.value.errno == {SourceStalled: errno.ETIMEDOUT, NotPermitted: errno.EACCES}.get(
            type(error), errno.EIO
        )
        assert fs.open_files == 0
        assert fs.get_attribute(inode_of(fs, "x"), "user.streamfs.error") == str(error).encode()
        assert fs.get_attribute(inode_of(fs, "x"), "user.streamfs.state") == b"failed"


async def test_extended_attributes_say_what_the_stream_is(tmp_path: Path) -> None:
    served = origins("x", size=200_000)
    async with a_filesystem(tmp_path, served) as fs:
        await fs.add([spec_of("x", command=False)])
        inode = inode_of(fs, "x")

        def value(name: str) -> bytes:
            return fs.get_attribute(inode, name)

        assert value("user.streamfs.progress") == b"0/?"
        for absent in ("size", "error", "exit", "validator", "persisted_path", "generation", "unheard_of"):
            with pytest.raises(NoAttribute):
                value(f"user.streamfs.{absent}")
        opened = await fs.open(inode)
        await fs.read(opened.handle, 0, 200_000)
        expected = {
            "user.streamfs.persist": b"0",
            "user.persist": b"0",
            "user.streamfs.progress": b"200000/200000",
            "user.streamfs.size": b"200000",
            "user.streamfs.buffered": b"200000",
            "user.streamfs.readers": b"1",
            "user.streamfs.generation": b"1",
            "user.streamfs.validator": b"v1",
            "user.streamfs.state": b"complete",
            "user.mime_type": b"audio/flac",
            "user.xdg.origin.url": b"http://origin.test/x",
            "user.streamfs.source": b"http://origin.test/x",
        }
        assert {name: value(name) for name in expected} == expected
        assert set(expected) <= set(fs.list_attributes(inode))
        assert fs.list_attributes(ROOT) == []
        for name, bad, error in (
            ("user.persist", b"2", InvalidRequest),
            ("user.persist", b"", InvalidRequest),
            ("user.streamfs.size", b"1", NotPermitted),
            ("security.selinux", b"1", NotPermitted),
        ):
            with pytest.raises(error):
                await fs.set_attribute(inode, name, bad)
        with pytest.raises(NoAttribute):
            fs.get_attribute(ROOT, "user.streamfs.state")
        fs.release(opened.handle)


async def test_persist_by_attribute_goes_on_across_restarts_and_reads_without_the_origin(tmp_path: Path) -> None:
    served = origins("x", size=16 * MIB + 3)
    origin = served["x"]
    origin.stalls[9 * MIB] = trio.Event()
    async with a_filesystem(tmp_path, served, spill_threshold=MIB) as fs:
        await fs.add([spec_of("x")])
        await fs.set_attribute(inode_of(fs, "x"), "user.persist", b"1\n")
        await until(lambda: origin.sent >= 9 * MIB and 0 < fs._cache.pool.used <= 2 * MIB)  # the rest is on disk
    before, origin.refuses = origin.sent, SourceFailed("no route")
    origin.stalls.clear()
    async with a_filesystem(tmp_path, served, spill_threshold=MIB) as fs:
        await until(lambda: bool(origin.probes))
        assert fs.get_attribute(inode_of(fs, "x"), "user.persist") == b"1"
        assert await read(fs, "x", MIB) == origin.content()[:MIB]
    origin.refuses = None
    async with a_filesystem(tmp_path, served, spill_threshold=MIB) as fs:
        await until(lambda: next(iter(fs.streams()))["state"] == "complete")
        path = Path(fs.get_attribute(inode_of(fs, "x"), "user.streamfs.persisted_path").decode())
        assert path.read_bytes() == origin.content()  # noqa: ASYNC240
        assert origin.sent - before < 12 * MIB, "what was there was fetched again"
    origin.refuses = SourceFailed("no route")
    asked = len(origin.opens)
    async with a_filesystem(tmp_path, served) as fs:
        assert await read(fs, "x") == origin.content()
        with pytest.raises(NotPermitted):
            fs.evict("x")
        await fs.set_attribute(inode_of(fs, "x"), "user.persist", b"0")
        fs.evict("x")
        await fs.removed()
        assert not path.exists()  # noqa: ASYNC240
    assert len(origin.opens) == asked


async def test_after_evict_all_and_closes_nothing_rests(tmp_path: Path) -> None:
    served = origins("a", "b", "c", size=8 * MIB) | {"cmd": Origin("cmd", ranged=False, told=False)}
    async with a_filesystem(tmp_path, served, spill_threshold=MIB) as fs:
        await fs.add([spec_of(n) for n in "abc"] + [spec_of("cmd", command=True)])
        for name in served:
            await read(fs, name, 3 * MIB)
        fs.evict_all()
        await until(lambda: fs._cache.pool.used == 0 and not any(o.bodies for o in served.values()))
        await fs.removed()
        await until(lambda: not any((tmp_path / "cache").iterdir()))  # one may just have been in the making


async def test_a_defect_in_a_probe_ends_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = origins("bad", "good")
    served["bad"].refuses = ValueError("a defect")
    async with a_filesystem(tmp_path, served) as fs:
        await fs.add([spec_of("bad", probe=True, eager=True), spec_of("good")])
        await until(lambda: caplog.text.count("unforeseen") == 2)
        assert await read(fs, "good") == served["good"].content()


async def test_a_probe_teaches_the_size_before_anything_is_opened(tmp_path: Path) -> None:
    served = origins("x", size=4321)
    async with a_filesystem(tmp_path, served) as fs:
        await fs.add([spec_of("x", probe=True)])
        await until(lambda: fs.attributes(inode_of(fs, "x")).size == 4321)
        assert served["x"].opens == []


async def test_an_eager_command_starts_at_once(tmp_path: Path) -> None:
    served = origins("x", ranged=False, told=False)
    async with a_filesystem(tmp_path, served) as fs:
        await fs.add([spec_of("x", command=True, eager=True)])
        await until(lambda: served["x"].sent > 0)


async def test_at_the_end_every_wait_ends_and_nothing_opens_any_more(tmp_path: Path) -> None:
    served = origins("x", "y")
    served["x"].stalls[1000] = trio.Event()
    served["y"].open_gate = trio.Event()
    async with a_filesystem(tmp_path, served) as fs, trio.open_nursery() as nursery:
        await fs.add([spec_of("x"), spec_of("y")])
        ended = []

        async def reading(name: str) -> None:
            with pytest.raises(Closed):
                await read(fs, name)
            ended.append(name)

        nursery.start_soon(reading, "x")
        nursery.start_soon(reading, "y")
        await until(lambda: served["x"].sent == 1000 and bool(served["y"].opens))
        fs.fail_all()
        await until(lambda: sorted(ended) == ["x", "y"])
        with pytest.raises(Closed):
            await fs.open(inode_of(fs, "x"))


async def test_sources_are_closed_with_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeSource] = []
    init = FakeSource.__init__

    def remember(self: FakeSource, origin: Origin) -> None:
        init(self, origin)
        made.append(self)

    monkeypatch.setattr(FakeSource, "__init__", remember)
    async with a_filesystem(tmp_path, origins("x")) as fs:
        await fs.add([spec_of("x")])
        await read(fs, "x")
    assert [source.closed for source in made] == [True]


async def test_a_poll_ends_with_its_descriptor(tmp_path: Path) -> None:
    origin = Origin(ranged=False, told=False, stalls={0: trio.Event()})
    async with a_filesystem(tmp_path, {"s": origin}) as fs:
        await fs.add([spec_of("s", command=True)])
        opened, other = await fs.open_named("s"), await fs.open_named("s")
        told: list[int] = []
        for number in (opened.handle, other.handle):
            assert not fs.is_ready(number, functools.partial(told.append, number))
        buffer = fs._handles[opened.handle][0].generation.buffer
        await until(lambda: buffer.waiting == 2)
        fs.release(opened.handle)
        await until(lambda: buffer.waiting == 1)
        origin.stalls[0].set()
        await until(lambda: bool(told))
        assert told == [other.handle]
        fs.release(other.handle)


async def test_what_is_looked_up_after_an_evict_can_be_opened_as_it_is(tmp_path: Path) -> None:
    """cp and its like refuse a file whose inode is another one when they open it than when they looked at it."""
    served = origins("x", size=MIB)
    async with a_filesystem(tmp_path, served) as fs:
        await fs.add([spec_of("x")])
        assert len(await read(fs, "x")) == MIB
        await until(lambda: fs.named("x").facts is not None)  # the catalogue learns in the background
        fs.evict("x")
        seen = fs.lookup(1, b"x")
        assert fs.lookup(1, b"x") == seen
        assert seen.size == MIB
        opened = await fs.open(seen.inode)
        assert fs.lookup(1, b"x").inode == seen.inode
        fs.release(opened.handle)


async def test_a_kept_command_whose_file_was_damaged_keeps_the_rest_over_a_restart(tmp_path: Path) -> None:
    origin = Origin(size=MIB, ranged=False, told=False)
    origins = {"kept": origin}
    async with a_filesystem(tmp_path, origins) as fs:
        await fs.add([StreamSpec(name="kept", source=CommandSource(argv=("true",)))])
        inode = fs.lookup(ROOT, b"kept").inode
        await fs.set_attribute(inode, "user.persist", b"1")
        await until(lambda: fs.get_attribute(inode, "user.streamfs.state") == b"complete")
        path = Path(fs.get_attribute(inode, "user.streamfs.persisted_path").decode())
    flip_byte(path, 300_000)
    for _ in range(2):  # the first run finds the damage and notes it, the second is told
        async with a_filesystem(tmp_path, origins) as fs:
            opened = await fs.open_named("kept")
            assert bytes(await fs.read(opened.handle, 0, 200_000)) == origin.content()[:200_000]
            with pytest.raises(Damaged):
                await fs.read(opened.handle, 300_000, 10)
            assert bytes(await fs.read(opened.handle, 900_000, 1000)) == origin.content()[900_000:901_000]
            fs.release(opened.handle)
    assert len(origin.opens) == 1, "the command ran again"
