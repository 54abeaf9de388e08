"""What stands in the heap: the board's own words of the head, its root, and its records.

A record is a block of the heap: a head of 24 bytes (`RECORD`), then JSON. Its checksum covers where it stands, what it
is and what it says, so that a reader which comes to a place that was given back and used again, or was being written,
knows. A record that changes is written anew at another place; then one store of 8 bytes makes the new one count. So
whenever the writer is stopped or killed, each record is there as a whole, before or after its change.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

from streamfs.board.heap import W_OWN

VERSION = 1
"""Counts up with each change that an older reader would misread."""

# Words of the head that are the board's, by index (see streamfs.board.heap).
W_VERSION, W_STATE, W_PID, W_BORN, W_BEAT, W_STREAMS, W_CHANGES = range(W_OWN, W_OWN + 7)

# Words of the root record, by index: offsets of records and of tables, and numbers.
R_FACTS, R_TABLE, R_RING, R_FIRST, R_NEXT, R_LISTENERS = range(6)
ROOT_BYTES = 8 * 8

# What W_STATE says.
FILLING, COMPLETE, CLOSED = 1, 2, 3

# Kinds of records.
K_FACTS, K_STREAM, K_EVENT, K_LISTENERS = 1, 2, 3, 4

RECORD = struct.Struct("=IIQQ")  # CRC-32 of all the rest and of the offset, bytes of JSON, kind, number
_SEAL = struct.Struct("=QIQQ")  # offset, bytes of JSON, kind, number


def sealed(offset: int, kind: int, number: int, data: bytes) -> bytes:
    """The record to store at `offset`."""
    return RECORD.pack(_checksum(offset, kind, number, data), len(data), kind, number) + data


def _checksum(offset: int, kind: int, number: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(_SEAL.pack(offset, len(data), kind, number)))


def unsealed(mapped: Any, length: int, offset: int, kind: int, number: int) -> bytes | None:
    """The JSON of the record at `offset` of the `length` bytes that are mapped; None where no whole one of this kind
    and number stands there."""
    if offset % 8 or not 0 < offset <= length - RECORD.size:
        return None
    crc, size, found_kind, found_number = RECORD.unpack_from(mapped, offset)
    if found_kind != kind or found_number != number or size > length - offset - RECORD.size:
        return None
    data: bytes = mapped[offset + RECORD.size : offset + RECORD.size + size]
    return data if crc == _checksum(offset, kind, number, data) else None


def born(pid: int) -> int:
    """When the process began, in the kernel's ticks; 0 where there is none. With the pid it names a process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
