"""Fingerprints of a run of bytes, so that a second reading can be compared with the first without keeping it."""

from __future__ import annotations

import crc32c

FIRST_MARK = 4096  # a live stream read again is found out after this many bytes


class Marks:
    """CRC32C of everything added so far, and of every beginning whose length is FIRST_MARK times a power of two."""

    def __init__(self) -> None:
        self.offset = 0
        self._crc = 0
        self._marks: list[tuple[int, int]] = []  # (length of the beginning, its CRC), ascending
        self._next = FIRST_MARK

    def add(self, data: memoryview) -> None:
        while self.offset + len(data) >= self._next:
            head = data[: self._next - self.offset]
            self._crc = crc32c.crc32c(head, self._crc)
            self.offset = self._next
            self._marks.append((self.offset, self._crc))
            self._next *= 2
            data = data[len(head) :]
        if data:
            self._crc = crc32c.crc32c(data, self._crc)
            self.offset += len(data)

    def agrees(self, other: Marks) -> bool:
        """False where both readings reached a length and differed there."""
        common = min(len(self._marks), len(other._marks))
        if self._marks[:common] != other._marks[:common]:
            return False
        return self.offset != other.offset or self._crc == other._crc
