"""The comparisons. A case gives, for each contender, something to call that gives one figure."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchlib import contenders, work
from benchlib.contenders import Mounted, Streamfs
from benchlib.origin import LINK_RATE, ROUND_TRIP, Missing, Origin

Figure = Callable[[], float]
MEMORY = 256 * 1024 * 1024
"""The memory budget of the daemon that is measured: the default."""


@dataclass(frozen=True)
class Goal:
    """streamfs' figure over the peer's is to be at least (where more is better) or at most `factor`."""

    peer: str
    factor: float


@dataclass(frozen=True)
class Case:
    """`prepare` gives the contenders, streamfs among them; they are called in turns, round after round. `constants` are
    figures to compare with that are not measured."""

    key: str
    title: str
    unit: str
    goals: tuple[Goal, ...]
    prepare: Callable[[Bench, ExitStack], dict[str, Figure]]
    more_is_better: bool = True
    constants: tuple[tuple[str, float], ...] = ()


class Bench:
    """What the cases share: the origin and the mounts, made when first asked for."""

    def __init__(self, origin: Origin, scratch: Path, stack: ExitStack, quick: bool) -> None:
        self.origin = origin
        self.scratch = scratch
        self.quick = quick
        self._stack = stack
        self._made: dict[str, Mounted | Missing] = {}
        self.missing: dict[str, str] = {}  # peer -> what to install

    @property
    def streamfs(self) -> Streamfs:
        """With the defaults."""
        found = self._get("streamfs", lambda: contenders.mounted_streamfs(self.origin, self.scratch))
        assert isinstance(found, Streamfs)
        return found

    @property
    def roomy(self) -> Streamfs:
        """With memory enough to keep a whole part of the origin's file there."""
        options = (f"--memory={3 * self.origin.part_size}", f"--spill-threshold={3 * self.origin.part_size}")
        found = self._get("roomy", lambda: contenders.mounted_streamfs(self.origin, self.scratch, *options))
        assert isinstance(found, Streamfs)
        return found

    @property
    def through_curl(self) -> Streamfs:
        """With every URL through libcurl, which speaks HTTP/2 where the server does."""
        make = partial(contenders.mounted_streamfs, self.origin, self.scratch, transport="curl")
        found = self._get("through curl", make)
        assert isinstance(found, Streamfs)
        return found

    def rclone(self, kind: str = "plain") -> Mounted | None:
        return self._peer(f"rclone {kind}", lambda: contenders.mounted_rclone(self.origin, kind, self.scratch))

    def httpfs2(self) -> Mounted | None:
        return self._peer("httpfs2", lambda: contenders.mounted_httpfs2(self.origin, self.scratch))

    def memfs(self, mode: str) -> Mounted | None:
        size = self.origin.part_size
        return self._peer(f"memfs {mode}", lambda: contenders.mounted_memfs(size, mode, self.scratch))

    def bare(self, mode: str = "cached") -> Mounted | None:
        url = self.origin.url("plain", self.origin.big)
        return self._peer(f"bare {mode}", lambda: contenders.mounted_bare(url, mode, self.scratch))

    def bare_memory(self, mode: str) -> Mounted | None:
        size = self.origin.part_size
        return self._peer(f"bare memory {mode}", lambda: contenders.mounted_bare(size, mode, self.scratch))

    def _peer(self, key: str, make: Callable[[], object]) -> Mounted | None:
        try:
            return self._get(key, make)
        except Missing as missing:
            self.missing[key.split()[0]] = str(missing)
            return None

    def _get(self, key: str, make: Callable[[], object]) -> Mounted:
        if key not in self._made:
            try:
                self._made[key] = self._stack.enter_context(make())  # type: ignore[arg-type]
            except Missing as missing:
                self._made[key] = missing
        found = self._made[key]
        if isinstance(found, Missing):
            raise found
        return found


def _rate(size: int, seconds: float) -> float:
    return size / seconds / 1e6


def _read_cold(mounted: Mounted, name: str, size: int, how: Callable[[Path], float]) -> Figure:
    def read() -> float:
        mounted.cold(name)
        return _rate(size, how(mounted.path(name)))

    return read


def _with_peers(
    found: dict[str, Figure], *peers: tuple[Mounted | None, Callable[[Mounted], Figure]]
) -> dict[str, Figure]:
    for mounted, make in peers:
        if mounted is not None:
            found[mounted.name] = make(mounted)
    return found


def _sequential(
    kind: str, how: Callable[[Path], float], httpfs2: bool, *curl: str, through_curl: bool = False
) -> Callable[..., dict[str, Figure]]:
    def prepare(bench: Bench, stack: ExitStack) -> dict[str, Figure]:
        origin = bench.origin
        options = [*curl, *(["--cacert", str(origin.certificates.authority)] if kind in ("tls", "http2") else [])]
        url = origin.url(kind, origin.big)
        found: dict[str, Figure] = {
            "streamfs": _read_cold(
                bench.through_curl if through_curl else bench.streamfs, f"{kind}/{origin.big}", origin.size, how
            ),
            "curl": lambda: _rate(origin.size, work.curl(url, *options)),
        }

        def make(mounted: Mounted) -> Figure:
            return _read_cold(mounted, origin.big, origin.size, how)

        peers = [(bench.rclone(kind), make)]
        if httpfs2:
            peers.append((bench.httpfs2(), make))
            peers.append((bench.bare("direct" if how is work.dd_direct else "cached"), make))
        return _with_peers(found, *peers)

    return prepare


def _memory_cached(bench: Bench, stack: ExitStack) -> dict[str, Figure]:
    size, name = bench.origin.part_size, f"plain/{bench.origin.part}"
    work.dd(bench.roomy.path(name))

    def read(path: Path) -> float:
        contenders.drop_pages(path)
        return _rate(size, work.dd(path))

    found: dict[str, Figure] = {"streamfs": partial(read, bench.roomy.path(name))}
    return _from_memory(bench, "cached", found, lambda path: partial(read, path))


def _from_memory(
    bench: Bench, mode: str, found: dict[str, Figure], make: Callable[[Path], Figure]
) -> dict[str, Figure]:
    peers = (bench.memfs(mode), bench.bare_memory(mode))
    return _with_peers(found, *[(peer, lambda mounted: make(mounted.path("file"))) for peer in peers])


def _memory_direct(bench: Bench, stack: ExitStack) -> dict[str, Figure]:
    size = bench.origin.part_size
    bench.roomy.add("direct", "--", "cat", str(bench.origin.path(bench.origin.part)))
    bench.roomy.cold("direct")
    # While the length is unknown, an open file is direct, and stays so.
    fd = os.open(bench.roomy.path("direct"), os.O_RDONLY)
    stack.callback(os.close, fd)
    work.dd_open(fd)
    found: dict[str, Figure] = {"streamfs": lambda: _rate(size, work.dd_open(fd))}

    def make(path: Path) -> Figure:
        other = os.open(path, os.O_RDONLY)
        stack.callback(os.close, other)
        return lambda: _rate(size, work.dd_open(other))

    return _from_memory(bench, "direct", found, make)


def _spilled(bench: Bench, stack: ExitStack) -> dict[str, Figure]:
    size, name = bench.origin.part_size, f"plain/{bench.origin.part}"
    work.dd(bench.roomy.path(name))
    bench.streamfs.cold(name)
    work.dd(bench.streamfs.path(name))
    _until_spilled(bench.streamfs, size)

    def read(path: Path) -> float:
        contenders.drop_pages(path)
        return _rate(size, work.dd(path))

    read(bench.streamfs.path(name))  # from the disk: from now on the kernel has the pages of the cache's file
    return {
        "streamfs": partial(read, bench.streamfs.path(name)),
        "in memory": partial(read, bench.roomy.path(name)),
    }


def _until_spilled(mounted: Streamfs, size: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        taken = sum(entry.stat().st_blocks * 512 for entry in os.scandir(mounted.home / "cache"))
        if taken >= size - (8 << 20):
            return
        time.sleep(0.1)
    raise RuntimeError("the stream was not spilled within 30 s")


def _reread(bench: Bench, stack: ExitStack) -> dict[str, Figure]:
    size, path = bench.origin.part_size, bench.streamfs.path(f"plain/{bench.origin.part}")
    local = bench.scratch / "local"
    local.write_bytes(bench.origin.path(bench.origin.part).read_bytes())
    stack.callback(local.unlink)
    work.dd(path)
    work.dd(local)
    return {"streamfs": lambda: _rate(size, work.dd(path)), "local file": lambda: _rate(size, work.dd(local))}


def _random_cold(step: int) -> Callable[[Bench, ExitStack], dict[str, Figure]]:
    def prepare(bench: Bench, stack: ExitStack) -> dict[str, Figure]:
        origin = bench.origin
        seconds = 0.7 if bench.quick else 1.5

        def make(mounted: Mounted, name: str = origin.big) -> Figure:
            def read() -> float:
                mounted.cold(name)
                return work.random_reads(mounted.path(name), origin.size, step, seconds)

            return read

        found = {"streamfs": make(bench.streamfs, f"plain/{origin.big}")}
        return _with_peers(found, (bench.httpfs2(), make), (bench.rclone(), make), (bench.bare(), make))

    return prepare


def _random_memory(bench: Bench, stack: ExitStack) -> dict[str, Figure]:
    size, path = bench.origin.part_size, bench.roomy.path(f"plain/{bench.origin.part}")
    work.dd(path)

    def read(path: Path) -> float:
        contenders.drop_pages(path)
        return work.random_reads(path, size, 4096, 0.7 if bench.quick else 1.5)

    return _from_memory(bench, "cached", {"streamfs": partial(read, path)}, lambda path: partial(read, path))


def _first_byte(bench: Bench, stack: ExitStack) -> dict[str, Figure]:
    name = bench.origin.big

    def make(mounted: Mounted, name: str = name) -> Figure:
        def once() -> float:
            mounted.cold(name)
            return work.first_byte(mounted.path(name))

        return lambda: sorted(once() for _ in range(9))[4] * 1000

    found = {"streamfs": make(bench.streamfs, f"plain/{name}")}
    return _with_peers(found, (bench.httpfs2(), make), (bench.rclone(), make), (bench.bare(), make))


def _crowd(readers: int) -> Callable[[Bench, ExitStack], dict[str, Figure]]:
    def prepare(bench: Bench, stack: ExitStack) -> dict[str, Figure]:
        origin = bench.origin

        def make(mounted: Mounted, name: str = origin.part) -> Figure:
            return _read_cold(mounted, name, readers * origin.part_size, lambda path: work.crowd(path, readers))

        return _with_peers({"streamfs": make(bench.streamfs, f"plain/{origin.part}")}, (bench.rclone(), make))

    return prepare


def _crowd_bytes(readers: int) -> Callable[[Bench, ExitStack], dict[str, Figure]]:
    def prepare(bench: Bench, stack: ExitStack) -> dict[str, Figure]:
        origin, name = bench.origin, f"plain/{bench.origin.part}"

        def asked() -> float:
            bench.streamfs.cold(name)
            before = origin.bytes_sent()
            work.crowd(bench.streamfs.path(name), readers)
            bench.streamfs.cold(name)  # ends what is still connected; then it is in the log
            time.sleep(0.2)  # nginx writes its log when the request has ended, and says so to nobody
            return (origin.bytes_sent() - before) / origin.part_size

        return {"streamfs": asked}

    return prepare


def _far_sequential(bench: Bench, stack: ExitStack) -> dict[str, Figure]:
    origin = bench.origin
    # All of the file, but for a quick look: one connection takes ten seconds for a GiB.
    name, size = (origin.part, origin.part_size) if bench.quick else (origin.big, origin.size)
    url = origin.url("far", name)
    return {
        "streamfs": _read_cold(bench.streamfs, f"far/{name}", size, work.dd),
        "curl": lambda: _rate(size, work.curl(url)),
    }


def _far_seek(bench: Bench, stack: ExitStack) -> dict[str, Figure]:
    origin, name = bench.origin, f"far/{bench.origin.big}"

    def sought() -> float:
        bench.streamfs.cold(name)
        return work.seek(bench.streamfs.path(name), origin.size // 2 // 4096 * 4096) * 1000

    return {"streamfs": sought}


def _command(bench: Bench, stack: ExitStack) -> dict[str, Figure]:
    size = bench.origin.size
    bench.streamfs.add("command", "--", "head", "-c", str(size), "/dev/zero")
    line = f"head -c {size} /dev/zero | cat > /dev/null"
    return {
        "streamfs": _read_cold(bench.streamfs, "command", size, work.cat),
        "pipe": lambda: _rate(size, work.shell(line)),
    }


def _cpu(bench: Bench, stack: ExitStack) -> dict[str, Figure]:
    origin = bench.origin

    def make(mounted: Mounted, name: str = origin.big) -> Figure:
        def spent() -> float:
            mounted.cold(name)
            before = work.cpu_seconds(mounted.pid)
            work.dd(mounted.path(name))
            return (work.cpu_seconds(mounted.pid) - before) * (1 << 30) / origin.size

        return spent

    return _with_peers({"streamfs": make(bench.streamfs, f"plain/{origin.big}")}, (bench.rclone(), make))


def _resident(bench: Bench, stack: ExitStack) -> dict[str, Figure]:
    name = f"plain/{bench.origin.big}"

    def over() -> float:
        bench.streamfs.cold(name)
        work.crowd(bench.streamfs.path(name), 4)
        return (work.peak_memory(bench.streamfs.pid) - MEMORY) / (1 << 20)

    return {"streamfs": over}


_CURL_NINE = (Goal("curl", 0.9), Goal("rclone", 4), Goal("httpfs2", 4))
_CURL_HALF = (Goal("curl", 0.5), Goal("rclone", 2), Goal("httpfs2", 2))
_LIBCURL = (Goal("curl", 0.5), Goal("rclone", 2))
_RANDOM = (Goal("httpfs2", 1), Goal("rclone", 5))

CASES = (
    Case("dd", "cold sequential, `dd bs=1M`", "MB/s", _CURL_NINE, _sequential("plain", work.dd, True)),
    Case(
        "dd-direct",
        "the same, past the page cache, `iflag=direct`",
        "MB/s",
        _CURL_NINE,
        _sequential("plain", work.dd_direct, True),
    ),
    Case("cp", "cold sequential, `cp`", "MB/s", _CURL_HALF, _sequential("plain", work.cp, True)),
    Case("cat", "cold sequential, `cat`", "MB/s", _CURL_HALF, _sequential("plain", work.cat, True)),
    Case("sha256sum", "cold sequential, `sha256sum`", "MB/s", _CURL_HALF, _sequential("plain", work.sha256sum, True)),
    Case(
        "tls", "cold sequential over TLS, `dd bs=1M`", "MB/s", (Goal("curl", 0.8),), _sequential("tls", work.dd, False)
    ),
    Case(
        "http2",
        "a server that offers HTTP/2, `dd bs=1M`",
        "MB/s",
        _LIBCURL,
        _sequential("http2", work.dd, False, "--http2"),
    ),
    Case(
        "http2-libcurl",
        "the same, by HTTP/2 through libcurl",
        "MB/s",
        _LIBCURL,
        _sequential("http2", work.dd, False, "--http2", through_curl=True),
    ),
    Case("ftp", "ftp, `dd bs=1M`", "MB/s", _LIBCURL, _sequential("ftp", work.dd, False)),
    Case("memory-direct", "in the daemon's memory, direct", "MB/s", (Goal("C libfuse", 0.85),), _memory_direct),
    Case("memory-cached", "in the daemon's memory, cached", "MB/s", (Goal("C libfuse", 0.85),), _memory_cached),
    Case("spilled", "spilled to disk (page-cached)", "MB/s", (Goal("in memory", 0.7),), _spilled),
    Case("reread", "again, from the kernel's page cache", "MB/s", (Goal("local file", 0.95),), _reread),
    Case("random-4k", "random 4 KiB, cold", "reads/s", _RANDOM, _random_cold(4096)),
    Case("random-64k", "random 64 KiB, cold", "reads/s", _RANDOM, _random_cold(65536)),
    Case("random-memory", "random 4 KiB, in the daemon", "reads/s", (Goal("C libfuse", 0.65),), _random_memory),
    Case("first-byte", "open to first byte", "ms", (Goal("httpfs2", 1.1),), _first_byte, more_is_better=False),
    Case("crowd-16", "16 readers of one cold stream, all together", "MB/s", (Goal("rclone", 5),), _crowd(16)),
    Case("crowd-64", "64 readers of one cold stream, all together", "MB/s", (Goal("rclone", 5),), _crowd(64)),
    Case(
        "crowd-bytes",
        "the same: bytes asked of the origin, 64 readers",
        "times the file",
        (Goal("the file", 1.01),),
        _crowd_bytes(64),
        more_is_better=False,
        constants=(("the file", 1.0),),
    ),
    Case(
        "far-dd",
        f"a link of {ROUND_TRIP * 1000:.0f} ms and {LINK_RATE / 1e6:.0f} MB/s a connection, `dd bs=1M`",
        "MB/s",
        (Goal("curl", 3),),
        _far_sequential,
    ),
    Case(
        "far-seek",
        "the same: seek to first byte",
        "ms",
        (Goal("round trip", 1.3),),
        _far_seek,
        more_is_better=False,
        constants=(("round trip", ROUND_TRIP * 1000),),
    ),
    Case("command", "a command, `head -c … /dev/zero`, by `cat`", "MB/s", (Goal("pipe", 0.7),), _command),
    Case("cpu", "CPU of the daemon", "s/GiB", (Goal("rclone", 1),), _cpu, more_is_better=False),
    Case(
        "resident",
        "daemon's peak memory over the budget",
        "MiB",
        (Goal("allowance", 1),),
        _resident,
        more_is_better=False,
        constants=(("allowance", 64.0),),
    ),
)
