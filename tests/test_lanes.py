"""Several requests at a time ahead of one reader: where a link's delay limits each connection, and only there.

The link is a fake with a clock of its own, so that figures are exact and no machine is too slow for them.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
import trio
import trio.testing

from streamfs.engine.lanes import GAIN, RETRY, SEGMENT, WIDTHS, Lanes
from streamfs.errors import SourceFailed
from streamfs.sources.base import Facts
from streamfs.stream import Stream
from tests.sourcefakes import MIB, FakeBody, FakeSource, House, Origin, a_house

SIZE = 192 * MIB
DELAY = 0.05  # seconds of one round trip
RATE = 100e6  # bytes a second and connection


class Link(FakeSource):
    """`delay` to each reply, `rate` bytes a second on each connection, `shared` on all together, at most `most`
    connections: what more are asked for hang, or are refused where `refusing`."""

    def __init__(
        self,
        origin: Origin,
        *,
        shared: float = float("inf"),
        most: int = 100,
        refusing: bool = False,
        delay: float = DELAY,
    ) -> None:
        super().__init__(origin)
        origin.piece = MIB
        self.shared = shared
        self.most = most
        self.refusing = refusing
        self.delay = delay
        self.free = 0.0  # when the shared line is free again
        self.widest = 0

    async def open(self, start: int, stop: int | None, expect: Facts | None) -> FakeBody:
        if self.origin.bodies >= self.most:
            if self.refusing:
                raise SourceFailed("too many connections")
            await trio.sleep_forever()
        await trio.sleep(self.delay)
        self.origin.opens.append((start, stop))
        body = SlowBody(self, start, stop)
        self.widest = max(self.widest, self.origin.bodies)
        return body


class Ftp(Link):
    """Its bodies go on past what was asked."""

    async def open(self, start: int, stop: int | None, expect: Facts | None) -> FakeBody:
        return await super().open(start, None, expect)


class SlowBody(FakeBody):
    def __init__(self, link: Link, start: int, stop: int | None) -> None:
        super().__init__(link.origin, start, stop)
        self._link = link
        self._line_free = trio.current_time()

    async def receive_into(self, view: memoryview) -> int:
        count = await super().receive_into(view)
        link = self._link
        now = trio.current_time()
        self._line_free = max(self._line_free, now) + count / RATE
        link.free = max(link.free, now) + count / link.shared
        await trio.sleep_until(max(self._line_free, link.free))
        return count


def streamed(house: House, link: Link) -> Stream:
    """What the link leads to, as a stream."""
    stream = house.stream(link.origin)
    stream.source = link
    return stream


async def timed(house: House, link: Link, step: int = MIB) -> tuple[float, float, Stream]:
    """Read all of it, checking; seconds of the link's clock for all of it and for its second half."""
    stream = streamed(house, link)
    began = trio.current_time()
    handle = await stream.open()
    found, position, halfway = hashlib.sha256(), 0, 0.0
    try:
        while piece := await handle.read(position, step):
            found.update(piece)
            position += len(piece)
            if not halfway and position >= link.origin.size // 2:
                halfway = trio.current_time()
        ended = trio.current_time()
    finally:
        handle.close()
    assert found.digest() == hashlib.sha256(link.origin.content()).digest()
    await trio.sleep(10)  # until every fetch has ended
    return ended - began, ended - halfway, stream


@pytest.mark.parametrize("kind", [Link, Ftp])
async def test_over_a_link_with_delay_lanes_bring_three_times_what_one_connection_does(
    kind: type[Link], tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    link = kind(Origin(size=SIZE))
    async with a_house(tmp_path, read_ahead=8 * MIB, memory=256 * MIB) as house:
        whole, half, _ = await timed(house, link)
        assert house.context.lanes == 0
    assert half <= SIZE / 2 / RATE / 3.5
    assert whole <= SIZE / RATE / 2.6  # of which the first bytes, read one window after the other, are a quarter
    assert link.widest == WIDTHS[-1]
    assert link.origin.sent == SIZE, "bytes came from the source more than once"


@pytest.mark.parametrize("step", [MIB, 100_000])
async def test_where_the_line_itself_is_the_limit_lanes_end_and_no_byte_comes_twice(
    step: int, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    size = 2 * WIDTHS[0] * SEGMENT + RETRY  # read to its end before lanes are tried again
    link = Link(Origin(size=size), shared=RATE)
    async with a_house(tmp_path, read_ahead=8 * MIB, memory=256 * MIB) as house:
        seconds, _, stream = await timed(house, link, step)
        assert stream.generation is not None
        assert stream.generation.plan.lanes is not None
        assert stream.generation.plan.lanes.over
    assert seconds <= size / RATE * 1.15 + 1
    assert link.widest == WIDTHS[0]
    assert link.origin.sent == size


async def test_without_delay_a_body_that_goes_on_is_read_to_its_end(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    link = Ftp(Origin(size=64 * MIB), delay=0.001)
    async with a_house(tmp_path, read_ahead=8 * MIB, memory=256 * MIB) as house:
        await timed(house, link)
    assert link.origin.opens == [(0, None)]


class SlowLogin(Ftp):
    """Near, but each of its bodies takes a login, and says so."""

    async def open(self, start: int, stop: int | None, expect: Facts | None) -> FakeBody:
        body = await super().open(start, stop, expect)
        body.reply_seconds = 0.001
        return body


async def test_an_opening_that_takes_long_is_no_delay_of_the_link(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    link = SlowLogin(Origin(size=64 * MIB), delay=0.1)
    async with a_house(tmp_path, read_ahead=8 * MIB, memory=256 * MIB) as house:
        await timed(house, link)
    assert link.origin.opens == [(0, None)]


async def test_a_reader_that_pauses_does_not_make_its_link_seem_slow(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Or lanes would be compared with its pace, and kept whatever they bring."""
    link = Link(Origin(size=SIZE), shared=RATE)
    async with a_house(tmp_path, read_ahead=8 * MIB, memory=256 * MIB) as house:
        stream = streamed(house, link)
        handle = await stream.open()
        position = 0
        while position < SIZE:
            position += len(await handle.read(position, MIB))
            if position % (16 * MIB) == 0:
                await trio.sleep(4)
        assert stream.generation is not None
        assert stream.generation.plan._rate >= RATE / 4
        handle.close()


async def test_lanes_that_did_not_pay_are_tried_again(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """What was in their way may have been the machine, busy with something else for a second."""
    size = SIZE + RETRY
    link = Link(Origin(size=size), shared=RATE)
    async with a_house(tmp_path, read_ahead=8 * MIB, memory=256 * MIB) as house:
        handle = await streamed(house, link).open()
        position = 0
        while position < 3 * size // 4:
            position += len(await handle.read(position, MIB))
            if link.widest == WIDTHS[0] and not house.context.lanes:
                link.shared = float("inf")  # they have been given up
        assert link.shared == float("inf")
        began = trio.current_time()
        while position < size:
            position += len(await handle.read(position, MIB))
        assert trio.current_time() - began <= size / 4 / RATE / 2
        handle.close()
    assert link.origin.sent == size


@pytest.mark.parametrize("refusing", [False, True])
async def test_a_server_that_bears_few_connections_is_read_by_one(
    refusing: bool, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    link = Link(Origin(size=SIZE), most=2, refusing=refusing)
    async with a_house(tmp_path, read_ahead=8 * MIB, memory=256 * MIB) as house:
        seconds, _, stream = await timed(house, link)
        assert stream.problem is None
        assert house.context.lanes == 0
    assert seconds <= SIZE / RATE * 1.2 + 5
    assert link.origin.sent == SIZE


async def test_without_delay_there_is_one_connection(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    link = Link(Origin(size=64 * MIB), delay=0.001)
    async with a_house(tmp_path, read_ahead=8 * MIB, memory=256 * MIB) as house:
        await timed(house, link)
    assert link.widest == 1


async def test_a_seek_meets_its_first_byte_after_one_round_trip_while_lanes_are_busy(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    link = Link(Origin(size=SIZE))
    async with a_house(tmp_path, read_ahead=8 * MIB, memory=256 * MIB) as house:
        stream = streamed(house, link)
        handle = await stream.open()
        for position in range(0, 128 * MIB, MIB):
            await handle.read(position, MIB)
            if position > 48 * MIB and house.context.lanes > 2:  # their number goes up and down as rounds end
                break
        assert house.context.lanes > 2
        began = trio.current_time()
        await handle.read(SIZE - 1 * MIB, 1)
        assert trio.current_time() - began <= 1.3 * DELAY
        handle.close()


async def test_lanes_stop_when_the_last_reader_leaves(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    link = Link(Origin(size=SIZE))
    async with a_house(tmp_path, read_ahead=8 * MIB, memory=256 * MIB) as house:
        stream = streamed(house, link)
        handle = await stream.open()
        for position in range(0, 64 * MIB, MIB):
            await handle.read(position, MIB)
        handle.close()
        await trio.sleep(10)
        assert (link.origin.bodies, house.context.lanes) == (0, 0)
        assert link.origin.sent <= 64 * MIB + WIDTHS[-1] * SEGMENT * 5 // 4
        handle = await stream.open()  # and who comes back reads on
        assert bytes(await handle.read(64 * MIB, SIZE - 64 * MIB)) == link.origin.content()[64 * MIB :]
        handle.close()


async def test_lanes_of_all_streams_stay_within_a_quarter_of_memory(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with a_house(tmp_path, read_ahead=8 * MIB, memory=256 * MIB, spill_threshold=8 * MIB) as house:
        most = 0

        async def read(link: Link) -> None:
            await timed(house, link)

        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(read, Link(Origin(name, size=SIZE // 2)))
            while nursery.child_tasks:
                most = max(most, house.context.lanes)
                await trio.sleep(0.01)
        assert 0 < most <= house.context.most_lanes
        assert house.context.lanes == 0


def test_a_width_that_does_not_pay_is_given_up_for_the_one_before() -> None:
    lanes = Lanes(0, 100.0, 0.0)
    lanes.reader = 1 << 40
    now = 0.0
    for width, rate in ((WIDTHS[0], 100 * GAIN), (WIDTHS[1], 100 * GAIN * 1.1)):
        assert lanes.width == width
        now += 2 * width * SEGMENT / rate
        for _ in range(2 * width):
            lanes.finished(SEGMENT, now)
    assert (lanes.width, lanes.over) == (WIDTHS[0], False)
    for _ in range(100):  # for good
        lanes.finished(1, now + 1e9)
    assert (lanes.width, lanes.over) == (WIDTHS[0], False)


def test_places_follow_one_another_and_end_at_the_size() -> None:
    lanes = Lanes(5 * MIB, 100.0, 0.0)
    lanes.reader = 1 << 40
    places = []
    while (place := lanes.place(0, 30 * MIB)) is not None:
        places.append(place)
        lanes.next = place[1]
    assert places[0][0] == 5 * MIB
    assert places[-1][1] == 30 * MIB
    assert all(before[1] == after[0] for before, after in itertools.pairwise(places))
    assert all(0 < stop - start <= SEGMENT * 5 // 4 for start, stop in places)
