"""Doubles for tests: bytes that name their place, streams that follow a script, threads that are always joined."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

WAIT = 30.0
"""Seconds after which a test that waits for an event has failed."""


def numbered_lines(size: int) -> bytes:
    """The first `size` bytes of "0\\n1\\n2\\n…"."""
    lines = []
    length = number = 0
    while length < size:
        line = b"%d\n" % number
        lines.append(line)
        length += len(line)
        number += 1
    return b"".join(lines)[:size]


def named_bytes(stream: str, generation: int, size: int) -> bytes:
    """`size` bytes, each a function of stream, generation and its offset, so that bytes out of place show."""
    return hashlib.shake_128(f"{stream}\0{generation}".encode()).digest(size)


def chunked(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def flip_byte(path: Path, offset: int) -> None:
    """Change one byte of a file, in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 0x40]))


class Gate:
    """A place in a script where the stream stalls until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def await_reached(self) -> None:
        assert self.reached.wait(WAIT), "the stream was not pulled up to the gate"

    def open(self) -> None:
        self.opened.set()


class ScriptedStream:
    """An iterable that gives chunks, stalls at gates and raises errors as its steps say.

    `starts`: how often iteration began. `pulled`: chunks given. `closed`: how often `close` was called.
    `together`: whether two threads were ever inside at once.
    """

    def __init__(self, steps: Sequence[Any]) -> None:
        self._steps = iter(steps)
        self._inside = threading.Lock()
        self.starts = 0
        self.pulled = 0
        self.closed = 0
        self.together = False

    def __iter__(self) -> ScriptedStream:
        return self

    def __next__(self) -> Any:
        if not self._inside.acquire(blocking=False):
            self.together = True
            raise AssertionError("the stream was pulled by two threads at once")
        try:
            if not self.pulled:
                self.starts += 1
            for step in self._steps:
                if isinstance(step, Gate):
                    step.reached.set()
                    if not step.opened.wait(WAIT):
                        raise AssertionError("nobody opened the gate")
                elif isinstance(step, BaseException):
                    raise step
                else:
                    self.pulled += 1
                    return step
            raise StopIteration
        finally:
            self._inside.release()

    def close(self) -> None:
        self.closed += 1


def generated(steps: Sequence[Any]) -> Iterator[Any]:
    """As ScriptedStream, but a generator: after it raised once, it looks like one that ended."""
    yield from ScriptedStream(steps)


class Crew:
    """Threads of one test: `start` them, `join` gives their results in order or raises the first error.

    As a context manager it joins at the end; a thread that does not end within WAIT fails the test.
    """

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._results: list[Any] = []
        self._errors: list[BaseException] = []

    def start(self, work: Callable[..., Any], *args: Any) -> threading.Thread:
        index = len(self._threads)
        self._results.append(None)

        def run() -> None:
            try:
                self._results[index] = work(*args)
            except BaseException as error:
                self._errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def join(self) -> list[Any]:
        for thread in self._threads:
            thread.join(WAIT)
            assert not thread.is_alive(), "a thread hangs"
        if self._errors:
            raise self._errors[0]
        return self._results

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.join()


def poll_until(condition: Callable[[], bool]) -> None:
    """Give other threads the processor until `condition` holds; for what no event tells, such as being enlisted."""
    pause = threading.Event()
    for _ in range(int(WAIT * 1000)):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("the condition never came true")


def read_terminal(ours: int) -> bytes:
    """What was written to the other end of a pseudo-terminal until all of its users have closed it. Closes `ours`."""
    shown = b""
    with contextlib.suppress(OSError):  # EIO once the other end has closed
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    return shown


def has_direct_writes(folder: Path) -> bool:
    """Whether files in `folder` can be written past the page cache."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            os.close(os.open(probe.name, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def refuse_writes(patch: pytest.MonkeyPatch, refuse: Callable[..., int]) -> None:
    """Every write to a recording's data is `refuse` from now on, whichever way it goes."""
    for name in ("pwrite", "pwritev"):
        patch.setattr(os, name, refuse)


def data_on_disk(cache: Path) -> int:
    """Bytes that the data files of a cache directory take. Others may be removing them meanwhile."""
    total = 0
    for path in cache.glob("*.data"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total
