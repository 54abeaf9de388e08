"""The heap in a file: what is taken stays what it is, what is given back joins, and a closed heap opens again."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from streamfs.board.heap import HEAD, W_CLEAN, W_LENGTH, Heap
from streamfs.errors import Damaged, NoSpace
from tests.fakes import named_bytes


def fill(heap: Heap, offset: int, name: object, size: int) -> None:
    heap.bytes[offset : offset + size] = named_bytes(str(name), 0, size)


class HeapAgainstDict(RuleBasedStateMachine):
    """A heap beside a dict of what each block must hold; it is closed and opened again at any time."""

    blocks = Bundle("blocks")

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "heap"
        self.heap = Heap.create(self.path)
        self.model: dict[int, bytes] = {}
        self.made = 0

    def _content(self, size: int) -> bytes:
        self.made += 1
        return named_bytes(str(self.made), 0, size)

    @rule(target=blocks, size=st.one_of(st.integers(1, 200), st.integers(1, 70_000)))
    def take(self, size: int) -> list[int]:
        offset = self.heap.take(size)
        assert offset % 8 == 0
        assert self.heap.room(offset) >= size
        self.model[offset] = self._content(size)
        self.heap.bytes[offset : offset + size] = self.model[offset]
        return [offset]  # a list, as a block that moves is still the same one

    @rule(block=consumes(blocks))
    def give(self, block: list[int]) -> None:
        self.heap.give(block[0])
        del self.model[block[0]]

    @rule(block=blocks, size=st.one_of(st.integers(1, 200), st.integers(1, 70_000)))
    def resize(self, block: list[int], size: int) -> None:
        before = self.model.pop(block[0])
        offset = block[0] = self.heap.resize(block[0], size)
        kept = min(size, len(before))
        assert self.heap.bytes[offset : offset + kept] == before[:kept]
        self.model[offset] = before[:kept] + self._content(size - kept)
        self.heap.bytes[offset : offset + size] = self.model[offset]

    @rule()
    def close_and_open(self) -> None:
        self.heap.close()
        self.heap = Heap.open(self.path)

    @invariant()
    def everything_is_as_it_should(self) -> None:
        if not hasattr(self, "heap"):
            return
        assert self.heap.check().taken == len(self.model)
        for offset, content in self.model.items():
            assert self.heap.bytes[offset : offset + len(content)] == content
        assert self.heap.words[W_LENGTH] == self.path.stat().st_size

    def teardown(self) -> None:
        if hasattr(self, "heap"):
            for offset in list(self.model):
                self.heap.give(offset)
            summary = self.heap.check()
            assert (summary.taken, summary.free) == (0, 1)
            self.heap.close()
            self.folder.cleanup()


HeapAgainstDict.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestHeapAgainstDict = HeapAgainstDict.TestCase


def test_write_reopen_grow_a_record_reopen(tmp_path: Path) -> None:
    path = tmp_path / "heap"
    with Heap.create(path) as heap:
        first, second = heap.take(100), heap.take(100)
        fill(heap, first, "first", 100)
        fill(heap, second, "second", 100)
    with Heap.open(path) as heap:
        first = heap.resize(first, 5_000_000)
        fill(heap, first, "longer", 5_000_000)
    with Heap.open(path) as heap:
        assert heap.bytes[first : first + 5_000_000] == named_bytes("longer", 0, 5_000_000)
        assert heap.bytes[second : second + 100] == named_bytes("second", 0, 100)
        assert heap.check().taken == 2


@pytest.mark.parametrize("seed", range(10))
def test_freeing_in_any_order_gives_one_maximal_block(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with Heap.create(tmp_path / "heap") as heap:
        offsets = [heap.take(chance.randint(1, 2000)) for _ in range(1000)]
        chance.shuffle(offsets)
        for offset in offsets:
            heap.give(offset)
        summary = heap.check()
        assert summary.free == 1
        assert summary.largest_free == (tmp_path / "heap").stat().st_size - HEAD - 16


def test_a_million_allocations_reach_a_plateau_and_coalesce(tmp_path: Path) -> None:
    """1 B to 64 KiB, some hundreds at a time: the file stops growing early, and all of it comes back as one block."""
    chance = random.Random(7)
    path = tmp_path / "heap"
    sizes = []
    live: list[int] = []
    with Heap.create(path) as heap:
        for count in range(1_000_000):
            live.append(heap.take(1 << chance.randrange(17)))
            if len(live) > 300:
                at = chance.randrange(len(live))
                live[at], live[-1] = live[-1], live[at]
                heap.give(live.pop())
            if count % 100_000 == 99_999:
                sizes.append(path.stat().st_size)
        used = heap.check().taken_bytes
        for offset in live:
            heap.give(offset)
        summary = heap.check()
    assert sizes[-1] == sizes[2], f"the file went on growing: {sizes}"
    assert sizes[-1] < 4 * used
    assert (summary.taken, summary.free) == (0, 1)


def test_a_block_grows_in_its_place_where_what_follows_is_free(tmp_path: Path) -> None:
    with Heap.create(tmp_path / "heap") as heap:
        block, after = heap.take(100), heap.take(10_000)
        heap.take(1)
        heap.give(after)
        assert heap.resize(block, 9_000) == block
        assert heap.resize(block, 10) == block
        assert heap.resize(block, 50_000) != block
        heap.check()


def test_what_was_not_taken_cannot_be_given_back(tmp_path: Path) -> None:
    with Heap.create(tmp_path / "heap") as heap:
        block = heap.take(100)
        heap.give(block)
        for wrong in (block, block + 1, block + 16, 0, -8, 1 << 50):
            with pytest.raises(ValueError):
                heap.give(wrong)
        heap.check()


def test_growing_keeps_every_byte_where_it_is(tmp_path: Path) -> None:
    with Heap.create(tmp_path / "heap") as heap:
        block = heap.take(1000)
        fill(heap, block, "kept", 1000)
        before = (tmp_path / "heap").stat()
        for _ in range(100):
            heap.take(60_000)
        after = (tmp_path / "heap").stat()
        assert after.st_size > before.st_size + 6_000_000
        assert after.st_ino == before.st_ino
        assert heap.bytes[block : block + 1000] == named_bytes("kept", 0, 1000)


def test_a_heap_that_may_not_grow_is_as_it_was(tmp_path: Path) -> None:
    with Heap.create(tmp_path / "heap", limit=200_000) as heap:
        block = heap.take(50_000)
        with pytest.raises(NoSpace):
            heap.take(300_000)
        with pytest.raises(NoSpace):
            heap.resize(block, 300_000)
        assert heap.check().taken == 1
        heap.take(100_000)


def test_a_full_disk_is_an_error_not_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    with Heap.create(tmp_path / "heap") as heap:
        monkeypatch.setattr("os.posix_fallocate", full)
        with pytest.raises(NoSpace, match="No space left"):
            heap.take(1_000_000)
        assert heap.check().taken == 0


def test_a_heap_that_was_not_closed_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "heap"
    with Heap.create(path) as heap:
        heap.take(5)
    raw = bytearray(path.read_bytes())
    raw[8 * W_CLEAN] = 0
    path.write_bytes(raw)
    with pytest.raises(Damaged):
        Heap.open(path)
    path.write_bytes(b"x" * 100_000)
    with pytest.raises(Damaged):
        Heap.open(path)


def test_damage_is_found(tmp_path: Path) -> None:
    with Heap.create(tmp_path / "heap") as heap:
        blocks = [heap.take(100) for _ in range(10)]
        heap.give(blocks[4])
        heap.words[(blocks[4] - 8) >> 3] += 16
        with pytest.raises(Damaged):
            heap.check()
