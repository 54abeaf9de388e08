"""A file that is a heap: blocks of any length are taken and given back inside it, and other programs map it.

Everything is in the file: a head, the lists of free blocks, and the blocks, each with its length before it. Places are
offsets from the start of the file, never addresses. The file grows by whole steps without being rewritten, and never
shrinks while it is in use, because a program that mapped it would then die at its next look.

One writer (`Heap`), any number of readers (`streamfs.board.reader`). Numbers in the heap are 8 bytes in the machine's
own order and are stored by one aligned store each, so that a reader sees the old number or the new one.

A block is a multiple of 16 bytes at a multiple of 16:

    word 0      its length, + 1 where it is taken, + 2 where the block before it is taken
    taken:      what its owner keeps there
    free:       word 1 the next, word 2 the previous free block of its class (0: none); last word its length again

Free blocks never touch: two neighbours that are given back become one. After the last block stands a word of 1 or 3, a
taken block of length 0. Free blocks are listed by class of length: one class for each multiple of 16 below 1024, then
eight for each doubling.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from streamfs.errors import Damaged, NoSpace

HEAD = 4096
"""Bytes of the head; the first block follows."""
MAGIC = int.from_bytes(b"sfboard\x01", "little")
"""The first word. A file of a machine with the other byte order has it reversed, and is not read."""

# Words of the head, by index.
W_MAGIC, W_LENGTH, W_ROOT, W_CLEAN, W_USED, W_BLOCKS = range(6)
W_OWN = 8
"""The first of the words that belong to whoever uses the heap; up to `W_BINS`."""
W_BINS = 64

_TAKEN, _BEFORE_TAKEN, _FLAGS = 1, 2, 15
_SMALLEST = 32
_LINEAR = 1024  # bytes; below it each multiple of 16 is a class
_CLASSES = 64 + 8 * 36
_GRAIN = 64 * 1024  # the file's length is a multiple of it, but for the head


class Summary(NamedTuple):
    """What `Heap.check` found. Bytes count whole blocks, their lengths' words too."""

    taken: int
    taken_bytes: int
    free: int
    free_bytes: int
    largest_free: int


class Heap:
    """The writer's end of a heap. For one thread.

    INVARIANT between two calls: blocks follow one another without a hole up to the end; no two free ones touch; each
    free one is in the list of its class, and `_classes` has a bit for each class that lists any.
    """

    def __init__(self, fd: int, length: int, limit: int) -> None:
        self._fd = fd
        self._limit = limit
        self._classes = 0
        self._map(length)

    @classmethod
    def create(cls, path: Path, limit: int = 1 << 40) -> Self:
        """A new heap in a new file, 0600. It may grow to `limit` bytes. Raises OSError, FileExistsError too."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            length = HEAD + _GRAIN
            os.posix_fallocate(fd, 0, length)  # not a file with holes: a full disk must be an error now, not a SIGBUS
            heap = cls(fd, length, limit)
        except BaseException:
            os.close(fd)
            path.unlink()
            raise
        words = heap.words
        words[W_LENGTH] = length
        heap._end(length, _TAKEN | _BEFORE_TAKEN)
        heap._make_free(HEAD, length - 16 - HEAD, _BEFORE_TAKEN)
        words[W_MAGIC] = MAGIC
        return heap

    @classmethod
    def open(cls, path: Path, limit: int = 1 << 40) -> Self:
        """A heap that its writer had closed. Raises Damaged for one that it had not (it was killed: make a new one),
        and for what is none; OSError."""
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            length = os.fstat(fd).st_size
            if length < HEAD + _GRAIN or length % 16:
                raise Damaged(f"{path} is no heap")
            heap = cls(fd, length, limit)
        except BaseException:
            os.close(fd)
            raise
        words = heap.words
        if words[W_MAGIC] != MAGIC or words[W_LENGTH] != length or words[W_CLEAN] != 1:
            heap._release()
            raise Damaged(f"{path} was not closed by its writer, or is no heap")
        words[W_CLEAN] = 0
        for index in range(_CLASSES):
            if words[W_BINS + index]:
                heap._classes |= 1 << index
        return heap

    def close(self) -> None:
        """Say that all is in order, and let go of the file. Safe to call again."""
        if self._fd >= 0:
            self.words[W_CLEAN] = 1
            self._release()

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def _release(self) -> None:
        self.words.release()
        self.bytes.close()
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _map(self, length: int) -> None:
        self.bytes = mmap.mmap(self._fd, length)
        """The whole file. Replaced when it grows: do not keep it over a call of `take` or `resize`."""
        self.words = memoryview(self.bytes).cast("Q")
        """The same as words of 8 bytes; the word at offset x is number x / 8."""

    # Taking and giving back

    def take(self, size: int) -> int:
        """The offset of `size` bytes (at least 1), a multiple of 8. Raises NoSpace where the file cannot grow."""
        need = max(_SMALLEST, (size + 8 + 15) & ~15)
        block = self._find(need)
        if not block:
            self._grow(need)
            block = self._find(need)
        words = self.words
        at = block >> 3
        head = words[at]
        length = head & ~_FLAGS
        self._unlist(block, length)
        if length - need >= _SMALLEST:
            words[at] = need | _TAKEN | (head & _BEFORE_TAKEN)
            self._list(block + need, length - need, _BEFORE_TAKEN)
        else:
            need = length
            words[at] = head | _TAKEN
            words[(block + length) >> 3] |= _BEFORE_TAKEN
        words[W_USED] += need
        words[W_BLOCKS] += 1
        return block + 8

    def give(self, offset: int) -> None:
        """Give back what `take` gave. Raises ValueError for anything else, as far as that can be seen."""
        words = self.words
        block = offset - 8
        at = block >> 3
        head = words[at] if offset % 16 == 8 and HEAD <= block < words[W_LENGTH] - 16 else 0
        if not head & _TAKEN:
            raise ValueError(f"no block was taken at {offset}")
        length = head & ~_FLAGS
        words[W_USED] -= length
        words[W_BLOCKS] -= 1
        self._make_free(block, length, head & _BEFORE_TAKEN)

    def room(self, offset: int) -> int:
        """How many bytes may be kept at `offset`, which was taken: at least as many as were asked for."""
        return (self.words[(offset - 8) >> 3] & ~_FLAGS) - 8

    def resize(self, offset: int, size: int) -> int:
        """Make a block that was taken `size` bytes long: in its place where it shrinks or what follows is free, else at
        another, with its bytes. Gives its offset. Raises NoSpace; then it is as it was."""
        need = max(_SMALLEST, (size + 8 + 15) & ~15)
        words = self.words
        block = offset - 8
        at = block >> 3
        head = words[at]
        length = head & ~_FLAGS
        if length < need:
            follows = words[(block + length) >> 3]
            if follows & _TAKEN or length + (follows & ~_FLAGS) < need:
                return self._move(offset, length - 8, size)
            self._unlist(block + length, follows & ~_FLAGS)
            whole = length + (follows & ~_FLAGS)
            words[W_USED] += whole - length
            length = whole
            words[at] = length | (head & _FLAGS)
            words[(block + length) >> 3] |= _BEFORE_TAKEN
        if length - need >= _SMALLEST:
            words[at] = need | (head & _FLAGS)
            words[W_USED] -= length - need
            self._make_free(block + need, length - need, _BEFORE_TAKEN)
        return offset

    def _move(self, offset: int, kept: int, size: int) -> int:
        there = self.take(size)
        self.bytes[there : there + kept] = self.bytes[offset : offset + kept]
        self.give(offset)
        return there

    # Free blocks

    def _find(self, need: int) -> int:
        """A free block of at least `need` bytes; 0 where there is none."""
        words = self.words
        index = _class(need)
        block = words[W_BINS + index]
        if block and words[block >> 3] & ~_FLAGS >= need:
            return block
        larger = self._classes >> (index + 1)
        if larger:
            return words[W_BINS + index + (larger & -larger).bit_length()]
        while block:  # nothing in a larger class: one of the same class may do before the file grows
            if words[block >> 3] & ~_FLAGS >= need:
                return block
            block = words[(block >> 3) + 1]
        return 0

    def _make_free(self, block: int, length: int, before: int) -> None:
        """The bytes are free now: join them with free neighbours, and list the whole. `before`: _BEFORE_TAKEN or 0."""
        words = self.words
        follows = words[(block + length) >> 3]
        if not follows & _TAKEN:
            self._unlist(block + length, follows & ~_FLAGS)
            length += follows & ~_FLAGS
        if not before:
            previous = words[(block >> 3) - 1]
            block -= previous
            self._unlist(block, previous)
            length += previous
            before = words[block >> 3] & _BEFORE_TAKEN
        self._list(block, length, before)
        words[(block + length) >> 3] &= ~_BEFORE_TAKEN

    def _list(self, block: int, length: int, before: int) -> None:
        words = self.words
        at = block >> 3
        index = _class(length)
        first = words[W_BINS + index]
        words[at] = length | before
        words[at + 1] = first
        words[at + 2] = 0
        words[(block + length - 8) >> 3] = length
        if first:
            words[(first >> 3) + 2] = block
        words[W_BINS + index] = block
        self._classes |= 1 << index

    def _unlist(self, block: int, length: int) -> None:
        words = self.words
        at = block >> 3
        following, previous = words[at + 1], words[at + 2]
        if following:
            words[(following >> 3) + 2] = previous
        if previous:
            words[(previous >> 3) + 1] = following
            return
        index = _class(length)
        words[W_BINS + index] = following
        if not following:
            self._classes &= ~(1 << index)

    # The file

    def _grow(self, need: int) -> None:
        old: int = self.words[W_LENGTH]
        step = max(need + 32, old // 4)
        length = min(old + (step + _GRAIN - 1) // _GRAIN * _GRAIN, self._limit & ~15)
        if length < old + need + 32:
            raise NoSpace(f"the board may not grow past {self._limit} bytes")
        try:
            os.posix_fallocate(self._fd, old, length - old)
        except OSError as error:
            raise NoSpace(f"the board cannot grow: {error.strerror}") from error
        self.words.release()
        self.bytes.close()
        self._map(length)
        words = self.words
        before = words[(old - 16) >> 3] & _BEFORE_TAKEN
        self._end(length, _TAKEN)
        self._make_free(old - 16, length - old, before)
        words[W_LENGTH] = length  # last: readers map no further than this

    def _end(self, length: int, head: int) -> None:
        self.words[(length - 16) >> 3] = head

    def check(self) -> Summary:
        """Walk over everything. Raises Damaged where an invariant does not hold."""
        words, length = self.words, self.words[W_LENGTH]
        free: dict[int, int] = {}
        taken = taken_bytes = 0
        block, before = HEAD, _BEFORE_TAKEN
        while block < length - 16:
            head = words[block >> 3]
            size = head & ~_FLAGS
            _expect(size >= _SMALLEST and block + size <= length - 16, f"the block at {block} is {size} bytes long")
            _expect(head & _BEFORE_TAKEN == before, f"the block at {block} is wrong about the one before it")
            if head & _TAKEN:
                taken, taken_bytes, before = taken + 1, taken_bytes + size, _BEFORE_TAKEN
            else:
                _expect(bool(before), f"two free blocks meet at {block}")
                _expect(words[(block + size - 8) >> 3] == size, f"the free block at {block} ends wrongly")
                free[block], before = size, 0
            block += size
        _expect(block == length - 16 and words[block >> 3] == _TAKEN | before, "the end is not where it should be")
        _expect(words[W_BLOCKS] == taken and words[W_USED] == taken_bytes, "the counts are wrong")
        listed = {}
        for index in range(_CLASSES):
            block, previous = words[W_BINS + index], 0
            _expect(bool(block) == bool(self._classes >> index & 1), f"the bit of class {index} is wrong")
            while block:
                _expect(block in free and block not in listed, f"class {index} lists {block}")
                _expect(_class(free[block]) == index, f"{block} is in the wrong class")
                _expect(words[(block >> 3) + 2] == previous, f"{block} is wrong about who lists it")
                listed[block] = index
                block, previous = words[(block >> 3) + 1], block
        _expect(len(listed) == len(free), "some free blocks are not listed")
        return Summary(taken, taken_bytes, len(free), sum(free.values()), max(free.values(), default=0))


def _class(length: int) -> int:
    """The class of a block of `length` bytes. A block of a higher class is longer than any of a lower one."""
    if length < _LINEAR:
        return length >> 4
    doublings = length.bit_length() - 11
    return 64 + doublings * 8 + (length >> (doublings + 7) & 7)


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise Damaged(f"the heap is damaged: {what}")
