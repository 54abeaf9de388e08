"""A disk that forgets what was not synced: it follows every write and sync, and gives any state a power cut may leave.

What was not synced may be there or not, sector by sector and in any order; so may names and sizes. Space that was
taken but never written may show what a removed file held there.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_DESCRIPTORS = Path("/proc/self/fd")


class PowerCut(BaseException):
    """The machine stops here. Not an Exception: no code of ours may handle it."""


class Kill(PowerCut):
    """Only the process stops here."""


@dataclass(eq=False)
class _File:
    durable: bytes = b""
    current: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # (offset, data), or (size, None)

    def write(self, offset: int, data: bytes) -> None:
        if offset > len(self.current):
            self.current.extend(bytes(offset - len(self.current)))
        self.current[offset : offset + len(data)] = data
        self.pending.append((offset, data))

    def resize(self, size: int) -> None:
        del self.current[size:]
        self.current.extend(bytes(size - len(self.current)))
        self.pending.append((size, None))

    def sync(self) -> None:
        self.durable = bytes(self.current)
        self.pending.clear()

    def after_cut(self, chance: random.Random, kept: float, sector: int, stale: bytes) -> bytes:
        size = len(self.durable)
        image = bytearray(self.durable) + stale[size:]
        for offset, data in self.pending:
            if data is None:
                if chance.random() < kept:
                    if offset < size:
                        image[offset:] = bytes(max(0, len(image) - offset))
                    size = offset
                continue
            if offset + len(data) > size and chance.random() < kept:
                size = offset + len(data)
            at = 0
            while at < len(data):
                stop = min(len(data), at + sector - (offset + at) % sector)
                if chance.random() < kept:
                    if offset + stop > len(image):
                        image.extend(bytes(offset + stop - len(image)))
                    image[offset + at : offset + stop] = data[at:stop]
                at = stop
        return bytes(image[:size]) + bytes(max(0, size - len(image)))


class Disk:
    """Follows the calls on `folder`, whose content counts as durable now. `around` is for `tests.crash.killer.patch`
    or a monkeypatch; calls go through to the real files too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stop_at: int | None = None
        self.stop_with: type[PowerCut] = PowerCut
        self.calls = 0
        self.begin()

    def begin(self) -> None:
        self._names: dict[str, _File] = {}
        self._opened: dict[int, _File | None] = {}  # None: the folder itself
        self._pending: list[tuple[str, _File | None]] = []
        self._removed: dict[str, bytes] = {}  # by suffix
        for path in self.folder.iterdir():
            file = self._names[path.name] = _File()
            file.write(0, path.read_bytes())
            file.sync()
        self._durable = dict(self._names)

    def around(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name == "open":
            return self._open(real, arguments)
        first = arguments[0]
        if name == "unlink":
            if Path(first).parent != self.folder:
                return real(*arguments)
        elif first not in self._opened:
            return real(*arguments)
        self._count()
        position = os.lseek(first, 0, os.SEEK_CUR) if name == "write" else 0
        result = real(*arguments)
        self._note(name, arguments, position, result)
        return result

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.stop_at:
            raise self.stop_with

    def _open(self, real: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
        path, flags = Path(arguments[0]), arguments[1]
        if path.parent == _DESCRIPTORS:  # opened once more
            again: int = real(*arguments)
            self._opened.pop(again, None)
            if int(path.name) in self._opened:
                self._opened[again] = self._opened[int(path.name)]
            return again
        if path != self.folder and path.parent != self.folder:
            fd: int = real(*arguments)
            self._opened.pop(fd, None)
            return fd
        if flags & os.O_CREAT:
            self._count()
        fd = real(*arguments)
        self.opened(path, fd)
        return fd

    def opened(self, path: Path, fd: int) -> None:
        """A call has opened `path`, which is the folder or in it; whatever was not there was made."""
        if path == self.folder:
            self._opened[fd] = None
            return
        if path.name not in self._names:
            self._names[path.name] = _File()
            self._pending.append((path.name, self._names[path.name]))
        self._opened[fd] = self._names[path.name]

    def called(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        """A call was made by somebody else: for a trace that is played back. `write` is not among them."""
        if name == "unlink" or arguments[0] in self._opened:
            self.calls += 1
            self._note(name, arguments, 0, result)

    def closed(self, fd: int) -> None:
        self._opened.pop(fd, None)

    def _note(self, name: str, arguments: tuple[Any, ...], position: int, result: Any) -> None:
        if name == "unlink":
            path = Path(arguments[0])
            gone = self._names.pop(path.name)
            self._removed[path.suffix] = bytes(gone.current)
            self._pending.append((path.name, None))
            return
        file = self._opened[arguments[0]]
        if file is None:
            assert name == "fsync"
            self._durable = dict(self._names)
            self._pending.clear()
        elif name == "write":
            file.write(position, bytes(arguments[1][:result]))
        elif name == "pwrite":
            file.write(arguments[2], bytes(arguments[1][:result]))
        elif name == "pwritev":
            file.write(arguments[2], b"".join(arguments[1])[:result])
        elif name == "ftruncate":
            file.resize(arguments[1])
        elif name == "posix_fallocate":
            file.resize(max(len(file.current), arguments[1] + arguments[2]))
        elif name == "fsync":
            file.sync()

    def states(self, chance: random.Random, count: int) -> list[dict[str, bytes]]:
        """Some of the states that a power cut now may leave: names with what is in their files."""
        return [self._state(chance) for _ in range(count)]

    def _state(self, chance: random.Random) -> dict[str, bytes]:
        kept, sector = chance.choice([0.0, 0.5, 0.9, 1.0]), chance.choice([64, 512, 4096])
        stale = self._removed if chance.random() < 0.3 else {}
        names: dict[str, _File | None] = dict(self._durable)
        for name, file in self._pending:
            if chance.random() < kept:
                names[name] = file
        return {
            name: file.after_cut(
                chance, kept if chance.random() < 0.7 else chance.random(), sector, stale.get(Path(name).suffix, b"")
            )
            for name, file in names.items()
            if file is not None
        }
