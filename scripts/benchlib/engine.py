"""The engine alone, beside what a program would otherwise write: `SpooledTemporaryFile` and a list of chunks, each
under a lock, and a local file. No mount, no network, no other process.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol

from streamfs import StreamBuffer

BEGIN, END = "<!-- engine: begin -->", "<!-- engine: end -->"
CHUNK = 64 * 1024
MIB = 1 << 20
READERS = (1, 4, 16, 64, 256)
_CONTENT = random.Random(1).randbytes(CHUNK)


def _chunks(size: int) -> Iterator[bytearray]:
    """A source as most are: one piece of memory, filled anew each time."""
    piece = bytearray(_CONTENT)
    for _ in range(size // CHUNK):
        yield piece


class Reader(Protocol):
    def read(self, offset: int, size: int) -> bytes: ...
    def close(self) -> None: ...


class ChunkList:
    """A list of chunks, under a lock."""

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._chunks: list[bytes] = []
        self._ends: list[int] = []
        for chunk in _chunks(size):
            with self._lock:
                self._chunks.append(bytes(chunk))
                self._ends.append((self._ends[-1] if self._ends else 0) + len(chunk))

    def read(self, offset: int, size: int) -> bytes:
        with self._lock:
            index = bisect_right(self._ends, offset)
            parts = []
            while size > 0 and index < len(self._chunks):
                chunk = self._chunks[index]
                start = offset - (self._ends[index] - len(chunk))
                part = chunk[start : start + size]
                parts.append(part)
                offset, size, index = offset + len(part), size - len(part), index + 1
            return b"".join(parts)

    def close(self) -> None:
        self._chunks.clear()


class Spooled:
    """A SpooledTemporaryFile, whose one position is under a lock."""

    def __init__(self, size: int, most: int) -> None:
        self._lock = threading.Lock()
        self._file = tempfile.SpooledTemporaryFile(max_size=most)  # noqa: SIM115
        for chunk in _chunks(size):
            with self._lock:
                self._file.seek(0, os.SEEK_END)
                self._file.write(chunk)

    def read(self, offset: int, size: int) -> bytes:
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size)

    def close(self) -> None:
        self._file.close()


class LocalFile:
    """A plain file, without a lock: pread(2)."""

    def __init__(self, size: int) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        for chunk in _chunks(size):
            self._file.write(chunk)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)

    def close(self) -> None:
        self._file.close()


def _engine(size: int, most: int) -> StreamBuffer:
    buffer = StreamBuffer(_chunks(size), max_size=most)
    buffer.read(size - 1, 1)
    return buffer


def _makers(size: int, most: int, *, memory_only: bool) -> dict[str, Callable[[], Reader]]:
    made: dict[str, Callable[[], Reader]] = {
        "StreamBuffer": lambda: _engine(size, most),
        "SpooledTemporaryFile": lambda: Spooled(size, most),
        "list of chunks": lambda: ChunkList(size),
        "local file": lambda: LocalFile(size),
    }
    if not memory_only:
        del made["list of chunks"]  # it has no disk
    return made


def _sequential(reader: Reader, size: int) -> None:
    for offset in range(0, size, CHUNK):
        if len(reader.read(offset, CHUNK)) != CHUNK:
            raise AssertionError("a short read")


def _scattered(reader: Reader, size: int) -> None:
    place = random.Random(2)
    for _ in range(size // CHUNK * 4):
        offset = place.randrange(size - 4096)
        if reader.read(offset, 4096)[0] != _CONTENT[offset % CHUNK]:
            raise AssertionError("a wrong byte")


def _crowd(reader: Reader, size: int, readers: int) -> None:
    share = size // readers // CHUNK * CHUNK
    threads = [threading.Thread(target=_sequential, args=(reader, share)) for _ in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(size: int, rounds: int) -> list[tuple[str, dict[str, float]]]:
    """(work, MB per second of processor time of each contender) in the order of the table; medians of the rounds, who
    begins changes. Other programs on the machine then count little."""
    figures: dict[str, dict[str, list[float]]] = {}
    for most, where in ((2 * size, "memory"), (5 * MIB, "disk")):
        makers = _makers(size, most, memory_only=where == "memory")
        works: dict[str, Callable[[Reader], None]] = {
            f"read in order from {where}, 64 KiB": lambda reader: _sequential(reader, size),
            f"read here and there from {where}, 4 KiB": lambda reader: _scattered(reader, size),
        }
        for count in READERS:
            works[f"read from {where} by {count} threads"] = lambda reader, count=count: _crowd(reader, size, count)
        amount = dict.fromkeys(works, size)
        amount[f"read here and there from {where}, 4 KiB"] = size // CHUNK * 4 * 4096
        names = list(makers)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                began = time.process_time()
                with closing(makers[name]()) as reader:
                    _note(figures, f"append to {where}", name, size, began)
                    for work, do in works.items():
                        began = time.process_time()
                        do(reader)
                        _note(figures, work, name, amount[work], began)
    return [
        (work, {name: statistics.median(taken) for name, taken in by_name.items()}) for work, by_name in figures.items()
    ]


def _note(figures: dict[str, dict[str, list[float]]], work: str, name: str, amount: int, began: float) -> None:
    figures.setdefault(work, {}).setdefault(name, []).append(amount / (time.process_time() - began) / 1e6)


def table(measured: list[tuple[str, dict[str, float]]]) -> str:
    others = ("SpooledTemporaryFile", "list of chunks", "local file")
    lines = [f"| work | StreamBuffer | {' | '.join(others)} |", "|---|---|---|---|---|"]
    for work, by_name in measured:
        own = by_name["StreamBuffer"]
        cells = [
            f"{by_name[name]:.0f} ({own / by_name[name]:.2f} of it)" if name in by_name else "-" for name in others
        ]
        lines.append(f"| {work} | {own:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def section(measured: list[tuple[str, dict[str, float]]], size: int, rounds: int) -> str:
    where = f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} processors"
    return (
        f"{size // MIB} MiB, {rounds} rounds, medians, MB per second of processor time; in brackets what StreamBuffer "
        f"reaches of it. {where}.\n\n{table(measured)}"
    )


def write(page: Path, text: str) -> None:
    """Put `text` between the marks of `page`."""
    head, rest = page.read_text().split(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def run(page: Path, *, quick: bool, rounds: int | None) -> int:
    size, turns = (32 if quick else 128) * MIB, rounds or (2 if quick else 3)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="streamfs-bench-"))
        before, tempfile.tempdir = tempfile.tempdir, folder
        stack.callback(setattr, tempfile, "tempdir", before)
        measured = measure(size, turns)
    print(table(measured))
    if not quick:
        write(page, section(measured, size, turns))
        print(f"written: {page}")
    return 0
