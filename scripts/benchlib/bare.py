"""The least that a file system in Python can be: one file of one URL, for one reader. The ceiling for streamfs.

    python bare.py MOUNTPOINT URL direct|cached
    python bare.py MOUNTPOINT SIZE direct|cached     a file "file" of so many bytes, out of memory

What it receives goes into a ring of memory and from there to the kernel. It keeps, checks and shares nothing, knows no
error but a traceback, and waits for its server with the event loop standing still, so that no other program in Python
on trio and pyfuse3 is faster. Its main loop is streamfs' own (streamfs.turns), which is faster than pyfuse3's.
"""

from __future__ import annotations

import re
import socket
import stat
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pyfuse3
import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from streamfs import mounting, turns

FILE = 2  # its inode
RING = 64 << 20
SMALL = 128 << 10  # a read of at most so many bytes, elsewhere than the last, brings no more
AROUND = 8 << 20  # the kernel's read-ahead sends requests side by side, in any order


class Link:
    """A connection to the server of one URL."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname, parts.port or 80)
        self._request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nRange: bytes=%s\r\n\r\n"
        self._socket: socket.socket | None = None
        self._head = bytearray(16 << 10)
        self.left = 0  # bytes of the body still to come
        self.size = 0  # of the file

    def ask(self, wanted: str) -> bytes:
        """Begin another body; gives its first bytes."""
        count = 0 if self._socket is None or self.left else self._send(wanted)
        if not count:  # there is no connection, or the server had enough of it
            if self._socket is not None:
                self._socket.close()
            self._socket = socket.create_connection(self._address)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            count = self._send(wanted)
            assert count, "the server ended the connection"
        while (end := self._head.find(b"\r\n\r\n", 0, count)) < 0:
            more = self._socket.recv_into(memoryview(self._head)[count:])
            assert more, "the server ended the connection"
            count += more
        told = re.search(rb"Content-Range: bytes (\d+)-(\d+)/(\d+)", self._head[:end], re.I)
        assert told is not None, "the server knows no ranges"
        self.size = int(told[3])
        first = bytes(self._head[end + 4 : count])
        self.left = int(told[2]) + 1 - int(told[1]) - len(first)
        return first

    def _send(self, wanted: str) -> int:
        """Ask; gives how many bytes of the reply are there, 0 where the server has ended the connection."""
        assert self._socket is not None
        try:
            self._socket.sendall((self._request % wanted).encode())
            return self._socket.recv_into(self._head)
        except (ConnectionResetError, BrokenPipeError):
            return 0

    def receive_into(self, view: memoryview) -> None:
        """All of it."""
        assert self._socket is not None
        done = 0
        while done < len(view):
            count = self._socket.recv_into(view[done:])
            assert count, "the server ended the connection"
            done += count
            self.left -= count


class OneFile(pyfuse3.Operations):
    enable_writeback_cache = False

    def __init__(self, name: str, size: int, direct: bool) -> None:
        super().__init__()
        self._name = name.encode()
        self._size = size
        self._direct = direct

    async def lookup(self, parent_inode: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        if name != self._name:
            raise pyfuse3.FUSEError(2)
        return await self.getattr(FILE, ctx)

    async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFREG | 0o444 if inode == FILE else stat.S_IFDIR | 0o555
        entry.st_size = self._size if inode == FILE else 0
        entry.st_blksize = 1 << 20
        entry.attr_timeout = entry.entry_timeout = 3600
        return entry

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode, direct_io=self._direct, keep_cache=True)


class FromMemory(OneFile):
    def __init__(self, size: int, direct: bool) -> None:
        super().__init__("file", size, direct)
        self._content = memoryview(bytearray(b"x") * size)

    async def read(self, fh: int, off: int, size: int) -> object:
        return self._content[off : off + size]


class FromServer(OneFile):
    def __init__(self, url: str, direct: bool) -> None:
        self._link = Link(url)
        self._link.ask("0-0")
        super().__init__(url.rpartition("/")[2], self._link.size, direct)
        self._ring = memoryview(bytearray(RING))
        self._from = self._to = 0  # offsets in the file: what the ring holds

    async def read(self, fh: int, off: int, size: int) -> object:
        stop = min(off + size, self._size)
        if stop <= off:
            return b""
        if not self._from <= off <= self._to + AROUND:
            self._go_to(off, stop)
        while self._to < stop:
            if not self._link.left:
                self._go_to(off, stop)
                continue
            start = self._to % RING
            count = min(RING - start, stop - self._to)
            self._link.receive_into(self._ring[start : start + count])
            self._to += count
            self._from = max(self._from, self._to - RING)
        start, end = off % RING, (stop - 1) % RING + 1
        return self._ring[start:end] if start < end else bytes(self._ring[start:]) + bytes(self._ring[:end])

    def _go_to(self, off: int, stop: int) -> None:
        first = self._link.ask(f"{off}-{stop - 1}" if off and stop - off <= SMALL else f"{off}-")
        self._from = self._to = off
        start = off % RING
        count = min(len(first), RING - start)
        self._ring[start : start + count] = first[:count]
        self._ring[: len(first) - count] = first[count:]
        self._to += len(first)


def main() -> None:
    mountpoint, source, mode = sys.argv[1:]
    direct = mode == "direct"
    operations = FromMemory(int(source), direct) if source.isdecimal() else FromServer(source, direct)
    pyfuse3.init(operations, mountpoint, {"ro", "fsname=bare"})
    try:
        turns.install()
        trio.run(_serve, Path(mountpoint))
    finally:
        pyfuse3.close(unmount=True)


async def _serve(mountpoint: Path) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main, 99)
        await trio.to_thread.run_sync(mounting.tune, mountpoint)


if __name__ == "__main__":
    main()
