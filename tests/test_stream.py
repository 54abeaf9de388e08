"""A registered stream: which version an open gets, what evicting, removing and persisting do to it."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from streamfs.engine.recording import Header, Recording
from streamfs.entries import Entry
from streamfs.errors import (
    Closed,
    NotFound,
    NotPermitted,
    OutsideWindow,
    SourceChanged,
    SourceFailed,
    SourceStalled,
    StreamfsError,
)
from streamfs.stream import REVALIDATE, Stream
from tests.fakes import refuse_writes
from tests.sourcefakes import KIB, MIB, FakeSource, House, Origin, a_house, settled, until
from tests.test_generation import check, read_all


def entry_of(stream: Stream, *, persist: bool) -> Entry:
    entry = stream.entry
    return Entry(id=entry.id, spec=entry.spec, added=entry.added, persist=persist, facts=entry.facts)


def persist(house: House, stream: Stream, on: bool = True) -> None:
    (house.kept.add if on else house.kept.discard)(stream.entry.id)
    stream.set_entry(entry_of(stream, persist=on))


# Versions


async def test_a_new_version_dooms_old_handles_and_new_opens_see_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin()
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        old = await stream.open()
        await check(old, origin, 0, MIB)
        old.generation.validated = float("-inf")
        origin.change()
        new = await stream.open()
        await check(new, origin, 0, MIB, version=2)
        for _ in range(2):
            assert old.read_now(0, 10) is None
            with pytest.raises(SourceChanged):
                await old.read(0, 10)
        old.close()
        new.close()


async def test_a_version_that_changes_under_a_fetch_dooms_its_handles(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=8 * MIB)
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        handle = await stream.open()
        await check(handle, origin, 0, 10)
        origin.change()
        with pytest.raises(SourceChanged):
            await handle.read(5 * MIB, 10)
        with pytest.raises(SourceChanged):
            await handle.read(0, 10)
        assert stream.generation is None
        assert await read_all(stream) == origin.content(2)
        handle.close()


@pytest.mark.parametrize("seed", range(12))
async def test_no_schedule_mixes_versions_or_misplaces_bytes(
    seed: int, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    dice = random.Random(seed)
    origin = Origin(
        size=2 * MIB + 321, ranged=seed % 3 != 0, told=dice.random() < 0.7, piece=dice.choice([3000, 65536])
    )
    async with a_house(tmp_path, read_ahead=dice.choice([128 * KIB, MIB])) as house:
        stream = house.stream(origin)
        seen: set[int] = set()

        async def reader(number: int) -> None:
            mine = random.Random(seed * 1000 + number)
            for _ in range(12):
                await trio.sleep(mine.random())
                before = origin.version
                try:
                    handle = await stream.open()
                except StreamfsError:
                    continue
                version = int(str(handle.generation.facts.validator)[1:])
                assert before <= version <= origin.version
                seen.add(version)
                content = origin.content(version)
                try:
                    for _ in range(mine.randrange(8)):
                        offset, size = mine.randrange(origin.size + 1000), mine.choice([1, 4096, 131072, MIB])
                        assert bytes(await handle.read(offset, size)) == content[offset : offset + size]
                        if mine.random() < 0.3:
                            await trio.sleep(mine.random() * 2)
                except (SourceChanged, SourceFailed, Closed):
                    pass
                finally:
                    handle.close()

        async def upheaval() -> None:
            while True:
                await trio.sleep(dice.random() * 2)
                match dice.randrange(4):
                    case 0:
                        origin.change()
                        if stream.generation is not None:
                            stream.generation.validated = float("-inf")
                    case 1:
                        stream.evict()
                    case 2:
                        origin.failures = {dice.randrange(origin.size): SourceFailed("the line broke")}
                    case 3:
                        origin.failures = {}

        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(upheaval)
                async with trio.open_nursery() as readers:
                    for number in range(10):
                        readers.start_soon(reader, number)
                nursery.cancel_scope.cancel()
        assert len(seen) > 1
        stream.evict()
        await settled()
        assert house.cache.pool.used == 0
        assert origin.bodies == 0


async def test_many_opens_wait_only_once_for_an_origin_that_hangs_while_bytes_are_cached(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin()
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        await read_all(stream)
        origin.probe_gate = trio.Event()

        async def read() -> None:
            assert await read_all(stream) == origin.content()

        before = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(read)
        assert trio.current_time() - before == pytest.approx(REVALIDATE, abs=0.1)


async def test_cached_bytes_serve_while_the_origin_is_gone(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin()
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        await read_all(stream)
        origin.refuses = SourceFailed("no route")
        assert await read_all(stream) == origin.content()


async def test_a_forbidden_origin_serves_nothing(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    origin = Origin()
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        await read_all(stream)
        origin.refuses = NotPermitted("a private address")
        with pytest.raises(NotPermitted):
            await stream.open()
        assert stream.problem is not None


async def test_a_rest_without_a_version_is_not_continued_and_its_readers_keep_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(ranged=False, named=False, failures={100_000: SourceFailed("the line broke")})
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        old = await stream.open()
        with pytest.raises(SourceFailed):
            await old.read(100_000, 1)
        origin.failures.clear()
        origin.change()
        old.generation.validated = float("-inf")
        await settled()
        new = await stream.open()
        assert new.generation is not old.generation
        await check(new, origin, 0, 200_000, version=2)
        await check(old, origin, 0, 100_000, version=1)
        assert len(stream.open_handles) == 2
        stream.interrupt(Closed("the end"))
        for handle in (old, new):
            with pytest.raises(Closed):
                await handle.read(0, 1)
            handle.close()


# Opens that wait


async def test_an_open_gets_no_handle_on_bytes_that_were_evicted_while_it_asked(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin()
    async with a_house(tmp_path) as house, trio.open_nursery() as nursery:
        stream = house.stream(origin)
        await read_all(stream)
        origin.probe_gate = trio.Event()

        async def read() -> None:
            assert await read_all(stream) == origin.content()

        nursery.start_soon(read)
        await settled()
        assert origin.probes == 1
        stream.evict()
        origin.probe_gate.set()
        await settled()
    assert origin.sent == 2 * origin.size


@pytest.mark.parametrize("cached", [False, True])
async def test_an_open_of_a_stream_that_is_removed_meanwhile_fails_at_once(
    cached: bool, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin()
    async with a_house(tmp_path) as house, trio.open_nursery() as nursery:
        stream = house.stream(origin)
        if cached:
            await read_all(stream)
        origin.open_gate = origin.probe_gate = trio.Event()
        failed = trio.Event()

        async def read() -> None:
            with pytest.raises(NotFound):
                await stream.open()
            failed.set()

        nursery.start_soon(read)
        await settled()
        stream.remove()
        await settled()
        assert failed.is_set()
        await stream.unread()
        assert stream.generation is None
        with pytest.raises(NotFound):
            await stream.open()


async def test_a_cancelled_open_leaves_nothing_and_the_next_one_works(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(open_gate=trio.Event())
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        with trio.move_on_after(1):
            await stream.open()
        assert (origin.bodies, stream.readers) == (0, 0)
        origin.open_gate = None
        assert await read_all(stream) == origin.content()


async def test_a_cancelled_read_leaves_the_stream_to_others(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    stall = trio.Event()
    origin = Origin(stalls={100_000: stall})
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        handle = await stream.open()
        with trio.move_on_after(1) as scope:
            await handle.read(90_000, 20_000)
        assert scope.cancelled_caught
        assert handle.generation.buffer.waiting == 0
        stall.set()
        await check(handle, origin, 90_000, 20_000)
        handle.close()


@pytest.mark.parametrize("command", [False, True])
async def test_the_size_policy_wait_gives_a_handle_that_knows_its_length(
    command: bool, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=3 * MIB, ranged=False, told=False)
    async with a_house(tmp_path) as house:
        handle = await house.stream(origin, command=command, size_policy="wait").open()
        assert handle.size == origin.size
        handle.close()


async def test_the_size_policy_wait_ends_where_nothing_arrives(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(ranged=False, told=False, stalls={1000: trio.Event()})
    async with a_house(tmp_path) as house:
        stream = house.stream(origin, size_policy="wait", stall_timeout=5.0)
        with pytest.raises(SourceStalled):
            await stream.open()
        assert trio.current_time() == pytest.approx(5.0, abs=0.1)
        assert stream.readers == 0


# Evict and remove


@pytest.mark.parametrize("what", ["evict", "remove"])
async def test_who_has_it_open_keeps_the_version_when_it_is_evicted_or_removed(
    what: str, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=4 * MIB)
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        handle = await stream.open()
        await check(handle, origin, 0, MIB)
        getattr(stream, what)()
        await check(handle, origin, 0, 4 * MIB)
        assert len(stream.open_handles) == 1
        handle.close()
        await stream.unread()
        await settled()
        assert house.cache.pool.used == 0
        assert origin.bodies == 0


@pytest.mark.parametrize("ticks", range(8))
@pytest.mark.parametrize("command", [True, False])
async def test_an_open_at_the_end_of_the_daemon_drops_nothing_that_is_kept(
    command: bool, ticks: int, tmp_path: Path
) -> None:
    origin = Origin(size=MIB, ranged=not command, told=not command)
    async with a_house(tmp_path) as house:
        stream = house.stream(origin, command=command)
        persist(house, stream)
        await until(lambda: stream.state == "complete")
        assert stream.persisted_path is not None
        path = stream.persisted_path
        async with trio.open_nursery() as nursery:

            async def open_late() -> None:
                with suppress(Closed):
                    (await stream.open()).close()

            nursery.start_soon(open_late)
            for _ in range(ticks):
                await trio.lowlevel.checkpoint()
            stream.interrupt(Closed("the end"))
        await stream.aclose()
        await house.cache.removed()
        assert path.read_bytes() == origin.content()


@pytest.mark.parametrize("when", ["while it rests in memory", "while its file is made", "after it went to disk"])
async def test_what_is_evicted_while_it_is_read_leaves_nothing_that_a_later_run_finds(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = Origin(size=4 * MIB, piece=MIB)
    async with a_house(tmp_path, spill_threshold=0, memory=64 * MIB) as house:
        stream = house.stream(origin)
        create = Recording.create
        if when == "while it rests in memory":
            house.cache.spill_threshold = 1 << 40
        elif when == "while its file is made":

            def evicting(path: Path, header: Header) -> Recording:
                recording = create(path, header)
                trio.from_thread.run_sync(stream.evict)
                return recording

            monkeypatch.setattr(Recording, "create", evicting)
        handle = await stream.open()
        await check(handle, origin, 0, 2 * MIB)
        if when == "after it went to disk":
            await until(lambda: handle.generation.buffer.memory < MIB)
            assert any(tmp_path.iterdir())  # noqa: ASYNC240
        if when != "while its file is made":
            stream.evict()
        house.cache.spill_threshold = 0
        house.cache._wanted.set()
        await until(lambda: stream.generation is None and handle.generation.buffer.memory < MIB)
        await house.cache.removed()
        assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240
        for offset in range(0, origin.size, MIB):
            await check(handle, origin, offset, MIB)
        await until(lambda: handle.generation.buffer.memory < 2 * MIB)
        assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240
        await check(handle, origin, 0, origin.size)
        handle.close()


async def test_evicted_bytes_are_given_back_at_once_where_nobody_reads(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=4 * MIB, ranged=False, told=False)
    async with a_house(tmp_path) as house:
        stream = house.stream(origin, command=True)
        handle = await stream.open()
        await check(handle, origin, 0, MIB)
        handle.close()
        stream.evict()
        await settled()
        assert house.cache.pool.used == 0
        assert origin.bodies == 0
        assert await read_all(stream) == origin.content()
        assert stream.generation is not None
        assert stream.generation.number == 2


async def test_a_persisted_stream_is_not_evicted(tmp_path: Path) -> None:
    origin = Origin(probe_gate=trio.Event())
    async with a_house(tmp_path) as house:
        stream = house.stream(origin, persist=True)
        with pytest.raises(NotPermitted, match="unpersist"):
            stream.evict()


# Persist; these use worker threads, so the real clock


async def until_persisted(stream: Stream) -> None:
    with trio.fail_after(20):
        while stream.persisted_path is None:  # noqa: ASYNC110
            await trio.sleep(0.002)


@pytest.mark.parametrize("command", [False, True])
async def test_persisting_brings_everything_without_a_reader_into_a_plain_file(command: bool, tmp_path: Path) -> None:
    origin = Origin(size=3 * MIB + 5, ranged=not command, told=not command)
    async with a_house(tmp_path, spill_threshold=MIB) as house:
        stream = house.stream(origin, command=command)
        persist(house, stream)
        await until_persisted(stream)
        path = stream.persisted_path
        assert path is not None
        assert path.read_bytes() == origin.content()
        assert (stream.state, stream.readers) == ("complete", 0)
        assert house.cache.pool.used == 0


async def test_what_the_daemon_holds_open_itself_is_in_use_and_has_no_reader(tmp_path: Path) -> None:
    stall = trio.Event()
    origin = Origin(size=MIB, stalls={100_000: stall})
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        persist(house, stream)
        await until(lambda: stream.open_handles)
        generation = stream.generation
        assert generation is not None and generation.in_use and generation.handles == 1
        assert stream.readers == 0
        handle = await stream.open({"pid": 4711, "program": "mpv"})
        assert (stream.readers, generation.handles) == (1, 2)
        handle.close()
        assert stream.readers == 0
        stall.set()
        await until_persisted(stream)


async def test_a_stream_of_no_bytes_can_be_persisted(tmp_path: Path) -> None:
    origin = Origin(size=0)
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        persist(house, stream)
        await until_persisted(stream)
        path = stream.persisted_path
        assert path is not None
        assert path.read_bytes() == b""


async def test_persisting_goes_on_after_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamfs.stream.PERSIST_RETRY", (0.01, 0.02))
    origin = Origin(size=2 * MIB, failures={MIB: SourceFailed("the line broke")})
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        persist(house, stream)
        with trio.fail_after(10):
            while len(origin.opens) < 6 or stream.problem is None:  # noqa: ASYNC110
                await trio.sleep(0.002)
        origin.failures.clear()
        await until_persisted(stream)
        assert origin.sent == origin.size


async def test_persisting_gets_the_new_version_when_the_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamfs.stream.PERSIST_RETRY", (0.01, 0.02))
    origin = Origin(size=4 * MIB, stalls={100_000: trio.Event()})
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        persist(house, stream)
        await trio.sleep(0.05)
        generation = stream.generation
        assert generation is not None
        origin.change()
        origin.stalls.clear()
        stream.changed(generation, SourceChanged("a new version"))
        await until_persisted(stream)
        path = stream.persisted_path
        assert path is not None
        assert path.read_bytes() == origin.content(2)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_version_that_is_given_up_while_it_is_settled_does_not_end_persisting(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamfs.stream.PERSIST_RETRY", (0.01, 0.02))
    origin = Origin(size=MIB)
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        settle, calls = house.cache.settle, []

        async def interfering(generation: object) -> None:
            calls.append(generation)
            if len(calls) == 1:
                assert stream.generation is not None
                origin.change()
                stream.changed(stream.generation, SourceChanged("a new version"))
            await settle(generation)  # type: ignore[arg-type]

        monkeypatch.setattr(house.cache, "settle", interfering)
        persist(house, stream)
        await until_persisted(stream)
        path = stream.persisted_path
        assert path is not None
        assert path.read_bytes() == origin.content(2)


async def test_persist_switched_off_and_on_while_it_works_still_ends(tmp_path: Path) -> None:
    stall = trio.Event()
    origin = Origin(size=4 * MIB, ranged=False, told=False, stalls={100_000: stall})
    async with a_house(tmp_path) as house:
        stream = house.stream(origin, command=True)
        persist(house, stream)
        await trio.sleep(0.02)
        persist(house, stream, on=False)
        persist(house, stream)
        await trio.sleep(0.02)
        stall.set()
        await until_persisted(stream)


async def test_unpersisting_stops_the_fetch(tmp_path: Path) -> None:
    stall = trio.Event()
    origin = Origin(size=16 * MIB, stalls={100_000: stall})
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        persist(house, stream)
        await trio.sleep(0.02)
        persist(house, stream, on=False)
        await trio.sleep(0.02)
        stall.set()
        await trio.sleep(0.1)
        assert origin.sent <= 100_000 + origin.piece
        assert not stream.open_handles


async def test_persisting_on_a_disk_that_takes_nothing_pauses_between_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = Origin(size=8 * MIB, piece=MIB)
    async with a_house(tmp_path, memory=2 * MIB, spill_threshold=MIB) as house:

        def refuse(*_: object) -> int:
            raise OSError(30, "Read-only file system")

        refuse_writes(monkeypatch, refuse)
        stream = house.stream(origin)
        persist(house, stream)
        await trio.sleep(0.6)
        assert stream.persisted_path is None
        assert house.cache.disk_error is not None
        assert stream.error is not None
        assert origin.sent <= 2 * origin.size, "the origin is asked again and again"
        handle = await stream.open()
        await check(handle, origin, 5 * MIB, 100_000)
        handle.close()


async def test_an_unforeseen_source_error_does_not_leave_the_stream(tmp_path: Path) -> None:
    origin = Origin()
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        assert isinstance(stream.source, FakeSource)
        persist(house, stream)
        origin.refuses = ValueError("a defect")
        with trio.fail_after(5):
            while stream.error is None:  # noqa: ASYNC110
                await trio.sleep(0.002)
        assert "internal error" in str(stream.error)


async def test_a_persisted_file_is_complete_again_only_when_its_damage_was_mended_on_disk(tmp_path: Path) -> None:
    origin = Origin(size=MIB)
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        persist(house, stream)
        with trio.fail_after(20):
            while stream.persisted_path is None:  # noqa: ASYNC110
                await trio.sleep(0.01)
        path = stream.persisted_path
        with path.open("r+b") as file:
            file.seek(300 * KIB)
            file.write(b"damage")
        handle = await stream.open()
        handle.generation.validated = float("-inf")
        origin.probe_gate = trio.Event()  # persisting, which asks for the version first, comes too late
        await check(handle, origin, 0, MIB)
        assert stream.state != "complete"
        assert stream.persisted_path is None
        origin.probe_gate.set()
        with trio.fail_after(20):
            while stream.persisted_path is None:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert stream.persisted_path.read_bytes() == origin.content()
        handle.close()


async def test_the_size_policy_wait_ends_where_all_bytes_are_here_but_no_end_comes(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=MIB, ranged=False, told=False, stalls={MIB: trio.Event()})
    async with a_house(tmp_path) as house:
        stream = house.stream(origin, command=True, size=MIB, size_policy="wait")
        with trio.fail_after(200), pytest.raises(SourceStalled):
            await stream.open()


async def test_a_declared_size_that_the_source_contradicts_cuts_nothing_off(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=2 * MIB)
    async with a_house(tmp_path) as house:
        stream = house.stream(origin, size=MIB)
        with pytest.raises(SourceFailed, match="declared"):
            await stream.open()
        await settled()
        assert origin.bodies == 0


async def test_a_read_that_does_not_wait_says_what_a_waiting_one_would(tmp_path: Path) -> None:
    origin = Origin(size=8 * MIB, ranged=False, told=False, named=False, stalls={8 * MIB: trio.Event()})
    async with a_house(tmp_path, spill_threshold=64 * KIB) as house:
        stream = house.stream(origin, window="1MiB")
        handle = await stream.open()
        handle.generation.demand(0, 8 * MIB)
        with trio.fail_after(20):
            while handle.generation.buffer.available(8 * MIB - 1, 1) == 0:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert handle.ready_at(0)
        with pytest.raises(OutsideWindow):
            await handle.read_available(0, 10)
        assert await handle.read_available(8 * MIB, 10) is None
        handle.close()
