"""One version of a stream: what its fetches bring, how far they go, how they end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from streamfs.engine.fetches import FIRST_AHEAD, MOST_FETCHES
from streamfs.errors import CommandFailed, SourceChanged, SourceFailed, SourceStalled
from streamfs.generation import IDLE, LINGER
from streamfs.stream import Handle, Stream
from tests.sourcefakes import KIB, MIB, Origin, a_house, settled


async def check(handle: Handle, origin: Origin, offset: int, size: int, version: int = 1) -> None:
    view = await handle.read(offset, size)
    assert bytes(view) == origin.content(version)[offset : offset + size]


async def read_all(stream: Stream, step: int = 100_000) -> bytes:
    handle = await stream.open()
    found = bytearray()
    try:
        while piece := bytes(await handle.read(len(found), step)):
            found += piece
    finally:
        handle.close()
    return bytes(found)


async def cancellable(
    work: Callable[[], Awaitable[None]], task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.CancelScope() as scope:
        task_status.started(scope)
        await work()


KINDS = [
    pytest.param({"ranged": True}, id="ranged"),
    pytest.param({"ranged": True, "told": False}, id="ranged-of-unknown-length"),
    pytest.param({"ranged": False}, id="one-way"),
    pytest.param({"ranged": False, "told": False, "named": False}, id="one-way-that-says-nothing"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 1, FIRST_AHEAD - 1, FIRST_AHEAD, FIRST_AHEAD + 1, 3 * MIB + 7])
async def test_every_byte_is_read_and_the_end_is_the_true_end(
    kind: dict[str, bool], size: int, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=size, **kind)
    async with a_house(tmp_path) as house:
        assert await read_all(house.stream(origin)) == origin.content()
    assert origin.sent == size, "bytes came from the source more than once"


@pytest.mark.parametrize("kind", KINDS)
async def test_many_readers_start_the_source_once(
    kind: dict[str, bool], tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=2 * MIB, piece=7 * KIB, **kind)
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        found: list[bytes] = []

        async def read() -> None:
            found.append(await read_all(stream))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(read)
        assert found == [origin.content()] * 20
    assert origin.sent == origin.size
    assert len([start for start, _ in origin.opens if start == 0]) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_bytes_that_arrived_are_given_while_the_source_hangs(
    kind: dict[str, bool], tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=MIB, stalls={100 * KIB: trio.Event()}, **kind)
    async with a_house(tmp_path) as house, trio.open_nursery() as nursery:
        handle = await house.stream(origin).open()
        nursery.start_soon(handle.read, 0, 200 * KIB)
        await settled()
        before = trio.current_time()
        for offset in (0, 5, 50 * KIB):
            await check(handle, origin, offset, 50 * KIB)
        assert handle.read_now(90 * KIB, 10 * KIB) is not None
        assert trio.current_time() == before
        nursery.cancel_scope.cancel()
        handle.close()


@pytest.mark.parametrize("read_ahead", [FIRST_AHEAD, MIB])
@pytest.mark.parametrize("command", [False, True])
async def test_a_one_way_source_is_read_no_further_than_the_read_ahead_past_the_furthest_reader(
    command: bool, read_ahead: int, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=8 * MIB, ranged=False, told=False, piece=MIB)
    async with a_house(tmp_path, read_ahead=read_ahead) as house:
        handle = await house.stream(origin, command=command).open()
        for stop in (1, 10 * KIB, 300 * KIB, 2 * MIB):
            await check(handle, origin, stop - 1, 1)
            await settled()
            assert stop <= origin.sent <= stop + read_ahead + MIB
        handle.close()


async def test_readers_that_come_and_go_take_a_command_no_further(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=16 * MIB, ranged=False, told=False)
    async with a_house(tmp_path) as house:
        stream = house.stream(origin, command=True)
        for _ in range(12):
            handle = await stream.open()
            await check(handle, origin, 0, 10)
            await settled()
            handle.close()
            await settled()
        assert origin.sent <= 10 + MIB + origin.piece


async def test_a_far_seek_brings_no_more_than_its_window(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=64 * MIB)
    async with a_house(tmp_path) as house:
        handle = await house.stream(origin).open()
        await check(handle, origin, 50 * MIB, 10)
        await settled()
        assert origin.sent <= 2 * FIRST_AHEAD  # the opening request, and the one at the place
        handle.close()


async def test_a_reader_that_meets_bytes_another_brought_asks_for_none_of_them(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=8 * MIB)
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        ahead = await stream.open()
        for offset in range(3 * MIB, 6 * MIB, 128 * KIB):
            await check(ahead, origin, offset, 128 * KIB)
        behind = await stream.open()
        for offset in range(0, 8 * MIB, 128 * KIB):
            await check(behind, origin, offset, 128 * KIB)
        assert origin.sent == origin.size
        assert all(stop is None or stop - start > 1 for start, stop in origin.opens), "a request for a single byte"
        ahead.close()
        behind.close()


async def test_more_readers_than_fetches_all_get_their_bytes(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=64 * MIB)
    async with a_house(tmp_path) as house:
        handle = await house.stream(origin).open()
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for place in range(3 * MOST_FETCHES):
                    nursery.start_soon(check, handle, origin, place * 2 * MIB + 1000, 200 * KIB)
        handle.close()


async def test_what_arrived_before_a_failure_stays_readable_and_beyond_it_fails_every_time(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=MIB, failures={100_000: SourceFailed("the line broke")})
    async with a_house(tmp_path) as house:
        handle = await house.stream(origin).open()
        for _ in range(3):
            with pytest.raises(SourceFailed, match="the line broke"):
                await handle.read(90_000, 20_000)
            assert bytes(await handle.read(90_000, 20_000, partial=True)) == origin.content()[90_000:100_000]
            with pytest.raises(SourceFailed):
                await handle.read(100_000, 1, partial=True)
        await check(handle, origin, 0, 100_000)
        handle.close()


async def test_a_later_open_of_a_url_tries_again(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    origin = Origin(size=MIB, failures={100_000: SourceFailed("the line broke")})
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        with pytest.raises(SourceFailed):
            await read_all(stream)
        origin.failures.clear()
        assert await read_all(stream) == origin.content()
    assert origin.sent == origin.size


async def test_a_request_ends_where_bytes_are_there_already(tmp_path: Path) -> None:
    """Its connection can serve the next; one that is left in the middle of a body cannot."""
    origin = Origin(size=16 * MIB)
    async with a_house(tmp_path) as house:
        handle = await house.stream(origin).open()
        for offset in (6 * MIB, 12 * MIB, 0):
            await check(handle, origin, offset, MIB)
        await settled()
        there = [(6 * MIB, 7 * MIB), (12 * MIB, 13 * MIB)]
        origin.opens.clear()
        for offset in range(0, origin.size, MIB):
            await check(handle, origin, offset, MIB)
        assert origin.sent == origin.size
        for start, stop in origin.opens:
            end = origin.size if stop is None else stop
            assert not any(first < end and start < last for first, last in there), (start, stop)


async def test_who_opened_before_a_failure_goes_on_to_get_it_though_a_later_open_tries_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=MIB, failures={500_000: SourceStalled("nothing came")})
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        before = await stream.open()
        with pytest.raises(SourceStalled):
            await before.read(500_000, 1)
        origin.failures.clear()
        origin.stalls[500_000] = trio.Event()
        later = await stream.open()
        assert not later.ready_at(500_000)
        with trio.fail_after(1):
            for _ in range(3):  # at once, and not when the new attempt has come to an end
                with pytest.raises(SourceStalled):
                    await before.read(500_000, 1)
            assert bytes(await before.read(0, 1000)) == origin.content()[:1000]
            assert before.ready_at(500_000)
            with pytest.raises(SourceStalled):
                await before.read_available(500_000, 1)
        origin.stalls.pop(500_000).set()
        assert bytes(await later.read(500_000, 1000)) == origin.content()[500_000:501_000]
        assert bytes(await before.read(500_000, 1000)) == origin.content()[500_000:501_000]  # it has arrived
        before.close()
        later.close()


async def test_a_later_open_of_a_command_does_not_run_it_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=MIB, ranged=False, told=False, failures={100_000: CommandFailed("exit status 3", 3)})
    async with a_house(tmp_path) as house:
        stream = house.stream(origin, command=True)
        for _ in range(2):
            with pytest.raises(CommandFailed):
                await read_all(stream)
        assert len(origin.opens) == 1


async def test_a_body_longer_than_declared_fails_once_its_bytes_are_read(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=300_000, ranged=False, length=300_001)
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        handle = await stream.open()
        await check(handle, origin, 0, 300_000)
        await settled()
        assert isinstance(stream.problem, SourceFailed)
        assert bytes(await handle.read(299_999, 100)) == origin.content()[299_999:]
        handle.close()


@pytest.mark.parametrize("ranged", [False, True])
async def test_a_body_shorter_than_declared_is_no_end(
    ranged: bool, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=300_000, ranged=ranged, length=200_000)
    if ranged:
        origin.failures[200_000] = SourceFailed("the body was cut")
    async with a_house(tmp_path) as house:
        handle = await house.stream(origin).open()
        with pytest.raises(SourceFailed):
            await handle.read(150_000, 100_000)
        assert handle.size == 300_000
        await check(handle, origin, 100_000, 100_000)
        handle.close()


async def test_a_one_way_url_that_is_started_again_is_compared_with_what_is_there(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=MIB, ranged=False, failures={400_000: SourceFailed("the line broke")})
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        with pytest.raises(SourceFailed):
            await read_all(stream)
        number = stream.generation and stream.generation.number
        origin.failures.clear()
        assert await read_all(stream) == origin.content()
        assert stream.generation is not None
        assert stream.generation.number == number


@pytest.mark.parametrize("length", [None, 300_000])
async def test_a_one_way_url_that_sends_other_bytes_than_before_has_changed(
    length: int | None, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=MIB, ranged=False, failures={400_000: SourceFailed("the line broke")})
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        handle = await stream.open()
        await handle.read(0, 400_000)
        with pytest.raises(SourceFailed):
            await handle.read(400_000, 1)
        origin.failures.clear()
        second = await stream.open()
        if length is None:
            origin.version, origin.named = 2, True
            origin.__class__ = _SameName
        origin.length = length
        for each in (second, handle):
            with pytest.raises(SourceChanged):
                await each.read(400_000, 1000)
            with pytest.raises(SourceChanged):
                await each.read(0, 1)
            each.close()


class _SameName(Origin):
    """Sends another version under the name of the first."""

    @property
    def facts(self):  # type: ignore[no-untyped-def]
        from dataclasses import replace

        return replace(super().facts, validator="v1")


async def test_a_fetch_is_kept_for_a_while_for_readers_that_come_back(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=8 * MIB)
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        handle = await stream.open()
        await check(handle, origin, 0, 10)
        generation = handle.generation
        handle.close()
        await trio.sleep(LINGER * 0.9)
        assert generation.fetching
        again = await stream.open()
        await trio.sleep(LINGER * 2)
        assert generation.fetching
        await trio.sleep(IDLE)
        assert not generation.fetching
        again.close()


async def test_a_fetch_that_nobody_needs_ends(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    origin = Origin(size=8 * MIB)
    async with a_house(tmp_path) as house:
        handle = await house.stream(origin).open()
        await check(handle, origin, 0, 10)
        handle.close()
        await trio.sleep(LINGER * 1.1)
        assert not handle.generation.fetching
        assert origin.bodies == 0


@pytest.mark.parametrize(("ranged", "within"), [(True, LINGER), (False, IDLE)])
async def test_a_fetch_that_waits_for_a_silent_source_ends_after_the_last_close(
    ranged: bool, within: float, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=MIB, ranged=ranged, stalls={1000: trio.Event()})
    async with a_house(tmp_path) as house:
        handle = await house.stream(origin).open()
        await check(handle, origin, 0, 1000)
        handle.close()
        await trio.sleep(within * 1.1)
        assert not handle.generation.fetching
        assert origin.bodies == 0


async def test_a_command_that_nobody_reads_is_paused_not_ended(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=8 * MIB, ranged=False, told=False)
    async with a_house(tmp_path) as house:
        stream = house.stream(origin, command=True)
        handle = await stream.open()
        await check(handle, origin, 0, 10)
        handle.close()
        await trio.sleep(100)
        assert stream.state == "paused"
        assert await read_all(stream) == origin.content()
    assert len(origin.opens) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_a_reader_goes_on_when_somebody_who_wanted_everything_gives_up(
    kind: dict[str, bool], tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    stall = trio.Event()
    origin = Origin(size=4 * MIB, stalls={100 * KIB: stall}, **kind)
    async with a_house(tmp_path) as house:
        handle = await house.stream(origin).open()
        with trio.fail_after(1):
            async with trio.open_nursery() as nursery:
                greedy = await nursery.start(cancellable, handle.generation.fetch_all)
                await settled()
                nursery.start_soon(check, handle, origin, 0, 2 * MIB)
                await settled()
                greedy.cancel()
                await settled()
                stall.set()
        handle.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_somebody_who_wants_everything_gets_it_though_another_gave_up(
    kind: dict[str, bool], tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    stall = trio.Event()
    origin = Origin(size=4 * MIB, stalls={100 * KIB: stall}, **kind)
    async with a_house(tmp_path) as house, trio.open_nursery() as nursery:
        handle = await house.stream(origin).open()
        nursery.start_soon(handle.generation.fetch_all)
        async with trio.open_nursery() as other:
            other.start_soon(handle.generation.fetch_all)
            await settled()
            other.cancel_scope.cancel()
        assert handle.generation.plan.greedy
        stall.set()
        await settled()
        assert handle.generation.buffer.complete
        assert not handle.generation.plan.greedy
        handle.close()


async def test_wanting_everything_ends_where_nothing_arrives_for_too_long(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=4 * MIB, stalls={100 * KIB: trio.Event()})
    async with a_house(tmp_path) as house:
        handle = await house.stream(origin).open()
        with pytest.raises(SourceStalled):
            await handle.generation.fetch_all(progress_within=7.0)
        assert trio.current_time() == pytest.approx(7.0, abs=0.1)
        handle.close()


async def test_an_unforeseen_error_of_a_source_fails_its_stream_alone(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Origin("bad"), Origin("good")
    bad.failures[100_000] = ValueError("a defect")  # type: ignore[assignment]
    async with a_house(tmp_path) as house:
        with pytest.raises(SourceFailed, match="a defect"):
            await read_all(house.stream(bad))
        assert await read_all(house.stream(good)) == good.content()
    assert "unforeseen" in caplog.text


async def test_a_one_way_fetch_fills_a_hole_and_goes_on_behind_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    origin = Origin(size=MIB, ranged=False, failures={400_000: SourceFailed("the line broke")})
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        with pytest.raises(SourceFailed):
            await read_all(stream)
        assert stream.generation is not None
        buffer = stream.generation.buffer
        with buffer._lock:  # as after damage on disk: the pieces there are lost
            segments = [s for s in buffer._store._segments if 64 * KIB <= s.start < 192 * KIB]
            for segment in segments:
                buffer._state.lost(segment.start, segment.stop, for_good=True)
            buffer._store.drop_memory(segments)
        origin.failures.clear()
        handle = await stream.open()
        await check(handle, origin, 500_000, 10_000)
        await check(handle, origin, 0, 500_000)
        handle.close()


async def test_what_lies_behind_every_reader_of_this_version_has_been_passed(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Nobody is expected to ask for it soon: so the kernel need not keep what of it goes to disk."""
    origin = Origin(size=2 * MIB, ranged=True)
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        ahead = await stream.open()
        generation = ahead.generation
        assert generation.passed == 0
        await ahead.read(0, MIB)
        assert generation.passed == MIB
        behind = await stream.open()
        assert generation.passed == 0
        await behind.read(0, 100)
        assert generation.passed == 100
        for handle in (ahead, behind):
            handle.close()
        assert generation.passed > origin.size
