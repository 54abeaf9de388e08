"""Which fetches the readers of one generation need. Decisions only: no I/O, no clock, no tasks.

A fetch is a cursor that brings bytes in order from where it started; `limit` says how far it may go now, and it
rests (backpressure) when it gets there. One-way sources have one fetch, from 0. Ranged sources have one per place
where somebody reads: a reader that waits far from every cursor gets a new one, a reader a little ahead of a cursor
waits for it to read through the gap. Where one connection cannot bring bytes as fast as its reader takes them and
the link has a delay, several fetches go on in lanes side by side (streamfs.engine.lanes).

How far a fetch goes ahead of its reader starts small, so that a first byte or a far seek costs little, and doubles
whenever the reader has caught up with it, up to the read-ahead (as mountpoint-s3 does); faster over a link with delay.
"""

from __future__ import annotations

from collections import deque

from streamfs.engine.lanes import LEAST_LATENCY, RETRY, SEGMENT, WIDTHS, Lanes

FIRST_AHEAD = 128 * 1024
"""Bytes of the first request at a place: the kernel's default read-ahead, which is what one read call brings here."""
SPARING = 64 * 1024
"""Bytes that a reader who looks at many files and reads on in few (thumbnailers, indexers) costs at a place."""
OPEN_ENDED = 4 * 1024 * 1024
"""From this read-ahead on, a request asks for everything up to the end: a reader that got here reads on."""
FAR_GROWTH = 4
"""What a read-ahead grows by at a time where a reply takes LEAST_LATENCY or more; elsewhere it doubles."""
MOST_FETCHES = 8
"""Cursors of one generation at a time: a guess at how many places a program reads at once."""
REORDER = 1024 * 1024
"""Bytes past the furthest read that still count as its continuation: the kernel's read-ahead sends requests of up to
1 MiB side by side, and they arrive in any order."""
MANY_JUMPS = 8
"""After so many places in a row from which nobody read on, a program reads here and there: a fetch at yet another place
then brings what is asked and no more. A guess: archives and media files are opened with fewer jumps."""
MOST_JUMPS = 4 * MANY_JUMPS
"""So many are remembered, and half of them forgotten each time somebody reads on: among places here and there some lie
beside each other by chance, while a program that has begun to read on soon does nothing else."""
_SAMPLE = 1024 * 1024  # bytes from which a rate is that of the connection, and not of what lay ready in it
LEAST_GAP, MOST_GAP = 64 * 1024, 4 * 1024 * 1024
"""Bounds, in bytes, of the gap that is read through rather than asked for anew."""


class Fetch:
    """One cursor. INVARIANT: start <= position; it has brought, or skipped as present, start..position."""

    __slots__ = ("ahead", "limit", "missed", "position", "start", "stop", "wanted")

    def __init__(self, start: int, wanted: int, limit: int | None, ahead: int, stop: int | None = None) -> None:
        self.start = start
        self.position = start
        self.wanted = wanted  # how far readers that it serves have asked
        self.limit = limit  # None: as far as there are bytes
        self.ahead = ahead
        self.stop = stop  # of a lane: it ends there; None: it goes on
        self.missed = start  # the last byte for which a reader had to wait

    @property
    def done(self) -> bool:
        """Whether it is a lane that has brought its segment."""
        return self.stop is not None and self.position >= self.stop

    @property
    def resting(self) -> bool:
        """Whether it has brought what it may."""
        return self.limit is not None and self.position >= self.limit

    def window(self) -> int | None:
        """Where the next request of a ranged source should end; None: open-ended."""
        if self.stop is not None:
            return self.stop
        if self.limit is None or self.ahead >= OPEN_ENDED:
            return None
        return max(self.limit, self.position + 1)


class FetchPlan:
    """The fetches of one generation."""

    def __init__(self, *, ranged: bool, read_ahead: int) -> None:
        self.ranged = ranged
        self.read_ahead = FIRST_AHEAD
        self.allow_ahead(read_ahead)
        self.fetches: list[Fetch] = []
        self.greedy = False
        """Everything is wanted, whatever readers do (persist): limits are off."""
        self._gap = LEAST_GAP
        self._jumps = 0  # fetches from which nobody read on: see MOST_JUMPS
        self.lanes: Lanes | None = None
        self._lanes_failed = False
        self._alone = RETRY  # bytes that one fetch brings after lanes that did not pay, before they are tried once more
        self._latency = float("inf")  # seconds, the least so far
        self._rate = 0.0  # bytes a second of one fetch, the least so far; 0: not measured
        self._left: deque[int] = deque(maxlen=MOST_FETCHES)  # where the latest of those without read-ahead ended

    def allow_ahead(self, read_ahead: int) -> None:
        """From now on read so many bytes ahead, FIRST_AHEAD at least; what is under way goes as far as it was let."""
        self.read_ahead = max(read_ahead, FIRST_AHEAD)

    def first(self, size: int = FIRST_AHEAD) -> Fetch:
        """The fetch of an opening request, from 0, which asked for `size` bytes of a ranged source."""
        if size < FIRST_AHEAD and self.ranged and not self.greedy:
            return self._begin(0, 0, size, 0)
        return self._start(0, 0)  # nobody has read anything yet

    def demand(self, missing: int, stop: int, *, sparing: bool = False) -> Fetch | None:
        """A reader waits for `missing`..stop. A new Fetch is to be run; None: one under way will do, or, where all
        MOST_FETCHES are busy, the reader asks again when one has ended. `sparing`: nothing is to be read ahead."""
        near = self._nearest(missing)
        if near is not None and sparing:
            near.wanted = max(near.wanted, stop)
            near.limit = None if near.limit is None else max(near.limit, stop)
            return None
        if near is not None:
            near.missed = max(near.missed, missing)
            if stop <= near.wanted and near.stop is None:
                return None  # a read that asks once more, or one that comes after its successor
            self._jumps //= 2
            if near.stop is not None:
                self._advance(stop)
                self._allow(near, stop)
                return None
            if near.position - near.start >= near.ahead:
                near.ahead = min(max(near.ahead * self._growth, FIRST_AHEAD), self.read_ahead)
            self._allow(near, stop)
            return None
        if self.lanes is not None and self.lanes.next <= missing <= self.lanes.next + REORDER:
            if not self.lanes.over:
                self._advance(stop)
                return None  # a lane is begun there, or will be when another ends
            if not self.crowded:
                return self._go_on_alone(missing, stop)
        if self.crowded:
            return None
        if sparing and self.ranged and not self.greedy:
            return self._begin(missing, stop, max(stop, missing + SPARING), 0)
        reads_on = self._reads_on(missing)
        self._jumps = self._jumps // 2 if reads_on else min(self._jumps + 1, MOST_JUMPS)
        return self._start(missing if self.ranged else 0, stop, short=self._jumping and not reads_on)

    def jump(self, missing: int, stop: int) -> Fetch | None:
        """As `demand`, where that begins a fetch without read-ahead, for missing..stop; else None, and nothing is
        begun."""
        if not self._jumping or not self.ranged or self.greedy or self.lanes is not None or self.crowded:
            return None
        if self._reads_on(missing) or self._nearest(missing) is not None:
            return None
        self._jumps = min(self._jumps + 1, MOST_JUMPS)
        return self._begin(missing, stop, stop, 0)

    def withdraw(self, fetch: Fetch) -> None:
        """Nothing was done for it."""
        self.fetches.remove(fetch)

    @property
    def _jumping(self) -> bool:
        """Whether a program reads here and there."""
        return self._jumps > MANY_JUMPS

    def _reads_on(self, missing: int) -> bool:
        """Whether `missing` is where a fetch without read-ahead has ended."""
        return any(left <= missing <= left + LEAST_GAP for left in self._left)

    def follow(self, stop: int, front: int) -> Fetch | None:
        """A reader has got everything up to `stop`, and bytes are there, unbroken, up to `front`: the fetch that
        stands at `front` may go on ahead of it. Returns that fetch, if there is one."""
        if self.lanes is not None and stop <= self.lanes.next:
            self._advance(stop)
        for fetch in self.fetches:
            if fetch.stop is not None:
                continue
            if fetch.position == front or (not self.ranged and front <= fetch.position):
                if fetch.position - fetch.start >= 4 * fetch.ahead:
                    fetch.ahead = min(fetch.ahead * self._growth, self.read_ahead)  # it is read on and on
                # It goes on by half a window or more, so that small reads do not cost a request each.
                if not self.ranged or fetch.limit is None or stop + fetch.ahead // 2 >= fetch.limit:
                    self._allow(fetch, stop)
                return fetch
        return None

    # Lanes

    def spread(self, fetch: Fetch, size: int | None, now: float) -> None:
        """Call where `may_spread`, before `fetch` asks for its next bytes: it becomes the first of several lanes."""
        if self.lanes is not None and self.lanes.over:
            self._alone *= 2
        self.lanes = Lanes(fetch.position, self._rate, now)
        self.lanes.reader = max(fetch.position, fetch.wanted)
        place = self.lanes.place(0, size or 0)
        assert place is not None
        fetch.start = fetch.position
        self.lanes.next = fetch.stop = fetch.limit = place[1]

    def may_spread(self, fetch: Fetch, size: int | None) -> bool:
        """Whether its reader waits for the next bytes, and one connection is limited by the delay of the link."""
        hungry = fetch.position - fetch.missed <= REORDER and (fetch.limit is None or fetch.ahead >= OPEN_ENDED)
        delayed = self._latency >= LEAST_LATENCY and self._rate > 0
        long = size is not None and size - fetch.position > WIDTHS[0] * SEGMENT
        busy = self._lanes_failed or self._active or fetch.position < self._alone_until
        return self.ranged and fetch.stop is None and not busy and hungry and delayed and long

    def end_of_request(self, fetch: Fetch) -> int | None:
        """Where the next request of `fetch` should end; None: nowhere."""
        window = fetch.window()
        if fetch.stop is not None or self._lanes_failed or self._alone_until <= fetch.position:
            return window
        return self._alone_until if window is None else min(window, self._alone_until)

    @property
    def _alone_until(self) -> int:
        """Up to where one fetch brings what follows lanes that did not pay; 0 where there are none such."""
        return self.lanes.next + self._alone if self.lanes is not None and self.lanes.over else 0

    def lane(self, size: int | None) -> Fetch | None:
        """Another lane to run, if one is due; ask again until there is none."""
        place = None if self.lanes is None or size is None else self.lanes.place(self._active, size)
        if self.lanes is None or place is None:
            return None
        start, stop = place
        fetch = Fetch(start, stop, stop, self.read_ahead, stop)
        self.lanes.next = stop
        self.fetches.append(fetch)
        return fetch

    def lane_ended(self, fetch: Fetch, now: float, *, failed: bool) -> None:
        """A lane has ended. `failed`: perhaps so many requests at a time were more than the source bears."""
        if failed:
            self._lanes_failed = True
            self.give_up_lanes()
        elif self.lanes is not None and fetch.done:
            self.lanes.finished(fetch.position - fetch.start, now)

    def give_up_lanes(self) -> None:
        """No more lanes for now."""
        if self.lanes is not None:
            self.lanes.over = True

    @property
    def _growth(self) -> int:
        """By how much the read-ahead grows where a reader has caught up with it: each step costs a round trip."""
        return FAR_GROWTH if LEAST_LATENCY <= self._latency < float("inf") else 2

    @property
    def _active(self) -> int:
        return sum(fetch.stop is not None for fetch in self.fetches)

    def _advance(self, stop: int) -> None:
        if self.lanes is not None:
            self.lanes.reader = max(self.lanes.reader, stop)

    def _go_on_alone(self, missing: int, stop: int) -> Fetch:
        """Where lanes did not pay, one fetch goes on behind the last of them, at full speed from the start."""
        fetch = Fetch(missing, stop, None if self.greedy else missing + self.read_ahead, self.read_ahead)
        self.fetches.append(fetch)
        return fetch

    def spare(self, missing: int) -> Fetch | None:
        """A resting fetch that may be ended to make place for one that brings `missing`. None where all are busy, or
        there is place, or a fetch under way brings it."""
        if not self.crowded or self._nearest(missing) is not None:
            return None
        return next((fetch for fetch in self.fetches if fetch.resting), None)

    def is_served(self, position: int, besides: Fetch) -> bool:
        """Whether another fetch than `besides` stands at `position` and brings what follows."""
        return any(fetch.position == position for fetch in self.fetches if fetch is not besides)

    @property
    def crowded(self) -> bool:
        """Whether there is no place for another fetch."""
        return len(self.fetches) - self._active >= MOST_FETCHES

    def release(self) -> None:
        """No reader is left: what is not greedy goes no further than where it is."""
        if not self.greedy:
            self._hold()

    def want_all(self) -> None:
        """Everything is wanted from now on."""
        self.greedy = True
        for fetch in self.fetches:
            fetch.limit = None
            fetch.ahead = self.read_ahead

    def want_no_more(self) -> None:
        """`want_all` is over: readers rule again."""
        self.greedy = False
        self._hold()

    def _hold(self) -> None:
        for fetch in self.fetches:
            # What nobody has read yet does not count as wanted, or each reader that comes and goes would take the
            # fetch another read-ahead further.
            fetch.limit, fetch.wanted = fetch.position, min(fetch.wanted, fetch.position)

    def ended(self, fetch: Fetch) -> None:
        self.fetches.remove(fetch)
        if not fetch.ahead:
            self._left.append(fetch.position)

    def measured(self, latency: float, rate: float, count: int = 0) -> None:
        """A request took `latency` seconds to its first byte, and its `count` bytes then came at `rate` bytes a second:
        reading through a gap is as good as asking anew while it takes no longer."""
        self._latency = min(self._latency, latency)
        if count >= _SAMPLE:
            # What had gathered before the first look makes a short request seem faster than its connection is.
            self._rate = min(self._rate or rate, rate)
        self._gap = int(min(max(latency * rate, LEAST_GAP), MOST_GAP))

    def _start(self, start: int, stop: int, *, short: bool = False) -> Fetch:
        ahead = FIRST_AHEAD if self.ranged and not self.greedy else self.read_ahead
        if short and self.ranged and not self.greedy:
            ahead = 0
        return self._begin(start, stop, None if self.greedy else max(stop, start + ahead), ahead)

    def _begin(self, start: int, stop: int, limit: int | None, ahead: int) -> Fetch:
        fetch = Fetch(start, stop, limit, ahead)
        self.fetches.append(fetch)
        return fetch

    def _nearest(self, missing: int) -> Fetch | None:
        """The fetch that will bring `missing` soonest, if any will soon enough."""
        if not self.ranged:
            return self.fetches[0] if self.fetches else None
        coming = [f for f in self.fetches if f.position <= missing and missing <= self._reach(f)]
        return max(coming, key=_position, default=None)

    def _reach(self, fetch: Fetch) -> int:
        """The last byte that the fetch brings soon."""
        if self._jumping and fetch.resting:
            return fetch.position + LEAST_GAP  # it would have to begin anew, and somebody may be there by chance
        return max(fetch.position + self._gap, fetch.wanted + REORDER) if fetch.stop is None else fetch.stop - 1

    def _allow(self, fetch: Fetch, stop: int) -> None:
        fetch.wanted = max(fetch.wanted, stop)
        if fetch.limit is not None:
            # INVARIANT: a fetch is allowed at most its read-ahead past the furthest reader.
            ahead = fetch.ahead if fetch.position > fetch.start else 0
            fetch.limit = max(fetch.limit, fetch.wanted + ahead)


def _position(fetch: Fetch) -> int:
    return fetch.position
