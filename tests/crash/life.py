"""The engine at work until it is killed, and what must be true of what it left."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from streamfs.cache import Cache
from streamfs.engine.buffer import Buffer
from streamfs.engine.pool import LARGE, Pool
from streamfs.engine.recording import BLOCK, DamagedExtent, Header, Recording, unlink_recording
from tests.fakes import named_bytes

STREAM, KEY = 7, "7:source"
SIZE = 2 * BLOCK + 777

content = lru_cache(maxsize=64)(named_bytes)
"""content(KEY, generation, SIZE): every byte names its stream, version and offset."""


@dataclass
class Claims:
    """What the engine has said before it was killed."""

    settled: int | None = None  # the generation that was reported whole and durable
    kept: list[tuple[int, int]] = field(default_factory=list)  # ranges that were reported to be on disk
    generation: int = 0  # whose they are

    def hear(self, words: list[int]) -> None:
        """One message of `Life`: [generation, settled, start, stop, start, stop, …]; it replaces what was said."""
        self.generation = words[0]
        self.settled = words[0] if words[1] else None
        self.kept = list(zip(words[2::2], words[3::2], strict=True))


def newest(folder: Path) -> Path | None:
    """The recording that a restarted cache finds, by its own search."""
    cache = Cache(folder, memory=LARGE, spill_threshold=0, size=None, ttl=1.0, is_kept=lambda _: True)
    cache.scan([STREAM])
    dormant = cache._dormant.get(STREAM)
    return None if dormant is None else dormant.path


class Life:
    """A random life of one stream's bytes in `folder`: fetched, spilled, settled, damaged, replaced by new versions."""

    def __init__(self, folder: Path, seed: int, tell: Callable[[list[int]], None], generation: int = 0) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self._tell = tell
        self._pool = Pool(4 * LARGE)
        self._generation = self._last = generation  # of the bytes, and the highest there ever was
        self.restart()

    def restart(self) -> None:
        """As after kill -9: all that is left is on disk."""
        path = newest(self._folder)
        recording = None if path is None else Recording.load(path)
        if recording is None or recording.header.key != KEY:
            if path is not None:
                unlink_recording(path)
            self._begin()
            return
        self._generation = recording.header.generation
        self._last = max(self._last, self._generation)
        self._buffer = Buffer(self._pool, size=SIZE, recording=recording)
        self._buffer.refetchable = True
        recording.ahead = self._random.choice([0, BLOCK, BLOCK])
        self._claim(settled=recording.durable and self._buffer.complete)

    def _begin(self) -> None:
        self._last += 1
        self._generation = self._last
        self._buffer = Buffer(self._pool, size=SIZE)
        self._buffer.refetchable = True
        path = self._folder / f"{STREAM}-{self._generation}.data"
        recording = Recording.create(path, Header(key=KEY, generation=self._generation))
        recording.ahead = self._random.choice([0, BLOCK, BLOCK])
        self._buffer.record(recording)

    def _claim(self, *, settled: bool = False) -> None:
        recording = self._buffer.recording
        assert recording is not None
        self._tell([self._generation, settled, *(edge for run in recording.present() for edge in run)])

    def go_on(self) -> None:
        """One more thing happens."""
        doing = self._random.choices(
            [self._bring, self._spill, self._settle, self._lose, self._replace, self._read], [8, 4, 2, 1, 1, 2]
        )[0]
        doing()

    def _bring(self, position: int | None = None, most: int | None = None) -> None:
        at = self._random.choice([self._random.randrange(SIZE), 0, BLOCK]) if position is None else position
        writer = self._buffer.writer(at)
        left = self._random.choice([100, 3000, BLOCK, SIZE]) if most is None else most
        while left and not writer.met:
            room = writer.room()
            assert room is not None
            count = min(left, len(room))
            room[:count] = content(KEY, self._generation, SIZE)[writer.position : writer.position + count]
            writer.wrote(count)
            left -= count
        writer.close()

    def _spill(self) -> None:
        recording = self._buffer.recording
        assert recording is not None
        recording.passed = self._random.choice([0, SIZE, SIZE, SIZE])  # through the page cache, or past it
        self._buffer.spill(self._random.choice([1, BLOCK, SIZE]), all_of_it=True)
        self._claim()

    def _settle(self) -> None:
        while True:
            while (gap := self._buffer.first_gap(0)) is not None:
                self._bring(gap, SIZE)
            try:
                self._buffer.settle_for_good()
            except ValueError:
                continue  # what an earlier life left was damaged
            break
        self._claim(settled=True)

    def _lose(self) -> None:
        recording = self._buffer.recording
        assert recording is not None
        extents = recording.extents(0, SIZE)
        if extents:
            lost = self._random.choice(extents)
            self._tell([self._generation, 0])
            self._buffer._drop_damaged(DamagedExtent(lost.start, lost.stop))
            self._claim()

    def _replace(self) -> None:
        recording = self._buffer.recording
        assert recording is not None
        self._tell([self._generation, 0])
        self._buffer.close()
        recording.unlink()
        self._begin()

    def _read(self) -> None:
        start = self._buffer.next_present(self._random.randrange(SIZE))
        if start is not None:
            found = self._buffer.read_copy(start, 1000 if start + 1000 <= SIZE else SIZE - start)
            if isinstance(found, bytes):
                expected = content(KEY, self._generation, SIZE)[start : start + len(found)]
                assert found == expected, f"wrong bytes were served at {start}"


def scripted(folder: Path, tell: Callable[[list[int]], None]) -> None:
    """A life that does each thing that changes the disk once, in an order that gives each its consequence."""
    life = Life(folder, 1, tell)
    life._bring(0, SIZE // 2)
    life._spill()
    life.restart()
    life._bring(SIZE // 2, SIZE)
    life._settle()
    life.restart()
    life._lose()
    life._settle()
    life._replace()
    life._bring(BLOCK, 3000)
    life._spill()
    life._lose()
    life._settle()
    life.restart()


def check(folder: Path, claims: Claims, *, power_cut: bool) -> None:
    """Load what is in `folder` as a restarted daemon does. Raises AssertionError where that breaks a promise."""
    path = newest(folder)
    recording = None if path is None else Recording.load(path)
    if recording is None:
        assert claims.settled is None, "a durable recording is gone"
        assert power_cut or not claims.kept, "bytes that were on disk are gone"
        return
    generation = recording.header.generation
    assert recording.header.key == KEY
    assert claims.settled in (None, generation), "another version was found than the durable one"
    expected, whole = content(KEY, generation, SIZE), True
    for extent in recording.extents(0, 1 << 62):
        out = memoryview(bytearray(extent.stop - extent.start))
        try:
            recording.read([extent], out, wait=True)
        except DamagedExtent:
            whole = False
            continue
        assert out == expected[extent.start : extent.stop], f"wrong bytes at {extent.start}"
    assert whole or power_cut, "what was written before a kill does not check"
    present = recording.present()
    if recording.durable:
        assert recording.size == SIZE
        assert whole and present.covers(0, SIZE), "it says durable, but is not whole"
        assert path is not None and path.read_bytes() == expected, "the plain file is not the stream"
    assert claims.settled is None or recording.durable, "a durable recording is no more"
    if not power_cut and claims.generation == generation:
        for start, stop in claims.kept:
            assert present.covers(start, stop), f"bytes {start} to {stop} had been on disk"
